"""Every layout starts from the same weights, bit for bit, once the shards are put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layouts.jobs import Run, flags
from layouts.pool import WorkerPool
from layouts.test_parity import LAYOUTS, VARIANTS


def assembled(run: Run) -> dict[str, torch.Tensor]:
    """Whole initial tensors by canonical name; every element must come from exactly one rank."""
    specs = {name: spec for trace in run.traces for name, spec in trace.specs.items()}
    shards: dict[str, dict[int, list[tuple[int, torch.Tensor]]]] = {name: {} for name in specs}
    for trace in run.traces:
        for name, tp_rank, start, values in trace.weights:
            shards[name].setdefault(tp_rank, []).append((start, values))
    whole = {}
    for name, spec in specs.items():
        ordered = []
        for tp_rank in sorted(shards[name]):
            end, parts = 0, []
            for start, values in sorted(shards[name][tp_rank], key=lambda part: part[0]):
                assert start == end, f"{name}: a gap or an overlap at {start}"
                end += values.numel()
                parts.append(values)
            ordered.append(torch.cat(parts).view(spec.local_shape(len(shards[name]))))
        whole[name] = spec.combine(ordered)
        assert tuple(whole[name].shape) == spec.full_shape
    return whole


@pytest.mark.parametrize(
    ("variant", "layout"),
    [*(("untied_gqa", layout) for layout in LAYOUTS), ("classic", "tp2"), ("classic", "tp2_pp2"), ("classic", "zero3")],
)
def test_initial_weights_do_not_depend_on_the_layout(runs: Callable[..., Run], variant: str, layout: str) -> None:
    size, changes = LAYOUTS[layout]
    expected = assembled(runs("ar", 1, train_iters=1, **VARIANTS[variant]))
    found = assembled(runs("ar", size, train_iters=1, **changes, **VARIANTS[variant]))
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def drawn_elements(argv: list[str]) -> int:
    """Elements that this rank draws until its engine stands."""
    from unittest import mock

    from layouts import jobs
    from megatron.parallel import tensor

    original, found = tensor.initial_shard, []

    def initial_shard(spec: object, **options: object) -> torch.Tensor:
        made = original(spec, **options)  # type: ignore[arg-type]
        found.append(0 if made.is_meta else made.numel())  # sizes are asked of models that hold nothing
        return made

    with mock.patch.object(tensor, "initial_shard", initial_shard):
        assert jobs.train("mdm", argv).status == 0
    return sum(found)


@pytest.mark.parametrize(
    ("size", "changes"), [(2, {"bf16": True}), (2, {"zero_stage": 3}), (4, {"pp_size": 2}), (2, {"engine": "fsdp2"})]
)
def test_only_the_first_data_parallel_rank_draws(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, size: int, changes: dict
) -> None:
    argv = flags(token_files, tmp_path / "run", train_iters=1, micro_batch_size=2, **changes)
    found = pools(size).run(drawn_elements, argv)
    assert [count > 0 for count in found] == [rank % 2 == 0 for rank in range(size)]


def test_another_seed_gives_other_weights(runs: Callable[..., Run]) -> None:
    one, other = (assembled(runs("ar", 1, train_iters=1, seed=seed)) for seed in (1234, 1235))
    different = [name for name, tensor in one.items() if not torch.equal(other[name], tensor)]
    assert different == [name for name in one if "layernorm" not in name]  # norms start at one


def test_shards_are_whole_heads(runs: Callable[..., Run]) -> None:
    """The two ranks hold the two halves of the query heads, of the key heads and of the value heads."""
    options = {"train_iters": 1, **VARIANTS["untied_gqa"]}
    full = assembled(runs("ar", 1, **options))["layers.0.self_attention.query_key_value.weight"]
    queries, keys, values = full.view(-1, 16, 64).split((4, 2, 2))  # heads of 16 channels, hidden 64
    for trace in runs("ar", 2, tp_size=2, **options).traces:
        (own,) = (w[3] for w in trace.weights if w[0] == "layers.0.self_attention.query_key_value.weight")
        rank = trace.place["tp"]
        heads = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1), slice(rank, rank + 1)
        expected = torch.cat([part[at] for part, at in zip((queries, keys, values), heads)])
        assert torch.equal(own.view(-1, 16, 64), expected)
