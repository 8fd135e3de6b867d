"""What a sweep file may hold: the kind of every value, checked before a run is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.config.option import SEED
from megatron.errors import UserError, require
from megatron.objectives import OBJECTIVES

GRID = ("objective", "model", "unique_tokens", "epochs", "seed")
_KEYS = {"name", "output", "grid", "data", "flags", "objectives", "vocab_size", "launcher", "price", "slurm"}
_KEYS |= {"exclude", "search", "branches"}
_PRICE = {"device", "devices", "dollars", "mfu", "peak_tflops"}
_SEARCH = {"trials", "coordinates", "give_up", "seeds"}
_SEE = "see docs/scaling.md"


def check_form(path: Path, data: Any) -> None:
    """Check the keys of a sweep file and the kinds of its values; numbers are checked where they are read.

    Raises:
        UserError: the first part that no sweep can have.
    """
    _check_keys(path, "the sweep", data, _KEYS, required={"grid", "data", "output"})
    _check_keys(path, "grid", data["grid"], set(GRID), required={*GRID} - {"seed"})
    for key, (rule, fits) in _FORMS.items():
        place: Any = data
        for part in key.split("."):
            place = place.get(part)
        if place is not None or key in ("output", "data"):
            require(fits(place), f"{path}: {key} is {place!r:.60}", f"it is {rule}", _SEE)


def positive(value: Any, name: str) -> float:
    """A number of the file, which must be above 0."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    require(
        math.isfinite(number) and number > 0,
        f"{name} {value!r:.60} is in the file",
        "it must be positive and finite",
        "mend that number",
    )
    return number


def count(value: Any, name: str) -> int:
    """A whole number of the file, from 1 to 10^15."""
    number = positive(value, name)
    require(
        number.is_integer() and number <= 10**15,
        f"{name} {value!r:.60} is in the file",
        "it must be a whole number of at most 10^15",
        "mend that number",
    )
    return int(number)


def seed(value: Any) -> int:
    """A seed of the grid."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value in SEED,
        f"seed {value!r:.60} is in the grid",
        f"a seed is a whole number from 0 to {SEED.at_most}",
        "mend it",
    )
    return int(value)


def listed(value: Any) -> list[Any]:
    """A list as it is, a single value as a list of it."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_keys(path: Path, where: str, data: Any, known: set[str], *, required: set[str]) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{path}: {where} is {type(data).__name__}", "it must be a mapping", _SEE)
    if unknown := sorted(map(str, data.keys() - known)):
        raise UserError(
            f"{path}: {where} has unknown keys {', '.join(unknown)}", f"known are {', '.join(sorted(known))}", _SEE
        )
    if missing := sorted(required - data.keys()):
        raise UserError(f"{path}: {where} lacks {', '.join(missing)}", "add them", _SEE)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_word(value: Any) -> bool:
    """Whether it can be part of a file's name and of an option of sbatch."""
    text = str(value)
    return isinstance(value, str | int | float) and bool(text) and not set(text) & set("/ \t\n\0")


def _is_flag_value(value: Any) -> bool:
    return all(part is None or isinstance(part, str | int | float) for part in listed(value))


def _are_flags(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(map(_is_flag_value, value.values())))


def _are_models(value: Any) -> bool:
    names = value if isinstance(value, Mapping) else listed(value)
    return all(map(_is_word, names)) and (not isinstance(value, Mapping) or all(map(_are_flags, value.values())))


def _are_objectives(value: Any) -> bool:
    return all(isinstance(name, str) and name in OBJECTIVES for name in listed(value))


def _is_data(value: Any) -> bool:
    """Counts and prefixes, or a source and where its subsets go."""
    if not isinstance(value, Mapping) or not all(map(_is_text, value.values())):
        return False
    return value.keys() <= {"source", "directory"} if "source" in value else bool(value)


def _is_price(value: Any) -> bool:
    return _are_flags(value) and value.keys() <= _PRICE and not any(isinstance(part, list) for part in value.values())


def _are_options(value: Any) -> bool:
    return _are_flags(value) and not any(isinstance(part, list) or "\n" in str(part) for part in value.values())


def _by_objective(value: Any) -> bool:
    return isinstance(value, Mapping) and _are_objectives(list(value)) and all(map(_are_flags, value.values()))


def _are_rules(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(rule, Mapping) and rule and rule.keys() <= {*GRID} for rule in value
    )


def _is_search(value: Any) -> bool:
    """Trials, coordinates with lists of values, each for all objectives or by objective; whether to give up."""
    return (
        isinstance(value, Mapping)
        and {"trials", "coordinates"} <= value.keys() <= _SEARCH
        and isinstance(value.get("give_up", True), bool)
        and isinstance(value.get("seeds", []), list)
        and _for_all_or_by_objective(value["trials"], lambda number: not isinstance(number, list))
        and isinstance(value["coordinates"], Mapping)
        and bool(value["coordinates"])
        and all(map(_is_word, value["coordinates"]))
        and all(_for_all_or_by_objective(values, _are_values) for values in value["coordinates"].values())
    )


def _are_branches(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and {"steps", "decay"} <= value.keys() <= {"steps", "decay", "flags"}
        and isinstance(value["steps"], list)
        and bool(value["steps"])
        and _are_flags(value.get("flags"))
    )


def _for_all_or_by_objective(value: Any, fits: Callable[[Any], bool]) -> bool:
    return (
        (_are_objectives(list(value)) and all(map(fits, value.values()))) if isinstance(value, Mapping) else fits(value)
    )


def _are_values(value: Any) -> bool:
    """A list of flag values, or of mappings of flags to them."""
    return isinstance(value, list) and all(
        _are_flags(part) and bool(part)
        if isinstance(part, Mapping)
        else not isinstance(part, list) and _is_flag_value(part)
        for part in value
    )


_OBJECTIVE = f"one of {', '.join(OBJECTIVES)}"
# Key of the file → what its value is, in words and as a predicate.
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a word without spaces and slashes", _is_word),
    "output": ("the folder of the runs", _is_text),
    "grid.objective": (f"a list, each {_OBJECTIVE}", _are_objectives),
    "grid.model": ("a list of presets, or names with their flags", _are_models),
    "grid.epochs": (
        f"numbers, or numbers for each objective, {_OBJECTIVE}",
        lambda value: not isinstance(value, Mapping) or _are_objectives(list(value)),
    ),
    "data": ("a prefix for every number of unique tokens, or source and directory", _is_data),
    "flags": ("a mapping of flags to values", _are_flags),
    "objectives": (f"a mapping of flags for each objective, {_OBJECTIVE}", _by_objective),
    "launcher": ("a command line, or a list of its words", lambda value: bool(value) and all(map(_is_text, listed(value)))),
    "price": (f"a mapping of {', '.join(sorted(_PRICE))}", _is_price),
    "slurm": ("a mapping of options of sbatch to single values", _are_options),
    "branches": ("steps, decay as a share of them, and flags of the branches", _are_branches),
    "search": (
        "trials, coordinates (lists of values, or of mappings of flags to them; also by objective), give_up and seeds",
        _is_search,
    ),
    "exclude": (f"a list of mappings of {', '.join(GRID)} to values", _are_rules),
}  # fmt: skip
