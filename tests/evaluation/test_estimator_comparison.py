"""tools/compare_estimators.py: figures with their labels, and numbers and texts that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.evaluation.estimator_comparison import read_texts
from tests.evaluation import tiny

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_estimators.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True, timeout=280, check=False)


def test_every_figure_says_what_it_is_over(tmp_path) -> None:
    tokenizer = tiny.build_tokenizer_file(tmp_path / "tokenizer", 400)
    model = tiny.make_run(tmp_path / "mdm", tiny.config_for("mdm", tokenizer, vocab_size=400, seq_length=48))
    texts = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": " ".join(tiny.sentences()[:8])}])
    flags = ["--load", str(model), "--text", str(texts), "--questions", "2", "--repeats", "2"]
    shown = run(*flags, "--answer-tokens", "3", "--output", str(tmp_path / "figures.json"))
    assert shown.returncode == 0, shown.stderr
    assert "± standard error over seeds" in shown.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["rows"]


@pytest.mark.parametrize(("flag", "value"), [("--repeats", "-1")])
def test_counts_below_one_end_with_status_2(tmp_path, flag, value) -> None:
    refused = run("--load", str(tmp_path), "--text", "x", flag, value)
    assert refused.returncode == 2
    assert f"{flag}: '{value}'; it must be a whole number from 1" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_line_without_text_is_named(tmp_path) -> None:
    path = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(UserError, match="line 2 has no text"):
        read_texts(path)
