"""What a GPU would be given, made without one: forward and backward passes of every mask with fake tensors, and the kernels
of blocks and head from inductor.

    bash tests/gpu_without_gpu/nightly.sh FOLDER            for sm_90, by the Triton in FOLDER and its ptxas
    python tests/gpu_without_gpu/check.py --device cpu      the rehearsal: inductor's C++ kernels, run, against plain torch

On cuda every tensor is fake and no kernel runs: FlexAttention and the head are compiled on the way, as in training. On cpu the
model's passes are fake with dense masks, and what is compiled is run and compared.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.model import visibility
from megatron.model.attention import RotaryEmbedding
from megatron.model.batch import Inputs, ModelBatch, Stream, Targets
from megatron.model.block import TransformerBlock
from megatron.model.gpt import GPTModel
from megatron.model.loss import WeightedCrossEntropy
from megatron.model.mask import (
    AttentionMask,
    BlockCausal,
    BlockDiffusion,
    Causal,
    Full,
    PerSample,
    RandomKeyDrop,
    WithinSegments,
)
from megatron.parallel.context import ParallelContext
from megatron.parallel.cross_entropy import _softmax_parts, _write_errors
from megatron.parallel.tensor import ParameterFactory

MASKS: dict[str, AttentionMask] = {
    "causal": Causal(),
    "full": Full(),
    "key_drop": RandomKeyDrop(0.5, seed=1),
    "per_sample": PerSample(0.5),
    "block_causal": BlockCausal(16),
    "block_diffusion": BlockDiffusion(16),
    "segments": WithinSegments(Causal()),
    "segments_key_drop": WithinSegments(RandomKeyDrop(0.5, seed=1)),
    "segments_per_sample": WithinSegments(PerSample(0.5)),
    "segments_block_diffusion": WithinSegments(BlockDiffusion(16)),
}


@dataclass(frozen=True)
class Sizes:
    """Of the model and of one micro-batch; heads of hidden / heads channels, half as many groups."""

    batch: int
    length: int
    hidden: int
    heads: int
    vocabulary: int

    def shape(self, dropout: float) -> Shape:
        return Shape.of(
            ModelConfig(
                num_layers=2,
                hidden_size=self.hidden,
                num_attention_heads=self.heads,
                num_query_groups=self.heads // 2,
                seq_length=self.length,
                padded_vocab_size=self.vocabulary,
                attention_dropout=0.0,
                hidden_dropout=dropout,
            )
        )


SIZES = {"cuda": Sizes(8, 2048, 768, 12, 50304), "cpu": Sizes(2, 32, 32, 2, 128)}


class Place:
    """Where tensors lie, and how they are faked there."""

    def __init__(self, device: str, *, backend: str = "inductor") -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.sizes, self.dtype = SIZES[device], torch.bfloat16 if device == "cuda" else torch.float32
        self.compile = partial(torch.compile, backend=backend)
        self.machine = None
        if device == "cuda":
            from hopper import Hopper  # beside this file

            self.machine = Hopper()

    def faked(self) -> AbstractContextManager[object]:
        return FakeTensorMode(allow_non_fake_inputs=True)

    def compiled(self) -> AbstractContextManager[object]:
        """What is compiled is run where that can be done."""
        return nullcontext() if self.machine is None else self.faked()

    def factory(self) -> ParameterFactory:
        drawn = self.machine is None
        return ParameterFactory(ParallelContext(), 1, dtype=self.dtype, device=self.device, is_drawn=drawn)

    def move_tables(self, module: torch.nn.Module) -> None:
        """Parameters are made on the device; ``module.to`` would change fake ones."""
        for each in module.modules():
            if isinstance(each, RotaryEmbedding):
                each._fill(each.cos.shape[0], self.device)

    def inputs(self) -> Inputs[torch.Tensor]:
        """Two segments a sample, and samples of both kinds."""
        batch, length = self.sizes.batch, self.sizes.length
        positions = torch.arange(length, device=self.device).expand(batch, length).contiguous()
        samples = torch.arange(batch, device=self.device)
        return Inputs(positions % 100, positions, samples, (positions >= length // 3).long(), samples % 2)


def check_model(place: Place, mask: AttentionMask) -> None:
    """Forward and backward pass of a model of two layers, loss included: every parameter gets a gradient of its own kind."""
    with place.faked():
        model = GPTModel(place.sizes.shape(0.0), place.factory())
        place.move_tables(model)
        inputs = place.inputs()
        batch, length = inputs.input_ids.shape
        weights = torch.ones(batch, length, device=place.device)
        counted = torch.arange(batch * length // 2, device=place.device)
        targets = Targets(inputs.input_ids, weights, counted, weights.sum(dim=1))
        loss = model(ModelBatch(inputs, targets), mask, WeightedCrossEntropy())
        loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        for name, parameter in model.named_parameters():
            found = parameter.grad
            assert found is not None and found.shape == parameter.shape and found.dtype == parameter.dtype, name


def check_block(place: Place, mask: AttentionMask) -> None:
    """A block, compiled as training does it, forward and backward, with dropout on a GPU."""
    with place.compiled():
        sizes = place.sizes.shape(0.1 if place.machine else 0.0)
        block = TransformerBlock(sizes, place.factory(), rotary=RotaryEmbedding.of(sizes))
        place.move_tables(block)
        inputs = place.inputs()
        shape = (*inputs.input_ids.shape, place.sizes.hidden)
        hidden = torch.randn(shape, dtype=place.dtype, device=place.device, requires_grad=True)
        stream = Stream(hidden, inputs.position_ids, inputs.sample_ids, inputs.segment_ids, inputs.is_causal)
        visible = block.self_attention.visible(stream, mask)

        def gradients(transform: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
            out = transform(hidden, visible, inputs.position_ids)
            return out, *torch.autograd.grad(out.float().square().sum(), [hidden, *block.parameters()])

        found = gradients(place.compile(block.transform, dynamic=False))
        assert found[0].shape == found[1].shape == shape
        if place.machine is None:
            torch.testing.assert_close(found, gradients(block.transform), rtol=1e-4, atol=1e-4)


def check_head(place: Place) -> None:
    """The two compiled passes over a chunk of logits."""
    rows = place.sizes.batch * place.sizes.length
    with place.compiled(), torch.no_grad():
        logits = torch.randn(rows, place.sizes.vocabulary, dtype=place.dtype, device=place.device)
        column = torch.arange(rows, device=place.device).remainder(place.sizes.vocabulary).unsqueeze(-1)
        plain = logits.clone()
        maximum, total, target = place.compile(_softmax_parts)(logits, column)
        place.compile(_write_errors)(logits, column, maximum, total)
        assert maximum.shape == total.shape == target.shape == (rows,) and maximum.dtype == torch.float32
        if place.machine is None:
            expected = plain.softmax(dim=-1).scatter_add(1, column, -torch.ones(rows, 1))
            torch.testing.assert_close(logits, expected)
            torch.testing.assert_close(total.log() + maximum, plain.logsumexp(dim=-1))


def checks() -> Iterator[tuple[str, Callable[[Place], None]]]:
    """Name and check; the head first, which is soon done."""
    yield "head", check_head
    for kind, check in (("model", check_model), ("block", check_block)):
        yield from ((f"{kind}/{name}", partial(check, mask=mask)) for name, mask in MASKS.items())


def run(place: Place, name: str, check: Callable[[Place], None]) -> bool:
    """Whether it passed; a line says so, with the number of kernels that were generated."""
    torch._dynamo.reset()
    visibility._static.cache_clear()
    from torch._inductor import metrics  # seconds to load

    metrics.reset()
    known, began = len(place.machine.faults) if place.machine else 0, time.perf_counter()
    fault = ""
    try:
        check(place)
    except Exception as error:  # whatever the compiler says, the others are to be tried
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = (
            f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {' '.join(str(error).split())[:500]}"
        )
    if place.machine is not None and len(place.machine.faults) > known:
        fault = "; ".join([*place.machine.faults[known:], *[fault] * bool(fault)])
    kernels, seconds = metrics.generated_kernel_count, time.perf_counter() - began
    print(f"{name:<32} {'FAILED' if fault else 'ok':<6} {kernels:3} kernels {seconds:6.1f} s  {fault}", flush=True)
    return not fault


def main(argv: list[str] | None = None) -> int:
    """0: all passed, 1: one did not, 2: wrong use."""
    parser = argparse.ArgumentParser(description="Compile masks, blocks and head for a GPU without one.")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="such as head model/* block/full")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager traces and compiles nothing")
    options = parser.parse_args(argv)
    chosen = [(name, check) for name, check in checks() if any(fnmatch.fnmatch(name, each) for each in options.only)]
    wrong = "" if chosen else f"no check is named {' or '.join(options.only)}"
    if options.device == "cuda" and "device.so" not in os.environ.get("LD_PRELOAD", ""):
        wrong = "--device cuda without device.cpp preloaded; start nightly.sh"
    elif options.device == "cuda" and torch.version.cuda is not None:
        wrong = f"torch {torch.__version__} is built for GPUs, whose driver it would ask; use one of the CPU"
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    place = Place(options.device, backend=options.backend)
    print(f"torch {torch.__version__}, {options.device}", flush=True)
    passed = [run(place, name, check) for name, check in chosen]
    print(f"{sum(passed)} of {len(passed)} passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
