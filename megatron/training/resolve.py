"""Flags → Plan: what only data, tokenizer and checkpoint can tell. Reads each once; runs before any process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from megatron.checkpoint.files import check_use
from megatron.checkpoint.select import Selection, select
from megatron.config import config_to_dict
from megatron.config.schema import EXACT_COUNT, NOISE_SCHEME, UNRECORDED, WEIGHT, Config, RunConfig, affects
from megatron.config.shape import ARCHITECTURE, Shape, padded_size
from megatron.config.validate import idle_notes
from megatron.data.blend import data_paths, parse_blend
from megatron.data.dataset import count_unique_tokens
from megatron.data.identity import (
    check_apart,
    check_vocabulary,
    data_fingerprint,
    tokenizer_fingerprint,
    verify_data,
    with_absolute_paths,
)
from megatron.data.indexed import read_meta
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import require
from megatron.objectives import build_objective, needs_mask_token, with_vocabulary
from megatron.objectives.base import is_exact
from megatron.parallel.launch import Launch
from megatron.randomness import named_seed
from megatron.runs.record import Branch, branch_of, holds_run
from megatron.screen import say
from megatron.training.deepspeed.settings import read_settings_file
from megatron.training.plan import Layout, Plan, Schedule, Seeds, Sources, Start, Vocabulary, origins_of
from megatron.training.schedule import plan_schedule

BRANCH = "megatron.training.branch"
# How earlier versions recorded flags that were not given.
UNSET_BEFORE = {"low_noise_iter": 0, "low_noise_ratio": 1.0, "dual_decoding": "ar"}


def resolve(
    flags: Config,
    launch: Launch,
    *,
    run_name: str,
    origins: Mapping[str, str] | None = None,
    is_rehearsal: bool = False,
) -> Plan:
    """Decide everything that is still open; check data, checkpoint and run directory.

    Args:
        flags: from :func:`megatron.config.parse`.
        launch: this process.
        run_name: folder under ``runs/`` for a run without ``--save``.
        origins: where each flag that was given comes from.
        is_rehearsal: nothing is written, so the run directory may hold one.

    Raises:
        UserError: what was given, the rule, the fix.
    """
    if (path := flags.parallel.deepspeed_config) is not None:
        read_settings_file(Path(path), bf16=flags.run.bf16)
    given, is_first = flags, launch.is_first_rank and not is_rehearsal
    if is_branch := flags.run.branch_from is not None:
        flags, is_branch = import_module(BRANCH).placed(flags, is_first=is_first)
    sources = _sources(flags, launch)
    vocabulary = _vocabulary(flags, sources, launch)
    manifest = (selection := _selection(flags)).manifest
    saved = manifest.get("config", {"model": {}, "objective": {}})
    shape = shape_of(flags, vocabulary.size, saved["model"])
    _check_objective(flags, saved["objective"].get("objective"))
    mask_id = mask_row(flags, vocabulary.size, shape.padded_vocab_size, manifest)
    layout = layout_of(flags, launch.world_size)
    before = {} if flags.run.finetune else manifest
    if not (before or flags.run.skip_train or flags.data.allow_training_data_in_validation):
        check_apart(sources.fingerprints["train"], sources.fingerprints["valid"])
    branch = import_module(BRANCH).begun(selection) if is_branch else branch_of(before)
    schedule = plan_schedule(flags, layout, unique_tokens=sources.unique_tokens, before=before, branch=branch)
    run_dir = _run_dir(flags, selection, run_name, is_first=is_first and not is_branch)
    seeds = _seeds(flags, before)
    settings = replace(
        flags,
        data=with_absolute_paths(flags.data, train=sources.train, valid=sources.valid),
        model=shape.recorded(),
        objective=with_vocabulary(flags.objective, mask_id, size=vocabulary.size, padded=shape.padded_vocab_size),
        optimizer=schedule.optimizer,
        run=_run(given.run, before, layout, schedule, branch),
    )
    noisy = replace(settings, run=replace(settings.run, seed=seeds.noise))  # another one after --no-load-rng
    objective, notes = build_objective(noisy, scheme=seeds.scheme), idle_notes(flags)
    if is_exact(objective.for_eval()):
        notes += ["--num-mc (an exact likelihood has one draw)"] * (flags.run.num_mc > 1)
        notes += ["--valid-estimator (an exact likelihood has no masks)"] * bool(flags.run.valid_estimator)
    start = _start(flags, settings, sources, selection, branch)
    parts = (settings, shape, layout, schedule, seeds, objective, start, sources, vocabulary, run_dir, tuple(notes))
    return Plan(*parts, origins_of(flags, settings, given=origins or {}))


def _start(flags: Config, settings: Config, sources: Sources, selection: Selection, branch: Branch | None) -> Start:
    """Where the run begins; ``settings`` are recorded, ``flags`` have the place to load from."""
    run, tag, manifest = flags.run, selection.tag, selection.manifest
    is_continued = bool(manifest) and not run.finetune
    goes_on = is_continued and not run.skip_train
    weights = WEIGHT if goes_on else run.load_kind or selection.weights
    if tag is not None:
        check_use(tag, manifest, weights, goes_on=goes_on)
    start = Start(
        tag=tag,
        place=None if run.load is None else (Path(run.load), run.load_tag),
        manifest=manifest,
        warning=selection.warning,
        is_continued=is_continued,
        with_optimizer=goes_on and not run.no_load_optim,
        branch=branch,
        weights=weights,
        changed={},
    )
    before, is_branching = manifest if is_continued else {}, start.is_branching
    start = replace(start, changed=_agreed_changes(settings, sources, before, is_branching=is_branching))
    return import_module(BRANCH).checked(start, settings) if is_branching else start


def _sources(flags: Config, launch: Launch) -> Sources:
    run, train, valid = flags.run, data_paths(flags.data, "train"), data_paths(flags.data, "valid")
    require(
        train or run.skip_train,
        "no training data",
        "a run needs a prefix of .bin/.idx files",
        "pass --train-data-path or --train-data-path-file (tools/preprocess_data.py makes them)",
    )
    require(
        valid or not run.skip_train,
        "--skip-train without validation data",
        "validation needs data",
        "pass --valid-data-path",
    )
    blends = {"train": train, "valid": valid}
    # Files that are damaged show it now, those of validation too, and not after hours.
    num_tokens = {name: count_unique_tokens(paths) for name, paths in blends.items()}
    is_writer = launch.is_first_rank  # of run.json; the digest of a long .idx takes seconds
    fingerprints = {name: data_fingerprint(paths) if paths and is_writer else [] for name, paths in blends.items()}
    return Sources(tuple(train), tuple(valid), num_tokens["train"], fingerprints)


def _vocabulary(flags: Config, sources: Sources, launch: Launch) -> Vocabulary:
    """By the tokenizer's flags, else by what the data record."""
    data, fingerprint = flags.data, None
    named = data.tokenizer_type or data.vocab_file or data.merge_file or data.tokenizer_model
    if named and data.tokenizer_type != "NullTokenizer":
        tokenizer = build_tokenizer(data)
        size, fingerprint = tokenizer.vocab_size, tokenizer_fingerprint(tokenizer)
    elif data.vocab_size is not None:
        size = data.vocab_size
    else:
        metas = [read_meta(prefix) or {} for _, prefix in parse_blend(sources.train or sources.valid)]
        sizes = {meta["vocab_size"] for meta in metas if meta.get("vocab_size")}
        fingerprint = next((meta["tokenizer_fingerprint"] for meta in metas if "tokenizer_fingerprint" in meta), None)
        require(
            len(sizes) == 1,
            f"the vocabulary is unknown (the data record {sorted(sizes) or 'none'})",
            "embedding and mask id depend on it",
            "pass --vocab-file and --merge-file, --tokenizer-model, or --tokenizer-type NullTokenizer --vocab-size N",
        )
        size = sizes.pop()
    own = [fingerprint] if named and fingerprint else []
    check_vocabulary(sources.train, sources.valid, vocab_size=size, fingerprints=own)
    if data.verify_data and launch.local_rank == 0:  # each machine may have a copy of its own
        verify_data(sources.train, sources.valid, say=say)
    return Vocabulary(size, {"vocab_size": size, "fingerprint": fingerprint})


