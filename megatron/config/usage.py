"""What a person sees who asks for help or errs on a command line: topics of the training flags, and the cure in a message."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron.config.parser import Help, Parser
from megatron.config.schema import Config
from megatron.config.shape import PRESETS
from megatron.errors import UserError

# The flags that nearly every run passes: those of plain --help.
COMMON = (
    "--config", "--objective", "--model", "--train-data-path", "--valid-data-path", "--tokenizer-model", "--seq-length",
    "--micro-batch-size", "--global-batch-size", "--train-samples", "--train-epochs", "--lr", "--bf16", "--save",
    "--load", "--save-interval", "--eval-interval",
)  # fmt: skip
TOPICS = {
    "model": "layers, width, heads, norm, positions, dropout",
    "objective": "flags of each objective",
    "data": "token files, blends, packing, tokenizer",
    "optimizer": "AdamW, learning rate, warm-up, decay",
    "parallel": "tensor, pipeline and data parallelism, ZeRO, recomputation",
    "run": "length, batch, precision, logging, validation, checkpoints",
    "presets": "sizes of --model with their shapes",
    "all": "every flag",
}


def suggestion(word: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``did you mean X?`` of the nearest name; empty where none is near."""
    plain = {str(name).lower(): str(name) for name in names}
    near = difflib.get_close_matches(word.lower(), plain, n=1, cutoff=cutoff)
    return f"did you mean {plain[near[0]]}?" if near else ""


