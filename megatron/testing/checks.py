"""Promises that a scorer, a policy, noise or a training step keeps, or an ``AssertionError`` with the numbers.

Each check takes plain functions, so that it can be pointed at any code: wrap yours in a ``lambda``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron.errors import require
from megatron.testing.oracles import all_texts

MOST_TEXTS = 10**7

Text = tuple[int, ...]
ScoreFn = Callable[[Sequence[Text]], Sequence[float]]
"""From texts to their log-likelihoods, nats."""


def check_sums_to_one(score: ScoreFn, *, vocab_size: int, length: int, tolerance: float = 1e-10) -> None:
    """The likelihoods of all texts of a length add up to 1, as those of a distribution do.

    What sees a value before it is drawn does not: a policy that ranks by the true token, a causal model that attends to its
    label, a softmax over tokens that are never drawn.

    Args:
        score: the exact log-likelihoods; in fp64 for the default tolerance, else allow 1e-5.
        vocab_size, length: of the texts; their number, vocab_size^length, is scored.
        tolerance: of the sum.
    """
    given = f"vocab_size {vocab_size} and length {length}"
    require(vocab_size**length <= MOST_TEXTS, given, f"at most {MOST_TEXTS:,} texts are scored", "take smaller ones")
    texts = all_texts(vocab_size, length)
    total = math.fsum(map(math.exp, _scores(score, texts)))
    if not abs(total - 1) <= tolerance:
        raise AssertionError(f"the likelihoods of {len(texts):,} texts sum to {total:.12g}, not to 1 ± {tolerance:g}")


def check_order_is_blind(steps: Callable[[Text], Sequence[Sequence[int]]], texts: Sequence[Text]) -> None:
    """What is uncovered next follows from what has been uncovered, never from the values that are about to be.

    Args:
        steps: for a text, the positions that each step uncovers when the text is scored.
        texts: at least two that begin alike in some order; all of a small vocabulary are best.
    """
    chosen: dict[frozenset[tuple[int, int]], tuple[list[int], Text]] = {}
    for text in texts:
        known: set[tuple[int, int]] = set()
        walk = steps(text)
        if sorted(position for positions in walk for position in positions) != list(range(len(text))):
            raise AssertionError(f"the steps {walk} of {text} do not uncover each of its {len(text)} tokens once")
        for positions in walk:
            own = sorted(positions)
            first, other = chosen.setdefault(frozenset(known), (own, text))
            if first != own:
                raise AssertionError(
                    f"with {dict(sorted(known)) or 'nothing'} uncovered, positions {first} come next in {other}, and {own} in "
                    f"{text}: the choice sees what it has not uncovered"
                )
            known |= {(position, text[position]) for position in own}


def check_is_bound(
    draws: Callable[[Text], ArrayLike],
    texts: Sequence[Text],
    *,
    truth: Callable[[Text], float],
    expected: Callable[[Text], float] | None = None,
    errors: float = 4.0,
) -> None:
    """The mean of an estimator is not below the exact negative log-likelihood, and is what it should be.

    Args:
        draws: independent draws of the bound of a text, nats, [draws]; one value where it has no noise.
        texts: to be scored.
        truth: the exact value, nats; ``oracles.mixture_nll`` for masked diffusion.
        expected: what the bound is in expectation, nats, such as ``oracles.bound_nll``; None: not known.
        errors: standard errors that a mean may be off.
    """
    for text in texts:
        found = np.atleast_1d(np.asarray(draws(text), dtype=np.float64))
        mean = float(found.mean())
        off = 1e-5 + (errors * float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else 0.0)
        exact = truth(text)
        if not mean >= exact - off:
            raise AssertionError(f"{text}: the bound is {mean:.6f} ± {off:.6f}, below the exact {exact:.6f}")
        if expected is not None and not abs(mean - (value := expected(text))) <= off:
            raise AssertionError(f"{text}: the bound is {mean:.6f} ± {off:.6f}, and {value:.6f} in expectation")


def check_scores_stand_alone(scorers: Mapping[str, ScoreFn], texts: Sequence[Text], *, tolerance: float = 1e-5) -> None:
    """A score depends on its text alone: not on batch mates, padding, order of requests, batch size or layout.

    The reference is every text by itself under the first scorer. Each scorer gets all texts at once, backwards, and each text
    beside the longest one.

    Args:
        scorers: by name, such as one for each batch size or layout.
        texts: of different lengths, so that something is padded.
        tolerance: nats.
    """
    named = list(scorers.items())
    require(named and texts, f"{len(named)} scorers and {len(texts)} texts", "scores are compared", "give some of both")
    alone = {text: float(_scores(named[0][1], [text])[0]) for text in texts}
    longest = max(texts, key=len)
    ways = {
        "together": [list(texts)],
        "backwards": [list(texts)[::-1]],
        "beside the longest": [[text, longest] for text in texts],
    }
    for name, score in named:
        for way, batches in ways.items():
            for batch in batches:
                for text, value in zip(batch, _scores(score, batch)):
                    if not abs(float(value) - alone[text]) <= tolerance:
                        raise AssertionError(
                            f"{text} scores {alone[text]:.7f} alone and {float(value):.7f} {way} ({name}): "
                            f"{float(value) - alone[text]:+.2g} nats, and {tolerance:g} are allowed"
                        )


def check_noise_is_of_the_sample(draw: Callable[[list[int]], Any], ids: Sequence[int]) -> None:
    """Noise is a function of the sample's index in the training stream: the same on any rank, in any micro-batch and after a
    resume, and another one for another sample.

    Args:
        draw: noise for a list of sample indices: an array, or a tuple of arrays, with a row a sample (masks, weights, times).
        ids: at least four.
    """
    ids = list(ids)
    require(len(set(ids)) >= 4, f"samples {ids}", "noise of several is compared", "give four indices or more")
    whole = _rows(draw(ids), ids)
    ways = {
        "in a second call": [ids],
        "one at a time": [[one] for one in ids],
        "on two ranks": [ids[0::2], ids[1::2]],
        "on three ranks": [ids[rank::3] for rank in range(3)],
        "after a resume": [ids[len(ids) // 2 :]],
        "in another order": [ids[::-1]],
    }
    for way, parts in ways.items():
        for part in parts:
            for sample, row in _rows(draw(part), part).items():
                if not _is_same(row, whole[sample]):
                    raise AssertionError(f"sample {sample} has other noise {way}: {row} for {whole[sample]}")
    if all(_is_same(row, whole[ids[0]]) for row in whole.values()):
        raise AssertionError(f"all of {len(ids)} samples have the same noise: {whole[ids[0]]}")


def check_gradient_scale(
    step: Callable[[Any], Mapping[str, ArrayLike]],
    layouts: Sequence[Hashable] = (1, 2, 4),
    *,
    tolerance: float = 1e-5,
) -> None:
    """A training step depends on its global batch, not on how many ranks or micro-batches share it.

    Args:
        step: what a step on one fixed global batch gives in a layout, whole, by name: loss, gradients or their norm.
        layouts: world sizes, or anything else that ``step`` understands; the first is the reference.
        tolerance: largest difference, relative to the largest entry of the reference.
    """
    require(len(layouts) > 1, f"layouts {tuple(layouts)}", "steps of several are compared", "give two or more")
    first, *others = layouts
    reference = {name: np.asarray(value, dtype=np.float64) for name, value in step(first).items()}
    for layout in others:
        found = {name: np.asarray(value, dtype=np.float64) for name, value in step(layout).items()}
        if found.keys() != reference.keys():
            raise AssertionError(f"layout {layout} has {sorted(found)}, and {first} has {sorted(reference)}")
        for name, value in found.items():
            _check_close(name, value, reference[name], f"in layout {layout}", f"in layout {first}", tolerance)


def _scores(score: ScoreFn, texts: Sequence[Text]) -> Sequence[float]:
    """One score a text."""
    found = score(texts)
    if len(found) != len(texts):
        raise AssertionError(f"{len(texts):,} texts have {len(found):,} scores")
    return found


def _check_close(name: str, value: np.ndarray, expected: np.ndarray, here: str, there: str, tolerance: float) -> None:
    if value.shape != expected.shape:
        raise AssertionError(f"{name} has shape {value.shape} {here} and {expected.shape} {there}")
    limit = tolerance * float(np.abs(expected).max(initial=0.0))
    off = float(np.abs(value - expected).max(initial=0.0))
    if not off <= limit:
        norms = float(np.linalg.norm(value)), float(np.linalg.norm(expected))
        ratio = norms[0] / norms[1] if norms[1] else math.nan
        raise AssertionError(
            f"{name} is {ratio:.4f} times as large {here} as {there} (norms {norms[0]:.6g} and {norms[1]:.6g}; the largest "
            f"difference is {off:.3g}, and {limit:.3g} is allowed)"
        )


def _rows(drawn: Any, ids: Sequence[int]) -> dict[int, tuple[np.ndarray, ...]]:
    parts = [np.asarray(part) for part in (drawn if isinstance(drawn, tuple) else (drawn,))]
    if any(len(part) != len(ids) for part in parts):
        raise AssertionError(f"{len(ids)} samples have {', '.join(str(len(part)) for part in parts)} rows of noise")
    return {sample: tuple(part[row] for part in parts) for row, sample in enumerate(ids)}


def _is_same(row: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(one, two) for one, two in zip(row, other))
