"""Tensor-parallel layers compute, and derive, what whole ones do, in eager mode and in one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts.pool import WorkerPool

BATCH, LENGTH, HIDDEN = 3, 16, 32
CLASSIC = ["--normalization", "layernorm", "--no-swiglu", "--no-disable-bias-linear", "--hidden-dropout", "0"]
DROPPING = ["--attention-dropout", "0.2", "--hidden-dropout", "0.2"]


def block_of(words: list[str], *, is_split: bool) -> Any:
    """One transformer block of two tensor-parallel ranks."""
    from megatron.config.shape import Shape
    from megatron.model.attention import RotaryEmbedding
    from megatron.model.block import TransformerBlock
    from megatron.objectives import parse
    from megatron.parallel.context import ParallelContext
    from megatron.parallel.tensor import ParameterFactory

    sizes = [
        "--num-layers",
        "1",
        "--hidden-size",
        str(HIDDEN),
        "--num-attention-heads",
        "4",
        "--seq-length",
        str(LENGTH),
    ]
    shape = Shape.from_flags(parse([*sizes, "--train-samples", "8", *words]).model, padded_vocab_size=128)
    context = replace(ParallelContext.create(tp_size=2), sequence_parallel=is_split)
    return TransformerBlock(shape, ParameterFactory(context, seed=1), rotary=RotaryEmbedding.of(shape))


def passes(block: Any, transform: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """Output, gradient of the input and of every parameter, of this rank's tokens."""
    from megatron.model.mask import Causal

    x, weights = torch.randn(2, BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3)).unbind()
    context = block.self_attention.context
    if context.sequence_parallel:
        x, weights = (whole.chunk(2, dim=1)[context.tp.rank] for whole in (x, weights))
    x = x.clone().requires_grad_()
    block.zero_grad()
    torch.manual_seed(5)
    y = transform(x, Causal(), None)
    (y * weights).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())]  # type: ignore[list-item]


def split_and_whole(words: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return tuple(passes(block, block.transform) for block in (block_of(words, is_split=on) for on in (True, False)))  # type: ignore[return-value]


@pytest.mark.parametrize("words", [[], CLASSIC], ids=["default", "classic"])
def test_a_split_sequence_gives_the_same_outputs_and_gradients(
    pools: Callable[[int], WorkerPool], words: list[str]
) -> None:
    """Of whole parameters (norms, biases of row-parallel layers) every rank has the gradient of all tokens."""
    found = pools(2).run(split_and_whole, [*words, "--attention-dropout", "0", "--hidden-dropout", "0"])
    for rank, (split, whole) in enumerate(found):
        for mine, theirs in zip(split[:2], whole[:2]):
            assert torch.allclose(mine, theirs.chunk(2, dim=1)[rank], atol=1e-6)
        for mine, theirs in zip(split[2:], whole[2:]):
            assert torch.allclose(mine, theirs, atol=1e-5), mine.shape


def eager_and_compiled() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    block = block_of(DROPPING, is_split=True)
    whole_graph = torch.compile(block.transform, dynamic=False, fullgraph=True, backend="aot_eager")
    return passes(block, block.transform), passes(block, whole_graph)


def test_a_block_of_a_split_sequence_is_one_graph_dropout_of_attention_included(
    pools: Callable[[int], WorkerPool],
) -> None:
    for eager, compiled in pools(2).run(eager_and_compiled):
        assert all(torch.equal(one, other) for one, other in zip(eager, compiled))


def evaluated() -> torch.Size:
    from megatron.model.mask import Causal

    block = block_of([], is_split=True).eval()
    return block.transform(torch.randn(1, 5, HIDDEN), Causal(), None).shape


def test_evaluation_takes_sequences_of_any_length(pools: Callable[[int], WorkerPool]) -> None:
    assert pools(2).run(evaluated) == [torch.Size([1, 5, HIDDEN])] * 2
