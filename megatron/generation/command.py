"""The program behind ``tools/generate.py``."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.data.jsonl import read_lines
from megatron.errors import UserError, require
from megatron.files import replace_file
from megatron.generation.animation import StepRecorder, animation, pieces_of
from megatron.generation.diffusion import DiffusionSettings, Step
from megatron.generation.display import UncoverDisplay
from megatron.generation.flags import NEW_TOKENS, build_generate_parser
from megatron.generation.samplers import sampler_of
from megatron.generation.sampling import TokenSampling
from megatron.generation.text import (
    GAP,
    Completion,
    Wanted,
    continue_causal,
    continue_masked,
    encode_with_gaps,
    fill_gaps,
)
from megatron.objectives.base import UniformDecoding
from megatron.runs.counts import format_count

if TYPE_CHECKING:
    from megatron.inference.model import InferenceModel

# Counts that a flag takes, both ends included; sampling and diffusion settings check their own.
COUNTS = {"max_new_tokens": (1, 10**9), "num_samples": (1, 10**6), "batch_size": (1, 10**9)}
# Flags that say something about the text, and so are options from Python too.
_FOR_TEXT = {
    *COUNTS,
    "infix",
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "order",
    "steps",
    "tokens_per_step",
    "block_length",
    "guidance",
}


def run_generate(argv: Sequence[str] | None = None) -> int:
    """Parse, generate, print.

    Raises:
        UserError: wrong flags, no model, a prompt that does not fit.
    """
    arguments = build_generate_parser().parse_args(argv)
    _check_numbers(arguments)
    _check_texts(arguments)
    prompts = [prompt for prompt in _prompts(arguments) for _ in range(arguments.num_samples)]
    _check_animation(arguments, len(prompts))
    from megatron.inference.model import load_model

    names = ("vocab_file", "merge_file", "tokenizer_model", "tokenizer_type")
    tokenizer = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    loaded = load_model(
        arguments.load,
        tag=arguments.load_tag,
        kind=arguments.load_kind,
        dtype=arguments.dtype,
        tokenizer_options=tokenizer or None,
    )
    if arguments.decoding is not None:
        loaded = loaded.decoded(arguments.decoding)
        require(
            loaded.is_causal == (arguments.decoding == "causal"),
            f"--decoding {arguments.decoding} with {loaded.source} ({loaded.config.objective.objective})",
            "only dual models decode in two ways",
            "drop it",
        )
    recorder = StepRecorder()
    completions, shown = _generate(loaded, prompts, arguments, recorder)
    if arguments.animate:
        _write_animation(loaded, recorder, arguments)
    for index, (prompt, completion, text) in enumerate(zip(prompts, completions, shown)):
        if arguments.json:
            entry = {"prompt": prompt, "sample": index % arguments.num_samples, "text": completion.text}
            print(json.dumps({**entry, "tokens": completion.tokens}))
        else:
            print(text if len(prompts) == 1 else f"--- {index + 1}\n{text}")
    if arguments.animate:
        print(f"animation: {arguments.animate}", file=sys.stderr)
    return 0


def complete(loaded: InferenceModel, prompts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
    """Complete every prompt as the program does, without showing steps.

    Args:
        loaded: model with a tokenizer.
        prompts: texts; an empty one starts a document.
        options: flags by their names, underscores for hyphens; the defaults are those of the program.

    Raises:
        UserError: an unknown option, a number out of range, or a prompt that does not fit.
    """
    if unknown := sorted(options.keys() - _FOR_TEXT):
        near = difflib.get_close_matches(unknown[0], _FOR_TEXT, n=1)
        fix = f"did you mean {near[0]}?" if near else "see megatron generate --help"
        raise UserError(f"option {unknown[0]!r}", f"the options are {', '.join(sorted(_FOR_TEXT))}", fix)
    words = [
        f"--{name.replace('_', '-')}={word}"
        for name, value in options.items()
        if value is not None
        for word in (value if isinstance(value, (list, tuple)) else [value])
    ]
    arguments = build_generate_parser().parse_args(["--load", loaded.source, "--no-show-steps", *words])
    _check_numbers(arguments)
    _check_texts(arguments)
    every = [prompt for prompt in prompts for _ in range(arguments.num_samples)]
    return _generate(loaded, every, arguments, StepRecorder())[0]


def _generate(
    loaded: InferenceModel, prompts: list[str], arguments: argparse.Namespace, recorder: StepRecorder
) -> tuple[list[Completion], list[str]]:
    """Completions, and the texts that people are shown."""
    by_chance = arguments.order in ("random", "ancestral") or isinstance(loaded.objective.decoding, UniformDecoding)
    require(
        arguments.num_samples == 1 or arguments.temperature > 0 or (by_chance and not loaded.is_causal),
        f"--num-samples {arguments.num_samples} at --temperature 0",
        "the most likely token is taken, so that all samples would be one text",
        "pass for instance --temperature 1, or drop it",
    )
    return (_causal if loaded.is_causal else _filled)(loaded, prompts, arguments, recorder)


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is loaded."""
    for name, (least, most) in COUNTS.items():
        value = getattr(arguments, name)
        flag = "--" + name.replace("_", "-")
        require(least <= value <= most, f"{flag} {value}", f"it is from {least} to {most}", "correct the number")
    _settings(arguments)
    require(
        arguments.temperature > 0 or (arguments.top_k == 0 and arguments.top_p == 1),
        "--top-k or --top-p at --temperature 0",
        "the most likely token is taken, and none drawn",
        "pass for instance --temperature 1, or drop them",
    )


