"""The parser of every program: 80 columns, flags in full, names in any case, and one message for what is wrong.

What only a person who asks or errs needs is in ``usage.py``, which a run does not load.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn


class Help(argparse.HelpFormatter):
    """As wide as the screen, at most 80; paragraphs are filled, indented ones stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size().columns, 80))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [part.strip("\n") for part in text.split("\n\n")]
        filled = [part if part.startswith(" ") else "\n".join(self._split_lines(part, width)) for part in parts]
        return "\n\n".join(filled)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.metavar == "" else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).replace(" ,", ",").rstrip()


def _in_lines(command: str) -> str:
    """A command in lines of at most 80 columns, which a shell reads as one; quoted words, comments, and flags with a value stay
    whole."""
    lines = [""]
    for word in re.findall(r"#.*|(?:--[\w-]+ (?![-#]))?(?:'[^']*'|\"[^\"]*\"|\S)+", command):
        lines += [word] if len(lines[-1]) + len(word) > 68 else [f"{lines.pop()} {word}".strip()]
    return "    " + " \\\n        ".join(lines)


class Parser(argparse.ArgumentParser):
    """What argparse does, with the manners above.

    Args:
        examples: command lines, one a string, that stand at the end of the help; the first one is shown where something is
            missing.
    """

    def __init__(self, *, examples: Sequence[str] = (), epilog: str = "", **more: Any) -> None:
        shown = "\n".join(["  examples:", *map(_in_lines, examples)]) if examples else ""
        parts = {"allow_abbrev": False, "formatter_class": Help, **more}
        super().__init__(epilog="\n\n".join(part for part in (epilog, shown) if part) or None, **parts)
        self.examples = tuple(examples)
        # 3.10 knows no -1e-4.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does; keeps the words, among which :meth:`error` looks for what was meant."""
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self.words, namespace)

    def format_help(self) -> str:
        """The whole help, under a line of usage that names what is needed."""
        self.usage = self.usage or import_module("megatron.config.usage").usage_line(self)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`~megatron.errors.UserError` for a message of argparse."""
        raise import_module("megatron.config.usage").refusal(self, message)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """The choice that is meant, whatever its case and its hyphens."""
        value = super()._get_value(action, text)  # type: ignore[misc]
        return named(value, action.choices) if action.choices and isinstance(value, str) else value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise import_module("megatron.config.usage").not_a_choice(action, value)


class HelpOnTopic(argparse.Action):
    """``--help``, ``--help TOPIC``, ``--help WORD``."""

    def __init__(self, option_strings: Sequence[str], dest: str, registry: Any) -> None:
        text = "flags of a section, of an objective, or with a word in them; all: every flag"
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", metavar="TOPIC", help=text)
        self.registry = registry

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the page and leave."""
        page = import_module("megatron.config.usage").help_on(parser, values, registry=self.registry)
        parser._print_message(page + "\n", sys.stdout)
        parser.exit()


def named(text: str, names: Iterable[str]) -> str:
    """The one of ``names`` that ``text`` spells without regard to case and hyphens; the text itself where there is none."""
    plain = {str(name).lower().replace("-", "_"): name for name in names}
    return plain.get(text.lower().replace("-", "_"), text)
