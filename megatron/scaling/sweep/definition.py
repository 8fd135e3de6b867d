"""A sweep: one YAML file that names a grid of runs. Here: what the runs are, what they cost and where they stand.

Each run owns one directory. ``sweep.json`` in it holds the flags it was started with, so that a changed YAML file can
never continue another run's results; a lock on ``sweep.lock`` is held by the runner *and inherited by the training
process*, so that it is free exactly when nothing trains there, also after a kill -9 of the runner.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.config.presets import PRESETS, swiglu_width
from megatron.errors import UserError
from megatron.model.arithmetic import PAPER_VOCAB_SIZE, compute_parameters, preset_parameters
from megatron.runs.reading import Run, load_run
from megatron.scaling.planner import DEVICES

_KEYS = {"name", "output", "grid", "data", "flags", "objectives", "vocab_size", "launcher", "price", "slurm", "exclude"}
_GRID = ("objective", "model", "unique_tokens", "epochs", "seed")
_OWNED = {"save", "load", "train-data-path", "train-epochs", "seed", "model", "objective"}
"""Flags that the grid sets; naming them under flags would contradict it."""


@dataclass(frozen=True)
class SweepRun:
    """One run: its place in the grid, its directory and the flags of its program (without leading dashes)."""

    name: str
    objective: str
    model: str
    unique_tokens: int
    epochs: float
    seed: int
    folder: Path
    flags: Mapping[str, Any]
    parameters: int

    @property
    def flops(self) -> float:
        """Training compute 6*N*D, with the nominal number of unique tokens."""
        return 6.0 * self.parameters * self.unique_tokens * self.epochs

    @property
    def program(self) -> str:
        return "pretrain_mdm.py" if self.objective == "mdm" else "pretrain_gpt.py"

    def arguments(self) -> list[str]:
        """Command-line words after the program. Loading from the run's own directory continues it where it stopped."""
        words = []
        for name, value in self.flags.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not False and value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return [*words, "--save", str(self.folder), "--load", str(self.folder)]


@dataclass(frozen=True)
class Sweep:
    """The parsed file. ``subset_source``: prefix that missing data subsets are cut from, or None."""

    name: str
    output: Path
    runs: tuple[SweepRun, ...]
    launcher: tuple[str, ...]
    price: Mapping[str, Any]
    slurm: Mapping[str, Any]
    subset_source: str | None = None
    path: Path = field(default=Path())


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ValueError: not YAML, an unknown or missing key, or a value that no run can have.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read as YAML ({error})", "a sweep is one YAML file", "see docs/scaling.md"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path} holds no mapping", "a sweep names at least grid, data and output", "see docs/scaling.md"
        )
    _check_keys(path, "the sweep", data, _KEYS, required={"grid", "data", "output"})
    _check_keys(path, "grid", data["grid"], set(_GRID), required={"objective", "model", "unique_tokens", "epochs"})
    flags = _dashed(data.get("flags") or {})
    if wrong := sorted(_OWNED & flags.keys()):
        raise UserError(
            f"{path}: flags name {', '.join(wrong)}", "the grid or the sweep sets these", "remove them from flags"
        )
    runs = tuple(_expand(data, flags, Path(data["output"])))
    if not runs:
        raise UserError(f"{path}: the grid is empty", "every axis needs a value", "check grid and exclude")
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{path}: the grid names {', '.join(twice)} twice", "values of an axis must differ", "remove repetitions"
        )
    launcher = data.get("launcher") or ["python"]
    return Sweep(
        name=str(data.get("name", path.stem)),
        output=Path(data["output"]),
        runs=runs,
        launcher=tuple(map(str, launcher.split() if isinstance(launcher, str) else launcher)),
        price=data.get("price") or {},
        slurm=data.get("slurm") or {},
        subset_source=data["data"].get("source"),
        path=path,
    )


def _expand(data: Mapping[str, Any], flags: Mapping[str, Any], output: Path) -> Iterator[SweepRun]:
    """Every run of the grid, in the order of cost, so that short runs report early."""
    grid, found = data["grid"], []
    models = grid["model"] if isinstance(grid["model"], dict) else {name: {} for name in _listed(grid["model"])}
    for objective in _listed(grid["objective"]):
        epochs = grid["epochs"].get(objective, []) if isinstance(grid["epochs"], dict) else grid["epochs"]
        axes = itertools.product(
            models, _listed(grid["unique_tokens"]), _listed(epochs), _listed(grid.get("seed", 1234))
        )
        for model, unique, length, seed in axes:
            place = {"objective": objective, "model": str(model), "unique_tokens": int(float(unique))}
            size = _parameters(
                str(model), _dashed(models[model] or {}), int(data.get("vocab_size") or PAPER_VOCAB_SIZE)
            )
            place |= {"epochs": _epochs(length, size, place["unique_tokens"]), "seed": int(seed)}
            if any(all(place.get(key) == value for key, value in rule.items()) for rule in data.get("exclude") or []):
                continue
            own = _dashed((data.get("objectives") or {}).get(objective) or {})
            found.append(_run(place, data, {**flags, **_dashed(models[model] or {}), **own}, output))
    yield from sorted(found, key=lambda run: (run.flops, run.name))


