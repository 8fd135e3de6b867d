"""Who is judged together, and on what: models by the names that a table gives them, and the samples that all of them score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from megatron.checkpoint.select import select
from megatron.data.dataset import build_dataset
from megatron.data.identity import check_vocabulary, tokenizer_fingerprint
from megatron.errors import UserError, require
from megatron.evaluation.court import Samples
from megatron.inference.ensemble import ensemble, members_of
from megatron.inference.model import InferenceModel, load_model
from megatron.parallel.context import ParallelContext
from megatron.randomness import VALIDATION_SEED


def load_models(
    expressions: Sequence[str], *, tag: str | None, kind: str | None = None, context: ParallelContext
) -> dict[str, InferenceModel]:
    """Models and ensembles by name; a run that is a part of several ensembles is in memory once.

    Args:
        expressions: what :func:`megatron.inference.model.load_model` takes.
        tag: checkpoint of all runs; None: the best by validation where it is kept, else the newest.
        kind: of the weights; see :func:`megatron.inference.model.load_model`.
        context: this process.

    Raises:
        UserError: nothing to load there, or models that cannot be compared.
    """

    @cache
    def loaded(path: str) -> InferenceModel:
        return load_model(path, tag=tag or best_tag(Path(path)), kind=kind, context=context)

    parts = {expression: members_of(expression) for expression in dict.fromkeys(expressions)}
    names = ["+".join(Path(own.path).absolute().name for own in members) for members in parts.values()]
    models = {}
    for (expression, members), name in zip(parts.items(), names):
        own = [loaded(member.path) for member in members]
        weights = [member.weight for member in members if member.weight is not None]
        model = own[0] if len(own) == 1 else ensemble(own, weights or None)
        shown = name if names.count(name) == 1 else expression
        for form in filter(None, (model, model.beside)):  # of a dual model both
            way = "AR" if form.is_causal else "masked diffusion"
            models[shown if model.beside is None else f"{shown} as {way}"] = form
    _check_comparable(models)
    return models


def _check_comparable(models: dict[str, InferenceModel]) -> None:
    lengths = {name: model.max_length for name, model in models.items()}
    require(
        len(set(lengths.values())) == 1,
        ", ".join(f"{name} has samples of {length} tokens" for name, length in lengths.items()),
        "likelihoods are compared on the same samples",
        "name models of one sequence length",
    )
    masks = {model.mask_id for model in models.values() if model.is_masked}
    makers = {
        name: tokenizer_fingerprint(model.tokenizer, without=masks) for name, model in models.items() if model.tokenizer
    }
    require(
        len(set(makers.values())) <= 1,
        f"{', '.join(makers)} have different tokenizers",
        "likelihoods are compared on the same tokens",
        "name models of one tokenizer",
    )


def best_tag(path: Path) -> str | None:
    """The tag of the best validation where it is kept; else None, the newest."""
    try:
        return "best" if select(path, "best", checksums=False).tag is not None else None
    except UserError:
        return None


def open_samples(
    models: dict[str, InferenceModel],
    paths: Sequence[str],
    *,
    number: int | None,
    cache_path: str | None,
    name: str = "valid",
    is_spread: bool = False,
) -> Samples:
    """Samples of a data set, in the order of a validation.

    Args:
        models: by name, of one sequence length; their tokenizer must be that of the data.
        paths: one prefix or a blend; where there are none, the validation set that the first model was trained with.
        number: of samples, the first ones; None: all.
        cache_path: folder of index maps; None: beside the data.
        name: what the samples are for; only part of the name of that folder.
        is_spread: take them evenly from the whole set instead, which may be a blend, part after part.

    Raises:
        UserError: no data, or data of another tokenizer.
    """
    first = next(iter(models.values()))
    paths = paths or list(first.config.data.valid_data_path or [])
    if not paths:
        raise UserError(
            f"no --valid-data-path, and {first.source} was trained without one",
            "likelihoods are of text that no model has seen",
            "pass --valid-data-path PREFIX",
        )
    for model in models.values():
        rows = (model.config.model.padded_vocab_size or 0) - len(model.unused_ids)
        masks = (model.mask_id,) if model.is_masked else ()  # an export adds that token, which the data need not know
        makers = [tokenizer_fingerprint(model.tokenizer, without=ids) for ids in ((), masks) if model.tokenizer]
        check_vocabulary(paths, vocab_size=rows, fingerprints=makers)

    every = build_dataset(
        paths, num_samples=None, seq_length=first.max_length, seed=VALIDATION_SEED, name=name, cache_path=cache_path
    )
    count = min(number or len(every), len(every))
    indices = [place * len(every) // count for place in range(count)] if is_spread else range(count)
    return Samples.of(every, indices, seq_length=first.max_length)
