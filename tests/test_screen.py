"""Lines fit the screen, and whoever waits is told how long."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from megatron import screen
from megatron.screen import Progress, fitted, wrapped

ROOT = Path(__file__).resolve().parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_interval_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    with Progress("encoding", 100_000_000, unit="B") as progress:
        for _ in range(4):
            now += 12
            progress.update(10_000_000, "5 documents/s")
    with Progress("quick", 3, unit="files") as quick:
        quick.update(3)
    assert list(Progress("quiet", 9, enabled=False).over("abc")) == ["a", "b", "c"]
    out, error = capsys.readouterr()
    assert (out, error) == ("", "encoding: 30%, 30.0 MB of 100.0 MB, 1:24 min left; 5 documents/s\n")
    unknown = Progress("reading", unit="rows", interval_seconds=0)
    now += 90
    unknown.update(7)
    assert capsys.readouterr().err == "reading: 7 rows in 1:30 min\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_errors_ends_nothing() -> None:
    """A line of a validation, and an error, which is then told by the status alone."""
    program = (
        "from megatron.screen import Progress\nfrom megatron.parallel.launch import complain\n"
        "for _ in range(2): Progress('validation', 3, interval_seconds=0).update()\n"
        "complain('error: x', is_speaker=True)\nprint('on')"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "on\n")


FILLING = """
import resource, signal, sys
from megatron.screen import say
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
took = [say("before", to_errors=True), say("before")]
limit(7)  # both files are full
took += [say("lost " * 9, to_errors=True), say("lost " * 9)]
limit(1000)
took += [say("after", to_errors=True), say("after")]
open(sys.argv[1] + "/took", "w").write(str(took))
"""


def test_a_full_disk_mutes_an_output_while_it_is_full(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out, open(tmp_path / "errors", "w") as errors:
        command = [sys.executable, "-c", FILLING, str(tmp_path)]
        status = subprocess.run(command, cwd=ROOT, stdout=out, stderr=errors, timeout=60).returncode
    assert status == 0
    assert (tmp_path / "took").read_text() == "[True, True, False, False, True, True]"
    assert [(tmp_path / name).read_text() for name in ("out", "errors")] == ["before\nafter\n"] * 2


@pytest.mark.parametrize("to_errors", [False, True])
def test_a_reader_that_is_gone_mutes_an_output_for_good(to_errors: bool) -> None:
    program = (
        "import sys, time\nfrom megatron.screen import say\nsys.stdin.read()\n"
        f"assert [say('x', to_errors={to_errors}) for _ in range(3)] == [False, True, True]"
    )
    names = ("stderr", "stdout") if to_errors else ("stdout", "stderr")
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    getattr(process, names[0]).close()
    process.stdin.close()  # type: ignore[union-attr]
    assert (getattr(process, names[1]).read(), process.wait(60)) == (b"", 0)


def test_what_was_done_before_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    progress = Progress("likelihoods", 100, unit="questions", start=50)
    now = 10.0
    progress.update(10)
    assert progress.line() == "likelihoods: 60%, 60 questions of 100 questions, 40 s left"


def test_a_terminal_gets_one_line_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("reading", 3) as progress:
        assert progress.bar is not None
        progress.bar.delay = 0
        for _ in range(3):
            progress.update()
            progress.bar.refresh()
    drawn = terminal.getvalue()
    assert "reading" in drawn and "\n" not in drawn
    assert not drawn.rpartition("\r")[0].rpartition("\r")[2].strip()


def test_lines_break_between_words_on_a_screen_and_stay_whole_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "error: " + "word " * 40 + "\n  " + "inner " * 20
    monkeypatch.setenv("COLUMNS", "80")
    assert wrapped(text) == text and fitted([(0, "a" * 90), (1, "b")]) == "a" * 90 + " | b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = wrapped(text).split("\n")
    assert max(map(len, lines)) <= 80 and " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert lines[-1].startswith("    inner")
    assert fitted([(0, "a" * 40), (2, "b" * 20), (1, "c" * 30)], " (best)") == "a" * 40 + " | " + "c" * 30 + " (best)"
