"""Download data sets, the published checkpoints and the GPT-2 tokenizer. `./download.sh --help` shows the options."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.errors import Failure
from megatron.files import replace_file

if TYPE_CHECKING:
    from megatron.hub import catalogue
    from megatron.hub.download import RemoteFile

ROOT = Path(__file__).resolve().parents[2]
# Data lies beside the scripts that read it; of an installed package, where it is asked for.
IS_CHECKOUT = (ROOT / "download.sh").is_file()
DATA_DIR = ROOT / "data" if IS_CHECKOUT else Path("data")
CONVERT = "python tools/convert_checkpoint.py" if IS_CHECKOUT else "megatron convert"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; no option means the quickstart."""
    parser = Parser(
        examples=(
            "./download.sh --quickstart",
            "./download.sh --mdm-checkpoint --dry-run",
        ),
        prog="download.sh" if Path(sys.argv[0]).name == "download.py" else None,
        description="Download from the Hugging Face hub. Interrupted downloads continue; every file is checked against "
        "the hash that the hub lists. HF_ENDPOINT, HF_HOME, HF_TOKEN and proxy variables are honoured.",
    )
    add = parser.add_argument
    add(
        "--quickstart",
        action="store_true",
        help="tokenised C4 subset of 100M tokens, validation set, GPT-2 tokenizer (default)",
    )
    add("--text", action="store_true", help="with --quickstart: also the JSONL files that the tokens come from")
    add(
        "--c4-subsets",
        nargs="*",
        metavar="NAME",
        help="the larger C4 subsets: all, or those whose path contains a NAME",
    )
    add("--ar-checkpoint", action="store_true", help="published AR model (140M, 100M unique tokens)")
    add("--mdm-checkpoint", action="store_true", help="published MDM model (425M, 100M unique tokens)")
    add("--gpt2", action="store_true", help="vocab.json and merges.txt of GPT-2")
    add(
        "--data-dir",
        default=os.environ.get("DATA_DIR") or str(DATA_DIR),
        metavar="DIR",
        help="where it goes (default: $DATA_DIR, or data in the repository; here where there is none)",
    )
    add("--dry-run", action="store_true", help="say what would be fetched and how large it is, and stop")
    return parser.parse_args(argv)


def chosen_items(args: argparse.Namespace) -> list[catalogue.Item]:
    """Turn the options into what to fetch. Everything except the tokenizer itself brings the tokenizer along."""
    from megatron.hub import catalogue

    items = []
    others = args.c4_subsets is not None or args.ar_checkpoint or args.mdm_checkpoint or args.gpt2
    if args.quickstart or args.text or not others:
        items.append(catalogue.quickstart(text=args.text))
    if args.c4_subsets is not None:
        items.append(catalogue.c4_subsets(args.c4_subsets))
    if args.ar_checkpoint:
        items.append(catalogue.checkpoint("ar"))
    if args.mdm_checkpoint:
        items.append(catalogue.checkpoint("mdm"))
    return [*items, catalogue.gpt2()]


def report(item: catalogue.Item, pairs: list[tuple[RemoteFile, str]], missing: list[tuple[RemoteFile, str]]) -> None:
    """Print what one item is, how large, and how much of it is to be fetched."""
    total, needed = sum(file.size for file, _ in pairs), sum(file.size for file, _ in missing)
    first = pairs[0][0]
    print(f"{item.title}: {first.repo_type} {item.repo_id} at {first.commit[:12]}")
    print(f"  {len(pairs)} files, {total / 1e6:,.1f} MB; to fetch: {len(missing)} files, {needed / 1e6:,.1f} MB")
    for file, place in missing:
        print(f"    {file.size / 1e6:>12,.1f} MB  {place}")


def next_steps(root: Path, items: list[catalogue.Item], places: list[str]) -> None:
    """Write the data path files of the quickstart and say how to go on."""
    from megatron.hub import catalogue

    for name, prefix in (("train", catalogue.TRAIN_PREFIX), ("valid", catalogue.VALID_PREFIX)):
        if f"{prefix}.bin" in places:
            replace_file(root / "c4_100m" / f"{name}_data_path.txt", f'"1.0 {root / prefix}"\n')
            print(f"{name} data: {root / prefix} (data path file: {root}/c4_100m/{name}_data_path.txt)")
    for tag in sorted({str(Path(place).parent.parent) for place in places if "/layer_" in place}):
        objective = "mdm" if "mdm" in tag else "ar"
        print(
            f"convert: {CONVERT} from-published {root / tag} runs/{Path(tag).name} "
            f"--objective {objective} --vocab-file {root}/gpt2/vocab.json --merge-file {root}/gpt2/merges.txt"
        )


def is_below_here(path: str) -> bool:
    """Say whether a path lies in the working directory: then relative names are shorter and survive a move."""
    return Path(path).resolve().is_relative_to(Path.cwd().resolve())


def main(argv: list[str] | None = None) -> None:
    """List everything first, check the disk, then fetch."""
    args = parse_args(argv)
    from megatron.hub import catalogue
    from megatron.hub.download import fetch, is_present

    root = Path(os.path.relpath(args.data_dir)) if is_below_here(args.data_dir) else Path(args.data_dir)
    items = chosen_items(args)
    plans = [catalogue.resolve(item) for item in items]
    missing = [[(file, place) for file, place in plan if not is_present(file, root / place)] for plan in plans]
    for item, plan, absent in zip(items, plans, missing):
        report(item, plan, absent)
    needed = sum(file.size for absent in missing for file, _ in absent)
    free = shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
    print(f"in all {needed / 1e6:,.1f} MB into {root}/ ({free / 1e6:,.0f} MB free)", flush=True)
    if args.dry_run:
        return
    if needed > free:
        given = f"{needed:,} bytes are needed and {free:,} are free"
        raise Failure(given, "the files must fit", "give another --data-dir")
    fetched = sum(fetch(file, root / place) for absent in missing for file, place in absent)
    next_steps(root, items, [place for plan in plans for _, place in plan])
    print(f"done: {sum(len(plan) for plan in plans)} files checked, {fetched} fetched")
