"""Command line ↔ configuration. Flags are generated from the schema, so help, defaults and run.json cannot disagree."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

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


class _Parser(argparse.ArgumentParser):
    """Exits with status 2 and one message that names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: Sequence[str] | None = None, *, objective: str = "ar", prog: str | None = None) -> Config:
    """Parse and check a command line.

    Args:
        argv: arguments without the program name; default: those of the process.
        objective: objective when ``--objective`` is absent.
        prog: program name for messages.

    Returns:
        The configuration with everything filled in that needs neither data nor process groups
        (:func:`megatron.training.resolve.resolve_config` does the rest).

    Raises:
        ValueError: three parts: what was given, the rule, the fix.
        SystemExit: unknown or malformed flag, or ``--help``.
    """
    from megatron.config.validate import fill_defaults, validate
    from megatron.objectives import objective_name

    parser = build_parser(prog)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown_flag_message(parser, unknown))
    sections = {}
    for section in dataclasses.fields(Config):
        cls: Any = section.default_factory
        sections[section.name] = cls(
            **{field.name: getattr(namespace, field.name) for field in dataclasses.fields(cls)}
        )
    config = Config(**sections)
    name = objective_name(config, objective)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, objective=name))
    config = fill_defaults(config)
    validate(config)
    return config


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of all training flags, grouped as the schema is."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        description="Pretrain a language model: one transformer, a causal or a masked-diffusion objective.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
    )
    for section in dataclasses.fields(Config):
        group = parser.add_argument_group(GROUP_TITLES[section.name])
        cls: Any = section.default_factory
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _add_flag(group, field, hints[field.name])
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)  # launchers
    return parser


def config_to_dict(config: Config) -> dict[str, Any]:
    """JSON-ready nested dictionary."""
    return dataclasses.asdict(config)


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of :func:`config_to_dict`; fields that a newer version added get their defaults.

    Raises:
        ValueError: a field that this version does not know.
    """
    sections = {}
    for section in dataclasses.fields(Config):
        cls: Any = section.default_factory
        given = values.get(section.name, {})
        known = {field.name for field in dataclasses.fields(cls)}
        if extra := sorted(set(given) - known):
            raise UserError(
                f"configuration section {section.name!r} has unknown fields {extra}",
                "this version knows only the flags of --help",
                "load it with the version that wrote it",
            )
        sections[section.name] = cls(**given)
    return Config(**sections)


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any) -> None:
    meta = field.metadata
    kebab = "--" + field.name.replace("_", "-")
    spellings = list(meta["flags"] or (kebab,))
    is_list = field.default is dataclasses.MISSING
    factory: Any = field.default_factory
    default = factory() if is_list else field.default
    base, is_optional = _base_type(hint)
    note = "" if default is None or default == [] or base is bool else f" (default: {default})"
    arguments: dict[str, Any] = {
        "dest": field.name,
        "default": default,
        "help": (meta["help"] + note).replace("%", "%%"),
    }
    if base is bool:
        # Only what is on by default, or decided by the machine, needs a negative form.
        action: Any = argparse.BooleanOptionalAction if default is True or is_optional else "store_true"
        if default is True:
            arguments["help"] += " (default: on)"
        added = group.add_argument(*spellings, action=action, **arguments)
        added.help = arguments["help"]  # Python 3.10 adds the default once more
        return
    if meta["choices"]:
        lowered = {choice.lower(): choice for choice in meta["choices"]}
        arguments["type"] = lambda text: lowered.get(text.lower(), text)
        arguments["choices"] = list(meta["choices"])
        arguments["metavar"] = "|".join(meta["choices"])
    else:
        arguments["type"] = base
        arguments["metavar"] = meta["unit"] or {int: "N", float: "X", str: "TEXT"}[base]
    if is_list:
        arguments["nargs"] = "*"
    group.add_argument(*spellings, **arguments)


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
    known = [spelling for action in parser._actions for spelling in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown argument {flag!r}; only flags listed by --help are accepted, in full; {hint}see --help"
