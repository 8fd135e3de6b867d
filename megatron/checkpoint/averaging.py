"""The mean of several checkpoints of one architecture: the last ones of a run (LAWA, arXiv 2209.14981), or of runs with other
seeds, data orders or settings (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.files import AVERAGE_UPDATES, AVERAGED_FROM, SEAL, complaints
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import newest_first, select
from megatron.checkpoint.tensors import open_whole_model
from megatron.config.schema import Config
from megatron.config.shape import ARCHITECTURE
from megatron.errors import require


def last_checkpoints(source: Path, *, count: int | None, tag: str | None = None) -> list[Path]:
    """Checkpoints of one source, oldest first, their files verified.

    Args:
        source: run directory, or one tag of it.
        count: the last so many of the run; None: the one that ``--load`` and ``tag`` would mean.
        tag: name of a tag, or "best".

    Raises:
        UserError: there are fewer, or one of them is damaged.
    """
    if count is None:
        found = select(source, tag)
        require(
            found.tag is not None, f"{source} holds no checkpoint", "an average needs some", "give a run or a tag of it"
        )
        assert found.tag is not None
        return [found.tag]
    known = [(path, manifest) for path, manifest in newest_first(source) if manifest is not None]
    own = [path for path, manifest in known if manifest.get("run_id") == known[0][1].get("run_id")]
    require(
        len(own) >= count,
        f"{source} holds {len(own)} checkpoints and --last asks for {count}",
        "all of them are averaged",
        "ask for fewer, or train with --save-interval and without --keep-last",
    )
    damaged = [f"{path.name} ({', '.join(reasons)})" for path in own[:count] if (reasons := [*complaints(path)])]
    require(
        not damaged,
        f"{source}: {', '.join(damaged)}",
        "none may be missing from the mean",
        "name the others one by one",
    )
    return own[count - 1 :: -1]


def mean_of(tags: Sequence[Path], weights: str) -> tuple[Config, dict[str, torch.Tensor], dict[str, Any]]:
    """Average checkpoints; of each, one tensor is in memory at a time.

    Args:
        tags: folders of checkpoints of any layouts.
        weights: kind that is averaged, as trained or each run's own average.

    Returns:
        Configuration of the last one; whole tensors, fp32, summed in fp64; and fields for the manifest: the position of the
        last one, its tokenizer, and what was averaged.

    Raises:
        UserError: one is named twice, or they are no models of one kind; every difference is named.
    """
    twice = [
        str(tag) for number, tag in enumerate(tags) if tag.resolve() in [other.resolve() for other in tags[:number]]
    ]
    require(not twice, f"{', '.join(twice)} given twice", "a mean counts each checkpoint once", "name it once")
    readers = [open_whole_model(tag, weights) for tag in tags]
    last = readers[-1]
    differing = [
        f"{reader.path} has {name} {before}, {last.path} {now}"
        for reader in readers[:-1]
        for name, before, now in _differences(reader, last)
    ]
    require(not differing, "; ".join(differing), "weights are averaged over models of one kind", "leave the others out")
    means = {
        name: torch.stack([reader.tensor(name).double() for reader in readers]).mean(dim=0).float()
        for name in last.specs
    }
    kept = ("consumed_samples", "tokens", "tokens_before", "epochs_before", "unique_tokens", "tokenizer", "data")
    position = {name: last.manifest[name] for name in kept if name in last.manifest}
    return last.config, means, {**position, AVERAGED_FROM: [_provenance(reader) for reader in readers]}


def _differences(one: CheckpointReader, other: CheckpointReader) -> Iterator[tuple[str, Any, Any]]:
    """What keeps two models apart, as (name, value, other value)."""

    def traits(reader: CheckpointReader) -> dict[str, Any]:
        model, objective = reader.config.model, reader.config.objective
        return {
            **{name: getattr(model, name) for name in (*ARCHITECTURE, "padded_vocab_size", "seq_length")},
            "objective": objective.objective,
            "mask_token_id": objective.mask_token_id,
            "tokenizer": (reader.manifest.get("tokenizer") or {}).get("fingerprint"),
        }

    mine, theirs = traits(one), traits(other)
    for name in mine:
        is_unknown = name == "tokenizer" and None in (mine[name], theirs[name])  # earlier versions did not record each
        if mine[name] != theirs[name] and not is_unknown:
            yield name, mine[name], theirs[name]


def _provenance(reader: CheckpointReader) -> dict[str, Any]:
    """What one of the averaged checkpoints is, wherever it lies later."""
    names = ("run_id", "step", "consumed_samples", AVERAGE_UPDATES, SEAL)
    known = {name: reader.manifest[name] for name in names if name in reader.manifest}
    return {"path": str(reader.path), "weights": reader.weights, **known}
