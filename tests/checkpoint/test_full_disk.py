"""No space left, at every operation of a save in turn: said on one line with the file and the cure; nothing is lost."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint import writer
from megatron.checkpoint.select import select
from megatron.checkpoint.upkeep import sweep_leftovers
from megatron.errors import Failure
from tests.checkpoint.saved import names, save, value


class Disk:
    """Counts the operations that change a file system; the chosen one fails."""

    def __init__(self, failing: int) -> None:
        self.failing, self.count = failing, 0

    def wrap(self, operation: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        """The operation, which fails when its turn has come."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            is_reading = operation is OPEN and not set(str(arguments[1:2] or options.get("mode", "r"))) & set("wxa")
            if is_reading:
                return operation(*arguments, **options)
            self.count += 1
            if self.count - 1 == self.failing:
                raise error
            return operation(*arguments, **options)

        return wrapped


OPEN = builtins.open
FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("step", [10, 20])
def test_every_operation_of_a_save_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A new step, and one that replaces an older checkpoint of its step."""
    failing, messages = 0, 0
    while True:
        run_dir = tmp_path / f"{failing}"
        save(run_dir, 10)
        disk = Disk(failing)
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", disk.wrap(OPEN, FULL))
            for name in ("fsync", "replace", "rename", "mkdir", "chmod"):
                patch.setattr(os, name, disk.wrap(getattr(os, name), FULL))
            patch.setattr(writer, "_write_all", disk.wrap(writer._write_all, FULL))
            try:
                save(run_dir, step, value=0.5)
                assert value(select(run_dir)) == 0.5  # nothing failed, or only what makes a rename durable
                if disk.count <= failing:
                    break
            except Failure as error:
                message, messages = str(error), messages + 1
                assert f"global_step{step}" in message and "No space left" in message and "free space" in message, (
                    message
                )
        found = select(run_dir)
        assert value(found) in (10, 0.5) and not found.skipped
        save(run_dir, step, value=0.75)
        sweep_leftovers(run_dir)
        assert value(select(run_dir)) == 0.75
        assert names(run_dir) == sorted({"global_step10", f"global_step{step}", "latest"})
        failing += 1
    print(f"{failing} operations of a save failed in turn, {messages} of them ended it")
    assert messages >= 9
