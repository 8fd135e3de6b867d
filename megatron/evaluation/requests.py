"""From texts to scored requests: where the answer starts, what is cut, how long targets are split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from megatron.data.tokenizer import Tokenizer
from megatron.errors import Failure, UserError, require
from megatron.evaluation.scorer import Request
from megatron.runs.record import read_records


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation, split as lm-eval's own models do.

    Spaces at the end of the context move to the continuation; both are encoded together, so that the ids are those of
    the running text. Where a merge leaves the continuation without a token of its own, the two are encoded apart.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, first = encode(context + continuation), encode(context)
    if len(whole) <= len(first):
        return first, encode(continuation)
    return first, whole[len(first) :]


def end_of_document(tokenizer: Tokenizer) -> int:
    """The token after which a text without context is scored.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eod_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name} has no end-of-document token",
            "a text without context is scored after it",
            "use the tokenizer of the training data",
        )
    return tokenizer.eod_id


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and its continuation, both with at least one token.

    Raises:
        UserError: one of them has none.
    """
    if context:
        first, target = encode_pair(tokenizer.encode, context, continuation)
    else:
        first, target, end = [], tokenizer.encode(continuation), end_of_document(tokenizer)
        own_start = len(target) > 1 and target[0] == end
        first, target = (target[:1], target[1:]) if own_start else ([end], target)
    require(first, f"context {context!r} is blank", "a blank text has no token to start from", "leave it empty")
    require(target, f"continuation {continuation!r} is empty", "a likelihood needs a token", "drop the item")
    return first, target


def windows(context: Sequence[int], target: Sequence[int], *, row_length: int, key: str = "") -> list[Request]:
    """Requests that score ``target`` given ``context`` in rows of at most ``row_length`` tokens.

    Usually one, with the left end of the context cut off. A longer target becomes disjoint pieces, each of which sees as
    much of what comes before it as fits (lm-eval's rolling windows); their scores add up.

    Args:
        context: at least one token.
        target: tokens to score.
        row_length: tokens of context and target together; for a causal model one more than its inputs.
        key: noise key; pieces after the first have their own.
    """
    if row_length < 2 or not context:
        raise UserError(
            f"rows of {row_length} tokens with {len(context)} context tokens",
            "a window holds at least one context and one target token",
            "use a longer --seq-length, and EOD as context of a text without one",
        )
    tokens, offset, piece = [*context, *target], len(context), row_length - 1
    result = []
    for start in range(offset, len(tokens), piece):
        end = min(start + piece, len(tokens))
        own_key = key if start == offset else f"{key}#{start - offset}"
        result.append(Request(tuple(tokens[max(end - row_length, 0) : start]), tuple(tokens[start:end]), own_key))
    return result


def as_whole(value: Any) -> int:
    """A count from a text or a number.

    Raises:
        ValueError, TypeError, OverflowError: no whole number.
    """
    number = int(value)
    if isinstance(value, bool) or not (isinstance(value, str) or number == value):
        raise ValueError(f"{value!r} is no whole number")
    return number


def whole_number(name: str, value: Any, *, at_least: int = 1) -> int:
    """A count from a flag or a model argument.

    Raises:
        UserError: no whole number, too small, or beyond any use.
    """
    try:
        number = as_whole(value)
    except (ValueError, TypeError, OverflowError):
        number = at_least - 1
    require(
        at_least <= number <= 10**15, f"{name} {value!r}", f"it is a whole number from {at_least}", "correct the number"
    )
    return number


class ResultCache:
    """Finished results on disk, one JSON object a line, so that an interrupted evaluation goes on where it was.

    Every rank appends to its own file and reads all of them, so the number of ranks may change in between.

    Args:
        folder: where the files are; None: keep nothing.
        fingerprint: everything a result depends on besides the request (checkpoint, estimator, draws, seed, ...).
        rank: of this process.
        write: False only reads (tensor-parallel peers, whose results are the same).
    """

    def __init__(self, folder: Path | None, *, fingerprint: str, rank: int = 0, write: bool = True) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._known: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("results-*.jsonl")):
                whole = [record for record in read_records(path) if record.keys() >= {"key", "value"}]
                self._known |= {record["key"]: record["value"] for record in whole}
            if write:
                self._file = _open_to_append(folder / f"results-{rank:05d}.jsonl")
        except OSError as error:
            raise _unusable(folder, error) from error

    def key(self, kind: str, *parts: Any) -> str:
        """Name of a result: a hash of the fingerprint, the kind of request and its arguments."""
        text = json.dumps([self.fingerprint, kind, parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The stored value, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Store a JSON value; on disk when the call returns."""
        self._known[key] = value
        if self._file is None or self.folder is None:
            return
        try:
            self._file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unusable(self.folder, error) from error


def _open_to_append(path: Path) -> IO[str]:
    """The file of one rank; a line that a kill cut off is ended first, so that the next one stands alone."""
    is_torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - kept open
    if is_torn:
        file.write("\n")
    return file


def _unusable(folder: Path, error: OSError) -> Failure:
    return Failure(
        f"{folder}: {error.strerror or error}",
        "finished results are kept there",
        "free space, mend permissions, or name another place (--output, --results_path); run again to go on",
    )
