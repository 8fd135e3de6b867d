"""Numbers of a run and where they go: metrics.jsonl always, TensorBoard and W&B when asked."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron.config.schema import Config
from megatron.model.arithmetic import peak_flops
from megatron.objectives.base import EXACT


class Throughput:
    """Tokens per second, TFLOP/s and MFU of one device over log intervals."""

    def __init__(self, config: Config, *, flops_per_token: float, num_devices: int, device: torch.device) -> None:
        assert config.run.global_batch_size
        self.tokens_per_step = config.run.global_batch_size * config.model.seq_length
        self.flops_per_token, self.num_devices = flops_per_token, num_devices
        self.peak = peak_flops(device)

    def report(self, *, steps: int, seconds: float) -> dict[str, float | None]:
        """Rates over ``steps`` steps that took ``seconds``."""
        tokens_per_second = steps * self.tokens_per_step / max(seconds, 1e-9)
        per_device = tokens_per_second * self.flops_per_token / self.num_devices
        return {
            "tokens_per_second": tokens_per_second,
            "tflops": per_device / 1e12,
            "mfu": None if self.peak is None else per_device / self.peak,
        }


class MetricsLog:
    """Sinks of one run. Made on the first rank only."""

    def __init__(self, run_dir: Path, config: Config, *, resume_step: int | None) -> None:
        """Args:
        run_dir: folder of the run; created.
        config: resolved configuration.
        resume_step: lines of later steps, left by an interrupted run, are dropped: they will be written again. None
            keeps every line (a validation is added to a run that is not continued).
        """
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        if resume_step is not None:
            _truncate(path, resume_step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        self._config = config
        self._tensorboard = _open_tensorboard(config)
        self._wandb = _open_wandb(config, run_dir)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; ``kind`` is "train" or "valid"."""
        self._file.write(json.dumps(_jsonable(record)) + "\n")
        scalars = self._scalars(record)
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _scalars(self, record: dict[str, Any]) -> dict[str, float]:
        run = self._config.run
        dropped = {"kind", "step", "label", "best"}
        dropped |= set() if run.log_timers_to_tensorboard else {"step_seconds"}
        dropped |= set() if run.log_batch_size_to_tensorboard else {"batch_size"}
        dropped |= set() if run.log_validation_ppl_to_tensorboard else {"ppl"}
        return {
            f"{record['kind']}/{key}": value
            for key, value in record.items()
            if key not in dropped and isinstance(value, int | float)
        }


def _truncate(path: Path, step: int) -> None:
    """Keep the complete lines up to ``step``."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _jsonable(record: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity are not JSON; they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _open_tensorboard(config: Config) -> Any:
    if config.run.tensorboard_dir is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(config.run.tensorboard_dir, max_queue=config.run.tensorboard_queue_size)


def _open_wandb(config: Config, run_dir: Path) -> Any:
    run = config.run
    if run.wandb_project is None:
        return None
    import wandb

    from megatron.config import config_to_dict

    folder = Path(run.wandb_save_dir or run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=run.wandb_project,
        name=run.wandb_exp_name,
        group=run.wandb_group,
        dir=str(folder),
        config=config_to_dict(config),
        mode=os.environ.get("WANDB_MODE", "online" if _has_wandb_login() else "offline"),  # type: ignore[arg-type]
        resume="allow",
        id=_wandb_id(run_dir),
        settings=wandb.Settings(silent=True),
    )


def _has_wandb_login() -> bool:
    """Whether ``wandb login`` was run or a key is in the environment (W&B itself would ask on the terminal)."""
    import netrc
    from urllib.parse import urlsplit

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_id(run_dir: Path) -> str:
    """One id per run directory, so that a resumed run continues its curves."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.urandom(8).hex())
    return path.read_text()


class Progress:
    """What a person sees: one line per log interval, and a live bar where the output is a terminal."""

    def __init__(self, *, total_steps: int, first_step: int, enabled: bool) -> None:
        self.enabled, self.total_steps = enabled, total_steps
        self.started, self.first_step = time.monotonic(), first_step
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def train_line(self, record: dict[str, Any]) -> None:
        """Print the progress line of one log interval."""
        eta = (time.monotonic() - self.started) / max(1, record["step"] - self.first_step)
        eta *= self.total_steps - record["step"]
        mfu = "" if record["mfu"] is None else f" | MFU {record['mfu']:.1%}"
        skipped = f" | skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
        self.print(
            f"step {record['step']:>{len(str(self.total_steps))}}/{self.total_steps} | epoch {record['epoch']:.2f} | "
            f"loss {record['loss']:.4f} | lr {record['lr']:.2e} | grad norm {record['grad_norm']:.3f} | "
            f"{record['tokens_per_second']:,.0f} tokens/s{mfu}{skipped} | {format_seconds(eta)} left"
        )

    def valid_line(self, record: dict[str, Any]) -> None:
        """Print the result of one validation; a bound never goes without its name and its error."""
        bits = "" if record["bits_per_byte"] is None else f" | {record['bits_per_byte']:.4f} bits/byte"
        error = "" if record["nll_se"] is None else f" ± {record['nll_se']:.4f}"
        best = " (best)" if record["best"] else ""
        draws = "" if record["label"] == EXACT else f" ({record['num_mc']} draw{'s' * (record['num_mc'] > 1)})"
        perplexity = "" if record["ppl"] is None else f" | perplexity {record['ppl']:.2f}"
        self.print(
            f"validation at step {record['step']}: {record['label']}{draws} {record['nll']:.4f}{error} nats/token"
            f"{perplexity}{bits}{best}"
        )
        if "gap" in record:
            self.print(
                f"likelihood gap of right to wrong answers ({record['gap_label']}): {record['gap']:.4f} ± {record['gap_se']:.4f} "
                f"nats/token | accuracy {record['gap_accuracy']:.3f}"
            )

    def print(self, text: str) -> None:
        """A line for a person, on the first rank."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float) -> str:
    """A duration for people: 45 s, 12:05 min, 3:20 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
