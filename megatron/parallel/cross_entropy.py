"""Losses of a linear head over a split vocabulary that never holds all logits.

The head is the largest matrix product of a small model and its fp32 logits the largest tensor. Rows are processed in
chunks; every chunk makes its logits, its loss and, when training, its gradients at once, so the logits are computed
once and [rows, vocab] never exists. The gradient of a token's loss with respect to its logits (for cross-entropy
``weight · (softmax − onehot)``) needs nothing from the backward pass but the scale of the scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron.parallel.context import ParallelContext

# Rows of one chunk: 256 x 50,304 fp32 logits are 50 MB, small enough to stay out of the way and large enough to keep the
# matrix products efficient (measured on CPU: 128 to 512 rows are within the noise, 32 rows cost 50 % more).
CHUNK_ROWS = {"cpu": 256, "cuda": 4096}

# A kind of row loss: this rank's logits [chunk, vocab / tp] in fp32 or more, which it may overwrite, and which rows they
# are → losses [chunk], and their derivatives by the logits [chunk, vocab / tp].
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


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, row_loss, loss_weights, context, needs_grad):  # type: ignore[no-untyped-def]
        sums = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=sums, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if needs_grad else None
        chunk_rows = CHUNK_ROWS.get(hidden.device.type, 256)
        buffer = hidden.new_empty(min(chunk_rows, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            # One buffer for all chunks: a fresh one would be mapped and cleared by the kernel page by page.
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: hidden[rows].shape[0]]).to(sums)
            losses[rows], errors = row_loss(logits, rows)
            if grad_hidden is not None and grad_weight is not None:
                errors = errors.to(hidden.dtype)
                scale = loss_weights[rows].unsqueeze(-1).to(hidden.dtype)
                torch.mm(errors, weight, out=grad_hidden[rows]).mul_(scale)
                _add_product(grad_weight, errors.t(), hidden[rows] * scale)
        if grad_hidden is not None and grad_weight is not None:
            if context.tp.size > 1:  # each rank has the part of the gradient that flows through its own columns
                dist.all_reduce(grad_hidden, group=context.tp.group)
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    def backward(ctx, grad_loss, _grad_losses):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        # The buffers belong to this call alone, so they are scaled in place.
        grad_hidden = grad_hidden.mul_(grad_loss.to(grad_hidden.dtype))
        grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _softmax_errors(
    logits: torch.Tensor, labels: torch.Tensor, context: ParallelContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy [rows] and ``softmax − onehot`` [rows, vocab / tp], fp32, written over the logits."""
    local = labels - context.tp.rank * logits.shape[1]
    is_here = (local >= 0) & (local < logits.shape[1])
    column = local.clamp(0, logits.shape[1] - 1).unsqueeze(-1)
    if context.tp.size == 1:
        # The fused kernel keeps a row in cache over its three passes.
        torch.ops.aten._log_softmax.out(logits, -1, False, out=logits)
        ce = -logits.gather(-1, column).squeeze(-1)
        errors = logits.exp_()
    else:
        maximum = logits.max(dim=-1).values
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=context.tp.group)
        target = (logits.gather(-1, column).squeeze(-1) - maximum) * is_here
        errors = logits.sub_(maximum.unsqueeze(-1)).exp_()
        sums = torch.stack((errors.sum(dim=-1), target))
        dist.all_reduce(sums, group=context.tp.group)
        ce = sums[0].log() - sums[1]
        errors.div_(sums[0].unsqueeze(-1))
    return ce, errors.scatter_add_(-1, column, -is_here.unsqueeze(-1).float())


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left · right`` in the precision of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
