"""Text in, text out: prompts with gaps, stop strings, batches of equal length."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron.generation.autoregressive import Decoder, generate_autoregressive
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings, Step
from megatron.generation.sampling import TokenSampling

GAP = re.compile(r"\[MASK(?::(\d+))?\]")


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    eod_id: int | None

    def encode(self, text: str) -> list[int]:
        """Text to ids."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        ...


@dataclass(frozen=True)
class Completion:
    """One result.

    Attributes:
        text: the generated text, cut at the first stop string or end of document; for a row with gaps the whole text.
        tokens: the ids behind it (generated ones, or all of a row with gaps), before the cut.
    """

    text: str
    tokens: list[int] = field(default_factory=list)


def encode_with_gaps(tokenizer: TextTokenizer, text: str, *, mask_id: int) -> list[int]:
    """Ids of ``text``; ``[MASK]`` and ``[MASK:n]`` stand for 1 and n tokens to be filled in."""
    ids: list[int] = []
    end = 0
    for gap in GAP.finditer(text):
        if gap.start() > end:
            ids += tokenizer.encode(text[end : gap.start()])
        ids += [mask_id] * int(gap.group(1) or 1)
        end = gap.end()
    return ids + (tokenizer.encode(text[end:]) if end < len(text) else [])


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings."""
    ends = [text.find(stop) for stop in stop_strings if stop and stop in text]
    return text[: min(ends)] if ends else text


def has_stopped(tokenizer: TextTokenizer, tokens: Sequence[int], stop_strings: Sequence[str]) -> bool:
    """Whether generated ``tokens`` hold the end of the document or a stop string."""
    if tokenizer.eod_id is not None and tokenizer.eod_id in tokens:
        return True
    if not any(stop_strings):
        return False
    text = tokenizer.decode(list(tokens))
    return any(stop and stop in text for stop in stop_strings)


def finish(tokenizer: TextTokenizer, tokens: Sequence[int], stop_strings: Sequence[str]) -> str:
    """Text of generated tokens up to the end of the document or the first stop string."""
    ids = list(tokens)
    if tokenizer.eod_id is not None and tokenizer.eod_id in ids:
        ids = ids[: ids.index(tokenizer.eod_id)]
    return cut_at_stop(tokenizer.decode(ids), stop_strings)


def continue_causal(
    make_decoder: Callable[[], Decoder],
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: TokenSampling,
    stop_strings: Sequence[str] = (),
    batch_size: int = 8,
    **options: object,
) -> list[Completion]:
    """Continue token prompts with an autoregressive model (``options`` go to generate_autoregressive)."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together: less forced decoding
    results: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        outputs = generate_autoregressive(
            make_decoder(),
            [prompts[index] for index in indices],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=lambda row, new: has_stopped(tokenizer, new, stop_strings),
            sample_numbers=indices,
            **options,  # type: ignore[arg-type]
        )
        for index, tokens in zip(indices, outputs):
            results[index] = Completion(finish(tokenizer, tokens, stop_strings), tokens)
    return [results[index] for index in range(len(prompts))]


def continue_masked(
    sampler: DiffusionSampler,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    settings: DiffusionSettings,
    stop_strings: Sequence[str] = (),
    batch_size: int = 8,
    on_step: Callable[[Step], None] | None = None,
) -> list[Completion]:
    """Continue token prompts with a masked diffusion model; rows of equal length share a batch."""
    rows = [[*prompt, *([sampler.mask_id] * max_new_tokens)] for prompt in prompts]
    starts = [len(prompt) for prompt in prompts]
    results: dict[int, Completion] = {}
    for indices in _equal_length_batches(rows, batch_size):

        def stop(row: int, prefix: list[int], indices: list[int] = indices) -> bool:
            return has_stopped(tokenizer, prefix[starts[indices[row]] :], stop_strings)

        filled = sampler.fill(
            [rows[index] for index in indices], settings=settings, stop=stop, on_step=on_step, sample_numbers=indices
        )
        for index, tokens in zip(indices, filled):
            new = tokens[starts[index] :]
            new = new[: new.index(sampler.mask_id)] if sampler.mask_id in new else new
            results[index] = Completion(finish(tokenizer, new, stop_strings), new)
    return [results[index] for index in range(len(prompts))]


def fill_gaps(
    sampler: DiffusionSampler,
    tokenizer: TextTokenizer,
    rows: Sequence[Sequence[int]],
    *,
    settings: DiffusionSettings,
    batch_size: int = 8,
    on_step: Callable[[Step], None] | None = None,
) -> list[Completion]:
    """Fill the mask tokens of whole rows (see :func:`encode_with_gaps`)."""
    results: dict[int, Completion] = {}
    for indices in _equal_length_batches(rows, batch_size):
        filled = sampler.fill(
            [rows[index] for index in indices], settings=settings, on_step=on_step, sample_numbers=indices
        )
        for index, tokens in zip(indices, filled):
            results[index] = Completion(tokenizer.decode(tokens), tokens)
    return [results[index] for index in range(len(rows))]


def _equal_length_batches(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of rows of equal length, at most ``batch_size`` together, longest first."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    return [
        indices[start : start + batch_size]
        for _, indices in sorted(by_length.items(), reverse=True)
        for start in range(0, len(indices), batch_size)
    ]
