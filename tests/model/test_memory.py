"""What a block is said to keep for its backward pass is what real blocks keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts.pool import WorkerPool

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.model.attention import RotaryEmbedding
from megatron.model.batch import Stream
from megatron.model.block import TransformerBlock
from megatron.model.mask import Causal, Full, RandomKeyDrop
from megatron.model.memory import head_bytes, kept_by_block, mask_bytes
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory

BATCH, LENGTH = 2, 32
ALONE = ParallelContext()
CLASSIC = {"swiglu": False, "normalization": "layernorm", "use_rotary_position_embeddings": False}


def shape_of(**changes: Any) -> Shape:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": LENGTH}
    return Shape.from_flags(
        ModelConfig(**{**sizes, "attention_dropout": 0.0, "hidden_dropout": 0.0, **changes}), padded_vocab_size=512
    )


def kept(shape: Shape, *, compiled: bool, context: ParallelContext = ALONE) -> int:
    """Bytes that the backward pass of one block will read, parameters and rotary tables aside."""
    block = TransformerBlock(shape, ParameterFactory(context, 1), rotary=RotaryEmbedding.of(shape)).bfloat16()
    if compiled:  # the partition of forward and backward that inductor works with, without its code
        torch._dynamo.reset()
        block.transform = torch.compile(block.transform, dynamic=False, backend="aot_eager_decomp_partition")
    rotary = block.self_attention.rotary
    aside = {p.untyped_storage()._cdata for p in block.parameters()}
    aside |= {t.untyped_storage()._cdata for t in ((rotary.cos, rotary.sin) if rotary else ())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is used twice
        if tensor.untyped_storage()._cdata not in aside:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = LENGTH // (context.tp.size if context.sequence_parallel else 1)
    x = torch.randn(BATCH, tokens, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(Stream(x), Full())
    return sum(found.values())


@pytest.mark.parametrize(
    ("changes", "compiled"),
    [
        ({}, True),
        ({"num_query_groups": 2}, True),
        ({"hidden_size": 96, "ffn_hidden_size": 200}, True),
        (CLASSIC, False),
    ],
    ids=["compiled", "grouped", "odd", "classic"],
)
def test_what_a_block_keeps_is_counted_to_the_byte(changes: dict[str, Any], compiled: bool) -> None:
    """RMSNorm of a block that is not compiled is decomposed on the CPU, in fp32, and fused on a GPU: the classic one shows it."""
    shape = shape_of(**changes)
    said = kept_by_block(shape, tp_size=1, width=2, is_compiled=compiled)
    assert kept(shape, compiled=compiled) == BATCH * LENGTH * sum(said.values())


def test_tensor_parallel_ranks_share_the_inside_of_a_block() -> None:
    shape = shape_of()
    one, two = (kept_by_block(shape, tp_size=size, width=2, is_compiled=True) for size in (1, 2))
    for part in ("queries, keys, values", "attention", "feed-forward"):
        assert two[part] == one[part] / 2
    assert two["normalised inputs"] == one["normalised inputs"]


def kept_by_rank(is_split: bool, changes: dict[str, Any], compiled: bool) -> int:
    context = replace(ParallelContext.create(tp_size=2), sequence_parallel=is_split)
    return kept(shape_of(**changes), compiled=compiled, context=context)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize(("changes", "compiled"), [({}, True), (CLASSIC, False)], ids=["compiled", "classic"])
def test_what_a_rank_of_a_block_keeps_is_counted_to_the_byte(
    pools: Callable[[int], WorkerPool], is_split: bool, changes: dict[str, Any], compiled: bool
) -> None:
    """With sequence parallelism its share of everything: the tokens are gathered again, in a compiled graph, too."""
    if compiled and not is_split and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 keeps inputs alone of a compiled block with an all-reduce in it and computes it again")
    shape = shape_of(**changes)
    said = kept_by_block(shape, tp_size=2, width=2, is_compiled=compiled, sequence_parallel=is_split)
    assert pools(2).run(kept_by_rank, is_split, changes, compiled) == [BATCH * LENGTH * sum(said.values())] * 2
    whole = kept_by_block(shape, tp_size=1, width=2, is_compiled=compiled)
    assert (sum(said.values()) == sum(whole.values()) / 2) == is_split


def test_only_masks_that_are_tensors_take_memory() -> None:
    shape, dropping = shape_of(), RandomKeyDrop(0.5, 1)
    options = {"samples": 8, "positions": 2048, "width": 2}
    assert mask_bytes(Causal(), shape, **options) == mask_bytes(Full(), shape, **options) == 0
    assert mask_bytes(dropping, shape, **options) < 2**20
    dense = mask_bytes(dropping, shape_of(attention_dropout=0.1), **options)
    assert dense == 3 * 8 * 2048**2


def test_the_head_needs_one_chunk_of_logits_whatever_the_batch() -> None:
    shape = shape_of()
    few, many = (head_bytes(shape, rows=rows, tp_size=1, width=2) for rows in (8192, 16384))
    assert many - few == 2 * (16384 - 8192) * 64 * 2  # rows and their gradient
