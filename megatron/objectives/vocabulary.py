"""Flags of everything that draws random tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.option import TOKENS, option


@dataclass(frozen=True)
class VocabularyOptions:
    """Flags of everything that draws random tokens."""

    noise_vocab_size: int | None = option(
        None, "tokens that noise draws from, ids from 0; default: the vocabulary before padding", unit="TOKENS",
        range=TOKENS, follows="vocabulary",
    )  # fmt: skip
