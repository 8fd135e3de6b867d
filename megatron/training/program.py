"""One run: process groups, engine, data and loop, put together from a resolved configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from megatron.checkpoint.files import read_manifest, remove_old_checkpoints
from megatron.checkpoint.select import agree_on_checkpoint, changed_settings, noise_config, open_checkpoint
from megatron.checkpoint.warm_start import AutoregressiveStart
from megatron.checkpoint.writer import write_checkpoint
from megatron.config.schema import Config
from megatron.data.dataset import BlendedDataset, GPTDataset, build_dataset, describe
from megatron.data.loader import build_loader
from megatron.model.arithmetic import model_flops_per_token, parameters_for_compute
from megatron.objectives import ModelBatch, build_objective
from megatron.runs.record import write_run_record
from megatron.training.deepspeed.engine import Engine, init_distributed
from megatron.training.deepspeed.shards import ShardedState
from megatron.training.loop import Loop, TrainState, state_from_dict, state_to_dict
from megatron.training.reporting import MetricsLog, Progress, Throughput
from megatron.training.resolve import ResolvedRun
from megatron.training.validation import evaluate

# The order of validation samples does not follow --seed: runs with different seeds are judged on the same samples.
VALIDATION_SEED = 1234


class Program:
    """A run from its configuration to its last line."""

    def __init__(self, resolved: ResolvedRun) -> None:
        """Start the process groups, build the engine, load the checkpoint.

        Raises:
            ValueError: layout or checkpoint do not fit.
        """
        self.resolved = resolved
        self.config: Config = resolved.config
        run = self.config.run
        self.context = init_distributed(self.config)
        self.state = TrainState()
        self.tag = agree_on_checkpoint(self.config, self.context)
        if self.tag is not None and not run.finetune:
            manifest = read_manifest(self.tag)
            self.state = state_from_dict(manifest)
            changed = changed_settings(self.config, manifest["config"])
            if changed and not run.skip_train:
                self._say(f"warning: the checkpoint was saved with other settings: {', '.join(changed)}")
        noisy = noise_config(self.config, loaded=self.tag is not None, consumed_samples=self.state.consumed_samples)
        self.objective = build_objective(noisy)
        self.engine = Engine(noisy, self.objective, self.context)
        self.sharded = ShardedState(self.engine.module, self.engine.optimizer, self.context)
        self._load()
        assert run.train_samples and run.global_batch_size
        self.progress = Progress(
            total_steps=run.train_samples // run.global_batch_size,
            first_step=self.state.step,
            enabled=self.context.is_first_rank,
        )

    def run(self) -> int:
        """Validate, or train to the end. Returns the exit status."""
        run = self.config.run
        parameters = parameters_for_compute(self.config.model, self.resolved.vocab_size)
        train = None if run.skip_train else self._train_dataset()
        self._introduce(parameters)
        if train is not None:
            self.progress.print(describe(train))
        validate = self._validator()
        log = self._open_log(parameters)
        loop = Loop(
            config=self.config,
            engine=self.engine,
            batches=iter(()) if train is None else self._batches(train),
            state=self.state,
            validate=validate,
            save=None if run.save is None else self._save,
            log=log,
            progress=self.progress,
            throughput=self._throughput(),
            unique_tokens=self.resolved.unique_tokens,
            parameters=parameters,
        )
        try:
            if run.skip_train:
                assert validate is not None
                loop.log_validation(validate())
            else:
                self._conclude(loop.run())
        finally:
            self.progress.close()
            if log is not None:
                log.close()
        return 0

    def _load(self) -> None:
        if self.tag is None:
            return
        run = self.config.run
        with_optimizer = not (run.finetune or run.no_load_optim or run.skip_train)
        reader = open_checkpoint(self.tag, self.config, vocab_size=self.resolved.vocab_size)
        self.sharded.load(reader, with_optimizer=with_optimizer)
        if isinstance(reader, AutoregressiveStart):
            self._say("the mask token starts as the mean of the token embeddings (the checkpoint never used one)")
        what = "weights and optimizer" if with_optimizer else "weights"
        verb = "starting" if run.finetune else "continuing"
        self._say(f"loaded {what} of {self.tag}; {verb} at step {self.state.step}")

    def _train_dataset(self) -> GPTDataset | BlendedDataset:
        return build_dataset(
            self.resolved.train_paths,
            num_samples=self.config.run.train_samples,
            seq_length=self.config.model.seq_length,
            seed=self.config.run.seed,
            name="train",
            cache_path=self.config.data.data_cache_path,
        )

    def _batches(self, dataset: GPTDataset | BlendedDataset) -> Iterator[ModelBatch]:
        run = self.config.run
        assert run.train_samples
        loader = build_loader(
            dataset,
            self.objective,
            self.context,
            micro_batch_size=run.micro_batch_size,
            first_sample=self.state.consumed_samples,
            last_sample=run.train_samples,
            num_workers=self.config.data.num_workers,
        )
        return iter(loader)

    def _validator(self) -> Callable[[], dict] | None:
        """A function that validates, or None where there is nothing to validate on."""
        run = self.config.run
        if not self.resolved.valid_paths or run.eval_iters == "0":
            return None
        assert run.global_batch_size
        wanted = None if run.eval_iters == "full" else int(run.eval_iters) * run.global_batch_size
        dataset = build_dataset(
            self.resolved.valid_paths,
            num_samples=wanted,
            seq_length=self.config.model.seq_length,
            seed=VALIDATION_SEED,
            name="valid",
            cache_path=self.config.data.data_cache_path,
        )

        measure_gap = None
        if run.gap_task is not None:
            from megatron.evaluation.gap import gap_metric

            measure_gap = gap_metric(self.config, self.engine)

        def validate() -> dict:
            result = evaluate(
                self.engine,
                dataset,
                self.objective,
                num_samples=wanted or dataset.num_samples,
                num_mc=run.num_mc,
                num_workers=self.config.data.num_workers,
            )
            gap = {} if measure_gap is None else measure_gap()
            return {**result.record(dataset.text_bytes_per_token), **gap}

        return validate

    def _save(self, state: TrainState) -> None:
        started = time.perf_counter()
        position = {**state_to_dict(state), "optimizer_steps": self.sharded.optimizer_steps(), "config": self.config}
        tag = write_checkpoint(
            self.resolved.run_dir,
            fragments=self.sharded.fragments_to_save(),
            specs=self.sharded.specs(),
            state=position,
            context=self.context,
        )
        keep_last = self.config.run.keep_last
        if keep_last is not None and self.context.is_first_rank:
            best = set() if state.best_step is None else {state.best_step}
            remove_old_checkpoints(self.resolved.run_dir, keep_last=keep_last, keep=best)
        self.progress.print(f"saved {tag} in {time.perf_counter() - started:.1f} s")

    def _open_log(self, parameters: int) -> MetricsLog | None:
        """Metrics and run.json, on the first rank. A validation does not rewrite the record of the run it validates."""
        if not self.context.is_first_rank:
            return None
        resume_step = None if self.config.run.skip_train else self.state.step
        log = MetricsLog(self.resolved.run_dir, self.config, resume_step=resume_step)
        path = self.resolved.run_dir / "run.json"
        if not (self.config.run.skip_train and path.exists()):
            write_run_record(path, self.resolved, self.objective, self.context, parameters=parameters)
        return log

    def _throughput(self) -> Throughput:
        flops = model_flops_per_token(
            self.config.model, mask=self.objective.attention_mask, loss_fraction=self.objective.loss_fraction
        )
        context = self.context
        return Throughput(self.config, flops_per_token=flops, num_devices=context.world_size, device=context.device)

    def _introduce(self, parameters: int) -> None:
        """Say what is about to happen, in two lines."""
        config, context = self.config, self.context
        model, run, zero = config.model, config.run, config.parallel.zero_stage
        precision, note = ("bf16" if run.bf16 else "fp32"), (" (runs as 1)" if zero == 0 else "")
        self.progress.print(
            f"{config.objective.objective} ({self.objective.label}) | model {model.model or 'custom'}: {parameters:,} "
            f"parameters, {model.num_layers} layers, hidden {model.hidden_size}, sequence {model.seq_length}, vocabulary "
            f"{self.resolved.vocab_size} (padded {model.padded_vocab_size})"
        )
        self.progress.print(
            f"tp {context.tp_size} x pp {context.pp_size} x dp {context.dp_size} on {context.device.type}, ZeRO {zero}{note}, "
            f"{precision} | global batch {run.global_batch_size} = micro {run.micro_batch_size} x dp {context.dp_size} x "
            f"{self.engine.num_micro_batches} accumulated | run directory {self.resolved.run_dir}"
        )

    def _conclude(self, reason: str | None) -> None:
        """The last line."""
        state = self.state
        if reason is not None:
            saved = (
                f"checkpoint of step {state.step} saved" if self.config.run.save else "no --save, so nothing was saved"
            )
            self.progress.print(f"stopped by {reason} at step {state.step}; {saved}")
            return
        best = "" if state.best_nll is None else f"; best validation {state.best_nll:.4f} at step {state.best_step}"
        self.progress.print(f"done: {state.step} steps{best}; metrics in {self.resolved.run_dir}")

    def _say(self, text: str) -> None:
        """A line before the progress display exists."""
        if self.context.is_first_rank:
            print(text, flush=True)
