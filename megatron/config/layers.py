"""What lies beneath the command line: configuration files (``--config``) and what a checkpoint records
(``--use-checkpoint-args``), as words for the parser, which checks them as it checks flags.

Imported only where one of the two flags is given. A later layer wins over an earlier one: files in their order, then flags.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

from megatron.config import cli
from megatron.config.cli import LAYERED, Registry, build_parser, flags_in, owned_options, truth
from megatron.config.document import Table, flat, read_document
from megatron.config.foreign import rules, split
from megatron.config.recorded import flags_of, repeated
from megatron.config.schema import SECTIONS, Config
from megatron.config.shape import ARCHITECTURE, SIZES
from megatron.config.usage import suggestion
from megatron.config.validate import PATHS
from megatron.errors import UserError, require

Recorded = Callable[[str, str | None], Mapping[str, Any]]
NO_SETTINGS = {"--help", "--config", "--dump-config", "--local-rank"}
# Of these a run has one; a layer that gives one replaces whichever of them a lower layer gives.
ALTERNATIVES = (
    ("train_samples", "train_iters", "train_epochs"),
    ("lr_warmup_samples", "lr_warmup_fraction"),
    ("train_data_path", "train_data_path_file"),
    ("valid_data_path", "valid_data_path_file"),
    ("padded_vocab_size", "make_vocab_size_divisible_by"),
)
# What a setting stands for: another value of it replaces these too.
REPLACED = {
    "model": SIZES,
    "tokenizer_model": ("tokenizer_type", "vocab_file", "merge_file", "vocab_size"),
    "vocab_file": ("tokenizer_type", "merge_file", "tokenizer_model", "vocab_size"),
    "objective": ("mask_token_id",),  # and the options of objectives
    **{name: tuple(other for other in group if other != name) for group in ALTERNATIVES for name in group},
}
# What a checkpoint says of the model that it holds: its shape, its tokens, its sequences.
OF_CHECKPOINT = (
    *("model", *ARCHITECTURE, "max_position_embeddings", "seq_length"),
    *("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model", "vocab_size"),
    *("reset_position_ids", "reset_attention_mask"),
)


class Setting(NamedTuple):
    """One setting of a layer.

    Attributes:
        names: fields that it sets.
        words: for the parser; none: left open.
        source: of it, for people.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    source: str


