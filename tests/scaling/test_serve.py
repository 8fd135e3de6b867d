"""tools/report.py --serve: on the loopback address only, nothing but the report, made anew while runs train, 130 on Ctrl-C."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runs.synthetic_runs import write_run

from megatron.errors import UserError
from megatron.runs.reading import find_runs
from megatron.scaling.report import serve
from megatron.scaling.report.page import write_report
from megatron.scaling.report.serve import LiveReport, open_server
from tests.browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(runs' folder, report's folder, port) of a report that is served."""
    monkeypatch.setattr(serve, "LEAST_SECONDS", 0.0)
    runs, out = tmp_path / "runs", tmp_path / "out"
    write_run(runs / "mdm", "mdm", validations=5)
    live = LiveReport([runs], lambda: write_report(find_runs([runs]), out))
    server = open_server(live, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield runs, out, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port: int, path: str, *, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def add_validation(folder: Path, nll: float) -> None:
    """A run goes on: one more validation at its end."""
    file = folder / "metrics.jsonl"
    last = json.loads(file.read_text().splitlines()[-1])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    row = next(row for row in reversed(rows) if row["kind"] == "valid")
    row = {**row, "step": last["step"] + 10, "epoch": last["epoch"] + 1, "nll": nll}
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def test_it_serves_the_page_and_its_pictures_and_no_other_file(served, tmp_path) -> None:
    _, out, port = served
    status, page, headers = ask(port, "/")
    assert status == 200
    written = (out / "report.html").read_text()
    assert written[written.index("<main>") : written.index("</main>")] in page, "the same page"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert ask(port, "/learning_curves.svg")[2]["Content-Type"] == "image/svg+xml"
    assert ask(port, "/learning_curves.png", method="HEAD")[:2] == (200, "")
    (out / "secret.svg").write_text("secret")
    (out / "learning_curves.png").unlink()
    (out / "learning_curves.png").symlink_to("/etc/hostname")
    names = ["secret.svg", "learning_curves.png", "../runs/mdm/run.json", "..%2fruns%2fmdm%2frun.json", "//etc/passwd"]
    names += ["run.json", "%2e%2e/runs/mdm/run.json", "", "..", "report.html/..", "learning_curves.svg/../secret.svg"]
    for name in names[:7] + names[8:]:
        assert ask(port, f"/{name}")[0] == 404, name
    assert ask(port, "/", method="POST")[0] == 501
    assert ask(port, "/", host="rebound.example")[0] == 403


def test_it_listens_on_the_loopback_address_only(served) -> None:
    assert serve.ADDRESS == "127.0.0.1"
    port = served[2]
    with socket.socket() as other:  # 127.0.0.2 is reached by a server on all addresses
        assert other.connect_ex(("127.0.0.2", port)) != 0
    with pytest.raises(UserError, match="another program listens"):
        open_server(None, port)


def test_a_run_that_goes_on_makes_a_new_version_and_a_broken_one_keeps_the_last(served) -> None:
    runs, _, port = served
    first = json.loads(ask(port, "/state")[1])
    assert json.loads(ask(port, "/state")[1]) == first, "nothing changed"
    add_validation(runs / "mdm", 1.2345)
    second = json.loads(ask(port, "/state")[1])
    assert second["version"] != first["version"]
    assert "1.234" in ask(port, "/")[1]
    record = (runs / "mdm/run.json").read_text()
    (runs / "mdm/run.json").write_text(record[:50])
    broken = json.loads(ask(port, "/state")[1])
    assert broken["version"] == second["version"]
    assert "not valid JSON" in broken["problem"]
    (runs / "mdm/run.json").write_text(record)
    assert json.loads(ask(port, "/state")[1])["problem"] == ""
    write_run(runs / "ar", "ar", validations=5)
    ask(port, "/state")
    assert "AR 0.9M" in ask(port, "/")[1], "a run that began later"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_an_open_page_follows_a_run_without_being_loaded_again(served) -> None:
    runs, _, port = served
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.run("window.kept = true, document.querySelector('details').open = true, scrollTo(0, 300)")
        assert "1.234" not in browser.run("document.body.innerText")
        add_validation(runs / "mdm", 1.2345)
        browser.wait("document.body.innerText.includes('1.234')")
        assert browser.run("window.kept && document.querySelector('details').open")
        assert browser.run("scrollY") == 300
        assert browser.run("document.getElementById('live').textContent").startswith("Updated at")


def test_everything_that_a_page_shows_is_watched(tmp_path) -> None:
    """Also what stands beside a run that was named alone, and no checkpoint."""
    run = write_run(tmp_path / "run", "mdm", validations=1)
    page = tmp_path / "report.html"
    page.write_text("")
    before = (live := LiveReport([run], lambda: page))._stamps()
    shown = ["search.json", "likelihood.json", "run/likelihood_2.json", "run/generalisation/record.json"]
    shown += ["run/evaluations/one.json", "run/downstream.json", "run/samples.jsonl"]
    for name in [*shown, "other.json", "run/global_step1/run.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert live._stamps().keys() - before.keys() == {tmp_path / name for name in shown}


def test_ctrl_c_ends_it_with_130_and_a_wrong_port_is_refused(tmp_path) -> None:
    write_run(tmp_path / "run", "mdm", validations=3)
    command = [sys.executable, str(ROOT / "tools/report.py"), str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--serve", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        line = next(line for line in process.stdout if line.startswith("serving http://127.0.0.1:"))
        port = int(line.split(":")[2].split("/")[0])
        assert ask(port, "/")[0] == 200
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "interrupted\n")
    wrong = subprocess.run([*command, "--serve", "70000"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "name the runs before it" in wrong.stderr