def _selection(flags: Config) -> Selection:
    """The checkpoint that ``--load`` means, judged by sizes alone: checksums are read by all ranks together, later."""
    run = flags.run
    if run.load is None:
        return Selection()
    load = Path(run.load)
    may_be_fresh = run.save is not None and _same(load, Path(run.save)) and not (run.finetune or run.skip_train)
    selection = select(load, run.load_tag, checksums=False) if may_be_fresh or load.exists() else Selection()
    require(
        may_be_fresh or selection.tag is not None,
        f"--load {load} {'holds no checkpoint' if load.exists() else 'does not exist'}",
        "a run starts fresh only where --load and --save are one folder",
        "correct the path, or drop --load",
    )
    return selection


def _same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()


def shape_of(flags: Config, vocab_size: int, saved: dict[str, Any]) -> Shape:
    """The shape of the flags, which must be that of the checkpoint (``saved``, empty without one)."""
    model, tp = flags.model, flags.parallel.tensor_model_parallel_size
    rows = partial(padded_size, multiple=model.make_vocab_size_divisible_by, tp_size=tp)
    padded = model.padded_vocab_size or saved.get("padded_vocab_size") or rows(vocab_size)
    if saved and flags.run.finetune and model.padded_vocab_size is None and needs_mask_token(flags.objective.objective):
        padded = max(padded, rows(vocab_size + 1))  # room for the mask token
    require(
        padded >= vocab_size,
        f"the padded vocabulary {padded} is below the vocabulary {vocab_size}",
        "every token needs a row",
        "raise --padded-vocab-size or use the tokenizer of the checkpoint",
    )
    require(
        padded % tp == 0,
        f"the padded vocabulary {padded} is not divisible by tensor-parallel size {tp}",
        "every rank holds an equal share",
        "choose another --tensor-model-parallel-size",
    )
    shape = Shape.from_flags(model, padded_vocab_size=padded)
    differing = [name for name in ARCHITECTURE if name in saved and saved[name] != getattr(shape, name)]
    require(
        not differing,
        f"{flags.run.load} is a checkpoint of another architecture: "
        + ", ".join(f"{name} {saved[name]} (here {getattr(shape, name)})" for name in differing),
        "both must be equal",
        "pass --use-checkpoint-args or the checkpoint's model flags, or name another checkpoint",
    )
    return shape


