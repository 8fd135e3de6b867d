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

from megatron.errors import UserError, require

RULE = "a configuration file is YAML or JSON: one 'name: value' for each setting, named as the flag"
NESTING = (
    "a value is a word or a list of words; the only groups are model, objective, data, optimizer, parallel and run"
)
MAX_BYTES = 1 << 24
SCALAR_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool", "int", "float"))
UNSET = ("~", "null", "Null", "NULL")


class Table(list[tuple[str, Any]]):
    """Pairs of a mapping in their order, equal names among them; a value is a word, None, a list or another table."""


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
            return _plain(tree, path), json.loads(text) if is_record else None
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
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


def _plain(value: Any, path: Path) -> Any:
    """A tree of JSON with words for its scalars."""
    if isinstance(value, Table):
        return Table((_word(name, path), _plain(member, path)) for name, member in value)
    if isinstance(value, list):
        return [_plain(member, path) for member in value]
    return value if value is None else _word(value if isinstance(value, str) else str(value).lower(), path)


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _tree(node, path, yaml, depth=0)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path} is no YAML ({problem or str(error).splitlines()[0]}{where})", RULE, "correct it"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply", RULE, "correct it") from error


def _tree(node: Any, path: Path, yaml: Any, *, depth: int) -> Any:
    where = f"{path}, line {node.start_mark.line + 1}"
    require(depth <= 3, f"{where}: nested too deeply", NESTING, "correct it")  # here, because aliases multiply
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        for key, _ in node.value:
            require(isinstance(key, yaml.ScalarNode), f"{where}: a name is a list or a mapping", RULE, "correct it")
        return Table((_word(key.value, path), _tree(value, path, yaml, depth=depth + 1)) for key, value in node.value)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_tree(member, path, yaml, depth=depth + 1) for member in node.value]
    is_word = isinstance(node, yaml.ScalarNode) and node.tag in SCALAR_TAGS
    require(is_word or node.tag.endswith(":timestamp"), f"{where}: the tag {node.tag}", RULE, "remove it")
    if node.style is None:  # not quoted
        require(node.value, f"{where}: a name without a value", "a setting that is left open is null", "give a value")
        return None if node.value in UNSET else _word(node.value, path)
    return _word(node.value, path)


def _word(text: str, path: Path) -> str:
    """The text, if a command line could hold it."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        text = "\0"
    require("\0" not in text, f"{path} has a character that no word has", RULE, "remove it")
    return text


def flat(table: Table, sections: Collection[str], path: Path) -> Table:
    """The pairs with those of its sections in their places.

    Args:
        table: of a file.
        sections: names of groups.
        path: the file, for errors.

    Raises:
        UserError: names of other mappings and of nested lists, all of them.
    """
    pairs, nested = Table(), Table()
    for name, value in table:
        is_section = isinstance(value, Table) and name in sections
        for own, member in value if is_section else [(name, value)]:
            is_list = isinstance(member, list) and all(isinstance(word, str) for word in member)
            (pairs if member is None or isinstance(member, str) or is_list else nested).append((own, member))
    names = ", ".join(dict.fromkeys(name for name, _ in nested))
    require(not nested, f"{path} has no word or list of words for {names}", NESTING, "correct it")
    return pairs
