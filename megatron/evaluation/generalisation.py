"""Losses on documents that a model was trained on and on others, by the share of the text that is hidden.

Both sets are scored as :mod:`megatron.evaluation.court` scores: token 0 of a sample is given, and sample i of either set has the
same masks, for every checkpoint and every run. A bound is the mean over the share t of masked tokens of the mean cross-entropy
of masked tokens, ``∫ ℓ(t) dt``; a bin holds that integral over its part of (0, 1), divided by its width. A causal model sees the
first i of L tokens when it predicts the next one, so its tokens fall into bins by 1 − i / L: what is told of both is how well
they predict when so much of the text is hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron.evaluation.court import Samples
from megatron.evaluation.passes import Passes
from megatron.evaluation.witnesses import main_witness
from megatron.inference.model import InferenceModel
from megatron.parallel.context import ParallelContext
from megatron.runs.generalisation import Measured

Entry = tuple[int, int, np.ndarray]  # sample, document, [tokens, loss, excess] of all and of every bin


def measure(
    loaded: InferenceModel,
    samples: Samples,
    *,
    pairs: int,
    bins: int,
    batch_size: int,
    on_samples: Callable[[int], object] = lambda count: None,
) -> Measured:
    """Score all samples, spread over data-parallel ranks; a collective call, the same result on every rank.

    Args:
        loaded: the model.
        samples: of one set.
        pairs: antithetic pairs of noise for a bound.
        bins: of the share that is hidden.
        batch_size: rows per forward pass.
        on_samples: called with the number of samples that are finished.
    """
    context: ParallelContext = loaded.context
    witness = main_witness(loaded, pairs=pairs, batch_size=batch_size)
    own = list(range(context.dp.rank, len(samples.tokens), context.dp.size))
    found: list[Entry] = []
    for start in range(0, len(own), batch_size):
        part = own[start : start + batch_size]
        for index, passes in zip(part, witness.by_pass(samples.requests(part))):
            found += _entries(index, samples.documents[index, 1:], _by_bin(passes, bins))
        on_samples(len(part))
    gathered = context.gather_objects(found if context.tp.rank == 0 else [])
    sample, document, values = (
        np.array(column) for column in zip(*sorted((e for part in gathered for e in part), key=_place))
    )
    tokens, loss, excess = values.transpose(1, 2, 0)
    # What a document has of its sample's weights beyond its share, others lack: it is given back at the mean loss.
    loss = loss - excess * (loss.sum(1) / np.maximum(tokens.sum(1), 1))[:, None]
    return Measured(
        sample.astype(np.int32), document.astype(np.int32), np.rint(tokens).astype(np.int32), loss, draws=witness.draws
    )


def _by_bin(passes: Passes, bins: int) -> np.ndarray:
    """[3, 1 + bins, target]: whether a token is counted, its loss, and its weight beyond 1; over all passes, and over those in
    which the share that is hidden is of a bin."""
    where = np.where(np.isnan(passes.hidden), -1, np.floor(passes.hidden * bins))
    parts = []
    for part in range(bins + 1):
        held = (where == part - 1) | (part == 0)
        chance = (held * passes.chances).sum(0)
        weights = held * passes.weights / np.where(chance > 0, chance, 1)
        parts.append((chance > 0, -(weights * passes.logprobs).sum(0), weights.sum(0) - (chance > 0)))
    return np.array(parts, dtype=np.float64).transpose(1, 0, 2)


def _entries(index: int, documents: np.ndarray, values: np.ndarray) -> list[Entry]:
    """An entry for every document in a sample; values: [3, 1 + bins, target]."""
    return [(index, int(document), values[..., documents == document].sum(-1)) for document in np.unique(documents)]


def _place(entry: Entry) -> tuple[int, int]:
    return entry[:2]


def described(samples: Samples) -> dict[str, Any]:
    """What a set is, for the record."""
    digest = hashlib.sha256(samples.tokens.astype("<i8").tobytes()).hexdigest()[:16]
    return {"samples": len(samples.tokens), "documents": len(np.unique(samples.documents[:, 1:])), "tokens": digest}
