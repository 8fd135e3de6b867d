"""Where a search looks: named flags, each with an ordered list of values. A trial is a run with one value of each."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron.config.schema import Config
from megatron.errors import UserError, require
from megatron.scaling.sweep.form import count, listed, positive, seed
from megatron.scaling.sweep.sweep_run import SweepRun, dashed, name_of

Point = tuple[int, ...]
"""A place in a space: for every coordinate the number of its value."""
MAX_POINTS = 100_000
LENGTH, AVERAGE = "train-epochs", "ema-decay"  # the first is what the coordinate "epochs" sets
_SHAPE = {"num-layers", "hidden-size", "ffn-hidden-size"}  # another size is another search: the grid's axis "model"


@dataclass(frozen=True)
class Coordinate:
    """One thing that is tuned. ``values``: for each of its values, in order, the flags that it sets."""

    name: str
    values: tuple[Mapping[str, Any], ...]

    def text(self, index: int) -> str:
        """One value, for people and for names: of several flags that of the coordinate's own name, else all that differ."""
        value = self.values[index]
        return _text(value[self.name]) if self.name in value else "-".join(dict.fromkeys(map(_text, value.values())))


@dataclass(frozen=True)
class Space:
    """Where one search looks.

    Attributes:
        start: the run of the grid that is its first trial.
        coordinates: what is tuned, in the order in which it is.
        origin: the start as a point.
        trials: how many trials it has.
        seeds: with which the choice is trained once more at the end: an ensemble, and the spread between seeds.
    """

    start: SweepRun
    coordinates: tuple[Coordinate, ...]
    origin: Point
    trials: int
    seeds: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """Name of the search: that of its first trial."""
        return self.start.name

    @property
    def longest(self) -> float:
        """Epochs of the longest trial that there may be."""
        lengths = [value[LENGTH] for item in self.coordinates for value in item.values if LENGTH in value]
        return max([self.start.epochs, *map(float, lengths)])

    @property
    def most_flops(self) -> float:
        """Training compute of the search if all trials are as long as the longest."""
        return (self.trials + len(self.seeds)) * self.start.flops * self.longest / self.start.epochs

    def run_at(self, point: Point, *, seed: int | None = None) -> SweepRun:
        """The run of a trial, or the same with another seed. That of the origin is the start itself; others are named by what
        differs from it."""
        if point == self.origin and seed is None:
            return self.start
        flags, name = dict(self.start.flags), ""
        for item, index, first in zip(self.coordinates, point, self.origin):
            flags |= item.values[index]
            if index != first and LENGTH not in item.values[index]:
                name += f"-{item.name}{re.sub(r'[^A-Za-z0-9.+_-]', '_', item.text(index))}"
        flags["seed"] = self.start.seed if seed is None else seed
        changed = replace(self.start, epochs=float(flags[LENGTH]), seed=flags["seed"], flags=flags)
        places = ("objective", "model", "unique_tokens", "epochs", "seed")
        name = name_of(**{key: getattr(changed, key) for key in places}) + name
        return replace(changed, name=name, folder=self.start.folder.parent / name)

    def text(self, point: Point) -> str:
        """What differs from the start: "lr 0.003, epochs 40"; "start" where nothing does."""
        rows = zip(self.coordinates, point, self.origin)
        return ", ".join(f"{item.name} {item.text(i)}" for item, i, first in rows if i != first) or "start"

    def next_point(self, tried: Iterable[Point], best: Point, before: Point) -> Point | None:
        """Coordinate descent: the untried point nearest to the best one, a step along a coordinate being of length 1.

        Of the nearest: one further in the direction that led to the best, then the coordinates after that one, in turn, the
        larger value first. So one coordinate is followed as long as it helps; where no neighbour of the best is left, come
        the points two steps away, so that every search has as many trials as it was given.

        Args:
            tried: points of all trials so far.
            best: the best of them.
            before: the best one before that was found; ``best`` itself at the start.

        Returns:
            The point; None where all have been tried.
        """
        step = tuple(b - a for a, b in zip(before, best))
        last = next((number for number, by in enumerate(step) if by), -1)
        size, known = len(self.coordinates), set(tried)

        def rank(point: Point) -> tuple:
            by = tuple(p - b for p, b in zip(point, best))
            moved = sorted(((number - last - 1) % size, -delta) for number, delta in enumerate(by) if delta)
            return sum(map(abs, by)), by != step, moved

        places = itertools.product(*(range(len(item.values)) for item in self.coordinates))
        return min((point for point in places if point not in known), key=rank, default=None)


