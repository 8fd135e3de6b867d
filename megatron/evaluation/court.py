"""Several models on the same tokens: every likelihood that each of them has, and whether one is better than another.

Rules that are the same for all: a sample is the first S tokens that training would read, its token 0 is given, tokens 1 to
S − 1 are scored; the softmax runs over the tokens that can be drawn (not the mask, not padding rows). So values differ a
little from those of a validation, where AR scores tokens 1 to S and diffusion 0 to S − 1. Errors are over documents, differences
are paired by sample and document (:mod:`megatron.statistics`); a policy is chosen on the selection half of the documents and its
value reported on the other half, since the best of many is better where it was chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron.data.dataset import BlendedDataset, GPTDataset
from megatron.data.identity import selection_half
from megatron.evaluation.exact import TokenScores
from megatron.evaluation.requests import ResultCache
from megatron.evaluation.scorer import Request
from megatron.evaluation.witnesses import Witness
from megatron.generation.policies import NEAR_TIE
from megatron.parallel.context import ParallelContext
from megatron.runs.likelihoods import BOUND, EXACT, MIXTURE, EnsembleRecord, Likelihoods, Value, VerdictRecord
from megatron.runs.sums import difference, halves, reach
from megatron.statistics import Estimate, ValidationSums, mean_loss

ENTRY = "sample, document, tokens, loss, near ties"  # what is kept of a sample
Entry = tuple[int, int, int, float, int]


class Samples(NamedTuple):
    """What is scored.

    Attributes:
        tokens: [samples, S] int64.
        documents: [samples, S] int64, the document of each token.
        in_selection: [documents] bool, whether a document is of the selection half.
    """

    tokens: np.ndarray
    documents: np.ndarray
    in_selection: np.ndarray

    @classmethod
    def of(cls, dataset: GPTDataset | BlendedDataset, indices: Sequence[int], *, seq_length: int) -> Samples:
        """Some samples of a data set, in order; from here on they are numbered from 0."""
        parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
        tokens = np.stack([dataset[index][:seq_length] for index in indices]).astype(np.int64)
        documents = np.stack([dataset.pieces(index).documents[:seq_length] for index in indices])
        return cls(tokens, documents, selection_half(*(part.documents for part in parts)))

    def requests(self, indices: Sequence[int]) -> list[Request]:
        """Tokens 1 to S − 1 given token 0; the noise of a sample is that of its number."""
        return [
            Request((row[0],), tuple(row[1:]), str(index))
            for index, row in zip(indices, self.tokens[list(indices)].tolist())
        ]


@dataclass
class Finding:
    """What one witness said.

    Attributes:
        model: name of the model.
        witness: its estimator's name.
        kind: EXACT, BOUND, MIXTURE or FLOOR.
        passes: forward passes a sample.
        sums: losses by sample and document.
        near_ties: tokens that were chosen so narrowly that rounding may choose others (``NEAR_TIE`` of generation/policies.py).
        seconds: spent in this call; what was known before costs nothing.
        is_fitted: the model was fitted to the selection half, so that the other half alone says what it is worth.
    """

    model: str
    witness: str
    kind: str
    passes: int
    sums: ValidationSums
    near_ties: int = 0
    seconds: float = 0.0
    is_fitted: bool = False

    @property
    def value(self) -> Estimate:
        """Nats per token over all documents, over the report half where the other one was fitted to."""
        return mean_loss(_half(self, 1) if self.is_fitted else self.sums)

    def record(self) -> Value:
        """As it is written."""
        value = self.value
        return Value(
            self.model, self.witness, self.kind, value.value, value.error, reach(value), value.num_documents, self.passes,
            self.near_ties, int(self.sums.tokens.sum()), self.seconds,
        )  # fmt: skip


def hear(witness: Witness, samples: Samples, *, model: str, cache: ResultCache, context: ParallelContext,
         chunk: int, on_samples: Callable[[int], object] = lambda count: None) -> Finding:  # fmt: skip
    """Score all samples by one witness, spread over data-parallel ranks; what the cache holds is not scored again."""
    began = time.monotonic()
    own = range(context.dp.rank, len(samples.tokens), context.dp.size)
    found: list[list[Entry]] = []
    for indices in _chunks(own, chunk):
        rows = {index: (samples.tokens[index].tolist(), samples.documents[index].tolist()) for index in indices}
        keys = {index: cache.key(witness.name, ENTRY, index, *rows[index]) for index in indices}
        missing = [index for index in indices if not _is_known(cache.get(keys[index]))]
        for index, scores in zip(missing, witness.scores(samples.requests(missing)) if missing else []):
            cache.put(keys[index], _by_document(index, samples.documents[index, 1:], scores))
        found += [cache.get(keys[index]) for index in indices]
        on_samples(len(indices))
    entries = [entry for part in context.gather_objects(found)[:: context.tp.size] for rows in part for entry in rows]
    sample, document, tokens, loss, near_ties = (np.array(column) for column in zip(*entries))
    sums = ValidationSums.collect(sample, document, tokens, loss, draws=witness.draws)
    return Finding(
        model, witness.name, witness.kind, witness.passes(samples.tokens.shape[1] - 1),
        sums.with_halves(samples.in_selection), int(near_ties.sum()), time.monotonic() - began,
    )  # fmt: skip


def _is_known(kept: object) -> bool:
    """Whether what the cache holds are entries; a damaged line is scored again."""
    return (
        isinstance(kept, list | tuple)
        and len(kept) > 0
        and all(isinstance(own, list | tuple) and len(own) == 5 for own in kept)
    )


def _chunks(indices: range, size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def _by_document(index: int, documents: np.ndarray, scores: TokenScores) -> list[Entry]:
    """An entry for every document in a sample."""
    parts = ((document, documents == document) for document in np.unique(documents))
    return [
        (index, int(document), int(own.sum()), -float(scores.logprobs[own].sum()), int(scores.near_ties[own].sum()))
        for document, own in parts
    ]


@dataclass(frozen=True)
class Verdict:
    """Whether model B is below model A, nats per token.

    Attributes:
        first, second: the findings that were compared, A and B.
        gap: B minus A, paired.
        reach: half of its 95 % interval.
        where: what it was measured on.
    """

    first: Finding
    second: Finding
    gap: Estimate
    reach: float
    where: str

    @property
    def answer(self) -> str:
        """``yes``, ``no``, or ``undecided``: within the error, or above by a bound, which can only be too high."""
        if not abs(self.gap.value) > self.reach:
            return "undecided at 95 %"
        is_below = self.gap.value < 0
        loser = self.first if is_below else self.second
        if loser.kind != EXACT:
            return f"undecided: {loser.witness} lies above, and can only be too high"
        return "yes" if is_below else "no"

    @property
    def basis(self) -> str:
        """What the answer rests on."""
        kinds = {self.first.kind, self.second.kind}
        return "exact values" if kinds == {EXACT} else "a bound"

    def record(self) -> VerdictRecord:
        """As it is written."""
        one, other = self.first, self.second
        estimators = [one.witness, other.witness]
        return VerdictRecord(
            one.model, other.model, estimators, self.answer, self.gap.value, self.reach, self.where, self.basis
        )


@dataclass
class Court:
    """Findings of several models; the first one is what the others are compared with."""

    findings: list[Finding] = field(default_factory=list)

    def verdicts(self) -> list[Verdict]:
        """B against A for every other model B, and fitted weights against those they replace: by the best exact value of B, and
        by its bound."""
        models = list(dict.fromkeys(own.model for own in self.findings))
        pairs = [(models[0], model) for model in models[1:]]
        pairs += [(model, fitted_name(model)) for model in models[1:] if fitted_name(model) in models]
        return [verdict for pair in pairs for verdict in self._of(*pair)]

    def record(self, samples: Samples, ensembles: Sequence[EnsembleRecord] = ()) -> Likelihoods:
        """As it is written; ``ensembles`` are those among the models."""
        findings, verdicts = [own.record() for own in self.findings], [own.record() for own in self.verdicts()]
        count, length = samples.tokens.shape
        return Likelihoods(count, length, findings, verdicts, near_tie_below=NEAR_TIE, ensembles=[*ensembles])

    def _of(self, first: str, second: str) -> Iterator[Verdict]:
        for kinds in ((EXACT,), (BOUND, MIXTURE)):
            ours = self._named(first, (EXACT,)) or self._named(first, (BOUND, MIXTURE))
            theirs = self._named(second, kinds)
            if ours and theirs:
                yield _verdict(ours, theirs)

    def _named(self, model: str, kinds: Sequence[str]) -> list[Finding]:
        return [own for own in self.findings if own.model == model and own.kind in kinds]


def fitted_name(model: str) -> str:
    """What an ensemble is called once its weights are fitted."""
    return f"{model}, fitted"


def _verdict(ours: Sequence[Finding], theirs: Sequence[Finding]) -> Verdict:
    """Each side's best of several on the selection half, compared on the report half; of one each, on all documents."""
    first, second, where = ours[0], theirs[0], "all documents"
    one, other = first.sums, second.sums
    if len(ours) > 1 or len(theirs) > 1 or first.is_fitted or second.is_fitted:
        where = "all documents, among which the best was chosen: there are no two halves"
        if all(halves(own.sums) is not None for own in (*ours, *theirs)):
            first, second = (min(side, key=lambda own: mean_loss(_half(own, 0)).value) for side in (ours, theirs))
            one, other, where = _half(first, 1), _half(second, 1), "documents that no choice saw"
        else:
            first, second = (min(side, key=lambda own: own.value.value) for side in (ours, theirs))
            one, other = first.sums, second.sums
    gap = difference(one, other)
    return Verdict(first, second, gap, reach(gap), where)


def _half(finding: Finding, index: int) -> ValidationSums:
    parts = halves(finding.sums)
    assert parts is not None
    return parts[index]
