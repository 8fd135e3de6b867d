"""Command line ↔ flags. The parser is generated from the schema, so help, defaults and run.json cannot disagree."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Protocol

from megatron.config.option import check_range, check_ranges, spelling
from megatron.config.schema import Config
from megatron.errors import UserError

GROUP_TITLES = {
    "model": "model",
    "objective": "objective",
    "data": "data and tokenizer",
    "optimizer": "optimizer and learning rate",
    "parallel": "parallelism and engine",
    "run": "run: length, logging, validation, checkpoints",
}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _Parser(argparse.ArgumentParser):
    """Exits with status 2 and one message that names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.HelpFormatter):
    """Wide enough for our flags; a switch is shown without the value that may follow it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=44, width=120)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.metavar == "" else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).replace(" ,", ",").rstrip()


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
) -> Config:
    """Parse and check a command line. Imports no torch.

    Args:
        argv: arguments without the program name; None: those of the process.
        registry: objectives by name; each brings its flags.
        objective: objective when ``--objective`` is absent.
        prog: program name for messages.
        world_size: processes that the launcher started.

    Returns:
        The flags as given; :func:`megatron.training.resolve.resolve` makes a plan of them.

    Raises:
        UserError: a number out of range, a flag that would have no effect, or flags that contradict each other.
        SystemExit: unknown or malformed flag, or ``--help``.
    """
    from megatron.config.validate import validate

    words = sys.argv[1:] if argv is None else list(argv)
    registry = _needed(registry, words, objective)
    parser = build_parser(registry, prog)
    for word in words:
        if word.startswith("--") and word.partition("=")[2] == "--":  # argparse would give an empty list of values
            parser.error(f"argument {word.partition('=')[0]}: '--' was given; it takes a value; correct it")
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(_unknown_flag_message(parser, unknown))
    sections = {}
    for section in dataclasses.fields(Config):
        cls: Any = section.default_factory
        own = {item.name: getattr(namespace, item.name) for item in dataclasses.fields(cls) if item.metadata}
        sections[section.name] = cls(**own)
        check_ranges(sections[section.name])
    given = {name: value for name in _options(registry) if (value := getattr(namespace, name)) is not None}
    name = namespace.objective or _chosen(given, registry, objective)
    options = _own_options(name, given, registry)
    chosen = dataclasses.replace(
        sections["objective"], objective=name, options={} if options is None else dataclasses.asdict(options)
    )
    config = Config(**{**sections, "objective": chosen})
    validate(config, registry, options, world_size)
    return config


def _needed(registry: Registry, words: Sequence[str], default: str) -> Registry:
    """The named objective alone, so that no other is imported; all where a word is no flag of it, or asks for help."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--objective", nargs="?", default=default)
    name = chooser.parse_known_args(words)[0].objective
    if name not in registry:
        return registry
    own = {name: registry[name]}
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    known = {flag for action in build_parser(own)._actions for flag in action.option_strings}
    return own if flags <= known - {"-h", "--help"} else registry


def _options(registry: Registry) -> dict[str, dataclasses.Field]:
    """The flags of all objectives by field name."""
    return {item.name: item for cls in registry.values() for item in dataclasses.fields(cls.Options)}


def _chosen(given: Mapping[str, Any], registry: Registry, default: str) -> str:
    """The objective that a launch script of the paper asks for by one of its flags, else the program's own."""
    for name, cls in registry.items():
        asking = (item.name for item in dataclasses.fields(cls.Options) if item.metadata["chooses"])
        if default == "ar" and any(given.get(flag) for flag in asking):
            return name
    return default


def _own_options(name: str, given: Mapping[str, Any], registry: Registry) -> Any:
    """The options of the chosen objective; a flag of another one is refused, because it belongs to no field."""
    if name not in registry:
        raise UserError(f"--objective {name!r}", f"an objective is one of {', '.join(registry)}", "correct the name")
    own = {item.name for item in dataclasses.fields(registry[name].Options)}
    for flag, value in given.items():
        check_range(_options(registry)[flag], value)
        owners = [other for other, cls in registry.items() if flag in {f.name for f in dataclasses.fields(cls.Options)}]
        if flag not in own and value:  # 0 and False switch off, as in published scripts
            raise UserError(
                f"{spelling(_options(registry)[flag])} with objective {name}",
                f"it belongs to {', '.join(owners)}",
                f"drop it or pass --objective {owners[0]}",
            )
    return registry[name].Options(**{flag: value for flag, value in given.items() if flag in own})


def build_parser(registry: Registry, prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of all training flags, grouped as the schema is."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        description="Pretrain a language model: one transformer, a causal or a masked-diffusion objective.",
        epilog="exit status: 0 at the end of the run, 75 stopped before it and saved (the same command continues), "
        "1 the run failed, 2 wrong input, 130 interrupted",
        formatter_class=_Help,
    )
    for section in dataclasses.fields(Config):
        is_objective = section.name == "objective"
        about = f"{', '.join(registry)}: the flags of one are refused with another." if is_objective else None
        group = parser.add_argument_group(GROUP_TITLES[section.name], about)
        cls: Any = section.default_factory
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if item.metadata:
                _add_flag(group, item, hints[item.name])
        if is_objective:
            _add_options(group, registry)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)  # launchers
    return parser