def _epochs(length: Any, parameters: int, unique_tokens: int) -> float:
    """Epochs, given as a number or as compute "1e19 FLOPs", which makes them C / (6·N·U) for each size."""
    text = str(length).lower()
    if not text.endswith("flops"):
        return float(length)
    return float(f"{float(text.removesuffix('flops')) / (6.0 * parameters * unique_tokens):.6g}")


def _run(place: Mapping[str, Any], data: Mapping[str, Any], flags: Mapping[str, Any], output: Path) -> SweepRun:
    unique, epochs, model = place["unique_tokens"], place["epochs"], place["model"]
    if unique <= 0 or epochs <= 0:
        raise ValueError(f"unique_tokens {unique} and epochs {epochs:g} are in the grid; both must be positive")
    explicit = {key: flags[key] for key in ("num-layers", "hidden-size", "ffn-hidden-size") if key in flags}
    flags = {
        **flags,
        "train-data-path": _data_prefix(data["data"], unique),
        "train-epochs": epochs,
        "seed": place["seed"],
    }
    if place["objective"] not in ("ar", "mdm"):
        flags["objective"] = place["objective"]
    if not explicit:
        flags["model"] = model
    name = f"{place['objective']}-{model}-{_exact_count(unique)}-{epochs:g}ep-seed{place['seed']}"
    parameters = _parameters(model, explicit, int(data.get("vocab_size") or PAPER_VOCAB_SIZE))
    return SweepRun(**place, name=name, folder=output / name, flags=flags, parameters=parameters)


def _parameters(model: str, explicit: Mapping[str, Any], vocab_size: int) -> int:
    """Parameters N for compute, of a preset or of the explicit shape."""
    if not explicit:
        if model not in PRESETS:
            raise UserError(
                f"model {model} is neither a preset nor given flags",
                "a model is a preset name or a name with num-layers, hidden-size and heads",
                f"presets: {', '.join(PRESETS)}",
            )
        return preset_parameters(model, vocab_size)
    if missing := {"num-layers", "hidden-size"} - explicit.keys():
        raise ValueError(f"model {model} lacks {', '.join(sorted(missing))}; an explicit shape names both")
    hidden = int(explicit["hidden-size"])
    width = int(explicit.get("ffn-hidden-size") or swiglu_width(hidden))
    return compute_parameters(
        num_layers=int(explicit["num-layers"]), hidden_size=hidden, ffn_hidden_size=width, vocab_size=vocab_size
    )


def _data_prefix(data: Mapping[str, Any], unique: int) -> str:
    """Prefix of the training data with this many tokens: listed by hand, or a subset of ``source``."""
    if "source" in data:
        return str(Path(data.get("directory") or Path(data["source"]).parent) / f"subset-{unique}_text_document")
    prefixes = {int(float(key)): str(value) for key, value in data.items()}
    if unique not in prefixes:
        raise UserError(
            f"no data for {unique} unique tokens",
            "data maps every number of the grid to a prefix, or names a source to cut subsets from",
            f"listed are {', '.join(map(str, sorted(prefixes)))}",
        )
    return prefixes[unique]


def state(run: SweepRun) -> str:
    """ "finished", "running", "failed" (its last attempt ended with an error), "interrupted" or "waiting"."""
    if is_locked(run):
        return "running"
    check_owner(run)
    attempts = read_attempts(run)
    if not attempts:
        return "waiting"
    if is_finished(run):
        return "finished"
    return "failed" if attempts[-1]["returncode"] not in (0, None) else "interrupted"


def is_finished(run: SweepRun) -> bool:
    """Whether the results are complete: the last step is logged and validated, and the program ended well or left the
    checkpoint of that step."""
    result = read_result(run)
    if result is None or not result.is_finished:
        return False
    last = max((int(row["step"]) for row in result.train), default=0)
    if any(flag.startswith("valid-data-path") for flag in run.flags) and (
        not result.valid or result.valid[-1].step < last
    ):
        return False
    attempts = read_attempts(run)
    ended_well = bool(attempts) and attempts[-1]["returncode"] == 0
    latest = run.folder / "latest"
    return ended_well or (latest.exists() and latest.read_text().strip() == f"global_step{last}")


