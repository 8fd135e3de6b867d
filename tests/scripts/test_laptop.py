"""The laptop quickstart: its commands, and in miniature: text, tokenizer, both runs, verdict and report; stopped with Ctrl-C
and continued."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_example_scripts import dry_run

REPO = Path(__file__).resolve().parents[2]
LAPTOP = REPO / "examples_scaling/quickstart/laptop.sh"
TUNED = [("16000", "3.0", "0.0"), ("32000", "1.0", "0.0")]  # samples, weight decay, dropout of AR and of MDM
SMALL = {
    "DOCUMENTS": "12",
    "VOCAB_SIZE": "300",
    "LAYERS": "1",
    "HIDDEN": "32",
    "HEADS": "2",
    "SEQ_LENGTH": "32",
    "MICRO_BATCH_SIZE": "4",
    "GLOBAL_BATCH_SIZE": "4",
    "TRAIN_SAMPLES": "960",
    "EVAL_INTERVAL": "120",
    "EVAL_ITERS": "4",
    "SAVE_INTERVAL": "100",
    "LOG_INTERVAL": "20",
    "NUM_MC": "2",
    "EXACT_SAMPLES": "4",
    "OMP_NUM_THREADS": "1",
}


def start(run_dir: Path, **settings: str) -> subprocess.Popen[str]:
    """Start laptop.sh as a terminal would: a process group of its own, which Ctrl-C reaches as a whole."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.Popen(
        ["bash", str(LAPTOP)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **clean,
            **SMALL,
            "VIRTUAL_ENV": sys.prefix,
            "RUN_DIR": str(run_dir),
            "INSTALL_FLAGS": "--deps-only",
            **settings,
        },
        start_new_session=True,
    )


