"""Write train.jsonl and validation.jsonl from the documentation of Python's standard library (about 2 MB).

The two files share no document and no run of 13 words. The same Python version, seed and size give the same files.
"""

from __future__ import annotations

from pathlib import Path

from megatron.config.parser import Parser
from megatron.config.ranges import real, whole


def main() -> None:
    """Write the two files."""
    from megatron.data.prepare.sample_corpus import NGRAM_WORDS, read_documents, split_documents, write_jsonl

    parser = Parser(description=__doc__, examples=("megatron data sample --output-dir data/sample",))
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="folder of the two files")
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=1234, help="seed of the split and the order (default: 1234)"
    )
    parser.add_argument(
        "--max-bytes", type=whole(1, 10**15), metavar="BYTES", help="text in both files together (default: all)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=real(0, 0.5),
        default=0.05,
        metavar="FRACTION",
        help="of the bytes (default: 0.05)",
    )
    args = parser.parse_args()
    documents = read_documents()
    train, validation = split_documents(
        documents, seed=args.seed, validation_fraction=args.validation_fraction, max_bytes=args.max_bytes
    )
    for name, side in (("train", train), ("validation", validation)):
        size = write_jsonl(args.output_dir / f"{name}.jsonl", side)
        print(f"{args.output_dir / name}.jsonl: {len(side):,} documents, {size:,} bytes of text")
    print(f"no run of {NGRAM_WORDS} words is in both files")
