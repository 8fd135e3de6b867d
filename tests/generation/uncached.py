"""The reference of the cached decoder."""

from __future__ import annotations

import torch

from megatron.inference.logits import LogitsFn


class UncachedDecoder:
    """Runs the whole sequence again for every token: slow, and the reference for the cached one."""

    def __init__(self, logits_fn: LogitsFn) -> None:
        self.logits_fn = logits_fn
        self.tokens: torch.Tensor | None = None

    def feed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See :class:`megatron.generation.autoregressive.Decoder`."""
        self.tokens = input_ids if self.tokens is None else torch.cat((self.tokens, input_ids), dim=1)
        last = torch.zeros_like(self.tokens, dtype=torch.bool)
        last[:, -1] = True
        return self.logits_fn(self.tokens, positions=last)
