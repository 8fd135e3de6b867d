"""A sweep as an array job of SLURM, one task a run, each queued again until its run is done."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.errors import require
from megatron.scaling.sweep.definition import Sweep
from megatron.scaling.sweep.runner import ROOT
from megatron.scaling.sweep.sweep_run import SweepRun

# The signal comes to the script alone, two to three minutes before the limit; the trainers save on it.
OPTIONS = {"open-mode": "append", "requeue": True, "signal": "B:USR1@120"}


def write_slurm(sweep: Sweep, runs: Sequence[SweepRun], folder: Path) -> Path:
    """Write the array job and return the script's path. Submitting it again continues what is missing.

    Every task calls ``tools/sweep.py FILE run --only NAME``, so locks, skipping and continuing work as they do locally
    (on a file system whose locks reach all nodes). Options of the file's ``slurm`` block come before ours; true is an option
    without a value, false leaves one of ours out.

    Raises:
        UserError: there is no checkout.
    """
    common = ROOT / "examples_scaling/common.sh"
    given = "a SLURM job from an installed package"
    require(common.is_file(), given, "its script is one of examples_scaling", "use the checkout: python tools/sweep.py")
    folder.mkdir(parents=True, exist_ok=True)
    runs = [
        run for run in runs if run.trunk is None
    ] or runs  # branches come after the run that they leave, in its task
    names = folder / "runs.txt"
    names.write_text("".join(f"{run.name}\n" for run in runs), encoding="utf-8")
    # SLURM makes no folder for the log, and ends a job without a word whose log has none: so not relative to wherever.
    options: dict[str, object] = {
        "job-name": sweep.name,
        "output": str(folder.resolve() / "%x-%a.txt"),
        "array": f"0-{len(runs) - 1}",
    }
    options |= OPTIONS | {str(key).lstrip("-").replace("_", "-"): value for key, value in sweep.slurm.items()}
    if "max-running" in options:
        options["array"] = f"{options['array']}%{options.pop('max-running')}"
    chosen = {key: value for key, value in options.items() if value is not None and value is not False}
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in chosen.items()]
    action = "search" if sweep.spaces else "run"  # a task a run of the grid, or a search that begins with it
    program = [sys.executable, str(ROOT / "tools/sweep.py"), str(sweep.path.resolve()), action, "--only"]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {shlex.quote(word)}" for word in words),
        f"source {shlex.quote(str(common))}",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f'name="$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(names.resolve()))})"',
        f'as_job {shlex.join(program)} "$name"',
    ]
    script = folder / "sweep.slurm"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return script
