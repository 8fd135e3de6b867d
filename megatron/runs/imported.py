"""Runs that others made, as run directories of ours: a record that says whose they are, and their validation losses.

A table has one row a run, or (``curve``) one row a validation; an event log of TensorBoard is a curve. Nothing is made up:
what a source does not say is empty in the record, and reports and fits name the source beside every number.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron.errors import Failure, UserError, require
from megatron.files import make_folder, replace_file, sha256_of
from megatron.runs.counts import parse_count
from megatron.runs.record import METRICS, RunRecord, ValidRow, holds_run, json_line

ALL = "all"
"""``unique_tokens`` of runs that read every token once."""
STEP = "step"
EVENTS = "events.out.tfevents"
"""Names of TensorBoard's event files begin like this."""
Row = Mapping[str, str | float]


@dataclass(frozen=True)
class Table:
    """Named columns. ``name``: of the run, where the whole table is one."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    place: Path
    name: str = ""


@dataclass(frozen=True)
class Fields:
    """Where each field comes from: a column, a column times a factor (``tokens_M*1e6``), or one number for all rows.

    Attributes:
        loss: validation loss, nats per token.
        parameters: N of C = 6·N·D.
        unique_tokens: tokens of one epoch; ``all`` where every token was read once.
        tokens, flops: training tokens, or the FLOPs that they follow from, D = C/(6·N); one of them.
        loss_se: standard error of the loss; "" where it is not known.
        name: column with the name of the run; "" numbers the rows.
    """

    loss: str
    parameters: str
    unique_tokens: str
    tokens: str = ""
    flops: str = ""
    loss_se: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        require(
            bool(self.tokens) != bool(self.flops),
            f"tokens {self.tokens or 'not given'}, flops {self.flops or 'not given'}",
            "training tokens are given, or follow from the FLOPs of 6·N·D",
            "name one of --tokens and --flops",
        )


@dataclass(frozen=True)
class Origin:
    """Whose runs these are. ``label``: what their loss is, "NLL (exact)" or "NLL bound"."""

    source: str
    licence: str
    objective: str
    label: str

    def __post_init__(self) -> None:
        for name in ("source", "licence"):
            require(
                bool(getattr(self, name).strip()),
                f"no {name}",
                "runs of others carry their source and licence wherever they are shown",
                f"name it with --{name}",
            )


@dataclass
class Imported:
    """One run to be: its size, its data, and (step, tokens, loss, standard error) of its validations."""

    name: str
    parameters: float
    unique_tokens: float
    points: list[tuple[int, float, float, float]] = field(default_factory=list)


def read_table(path: Path) -> Table:
    """A CSV file with a line of column names.

    Raises:
        UserError: no such table.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = tuple(reader.fieldnames or ())
            rows = tuple(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}", "a table is CSV in UTF-8", "write it as such") from None
    rule, fix = "a table has a line of column names and rows of as many values", "write it as CSV with commas"
    require(len(columns) > 1 and len(rows), f"{path} has {len(columns)} columns and {len(rows)} rows", rule, fix)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    require(not twice, f"{path} has two columns {', '.join(twice)}", rule + ", each name once", "rename one of them")
    broken = next((number for number, row in enumerate(rows, 1) if None in row or None in row.values()), None)
    require(broken is None, f"{path}, row {broken}: more or fewer values than column names", rule, fix)
    return Table(columns, rows, path)


