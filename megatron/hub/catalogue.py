"""What can be downloaded by name, and where it goes under the data folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.hub.download import DownloadError, RemoteFile, list_files

QUICKSTART = "ZahlenReal/diffusion_data_constraint_quickstart"
C4_SUBSETS = "ZahlenReal/diffusion_data_constraint_c4subsets"
MODELS = "ZahlenReal/diffusion_data_constraint_models"
MODELS_FOLDER = "100m_new/"
GPT2 = "openai-community/gpt2"
TRAIN_PREFIX = "c4_100m/gpt2tok_c4_100_text_document"
VALID_PREFIX = "c4_100m/gpt2tok_c4_val_text_document"

# Weights and settings of a checkpoint; the optimizer states beside them cannot be converted and are left out.
CHECKPOINT_FILE = re.compile(r"(?:^|/)(?:latest|layer_\d+-model_\d+-model_states\.pt|mp_rank_\d+_model_states\.pt)$")


@dataclass(frozen=True)
class Item:
    """One thing to download: where it is, which files of the repository, and where each goes."""

    title: str
    repo_id: str
    repo_type: str
    select: Callable[[str], bool]
    place: Callable[[str], str]  # path in the repository -> path under the data folder


def quickstart(*, text: bool) -> Item:
    """Tokenised 100M-token C4 subset and validation set; with ``text`` also the JSONL files that they come from."""
    endings = (".bin", ".idx", ".jsonl") if text else (".bin", ".idx")
    return Item("quickstart data (C4, 100M tokens)", QUICKSTART, "dataset", lambda path: path.endswith(endings),
                lambda path: f"c4_100m/{Path(path).name}")  # fmt: skip


def c4_subsets(names: list[str]) -> Item:
    """The larger subsets; all of them, or those whose path contains one of ``names``."""

    def select(path: str) -> bool:
        return path.endswith((".bin", ".idx")) and (not names or any(name.lower() in path.lower() for name in names))

    return Item("C4 subsets", C4_SUBSETS, "dataset", select, lambda path: f"c4_subsets/{path}")


def checkpoint(objective: str) -> Item:
    """The published AR ("ar") or MDM ("mdm") model, weights only, in its original layout."""
    marker = {"ar": r"/(?:ar|arm)(?:_|/|$)", "mdm": r"/mdm(?:_|/|$)"}[objective]

    def select(path: str) -> bool:
        return path.startswith(MODELS_FOLDER) and bool(CHECKPOINT_FILE.search(path)) and bool(re.search(marker, path))

    title = f"published {objective.upper()} checkpoint"
    return Item(title, MODELS, "model", select, lambda path: f"published/{path.removeprefix(MODELS_FOLDER)}")


def gpt2() -> Item:
    """Vocabulary and merges of GPT-2, with which all published data was tokenised."""
    return Item(
        "GPT-2 tokenizer", GPT2, "model", lambda path: path in ("vocab.json", "merges.txt"), lambda path: f"gpt2/{path}"
    )


def resolve(item: Item, *, endpoint: str | None = None) -> list[tuple[RemoteFile, str]]:
    """List the files of an item and their places.

    Raises:
        DownloadError: the repository cannot be listed, has no such file, or names one that would leave the data folder.
    """
    files = list_files(item.repo_id, item.repo_type, select=item.select, endpoint=endpoint)
    if not files:
        everything = list_files(item.repo_id, item.repo_type, select=lambda path: True, endpoint=endpoint)
        some = ", ".join(file.path for file in everything[:12]) or "nothing"
        raise DownloadError(
            f"{item.title}: {item.repo_id} has no such file",
            f"it holds {some}",
            f"check the name that you gave, or fetch with: hf download --repo-type {item.repo_type} {item.repo_id}",
        )
    pairs = [(file, item.place(file.path)) for file in files]
    outside = [place for _, place in pairs if Path(place).is_absolute() or ".." in Path(place).parts]
    if outside or len({place for _, place in pairs}) != len(pairs):
        raise DownloadError(
            f"{item.title}: {item.repo_id} lists {outside or 'two files of one name'}",
            "files must have their own places under the data folder",
            "nothing is fetched",
        )
    return pairs
