"""SYNTHETIC run directories for tests of readers and reports: the losses come from formulas, no model was trained.

The shapes follow the CPU probe in FACTS section 8 (AR turns early, the MDM bound falls for hundreds of epochs).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron.statistics import ValidationSums, mean_loss

LABELS = {"ar": "NLL (exact)", "mdm": "NLL bound", "maskgit": "MaskGIT loss (not a likelihood bound)"}


def curve(objective: str, epoch: float, parameters: int, unique: int) -> tuple[float, float]:
    """(validation, training) loss of a made-up learning curve at an epoch, nats per token."""
    size = (parameters / 1e6) ** -0.12
    data = (unique / 1e5) ** -0.1
    if objective == "ar":
        turn = 13.0 * (unique / 1e5) ** 0.4 / (parameters / 1e6) ** 0.5
        fit = 3.35 * size * data + 3.6 * (1 + epoch) ** -0.9
        return fit + 0.25 * math.log1p((epoch / turn) ** 1.6), fit - 0.9 * math.log1p(epoch / turn)
    fit = 3.0 * size * data + 4.4 * (1 + epoch) ** -0.24
    return fit, fit - 0.02


def config(objective: str, samples: int, seed: int, **model: Any) -> dict[str, Any]:
    return {
        "model": {
            "model": None,
            "num_layers": 3,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "seq_length": 128,
            **model,
        },
        "objective": {"objective": objective, "mask_token_id": None},
        "data": {"train_data_path": ["corpus/train"], "valid_data_path": ["corpus/valid"], "num_workers": 2},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "parallel": {"tensor_model_parallel_size": 1},
        "run": {
            "seed": seed,
            "train_samples": samples,
            "global_batch_size": 16,
            "save": f"runs/{objective}",
            "num_mc": 1,
        },
    }


def write_run(
    folder: Path,
    objective: str = "mdm",
    *,
    parameters: int = 900_000,
    unique: int = 100_000,
    epochs: float = 150.0,
    seed: int = 1234,
    validations: int = 18,
    downstream: dict[str, Any] | None = None,
) -> Path:
    """Write one synthetic run directory per the contract and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    samples = int(epochs * unique / 128)
    info = {
        "format": 1,
        "objective": objective,
        "label": LABELS.get(objective, "NLL bound"),
        "config": config(objective, samples, seed),
        "parameters": {"total": parameters, "embedding": parameters // 5, "for_compute": parameters},
        "unique_tokens": unique,
        "train_samples": samples,
        "train_tokens": samples * 128,
        "epochs": samples * 128 / unique,
        "train_flops": 6.0 * parameters * samples * 128,
        "versions": {"torch": "2.13.0", "synthetic": "yes"},
        "device": "cpu (synthetic)",
        "started": "2026-11-22T00:00:00",
        "text_bytes_per_token": 2.1,
    }
    (folder / "run.json").write_text(json.dumps(info))
    steps = samples // 16

    def position(step: int) -> dict[str, Any]:
        tokens = step * 16 * 128
        place = {"step": step, "samples": step * 16, "tokens": tokens}
        return {**place, "epoch": tokens / unique, "flops": 6.0 * parameters * tokens}

    rows: list[dict[str, Any]] = []
    for step in map(int, np.unique(np.geomspace(1, steps, 240).astype(int))):
        noise = rng.normal(0, 0.06 if objective == "ar" else 0.25)
        loss = curve(objective, position(step)["epoch"], parameters, unique)[1] + noise
        speed = {"tokens_per_second": 6000 + rng.normal(0, 150), "tflops": 0.03, "mfu": None, "seconds": 0.34}
        rows.append(
            {"kind": "train", **position(step), "loss": loss, "lr": 1e-3, "grad_norm": 0.8, **speed, "skipped_steps": 0}
        )
    for step in map(int, np.unique(np.geomspace(max(1, steps // 300), steps, validations).astype(int))):
        nll = curve(objective, position(step)["epoch"], parameters, unique)[0] + rng.normal(0, 0.008)
        error, draws = (0.012, 1) if objective == "ar" else (0.025, 4)
        value = {
            "nll": nll,
            "nll_se": error,
            "ppl": math.exp(nll),
            "bits_per_byte": nll / math.log(2) / 2.1,
            "best": False,
        }
        rows.append(
            {"kind": "valid", **position(step), "label": info["label"], "num_mc": draws, "num_samples": 160, **value}
        )
    rows.sort(key=lambda row: (row["step"], row["kind"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if downstream:
        (folder / "downstream.json").write_text(json.dumps(downstream))
    return folder


def write_sums(folder: Path, *, documents: int = 40, shift: float = 0.0, halves: bool = False, draws: int = 0) -> None:
    """Put sums a (sample, document) beside every validation of a run, and what the rows then say.

    Documents have strong effects, the same in every run; ``shift`` is added to the losses of the run's report half.
    """
    owner = np.repeat(np.arange(documents), 24).reshape(-1, 32)
    effects = np.random.default_rng(0).normal(0, 0.6, documents)
    in_selection = np.arange(documents) % 2 == 0
    (folder / "validations").mkdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] != "valid":
            continue
        rng = np.random.default_rng(row["step"])
        loss = row["nll"] + (effects - effects.mean() + shift * ~in_selection)[owner] + rng.normal(0, 0.02, owner.shape)
        sums = ValidationSums.of_tokens(np.arange(len(owner)), owner, loss, draws=draws)
        sums = sums.with_halves(in_selection) if halves else sums
        sums.save(folder / f"validations/step{row['step']:08d}.npz")
        estimate = mean_loss(sums)
        row.update(nll=estimate.value, nll_se=estimate.error, se_kind="documents", num_documents=documents,
                   sums=f"validations/step{row['step']:08d}.npz")  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