def read_event_logs(place: Path) -> list[Table]:
    """TensorBoard's scalars, one table for each folder with event files at any depth: ``step`` and a column a tag.

    Raises:
        UserError: no scalar there.
        Failure: TensorBoard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise Failure(
            f"{place} is a TensorBoard log, and the package tensorboard is not installed",
            "TensorBoard's own reader reads its logs",
            "pip install tensorboard, or import a CSV of them",
        ) from None
    files = [place] if place.is_file() else sorted(place.glob(f"**/{EVENTS}*"))
    tables = []
    folders = [*dict.fromkeys(file.parent if place.is_dir() else file for file in files)]
    called = Counter(folder.name for folder in folders)
    for folder in folders:
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        tags = tuple(log.Tags()["scalars"])
        by_step: dict[int, dict[str, str | float]] = {}
        for tag in tags:
            for event in log.Scalars(tag):
                by_step.setdefault(event.step, {STEP: float(event.step)})[tag] = event.value
        name = folder.resolve().name if folder.is_dir() else folder.resolve().parent.name
        if called[folder.name] > 1:  # run1/tb, run2/tb
            name = "-".join(folder.relative_to(place).parts) or name
        if tags:
            rows = tuple(by_step[step] for step in sorted(by_step))
            tables.append(Table((STEP, *tags), rows, folder, name))
    require(
        bool(tables), f"{place} holds no scalars of TensorBoard", f"its files are called {EVENTS}…", "name their folder"
    )
    return tables


def collect(table: Table, fields: Fields, *, curve: bool = False) -> tuple[list[Imported], list[str]]:
    """The runs of a table, and in words the rows that are left out (no finite, positive loss).

    Args:
        table: rows; in an event log a value that a step lacks is that of the step before.
        fields: which column is what.
        curve: rows of one name are validations of one run; else every row is a finished run.

    Raises:
        UserError: a column that is not there, a value that is no count, a run of two sizes, or of two losses at one place.
    """
    runs: dict[str, Imported] = {}  # of a curve by its name, which may be no name of a folder
    left_out: list[str] = []
    values: dict[str, str | float] = {}
    for number, row in enumerate(table.rows, 1):
        where = f"{table.place}, row {number}"
        values = {**values, **row} if table.name else dict(row)
        loss = _loss(values, row, fields, table)
        if loss is None:
            if not table.name:  # most steps of a log have no validation
                left_out.append(f"{where}: no finite, positive loss")
            continue
        name = table.name or str(values[fields.name] if fields.name else f"{table.place.stem}-{number}")
        found = _run(values, fields, table, name, where)
        if curve or table.name:
            kept = runs.setdefault(name, found)
            same = math.isclose(kept.parameters, found.parameters, rel_tol=1e-6)
            require(same, f"{where}: run {name} has two sizes", "a run has one", "correct the table")
            found, kept.unique_tokens = kept, max(kept.unique_tokens, found.unique_tokens)
        else:
            runs[str(number)] = found
        step = _step(values, where) if STEP in table.columns else 0
        tokens = _tokens(values, fields, table, found.parameters, where)
        error = _value(values, fields.loss_se, table, where, least=0) if fields.loss_se else math.nan
        found.points.append((step, tokens, loss, error))
    for run in runs.values():
        given, fix = f"{table.place}: run {run.name} has no training tokens", "name other --tokens or --unique-tokens"
        require(run.unique_tokens >= 1, given, "a run was trained on some", fix)
        _put_in_order(run, table, has_steps=STEP in table.columns)
    return list(runs.values()), left_out


def _put_in_order(run: Imported, table: Table, *, has_steps: bool) -> None:
    """Sort the points of a curve by step, where the table has it, and tokens; without one they are numbered."""
    points = sorted(run.points, key=lambda point: point[:2])
    place = 0 if has_steps else 1
    twice = next((one for one, other in itertools.pairwise(points) if one[place] == other[place]), None)
    if twice is not None:
        where = f"step {twice[0]}" if has_steps else f"{twice[1]:g} tokens"
        given = f"{table.place}: run {run.name} has two losses at {where}"
        raise UserError(given, "a curve has one at each place", "correct the table, or tell its runs apart with --name")
    run.points = points if has_steps else [(number, *point[1:]) for number, point in enumerate(points, 1)]


def name_folders(runs: Iterable[Imported]) -> None:
    """Make the names of runs those of folders, each its own: runs of one name differ in their seed."""
    taken: set[str] = set()
    for run in runs:
        name = found = re.sub(r"[^\w.+-]+", "_", run.name).strip("._") or "run"
        number = 1
        while found in taken:
            number += 1
            found = f"{name}-{number}"
        taken.add(found)
        run.name = found


def check_free(folder: Path) -> None:
    """Raises:
    UserError: the folder holds a run.
    """
    free = not holds_run(folder)
    require(free, f"{folder} holds a run", "an import overwrites none", "remove it or name another folder")


def write_run(run: Imported, folder: Path, *, origin: Origin, place: Path, fields: Fields) -> None:
    """Write ``run.json`` and ``metrics.jsonl`` of an imported run.

    Raises:
        UserError: the folder holds a run.
    """
    check_free(folder)
    make_folder(folder)
    last = max(tokens for _, tokens, _, _ in run.points)
    record = RunRecord(
        objective=origin.objective,
        label=origin.label,
        train_label="",
        config={},
        parameters={"total": round(run.parameters), "embedding": 0, "for_compute": round(run.parameters)},
        unique_tokens=round(run.unique_tokens),
        train_samples=0,
        train_tokens=round(last),
        epochs=last / run.unique_tokens,
        train_flops=6.0 * run.parameters * last,
        layout={},
        versions={},
        device="",
        started="",
        text_bytes_per_token=None,
        imported={
            "source": origin.source,
            "licence": origin.licence,
            "file": place.name,
            "sha256": _sha256(place),
            "fields": json.dumps({name: value for name, value in asdict(fields).items() if value}),
        },
    )
    rows = [json_line(_row(run, point, label=origin.label)) for point in run.points]
    replace_file(folder / METRICS, "".join(rows))
    record.write(folder)


def _row(run: Imported, point: tuple[int, float, float, float], *, label: str) -> ValidRow:
    step, tokens, loss, error = point
    return ValidRow(
        step=step,
        samples=0,
        tokens=round(tokens),
        epoch=tokens / run.unique_tokens,
        flops=6.0 * run.parameters * tokens,
        nll=loss,
        nll_se=error,
        label=label,
        num_mc=1,
        num_samples=0,
        ppl=math.exp(min(loss, 700.0)),
        bits_per_byte=None,
        best=False,
    )


def _run(values: Row, fields: Fields, table: Table, name: str, where: str) -> Imported:
    parameters = _value(values, fields.parameters, table, where)
    tokens = _tokens(values, fields, table, parameters, where)
    unique = tokens if fields.unique_tokens == ALL else _value(values, fields.unique_tokens, table, where)
    return Imported(name, parameters, min(unique, tokens) if not table.name else unique)


def _tokens(values: Row, fields: Fields, table: Table, parameters: float, where: str) -> float:
    least = 0 if table.name else 1  # a log may begin with a validation before the first step
    if fields.tokens:
        return _value(values, fields.tokens, table, where, least=least)
    return _value(values, fields.flops, table, where, least=least * 6 * parameters) / (6 * parameters)


def _step(values: Row, where: str) -> int:
    try:
        return int(float(values[STEP]))
    except (ValueError, OverflowError):
        rule = "the column step holds whole numbers, by which a curve is in order"
        raise UserError(f"{where}: step is {values[STEP]!r}", rule, "correct the table, or rename the column") from None


def _loss(values: Row, row: Row, fields: Fields, table: Table) -> float | None:
    """The loss of a row; None where it has none that can be used. The column must be there."""
    column, factor = _column(fields.loss, table)
    if column is None:
        raise UserError(
            f"loss {fields.loss}", f"the columns are {', '.join(table.columns)}", "name the one with the loss"
        )
    try:
        loss = float(row.get(column, math.nan)) * factor
    except ValueError:
        return None
    return loss if math.isfinite(loss) and loss > 0 else None


def _value(values: Row, given: str, table: Table, where: str, *, least: float = 1) -> float:
    """A finite number of at least ``least`` from what a field was given as."""
    column, factor = _column(given, table)
    text = given if column is None else values.get(column, "")
    try:
        value = (text if isinstance(text, float) else parse_count(str(text).strip(), least=1e-12)) * factor
    except UserError:
        known = f"the columns are {', '.join(table.columns)}"
        rule = (
            f"a number is needed there, such as 1e9 or 100M; {known}" if column is None else "a number is needed there"
        )
        raise UserError(
            f"{where}: {given} is {str(text)!r}", rule, "name another column or correct the table"
        ) from None
    fix = f"name its unit where it has one, as in {given}*1e9, or correct the table"
    require(least <= value < math.inf, f"{where}: {given} is {value:g}", f"it is at least {least:g}, and finite", fix)
    return value


def _column(given: str, table: Table) -> tuple[str | None, float]:
    """(column, factor) of ``column`` or ``column*factor``; no column for a plain number."""
    if given in table.columns:
        return given, 1.0
    name, _, factor = given.rpartition("*")
    if name.strip() in table.columns:
        return name.strip(), parse_count(factor.strip(), least=1e-30)
    return None, 1.0


def _sha256(place: Path) -> str:
    """Of the file; of a folder with event files that of theirs, in hexadecimal, one after the other."""
    if place.is_file():
        return sha256_of(place)
    return hashlib.sha256("".join(map(sha256_of, sorted(place.glob(f"{EVENTS}*")))).encode()).hexdigest()