def _add_options(group: argparse._ArgumentGroup, registry: Registry) -> None:
    """The flags of every objective, each with the names of those that have it."""
    for name, item in _options(registry).items():
        owners = [owner for owner, cls in registry.items() if name in {f.name for f in dataclasses.fields(cls.Options)}]
        hint = typing.get_type_hints(registry[owners[0]].Options)[name]
        _add_flag(group, item, hint, owners=owners)


def config_to_dict(config: Config) -> dict[str, Any]:
    """JSON-ready nested dictionary; the options of the objective stand among its section's fields."""
    values = dataclasses.asdict(config)
    values["objective"].update(values["objective"].pop("options"))
    return values


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of :func:`config_to_dict`; fields that a newer version added get their defaults.

    Raises:
        UserError: a field that this version does not know.
    """
    sections = {}
    for section in dataclasses.fields(Config):
        cls: Any = section.default_factory
        given = dict(values.get(section.name, {}))
        known = {item.name for item in dataclasses.fields(cls)}
        if "options" in known:  # of whichever objective: which ones it has is for the objective to say
            given["options"] = {name: given.pop(name) for name in sorted(set(given) - known)}
        if extra := sorted(set(given) - known):
            raise UserError(
                f"configuration section {section.name!r} has unknown fields {extra}",
                "this version knows only the flags of --help",
                "load it with the version that wrote it",
            )
        sections[section.name] = cls(**given)
    return Config(**sections)


def _add_flag(
    group: argparse._ArgumentGroup, item: dataclasses.Field, hint: Any, *, owners: Sequence[str] = ()
) -> None:
    """One flag; with ``owners``, the objectives that have it, its default is None, so that it shows whether it was given."""
    meta = item.metadata
    spellings = list(meta["flags"] or (spelling(item),))
    is_list = item.default is dataclasses.MISSING
    factory: Any = item.default_factory
    default = factory() if is_list else item.default
    base, is_optional = _base_type(hint)
    # Only what is on by default, or decided by the machine, needs a negative form.
    has_negative = base is bool and (default is True or (is_optional and not owners))
    negative = "--no-" + spellings[0].removeprefix("--") if has_negative else ""
    help = _help_text(meta, default, negative=negative, owners=owners)
    default = None if owners else default
    if base is bool:  # a value may follow: `--flag True`
        group.add_argument(
            *spellings, dest=item.name, default=default, nargs="?", const=True, type=_truth, metavar="", help=help
        )
        if has_negative:
            group.add_argument(negative, dest=item.name, action="store_false", default=default, help=argparse.SUPPRESS)
        return
    arguments: dict[str, Any] = {"dest": item.name, "default": default, "help": help}
    if meta["choices"]:
        lowered = {choice.lower(): choice for choice in meta["choices"]}
        arguments["type"] = lambda text: lowered.get(text.lower(), text)
        arguments["choices"] = list(meta["choices"])
        arguments["metavar"] = "|".join(meta["choices"])
    else:
        arguments["type"] = base if base is str else _number(base)
        arguments["metavar"] = meta["unit"] or {int: "N", float: "X", str: "TEXT"}[base]
    if is_list:
        arguments["nargs"] = "*"
    group.add_argument(*spellings, **arguments)


def _help_text(meta: Mapping[str, Any], default: Any, *, negative: str, owners: Sequence[str]) -> str:
    """Whose flag it is, what it does and, in brackets, its default, its range and its negative form."""
    notes = [] if default is None or default == [] or default is False else [f"default: {default}"]
    if default is True:
        notes = ["default: on"]
    if meta["range"] is not None:
        notes.append(meta["range"].brief())
    if negative:
        notes.append(f"{negative} turns it off")
    whose = f"{', '.join(owners)}: " if owners else ""
    return (whose + meta["help"] + f" ({'; '.join(notes)})" * bool(notes)).replace("%", "%%")


def _truth(text: str) -> bool:
    """``True`` or ``False`` after a flag that needs no value, as published scripts write it."""
    if text.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} follows a switch; it takes no value, or True or False; drop it")
    return WORDS[text.lower()]


def _number(base: type) -> Callable[[str], Any]:
    """A converter whose message names the kind of number; whole numbers may be written 1e6."""
    kind = "a whole number" if base is int else "a number"

    def convert(text: str) -> Any:
        try:
            return base(text)
        except ValueError:
            pass
        try:
            value = float(text)
            if base is int and value.is_integer():
                return int(value)
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} was given; it takes {kind}; correct it")

    return convert


def _base_type(hint: Any) -> tuple[type, bool]:
    """int, float, str or bool, and whether None is allowed; ``list[str]`` counts as str."""
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0], True
    return hint, False


def _unknown_flag_message(parser: argparse.ArgumentParser, unknown: list[str]) -> str:
    flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown argument {flag!r}; only flags listed by --help are accepted, in full; {hint}see --help"
