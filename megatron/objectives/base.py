"""The seam between data, objective and model. Nothing here, and no objective, imports torch.

Preparation runs in the data loader's workers, on numpy arrays, without collectives. What an objective is made of:
a batch (:class:`ModelBatch`), an attention mask, a kind of loss, and the way its model is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from megatron.config.schema import EXACT_COUNT, NOISE_SCHEME
from megatron.config.shape import Shape
from megatron.model.arithmetic import model_flops_per_token, positions_per_token
from megatron.model.batch import ModelBatch, Samples
from megatron.model.loss import LossKind
from megatron.model.mask import AttentionMask

# What a loss may be called. The mean over noise of a bound is an upper bound on the negative log-likelihood.
EXACT = "NLL (exact)"
BOUND = "NLL bound"
NO_BOUND = "not a likelihood bound"


@dataclass(frozen=True)
class CausalDecoding:
    """The model gives the next token, left to right.

    Attributes:
        shift: how far behind its position the token lies that a row of logits is about.
    """

    shift: ClassVar[int] = 1


@dataclass(frozen=True)
class MaskedDecoding:
    """The model fills masked tokens of a whole sequence, in any order.

    Attributes:
        mask_token_id: id of a token that is not there yet.
        shift: as in :class:`CausalDecoding`; 0: a masked token is predicted where it stands.
    """

    mask_token_id: int
    shift: int = 0


@dataclass(frozen=True)
class BlockDecoding:
    """The model fills the masked tokens of one block, given the blocks before it.

    Attributes:
        mask_token_id: id of a token that is not there yet.
        block_size: tokens per block.
    """

    mask_token_id: int
    block_size: int
    shift: ClassVar[int] = 0


@dataclass(frozen=True)
class UniformDecoding:
    """The model tells tokens from noise in a whole sequence: any of its tokens may be wrong.

    Attributes:
        vocab_size: tokens that noise is drawn from, ids 0 … V − 1.
    """

    vocab_size: int
    shift: ClassVar[int] = 0


# What samplers, scorers and exporters ask of an objective.
Decoding = CausalDecoding | MaskedDecoding | BlockDecoding | UniformDecoding


class Setting(NamedTuple):
    """What an objective needs to know of its run.

    Attributes:
        seed: of the noise.
        global_batch_size: samples in a step, for stratified times.
        seq_length: tokens per sample.
        mask_token_id: id that replaces a masked token; None where the objective masks none.
        scheme: of the noise, :data:`megatron.config.schema.NOISE_SCHEME`.
        valid_estimator: how a bound is estimated in validation, ``EXACT_COUNT`` or ``BERNOULLI`` of config.schema.
        padded_vocab_size: rows of the embedding; None: not known yet.
    """

    seed: int
    global_batch_size: int
    seq_length: int
    mask_token_id: int | None = None
    scheme: int = NOISE_SCHEME
    valid_estimator: str = EXACT_COUNT
    padded_vocab_size: int | None = None


@dataclass(frozen=True)
class NoOptions:
    """An objective without flags of its own."""


class Objective(Protocol):
    """What is predicted from what.

    Attributes:
        needs_mask_token: whether the vocabulary must have room for a mask token.
        Options: a frozen dataclass of ``option(...)``: its flags, with their ranges and help.
    """

    needs_mask_token: ClassVar[bool]
    Options: ClassVar[type]

    @property
    def num_views(self) -> int:
        """Rows of a batch for every sample of it, each with as many positions (for FLOP counts)."""

    @property
    def beside(self) -> Objective | None:
        """Another objective in its evaluation form for which the same weights are validated, too; None: there is none."""

    @property
    def attention_mask(self) -> AttentionMask:
        """Which keys a query sees: all that the model knows of the objective."""

    @property
    def loss(self) -> LossKind:
        """From predictions to a loss."""

    @property
    def decoding(self) -> Decoding:
        """How its model is sampled and scored."""

    @property
    def label(self) -> str:
        """What its loss may be called: :data:`EXACT`, :data:`BOUND` or :data:`NO_BOUND`."""

    @property
    def loss_fraction(self) -> float:
        """Expected share of tokens in the loss, of all views together (for FLOP counts)."""

    @classmethod
    def build(cls, options: object, setting: Setting) -> Objective:
        """The objective of a run.

        Args:
            options: its ``Options``.
            setting: the rest of the run.

        Raises:
            UserError: the options do not fit each other or the run.
        """

    def prepare(self, samples: Samples) -> ModelBatch[np.ndarray]:
        """Make a batch; all noise is a function of (seed, sample id)."""

    def token_weights(self, sample_ids: np.ndarray, seq_length: int) -> np.ndarray:
        """What each token counts in this draw of the noise, [batch, seq]; 1 in the mean over draws of evaluation."""

    def for_eval(self, draw: int = 0, num_draws: int = 1) -> Objective:
        """The same objective with evaluation settings: no training-only noise, a fixed seed.

        Args:
            draw: which of the noise draws this is.
            num_draws: how many there are; they are averaged with equal weights, and what one has for noise may depend on
                all of them (times spread over them, pairs of complementary masks).
        """


def flops_per_token(shape: Shape, objective: Objective) -> float:
    """FLOPs of a training step per token of data, see :func:`megatron.model.arithmetic.model_flops_per_token`."""
    share, views = objective.loss_fraction, objective.num_views
    return model_flops_per_token(shape, mask=objective.attention_mask, loss_fraction=share, num_views=views)


def computed_positions(objective: Objective) -> int:
    """Positions that the transformer computes in training per token of data: of every view, and of both copies of a sequence."""
    return objective.num_views * positions_per_token(objective.attention_mask)


def compute_per_token(parameters: int, objective: Objective) -> float:
    """C/D of C = 6·N·D in FLOPs (Kaplan et al., arXiv 2001.08361), D being tokens of data; a token that is computed twice counts
    twice."""
    return 6.0 * parameters * computed_positions(objective)


def head_in_blocks(shape: Shape, objective: Objective) -> float:
    """FLOPs of the head (the output matrix, at the positions in the loss) over those of one block."""
    head = 6 * shape.padded_vocab_size * shape.hidden_size * objective.loss_fraction
    return head * shape.num_layers / (flops_per_token(shape, objective) - head)


def is_exact(objective: Objective) -> bool:
    """Whether the loss is a likelihood, not a bound on one."""
    return objective.label == EXACT


def first_tokens(array: np.ndarray | None) -> np.ndarray | None:
    """What belongs to the first seq of seq + 1 tokens: inputs of all objectives, labels of diffusion."""
    return None if array is None else array[:, :-1]
