"""Make a smaller data set: the first documents, documents up to a number of tokens, or a seeded random sample."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.config.ranges import refuse_idle, whole
from megatron.files import replace_file

if TYPE_CHECKING:
    from megatron.data.tokenizer import Tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__,
        examples=("megatron data subset --input data/train --output data/small --documents 100",),
        epilog="Random samples of one seed are nested; documents keep their order.",
    )
    add = parser.add_argument
    add(
        "--input",
        required=True,
        metavar="PATH",
        help="a .jsonl file (also compressed), or the prefix of PREFIX.bin and PREFIX.idx",
    )
    add("--output", required=True, metavar="PATH", help="the same kind: a .jsonl file, or a prefix")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--documents", type=whole(1, 2**63 - 1), metavar="DOCUMENTS", help="this many documents")
    size.add_argument(
        "--tokens", type=whole(1, 2**63 - 1), metavar="TOKENS", help="as many documents as fit into this many tokens"
    )
    add("--random", action="store_true", help="a random sample instead of the first documents")
    add("--seed", type=whole(0, 2**63 - 1), default=1234, help="seed of --random (default: 1234)")
    add("--json-keys", default="text", metavar="KEY", help="JSONL: key of the text (default: text)")
    add("--data-path-file", metavar="FILE", help="also write the line for --train-data-path-file here")
    for flag in ("--tokenizer-type", "--vocab-file", "--merge-file", "--tokenizer-model"):
        add(flag, metavar="NAME" if flag == "--tokenizer-type" else "FILE", help="JSONL: tokenizer that counts tokens")
    args = parser.parse_args(argv)
    idle = {} if args.random else {"seed": "the first documents are taken without --random"}
    if not is_jsonl(args.input):
        names = ("json_keys", "tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
        idle |= dict.fromkeys(names, "the input is tokenised")
    refuse_idle(parser, args, idle)
    return args


def is_jsonl(name: str) -> bool:
    """Whether the input is a file of texts, not the prefix of token files."""
    return Path(name).is_file() and not name.endswith((".bin", ".idx"))


def counting_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """Build the tokenizer that the flags name, if any."""
    from megatron.config.schema import DataConfig
    from megatron.data.tokenizer import build_tokenizer

    names = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
    given = {name: getattr(args, name) for name in names}
    return build_tokenizer(DataConfig(**given)) if any(given.values()) else None


def main(argv: list[str] | None = None) -> None:
    """Make the subset and print what it is."""
    args = parse_args(argv)
    from megatron.data.indexed import clean_prefix
    from megatron.data.prepare.subset import Selection, subset_indexed, subset_jsonl

    selection = Selection(args.documents, args.tokens, args.seed if args.random else None)
    if is_jsonl(args.input):
        report = subset_jsonl(
            args.input, args.output, selection, tokenizer=counting_tokenizer(args), key=args.json_keys
        )
    else:
        report = subset_indexed(clean_prefix(args.input), args.output, selection)
    if args.data_path_file:
        replace_file(args.data_path_file, report["data_path_line"] + "\n")
    print(json.dumps(report, indent=1))
