"""Every flag of the published launch scripts that concerns training and validation parses here, spelled as there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.objectives import parse

FLAGS = Path(__file__).resolve().parents[1] / "golden/facts/launch_flags.txt"
# These belong to the downstream evaluation program.
DOWNSTREAM = {
    "--eval_fp32",
    "--eval_method",
    "--inference",
    "--only_generate",
    "--only_mc_nll",
    "--results_path",
    "--task_list",
}
SHAPE = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--train-samples", "640"]
# Flag → (value on the command line, field of the configuration, value that it must have).
EXPECTED: dict[str, tuple[list[str], str, object]] = {
    "--adam-beta1": (["0.8"], "optimizer.adam_beta1", 0.8),
    "--adam-beta2": (["0.95"], "optimizer.adam_beta2", 0.95),
    "--adam-eps": (["1e-7"], "optimizer.adam_eps", 1e-7),
    "--attention-dropout": (["0.2"], "model.attention_dropout", 0.2),
    "--bf16": ([], "run.bf16", True),
    "--clip-grad": (["0.5"], "optimizer.clip_grad", 0.5),
    "--cpu-optimizer": ([], "optimizer.cpu_optimizer", True),
    "--data-impl": (["mmap"], "data.data_impl", "mmap"),
    "--deepspeed": ([], "parallel.deepspeed", True),
    "--deepspeed_config": (["{tmp}"], "parallel.deepspeed_config", "{tmp}"),
    "--disable-bias-linear": ([], "model.disable_bias_linear", True),
    "--eval-interval": (["7", "--valid-data-path", "/v"], "run.eval_interval", 7),
    "--eval-iters": (["9"], "run.eval_iters", "9"),
    "--global-batch-size": (["16"], "run.global_batch_size", 16),
    "--hidden-size": (["128"], "model.hidden_size", 128),
    "--kill-switch-file": (["/k"], "run.kill_switch_file", "/k"),
    "--kv-channels": (["32"], "model.kv_channels", 32),
    "--load": (["/l"], "run.load", "/l"),
    "--load-tag": (["latest", "--load", "/l"], "run.load_tag", "latest"),
    "--log-batch-size-to-tensorboard": ([], "run.log_batch_size_to_tensorboard", True),
    "--log-interval": (["3"], "run.log_interval", 3),
    "--log-timers-to-tensorboard": ([], "run.log_timers_to_tensorboard", True),
    "--log-validation-ppl-to-tensorboard": ([], "run.log_validation_ppl_to_tensorboard", True),
    "--lr": (["1e-3"], "optimizer.lr", 1e-3),
    "--lr-decay-samples": (["500"], "optimizer.lr_decay_samples", 500),
    "--lr-decay-style": (["cosine"], "optimizer.lr_decay_style", "cosine"),
    "--lr-warmup-samples": (["5"], "optimizer.lr_warmup_samples", 5),
    "--max-position-embeddings": (["4096"], "model.max_position_embeddings", 4096),
    "--merge-file": (["/m"], "data.merge_file", "/m"),
    "--micro-batch-size": (["4"], "run.micro_batch_size", 4),
    "--min-lr": (["1e-5"], "optimizer.min_lr", 1e-5),
    "--no-load-optim": ([], "run.no_load_optim", True),
    "--no-load-rng": ([], "run.no_load_rng", True),
    "--no-pipeline-parallel": ([], "parallel.no_pipeline_parallel", True),
    "--normalization": (["rmsnorm"], "model.normalization", "rmsnorm"),
    "--num-attention-heads": (["8"], "model.num_attention_heads", 8),
    "--num-layers": (["3"], "model.num_layers", 3),
    "--num-mc": (["5"], "run.num_mc", 5),
    "--optimizer": (["adam"], "optimizer.optimizer", "adam"),
    "--pipeline-model-parallel-size": (["2"], "parallel.pipeline_model_parallel_size", 2),
    "--save": (["/s"], "run.save", "/s"),
    "--save-interval": (["4", "--save", "/s"], "run.save_interval", 4),
    "--seq-length": (["128"], "model.seq_length", 128),
    "--skip-train": ([], "run.skip_train", True),
    "--swiglu": ([], "model.swiglu", True),
    "--tensor-model-parallel-size": (["2"], "parallel.tensor_model_parallel_size", 2),
    "--tensorboard-dir": (["/t"], "run.tensorboard_dir", "/t"),
    "--tensorboard-queue-size": (["5"], "run.tensorboard_queue_size", 5),
    "--train-data-path-file": (["/d"], "data.train_data_path_file", "/d"),
    "--train-samples": (["320"], "run.train_samples", 320),
    "--use-rotary-position-embeddings": ([], "model.use_rotary_position_embeddings", True),
    "--valid-data-path-file": (["/d"], "data.valid_data_path_file", "/d"),
    "--vocab-file": (["/v"], "data.vocab_file", "/v"),
    "--wandb-exp-name": (["n"], "run.wandb_exp_name", "n"),
    "--wandb-group": (["g"], "run.wandb_group", "g"),
    "--wandb-project": (["p"], "run.wandb_project", "p"),
    "--wandb-save-dir": (["/w"], "run.wandb_save_dir", "/w"),
    "--weight-decay": (["0.2"], "optimizer.weight_decay", 0.2),
    "--zero-stage": (["2"], "parallel.zero_stage", 2),
    # Objectives of the ablations; the published scripts choose them by these flags alone.
    "--ar-ratio": (["0.5"], "objective.ar_ratio", 0.5),
    "--num-order-list": (["4", "--use-order-list"], "objective.num_order_list", 4),
    "--randmask-ratio": (["0.5"], "objective.randmask_ratio", 0.5),
    "--use-order-list": (["--num-order-list", "4"], "objective.use_order_list", True),
    "--use-predefined-order": (["--num-order-list", "4", "--use-order-list"], "objective.use_predefined_order", True),
}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--use-order-list", "True", "--num-order-list", "4"], "permuted_ar"),
        (["--num-order-list", "0"], "ar"),  # off
        (["--num-order-list", "4"], "permuted_ar"),
        (["--randmask-ratio", "0.5"], "masked_attention_ar"),
    ],
)
def test_published_forms_choose_the_objective(flags: list[str], expected: str) -> None:
    assert parse([*SHAPE, *flags], objective="ar").objective.objective == expected


def test_low_noise_start_alone_means_what_the_reference_means() -> None:
    """1,000 iterations, ratio 0.5 (FACTS section 9)."""
    from megatron.objectives import build_objective

    config = parse([*SHAPE, "--low-noise-start", "--global-batch-size", "4", "--mask-token-id", "500"], objective="mdm")
    objective = build_objective(config)
    assert (objective.low_noise_samples, objective.low_noise_ratio) == (4000, 0.5)  # type: ignore[attr-defined]


def test_table_covers_the_published_flags() -> None:
    assert set(FLAGS.read_text().split()) == set(EXPECTED) | DOWNSTREAM


@pytest.mark.parametrize("flag", sorted(EXPECTED))
def test_published_flag_sets_its_field(flag: str, tmp_path: Path) -> None:
    values, name, expected = EXPECTED[flag]
    settings = tmp_path / "deepspeed.json"
    settings.write_text("{}")
    values = [value.replace("{tmp}", str(settings)) for value in values]
    # Two processes, for the parallel sizes above.
    config = parse([*SHAPE, flag, *values], objective="mdm" if flag == "--ar-ratio" else "ar", world_size=2)
    section, field = name.split(".")
    own = config.objective.options
    value = own[field] if section == "objective" else getattr(getattr(config, section), field)
    assert value == (str(settings) if expected == "{tmp}" else expected)
