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
