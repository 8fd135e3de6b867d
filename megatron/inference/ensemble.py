"""Several models as one: the weighted mean of their probabilities, of the same shape or of different ones.

``p(x | z) = Σ_k w_k · p_k(x | z)``: of causal models a causal model, of denoisers a denoiser, so that samplers, scorers, exact
values and bounds need to know nothing of it. All members are in memory at once and are asked one after another. Each p_k is over
all rows of the vocabulary; who closes some of them (the mask, padding) closes them in the mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron.data.identity import tokenizer_fingerprint
from megatron.errors import UserError, require
from megatron.model.attention import LayerCache
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import AttentionMask

if TYPE_CHECKING:
    from megatron.inference.model import InferenceModel

_WEIGHTED = re.compile(r"(\d+\.?\d*(?:e-?\d+)?|\.\d+(?:e-?\d+)?)\*(.+)")


class Member(NamedTuple):
    """One of ``RUN+RUN``: where it is, and its weight; None: all have the same."""

    path: str
    weight: float | None = None


def members_of(expression: str | Path) -> list[Member]:
    """What ``RUN``, ``RUN+RUN`` or ``0.7*RUN+0.3*RUN`` names; a path that exists is one run, whatever it is called.

    Raises:
        UserError: an empty part, weights for some only, or a weight that is no positive number.
    """
    text = str(expression)
    if Path(text).exists() or ("+" not in text and _WEIGHTED.fullmatch(text) is None):
        return [Member(text)]
    parts = text.split("+")
    found = [_member(part.strip()) for part in parts]
    is_right = all(own.path for own in found) and len({own.weight is None for own in found}) == 1
    require(
        is_right and all(own.weight is None or 0 < own.weight < math.inf for own in found),
        f"the ensemble {text}",
        "it is RUN+RUN, or with positive weights, one for each, 0.7*RUN+0.3*RUN",
        "correct it; a run whose name has a + in it cannot be a part",
    )
    return found


def _member(text: str) -> Member:
    weighted = _WEIGHTED.fullmatch(text)
    return Member(text) if weighted is None else Member(weighted[2], float(weighted[1]))


class MixedModel(nn.Module):
    """The mean of models, where a :class:`GPTModel` is asked for logits.

    Args:
        members: at least one, on one device.
        weights: positive; they are divided by their sum.
    """

    def __init__(self, members: Sequence[GPTModel], weights: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        total = math.fsum(weights)
        self.log_weights = [math.log(weight / total) for weight in weights]

    @property
    def layers(self) -> list[nn.Module]:
        """Blocks of all members, each with a cache of its own."""
        return [layer for member, _ in self._with_caches(None) for layer in member.layers]

    def logits(
        self,
        inputs: Inputs[torch.Tensor],
        mask: AttentionMask,
        *,
        positions: torch.Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """``log Σ_k w_k · softmax(logits_k)``, at least fp32; arguments and shape of :meth:`GPTModel.logits`."""
        mean: torch.Tensor | None = None
        for (member, own), weight in zip(self._with_caches(caches), self.log_weights):
            logits = member.logits(inputs, mask, positions=positions, caches=own)
            logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1) + weight
            mean = logprobs if mean is None else torch.logaddexp(*_as_wide(mean, logprobs))
        assert mean is not None
        return mean

    def hidden_states(
        self, inputs: Inputs[torch.Tensor], mask: AttentionMask, caches: Sequence[LayerCache] | None = None
    ) -> torch.Tensor:
        """Those of all members, [batch, seq, Σ hidden]; see :meth:`GPTModel.hidden_states`."""
        return torch.cat([m.hidden_states(inputs, mask, own) for m, own in self._with_caches(caches)], dim=-1)

    def _with_caches(
        self, caches: Sequence[LayerCache] | None
    ) -> Iterator[tuple[GPTModel, Sequence[LayerCache] | None]]:
        """The members, each with those of the caches that are its own."""
        start = 0
        for member in self.members:
            assert isinstance(member, GPTModel)
            stop = start + len(member.layers)
            yield member, None if caches is None else caches[start:stop]
            start = stop


def _as_wide(one: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    """Two of log-probabilities over vocabularies that differ in their padding; a row that a model lacks it never predicts."""
    widest = max(one.shape[-1], other.shape[-1])
    return [F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in (one, other)]


def ensemble(members: Sequence[InferenceModel], weights: Sequence[float] | None = None) -> InferenceModel:
    """Loaded models as one, which share their memory with it.

    Args:
        members: at least one, of one kind, sequence length and tokenizer.
        weights: positive; they are divided by their sum; None: all the same.

    Raises:
        UserError: models whose probabilities are of different things.
    """
    _check_alike(members)
    total = math.fsum(weights or [1.0] * len(members))
    shares = [weight / total for weight in weights or [1.0] * len(members)]
    models = [part for own in members if isinstance(part := own.model, GPTModel)]
    assert len(models) == len(members) == len(shares), "an ensemble is made of single models, each with a weight"
    first = next((own for own in members if own.tokenizer is not None), members[0])
    rows = max(own.config.model.padded_vocab_size or 0 for own in members)
    config = dataclasses.replace(first.config, model=dataclasses.replace(first.config.model, padded_vocab_size=rows))
    names = [own.source if weights is None else f"{share:.6g}*{own.source}" for share, own in zip(shares, members)]
    other = first.other if all(own.other is not None for own in members) else None
    identity = hashlib.sha256(repr([(share, own.identity) for share, own in zip(shares, members)]).encode())
    return dataclasses.replace(
        first, model=MixedModel(models, shares), config=config, source="+".join(names),
        identity=identity.hexdigest()[:16], members=tuple(members), weights=tuple(shares), other=other,
    )  # fmt: skip


def _check_alike(members: Sequence[InferenceModel]) -> None:
    """Refuse what has no common probabilities to average."""

    def require_same(what: str, values: Sequence[object], shown: Sequence[object]) -> None:
        require(
            len(set(values)) <= 1,
            ", ".join(f"{own.source} has {value}" for own, value in zip(members, shown)),
            f"an ensemble averages probabilities of the same tokens given the same text: {what}",
            "name runs that agree in it",
        )

    kinds = [repr((own.objective.decoding, own.objective.attention_mask)) for own in members]
    names = [f"the objective {own.config.objective.objective} with {own.objective.decoding}" for own in members]
    require_same("one kind of model (causal; masked, with one mask and shift; blocks of one size)", kinds, names)
    lengths = [own.max_length for own in members]
    require_same("one sequence length", lengths, [f"samples of {length} tokens" for length in lengths])
    sizes = [(own.config.model.padded_vocab_size or 0) - len(own.unused_ids) for own in members]
    require_same("one tokenizer", sizes, [f"{size} tokens" for size in sizes])
    masks = {own.mask_id for own in members if own.is_masked}
    known = [own for own in members if own.tokenizer is not None]
    prints = [tokenizer_fingerprint(own.tokenizer, without=masks) for own in known if own.tokenizer is not None]
    if len(set(prints)) > 1:
        raise UserError(
            f"{', '.join(own.source for own in known)} have different tokenizers",
            "an ensemble averages probabilities of the same tokens",
            "name runs of one tokenizer",
        )
