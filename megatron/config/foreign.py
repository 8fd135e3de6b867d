"""Command lines of Megatron-LM and Megatron-DeepSpeed in our words, by the table ``megatron_flags.csv`` beside this file.

Imported only where a command line has a flag or a value that is not ours. ``docs/migration.md`` shows the same table.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from megatron.config.cli import number_of
from megatron.config.option import flag_of, idle_options
from megatron.config.schema import SECTIONS
from megatron.errors import UserError

TABLE = Path(__file__).with_name("megatron_flags.csv")
# What decides the model, its schedule and its measurements there and is another default here.
DEFAULTS: dict[str, Any] = {
    "normalization": "layernorm",
    "swiglu": False,
    "use_rotary_position_embeddings": False,
    "disable_bias_linear": False,
    "lr_decay_style": "linear",
    "eval_interval": 1000,
    "eval_iters": "100",
    "log_interval": 100,
}
NEED_VALIDATION = ("eval_interval", "eval_iters")


class Rule(NamedTuple):
    """What becomes of a flag; of several rules the first that fits holds.

    Attributes:
        flag: as Megatron spells it.
        takes: values: "0", "1" or "any".
        value: values that the rule is for, separated by ``|``; empty: all.
        given_with: another flag (and its value) that must be there too.
        kind: "alias", "no effect" or "refused".
        here: our words; N is the value, N*batch and N/seq samples of steps and of tokens.
        reason: why; for an alias, in what it differs.
    """

    flag: str
    takes: str
    value: str
    given_with: str
    kind: str
    here: str
    reason: str

    def fits(self, value: str, given: Mapping[str, str]) -> bool:
        """Whether the rule is for this value beside what else was ``given``."""
        name, _, other = self.given_with.partition(" ")
        is_beside = not name or (name in given and other in ("", given[name].lower()))
        return is_beside and (not self.value or value.lower() in self.value.lower().split("|"))


@cache
def rules() -> tuple[Rule, ...]:
    """The table."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return tuple(Rule(**row) for row in csv.DictReader(lines))


class Words(NamedTuple):
    """One flag of a command line with the words that follow it; ``raw`` as they stood."""

    flag: str
    values: list[str]
    raw: list[str]

    @property
    def value(self) -> str:
        """What follows the flag, as one text."""
        return " ".join(self.values)

    def words(self) -> list[str]:
        """Them, with the flag as our parser spells it."""
        _, has_value, value = self.raw[0].partition("=")
        return [f"{self.flag}={value}" if has_value else self.flag, *self.raw[1:]] if self.flag else self.raw


def translate(
    words: Sequence[str], parser: argparse.ArgumentParser, *, world_size: int
) -> tuple[list[str], tuple[str, ...]]:
    """A command line with the flags of Megatron replaced by ours.

    Args:
        words: the command line.
        parser: of our flags; its defaults become Megatron's where ``--megatron-defaults`` is among the words.
        world_size: processes that the launcher started.

    Returns:
        Our words, and lines to be said at start: what was read as what, what has no effect, which defaults differ.

    Raises:
        UserError: words that are not accepted, all of them, each with its counterpart or the reason.
    """
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    parts = _with_shares([part._replace(flag=_hyphens(part.flag, known)) for part in split(words)])
    given = {part.flag: " ".join(part.values) for part in parts}
    judged = [(part, _rule(part, given)) for part in parts]
    wrong = [line for part, rule in judged if (line := _wrong(part, rule, known)) is not None]
    if wrong:
        raise _refusal(wrong)
    taken = [(part, rule) for part, rule in judged if rule is not None and not _is_switched_off(part, rule)]
    ours = [word for part, rule in judged if rule is None for word in part.words()]
    aliased = _aliased([(part, rule) for part, rule in taken if rule.kind == "alias"], ours, parser, world_size)
    wrong = _named_twice(ours, aliased, known)
    if wrong:
        raise _refusal(wrong)
    new = [word for _, _, here in aliased for word in here]
    read = [
        f"{' '.join(part.raw)} as {' '.join(here)}" + f" ({rule.reason})" * bool(rule.reason)
        for part, rule, here in aliased
    ]
    is_foreign = bool(taken) or any(part.flag != part.raw[0].partition("=")[0] for part in parts if part.flag)
    ours, idle = _without_idle([*ours, *new], parser, known) if is_foreign else ([*ours, *new], [])
    idle = [(part.flag, rule.reason) for part, rule in taken if rule.kind == "no effect"] + idle
    reasons = dict.fromkeys(reason for _, reason in idle)
    grouped = [f"{', '.join(flag for flag, why in idle if why == reason)} ({reason})" for reason in reasons]
    notes = [_listed("read as ours:", read)] if read else []
    notes += [_listed("without effect here:", grouped)] if grouped else []
    return ours + _defaults(ours, parser, known, notes, is_foreign=is_foreign), tuple(notes)


