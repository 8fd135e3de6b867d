"""From logits to tokens: temperature, top-k, top-p, and random numbers that depend on nothing but the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.errors import require
from megatron.randomness import named_seed


@dataclass(frozen=True)
class TokenSampling:
    """How a token is drawn from its distribution.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability (Holtzman et al. 2020, arXiv 1904.09751).
        seed: a row draws from the stream (seed, its sample number).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < math.inf,
            f"temperature {self.temperature}",
            "it divides the logits: 0 takes the most likely token, any other is a positive number",
            "use 0 or a number such as 0.8",
        )
        require(self.top_k >= 0, f"top_k {self.top_k} is negative", "it counts tokens", "use 0 (all) or more")
        require(
            0 < self.top_p <= 1,
            f"top_p {self.top_p} is not in (0, 1]",
            "it is a probability",
            "use 1 to keep all tokens",
        )
        require(self.seed >= 0, f"seed {self.seed} is negative", "a seed is a number from 0", "use 0 or more")

    def generators(
        self, rows: Sequence[int], device: torch.device, *, purpose: str = "sampling"
    ) -> list[torch.Generator]:
        """One stream for each sample number (any integer), so that a sample does not depend on its batch mates."""
        seeds = [named_seed(self.seed, f"{purpose}:{row}") for row in rows]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def filter_logits(logits: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Set tokens outside the top-k and the top-p nucleus to -inf. ``logits``: [n, vocab]."""
    if 0 < top_k < logits.shape[-1]:
        kept, index = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, kept)
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the more likely tokens: the first token always stays
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    return logits


def draw_tokens(logits: torch.Tensor, sampling: TokenSampling, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Tokens [n] from ``logits`` [n, vocab] by the Gumbel-max trick on ``uniforms`` [n, vocab] (None when greedy)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert uniforms is not None
    gumbel = -torch.log(-torch.log(uniforms.double().clamp(1e-300, 1 - 1e-16)))
    return (drawn_from(logits, sampling) + gumbel).argmax(-1)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, sampling: TokenSampling) -> torch.Tensor:
    """log p with which :func:`draw_tokens` draws ``tokens`` [n] from ``logits`` [n, vocab]: [n] float64."""
    return drawn_from(logits, sampling).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def drawn_from(logits: torch.Tensor, sampling: TokenSampling) -> torch.Tensor:
    """Logits of the distribution that tokens are drawn from, [n, vocab] float64; the likeliest token at temperature 0."""
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf, dtype=torch.float64).scatter(-1, best, 0.0)
    # The largest logit is 0 first, so that a tiny temperature gives -inf for the others and never inf - inf.
    logits = logits.double() - logits.double().amax(-1, keepdim=True)
    return filter_logits(logits / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)


def row_uniforms(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """float64 uniforms: with fp32 ones the largest Gumbel would be 16.6, which biases rare tokens."""
    return torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64)
