"""What ``megatron generalisation RUN`` wrote: losses of a run's checkpoints on documents that it was trained on and on others.

RUN/generalisation/record.json   what was scored, and how
RUN/generalisation/STEP.npz      sums of one checkpoint

Typed, written and read here only; the report draws it. A gap is unseen minus seen. Documents of the two sets are others, the
masks are the same, sample by sample; two checkpoints, and two runs on the same data, are paired by document.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.schema import AVERAGE, WEIGHT
from megatron.errors import UserError
from megatron.files import make_folder, read_object, replace_file
from megatron.runs.record import GENERALISATION
from megatron.runs.sums import welch
from megatron.statistics import Estimate, ValidationSums, combined, mean_loss

RECORD = "record.json"
_RULE = "megatron generalisation wrote it"
_FIX = "delete the folder, and run that again"


@dataclass(frozen=True)
class Measured:
    """One set of documents under one checkpoint.

    Attributes:
        sample, document: int32 [entries], a sample and a document in it.
        tokens: int32 [1 + bins, entries], scored tokens, of all and of each bin; in a bin of a bound those of the whole text.
        loss: float64 [1 + bins, entries], sum of their losses in nats.
        draws: of the noise; 0 where the loss is exact.
    """

    sample: np.ndarray
    document: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    draws: int = 0

    def sums(self, part: int) -> ValidationSums:
        """Of all (part 0) or of bin ``part − 1``."""
        kept = self.tokens[part] > 0
        columns = (self.sample[kept], self.document[kept], self.tokens[part, kept], self.loss[part, kept])
        return ValidationSums(*columns, draws=self.draws)


@dataclass(frozen=True)
class Point:
    """One checkpoint.

    Attributes:
        step, epoch: where in the training.
        seen, unseen: losses on the two sets.
    """

    step: int
    epoch: float
    seen: Measured
    unseen: Measured

    def loss(self, name: str, part: int = 0) -> Estimate:
        """Nats per token on the set ``seen`` or ``unseen``."""
        return mean_loss((self.seen if name == "seen" else self.unseen).sums(part))

    def gap(self, part: int = 0) -> Estimate:
        """Unseen minus seen, nats per token, with its error over documents and masks; NaN where a bin holds nothing."""
        if not (self.seen.tokens[part].any() and self.unseen.tokens[part].any()):
            return Estimate(math.nan, math.nan, 0, math.nan)
        return _apart(self.loss("unseen", part), self.loss("seen", part))


@dataclass(frozen=True)
class Protocol:
    """What must agree between two checkpoints that are compared.

    Attributes:
        run_id: of the run; not compared between runs.
        label: what the loss is, of :mod:`megatron.objectives.base`.
        estimator: how it was taken; "" where it is exact.
        bins: of the share that is hidden.
        seq_length: tokens of a sample, of which the first is given.
        seen, unseen: of each set: samples, documents, and a fingerprint of its tokens.
        weights: as trained, or their average.
    """

    run_id: str
    label: str
    estimator: str
    bins: int
    seq_length: int
    seen: dict[str, Any]
    unseen: dict[str, Any]
    weights: str = WEIGHT  # of records from before there were others

    @property
    def kind(self) -> str:
        """Label and estimator, for people, such as ``NLL bound, 16 passes``."""
        averaged = ", averaged weights" if self.weights == AVERAGE else ""
        return self.label + self.estimator.removeprefix("bound") + averaged

    def is_comparable(self, other: Protocol) -> bool:
        """Whether gaps of two runs are of the same documents."""
        return (self.seen, self.unseen, self.seq_length) == (other.seen, other.unseen, other.seq_length)


@dataclass(frozen=True)
class Generalisation:
    """The record of one run.

    Attributes:
        folder: of the run.
        protocol: of all its points.
        epochs: of each step that was measured.
    """

    folder: Path
    protocol: Protocol
    epochs: dict[int, float] = field(default_factory=dict)

    @classmethod
    def begin(cls, folder: Path, protocol: Protocol) -> Generalisation:
        """A record that goes on from one of the same protocol; another one is begun anew."""
        found = cls.load(folder)
        if found is not None and found.protocol == protocol:
            return found
        (folder / GENERALISATION / RECORD).unlink(missing_ok=True)  # first: it names the others
        for file in (folder / GENERALISATION).glob("*.npz"):
            file.unlink()
        return cls(folder, protocol)

    @classmethod
    def load(cls, folder: Path) -> Generalisation | None:
        """What was written for a run; None where nothing was.

        Raises:
            UserError: damaged, or of another kind.
        """
        path = folder / GENERALISATION / RECORD
        if not path.is_file():
            return None
        record = read_object(path, rule=_RULE, fix=_FIX)
        try:
            epochs = {int(step): float(epoch) for step, epoch in record["epochs"].items()}
            return cls(folder, Protocol(**record["protocol"]), epochs)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error})", _RULE, _FIX) from None

    def add(self, point: Point) -> None:
        """Write one checkpoint, then that it is there."""
        path = self.folder / GENERALISATION / f"{point.step}.npz"
        make_folder(path.parent)
        arrays = {
            f"{name}_{key}": value
            for name, own in (("seen", point.seen), ("unseen", point.unseen))
            for key, value in vars(own).items()
        }
        replace_file(path, lambda file: np.savez_compressed(file, **arrays))
        self.epochs[point.step] = point.epoch
        record = {
            "protocol": asdict(self.protocol),
            "epochs": {str(step): self.epochs[step] for step in sorted(self.epochs)},
        }
        replace_file(path.parent / RECORD, json.dumps(record, indent=1))

    @cached_property
    def points(self) -> list[Point]:
        """What was measured, in order of steps.

        Raises:
            UserError: a file is missing or damaged.
        """
        return [self._point(step) for step in sorted(self.epochs)]

    def _point(self, step: int) -> Point:
        path = self.folder / GENERALISATION / f"{step}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                seen, unseen = (
                    Measured(**{key: stored[f"{name}_{key}"] for key in ("sample", "document", "tokens", "loss")},
                             draws=int(stored[f"{name}_draws"])) for name in ("seen", "unseen")
                )  # fmt: skip
        except Exception as error:  # numpy and zip meet damaged bytes with errors of many kinds
            raise UserError(f"{path} cannot be read ({error})", _RULE, _FIX) from None
        return Point(step, self.epochs[step], seen, unseen)


def gap_difference(first: Point, second: Point) -> Estimate:
    """Gap of ``second`` minus that of ``first``: of checkpoints, or of runs, on the same two sets, each paired by document."""
    pairs = ((second.unseen, first.unseen), (second.seen, first.seen))
    unseen, seen = (combined((1, other.sums(0)), (-1, one.sums(0))) for other, one in pairs)
    return _apart(unseen, seen)


def _apart(unseen: Estimate, seen: Estimate) -> Estimate:
    """A difference between two sets that share no document: variances add up, degrees of freedom are those of Welch (1947).

    What both have in common, the masks of a sample, would make it a little smaller, and is left out.
    """
    degrees = welch(*((own.error**2, own.degrees) for own in (unseen, seen)))
    number = unseen.num_documents + seen.num_documents
    return Estimate(unseen.value - seen.value, math.hypot(unseen.error, seen.error), number, degrees)
