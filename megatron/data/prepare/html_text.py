"""The text that a reader of an HTML page sees, by the standard library's parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HIDDEN = frozenset({"head", "script", "style", "template", "noscript", "svg", "math", "iframe", "object"})
_LINES = frozenset({"br", "li", "tr", "dt", "dd", "caption", "option", "figcaption", "summary"})  # begin a line
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "details", "dialog", "div", "dl", "fieldset", "figure"}
    | {"footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "nav", "ol", "p", "pre"}
    | {"section", "table", "ul"}
)
_CHARSET = re.compile(
    rb"""<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)
_DECLARED_WITHIN = 1024  # bytes, by the HTML standard


def decode_page(raw: bytes) -> str:
    """Return a page as text: UTF-8, or else the character set that it declares.

    Raises:
        UnicodeDecodeError: neither fits.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        declared = _CHARSET.search(raw[:_DECLARED_WITHIN])
        if declared is None:
            raise
        try:
            return raw.decode(declared[1].decode("ascii"))
        except LookupError:  # no such character set
            pass
        raise


def visible_text(page: str) -> str:
    """Return the text of a page without tags, scripts, styles and what ``hidden`` hides.

    White space is collapsed as a browser does, except in ``pre``; blocks are set apart by a blank line.
    """
    parser = _Visible()
    parser.feed(page)
    parser.close()
    return parser.text()


class _Visible(HTMLParser):
    """Collects lines of text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = [""]
        self._hidden: list[str] = []  # open tags from the outermost hidden one on
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        is_void = tag in {"br", "hr", "img", "input", "link", "meta", "wbr", "col", "area", "base", "embed", "source"}
        if tag == "body":
            self._hidden = []  # a head that nobody closed
        if self._hidden or tag in _HIDDEN or "hidden" in dict(attrs):
            if not is_void:
                self._hidden.append(tag)
            return
        self._pre += tag == "pre"
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._hidden:
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:  # inner tags that nobody closed
                pass
            return
        if not self._hidden:
            self._pre -= tag == "pre" and self._pre > 0
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._pre:
            first, *others = data.split("\n")
            self._lines[-1] += first
            self._lines += others
            return
        words = " ".join(data.split())
        starts = data[:1].isspace() and self._lines[-1][-1:] not in ("", " ")
        self._lines[-1] += " " * starts + words + " " * bool(words and data[-1:].isspace())

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._lines += ["", ""]
        elif tag in _LINES:
            self._lines.append("")

    def text(self) -> str:
        """Return what was collected; never more than one blank line in a row."""
        return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in self._lines)).strip()
