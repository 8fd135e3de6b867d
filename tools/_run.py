"""Doors: each program in this folder starts one of ``megatron/commands/``, and ends as that package's ``running.py`` says."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # so that a program works from any folder, installed or not

from megatron.commands.running import run


def door(module: str) -> NoReturn:
    """Run ``main()`` of a module of ``megatron.commands`` and leave with its status."""
    run(lambda: import_module(f"megatron.commands.{module}").main())