def spaces_of(
    path: Path, search: Mapping[str, Any] | None, starts: Sequence[SweepRun], owned: set[str]
) -> tuple[Space, ...]:
    """One space for every run of the grid; none where the file has no ``search``.

    Args:
        path: of the file, for errors.
        search: the block ``search``, of the form that form.py checks.
        starts: runs of the grid.
        owned: flags that the grid sets.

    Raises:
        UserError: a value that no trial can have, or a start that is not among the values.
    """
    if not search:
        return ()
    known = {start.objective for start in starts}
    for name, values in (("trials", search["trials"]), *search["coordinates"].items()):
        others = sorted(values.keys() - known) if isinstance(values, Mapping) else []
        require(not others, f"{path}: search gives {name} for {', '.join(others)}",
                f"the grid has {', '.join(sorted(known))}", "remove it, or add the objective to the grid")  # fmt: skip
    spaces = tuple(_space(path, search, start, owned - {LENGTH} | _SHAPE) for start in starts)
    for space in spaces:
        _check_values(path, space)
        _check_averages(path, space)
    return spaces


def _space(path: Path, search: Mapping[str, Any], start: SweepRun, owned: set[str]) -> Space:
    given = {name: _own(values, start.objective) for name, values in search["coordinates"].items()}
    coordinates = tuple(
        _coordinate(path, str(name), values, owned) for name, values in given.items() if values is not None
    )
    require(coordinates, f"{path}: the search has no coordinate for {start.objective}", "a search tunes something",
            "give coordinates, each a flag and a list of its values")  # fmt: skip
    flags = [flag for item in coordinates for flag in item.values[0]]
    twice = sorted({flag for flag in flags if flags.count(flag) > 1})
    require(not twice, f"{path}: two coordinates set {', '.join(twice)}", "a trial has one value of each flag",
            "tune a flag in one coordinate")  # fmt: skip
    number = count(_own(search["trials"], start.objective), f"search.trials of {start.objective}")
    size = math.prod(len(item.values) for item in coordinates)
    require(
        size <= MAX_POINTS, f"{path}: the search has {size:,} points", f"at most {MAX_POINTS:,}", "leave values out"
    )
    require(number <= size, f"{path}: search.trials of {start.objective} is {number}",
            f"its coordinates have {size} points", "ask for fewer trials, or give more values")  # fmt: skip
    seeds = tuple(seed(value) for value in search.get("seeds", []))
    require(len({*seeds, start.seed}) == len(seeds) + 1, f"{path}: search.seeds has {', '.join(map(str, seeds))}",
            f"they differ from each other and from {start.seed}, that of the grid", "mend the list")  # fmt: skip
    return Space(start, coordinates, tuple(_index_of(path, item, start) for item in coordinates), number, seeds)


def _check_values(path: Path, space: Space) -> None:
    """Every value makes flags that the trainer takes, and leaves alone what the trials are judged on."""
    judged = _judged_on(space.start.parsed())
    for number, item in enumerate(space.coordinates):
        for index in range(len(item.values)):
            point = (*space.origin[:number], index, *space.origin[number + 1 :])
            given = f"{path}: {item.name} {item.text(index)} in the search of {space.title}"
            found = _judged_on(space.run_at(point).parsed(f"{given}: "))
            moved = sorted(name for name, value in found.items() if value != judged[name])
            require(not moved, f"{given} changes {', '.join(moved)}",
                    "all trials are judged on the same validation, and train on the same text",
                    "set it once for all, a number of samples by eval-iters: full")  # fmt: skip


