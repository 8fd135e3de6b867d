"""The order in which a data set is read: Megatron's, bit for bit, without loops over samples.

All epochs of documents are shuffled together into one stream of tokens; sample k is the ``seq_length + 1`` tokens from
``k * seq_length`` on (neighbours share one token); then the samples are shuffled. When less than 80 % of the last epoch
is needed, that epoch is kept apart: its documents and samples are shuffled among themselves and come last, so that
training over E.1 epochs does not read some documents E+1 times before others E times.

The maps of an order are built once, checked at every start, and shared by all processes. A cache folder named by a hash of
everything they depend on holds them and plan.json, which names that hash and a digest of each map. The folder is built under a
temporary name and renamed: any number of processes may build at once, each sees a complete folder or none. What does not agree
with its digests is built again.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.errors import UserError, require
from megatron.files import one_at_a_time, remove_leftovers, replace_folder, sha256_of, temporary_name
from megatron.screen import Progress

_CHUNK = 1 << 22  # documents per step of the boundary search: bounds its memory


@dataclass(frozen=True)
class OrderPlan:
    """All that the order depends on, apart from the document sizes.

    Attributes:
        seed: seed of the shuffles.
        seq_length: tokens per sample, without the one of overlap.
        tokens_per_epoch: tokens of all documents.
        num_epochs: epochs that the maps cover.
        first_part_samples: samples that are shuffled together first; the rest, from the last epoch, come after them.
        total_samples: samples that the maps hold.
    """

    seed: int
    seq_length: int
    tokens_per_epoch: int
    num_epochs: int
    first_part_samples: int
    total_samples: int

    @property
    def separate_last_epoch(self) -> bool:
        """Whether the last epoch is shuffled apart."""
        return self.first_part_samples < self.total_samples


def plan_order(
    *, tokens_per_epoch: int, num_samples: int | None, seq_length: int, seed: int, source: str = "the data set"
) -> OrderPlan:
    """Return how many epochs ``num_samples`` samples need and whether the last one is kept apart.

    ``num_samples=None`` means one epoch, every sample once.

    Raises:
        UserError: a non-positive size, or one epoch is asked for and is shorter than one sample; ``source`` names the data.
    """
    if seq_length < 1 or (num_samples is not None and num_samples < 1):
        raise UserError(f"{num_samples} samples of {seq_length} tokens", "both must be at least 1", "raise them")
    if tokens_per_epoch < 1:
        raise UserError(f"{source} has no tokens", "it needs at least one", "check the input of the preprocessing")

    def samples_in(num_epochs: int) -> int:
        return (num_epochs * tokens_per_epoch - 1) // seq_length

    if num_samples is None:
        num_epochs, separate = 1, False
        given = f"{source} has {tokens_per_epoch} tokens and seq_length is {seq_length}"
        rule, fix = "one pass needs at least one token more than that", "use more data or a smaller --seq-length"
        require(samples_in(1) >= 1, given, rule, fix)
    else:
        num_epochs = -(-(num_samples * seq_length + 1) // tokens_per_epoch)
        from_last = num_samples - samples_in(num_epochs - 1) if num_epochs > 1 else 0
        separate = num_epochs > 1 and from_last < int(0.80 * samples_in(1))
    total = samples_in(num_epochs)
    first = samples_in(num_epochs - 1) if separate else total
    return OrderPlan(seed, seq_length, tokens_per_epoch, num_epochs, first, total)


def build_document_order(num_documents: int, plan: OrderPlan, rng: np.random.RandomState) -> np.ndarray:
    """Return the document of each place in the stream, int32 [num_epochs * num_documents]."""
    together = plan.num_epochs - int(plan.separate_last_epoch)
    order = np.tile(np.arange(num_documents, dtype=np.int32), plan.num_epochs)
    rng.shuffle(order[: together * num_documents])
    rng.shuffle(order[together * num_documents :])  # where there is nothing apart, this draws nothing
    return order


def build_sample_starts(sizes: np.ndarray, document_order: np.ndarray, plan: OrderPlan) -> np.ndarray:
    """Return where samples start, int64 [total_samples + 1, 2]: place in ``document_order`` and token offset there.

    Sample k reads from row k up to and including the token of row k+1. A token's place is found by binary search in the
    running sum of document sizes, one chunk of documents after the other.
    """
    starts = np.zeros((plan.total_samples + 1, 2), dtype=np.int64)
    row, tokens_before = 1, 0  # row 0 is the start of the stream, also when the first document is empty
    progress = Progress("building the data order", len(document_order), unit="documents")
    for begin in progress.over(range(0, len(document_order), _CHUNK), each=_CHUNK):
        ends = tokens_before + np.cumsum(sizes[document_order[begin : begin + _CHUNK]], dtype=np.int64)
        # The rows k that lie in this chunk: k * seq_length < ends[-1].
        stop = min(plan.total_samples + 1, -(-int(ends[-1]) // plan.seq_length))
        if stop > row:
            positions = np.arange(row, stop, dtype=np.int64) * plan.seq_length
            place = np.searchsorted(ends, positions, side="right")
            before = np.concatenate([[tokens_before], ends])
            starts[row:stop, 0] = begin + place
            starts[row:stop, 1] = positions - before[place]
            row = stop
        tokens_before = int(ends[-1])
    return starts


def build_sample_order(plan: OrderPlan, rng: np.random.RandomState) -> np.ndarray:
    """Return the order of samples, uint32 [total_samples] (int64 where uint32 is too small)."""
    dtype = np.uint32 if plan.total_samples < np.iinfo(np.uint32).max - 1 else np.int64
    order = np.arange(plan.total_samples, dtype=dtype)
    rng.shuffle(order[: plan.first_part_samples])
    rng.shuffle(order[plan.first_part_samples :])
    return order


class IndexMaps(NamedTuple):
    """The three maps of one order; see the functions that build them for shapes.

    Attributes:
        document_order: int32, document of each place in the stream (Megatron: doc_idx).
        sample_starts: int64 [n + 1, 2] (Megatron: sample_idx).
        sample_order: uint32 [n] (Megatron: shuffle_idx).
    """

    document_order: np.ndarray
    sample_starts: np.ndarray
    sample_order: np.ndarray


def build_maps(sizes: np.ndarray, plan: OrderPlan) -> IndexMaps:
    """Build all three maps. The random stream is Megatron's: document shuffles first, then sample shuffles."""
    rng = np.random.RandomState(plan.seed)
    document_order = build_document_order(len(sizes), plan, rng)
    sample_starts = build_sample_starts(sizes, document_order, plan)
    return IndexMaps(document_order, sample_starts, build_sample_order(plan, rng))


