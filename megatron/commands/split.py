"""Split own text into OUT/train.jsonl and OUT/validation.jsonl by document, without leakage.

Reads .txt, .md, .rst, .py, .html, .jsonl, also compressed, .parquet, and folders of them. Documents that share half of the
shorter one's runs of 8 words are kept on one side; exact copies are left out. The same text and seed give the same
split on every machine. Fewer than 20 documents are cut into passages at ends of paragraphs. See docs/data.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.config.parser import Parser
from megatron.config.ranges import real, whole

EXAMPLES = (
    "megatron data split --input my-notes --output-dir data/notes",
    "megatron data split --input posts.jsonl.gz --json-keys body --validation-documents 200 --output-dir data/posts",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    from megatron.data.prepare.readers import FORMATS

    parser = Parser(description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders or patterns")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="folder of the two files")
    add("--input-format", choices=FORMATS, help="default: by file name")
    add("--json-keys", default="text", metavar="KEY", help="key or column of the text (default: text)")
    split = ("file", "blank-line")
    add("--text-split", choices=split, default="file", help="plain text: a document is a file (default) or a block")
    add("--skip-errors", action="store_true", help="leave out what is no text (default: refuse)")
    size = parser.add_mutually_exclusive_group()
    fraction, number = real(0, 0.5), whole(1, 2**63 - 1)
    size.add_argument("--validation-fraction", type=fraction, default=0.05, help="of the bytes (default: 0.05)")
    size.add_argument("--validation-documents", type=number, metavar="DOCUMENTS", help="so many instead")
    add("--max-validation-bytes", type=number, metavar="BYTES", help="about so many at most (default: any)")
    share = "part of the shorter one's 8-word runs that makes two documents near-duplicates (default: 0.5)"
    add("--near-duplicates", type=real(0, 1), default=0.5, metavar="FRACTION", help=share)
    add("--seed", type=whole(0, 2**63 - 1), default=1234, help="seed of the choice (default: 1234)")
    for flag in ("--tokenizer-type", "--vocab-file", "--merge-file", "--tokenizer-model"):
        add(flag, metavar="NAME" if flag == "--tokenizer-type" else "FILE", help="tokenizer that counts tokens")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Split and say what came of it."""
    args = parse_args(argv)
    from megatron.config.schema import DataConfig
    from megatron.data.prepare.documents import ReadOptions
    from megatron.data.prepare.readers import find_sources
    from megatron.data.prepare.split import SplitOptions, split
    from megatron.data.tokenizer import build_tokenizer

    names = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
    given = {name: getattr(args, name) for name in names}
    options = SplitOptions(
        fraction=args.validation_fraction,
        documents=args.validation_documents,
        max_validation_bytes=args.max_validation_bytes,
        near_duplicates=args.near_duplicates,
        seed=args.seed,
        reading=ReadOptions(args.json_keys, args.text_split, args.skip_errors),
    )
    tokenizer = build_tokenizer(DataConfig(**given)) if any(given.values()) else None
    split(find_sources(args.input, args.input_format), args.output_dir, options, tokenizer=tokenizer)
