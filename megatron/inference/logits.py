"""What samplers and scorers ask of a model."""

from __future__ import annotations

from typing import Protocol

import torch


class LogitsFn(Protocol):
    """The model, as far as this package knows it."""

    def __call__(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of ``input_ids`` [batch, seq] int64: [batch, seq, vocab], or [selected, vocab] (row-major order) with
        ``positions`` [batch, seq] bool."""
        ...
