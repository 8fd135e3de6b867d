"""Numbers of a run and where they go: metrics.jsonl always, TensorBoard and W&B when asked, and a line for people."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.config import config_to_dict, values_of
from megatron.config.schema import Config
from megatron.files import replace_file, written_whole
from megatron.objectives import OBJECTIVES
from megatron.objectives.base import BOUND, EXACT
from megatron.runs.record import MetricsFile, Row, TrainRow, ValidRow, kind_of
from megatron.screen import Progress, fitted, format_seconds, say, wrapped
from megatron.training.plan import WORKED_OUT, Plan


class MetricsLog:
    """Sinks of one run. Made on the first rank only."""

    def __init__(self, run_dir: Path, settings: Config, *, last_step: int, is_branch: bool = False) -> None:
        """Args:
        run_dir: folder of the run.
        settings: of the run.
        last_step: step from which it goes on; what an interrupted attempt wrote of later ones is dropped everywhere.
        is_branch: what is written again may have other values.
        """
        self.file = MetricsFile(run_dir, last_step=last_step)
        self._run = settings.run
        self._tensorboard = _open_tensorboard(settings, last_step)
        if is_branch and self.file.has_dropped:  # W&B never takes a step twice: the branch is a W&B run of its own
            (run_dir / "wandb_id").unlink(missing_ok=True)
        is_known = (run_dir / "wandb_id").exists()
        self._wandb = _open_wandb(settings, run_dir)
        for row in [] if self._wandb is None or is_known else self.file.rows:
            self._wandb.log(self._scalars(row), step=row["step"])

    def write(self, row: Row) -> None:
        """Append one row."""
        self.file.write(row)
        scalars = self._scalars(asdict(row))
        if self._tensorboard is not None:
            with _written(self._run.tensorboard_dir):
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, row.step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=row.step)

    def close(self) -> None:
        """Flush everything."""
        self.file.close()
        if self._tensorboard is not None:
            with _written(self._run.tensorboard_dir):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _scalars(self, row: dict[str, Any]) -> dict[str, float]:
        is_shown = {
            "step": False,
            "best": False,
            "step_seconds": self._run.log_timers_to_tensorboard,
            "batch_size": self._run.log_batch_size_to_tensorboard,
            "ppl": self._run.log_validation_ppl_to_tensorboard,
        }
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        return {f"{row['kind']}/{name}": value for name, value in numbers.items() if is_shown.get(name, True)}


def _open_tensorboard(settings: Config, last_step: int) -> Any:
    if settings.run.tensorboard_dir is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    run = settings.run  # steps that are written again replace those of the interrupted attempt
    with _written(run.tensorboard_dir):
        return SummaryWriter(run.tensorboard_dir, max_queue=run.tensorboard_queue_size, purge_step=last_step + 1)


def _written(folder: str | None) -> AbstractContextManager[None]:
    fix = "free space on that disk, or start again with another --tensorboard-dir or none"
    return written_whole(str(folder), "TensorBoard's events go there", fix)


def _open_wandb(settings: Config, run_dir: Path) -> Any:
    run = settings.run
    if run.wandb_project is None:
        return None
    import wandb

    folder = Path(run.wandb_save_dir or run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        entity=run.wandb_entity,
        project=run.wandb_project,
        name=run.wandb_exp_name,
        group=run.wandb_group,
        dir=str(folder),
        config=config_to_dict(settings),
        mode=os.environ.get("WANDB_MODE", "online" if _has_wandb_login() else "offline"),  # type: ignore[arg-type]
        resume="allow",  # steps that are written again are dropped by W&B: its steps only grow, and they are the same
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
        replace_file(path, os.urandom(8).hex())
    return path.read_text()


class Screen:
    """What a person sees: one line per log interval, and a live bar where the output is a terminal."""

    def __init__(self, *, total_steps: int, first_step: int, enabled: bool) -> None:
        self.enabled, self.total_steps = enabled, total_steps
        self.started, self.first_step = time.monotonic(), first_step
        self._bar = Progress("training", total_steps, unit="steps", start=first_step, enabled=enabled).bar

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def train_line(self, row: TrainRow) -> None:
        """Print the progress line of one log interval."""
        eta = (time.monotonic() - self.started) / max(1, row.step - self.first_step) * (self.total_steps - row.step)
        mfu = "" if row.mfu is None else f"MFU {row.mfu:.1%}"
        self.print(
            fitted(
                [
                    (0, f"step {row.step:>{len(str(self.total_steps))}}/{self.total_steps}"),
                    (1, f"epoch {row.epoch:.2f}"),
                    (0, f"loss {row.loss:.4f}"),
                    (5, f"lr {row.lr:.2e}"),
                    (3, f"norm {row.grad_norm:.3f}"),
                    (4 if mfu else 2, f"{row.tokens_per_second:,.0f} tok/s"),
                    (2, mfu),
                    (0, f"skipped {row.skipped_steps}" if row.skipped_steps else ""),
                    (0, f"{format_seconds(eta)} left"),
                ]
            )
        )

    def valid_line(self, row: ValidRow) -> None:
        """Print the result of one validation; a bound never goes without its name and its error."""
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f} bits/byte"
        perplexity = "" if row.ppl is None else f"perplexity {row.ppl:.2f}"
        head = f"validation at step {row.step}: {measured(row)}"
        self.print(fitted([(0, head), (2, perplexity), (1, bits)], " (best)" if row.best else ""))
        for kind, label, nll, se in (("an autoregressive model", EXACT, row.ar_nll, row.ar_nll_se),
                                     ("masked diffusion", BOUND, row.mdm_nll, row.mdm_nll_se)):  # fmt: skip
            if nll is not None:
                error = "" if se is None else f" ± {se:.4f}"
                self.print(f"the same weights as {kind}: {label} {nll:.4f}{error} nats/token")
        if row.gap is not None:
            self.print(
                f"likelihood gap of right to wrong answers ({row.gap_label}): {row.gap:.4f} ± {row.gap_se:.4f} "
                f"nats/token | accuracy {row.gap_accuracy:.3f}"
            )

    def print(self, text: str) -> None:
        """A line for a person, on the first rank."""
        if self.enabled:
            self.enabled = say(wrapped(text), write=print if self._bar is None else self._bar.write)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def given_settings(plan: Plan) -> Iterator[str]:
    """Yield lines of 80 columns about the settings that were chosen and are not defaults: by whom, and what they are."""
    values, options = values_of(plan.settings), OBJECTIVES[str(plan.settings.objective.objective)].Options()
    default = values_of(Config()) | asdict(options)
    for source in sorted({*plan.origins.values()} - {WORKED_OUT}):
        names = [name for name, origin in plan.origins.items() if origin == source]
        shown = [f"{name} {_short(values[name])}" for name in names if values[name] != default.get(name)]
        if shown:
            yield textwrap.fill(f"{source}: {', '.join(shown)}", width=80, subsequent_indent="  ")


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def precision_warning(device: str, *, bf16: bool) -> str | None:
    """What fp32 means on a GPU. TF32, with 10 bits of mantissa, would not leave layouts equal to 1e-5, so it stays off."""
    if bf16 or device != "cuda":
        return None
    return "warning: fp32 on a GPU does not use its matrix units (TF32 is off); --bf16 does"


def measured(row: ValidRow) -> str:
    """What a validation is, its value and error: ``NLL (exact) 4.6512 ± 0.0621 nats/token``."""
    error = "" if row.nll_se is None else f" ± {row.nll_se:.4f}"
    return f"{kind_of(row.label, row.num_mc, row.estimator, row.weights)} {row.nll:.4f}{error} nats/token"
