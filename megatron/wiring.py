"""The one place through which a room reaches a higher one: ``inference`` opens formats whose readers live in ``convert``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron.config.schema import Config


def read_foreign(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """A Hugging Face export as configuration and whole canonical tensors.

    Raises:
        UserError: no model of a known kind, or files that do not belong together.
    """
    from megatron.convert.hf_folder import import_folder

    return import_folder(folder)
