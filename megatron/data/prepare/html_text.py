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
_VOID = frozenset(
    {"br", "hr", "img", "input", "link", "meta", "wbr", "col", "area", "base", "embed", "source", "track", "param"}
)
_IN_HEAD = frozenset({"base", "link", "meta", "noscript", "script", "style", "template", "title"})
# End tags that may be left out: what a start tag ends, and inside of which element.
_LISTS, _TABLE = frozenset({"ul", "ol", "menu"}), frozenset({"table"})
_ENDS = {
    "li": (frozenset({"li"}), _LISTS),
    **dict.fromkeys(("dt", "dd"), (frozenset({"dt", "dd"}), frozenset({"dl"}))),
    "tr": (frozenset({"tr"}), _TABLE),
    **dict.fromkeys(("td", "th"), (frozenset({"td", "th"}), _TABLE)),
    "option": (frozenset({"option"}), frozenset({"select", "datalist"})),
    **dict.fromkeys(_BLOCKS, (frozenset({"p"}), frozenset({"button"}))),
}
_DEEPEST = 512  # elements inside each other, as in browsers: more are tags that nobody closes
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
        self._open: list[str] = []  # elements around this place, the outermost first
        self._hidden = 0  # how many are open up to the outermost hidden one; 0: none is
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_before(tag)
        hides = tag in _HIDDEN or "hidden" in dict(attrs)
        begins = hides and not self._hidden
        if tag not in _VOID and (begins or len(self._open) < _DEEPEST):
            self._open.append(tag)
            if begins:
                self._hidden = len(self._open)
        if hides or self._hidden:
            return
        self._pre += tag == "pre"
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._hidden:
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            place = len(self._open) - 1 - self._open[::-1].index(tag)
            if place < self._hidden - 1 and tag not in _BLOCKS | _LINES:
                return  # <b><div hidden></b>: the text goes on inside of both
            is_hidden = place == self._hidden - 1  # the hidden one itself ends: nothing is to be seen of it
            self._end(place)
            if is_hidden:
                return
        if not self._hidden:
            self._pre -= tag == "pre" and self._pre > 0
            self._break(tag)

    def _end_before(self, tag: str) -> None:
        """End the elements that a start tag ends, because their own end tags may be left out."""
        if tag == "body" or (self._open[-1:] == ["head"] and tag not in _IN_HEAD):
            self._end(self._open.index("head") if "head" in self._open else len(self._open))
        ended, within = _ENDS.get(tag, (frozenset(), frozenset()))
        for place in reversed(range(len(self._open))):
            if self._open[place] in within:
                return
            if self._open[place] in ended:
                self._end(place)
                return

    def _end(self, place: int) -> None:
        """End an open element and all inside of it."""
        del self._open[place:]
        if len(self._open) < self._hidden:
            self._hidden = 0

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
