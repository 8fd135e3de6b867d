"""Run directories as written by training: ``run.json`` (what was trained) and ``metrics.jsonl`` (what happened).

Reports, fits and sweeps read runs only through this file. A run that is still being written, or that was killed, is
readable: a torn last line is dropped, and rows that a resumed run wrote again replace the earlier ones.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import UserError

FORMAT = 1
_REQUIRED = ("objective", "label", "config", "parameters", "unique_tokens", "train_samples", "train_flops")


@dataclass(frozen=True)
class Validation:
    """One validation: ``nll`` and ``nll_se`` in nats per token; ``bits_per_byte`` is None where the data does not say
    how many bytes of text a token stands for."""

    step: int
    samples: int
    tokens: int
    epoch: float
    flops: float
    nll: float
    nll_se: float
    label: str
    num_mc: int
    num_samples: int
    bits_per_byte: float | None

    @property
    def ppl(self) -> float:
        """Perplexity: exp(nll). Infinite where the exponent overflows."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Run:
    """One training run. ``info`` is run.json; ``train`` and ``valid`` are in order of steps.

    ``valid`` holds the learning curve: the validations with the most common (num_mc, num_samples). Validations with
    other settings (for example a last one with more draws) are in ``other_valid``, so that a curve never mixes two
    estimators. ``seeds`` names the seeds of which this run is the mean (``replicates.py``); it is empty for one run.
    """

    path: Path
    name: str
    info: Mapping[str, Any]
    train: tuple[Mapping[str, Any], ...]
    valid: tuple[Validation, ...]
    other_valid: tuple[Validation, ...] = ()
    seeds: tuple[int | None, ...] = ()

    @property
    def objective(self) -> str:
        return str(self.info["objective"])

    @property
    def label(self) -> str:
        """What the validation number is: "NLL (exact)", "NLL bound", or another text that is neither."""
        return str(self.info["label"])

    @property
    def is_exact(self) -> bool:
        return "exact" in self.label.lower()

    @property
    def is_likelihood(self) -> bool:
        """Whether the number is a likelihood or a bound on it, so that it may be compared at all."""
        return self.is_exact or (self.label.lower().startswith("nll bound"))

    @property
    def parameters(self) -> int:
        """All parameters; where a pipeline run did not count them, the compute formula's."""
        return int(self.info["parameters"].get("total") or self.compute_parameters)

    @property
    def compute_parameters(self) -> int:
        """Parameters N in FLOPs = 6*N*D."""
        return int(self.info["parameters"]["for_compute"])

    @property
    def unique_tokens(self) -> int:
        return int(self.info["unique_tokens"])

    @property
    def epochs(self) -> float:
        """Epochs that the run was asked for; what it reached is ``last_step['epoch']``."""
        return float(self.info.get("epochs") or self.info["train_tokens"] / self.unique_tokens)

    @property
    def seed(self) -> int | None:
        """Seed of the run, of the first one where it is a mean."""
        return self.info["config"].get("run", {}).get("seed")

    @property
    def size_name(self) -> str:
        """Preset name where the run used one, else the parameter count such as "0.9M"."""
        preset = self.info["config"].get("model", {}).get("model")
        return str(preset) if preset else format_count(self.parameters)

    @property
    def title(self) -> str:
        """Objective and size, for legends and sentences."""
        mean = f" (mean of {len(self.seeds)} seeds)" if self.seeds else ""
        return f"{self.objective.upper()} {self.size_name}{mean}"

    @cached_property
    def best(self) -> Validation | None:
        """The validation with the lowest finite NLL, or None before the first."""
        finite = [row for row in self.valid if math.isfinite(row.nll)]
        return min(finite, key=lambda row: row.nll) if finite else None

    @property
    def samples_done(self) -> int:
        return max((int(row["samples"]) for row in self.train), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the last logged step reached the samples that the run was asked for (in whole global batches)."""
        reached = max([self.samples_done, *(row.samples for row in self.valid)])
        wanted = int(self.info["train_samples"])
        batch = int(self.info["config"].get("run", {}).get("global_batch_size") or 1)
        return reached >= wanted // batch * batch

    def column(self, name: str) -> np.ndarray:
        """One column of the validation curve as float64, for example ``column("nll")``."""
        values = [getattr(row, name) for row in self.valid]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def train_column(self, name: str) -> np.ndarray:
        """One column of the training rows as float64; missing values are NaN."""
        values = [row.get(name) for row in self.train]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def tokens_per_second(self) -> float | None:
        """Median training speed over the logged steps, which a slow first step or one stall does not move."""
        speed = self.train_column("tokens_per_second")
        speed = speed[np.isfinite(speed) & (speed > 0)]
        return float(np.median(speed)) if speed.size else None

    def hours(self) -> float | None:
        """Hours of training of all logged steps, from the trained tokens and the median speed."""
        speed = self.tokens_per_second()
        tokens = self.train_column("tokens")
        return float(np.nanmax(tokens)) / speed / 3600 if speed and tokens.size else None


_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def parse_count(text: str) -> float:
    """A count as people write it: "100M", "40k", "1e8", "100000000".

    Raises:
        ValueError: it is none of these.
    """
    scale = next((scale for scale, suffix in _COUNTS if text.endswith(suffix)), None)
    try:
        return float(text) if scale is None else float(text[:-1]) * scale
    except ValueError:
        raise UserError(
            f"{text!r} is not a count", "a count is a number, with k, M, B or T at will", "write 100M or 1e8"
        ) from None


def format_count(value: float) -> str:
    """A count in words for labels: 912345 -> "0.91M", 100000 -> "100k", 425e6 -> "425M"."""
    for scale, suffix in _COUNTS:
        if value >= scale * 0.9:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def load_run(path: str | Path) -> Run:
    """Read one run directory.

    Raises:
        ValueError: no readable run.json there, a field is missing, or a line of metrics.jsonl other than a torn last
            one is not JSON.
    """
    folder = Path(path)
    info = _read_info(folder)
    rows = _read_metrics(folder / "metrics.jsonl")
    train = _last_per_step(row for row in rows if row.get("kind") == "train")
    curve, other = _split_validations([_validation(row, folder) for row in rows if row.get("kind") == "valid"])
    return Run(folder, folder.resolve().name, info, tuple(train), tuple(curve), tuple(other))


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Load every run in the given places: each is a run directory or a folder that holds run directories at any depth.

    Runs come back once each, in order; names that occur twice are prefixed by their parent folder.

    Raises:
        ValueError: a place holds no run, or a run cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if (path / "run.json").is_file():
            found = [path]
        else:
            found = sorted(file.parent for file in path.glob("**/run.json"))
        if not found:
            raise UserError(
                f"{path} holds no run.json",
                "a report needs run directories as written by --save",
                "give the folder that was passed as --save, or a folder of such folders",
            )
        folders.update({folder.resolve(): folder for folder in found})
    runs = [load_run(folder) for folder in folders.values()]
    counts = Counter(run.name for run in runs)
    return [
        run if counts[run.name] == 1 else replace(run, name=f"{run.path.resolve().parent.name}/{run.name}")
        for run in runs
    ]


def _read_info(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no run.json",
            "a run directory holds run.json and metrics.jsonl",
            "give the folder that was passed as --save",
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not valid JSON ({error})", "it is written once at the start", "start the run again"
        ) from None
    if info.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {info.get('format')}",
            f"this version reads format {FORMAT}",
            "use the version of the code that wrote it",
        )
    missing = [key for key in _REQUIRED if key not in info]
    if missing:
        raise UserError(
            f"{file} lacks {', '.join(missing)}", "every run.json names them", "start the run again to write it"
        )
    return info


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; an absent file is a run that has not logged yet."""
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            # Only the text after the last newline can be torn: each row is written with its newline in one call.
            if number == len(lines):
                break
            raise UserError(
                f"{file}, line {number} is not JSON: {line[:60]!r}",
                "each line is one object",
                "delete that line, or start the run again",
            ) from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _validation(row: Mapping[str, Any], folder: Path) -> Validation:
    try:
        return Validation(
            step=int(row["step"]),
            samples=int(row["samples"]),
            tokens=int(row["tokens"]),
            epoch=float(row["epoch"]),
            flops=float(row["flops"]),
            nll=_number(row["nll"]),
            nll_se=_number(row["nll_se"]),
            label=str(row["label"]),
            num_mc=int(row["num_mc"]),
            num_samples=int(row["num_samples"]),
            bits_per_byte=None if row.get("bits_per_byte") is None else float(row["bits_per_byte"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'metrics.jsonl'}, validation at step {row.get('step')}: missing or wrong field {error}",
            "validation rows carry step, samples, tokens, epoch, flops, nll, nll_se, label, num_mc and num_samples",
            "validate the run again",
        ) from None


def _number(value: Any) -> float:
    """A float; null (a NaN that some JSON writers turn into null) is NaN."""
    return math.nan if value is None else float(value)


def _last_per_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    latest = {int(row["step"]): row for row in rows}
    return [latest[step] for step in sorted(latest)]


def _split_validations(rows: list[Validation]) -> tuple[list[Validation], list[Validation]]:
    latest = {(row.step, row.num_mc, row.num_samples): row for row in rows}
    rows = sorted(latest.values(), key=lambda row: row.step)
    if not rows:
        return [], []
    counts = Counter((row.num_mc, row.num_samples) for row in rows)
    # On a tie the more precise setting is the curve.
    usual = max(counts, key=lambda key: (counts[key], key[0] * key[1]))
    curve = [row for row in rows if (row.num_mc, row.num_samples) == usual]
    return curve, [row for row in rows if (row.num_mc, row.num_samples) != usual]
