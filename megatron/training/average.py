"""The exponential moving average of the weights (``--ema-decay``), kept in fp32 beside the optimizer's masters."""

from __future__ import annotations

import torch

# Elements that change places at a time: so much is in memory twice.
EXCHANGED = 1 << 24


class Average:
    """Average of this rank's part of the fp32 masters: 4 bytes a parameter, shared by the data-parallel ranks.

    The n-th update, n from 0, is ``average = d · average + (1 − d) · weights`` with ``d = min(decay, (1 + n) / (10 + n))``. The
    ramp, of TensorFlow's ``ExponentialMovingAverage``, makes the window grow with the run until it is that of the decay, about
    1 / (1 − decay) updates, so that the initial weights, from which the average starts, are soon forgotten.

    Attributes:
        decay: --ema-decay.
        num_updates: [] int64 on the device, updates so far: n of the next one.
    """

    def __init__(self, masters: list[torch.Tensor], decay: float) -> None:
        """Args:
        masters: what this rank has of the weights, fp32; the average starts as a copy of them.
        decay: limit of d.
        """
        self.decay = decay
        self._averages = {master: master.detach().clone() for master in masters}
        self.num_updates = torch.zeros((), dtype=torch.int64, device=masters[0].device)

    def of(self, master: torch.Tensor) -> torch.Tensor:
        """The average of one master."""
        return self._averages[master]

    @torch.no_grad()
    def update(self, skipped: torch.Tensor) -> None:
        """Take the weights of this moment in. Nothing waits for the device.

        Args:
            skipped: [] bool on the device, whether the step left the weights as they were; then there is no update.
        """
        kept = ((1 + self.num_updates) / (10 + self.num_updates)).clamp(max=self.decay)
        skipped = skipped.to(self.num_updates.device)  # elsewhere only where the optimizer is in host memory
        share = (1 - kept).masked_fill(skipped, 0.0)
        torch._foreach_lerp_([*self._averages.values()], [*self._averages], [share] * len(self._averages))
        self.num_updates += ~skipped

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights of this moment."""
        for master, average in self._averages.items():
            average.copy_(master)
        self.num_updates.zero_()

    @torch.no_grad()
    def exchange(self) -> None:
        """Let masters and averages change places; doing it again undoes it exactly. Every tensor stays where it is in memory,
        because engines know their masters by it."""
        for master, average in self._averages.items():
            for one, other in zip(master.view(-1).split(EXCHANGED), average.view(-1).split(EXCHANGED)):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