def read_result(run: SweepRun) -> Run | None:
    """The run directory, or None before training wrote it."""
    return load_run(run.folder) if (run.folder / "run.json").exists() else None


def check_owner(run: SweepRun) -> None:
    """Refuse a directory that was started with other flags.

    Raises:
        ValueError: what differs.
    """
    file = run.folder / "sweep.json"
    if not file.exists():
        return
    stored, wanted = json.loads(file.read_text(encoding="utf-8"))["flags"], _plain(run)
    if stored != wanted:
        names = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
        changes = ", ".join(f"{key}: {stored.get(key)!r} before, {wanted.get(key)!r} now" for key in names)
        raise UserError(
            f"{run.folder} was started with other flags ({changes})",
            "one directory holds one configuration",
            "restore the flags, change output, or delete that directory",
        )


def claim(run: SweepRun) -> None:
    """Write down whose directory this is; a directory that holds a run of unknown origin is refused."""
    check_owner(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    file = run.folder / "sweep.json"
    if file.exists():
        return
    if (run.folder / "run.json").exists():
        raise UserError(
            f"{run.folder} holds a run that no sweep started",
            "one directory holds one configuration",
            "change output, or delete that directory",
        )
    temporary = file.with_name("sweep.json.tmp")
    temporary.write_text(json.dumps({"format": 1, "flags": _plain(run)}, indent=1), encoding="utf-8")
    temporary.replace(file)


@contextmanager
def lock(run: SweepRun) -> Iterator[int | None]:
    """The file descriptor of the run's lock, or None where somebody else holds it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.folder / "sweep.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)  # a child that inherited it keeps the lock


def is_locked(run: SweepRun) -> bool:
    if not (run.folder / "sweep.lock").exists():
        return False
    with lock(run) as descriptor:
        return descriptor is None


def read_attempts(run: SweepRun) -> list[dict[str, Any]]:
    """Starts (``returncode`` None) and ends of training programs, oldest first; a line torn by a kill is left out."""
    file = run.folder / "attempts.jsonl"
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def hours(flops: float, price: Mapping[str, Any]) -> float | None:
    """Wall-clock hours at the stated devices and utilisation; None where the sweep names no device."""
    if not price:
        return None
    if "peak_tflops" not in price and price.get("device", "H100") not in DEVICES:
        raise UserError(
            f"price names device {price['device']}", f"known are {', '.join(DEVICES)}", "or give peak_tflops"
        )
    peak = float(price["peak_tflops"]) * 1e12 if "peak_tflops" in price else DEVICES[price.get("device", "H100")]
    return flops / (peak * float(price.get("mfu", 0.4)) * int(price.get("devices", 1))) / 3600


def unmatched(runs: Sequence[SweepRun]) -> list[str]:
    """What differs between runs of one comparison (same model, data, epochs and seed) besides the objective.

    Flags of the schema's objective section, and the number of noise draws, belong to the objective.
    """
    allowed = _objective_flags()
    groups: dict[tuple, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault((run.model, run.unique_tokens, run.epochs, run.seed), []).append(run)
    found = []
    for members in groups.values():
        for other in members[1:]:
            for key in sorted(members[0].flags.keys() | other.flags.keys()):
                first, second = members[0].flags.get(key), other.flags.get(key)
                if first != second and key not in allowed:
                    found.append(f"{members[0].name} and {other.name}: --{key} is {first!r} against {second!r}")
    return found


def _objective_flags() -> set[str]:
    from dataclasses import fields

    from megatron.config.schema import ObjectiveConfig

    return {item.name.replace("_", "-") for item in fields(ObjectiveConfig)} | {"num-mc"}


def _exact_count(count: int) -> str:
    """A count in a name: short where nothing is lost "1.5M", else all digits, so that names cannot collide."""
    for scale, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= scale and count * 100 % scale == 0:
            return f"{count / scale:.10g}{suffix}"
    return str(count)


def _plain(run: SweepRun) -> dict[str, Any]:
    return json.loads(json.dumps({**run.flags, "objective": run.objective}))


def _dashed(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).lstrip("-").replace("_", "-"): value for key, value in flags.items()}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_keys(path: Path, where: str, data: Any, known: set[str], *, required: set[str]) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{path}: {where} is {type(data).__name__}", "it must be a mapping", "see docs/scaling.md")
    if unknown := sorted(data.keys() - known):
        raise ValueError(
            f"{path}: {where} has unknown keys {', '.join(map(str, unknown))}; known are {', '.join(sorted(known))}"
        )
    if missing := sorted(required - data.keys()):
        raise UserError(f"{path}: {where} lacks {', '.join(missing)}", "add them", "see docs/scaling.md")
