"""Of an HTML page its visible text counts, in the character set that it declares."""

from __future__ import annotations

import pytest

from megatron.data.prepare.html_text import decode_page, visible_text
from megatron.data.prepare.rows import parse_row

PAGE = """<!DOCTYPE html><html><head><title>no</title><style>p {no}</style><script>var no = "<p>no</p>";</script></head>
<body class="x"><!-- no --><h1>Kopf &amp; Fuß</h1>
<p>one   <b>bold</b>word,
two</p><div hidden>no <p>no</p></div><ul><li>a<li>b</ul><pre>  x
    y</pre><br><template>no</template>end&nbsp;&#x263a;</body></html>"""


def test_tags_scripts_styles_and_hidden_parts_are_no_text() -> None:
    assert visible_text(PAGE) == "Kopf & Fuß\n\none boldword, two\n\na\nb\n\n  x\n    y\n\nend ☺"


@pytest.mark.parametrize("page", ["<head><title>no</title><body>text", "<script>no</script>text", "text<div hidden>no"])
def test_what_nobody_closed(page: str) -> None:
    assert visible_text(page) == "text"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>one<p hidden>no<p>two</p>three", "one\n\ntwo\n\nthree"),
        ("<ul><li>one<li hidden>no<li>two</ul>three", "one\ntwo\n\nthree"),
        ("<ul><li hidden>no<ul><li>no</ul>no</ul>one", "one"),
        ("<dl><dt>a<dd hidden>no<dt>b</dl>c", "a\nb\n\nc"),
        ("<table><tr hidden><td>no<td>no<tr><td>one</table>two", "one\n\ntwo"),
        ("<html><head><title>no</title><meta><p>one", "one"),
        ("<div hidden><p>no<div>no</div>no</div>one", "one"),
        ("<b>one<div hidden>no</b>no</div> two", "one two"),
        ("<b>" * 30_000 + "<p hidden>no</p>one", "one"),
    ],
)
def test_a_hidden_element_ends_where_its_end_tag_may_be_left_out(page: str, text: str) -> None:
    """HTML lets </p>, </li>, </td>, </head> and others out; all of the page after a hidden one was lost."""
    assert visible_text(page) == text


@pytest.mark.parametrize(
    "page",
    ['<meta charset="iso-8859-1"><p>größer', '<?xml version="1.0" encoding="ISO-8859-1"?><p>größer</p>',
     '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1"><p>größer'],
)  # fmt: skip
def test_the_declared_character_set_counts_where_utf_8_does_not_fit(page: str) -> None:
    assert parse_row(page.encode("latin-1"), "page", ["text"]) == ["größer"]
    assert visible_text(decode_page(page.encode())) == "größer"


@pytest.mark.parametrize(
    "page", [b"<p>gr\xf6\xdfer", b'<meta charset="no-such-set">\xf6', b'<meta charset="ascii">\xf6']
)
def test_a_page_of_an_unknown_character_set_is_malformed(page: bytes) -> None:
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte 0xf6 .*iconv"):
        parse_row(page, "page", ["text"])
