"""Sweeps as files: the grid, its commands and prices, matched comparisons, jobs of SLURM."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.commands import preflight
from megatron.config.cli import build_parser
from megatron.errors import UserError
from megatron.objectives import OBJECTIVES
from megatron.scaling.literature import preset_parameters
from megatron.scaling.sweep.definition import hours, load_sweep, unmatched
from megatron.scaling.sweep.price import price_of
from megatron.scaling.sweep.runner import command_line
from megatron.scaling.sweep.slurm import write_slurm
from megatron.scaling.sweep.state import state

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "tools/sweep.py")]


def write_sweep(folder: Path, **changes) -> Path:
    data = {
        "name": "test",
        "output": str(folder / "runs"),
        "grid": {
            "objective": ["ar", "mdm"],
            "model": {"small": {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4}},
            "unique_tokens": [100, 200],
            "epochs": [1, 3],
            "seed": [1],
        },
        "data": {100: "corpus-100", 200: "corpus-200"},
        "flags": {"lr": 0.001, "seq-length": 10, "valid-data-path": "corpus-valid"},
        "launcher": [sys.executable, str(ROOT / "tests/scaling/fake_trainer.py")],
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_grid_expands_to_every_combination_cheapest_first(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path))
    assert len(sweep.runs) == 8
    assert [run.flops for run in sweep.runs] == sorted(run.flops for run in sweep.runs)
    assert len({run.folder for run in sweep.runs}) == 8
    first = sweep.runs[0]
    assert first.parameters == 2 * (4 * 64**2 + 3 * 64 * 128 + 6 * 64) + 50257 * 64
    assert first.flops == 6.0 * first.parameters * 100


def test_epochs_by_objective_excluded_runs_and_own_flags(tmp_path):
    sweep = load_sweep(
        write_sweep(
            tmp_path,
            grid={
                "objective": ["ar", "mdm"],
                "model": ["7M"],
                "unique_tokens": [100],
                "epochs": {"ar": [1], "mdm": [1, 9]},
            },
            exclude=[{"objective": "mdm", "epochs": 9.0}],
            objectives={"mdm": {"num_mc": 4}},
        )
    )
    assert {run.name: run.flags.get("num-mc") for run in sweep.runs} == {
        "ar-7M-100-1ep-seed1234": None,
        "mdm-7M-100-1ep-seed1234": 4,
    }
    assert sweep.runs[0].parameters == preset_parameters("7M")
    grid = {"objective": ["ar", "mdm"], "model": ["7M"], "unique_tokens": ["1e2"], "epochs": ["6e12 FLOPs"]}
    rule = {"objective": "mdm", "unique_tokens": "1e2", "epochs": "6e12 FLOPs"}  # as the grid says it
    assert [run.objective for run in load_sweep(write_sweep(tmp_path, grid=grid, exclude=[rule])).runs] == ["ar"]


def test_compute_is_what_a_run_records(tmp_path):
    """Tokens that are computed twice count twice, and a shape is that of its flags: so compute buys as many epochs as the record
    says that they cost."""
    views = {
        "block_diffusion": {"block-size": 5},
        "mir_ar": {},
        "mdm": {"complementary-masks": True},
        "uniform_diffusion": {},
    }
    shape = {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "num-query-groups": 1, "no-swiglu": True}
    grid = {"objective": ["ar", *views], "model": {"tiny": shape}, "unique_tokens": [100], "epochs": ["6e12 FLOPs"]}
    runs = {run.objective: run for run in load_sweep(write_sweep(tmp_path, grid=grid, objectives=views)).runs}
    plain = runs["ar"]
    assert plain.parameters == 2 * (2 * 64**2 * 5 // 4 + 2 * 64 * 256 + 6 * 64) + 50257 * 64
    for name, run in runs.items():
        assert run.flops == pytest.approx(6e12, rel=1e-5) and run.parameters == plain.parameters, name
        twice = name in ("block_diffusion", "mir_ar", "mdm")
        assert run.epochs == pytest.approx(plain.epochs / (2 if twice else 1), rel=1e-5), name


def test_every_command_parses_with_the_real_flags(tmp_path):
    path = write_sweep(tmp_path, objectives={"mdm": {"num-mc": 4}}, launcher="torchrun --nproc-per-node 8")
    sweep = load_sweep(path)
    for run in sweep.runs:
        command = command_line(sweep, run)
        assert command[:4] == [sys.executable, str(ROOT / "tools/_torchrun.py"), "--nproc-per-node", "8"]
        assert Path(command[4]).name == ("pretrain_mdm.py" if run.objective == "mdm" else "pretrain_gpt.py")
        assert Path(command[4]).is_file()
        parsed = build_parser(OBJECTIVES).parse_args(command[5:])
        assert parsed.train_epochs == run.epochs
        assert parsed.save == parsed.load == str(run.folder)


def test_launchers_are_those_of_the_environment(tmp_path, monkeypatch):
    """Also behind others; variables are filled in; what is no launcher of ours is left alone."""
    monkeypatch.setenv("SLURM_NNODES", "4")
    launcher = "srun --cpus-per-task=8 torchrun --nnodes $SLURM_NNODES"
    sweep = load_sweep(write_sweep(tmp_path, launcher=launcher))
    torchrun = [sys.executable, str(ROOT / "tools/_torchrun.py")]
    assert command_line(sweep, sweep.runs[0])[:6] == ["srun", "--cpus-per-task=8", *torchrun, "--nnodes", "4"]
    sweep = load_sweep(write_sweep(tmp_path, launcher="deepspeed --num_gpus 2"))
    deepspeed = Path(command_line(sweep, sweep.runs[0])[0])
    assert (deepspeed.parent, deepspeed.name) == (Path(sys.executable).parent, "deepspeed")
    sweep = load_sweep(write_sweep(tmp_path, launcher="srun python"))
    assert command_line(sweep, sweep.runs[0])[:2] == ["srun", sys.executable]


def test_price(tmp_path):
    assert hours(989e12 * 3600, {"device": "H100", "devices": 2, "mfu": 0.5}) == pytest.approx(1.0)
    assert hours(1e12, {"peak_tflops": 1, "mfu": 1.0}) == pytest.approx(1 / 3600)
    assert hours(1e12, {}) is None
    done = subprocess.run([*PROGRAM, str(write_sweep(tmp_path, price={"device": "H100", "mfu": 0.4})), "price"],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 runs together" in done.stdout
    assert "40% MFU" in done.stdout
    assert done.stdout.count(" GiB a GPU") == 8


def test_a_price_is_that_of_preflight(tmp_path):
    """Hours and memory of a run: as ``megatron doctor --preflight`` says them of its command."""
    price = {"device": "H100", "mfu": 0.4, "dollars": 3}
    for run in load_sweep(write_sweep(tmp_path, price=price)).runs:
        figures = tmp_path / f"{run.name}.json"
        words = [*run.arguments(), "--vocab-size", str(run.vocab_size), "--tokenizer-type", "NullTokenizer"]
        default = ["--objective", run.objective] if run.objective == "mdm" else []
        assert preflight.main([*default, *words, "--gpus", "1", "--json", str(figures)]) == 0
        found, said = json.loads(figures.read_text()), price_of(run, price)
        assert said.bytes == found["fullest"]["bytes"]
        assert said.flops == pytest.approx(found["flops_per_token"] * run.unique_tokens * run.epochs)
        assert said.hours == pytest.approx(said.flops / 989e12 / 0.4 / 3600)
        assert said.dollars == pytest.approx(3 * said.hours)


def test_check_finds_what_else_differs(tmp_path):
    assert unmatched(load_sweep(write_sweep(tmp_path, objectives={"mdm": {"num-mc": 4}})).runs) == []
    path = write_sweep(tmp_path, objectives={"mdm": {"lr": 0.01}})
    found = unmatched(load_sweep(path).runs)
    assert len(found) == 4
    assert all("--lr is 0.001 against 0.01" in text for text in found)
    done = subprocess.run([*PROGRAM, str(path), "check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gird": {}}, "unknown keys gird"),
        ({"flags": {"seed": 3}}, "seed in flags; the grid or the sweep sets these"),
        ({"objectives": {"mdm": {"seed": 3, "num-mc": 2}}}, "sweep.yaml: seed in objectives.mdm"),
        (
            {"grid": {"objective": "ar", "model": {"own": {"train_epochs": 3}}, "unique_tokens": [100], "epochs": [1]}},
            "train-epochs in grid.model.own",
        ),
        ({"data": {100: "x"}}, "no data for 200 unique tokens"),
        ({"grid": {"objective": "ar", "model": ["9M"], "unique_tokens": [100], "epochs": [1]}}, "neither a preset"),
        ({"grid": {"objective": "ar", "model": ["7M"], "unique_tokens": [100, 100], "epochs": [1]}}, "twice"),
        ({"grid": {"objective": "ar", "model": ["7M"], "unique_tokens": [100], "epochs": [0]}}, "must be positive"),
        (
            {"grid": {"objective": "ar", "model": ["7M"], "unique_tokens": [100], "epochs": [math.nan]}},
            "must be positive",
        ),
        ({"grid": {"objective": "ar", "model": ["7M"], "unique_tokens": ["many"], "epochs": [1]}}, "must be positive"),
        (
            {"grid": {"objective": "ar", "model": ["7M"], "unique_tokens": [100], "epochs": ["x FLOPs"]}},
            "must be positive",
        ),
        ({"grid": {"objective": "ar", "model": ["7M"], "unique_tokens": [100], "epochs": [1], "seed": [-5]}}, "from 0"),
        ({"grid": {"objective": "ar"}}, "lacks epochs, model, unique_tokens"),
    ],
)
def test_wrong_files_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_sweep(write_sweep(tmp_path, **changes))


def test_an_option_of_slurm_is_one_word_whatever_is_in_it(tmp_path, monkeypatch):
    """sbatch takes quotes as a shell does, an unquoted blank for the next option, and # for a comment."""
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    sweep = load_sweep(write_sweep(tmp_path / "my runs", slurm={"comment": "two words #1", "partition": "gpu"}))
    lines = write_slurm(sweep, sweep.runs, Path("jobs")).read_text().splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("#SBATCH ")]
    assert ["#SBATCH", f"--output={tmp_path}/my runs/jobs/%x-%a.txt"] in words
    assert ["#SBATCH", "--comment=two words #1"] in words and all(len(line) == 2 for line in words)


