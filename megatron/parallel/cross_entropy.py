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

# Logits of one chunk: 512 rows x 50,304 columns in fp32 are 100 MB, small enough to stay out of the way and large
# enough to keep the matrix products efficient (measured on CPU: 256 to 1024 are within 3 %).
CHUNK_ROWS = {"cpu": 512, "cuda": 4096}


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
        chunk_rows = CHUNK_ROWS.get(hidden.device.type, 512)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            ce[rows], grad_logits = _chunk(hidden[rows], weight, labels[rows], loss_weights[rows], context)
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = grad_logits.to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), hidden[rows])
                else:
                    grad_weight += grad_logits.t() @ hidden[rows]
        if grad_hidden is not None and grad_weight is not None:
            if context.tp_size > 1:  # each rank has the part of the gradient that flows through its own columns
                dist.all_reduce(grad_hidden, group=context.tp_group)
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


def _chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor,
    context: ParallelContext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy [rows] and gradient of the weighted sum with respect to the logits [rows, vocab / tp], fp32."""
    logits = (hidden @ weight.t()).float()
    maximum = logits.max(dim=-1).values
    if context.tp_size > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=context.tp_group)
    local = labels - context.tp_rank * weight.shape[0]
    is_here = (local >= 0) & (local < weight.shape[0])
    column = local.clamp(0, weight.shape[0] - 1).unsqueeze(-1)
    target = (logits.gather(-1, column).squeeze(-1) - maximum) * is_here
    probabilities = logits.sub_(maximum.unsqueeze(-1)).exp_()
    total = probabilities.sum(dim=-1)
    if context.tp_size > 1:
        sums = torch.stack((total, target))
        dist.all_reduce(sums, group=context.tp_group)
        total, target = sums.unbind()
    ce = total.log() - target
    grad_logits = probabilities.mul_((loss_weights / total).unsqueeze(-1))
    grad_logits.scatter_add_(-1, column, (-loss_weights * is_here).unsqueeze(-1))
    return ce, grad_logits
