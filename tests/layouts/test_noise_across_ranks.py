"""Who sees which noise: the ends of a pipeline the same, tensor-parallel ranks the same, data-parallel ranks different.

The tensors compared are those that the embedding and the loss were really given, not those that a loader made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from layouts.jobs import VOCAB, Run

MASK_ID = VOCAB  # the first padding row
MDM: dict[str, Any] = {"ar_ratio": 0.3, "train_iters": 5}
PIPELINES = {"pp2": (2, {"pp_size": 2}), "tp2_pp2": (4, {"tp_size": 2, "pp_size": 2}),
             "pp2_dp2": (4, {"pp_size": 2})}  # fmt: skip


def by_sample(run: Run, *, pp: int, dp: int | None = None) -> dict[int, dict[str, torch.Tensor]]:
    """Sample id → rows of what one stage was given; tensor-parallel ranks must agree about them."""
    rows: dict[int, dict[str, torch.Tensor]] = {}
    for trace in run.traces:
        if trace.place["pp"] != pp or dp not in (None, trace.place["dp"]):
            continue
        for index, batch in enumerate(trace.batches):
            for row, sample in enumerate(batch.inputs.sample_ids.tolist()):
                seen = {}
                if trace.inputs:
                    seen["inputs"] = trace.inputs[index][row]
                if trace.targets:
                    seen["labels"], seen["weights"] = (tensor[row] for tensor in trace.targets[index][:2])
                for name, value in seen.items():
                    before = rows.setdefault(sample, {}).setdefault(name, value)
                    assert torch.equal(before, value), f"ranks disagree about {name} of sample {sample}"
    return rows


@pytest.mark.parametrize("layout", list(PIPELINES))
def test_first_and_last_stage_see_the_same_masks(runs: Callable[..., Run], layout: str) -> None:
    size, changes = PIPELINES[layout]
    run, reference = runs("mdm", size, **changes, **MDM), by_sample(runs("mdm", 1, **MDM), pp=0)
    first, last = by_sample(run, pp=0), by_sample(run, pp=1)
    assert sorted(first) == sorted(last) == list(range(40))
    for sample, ends in reference.items():
        inputs, labels, weights = first[sample]["inputs"], last[sample]["labels"], last[sample]["weights"]
        is_masked = inputs == MASK_ID
        assert torch.equal(is_masked, weights > 0)
        assert torch.equal(inputs[~is_masked], labels[~is_masked])
        assert len(weights[is_masked].unique()) <= 1  # one mask probability per sequence
        assert torch.equal(inputs, ends["inputs"]) and torch.equal(weights, ends["weights"])
    assert "labels" not in first[0] and "inputs" not in last[0]  # the two ends were looked at separately


def test_permuted_order_is_the_same_at_both_ends(runs: Callable[..., Run]) -> None:
    options = {"num_order_list": 4, "use_order_list": True, "train_iters": 3}
    run = runs("ar", 2, pp_size=2, **options)
    first, last = by_sample(run, pp=0), by_sample(run, pp=1)
    reference, plain = by_sample(runs("ar", 1, **options), pp=0), by_sample(runs("ar", 1, train_iters=3), pp=0)
    for sample in range(24):
        assert torch.equal(first[sample]["inputs"][1:], last[sample]["labels"][:-1])
        assert torch.equal(first[sample]["inputs"], reference[sample]["inputs"])
    moved = [not torch.equal(first[sample]["inputs"], plain[sample]["inputs"]) for sample in range(24)]
    assert any(moved) and not all(moved)  # one of the four orders is left to right


def test_tensor_parallel_ranks_see_the_same(runs: Callable[..., Run]) -> None:
    one, other = runs("mdm", 2, tp_size=2, **MDM).traces
    assert len(one.inputs) == len(other.inputs) == 10
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one.targets, other.targets))


def test_data_parallel_ranks_draw_different_noise(runs: Callable[..., Run]) -> None:
    run, reference = runs("mdm", 2, **MDM), by_sample(runs("mdm", 1, **MDM), pp=0)
    ranks = [by_sample(run, pp=0, dp=dp) for dp in range(2)]
    assert not set(ranks[0]) & set(ranks[1])
    for sample, seen in {**ranks[0], **ranks[1]}.items():  # the same noise per sample as one process draws
        assert torch.equal(seen["inputs"], reference[sample]["inputs"])
        assert torch.equal(seen["weights"], reference[sample]["weights"])
    nested = []
    for step in range(5):
        own, others = ([ranks[dp][s] for s in sorted(ranks[dp]) if s // 8 == step] for dp in range(2))
        assert len(own) == len(others) == 4
        for mine, theirs in zip(own, others):
            masks = mine["inputs"] == MASK_ID, theirs["inputs"] == MASK_ID
            assert not torch.equal(*masks)
            nested.append(any(torch.equal(masks[0] & masks[1], mask) for mask in masks))
        # Times are spread over the global batch, not over each rank's part of it (a sequence without masks has none).
        weights = [float(seen["weights"].max()) for seen in own + others if (seen["weights"] > 0).any()]
        assert len(set(weights)) == len(weights) >= 6
    # The same random numbers at another time would mask a part of the same tokens, in every pair.
    assert sum(nested) <= len(nested) // 2