_FORMAT = 2  # of the folder, a part of its name
_MAPS = IndexMaps._fields  # each is one file


def load_or_build_maps(sizes: np.ndarray, plan: OrderPlan, *, name: str, folders: list[Path]) -> IndexMaps:
    """Return the maps, memory-mapped from the first cache folder that has them or can be written.

    Args:
        sizes: tokens per document, int32 [documents].
        plan: the rest of what the maps depend on.
        name: first part of the folder's name, for people who look at the cache.
        folders: cache folders in order of preference. When none can be used, the maps stay in memory.

    Raises:
        UserError: they are larger than the memory of this machine.
    """
    key = f"{name}-{_hash(sizes, plan)}"
    folders = [folder for folder in folders if not _is_foreign(folder) and not _is_foreign(folder / key)]
    for folder in folders:
        if (maps := _load(folder / key)) is not None:
            return maps
    needed = 4 * plan.num_epochs * len(sizes) + 20 * plan.total_samples
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    given = f"the order of {plan.num_epochs:,} epochs, {plan.total_samples:,} samples, takes {needed / 1e9:,.1f} GB"
    rule = f"it is made in memory, of which this machine has {there / 1e9:,.1f} GB"
    require(needed <= there, given, rule, "train for less (--train-samples, --train-iters, --train-epochs)")
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
