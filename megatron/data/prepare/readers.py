"""Input of the preprocessing: JSON lines, plain text and HTML (also compressed), parquet, saved ``datasets``, in batches.

A reader yields batches of rows without looking into them: parsing is the workers' part. It names every row by file and
line, so that a wrong one can be reported.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.prepare.streams import COMPRESSIONS, read_json_lines, read_lines, read_whole, uncompressed_name
from megatron.errors import UserError, require

FORMATS = ("jsonl", "text", "html", "parquet", "datasets")
_SUFFIXES = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".txt", ".md", ".markdown", ".rst", ".py"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".parquet": "parquet",
}
_CONVERTERS = {  # of files that hold text in a form that only their programs read
    ".pdf": "pdftotext IN.pdf OUT.txt",
    ".ipynb": "jupyter nbconvert --to markdown IN.ipynb",
    **{suffix: f"pandoc IN{suffix} -o OUT.txt" for suffix in (".docx", ".odt", ".epub", ".rtf", ".tex")},
}
_UNITS = {"jsonl": "line", "text": "document", "html": "page"}
_BATCH_ROWS = 2048
_BATCH_BYTES = 1 << 19
_SHOWN_NAMES = 10


@dataclass(frozen=True)
class Source:
    """One input: a file, or a saved ``datasets`` folder."""

    path: Path
    format: str


@dataclass(frozen=True)
class Batch:
    """Rows of one input.

    Attributes:
        source: path of the input, for reports.
        unit: what ``first`` counts: line, row, document or page (of HTML).
        first: number of the first row, from 1.
        rows: raw JSON lines, texts or pages (bytes), or (parquet, datasets) rows as dictionaries of the keys.
        bytes_read: bytes of the file behind these rows, for the progress bar (0 where unknown).
    """

    source: str
    unit: str
    first: int
    rows: Sequence[bytes] | Sequence[dict[str, Any]]
    bytes_read: int


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def find_sources(
    inputs: Sequence[str], format: str | None = None, *, root: str | None = None, say: Callable[[str], None] = _say
) -> list[Source]:
    """Return the inputs in order; folders and glob patterns stand for the files in them, sorted by name.

    Args:
        inputs: files, folders (of files, or saved by ``datasets``) or patterns.
        format: one of FORMATS; None decides by file name.
        root: folder that relative inputs lie in; default: the working directory.
        say: told which files of a folder are left out, because their names tell no format.

    Raises:
        UserError: nothing matches, or a file's name does not tell its format.
    """
    sources: list[Source] = []
    for text in inputs:
        require(
            text.strip(), "--input ''", "it must name a file, a folder or a pattern", "check the variable it comes from"
        )
        path = Path(os.path.expanduser(root or "."), os.path.expanduser(text))
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            sources.append(_saved_dataset(path))
            continue
        if path.is_dir():
            found, strange = _walk(path)
            paths = [file for file in found if format or _format_of(file)]
            left = [file for file in found if file not in set(paths)]
            _name_left_out(text, path, left, strange, say=say)
        else:
            paths = [path] if path.is_file() else _matches(text, path, say=say)
        if not paths:
            raise UserError(
                f"--input {text}: nothing to read there", "it must be a file, a folder or a pattern", "check it"
            )
        for file in paths:
            kind = format or _format_of(file)
            if kind is None:
                command = _CONVERTERS.get(file.suffix.lower())
                raise UserError(
                    f"--input {file}: its name does not tell the format",
                    f"known are {', '.join(_SUFFIXES)}, also with {', '.join(COMPRESSIONS)}",
                    f"convert it first: {command}" if command else f"add --input-format {'|'.join(FORMATS)}",
                )
            sources.append(Source(file, kind))
    return sources


def _matches(text: str, pattern: Path, *, say: Callable[[str], None]) -> list[Path]:
    """The files that match a pattern, sorted. Folders are no files; those of which it reaches nothing are named."""
    found = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    files = [path for path in found if not path.is_dir()]
    inside = {folder for file in files for folder in file.parents}
    if left := [str(path) for path in found if path.is_dir() and path not in inside]:
        say(f"--input {text}: not looked at: the folders {_shown(left)} (name them, or write ** for all below)")
    return files


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a folder and of those in it, sorted, and in words what of it is not looked at.

    Links are followed, into each folder once; hidden files and folders, whose names begin with a dot, are left alone.
    """
    files: list[Path] = []
    broken: list[str] = []
    seen: set[tuple[int, int]] = set()
    hidden = 0
    for root, folders, names in os.walk(folder, followlinks=True):
        state = os.stat(root)
        if (state.st_dev, state.st_ino) in seen:  # a link to a folder that is above it or beside it
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if path.is_file():
                files.append(path)
            else:
                broken.append(str(path.relative_to(folder)))
    strange = [f"{hidden} hidden files or folders"] * (hidden > 0)
    return sorted(files), strange + ([f"no files or broken links: {_shown(sorted(broken))}"] if broken else [])


