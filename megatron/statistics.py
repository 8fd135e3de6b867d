"""What a printed ± means: the error of a mean loss over documents, of the difference of two runs, and their intervals.

A validation scores samples, windows cut from packed documents; a long document spans several of them. Two scores err
together when they belong to one document, because documents are what was drawn from the population, and, where the
objective draws noise, when they belong to one sample, because all of it shares one mask. So a validation keeps its sums
a (sample, document), and every error here comes from them. *Population*: documents like those of the validation set.
*Unit*: the document. *Randomness*: which documents were drawn, and the noise of the objective where it has any; not
the training seed.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from megatron.errors import UserError, require
from megatron.files import replace_file

Array = np.ndarray
Half = Literal["selection", "report"]

OVER_DOCUMENTS = "documents"
"""``se_kind`` of an error clustered by document (:func:`mean_loss`)."""
OVER_SAMPLES = "samples"
"""``se_kind`` of the older error, which takes samples for independent: too small where they share documents."""


_COLUMNS = ("sample", "document", "tokens", "loss")


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error.

    Attributes:
        value: the estimate, in nats per token for losses.
        error: its standard error in the same unit; NaN where one document says nothing about others.
        num_documents: documents behind it.
        degrees: degrees of freedom of ``error``: fewer than documents where some hold most of the tokens.
        has_noise: whether the objective's noise is a part of ``error``.
    """

    value: float
    error: float
    num_documents: int
    degrees: float
    has_noise: bool

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Both ends of the interval ``value ± t·error``, t of Student's distribution: wider at few documents."""
        half = t_quantile((1 + confidence) / 2, self.degrees) * self.error
        return self.value - half, self.value + half

    @property
    def meaning(self) -> str:
        """What ± is, for tables and notes."""
        noise = " and noise draws" if self.has_noise else ""
        return f"one standard error over {self.num_documents} documents{noise}"


