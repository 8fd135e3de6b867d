"""The fragments in torch's sharded parameters: rows of each tensor, as equal in number as ``torch.chunk`` makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron.parallel.context import ParallelContext
from megatron.training.shards import Place, Shards


class RowShards(Shards):
    """Fragments of rows: a master is this rank's part of one parameter."""

    def __init__(
        self,
        own: Mapping[torch.nn.Parameter, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        context: ParallelContext,
        *,
        regather: Callable[[], None],
        ema_decay: float | None = None,
    ) -> None:
        """Args:
        own: this rank's rows of each sharded parameter, in its memory; none where there are fewer rows than ranks.
        optimizer: steps on them.
        context: this process.
        regather: makes the model gather its weights again.
        ema_decay: of the average of the weights; None: none is kept.
        """
        self._own, self._regather = own, regather
        super().__init__(list(own), optimizer, context, ema_decay=ema_decay)

    def masters(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """This rank's rows, by group."""
        return [(master, group) for group in self.optimizer.param_groups for master in group["params"]]

    def locate(self, parameter: torch.nn.Parameter) -> Place | None:
        """All of its own master."""
        master, whole = self._own[parameter], parameter.shape
        first = self.context.dp.rank * ceil(whole[0] / self.context.dp.size)
        return Place(master, first * whole[1:].numel(), 0, master.numel()) if master.numel() else None

    def refresh(self) -> None:
        """Drop weights that were gathered before; the next pass gathers the new ones."""
        self._regather()


def own_rows(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """This rank's rows of a sharded parameter as a plain one, in the same memory and with the same record."""
    assert isinstance(parameter, DTensor)
    rows = torch.nn.Parameter(parameter.to_local().detach())
    rows.__dict__.update(shard=parameter.__dict__["shard"])
    return rows
