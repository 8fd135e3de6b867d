"""Continuing from a checkpoint: which one, what changed since, and whose weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.files import MANIFEST, checkpoint_tags, damaged_files, find_checkpoint
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.warm_start import AutoregressiveStart
from megatron.config import config_to_dict
from megatron.config.schema import Config
from megatron.errors import UserError
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import named_seed

# Settings that may change between save and load, but make it another run than the one that was saved.
WATCHED = {
    "run": ("seed", "global_batch_size", "train_samples"),
    "model": ("seq_length", "attention_dropout", "hidden_dropout"),
}


def agree_on_checkpoint(config: Config, context: ParallelContext) -> Path | None:
    """The checkpoint that ``--load`` means, or None to start fresh; a collective call.

    Without ``--load-tag`` it is the newest one whose files match their manifest. The ranks share the reading.

    Raises:
        ValueError: there are checkpoints, but none can be used.
    """
    load, tag = config.run.load, config.run.load_tag
    if load is None:
        return None
    if tag is not None or (Path(load) / MANIFEST).is_file():
        named = find_checkpoint(Path(load), tag, checksums=False)[0]
        candidates = [] if named is None else [named]
    else:
        candidates = checkpoint_tags(Path(load))
    complaints: list[str] = []
    for candidate in candidates:
        own = list(damaged_files(candidate, part=context.rank, parts=context.world_size))
        found = [complaint for part in context.gather_objects(own) for complaint in part]
        if not found:
            if complaints and context.is_first_rank:
                print(f"warning: skipped damaged checkpoints: {'; '.join(complaints)}", flush=True)
            return candidate
        complaints.append(f"{candidate.name} ({', '.join(found)})")
    if complaints:
        raise UserError(
            f"no checkpoint in {load} can be used: {'; '.join(complaints)}",
            "files must match their manifest",
            "restore them or choose another --load",
        )
    return None


def changed_settings(config: Config, saved: dict[str, Any]) -> list[str]:
    """What differs from the saved configuration among the settings that make a run what it is."""
    now = config_to_dict(config)
    return [
        f"{name} {saved[section][name]} → {now[section][name]}"
        for section, names in WATCHED.items()
        for name in names
        if name in saved.get(section, {}) and saved[section][name] != now[section][name]
    ]


def noise_config(config: Config, *, loaded: bool, consumed_samples: int) -> Config:
    """The configuration with the seed of noise and dropout: another one after ``--no-load-rng``."""
    if not (config.run.no_load_rng and loaded):
        return config
    seed = named_seed(config.run.seed, f"reloaded at {consumed_samples}")
    return replace(config, run=replace(config.run, seed=seed))


def open_checkpoint(tag: Path, config: Config, *, vocab_size: int) -> CheckpointReader | AutoregressiveStart:
    """The checkpoint itself, or with a mask token where masked diffusion starts from a model that never used one."""
    reader = CheckpointReader(tag)
    mask_id, padded = config.objective.mask_token_id, config.model.padded_vocab_size
    was_masked = reader.config.objective.mask_token_id is not None
    if not config.run.finetune or was_masked or mask_id is None or padded is None:
        return reader
    return AutoregressiveStart(reader, vocab_size=vocab_size, mask_id=mask_id, padded_vocab_size=padded)
