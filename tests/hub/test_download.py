"""Downloads against a hub on localhost: breaks in the middle, damaged files, wrong names, tokens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron.commands import download
from megatron.files import one_at_a_time
from megatron.hub import catalogue
from megatron.hub import download as hub_module
from megatron.hub.download import DownloadError, RemoteFile, fetch, is_present, list_files
from tests.hub.fake_hub import COMMIT, Fault, Hub

ROOT = Path(__file__).resolve().parents[2]
CONTENT = random.Random(0).randbytes(100_000)
REPO = "ZahlenReal/diffusion_data_constraint_quickstart"


def one_file(hub: Hub, content: bytes = CONTENT) -> RemoteFile:
    hub.repos["dataset", REPO] = {"tokens.bin": content}
    (file,) = list_files(REPO, "dataset", select=lambda path: True, endpoint=hub.url)
    return file


def content_requests(hub: Hub) -> list[str | None]:
    return [span for method, path, span in hub.requests if method == "GET" and path.startswith("/cdn/")]


def test_listing_gives_commit_sizes_and_hashes(hub: Hub) -> None:
    hub.repos["dataset", REPO] = {"big.bin": CONTENT, "small.txt": b"hello", "other.md": b"no"}
    files = list_files(REPO, "dataset", select=lambda path: not path.endswith(".md"), endpoint=hub.url)
    assert [(file.path, file.size, file.is_lfs, file.commit) for file in files] == [
        ("big.bin", 100_000, True, COMMIT),
        ("small.txt", 5, False, COMMIT),
    ]
    assert files[1].digest == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"  # git hash-object of "hello"


@pytest.mark.parametrize("cuts", [[50_000], [10_000, 20_000, 1_000], [0, 0, 99_999]])
def test_broken_connections_continue_where_they_stopped(hub: Hub, tmp_path: Path, cuts: list[int]) -> None:
    file = one_file(hub)
    hub.faults["tokens.bin"] = Fault(cut_after=list(cuts))
    assert fetch(file, tmp_path / "tokens.bin", endpoint=hub.url, wait_seconds=0)
    assert (tmp_path / "tokens.bin").read_bytes() == CONTENT
    spans = content_requests(hub)
    assert len(spans) == len(cuts) + 1
    assert spans[0] is None
    if cuts[0]:
        assert spans[1] == f"bytes={cuts[0]}-"  # nothing is fetched twice
        assert hub.sent_bytes - 500 < len(CONTENT) + 1000  # 500: JSON of the listing


def test_a_second_process_waits_for_the_first_and_fetches_nothing(hub: Hub, tmp_path: Path, capsys) -> None:
    """It ended with an error, and a third one could write the same partial file, because the lock was deleted."""
    file = one_file(hub)
    place = tmp_path / "tokens.bin"
    lock = tmp_path / ".download" / f"tokens.bin.{file.digest[:16]}.lock"

    with ThreadPoolExecutor(1) as pool:
        with one_at_a_time(lock):
            second = pool.submit(fetch, file, place, endpoint=hub.url, wait_seconds=0)
            while "waiting" not in capsys.readouterr().out and not second.done():
                time.sleep(0.01)
            place.write_bytes(CONTENT)  # the first one ends
        assert second.result() is False
    assert content_requests(hub) == []


def test_a_file_in_a_folder_that_cannot_be_written_is_present(hub: Hub, tmp_path: Path) -> None:
    """Data of a group are often only to be read: hashing it again is all that a seal saves."""
    file = one_file(hub)
    (tmp_path / "tokens.bin").write_bytes(CONTENT)
    (tmp_path / ".download").write_text("no folder")
    assert is_present(file, tmp_path / "tokens.bin")
    assert not fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)


def test_a_full_disk_is_said_and_not_tried_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was called a lost connection, six times, and then the hub's fault."""
    file = one_file(hub)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "http_get", full)
    with pytest.raises(DownloadError, match=r"incomplete could not be written \(No space left on device\).*free space"):
        fetch(file, tmp_path / "tokens.bin", endpoint=hub.url, wait_seconds=60)


