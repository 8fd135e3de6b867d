"""``megatron doctor --preflight``: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron.commands import doctor, preflight
from megatron.errors import UserError

RUN = ["--objective", "mdm", "--model", "2298M", "--micro-batch-size", "8", "--train-iters", "100"]


def test_a_run_that_does_not_fit_says_by_how_much_and_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the doctor, as users type it; in fp32, as the flags are by default."""
    monkeypatch.setattr(sys, "argv", ["doctor", "--preflight", *RUN, "--gpus", "8", "--device", "h100"])
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "Does not fit: " in text and " of 79.6 GiB, " in text and " too much (forward pass done)" in text
    for part in ("weights", "gradients", "optimizer", "buckets", "activations", "head", "runtime"):
        assert f"  {part:<12} " in text
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  --")}
    assert lines["--recompute-activations"].endswith("  fits")
    assert lines["--cpu-optimizer"].endswith("  does not fit")
    assert "--zero-stage 2" not in lines  # in fp32, with one micro-batch, it makes nothing smaller
    assert "--micro-batch-size 4 --global-batch-size 64" in lines  # the batch that the run has, and would have no more
    assert "Layouts that fit" in text and "a vocabulary of 50,257 is assumed" in text


def test_a_run_that_fits_is_priced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "preflight.json"
    flags = [*RUN, "--bf16", "--gpus", "64", "--mfu", "0.5", "--dollars", "3", "--save-gb-per-second", "10"]
    assert preflight.main(["--preflight", *flags, "--json", str(figures)]) == 0
    text, found = capsys.readouterr().out, json.loads(figures.read_text())
    assert "Fits: " in text and "Does not fit" not in text and "What one flag" not in text
    assert found["fits"] and found["remedies"] == {} and found["suggestions"] == []
    assert found["fullest"]["bytes"] == sum(found["fullest"]["parts"].values()) < found["device_bytes"]
    assert found["layout"]["dp"] == 64 and found["tokens"] == 100 * 64 * 8 * 2048
    assert found["device_hours"] == pytest.approx(found["flops"] / 989e12 / 0.5 / 3600)
    assert found["hours"] == pytest.approx(found["device_hours"] / 64)
    assert found["dollars"] == pytest.approx(3 * found["device_hours"])
    assert found["checkpoint_seconds"] == pytest.approx(12 * found["parameters"] / 10e9)
    assert f"${found['dollars']:,.0f}" in text and "Compile: on" in text and "Open files: " in text


@pytest.mark.parametrize(
    ("more", "is_whole"),
    [
        ([], True),
        (["--attention-dropout", "0", "--no-sequence-parallel"], True),
        (["--no-sequence-parallel"], False),
        (["--seq-length", "2047"], False),
    ],
)
def test_blocks_that_fall_into_pieces_are_said(
    more: list[str], is_whole: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    preflight.main(["--gpus", "2", "--model", "7M", "--bf16", "--train-iters", "9", "--tp-size", "2", *more])
    text = capsys.readouterr().out
    assert ("every block is one graph" in text, "each block in pieces" in text) == (is_whole, not is_whole)


def test_suggestions_come_on_request(tmp_path: Path) -> None:
    figures = tmp_path / "preflight.json"
    assert preflight.main([*RUN, "--bf16", "--suggest", "4", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())["suggestions"]
    assert len(found) == 4 and found == sorted(found, key=lambda each: round(each["step_seconds"], 4))


@pytest.mark.parametrize(
    "more", [["--gpus", "3", "--pipeline-model-parallel-size", "3"], ["--gpus", "2", "--gpus-per-node", "1"]]
)
def test_no_layout_fits_is_not_said_beside_one_that_does(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Three stages of three GPUs; tensor-parallel ranks on two nodes, which are never suggested."""
    model = ["--objective", "ar", "--model", "6796M", "--bf16", "--train-iters", "10", "--attention-dropout", "0"]
    assert preflight.main([*model, "--micro-batch-size", "32", "--global-batch-size", "256", *more]) == 1
    text = capsys.readouterr().out
    assert ("GiB  fits" in text or "Layouts that fit" in text) and "No layout" not in text


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        (["--device", "h1000"], "--device h1000"),
        (["--gpus", "6", "--tensor-model-parallel-size", "4"], "6 processes cannot hold"),
        (["--zero-stage", "3", "--pipeline-model-parallel-size", "2"], "--zero-stage 3 with 2 pipeline stages"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_what_training_refuses_is_refused_here(flags: list[str], given: str) -> None:
    with pytest.raises(UserError, match=given):
        preflight.main([*RUN, *flags])
