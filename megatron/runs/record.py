"""What a run directory holds besides checkpoints: typed records, written and read here only.

RUN/run.json             who the run is: settings it began with, data, and every attempt at it
RUN/metrics.jsonl        one row a line: TrainRow or ValidRow
RUN/validations/*.npz    sums a (sample, document) of each validation
RUN/evaluations/*.json   evaluations of finished checkpoints: records of their own, they touch no curve
RUN/generalisation/      losses on seen and unseen documents (runs/generalisation.py)
RUN/best.json            the best validation so far
RUN/stopped.json         there while a run is stopped before its end: why, and at which step
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron.checkpoint.files import ABANDONED, BEST, LATEST, MANIFEST, VALIDATIONS, delete_tag, tag_folders
from megatron.config.schema import AVERAGE, BERNOULLI, WEIGHT
from megatron.files import one_at_a_time, replace_file, written_whole
from megatron.objectives.base import EXACT

DIVERGED = "steps in a row had a NaN or infinite gradient"  # what a run that diverged says last, with their number
RECORD, METRICS, STOPPED = "run.json", "metrics.jsonl", "stopped.json"
RECORD_LOCK = ".run.json.lock"  # held for a moment by whoever changes run.json: the run itself, and branches of it
EVALUATIONS, GENERALISATION = "evaluations", "generalisation"
OVER_DOCUMENTS = "documents"  # `se_kind` of errors clustered by document (megatron/statistics.py)
# Kinds of rows: of training, and of validations of the weights as trained and of their average (--ema-decay).
TRAIN, VALID, VALID_AVERAGE = "train", "valid", "valid_ema"
WEIGHTS = {VALID: WEIGHT, VALID_AVERAGE: AVERAGE}
Record = TypeVar("Record")
PROTOCOL = ("label", "estimator", "num_mc", "num_samples", "data")  # what makes two validations of a run comparable


@dataclass(frozen=True)
class Attempt:
    """One start of the program on a run.

    Attributes:
        started: local time, ISO 8601.
        command: the command line.
        commit: of this project's checkout, with ``+`` where files differ from it; None outside one.
        version: of this project.
        host: first rank's.
        layout: world, tp, pp, dp and micro-batch sizes, ZeRO stage, engine.
        versions: of Python, packages, CUDA, NCCL and the driver.
        device: name of the accelerator or processor.
        from_step, from_samples: where it began.
        from_tag: checkpoint it loaded, or None.
        changed: settings that differ from those before, ``section.name`` → [before, now]; they hold from ``from_step``.
        ended: reason, step and time of its end; None while it runs or where it was killed.
    """

    started: str
    command: list[str]
    commit: str | None
    version: str
    host: str
    layout: dict[str, int | str]
    versions: dict[str, str]
    device: str
    from_step: int = 0
    from_samples: int = 0
    from_tag: str | None = None
    changed: dict[str, list[Any]] = field(default_factory=dict)
    ended: dict[str, Any] | None = None


@dataclass(frozen=True)
class Link:
    """Another run: its folder, its run id, and the checkpoint (and step) that it shares with this one."""

    run: str
    run_id: str
    tag: str
    step: int


@dataclass(frozen=True)
class Branch(Link):
    """Where a run left another one (``--branch-from``); kept in run.json and in its checkpoints.

    Attributes:
        samples: consumed by then.
        order_samples: that the data order of both is planned for.
        changed: settings that differ from there on, ``section.name`` → [before, now].
    """

    samples: int
    order_samples: int
    changed: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """``run.json``. Settings are those that the run began with; what changed later stands in its attempts.

    Attributes:
        objective, label, train_label: what was trained, what its validation and its training loss may be called.
        config: every setting by section, as resolved.
        parameters: ``total`` as trained, ``embedding`` among them, ``for_compute`` N of C = 6·N·D.
        unique_tokens: tokens of one epoch.
        train_samples, train_tokens, epochs, train_flops: planned length, of the last attempt.
        layout, versions, device, started: of the first attempt.
        text_bytes_per_token: of the training data, where recorded.
        run_id: of this run alone; checkpoints carry it.
        noise_scheme: of masks, times and orders (``megatron/randomness.py``).
        data, tokenizer: fingerprints: what the data are, wherever they lie.
        attempts: every start of the program on this run.
        origins: where the settings come from that were not left at their defaults, by field.
        branch: the run that this one left; None for all others.
        branches: runs that left this one. Theirs to add (``runs/branches.py``): the run keeps what stands there.
        imported: of a run that others made (imported.py): source, licence, file and its SHA-256, fields; else empty.
    """

    objective: str
    label: str
    train_label: str
    config: dict[str, Any]
    parameters: dict[str, int]
    unique_tokens: int
    train_samples: int
    train_tokens: int
    epochs: float
    train_flops: float
    layout: dict[str, int | str]
    versions: dict[str, str]
    device: str
    started: str
    text_bytes_per_token: float | None
    run_id: str = ""
    noise_scheme: int = 1
    data: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    branch: Branch | None = None
    branches: list[Link] = field(default_factory=list)
    imported: dict[str, str] = field(default_factory=dict)
    format: int = 1

    def write(self, run_dir: Path) -> None:
        """Replace ``run.json``; branches that were added meanwhile stay."""
        with one_at_a_time(run_dir / RECORD_LOCK):
            there = RunRecord.read(run_dir)
            is_same = there is not None and there.run_id == self.run_id
            branches = there.branches if there is not None and is_same else self.branches
            replace_file(run_dir / RECORD, json.dumps(asdict(replace(self, branches=branches)), indent=1))

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord | None:
        """The record of a run; None where there is none that can be read (a damaged one is no reason to lose a run)."""
        try:
            values = json.loads((run_dir / RECORD).read_bytes())
            for name, kind in (("attempts", Attempt), ("branches", Link)):
                values[name] = [of_known_fields(kind, entry) for entry in values.get(name, [])]
            return of_known_fields(cls, {**values, "branch": branch_of(values)})
        except (OSError, ValueError, TypeError, AttributeError):  # no JSON, of another kind, or fields are missing
            return None


def branch_of(values: Mapping[str, Any]) -> Branch | None:
    """The branch that a manifest or a run.json records."""
    found = values.get("branch")
    return None if found is None else of_known_fields(Branch, found)


def of_known_fields(cls: type[Record], values: dict[str, Any]) -> Record:
    """A record from JSON; fields of other versions are passed over.

    Raises:
        TypeError: a field is missing.
    """
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Position:
    """Where a row of metrics.jsonl stands; all five count from the start of the run."""

    step: int
    samples: int
    tokens: int
    epoch: float
    flops: float


@dataclass(frozen=True)
class TrainRow(Position):
    """One line of training: the mean over a log interval."""

    loss: float
    lr: float
    grad_norm: float
    seconds: float
    step_seconds: float
    batch_size: int
    tokens_per_second: float
    tflops: float
    mfu: float | None
    skipped_steps: int
    kind: str = TRAIN


@dataclass(frozen=True)
class ValidRow(Position):
    """One validation: nll in nats per token ± its standard error, what it is, and how it was taken.

    Attributes:
        nll_se: standard error of ``nll`` over documents (``se_kind`` says so), noise included.
        num_samples: distinct samples of seq_length tokens; ``num_documents`` documents have tokens in them.
        estimator: how a bound was estimated (``--valid-estimator``); "" where the loss is exact.
        data: fingerprint of the validation data.
        sums: file under the run directory with the sums a (sample, document).
        ar_nll, ar_nll_se: exact NLL of the same weights as an autoregressive model, where training makes them one too (dual,
            ``--block-ar-weight``) and ``nll`` is not it already, ± over documents.
        mdm_nll, mdm_nll_se: bound of the same weights as masked diffusion (dual), where ``nll`` is not it already.
        kind: VALID, or VALID_AVERAGE for the averaged weights.
    """

    nll: float
    nll_se: float | None
    label: str
    num_mc: int
    num_samples: int
    ppl: float | None
    bits_per_byte: float | None
    best: bool
    num_documents: int | None = None
    se_kind: str = OVER_DOCUMENTS
    estimator: str = ""
    data: str = ""
    sums: str | None = None
    gap: float | None = None
    gap_se: float | None = None
    gap_accuracy: float | None = None
    gap_label: str | None = None
    ar_nll: float | None = None
    ar_nll_se: float | None = None
    mdm_nll: float | None = None
    mdm_nll_se: float | None = None
    kind: str = VALID

    @property
    def weights(self) -> str:
        """Kind of the weights that were validated."""
        return WEIGHTS[self.kind]

    @property
    def suffix(self) -> str:
        """Ending that tells files of validations of the averaged weights apart."""
        return "" if self.kind == VALID else f"_{self.weights}"


Row = TrainRow | ValidRow


def json_line(row: Row) -> str:
    """One line of ``metrics.jsonl``. NaN and infinity are not JSON; they become null, and what is not there is left out."""
    optional = {item.name for item in fields(row) if item.default is None}
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row).items()
        if not (name in optional and value is None)
    }
    return json.dumps({"kind": values.pop("kind"), **values}) + "\n"


def parse_line(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """One line of a metrics file: its record or None, and whether text was lost.

    A record that was once appended to a line torn by a kill is found behind it.
    """
    starts = [0]
    while (start := line.find(b'{"kind"', starts[-1] + 1)) > 0:
        starts.append(start)
    for start in starts:
        try:
            row = json.loads(line[start:])
        except (ValueError, RecursionError):  # torn, or not even UTF-8
            continue
        if isinstance(row, dict):
            return row, start > 0
    return None, True


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line, in order; what is torn or damaged is passed over. An absent file has none."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [record for line in lines if line.strip() and (record := parse_line(line)[0]) is not None]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Complete rows of a metrics file, in order."""
    rows = read_records(path)
    return [row for row in rows if isinstance(row.get("step"), int) and row.get("kind") in (TRAIN, *WEIGHTS)]


