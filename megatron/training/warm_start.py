"""Start masked diffusion from an autoregressive checkpoint (``pretrain_mdm.py --finetune --load AR_RUN``).

Every tensor is taken over, attention becomes bidirectional through the objective, and the embedding of the mask token,
which the autoregressive model never read, starts as the mean of the token embeddings.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.convert.start import with_mask_embedding
from megatron.training.checkpoint import CheckpointReader, Fragment, fill_from_full

VOCABULARY_TENSORS = ("word_embeddings.weight", "lm_head.weight")


class AutoregressiveStart:
    """A :class:`CheckpointReader` of an autoregressive run that has a mask token.

    Attributes:
        specs: of the new model; the vocabulary may have more rows than the checkpoint.
    """

    def __init__(self, reader: CheckpointReader, *, vocab_size: int, mask_id: int, padded_vocab_size: int) -> None:
        """Args:
        reader: the autoregressive checkpoint.
        vocab_size: vocabulary before padding.
        mask_id: id of the mask token.
        padded_vocab_size: rows of the new model.
        """
        self._reader = reader
        self.path, self.manifest = reader.path, reader.manifest
        own = {name: reader.tensor(name) for name in VOCABULARY_TENSORS if name in reader.specs}
        self._changed = with_mask_embedding(
            own, vocab_size=vocab_size, mask_id=mask_id, padded_vocab_size=padded_vocab_size
        )
        self.specs = dict(reader.specs)
        for name, tensor in self._changed.items():
            self.specs[name] = replace(self.specs[name], full_shape=tuple(tensor.shape), blocks=(padded_vocab_size,))

    def read(self, fragment: Fragment) -> None:
        """Fill a fragment of the weights; there is no optimizer state to continue."""
        if fragment.name in self._changed:
            fill_from_full(fragment, self._changed[fragment.name], self.specs[fragment.name])
        else:
            self._reader.read(fragment)
