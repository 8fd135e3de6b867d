"""Read ``torch.save`` files without running code that they carry.

A pickle is a program: a hostile one runs whatever it likes while it is loaded. The reader here lets a file ask only for
tensors, plain containers and ``argparse.Namespace``. It checks three times: the zip archive must be complete and pass
its checksums, the names that the pickle wants to import are listed without executing anything, and then torch's own
``weights_only`` interpreter, which knows no general ``import``, loads it.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.errors import UserError

ZIP_MAGIC = b"PK\x03\x04"


class Placeholder:
    """Stands for an object of a library that is not needed, such as a loss scaler; it keeps its fields."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


# Objects that a DeepSpeed checkpoint may hold beside its tensors. Each becomes a Placeholder;
# the class is not imported.
PLACEHOLDERS = ("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")


def _allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what a file may name besides torch's own list (tensors, storages, dtypes, OrderedDict, Size, device)."""
    return [argparse.Namespace, *((Placeholder, name) for name in PLACEHOLDERS)]


def load_pickled(path: str | Path) -> Any:
    """Load a file that ``torch.save`` wrote; its code is never run.

    Args:
        path: a zip checkpoint (every torch since 1.6).

    Returns:
        What was saved. Tensors are mapped from the file (read-only use; copy before you change them), on the CPU.

    Raises:
        ValueError: if the file is truncated or damaged, is not a torch zip checkpoint, or asks for a class or function
            outside the list above. The message names it.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    _check_archive(path)
    with torch.serialization.safe_globals(_allowed()):
        try:
            refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
            loaded = None if refused else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged pickle makes nearly anything of itself
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{path} cannot be read as plain tensors and containers ({reason})",
                "nothing else is loaded from a pickle",
                "download the file again, or save its tensors as safetensors with the torch that wrote it",
            ) from error
    if refused:
        raise UserError(
            f"{path} asks for {', '.join(refused)}",
            "only tensors, plain containers and argparse.Namespace are loaded, because a pickle can run any code",
            "do not use this file unless you know who wrote it, and then save its tensors again as safetensors",
        )
    return loaded


def _check_archive(path: Path) -> None:
    """Check that the file is a whole torch zip archive: its directory, its one pickle, the CRC-32 of every member."""
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != ZIP_MAGIC:
        raise UserError(
            f"{path} ({size:,} bytes) is not a torch zip checkpoint",
            "files are read only in the format of torch >= 1.6",
            "download it again, or load and save it again with a recent torch",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist()]
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            damaged = None if packed else archive.testzip()
    except Exception as error:  # also RuntimeError, NotImplementedError, ValueError, OSError: of one flipped bit
        raise UserError(
            f"{path} ({size:,} bytes) is truncated or damaged ({error})",
            "a checkpoint file must be complete",
            "download or copy it again",
        ) from error
    if damaged is not None:
        raise UserError(
            f"{path} is damaged: the checksum of its part {damaged} is wrong",
            "a checkpoint file must be intact",
            "download or copy it again",
        )
    if packed or sum(name.endswith("/data.pkl") for name in names) != 1:
        raise UserError(
            f"{path} is a zip archive, but not one that torch.save wrote",
            "it needs one data.pkl and uncompressed parts",
            "check that it is the right file",
        )
