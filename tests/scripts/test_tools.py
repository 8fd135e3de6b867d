"""The command-line programs, as a user of a fresh checkout starts them: from another folder, without PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted((ROOT / "tools").glob("[!_]*.py"))
PROGRAMS = sorted([*TOOLS, *ROOT.glob("pretrain_*.py")])
TINY = [
    "--num-layers",
    "1",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "2",
    "--seq-length",
    "32",
    "--micro-batch-size",
    "2",
]


def run(
    program: Path, *flags: str, cwd: Path, options: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the figures below are those of a CPU
    command = [sys.executable, *options, str(program), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("program", PROGRAMS[::7], ids=lambda path: path.stem)  # test_console.py asks every verb
def test_help(program: Path, tmp_path: Path) -> None:
    done = run(program, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert program.stem in done.stdout.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


# Tool → arguments that its own argparse takes and that are wrong all the same.
WRONG = {
    "average_checkpoints": ["absent", "--output", "out"],
    "benchmark": ["--no-such-flag"],
    "check_environment": ["--with", "nothing"],
    "compare_estimators": ["--load", "absent", "--text", "absent", "--answer-tokens", "4,many"],
    "convert_checkpoint": ["to-hf", "absent", "out"],
    "doctor": ["--preflight", "--device", "nothing"],
    "download": ["--ar-checkpoints"],
    "evaluate_downstream": ["--task_list", "arc_easy"],
    "fit_laws": ["absent"],
    "generalisation": ["absent"],
    "generate": ["--load", "absent"],
    "import_runs": [
        *("absent", "--output", "out", "--source", "s", "--licence", "l", "--objective", "ar"),
        *("--loss", "loss", "--parameters", "n", "--unique-tokens", "u", "--tokens", "d"),
    ],
    "inspect_data": ["absent"],
    "likelihood": ["absent"],
    "make_sample_corpus": ["--output-dir", "out", "--validation-fraction", "7"],
    "make_subset": ["--input", "absent", "--output", "out", "--documents", "3"],
    "plan": ["--unique-tokens", "1e8", "--flops", "1e20", "--mfu", "7"],
    "preprocess_data": ["--input", "absent.jsonl", "--output-prefix", "out"],
    "push_to_hub": ["absent", "me/model"],
    "report": ["absent"],
    "split_data": ["--input", "absent", "--output-dir", "out"],
    "sweep": ["absent.yaml", "list"],
    "train_tokenizer": ["--input", "absent.jsonl", "--output", "out"],
}


@pytest.mark.parametrize("program", TOOLS, ids=lambda path: path.stem)
def test_wrong_input_is_one_line_and_status_2(program: Path, tmp_path: Path) -> None:
    done = run(program, *WRONG[program.stem], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# Flags that would have no effect beside the others, before anything is read.
IDLE = {
    "compare_estimators --load a --valid-data-path b --questions 3": "--questions would have no effect; a validation asks no",
    "compare_estimators --load a --text b --num-mc 3": "--num-mc would have no effect; it is of a validation",
    "compare_estimators --load a --text b --variance-tokens 3 --answer-tokens 4": "--answer-tokens would have no effect",
    "compare_estimators --load a --valid-data-path b --parts 3 --repeats 4": "--repeats would have no effect",
    "convert_checkpoint to-hf a b --no-tokenizer --tokenizer t": "--tokenizer would have no effect; --no-tokenizer leaves it",
    "convert_checkpoint to-hf a b --tokenizer t --vocab-file v": "--vocab-file would have no effect; --tokenizer stands in",
    "preprocess_data --input a --output-prefix b --skip-errors --max-errors 3": "--max-errors would have no effect",
    "evaluate_downstream --load a --task_list boolq --log_samples": "--log_samples without --results_path",
    "generate --load a --top-k 3": "--top-k or --top-p at --temperature 0",
    "make_subset --input a.jsonl --output b --documents 3 --seed 7": "--seed would have no effect; the first documents",
    "make_subset --input a --output b --documents 3 --json-keys k": "--json-keys would have no effect; the input is token",
    "plan --unique-tokens 1B --flops 1e20 --device A100 --peak-tflops 9": "--device would have no effect; --peak-tflops stands",
    "sweep s.yaml list --jobs 2": "--jobs would have no effect; list starts nothing",
    "sweep s.yaml run --output d": "--output would have no effect; run writes no job script",
    "push_to_hub a me/b --no-export --with-checkpoint --trim-vocab": "--trim-vocab would have no effect; there is no export",
}


@pytest.mark.parametrize("words", IDLE)
def test_flags_without_effect_are_refused(words: str, tmp_path: Path) -> None:
    tool, *flags = words.split()
    done = run(ROOT / "tools" / f"{tool}.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and IDLE[words] in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", TOOLS, ids=lambda path: path.stem)
def test_a_fault_of_the_program_keeps_its_traceback(program: Path, tmp_path: Path) -> None:
    """A ValueError of ours is no excuse: argparse is broken from outside, as a bug of the tool would be."""
    breaking = "import argparse\ndef broken(*a, **k): raise ValueError('a bug')\n"
    breaking += "argparse.ArgumentParser.parse_known_args = broken\n"
    (tmp_path / "sitecustomize.py").write_text(breaking)
    done = run(program, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: a bug\n")


def test_flags_of_an_evaluation_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    words = ["--load", "a", "--task_list", "boolq", "--log_samples"]
    done = run(ROOT / "tools/evaluate_downstream.py", *words, cwd=tmp_path, options=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 2 and "argparse" in imported and "torch" not in imported


@pytest.mark.parametrize("program", TOOLS, ids=lambda path: path.stem)
def test_without_the_environment_one_line_says_how_to_reach_it(program: Path, tmp_path: Path) -> None:
    """An interpreter that sees no installed package: any python3 of the system."""
    if program.stem == "benchmark":
        pytest.skip("it measures torch, which it imports first")
    done = run(program, *WRONG[program.stem], cwd=tmp_path, options=["-S"])
    if done.returncode == 2:  # the mistake was found before a package was needed
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 1, done.stderr
    assert " has no package " in done.stderr
    assert "source .venv/bin/activate, or bash install.sh" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_benchmark_measures_and_writes_json(tmp_path: Path) -> None:
    done = run(
        ROOT / "tools/benchmark.py", *TINY, "--objective", "mdm", "--steps", "3", "--warmup", "1", "--num-workers", "0",
        "--compare-plain", "--json", "result.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(done.stdout) == result
    assert (result["objective"], result["precision"], result["global_batch"], result["sequence"]) == (
        "mdm",
        "fp32",
        2,
        32,
    )
    assert result["layout"] == {"tp": 1, "pp": 1, "dp": 1}
    assert result["steps"] == 3
    seconds = result["step_seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert result["tokens_per_second"] == pytest.approx(64 / seconds["median"])
    # Blocks: 4 projections of 32 x 32 and 3 matrices of 32 x 64; head: 50,304 x 32 for the masked half; 32 keys a token.
    flops = 6 * (4 * 32 * 32 + 3 * 32 * 64 + 50_304 * 32 * 0.5005) + 12 * 32 * 32
    assert result["flops_per_token"] == pytest.approx(flops)
    assert result["tflops_per_device"] == pytest.approx(flops * result["tokens_per_second"] / 1e12)
    assert result["mfu"] is None  # no data sheet says what this CPU can do
    assert result["times_faster_than_plain"] > 0


def test_benchmark_refuses_a_comparison_with_accumulation(tmp_path: Path) -> None:
    flags = [*TINY, "--objective", "ar", "--global-batch-size", "4", "--compare-plain"]
    done = run(ROOT / "tools/benchmark.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --compare-plain with accumulation")
