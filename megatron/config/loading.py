"""Which weights of a checkpoint a tool takes: the flag that all of them share."""

from __future__ import annotations

import argparse

from megatron.config.schema import AVERAGE, WEIGHT


def add_load_kind(parser: argparse._ActionsContainer) -> None:
    """Add ``--load-kind`` to a parser or to a group of its flags."""
    parser.add_argument(
        "--load-kind",
        choices=(WEIGHT, AVERAGE),
        metavar="KIND",
        help="weight: weights as trained; ema: their average (--ema-decay of a training); default: weight, and of the tag "
        "best those that were validated as the best",
    )
