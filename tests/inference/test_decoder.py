"""The key/value cache against running everything again: logits and generated tokens."""

from __future__ import annotations

import pytest
import torch

from megatron.config import ModelConfig
from megatron.config.shape import Shape
from megatron.generation.autoregressive import generate_autoregressive
from megatron.generation.sampling import TokenSampling
from megatron.inference.decoder import CachedDecoder
from megatron.inference.logits import LogitsFn
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal
from megatron.objectives import parse
from megatron.parallel.tensor import ParameterFactory
from tests.generation.uncached import UncachedDecoder


def build(*flags: str) -> GPTModel:
    sizes = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "700"]
    config: ModelConfig = parse([*sizes, *flags, "--train-samples", "4"]).model
    model = GPTModel(Shape.from_flags(config, padded_vocab_size=64), ParameterFactory(seed=5)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8
    return model


def logits_of(model: GPTModel) -> LogitsFn:
    """The model without a cache."""
    return lambda ids, positions=None: model.logits(Inputs(ids), Causal(), positions=positions)


VARIANTS = {
    "default": [],
    "grouped": ["--num-query-groups", "2"],
    "learned positions": ["--no-use-rotary-position-embeddings"],
    "untied": ["--untie-embeddings-and-output-weights"],
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_cached_logits_equal_uncached(flags) -> None:
    model = build(*flags)
    tokens = torch.randint(0, 64, (3, 300), generator=torch.Generator().manual_seed(1))
    cached, plain = (
        CachedDecoder(model),
        UncachedDecoder(logits_of(model)),
    )
    with torch.inference_mode():
        for start, end in [(0, 250), *((i, i + 1) for i in range(250, 262))]:  # crosses the block size of the cache
            torch.testing.assert_close(
                cached.feed(tokens[:, start:end]), plain.feed(tokens[:, start:end]), atol=2e-5, rtol=1e-5
            )
        assert cached.caches[0].length == 262


def test_cached_generation_equals_uncached() -> None:
    model = build("--untie-embeddings-and-output-weights")
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10], [1, 2, 3, 4, 5, 6]]
    for sampling in (TokenSampling(), TokenSampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)):
        results = [
            generate_autoregressive(decoder, prompts, max_new_tokens=20, sampling=sampling)
            for decoder in (
                CachedDecoder(model),
                UncachedDecoder(logits_of(model)),
            )
        ]
        assert results[0] == results[1]
        assert len({tuple(new) for new in results[0]}) >= 3, "too uniform to tell"


def test_selected_positions_equal_all_logits() -> None:
    model = build()
    tokens = torch.randint(0, 64, (2, 9))
    positions = torch.rand(2, 9) < 0.4
    with torch.inference_mode():
        whole = model.logits(Inputs(tokens), Causal())
        torch.testing.assert_close(model.logits(Inputs(tokens), Causal(), positions=positions), whole[positions])
