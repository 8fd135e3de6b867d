"""Wiring: command line → configuration → engine, data, loop. Every user mistake ends here as one message."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from megatron.config import config_to_dict, parse
from megatron.config.schema import Config


def main(objective: str, argv: Sequence[str] | None = None) -> int:
    """Run a training program.

    Args:
        objective: objective when ``--objective`` is absent ("ar" or "mdm").
        argv: arguments; default: those of the process.

    Returns:
        Exit status: 0 done (or stopped on request with a checkpoint), 1 the run failed, 2 wrong input, 130 interrupted.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        from megatron.training.resolve import resolve

        config = parse(argv, objective=objective)
        resolved = resolve(config, run_name=f"{config.objective.objective}_{datetime.now():%Y%m%d_%H%M%S}")
    except ValueError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        return _Program(resolved).run()
    except KeyboardInterrupt:
        return 130  # before the first step, or Ctrl-C twice: nothing is saved
    except (ValueError, OSError, RuntimeError) as error:
        if not _is_expected(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        _leave()


def _is_expected(error: BaseException) -> bool:
    """Whether this project raised the error for the user to read (anything else keeps its traceback)."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and f"{os.sep}megatron{os.sep}" in frame.tb_frame.f_code.co_filename


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


class _Program:
    """One run, from a resolved configuration."""

    def __init__(self, resolved) -> None:  # type: ignore[no-untyped-def]
        # Imports of torch and DeepSpeed take seconds; a wrong flag is reported before them.
        from megatron.objectives import build_objective
        from megatron.training import engine as engine_module
        from megatron.training.loop import TrainState

        self.resolved = resolved
        self.config: Config = resolved.config
        self.context = engine_module.init_distributed(self.config)
        self.state = TrainState()
        self.tag = self._agree_on_checkpoint()
        self._load_train_state()
        noise_config = self._noise_config()
        self.objective = build_objective(noise_config)
        self.engine = engine_module.Engine(noise_config, self.objective, self.context)
        self._load_tensors()

    def run(self) -> int:
        """Validate, or train to the end."""
        from megatron.data.dataset import describe
        from megatron.training.loop import Loop
        from megatron.training.metrics import MetricsLog, Progress, parameters_for_compute

        run = self.config.run
        assert run.train_samples and run.global_batch_size
        total_steps = run.train_samples // run.global_batch_size
        progress = Progress(total_steps=total_steps, first_step=self.state.step, enabled=self.context.is_first_rank)
        self.progress = progress
        parameters = parameters_for_compute(self.config.model, self.resolved.vocab_size)
        train = None if run.skip_train else self._train_dataset()
        self._introduce(parameters, describe(train) if train is not None else None)
        validate = self._validator()
        log = None
        if self.context.is_first_rank:
            log = MetricsLog(self.resolved.run_dir, self.config, resume_step=self.state.step)
            self._write_run_json(parameters)
        batches = iter(()) if train is None else self._batches(train)
        loop = Loop(self.config, self.engine, batches, self.state, validate, self._saver(), log, progress,
                    self._throughput(), self.resolved.unique_tokens, parameters)  # fmt: skip
        try:
            if run.skip_train:
                assert validate is not None
                loop.log_validation(validate())
                return 0
            reason = loop.run()
        finally:
            progress.close()
            if log is not None:
                log.close()
        if reason is not None:
            saved = f"checkpoint of step {self.state.step} saved" if run.save else "no --save, so nothing was saved"
            progress.print(f"stopped by {reason} at step {self.state.step}; {saved}")
        else:
            best = (
                ""
                if self.state.best_nll is None
                else f"; best validation {self.state.best_nll:.4f} at step {self.state.best_step}"
            )
            progress.print(f"done: {self.state.step} steps{best}; metrics in {self.resolved.run_dir}")
        return 0

    def _agree_on_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files verify; the ranks share the reading and must agree."""
        from megatron.training.checkpoint import MANIFEST, checkpoint_tags, damaged_files, find_checkpoint

        load, tag = self.config.run.load, self.config.run.load_tag
        if load is None:
            return None
        if tag is not None or (Path(load) / MANIFEST).is_file():
            named = find_checkpoint(Path(load), tag, checksums=False)[0]
            candidates = [] if named is None else [named]
        else:
            candidates = checkpoint_tags(Path(load))
        complaints: list[str] = []
        for candidate in candidates:
            own = list(damaged_files(candidate, part=self.context.rank, parts=self.context.world_size))
            found = [complaint for part in self.context.gather_objects(own) for complaint in part]
            if not found:
                if complaints and self.context.is_first_rank:
                    print(f"warning: skipped damaged checkpoints: {'; '.join(complaints)}", flush=True)
                return candidate
            complaints.append(f"{candidate.name} ({', '.join(found)})")
        if complaints:
            raise ValueError(
                f"no checkpoint in {load} can be used: {'; '.join(complaints)}; files must match their manifest; restore "
                "them or choose another --load"
            )
        return None

    def _load_train_state(self) -> None:
        from megatron.training.checkpoint import read_manifest
        from megatron.training.loop import state_from_dict

        if self.tag is not None and not self.config.run.finetune:
            manifest = read_manifest(self.tag)
            self.state = state_from_dict(manifest)
            self._warn_about_changes(manifest["config"])

    def _warn_about_changes(self, saved: dict) -> None:
        """Resuming under other data, seed or batch is allowed, but the run is no longer the one that was saved."""
        now = config_to_dict(self.config)
        watched = {
            "run": ("seed", "global_batch_size", "train_samples"),
            "model": ("seq_length", "attention_dropout", "hidden_dropout"),
            "objective": ("objective",),
        }
        changed = [
            f"{name} {saved[section][name]} → {now[section][name]}"
            for section, names in watched.items()
            for name in names
            if name in saved.get(section, {}) and saved[section][name] != now[section][name]
        ]
        if changed and self.context.is_first_rank and not self.config.run.skip_train:
            print(f"warning: the checkpoint was saved with other settings: {', '.join(changed)}", flush=True)

    def _noise_config(self) -> Config:
        """The configuration with the seed of noise and dropout; another one after ``--no-load-rng``."""
        from megatron.parallel.sharding import named_seed

        run = self.config.run
        if not run.no_load_rng or self.tag is None:
            return self.config
        seed = named_seed(run.seed, f"reloaded at {self.state.consumed_samples}")
        return replace(self.config, run=replace(run, seed=seed))

    def _load_tensors(self) -> None:
        from megatron.training.checkpoint import CheckpointReader
        from megatron.training.state import ShardedState

        self.sharded = ShardedState(self.engine.module, self.engine.optimizer, self.context)
        if self.tag is None:
            return
        run = self.config.run
        with_optimizer = not (run.finetune or run.no_load_optim or run.skip_train)
        self.sharded.load(self._reader(CheckpointReader(self.tag)), with_optimizer=with_optimizer)
        if self.context.is_first_rank:
            what = "weights" if not with_optimizer else "weights and optimizer"
            print(
                f"loaded {what} of {self.tag}; {'starting' if run.finetune else 'continuing'} at step {self.state.step}",
                flush=True,
            )

    def _reader(self, reader):  # type: ignore[no-untyped-def]
        """The checkpoint itself, or with a mask token where masked diffusion starts from an autoregressive one."""
        from megatron.training.warm_start import AutoregressiveStart

        config = self.config
        was_masked = reader.config.objective.mask_token_id is not None
        if not config.run.finetune or was_masked or config.objective.mask_token_id is None:
            return reader
        assert config.model.padded_vocab_size
        if self.context.is_first_rank:
            print(
                "the mask token starts as the mean of the token embeddings (the checkpoint never used one)", flush=True
            )
        return AutoregressiveStart(
            reader,
            vocab_size=self.resolved.vocab_size,
            mask_id=config.objective.mask_token_id,
            padded_vocab_size=config.model.padded_vocab_size,
        )

    def _train_dataset(self):  # type: ignore[no-untyped-def]
        from megatron.data.dataset import build_dataset

        return build_dataset(
            self.resolved.train_paths,
            num_samples=self.config.run.train_samples,
            seq_length=self.config.model.seq_length,
            seed=self.config.run.seed,
            name="train",
            cache_path=self.config.data.data_cache_path,
        )

    def _batches(self, dataset) -> Iterator:  # type: ignore[no-untyped-def]
        from megatron.data.loader import build_loader

        run = self.config.run
        assert run.train_samples
        return iter(
            build_loader(
                dataset,
                self.objective,
                self.context,
                micro_batch_size=run.micro_batch_size,
                first_sample=self.state.consumed_samples,
                last_sample=run.train_samples,
                num_workers=self.config.data.num_workers,
            )
        )

    def _validator(self) -> Callable[[], dict] | None:
        from megatron.data.dataset import build_dataset
        from megatron.training.evaluate import evaluate

        run = self.config.run
        if not self.resolved.valid_paths:
            return None
        assert run.global_batch_size
        wanted = None if run.eval_iters == "full" else int(run.eval_iters) * run.global_batch_size
        if wanted == 0:
            return None
        # The seed of the order is fixed, so that runs with different seeds are judged on the same samples.
        dataset = build_dataset(
            self.resolved.valid_paths,
            num_samples=wanted,
            seq_length=self.config.model.seq_length,
            seed=1234,
            name="valid",
            cache_path=self.config.data.data_cache_path,
        )
        num_samples = wanted or dataset.num_samples

        def validate() -> dict:
            result = evaluate(
                self.engine,
                dataset,
                self.objective,
                num_samples=num_samples,
                num_mc=run.num_mc,
                num_workers=self.config.data.num_workers,
            )
            return result.record(dataset.text_bytes_per_token)

        return validate

    def _saver(self):  # type: ignore[no-untyped-def]
        from megatron.training.checkpoint import remove_old_checkpoints, write_checkpoint
        from megatron.training.loop import TrainState, state_to_dict

        run = self.config.run
        if run.save is None:
            return None

        def save(state: TrainState) -> None:
            started = time.perf_counter()
            description = {
                **state_to_dict(state),
                "optimizer_steps": self.sharded.optimizer_steps(),
                "config": self.config,
            }
            tag = write_checkpoint(
                self.resolved.run_dir,
                fragments=self.sharded.fragments_to_save(),
                specs=self.sharded.specs(),
                state=description,
                context=self.context,
            )
            if run.keep_last is not None and self.context.is_first_rank:
                best = set() if state.best_step is None else {state.best_step}
                remove_old_checkpoints(self.resolved.run_dir, keep_last=run.keep_last, keep=best)
            self.progress.print(f"saved {tag} in {time.perf_counter() - started:.1f} s")

        return save

    def _throughput(self):  # type: ignore[no-untyped-def]
        from megatron.training.metrics import Throughput, model_flops_per_token

        flops = model_flops_per_token(
            self.config.model,
            mask=self.objective.attention_mask,
            loss_fraction=self.objective.loss_fraction,
        )
        return Throughput(
            self.config, flops_per_token=flops, num_devices=self.context.world_size, device=self.context.device
        )

    def _introduce(self, parameters: int, data: str | None) -> None:
        """Say what is about to happen, in a few lines."""
        config, context = self.config, self.context
        model, run = config.model, config.run
        name = model.model or "custom"
        precision = "bf16" if run.bf16 else "fp32"
        zero_note = " (runs as 1)" if config.parallel.zero_stage == 0 else ""
        layout = f"tp {context.tp_size} x pp {context.pp_size} x dp {context.dp_size}"
        self.progress.print(
            f"{config.objective.objective} ({self.objective.label}) | model {name}: {parameters:,} parameters, "
            f"{model.num_layers} layers, hidden {model.hidden_size}, sequence {model.seq_length}, vocabulary "
            f"{self.resolved.vocab_size} (padded {model.padded_vocab_size})"
        )
        self.progress.print(
            f"{layout} on {context.device.type}, ZeRO {config.parallel.zero_stage}{zero_note}, "
            f"{precision} | global batch {run.global_batch_size} = micro {run.micro_batch_size} x dp {context.dp_size} x "
            f"{self.engine.num_micro_batches} accumulated | run directory {self.resolved.run_dir}"
        )
        if data is not None:
            self.progress.print(data)

    def _write_run_json(self, parameters: int) -> None:
        import torch

        from megatron.config.presets import training_flops
        from megatron.data.blend import parse_blend
        from megatron.data.dataset import text_bytes_per_token
        from megatron.training.checkpoint import write_atomically

        config, resolved = self.config, self.resolved
        assert config.model.padded_vocab_size and config.model.hidden_size and config.run.train_samples
        tokens = config.run.train_samples * config.model.seq_length
        specs = self.sharded.specs() if self.context.pp_size == 1 else {}
        total = sum(torch.Size(spec.full_shape).numel() for spec in specs.values()) or None
        prefixes = [prefix for _, prefix in parse_blend(resolved.train_paths or resolved.valid_paths)]
        record = {
            "format": 1,
            "objective": config.objective.objective,
            "label": self.objective.for_eval().label,
            "config": config_to_dict(config),
            "parameters": {
                "total": total,
                "embedding": config.model.padded_vocab_size * config.model.hidden_size,
                "for_compute": parameters,
            },
            "unique_tokens": resolved.unique_tokens,
            "train_samples": config.run.train_samples,
            "train_tokens": tokens,
            "epochs": tokens / resolved.unique_tokens if resolved.unique_tokens else 0.0,
            "train_flops": training_flops(parameters, tokens),
            "layout": {"world": self.context.world_size, "tp": self.context.tp_size, "pp": self.context.pp_size,
                       "dp": self.context.dp_size},
            "versions": _versions(),
            "device": torch.cuda.get_device_name() if self.context.device.type == "cuda" else platform.processor() or "CPU",
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "text_bytes_per_token": text_bytes_per_token(prefixes[0]) if len(prefixes) == 1 else None,
        }  # fmt: skip
        write_atomically(resolved.run_dir / "run.json", json.dumps(record, indent=1))


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers", "numpy", "apex"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
