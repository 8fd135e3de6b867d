"""The log-likelihood of a text under a loaded model."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.errors import require
from megatron.evaluation.blocks import scorer_of
from megatron.evaluation.estimators import make_estimator
from megatron.evaluation.requests import encode_request, whole_number, windows
from megatron.evaluation.scorer import CausalScorer, Estimate
from megatron.evaluation.uniform import UniformScorer
from megatron.inference.model import InferenceModel

MAX_DRAWS = 10**6


def log_likelihood(
    loaded: InferenceModel, text: str, *, context: str, num_draws: int, estimator: str, seed: int
) -> Estimate:
    """Score ``text`` after ``context`` (or after an end of document), in windows of the longest input.

    Args:
        loaded: model with a tokenizer.
        text: what is scored.
        context: what is given.
        num_draws: mask draws of a masked diffusion model.
        estimator: of a masked diffusion model.
        seed: of the masks.

    Raises:
        UserError: no tokenizer, nothing to score, or an estimator or a number that is none.
    """
    num_draws = whole_number("num_draws", num_draws)
    require(num_draws <= MAX_DRAWS, f"num_draws {num_draws}", f"at most {MAX_DRAWS} draws", "lower it")
    method = make_estimator(estimator, seed=whole_number("seed", seed, at_least=0))
    row_length = loaded.max_length + loaded.is_causal  # a causal model is not fed the last token
    requests = windows(*encode_request(loaded.require_tokenizer(), context, text), row_length=row_length)
    if loaded.is_causal:
        causal = CausalScorer(loaded.logits, max_length=loaded.max_length, device=loaded.device)
        return add_up(causal.score(requests))
    if not loaded.is_masked:
        return add_up(UniformScorer.of(loaded, seed=seed).score(requests, num_draws=-(-num_draws // 2)))
    return add_up(scorer_of(loaded).score(requests, method, num_draws=num_draws))


def add_up(pieces: Sequence[Estimate]) -> Estimate:
    """The sum over the windows of one text; their errors are independent."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    return Estimate(
        value=sum(piece.value for piece in pieces),
        standard_error=sum(piece.standard_error**2 for piece in pieces) ** 0.5,
        kind=first.kind,
        estimator=first.estimator,
        num_passes=sum(piece.num_passes for piece in pieces),
        num_draws=first.num_draws,
        is_greedy=None if first.is_greedy is None else all(piece.is_greedy for piece in pieces),
    )