class Layers:
    """The parser's flags, and what is known of them here."""

    def __init__(self, registry: Registry, prog: str | None) -> None:
        self.registry = registry
        self.parser = build_parser(registry, prog)
        self.known = {flag: action for action in self.parser._actions for flag in action.option_strings}
        self.options = tuple(owned_options(registry))
        hidden = {flag for flag, action in self.known.items() if NO_SETTINGS & {*action.option_strings}}
        flags = [*(rule.flag for rule in rules()), *(flag for flag in self.known if flag not in hidden)]
        self.by_key = {_key(flag): flag for flag in flags}  # ours are last, and win

    def of_file(self, path: Path, notes: list[str]) -> list[Setting]:
        """The settings of a file; notes on a record are added to ``notes``."""
        table, record = read_document(path)
        if record is not None:
            values, lines = repeated(record, path, self.registry)
            notes += lines
            table = _words_of(values)
        pairs = flat(table, SECTIONS, path)
        self._check_names([name for name, _ in pairs], path)
        return [self._setting(name, value, path) for name, value in pairs]

    def _check_names(self, names: Sequence[str], path: Path) -> None:
        unknown = [_shown(name, self.by_key) for name in dict.fromkeys(names) if _key(name) not in self.by_key]
        require(
            not unknown,
            f"{path} has {len(unknown)} unknown name{'s' * (len(unknown) > 1)}: {', '.join(unknown)}",
            "a name is that of a flag, with - or _ (--help lists them)",
            f"correct {'them' if len(unknown) > 1 else 'it'}",
        )
        same: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            same.setdefault(self.fields_of(self.by_key[_key(name)]), []).append(name)
        twice = [" and ".join(group) for group in same.values() if len(group) > 1]
        require(not twice, f"{path} gives twice: {', '.join(twice)}", "a setting has one value", "remove one")

    def _setting(self, name: str, value: str | list[str] | None, path: Path) -> Setting:
        flag = self.by_key[_key(name)]
        action, names = self.known.get(flag), self.fields_of(flag)
        if value is None:
            return Setting(names, (), str(path))
        for word in value if isinstance(value, list) else []:
            is_flag = word.startswith("-") and not word[1:2].isdecimal() and word[1:2] != "."
            require(
                not is_flag, f"{path}: {name} has {word!r}", "no word of a list begins with -", "write ./ before it"
            )
        if action is None or action.nargs == 0:
            return Setting(names, self._bare(flag, value, path), str(path))
        if action.nargs == "*":
            return Setting(names, (flag, *([value] if isinstance(value, str) else value)), str(path))
        require(isinstance(value, str), f"{path}: {name} is a list", "it takes one value", "correct it")
        return Setting(names, (f"{flag}={value}",), str(path))

    def _bare(self, flag: str, value: str | list[str], path: Path) -> tuple[str, ...]:
        """Words of a switch, which takes no value, and of a flag of Megatron's, which may."""
        is_switch = flag in self.known or any(rule.takes == "0" for rule in rules() if rule.flag == flag)
        if not is_switch:
            return (flag, *([value] if isinstance(value, str) else value))
        try:
            return (flag,) if truth(str(value)) else ()
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{path}: {_key(flag)} is {value}", "it is true or false", "correct it") from error

    def of_words(self, words: Sequence[str]) -> list[Setting]:
        """The settings of a command line."""
        found = []
        for part in split(words):
            flag = part.flag if part.flag in self.known else self.by_key.get(_key(part.flag), part.flag)
            found.append(Setting(self.fields_of(flag), tuple(part.raw), "flag"))
        return found

    def fields_of(self, flag: str) -> tuple[str, ...]:
        """Fields that a flag sets; for one of Megatron's, those of what it means here."""
        if flag in self.known:
            return (self.known[flag].dest,)
        meant = [word for rule in rules() if rule.flag == flag and rule.kind == "alias" for word in rule.here.split()]
        names = dict.fromkeys(self.known[word].dest for word in meant if word in self.known)
        return tuple(names) or (flag,)

    def merged(self, layers: Iterable[Sequence[Setting]]) -> list[Setting]:
        """One list of settings: each layer replaces what lower ones say of the same."""
        kept: list[Setting] = []
        for layer in layers:
            before = {name: _value(setting) for setting in kept for name in setting.names}
            gone: set[str] = set()
            for setting in layer:
                gone |= set(setting.names)
                for name in setting.names if len(setting.names) == 1 else ():
                    if before.get(name) != _value(setting):
                        gone |= {*REPLACED.get(name, ()), *(self.options if name == "objective" else ())}
            for setting in kept:
                again = [name for name in setting.names if name in gone]
                if len(again) not in (0, len(setting.names)):
                    raise UserError(
                        f"{_key(setting.words[0])} ({setting.source}) beside {' and '.join(again)}",
                        f"it gives {' and '.join(setting.names)}, and a part of that is given anew",
                        "give all of them anew",
                    )
            kept = [setting for setting in kept if not gone & set(setting.names)] + list(layer)
        return kept

    def of_checkpoint(self, settings: Sequence[Setting], recorded: Recorded) -> list[Setting]:
        """What the checkpoint that ``settings`` load says of its model.

        Raises:
            UserError: there is none, or the settings contradict it; both values are named.
        """
        words = [word for setting in settings for word in setting.words]
        flags = self.parser.parse_known_args(words)[0]
        require(
            flags.load is not None,
            "--use-checkpoint-args without --load",
            "shape and tokenizer are those of a checkpoint",
            "pass --load RUN, or drop it",
        )
        manifest = recorded(flags.load, flags.load_tag)
        values = flags_of(manifest, self.registry)
        of_objective = ("objective", "mask_token_id", *self.options) if flags.skip_train else ()
        taken = {name: values[name] for name in (*OF_CHECKPOINT, *of_objective) if values.get(name) is not None}
        given = {name: setting.source for setting in settings for name in setting.names}
        differing = [
            f"{_key(name)} is {getattr(flags, name)} ({given[name]}) and {values.get(name)} in the checkpoint"
            for name in (*OF_CHECKPOINT, *of_objective[:1])
            if name in given and not _agree(getattr(flags, name), values.get(name), self.known, name)
        ]
        require(
            not differing,
            f"--use-checkpoint-args with --load {flags.load}: {'; '.join(differing)}",
            "the checkpoint says what its model is",
            "drop them, or drop --use-checkpoint-args",
        )
        return [self._setting(name, value, Path(manifest["name"])) for name, value in _words_of(taken)]


