"""Text to Megatron token files, on many processes. tools/preprocess_data.py is its command line.

The reader hands batches of raw rows to the workers, which parse and encode them with the batch call of the fast
tokenizers; results come back in order, as arrays. So the output does not depend on the number of workers. At most a few
batches per worker are in flight, so memory stays small for inputs of any size.
"""

from __future__ import annotations

import collections
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.identity import tokenizer_fingerprint
from megatron.data.prepare.readers import Batch, Source, read_batches
from megatron.data.prepare.rows import parse_row
from megatron.data.prepare.word_cache import batch_encoder
from megatron.data.prepare.writer import IndexedDatasetWriter, token_dtype
from megatron.data.tokenizer import FILES, Tokenizer, tokenizer_from_spec
from megatron.errors import Failure, UserError

_IN_FLIGHT = 4  # batches per worker
_SHOWN_ERRORS = 20


@dataclass(frozen=True)
class PreprocessOptions:
    """What to make of the input.

    Attributes:
        output_prefix: data sets are called OUTPUT_KEY_document.
        keys: entries of a JSON object (or columns) to encode, one data set each; plain text is the first key.
        append_eod: end every document with the tokenizer's end-of-document id.
        max_errors: malformed rows to accept; one more stops the run without output. None accepts any number.
        text_split: see readers.read_batches.
        workers: processes that encode; 1 encodes in this process.
    """

    output_prefix: str
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    max_errors: int | None = 0
    text_split: str = "file"
    workers: int = 1

    def prefix(self, key: str) -> str:
        """Return the prefix of the data set of ``key``."""
        return f"{self.output_prefix}_{key}_document"


@dataclass
class Encoded:
    """One encoded batch. Per key: tokens [sum(sizes)], sizes [documents] and the bytes of text."""

    tokens: list[np.ndarray]
    sizes: list[np.ndarray]
    text_bytes: list[int]
    empty: int
    errors: list[str]
    bytes_read: int


@dataclass
class Summary:
    """What a run read and wrote. ``documents`` and ``tokens`` are those written, per key; ``seconds`` is wall time."""

    documents: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    text_bytes: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    malformed: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


class BatchEncoder:
    """Parses and encodes batches; one lives in each worker."""

    def __init__(self, spec: dict[str, Any], options: PreprocessOptions) -> None:
        """Build the tokenizer of ``spec`` (see tokenizer_from_spec)."""
        self._tokenizer = tokenizer_from_spec(spec)
        self._encode = batch_encoder(self._tokenizer)
        self._options = options
        self._dtype = token_dtype(self._tokenizer.vocab_size)

    def __call__(self, batch: Batch, parse_only: bool) -> Encoded:
        """Encode a batch; with ``parse_only`` only look for malformed rows."""
        rows: list[list[str]] = []
        errors = []
        for number, raw in enumerate(batch.rows, start=batch.first):
            try:
                texts = parse_row(raw, batch.unit, self._options.keys)
            except ValueError as error:
                errors.append(f"{batch.source}, {batch.unit} {number}: {error}")
                continue
            if texts is not None:
                rows.append(texts)
        encoded = Encoded([], [], [], 0, errors, batch.bytes_read)
        for column in range(0 if parse_only else len(self._options.keys)):
            texts = [row[column] for row in rows if row[column]]
            ids = self._encode(texts)
            self._append(encoded, ids)
            encoded.text_bytes.append(sum(len(text.encode("utf-8")) for text in texts))
            encoded.empty += len(rows) - len(encoded.sizes[-1])
        return encoded

    def _append(self, encoded: Encoded, ids: list[list[int]]) -> None:
        ids = [document for document in ids if document]
        if self._options.append_eod:
            assert self._tokenizer.eod_id is not None  # preprocess() refuses it
            for document in ids:
                document.append(self._tokenizer.eod_id)
        sizes = np.fromiter(map(len, ids), np.int32, len(ids))
        flat = np.empty(int(sizes.sum()), self._dtype)
        end = 0
        for document in ids:
            flat[end : end + len(document)] = document
            end += len(document)
        encoded.tokens.append(flat)
        encoded.sizes.append(sizes)


