"""Optional accelerators: FlashAttention 3 and 4 behind PyTorch's own attention, liger-kernel for SwiGLU.

They are asked for by flag and never required: a checkpoint trained with them loads on a laptop. liger-kernel falls back to
PyTorch where it cannot run. FlashAttention is a switch of PyTorch for the whole process, so who asks for it where it would
have no effect is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn import attention

from megatron.config.option import PACKAGES, is_installed
from megatron.errors import UserError, require
from megatron.model.mask import AttentionMask, Causal, Full


class Flash(NamedTuple):
    """A FlashAttention: its name in PyTorch, the major compute capabilities that PyTorch gives it to, and its largest head."""

    name: str
    majors: tuple[int, ...]
    channels: int


FLASH = {"fa3": Flash("FA3", (9,), 256), "fa4": Flash("FA4", (9, 10), 128)}


def flash_obstacle(backend: str) -> str | None:
    """What keeps a FlashAttention from this machine; None: nothing that can be seen before it is switched on."""
    flash = FLASH[backend]
    if flash.name not in getattr(attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} has no switch to it"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major not in flash.majors:
        return f"the device has compute capability {major}.{minor}, and it runs on {' and '.join(f'{m}.x' for m in flash.majors)}"
    return None if is_installed(backend) else f"the package {PACKAGES[backend]} is not installed"


def check_flash(backend: str, mask: AttentionMask, *, head_size: int) -> None:
    """Check that a FlashAttention would have an effect, and can be had; "sdpa" always can.

    Args:
        backend: value of ``--attention-backend``.
        mask: kind of the training.
        head_size: channels of a head.

    Raises:
        UserError: it takes no such mask or heads, or this machine does not have it.
    """
    if backend not in FLASH:
        return
    given, name = f"--attention-backend {backend}", FLASH[backend].name
    require(
        isinstance(mask, Causal | Full),
        f"{given} would have no effect: attention of this training is {type(mask).__name__}",
        "causal and full attention over whole samples are its own; all other masks are compiled into FlexAttention",
        "drop the flag",
    )
    largest = FLASH[backend].channels
    require(head_size <= largest, f"{given} with heads of {head_size}", f"{name} takes at most {largest}", "drop it")
    obstacle = flash_obstacle(backend)
    fix = "pass it where the line FlashAttention of `megatron doctor` has it, or drop it"
    require(obstacle is None, f"{given}, but {obstacle}", f"{name} is a kernel for some GPUs", fix)


@contextmanager
def attention_kernels(backend: str) -> Iterator[None]:
    """Let scaled_dot_product_attention use the kernels of ``--attention-backend`` within the block, in this process.

    On compute capabilities 9.0 and 10.0 PyTorch prefers cuDNN's kernel to any FlashAttention, so that is switched off.

    Raises:
        UserError: the package is there, and PyTorch cannot use it.
    """
    if backend not in FLASH:
        yield
        return
    has_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        attention.activate_flash_attention_impl(FLASH[backend].name)
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        given = f"--attention-backend {backend}: torch {torch.__version__} cannot use {PACKAGES[backend]} ({error})"
        raise UserError(given, "both must fit each other", "install another version of it, or drop the flag") from error
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn)
        attention.restore_flash_attention_impl()


def silu_mul(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
    """``silu(gate) · up``; liger-kernel does it in one pass and keeps no product for the backward pass."""
    if backend == "liger" and gate.is_cuda and is_installed(backend):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())
    return F.silu(gate) * up