def _shown(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {len(names) - _SHOWN_NAMES} more" * (len(names) > _SHOWN_NAMES))


def _name_left_out(
    text: str, folder: Path, files: list[Path], strange: list[str], *, say: Callable[[str], None]
) -> None:
    """Say what of a folder is not read, and how to read it."""
    if strange:
        say(f"--input {text}: not looked at: {'; '.join(strange)}")
    if files:
        say(
            f"--input {text}: left out {len(files)} of its files, whose names tell no format: "
            f"{_shown([str(file.relative_to(folder)) for file in files])} (--input-format reads all)"
        )
    for suffix in sorted({file.suffix.lower() for file in files} & set(_CONVERTERS)):
        say(f"  {suffix} files can be converted: {_CONVERTERS[suffix]}")


def _format_of(path: Path) -> str | None:
    return _SUFFIXES.get(Path(uncompressed_name(path)).suffix.lower())


def _saved_dataset(path: Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        names = {state.parent.name for state in path.glob("*/state.json")} or {"train"}
        splits = sorted(names, key=lambda name: (name != "train", name))  # the one most likely meant first
        raise UserError(
            f"--input {path} holds the splits {', '.join(splits)}",
            "one data set is made of one split",
            f"choose one, for example --input {path / splits[0]}",
        )
    return Source(path, "datasets")


def total_bytes(sources: Sequence[Source]) -> int | None:
    """Return the bytes that the readers will report; None when some input cannot tell."""
    if any(
        source.format in ("parquet", "datasets") or source.path.suffix.lower() in COMPRESSIONS for source in sources
    ):
        return None
    return sum(source.path.stat().st_size for source in sources)


def read_batches(source: Source, keys: Sequence[str], *, text_split: str = "file") -> Iterator[Batch]:
    """Yield the rows of one input.

    Args:
        source: the input.
        keys: columns to read from parquet and datasets.
        text_split: for plain text, ``file`` (a file is a document) or ``blank-line`` (blocks between blank lines are).

    Raises:
        ValueError: a column is missing or a library is not installed.
        OSError: the file cannot be read.
    """
    if source.format in _UNITS:
        if source.format == "jsonl":
            rows = read_json_lines(source.path)
        else:  # a page is parsed as a whole
            rows = _texts(source.path, text_split if source.format == "text" else "file")
        yield from _batched(rows, str(source.path), _UNITS[source.format])
    else:
        first = 1
        tables = _parquet(source.path, keys) if source.format == "parquet" else _datasets(source.path, keys)
        for records in tables:
            yield Batch(str(source.path), "row", first, records, 0)
            first += len(records)


def _texts(path: Path, text_split: str) -> Iterator[bytes]:
    if text_split == "file":
        yield read_whole(path)
        return
    block: list[bytes] = []
    for line in read_lines(path):
        if line.strip():
            block.append(line)
        elif block:
            yield b"".join(block)
            block = []
    if block:
        yield b"".join(block)


def _batched(rows: Iterator[bytes], source: str, unit: str) -> Iterator[Batch]:
    """Group rows by number and by size: long documents must not make one worker's batch a hundred times another's."""
    batch: list[bytes] = []
    first, size = 1, 0
    for row in rows:
        batch.append(row)
        size += len(row)
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield Batch(source, unit, first, batch, size)
            first += len(batch)
            batch, size = [], 0
    if batch:
        yield Batch(source, unit, first, batch, size)


def _parquet(path: Path, keys: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("pyarrow is not installed", "parquet input needs it", "run pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, keys)
            for part in file.iter_batches(batch_size=_BATCH_ROWS // 4, columns=list(keys)):
                yield part.to_pylist()
    except (
        pyarrow.ArrowException,
        UnicodeDecodeError,
        OSError,
    ) as error:  # of a damaged file, an OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{path} ({error})", "it must be a sound parquet file", "check it and --input-format"
        ) from error


def _datasets(path: Path, keys: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError("datasets is not installed", "this input needs it", "run pip install datasets") from error
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:  # of its JSON and Arrow files, whichever is damaged
        raise UserError(
            f"{path} ({error})", "it must be a sound folder of datasets", "copy or save it again"
        ) from error
    _check_columns(path, data.column_names, keys)
    data = data.select_columns(list(keys))
    step = _BATCH_ROWS // 4
    for start in range(0, len(data), step):
        columns = data[start : start + step]
        yield [dict(zip(keys, row)) for row in zip(*(columns[key] for key in keys))]


def _check_columns(path: Path, columns: Sequence[str], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in columns]
    if missing:
        raise UserError(
            f"{path} has the columns {', '.join(columns)}, not {missing[0]}",
            "--json-keys names columns",
            f"choose of them, for example --json-keys {(*columns, 'KEY')[0]}",
        )
