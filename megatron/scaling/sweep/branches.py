"""Branches of the runs of a grid: each leaves its run, the trunk, at one of its checkpoints and decays the learning rate from
there (``--branch-from``, docs/training.md). One stable run gives decayed losses at every length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.errors import require
from megatron.scaling.sweep.form import count, positive
from megatron.scaling.sweep.sweep_run import SweepRun, dashed

TRUNK_ONLY = {"train-epochs", "lr-decay-style"}  # what a branch has its own of
OF_A_BRANCH = {"train-samples", "branch-from"}
"""Flags that are set here."""


def branches_of(path: Path, block: Mapping[str, Any] | None, trunk: SweepRun) -> list[SweepRun]:
    """The branches of one run, shortest first; none where the file has no ``branches``.

    Args:
        path: of the file, for errors.
        block: ``steps`` of the trunk at which they leave it, ``decay`` as a share of those, and flags of theirs.
        trunk: the run that they leave.

    Raises:
        UserError: a step at which the trunk has no checkpoint, or a branch that ends after it.
    """
    if not block:
        return []
    batch, length, interval = (count(trunk.flags.get(name), f"{name} of {trunk.name}") for name in
                               ("global-batch-size", "seq-length", "save-interval"))  # fmt: skip
    decay, found = positive(block["decay"], "branches.decay"), []
    require("keep-last" not in trunk.flags, f"{path}: keep-last, and branches", "a branch leaves a checkpoint of its trunk",
            "remove keep-last")  # fmt: skip
    for step in sorted(count(value, "branches.steps") for value in block["steps"]):
        samples = round(step * batch * (1 + decay))
        epochs = samples * length / trunk.unique_tokens
        require(step % interval == 0, f"{path}: branches leave at step {step}", f"checkpoints are saved every {interval} steps",
                "give multiples of that")  # fmt: skip
        require(epochs <= trunk.epochs, f"{path}: a branch from step {step} ends at epoch {epochs:.3g}",
                f"{trunk.name} is planned for {trunk.epochs:g}", "give more epochs, or earlier steps")  # fmt: skip
        flags = {name: value for name, value in trunk.flags.items() if name not in TRUNK_ONLY}
        flags |= {**dashed(block.get("flags") or {}), "train-samples": samples}
        flags["branch-from"] = f"{trunk.folder}:global_step{step}"
        name = f"{trunk.name}-branch{step}"
        found.append(replace(trunk, name=name, folder=trunk.folder.parent / name, epochs=epochs, flags=flags,
                             trunk=trunk, added_share=decay / (1 + decay)))  # fmt: skip
    return found
