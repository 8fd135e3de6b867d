"""Dropout under tensor parallelism: whole activations are dropped alike on all ranks, split heads and tokens independently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layouts import jobs
from layouts.jobs import Run
from layouts.pool import WorkerPool

BOTH = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "train_iters": 5}
UNSPLIT = {"tp_size": 2, "no_sequence_parallel": True}


def test_hidden_dropout_does_not_depend_on_tensor_parallelism(runs: Callable[..., Run]) -> None:
    options = {"hidden_dropout": 0.1, "train_iters": 5}
    expected = runs("ar", 1, **options).traces[0].losses
    for trace in runs("ar", 2, **UNSPLIT, **options).traces:
        assert trace.losses == pytest.approx(expected, abs=1e-5, rel=0)
    assert runs("ar", 1, train_iters=5).traces[0].losses[0] != expected[0]  # something was dropped


def test_replicated_activations_agree_across_ranks(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    argv = jobs.flags(token_files, tmp_path / "run", **UNSPLIT, **BOTH)
    one, other = pools(2).run(jobs.train, "ar", argv, ("hidden",))
    assert one.losses == other.losses
    assert len(one.hidden) == 5 * 2 * 2  # steps, micro-batches, blocks
    assert all(torch.equal(a, b) for a, b in zip(one.hidden, other.hidden))


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, UNSPLIT), (2, {"tp_size": 2})])
def test_recomputation_repeats_the_dropout(runs: Callable[..., Run], size: int, layout: dict[str, Any]) -> None:
    plain, again = (runs("ar", size, recompute_activations=on, **layout, **BOTH) for on in (False, True))
    assert [t.losses for t in plain.traces] == [t.losses for t in again.traces]
    assert [t.grad_norms for t in plain.traces] == [t.grad_norms for t in again.traces]


@pytest.mark.parametrize("layout", [{}, {"tp_size": 2}, {"zero_stage": 3, "micro_batch_size": 2}])
@pytest.mark.parametrize("objective", ["ar", "uniform_diffusion"])
def test_dropout_does_not_depend_on_the_engine(
    runs: Callable[..., Run], objective: str, layout: dict[str, Any]
) -> None:
    one, other = (runs(objective, 2, engine=engine, **layout, **BOTH) for engine in ("deepspeed", "fsdp2"))
    for ours, theirs in zip(one.traces, other.traces):
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-5, rel=0)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ranks_with_tokens_of_their_own_drop_differently(pools: Callable[[int], WorkerPool], tp_size: int) -> None:
    """Data-parallel ranks, and those that share a sequence."""
    patterns = pools(2).run(dropped_by_the_step, tp_size)
    assert patterns[0][0] == patterns[0][1]  # the same step again: the same dropout
    assert len({patterns[0][0], patterns[1][0], patterns[0][2], patterns[1][2]}) == 4  # other rank or other step


def dropped_by_the_step(tp_size: int) -> list[tuple[bool, ...]]:
    """Which of 64 numbers are dropped at samples 8, 8 and 16, from the engine's own seeding."""
    from types import SimpleNamespace

    from megatron.parallel.context import ParallelContext
    from megatron.training.engine import Engine

    context = replace(ParallelContext.create(tp_size=tp_size), sequence_parallel=tp_size > 1)
    engine: Any = SimpleNamespace(context=context, config=SimpleNamespace(run=SimpleNamespace(seed=1234)))
    patterns = []
    for samples in (8, 8, 16):
        Engine._seed_dropout(engine, samples)
        patterns.append(tuple((torch.nn.functional.dropout(torch.ones(64), 0.5) == 0).tolist()))
    return patterns


def test_heads_of_different_ranks_drop_different_probabilities(pools: Callable[[int], WorkerPool]) -> None:
    (out, state), (other_out, other_state) = pools(2).run(attend_with_dropout)
    assert torch.equal(state, other_state)  # the stream for replicated activations advanced alike
    assert not torch.equal(out, other_out)


def attend_with_dropout() -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of equal queries, keys and values on every rank, after equal seeds."""
    from megatron.config.shape import Shape
    from megatron.model.attention import SelfAttention
    from megatron.model.mask import Causal
    from megatron.objectives import parse
    from megatron.parallel.context import ParallelContext
    from megatron.parallel.tensor import ParameterFactory

    shape = ["--num-layers", "1", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "16"]
    flags = parse([*shape, "--attention-dropout", "0.5", "--train-samples", "8"]).model
    factory = ParameterFactory(ParallelContext.create(tp_size=2), seed=1)
    layer = SelfAttention(Shape.from_flags(flags, padded_vocab_size=128), factory, rotary=None)
    torch.manual_seed(7)
    query, key, value = torch.randn(3, 2, 2, 16, 16).unbind()  # [batch, heads of this rank, seq, channels]
    return layer._attend(query, key, value, Causal()), torch.get_rng_state()