def metrics(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def settings(run_dir: Path) -> tuple[int, float, float]:
    """Samples, weight decay and dropout of a run."""
    config = json.loads((run_dir / "run.json").read_text())["config"]
    assert config["model"]["attention_dropout"] == config["model"]["hidden_dropout"]
    return config["run"]["train_samples"], config["optimizer"]["weight_decay"], config["model"]["hidden_dropout"]


def wait_for_steps(path: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Wait for the first line of a metrics file."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"no step in {path} after {seconds} s"
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_interrupted_and_continued_to_the_report(tmp_path: Path) -> None:
    run_dir = tmp_path / "laptop"
    process = start(run_dir)
    wait_for_steps(run_dir / "ar/metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "minutes on 2 CPU cores" in output  # said at the start
    assert "stopped; the same command continues" in output
    stopped_at = int((run_dir / "ar/latest").read_text().strip().removeprefix("global_step"))
    assert stopped_at < 240
    assert not (run_dir / "mdm").exists()

    process = start(run_dir)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert f"continuing at step {stopped_at}" in output
    for name, label in (("ar", "NLL (exact)"), ("mdm", "NLL bound")):
        assert [record["step"] for record in metrics(run_dir / name, "train")] == list(range(20, 241, 20))
        assert [record["step"] for record in metrics(run_dir / name, "valid")] == [120, 240]
        assert {record["label"] for record in metrics(run_dir / name, "valid")} == {label}
        assert len((run_dir / name / "samples.jsonl").read_text().splitlines()) == 2  # of the best checkpoint
    page = (run_dir / "report/report.html").read_text()
    assert "NLL bound" in page
    assert "mdm below ar: " in page and "rests on exact values" in page and "mdm below ar: " in output
    judged = json.loads((run_dir / "likelihood.json").read_text())
    assert judged["samples"] == 4
    assert [(value["model"], value["kind"]) for value in judged["findings"]] == [
        ("ar", "exact"), ("mdm", "upper bound"), ("mdm", "exact"), ("mdm", "exact"),
    ]  # fmt: skip
    assert [settings(run_dir / name)[1] for name in ("ar", "mdm")] == [3.0, 1.0]  # the tuned recipe is the default
    assert list((run_dir / "report").rglob("*.png"))
    assert "matched" in output
    assert str(run_dir / "report/report.html") in output
    assert "Next:  source " in output.splitlines()[-4]


@pytest.mark.timeout(300)
def test_own_text_of_nine_kilobytes_to_the_report(tmp_path: Path) -> None:
    (tmp_path / "mein Text").mkdir()
    text = "\n\n".join(f"Absatz {number}: {number * number} Wörter sind {number % 7} zu viel." for number in range(200))
    (tmp_path / "mein Text/größe.md").write_text(text[:9000], encoding="utf-8")
    small = {"DOCUMENTS": "", "TRAIN_SAMPLES": "16", "EVAL_INTERVAL": "2", "EVAL_ITERS": "full", "RECIPE": "plain"}
    run_dir = tmp_path / "mein Lauf"
    process = start(run_dir, TEXT=str(tmp_path / "mein Text"), PROMPT="Absatz 'zwei'", **small)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "documents are few: cut" in output
    assert [record["step"] for record in metrics(run_dir / "mdm", "valid")] == [2, 4]
    assert (run_dir / "report/report.html").is_file()
    assert settings(run_dir / "ar") == settings(run_dir / "mdm") == (16, 0.1, 0.0)
    report, generate = (shlex.split(line) for line in output.splitlines()[-3:-1])  # the next commands run as printed
    assert report == ["megatron", "report", str(run_dir / "ar"), str(run_dir / "mdm"), "--serve"]
    assert generate[3] == str(run_dir / "mdm") and generate[-1] == "Absatz 'zwei'"

    (tmp_path / "mein Text/neu.txt").write_text("more")
    process = start(run_dir, TEXT=str(tmp_path / "mein Text"), **small)
    assert "text that changed since" in process.communicate(timeout=200)[0]
    assert process.returncode == 2


def test_laptop_prints_every_command_and_passes_flags_on(tmp_path: Path) -> None:
    words = dry_run(LAPTOP, "--log-interval", "7", RUN_DIR=str(tmp_path / "run"))
    assert [Path(word).name for word in words if word.endswith((".py", "install.sh"))] == [
        "install.sh", "make_sample_corpus.py", "train_tokenizer.py", "preprocess_data.py", "preprocess_data.py",
        "make_subset.py", "pretrain_gpt.py", "generate.py", "pretrain_mdm.py", "generate.py", "likelihood.py", "report.py",
    ]  # fmt: skip
    assert [after for word, after in itertools.pairwise(words) if word == "--log-interval"] == ["50", "7"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({}, "laptop", TUNED),
        ({"RECIPE": "plain"}, "laptop-plain", [("20000", "0.1", "0.0")] * 2),
        ({"RECIPE": "plain", "TEXT": "."}, "laptop-.-plain", [("20000", "0.1", "0.0")] * 2),
        ({"TRAIN_SAMPLES": "80", "DROPOUT": "0.2"}, "laptop", [("80", own[1], "0.2") for own in TUNED]),
    ],
)
def test_laptop_trains_each_side_by_its_recipe(
    given: dict[str, str], name: str, expected: list[tuple[str, str, str]]
) -> None:
    words = dry_run(LAPTOP, **given)
    flags = ("--train-samples", "--weight-decay", "--hidden-dropout")
    values = [[after for word, after in itertools.pairwise(words) if word == flag] for flag in flags]
    assert list(zip(*values)) == expected
    assert str(REPO / "runs" / name / "mdm") in words


def test_laptop_knows_two_recipes() -> None:
    with pytest.raises(AssertionError, match=r"RECIPE=fancy; there are tuned and plain; leave it out for tuned"):
        dry_run(LAPTOP, RECIPE="fancy")


def test_laptop_takes_one_gpu_of_many(tmp_path: Path) -> None:
    """Its batch is for one process; eight would each want a part of it."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor n in 0 1 2 3 4 5 6 7; do echo GPU $n; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    words = dry_run(LAPTOP, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert not [word for word in words if "torchrun" in word]


def test_laptop_dry_run_shows_the_precision_of_the_real_run(tmp_path: Path) -> None:
    """fp32 on a machine without GPU; another machine is meant where its processes are named."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert "--bf16" not in dry_run(LAPTOP, PATH=path)
    assert "--bf16" in dry_run(LAPTOP, PATH=path, GPUS_PER_NODE="1")


def test_laptop_takes_own_text_and_its_dry_run_prints_every_command(tmp_path: Path) -> None:
    (tmp_path / "Meine Bücher").mkdir()
    flags = {"TEXT": str(tmp_path / "Meine Bücher"), "SPLIT_FLAGS": "--json-keys body"}
    words = dry_run(LAPTOP, "--lr", "7e-4", **flags)
    assert [Path(word).name for word in words if word.endswith((".py", "install.sh"))] == [
        "install.sh", "split_data.py", "train_tokenizer.py", "preprocess_data.py", "preprocess_data.py",
        "pretrain_gpt.py", "generate.py", "pretrain_mdm.py", "generate.py", "likelihood.py", "report.py",
    ]  # fmt: skip
    after = [next_word for word, next_word in itertools.pairwise(words) if word in ("--input", "--json-keys", "--save")]
    assert after[0] == str(tmp_path / "Meine Bücher") and "body" in after
    assert str(REPO / "runs/laptop-Meine_B__cher/ar") in after, "own text has a run directory of its own"
    assert words.count("7e-4") == 2
    words = dry_run(LAPTOP, DOCUMENTS="5", **flags)
    assert words[words.index("--documents") + 1] == "5"
    with pytest.raises(AssertionError, match=r"TEXT=/nowhere does not exist; it is a file or a folder of text; check"):
        dry_run(LAPTOP, TEXT="/nowhere")
