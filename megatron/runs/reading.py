"""Run directories as written by training: ``run.json`` (what was trained) and ``metrics.jsonl`` (what happened).

Reports, fits and sweeps read runs only through this file. A run that is still being written, or that was killed, is
readable: rows that a resumed run wrote again replace the earlier ones, and a line that cannot be read is left out and named
in :attr:`Run.problems`. Only what nothing can be said without, a readable run.json, is required.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron.config.schema import WEIGHT
from megatron.errors import UserError, require
from megatron.runs.record import (
    EVALUATIONS,
    RECORD,
    TRAIN,
    VALID,
    VALID_AVERAGE,
    WEIGHTS,
    TrainRow,
    estimator_of,
    parse_line,
)
from megatron.runs.run import OVER_SAMPLES, Run, Validation

__all__ = ["Rows", "Run", "Validation", "find_runs", "load_run", "read_rows", "readable"]
Place = TypeVar("Place")
Found = TypeVar("Found")

FORMAT = 1
# What a run says of itself by its record: asked once where it is read, so that no report meets a damaged one.
_ASKED = ("branch", "source", "parameters", "compute_parameters", "unique_tokens", "train_flops", "epochs", "seed", "size_name",
          "samples_planned")  # fmt: skip
_OF_TRAINING = {item.name for item in fields(TrainRow)} - {"kind"}
_REQUIRED = ("objective", "label", "config", "parameters", "unique_tokens", "train_samples", "train_flops")


@dataclass
class Rows:
    """What metrics.jsonl holds, in its order. ``problems`` names the lines that could not be used."""

    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[Validation] = field(default_factory=list)
    averaged: list[Validation] = field(default_factory=list)
    evaluations: list[Validation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load_run(path: str | Path) -> Run:
    """Read one run directory.

    Raises:
        UserError: no readable run.json there, or a field of it is missing.
    """
    folder = Path(path)
    info = _evaluated(folder) if _holds_evaluations_only(folder) else None
    info = info or _read_info(folder)
    rows = read_rows(folder / "metrics.jsonl")
    _add_evaluations(rows, folder)
    curve, other = _split_validations(rows.valid)
    # A validation is there with the row of the trained weights, which is its last: who looks in between sees the other alone.
    whole = {row.step for row in rows.valid}
    averaged, apart = _split_validations([row for row in rows.averaged if row.step in whole])
    if averaged and curve and averaged[0].conditions != curve[0].conditions:
        averaged, apart = [], [*averaged, *apart]
    run = Run(
        folder,
        folder.resolve().name,
        info,
        train=tuple(_last_per_step(rows.train)),
        valid=tuple(curve),
        other_valid=(*other, *apart, *rows.evaluations),
        problems=tuple(rows.problems),
        averaged=tuple(averaged),
    )
    try:
        for name in _ASKED:
            getattr(run, name)
        _ = [dict(section or {}) for section in info["config"].values()]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        given = f"{folder / RECORD} is damaged ({type(error).__name__}: {error})"
        raise UserError(given, "a record is what training wrote", "restore it, or start the run again") from None
    return run


def readable(read: Callable[[Place], Found], places: Iterable[Place], left_out: list[str] | None) -> list[Found]:
    """What can be read of several, of which a damaged one spoils no other.

    Args:
        read: reads one.
        places: where they are.
        left_out: receives in words what cannot be read; None: the first is an error.
    """
    found = []
    for place in places:
        try:
            found.append(read(place))
        except (UserError, OSError) as error:
            if left_out is None:
                raise
            left_out.append(error.given if isinstance(error, UserError) else str(error))
    return found


def find_runs(paths: Iterable[str | Path], *, left_out: list[str] | None = None) -> list[Run]:
    """Load every run in the given places: each is a run directory or a folder that holds run directories at any depth.

    Runs come back once each, in order; names that occur twice are prefixed by as many folders as set them apart.

    Args:
        paths: the places.
        left_out: receives in words which runs cannot be read; None: the first is an error.

    Raises:
        UserError: a place holds no run, or no run can be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if (path / RECORD).is_file() or _holds_evaluations_only(path):
            found = [path]
        else:
            evaluated = {file.parent.parent for file in path.glob(f"**/{EVALUATIONS}/*.json")}
            # Other programs have folders of this name too: only what can be read makes a run.
            alone = {folder for folder in evaluated if _holds_evaluations_only(folder) and _evaluated(folder)}
            found = sorted({file.parent for file in path.glob(f"**/{RECORD}")} | alone)
        if not found:
            raise UserError(
                f"{path} holds no run.json and no evaluation",
                "a report needs run directories as written by --save",
                "give the folder that was passed as --save, or a folder of such folders",
            )
        folders.update({folder.resolve(): folder for folder in found})
    runs = readable(load_run, folders.values(), left_out)
    given, rule = "; ".join((left_out or [])[:9]), "a report needs a run that can be read"
    require(runs or not folders, given, rule, "restore its files, or name other runs")
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(run.name, []).append(run)
    return [replace(run, name=_name_among(run, named[run.name])) for run in runs]


def _name_among(run: Run, namesakes: Sequence[Run]) -> str:
    """The shortest end of its path that is of no other run of this name, and as long for all of them."""
    paths, length = [one.path.resolve().parts for one in namesakes], 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return "/".join(run.path.resolve().parts[-length:])


def _holds_evaluations_only(folder: Path) -> bool:
    return not (folder / RECORD).is_file() and any((folder / EVALUATIONS).glob("*.json"))


