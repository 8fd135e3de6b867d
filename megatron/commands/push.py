"""Upload a run to the Hugging Face hub: weights for transformers, run.json, metrics.jsonl and a model card."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser
from megatron.config.ranges import refuse_idle
from megatron.errors import UserError, require

if TYPE_CHECKING:
    from megatron.hub.upload import UploadPlan


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__,
        epilog="HF_ENDPOINT, HF_HOME and HF_TOKEN are honoured.",
        examples=("megatron hub push runs/mdm owner/name --dry-run",),
    )
    add = parser.add_argument
    add("run", help="run directory (the folder of --save)")
    add("repo_id", help="owner/name on the hub")
    add("--tag", help="checkpoint to upload; default: the newest that verifies")
    add_load_kind(parser)
    add("--private", action="store_true", help="make the repository private if it is created now")
    add(
        "--with-checkpoint",
        action="store_true",
        help="also upload the checkpoint with optimizer state, to continue training",
    )
    add("--no-export", action="store_true", help="no Hugging Face export (for architectures that it cannot express)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the exported weights")
    add("--trim-vocab", action="store_true", help="drop the padding rows that no token uses")
    add("--tokenizer", metavar="NAME", help="Hugging Face tokenizer instead of the run's own")
    add("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    add("--license", metavar="ID", help="licence named in the model card, such as apache-2.0")
    add("--output", metavar="DIR", help="keep what is uploaded in this folder")
    add("--dry-run", action="store_true", help="say what would be uploaded and stop")
    args = parser.parse_args(argv)
    idle = {"tokenizer": "--no-tokenizer leaves it out"} if args.no_tokenizer else {}
    if args.no_export:
        names = ("load_kind", "dtype", "trim_vocab", "tokenizer", "no_tokenizer")
        idle |= dict.fromkeys(names, "there is no export")
    refuse_idle(parser, args, idle)
    return args


def plan_of(args: argparse.Namespace) -> UploadPlan:
    """Turn the flags into a plan."""
    from megatron.convert.hf_folder import ExportOptions
    from megatron.hub.upload import UploadPlan

    near = f"write {args.repo_id.strip('/').replace('/', '-')} behind its owner: OWNER/NAME"
    is_whole = args.repo_id.count("/") == 1 and all(args.repo_id.split("/"))
    require(is_whole, f"{args.repo_id!r} as repository", "on the hub it is owner/name", near)
    if args.no_export and not args.with_checkpoint:
        raise UserError("--no-export without --with-checkpoint", "an upload holds weights", "add --with-checkpoint")
    export = ExportOptions(
        dtype=args.dtype,
        trim_vocab=args.trim_vocab,
        tokenizer=args.tokenizer,
        with_tokenizer=not args.no_tokenizer,
        verify=True,
    )
    return UploadPlan(
        args.repo_id, args.tag, args.load_kind, not args.no_export, args.with_checkpoint, args.license, export
    )


def main(argv: list[str] | None = None) -> None:
    """Stage, show and upload."""
    args = parse_args(argv)
    from megatron.hub.upload import stage, upload

    with tempfile.TemporaryDirectory(prefix="push-") as scratch:
        folder = Path(args.output) if args.output else Path(scratch) / "upload"
        files = stage(Path(args.run), folder, plan_of(args))
        for name, size in files:
            print(f"  {size / 1e6:>12,.3f} MB  {name}")
        print(f"{len(files)} files, {sum(size for _, size in files) / 1e6:,.1f} MB, to {args.repo_id}", flush=True)
        if not args.dry_run:
            print(upload(folder, args.repo_id, private=args.private))
