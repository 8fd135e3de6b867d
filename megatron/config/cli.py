"""Command line ↔ flags. The parser is generated from the schema, so help, defaults and run.json cannot disagree."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, fields, replace
from importlib import import_module
from os.path import expanduser
from typing import Any, ClassVar, Protocol

from megatron.config.option import check_range, default_of, spelling
from megatron.config.parser import HelpOnTopic, Parser, named
from megatron.config.schema import SECTIONS, Config
from megatron.config.validate import PATHS, validate
from megatron.errors import UserError, require

EXAMPLES = (
    "megatron train --objective mdm --model 7M --train-data-path data/train --valid-data-path data/valid --train-epochs 4 "
    "--save runs/mdm",
    "megatron train --objective ar --model 140M --bf16 ... --save runs/ar --load runs/ar  # the same command continues a run",
    "torchrun --nproc-per-node 8 pretrain_mdm.py --model 2298M --tensor-model-parallel-size 2 ...  # several GPUs",
    "megatron train --help warmup  # all flags with a word",
)
HINTS = functools.cache(typing.get_type_hints)  # half of the time that a parser takes
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# Flags that are no settings of a run.
# fmt: off
APART: dict[str, dict[str, Any]] = {
    "--config": {"action": "append", "metavar": "FILE", "help": "YAML or JSON of settings, named as the flags; run.json of "
        "a run repeats it; of several files a later one wins, and flags win over all"},
    "--dump-config": {"nargs": "?", "const": "-", "metavar": "FILE",
        "help": "print every setting as YAML, with where it comes from (or write it to FILE), and do not train"},
    "--use-checkpoint-args": {"action": "store_true",
        "help": "shape, tokenizer and sequence length of the checkpoint of --load (with --skip-train its objective too)"},
    "--megatron-defaults": {"action": "store_true",
        "help": "Megatron's defaults (LayerNorm, GELU, learned positions, biases, linear decay, intervals), not ours"},
}
# fmt: on
LAYERED = {"--config", "--use-checkpoint-args"}  # what brings settings from elsewhere


class HasOptions(Protocol):
    """What the parser asks of an objective."""

    needs_mask_token: ClassVar[bool]
    Options: ClassVar[type]


Registry = Mapping[str, type[HasOptions]]


def parse(
    argv: Sequence[str] | None,
    registry: Registry,
    *,
    objective: str = "ar",
    prog: str | None = None,
    world_size: int = 1,
    notes: list[str] | None = None,
    origins: dict[str, str] | None = None,
    recorded: Callable[[str, str | None], Mapping[str, Any]] | None = None,
) -> Config:
    """Parse and check a command line. Imports no torch.

    Args:
        argv: arguments without the program name; None: those of the process.
        registry: objectives by name; each brings its flags.
        objective: objective when ``--objective`` is absent.
        prog: program name for messages.
        world_size: processes that the launcher started.
        notes: receives what is to be said at start: of a command line of Megatron's, of a run that is repeated.
        origins: receives where each setting that was given comes from, by field: "flag", a file, a checkpoint.
        recorded: gives what the checkpoint of a folder and a tag records, for ``--use-checkpoint-args``.

    Returns:
        The flags as given; :func:`megatron.training.resolve.resolve` makes a plan of them.

    Raises:
        UserError: an unknown or malformed flag, a number out of range, a flag that would have no effect, flags that
            contradict each other, or a file that is none.
        SystemExit: ``--help``.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    notes, origins = [] if notes is None else notes, {} if origins is None else origins
    if LAYERED & flags_in(words):
        told = {"prog": prog, "world_size": world_size, "notes": notes, "origins": origins, "recorded": recorded}
        return import_module("megatron.config.layers").parse(words, registry, objective=objective, **told)
    registry, parser = _needed(registry, words, default=objective, prog=prog)
    _check_words(words)
    if _is_foreign(parser, words):
        words, lines = import_module("megatron.config.foreign").translate(words, parser, world_size=world_size)
        notes += lines
    values, sections = vars(parser.parse_args(words)), {}
    origins |= dict.fromkeys(_given(parser, words), "flag") | origins
    for section, cls in SECTIONS.items():
        sections[section] = cls(**{item.name: values[item.name] for item in fields(cls) if item.metadata})
    owned = owned_options(registry)
    given = {name: values[name] for name in owned if values[name] is not None}
    # A launch script of the paper asks for its objective by one of the flags.
    asked = [owners[0] for flag, (item, owners) in owned.items() if item.metadata["chooses"] and given.get(flag)]
    chosen = asked[0] if asked and objective == "ar" else objective
    name = sections["objective"].objective
    name = named(chosen if name is None else name, list(registry))
    _check_name(name, registry)
    options = registry[name].Options(**_own_options(name, given, owned))
    sections["objective"] = replace(sections["objective"], objective=name, options=asdict(options))
    config = Config(**sections)
    validate(config, options, needs_mask_token=registry[name].needs_mask_token, world_size=world_size)
    return config


