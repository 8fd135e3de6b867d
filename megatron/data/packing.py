"""What the boundaries of documents mean inside a sample that holds several: ``--reset-position-ids``,
``--reset-attention-mask`` and ``--eod-mask-loss``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.config.schema import DataConfig
from megatron.data.blend import parse_blend, read_data_path_file
from megatron.data.indexed import read_meta
from megatron.errors import UserError


@dataclass(frozen=True)
class Packing:
    """How samples that hold several documents are treated. The default is one stream of tokens, as in Megatron.

    Boundaries are those of the data set, not the EOD tokens, which a text may lack or contain.

    Attributes:
        reset_positions: positions begin again at 0 with every document.
        reset_attention: tokens see their own document only.
        eod_id: tokens of this id have no loss as inputs (what follows them is another document); None: all tokens have.
    """

    reset_positions: bool = False
    reset_attention: bool = False
    eod_id: int | None = None

    @property
    def asks_for_documents(self) -> bool:
        """Whether the boundaries of documents are needed."""
        return self.reset_positions or self.reset_attention


ONE_STREAM = Packing()


def build_packing(config: DataConfig) -> Packing:
    """The treatment that the flags ask for.

    Raises:
        UserError: ``--eod-mask-loss`` where neither data nor tokenizer say which token ends a document.
    """
    eod_id = _eod_id(config) if config.eod_mask_loss else None
    return Packing(config.reset_position_ids, config.reset_attention_mask, eod_id)


def _eod_id(config: DataConfig) -> int:
    prefixes = []
    for paths, file in (
        (config.train_data_path, config.train_data_path_file),
        (config.valid_data_path, config.valid_data_path_file),
    ):
        items = list(paths) if paths else read_data_path_file(file) if file else []
        prefixes += [prefix for _, prefix in parse_blend(items)] if items else []
    recorded = {meta["eod_id"] for prefix in prefixes if (meta := read_meta(prefix)) and meta.get("eod_id") is not None}
    if len(recorded) > 1:
        raise UserError(
            f"the data end their documents with the tokens {sorted(recorded)}",
            "--eod-mask-loss needs one",
            "preprocess the data with one tokenizer, or drop the flag",
        )
    eod_id = recorded.pop() if recorded else _eod_of_tokenizer(config)
    if eod_id is None:
        raise UserError(
            "--eod-mask-loss, but neither PREFIX.meta.json nor the tokenizer names an end-of-document token",
            "the token must be known to be left out of the loss",
            "pass the tokenizer of the data (--vocab-file and --merge-file, or --tokenizer-model), or drop the flag",
        )
    return eod_id


def _eod_of_tokenizer(config: DataConfig) -> int | None:
    from megatron.data.tokenizer import build_tokenizer

    try:
        return build_tokenizer(config).eod_id
    except UserError:
        return None  # said by the caller, with what it was needed for


def places_in_documents(segment_ids: np.ndarray) -> np.ndarray:
    """Positions that begin again at 0 with every segment, int64 [batch, seq + 1].

    Args:
        segment_ids: [batch, seq + 1] ascending segment of each token.
    """
    places = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    is_first = np.diff(segment_ids, axis=1, prepend=-1) != 0
    return places - np.maximum.accumulate(np.where(is_first, places, 0), axis=1)
