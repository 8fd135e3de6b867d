"""A fresh local hub for each test; nothing of this suite leaves the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from tests.hub import fake_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[fake_hub.Hub]:
    # tests/run.sh keeps the suite off the network (HF_HUB_OFFLINE); the hub of these tests is on this machine.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    state = fake_hub.Hub()
    server = fake_hub.start(state)
    yield state
    server.shutdown()
    server.server_close()
