"""What a printed ± means: the error of a mean loss, or of a difference of two, over documents.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from megatron.files import replace_file

Array = np.ndarray
Half = Literal["selection", "report"]


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error.

    Attributes:
        value: the estimate, in nats per token for losses.
        error: its standard error in the same unit; NaN where one document says nothing about others.
        num_documents: documents behind it.
        degrees: degrees of freedom of ``error``: fewer than documents where some hold most of the tokens.
    """

    value: float
    error: float
    num_documents: int
    degrees: float


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
        sample: ArrayLike,
        document: ArrayLike,
        tokens: ArrayLike,
        loss: ArrayLike,
        excess: ArrayLike = 0.0,
        *,
        draws: int = 0,
    ) -> ValidationSums:
        """Entries in any order, of any number of passes: what is scored again (another draw, or a sample that a loader
        repeats) is averaged into one entry, so that repeats never make an error smaller.

        Args:
            sample, document, tokens, loss: one array [n] each, as the attributes say.
            excess: [n] weight of the tokens beyond their number, 0 in expectation. It is given back at the mean loss: what
                one document of a sample has of it, the others lack, so the whole stays as it is and its parts lose noise.
            draws: noise draws a sample; 0 for an exact loss.
        """
        pairs, index, counts = _pairs(sample, document)
        extra = np.broadcast_to(excess, index.shape)
        size, mean, extra = (np.bincount(index, np.ravel(values)) / counts for values in (tokens, loss, extra))
        if extra.any():  # of exact losses nothing is given back, and one of them may be infinite
            mean -= extra * (mean.sum() / size.sum())
        return ValidationSums(pairs[0], pairs[1], size.astype(np.int32), mean, draws)

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
        pairs, index, tokens = _pairs(owner[counted], document[counted])
        return ValidationSums(pairs[0], pairs[1], tokens.astype(np.int32), np.bincount(index, loss[counted]), draws)

    @property
    def num_documents(self) -> int:
        """Documents with a counted token."""
        return len(set(self.document.tolist()))  # np.unique without counts imports numpy.ma, a twentieth of a small run

    @property
    def num_samples(self) -> int:
        """Samples with a counted token."""
        return len(set(self.sample.tolist()))

    def with_halves(self, in_selection: Array) -> ValidationSums:
        """The same sums that know their halves; ``in_selection`` is [documents] bool, by index of the document."""
        return replace(self, in_selection=np.asarray(in_selection, bool)[self.document])

    def save(self, path: str | Path) -> None:
        """Write one compressed .npz file, whole or not at all; about 8 bytes an entry."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        replace_file(path, lambda file: np.savez_compressed(file, **arrays))


def mean_loss(sums: ValidationSums) -> Estimate:
    """Loss per token, Σ loss / Σ tokens, with its error."""
    return combined((1, sums))


def combined(*terms: tuple[int, ValidationSums]) -> Estimate:
    """Σ sign · loss per token, each a ratio Σ loss / Σ tokens, with the error of the whole.

    By linearisation of the ratios, clustered by document; of two validations it is paired: what makes a document hard for
    both cancels. Where noise is drawn, products of the influences of *different* documents in one sample are added, since
    one mask serves a sample (the second way of two-way clustering; Cameron, Gelbach and Miller, 2011); a negative sum of
    them adds nothing.

    Args:
        terms: (sign, sums), the sign 1 or −1.

    Returns:
        The value and its error; of infinite losses (texts that a sampler never draws) there is none, NaN.
    """
    ratios = [float(part.loss.sum() / part.tokens.sum()) for _, part in terms]
    value = sum(sign * ratio for (sign, _), ratio in zip(terms, ratios))
    if not math.isfinite(value):
        return Estimate(value, math.nan, len(np.unique(np.concatenate([part.document for _, part in terms]))), math.nan)
    influence = np.concatenate(
        [sign * (part.loss - ratio * part.tokens) / part.tokens.sum() for (sign, part), ratio in zip(terms, ratios)]
    )
    weight = np.concatenate([part.tokens / part.tokens.sum() / len(terms) for _, part in terms])
    document = np.concatenate([part.document for _, part in terms])
    sample = np.concatenate([part.sample for _, part in terms])
    variance, num_documents, degrees = _clustered(influence, weight, document)
    if any(part.draws for _, part in terms):
        by_sample = np.bincount(np.unique(sample, return_inverse=True)[1].ravel(), influence)
        by_pair = np.bincount(_pairs(sample, document)[1], influence)
        variance += max(0.0, float(np.sum(by_sample**2) - np.sum(by_pair**2)))
    return Estimate(value, math.sqrt(variance), num_documents, degrees)


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


def _pairs(sample: ArrayLike, document: ArrayLike) -> tuple[Array, Array, Array]:
    """The distinct (sample, document), int32 [2, pairs]; the pair of every entry; how many entries a pair has."""
    # One number a pair, in the order of pairs: numpy sorts numbers ten times as fast as columns.
    numbers = np.ravel(sample).astype(np.int64) * 2**32 + np.ravel(document).astype(np.int32)
    found, index, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    second = found.astype(np.int32)  # its last 32 bits
    return np.stack([(found - second >> 32).astype(np.int32), second]), index.ravel(), counts
