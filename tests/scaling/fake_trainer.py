"""Stands in for a training program in tests of sweeps: a launcher word before the real program, which it never starts.

Writes run.json and metrics.jsonl as training does, one step after another, continues from the step in "latest", and notes
every start in starts.txt and its share of the cores in threads.txt. FAKE_STEP_SECONDS slows it down; FAKE_FAIL names an
objective whose first start fails half-way. The kill-switch file stops it with status 75.
"""

import json
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
samples = round(float(flags["train-epochs"]) * unique / 10)
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
(folder / "run.json").write_text(json.dumps(info))
latest = folder / "latest"
done = int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0
metrics = folder / "metrics.jsonl"
kept = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
kept = [line for line in kept if json.loads(line)["step"] <= done]
metrics.write_text("".join(line + "\n" for line in kept))
with open(metrics, "a", buffering=1) as file:
    for step in range(done + 1, samples + 1):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
        if Path(flags["kill-switch-file"]).exists():
            sys.exit(75)
        place = {"step": step, "samples": step, "tokens": step * 10, "epoch": step * 10 / unique, "flops": 1.0 * step}
        file.write(
            json.dumps({"kind": "train", **place, "loss": 5.0, "tokens_per_second": 1.0, "seed": flags["seed"]}) + "\n"
        )
        if step == samples:
            number = {"nll": 4.0 + unique / 1e6, "nll_se": 0.01, "label": label, "num_mc": 1, "num_samples": 8}
            file.write(json.dumps({"kind": "valid", **place, **number, "bits_per_byte": None}) + "\n")
        if os.environ.get("FAKE_FAIL") == objective and first and step == samples // 2:
            sys.exit(3)
        latest.with_suffix(".tmp").write_text(f"global_step{step}")
        latest.with_suffix(".tmp").replace(latest)  # as the real one does it: a kill leaves the old one or the new one
