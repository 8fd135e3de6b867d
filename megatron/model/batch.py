"""What goes into the model and what travels through it. Imports no torch: objectives fill these with numpy arrays, the
loader turns them into tensors, and because all are named tuples, pinning memory and pipelines take them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from typing_extensions import NamedTuple  # generic before Python 3.11, too

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array")  # np.ndarray in the loader's workers, torch.Tensor from there on
Other = TypeVar("Other")


class Samples(NamedTuple):
    """What an objective gets: samples of the training stream.

    Attributes:
        tokens: [batch, seq + 1] int64.
        ids: [batch] int64, index of each sample in the whole stream; all noise is a function of it.
        loss_mask: [batch, seq + 1] bool, False for tokens that have no loss as inputs; None: all have.
        segment_ids: [batch, seq + 1] int64, ascending from 0: tokens of other segments are never seen; None: one segment.
        position_ids: [batch, seq + 1] int64, place of each token in its document; None: in the sample.
    """

    tokens: np.ndarray
    ids: np.ndarray
    loss_mask: np.ndarray | None = None
    segment_ids: np.ndarray | None = None
    position_ids: np.ndarray | None = None


class Inputs(NamedTuple, Generic[Array]):
    """What the first layer is given.

    Attributes:
        input_ids: [batch, width] int64.
        position_ids: [batch, width] int64, or None for 0 … width − 1.
        sample_ids: [batch] int64, for masks that differ between samples.
        segment_ids: [batch, width] int64, for masks within segments; None: one segment.
        is_causal: [batch] int64, 1 for samples that see nothing behind a token, for masks that ask it; None: they do not.
    """

    input_ids: Array
    position_ids: Array | None = None
    sample_ids: Array | None = None
    segment_ids: Array | None = None
    is_causal: Array | None = None


class Targets(NamedTuple, Generic[Array]):
    """What the loss is given.

    Attributes:
        labels: [batch, width] int64.
        loss_weights: [batch, width] fp32; 0 means that the position is not in the loss.
        positions: [n] int64, indices into batch·width of the positions with a weight, made on the CPU so that the device is
            not asked how many there are.
        num_tokens: [batch] fp32, tokens of each sample that could be in the loss; their sum divides the loss.
        noised: [batch, width] int64, what stands in the input for each label, and
        odds: [batch, width] fp32, V · visible share / noised share of each: of a loss that depends on them; None: not.
    """

    labels: Array
    loss_weights: Array
    positions: Array
    num_tokens: Array
    noised: Array | None = None
    odds: Array | None = None

    def flat(self) -> Targets[Array]:
        """What belongs to the positions in the loss, [n] each."""
        names = ("labels", "loss_weights", "noised", "odds")
        there = {name: part for name in names if (part := getattr(self, name)) is not None}
        return self._replace(**{name: part.reshape(-1)[self.positions] for name, part in there.items()})


class ModelBatch(NamedTuple, Generic[Array]):
    """One micro-batch, prepared by an objective; also the (inputs, labels) of a pipeline."""

    inputs: Inputs[Array]
    targets: Targets[Array]

    def map(self, change: Callable[[Array], Other]) -> ModelBatch[Other]:
        """The batch with every array changed; what is absent stays absent."""
        inputs, targets = ([None if array is None else change(array) for array in part] for part in self)
        return ModelBatch(Inputs(*inputs), Targets(*targets))  # type: ignore[arg-type]


class Stream(NamedTuple):
    """What travels from layer to layer and from stage to stage.

    Attributes:
        hidden: [batch, width, hidden].
        position_ids, sample_ids, segment_ids, is_causal: as in :class:`Inputs`.
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    is_causal: torch.Tensor | None = None


def build_batch(
    inputs: Inputs[np.ndarray], *, labels: np.ndarray, loss_weights: np.ndarray, has_loss: np.ndarray | None = None
) -> ModelBatch[np.ndarray]:
    """Complete a batch: the positions in the loss are counted here, on the CPU.

    Args:
        inputs: see :class:`Inputs`; inputs past the labels (a clean copy of the tokens) are in no loss.
        labels: [batch, seq] int64.
        loss_weights: [batch, seq].
        has_loss: [batch, seq] bool, where a loss is allowed at all; None: everywhere.
    """
    batch, seq = labels.shape
    num_tokens = np.full(batch, seq) if has_loss is None else has_loss.sum(axis=1)
    weights = loss_weights if has_loss is None else loss_weights * has_loss
    padding = ((0, 0), (0, inputs.input_ids.shape[1] - seq))
    labels, weights = np.pad(labels, padding), np.pad(weights.astype(np.float32), padding)
    return ModelBatch(inputs, Targets(labels, weights, weights.reshape(-1).nonzero()[0], num_tokens.astype(np.float32)))


def second_view(first: ModelBatch[np.ndarray], second: ModelBatch[np.ndarray]) -> ModelBatch[np.ndarray]:
    """One micro-batch of two views of the same samples, the rows of ``second`` after those of ``first``: its losses are added,
    and its tokens are not counted again."""
    inputs = (_rows(*pair) for pair in zip(first.inputs, second.inputs))
    positions = np.concatenate((first.targets.positions, first.targets.labels.size + second.targets.positions))
    targets = Targets(*(_rows(*pair) for pair in zip(first.targets, second.targets)))  # type: ignore[arg-type]
    counted = _rows(first.targets.num_tokens, np.zeros_like(second.targets.num_tokens))
    assert counted is not None
    return ModelBatch(Inputs(*inputs), targets._replace(positions=positions, num_tokens=counted))  # type: ignore[arg-type]


def _rows(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate((first, second))


def places_in_documents(segment_ids: np.ndarray) -> np.ndarray:
    """Positions that begin again at 0 with every segment, int64 [batch, seq + 1].

    Args:
        segment_ids: [batch, seq + 1] segment of each token; those of one stand together.
    """
    places = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    is_first = np.diff(segment_ids, axis=1, prepend=-1) != 0
    return places - np.maximum.accumulate(np.where(is_first, places, 0), axis=1)