class MetricsFile:
    """``metrics.jsonl``, open for a run that trains."""

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        """Args:
        run_dir: folder of the run.
        last_step: rows of later steps, left by an interrupted attempt, are dropped: they will be written again.
        """
        self.path = run_dir / METRICS
        found = read_rows(self.path)
        rows = [row for row in found if row["step"] <= last_step]
        # A validation is there with the row of the trained weights, which is its last.
        self.validated = {row["step"] for row in rows if row["kind"] == VALID}
        rows = [row for row in rows if row["kind"] != VALID_AVERAGE or row["step"] in self.validated]
        self.rows, self.has_dropped = rows, len(rows) < len(found)
        if self.path.exists():
            replace_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        validations = (_validation(row) for row in rows if row["kind"] in WEIGHTS)
        self._valid = [row for row in validations if row is not None]
        with written_whole(self.path):
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, row: Row) -> None:
        """Append one row.

        Raises:
            Failure: the disk does not take it.
        """
        if isinstance(row, ValidRow):
            self._valid.append(row)
        fix = "free space on that disk and start again: the run continues from its newest checkpoint"
        with written_whole(self.path, "every row of a run is kept", fix):
            self._file.write(json_line(row))
            self._file.flush()

    def best(self, *last: ValidRow) -> ValidRow | None:
        """The best of the validations that were taken as the last one was, of trained weights or of their average; the earlier
        of two that are equal.

        Args:
            last: validations that are not written yet.
        """
        rows = [*self._valid, *last]
        # Rows from before the data were recorded ("") belong to the curve that goes on from them.
        same = [row for row in rows if all(getattr(row, name) in (getattr(rows[-1], name), "") for name in PROTOCOL)]
        return min((row for row in same if math.isfinite(row.nll)), key=lambda row: row.nll, default=None)

    def close(self) -> None:
        """Close the file; rows are flushed as they come."""
        with suppress(OSError):  # a full disk refuses the same bytes again
            self._file.close()


