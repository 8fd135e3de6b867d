"""Encode text into Megatron token files: OUTPUT_KEY_document.bin, .idx and .meta.json.

Input is JSON lines and plain text (also .gz, .bz2, .xz, .zst), parquet or a folder saved by the `datasets` library; several
inputs, folders and patterns are read in order. The output appears complete or not at all. See docs/data.md.

Malformed rows (no JSON, no such key, no text, no UTF-8) are reported by file and line and counted. By default one is
too many: the whole input is checked, nothing is written, and the exit status is 2. --max-errors N leaves out up to N,
--skip-errors any number.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.config.ranges import refuse_idle, whole
from megatron.errors import UserError
from megatron.screen import Progress, wrapped

if TYPE_CHECKING:
    from megatron.data.prepare.preprocess import Encoded, PreprocessOptions, Summary


EXAMPLES = (
    "megatron data preprocess --input c4.jsonl --output-prefix data/c4 --vocab-file vocab.json --merge-file merges.txt "
    "--append-eod",
    "megatron data preprocess --input books --output-prefix data/books --tokenizer-type ByteTokenizer --append-eod",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags; Megatron's spellings."""
    from megatron.data.prepare.readers import FORMATS
    from megatron.data.tokenizer import KINDS

    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = Parser(description=description, epilog=epilog, examples=EXAMPLES)
    group = parser.add_argument_group("input")
    group.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or patterns")
    group.add_argument("--root", metavar="DIR", help="folder of relative inputs (default: the working directory)")
    group.add_argument("--input-format", choices=FORMATS, help="default: by file name")
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys or columns (default: text)"
    )
    group.add_argument(
        "--text-split",
        choices=("file", "blank-line"),
        default="file",
        help="plain text: a document is a file (default) or a block between blank lines",
    )
    group.add_argument(
        "--max-errors",
        type=whole(0, 10**12),
        default=0,
        metavar="ROWS",
        help="malformed rows to leave out (default: 0)",
    )
    group.add_argument("--skip-errors", action="store_true", help="leave out any number of malformed rows")
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type", metavar="TYPE", choices=KINDS, help=", ".join(KINDS) + " (default: by the other flags)"
    )
    group.add_argument("--vocab-file", metavar="FILE", help="vocab.json of a GPT-2 BPE")
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of a GPT-2 BPE")
    group.add_argument(
        "--tokenizer-model", metavar="PATH", help="HF name, folder or tokenizer.json; SentencePiece .model"
    )
    group.add_argument("--vocab-size", type=whole(1, 2**31 - 1), metavar="TOKENS", help="vocabulary of NullTokenizer")
    group.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PATH", help="start of the output names")
    group.add_argument("--overwrite", action="store_true", help="replace data sets of this name")
    group.add_argument("--dataset-impl", choices=("mmap",), default="mmap", help="format of the output: always mmap")
    group.add_argument(
        "--workers", type=whole(1, 4096), metavar="PROCESSES", help="encoding processes (default: the cores)"
    )
    group.add_argument(
        "--log-interval", type=whole(1, 10**6), default=30, metavar="SECONDS", help="between progress lines in a log"
    )
    args = parser.parse_args(argv)
    refuse_idle(parser, args, {"max_errors": "--skip-errors leaves out any number"} if args.skip_errors else {})
    return args


def _rates(summary: Summary, seconds: float) -> str:
    documents, tokens = max(summary.documents.values(), default=0), sum(summary.tokens.values())
    return f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s"


def encode(args: argparse.Namespace) -> None:
    """Preprocess as the flags say.

    Raises:
        UserError: wrong flags or input.
    """
    from megatron.config.schema import DataConfig
    from megatron.data.prepare.preprocess import PreprocessOptions, preprocess
    from megatron.data.prepare.readers import find_sources, total_bytes
    from megatron.data.tokenizer import build_tokenizer

    sources = find_sources(args.input, args.input_format, root=args.root)
    if any(source.format == "text" for source in sources) and len(args.json_keys) > 1:
        raise UserError(f"--json-keys {' '.join(args.json_keys)} with plain text", "it has one text", "give one key")
    options = PreprocessOptions(
        output_prefix=os.path.expanduser(args.output_prefix),
        keys=tuple(dict.fromkeys(args.json_keys)),
        append_eod=args.append_eod,
        max_errors=None if args.skip_errors else args.max_errors,
        text_split=args.text_split,
        workers=args.workers or len(os.sched_getaffinity(0)),
    )
    if not args.overwrite:
        for key in options.keys:
            if os.path.exists(options.prefix(key) + ".idx"):
                raise UserError(
                    f"{options.prefix(key)}.idx exists",
                    "finished data is not replaced by accident",
                    "choose another --output-prefix or add --overwrite",
                )
    tokenizer = build_tokenizer(
        DataConfig(
            tokenizer_type=args.tokenizer_type,
            vocab_file=args.vocab_file,
            merge_file=args.merge_file,
            tokenizer_model=args.tokenizer_model,
            vocab_size=args.vocab_size,
        )
    )
    with Progress("encoding", total_bytes(sources), unit="B", interval_seconds=args.log_interval) as progress:

        def show(encoded: Encoded, summary: Summary) -> None:
            seconds = max(time.monotonic() - progress.started, 1e-9)
            progress.update(encoded.bytes_read, _rates(summary, seconds))

        summary = preprocess(sources, tokenizer, options, progress=show)
    report(options, summary, tokenizer.name)


def report(options: PreprocessOptions, summary: Summary, tokenizer: str) -> None:
    """Print what was written and left out."""
    for error in summary.errors:
        print(f"left out: {error}", file=sys.stderr)
    if summary.malformed:
        print(f"left out {summary.malformed:,} malformed rows", file=sys.stderr)
    for key in options.keys:
        documents, tokens, size = summary.documents[key], summary.tokens[key], summary.text_bytes[key]
        line = f"{documents:,} documents, {tokens:,} tokens ({tokenizer}), {size:,} bytes of text"
        print(wrapped(f"{options.prefix(key)}: {line}, {size / tokens:.2f} bytes per token"))
    if summary.empty:
        print(f"{summary.empty:,} empty documents were left out")
    seconds = max(summary.seconds, 1e-9)
    documents, tokens = sum(summary.documents.values()), sum(summary.tokens.values())
    print(f"{seconds:.1f} s: {documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s")


def main() -> None:
    """Parse and encode."""
    encode(parse_args())
