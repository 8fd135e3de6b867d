"""The flags behind a record: what run.json and checkpoints record, with what follows from the rest left open again.

So that a run can be repeated with a change: another ``--train-iters`` moves the end of the decay, which is recorded as a
number, and another ``--hidden-size`` the feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron.config.cli import Registry, config_from_dict
from megatron.config.option import default_of, flag_of, idle_options
from megatron.config.schema import EXACT_COUNT, NOISE_SCHEME, UNRECORDED, Config, ModelConfig
from megatron.config.shape import Shape, padded_size
from megatron.errors import UserError, require

# Sizes that may follow from the others; those that follow from most of them first.
SIZES = (
    *("ffn_hidden_size", "kv_channels", "num_query_groups", "max_position_embeddings"),
    *("num_attention_heads", "hidden_size", "num_layers"),
)
ONE_FOLDER = {"overwrite": False, "change_settings": False, "kill_switch_file": None, "tensorboard_dir": None}
RULE = "a record is what a run of this project wrote"


def repeated(record: Mapping[str, Any], path: Path, registry: Registry) -> tuple[dict[str, Any], list[str]]:
    """The flags that repeat a run from its first step.

    Args:
        record: the object in its run.json.
        path: of that file: the run's own folder, where a repetition is refused, is the one that it lies in.
        registry: objectives by name.

    Returns:
        Every flag's value by name, and lines to be said at start.

    Raises:
        UserError: it is no record, or one of a version with other settings.
    """
    require(isinstance(record.get("objective"), str), f"{path} is no record of a run", RULE, "pass its run.json")
    try:
        sections = _sections(record["config"])
        config, attempts = config_from_dict(sections), record.get("attempts") or []
        run = config.run
        is_resumable = run.load is None or (run.save is not None and Path(run.load) == Path(run.save))
        first = attempts[0] if attempts and not is_resumable else {}
        tag = first.get("from_tag")
        left = [(name, getattr(run, name)) for name, off in ONE_FOLDER.items() if getattr(run, name) != off]
        scheme = record.get("noise_scheme", 1)
        run = replace(
            run,
            save=None if run.save is None else str(path.parent),
            load=None if is_resumable else run.load,
            load_tag=None if is_resumable else run.load_tag or (Path(tag).name if tag else None),
            noise_scheme=run.noise_scheme if scheme == NOISE_SCHEME else scheme,
        )
        told = ", ".join(f"{flag_of(name)} {value}" for name, value in left)
        lines = [f"{path}: not taken over: {told}"] if left else []
        for attempt in attempts:
            for name, (before, now, *_) in (attempt.get("changed") or {}).items():
                step = f"; from step {attempt['from_step']} on the run had {now}"
                lines.append(f"{path}: {name} is {before}, with which the run began{step}")
        flags = flags_of({**record, "config": {**sections, "run": asdict(run)}}, registry)
        return {**flags, **ONE_FOLDER}, lines  # last: what has an effect only with one of them is kept for another one
    except UserError as error:
        raise UserError(f"{path}: {error.given}", error.rule, error.fix) from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        problem = f"{path} is damaged ({type(error).__name__}: {error})"
        raise UserError(problem, RULE, "pass the run.json of another run") from error


def _sections(config: Mapping[str, Any]) -> dict[str, Any]:
    odd = [name for name, section in config.items() if not isinstance(section, Mapping)]
    require(not odd, f"no settings under {', '.join(odd)}", RULE, "pass the run.json of another run")
    return {**config, "run": {**UNRECORDED["run"], **config["run"]}}


def flags_of(record: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Every flag's value by name: those of ``config`` in a record or a manifest, without what follows from the rest, what
    has no effect, and options of other objectives.

    Raises:
        UserError: fields that this version does not know.
    """
    config = config_from_dict(dict(record["config"]))
    size = (record.get("tokenizer") or {}).get("vocab_size") or config.data.vocab_size
    is_fresh = config.run.load is None and config.run.branch_from is None  # else a checkpoint has a say
    objective = config.objective
    if is_fresh and objective.mask_token_id == size:
        objective = replace(objective, mask_token_id=None)
    require(
        objective.objective in registry,
        f"the objective {objective.objective!r}",
        f"an objective is one of {', '.join(registry)}",
        "load it with the version that wrote it",
    )
    cls = registry[str(objective.objective)].Options
    given = {item: objective.options[item.name] for item in fields(cls) if item.name in objective.options}
    follows = {item for item, value in given.items() if is_fresh and item.metadata["follows"] and value == size}
    options = cls(**{item.name: value for item, value in given.items() if item not in follows})
    rows = padded_size(size, multiple=config.model.make_vocab_size_divisible_by, tp_size=_tp(config)) if size else None
    config = _with_open_run(replace(config, objective=objective), record)
    model = _with_open_sizes(config.model)
    if is_fresh and model.padded_vocab_size == rows:
        model = replace(model, padded_vocab_size=None)
    named: dict[str, Any] = {name: [] for name in _listed(config)}  # by files
    data = replace(config.data, **named)
    parts = [model, config.objective, options, data, config.optimizer, config.parallel, config.run]
    values = [(item, getattr(part, item.name)) for part in parts for item in fields(part) if item.metadata]
    idle = {item.name for item, _ in idle_options(values) if not item.metadata["no_effect"]}
    return {item.name: default_of(item) if item.name in idle else value for item, value in values}


def _tp(config: Config) -> int:
    return config.parallel.tensor_model_parallel_size


def _listed(config: Config) -> list[str]:
    return [f"{kind}_data_path" for kind in ("train", "valid") if getattr(config.data, f"{kind}_data_path_file")]


def _with_open_sizes(model: ModelConfig) -> ModelConfig:
    shape = Shape.of(model)
    for name in SIZES:
        nothing: dict[str, Any] = {name: None}
        candidate = replace(model, **nothing)
        with suppress(UserError):  # nothing else gives this size
            if Shape.from_flags(candidate, padded_vocab_size=shape.padded_vocab_size) == shape:
                model = candidate
    return model


def _with_open_run(config: Config, record: Mapping[str, Any]) -> Config:
    run, optimizer, unique_tokens = config.run, config.optimizer, record.get("unique_tokens") or 0
    follows = {(run.train_iters or 0) * (run.global_batch_size or 0)}
    if run.train_epochs is not None:
        follows = {round(run.train_epochs * unique_tokens / config.model.seq_length)}
    left_at = (record.get("branch") or {}).get("samples")
    if left_at is not None and optimizer.lr_wsd_decay_samples == (optimizer.lr_decay_samples or 0) - left_at:
        optimizer = replace(optimizer, lr_wsd_decay_samples=None)  # all that the branch trains
    if optimizer.lr_decay_samples == run.train_samples:
        optimizer = replace(optimizer, lr_decay_samples=None)
    if optimizer.lr_warmup_fraction is not None:
        optimizer = replace(optimizer, lr_warmup_samples=0)
    if run.load is None and run.valid_estimator == EXACT_COUNT:
        run = replace(run, valid_estimator=None)
    if run.train_samples in follows:
        run = replace(run, train_samples=None)
    return replace(config, run=run, optimizer=optimizer)