def estimator_of(row: Mapping[str, Any]) -> str:
    """How a recorded validation was estimated; before there was a choice, by coins where there was noise."""
    return str(row.get("estimator", "" if row["label"] == EXACT else BERNOULLI))


def kind_of(label: str, num_mc: int, estimator: str, weights: str = WEIGHT) -> str:
    """What a validation is, for people: ``NLL (exact)``, ``NLL bound (2 exact-count-antithetic draws)``."""
    text = f"{label} ({num_mc} {estimator} draw{'s' * (num_mc > 1)})" if estimator else label
    return text if weights == WEIGHT else f"{text} of the averaged weights"


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run already."""
    return any((folder / name).exists() for name in (RECORD, METRICS)) or any(folder.glob(f"global_step*/{MANIFEST}"))


def clear_run(folder: Path) -> None:
    """Remove a run from its folder (``--overwrite``): its records and checkpoints, nothing else."""
    for tag in tag_folders(folder):
        delete_tag(tag)
    for name in (LATEST, RECORD, METRICS, BEST, STOPPED, "wandb_id"):
        (folder / name).unlink(missing_ok=True)
    for name in (VALIDATIONS, EVALUATIONS, GENERALISATION, ABANDONED):
        shutil.rmtree(folder / name, ignore_errors=True)


def write_evaluation(run_dir: Path, record: dict[str, Any], *, name: str) -> Path:
    """Add an evaluation of a checkpoint: a record of its own beside the run that it judges, under a new name."""
    path, number = run_dir / EVALUATIONS / f"{name}.json", 0
    with one_at_a_time(path.with_name(".lock")):  # several may judge one run at a time
        while path.exists():
            path, number = path.with_name(f"{name}-{number + 1}.json"), number + 1
        replace_file(path, json.dumps(record, indent=1))
    return path


def _validation(values: dict[str, Any]) -> ValidRow | None:
    """A row of a file; None where it lacks fields (damaged) or has no likelihood (not finite)."""
    try:
        row = of_known_fields(ValidRow, {**values, "estimator": estimator_of(values)})
    except (TypeError, KeyError):
        return None
    return row if isinstance(row.nll, float) else None