def _needed(registry: Registry, words: Sequence[str], *, default: str, prog: str | None) -> tuple[Registry, Parser]:
    """The named objective alone, so that no other is imported, and its parser; all where a word is no flag of it, or asks
    for help."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--objective", nargs="?", default=default)
    name = named(chooser.parse_known_args(words)[0].objective or "", list(registry))
    if name in registry:
        own = {name: registry[name]}
        parser = build_parser(own, prog)
        known = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
        if {word.partition("=")[0] for word in words if word.startswith("-")} <= known:
            return own, parser
    return registry, build_parser(registry, prog)


def _check_words(words: Sequence[str]) -> None:
    given = "--dump-config"
    require(given not in flags_in(words), given, "this program prints no settings", "give it to megatron train")
    for word in words:
        flag, _, value = word.partition("=")
        is_empty = word.startswith("--") and value == "--"  # argparse would give an empty list of values
        require(not is_empty, f"{flag} has the value '--'", "it takes a value", "correct it")


def flags_in(words: Sequence[str]) -> set[str]:
    """The flags of a command line, in whichever spelling, with hyphens."""
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def _given(parser: Parser, words: Sequence[str]) -> list[str]:
    flags = {word.partition("=")[0] for word in words}
    return [action.dest for action in parser._actions if flags & set(action.option_strings)]


def _is_foreign(parser: Parser, words: Sequence[str]) -> bool:
    """Whether a flag, or a choice of one, is not ours, or Megatron's defaults are asked for: a normal run has none."""
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    if "--help" in words or "-h" in words:
        return False
    for word, following in zip(words, [*words[1:], ""]):
        flag, has_value, value = word.partition("=")
        choices = known[flag].choices if flag in known else None
        if flag == "--megatron-defaults" or (flag not in known and word.startswith("--")):
            return True
        if choices and (value if has_value else following).lower() not in map(str.lower, choices):
            return True
    return False


def owned_options(registry: Registry) -> dict[str, tuple[Field, list[str]]]:
    """The flags of all objectives by field name, each with the objectives that have it."""
    found: dict[str, tuple[Field, list[str]]] = {}
    for name, cls in registry.items():
        for item in fields(cls.Options):
            found.setdefault(item.name, (item, []))[1].append(name)
    return found


def _check_name(name: str, registry: Registry) -> None:
    if name not in registry:
        fix = import_module("megatron.config.usage").suggestion(name, registry) or "correct the name"
        raise UserError(f"--objective {name!r}", f"an objective is one of {', '.join(registry)}", fix)


def _own_options(name: str, given: Mapping[str, Any], owned: Mapping[str, tuple[Field, list[str]]]) -> dict[str, Any]:
    """What was given for the chosen objective; a flag of another one is refused, because it belongs to no field."""
    for flag, value in given.items():
        item, owners = owned[flag]
        check_range(item, value)  # here, because those of other objectives go no further
        require(
            name in owners or not value,  # 0 and False switch off, as in published scripts
            f"{spelling(item)} with objective {name}",
            f"it belongs to {', '.join(owners)}",
            f"drop it or pass --objective {owners[0]}",
        )
    return {flag: value for flag, value in given.items() if name in owned[flag][1]}


def build_parser(registry: Registry, prog: str | None = None, *, examples: Sequence[str] = EXAMPLES) -> Parser:
    """The parser of all training flags, grouped as the schema is."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        description="Pretrain a language model: one transformer, a causal or a masked-diffusion objective.",
        epilog="exit status: 0 at the end of the run, 75 stopped before it and saved (the same command continues), "
        "1 the run failed, 2 wrong input, 130 interrupted",
        examples=examples,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=HelpOnTopic, registry=registry)
    for section in fields(Config):
        cls = SECTIONS[section.name]
        is_objective = section.name == "objective"
        about = f"{', '.join(registry)}: the flags of one are refused with another." if is_objective else None
        group = parser.add_argument_group(section.metadata["title"], about)
        hints = HINTS(cls)
        for item in fields(cls):
            if item.metadata:
                _add_flag(group, item, hints[item.name])
        if is_objective:
            for name, (item, owners) in owned_options(registry).items():
                hint = HINTS(registry[owners[0]].Options)[name]
                _add_flag(group, item, hint, owners=owners)
    for flag, arguments in APART.items():
        group.add_argument(flag, **arguments)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)  # launchers
    return parser


def config_to_dict(config: Config) -> dict[str, Any]:
    """JSON-ready nested dictionary; the options of the objective stand among its section's fields."""
    values = asdict(config)
    values["objective"].update(values["objective"].pop("options"))
    return values


