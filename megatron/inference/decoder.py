"""Key/value cached decoding with the autoregressive model."""

from __future__ import annotations

import torch

from megatron.inference.logits import Predictor
from megatron.model.batch import Inputs
from megatron.model.mask import Causal


class GrowingCache:
    """Keys and values of one attention layer, [batch, groups, seq, channels], grown in blocks: a new token costs one position
    instead of the whole sequence."""

    BLOCK = 256

    def __init__(self) -> None:
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new positions [batch, groups, new, channels]; returns all of them."""
        end = self.length + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            self._keys, self._values = self._grown(self._keys, keys, end), self._grown(self._values, values, end)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor, end: int) -> torch.Tensor:
        room = -(-end // self.BLOCK) * self.BLOCK
        new = like.new_empty(like.shape[0], like.shape[1], room, like.shape[3])
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new


class CachedDecoder:
    """A causal model that remembers what it was fed (see ``autoregressive.Decoder``)."""

    def __init__(self, model: Predictor) -> None:
        self.model = model
        self.caches = [GrowingCache() for _ in model.layers]

    def feed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Append ``input_ids`` [batch, new], first a prompt, then single tokens; logits of the last one [batch, vocab]."""
        last = torch.zeros_like(input_ids, dtype=torch.bool)
        last[:, -1] = True
        return self.model.logits(Inputs(input_ids), Causal(), positions=last, caches=self.caches)
