"""Weights of an ensemble, fitted on the selection half of the documents.

The loss ``−Σ_n c_n · log Σ_k w_k · p_kn`` over tokens n (of a denoiser: over tokens and masks, c the weights of the bound) is
convex in w; EM (Dempster, Laird and Rubin 1977) never raises it:

    w_k ← w_k · g_k,    g_k = Σ_n c_n · p_kn / (Σ_j w_j · p_jn) / Σ_n c_n                                              (1)

and by concavity of the logarithm no weights are better than w by more than max_k g_k − 1 nats per unit of c, which says when to
stop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron.errors import UserError, require
from megatron.evaluation.court import Samples
from megatron.evaluation.requests import ResultCache
from megatron.evaluation.witnesses import main_witness
from megatron.inference.ensemble import ensemble
from megatron.inference.model import InferenceModel
from megatron.parallel.context import ParallelContext

TOLERANCE, MAX_STEPS = 1e-6, 20_000  # nats per token from the best weights; steps of EM at most
LEAST = 1e-9  # weight of a member that is not wanted: it stays, so that the ensemble is the one that was named


class Fit(NamedTuple):
    """Weights that sum to 1, and nats per token on the documents that chose them: with the weights before, and with these."""

    weights: tuple[float, ...]
    before: float
    after: float


def fit_weights(probabilities: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The weights [members] of the lowest loss, to ``TOLERANCE``.

    Args:
        probabilities: float64 [members, n], not all 0 for any n; rows may be scaled by a factor of n.
        counts: float64 [n], what each counts.
    """
    share = counts / counts.sum()
    weights = np.full(len(probabilities), 1 / len(probabilities))
    for _ in range(MAX_STEPS):
        gain = (probabilities / (weights @ probabilities)) @ share
        if gain.max() <= 1 + TOLERANCE:
            break
        weights = weights * gain
    weights = np.maximum(weights, LEAST)
    return weights / weights.sum()


def fitted(
    loaded: InferenceModel,
    samples: Samples,
    *,
    pairs: int,
    batch_size: int,
    context: ParallelContext,
    cache: ResultCache,
) -> tuple[InferenceModel, Fit]:
    """An ensemble with the weights that suit the selection half best; a collective call, the same on every rank.

    Args:
        loaded: an ensemble.
        samples: of which tokens of the selection half are used.
        pairs: pairs of masks of a masked model, the same for all members.
        batch_size: rows per forward pass.
        context: this process.
        cache: remembers what was fitted.

    Raises:
        UserError: a model without probabilities to average, or documents of one half only.
    """
    if not (loaded.is_causal or loaded.is_masked):
        raise UserError(
            f"fitted weights of {loaded.source}",
            "they are fitted to the probabilities of tokens, and the bound of uniform-state diffusion is not made of them",
            "name weights, or leave them equal",
        )
    chosen = samples.in_selection[samples.documents[:, 1:]]
    require(
        chosen.any() and not chosen.all(),
        f"fitted weights on {len(np.unique(samples.documents))} documents, all of one half",
        "weights are fitted on one half of the documents and judged on the other",
        "score more samples",
    )
    way = main_witness(
        loaded, pairs=pairs, batch_size=batch_size
    ).name  # the two forms of a dual model are fitted apart
    key = cache.key("ensemble weights", way, pairs, samples.tokens.tolist(), chosen.tolist())
    kept = cache.get(key)
    if not (isinstance(kept, list) and len(kept) == len(loaded.members) + 2):
        kept = _fit(loaded, samples, chosen, pairs=pairs, batch_size=batch_size, context=context)
        cache.put(key, kept)
    *weights, before, after = kept
    return ensemble(loaded.members, weights), Fit(tuple(weights), before, after)


def _fit(
    loaded: InferenceModel,
    samples: Samples,
    chosen: np.ndarray,
    *,
    pairs: int,
    batch_size: int,
    context: ParallelContext,
) -> list[float]:
    """Weights, and the loss with those before and with these."""
    indices = np.flatnonzero(chosen.any(1))[context.dp.rank :: context.dp.size].tolist()
    rows, own_counts = [], np.zeros(0)
    for member in loaded.members:
        witness, pieces = main_witness(member, pairs=pairs, batch_size=batch_size), [(np.zeros(0), np.zeros(0))]
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            for index, own in zip(part, witness.by_pass(samples.requests(part))):
                kept = (own.weights > 0) & chosen[index]
                pieces.append((own.weights[kept], own.logprobs[kept]))
        own_counts, own_logprobs = (np.concatenate(column) for column in zip(*pieces))
        rows.append(own_logprobs)
    found = context.gather_objects((own_counts, np.stack(rows)))[:: context.tp.size]
    counts, logprobs = (np.concatenate(part, axis=-1) for part in zip(*found))
    highest = logprobs.max(0)
    probabilities = np.exp(logprobs - highest)

    def loss(weights: np.ndarray) -> float:
        return float(-counts @ (np.log(weights @ probabilities) + highest) / counts.sum())

    weights = fit_weights(probabilities, counts)
    return [*weights.tolist(), loss(np.array(loaded.weights)), loss(weights)]
