"""The cache of index maps (see megatron/data/order.py): built once, checked at every start, shared by all processes.

A folder named by a hash of everything the maps depend on holds them and plan.json, which names that hash and a digest of
each map. The folder is built under a temporary name and renamed: any number of processes may build at once, each sees a
complete folder or none. What does not agree with its digests is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from megatron.data.order import IndexMaps, OrderPlan, build_maps
from megatron.errors import UserError
from megatron.files import one_at_a_time, remove_leftovers, replace_folder, sha256_of, temporary_name

_FORMAT = 2  # of the folder, a part of its name
_MAPS = tuple(item.name for item in fields(IndexMaps))  # each is one file


def load_or_build_maps(sizes: np.ndarray, plan: OrderPlan, *, name: str, folders: list[Path]) -> IndexMaps:
    """Return the maps, memory-mapped from the first cache folder that has them or can be written.

    Args:
        sizes: tokens per document, int32 [documents].
        plan: the rest of what the maps depend on.
        name: first part of the folder's name, for people who look at the cache.
        folders: cache folders in order of preference. When none can be used, the maps stay in memory.
    """
    key = f"{name}-{_hash(sizes, plan)}"
    folders = [folder for folder in folders if not _is_foreign(folder) and not _is_foreign(folder / key)]
    for folder in folders:
        maps = _load(folder / key)
        if maps is not None:
            return maps
    built: IndexMaps | None = None
    for folder in folders:
        try:
            folder.mkdir(mode=0o775, parents=True, exist_ok=True)  # never writable by everyone, whatever the umask
            with one_at_a_time(folder / f"{key}.lock"):
                if (maps := _load(folder / key)) is None:  # another process was faster
                    built = built or build_maps(sizes, plan)
                    _store(folder / key, built, plan)
                    maps = _load(folder / key)
            if maps is not None:
                return maps
        except (OSError, UserError) as error:
            warnings.warn(f"cannot cache index maps in {folder} ({error}); trying elsewhere", stacklevel=2)
    return built or build_maps(sizes, plan)


def default_cache_folders(prefix: str) -> list[Path]:
    """Return the cache folders of a data set: beside the data, else one of this user's in the temporary folder."""
    temporary = Path(tempfile.gettempdir()) / f"megatron-index-cache-{os.getuid()}"
    return [Path(prefix).resolve().parent / "index-cache", temporary]


def _hash(sizes: np.ndarray, plan: OrderPlan) -> str:
    digest = hashlib.blake2b(json.dumps([_FORMAT, asdict(plan)]).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(sizes, np.int32).data)
    return digest.hexdigest()


def _is_foreign(path: Path) -> bool:
    """Whether somebody else could have put ``path`` there or could write to it; said in words.

    In a folder where everyone may make files, such as /tmp, only what belongs to this user or to root is trusted.
    """
    try:
        own, above = path.lstat(), path.parent.stat()
        mode = path.stat().st_mode
    except OSError:
        return False  # nothing there
    if above.st_mode & stat.S_IWOTH and own.st_uid not in (0, os.getuid()):
        problem = f"it belongs to user {own.st_uid}, in a folder where everyone may make files"
    elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        problem = "everyone may write to it"
    else:
        return False
    warnings.warn(f"index cache {path} is not used: {problem}", stacklevel=3)
    return True


def _load(folder: Path) -> IndexMaps | None:
    """Return the maps of one cache folder; None when it is absent or damaged (it is then moved away)."""
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / "plan.json").read_bytes())
        if (record.get("key"), record.get("digests")) == (folder.name, _digests(folder)):
            return IndexMaps(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _MAPS))
        problem = "its checksums differ"
    except Exception as error:  # numpy and json meet damaged bytes with errors of many kinds
        problem = str(error)
    warnings.warn(f"damaged index cache {folder} ({problem}); building it again", stacklevel=2)
    with contextlib.suppress(OSError):
        aside = temporary_name(folder)
        os.rename(folder, aside)  # atomic, and only one process wins
        shutil.rmtree(aside, ignore_errors=True)
    return None


def _digests(folder: Path) -> dict[str, str]:
    """Digest of each map. They guard against damage, not against people: those are kept out by ``_is_foreign``."""
    return {name: sha256_of(folder / f"{name}.npy") for name in _MAPS}


def _store(folder: Path, maps: IndexMaps, plan: OrderPlan) -> None:
    remove_leftovers(folder.parent, name="*")  # of builders that were killed, whatever they built
    try:
        with replace_folder(folder) as temporary:
            temporary.chmod(temporary.stat().st_mode & ~stat.S_IWOTH)
            for name in _MAPS:
                np.save(temporary / f"{name}.npy", getattr(maps, name))
            record = {"key": folder.name, "plan": asdict(plan), "digests": _digests(temporary)}
            (temporary / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except UserError:
        if not folder.is_dir():  # otherwise another process, on a file system without locks, was faster
            raise
