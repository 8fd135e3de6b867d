"""Run directories as the ends of a conversion: read the weights of a run, or make a run of converted weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.files import ORIGIN
from megatron.checkpoint.select import Selection, select
from megatron.checkpoint.tensors import open_whole_model, save_full_checkpoint
from megatron.config import config_to_dict
from megatron.config.schema import Config
from megatron.config.shape import Shape
from megatron.convert.hf_folder import CONFIG_FILES
from megatron.convert.hf_tokenizer import copy_tokenizer, named_tokenizer
from megatron.errors import UserError
from megatron.files import replace_folder
from megatron.model.arithmetic import parameters_for_compute
from megatron.objectives import build_objective
from megatron.objectives.base import compute_per_token
from megatron.screen import Progress


def read_run(
    path: str | Path, *, tag: str | None = None, kind: str | None = None
) -> tuple[Config, dict[str, Tensor], Path]:
    """Read all weights of a checkpoint; its files are verified first.

    Args:
        path: run directory, or one tag of it.
        tag: such as ``global_step100``; default: the newest that verifies.
        kind: of the weights: ``weight`` or ``ema``; default: as trained, and of the tag ``best`` those validated as the best.

    Returns:
        Configuration, its tokenizer spelled out; full canonical tensors (fp32); and the folder of the tag.

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    found = select_checkpoint(path, tag)
    assert found.tag is not None
    return *read_tag(found.tag, kind or found.weights), found.tag


def select_checkpoint(path: str | Path, tag: str | None) -> Selection:
    """The verified checkpoint of a run; says what was passed over.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    found = select(path, tag)
    if found.tag is None:
        raise UserError(
            f"{path} holds no checkpoint",
            "a run has global_stepN folders with a manifest.json",
            "give the folder that was passed as --save",
        )
    if found.warning:
        print(found.warning, file=sys.stderr, flush=True)
    return found


def read_tag(tag: Path, kind: str) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and full canonical tensors (fp32) of one kind, of a verified checkpoint."""
    reader = open_whole_model(tag, kind)
    names = Progress("reading", len(reader.specs), unit="tensors").over(reader.specs)
    data = named_tokenizer(reader.config.data, reader.manifest.get("tokenizer") or {})
    return replace(reader.config, data=data), {name: reader.tensor(name) for name in names}


def origin_of(folder: Path) -> Path | None:
    """Return the folder of a run that keeps its Hugging Face origin, given the run or one of its tags."""
    return next((found for found in (folder / ORIGIN, folder.parent / ORIGIN) if found.is_dir()), None)


def write_run(
    path: str | Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    source: str | Path,
    origin: Path | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Make a run directory of weights that were not trained in it: one checkpoint, ``latest``, run.json. Complete or not at all.

    Args:
        path: folder to make.
        config: resolved configuration.
        tensors: full canonical tensors.
        step: step of the checkpoint.
        source: where the weights come from, noted in run.json.
        origin: Hugging Face folder whose config.json and tokenizer the run keeps, for the way back.
        more: further fields of the manifest.

    Raises:
        ValueError: names or shapes are not those of the model, or ``path`` is taken.
    """
    path = Path(path)
    with replace_folder(path) as folder:
        if origin is not None:
            (folder / ORIGIN).mkdir()
            for name in CONFIG_FILES:
                if (origin / name).is_file():
                    shutil.copyfile(origin / name, folder / ORIGIN / name)
            if config.data.tokenizer_model == str(origin):
                copy_tokenizer(origin, folder / ORIGIN)
                config = replace(config, data=replace(config.data, tokenizer_model=os.path.abspath(path / ORIGIN)))
        save_full_checkpoint(folder, config, tensors, step=step, more=more)
        (folder / "run.json").write_text(
            json.dumps(_run_json(config, tensors, source), indent=1) + "\n", encoding="utf-8"
        )


def _run_json(config: Config, tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Describe the run as training does; what a conversion cannot know (data, epochs) is 0 or null."""
    samples = config.run.train_samples or 0
    parameters = parameters_for_compute(
        Shape.of(config.model), config.data.vocab_size or config.model.padded_vocab_size or 0
    )
    tokens, trained = samples * config.model.seq_length, build_objective(config)
    return {
        "format": 1,
        "objective": config.objective.objective,
        "label": trained.for_eval().label,
        "config": config_to_dict(config),
        "parameters": {
            "total": sum(tensor.numel() for tensor in tensors.values()),
            "embedding": tensors["word_embeddings.weight"].numel(),
            "for_compute": parameters,
        },
        "unique_tokens": 0,
        "train_samples": samples,
        "train_tokens": tokens,
        "epochs": 0.0,
        "train_flops": compute_per_token(parameters, trained) * tokens,
        "versions": {},
        "device": "converted",
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "text_bytes_per_token": None,
        "converted_from": str(source),
    }
