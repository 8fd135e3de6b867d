"""A sweep: one YAML file that names a grid of runs. Here: what the runs are, and what they cost (state.py: where they stand)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatron.config.shape import PRESETS
from megatron.errors import UserError, require
from megatron.model.arithmetic import DEVICES
from megatron.objectives import OBJECTIVES
from megatron.scaling.literature import PAPER_VOCAB_SIZE
from megatron.scaling.sweep.branches import OF_A_BRANCH, branches_of
from megatron.scaling.sweep.form import check_form, count, listed, positive, seed
from megatron.scaling.sweep.space import Space, spaces_of
from megatron.scaling.sweep.sweep_run import SweepRun, dashed, name_of

_OWNED = {"save", "load", "kill-switch-file", "train-data-path", "train-epochs", "seed", "model", "objective"}
"""Flags that the grid and the sweep set; naming them elsewhere would contradict it."""


@dataclass(frozen=True)
class Sweep:
    """The parsed file.

    Attributes:
        subset_source: prefix that missing data subsets are cut from, or None.
        spaces: what a search does with every run of the grid; empty where the file is a grid alone.
        gives_up: whether a search stops trials without hope.
    """

    name: str
    output: Path
    runs: tuple[SweepRun, ...]
    launcher: tuple[str, ...]
    price: Mapping[str, Any]
    slurm: Mapping[str, Any]
    subset_source: str | None = None
    path: Path = field(default=Path())
    spaces: tuple[Space, ...] = ()
    gives_up: bool = True

    @property
    def flops(self) -> float:
        """Training compute of all runs; of a search the most that it can take."""
        return sum([space.most_flops for space in self.spaces] or [run.flops for run in self.runs])


class _Loader(yaml.SafeLoader):
    """YAML in which 24:00:00 is a time, not the number 86400 to the base of 60 (sbatch would take it for minutes)."""


_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"^[-+]?\d+(:\d+)+(\.\d*)?$")), *others]
    for first, others in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: not YAML, an unknown or missing key, or a value that no run can have.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read as YAML ({reason})",
            "a sweep is one YAML file",
            "see docs/scaling.md",
        ) from None
    check_form(path, data)
    _check_owned(path, data)
    flags = dashed(data.get("flags") or {})
    runs = tuple(_expand(path, data, flags))
    if not runs:
        raise UserError(f"{path}: the grid is empty", "every axis needs a value", "check grid and exclude")
    branches = data.get("branches")
    require(not (branches and data.get("search")), f"{path} has search and branches", "a search tunes runs of their own",
            "make two files of it")  # fmt: skip
    runs = tuple(run for trunk in runs for run in (trunk, *branches_of(path, branches, trunk)))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{path}: the grid names {', '.join(twice)} twice", "values of an axis must differ", "remove repetitions"
        )
    for run in runs:  # branches, too
        run.parsed(f"{path}: {run.name}: ")
    dollars(0.0, data.get("price") or {})  # a wrong price is refused before anything starts
    launcher, search = data.get("launcher") or ["python"], data.get("search")
    return Sweep(
        name=str(data.get("name", path.stem)),
        output=Path(data["output"]),
        runs=runs,
        launcher=tuple(map(str, launcher.split() if isinstance(launcher, str) else launcher)),
        price=data.get("price") or {},
        slurm=data.get("slurm") or {},
        subset_source=data["data"].get("source"),
        path=path,
        spaces=spaces_of(path, search, runs, _OWNED),
        gives_up=(search or {}).get("give_up", True),
    )


def _check_owned(path: Path, data: Mapping[str, Any]) -> None:
    """No flag of any block is one that the grid, the sweep or a branch sets."""
    models, branches = data["grid"]["model"], data.get("branches") or {}
    blocks = {"flags": data.get("flags"), "branches.flags": branches.get("flags")}
    blocks |= {f"objectives.{name}": given for name, given in (data.get("objectives") or {}).items()}
    blocks |= {f"grid.model.{name}": given for name, given in (models.items() if isinstance(models, dict) else ())}
    for place, block in blocks.items():
        owned = _OWNED | (OF_A_BRANCH if place == "branches.flags" else set())
        wrong = sorted(owned & dashed(block or {}).keys())
        require(
            not wrong, f"{path}: {', '.join(wrong)} in {place}", "the grid or the sweep sets these", "remove them there"
        )


def _expand(path: Path, data: Mapping[str, Any], flags: Mapping[str, Any]) -> Iterator[SweepRun]:
    """Every run of the grid, in the order of cost, so that short runs report early."""
    grid, found = data["grid"], []
    rules, used = data.get("exclude") or [], set()
    models = grid["model"] if isinstance(grid["model"], dict) else {name: {} for name in listed(grid["model"])}
    for objective in listed(grid["objective"]):
        epochs = grid["epochs"].get(objective) if isinstance(grid["epochs"], dict) else grid["epochs"]
        require(epochs is not None, f"grid.epochs has none for {objective}", "every objective of the grid has epochs",
                "give them, or leave the objective out")  # fmt: skip
        axes = itertools.product(models, listed(grid["unique_tokens"]), listed(epochs), listed(grid.get("seed", 1234)))
        for model, unique, length, number in axes:
            place = {
                "objective": objective,
                "model": str(model),
                "unique_tokens": count(unique, "unique_tokens"),
            }
            own = dashed((data.get("objectives") or {}).get(objective) or {})
            given = {**flags, **dashed(models[model] or {}), **own}
            place |= {"epochs": 1.0, "seed": seed(number)}
            place["epochs"] = _epochs(length, _run(place, data, given))
            # A rule says a value as the grid does ("1e8", "1e19 FLOPs"), or as what it is.
            said = place | {"model": model, "unique_tokens": unique, "epochs": length, "seed": number}
            if matching := {
                i for i, rule in enumerate(rules) if all(rule[key] in (place[key], said[key]) for key in rule)
            }:
                used |= matching
                continue
            found.append(_run(place, data, given))
    if idle := [rule for i, rule in enumerate(rules) if i not in used]:
        raise UserError(
            f"exclude has {idle[0]}", "a rule names runs of the grid, and the grid has none such", "mend it"
        )
    for run in found:  # what a trainer would refuse is, before it is counted
        run.parsed(f"{path}: {run.name}: ")
    yield from sorted(found, key=lambda run: (run.flops, run.name))


def _epochs(length: Any, once: SweepRun) -> float:
    """Epochs, given as a number or as compute "1e19 FLOPs", of which ``once``, the run of one epoch, says how many they make."""
    text = str(length).lower()
    if not text.endswith("flops"):
        return positive(length, "epochs")
    return float(f"{positive(text.removesuffix('flops').strip(), 'epochs given as compute') / once.flops:.6g}")


def _run(place: Mapping[str, Any], data: Mapping[str, Any], flags: Mapping[str, Any]) -> SweepRun:
    unique, epochs, model = place["unique_tokens"], place["epochs"], place["model"]
    has_shape = _has_shape(model, flags)
    flags = {
        **flags,
        "train-data-path": _data_prefix(data["data"], unique),
        "train-epochs": epochs,
        "seed": place["seed"],
    }
    if place["objective"] not in ("ar", "mdm"):
        flags["objective"] = place["objective"]
    if not has_shape:
        flags["model"] = model
    name = name_of(**place)
    return SweepRun(**place, name=name, folder=Path(data["output"]) / name, flags=flags, vocab_size=_vocab_size(data))


def _has_shape(model: str, flags: Mapping[str, Any]) -> bool:
    """Whether the flags give the shape of a model; else it is a preset."""
    explicit = {key: flags[key] for key in ("num-layers", "hidden-size", "ffn-hidden-size") if key in flags}
    if not explicit:
        if model not in PRESETS:
            raise UserError(
                f"model {model} is neither a preset nor given flags",
                "a model is a preset name or a name with num-layers, hidden-size and heads",
                f"presets: {', '.join(PRESETS)}",
            )
        return False
    if missing := {"num-layers", "hidden-size"} - explicit.keys():
        raise UserError(
            f"model {model} lacks {', '.join(sorted(missing))}", "an explicit shape names both", "add them to the model"
        )
    for key, value in explicit.items():
        count(value, key)
    return True


def _vocab_size(data: Mapping[str, Any]) -> int:
    given = data.get("vocab_size")
    return PAPER_VOCAB_SIZE if given is None else count(given, "vocab_size")


def _data_prefix(data: Mapping[str, Any], unique: int) -> str:
    """Prefix of the training data with this many tokens: listed by hand, or a subset of ``source``."""
    if "source" in data:
        return str(Path(data.get("directory") or Path(data["source"]).parent) / f"subset-{unique}_text_document")
    prefixes = {count(key, "data for unique tokens"): str(value) for key, value in data.items()}
    if unique not in prefixes:
        raise UserError(
            f"no data for {unique} unique tokens",
            "data maps every number of the grid to a prefix, or names a source to cut subsets from",
            f"listed are {', '.join(map(str, sorted(prefixes)))}",
        )
    return prefixes[unique]


def hours(flops: float, price: Mapping[str, Any]) -> float | None:
    """Wall-clock hours at the stated devices and utilisation; None where the sweep names no device."""
    if not price:
        return None
    device = price.get("device", "H100")
    if "peak_tflops" not in price and device not in DEVICES:
        raise UserError(f"price names device {device}", f"known are {', '.join(DEVICES)}", "or give peak_tflops")
    peak = positive(price["peak_tflops"], "peak_tflops") * 1e12 if "peak_tflops" in price else DEVICES[device].peak
    mfu = positive(price.get("mfu", 0.4), "mfu")
    require(mfu <= 1, f"price names mfu {mfu:g}", "it is a share of the peak", "give 0.4, say")
    speed = peak * mfu * positive(price.get("devices", 1), "devices")
    return flops / speed / 3600


def dollars(flops: float, price: Mapping[str, Any]) -> float | None:
    """What these FLOPs cost at ``dollars`` an hour and device; None where the sweep names no device or no price of it."""
    needed = hours(flops, price)
    if needed is None or price.get("dollars") is None:
        return None
    return needed * positive(price.get("devices", 1), "devices") * positive(price["dollars"], "dollars")


def unmatched(runs: Sequence[SweepRun]) -> list[str]:
    """What differs between runs of one comparison (same model, data, epochs, seed and step of branching) besides the objective.

    Flags of the schema's objective section, and the number of noise draws, belong to the objective.
    """
    allowed = _objective_flags()
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.name.removeprefix(run.objective), []).append(run)
    found = []
    for members in groups.values():
        for other in members[1:]:
            for key in sorted(members[0].flags.keys() | other.flags.keys()):
                first, second = members[0].flags.get(key), other.flags.get(key)
                if first != second and key not in allowed:
                    found.append(f"{members[0].name} and {other.name}: --{key} is {first!r} against {second!r}")
    return found


def _objective_flags() -> set[str]:
    owned = [item.name for cls in OBJECTIVES.values() for item in fields(cls.Options)]
    return {name.replace("_", "-") for name in owned} | {
        "objective",
        "mask-token-id",
        "num-mc",
        "valid-estimator",
        "branch-from",
    }
