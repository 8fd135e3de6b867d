"""The animated SVG of tools/generate.py --animate: what it shows, in which order, and for whom."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from megatron.errors import UserError
from megatron.generation.animation import MAX_FRAMES, Piece, StepRecorder, animation, pieces_of
from megatron.generation.command import run_generate
from megatron.generation.diffusion import Step
from tests.browser import CHROMIUM, Browser
from tests.evaluation import tiny
from tests.generation.test_autoregressive import Letters

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animate")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", 400)
    return {
        name: str(tiny.make_run(folder / name, tiny.config_for(name, tokenizer, vocab_size=400, seq_length=48)))
        for name in ("ar", "mdm")
    }


def drawn(svg: str) -> list[tuple[float, float, str, str]]:
    """(y, x, class, text) of every piece of text, in reading order; captions left out."""
    texts = [item for item in ET.fromstring(svg).iter(f"{SVG}text") if item.get("class") != "caption"]
    return sorted((float(t.get("y")), float(t.get("x")), t.get("class"), t.text or "") for t in texts)


def test_the_picture_holds_the_text_that_is_printed(runs, tmp_path, capsys) -> None:
    flags = ["--load", runs["mdm"], "--prompt", "Return the", "--infix", " of the file.", "--max-new-tokens", "5"]
    assert run_generate([*flags, "--temperature", "1", "--animate", str(tmp_path / "a.svg")]) == 0
    shown = drawn((tmp_path / "a.svg").read_text(encoding="utf-8"))
    printed = re.sub("[\x00-\x08\x0b-\x1f]", "\ufffd", capsys.readouterr().out)  # what XML cannot hold
    assert "".join("".join(part[3] for part in shown).split()) == "".join(printed.split())
    assert shown[0][2:] == ("given", "Return")


def test_each_token_appears_at_the_step_that_uncovered_it() -> None:
    recorder = StepRecorder()
    row = torch.tensor([[7, 99, 99, 99]])
    for index, position in enumerate((2, 3, 1)):
        row[0, position] = position
        recorder.on_step(Step(index, row, torch.arange(4)[None] == position))
    pieces = pieces_of(Letters(), recorder.tokens, recorder.step_of)
    assert pieces == [Piece("h", None), Piece("b", 2), Piece("c", 0), Piece("d", 1)]
    svg = animation(pieces, caption="")
    assert [part[2:] for part in drawn(svg)] == [("given", "h"), ("t2", "b"), ("t0", "c"), ("t1", "d")]
    starts = [float(re.search(rf"@keyframes t{k}\{{0%,([\d.]+)%", svg).group(1)) for k in range(3)]
    assert starts == sorted(set(starts))
    assert re.findall(r'class="mask m(\d+)"', svg) == ["2", "0", "1"]


def test_it_needs_nothing_else_runs_no_script_and_rests_where_motion_is_not_wanted(runs, tmp_path) -> None:
    file = tmp_path / "a.svg"
    run_generate(["--load", runs["mdm"], "--prompt", "Return", "--max-new-tokens", "6", "--animate", str(file)])
    svg = file.read_text(encoding="utf-8")
    assert not re.search(r"<script|href=|url\(|@import|\bon\w+=", svg)
    assert svg.count("http") == 1, "the name space"
    style = re.search("<style>(.*?)</style>", svg, re.DOTALL).group(1)
    outside, moving = style.split("@media(prefers-reduced-motion:no-preference){")
    assert "animation" in moving
    assert "animation" not in outside
    assert ".mask{fill:#c5d5ea;opacity:0}" in outside, "at rest the masks are gone and the text stands"
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby").split() == [
        root.find(f"{SVG}title").get("id"),
        root.find(f"{SVG}desc").get("id"),
    ]
    assert "The finished text: Return" in root.find(f"{SVG}desc").text
    assert "parameters (mdm, global_step" in root.find(f"{SVG}desc").text


def test_the_picture_of_the_readme_is_one_of_these() -> None:
    svg = (Path(__file__).resolve().parents[2] / "docs/img/uncover.svg").read_text(encoding="utf-8")
    assert not re.search(r"<script|href=|url\(|@import|\bon\w+=", svg)
    assert (
        svg.split("<style>")[1].split("@media(prefers-color")[0]
        == animation([Piece("a", 0)], caption="").split("<style>")[1].split("@media(prefers-color")[0]
    ), "drawn as this version draws"
    assert "382k parameters (mdm, global_step4000), uncovered in 33<" in svg


def test_a_causal_model_is_shown_from_left_to_right(runs, tmp_path) -> None:
    file = tmp_path / "a.svg"
    run_generate(["--load", runs["ar"], "--prompt", "Return", "--max-new-tokens", "8", "--animate", str(file)])
    svg = file.read_text(encoding="utf-8")
    frames = [int(name[1:]) for _, _, name, _ in drawn(svg) if name != "given"]
    assert frames == sorted(frames)
    assert "written from left to right" in svg


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--animate", "a.png"], "ends in .svg"),
        (["--animate", "/nowhere/a.svg"], "no folder"),
        (["--animate", "a.svg", "--num-samples", "2"], "shows one"),
        (["--animate", "a.svg", "--stop", "."], "every token"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_model_is_loaded(flags, message) -> None:
    with pytest.raises(UserError, match=message):
        run_generate(["--load", "/nowhere", "--prompt", "a", *flags])


class Bytes:
    """A token is a byte of UTF-8; 0 ends a document."""

    eod_id = 0

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_characters_of_several_tokens_appear_with_the_last_and_ends_of_documents_hide_what_follows() -> None:
    row = [0, *"aé\N{SNOWMAN}".encode(), 0, ord("x"), ord("b")]
    steps = {position: position for position in range(2, len(row) - 1)}
    found = pieces_of(Bytes(), row, steps)
    assert found == [Piece("a", None), Piece("é", 3), Piece("\N{SNOWMAN}", 6), Piece("b", None)]


def test_lines_are_broken_between_words_and_hold_what_xml_cannot() -> None:
    words = [Piece(f" word{number}\x00<&" if number == 3 else f" word{number}", number) for number in range(30)]
    svg = animation([Piece("begin", None), *words, Piece("\n  indented", 30)], caption="c" * 200, columns=40)
    shown = drawn(svg)
    lines: dict[float, str] = {}
    for y, _, _, text in shown:
        lines[y] = lines.get(y, "") + text
    assert max(map(len, lines.values())) <= 40
    assert " ".join(line.strip() for line in lines.values()).split() == [
        "begin", *(f"word{n}" + "\ufffd<&" * (n == 3) for n in range(30)), "indented"
    ]  # fmt: skip
    assert not any(text[-1].isdigit() and text[:1].isdigit() for text in lines.values()), "no word was cut"
    assert shown[-1][3].startswith("  indented")


def test_many_steps_share_frames() -> None:
    svg = animation([Piece("ab ", step) for step in range(1000)], caption="")
    assert f"@keyframes t{MAX_FRAMES - 1}{{" in svg
    assert f"@keyframes t{MAX_FRAMES}{{" not in svg
    assert len(svg) < 300_000
    with pytest.raises(UserError, match="no token was drawn"):
        animation([Piece("given", None)], caption="")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_moves_it_unless_the_reader_asks_for_rest(tmp_path) -> None:
    file = tmp_path / "a.svg"
    file.write_text(
        animation([Piece("given ", None), Piece("one ", 1), Piece("two", 0)], caption="c"), encoding="utf-8"
    )
    opacity = "[...document.querySelectorAll('.t0, .t1, .mask')].map(e => +getComputedStyle(e).opacity)"
    to = "document.getAnimations().forEach(a => {{ a.pause(); a.currentTime = {} }})"
    with Browser() as browser:
        browser.open(file.as_uri())
        browser.run(to.format(100))
        assert browser.run(opacity) == [1, 0, 1, 0], "mask, text, mask, text in the order of the file"
        browser.run(to.format(7000))
        assert browser.run(opacity) == [0, 1, 0, 1]
        browser.open(file.as_uri(), reduced_motion=True)
        assert browser.run("document.getAnimations().length") == 0
        assert browser.run(opacity) == [0, 1, 0, 1]
