"""Rotary position embedding, rotate-half form over all channels of a head (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin, fp32, grown on demand; not part of the state dict."""

    def __init__(self, *, channels: int, length: int, base: float) -> None:
        super().__init__()
        self.channels, self.base = channels, base
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._fill(length, torch.device("cpu"))

    def _fill(self, length: int, device: torch.device) -> None:
        # fp64 angles: at position 4096 an fp32 product is off by up to 2e-4 radians.
        exponent = torch.arange(0, self.channels, 2, dtype=torch.float64, device=device) / self.channels
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * self.base**-exponent
        angles = torch.cat((angles, angles), dim=-1)  # [length, channels]
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follow the module to its device but stay fp32: in bf16 the angles of distant positions collapse."""
        super()._apply(fn, recurse)
        self._fill(self.cos.shape[0], self.cos.device)
        return self

    def forward(self, length: int, position_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, broadcastable to [batch, heads, seq, channels].

        Args:
            length: positions 0 … length − 1 when ``position_ids`` is None.
            position_ids: [batch, seq] int64 positions of each token, below the table's length.
        """
        if position_ids is None:
            if length > self.cos.shape[0]:
                self._fill(length, self.cos.device)
            return self.cos[:length], self.sin[:length]
        return self.cos[position_ids].unsqueeze(1), self.sin[position_ids].unsqueeze(1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` [batch, heads, seq, channels]: ``x·cos + rotate_half(x)·sin``, in fp32, back in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)
