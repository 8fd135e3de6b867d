"""The exponential moving average of the weights (``--ema-decay``), kept in fp32 beside the optimizer's masters."""

from __future__ import annotations

import torch


class Average:
    """Average of this rank's partitions of the fp32 masters: 4 bytes a parameter, shared by the data-parallel ranks.

    The n-th update, n from 0, is ``average = d · average + (1 − d) · weights`` with ``d = min(decay, (1 + n) / (10 + n))``. The
    ramp, of TensorFlow's ``ExponentialMovingAverage``, makes the window grow with the run until it is that of the decay, about
    1 / (1 − decay) updates, so that the initial weights, from which the average starts, are soon forgotten.

    Attributes:
        decay: --ema-decay.
        num_updates: updates so far, n of the next one.
    """

    def __init__(self, masters: list[torch.Tensor], decay: float) -> None:
        """Args:
        masters: this rank's flat partitions, fp32; the average starts as a copy of them.
        decay: limit of d.
        """
        self.decay, self.num_updates = decay, 0
        self._averages = {master: master.detach().clone() for master in masters}

    def of(self, master: torch.Tensor) -> torch.Tensor:
        """The average of one partition."""
        return self._averages[master]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of this moment in. Nothing waits for the device."""
        kept = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_([*self._averages.values()], [*self._averages], 1 - kept)
        self.num_updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights of this moment."""
        for master, average in self._averages.items():
            average.copy_(master)
        self.num_updates = 0

    def exchange(self) -> None:
        """Let masters and averages change places: their memory does, nothing is copied, and doing it again undoes it exactly."""
        for master, average in self._averages.items():
            master.data, average.data = average.data, master.data
