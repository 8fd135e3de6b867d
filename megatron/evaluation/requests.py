"""From texts to scored requests: where the answer starts, what is cut, how long targets are split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from megatron.errors import UserError
from megatron.evaluation.scorer import Request


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
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("results-*.jsonl")):
            self._read(path)
        if write:
            self._file = open(folder / f"results-{rank:05d}.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - kept open

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (json.JSONDecodeError, KeyError, TypeError):  # the last line of a process that was killed
                continue

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
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._file.flush()