def values_of(config: Config) -> dict[str, Any]:
    """The value of every field by name, those of the objective's options too."""
    return {name: value for section in config_to_dict(config).values() for name, value in section.items()}


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of :func:`config_to_dict`; fields that a newer version added get their defaults.

    Raises:
        UserError: a field that this version does not know.
    """
    sections = {}
    for section, cls in SECTIONS.items():
        given = dict(values.get(section, {}))
        known = {item.name for item in fields(cls)}
        if "options" in known:  # of whichever objective: which ones it has is for the objective to say
            given["options"] = {name: given.pop(name) for name in sorted(set(given) - known)}
        if extra := sorted(set(given) - known):
            raise UserError(
                f"configuration section {section!r} has unknown fields {extra}",
                "this version knows only the flags of --help",
                "load it with the version that wrote it",
            )
        sections[section] = cls(**given)
    return Config(**sections)


def _add_flag(group: argparse._ArgumentGroup, item: Field, hint: Any, *, owners: Sequence[str] = ()) -> None:
    """One flag; with ``owners``, the objectives that have it, its default is None, so that it shows whether it was given."""
    meta = item.metadata
    spellings = list(meta["flags"] or (spelling(item),))
    default = default_of(item)
    inner = typing.get_args(hint)  # of ``list[str]``, ``int | None``
    base = inner[0] if inner else hint
    # Only what is on by default, or decided by the machine, needs a negative form.
    has_negative = base is bool and (default is True or (bool(inner) and not owners))
    negative = "--no-" + spellings[0].removeprefix("--") if has_negative else ""
    help = _help_text(meta, default, negative=negative, owners=owners)
    many = {"nargs": "*"} if isinstance(default, list) else {}
    default = None if owners else default
    if base is bool:  # a value may follow: `--flag True`
        group.add_argument(
            *spellings, dest=item.name, default=default, nargs="?", const=True, type=truth, metavar="", help=help
        )
        if has_negative:
            group.add_argument(negative, dest=item.name, action="store_false", default=default, help=argparse.SUPPRESS)
        return
    arguments: dict[str, Any] = {"dest": item.name, "default": default, "help": help, **many}
    if meta["choices"]:
        arguments["choices"] = list(meta["choices"])
        arguments["metavar"] = "NAME" if len(meta["choices"]) > 3 else "|".join(meta["choices"])
    else:
        is_place = meta["unit"] in PATHS  # a shell expands ~ in some spellings only
        arguments["type"] = number_of(base) if base is not str else expanduser if is_place else _text
        arguments["metavar"] = meta["unit"] or {int: "N", float: "X", str: "TEXT"}[base]
    group.add_argument(*spellings, **arguments)


def _help_text(meta: Mapping[str, Any], default: Any, *, negative: str, owners: Sequence[str]) -> str:
    """Whose flag it is, what it does and, in brackets, its default, its range and its negative form."""
    notes = [] if default is None or default == [] or default is False else [f"default: {default}"]
    if default is True:
        notes = ["default: on"]
    if meta["range"] is not None:
        notes.append(meta["range"].brief())
    if len(meta["choices"]) > 3:
        notes.append(f"one of {', '.join(meta['choices'])}")
    if negative:
        notes.append(f"{negative} turns it off")
    whose = f"{', '.join(owners)}: " if owners else ""
    return (whose + meta["help"] + f" ({'; '.join(notes)})" * bool(notes)).replace("%", "%%")


def truth(text: str) -> bool:
    """``True`` or ``False`` after a flag that needs no value, as published scripts write it."""
    if text.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} follows a switch; it takes no value, or True or False; drop it")
    return WORDS[text.lower()]


def _text(word: str) -> str:
    """A word that goes into records of others; only a path may be no text."""
    if word.encode(errors="replace").decode() != word:
        raise argparse.ArgumentTypeError(f"{word!r} was given; it is no text in UTF-8; correct it")
    return word


def number_of(base: type) -> Callable[[str], Any]:
    """A converter whose message names the kind of number; whole numbers may be written 1e6."""
    kind, example = ("a whole number", "1000 or 1e3") if base is int else ("a number", "0.0003 or 3e-4")

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            return base(text)
        with contextlib.suppress(ValueError):
            if base is int and float(text).is_integer():
                return int(float(text))
        raise argparse.ArgumentTypeError(f"{text!r} was given; it takes {kind}; write such as {example}")

    return convert
