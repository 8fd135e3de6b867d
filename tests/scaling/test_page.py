"""What stands in the report page, and how it looks on a phone, a desk and paper. All runs here are SYNTHETIC."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.errors import UserError
from megatron.runs.conclusion import conclusion
from megatron.runs.reading import find_runs, load_run
from megatron.scaling.report.look import CSS
from megatron.scaling.report.page import charts, write_report
from megatron.scaling.report.panels import compose, save
from megatron.scaling.report.plots import gap_curve
from megatron.scaling.report.provenance import flat_settings, read_samples
from tests.browser import CHROMIUM, Browser

COMMAND = ["pretrain_mdm.py", "--lr", "1e-3", "--title", "two words <b>"]
VOID = {"meta", "img", "br", "hr", "link"}


def record(folder, **more) -> None:
    """Add to a run's record."""
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("ar", "mdm"):
        write_run(folder / name, name, validations=8)
        attempt = {
            "started": "2026-11-26T01:00:00+00:00",
            "command": COMMAND,
            "commit": "0123456789abcdef+",
            "from_step": 0,
        }
        data = {
            "train": [{"prefix": "/home/me/data/books", "weight": 1.0, "tokens": 100_000, "idx_sha256": "feed" * 16}]
        }
        record(folder / name, attempts=[attempt], data=data, tokenizer={"vocab_size": 500, "fingerprint": None})
        lines = [{"prompt": "Return <i>", "sample": 0, "text": f" the {name} & more\n \n\n\nend", "tokens": [1]}]
        (folder / name / "samples.jsonl").write_text("\n".join([*map(json.dumps, lines), "torn {"]))
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return write_report(find_runs([runs]), tmp_path_factory.mktemp("out"))


