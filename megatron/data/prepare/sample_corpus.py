"""A small real text that every machine has: the documentation of Python's standard library (about 2 MB).

Documents are the topics of ``help()`` (the language reference), and for each module its own docstring with those of its
functions, and each class with its methods. Docstrings are read from the source files with ``ast``: nothing is imported,
so nothing runs, and the same Python version gives the same text everywhere.

The standard library repeats itself (decimal and _pydecimal, json.dump and json.dumps). So that a validation document
teaches nothing that training has seen, a docstring that occurs twice is kept once, and documents that share any run of
``NGRAM_WORDS`` words are put on the same side of the split together.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron.data.prepare.documents import Document
from megatron.data.prepare.near_duplicates import joined
from megatron.errors import UserError
from megatron.files import make_folder, replace_file

NGRAM_WORDS = 13  # the usual length in contamination checks of language models
_MIN_CHARS = 200  # a shorter class goes into its module's document; a shorter document is left out
_SKIPPED_FOLDERS = {"__pycache__", "ensurepip", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
_SKIPPED_FOLDERS |= {"test", "tests", "turtledemo"}
_WORDS = re.compile(r"\w+")
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_documents() -> list[Document]:
    """Return the documents of this Python's standard library, in a fixed order, duplicates removed."""
    seen: set[str] = set()
    documents = []
    for source, pieces in [*_topics(), *_modules(Path(sysconfig.get_path("stdlib")))]:
        fresh = []
        for heading, text in pieces:
            key = " ".join(_words(text))
            if key and key not in seen:
                seen.add(key)
                fresh.append(f"{heading}\n{text}" if heading else text)
        whole = "\n\n".join(fresh)
        if len(whole) >= _MIN_CHARS:
            documents.append(Document(source, whole + "\n"))
    return documents


_Pieces = list[tuple[str, str]]  # (heading or "", docstring)


def _topics() -> Iterator[tuple[str, _Pieces]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the docstrings are enough
        return
    for name in sorted(topics):
        yield f"help:{name}", [("", topics[name].strip())]


def _modules(root: Path) -> Iterator[tuple[str, _Pieces]]:
    for path in sorted(_source_files(root)):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):  # a few files hold templates or wrong code on purpose
            continue
        module: _Pieces = [("", ast.get_docstring(tree) or "")]
        for node in tree.body:
            if not isinstance(node, _Definition):
                continue
            pieces = list(_docstrings(node, ""))
            if isinstance(node, ast.ClassDef) and sum(len(text) for _, text in pieces) >= _MIN_CHARS:
                yield f"{name}:{node.name}", pieces
            else:
                module += pieces
        yield name, module


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _docstrings(node: _Definition, indent: str) -> Iterator[tuple[str, str]]:
    """Yield (signature, docstring) of a definition and, for a class, of what is defined in it."""
    text = ast.get_docstring(node)
    if text:
        inside = indent + "    "
        yield indent + _signature(node), "\n".join(inside + line if line else "" for line in text.splitlines())
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, _Definition):
                yield from _docstrings(child, indent + "    ")


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"


def split_documents(
    documents: Sequence[Document], *, seed: int = 1234, validation_fraction: float = 0.05, max_bytes: int | None = None
) -> tuple[list[Document], list[Document]]:
    """Return (training, validation) documents that share no run of ``NGRAM_WORDS`` words.

    Args:
        documents: texts to split.
        seed: seed of the choice and of the order within each side.
        validation_fraction: part of the bytes for validation, in (0, 0.5].
        max_bytes: UTF-8 bytes to keep over both sides; None keeps everything.

    Raises:
        ValueError: a fraction out of range, or too little text for both sides.
    """
    if not 0 < validation_fraction <= 0.5:
        raise UserError(f"validation fraction {validation_fraction}", "it must be above 0 and at most 0.5", "try 0.05")
    rng = random.Random(seed)
    groups = _connected(documents)
    rng.shuffle(groups)
    total = sum(_size(document) for group in groups for document in group)
    budget = total if max_bytes is None else min(total, max_bytes)
    wanted = budget * validation_fraction
    train: list[Document] = []
    validation: list[Document] = []
    validation_bytes = 0
    for group in sorted(groups, key=len):  # single documents first: a large group would be a lopsided validation set
        size = sum(map(_size, group))
        if validation_bytes + size <= wanted and size <= wanted / 2:
            validation += group
            validation_bytes += size
    chosen = set(validation)
    kept = validation_bytes
    for document in (document for group in groups for document in group if document not in chosen):
        if kept + _size(document) <= budget:
            train.append(document)
            kept += _size(document)
    if not train or not validation:
        raise UserError(
            f"{budget} bytes in {len(documents)} documents", "both sides need one at least", "raise --max-bytes"
        )
    rng.shuffle(train)
    rng.shuffle(validation)
    if shared := shared_runs(train, validation):
        raise AssertionError(f"{len(shared)} runs of words are on both sides of the split")
    return train, validation


def shared_runs(first: Iterable[Document], second: Iterable[Document]) -> set[str]:
    """Return the runs of ``NGRAM_WORDS`` normalised words (or whole shorter documents) that occur on both sides."""
    runs = {run for document in first for run in _runs(document.text)}
    return {run for document in second for run in _runs(document.text) if run in runs}


def _connected(documents: Sequence[Document]) -> list[list[Document]]:
    """Return groups of documents such that documents of different groups share no run of words."""
    owner: dict[str, int] = {}
    pairs = ((owner.setdefault(run, index), index) for index, own in enumerate(documents) for run in _runs(own.text))
    groups: dict[int, list[Document]] = {}
    for document, label in zip(documents, joined(len(documents), pairs).tolist()):
        groups.setdefault(label, []).append(document)
    return list(groups.values())


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _runs(text: str) -> Iterator[str]:
    words = _words(text)
    for start in range(max(1, len(words) - NGRAM_WORDS + 1)):
        yield " ".join(words[start : start + NGRAM_WORDS])


def _size(document: Document) -> int:
    return len(document.text.encode("utf-8"))


def write_jsonl(path: Path, documents: Iterable[Document]) -> int:
    """Write ``{"text": …, "source": …}`` lines; the file appears complete or not at all. Returns bytes of text."""
    make_folder(path.parent)
    rows = [{"text": document.text, "source": document.source} for document in documents]
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return sum(len(row["text"].encode()) for row in rows)
