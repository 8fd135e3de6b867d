"""Autoregressive sampling, batched over prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from megatron.errors import UserError
from megatron.generation.sampling import TokenSampling, draw_tokens, row_uniforms

# Called after every token: (row, all tokens of the row so far); returning True ends the row.
StopFn = Callable[[int, list[int]], bool]


class Decoder(Protocol):
    """A causal model that remembers what it was fed."""

    def feed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Append ``input_ids`` [batch, new] and return logits of the last position, [batch, vocab]."""


@torch.inference_mode()
def generate_autoregressive(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: TokenSampling,
    forbidden: Sequence[int] = (),
    stop: StopFn | None = None,
    on_token: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
    sample_numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to ``max_new_tokens`` tokens; returns the new tokens only.

    All rows start at position 0 and advance together; while a row is inside its prompt, the prompt gives its next
    token. So nothing is padded and no mask is needed, whatever the lengths.

    Args:
        decoder: a fresh decoder (the cache is empty).
        prompts: at least one token each.
        max_new_tokens: tokens to add to each prompt.
        sampling: temperature, top-k, top-p and seed.
        forbidden: token ids that are never drawn (padding rows of the vocabulary).
        stop: ends a row early.
        on_token: called with (row, token) for every new token.
        device: of the token ids.
        sample_numbers: random stream of each row; default 0, 1, 2, ...
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt is empty", "a causal model needs a first token", "start it with the EOD token")
    device = torch.device(device)
    streams = sampling.generators(range(len(prompts)) if sample_numbers is None else sample_numbers, device)
    rows = [list(prompt) for prompt in prompts]
    limits = [len(prompt) + max_new_tokens for prompt in prompts]
    done = [max_new_tokens == 0] * len(rows)
    position = min(len(prompt) for prompt in prompts)
    feed = torch.tensor([row[:position] for row in rows], device=device)
    while not all(done):
        logits = decoder.feed(feed).float()
        logits[:, list(forbidden)] = -torch.inf
        active = [i for i, row in enumerate(rows) if not done[i] and len(row) == position]
        if active:
            uniforms = None
            if sampling.temperature > 0:
                uniforms = torch.stack([row_uniforms(streams[i], logits.shape[-1]) for i in active])
            drawn = draw_tokens(logits[active], sampling, uniforms).tolist()
            for i, token in zip(active, drawn):
                rows[i].append(token)
                if on_token is not None:
                    on_token(i, token)
                done[i] = len(rows[i]) == limits[i] or (stop is not None and stop(i, rows[i][len(prompts[i]) :]))
        # A finished row feeds any token: its outputs are not used and no other row sees them.
        feed = torch.tensor([[row[position] if position < len(row) else 0] for row in rows], device=device)
        position += 1
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
