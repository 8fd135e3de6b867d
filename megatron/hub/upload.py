"""Put a run on the Hugging Face hub: weights for ``transformers``, its records and a model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants

from megatron.checkpoint.files import LATEST, write_manifest
from megatron.config.schema import WEIGHT
from megatron.convert.hf_folder import ExportOptions, export_folder
from megatron.convert.huggingface import attention_family
from megatron.convert.run_folder import origin_of, read_tag, select_checkpoint
from megatron.errors import Failure
from megatron.files import replace_folder
from megatron.hub.model_card import model_card, read_run_records, without_local_paths
from megatron.runs.record import METRICS, RECORD


class UploadError(Failure):
    """An upload that failed: what was asked, what happened, what to do."""


@dataclass(frozen=True)
class UploadPlan:
    """What goes up.

    Attributes:
        repo_id: "owner/name".
        tag: checkpoint of the run; default: the newest that verifies.
        kind: of the exported weights; default: as trained, and of the tag ``best`` those that were validated as the best.
        with_export: the Hugging Face export.
        with_checkpoint: the checkpoint in this repository's format, optimizer state included, to continue training.
        license_name: for the model card.
        export: options of the export.
    """

    repo_id: str
    tag: str | None = None
    kind: str | None = None
    with_export: bool = True
    with_checkpoint: bool = False
    license_name: str | None = None
    export: ExportOptions = ExportOptions()


def stage(run: Path, folder: Path, plan: UploadPlan) -> list[tuple[str, int]]:
    """Put everything that is to be uploaded, and nothing else, into a new folder; it appears complete or not at all.

    Args:
        run: run directory.
        folder: folder to make.
        plan: what to include.

    Returns:
        Paths inside the folder and their bytes.

    Raises:
        ValueError: no run, no usable checkpoint, an architecture that cannot be exported, or ``folder`` is taken.
    """
    with replace_folder(folder) as fresh:
        _fill(fresh, run, plan)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size) for path in files]


def _fill(folder: Path, run: Path, plan: UploadPlan) -> None:
    info, _ = read_run_records(run)
    found = select_checkpoint(run, plan.tag)
    assert found.tag is not None
    tag, kind, family = found.tag, WEIGHT, None
    if plan.with_export:
        kind = plan.kind or found.weights
        config, tensors = read_tag(tag, kind)
        family = attention_family(config)
        origin = plan.export.origin or origin_of(tag)
        export_folder(config, tensors, folder, options=replace(plan.export, origin=origin))
    (folder / RECORD).write_text(json.dumps(without_local_paths(info), indent=1) + "\n", encoding="utf-8")
    if (run / METRICS).is_file():
        shutil.copyfile(run / METRICS, folder / METRICS)
    if plan.with_checkpoint:
        (folder / tag.name).mkdir()
        for name in found.manifest["files"]:
            shutil.copyfile(tag / name, folder / tag.name / name)
        write_manifest(folder / tag.name, without_local_paths(found.manifest))
        (folder / LATEST).write_text(tag.name, encoding="utf-8")
    step, license_name = int(found.manifest["step"]), plan.license_name
    card = model_card(run, repo_id=plan.repo_id, step=step, family=family, weights=kind, license_name=license_name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def upload(folder: Path, repo_id: str, *, private: bool, endpoint: str | None = None) -> str:
    """Create the repository if needed and upload a staged folder as one commit.

    Files that arrived in an earlier, interrupted attempt are not sent again (the hub knows them by their hash).

    Args:
        folder: from :func:`stage`.
        repo_id: "owner/name".
        private: visibility of a repository that is created now.
        endpoint: hub address; default: HF_ENDPOINT.

    Returns:
        Address of the commit.

    Raises:
        UploadError: no connection, no permission, or the hub refused.
    """
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload run")
    except Exception as error:  # transport errors have no common class across versions of huggingface_hub
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UploadError(
            f"uploading to {repo_id} at {endpoint or constants.ENDPOINT} failed ({reason})",
            "it needs a token with write access and a steady connection",
            "run: hf auth login (or set HF_TOKEN), and the same command again to continue",
        ) from error
    return str(commit.commit_url)
