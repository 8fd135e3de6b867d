"""Losses of a linear head over a split vocabulary that never holds all logits.

The head is the largest matrix product of a small model and its fp32 logits the largest tensor. Rows are processed in
chunks; every chunk makes its logits, its loss and, when training, its gradients at once, so the logits are computed
once and [rows, vocab] never exists. The gradient of a token's loss with respect to its logits (for cross-entropy
``weight · (softmax − onehot)``) needs nothing from the backward pass but the scale of the scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx

from megatron.parallel.context import ParallelContext

# Rows of one chunk: 256 x 50,304 fp32 logits are 50 MB, small enough to stay out of the way and large enough to keep the
# matrix products efficient (measured on CPU: 128 to 512 rows are within the noise, 32 rows cost 50 % more).
CHUNK_ROWS = {"cpu": 256, "cuda": 8192}

# A kind of row loss: this rank's logits [chunk, vocab / tp] in the dtype of the model, which it may overwrite, and which
# rows they are → losses [chunk] in fp32 or more, and their derivatives by the logits [chunk, vocab / tp] in any dtype.
RowLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor,
    context: ParallelContext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of ``−log softmax(hidden · weightᵀ)[label]``; see :func:`linear_loss`.

    Args:
        hidden: [rows, hidden], the same on every tensor-parallel rank.
        weight: [vocab / tp, hidden], this rank's rows of the output matrix.
        labels: [rows] int64, ids in the whole vocabulary.
        loss_weights: [rows] fp32, no gradient.
        context: this process.
    """

    def cross_entropy(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _softmax_errors(logits, labels[rows], context)

    return linear_loss(hidden, weight, cross_entropy, loss_weights, context)


def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    row_loss: RowLoss,
    loss_weights: torch.Tensor,
    context: ParallelContext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of a loss of the logits ``hidden · weightᵀ``.

    Args:
        hidden: [rows, hidden], the same on every tensor-parallel rank.
        weight: [vocab / tp, hidden], this rank's rows of the output matrix.
        row_loss: losses of some rows, and their derivatives by the logits.
        loss_weights: [rows] fp32, no gradient.
        context: this process.

    Returns:
        loss: scalar fp32, Σ loss_weights · loss, differentiable in ``hidden`` and ``weight``.
        losses: [rows] fp32, unweighted, in nats, detached.
    """
    # Inside an autograd function gradients are always off, so it is told whether any will be asked for.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearLoss.apply(hidden, weight, row_loss, loss_weights, context, needs_grad)


class _Kept(FunctionCtx):
    """What the loss keeps from its forward for its backward pass: gradients for a loss gradient of one."""

    weight_dtype: torch.dtype
    saved_tensors: tuple[torch.Tensor, ...]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Kept,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        row_loss: RowLoss,
        loss_weights: torch.Tensor,
        context: ParallelContext,
        needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=sums, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if needs_grad else None
        chunk_rows = CHUNK_ROWS.get(hidden.device.type, 256)
        buffer = hidden.new_empty(min(chunk_rows, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            # One buffer for all chunks: a fresh one would be mapped and cleared by the kernel page by page.
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: hidden[rows].shape[0]])
            losses[rows], errors = row_loss(logits, rows)
            if grad_hidden is not None and grad_weight is not None:
                errors = errors.to(hidden.dtype)
                scale = loss_weights[rows].unsqueeze(-1)
                torch.mm(errors, weight, out=grad_hidden[rows]).mul_(scale)
                _add_product(grad_weight, errors.t(), (hidden[rows] * scale).to(hidden.dtype))
        if grad_hidden is not None and grad_weight is not None:
            if context.tp.size > 1:  # each rank has the part of the gradient that flows through its own columns
                dist.all_reduce(grad_hidden, group=context.tp.group)
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    def backward(
        ctx: _Kept, grad_loss: torch.Tensor, _grad_losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The buffers belong to this call alone, so they are scaled in place.
        grad_hidden = grad_hidden.mul_(grad_loss.to(grad_hidden.dtype))
        grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _softmax_errors(
    logits: torch.Tensor, labels: torch.Tensor, context: ParallelContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy [rows], and ``softmax − onehot`` [rows, vocab / tp] in the dtype of the logits, written over them."""
    local = labels - context.tp.rank * logits.shape[1]
    is_here = (local >= 0) & (local < logits.shape[1])
    column = torch.where(is_here, local, -1).unsqueeze(-1)
    if context.tp.size == 1 and not logits.is_cuda and logits.dtype != torch.bfloat16:
        # The fused kernel keeps a row in cache over its three passes.
        torch.ops.aten._log_softmax.out(logits, -1, False, out=logits)
        ce = -logits.gather(-1, column).squeeze(-1)
        return ce, logits.exp_().scatter_add_(-1, column, -torch.ones_like(column, dtype=logits.dtype))
    softmax_parts, write_errors = _passes(logits.device.type)
    maximum, total, target = softmax_parts(logits, column)
    if context.tp.size > 1:
        highest = maximum.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=context.tp.group)
        sums = torch.stack((total * (maximum - highest).exp(), target))
        dist.all_reduce(sums, group=context.tp.group)
        maximum, (total, target) = highest, sums
    write_errors(logits, column, maximum, total)
    return total.log() + maximum - target, logits


def _softmax_parts(logits: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row m = max l, Σ exp(l − m), and l at the column or 0 where that is −1: [rows] each, fp32 or more.

    Compiled, one pass that reads the logits once.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maximum = wide.amax(-1)
    total = (wide - maximum.unsqueeze(-1)).exp().sum(-1)
    target = wide.gather(-1, column.clamp(min=0)).masked_fill(column < 0, 0.0).squeeze(-1)
    return maximum, total, target


def _write_errors(logits: torch.Tensor, column: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor) -> None:
    """``exp(l − m)/Σ − onehot`` over the logits. Compiled, one pass that reads and writes them once."""
    wide = logits.to(maximum.dtype)
    softmax = (wide - maximum.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    is_label = torch.arange(logits.shape[1], device=logits.device) == column
    logits.copy_(softmax - is_label.to(softmax.dtype))


Tensors = tuple[torch.Tensor, ...]


@cache
def _passes(device: str) -> tuple[Callable[..., Tensors], Callable[..., None]]:
    """:func:`_softmax_parts` and :func:`_write_errors`; on a GPU each is one compiled kernel for any number of rows. The
    vocabulary is a constant of it, so that loads are as wide as they can be."""
    if device != "cuda":
        return _softmax_parts, _write_errors
    parts, errors = torch.compile(_softmax_parts), torch.compile(_write_errors)

    def with_any_rows(*tensors: torch.Tensor) -> Tensors:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return tensors

    return lambda *tensors: parts(*with_any_rows(*tensors)), lambda *tensors: errors(*with_any_rows(*tensors))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left · right`` in the precision of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
