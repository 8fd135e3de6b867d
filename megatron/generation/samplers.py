"""Which sampler a diffusion model takes."""

from __future__ import annotations

from megatron.generation import blocks
from megatron.generation.text import Sampler
from megatron.generation.uniform import UniformSampler
from megatron.inference.model import InferenceModel
from megatron.objectives.base import UniformDecoding


def sampler_of(loaded: InferenceModel) -> Sampler:
    """The sampler of a loaded model.

    Raises:
        UserError: the model is causal.
    """
    decoding = loaded.objective.decoding
    if isinstance(decoding, UniformDecoding):
        return UniformSampler(loaded.logits, vocab_size=decoding.vocab_size, device=loaded.device)
    return blocks.sampler_of(loaded)
