"""A mask is made once for a micro-batch, whatever the number of blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel, build_layers
from megatron.model.mask import AttentionMask, Full, RandomKeyDrop, within_segments
from megatron.objectives import build_objective, parse
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory
from megatron.training.deepspeed.pipeline import Blocks, packed
from megatron.training.engine import Mode

MASKS = [RandomKeyDrop(0.5, 7), within_segments(Full())]


class Counting(TorchDispatchMode):
    """Operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.calls[function.__name__.split(".")[0]] += 1
        return function(*arguments, **(options or {}))

    @property
    def of_masks(self) -> int:
        """Calls that only masks make: hashes of key drops, comparisons of segments."""
        return self.calls["bitwise_xor"] + self.calls["eq"] + self.calls["__rshift__"]


def shape_of(num_layers: int) -> Shape:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "seq_length": 16, "padded_vocab_size": 64}
    return Shape.of(ModelConfig(num_layers=num_layers, attention_dropout=0.0, hidden_dropout=0.0, **sizes))


def inputs(first: int = 0) -> Inputs[torch.Tensor]:
    """Two samples of two segments."""
    ids, positions = torch.zeros(2, 16, dtype=torch.int64), torch.arange(16).expand(2, 16).contiguous()
    return Inputs(ids, positions, torch.tensor([first, first + 1]), (positions >= 9).long())


def calls_of_model(num_layers: int, mask: AttentionMask, *, recompute: bool) -> int:
    model = GPTModel(shape_of(num_layers), recompute=recompute)
    with Counting() as counting:
        model.hidden_states(inputs(), mask).sum().backward()
    return counting.of_masks


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_of_the_plain_model(mask: AttentionMask, recompute: bool) -> None:
    one, four = (calls_of_model(layers, mask, recompute=recompute) for layers in (1, 4))
    assert one == four > 0


def test_of_a_stage_of_a_pipeline() -> None:
    size = "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --micro-batch-size 2 --train-iters 1"
    config = parse(f"{size} --objective masked_attention_ar --randmask-ratio 0.5".split())
    mode = Mode(build_objective(config), within_documents=False)
    shape = shape_of(4)
    layers = build_layers(shape, ParameterFactory(ParallelContext(), 1))[1:-2]
    plain = GPTModel(shape, ParameterFactory(seed=1))

    def calls(num_blocks: int, batch: Inputs[torch.Tensor]) -> int:
        tensors: Any = packed(plain.embedding(batch), mode.mask)
        with Counting() as counting:
            tensors = Blocks(layers[:num_blocks], mode)(tensors)
        if num_blocks == 4:  # and it is the mask of this micro-batch
            torch.testing.assert_close(plain.final_layernorm(tensors[0]), plain.hidden_states(batch, mode.mask))
        return counting.of_masks

    assert calls(1, inputs()) == calls(4, inputs()) == calls(4, inputs(8)) > 0
