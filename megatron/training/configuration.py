"""``--dump-config``, and what ``--config RUN/run.json`` and ``--use-checkpoint-args`` ask of data and checkpoints.

Imported only where one of these flags is given.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import yaml

import megatron
from megatron.checkpoint.select import select
from megatron.config import config_to_dict, values_of
from megatron.config.document import read_document
from megatron.config.schema import Config
from megatron.errors import UserError, require
from megatron.files import replace_file
from megatron.objectives import parse
from megatron.parallel.launch import Launch
from megatron.screen import say
from megatron.training.deepspeed.settings import read_settings_file
from megatron.training.plan import Plan
from megatron.training.resolve import changed_data, resolve

CHECKPOINT = "checkpoint "  # before its tag: the origin of what it says


def recorded(load: str, tag: str | None) -> dict[str, Any]:
    """The manifest of the checkpoint that ``--load`` and ``--load-tag`` mean, and its ``name``.

    Raises:
        UserError: there is none.
    """
    found = select(load, tag, checksums=False)
    if found.tag is None:
        given = f"--use-checkpoint-args: --load {load} holds no checkpoint"
        rule, fix = "shape and tokenizer are those of a checkpoint", "correct --load, or drop --use-checkpoint-args"
        raise UserError(given, rule, fix)
    return {**found.manifest, "name": CHECKPOINT + found.tag.name}


def dump(objective: str, words: Sequence[str], launch: Launch) -> int:
    """Print every setting of the run that a command line means, or write it to a file; nothing else is written.

    Args:
        objective: objective when ``--objective`` is absent.
        words: the command line.
        launch: this process; the first one alone prints.

    Returns:
        Exit status.

    Raises:
        UserError: as at the start of the run, but for a run directory that holds a run.
    """
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--dump-config", "--dump_config", nargs="?", const="-")
    options, rest = chooser.parse_known_args(words)
    place = options.dump_config
    given, fix = f"--dump-config {place}", "give another name"
    require(place and not isdir(place), f"{given} is no name of a file", "the settings are written to a file", fix)
    require(not isfile(place), f"{given}: there is such a file", "nothing is replaced", fix)
    origins: dict[str, str] = {}
    notes: list[str] = []
    told = {"world_size": launch.world_size, "origins": origins, "recorded": recorded, "notes": notes}
    flags = parse(rest, objective=objective, **told)
    plan = resolve(flags, launch, run_name="RUN", origins=origins, is_rehearsal=True)
    if launch.is_first_rank:
        text = "\n".join([*document(flags, plan), ""])
        if place == "-":
            say(text.rstrip())
        else:
            replace_file(place, text)
        for line in [*notes, *([] if place == "-" else [f"wrote {place}"])]:
            say(line, to_errors=True)
    return 0


def document(flags: Config, plan: Plan) -> Iterator[str]:
    """Yield the lines of a configuration file that gives the same plan.

    What the flags leave open, and the plan fills in, is a comment: it follows from the rest again.

    Args:
        flags: as given.
        plan: what became of them.
    """
    layout, given, default = plan.layout, values_of(flags), values_of(Config())
    yield f"# Every setting, by megatron-mdm {megatron.__version__}. --config FILE starts the same run; settings in"
    yield "# comments follow from the others."
    yield f"# Processes (environment): {layout.world_size} = tp {layout.tp_size} x pp {layout.pp_size} x dp {layout.dp_size}"
    for section, values in config_to_dict(plan.settings).items():
        yield f"{section}:"
        for name, value in values.items():
            is_open = name in default and given[name] == default[name] and value != given[name]
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
            line = f"  {'# ' * is_open}{name}: {text.removesuffix('...' + chr(10)).strip()}"
            yield f"{line:<44}  # {plan.origins.get(name, 'default')}"
        if section == "parallel" and flags.parallel.deepspeed_config is not None:
            settings = read_settings_file(Path(flags.parallel.deepspeed_config), bf16=flags.run.bf16)
            yield from (f"  # {flags.parallel.deepspeed_config}: {name} {value}" for name, value in settings.items())


def check_contents(plan: Plan) -> None:
    """Refuse data that are no longer those of the run that is repeated (``--config RUN/run.json``), and another tokenizer
    than that of the checkpoint (``--use-checkpoint-args``): names may stand for something else by now.

    Raises:
        UserError: what was read, and what is there now.
    """
    before, now = (
        each.get("fingerprint") for each in (plan.start.manifest.get("tokenizer", {}), plan.vocabulary.tokenizer)
    )
    is_of_checkpoint = any(source.startswith(CHECKPOINT) for source in plan.origins.values())
    require(
        not is_of_checkpoint or before is None or now in (None, before),
        f"the tokenizer of this run ({now}) is not that of --load {plan.settings.run.load} ({before})",
        "a token means what it meant to the model",
        "name the tokenizer of the checkpoint, or drop --use-checkpoint-args",
    )
    for kind in ("train", "valid"):
        source = next((plan.origins[name] for name in _places(kind) if name in plan.origins), "")
        record = read_document(Path(source))[1] if isfile(source) else None
        changed = changed_data(record or {}, plan.sources).get(f"data.{kind}")
        if changed is not None:
            before, now = (" and ".join(parts) for parts in changed[:2])
            raise UserError(
                f"{source} repeats a run on {before}; at that place is now {now}",
                "a repetition reads the same data",
                f"pass --{kind}-data-path to read what is there now",
            )


def _places(kind: str) -> tuple[str, str]:
    return f"{kind}_data_path_file", f"{kind}_data_path"
