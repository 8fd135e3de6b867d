"""A model of blocks, asked about whole texts at once, or block after block with the keys and values of finished blocks."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from megatron.inference.decoder import GrowingCache
from megatron.inference.logits import Predictor
from megatron.model.batch import Inputs
from megatron.model.mask import BlockDiffusion, Full


class BlockLogitsFn(Protocol):
    """A model of blocks, as far as samplers and scorers know it."""

    def __call__(
        self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None, clean: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As :class:`megatron.inference.logits.LogitsFn`, each block given the blocks before it of ``clean`` [batch, seq];
        None: of ``input_ids`` themselves, whose blocks before the wanted positions are then finished ones."""


class BlockModel:
    """All blocks in one pass over [noised; clean], as in training. Rows may end within a block: its rest is masked.

    Args:
        model: trained by block diffusion.
        mask: of that training.
        mask_id: id of the mask token.
    """

    def __init__(self, model: Predictor, mask: BlockDiffusion, *, mask_id: int) -> None:
        self.model, self.mask, self.mask_id = model, mask, mask_id

    def __call__(
        self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None, clean: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`BlockLogitsFn`."""
        wanted = torch.ones_like(input_ids, dtype=torch.bool) if positions is None else positions
        missing = -input_ids.shape[1] % self.mask.size
        copies = [
            F.pad(ids, (0, missing), value=self.mask_id) for ids in (input_ids, input_ids if clean is None else clean)
        ]
        both = torch.cat(copies, dim=1)
        places = torch.arange(both.shape[1] // 2, device=both.device).repeat(2).expand(both.shape)
        wanted = F.pad(wanted, (0, both.shape[1] - wanted.shape[1]))
        found = self.model.logits(Inputs(both, places), self.mask, positions=wanted)
        return found if positions is not None else found.view(*input_ids.shape, -1)

    def filling(self) -> CachedBlocks:
        """A fresh memory for one batch of rows that is filled from left to right."""
        return CachedBlocks(self.model, self.mask, mask_id=self.mask_id)


class CachedBlocks:
    """A LogitsFn that remembers finished blocks: a pass costs the positions of the block that it asks about.

    The tokens before that block are compared with those whose keys and values are there, and what is new or differs is
    fed once. So it answers rightly in any order of questions, and cheaply where blocks follow each other.
    """

    def __init__(self, model: Predictor, mask: BlockDiffusion, *, mask_id: int) -> None:
        self.model, self.mask, self.mask_id = model, mask, mask_id
        self._forget()

    def __call__(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [selected, vocab] of ``positions`` [batch, seq] bool, all in one block; the blocks before it are finished."""
        assert positions is not None, "one pass is about one block"
        columns, size = positions.any(0).nonzero(), self.mask.size
        start = int(columns[0]) // size * size
        assert int(columns[-1]) < start + size, "one pass is about one block"
        self._hold(input_ids[:, :start])
        own, wanted = input_ids[:, start : start + size], positions[:, start : start + size]
        rest = (0, size - own.shape[1])
        block = Inputs(F.pad(own, rest, value=self.mask_id))
        logits = self.model.logits(block, Full(), positions=F.pad(wanted, rest), caches=self._caches)
        self._rewind(start)
        return logits

    def _forget(self) -> None:
        self._caches = [GrowingCache() for _ in self.model.layers]
        self._held = torch.empty(0, 0, dtype=torch.int64)

    def _hold(self, prefix: torch.Tensor) -> None:
        """Make the caches hold ``prefix`` [batch, whole blocks]."""
        if self._held.shape[0] != prefix.shape[0]:
            self._forget()
            self._held = prefix[:, :0]
        width = min(self._held.shape[1], prefix.shape[1])
        same = (self._held[:, :width] == prefix[:, :width]).all(0)
        known = int(same.long().cumprod(0).sum()) // self.mask.size * self.mask.size
        self._rewind(known)
        if known < prefix.shape[1]:
            self.model.hidden_states(Inputs(prefix[:, known:]), self.mask.clean, self._caches)
        self._held = prefix.clone()

    def _rewind(self, length: int) -> None:
        for cache in self._caches:
            cache.length = length
