"""What a rank holds of weights and optimizer state, as fragments: the bridge between an engine and the layout-free checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megatron.checkpoint.files import AVERAGE_UPDATES, Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.config.schema import AVERAGE, WEIGHT
from megatron.errors import UserError
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec, shard_of
from megatron.training.optimizer import MOMENTS

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
        skipped = skipped.to(self.num_updates.device)  # elsewhere only where the optimizer is in host memory
        # 1 − d itself: fp32 has no d so near to 1.
        share = (9 / (10 + self.num_updates)).clamp(min=1 - self.decay).masked_fill(skipped, 0.0)
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


class Place(NamedTuple):
    """Where this rank holds a range of a parameter.

    Attributes:
        master: fp32 tensor that has it; the optimizer steps on it.
        start: first element of the parameter that is there.
        offset: where in the master it is, both in memory order.
        numel: elements.
    """

    master: torch.Tensor
    start: int
    offset: int
    numel: int


class Shards(ABC):
    """Fragments of one rank's model and optimizer. The ranges that masters have of parameters are the fragments, so saving moves
    nothing between ranks and loading writes in place.

    Attributes:
        parameters: of this rank, each once.
        optimizer: torch's, which steps on the masters.
        average: of the weights, where one is kept.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        context: ParallelContext,
        *,
        ema_decay: float | None = None,
    ) -> None:
        """Args:
        parameters: of the model or this rank's pipeline stage.
        optimizer: steps on the masters.
        context: this process.
        ema_decay: of the average of the weights; None: none is kept.
        """
        self.parameters, self.optimizer, self.context = parameters, optimizer, context
        masters = [master for master, _ in self.masters()]
        self.average = None if ema_decay is None else Average(masters, ema_decay)

    @abstractmethod
    def masters(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """This rank's fp32 masters, each with its group of the optimizer."""

    @abstractmethod
    def locate(self, parameter: torch.nn.Parameter) -> Place | None:
        """Where this rank holds its range of a parameter; None where it holds nothing of it."""

    @abstractmethod
    def refresh(self) -> None:
        """Give the model the masters to compute with, after they were changed; a collective call."""

    def specs(self) -> dict[str, ShardSpec]:
        """Shape and split of every tensor on this rank, by canonical name."""
        return {record.name: record.spec for record in map(shard_of, self.parameters)}

    def speaks_for(self, parameter: torch.nn.Parameter) -> bool:
        """Whether this rank, of those tensor-parallel ranks and stages that have the same of a parameter, is the first."""
        return shard_of(parameter).spec.dim is not None or self.context.tp.rank == 0

    def fragments_to_save(self) -> list[Fragment]:
        """What this rank alone must write: of a tensor that several ranks hold, the first one's."""
        return [
            fragment
            for parameter in self.parameters
            if self.speaks_for(parameter)
            for fragment in self._fragments(parameter)
        ]

    def load(self, reader: CheckpointReader, *, with_optimizer: bool) -> None:
        """Overwrite weights, and with them moments, step count and average, from a checkpoint of any layout. An average that is
        not there starts from the weights.

        Raises:
            UserError: tensors are missing from the checkpoint or have other shapes.
        """
        for name, spec in self.specs().items():
            saved = reader.specs.get(name)
            if saved is None or saved.full_shape != spec.full_shape:
                found = "no such tensor" if saved is None else f"shape {saved.full_shape}"
                raise UserError(
                    f"checkpoint {reader.path}: {name}: {found}, this model has {spec.full_shape}",
                    "architectures must be equal",
                    "pass the model flags of the checkpoint (see its manifest.json)",
                )
        if with_optimizer:
            self._create_moments(int(reader.manifest["optimizer_steps"]))
        is_averaged = with_optimizer and AVERAGE_UPDATES in reader.manifest
        wanted = {WEIGHT: True, AVERAGE: is_averaged}
        for parameter in self.parameters:
            for fragment in self._fragments(parameter):
                if wanted.get(fragment.kind, with_optimizer):
                    reader.read(fragment)
        self.refresh()
        if self.average is not None and is_averaged:
            self.average.num_updates.fill_(int(reader.manifest[AVERAGE_UPDATES]))
        elif self.average is not None:
            self.average.restart()

    def updates(self) -> dict[str, int]:
        """Updates so far, of the weights and of their average, as the manifest counts them; skipped steps make none."""
        steps = next((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), 0)
        averaged = {} if self.average is None else {AVERAGE_UPDATES: int(self.average.num_updates)}
        return {"optimizer_steps": steps, **averaged}

    def exchange(self) -> None:
        """Give the model the averaged weights, or those that it had back; a collective call."""
        assert self.average is not None
        self.average.exchange()
        self.refresh()

    def _fragments(self, parameter: torch.nn.Parameter) -> Iterator[Fragment]:
        """What this rank holds of a parameter, of every kind."""
        place = self.locate(parameter)
        if place is None:
            return
        whole, tp = shard_of(parameter), self.context.tp
        tp_rank, tp_size = (tp.rank, tp.size) if whole.spec.dim is not None else (0, 1)
        for kind, source in self._held(place.master).items():
            data = source.detach().view(-1).narrow(0, place.offset, place.numel)
            yield Fragment(kind, whole.name, tp_rank, tp_size, place.start, data)

    def _held(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """A master and what is kept beside it, by kind."""
        state = self.optimizer.state.get(master, {})
        moments = {kind: state[kind] for kind in MOMENTS if kind in state}
        return {WEIGHT: master, **moments, **({} if self.average is None else {AVERAGE: self.average.of(master)})}

    def _create_moments(self, steps: int) -> None:
        """Give every master the state that ``steps`` updates would have left, still zero."""
        if steps == 0:
            return
        for master, group in self.masters():
            # Fused AdamW keeps the step beside the parameters.
            step = torch.tensor(float(steps), dtype=torch.float32, device=master.device)
            self.optimizer.state[master] = {
                "step": step,
                **{kind: torch.zeros_like(master) for kind in group["moments"]},
            }
        for group in self.optimizer.param_groups:
            if "step" in group:  # apex counts per group
                group["step"] = steps
