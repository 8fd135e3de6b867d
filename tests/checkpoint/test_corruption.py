"""A seeded storm over the files of a checkpoint: nothing damaged is ever used without a word.

The suite runs a few hundred damages; ``STORM=1`` flips every bit of every file and cuts it everywhere. Outcomes: *detected*
(refused by name), *fell back* (to the older checkpoint, with a word), *harmless* (what is loaded is what was saved),
*silent* (anything else: must not happen).
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import Selection, select
from megatron.checkpoint.writer import Saving
from megatron.errors import UserError
from megatron.objectives import parse
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec

STEPS = (20, 30)  # their names differ in one bit
IS_STORM = os.environ.get("STORM") == "1"
SPECS = {"a": ShardSpec((6, 4), 0, (4, 2)), "b.weight": ShardSpec((5,))}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two tensors with moments."""
    folder = tmp_path_factory.mktemp("run")
    config = parse(["--model", "7M", "--train-samples", "80", "--seq-length", "8"], objective="mdm")
    for step in STEPS:
        generator = torch.Generator().manual_seed(step)
        fragments = [
            Fragment(kind, name, 0, 1, 0, torch.randn(spec.full_shape, generator=generator).reshape(-1))
            for kind in ("weight", "exp_avg", "exp_avg_sq")
            for name, spec in SPECS.items()
        ]
        state = {
            "step": step,
            "consumed_samples": 8 * step,
            "optimizer_steps": step,
            "config": config,
            "best_nll": 3.5e-05,
        }
        Saving(folder, fragments=fragments, specs=SPECS, state=state, context=ParallelContext()).publish()
    return folder


def contents(found: Selection) -> tuple[Any, ...]:
    """All that a run would continue from."""
    assert found.tag is not None and found.manifest is not None
    reader = CheckpointReader(found.tag)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    tensors = [reader.tensor(name, kind).numpy().tobytes() for name in SPECS for kind in kinds]
    return found.tag.name, found.manifest, tensors


def damages(path: Path, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """New contents of a file: with one bit flipped, cut, empty, or none because it is deleted."""
    whole = path.read_bytes()
    bits = range(8 * len(whole)) if IS_STORM else chance.sample(range(8 * len(whole)), min(90, 8 * len(whole)))
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        yield "bit", bytes(changed)
    for length in range(len(whole)) if IS_STORM else chance.sample(range(len(whole)), min(20, len(whole))):
        yield "cut", whole[:length]
    yield "empty", b""
    yield "deleted", None


def kind_of(path: Path, whole: bytes, damaged: bytes | None) -> str:
    """Which part of which kind of file was damaged."""
    if path.suffix != ".safetensors" or damaged is None:
        return path.name.split("-")[0]
    header = 8 + int.from_bytes(whole[:8], "little")
    first = next((i for i, (old, new) in enumerate(zip(whole, damaged)) if old != new), len(damaged))
    return "shard header" if first < header else "shard data"


def outcome(run_dir: Path, tag: str | None, expected: dict[str, tuple[Any, ...]]) -> str:
    """What a resume makes of the folder as it is now."""
    newest = f"global_step{STEPS[-1]}"
    try:
        found = select(run_dir, tag)
        loaded = contents(found)
    except UserError:
        return "detected"
    if loaded != expected[loaded[0]]:
        return "silent"
    if loaded[0] == newest:
        return "harmless"
    return "fell back" if found.skipped and tag is None else "silent"


@pytest.mark.parametrize("tag", [None, f"global_step{STEPS[-1]}"])
def test_no_damage_is_silent(run_dir: Path, tag: str | None) -> None:
    expected = {f"global_step{step}": contents(select(run_dir, f"global_step{step}")) for step in STEPS}
    newest = run_dir / f"global_step{STEPS[-1]}"
    chance, counts = random.Random(20261125), Counter[tuple[str, str, str]]()
    for path in (newest / "manifest.json", newest / "shard-00000.safetensors", run_dir / "latest"):
        whole = path.read_bytes()
        for how, damaged in damages(path, chance):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            what = outcome(run_dir, tag, expected)
            counts[kind_of(path, whole, damaged), how, what] += 1
            path.write_bytes(whole)
    for (kind, how, what), number in sorted(counts.items()):
        print(f"{'newest' if tag is None else '--load-tag':>10}  {kind:<14} {how:<8} {what:<10} {number}")
    assert not [key for key in counts if key[2] == "silent"]
    assert sum(counts.values()) >= 250
    wanted = {"fell back", "harmless"} if tag is None else {"detected", "harmless"}
    assert {what for _, _, what in counts} == wanted  # nothing blocks a resume while an older checkpoint is whole
