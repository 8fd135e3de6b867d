"""A trained model ready for inference: from a checkpoint of any layout, or from a Hugging Face export."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron.checkpoint.files import MANIFEST
from megatron.checkpoint.select import select
from megatron.checkpoint.tensors import open_whole_model
from megatron.config.schema import WEIGHT, Config
from megatron.config.shape import Shape
from megatron.data.identity import check_tokenizer
from megatron.data.tokenizer import NullTokenizer, Tokenizer, build_tokenizer
from megatron.errors import UserError, require
from megatron.inference.blocks import BlockModel
from megatron.inference.decoder import CachedDecoder
from megatron.inference.ensemble import MixedModel, ensemble, members_of
from megatron.inference.logits import LogitsFn, at_tokens
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import BlockDiffusion
from megatron.objectives import Objective, build_objective
from megatron.objectives.base import BlockDecoding, CausalDecoding, MaskedDecoding
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import shard_of
from megatron.parallel.tensor import ParameterFactory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class InferenceModel:
    """Model, tokenizer and what evaluation and generation ask about them.

    Attributes:
        model: in evaluation mode, on its device; of an ensemble the mean of its members.
        config: of the run that trained it.
        objective: in its evaluation form: says under which attention mask the model computes and how it is decoded.
        other: another such form that the weights were trained for, too.
        tokenizer: None where none is known (scoring of token ids still works).
        tokenizer_problem: why there is none.
        members, weights: of an ensemble; else empty.
        context: this process; a model may be split over tensor-parallel ranks.
        source: what was loaded, for people.
        identity: hash of the loaded checkpoint, for caches.
    """

    model: GPTModel | MixedModel
    config: Config
    objective: Objective
    tokenizer: Tokenizer | None
    context: ParallelContext
    source: str
    identity: str
    tokenizer_problem: str = ""
    other: Objective | None = None
    members: tuple[InferenceModel, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def parts(self) -> tuple[InferenceModel, ...]:
        """The members of an ensemble, else the model itself."""
        return self.members or (self,)

    @property
    def beside(self) -> InferenceModel | None:
        """The same weights under the other form; None where there is none."""
        if self.other is None:
            return None
        members = tuple(own.beside or own for own in self.members)
        return dataclasses.replace(self, objective=self.other, other=self.objective, members=members)

    def decoded(self, decoding: str) -> InferenceModel:
        """The same weights, ``"causal"`` or ``"masked"``, where they were trained for both; else the model as it is."""
        is_causal = decoding == "causal"
        return self.beside if self.beside is not None and self.is_causal != is_causal else self

    @property
    def max_length(self) -> int:
        """Longest input in tokens: the sequence length of training."""
        return self.config.model.seq_length

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def is_causal(self) -> bool:
        """Whether this is autoregressive."""
        return isinstance(self.objective.decoding, CausalDecoding)

    @property
    def is_masked(self) -> bool:
        """Whether this is masked diffusion, of whole sequences or of blocks."""
        return isinstance(self.objective.decoding, MaskedDecoding | BlockDecoding)

    @property
    def block_size(self) -> int | None:
        """Tokens of a block, which sees the blocks before it and nothing behind; None: a sequence is no row of blocks."""
        return self.objective.decoding.block_size if isinstance(self.objective.decoding, BlockDecoding) else None

    @property
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            UserError: the model has none.
        """
        if not isinstance(self.objective.decoding, MaskedDecoding | BlockDecoding):
            raise UserError(
                f"{self.source} is {'a causal' if self.is_causal else 'another'} model ({self.config.objective.objective})",
                "only masked diffusion has a mask token",
                "use megatron_ar, --eval_method ar, or load another checkpoint",
            )
        return self.objective.decoding.mask_token_id

    def require_whole_sequences(self) -> None:
        """Check that masked diffusion is of whole sequences.

        Raises:
            UserError: a causal model, or a model of blocks.
        """
        require(
            self.block_size is None,
            f"{self.source} is a model of blocks ({self.config.objective.objective})",
            "this measures masked diffusion of whole sequences",
            "load another checkpoint; megatron likelihood and megatron eval score models of blocks",
        )
        _ = self.mask_id

    @property
    def unused_ids(self) -> list[int]:
        """Rows of the padded vocabulary that are no token of the tokenizer (the mask token among them)."""
        used = self.tokenizer.vocab_size if self.tokenizer is not None else self.config.data.vocab_size
        return [] if used is None else list(range(used, self.config.model.padded_vocab_size or 0))

    def logits(
        self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None, clean: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of all positions, or of some (a ``LogitsFn``); of a model of blocks, of each block given those before it of
        ``clean``, or of ``input_ids`` themselves (a ``BlockLogitsFn``)."""
        if self.block_size is not None:
            return self._blocks(input_ids, positions=positions, clean=clean)
        shift = 0 if self.is_causal else self.objective.decoding.shift
        return at_tokens(self._rows, shift)(input_ids, positions=positions)

    def _rows(self, input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.logits(Inputs(input_ids), self.objective.attention_mask, positions=positions)

    def filling(self) -> LogitsFn:
        """The model for one batch of rows that is filled: of a model of blocks, one that remembers finished blocks."""
        return self.logits if self.block_size is None else self._blocks.filling()

    @property
    def _blocks(self) -> BlockModel:
        assert isinstance(self.objective.attention_mask, BlockDiffusion)
        return BlockModel(self.model, self.objective.attention_mask, mask_id=self.mask_id)

    def decoder(self) -> CachedDecoder:
        """A fresh key/value cache around the model."""
        return CachedDecoder(self.model)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(
                f"no tokenizer for {self.source} ({self.tokenizer_problem})",
                "text needs the one that the model was trained with",
                "pass --vocab-file and --merge-file, or --tokenizer-model",
            )
        return self.tokenizer


def load_model(
    path: str | Path,
    *,
    tag: str | None = None,
    kind: str | None = None,
    dtype: str = "float32",
    context: ParallelContext | None = None,
    tokenizer_options: dict[str, Any] | None = None,
) -> InferenceModel:
    """Load a run, one tag of it, a Hugging Face export (a folder with config.json), or several of them as one.

    Args:
        path: run directory, tag directory or export; ``RUN+RUN`` or ``0.7*RUN+0.3*RUN``: an ensemble of them.
        tag: such as ``global_step100`` or ``latest``; default: the newest tag that verifies.
        kind: of the weights: ``weight`` (as trained) or ``ema`` (their average); default: as trained, and of the tag ``best``
            those that were validated as the best.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        context: this process; every tensor-parallel rank keeps its share. The checkpoint's own layout does not matter.
        tokenizer_options: fields of DataConfig (vocab_file, merge_file, tokenizer_model, tokenizer_type) that replace
            those of the run.

    Raises:
        UserError: nothing to load there, a damaged checkpoint, one without such weights, an unknown dtype, or an ensemble of
            models that do not fit.
    """
    context = context or ParallelContext.create()
    parts = members_of(path)
    if len(parts) > 1:
        how: dict[str, Any] = {"tag": tag, "kind": kind, "dtype": dtype, "context": context,
                               "tokenizer_options": tokenizer_options}  # fmt: skip
        weights = [own.weight for own in parts if own.weight is not None]
        return ensemble([load_model(own.path, **how) for own in parts], weights or None)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}", f"a model runs in one of {', '.join(DTYPES)}", "choose one of them")
    path = Path(parts[0].path)
    is_export = (path / "config.json").is_file() and not (path / MANIFEST).is_file()
    stored = _open_export(path, tag, kind) if is_export else _open_checkpoint(path, tag, kind, context)
    config, source, identity = stored.config, stored.source, stored.identity
    tokenizer, problem = _tokenizer(stored, tokenizer_options or {})
    trained = build_objective(config)
    objective = trained.for_eval()
    model = GPTModel(Shape.of(config.model), ParameterFactory(context))
    _load_tensors(model, stored.tensor_of, context)
    model = model.to(device=context.device, dtype=DTYPES[dtype]).eval()
    told = (tokenizer, context, source, identity + dtype, problem)
    return InferenceModel(model, config, objective, *told, other=trained.beside)


class _Stored(NamedTuple):
    """Weights on disk: their configuration, each tensor by its canonical name, what they are called, a hash of them, and what is
    recorded of their tokenizer."""

    config: Config
    tensor_of: Callable[[str], torch.Tensor]
    source: str
    identity: str
    tokenizer: Mapping[str, Any]


def _open_export(path: Path, tag: str | None, kind: str | None) -> _Stored:
    from megatron.wiring import read_foreign

    is_one = f"{path} is an export and --load-tag is {tag}"
    require(tag is None, is_one, "an export is one checkpoint", "drop --load-tag")
    is_whole = f"{path} is an export and --load-kind is {kind}"
    require(kind in (None, WEIGHT), is_whole, "an export has one set of weights", "drop --load-kind")
    config, tensors = read_foreign(path)
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted(path.iterdir())]
    return _Stored(config, tensors.__getitem__, str(path), _hash("\n".join(stamps).encode()), {})


def _open_checkpoint(path: Path, tag: str | None, kind: str | None, context: ParallelContext) -> _Stored:
    found = select(path, tag)
    if found.tag is None:
        raise UserError(
            f"{path} holds no checkpoint", "a run has global_stepN folders, an export config.json", "correct --load"
        )
    if found.warning and context.is_first_rank:
        print(found.warning, flush=True)
    reader = open_whole_model(found.tag, kind := kind or found.weights)
    source, identity = str(found.tag), _hash((found.tag / MANIFEST).read_bytes())
    if kind != WEIGHT:
        source, identity = f"{source} (averaged weights)", f"{identity}{kind}"
    return _Stored(reader.config, reader.tensor, source, identity, reader.manifest.get("tokenizer") or {})


def _load_tensors(model: GPTModel, tensor_of: Any, context: ParallelContext) -> None:
    for parameter in model.parameters():
        whole = shard_of(parameter)
        parameter.data.copy_(whole.spec.shard(tensor_of(whole.name), context.tp.rank, context.tp.size))


@torch.no_grad()
def load_tensors(model: GPTModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy this rank's tensors, by the name of the whole one, into the parameters.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    own = model.tensors()
    differing = sorted(own.keys() ^ tensors.keys())
    differing += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if differing:
        raise UserError(
            f"the tensors {', '.join(differing[:8])} are not those of the model",
            "every parameter has one tensor of its shape",
            "check the configuration and the source",
        )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def _tokenizer(stored: _Stored, options: dict[str, Any]) -> tuple[Tokenizer | None, str]:
    """The tokenizer of the options, else of the run; None and the reason where the run's cannot be built here."""
    config, data, recorded = stored.config, stored.config.data, stored.tokenizer
    if options:  # another tokenizer replaces the run's altogether
        fresh = dict.fromkeys(("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model", "vocab_size"))
        data, recorded = dataclasses.replace(data, **{**fresh, **options}), {}
    try:
        tokenizer = build_tokenizer(data)
        check_tokenizer(tokenizer, recorded)
    except (ValueError, OSError) as error:
        if options:
            raise
        return None, str(error)
    if isinstance(tokenizer, NullTokenizer):
        return None, "the data were tokenised before they came here"
    rows = config.model.padded_vocab_size
    if rows is not None and tokenizer.vocab_size > rows:
        problem = f"{tokenizer.name} has {tokenizer.vocab_size:,} ids and the model rows for {rows:,}"
        require(not options, problem, "text needs the tokenizer that the model was trained with", "name that one")
        return None, problem
    return tokenizer, ""


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