def _check_texts(arguments: argparse.Namespace) -> None:
    """Refuse words of the command line that are no UTF-8, which Python passes on as lone surrogates."""
    for name in ("prompt", "infix", "stop"):
        given = getattr(arguments, name) or []
        for text in [given] if isinstance(given, str) else given:
            sound = text.encode(errors="replace").decode() == text
            require(sound, f"--{name} {ascii(text)[:60]}", "text is UTF-8", "set a UTF-8 locale, or use --prompt-file")


def _check_animation(arguments: argparse.Namespace, results: int) -> None:
    """Refuse what an animation cannot show, or where it cannot go, before anything is loaded."""
    file = arguments.animate
    if file is None:
        return
    require(file.suffix == ".svg", f"--animate {file}", "it is an SVG", "name a file that ends in .svg")
    require(file.parent.is_dir(), f"--animate {file}", f"there is no folder {file.parent}", "make it or name another")
    require(results == 1, f"--animate with {results} results", "it shows one", "pass one --prompt and one sample")
    require(not arguments.stop, "--animate with --stop", "it shows every token that was drawn", "drop one of them")


def _write_animation(loaded: Any, recorder: StepRecorder, arguments: argparse.Namespace) -> None:
    """The file of ``--animate``; its caption says which model drew the text, and how."""
    size = format_count(sum(parameter.numel() for parameter in loaded.model.parameters()))
    steps = len(set(recorder.step_of.values()))
    how = "written from left to right" if loaded.is_causal else f"uncovered in {steps} steps, order {arguments.order}"
    caption = (
        f"One sample of a model with {size} parameters ({loaded.config.objective.objective}, {Path(loaded.source).name}), "
        f"{how}, temperature {arguments.temperature:g}, seed {arguments.seed}. "
    )
    pieces = pieces_of(loaded.require_tokenizer(), recorder.tokens, recorder.step_of)
    caption += "Grey text was given." if any(piece.step is None for piece in pieces) else "Nothing was given."
    replace_file(arguments.animate, animation(pieces, caption=caption))


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts; one empty prompt where none was asked for."""
    prompts = list(arguments.prompt or [])
    if arguments.prompt_file is not None:
        lines = [line for _, line in read_lines(Path(arguments.prompt_file))]
        require(lines, f"--prompt-file {arguments.prompt_file} holds no prompt", "it has one a line", "add lines")
        prompts += lines
    return prompts or [""]


def _sampling(arguments: argparse.Namespace) -> TokenSampling:
    return TokenSampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)


def _settings(arguments: argparse.Namespace) -> DiffusionSettings:
    return DiffusionSettings(
        arguments.order,
        arguments.steps,
        arguments.block_length,
        arguments.guidance,
        _sampling(arguments),
        tokens_per_step=arguments.tokens_per_step,
    )


def _causal(
    loaded: Any, prompts: list[str], arguments: argparse.Namespace, recorder: StepRecorder
) -> tuple[list[Completion], list[str]]:
    only_masked = {
        "--infix": arguments.infix,
        "--steps": arguments.steps,
        "--tokens-per-step": arguments.tokens_per_step,
        "--block-length": arguments.block_length,
        "--guidance": arguments.guidance,
        "[MASK] gaps": any(GAP.search(prompt) for prompt in prompts),
        "--show-steps": arguments.show_steps,
        f"--order {arguments.order}": arguments.order != "confidence",
    }
    for flag, value in only_masked.items():
        if value:
            raise UserError(
                f"{flag} with {loaded.source}, a causal model",
                "it writes from left to right",
                "drop it or load a masked diffusion model",
            )
    rows = [_fitting(loaded, prompt, arguments.max_new_tokens) for prompt in prompts]
    if arguments.animate:
        recorder.tokens = list(rows[0])
    completions = continue_causal(
        loaded.decoder,
        loaded.require_tokenizer(),
        rows,
        Wanted(arguments.max_new_tokens, arguments.stop, arguments.batch_size),
        sampling=_sampling(arguments),
        forbidden=loaded.unused_ids,
        device=loaded.device,
        on_token=recorder.on_token if arguments.animate else None,
    )
    return completions, [prompt + completion.text for prompt, completion in zip(prompts, completions)]


def _filled(
    loaded: Any, prompts: list[str], arguments: argparse.Namespace, recorder: StepRecorder
) -> tuple[list[Completion], list[str]]:
    tokenizer = loaded.require_tokenizer()
    sampler = sampler_of(loaded)
    show = arguments.show_steps
    if show is None:
        show = sys.stdout.isatty() and len(prompts) == 1 and not arguments.json
    observers: list[Callable[[Step], None]] = [UncoverDisplay(tokenizer, mask_id=sampler.mask_id)] if show else []
    observers += [recorder.on_step] if arguments.animate else []

    def observe(step: Step) -> None:
        for observer in observers:
            observer(step)

    options: dict[str, Any] = {"settings": _settings(arguments), "on_step": observe}
    has_gap = [GAP.search(prompt) is not None for prompt in prompts]
    if arguments.infix is not None or any(has_gap):
        require(
            arguments.infix is not None or all(has_gap),
            "prompts with [MASK] and without",
            "gaps are filled, or texts continued",
            "generate them apart",
        )
        rows = [_row_with_gaps(loaded, prompt, arguments, mask_id=sampler.mask_id) for prompt in prompts]
        require(
            arguments.max_new_tokens == NEW_TOKENS or not all(has_gap),
            f"--max-new-tokens {arguments.max_new_tokens} beside [MASK]",
            "gaps say how many tokens are added",
            "drop it, or write [MASK:N]",
        )
        completions = fill_gaps(
            sampler, tokenizer, rows, stop_strings=arguments.stop, batch_size=arguments.batch_size, **options
        )
        return completions, [completion.text for completion in completions]
    rows = [_fitting(loaded, prompt, arguments.max_new_tokens) for prompt in prompts]
    wanted = Wanted(arguments.max_new_tokens, arguments.stop, arguments.batch_size)
    completions = continue_masked(sampler, tokenizer, rows, wanted, **options)
    return completions, [prompt + completion.text for prompt, completion in zip(prompts, completions)]


def _row_with_gaps(loaded: Any, prompt: str, arguments: argparse.Namespace, *, mask_id: int) -> list[int]:
    """A whole row: the prompt with its gaps, or prompt, new tokens and infix."""
    tokenizer, most = loaded.require_tokenizer(), loaded.max_length
    row = encode_with_gaps(tokenizer, prompt, mask_id=mask_id, most=most)
    if arguments.infix is not None:
        gap = "" if GAP.search(prompt) else f"[MASK:{arguments.max_new_tokens}]"
        row += encode_with_gaps(tokenizer, gap + arguments.infix, mask_id=mask_id, most=most)
    if tokenizer.eod_id is not None:
        row = [tokenizer.eod_id, *row]  # a document begins after the end of another one
    if len(row) > loaded.max_length:
        raise UserError(
            f"the text with its gaps has {len(row)} tokens",
            f"the model holds {loaded.max_length}",
            "shorten it or the gaps",
        )
    return row


def _fitting(loaded: Any, prompt: str, max_new_tokens: int) -> list[int]:
    """Ids of a prompt (EOD for an empty one), its left end cut where prompt and new tokens do not fit."""
    room = loaded.max_length - max_new_tokens
    require(
        room >= 1,
        f"--max-new-tokens {max_new_tokens}",
        f"prompt and new tokens share {loaded.max_length} positions",
        f"pass 1 to {loaded.max_length - 1}",
    )
    tokenizer = loaded.require_tokenizer()
    ids = tokenizer.encode(prompt)
    if not ids:
        eod = tokenizer.eod_id
        require(eod is not None, "an empty prompt", "the tokenizer has no EOD to start from", "pass --prompt TEXT")
        ids = [eod]
    return ids[-room:]
