"""Text in, text out: prompts with gaps, stop strings, batches of equal length."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from megatron.errors import require
from megatron.generation.autoregressive import Decoder, generate_autoregressive
from megatron.generation.diffusion import DiffusionSettings, Step, StopFn
from megatron.generation.sampling import TokenSampling

GAP = re.compile(r"\[MASK(?::(\d+))?\]")


class Sampler(Protocol):
    """What fills rows: ``mask_id`` stands where a token is wanted."""

    mask_id: int

    def check(self, settings: DiffusionSettings, *, num_masked: int) -> None:
        """Refuse settings by which it cannot fill so many tokens."""

    def fill(
        self,
        rows: Sequence[Sequence[int]],
        *,
        settings: DiffusionSettings,
        stop: StopFn | None = None,
        on_step: Callable[[Step], None] | None = None,
        sample_numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The rows with tokens there; see :class:`megatron.generation.diffusion.DiffusionSampler`."""


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    eod_id: int | None

    def encode(self, text: str) -> list[int]:
        """Text to ids."""

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""


@dataclass(frozen=True)
class Completion:
    """One result.

    Attributes:
        text: the generated text, cut at the first stop string or end of document; for a row with gaps the whole text, in
            which each gap is cut so and everything given is kept.
        tokens: the ids behind it (generated ones, or all of a row with gaps), before the cut.
    """

    text: str
    tokens: list[int] = field(default_factory=list)


def encode_with_gaps(tokenizer: TextTokenizer, text: str, *, mask_id: int, most: int = 1 << 20) -> list[int]:
    """Ids of ``text``; ``[MASK]`` and ``[MASK:n]`` stand for 1 and n tokens to be filled in.

    Raises:
        UserError: gaps of no token, or of more than ``most`` together.
    """
    gaps = list(GAP.finditer(text))
    sizes = [int(digits) if len(digits := gap.group(1) or "1") <= 18 else most + 1 for gap in gaps]
    require(0 not in sizes, "a gap [MASK:0]", "a gap holds at least one token", "drop it")
    require(sum(sizes) <= most, f"gaps of {sum(sizes)} tokens", f"the model holds {most}", "make them smaller")
    ids: list[int] = []
    end = 0
    for gap, size in zip(gaps, sizes):
        if gap.start() > end:
            ids += tokenizer.encode(text[end : gap.start()])
        ids += [mask_id] * size
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


@dataclass(frozen=True)
class Wanted:
    """What is to be written behind token prompts.

    Attributes:
        max_new_tokens: behind each, at most.
        stop_strings: texts that end it.
        batch_size: rows per forward pass.
        streams: sample number of each prompt (its random stream); default 0, 1, 2, ...
    """

    max_new_tokens: int
    stop_strings: Sequence[str] = ()
    batch_size: int = 8
    streams: Sequence[int] | None = None

    def of_rows(self, indices: Sequence[int]) -> list[int]:
        """The random streams of some prompts."""
        return list(indices) if self.streams is None else [self.streams[index] for index in indices]