class Tags(HTMLParser):
    """Counts what is unbalanced, and keeps the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(page) -> None:
    text = page.read_text()
    tags = Tags(text)
    assert not tags.open
    assert not [tag for tag, _ in tags.tags if tag in ("script", "link", "iframe", "object")]
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\(', text)
    assert all(attributes.get("alt") is not None for tag, attributes in tags.tags if tag == "img")
    assert all(attributes.get("scope") for tag, attributes in tags.tags if tag == "th")
    for tag, attributes in tags.tags:
        if attributes.get("class") == "wide" or tag == "blockquote":
            assert attributes["tabindex"] == "0", f"{tag}: a keyboard can scroll it"
            assert attributes["aria-label"]


def test_a_matched_pair_has_its_gap_ends_and_crossing(page, runs) -> None:
    found = charts(find_runs([runs]))
    assert [chart.stem for chart in found] == ["learning_curves"]
    assert [panel.title for panel in found[0].panels] == [
        "Validation against epochs",
        "Generalisation gap against epochs",
    ]
    first, second = compose(found[0]).axes
    assert first.get_ylabel() == "validation, nats per token"
    assert second.get_ylabel() == "validation − training, nats per token"
    assert any("MDM below AR\nfrom epoch" in text.get_text() for text in first.texts)
    text = page.read_text()
    for words in ("AR at its best", "AR at the end", "MDM at its best, the end", "Crossing: from epoch"):
        assert words in text
    assert re.search(r"At epoch \d+ the difference MDM − AR is −\d\.\d+ ± \d\.\d+ nats/token", text)


def test_compute_has_a_panel_where_it_says_something_else_than_epochs(runs, tmp_path) -> None:
    larger = load_run(write_run(tmp_path / "larger", "mdm", parameters=2_700_000, validations=5))
    titles = [panel.title for panel in charts([*find_runs([runs]), larger])[0].panels]
    assert titles[1] == "Validation against compute"


def test_a_gap_is_validation_minus_the_training_loss_since_the_one_before(runs) -> None:
    run = load_run(runs / "ar")
    epochs, gap, error = gap_curve(run)
    row, before = run.valid[3], run.valid[2]
    since = [item["loss"] for item in run.train if before.step < item["step"] <= row.step]
    assert gap[list(epochs).index(row.epoch)] == pytest.approx(row.nll - np.mean(since))
    assert error[0] == run.valid[0].nll_se
    other = load_run(runs / "ar")
    other.info["train_label"] = "AR loss with dropped inputs (not a likelihood)"
    assert not gap_curve(other)[0].size, "two quantities have no difference"


def test_settings_data_commit_command_lines_and_samples_are_in_the_page(page, runs) -> None:
    text = page.read_text()
    for words in (
        "<code>optimizer.lr</code> 0.001", "books", "feed" * 16, "commit 0123456789ab", "0123456789abcdef+",
        "pretrain_mdm.py --lr 1e-3 --title &#x27;two words &lt;b&gt;&#x27;",
        "<b>Return &lt;i&gt;</b> the mdm &amp; more", "Settings that all runs share",
    ):  # fmt: skip
        assert words in text, words
    assert "/home/me" not in text, "a data set is known by its contents, not by its place"
    assert flat_settings(load_run(runs / "mdm"))["optimizer.lr"] == "0.001"
    assert "run.save" not in flat_settings(load_run(runs / "mdm"))
    assert read_samples(runs / "mdm") == [("Return <i>", " the mdm & more\n \n\n\nend")]
    assert "<b>Return &lt;i&gt;</b> the mdm &amp; more\n\nend</blockquote>" in text, "blank lines are one"


def test_samples_keep_separators_within_strings(tmp_path) -> None:
    """U+2028 and U+0085 end no line; a line that cannot be read takes no other one with it."""
    texts = ["a\u2028b", "a\u0085b", "a\x0bb"]
    lines = [json.dumps({"prompt": "p", "text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "samples.jsonl").write_text("\n".join(["[" * 100_000, *lines]), encoding="utf-8")
    assert read_samples(tmp_path) == [("p", text) for text in texts]


def test_folders_with_evaluations_only_are_welcome(runs, tmp_path) -> None:
    folder = tmp_path / "places/evaluated"
    (folder / "evaluations").mkdir(parents=True)
    result = {
        "step": 500, "samples": 8000, "tokens": 1_000_000, "epoch": 10.0, "flops": 6e12, "nll": 3.21, "nll_se": 0.01,
        "label": "NLL bound", "num_mc": 128, "num_samples": 160, "bits_per_byte": 1.5, "kind": "valid",
        "num_documents": 40, "se_kind": "documents",
    }  # fmt: skip
    entry = {"objective": "mdm", "checkpoint": "global_step500", "result": result, "attempt": {"command": COMMAND}}
    (folder / "evaluations/a.json").write_text(json.dumps(entry))
    (run,) = find_runs([tmp_path / "places"])
    assert run.is_evaluation
    assert run.title == "MDM 1M"
    assert conclusion([run]) == [
        "evaluated is an evaluation: MDM 1M at step 500 has NLL bound 3.210 ± 0.010 nats/token over 40 documents."
    ]
    text = write_report([run], tmp_path / "out").read_text()
    assert "evaluated (evaluation only)" in text
    assert "NLL bound (128 bernoulli draws)" in text
    assert "two words" in text
    both = write_report([*find_runs([runs, folder])], tmp_path / "both").read_text()
    assert "is an evaluation" in both
    assert "AR at the end" in both
    (folder / "evaluations/a.json").write_text("{")
    with pytest.raises(UserError, match=r"has no run\.json"):
        load_run(folder)
    shutil.copytree(runs / "ar", tmp_path / "places/ar")
    assert [found.name for found in find_runs([tmp_path / "places"])] == ["ar"], (
        "a folder of that name of somebody else"
    )


def test_a_legend_names_what_it_has_room_for_and_counts_the_rest(tmp_path) -> None:
    for size in range(8):
        for objective in ("ar", "mdm"):
            write_run(tmp_path / f"{objective}{size}", objective, parameters=300_000 + 100_000 * size, validations=3)
    chart = charts(find_runs([tmp_path]))[0]
    figure = compose(chart)
    figure.canvas.draw()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 13
    assert names[-1] == "and 4 more (all are in the page)"
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert save(chart, tmp_path / "out").count("<li>") == 16


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_letters_stand_out_from_every_ground_of_the_page() -> None:
    grounds = re.findall(r"background: (#\w+)", CSS)
    letters = re.findall(r"[; {]color: (#\w+)", CSS)
    assert {"#fff", "#f5f5f7"} <= set(grounds)
    for letter in letters:
        for ground in grounds:
            assert (luminance(ground) + 0.05) / (luminance(letter) + 0.05) >= 4.5, (letter, ground)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_panels_stack_on_a_phone_and_nothing_sticks_out(page) -> None:
    shown = (
        "[...document.querySelectorAll('#learning_curves .panels img')].map(i => [i.offsetLeft, i.offsetTop, i.width])"
    )
    outside = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName)"""
    with Browser() as browser:
        for width, columns in ((390, 1), (768, 2), (1440, 2)):
            browser.open(page.as_uri(), width=width)
            images = browser.run(shown)
            assert len({left for left, _, _ in images}) == columns, width
            assert min(wide for _, _, wide in images) >= 320
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run(outside) == []
            assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        shutil.copy(page, page.with_name("alone.html"))
        browser.open(page.with_name("alone.html").as_uri())
        assert (
            browser.run("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
        )