def test_slurm_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_sweep(tmp_path, output="runs", slurm={"partition": "gpu", "gpus-per-node": 8, "max-running": 3})
    path.write_text(path.read_text() + "  time: 24:00:00\n  exclusive: true\n  requeue: false\n")
    done = subprocess.run([*PROGRAM, path.name, "slurm"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "runs/slurm/sweep.slurm"
    text = script.read_text()
    assert "#SBATCH --array=0-7%3" in text
    assert f"#SBATCH --output={tmp_path}/runs/slurm/%x-%a.txt" in text  # wherever sbatch is called
    assert {"#SBATCH --partition=gpu", "#SBATCH --exclusive", "#SBATCH --open-mode=append"} <= set(text.splitlines())
    assert "#SBATCH --time=24:00:00" in text, "not 86400, which are minutes"
    assert "#SBATCH --signal=B:USR1@120" in text and "requeue" not in text
    assert not re.search(r"max.running", text)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    # Task 3 runs the fourth run and no other.
    task = dict(os.environ, SLURM_ARRAY_TASK_ID="3", SLURM_JOB_ID="7")
    done = subprocess.run(["bash", str(script)], env=task, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [state(run) for run in load_sweep(path).runs].count("finished") == 1
    assert state(load_sweep(path).runs[3]) == "finished"


def test_the_example_sweep_is_valid_and_matched():
    sweep = load_sweep(ROOT / "examples_scaling/sweeps/laptop.yaml")
    assert len(sweep.runs) == 44
    assert unmatched(sweep.runs) == []
    for run in sweep.runs:
        build_parser(OBJECTIVES).parse_args(command_line(sweep, run)[2:])
    assert hours(sum(run.flops for run in sweep.runs), sweep.price) is not None
