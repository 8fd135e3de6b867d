"""Optional accelerators: which package a backend needs, and whether it is there."""

from __future__ import annotations

import importlib.util

PACKAGES = {"flash-attn": "flash_attn", "liger": "liger_kernel"}


def is_installed(backend: str) -> bool:
    """Whether the package of a backend is there; PyTorch's own always is."""
    return backend not in PACKAGES or importlib.util.find_spec(PACKAGES[backend]) is not None
