"""Start a masked-diffusion model from an autoregressive one: same tensors, full attention, a mask token to learn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def with_mask_embedding(
    tensors: Mapping[str, Tensor], *, vocab_size: int, mask_id: int, padded_vocab_size: int | None = None
) -> dict[str, Tensor]:
    """Give an AR model a mask embedding: the mean of its token embeddings.

    The row of the mask token was never an input: it holds noise, or what the softmax pushed it to. The mean says "some
    token": it has the scale and the common direction of the embeddings, and where nothing else is known, the mean is
    the input with the least summed squared distance to all tokens. (AR models adapted to diffusion: arXiv 2410.17891.)

    Where the head has its own matrix, the row of the mask token becomes that of the padding: it is never a label, and
    the
    AR model has already learned to give such rows no probability.

    Args:
        tensors: full canonical tensors [padded vocabulary, hidden] of the AR model, fp32.
        vocab_size: tokens before padding; the mean runs over these rows, without the mask row.
        mask_id: row of the mask token.
        padded_vocab_size: rows of the new model; default: as many as there are, or as the mask token needs.

    Returns:
        A new dict; only the vocabulary tensors are copies.

    Raises:
        ValueError: the vocabulary or the mask token does not fit the rows.
    """
    embedding = tensors["word_embeddings.weight"]
    rows = embedding.shape[0]
    wanted = padded_vocab_size or max(rows, mask_id + 1)
    if not (0 < vocab_size <= rows and 0 <= mask_id < wanted and wanted >= rows):
        raise ValueError(
            f"vocabulary {vocab_size}, mask token {mask_id}, {rows} rows in the checkpoint and {wanted} in the new "
            "model; the rows must hold the vocabulary and the mask token, and none may be lost; change --mask-token-id "
            "or --padded-vocab-size"
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
