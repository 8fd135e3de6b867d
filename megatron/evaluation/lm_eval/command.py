"""The program behind ``tools/evaluate_downstream.py``: flags, one evaluation, its JSON and its table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config import ModelConfig, build_parser
from megatron.errors import UserError, require
from megatron.evaluation.lm_eval.flags import build_downstream_parser
from megatron.evaluation.lm_eval.tasks import parse_task_list, task_loader
from megatron.files import make_folder, replace_file
from megatron.objectives import OBJECTIVES

if TYPE_CHECKING:
    from megatron.parallel.context import ParallelContext

DEFAULT_DRAWS = 128
# Flags of training that evaluation reads; model sizes are compared with the checkpoint; others have no effect here.
USED = {
    "load", "load_tag", "load_kind", "tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size",
    "seq_length", "vocab_file", "merge_file", "tokenizer_model", "tokenizer_type", "num_mc", "bf16", "seed", "local_rank",
}  # fmt: skip
MODEL_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)} - {
    "seq_length", "max_position_embeddings", "attention_dropout", "hidden_dropout", "init_method_std", "model",
    "make_vocab_size_divisible_by", "padded_vocab_size",
}  # fmt: skip


def run_downstream(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, write and print.

    Raises:
        UserError: wrong flags, model or task.
        Failure: a data set or the folder of the results that cannot be used.
    """
    arguments = build_downstream_parser().parse_args(argv)
    tasks = parse_task_list(arguments.task_list)
    if not tasks:
        raise UserError("--task_list is empty", "an evaluation needs a task", "pass --task_list all or names")
    has_model = arguments.fetch_only or hasattr(arguments, "load")
    require(has_model, "no --load", "an evaluation needs a run directory or an export", "pass --load PATH")
    require(
        not arguments.results_path or not Path(arguments.results_path).is_dir(),
        f"--results_path {arguments.results_path} is a folder",
        "the results are one JSON file",
        "name a file in it",
    )
    require(
        arguments.results_path or not arguments.log_samples,
        "--log_samples without --results_path",
        "items and their scores go into the JSON",
        "pass --results_path FILE",
    )
    no_likelihoods = "--only_generate computes no likelihoods to rank by or to average"
    refused = dict.fromkeys(("multiple_choice", "loglikelihood_rolling"), no_likelihoods)
    loader = task_loader(tasks, refused if arguments.only_generate else None)
    if arguments.fetch_only:
        loader.load(tasks)
        print(f"fetched: {', '.join(tasks)}")
        return 0
    from megatron.inference.processes import processes

    with processes(getattr(arguments, "tensor_model_parallel_size", 1)) as context:
        _evaluate(arguments, tasks, loader, context)
        context.barrier()
    return 0


def _evaluate(arguments: argparse.Namespace, tasks: list[str], loader: Any, context: ParallelContext) -> None:
    """Load, evaluate, print, write; a collective call."""
    lm = build_lm(arguments, context)
    if arguments.gen_kwargs is not None:
        from lm_eval.utils import simple_parse_args_string

        given = simple_parse_args_string(arguments.gen_kwargs)
        lm.require_heeded(given)
        lm.read_generation_arguments(given)
    if context.is_first_rank:
        _say_what_has_no_effect(arguments, lm)
    from lm_eval.evaluator import simple_evaluate

    results = simple_evaluate(
        model=lm, tasks=tasks, task_manager=loader, limit=arguments.limit, num_fewshot=arguments.num_fewshot,
        gen_kwargs=arguments.gen_kwargs, log_samples=arguments.log_samples, batch_size=lm.batch_size,
    )  # fmt: skip
    summary = lm.summary.merge(lm._gather(lm.summary)).as_dict()
    refusals = lm.refusals.merge(lm._gather(lm.refusals))
    if results is not None and context.is_first_rank:
        results = finish_results(dict(results), summary, arguments, refusals=refusals)
        if arguments.results_path:
            _write(Path(arguments.results_path), results)
        print(table(results))


