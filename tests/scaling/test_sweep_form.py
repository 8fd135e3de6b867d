"""Sweep files: whatever stands in them is a sweep, or refused in three parts, and what is refused names its place."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.errors import UserError
from megatron.scaling.sweep.definition import hours, load_sweep

SWEEP: dict[str, Any] = {
    "name": "t", "output": "runs", "vocab_size": 50257, "launcher": "python",
    "grid": {
        "objective": ["ar", "mdm"], "model": {"small": {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4}},
        "unique_tokens": [100, 200], "epochs": {"ar": [1], "mdm": [1, 3]}, "seed": [1],
    },
    "data": {100: "a", 200: "b"}, "flags": {"lr": 0.001}, "objectives": {"mdm": {"num-mc": 4}}, "slurm": {"time": "1:00"},
    "exclude": [{"objective": "mdm", "epochs": 3}], "price": {"device": "H100", "devices": 2, "mfu": 0.4, "dollars": 3},
}  # fmt: skip
ODD = [
    "", 0, -1, -0.0, math.nan, math.inf, 10**30, 10**400, "abc", "1e400", 1.5, True, [], {}, [None], [[1]], {"a": 1},
    {1: {}}, "a/b", None,
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place of a nested file."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def load(folder: Path, place: tuple, value: Any) -> Any:
    data = copy.deepcopy(SWEEP)
    if not place:
        data = value
    else:
        parent: Any = data
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
    (folder / "sweep.yaml").write_text(yaml.safe_dump(data))
    return load_sweep(folder / "sweep.yaml")


@pytest.mark.parametrize("place", places(SWEEP), ids=lambda place: ".".join(map(str, place)))
def test_every_file_is_a_sweep_or_refused_in_three_parts(tmp_path: Path, place: tuple) -> None:
    told = []
    for value in ODD:
        try:
            sweep = load(tmp_path, place, value)
        except UserError as error:
            told.append(str(error))
            continue
        cost = hours(1.0, sweep.price)
        assert cost is None or cost > 0
        assert all(math.isfinite(run.flops) and run.flops > 0 for run in sweep.runs), value
        assert all(isinstance(word, str) for run in sweep.runs for word in run.arguments())
    assert all(text.count("; ") >= 2 for text in told), told
    assert len(told) >= (1 if place[:1] in (("flags",), ("slurm",), ("objectives",)) else 3)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("grid", "objective"), "adm", "grid.objective is 'adm'; it is a list, each one of ar, mdm"),
        (("grid", "epochs"), {"adm": [1]}, "grid.epochs is .*; it is numbers, or numbers for each objective"),
        (("exclude",), [{"objective": "adm"}], "exclude has .*; a rule names runs of the grid, and the grid has none such"),
        (("exclude",), [{"objektive": "mdm"}], "exclude is .*; it is a list of mappings of objective, model"),
        (("objectives",), {"adm": {"num-mc": 4}}, "objectives is .*; it is a mapping of flags for each objective"),
        (("price",), {"mfus": 0.9}, "price is .*; it is a mapping of device, devices, dollars, mfu, peak_tflops"),
        (("slurm", "time"), ["1:00"], "slurm is .*; it is a mapping of options of sbatch to single values"),
        (("price", "mfu"), 40, "price names mfu 40; it is a share of the peak"),
        (("price", "device"), "H1000", "price names device H1000; known are"),
        (("data",), {"source": "x", "folder": "y"}, "data is .*; it is a prefix for every number"),
        (("grid", "model", "small", "num-layers"), 1.5, "num-layers 1.5 is in the file; it must be a whole number"),
        (("grid", "unique_tokens"), [100.5], "unique_tokens 100.5 is in the file; it must be a whole number"),
        (("name",), "two words", "name is 'two words'; it is a word without spaces"),
        (("flags", "lr"), -1, "sweep.yaml: .*-100-.*: --lr is -1"),
        (("objectives",), {"mdm": {"num-mcs": 4}}, "sweep.yaml: mdm-.*: unknown argument '--num-mcs'"),
        (("flags", "lr"), {"ar": 1e-3}, "flags is .*; it is a mapping of flags to values"),
    ],
)  # fmt: skip
def test_what_would_be_passed_over_is_refused(tmp_path: Path, place: tuple, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, place, value)


@pytest.mark.parametrize("content", [b"\xde\xad", b"name:\tx", b"[" * 3000, b"a: &a [*a]", b""], ids=repr)
def test_a_file_that_is_no_sweep_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}"):
        load_sweep(path)
    with pytest.raises(UserError, match=r"nowhere.yaml cannot be read as YAML \(No such file or directory\)"):
        load_sweep(tmp_path / "nowhere.yaml")
