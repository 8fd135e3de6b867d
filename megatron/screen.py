"""What people see: lines that fit the screen, and progress with the time left, to standard error."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
INTERVAL_SECONDS = 30.0


def columns() -> int:
    """Columns of the terminal that the output goes to (``COLUMNS`` wins); 0 for a log, whose lines stay whole."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else 0


def wrapped(text: str) -> str:
    """The lines of a text, broken between words where they are wider than the screen; in a log they stay whole."""
    width = columns()
    if not width:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(
            line, max(40, width), subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        ) or [""]
    return "\n".join(lines)


def fitted(parts: Sequence[tuple[int, str]], tail: str = "") -> str:
    """Parts with bars between them; on a narrow screen those with the highest numbers are left out, 0 never."""
    kept, width = [part for part in parts if part[1]], columns()
    while True:
        line, last = " | ".join(text for _, text in kept) + tail, max(rank for rank, _ in kept)
        if not width or len(line) <= width or last == 0:
            return line
        kept = [part for part in kept if part[0] < last]


def say(text: str, *, to_errors: bool = False, write: Callable[..., object] = print) -> bool:
    """Print a line for a person; a closed or full output is not worth a run. Returns whether it took the line.

    Args:
        text: the line.
        to_errors: to standard error instead of standard output.
        write: takes the text, and ``file=``.
    """
    stream = sys.stderr if to_errors else sys.stdout
    try:
        write(text, file=stream)
        if stream is not None:
            stream.flush()
    except OSError as error:
        drop(2 if to_errors else 1, for_good=isinstance(error, BrokenPipeError))
        return False
    return True


def drop(descriptor: int, *, for_good: bool) -> None:
    """Send what an output did not take nowhere, so that it can be flushed at exit; a disk may have room for the next line, the
    reader of a pipe does not come back."""
    kept = os.dup(descriptor)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
    if not for_good:
        (sys.stderr if descriptor == 2 else sys.stdout).flush()
        os.dup2(kept, descriptor)
    os.close(kept)


def format_seconds(seconds: float) -> str:
    """A duration for people: 45 s, 12:05 min, 3:20 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


class Progress:
    """How far something is: redrawn in one line on a terminal, elsewhere a line every half minute; gone at its end.

    Args:
        what: names it, such as ``encoding``.
        total: units in all; None: not known.
        unit: what is counted; ``B`` is shown in multiples.
        start: units that were done before.
        enabled: False says nothing, as on all ranks but the first.
        interval_seconds: between lines where there is no terminal.
    """

    def __init__(
        self, what: str, total: int | None = None, *, unit: str = "", start: int = 0, enabled: bool = True,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:  # fmt: skip
        self.what, self.total, self.unit, self.start, self.done = what, total, unit, start, start
        self.note, self.interval = "", interval_seconds
        self.started = self._last = time.monotonic()
        self._is_shown, self.bar = enabled and sys.stderr is not None, None
        if self._is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=start, desc=what, unit=unit or "it", unit_scale=unit == "B", dynamic_ncols=True,
                leave=False, delay=1,  # what takes no second needs none
            )  # fmt: skip

    def update(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are done; ``note`` stands behind the numbers."""
        self.done, self.note = self.done + count, note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self._is_shown and time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            say(self.line(), to_errors=True)

    def line(self) -> str:
        """``encoding: 40%, 12 MB of 30 MB, 1:20 min left; note``."""
        seconds, done = time.monotonic() - self.started, self.done - self.start
        if self.total:
            left = seconds / max(1, done) * max(0, self.total - self.done)
            amount = f"{self.done / self.total:.0%}, {self._amount(self.done)} of {self._amount(self.total)}"
            amount += f", {format_seconds(left)} left" if done else ""
        else:
            amount = f"{self._amount(self.done)} in {format_seconds(seconds)}"
        return f"{self.what}: {amount}" + (f"; {self.note}" if self.note else "")

    def _amount(self, count: int) -> str:
        return f"{count / 1e6:,.1f} MB" if self.unit == "B" else f"{count:,} {self.unit}".rstrip()

    def over(self, items: Iterable[Item], *, each: int = 1) -> Iterator[Item]:
        """The items; each counts ``each`` units when the next is asked for."""
        with self:
            for item in items:
                yield item
                self.update(each)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