def _check_averages(path: Path, space: Space) -> None:
    """No two values of ``ema-decay`` make the same trial: all above the end of its ramp do (``megatron.training.shards``)."""
    config = space.start.parsed()
    samples = int(space.longest * space.start.unique_tokens / config.model.seq_length)
    updates = samples // (config.run.global_batch_size or config.run.micro_batch_size)
    for item in space.coordinates:
        values = [
            _number(value[AVERAGE]) for value in item.values if value.keys() == {AVERAGE} and value[AVERAGE] is not None
        ]
        alike = [f"{value:g}" for value in values if value > updates / (9 + updates)]
        require(len(alike) < 2, f"{path}: ema-decay {' and '.join(alike)} in the search of {space.title}",
                f"in {updates:,} updates the decay rises to {updates / (9 + updates):.4g}, so they make the same trial",
                "keep one of them, or give it by objective")  # fmt: skip


def _judged_on(config: Config) -> dict[str, Any]:
    """The settings that decide, whatever the model, what a validation measures."""
    data, run = config.data, config.run
    found = {each.name: getattr(data, each.name) for each in fields(data) if each.metadata["affects"] != "layout"}
    found |= {each.name: getattr(run, each.name) for each in fields(run) if each.metadata["affects"] == "validation"}
    del found["eval_interval"]
    batch = 0 if run.eval_iters == "full" else run.global_batch_size
    return {**found, "seq_length": config.model.seq_length, "samples of a validation step": batch}


def _own(value: Any, objective: str) -> Any:
    """What a value is for one objective, where it is given by objective."""
    return value.get(objective) if isinstance(value, Mapping) else value


def _coordinate(path: Path, name: str, values: Any, owned: set[str]) -> Coordinate:
    flag = LENGTH if name == "epochs" else str(name).lstrip("-").replace("_", "-")
    found = tuple(dashed(value) if isinstance(value, Mapping) else {flag: value} for value in listed(values))
    for value in found:
        if LENGTH in value:
            value[LENGTH] = positive(value[LENGTH], f"search.coordinates.{name}")
        wrong = sorted(owned & value.keys())
        require(not wrong, f"{path}: the coordinate {name} sets {', '.join(wrong)}", "the grid or the sweep sets these",
                "tune other flags")  # fmt: skip
        require(value.keys() == found[0].keys(), f"{path}: a value of the coordinate {name} sets {', '.join(value)}",
                f"the first sets {', '.join(found[0])}", "name the same flags in every value")  # fmt: skip
    coordinate = Coordinate(name, found)
    texts = [coordinate.text(index) for index in range(len(found))]
    require(len({*texts}) == len(texts) >= 2, f"{path}: the coordinate {name} has the values {', '.join(texts)}",
            "it has two or more that differ", "mend the list")  # fmt: skip
    return coordinate


def _index_of(path: Path, item: Coordinate, start: SweepRun) -> int:
    for index, value in enumerate(item.values):
        if all(_number(start.flags.get(flag)) == _number(wanted) for flag, wanted in value.items()):
            return index
    has = ", ".join(f"{flag} {_text(start.flags.get(flag))}" for flag in item.values[0])
    texts = ", ".join(item.text(index) for index in range(len(item.values)))
    raise UserError(
        f"{path}: {start.name} has {has}", f"a search starts at a value of {item.name}: {texts}", "add it there"
    )


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> Any:
    """A flag's value as a number where it is one: YAML takes 1e-3 for text."""
    try:
        return float(value) if value is not None and not isinstance(value, bool) else value
    except (TypeError, ValueError):
        return value
