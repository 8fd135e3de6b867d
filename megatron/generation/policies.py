"""Which masked tokens to uncover next: a choice that sees predictions, never the values that it is about to reveal.

That makes the sampler's distribution a product. With masked tokens ``A_k`` chosen at step k from what stands before it,
``log p(x) = Σ_k Σ_{i ∈ A_k} log p(x_i | z_k)`` and ``z_{k+1}`` is ``z_k`` with the tokens of ``A_k``: exact for the sampler that
fills ``A_k`` in one pass (arXiv 2603.01367). ``diffusion.py`` draws with these policies and scores with them.

* ``confidence``: the positions whose most likely token has the highest probability (Chang et al. 2022, arXiv 2202.04200; Nie
  et al. 2025, arXiv 2502.09992, sec. 2.4, who take the probability of the token that was drawn: the same without temperature);
* ``margin``: the largest difference between the two best tokens (Kim et al. 2025, arXiv 2502.06768);
* ``entropy``: the lowest entropy of the prediction;
* ``-reversed``: these the other way round, the least sure position first;
* ``left-to-right``, ``right-to-left``, ``random``: an order that is known before; the random one is a function of seed and row.

Ranks of a learned policy are computed, so they carry rounding errors that differ between batch sizes and layouts, and two
candidates may change places: the row then takes another path, to another likelihood. Such choices are counted
(:func:`near_ties`), because no score can promise what they decide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NEAR_TIE = 2e-5
"""Ranks (nats; for ``margin`` probability) this close may change places: layouts move a log-probability by up to 1e-5 each in
fp32."""

_SURENESS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "confidence": lambda logprobs: logprobs.amax(-1),
    "margin": lambda logprobs: -logprobs.exp().topk(2, dim=-1).values.diff(dim=-1).squeeze(-1),
    "entropy": lambda logprobs: (logprobs.exp() * logprobs.clamp(min=-1e30)).sum(-1),
}
"""How sure a prediction is, from its log-probabilities [n, vocab]: [n]."""


def sureness(policy: str, logits: torch.Tensor) -> torch.Tensor:
    """What a learned policy ranks by, the highest first.

    Args:
        policy: a learned one, perhaps reversed.
        logits: [n, vocab] predictions.

    Returns:
        [n] float64.
    """
    value = _SURENESS[policy.removesuffix("-reversed")](logits.double().log_softmax(-1))
    return -value if policy.endswith("-reversed") else value


def known_ranks(policy: str, uniforms: torch.Tensor) -> torch.Tensor:
    """What an order that is known before ranks by, the highest first.

    Args:
        policy: of ``KNOWN`` in flags.py.
        uniforms: [batch, seq] numbers of the random order.

    Returns:
        [batch, seq] float64.
    """
    if policy == "random":
        return uniforms.double()
    places = torch.arange(uniforms.shape[-1], dtype=torch.float64, device=uniforms.device).expand(uniforms.shape)
    return -places if policy == "left-to-right" else places


def first_ranked(ranks: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The candidates that come first: bool [batch, seq]; of equal ones the left.

    Args:
        ranks: [batch, seq], the highest first.
        candidates: [batch, seq] bool, who may be taken.
        counts: [batch] how many of each row.
    """
    ordered = ranks.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    # A rank of -inf ties with those who may not be taken, so these are counted out by the mask, not by the rank.
    place = candidates.gather(-1, ordered).cumsum(-1)
    taken = candidates.gather(-1, ordered) & (place <= counts[:, None])
    return torch.zeros_like(candidates).scatter(-1, ordered, taken)


def near_ties(ranks: torch.Tensor, candidates: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Those taken while a candidate that was left lies within ``NEAR_TIE``: bool [batch, seq].

    Args:
        ranks: [batch, seq] of a learned policy.
        candidates, taken: [batch, seq] bool, see :func:`first_ranked`.
    """
    left = ranks.masked_fill(~candidates | taken, -torch.inf).amax(-1, keepdim=True)
    return taken & (ranks - left <= NEAR_TIE)
