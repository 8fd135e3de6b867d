"""Start masked diffusion from an autoregressive checkpoint (``pretrain_mdm.py --finetune --load AR_RUN``).

Every tensor is taken over, attention becomes bidirectional through the objective, and the embedding of the mask token,
which the autoregressive model never read, starts as the mean of the token embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.reader import CheckpointReader
from megatron.config.schema import WEIGHT, Config
from megatron.errors import require

VOCABULARY_TENSORS = ("word_embeddings.weight", "lm_head.weight")


def open_checkpoint(tag: Path, config: Config, *, vocab_size: int, weights: str = WEIGHT) -> CheckpointReader:
    """The checkpoint; with a mask token where masked diffusion starts from a model that never used one.

    Args:
        tag: folder of the checkpoint.
        config: of the run that begins.
        vocab_size: vocabulary before padding.
        weights: kind that is read as the weights.
    """
    reader = CheckpointReader(tag, weights)
    mask_id, padded = config.objective.mask_token_id, config.model.padded_vocab_size
    was_masked = reader.config.objective.mask_token_id is not None
    if config.run.finetune and not was_masked and mask_id is not None and padded is not None:
        own = {name: reader.tensor(name) for name in VOCABULARY_TENSORS if name in reader.specs}
        changed = with_mask_embedding(own, vocab_size=vocab_size, mask_id=mask_id, padded_vocab_size=padded)
        for name, tensor in changed.items():
            reader.specs[name] = replace(reader.specs[name], full_shape=tuple(tensor.shape), blocks=(padded,))
            reader.replaced[name] = tensor
    return reader


def with_mask_embedding(
    tensors: Mapping[str, Tensor], *, vocab_size: int, mask_id: int, padded_vocab_size: int | None = None
) -> dict[str, Tensor]:
    """Give an AR model a mask embedding: the mean of its token embeddings.

    The row of the mask token was never an input: it holds noise, or what the softmax pushed it to. The mean says "some
    token": it has the scale and the common direction of the embeddings, and where nothing else is known, the mean is
    the input with the least summed squared distance to all tokens. (AR models adapted to diffusion: arXiv 2410.17891.)

    Where the head has its own matrix, the row of the mask token becomes that of the padding: it is never a label, and the
    AR model has already learned to give such rows no probability.

    Args:
        tensors: full canonical tensors [padded vocabulary, hidden] of the AR model, fp32.
        vocab_size: tokens before padding; the mean runs over these rows, without the mask row.
        mask_id: row of the mask token.
        padded_vocab_size: rows of the new model; default: as many as there are, or as the mask token needs.

    Returns:
        A new dict; only the vocabulary tensors are copies.

    Raises:
        UserError: the vocabulary or the mask token does not fit the rows.
    """
    embedding = tensors["word_embeddings.weight"]
    rows = embedding.shape[0]
    wanted = padded_vocab_size or max(rows, mask_id + 1)
    require(
        0 < vocab_size <= rows and 0 <= mask_id < wanted and wanted >= rows,
        f"vocabulary {vocab_size}, mask token {mask_id}, {rows} rows in the checkpoint and {wanted} in the new model",
        "the rows must hold the vocabulary and the mask token, and none may be lost",
        "change --mask-token-id or --padded-vocab-size",
    )
    out = dict(tensors)
    tokens = torch.ones(vocab_size, dtype=torch.bool)
    if mask_id < vocab_size:
        tokens[mask_id] = False
    mean = embedding[:vocab_size][tokens].double().mean(dim=0).to(embedding.dtype)
    out["word_embeddings.weight"] = _grown(embedding, wanted, mean)
    out["word_embeddings.weight"][mask_id] = mean
    if "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"]
        unused = head[vocab_size:].mean(dim=0) if rows > vocab_size else torch.zeros_like(head[0])
        out["lm_head.weight"] = _grown(head, wanted, unused)
        if mask_id >= vocab_size:
            out["lm_head.weight"][mask_id] = unused
    return out


def _grown(matrix: Tensor, rows: int, value: Tensor) -> Tensor:
    """Return a copy of [n, hidden] with ``rows`` rows, new ones set to ``value`` [hidden]."""
    grown = value.repeat(rows, 1)
    grown[: matrix.shape[0]] = matrix
    return grown
