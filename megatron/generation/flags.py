"""Flags of ``tools/generate.py``; they import no torch, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser

LEARNED = ("confidence", "margin", "entropy")
KNOWN = ("left-to-right", "right-to-left", "random")
POLICIES = (*LEARNED, *(f"{name}-reversed" for name in LEARNED), *KNOWN)  # see policies.py
ORDERS = (*POLICIES, "ancestral")
NEW_TOKENS = 64
EXAMPLES = (
    'megatron generate --load runs/mdm --prompt "The cat" --max-new-tokens 32',
    'megatron generate --load runs/mdm --prompt "The [MASK:2] on the [MASK]."',
)


def build_generate_parser() -> argparse.ArgumentParser:
    """Flags of tools/generate.py."""
    parser = Parser(description="Generate text with a checkpoint of any layout or an export.", examples=EXAMPLES)
    _add_model_flags(parser)
    add = parser.add_argument_group("text").add_argument
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be repeated; diffusion fills [MASK] and [MASK:8] (one and "
        "eight tokens) in it; without a gap the text is continued",
    )
    add("--prompt-file", metavar="FILE", help="one prompt a line")
    add("--infix", metavar="TEXT", help="diffusion: text that stands behind the generated tokens")
    add("--max-new-tokens", type=int, default=NEW_TOKENS, metavar="TOKENS", help="tokens to add (default: %(default)s)")
    add("--num-samples", type=int, default=1, metavar="COUNT",
        help="results of every prompt (default: 1), where something is drawn")  # fmt: skip
    add("--stop", action="append", default=[], metavar="TEXT", help="end at this string; may be repeated")
    add("--batch-size", type=int, default=8, metavar="ROWS", help="rows per forward pass (default: 8)")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default: 0)")
    add("--top-k", type=int, default=0, metavar="TOKENS", help="draw from the k most likely tokens; 0: from all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens with this probability")
    add("--seed", type=int, default=1234, help="the same seed gives the same text (default: 1234)")
    add = parser.add_argument_group("diffusion").add_argument
    add("--order", choices=ORDERS, default="confidence", metavar="NAME", help="what to uncover next: "
        f"{', '.join(ORDERS)} (default: confidence; uniform-state diffusion above temperature 0: ancestral)")  # fmt: skip
    add("--steps", type=int, metavar="STEPS", help="forward passes in all; default: one per token")
    add("--tokens-per-step", type=int, metavar="TOKENS", help="so many in every pass, instead of --steps")
    add(
        "--block-length",
        type=int,
        metavar="TOKENS",
        help="masked diffusion: uncover from left to right in blocks; default: one block",
    )
    add(
        "--guidance",
        type=float,
        default=0.0,
        metavar="W",
        help="masked diffusion: classifier-free guidance against the same row without the given tokens; 0: none",
    )
    _add_output_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--load", required=True, metavar="PATH", help="run directory, tag directory, Hugging Face export, or "
        "RUN+RUN, the mean of their probabilities")  # fmt: skip
    add(
        "--load-tag",
        metavar="TAG",
        help="checkpoint, such as global_step100 or latest; default: the newest that verifies",
    )
    add_load_kind(group)
    add(
        "--decoding",
        choices=("causal", "masked"),
        help="dual models: how to write; default: as --dual-decoding of the run",
    )
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: float32")
    add("--vocab-file", metavar="FILE", help="vocab.json of a GPT-2 BPE; default: the tokenizer of the run")
    add("--merge-file", metavar="FILE", help="merges.txt of a GPT-2 BPE")
    add("--tokenizer-model", metavar="PATH", help="Hugging Face tokenizer or SentencePiece model")
    add("--tokenizer-type", metavar="TYPE", help="see megatron train --help data")


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add(
        "--show-steps",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show text being uncovered; default: on a terminal, for one result",
    )
    add(
        "--animate",
        type=Path,
        metavar="FILE.svg",
        help="also write one result as an animated SVG: masked diffusion in the order in which it uncovers, a causal model from "
        "left to right",
    )
    add("--json", action="store_true", help="print one JSON object a line: prompt, sample, text, tokens")
