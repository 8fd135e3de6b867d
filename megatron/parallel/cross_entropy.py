"""Cross-entropy of a linear head over a split vocabulary that never holds all logits.

The head is the largest matrix product of a small model and its fp32 logits the largest tensor. Rows are processed in
chunks; every chunk makes its logits, its loss and, when training, its gradients at once, so the logits are computed
once and [rows, vocab] never exists. The gradient of a token's loss with respect to its logits is
``weight · (softmax − onehot)``, which needs nothing from the backward pass but the scale of the scalar loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron.parallel.context import ParallelContext

# Rows of one chunk: 256 x 50,304 fp32 logits are 50 MB, small enough to stay out of the way and large enough to keep the
# matrix products efficient (measured on CPU: 128 to 512 rows are within the noise, 32 rows cost 50 % more).
CHUNK_ROWS = {"cpu": 256, "cuda": 4096}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor,
    context: ParallelContext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of ``−log softmax(hidden · weightᵀ)[label]``.

    Args:
        hidden: [rows, hidden], the same on every tensor-parallel rank.
        weight: [vocab / tp, hidden], this rank's rows of the output matrix.
        labels: [rows] int64, ids in the whole vocabulary.
        loss_weights: [rows] fp32, no gradient.
        context: this process.

    Returns:
        loss: scalar fp32, Σ loss_weights · ce, differentiable in ``hidden`` and ``weight``.
        ce: [rows] fp32, the unweighted cross-entropy in nats, detached.
    """
    # Inside an autograd function gradients are always off, so it is told whether any will be asked for.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, context, needs_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_weights, context, needs_grad):  # type: ignore[no-untyped-def]
        ce = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        chunk_rows = CHUNK_ROWS.get(hidden.device.type, 256)
        buffer = hidden.new_empty(min(chunk_rows, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            # One buffer for all chunks: a fresh one would be mapped and cleared by the kernel page by page.
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: hidden[rows].shape[0]]).float()
            ce[rows], errors = _softmax_errors(logits, labels[rows], context)
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
        ctx.mark_non_differentiable(ce)
        return (ce * loss_weights).sum(), ce

    @staticmethod
    def backward(ctx, grad_loss, _grad_ce):  # type: ignore[no-untyped-def]
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
    """``total += left · right`` in fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right
