"""The bound of uniform-state diffusion from a linear head over a split vocabulary.

With V tokens, visible share α and x̄ = Vα·1_x + 1 − α, x̄θ = Vα·p_θ + 1 − α, the density of the bound over time is

    ℓ = α'/(Vα) · [V/x̄_z − V/x̄θ_z − Σ_j (x̄_j/x̄_z) · log(x̄θ_z·x̄_j / (x̄θ_j·x̄_z))]                                    (1)

(Sahoo et al., arXiv 2506.10892; arXiv 2602.15014; α' < 0). With r_j = x̄_j/x̄_z and rθ_j likewise it is

    ℓ = −α'/(Vα) · Σ_j D(r_j ‖ rθ_j),    D(a ‖ b) = a·log(a/b) − a + b ≥ 0,                                             (2)

because Σ_j x̄_j = Σ_j x̄θ_j = V. All of it depends on α through the odds k = Vα/(1 − α) alone: with y_j = k·p_j, L_j = log(1 + y_j)
and D_x = log(1 + k) − L_x, which is log(1 + w) with w = k·(1 − p_x)/(1 + y_x),

    Σ_j D = k·D_x + log(1 + k) − Σ_j L_j + (V + k)·(L_z + exp(−L_z) − 1)                        where z ≠ x,             (3)
    Σ_j D = [(V + k)·w − (V − 1)·D_x − Σ_{j≠x} L_j] / (1 + k)                                   where z = x.

So a row needs its softmax and one sum more over the vocabulary. Near k = 0 (all noise) terms are of order k and their sum of
order k², so the value, which is divided by k, has the absolute error of p in fp32, about 1e-6; near α = 1 terms and value grow
like log k. What is computed per row and not per token is in fp64.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron.parallel.context import ParallelContext
from megatron.parallel.cross_entropy import linear_loss

PARTS = 16  # a chunk's rows go through what needs a copy of them in so many parts


def linear_uniform_bound(
    output: tuple[torch.Tensor, torch.Tensor],
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    loss_weights: torch.Tensor,
    context: ParallelContext,
    *,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of ``Σ_j D(r_j ‖ rθ_j) / k``, which is ℓ · (1 − α) / (−α').

    Args:
        output: hidden [rows, hidden], the same on every tensor-parallel rank, and this rank's rows of the output matrix
            [vocab / tp, hidden]. Rows past ``vocab_size`` are no tokens and have no share of p.
        states: [rows] each: tokens x, what stands for them z (int64), and odds k > 0.
        loss_weights: [rows] fp32, no gradient.
        context: this process.
        vocab_size: V.

    Returns:
        As :func:`megatron.parallel.cross_entropy.linear_loss`.
    """
    hidden, weight = output

    def row_loss(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, noised, odds = (state[rows] for state in states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return divergences(logits, torch.stack((tokens, noised)), odds, context, vocab_size=vocab_size)

    return linear_loss(hidden, weight, row_loss, loss_weights, context)


def divergences(
    logits: torch.Tensor, pairs: torch.Tensor, odds: torch.Tensor, context: ParallelContext, *, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (3) over k, and its derivatives by the logits.

    Args:
        logits: [rows, vocab / tp] of this rank, fp32 or more; overwritten.
        pairs: [2, rows] int64, tokens x and what stands for them z.
        odds: [rows] k.
        context: this process.
        vocab_size: V.

    Returns:
        [rows] in nats, and [rows, vocab / tp].
    """
    local = pairs - context.tp.rank * logits.shape[1]
    is_here = (local >= 0) & (local < logits.shape[1])
    columns = local.clamp(0, logits.shape[1] - 1)
    logits[:, max(vocab_size - context.tp.rank * logits.shape[1], 0) :] = -torch.inf
    log_probs = _normalise(logits, columns, is_here, context)
    k = odds.double()
    y = logits.mul_(k.to(logits.dtype).unsqueeze(-1))
    logs, parts = _sums(y, context)

    is_same, shift = pairs[0] == pairs[1], -torch.expm1(log_probs[0])
    y_x, y_z = k * log_probs.exp()
    w = k * shift / (1 + y_x)
    log_x, log_z, behind = y_x.log1p(), y_z.log1p(), w.log1p()
    differs = k * behind + k.log1p() - logs + (vocab_size + k) * (log_z + torch.expm1(-log_z))
    same = ((vocab_size + k) * w - (vocab_size - 1) * behind - (logs - log_x)) / (1 + k)
    values = torch.where(is_same, same, differs) / k

    # With s_j = y_j/(1 + y_j) and r = x̄_z/(1 − α): p_j · dΣD/dp_j = −s_j/r + at_x · 1[j = x] + at_z · 1[j = z].
    r = torch.where(is_same, 1 + k, torch.ones_like(k))
    s_x, s_z = y_x / (1 + y_x), y_z / (1 + y_z)
    at_x = -k * s_x / r
    at_z = (vocab_size + k) * s_z * torch.where(is_same, -w / (1 + k), s_z)
    through_sum = (parts / r - at_x - at_z) / k**2
    errors = _errors(y, through_sum, 1 / (r * k))
    for column, here, at in zip(columns, is_here, (at_x, at_z)):
        errors.scatter_add_(-1, column.unsqueeze(-1), (here * at / k).to(errors.dtype).unsqueeze(-1))
    return values.to(errors.dtype), errors


def _normalise(
    logits: torch.Tensor, columns: torch.Tensor, is_here: torch.Tensor, context: ParallelContext
) -> torch.Tensor:
    """Softmax in place; log p of the columns, fp64 [2, rows]."""
    maximum = logits.amax(dim=-1)
    if context.tp.size > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=context.tp.group)
    logits.sub_(maximum.unsqueeze(-1))
    # A column of another rank adds nothing; there it may be −inf.
    targets = torch.where(is_here, logits.gather(-1, columns.T).T, 0.0).double()
    logits.exp_()
    sums = torch.cat((logits.sum(dim=-1).double().unsqueeze(0), targets))
    if context.tp.size > 1:
        dist.all_reduce(sums, group=context.tp.group)
    logits.div_(sums[0].to(logits.dtype).unsqueeze(-1))
    return sums[1:] - sums[0].log()


def _sums(y: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Σ_j log(1 + y_j) and Σ_j y_j/(1 + y_j), fp64 [2, rows]."""
    sums = torch.empty(2, y.shape[0], dtype=torch.float64, device=y.device)
    for part, found in zip(y.split(_rows_at_once(y)), sums.split(_rows_at_once(y), dim=1)):
        copy = part.log1p()
        found[0] = copy.sum(-1)
        found[1] = torch.div(part, torch.add(part, 1, out=copy), out=copy).sum(-1)
    if context.tp.size > 1:
        dist.all_reduce(sums, group=context.tp.group)
    return sums


def _errors(y: torch.Tensor, added: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """``y · (added − taken/(1 + y))`` over y."""
    columns = (row.to(y.dtype).unsqueeze(-1).split(_rows_at_once(y)) for row in (added, taken))
    for part, plus, minus in zip(y.split(_rows_at_once(y)), *columns):
        part.mul_((1 + part).reciprocal_().mul_(-minus).add_(plus))
    return y


def _rows_at_once(y: torch.Tensor) -> int:
    return max(1, -(-y.shape[0] // PARTS))