def _check_objective(flags: Config, saved: str | None) -> None:
    own, is_evaluation = flags.objective.objective, flags.run.skip_train
    require(
        saved in (None, own) or (flags.run.finetune and not is_evaluation),
        f"{flags.run.load} is a checkpoint of objective {saved}, this run "
        f"{'evaluates' if is_evaluation else 'trains'} {own}",
        "what a model was trained for decides what its loss means",
        f"pass --objective {saved}" + ", or --finetune to start a new run from its weights" * (not is_evaluation),
    )


def mask_row(flags: Config, vocab_size: int, padded: int, manifest: dict[str, Any]) -> int | None:
    """Row of the mask token: the flag's, else the one that the checkpoint was trained with, else the first padding row."""
    if not needs_mask_token(flags.objective.objective):
        return None
    saved = manifest["config"]["objective"].get("mask_token_id") if manifest else None
    candidates = (flags.objective.mask_token_id, saved, vocab_size)
    mask_id = next(candidate for candidate in candidates if candidate is not None)
    was_token = mask_id < (manifest.get("tokenizer", {}).get("vocab_size") or mask_id + 1)
    require(
        mask_id != saved or was_token or mask_id >= vocab_size or flags.objective.mask_token_id is not None,
        f"the mask id {mask_id} of the checkpoint is a token of this vocabulary of {vocab_size}",
        "the mask has a row of its own",
        f"pass --mask-token-id {vocab_size}, or the tokenizer of the checkpoint",
    )
    require(
        0 <= mask_id < padded,
        f"the mask id {mask_id} has no row in the padded vocabulary of {padded} (vocabulary {vocab_size})",
        "masked tokens need an embedding",
        f"pass --padded-vocab-size {padded + 128} or --mask-token-id of an unused token",
    )
    return mask_id


