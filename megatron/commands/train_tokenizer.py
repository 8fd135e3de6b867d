"""Train a small byte-level BPE on text and save it as a tokenizer folder for --tokenizer-model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.config.ranges import whole
from megatron.errors import UserError

if TYPE_CHECKING:
    from megatron.data.prepare.readers import Source


EXAMPLES = ("megatron data tokenizer --input train.jsonl --vocab-size 2048 --output data/tokenizer",)


def texts(sources: list[Source], key: str) -> Iterator[str]:
    """Yield the texts of all sources.

    Raises:
        UserError: a malformed row.
    """
    from megatron.data.prepare.preprocess import parse_row
    from megatron.data.prepare.readers import read_batches

    for source in sources:
        for batch in read_batches(source, [key]):
            for number, raw in enumerate(batch.rows, start=batch.first):
                try:
                    row = parse_row(raw, batch.unit, [key])
                except ValueError as error:
                    given = f"{batch.source}, {batch.unit} {number}: {error}"
                    raise UserError(given, "a tokenizer is trained on sound rows only", "mend or remove it") from error
                if row is not None:
                    yield row[0]


def main() -> None:
    """Train and save."""
    from megatron.data.prepare.bpe_training import train_bpe
    from megatron.data.prepare.readers import FORMATS, find_sources

    parser = Parser(
        description=__doc__,
        examples=EXAMPLES,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or patterns")
    parser.add_argument("--input-format", choices=FORMATS, help="default: by file name")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument(
        "--vocab-size", type=whole(1, 1 << 24), default=2048, metavar="TOKENS", help="ids to make (default: 2048)"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder to save; of an existing one, its tokenizer is replaced",
    )
    args = parser.parse_args()
    sources = find_sources(args.input, args.input_format)
    tokenizer = train_bpe(texts(sources, args.json_keys), vocab_size=args.vocab_size, folder=args.output)
    print(f"{args.output}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}")