def build_lm(arguments: argparse.Namespace, context: Any) -> Any:
    """The lm-eval model that the flags ask for."""
    from megatron.inference.model import load_model

    names = ("vocab_file", "merge_file", "tokenizer_model", "tokenizer_type")
    tokenizer = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    dtype = "bfloat16" if getattr(arguments, "bf16", False) and not arguments.eval_fp32 else "float32"
    if context.device.type == "cpu":
        dtype = "float32"  # bf16 matrix products are slow and coarse there
    model = load_model(
        arguments.load, tag=getattr(arguments, "load_tag", None), kind=getattr(arguments, "load_kind", None), dtype=dtype,
        context=context, tokenizer_options=tokenizer or None,
    )  # fmt: skip
    if arguments.eval_method in ("mc", "exact"):
        model = model.decoded("masked")
    _check_model_flags(arguments, model.config.model)
    options: dict[str, Any] = {
        "model": model,
        "batch_size": getattr(arguments, "micro_batch_size", None),
        "max_length": getattr(arguments, "seq_length", None),
        "cache_dir": f"{arguments.results_path}.cache" if arguments.results_path else None,
        "seed": getattr(arguments, "seed", 1234),
    }
    if model.is_causal:
        return _causal_lm(arguments, options)
    return (_masked_lm if model.is_masked else _uniform_lm)(arguments, options)