def preprocess(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    *,
    progress: Callable[[Encoded, Summary], None] = lambda encoded, summary: None,
) -> Summary:
    """Encode all sources into data sets called OUTPUT_KEY_document; on any error none of them appears.

    When malformed rows exceed ``max_errors``, the rest of the input is only parsed: the error then names all of them.

    Raises:
        ValueError: ``append_eod`` without an end-of-document id; nothing to write; unreadable input.
        UserError: too many malformed rows.
    """
    if options.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"--append-eod with {tokenizer.name}, which has no end-of-document token",
            "one is needed",
            "leave --append-eod out or use another tokenizer",
        )
    summary = Summary(text_bytes=dict.fromkeys(options.keys, 0))
    started = time.monotonic()
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedDatasetWriter(options.prefix(key), dtype)) for key in options.keys]
        for encoded in _encode_all(sources, tokenizer, options, summary):
            summary.empty += encoded.empty
            summary.malformed += len(encoded.errors)
            summary.errors += encoded.errors[: _SHOWN_ERRORS - len(summary.errors)]
            for key, writer, tokens, sizes, size in zip(
                options.keys, writers, encoded.tokens, encoded.sizes, encoded.text_bytes
            ):
                writer.add_documents(tokens, sizes)
                summary.text_bytes[key] += size
                summary.documents[key], summary.tokens[key] = writer.num_documents, writer.num_tokens
            progress(encoded, summary)
        if _too_many(summary, options):
            raise _malformed(summary, options)
        if not all(summary.tokens.get(key) for key in options.keys):
            raise UserError("the input holds no text", "at least one token is needed", "check --input and --json-keys")
        for key, writer in zip(options.keys, writers):
            writer.prepare(_meta(key, tokenizer, options, summary))
        for writer in writers:  # from here on only names change
            writer.publish()
    summary.seconds = time.monotonic() - started
    return summary


def _malformed(summary: Summary, options: PreprocessOptions) -> UserError:
    """More malformed rows than allowed; nothing was written."""
    more = summary.malformed - len(summary.errors)
    shown = [f"  {error}" for error in summary.errors] + [f"  and {more} more"] * (more > 0)
    return UserError(
        "\n".join([f"{summary.malformed} malformed rows:", *shown]),
        f"at most {options.max_errors} are allowed, so nothing was written",
        "correct them, or leave them out with --max-errors N or --skip-errors",
    )


def _too_many(summary: Summary, options: PreprocessOptions) -> bool:
    return options.max_errors is not None and summary.malformed > options.max_errors


def _meta(key: str, tokenizer: Tokenizer, options: PreprocessOptions, summary: Summary) -> dict[str, Any]:
    return {
        "format": 1,
        "documents": summary.documents[key],
        "tokens": summary.tokens[key],
        "text_bytes": summary.text_bytes[key],
        "append_eod": options.append_eod,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "malformed": summary.malformed,
        "empty": summary.empty,
        "tokenizer": portable_spec(tokenizer, Path(options.output_prefix).parent),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }


def portable_spec(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Return the spec with files relative to ``folder``, so that data and tokenizer can be moved together."""
    spec = dict(tokenizer.spec)
    for key in FILES:
        if spec.get(key) and os.path.exists(spec[key]):
            spec[key] = os.path.relpath(os.path.realpath(spec[key]), folder.resolve())
    return spec


def _encode_all(
    sources: Sequence[Source], tokenizer: Tokenizer, options: PreprocessOptions, summary: Summary
) -> Iterator[Encoded]:
    """Yield the encoded batches in input order."""
    batches = (
        batch for source in sources for batch in read_batches(source, options.keys, text_split=options.text_split)
    )
    if options.workers <= 1:
        encoder = BatchEncoder(tokenizer.spec, options)
        for batch in batches:
            yield encoder(batch, _too_many(summary, options))
        return
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=get_context("spawn"),  # forking a process with threads can hang
        initializer=_start_worker,
        initargs=(tokenizer.spec, options, os.getpid()),
    )
    with pool:
        waiting: collections.deque[Future[Encoded]] = collections.deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode_in_worker, batch, _too_many(summary, options)))
                if len(waiting) >= _IN_FLIGHT * options.workers:
                    yield _result(pool, waiting.popleft())
            while waiting:
                yield _result(pool, waiting.popleft())
        except BrokenProcessPool as error:
            _abandon(pool)
            raise Failure(
                f"one of {options.workers} workers was killed, probably for lack of memory",
                "nothing was written",
                "use fewer --workers",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(pool: ProcessPoolExecutor, future: Future[Encoded]) -> Encoded:
    """The result of a task. Notices a killed worker also where the pool does not: one that dies while it sends a result
    leaves the pool waiting for the rest of it for ever.

    Raises:
        BrokenProcessPool: a worker is gone.
    """
    internals: Any = pool
    while not wait([future], timeout=1.0).done:
        if any(worker.exitcode is not None for worker in list((internals._processes or {}).values())):
            raise BrokenProcessPool("a worker was killed")
    return future.result()


def _abandon(pool: ProcessPoolExecutor) -> None:
    """End the workers of a broken pool, and the waits of its threads for them (cpython issue 94777, on older versions)."""
    internals: Any = pool
    for worker in list((internals._processes or {}).values()):
        worker.kill()
    internals._call_queue._reader.close()
    internals._result_queue._writer.close()


_encoder: BatchEncoder | None = None  # of this worker process


def _start_worker(spec: dict[str, Any], options: PreprocessOptions, parent: int) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    _encoder = BatchEncoder(spec, options)


def _exit_with_parent(parent: int) -> None:
    """End this worker when the main process was killed: nobody else would wake it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    sys.stderr.flush()
    os._exit(1)


def _encode_in_worker(batch: Batch, parse_only: bool) -> Encoded:
    assert _encoder is not None
    return _encoder(batch, parse_only)