def _evaluated(folder: Path) -> dict[str, Any] | None:
    """What stands in for run.json where checkpoints of elsewhere were evaluated into a folder: what the first record there
    says that can be read; None without one.

    Parameters are those of the compute formula, in records of earlier versions from the FLOPs of the training; what no record
    says is 0.
    """
    for file in sorted((folder / EVALUATIONS).glob("*.json")):
        try:
            record = json.loads(file.read_bytes())
            row = _validation(record.get("result", record))
            counted = round(row.flops / row.tokens / 6) if row.tokens and math.isfinite(row.flops) else 0
            parameters = int(record.get("parameters", counted))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # named by _add_evaluations
        attempt, protocol = record.get("attempt") or {}, record.get("protocol") or {}
        return {
            "objective": str(record.get("objective", "unknown")),
            "label": row.label,
            "config": {"run": {"num_mc": row.num_mc}, "model": {"seq_length": protocol.get("seq_length")}},
            "parameters": {"total": parameters, "for_compute": parameters},
            **dict.fromkeys(("unique_tokens", "train_samples", "train_flops"), 0),
            **{name: attempt[name] for name in ("versions", "device", "started") if name in attempt},
            "attempts": [attempt] if attempt else [],
        }
    return None


def read_rows(file: Path) -> Rows:
    """Every usable row of a metrics file; an absent file is a run that has not logged yet.

    A last line without its newline is what a kill leaves and no problem. A whole record that was appended to such a torn line
    is found again behind it.
    """
    rows = Rows()
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, torn = parse_line(line)
        if torn and number < len(lines):
            rows.problems.append(f"{file}, line {number}: {line[:40]!r} is not a record" + ("" if row is None else
                                 "; the one behind it is used"))  # fmt: skip
        if row is not None:
            _add_row(rows, row, f"{file}, line {number}")
    return rows


def _add_row(rows: Rows, row: dict[str, Any], where: str) -> None:
    """Sort one record in; one that lacks a field, or holds text where a number belongs, is a problem."""
    kind = row.get("kind")
    try:
        if kind == TRAIN:
            for name in _OF_TRAINING & row.keys():
                _number(row[name])
            rows.train.append({**row, "step": int(row["step"]), "samples": int(row["samples"])})
        elif kind == VALID_AVERAGE:
            rows.averaged.append(_validation(row))
        elif kind in (VALID, "evaluation"):
            validation = _validation(row)
            # Older versions evaluated a finished run into its own curve, and without training data wrote epoch 0.
            stands_apart = kind == "evaluation" or (validation.tokens > 0 and validation.epoch == 0)
            (rows.evaluations if stands_apart else rows.valid).append(validation)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        rows.problems.append(f"{where}: a record of kind {kind!r} lacks or garbles {error}")


def _add_evaluations(rows: Rows, folder: Path) -> None:
    """Evaluations of finished checkpoints, a file each: they touch no curve."""
    for file in sorted((folder / EVALUATIONS).glob("*.json")):
        try:
            record = json.loads(file.read_bytes())
            rows.evaluations.append(_validation(record.get("result", record)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            rows.problems.append(f"{file}: no evaluation ({type(error).__name__}: {error})")


def _read_info(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    try:
        info = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no run.json",
            "a run directory holds run.json and metrics.jsonl",
            "give the folder that was passed as --save",
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not valid JSON ({error})", "it is written once at the start", "start the run again"
        ) from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {info.get('format') if isinstance(info, dict) else type(info).__name__}",
            f"this version reads format {FORMAT}",
            "use the version of the code that wrote it",
        )
    missing = [key for key in _REQUIRED if key not in info]
    if missing:
        raise UserError(
            f"{file} lacks {', '.join(missing)}", "every run.json names them", "start the run again to write it"
        )
    return info


def _validation(row: Mapping[str, Any]) -> Validation:
    documents, sums = row.get("num_documents"), row.get("sums")
    return Validation(
        step=int(row["step"]),
        samples=int(row["samples"]),
        tokens=int(row["tokens"]),
        epoch=_number(row["epoch"]),
        flops=_number(row["flops"]),
        nll=_number(row["nll"]),
        nll_se=_number(row["nll_se"]),
        label=str(row["label"]),
        num_mc=int(row["num_mc"]),
        num_samples=int(row["num_samples"]),
        bits_per_byte=None if row.get("bits_per_byte") is None else float(row["bits_per_byte"]),
        num_documents=None if documents is None else int(documents),
        se_kind=str(row.get("se_kind") or OVER_SAMPLES),
        estimator=estimator_of(row),
        protocol=str(row.get("data") or ""),
        sums=None if sums is None else str(sums),
        weights=WEIGHTS.get(str(row.get("kind")), WEIGHT),
    )


def _number(value: Any) -> float:
    """A float; null (JSON has no NaN) is NaN."""
    return math.nan if value is None else float(value)


def _last_per_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def _split_validations(rows: list[Validation]) -> tuple[list[Validation], list[Validation]]:
    """(the curve, all validations with another estimator); rows written again replace the earlier ones."""
    known: dict[tuple[str, int, int, str], set[str]] = {}
    for row in rows:
        known.setdefault(row.conditions[:4], set()).add(row.protocol)
    # Rows from before protocols were recorded belong to the curve that goes on from them.
    only = {key: max(protocols) for key, protocols in known.items() if len(protocols - {""}) == 1}
    rows = [replace(row, protocol=only.get(row.conditions[:4], row.protocol)) for row in rows]
    latest = {(row.step, row.conditions): row for row in rows}
    rows = sorted(latest.values(), key=lambda row: row.step)
    if not rows:
        return [], []
    counts = Counter(row.conditions for row in rows)
    # On a tie the more precise setting is the curve.
    usual = max(counts, key=lambda key: (counts[key], key[1] * key[2]))
    curve = [row for row in rows if row.conditions == usual]
    return curve, [row for row in rows if row.conditions != usual]