def _causal_lm(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    from megatron.evaluation.lm_eval.models import MegatronAR

    _refuse(
        arguments,
        ("only_generate", "only_mc_nll", "estimator", "no_adaptive", "policy", "tokens_per_step"),
        methods=("mc", "exact"),
        model=f"{options['model'].source}, an autoregressive model",
        rule="it has one exact likelihood",
    )
    return MegatronAR(**options)


def _uniform_lm(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    from megatron.evaluation.lm_eval.uniform import MegatronUniform

    _refuse(
        arguments,
        ("only_generate", "estimator", "no_adaptive", "policy", "tokens_per_step"),
        methods=("ar", "exact"),
        model=f"{options['model'].source}, a uniform-state diffusion model",
        rule="it has one bound",
    )
    greedy = "never" if arguments.only_mc_nll else "auto"
    return MegatronUniform(**options, num_mc=getattr(arguments, "num_mc", DEFAULT_DRAWS), greedy=greedy)


def _refuse(
    arguments: argparse.Namespace, flags: Sequence[str], *, methods: Sequence[str], model: str, rule: str
) -> None:
    """Refuse flags of another kind of model."""
    given = [flag for flag in flags if getattr(arguments, flag)]
    given += [f"eval_method {arguments.eval_method}"] * (arguments.eval_method in methods)
    require(not given, f"--{(given or [''])[0]} with {model}", rule, "drop the flag")


def _masked_lm(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    from megatron.evaluation.lm_eval.models import MegatronMDM

    is_exact = arguments.eval_method == "exact"
    for flag in ("policy", "tokens_per_step"):
        require(
            is_exact or getattr(arguments, flag) is None,
            f"--{flag} without --eval_method exact",
            "it says what a sampler uncovers next",
            "add --eval_method exact, or drop it",
        )
    require(
        not (is_exact and (arguments.estimator or arguments.only_generate)),
        "--eval_method exact with --estimator or --only_generate",
        "the likelihood of a sampler is one number, without an estimator",
        "drop one of them",
    )
    if arguments.only_generate and arguments.only_mc_nll:
        raise UserError("--only_generate and --only_mc_nll exclude each other", "nothing would be left", "drop one")
    estimator = arguments.estimator or ("left-to-right" if arguments.eval_method == "ar" else "exact-count")
    is_estimated = not (is_exact or arguments.only_generate)
    is_drawn = is_estimated and estimator != "left-to-right"
    for flag, is_heeded in (("estimator", is_estimated), ("no_adaptive", is_drawn)):
        given, rule = f"--{flag} would have no effect", "it is for likelihoods that are estimated from masks"
        require(is_heeded or not getattr(arguments, flag), given, rule, "drop it")
    return MegatronMDM(
        **options, estimator=estimator if is_estimated else None, num_mc=getattr(arguments, "num_mc", None) if is_drawn else None,
        adaptive=False if arguments.no_adaptive else None, greedy="never" if arguments.only_mc_nll else "auto",
        only_greedy=arguments.only_generate, policy=(arguments.policy or "confidence") if is_exact else None,
        tokens_per_step=arguments.tokens_per_step,
    )  # fmt: skip


def _check_model_flags(arguments: argparse.Namespace, model: ModelConfig) -> None:
    for name in sorted(MODEL_FIELDS):
        given = getattr(arguments, name, None)
        if given is not None and given != getattr(model, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {given}, but the checkpoint has {getattr(model, name)}",
                "the checkpoint's own shape is used",
                "drop the flag or load another checkpoint",
            )


def _say_what_has_no_effect(arguments: argparse.Namespace, lm: Any) -> None:
    known = {action.dest for action in build_parser(OBJECTIVES)._actions}
    idle = sorted(name for name in vars(arguments) if name in known - USED - MODEL_FIELDS)
    if idle:
        print(
            f"flags of training without effect on an evaluation: {', '.join('--' + n.replace('_', '-') for n in idle)}"
        )
    if hasattr(arguments, "num_mc") and not lm.is_drawn:
        print("--num-mc: no masks are drawn here")
    if getattr(arguments, "bf16", False) and lm.get_model_info()["model_dtype"] == "torch.float32":
        print(f"--bf16: evaluated in float32 ({'as --eval_fp32 says' if arguments.eval_fp32 else 'on a CPU'})")
    if getattr(arguments, "pipeline_model_parallel_size", 1) > 1:
        print(
            "--pipeline-model-parallel-size: stages are not needed for inference; those ranks evaluate other items instead"
        )


BOUNDED = {
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
}  # metrics that a bound bounds from above
UPPER_BOUND = " (upper bound)"


def finish_results(
    results: dict[str, Any],
    summary: dict[str, Any],
    arguments: argparse.Namespace,
    *,
    refusals: dict[str, dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Say what the likelihoods were, in the names of metrics too, and what was refused; take out what was not computed."""
    for task, metrics in results["results"].items():
        kind = results["configs"].get(task, {}).get("output_type")
        dropped: tuple[str, ...] = ()
        if kind == "loglikelihood" and arguments.only_generate:
            dropped = ("perplexity",)
        elif arguments.only_mc_nll:
            dropped = {"loglikelihood": ("acc",), "multiple_choice": ("exact_match",)}.get(kind, ())
        for sample in results.get("samples", {}).get(task, ()):
            sample["metrics"] = [name for name in sample.get("metrics", ()) if name not in dropped]
            for name in dropped:
                sample.pop(name, None)
        is_bound = _is_bound(task, results.get("group_subtasks", {}), summary)
        results["results"][task] = {
            _label(name) if is_bound else name: value
            for name, value in metrics.items()
            if name.split(",")[0].removesuffix("_stderr") not in dropped
        }
        if task in results.get("groups", {}):
            results["groups"][task] = results["results"][task]
    results["likelihoods"] = summary
    results["refused"] = refusals or {}
    return results


def _is_bound(task: str, parts: dict[str, list[str]], summary: dict[str, Any]) -> bool:
    """Whether likelihoods of a task, or of one in a group, are bounds; ``parts``: tasks and groups of each group."""
    is_own = "bound: " in summary.get(task, {}).get("estimator", "")
    return is_own or any(_is_bound(part, parts, summary) for part in parts.get(task, ()))


def _label(name: str) -> str:
    """``word_perplexity_stderr,none`` → ``word_perplexity (upper bound)_stderr,none``; other metrics as they are."""
    metric, comma, filter_name = name.partition(",")
    base = metric.removesuffix("_stderr")
    return base + UPPER_BOUND + metric[len(base) :] + comma + filter_name if base in BOUNDED else name


def table(results: dict[str, Any]) -> str:
    """One line for each metric: value ± standard error over items, and what the likelihoods are."""
    header = ("task", "items", "metric", "value", "likelihood", "± nats", "passes")
    rows: list[tuple[str, ...]] = [header]
    for task, metrics in results["results"].items():
        own = results.get("likelihoods", {}).get(task, {})
        error = own.get("rms_standard_error_nats")
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            shown = f"{value:.4f}" + (f" ± {stderr:.4f}" if isinstance(stderr, float) and math.isfinite(stderr) else "")
            items = str(results.get("n-samples", {}).get(task, {}).get("effective", ""))
            rows.append((task, items, metric, shown, own.get("estimator", ""), "" if error is None else f"{error:.3f}",
                         f"{own['passes_per_answer']:.1f}" if own else ""))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines.append("value ± standard error over items; ± nats: rms standard error of one likelihood over its mask draws; passes: "
                 "forward passes for one likelihood")  # fmt: skip
    if any("ranking: " in own.get("estimator", "") for own in results.get("likelihoods", {}).values()):
        lines.append(
            "ranking: likelihoods from races, good for the winner and biased otherwise (--no_adaptive: bounds)"
        )
    for task, reasons in results.get("refused", {}).items():
        item, reason = next(iter(reasons.items()))
        lines.append(
            f"{task}: {len(reasons)} items refused and left out of its metrics, the first: item {item}: {reason}"
        )
    return "\n".join(lines)


def _write(path: Path, results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    make_folder(path.parent)
    replace_file(path, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
