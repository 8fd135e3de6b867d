"""The likelihood gap: right sign, exact values for a causal model, the same every time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron.evaluation.gap import GapTask, likelihood_gap
from tests.evaluation import toy


def encode(text: str) -> list[int]:
    return [ord(c) % 9 for c in text.replace(" ", "")]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def task(tmp_path) -> GapTask:
    items = [
        {"query": "abc", "choices": ["de", "fgh", "a"], "gold": 1},
        {"query": "", "choices": ["bb", "cd"], "gold": 0},
    ]
    return GapTask.load(write(tmp_path / "small.jsonl", items), encode, row_length=10, eod_id=8)


def test_causal_gap_is_the_plain_one(task) -> None:
    model = toy.ToyCausalModel(vocab=9)
    result = likelihood_gap(model, task, mask_id=None, max_length=10)
    gaps, right = [], []
    for question, gold in zip(task.questions, task.gold):
        sums = []
        for request in question:
            row = torch.tensor([request.context + request.target])
            logprobs = torch.log_softmax(model(row)[0].double(), -1)
            start = len(request.context)
            sums.append(sum(float(logprobs[start + i - 1, t]) for i, t in enumerate(request.target)))
        means = [s / len(r.target) for s, r in zip(sums, question)]
        gaps.append(means[gold] - np.mean([m for i, m in enumerate(means) if i != gold]))
        right.append(int(np.argmax(sums)) == gold)
    assert result["gap"] == pytest.approx(np.mean(gaps), abs=1e-5)
    assert result["accuracy"] == np.mean(right)
    assert result["label"] == "exact"


def test_masked_gap_is_repeatable_and_a_bound(task) -> None:
    model = toy.ToyMaskedModel(vocab=9, length=10)
    one, two = (likelihood_gap(model, task, mask_id=9, max_length=10, batch_size=size) for size in (1, 7))
    assert one["gap"] == pytest.approx(two["gap"], abs=1e-5)
    assert one["label"] == "bound"


@pytest.mark.parametrize(
    ("item", "message"),
    [({"query": "a", "choices": ["b"]}, "gold"), ({"query": "a", "choices": ["b"], "gold": 1}, "index"),
     ({"query": "a", "choices": ["b" * 20], "gold": 0}, "holds 10")],
)  # fmt: skip
def test_bad_items_are_refused(tmp_path, item, message) -> None:
    with pytest.raises(ValueError, match=message):
        GapTask.load(write(tmp_path / "bad.jsonl", [item]), encode, row_length=10)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_training_logs_the_gap(tmp_path, objective, monkeypatch) -> None:
    """A tiny run through the program, in a process of its own (DeepSpeed keeps global state)."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    from megatron.data.prepare.writer import IndexedDatasetWriter

    repo = Path(__file__).resolve().parents[2]
    writer = IndexedDatasetWriter(tmp_path / "data", np.uint16)
    for start in range(20):
        writer.add_document((np.arange(50) * 7 + start) % 250)
    writer.close()
    task = write(tmp_path / "small.jsonl", [{"query": "ab", "choices": ["cd", "xyz"], "gold": 0}] * 2)
    program = {"ar": "pretrain_gpt.py", "mdm": "pretrain_mdm.py"}[objective]
    flags = (
        "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 --train-iters 2"
    )
    flags += f" --train-data-path {tmp_path}/data --valid-data-path {tmp_path}/data --tokenizer-type ByteTokenizer --eval-iters 1"
    flags += " --allow-training-data-in-validation"
    flags += f" --save {tmp_path}/run --num-workers 0 --attention-dropout 0.1 --gap-task {task}"
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repo / program), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (valid,) = [record for record in records if record["kind"] == "valid"]
    assert np.isfinite(valid["gap"])
    assert valid["gap_se"] == pytest.approx(0.0, abs=2.0)
    assert valid["gap_label"] == {"ar": "exact", "mdm": "bound"}[objective]
    assert 0 <= valid["gap_accuracy"] <= 1
    assert "likelihood gap" in result.stdout
