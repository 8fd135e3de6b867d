"""Describe a data set and verify it: tokens per epoch, lengths, duplicates. Exit status 1 if it is damaged."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from megatron.config.parser import Parser
from megatron.config.ranges import whole
from megatron.errors import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, examples=("megatron data inspect data/train_text_document",))
    parser.add_argument("prefix", nargs="+", help="common part of PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--vocab-size",
        type=whole(1, 2**31 - 1),
        metavar="TOKENS",
        help="ids must be below it (default: PREFIX.meta.json)",
    )
    parser.add_argument(
        "--eod-id", type=whole(0, 2**31 - 1), metavar="ID", help="end-of-document id (default: PREFIX.meta.json)"
    )
    parser.add_argument("--no-duplicates", action="store_true", help="do not look for repeated documents")
    parser.add_argument(
        "--record", action="store_true", help="write digests and largest id to PREFIX.meta.json, for --verify-data"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a data set")
    return parser.parse_args(argv)


def show(report: dict[str, Any]) -> None:
    """Print a report for people."""
    tokens, documents = report["tokens_per_epoch"], report["documents"]
    print(f"{report['prefix']}\n  tokens per epoch  {tokens:,}\n  documents         {documents:,}")
    print(
        f"  on disk           {report['token_bytes'] / 1e6:,.1f} MB of {report['dtype']}, largest id "
        f"{report['largest_id']}"
    )
    if report["length"]:
        print("  length            " + ", ".join(f"{name} {value:,.6g}" for name, value in report["length"].items()))
    if report["documents_ending_in_eod"] is not None:
        print(f"  ending in EOD     {report['documents_ending_in_eod']:,}")
    if report["duplicate_documents"] is not None:
        share = report["duplicate_documents"] / max(documents, 1)
        print(
            f"  duplicates        {report['duplicate_documents']:,} documents ({share:.3%}), "
            f"{report['duplicate_tokens']:,} tokens"
        )
    if report["text_bytes_per_token"]:
        print(f"  bytes per token   {report['text_bytes_per_token']:.4f}")
    most = max((row[2] for row in report["histogram"]), default=1)
    for first, last, count, inside in report["histogram"]:
        bar = "#" * round(10 * count / most)
        print(f"  {first:>9,} to {last:>9,} {count:>9,} documents {inside:>15,} tokens  {bar}")
    for problem in report["problems"]:
        print(f"  DAMAGED: {problem}")
    if not report["problems"]:
        print("  intact")


def main(argv: list[str] | None = None) -> int:
    """Inspect every prefix. Returns the exit status."""
    args = parse_args(argv)
    from megatron.data.prepare.inspection import inspect, record

    status = 0
    for prefix in args.prefix:
        try:
            report = inspect(prefix, vocab_size=args.vocab_size, eod_id=args.eod_id, duplicates=not args.no_duplicates)
            if args.record and not report["problems"]:
                record(report)
        except UserError as error:  # the other data sets are inspected all the same
            print(f"error: {error}", file=sys.stderr)
            status = max(status, error.exit_status)
            continue
        status = max(status, 1 if report["problems"] else 0)
        if args.json:
            print(json.dumps(report))
        else:
            show(report)
    return status
