"""Stands in for a training program in tests of sweeps: a launcher word before the real program, which it never starts.

Writes run.json and metrics.jsonl as training does, one step after another, continues from the step in "latest", and notes
every start in starts.txt and its share of the cores in threads.txt. FAKE_STEP_SECONDS slows it down; FAKE_FAIL names an
objective whose first start fails half-way. The kill-switch file stops it with status 75.

With --eval-interval it validates on the way, two documents in each half, by a learning curve of its own: best at lr 0.01 and
weight-decay 1 on the selection half, weight-decay 2 on the report half, worse by 1 from weight-decay 4 on; it diverges at lr 1.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

program, words = sys.argv[1], sys.argv[2:]
flags = {}
for position, word in enumerate(words):
    if word.startswith("--"):
        following = words[position + 1] if position + 1 < len(words) else "--"
        flags[word[2:]] = True if following.startswith("--") else following
folder = Path(flags["save"])
assert flags["load"] == flags["save"]
objective = "mdm" if "mdm" in Path(program).name else "ar"
unique = int("".join(filter(str.isdigit, Path(flags["train-data-path"]).name)))
samples = round(float(flags.get("train-samples", float(flags.get("train-epochs", 0)) * unique / 10)))
label = "NLL (exact)" if objective == "ar" else "NLL bound"
with open(folder / "starts.txt", "a") as file:
    file.write(f"{os.getpid()}\n")
(folder / "threads.txt").write_text(os.environ.get("OMP_NUM_THREADS", ""))
first = not (folder / "run.json").exists()
config = {
    "model": {},
    "objective": {"objective": objective},
    "run": {"seed": int(flags["seed"]), "global_batch_size": 1},
}
config["optimizer"] = {"lr": float(flags["lr"])}
info = {
    "format": 1, "objective": objective, "label": label, "config": config, "train_samples": samples, "train_flops": 1.0,
    "parameters": {"total": 1000, "for_compute": 1000}, "unique_tokens": unique, "epochs": samples * 10 / unique,
}  # fmt: skip
(folder / "run.tmp").write_text(json.dumps(info))
(folder / "run.tmp").replace(folder / "run.json")  # as the real one does it: who looks finds the old one or the new one
latest = folder / "latest"
done = int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0
metrics = folder / "metrics.jsonl"


def validate(step):
    """The fields of one validation, its sums kept beside it."""
    import numpy as np

    from megatron.statistics import ValidationSums

    lr, decay = float(flags["lr"]), float(flags.get("weight-decay", 1))
    loss = 4 + 0.2 * math.log10(lr / 0.01) ** 2 + 0.5 * 0.01 ** (step / samples) + (decay >= 4)
    halves = np.array([True, True, False, False])
    spread = np.array([0.001, -0.001, 0.002, -0.002])
    losses = loss + np.where(halves, 0.01 * abs(decay - 1), 0.01 * abs(decay - 2)) + spread
    numbers = np.arange(4, dtype=np.int32)
    sums = ValidationSums(numbers, numbers, np.full(4, 10, np.int32), 10 * losses, in_selection=halves)
    (folder / "validations").mkdir(exist_ok=True)
    sums.save(folder / f"validations/step{step}.npz")
    return {"nll": float(losses.mean()), "sums": f"validations/step{step}.npz"}


kept = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
kept = [line for line in kept if json.loads(line)["step"] <= done]
metrics.with_suffix(".tmp").write_text("".join(line + "\n" for line in kept))
metrics.with_suffix(".tmp").replace(metrics)
with open(metrics, "a", buffering=1) as file:
    for step in range(done + 1, samples + 1):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
        if Path(flags["kill-switch-file"]).exists():
            sys.exit(75)
        place = {"step": step, "samples": step, "tokens": step * 10, "epoch": step * 10 / unique, "flops": 1.0 * step}
        file.write(
            json.dumps(
                {
                    "kind": "train",
                    **place,
                    "loss": 5.0,
                    "tokens_per_second": 1.0,
                    "seed": flags["seed"],
                    "lr": float(flags["lr"]),
                }
            )
            + "\n"
        )
        interval = int(flags.get("eval-interval", samples))
        if float(flags["lr"]) >= 1 and step > samples // 2:
            sys.exit("error: 11 steps in a row had a NaN or infinite gradient; a run that diverges ends; lower --lr")
        if step == samples or step % interval == 0:
            number = {"nll": 4.0 + unique / 1e6, "nll_se": 0.01, "label": label, "num_mc": 1, "num_samples": 8}
            number |= validate(step) if "eval-interval" in flags else {}
            file.write(json.dumps({"kind": "valid", **place, **number, "bits_per_byte": None}) + "\n")
        if os.environ.get("FAKE_FAIL") == objective and first and step == samples // 2:
            sys.exit(3)
        latest.with_suffix(".tmp").write_text(f"global_step{step}")
        latest.with_suffix(".tmp").replace(latest)