def test_a_new_process_continues_a_partial_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server breaks every time: the first call gives up and says so; the second, with a good server, continues."""
    file = one_file(hub)
    monkeypatch.setattr(hub_module, "ATTEMPTS", 1)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.faults["tokens.bin"] = Fault(cut_after=[30_000] + [0] * 20)
    with pytest.raises(DownloadError, match=r"tokens.bin .* of 100,000 bytes .* run the same command again"):
        fetch(file, tmp_path / "tokens.bin", endpoint=hub.url, wait_seconds=0)
    assert not (tmp_path / "tokens.bin").exists()
    hub.faults.clear()
    hub.requests.clear()
    assert fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)
    assert content_requests(hub) == ["bytes=30000-"]
    assert (tmp_path / "tokens.bin").read_bytes() == CONTENT


def test_damaged_once_is_fetched_again(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = one_file(hub)
    hub.faults["tokens.bin"] = Fault(corrupt=1)
    fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)
    assert (tmp_path / "tokens.bin").read_bytes() == CONTENT
    assert "wrong checksum" in capsys.readouterr().out


def test_damaged_always_is_refused_and_never_gets_its_name(hub: Hub, tmp_path: Path) -> None:
    file = one_file(hub)
    hub.faults["tokens.bin"] = Fault(corrupt=100)
    with pytest.raises(DownloadError, match=r"arrived damaged twice"):
        fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_partial_file_of_wrong_bytes_is_detected(hub: Hub, tmp_path: Path) -> None:
    """What an earlier process left may be damaged: the whole is hashed, not only the new part."""
    file = one_file(hub)
    state = tmp_path / ".download"
    state.mkdir()
    (state / f"tokens.bin.{file.digest[:16]}.incomplete").write_bytes(b"\0" * 60_000)
    fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)
    assert (tmp_path / "tokens.bin").read_bytes() == CONTENT
    assert content_requests(hub) == ["bytes=60000-", None]


def test_small_files_are_checked_by_git_hash(hub: Hub, tmp_path: Path) -> None:
    file = one_file(hub, b"merges v1\n")
    hub.faults["tokens.bin"] = Fault(corrupt=1)
    fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)
    assert (tmp_path / "tokens.bin").read_bytes() == b"merges v1\n"


def test_present_file_is_not_fetched_and_changed_file_is(hub: Hub, tmp_path: Path) -> None:
    file = one_file(hub)
    target = tmp_path / "tokens.bin"
    assert fetch(file, target, endpoint=hub.url)
    assert not fetch(file, target, endpoint=hub.url)
    [marker] = tmp_path.rglob("tokens.bin.verified")
    marker.write_bytes(b"\xff\xfe")  # of a disk that failed: the file is hashed again
    assert is_present(file, target)
    damaged = bytearray(CONTENT)
    damaged[7] ^= 255
    target.write_bytes(bytes(damaged))
    os.utime(target, (1, 1))
    assert not is_present(file, target)
    assert fetch(file, target, endpoint=hub.url)
    assert target.read_bytes() == CONTENT


def test_server_errors_are_retried(hub: Hub, tmp_path: Path) -> None:
    file = one_file(hub)
    hub.faults["tokens.bin"] = Fault(status=[503, 500])
    fetch(file, tmp_path / "tokens.bin", endpoint=hub.url, wait_seconds=0)
    assert (tmp_path / "tokens.bin").read_bytes() == CONTENT


def test_token_goes_to_the_hub_and_not_to_its_content_server(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private_token = "hf_secret"
    hub.repos["dataset", REPO] = {"tokens.bin": CONTENT}
    with pytest.raises(DownloadError, match=r"cannot list dataset .* HF_TOKEN"):
        list_files(REPO, "dataset", select=lambda path: True, endpoint=hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (file,) = list_files(REPO, "dataset", select=lambda path: True, endpoint=hub.url)
    fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)
    assert hub.tokens == [None]


def test_file_in_the_cache_of_hf_home_is_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = one_file(hub)
    cached = tmp_path / "cached.bin"
    cached.write_bytes(CONTENT)
    monkeypatch.setattr(hub_module, "try_to_load_from_cache", lambda *arguments, **named: str(cached))
    fetch(file, tmp_path / "out" / "tokens.bin", endpoint=hub.url)
    assert content_requests(hub) == []
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == CONTENT


def test_files_too_large_for_plain_http_go_through_huggingface_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = one_file(hub)
    monkeypatch.setattr(hub_module, "PLAIN_HTTP_LIMIT_BYTES", 1000)
    fetch(file, tmp_path / "tokens.bin", endpoint=hub.url)
    assert (tmp_path / "tokens.bin").read_bytes() == CONTENT


def test_unknown_repository_and_unreachable_hub(hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"cannot list model nobody/nothing"):
        list_files("nobody/nothing", "model", select=lambda path: True, endpoint=hub.url)
    with pytest.raises(DownloadError, match=r"check the connection and HF_ENDPOINT"):
        list_files(REPO, "dataset", select=lambda path: True, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("objective", "path", "wanted"),
    [
        ("ar", "100m_new/arm_best_on_100m/global_step5/layer_01-model_00-model_states.pt", True),
        ("ar", "100m_new/arm_best_on_100m/latest", True),
        ("ar", "100m_new/mdm_best_on_100m/latest", False),
        ("mdm", "100m_new/mdm_best_on_100m/global_step5/mp_rank_00_model_states.pt", True),
        ("mdm", "100m_new/mdm_best_on_100m/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", False),
        ("mdm", "old/mdm_best_on_100m/latest", False),
    ],
)
def test_checkpoint_selection(objective: str, path: str, wanted: bool) -> None:
    assert catalogue.checkpoint(objective).select(path) is wanted


def test_a_path_that_leaves_the_data_folder_is_refused(hub: Hub) -> None:
    hub.repos["dataset", catalogue.C4_SUBSETS] = {"../../x.bin": b"x"}
    with pytest.raises(DownloadError, match=r"nothing is fetched"):
        catalogue.resolve(catalogue.c4_subsets([]), endpoint=hub.url)


def test_no_match_names_what_there_is(hub: Hub) -> None:
    hub.repos["dataset", catalogue.C4_SUBSETS] = {"c4_50M.bin": b"x"}
    with pytest.raises(DownloadError, match=r"no such file; it holds c4_50M.bin"):
        catalogue.resolve(catalogue.c4_subsets(["7B"]), endpoint=hub.url)


def run_tool(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "download.sh"), *arguments],
        cwd=home,
        env=environment(hub, home),
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(hub: Hub, home: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        "PATH": path,
        "HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "DATA_DIR": "data",
        "VIRTUAL_ENV": sys.prefix,
        "NO_PROXY": "*",
    }


def fill_hub(hub: Hub, size: int = 200_000) -> dict[str, bytes]:
    make = random.Random(1).randbytes
    names = ("gpt2tok_c4_100_text_document", "gpt2tok_c4_val_text_document")
    files = {f"{name}.{ending}": make(size) for name in names for ending in ("bin", "idx")}
    hub.repos["dataset", REPO] = {
        **files,
        "c4_100m.jsonl": make(5000),
        "c4_validation.jsonl": make(5000),
        "README.md": b"#",
    }
    hub.repos["model", catalogue.GPT2] = {
        "vocab.json": b"{}",
        "merges.txt": b"#version: 0.2\n",
        "model.safetensors": b"x",
    }
    return files


def test_command_brings_the_quickstart_where_the_scripts_look(hub: Hub, tmp_path: Path) -> None:
    files = fill_hub(hub)
    hub.faults["gpt2tok_c4_100_text_document.bin"] = Fault(corrupt=1)
    dry = run_tool(hub, tmp_path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "4 files, 0.8 MB; to fetch: 4 files" in dry.stdout
    assert not (tmp_path / "data" / "c4_100m").exists()
    result = run_tool(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    for name, content in files.items():
        assert (tmp_path / "data" / "c4_100m" / name).read_bytes() == content
    assert sorted(path.name for path in (tmp_path / "data" / "gpt2").iterdir() if path.is_file()) == [
        "merges.txt",
        "vocab.json",
    ]
    line = (tmp_path / "data/c4_100m/train_data_path.txt").read_text()
    assert line == '"1.0 data/c4_100m/gpt2tok_c4_100_text_document"\n'
    assert not (tmp_path / "data" / "c4_100m" / "c4_100m.jsonl").exists()
    again = run_tool(hub, tmp_path)
    assert "6 files checked, 0 fetched" in again.stdout


def test_example_scripts_look_where_the_download_puts_its_files() -> None:
    script = 'unset DATA_DIR; source examples_scaling/common.sh; echo "$TRAIN_DATA"; echo "$VALID_DATA"'
    output = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert output.split() == [
        str(ROOT / "data" / prefix) for prefix in (catalogue.TRAIN_PREFIX, catalogue.VALID_PREFIX)
    ]
    assert download.parse_args([]).data_dir == str(ROOT / "data") or "DATA_DIR" in os.environ


def test_command_fails_loudly_on_a_file_that_stays_damaged(hub: Hub, tmp_path: Path) -> None:
    files = fill_hub(hub)
    hub.faults["gpt2tok_c4_val_text_document.bin"] = Fault(corrupt=100)
    result = run_tool(hub, tmp_path)
    assert result.returncode == 1
    assert "arrived damaged twice" in result.stderr
    assert not (tmp_path / "data/c4_100m/gpt2tok_c4_val_text_document.bin").exists()
    assert not (tmp_path / "data/c4_100m/valid_data_path.txt").exists()
    assert (tmp_path / "data/c4_100m/gpt2tok_c4_100_text_document.bin").read_bytes() == files[
        "gpt2tok_c4_100_text_document.bin"
    ]


def test_killed_process_continues(hub: Hub, tmp_path: Path) -> None:
    """SIGKILL in the middle of a 60 MB file; the next process asks for the rest only."""
    fill_hub(hub, size=100)
    content = random.Random(2).randbytes(60_000_000)
    name = "gpt2tok_c4_100_text_document.bin"
    hub.repos["dataset", REPO] = {name: content}
    hub.slow_after = 30_000_000
    process = subprocess.Popen(
        ["bash", str(ROOT / "download.sh")],
        cwd=tmp_path,
        env=environment(hub, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = tmp_path / "data/c4_100m/.download"
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and not any(path.stat().st_size >= 20_000_000 for path in state.glob("*.incomplete"))
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.slow_after = None
    (partial,) = state.glob("*.incomplete")
    size = partial.stat().st_size
    assert 20_000_000 <= size < len(content)
    hub.requests.clear()
    result = run_tool(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"bytes={size}-" in content_requests(hub)
    assert (tmp_path / "data/c4_100m" / name).read_bytes() == content