def _without_idle(
    words: Sequence[str], parser: argparse.ArgumentParser, known: Mapping[str, argparse.Action]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The words without flags of ours that are refused for having no effect, and those with the reason.

    Megatron takes them: --min-lr with a constant rate, --eval-interval without validation data.
    """
    values = vars(parser.parse_known_args(list(words))[0])
    items = [(item, values[item.name]) for cls in SECTIONS.values() for item in fields(cls) if item.metadata]
    reasons = {item.name: reason for item, reason in idle_options(items) if not item.metadata["published"]}
    parts = [(part, known[part.flag].dest if part.flag in known else "") for part in split(words)]
    kept = [word for part, name in parts if name not in reasons for word in part.words()]
    return kept, [(part.flag, f"it {reasons[name]}") for part, name in parts if name in reasons]


def _listed(head: str, lines: Sequence[str]) -> str:
    return "\n  ".join([head, *lines])


def split(words: Sequence[str]) -> Iterator[Words]:
    """Yield each flag with the words up to the next one; words before the first have the flag ""."""
    part = Words("", [], [])
    for word in words:
        if word.startswith("-") and not word[1:2].isdecimal() and word[1:2] not in ("", "."):
            if part.raw:
                yield part
            flag, has_value, value = word.partition("=")
            part = Words(flag, [value] if has_value else [], [word])
        else:
            part.values.append(word)
            part.raw.append(word)
    if part.raw:
        yield part


def _hyphens(flag: str, known: Mapping[str, Any]) -> str:
    """The flag as the table or our parser spells it: some projects write underscores."""
    spelled = flag.replace("_", "-")
    names = {rule.flag.replace("_", "-"): rule.flag for rule in rules()}
    return flag if flag in known else names.get(spelled, spelled if spelled in known else flag)


def _with_shares(parts: list[Words]) -> list[Words]:
    """The value of ``--split`` put behind those of ``--data-path``, which it divides."""
    if all(part.flag != "--data-path" for part in parts):
        return parts
    shares = next((part for part in reversed(parts) if part.flag == "--split"), Words("", ["969,30,1"], []))
    joined = {"--data-path": (shares.values, shares.raw), "--split": None}
    found = [(part, joined.get(part.flag, ([], []))) for part in parts]
    return [
        part._replace(values=part.values + more[0], raw=part.raw + more[1]) for part, more in found if more is not None
    ]


def _shares(text: str) -> list[float]:
    """Ends of training, validation and test data as fractions, by megatron-core's rule; [] for a text without shares."""
    numbers = [float(word) for word in re.findall(r"\d+\.?\d*|\.\d+", text)][:3]
    if not numbers or numbers[0] == 0:
        return []
    return [min(1.0, edge) for edge in accumulate(number / sum(numbers) for number in numbers)]


def _divided(paths: Sequence[str], edges: Sequence[float]) -> list[str]:
    """The paths of training and validation that a path and the ends of its parts mean."""
    is_blend = len(paths) > 1
    words = []
    for name, begin, end in zip(("train", "valid"), (0.0, *edges), edges):
        if begin < end:
            part = f"@{begin}:{end}"
            named = [path.removesuffix(".bin").removesuffix(".idx") + part for path in paths]
            words += [f"--{name}-data-path"]
            words += [path if is_blend and place % 2 == 0 else named[place] for place, path in enumerate(paths)]
    return words


def _rule(part: Words, given: Mapping[str, str]) -> Rule | None:
    return next((rule for rule in rules() if rule.flag == part.flag and rule.fits(part.value, given)), None)


def _is_switched_off(part: Words, rule: Rule) -> bool:
    return rule.takes == "0" and part.value.lower() in ("false", "no", "0")


def _wrong(part: Words, rule: Rule | None, known: Mapping[str, Any]) -> str | None:
    """Why words are not accepted; None: they are."""
    words = " ".join(part.raw)
    if rule is None:
        return None if part.flag in known or not part.flag else _unknown(part.flag, known)
    if rule.kind == "refused":
        counterpart = f"; instead: {rule.here}" if rule.here else ""
        return None if _is_switched_off(part, rule) else f"{words}: {rule.reason}{counterpart}"
    if rule.takes == "0" and part.value.lower() not in ("", "true", "yes", "1", "false", "no", "0"):
        return f"{words}: it takes no value"
    if rule.takes == "1" and len(part.values) != 1:
        return f"{words}: it takes one value"
    if rule.flag == "--data-path" and not (_shares(part.values[-1]) and len(part.values) > 1):
        return f"{words}: it takes a prefix or a blend, and --split shares such as 969,30,1"
    if rule.kind == "alias" and _counts(rule) and _whole(part.value) is None:
        return f"{words}: it takes a whole number"
    return None


def _unknown(flag: str, known: Mapping[str, Any]) -> str:
    """A flag of nobody: only a slip of the keyboard is guessed at; what means the same is a matter of the table."""
    near = difflib.get_close_matches(flag, [*known, *(rule.flag for rule in rules())], n=1, cutoff=0.85)
    near = near or [name for name in known if flag.lstrip("-") in name.lstrip("-").split("-")][:2]
    return f"unknown argument {flag!r}; " + (
        f"did you mean {' or '.join(near)}?" if near else "it is no flag of Megatron's either"
    )


def _refusal(lines: Sequence[str]) -> UserError:
    where = "see --help, and docs/migration.md for Megatron's flags"
    if len(lines) == 1:
        given, _, rule = lines[0].partition("; ")
        return UserError(given, rule or "it is not accepted", where)
    return UserError(f"{len(lines)} arguments are not accepted", where, "\n  ".join(["mend or drop them:", *lines]))


def _aliased(
    aliases: Sequence[tuple[Words, Rule]], ours: Sequence[str], parser: argparse.ArgumentParser, world_size: int
) -> list[tuple[Words, Rule, list[str]]]:
    """Aliases with our words for them, to be put last: those that count nothing, samples and steps, tokens, in that order."""
    plain = [(part, rule, _filled(part, rule, {})) for part, rule in aliases if not _counts(rule)]
    flags = parser.parse_known_args([*ours, *(word for _, _, words in plain for word in words)])[0]
    model_ranks = flags.tensor_model_parallel_size * flags.pipeline_model_parallel_size
    batch = flags.global_batch_size or flags.micro_batch_size * max(1, world_size // model_ranks)
    found = plain
    for part, rule in sorted(aliases, key=lambda alias: alias[0].flag.endswith("-tokens")):
        if _counts(rule):
            number = _whole(part.value) or 0
            words = _filled(part, rule, {"N*batch": number * batch, "N/seq": number // flags.seq_length})
            if part.flag == "--train-tokens":
                words = _earlier(int(words[1]), flags, batch)
            found = [*found, (part, rule, words)]
    return found


def _named_twice(
    ours: Sequence[str], aliased: Sequence[tuple[Words, Rule, list[str]]], known: Mapping[str, argparse.Action]
) -> list[str]:
    """Aliases that say otherwise what another flag says, too. Tokens go before samples and steps, as in Megatron-DeepSpeed."""
    said = {known[part.flag].dest: part for part in split(ours) if part.flag in known}
    wrong = []
    for alias, _, words in aliased:
        for part in split(words):
            name = known[part.flag].dest
            other = said.setdefault(name, part._replace(raw=alias.raw))
            differs = (other.values, other.flag.startswith("--no-")) != (part.values, part.flag.startswith("--no-"))
            if differs and not alias.flag.endswith("-tokens"):
                pair = f"{' '.join(alias.raw)} beside {' '.join(other.raw)}"
                wrong.append(f"{pair}; the first is read as {' '.join(words)}: keep one, or write both in our words")
    return wrong


def _counts(rule: Rule) -> bool:
    return "*" in rule.here or "/" in rule.here


def _filled(part: Words, rule: Rule, numbers: Mapping[str, int]) -> list[str]:
    if part.flag == "--data-path":
        return _divided(part.values[:-1], _shares(part.values[-1]))
    values = {"N": part.value, **{name: str(value) for name, value in numbers.items()}}
    return [values.get(word, word) for word in rule.here.split()]


def _earlier(samples: int, flags: argparse.Namespace, batch: int) -> list[str]:
    """The length of training: that in tokens, or another one that was given, whichever ends first."""
    if flags.train_iters is not None:
        return ["--train-iters", str(min(flags.train_iters, samples // batch))]
    return ["--train-samples", str(min(flags.train_samples or samples, samples))]


def _whole(text: str) -> int | None:
    with suppress(argparse.ArgumentTypeError):
        return number_of(int)(text)
    return None


def _defaults(
    words: Sequence[str],
    parser: argparse.ArgumentParser,
    known: Mapping[str, argparse.Action],
    notes: list[str],
    *,
    is_foreign: bool,
) -> list[str]:
    """Take Megatron's defaults, or say where ours differ; returns words that take the rows of its vocabulary."""
    given = {known[flag].dest for word in words if (flag := word.partition("=")[0]) in known}
    has_validation = given & {"valid_data_path", "valid_data_path_file"}
    differing = {
        name: value
        for name, value in DEFAULTS.items()
        if name not in given and (has_validation or name not in NEED_VALIDATION)
    }
    flags = parser.parse_known_args(list(words))[0]
    tp, rows = flags.tensor_model_parallel_size, flags.make_vocab_size_divisible_by
    pads_more = tp > 1 and flags.padded_vocab_size is None
    if flags.megatron_defaults:
        parser.set_defaults(**differing)
        taken = [f"{flag_of(name)} {value}" for name, value in differing.items()]
        padding = ["--make-vocab-size-divisible-by", str(rows * tp)] if pads_more else []
        notes.append(_listed("defaults of Megatron taken:", [*taken, *([" ".join(padding)] if padding else [])]))
        return padding
    shown = [f"{flag_of(name)} is {getattr(flags, name)} (Megatron: {value})" for name, value in differing.items()]
    if pads_more:
        shown.append(f"the vocabulary is padded to a multiple of {rows} (Megatron: {rows * tp})")
    if is_foreign and shown:
        notes.append(_listed("defaults that differ, --megatron-defaults takes theirs:", shown))
    return []
