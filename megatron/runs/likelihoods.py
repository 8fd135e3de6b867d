"""What ``megatron likelihood --output FILE`` wrote: every likelihood of some models on the same tokens, and verdicts.

Typed, written and read here only; the report draws it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar, get_origin, get_type_hints

from megatron.errors import UserError
from megatron.files import make_folder, read_object, replace_file

# What a value says of the negative log-likelihood. A bound of the mixture is one of ancestral sampling in many steps.
EXACT, BOUND, MIXTURE = "exact", "upper bound", "upper bound of the mixture"
FLOOR = "lower bound of the mixture"
NAMED, FITTED = "named", "fitted on the selection half"  # where the weights of an ensemble come from
Record = TypeVar("Record", bound="Value | VerdictRecord | EnsembleRecord | Likelihoods")


@dataclass(frozen=True)
class Value:
    """One model by one estimator, nats per token.

    Attributes:
        model: its name.
        estimator: its name, with the sampler where the value is of one.
        kind: one of ``EXACT``, ``BOUND``, ``MIXTURE``, ``FLOOR``.
        nll: over all documents.
        standard_error, reach_95: of ``nll`` over documents; the second is half of its 95 % interval.
        documents: behind the errors.
        passes: forward passes a sample.
        near_ties: tokens that a sampler chose so narrowly that rounding may choose others.
        tokens: that were scored.
        seconds: it took in the call that wrote it.
    """

    model: str
    estimator: str
    kind: str
    nll: float
    standard_error: float
    reach_95: float
    documents: int
    passes: int
    near_ties: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class VerdictRecord:
    """Whether the second model is below the first, nats per token.

    Attributes:
        first, second: names of the models.
        estimators: two, of the first and of the second.
        second_below_first: ``yes``, ``no`` or ``undecided …``.
        gap: second minus first, paired.
        reach_95: half of its 95 % interval.
        measured_on: which documents.
        rests_on: ``exact values`` or ``a bound``.
    """

    first: str
    second: str
    estimators: list[str]
    second_below_first: str
    gap: float
    reach_95: float
    measured_on: str
    rests_on: str

    @property
    def answer(self) -> str:
        """The question and its answer."""
        return f"{self.second} below {self.first}: {self.second_below_first}"

    @property
    def reason(self) -> str:
        """The difference, what was compared, on what, and what the answer rests on."""
        one, other = self.estimators
        return (
            f"{self.gap:+.4f} ± {self.reach_95:.4f} ({other} against {one}), paired, on {self.measured_on}; rests on "
            f"{self.rests_on}"
        )


@dataclass(frozen=True)
class EnsembleRecord:
    """A model that is the mean of several.

    Attributes:
        name: of the model; where its weights are fitted, its values are of the report half of the documents.
        members: as ``--load`` takes them, with the weights where these are not equal.
        weights: ``NAMED`` or ``FITTED``.
        before, after: of fitted ones: nats per token on the selection half with the weights that were named and with these.
    """

    name: str
    members: str
    weights: str = NAMED
    before: float = math.nan
    after: float = math.nan

    @property
    def is_fitted(self) -> bool:
        """Whether the weights were chosen on these data."""
        return self.weights == FITTED


@dataclass(frozen=True)
class Likelihoods:
    """One file.

    Attributes:
        samples, seq_length: what was scored: tokens 1 to seq_length − 1 of each sample, given token 0.
        findings: every value.
        verdicts: every model against the first.
        near_tie_below: what counts as a near tie.
        ensembles: which of the models are means of several.
    """

    samples: int
    seq_length: int
    findings: list[Value]
    verdicts: list[VerdictRecord] = field(default_factory=list)
    near_tie_below: float = math.nan
    ensembles: list[EnsembleRecord] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        make_folder(path.parent)
        replace_file(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> Likelihoods:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: damaged, or another kind of file.
        """
        rule, fix = "it holds what megatron likelihood --output wrote", "delete it or write it again"
        record = read_object(path, rule=rule, fix=fix)
        try:
            findings = [_checked(Value(**row)) for row in record.pop("findings")]
            verdicts = [_checked(VerdictRecord(**row)) for row in record.pop("verdicts")]
            ensembles = [_checked(EnsembleRecord(**row)) for row in record.pop("ensembles", [])]
            return _checked(cls(**record, findings=findings, verdicts=verdicts, ensembles=ensembles))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error})", rule, fix) from None


def _checked(own: Record) -> Record:
    """The record, of which every value has the type that it should; a whole number is a real one, too.

    Raises:
        TypeError: it has not.
    """
    for name, kind in get_type_hints(type(own)).items():
        value, expected = getattr(own, name), get_origin(kind) or kind
        is_right = isinstance(value, (int, float) if expected is float else expected) and not isinstance(value, bool)
        if not is_right or (kind == list[str] and [*map(type, value)] != [str, str]):
            raise TypeError(f"{name} is {str(value)[:40]!r}")
    return own
