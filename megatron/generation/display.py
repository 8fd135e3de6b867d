"""Show text being uncovered step by step: in place on a terminal, one line a step elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import torch

from megatron.generation.animation import width_of
from megatron.generation.diffusion import Step
from megatron.generation.text import TextTokenizer

NEW, RESET, DIM = "\x1b[1;32m", "\x1b[0m", "\x1b[2m"


class UncoverDisplay:
    """Draws the first row of every step.

    Args:
        tokenizer: turns tokens into text.
        mask_id: shown as ``_``; negative where a model has no mask, and every token may change in a step.
        stream: where to draw; colours (unless NO_COLOR is set) and redrawing only on a terminal.
    """

    def __init__(self, tokenizer: TextTokenizer, *, mask_id: int, stream: TextIO | None = None) -> None:
        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self.is_coloured = self.is_terminal and not os.environ.get("NO_COLOR")
        self._lines = 0

    def __call__(self, step: Step) -> None:
        """Draw one step."""
        text = self.render(step.tokens[0], step.uncovered[0])
        left, changed = int((step.tokens[0] == self.mask_id).sum()), int(step.uncovered[0].sum())
        label = f"step {step.index + 1}, " + (f"{left} masked" if self.mask_id >= 0 else f"{changed} changed")
        if not self.is_terminal:
            print(f"[{label}] {text}", file=self.stream, flush=True)
            return
        if self._lines:
            self.stream.write(f"\x1b[{self._lines}F\x1b[J")  # back to the first line of the last drawing
        shown = f"{DIM}[{label}]{RESET} {text}\n" if self.is_coloured else f"[{label}] {text}\n"
        self.stream.write(shown)
        self.stream.flush()
        self._lines = self._height(shown)

    def render(self, tokens: torch.Tensor, uncovered: torch.Tensor) -> str:
        """Text of one row [seq]; runs of known tokens are decoded together, so that characters of several tokens show."""
        parts: list[str] = []
        run: list[int] = []
        run_is_new = False

        def flush() -> None:
            if run:
                text = self.tokenizer.decode(run)
                parts.append(f"{NEW}{text}{RESET}" if run_is_new and self.is_coloured else text)
                run.clear()

        for position, (token, is_new) in enumerate(zip(tokens.tolist(), uncovered.tolist())):
            if position == 0 and token == self.tokenizer.eod_id:
                continue  # only says that a document begins
            if token == self.mask_id:
                flush()
                parts.append("_")
                continue
            if is_new != run_is_new:
                flush()
                run_is_new = is_new
            run.append(token)
        flush()
        return "".join(parts)

    def _height(self, shown: str) -> int:
        """Terminal lines that a drawing takes."""
        import re
        import shutil

        width = shutil.get_terminal_size().columns
        plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown)
        return sum(max(1, -(-width_of(line) // width)) for line in plain.rstrip("\n").split("\n"))
