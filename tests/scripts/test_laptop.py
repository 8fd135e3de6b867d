"""The laptop quickstart in miniature: text, tokenizer, both runs, verdict and report; stopped with Ctrl-C and continued."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LAPTOP = REPO / "examples_scaling/quickstart/laptop.sh"
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