@dataclass(frozen=True)
class ValidationSums:
    """The sums of one validation: an entry for every part of a document in a sample.

    Attributes:
        sample: [entries] int32, index of the sample.
        document: [entries] int32, index of the document, one numbering over all validation sets.
        tokens: [entries] int32, scored tokens.
        loss: [entries] float64, sum of their losses in nats, mean over the noise draws.
        draws: noise draws a sample; 0 where the loss is exact.
        in_selection: [entries] bool, whether the document is of the selection half (:func:`half_of`); None: not known.
    """

    sample: Array
    document: Array
    tokens: Array
    loss: Array
    draws: int = 0
    in_selection: Array | None = None

    @staticmethod
    def collect(
        sample: ArrayLike, document: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, draws: int = 0
    ) -> ValidationSums:
        """Entries in any order, of any number of passes: what is scored again (another draw, or a sample that a loader
        repeats) is averaged into one entry, so that repeats never make an error smaller.

        Args:
            sample, document, tokens, loss: one array [n] each, as the attributes say.
            draws: noise draws a sample; 0 for an exact loss.
        """
        keys = np.stack([np.asarray(sample, np.int32).ravel(), np.asarray(document, np.int32).ravel()])
        unique, index, counts = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
        index = index.ravel()
        mean = np.bincount(index, np.asarray(loss, np.float64).ravel(), len(counts)) / counts
        size = np.bincount(index, np.asarray(tokens, np.float64).ravel(), len(counts)) / counts
        return ValidationSums(unique[0], unique[1], np.rint(size).astype(np.int32), mean, draws)

    @staticmethod
    def of_tokens(sample: Array, document: Array, loss: Array, *, draws: int = 0) -> ValidationSums:
        """Sums of a batch.

        Args:
            sample: [batch] indices of the samples.
            document: [batch, seq] the document of every token; negative where a token is not counted.
            loss: [batch, seq] loss of every token in nats; of a bound, its weighted cross-entropy, mostly zero.
            draws: noise draws a sample; 0 for an exact loss.
        """
        counted = document >= 0
        owner = np.broadcast_to(np.asarray(sample)[:, None], document.shape)
        keys = np.stack([owner[counted], document[counted]])
        unique, index = np.unique(keys, axis=1, return_inverse=True)
        index = index.ravel()
        tokens, total = np.bincount(index), np.bincount(index, np.asarray(loss, np.float64)[counted])
        return ValidationSums.collect(unique[0], unique[1], tokens, total, draws=draws)

    @property
    def num_documents(self) -> int:
        return len(np.unique(self.document))

    @property
    def num_samples(self) -> int:
        return len(np.unique(self.sample))

    def take(self, kept: Array) -> ValidationSums:
        """The entries for which ``kept`` [entries] (mask or indices) holds."""
        columns = (self.sample[kept], self.document[kept], self.tokens[kept], self.loss[kept])
        return ValidationSums(
            *columns, draws=self.draws, in_selection=None if self.in_selection is None else self.in_selection[kept]
        )

    def with_halves(self, in_selection: Array) -> ValidationSums:
        """The same sums that know their halves; ``in_selection`` is [documents] bool, by index of the document."""
        return replace(self, in_selection=np.asarray(in_selection, bool)[self.document])

    def halves(self) -> tuple[ValidationSums, ValidationSums] | None:
        """Sums of the selection half and of the report half; None where they are not known or one of them is empty."""
        chosen = self.in_selection
        return None if chosen is None or chosen.all() or not chosen.any() else (self.take(chosen), self.take(~chosen))

    def save(self, path: str | Path) -> None:
        """Write one compressed .npz file, whole or not at all; about 8 bytes an entry."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        replace_file(path, lambda file: np.savez_compressed(file, **arrays))

    @staticmethod
    def load(path: str | Path) -> ValidationSums:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: damaged, or another kind of file.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            draws = int(arrays.pop("draws"))
            sums = ValidationSums(**{name: arrays[name] for name in (*_COLUMNS, *arrays)}, draws=draws)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path} cannot be read ({error})", "it holds the sums of one validation", "delete it or validate again"
            ) from None
        require(
            sums.sample.ndim == 1 and len({array.shape for array in arrays.values()}) == 1,
            f"{path} holds arrays of different lengths",
            "sums have one sample, document, tokens and loss an entry",
            "delete it or validate again",
        )
        return sums


def mean_loss(sums: ValidationSums) -> Estimate:
    """Loss per token, Σ loss / Σ tokens, with the error of this ratio by linearisation, clustered by document."""
    return _estimate(sums, None)


def difference(first: ValidationSums, second: ValidationSums) -> Estimate:
    """Loss per token of ``second`` minus that of ``first``, paired: what makes a document hard for both cancels.

    Only samples that both have scored count. Token counts may differ (AR does not score the first token of a sample).

    Raises:
        UserError: the two share no sample.
    """
    common = np.intersect1d(first.sample, second.sample)
    require(
        len(common),
        "two validations without a common sample",
        "a paired difference needs the same samples",
        "validate both runs on the same data",
    )
    return _estimate(second.take(np.isin(second.sample, common)), first.take(np.isin(first.sample, common)))


def document_bootstrap(
    sums: ValidationSums, other: ValidationSums | None = None, *, num_resamples: int = 1000, seed: int = 0
) -> Array:
    """Loss per token, or its difference to ``other``, of resamples of whole documents; [num_resamples] float64.

    Slow, with no assumption but that documents are independent: the check of the errors above.
    """
    names, tables = np.unique(sums.document), []
    for part in (sums,) if other is None else (sums, other):
        index = np.searchsorted(names, part.document)
        tables.append([np.bincount(index, value, len(names)) for value in (part.loss, part.tokens)])
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), num_resamples)
    ratios = [(counts @ loss) / (counts @ tokens) for loss, tokens in tables]
    return ratios[0] if other is None else ratios[0] - ratios[1]


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t at ``degrees`` ≥ 1 of freedom (any real number; else NaN), to 1e-4 of itself.

    With t = √ν·tan θ the density of θ is cos^(ν − 1) θ, which is smooth, so that a fine table of its integral is enough.
    """
    if not degrees >= 1:
        return math.nan
    if degrees > 1e6:
        return NormalDist().inv_cdf(probability)
    theta = np.linspace(0.0, min(math.pi / 2, 40 / math.sqrt(degrees)), 20_001)
    density = np.cos(theta) ** (degrees - 1)
    mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    angle = np.interp(abs(2 * probability - 1) * mass[-1], mass, theta)
    return math.copysign(math.sqrt(degrees) * math.tan(angle), probability - 0.5)