def parse(
    words: Sequence[str],
    registry: Registry,
    *,
    recorded: Recorded | None,
    origins: dict[str, str],
    notes: list[str],
    **more: Any,
) -> Config:
    """What :func:`megatron.config.cli.parse` does, of a command line with what files and a checkpoint add to it.

    Raises:
        UserError: as there; where it is about a setting that is not from the command line, it says from where that is.
    """
    layers = Layers(registry, more["prog"])
    own = type(layers.parser)(prog=more["prog"], add_help=False, allow_abbrev=False)
    own.add_argument("--config", action="append", default=[])
    named, rest = own.parse_known_args(words)
    files = [layers.of_file(Path(expanduser(name)), notes) for name in named.config]
    settings = layers.merged([*files, layers.of_words(rest)])
    if any("use_checkpoint_args" in setting.names and setting.words for setting in settings):
        require(recorded, "--use-checkpoint-args", "this program loads no checkpoint", "drop it")
        assert recorded is not None
        settings = layers.merged([layers.of_checkpoint(settings, recorded), settings])
    sources = {name: part.source for part in settings if part.source != "flag" for name in part.names if part.words}
    words = [word for part in settings if "use_checkpoint_args" not in part.names for word in part.words]
    left = " ".join(LAYERED & flags_in(words))
    require(not left, f"{left} behind --", "no flag stands there", "drop the --")
    origins.update(sources)
    try:
        return cli.parse(words, registry, origins=origins, notes=notes, **more)
    except UserError as error:
        named = re.findall(r"--[\w-]+|\b[a-z]+(?:_[a-z0-9]+)+\b", str(error))
        found = dict.fromkeys(sources.get(_key(name), sources.get(name, "")) for name in named)
        origin = ", ".join(source for source in found if source)
        if not origin:
            raise
        raise type(error)(f"{error.given} ({origin})", error.rule, error.fix) from error


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _shown(name: str, known: Mapping[str, str]) -> str:
    near = suggestion(_key(name), known, cutoff=0.7)
    return f"{name!r}" + f" ({near})" * bool(near)


def _value(setting: Setting) -> tuple[str, ...]:
    """Words without the flag, however it is spelled."""
    _, _, joined = setting.words[0].partition("=") if setting.words else ("", "", "")
    return tuple([joined] * bool(joined) + list(setting.words[1:]))


def _words_of(values: Mapping[str, Any]) -> Table:
    return Table(
        (name, [str(word) for word in value] if isinstance(value, list) else None if value is None else str(value))
        for name, value in values.items()
    )


def _agree(given: Any, recorded: Any, known: Mapping[str, argparse.Action], name: str) -> bool:
    """Whether two values mean the same; where files lie says nothing of what they hold."""
    is_place = known["--" + name.replace("_", "-")].metavar in PATHS
    return is_place or given == recorded or str(given).lower() == str(recorded).lower()
