"""Optional accelerators, each with PyTorch as its fallback: flash-attn for attention, liger-kernel for SwiGLU.

They are asked for by flag and never required. Where a kernel cannot run (no package, no CUDA tensor, fp32), the call falls
back, so a checkpoint trained with them loads on a laptop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron.config.option import is_installed


def can_flash(query: torch.Tensor) -> bool:
    """Whether flash-attn takes these tensors: CUDA, 16 bits, up to 256 channels a head."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] <= 256 and is_installed("flash-attn")


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, dropout: float
) -> torch.Tensor:
    """Attention by the flash-attn package: [batch, heads, seq, channels] in and out; keys may have fewer heads."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # its layout is [batch, seq, heads, channels]
    return flash_attn_func(query, key, value, dropout_p=dropout, causal=causal).transpose(1, 2)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
    """``silu(gate) · up``; liger-kernel does it in one pass and keeps no product for the backward pass."""
    if backend == "liger" and gate.is_cuda and is_installed(backend):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())
    return F.silu(gate) * up