def layout_of(flags: Config, world: int) -> Layout:
    """The axes of so many processes, and the batch."""
    parallel, run = flags.parallel, flags.run
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = max(1, world // (tp * pp))
    batch = run.global_batch_size or run.micro_batch_size * dp
    return Layout(world, tp, pp, dp, run.micro_batch_size, batch, parallel.zero_stage, parallel.engine)


def _seeds(flags: Config, manifest: dict[str, Any]) -> Seeds:
    """A continued run keeps its noise, also the other one that it drew after an earlier ``--no-load-rng``."""
    seed = flags.run.seed
    noise = manifest.get("noise_seed", seed)
    if manifest and flags.run.no_load_rng:
        noise = named_seed(seed, f"reloaded at {manifest['consumed_samples']}")
    given = flags.run.noise_scheme
    scheme = manifest.get("noise_scheme", 1) if manifest else given or NOISE_SCHEME
    require(
        given in (None, scheme),
        f"--noise-scheme {given} in a run that draws by scheme {scheme}",
        "a run keeps the noise that it began with",
        "drop it, or start a new run from the weights with --finetune",
    )
    return Seeds(seed, noise, scheme)


def _run(
    run: RunConfig, manifest: dict[str, Any], layout: Layout, schedule: Schedule, branch: Branch | None
) -> RunConfig:
    """The flags of the run with what became of them. A continued run keeps its own estimator; evaluations and new runs take
    that of lowest variance."""
    own = EXACT_COUNT
    if manifest and not run.skip_train:
        own = {**UNRECORDED["run"], **manifest["config"].get("run", {})}["valid_estimator"]
    return replace(
        run,
        valid_estimator=run.valid_estimator or own,
        global_batch_size=layout.global_batch_size,
        train_samples=schedule.train_samples,
        branch_from=None if branch is None else f"{branch.run}:{branch.tag}",
    )


def _run_dir(flags: Config, selection: Selection, run_name: str, *, is_first: bool) -> Path:
    """Where the run writes. An evaluation writes beside the run that it judges."""
    run = flags.run
    if run.skip_train and run.save is None and selection.tag is not None and run.load is not None:
        is_tag = selection.tag.resolve() == Path(run.load).resolve()
        return Path(run.load).resolve().parent if is_tag else Path(run.load)
    run_dir = Path(run.save) if run.save else Path("runs") / run_name
    is_own = run.load is not None and _same(Path(run.load), run_dir)
    require(
        not (run.finetune and is_own),
        f"--finetune with one folder {run_dir} for --load and --save",
        "it starts a new run, and a run directory belongs to one run",
        "choose another --save, or drop --finetune to continue",
    )
    require(
        run.load is None or not run.overwrite or not Path(run.load).resolve().is_relative_to(run_dir.resolve()),
        f"--overwrite of {run_dir} with a checkpoint of {run.load}",
        "what is replaced is deleted first, and nothing could be loaded",
        "choose another --save, or drop --overwrite",
    )
    require(
        not is_first or run.skip_train or run.overwrite or is_own or not holds_run(run_dir),
        f"--save {run_dir} holds a run already",
        "a run directory belongs to one run",
        f"pass --load {run_dir} to continue it, --overwrite to replace it, or another --save",
    )
    return run_dir


def _agreed_changes(
    settings: Config, sources: Sources, manifest: dict[str, Any], *, is_branching: bool
) -> dict[str, tuple[Any, Any, str]]:
    """Settings that differ from those at the checkpoint; what changes results only where it was asked for."""
    if not manifest or settings.run.skip_train:
        return {}
    changed = changed_settings(manifest["config"], settings) | changed_data(manifest, sources)
    kinds = ("results",) if is_branching else ("results", "schedule")
    refused = [f"{name} {before} → {now}" for name, (before, now, affects) in changed.items() if affects in kinds]
    where = f"--branch-from {settings.run.branch_from}" if is_branching else f"--load {settings.run.load}"
    require(
        settings.run.change_settings or not refused,
        f"{where} was trained with other settings: {', '.join(refused)}",
        "a run keeps the settings that make its numbers what they are",
        "pass the run's own, or --change-settings, which records the step from which the new ones hold",
    )
    return changed


def changed_data(record: Mapping[str, Any], sources: Sources) -> dict[str, tuple[Any, Any, str]]:
    """Data that are not those of a record or a manifest, by content, as :func:`changed_settings` says it."""
    changed: dict[str, tuple[Any, Any, str]] = {}
    for name, kind in (("train", "results"), ("valid", "validation")):
        parts = record.get("data", {}).get(name, []), sources.fingerprints[name]
        keys = ["idx_sha256", *(["bin_sample"] if all("bin_sample" in part for part in chain(*parts)) else [])]
        before, now = ([_content(part, keys) for part in each] for each in parts)
        if before and now and before != now:  # by content: where the files lie does not matter
            changed[f"data.{name}"] = (before, now, kind)
    return changed


def _content(part: dict[str, Any], keys: list[str]) -> str:
    """What a part of the data is, wherever it lies."""
    return f"{part['weight']:.6g} x {part['tokens']:,} tokens ({' '.join(part[key][:12] for key in keys)})"


def changed_settings(before: dict[str, Any], now: Config) -> dict[str, tuple[Any, Any, str]]:
    """Settings that differ, ``section.name`` → (before, now, what they affect); output and layout are passed over.

    Args:
        before: ``config`` of a run record or manifest, of this version or an earlier one.
        now: settings of this attempt.
    """
    found = {}
    for section, values in config_to_dict(now).items():
        saved = {**UNRECORDED.get(section, {}), **before.get(section, {})}
        for name in values.keys() & saved.keys():
            unset = (None, UNSET_BEFORE.get(name))
            is_same = saved[name] == values[name] or (saved[name] in unset and values[name] in unset)
            kind = affects(section, name)
            if kind in ("results", "schedule", "length", "validation") and not is_same:
                found[f"{section}.{name}"] = (saved[name], values[name], kind)
    return dict(sorted(found.items()))
