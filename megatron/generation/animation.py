"""Text being uncovered, as one animated SVG: no script, no font, no other file; CSS moves it, and only where the reader allows.

What is drawn is the text itself. Animation hides each piece until its step, so a viewer without CSS, a print and a reader who
asks for reduced motion see the finished text.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from megatron.errors import require
from megatron.generation.diffusion import Step
from megatron.generation.text import TextTokenizer

COLUMNS = 64
MAX_FRAMES = 96
"""More steps than this share frames, so that a file stays small."""
FRAME_SECONDS, LEAST_SECONDS, MOST_SECONDS = 0.16, 3.0, 12.0
LEAD_SECONDS, HOLD_SECONDS = 0.8, 4.0
CELL, LINE, MARGIN = 9.6, 26, 24
"""Width of a character, height of a line and margin, px; a font size of 16 px has characters of 0.6 em."""

_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Piece:
    """Characters that appear together: one token, or several where a character takes more than one.

    ``step``: the forward pass that uncovered the last of them, from 0; None for given text.
    """

    text: str
    step: int | None


class StepRecorder:
    """Remembers one row and at which step each of its tokens was drawn: the ``on_step`` of a sampler, or ``on_token``.

    Args:
        given: ids that a causal model continues; a sampler of whole rows brings them itself.
    """

    def __init__(self, given: Sequence[int] = ()) -> None:
        self.tokens = list(given)
        self.step_of: dict[int, int] = {}

    def on_step(self, step: Step) -> None:
        """Note what a step of masked diffusion uncovered in the first row."""
        self.tokens = step.tokens[0].tolist()
        self.step_of.update(dict.fromkeys(step.uncovered[0].nonzero().flatten().tolist(), step.index))

    def on_token(self, row: int, token: int) -> None:
        """Note the next token of a causal model."""
        self.step_of[len(self.tokens)] = len(self.step_of)
        self.tokens.append(token)


def pieces_of(tokenizer: TextTokenizer, tokens: Sequence[int], step_of: Mapping[int, int]) -> list[Piece]:
    """The text of a row in pieces that appear at once.

    Args:
        tokenizer: turns tokens into text.
        tokens: [seq] ids of the finished row. What was drawn behind an end of document, up to the next given token, is left
            out, as it is when the text is printed; so is an end of document at the start.
        step_of: {position: step} of the drawn tokens; the others were given.
    """
    pieces: list[Piece] = []
    kept: list[int] = []
    waiting: list[int | None] = []
    shown, ended = "", False
    for position, token in enumerate(tokens):
        step = step_of.get(position)
        ended = step is not None and (ended or token == tokenizer.eod_id)
        if ended or (position == 0 and token == tokenizer.eod_id):
            continue
        kept.append(token)
        waiting.append(step)
        text = tokenizer.decode(kept)
        if text.endswith("\ufffd") and position + 1 < len(tokens):
            continue  # part of a character
        drawn = [value for value in waiting if value is not None]
        grown = text[len(shown) :] if text.startswith(shown) else tokenizer.decode([token])
        pieces.append(Piece(grown, max(drawn) if drawn else None))
        shown, waiting = text, []
    return pieces


def animation(pieces: Sequence[Piece], *, caption: str, columns: int = COLUMNS) -> str:
    """The SVG of a text in pieces, as XML: wrapped at ``columns`` characters, ``caption`` under it.

    Raises:
        UserError: no piece was drawn.
    """
    steps = sorted({piece.step for piece in pieces if piece.step is not None})
    require(bool(steps), "no token was drawn", "an animation shows tokens being uncovered", "ask for some")
    frames = min(len(steps), MAX_FRAMES)
    frame_of = {step: rank * frames // len(steps) for rank, step in enumerate(steps)}
    moving = min(max(frames * FRAME_SECONDS, LEAST_SECONDS), MOST_SECONDS)
    seconds = LEAD_SECONDS + moving + HOLD_SECONDS
    starts = [100 * (LEAD_SECONDS + moving * frame / frames) / seconds for frame in range(frames)]

    cells, lines = _place(pieces, columns)
    width = round(columns * CELL + 2 * MARGIN)
    captions = textwrap.wrap(_clean(caption), round(columns * 1.3)) or [""]
    bar = MARGIN + lines * LINE + 10
    height = bar + 18 + 18 * len(captions) + 8
    body = [_cell(text, row, column, None if step is None else frame_of[step]) for text, row, column, step in cells]
    text = _clean("".join(piece.text for piece in pieces))
    body.append(f'<rect class="track" x="{MARGIN}" y="{bar}" width="{width - 2 * MARGIN}" height="3" rx="1.5"/>')
    body.append(f'<rect class="bar" x="{MARGIN}" y="{bar}" width="{width - 2 * MARGIN}" height="3" rx="1.5"/>')
    body += [
        f'<text class="caption" x="{MARGIN}" y="{bar + 24 + 18 * number}">{escape(line)}</text>'
        for number, line in enumerate(captions)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title text">\n'
        f'<title id="title">Text being uncovered in {len(steps)} steps</title>\n'
        f'<desc id="text">{escape(caption)} The finished text: {escape(text)}</desc>\n'
        f"<style>{_style(starts, seconds, moving)}</style>\n"
        f'<rect class="page" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _style(starts: Sequence[float], seconds: float, moving: float) -> str:
    """Colours of a light and a dark page, and the frames: text shows from its frame on, its mask goes at that moment."""
    first, last = 100 * LEAD_SECONDS / seconds, 100 * (LEAD_SECONDS + moving) / seconds
    rules = [
        ".page{fill:#fff;stroke:#d0d7de}text{font:16px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#0a5cad;"
        "white-space:pre}text.given{fill:#57606a}.mask{fill:#c5d5ea;opacity:0}.track{fill:#e4e8ec}.bar{fill:#0a5cad}"
        "text.caption{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#57606a}",
        "@media(prefers-color-scheme:dark){.page{fill:#0d1117;stroke:#30363d}text{fill:#79b8ff}"
        "text.given,text.caption{fill:#9aa4af}.mask{fill:#2b4566}.track{fill:#21262d}.bar{fill:#58a6ff}}",
        "@media(prefers-reduced-motion:no-preference){",
        f".bar{{transform-box:fill-box;transform-origin:left;animation:bar {seconds:.2f}s linear infinite}}"
        f"@keyframes bar{{0%,{first:.2f}%{{transform:scaleX(0)}}{last:.2f}%,100%{{transform:scaleX(1)}}}}",
    ]
    for frame, start in enumerate(starts):
        shown = start + 0.6
        rules.append(
            f".t{frame}{{animation:t{frame} {seconds:.2f}s infinite}}.m{frame}{{animation:m{frame} {seconds:.2f}s infinite}}"
            f"@keyframes t{frame}{{0%,{start:.2f}%{{opacity:0;fill:#0a7d33}}{shown:.2f}%{{opacity:1;fill:#0a7d33}}"
            f"{min(shown + 9, 99.5):.2f}%,100%{{opacity:1}}}}"
            f"@keyframes m{frame}{{0%,{start:.2f}%{{opacity:1}}{shown:.2f}%,100%{{opacity:0}}}}"
        )
    return "".join([*rules, "}"])


def _cell(text: str, row: int, column: int, frame: int | None) -> str:
    """One piece within one line; drawn ones lie over the mask that stands for them before."""
    x, y, width = MARGIN + column * CELL, MARGIN + row * LINE, width_of(text) * CELL
    label = escape(text, quote=False)
    fitted = f'textLength="{width:.1f}"'  # whatever monospaced font there is
    if frame is None:
        return f'<text class="given" x="{x:.1f}" y="{y + 17}" {fitted}>{label}</text>' if text.strip() else ""
    mask = f'<rect class="mask m{frame}" x="{x + 1:.1f}" y="{y + 2}" width="{width - 2:.1f}" height="20" rx="4"/>'
    return mask + (f'<text class="t{frame}" x="{x:.1f}" y="{y + 17}" {fitted}>{label}</text>' if text.strip() else "")


def _place(pieces: Sequence[Piece], columns: int) -> tuple[list[tuple[str, int, int, int | None]], int]:
    """Lay pieces out: (text, line, column, step) of each part that lies in one line, and the number of lines."""
    texts = [_clean(piece.text) for piece in pieces]
    owner = [index for index, text in enumerate(texts) for _ in text]
    spots, lines = _wrapped("".join(texts), columns)
    placed: list[tuple[str, int, int, int | None]] = []
    for (index, row), part in groupby(zip(owner, spots, "".join(texts)), key=lambda item: (item[0], item[1][0])):
        shown = [(spot[1], character) for _, spot, character in part if spot[1] is not None and character != "\n"]
        if shown:
            column = shown[0][0] or 0
            placed.append(("".join(character for _, character in shown), row, column, pieces[index].step))
    return placed, lines


def _wrapped(text: str, columns: int) -> tuple[list[tuple[int, int | None]], int]:
    """(line, column) of every character, broken at spaces, and the number of lines; a word longer than a line is cut.

    The column of a space that a line ends with is None: it is not drawn.
    """
    spots: list[tuple[int, int | None]] = []
    row = column = 0
    for word in re.findall(r"\n|[^\S\n]|\S+", text):
        if word == "\n":
            spots.append((row, None))
            row, column = row + 1, 0
            continue
        if column and column + width_of(word) > columns:
            if word.isspace():
                spots.append((row, None))
                row, column = row + 1, 0
                continue
            row, column = row + 1, 0
        for character in word:
            if column + width_of(character) > columns:
                row, column = row + 1, 0
            spots.append((row, column))
            column += width_of(character)
    return spots, row + 1


def _clean(text: str) -> str:
    """Tabs as spaces, line ends as line feeds, and what XML cannot hold as a replacement character."""
    return _NOT_XML.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4))


def width_of(text: str) -> int:
    """Cells of a monospaced line: 2 for wide characters of East Asia, 0 for combining ones."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
