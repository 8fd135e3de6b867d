"""Convert checkpoints: the published DeepSpeed layout, this repository's format, and Hugging Face folders."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser
from megatron.config.ranges import refuse_idle

if TYPE_CHECKING:
    from megatron.config.schema import Config
    from megatron.convert.hf_folder import ExportOptions
    from megatron.convert.published import PublishedCheckpoint


EXAMPLES = (
    "megatron convert to-hf runs/mdm exported/mdm",
    "megatron convert from-hf exported/mdm runs/again",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__,
        examples=EXAMPLES,
        epilog="Outputs appear complete or not at all. See docs/converting.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    published = commands.add_parser("from-published", help="published (DeepSpeed pipeline) checkpoint -> run directory")
    to_hf = commands.add_parser("to-hf", help="run directory -> Hugging Face folder")
    from_hf = commands.add_parser("from-hf", help="Hugging Face folder -> run directory")
    straight = commands.add_parser("published-to-hf", help="published checkpoint -> Hugging Face folder")
    for command, source, target in (
        (published, "folder with `latest`, or a global_stepN folder", "run directory to make"),
        (to_hf, "run directory, or one global_stepN of it", "Hugging Face folder to make"),
        (from_hf, "folder with config.json and safetensors", "run directory to make"),
        (straight, "folder with `latest`, or a global_stepN folder", "Hugging Face folder to make"),
    ):
        command.add_argument("source", help=source)
        command.add_argument("target", help=target)
        command.add_argument("--verify", action="store_true", help="compare logits with transformers before the end")
    for command in (published, straight):
        text = "what trained it; both objectives have the same tensors, so the files do not say"
        command.add_argument("--objective", required=True, choices=("ar", "mdm"), help=text)
    for command in (published, straight, to_hf):
        command.add_argument("--vocab-file", metavar="FILE", help="vocab.json of the GPT-2 tokenizer")
        command.add_argument("--merge-file", metavar="FILE", help="merges.txt of the GPT-2 tokenizer")
    for command in (to_hf, straight):
        text = "write this Hugging Face tokenizer (folder or hub name) instead of the run's own"
        command.add_argument("--tokenizer", metavar="NAME", help=text)
        dtypes = ("auto", "float32", "bfloat16", "float16")
        command.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights; auto: that of training")
        command.add_argument("--trim-vocab", action="store_true", help="drop the padding rows that no token uses")
        command.add_argument(
            "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="split larger files (default: 5GB)"
        )
    for command in (to_hf, straight, from_hf):
        command.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    to_hf.add_argument("--tag", help="checkpoint of the run; default: the newest that verifies")
    add_load_kind(to_hf)
    args = parser.parse_args(argv)
    idle = {}
    if getattr(args, "tokenizer", None):
        idle = dict.fromkeys(("vocab_file", "merge_file"), "--tokenizer stands in its place")
    if getattr(args, "no_tokenizer", False):
        idle = dict.fromkeys(("tokenizer", "vocab_file", "merge_file"), "--no-tokenizer leaves it out")
    refuse_idle(commands.choices[args.command], args, {name: why for name, why in idle.items() if hasattr(args, name)})
    return args


def _size(text: str) -> str:
    """A size as the hub library reads it; it counts in powers of ten and takes none of 0."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}[KMGT]B", text.upper()):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; it must be a whole number of KB, MB, GB or TB, such as 5GB")
    return text.upper()


def with_tokenizer_files(config: Config, args: argparse.Namespace) -> Config:
    """Point the configuration at tokenizer files of this machine."""
    if not (args.vocab_file or args.merge_file):
        return config
    files = {"vocab_file": args.vocab_file, "merge_file": args.merge_file, "tokenizer_type": "GPT2BPETokenizer"}
    return replace(config, data=replace(config.data, **files))


def read_published_source(args: argparse.Namespace) -> PublishedCheckpoint:
    """Read the published checkpoint that the flags name."""
    from megatron.convert.published import read_published

    found = read_published(args.source, objective=args.objective)
    return replace(found, config=with_tokenizer_files(found.config, args))


def export_options(args: argparse.Namespace, origin: Path | None) -> ExportOptions:
    """Turn the flags of an export into options."""
    from megatron.convert.hf_folder import ExportOptions

    return ExportOptions(
        dtype=args.dtype,
        trim_vocab=args.trim_vocab,
        tokenizer=args.tokenizer,
        with_tokenizer=not args.no_tokenizer,
        verify=args.verify,
        max_shard_size=args.max_shard_size,
        origin=origin,
    )


def convert(args: argparse.Namespace) -> dict:
    """Run one command; returns what was written."""
    from megatron.convert.hf_folder import compare_logits, export_folder, import_folder, verify_weights
    from megatron.convert.run_folder import origin_of, read_run, write_run

    if args.command == "from-published":
        found = read_published_source(args)
        difference = verify_weights(found.config, found.tensors) if args.verify else None
        write_run(args.target, found.config, found.tensors, step=found.step, source=args.source)
        return {"step": found.step, "tensors": len(found.tensors), "verified": difference}
    if args.command == "from-hf":
        config, tensors = import_folder(args.source, with_tokenizer=not args.no_tokenizer)
        difference = compare_logits(config, tensors, Path(args.source)) if args.verify else None
        write_run(args.target, config, tensors, step=0, source=args.source, origin=Path(args.source))
        return {"step": 0, "tensors": len(tensors), "verified": difference}
    if args.command == "to-hf":
        config, tensors, folder = read_run(args.source, tag=args.tag, kind=args.load_kind)
        options = export_options(args, origin_of(folder))
        return export_folder(with_tokenizer_files(config, args), tensors, args.target, options=options)
    found = read_published_source(args)
    return export_folder(found.config, found.tensors, args.target, options=export_options(args, None))


def main(argv: list[str] | None = None) -> None:
    """Convert and print a report as JSON."""
    args = parse_args(argv)
    report = convert(args)
    if report.get("tokenizer") is False and not args.no_tokenizer:
        print("note: the run names no tokenizer; pass --tokenizer, or --vocab-file and --merge-file", file=sys.stderr)
    print(json.dumps({"command": args.command, "source": args.source, "target": args.target, **report}))