def refusal(parser: Parser, message: str) -> UserError:
    """The error for a message of argparse, in three parts: what was given, the rule, the fix."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    example = f"for example: {parser.examples[0].partition('  #')[0]}" if parser.examples else "see --help"
    if found := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        left = found[1].split()
        return _unknown(_foreign(left, flags), flags) if _foreign(left, flags) else _unexpected(parser, left[0])
    has_commands = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)  # with their flags
    if " required" in message and not has_commands and (words := _foreign(parser.words, flags)):
        return _unknown(words, flags)  # what is missing may be there, misspelled
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        return UserError(f"missing: {found[1]}", "the program needs it", example)
    if found := re.fullmatch(r"one of the arguments (.*) is required", message):
        return UserError(f"none of {found[1]} was given", "the program needs one of them", example)
    what, _, rest = message.removeprefix("argument ").partition(": ")
    name = what.split(", ")[0].split("/")[0]
    if rest.startswith("expected "):
        number = rest.removeprefix("expected ").replace("argument", "value")
        return UserError(f"{name} has no value", f"it takes {number}", "write it after the flag, or drop the flag")
    if rest.startswith("not allowed with"):
        return UserError(f"{name} with {rest.split()[-1]}", "they exclude each other", "drop one of them")
    given, rule, fix = [*rest.split("; ", 2), "", ""][:3]
    return UserError(f"{name}: {given}" if rest else message, rule or "see --help", fix or "correct it")


def _foreign(words: Iterable[str], flags: Sequence[str]) -> list[str]:
    """Words that look like flags, and are none, without their values."""
    names = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--") and word != "--")
    return [name for name in names if name not in flags]


def _unexpected(parser: Parser, word: str) -> UserError:
    """The error for a word that no flag takes; most often it is the second one behind a flag that takes one."""
    before = parser.words[: parser.words.index(word)] if word in parser.words else []
    last = next((name for name in reversed(before) if name.startswith("-")), "").partition("=")[0]
    action = next((action for action in parser._actions if last in action.option_strings), None)
    if action is None or action.nargs is not None:
        return UserError(
            f"unknown argument {word!r}", "only flags listed by --help are accepted, in full", "see --help"
        )
    return UserError(f"{word!r} behind {last}", "that flag takes one value", "drop it, or quote a value with spaces")


def _unknown(words: Sequence[str], flags: Sequence[str]) -> UserError:
    """The error for all unknown words at once, each with its nearest flag."""
    rule = "only flags listed by --help are accepted, in full"
    if len(words) == 1:
        return UserError(f"unknown argument {words[0]!r}", rule, suggestion(words[0], flags) or "see --help")
    near = [(word, suggestion(word, flags)) for word in words]
    shown = ", ".join(f"{word!r}" + f" ({hint})" * bool(hint) for word, hint in near)
    return UserError(f"unknown arguments {shown}", rule, "see --help")


def usage_line(parser: Parser) -> str:
    """``%(prog)s`` with what is needed; everything else is ``[flags]``."""
    formatter, words = Help(parser.prog), ["%(prog)s"]
    for action in parser._actions:
        default = action.dest if not action.option_strings else action.dest.upper()
        values = formatter._format_args(action, default)
        if not action.option_strings:
            words.append(values)
        elif action.required:
            words.append(f"{action.option_strings[0]} {values.replace(' [', ' ...[').partition('[')[0]}")
    first = " " * (len("usage: ") + len(parser.prog) - len(words[0]))  # as wide as what stands there in the end
    lines = textwrap.wrap(" ".join([*words, "[flags]"]), 80, initial_indent=first, subsequent_indent=" " * 7)
    return "\n".join(lines).lstrip()


def not_a_choice(action: argparse.Action, value: Any) -> argparse.ArgumentError:
    """The error for a value that is no choice, with the nearest one."""
    names = [str(choice) for choice in action.choices or ()]
    fix = suggestion(str(value), names) or "choose one of them"
    return argparse.ArgumentError(action, f"{str(value)[:80]!r} was given; it is one of {', '.join(names)}; {fix}")


def help_on(parser: Parser, topic: str | None, *, registry: Mapping[str, Any]) -> str:
    """The page of a topic; of None, what a person needs first.

    Raises:
        UserError: no topic, objective or flag has such a name.
    """
    if topic is None:
        return _overview(parser, registry)
    topic = topic.lower().lstrip("-").replace("_", "-")
    if topic == "all":
        return parser.format_help()
    if topic == "presets":
        return "\n".join(_presets())
    actions = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    titles = {section.metadata["title"]: section.name for section in fields(Config)}
    groups = {titles[group.title]: group for group in parser._action_groups if group.title in titles}
    if topic in groups:
        return _flags(parser, groups[topic]._group_actions, str(groups[topic].title))
    objective = topic.replace("-", "_")
    if objective in registry:
        own = {item.name for item in fields(registry[objective].Options)}
        found = [action for action in actions if action.dest in own]
        return _flags(parser, found, f"{objective}: {about(registry[objective])}")
    found = [
        action for action in actions if topic in " ".join(action.option_strings) or topic in str(action.help).lower()
    ]
    if not found:
        given = f"--help {topic}"
        raise UserError(
            given, f"topics are {', '.join((*TOPICS, *registry))}", "or a word that is in a flag or its help"
        )
    return _flags(parser, found, f"flags with {topic!r}")


def about(objective: Any) -> str:
    """The line about an objective: the first sentence of its module."""
    text = " ".join((sys.modules[objective.__module__].__doc__ or "").split())
    return re.split(r" \(|\. |\.$", text)[0]


def _overview(parser: Parser, registry: Mapping[str, Any]) -> str:
    """What a person needs first: of training the common flags; of a program that only takes them along, its own."""
    known = {section.metadata["title"] for section in fields(Config)} | {"positional arguments", "options"}
    prog, own = parser.prog, [group for group in parser._action_groups if group.title not in known]
    lines = [f"usage: {prog} [flags]", "", _filled(parser, str(parser.description)), ""]
    if own:
        lines += [_flags(parser, group._group_actions, str(group.title)) for group in own]
    else:
        indent = " " * 23
        rows = [f"  {name:<20} {about(registry[name])}" for name in registry]
        lines += ["objectives (--objective NAME):", *(textwrap.fill(row, 80, subsequent_indent=indent) for row in rows)]
        lines += ["", "sizes (--model NAME, in any case; shapes: --help presets):"]
        lines += [textwrap.fill(", ".join(PRESETS), 80, initial_indent="  ", subsequent_indent="  "), ""]
        common = [action for action in parser._actions if set(action.option_strings) & set(COMMON)]
        lines += [_flags(parser, common, "flags of nearly every run")]
    lines += ["", f"more: {prog} --help TOPIC, an objective, or a word such as warmup"]
    lines += [f"  {name:<12} {text}" for name, text in TOPICS.items()]
    return "\n".join([*lines, "", _filled(parser, str(parser.epilog))])


def _filled(parser: Parser, text: str) -> str:
    formatter = Help(parser.prog)
    formatter.add_text(text.replace("%", "%%") if "%(" not in text else text)
    return formatter.format_help().strip("\n")


def _flags(parser: Parser, actions: Sequence[argparse.Action], title: str) -> str:
    formatter = Help(parser.prog)
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help().strip("\n")


def _presets() -> list[str]:
    head = f"  {'--model':<8}{'layers':>8}{'width':>8}{'heads':>8}{'channels per head':>20}"
    rows = [
        f"  {name:<8}{size.num_layers:>8}{size.hidden_size:>8}{size.num_attention_heads:>8}{size.kv_channels:>20}"
        for name, size in PRESETS.items()
    ]
    return ["presets of arXiv 2507.15857; a flag such as --num-layers wins:", head, *rows]