def continue_causal(
    make_decoder: Callable[[], Decoder],
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    wanted: Wanted,
    *,
    sampling: TokenSampling,
    **options: object,
) -> list[Completion]:
    """Continue token prompts with an autoregressive model.

    Args:
        make_decoder: makes a fresh decoder.
        tokenizer: of the model.
        prompts: at least one token each.
        wanted: what is to be written.
        sampling: temperature, top-k, top-p and seed.
        options: for generate_autoregressive, like the arguments not named here.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together: less forced decoding
    results: dict[int, Completion] = {}
    for start in range(0, len(order), wanted.batch_size):
        indices = order[start : start + wanted.batch_size]
        outputs = generate_autoregressive(
            make_decoder(),
            [prompts[index] for index in indices],
            max_new_tokens=wanted.max_new_tokens,
            sampling=sampling,
            stop=lambda row, new: has_stopped(tokenizer, new, wanted.stop_strings),
            sample_numbers=wanted.of_rows(indices),
            **options,  # type: ignore[arg-type]
        )
        for index, tokens in zip(indices, outputs):
            results[index] = Completion(finish(tokenizer, tokens, wanted.stop_strings), tokens)
    return [results[index] for index in range(len(prompts))]


def continue_masked(
    sampler: Sampler,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    wanted: Wanted,
    *,
    settings: DiffusionSettings,
    on_step: Callable[[Step], None] | None = None,
) -> list[Completion]:
    """Continue token prompts with a diffusion model; rows of equal length share a batch."""
    rows = [[*prompt, *([sampler.mask_id] * wanted.max_new_tokens)] for prompt in prompts]
    starts = [len(prompt) for prompt in prompts]
    results: dict[int, Completion] = {}
    for indices in _equal_batches(rows, wanted.batch_size, mask_id=sampler.mask_id):

        def stop(row: int, prefix: list[int], indices: list[int] = indices) -> bool:
            return has_stopped(tokenizer, prefix[starts[indices[row]] :], wanted.stop_strings)

        filled = sampler.fill(
            [rows[index] for index in indices], settings=settings, stop=stop, on_step=on_step,
            sample_numbers=wanted.of_rows(indices),
        )  # fmt: skip
        for index, tokens in zip(indices, filled):
            new = tokens[starts[index] :]
            new = new[: new.index(sampler.mask_id)] if sampler.mask_id in new else new
            results[index] = Completion(finish(tokenizer, new, wanted.stop_strings), new)
    return [results[index] for index in range(len(prompts))]


def fill_gaps(
    sampler: Sampler,
    tokenizer: TextTokenizer,
    rows: Sequence[Sequence[int]],
    *,
    settings: DiffusionSettings,
    stop_strings: Sequence[str] = (),
    batch_size: int = 8,
    on_step: Callable[[Step], None] | None = None,
) -> list[Completion]:
    """Fill the mask tokens of whole rows (see :func:`encode_with_gaps`)."""
    results: dict[int, Completion] = {}
    for indices in _equal_batches(rows, batch_size, mask_id=sampler.mask_id):
        filled = sampler.fill(
            [rows[index] for index in indices], settings=settings, on_step=on_step, sample_numbers=indices
        )
        for index, tokens in zip(indices, filled):
            is_gap = [token == sampler.mask_id for token in rows[index]]
            results[index] = Completion(text_with_gaps(tokenizer, tokens, is_gap, stop_strings=stop_strings), tokens)
    return [results[index] for index in range(len(rows))]


def text_with_gaps(
    tokenizer: TextTokenizer, tokens: Sequence[int], is_gap: Sequence[bool], *, stop_strings: Sequence[str] = ()
) -> str:
    """Text of a filled row: a gap ends at an end of document or a stop string drawn in it; what was given stays.

    Args:
        tokenizer: turns tokens into text.
        tokens: [seq] ids; an end of document at the start, which only says that a document begins, is not shown.
        is_gap: [seq] whether a token was drawn.
        stop_strings: each gap ends at the first of them.
    """
    eod, text, kept = tokenizer.eod_id, "", list[int]()
    for drawn, run in groupby(range(len(tokens)), key=lambda index: is_gap[index]):
        ids = [tokens[index] for index in run]
        if drawn and eod is not None and eod in ids:
            ids = ids[: ids.index(eod)]
        elif not drawn and not kept and not text and ids[0] == eod:
            ids = ids[1:]
        before, after = tokenizer.decode(kept), tokenizer.decode(kept + ids)  # a text may depend on what is before it
        piece = after[len(before) :] if after.startswith(before) else tokenizer.decode(ids)
        text += cut_at_stop(piece, stop_strings) if drawn else piece
        kept += ids
    return text


def _equal_batches(rows: Sequence[Sequence[int]], batch_size: int, *, mask_id: int) -> list[list[int]]:
    """Indices of rows of equal length with as many mask tokens, so that the steps and blocks of a row are its own; at most
    ``batch_size`` together, longest first."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault((len(row), list(row).count(mask_id)), []).append(index)
    return [
        indices[start : start + batch_size]
        for _, indices in sorted(alike.items(), reverse=True)
        for start in range(0, len(indices), batch_size)
    ]