def fingerprint(tokens: ArrayLike) -> bytes:
    """What a document is known by, whatever file, order or integer type holds it: 16 bytes of its token ids."""
    return hashlib.blake2b(np.asarray(tokens).astype("<i8").tobytes(), digest_size=16).digest()


def half_of(document_fingerprint: bytes | str) -> Half:
    """The half of the validation documents that a document belongs to, for ever.

    Whatever is chosen on validation data (a checkpoint, a temperature, a size) is chosen on the selection half; its value is
    reported on the other, because the best of many is better on the data that chose it than on any other.
    """
    data = document_fingerprint.encode() if isinstance(document_fingerprint, str) else document_fingerprint
    digest = hashlib.blake2b(data, digest_size=8, person=b"megatron-half").digest()
    return "selection" if digest[0] & 1 else "report"


def _estimate(sums: ValidationSums, minus: ValidationSums | None) -> Estimate:
    """Ratio of ``sums``, less that of ``minus``, with the error of the whole."""
    parts = [(sums, 1.0)] + ([] if minus is None else [(minus, -1.0)])
    ratios = [float(part.loss.sum() / part.tokens.sum()) for part, _ in parts]
    influence = np.concatenate(
        [sign * (part.loss - ratio * part.tokens) / part.tokens.sum() for (part, sign), ratio in zip(parts, ratios)]
    )
    weight = np.concatenate([part.tokens / part.tokens.sum() / len(parts) for part, _ in parts])
    document = np.concatenate([part.document for part, _ in parts])
    sample = np.concatenate([part.sample for part, _ in parts])
    value = ratios[0] - (0.0 if minus is None else ratios[1])
    has_noise = any(part.draws for part, _ in parts)
    variance, num_documents, degrees = _clustered(influence, weight, document)
    if has_noise:
        variance += max(0.0, _sample_noise(influence, document, sample))
    return Estimate(value, math.sqrt(variance), num_documents, degrees, has_noise)


def _clustered(influence: Array, weight: Array, cluster: Array) -> tuple[float, int, float]:
    """Variance of Σ influence with independent clusters, their number, and its degrees of freedom.

    Each squared sum is divided by 1 − w, w the cluster's share of the tokens, since the ratio is fitted to the cluster
    itself (CR2 of Bell and McCaffrey, 2002; for clusters of one size the factor G/(G − 1)). Degrees of freedom: one less than
    the effective number of clusters, 1 / Σ w² (Kish).
    """
    index = np.unique(cluster, return_inverse=True)[1].ravel()
    sums, share = np.bincount(index, influence), np.bincount(index, weight)
    if len(sums) < 2:
        return math.nan, len(sums), math.nan
    variance = float(np.sum(sums**2 / np.maximum(1 - share, 1e-12)))
    return variance, len(sums), max(1.0, float(1 / np.sum(share**2)) - 1)


def _sample_noise(influence: Array, document: Array, sample: Array) -> float:
    """What a common mask adds: products of the influences of *different* documents in one sample (the second way of
    two-way clustering; Cameron, Gelbach and Miller, 2011). May come out negative, and then adds nothing."""
    by_sample = np.bincount(np.unique(sample, return_inverse=True)[1].ravel(), influence)
    pairs = np.unique(np.stack([sample, document]), axis=1, return_inverse=True)[1].ravel()
    return float(np.sum(by_sample**2) - np.sum(np.bincount(pairs, influence) ** 2))
