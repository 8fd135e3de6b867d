"""Configuration files as they are written: names and words, without guessing at types.

A YAML file is read as text with structure: ``1e-4``, ``no`` and ``0777`` are the words that they would be on a command line,
so that the parser of the flags, which knows what each one takes, judges both alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import UserError, require

RULE = "a configuration file is YAML or JSON: one 'name: value' for each setting, named as the flag"
NESTING = (
    "a value is a word or a list of words; the only groups are model, objective, data, optimizer, parallel and run"
)
MAX_BYTES = 1 << 24
UNSET = ("~", "null", "Null", "NULL")


class Table(list[tuple[Any, Any]]):
    """Pairs of a mapping in their order, equal names among them; a value is a word, None, a list or another table."""


class Loader(yaml.SafeLoader):
    """YAML in which a scalar is the word that it is written as, and a mapping is its pairs."""

    def word(self, node: yaml.ScalarNode) -> str | None:
        """The scalar as it stands; None for the word of an open setting, unless it is quoted."""
        text, where = str(self.construct_scalar(node)), f"{node.start_mark.name}, line {node.start_mark.line + 1}"
        is_quoted = node.style is not None
        fix = "a setting that is left open is null"
        require(text or is_quoted, f"{where}: a name without a value", fix, "give a value")
        return None if text in UNSET and not is_quoted else text

    def table(self, node: yaml.MappingNode) -> Table:
        """The mapping."""
        return Table(self.construct_pairs(node, deep=True))


for _kind in ("str", "null", "bool", "int", "float", "timestamp", "merge", "value"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.word)
Loader.add_constructor("tag:yaml.org,2002:map", Loader.table)


def read_document(path: Path) -> tuple[Table, dict[str, Any] | None]:
    """Read a configuration file.

    Args:
        path: YAML or JSON, UTF-8.

    Returns:
        Its pairs, and the whole object where it is the ``run.json`` of a run.

    Raises:
        UserError: no file, too long, no text, or no mapping.
    """
    text = _text(path)
    if text.lstrip().startswith("{"):
        try:
            tree = json.loads(text, object_pairs_hook=Table, parse_int=str, parse_float=str, parse_constant=str)
            is_record = any(name == "config" and isinstance(value, Table) for name, value in tree)
            return tree, json.loads(text) if is_record else None
        except (ValueError, RecursionError) as error:
            require(path.suffix != ".json", f"{path} is no JSON ({error})", RULE, "correct it")
    tree = _yaml(text, path)
    require(
        isinstance(tree, Table),
        f"{path} holds {'nothing' if tree is None else 'a list' if isinstance(tree, list) else 'one text'}",
        RULE,
        "write for instance 'lr: 1e-3'",
    )
    return tree, None


def _text(path: Path) -> str:
    fix = f"pass {path}/run.json" if isfile(path / "run.json") else "correct the path"
    require(not isdir(path), f"--config {path} is a folder", "it names a file", fix)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--config {path} cannot be read ({reason})", "it names a file", fix) from error
    require(len(content) <= MAX_BYTES, f"--config {path} has more than {MAX_BYTES >> 20} MB", RULE, "correct the path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 (byte {error.start})", RULE, "save it as UTF-8") from error


def _yaml(text: str, path: Path) -> Any:
    try:
        loader = Loader(text)
        loader.name = str(path)  # which its marks have
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = problem or str(error).splitlines()[0]
        raise UserError(f"{path} is no YAML ({problem}{where})", RULE, "correct it") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply", RULE, "correct it") from error


def flat(table: Table, sections: Collection[str], path: Path) -> Table:
    """The pairs with those of its sections in their places.

    Args:
        table: of a file.
        sections: names of groups.
        path: the file, for errors.

    Raises:
        UserError: a name or a word that no command line could hold; names of other mappings and of nested lists, all of them.
    """
    pairs, nested = Table(), Table()
    for name, value in table:
        is_section = isinstance(value, Table) and name in [*sections]
        for own, member in value if is_section else [(name, value)]:
            require(isinstance(own, str), f"{path}: a name is a list or a mapping", RULE, "correct it")
            words = [_word(word, path) for word in member] if isinstance(member, list) else _word(member, path)
            is_list = isinstance(words, list) and all(isinstance(word, str) for word in words)
            is_plain = words is None or isinstance(words, str) or is_list
            (pairs if is_plain else nested).append((_word(own, path), words))
    names = ", ".join(dict.fromkeys(name for name, _ in nested))
    require(not nested, f"{path} has no word or list of words for {names}", NESTING, "correct it")
    return pairs


def _word(value: Any, path: Path) -> Any:
    """A scalar as a command line would hold it; lists and tables as they are."""
    if isinstance(value, bool):  # of JSON
        return str(value).lower()
    if isinstance(value, str):
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            value = "\0"
        require("\0" not in value, f"{path} has a character that no word has", RULE, "remove it")
    return value
