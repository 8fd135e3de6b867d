"""Text files as bytes, plain or compressed, read as their standards say; every error names the file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron.errors import Failure, UserError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_ONE_VALUE = re.compile(rb"\[\s*(\{.*)?|\{")


def uncompressed_name(path: Path) -> str:
    """Return the file name without the suffix of a compression."""
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, ends included; only a newline byte ends one (U+2028 or U+0085 in a text do not).

    Raises:
        UserError: damaged compression, or UTF-16.
        Failure: the disk failed.
    """
    number = 0
    with _named(path) as where, _open(path) as file:
        for line in file:
            number += 1
            where[0] = f" after line {number}"
            yield line


def read_json_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file of JSON lines; a file that holds one JSON value instead is refused."""
    is_first = True
    for line in read_lines(path):
        if is_first and line.strip():
            is_first = False
            if _ONE_VALUE.fullmatch(line.strip()):
                raise UserError(
                    f"{path} holds one JSON {'array' if line.lstrip()[:1] == b'[' else 'object spread over lines'}",
                    "JSON lines have one object a line",
                    f"convert it, for example with: jq -c '.[]' {shlex.quote(str(path))} > lines.jsonl",
                )
        yield line


def read_whole(path: Path) -> bytes:
    """Return the content of a file. Raises as :func:`read_lines` does."""
    with _named(path), _open(path) as file:
        return file.read()


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open for reading, behind the byte order mark that some editors write."""
    suffix = path.suffix.lower()
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
    if suffix in openers and path.stat().st_size == 0:  # some of the libraries take that for a stream of nothing
        raise EOFError("it is empty")
    with openers.get(suffix, io.open)(path, "rb") as file:  # type: ignore[operator]
        head = file.peek(4)[:4]
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            cure = f"convert it: iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
            raise UserError(f"{path} is UTF-16", "text must be UTF-8", cure)
        yield file


def _open_zstandard(path: Path, mode: str) -> io.BufferedReader:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("pyarrow is not installed", ".zst input needs it", "run pip install pyarrow") from error
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), mode), "zstd")
    return io.BufferedReader(stream, 1 << 20)


@contextmanager
def _named(path: Path) -> Iterator[list[str]]:
    """Give errors of reading the name of the file; the yielded list holds how far it was read."""
    where = [""]
    try:
        yield where
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise Failure(
                f"{path} cannot be read{where[0]} ({error.strerror})",
                "input must be readable to its end",
                "check the file, its permissions and its disk",
            ) from error
        raise UserError(
            f"{path} is damaged or cut off{where[0]} ({error})",
            f"its name says that it is compressed ({path.suffix})",
            "copy or compress it again",
        ) from error
