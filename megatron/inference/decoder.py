"""Key/value cached decoding with the autoregressive model."""

from __future__ import annotations

import torch

from megatron.model.batch import Inputs
from megatron.model.cache import LayerCache
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal


class CachedDecoder:
    """A causal GPTModel that remembers what it was fed (see ``autoregressive.Decoder``)."""

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self.caches = [LayerCache() for _ in model.layers]

    def feed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Append ``input_ids`` [batch, new], first a prompt, then single tokens; logits of the last one [batch, vocab]."""
        last = torch.zeros_like(input_ids, dtype=torch.bool)
        last[:, -1] = True
        return self.model.logits(Inputs(input_ids), Causal(), positions=last, caches=self.caches)
