"""Every likelihood of one model or several on the same tokens, and whether one is better than another."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser
from megatron.config.ranges import real, refuse_idle, whole
from megatron.errors import require
from megatron.screen import Progress

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.evaluation.court import Court, Samples
    from megatron.evaluation.requests import ResultCache
    from megatron.inference.model import InferenceModel
    from megatron.parallel.context import ParallelContext
    from megatron.runs.likelihoods import EnsembleRecord, Likelihoods

POLICIES = "left-to-right,confidence,entropy,random,confidence-reversed"
COUNT = whole(1, 10**9)


def build_parser() -> argparse.ArgumentParser:
    """Flags of tools/likelihood.py."""
    parser = Parser(
        description=__doc__,
        examples=(
            "megatron likelihood runs/ar runs/mdm --output verdict.json",
            "megatron likelihood runs/ar runs/mdm --samples 48 --tokens-per-step 1,4",
            "megatron likelihood runs/ar-1+runs/ar-2 runs/mdm-1+runs/mdm-2",
        ),
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run, one tag of it, or export; RUN+RUN or '0.7*RUN+0.3*RUN': an ensemble, the "
        "mean of their probabilities; the first is compared with")  # fmt: skip
    add("--ensemble-weights", choices=("named", "fitted", "both"), default="named", help="weights of ensembles: those that are "
        "named, else equal ones (default); fitted on one half of the documents and judged on the other; both")  # fmt: skip
    add("--load-tag", metavar="TAG", help="checkpoint of all runs; default: the best by validation where it is kept, "
        "else the newest")  # fmt: skip
    add_load_kind(parser)
    add("--valid-data-path", nargs="+", metavar="PREFIX", help="data to score; default: the first run's validation set")
    add("--data-cache-path", metavar="DIR", help="index maps; default: beside the data")
    add("--samples", type=COUNT, metavar="N", help="score the first N; default: all")
    add("--policies", default=POLICIES, metavar="P,P,...", help=f"samplers of masked diffusion (default: {POLICIES})")
    add("--tokens-per-step", default="1", metavar="K,K,...", help="tokens uncovered in a pass (default: 1)")
    add("--block-length", type=COUNT, metavar="TOKENS", help="uncover from left to right in blocks")
    add(
        "--temperature",
        type=real(0, 1e6),
        default=1.0,
        metavar="T",
        help="1 is the model's own distribution (default: 1)",
    )
    add("--top-k", type=whole(0, 10**9), default=0, metavar="TOKENS", help="0: all (default)")
    add("--top-p", type=real(0, 1), default=1.0, metavar="P", help="1: all (default)")
    add("--num-mc", type=COUNT, default=8, metavar="PAIRS", help="pairs of masks for the bound (default: 8)")
    add("--orders", type=whole(0, 10**6), default=0, metavar="K",
        help="also bounds of the mixture from K random orders, from above and, for blocks of up to 16 tokens and 64 orders or "
        "more, from below; 0: without (default)")  # fmt: skip
    add("--batch-size", type=COUNT, default=32, metavar="ROWS", help="rows in a pass (default: 32)")
    add("--tensor-model-parallel-size", type=COUNT, default=1, metavar="RANKS", help="ranks that share a model")
    add("--output", type=Path, metavar="FILE", help="write it as JSON; finished samples are kept in FILE.cache")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, score, print, write.

    Raises:
        UserError: wrong flags, no model, or models that cannot be compared.
    """
    options = build_parser().parse_args(arguments)
    settings = samplers(options)
    is_file = options.output is None or not options.output.is_dir()
    require(is_file, f"--output {options.output}", "it is a folder, and a file is written", "name a file in it")
    from megatron.inference.ensemble import members_of
    from megatron.inference.processes import processes

    require(
        options.ensemble_weights == "named" or any(len(members_of(run)) > 1 for run in options.runs),
        f"--ensemble-weights {options.ensemble_weights} without an ensemble",
        "it chooses the weights of RUN+RUN",
        "drop it, or name an ensemble",
    )
    with processes(options.tensor_model_parallel_size) as context:
        judge(options, settings, context)
        context.barrier()
    return 0


def judge(options: argparse.Namespace, settings: list[Any], context: ParallelContext) -> None:
    """Load, score, print, write; a collective call."""
    from megatron.evaluation.bench import load_models, open_samples

    models = load_models(options.runs, tag=options.load_tag, kind=options.load_kind, context=context)
    _check_heeded(options, list(models.values()))
    paths = options.valid_data_path or []
    samples = open_samples(models, paths, number=options.samples, cache_path=options.data_cache_path)
    models, ensembles = _with_fits(options, models, samples, context)
    fits = {own.name for own in ensembles if own.is_fitted}
    court = _hear_all(options, models, samples, settings, context, fitted=fits)
    if context.is_first_rank:
        found = court.record(samples, ensembles)
        print("\n".join(f"{name}: {model.source}{_packing(model)}" for name, model in models.items()))
        print(report(found))
        if options.output:
            found.save(options.output)


# Flags of samplers and mixtures of masked diffusion.
OF_MASKED = ("policies", "tokens_per_step", "block_length", "temperature", "top_k", "top_p", "orders")


def _check_heeded(options: argparse.Namespace, models: Sequence[InferenceModel]) -> None:
    """Refuse flags that none of the models heeds."""
    sources = ", ".join(model.source for model in models)
    idle = {name: f"{sources}: none is masked diffusion" for name in OF_MASKED if not any(m.is_masked for m in models)}
    if all(model.is_causal for model in models):
        idle["num_mc"] = f"{sources}: every likelihood is exact"
    refuse_idle(build_parser(), options, idle)


def _packing(model: InferenceModel) -> str:
    """What is to be said of a model that knows documents only one at a time."""
    flags = [
        f"--{name.replace('_', '-')}"
        for name in ("reset_position_ids", "reset_attention_mask")
        if any(getattr(own.config.data, name) for own in model.parts)
    ]
    return (
        f" (trained with {' '.join(flags)}; scored here on whole samples, which may hold several documents)"
        if flags
        else ""
    )


def samplers(options: argparse.Namespace) -> list[Any]:
    """Settings of every policy with every number of tokens a pass, checked before anything is loaded."""
    from megatron.generation.diffusion import DiffusionSettings
    from megatron.generation.sampling import TokenSampling

    sampling = TokenSampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    counts, policies = (
        [word.strip() for word in words.split(",")] for words in (options.tokens_per_step, options.policies)
    )
    require(
        all(count.isdecimal() and 0 < int(count) < 10**6 for count in counts),
        f"--tokens-per-step {options.tokens_per_step}",
        "it counts tokens that are uncovered in one pass",
        "give numbers from 1, such as 1,4",
    )
    found = [
        DiffusionSettings(policy, block_length=options.block_length, sampling=sampling, tokens_per_step=int(count))
        for policy in dict.fromkeys(filter(None, policies))
        for count in dict.fromkeys(counts)
    ]
    for settings in found:
        settings.check_has_likelihood()
    return found


def _with_fits(options: argparse.Namespace, models: dict[str, InferenceModel], samples: Samples,
               context: ParallelContext) -> tuple[dict[str, InferenceModel], list[EnsembleRecord]]:  # fmt: skip
    """The models with the weights that were asked for, and what is to be said of their ensembles."""
    from megatron.evaluation.court import fitted_name
    from megatron.evaluation.ensemble_weights import fitted
    from megatron.runs.likelihoods import FITTED, EnsembleRecord

    chosen, judged, records = options.ensemble_weights, dict[str, Any](), []
    how = {"pairs": options.num_mc, "batch_size": options.batch_size, "context": context}
    for name, model in models.items():
        if chosen != "fitted" or not model.members:
            judged[name] = model
            records += [EnsembleRecord(name, model.source)] if model.members else []
        if chosen != "named" and model.members:
            own, fit = fitted(model, samples, **how, cache=_cache(options, model, context))
            judged[fitted_name(name)] = own
            records.append(EnsembleRecord(fitted_name(name), own.source, FITTED, fit.before, fit.after))
    return judged, records


def _cache(options: argparse.Namespace, model: InferenceModel, context: ParallelContext) -> ResultCache:
    from megatron.evaluation.requests import ResultCache

    folder = options.output.with_name(f"{options.output.name}.cache") if options.output else None
    return ResultCache(folder, fingerprint=model.identity, rank=context.rank, write=context.tp.rank == 0)


def _hear_all(options: argparse.Namespace, models: dict[str, InferenceModel], samples: Samples, settings: list[Any],
              context: ParallelContext, *, fitted: Collection[str]) -> Court:  # fmt: skip
    from megatron.evaluation.court import Court, hear
    from megatron.evaluation.witnesses import witnesses

    court = Court()
    how = {"pairs": options.num_mc, "orders": options.orders, "batch_size": options.batch_size}
    plan = [(name, model, witness) for name, model in models.items() for witness in witnesses(model, settings, **how)]
    for name, model, witness in plan:
        cache = _cache(options, model, context)
        total = len(range(context.dp.rank, len(samples.tokens), context.dp.size))
        title, is_speaker = f"{name}: {witness.name}", context.is_first_rank
        with Progress(title, total, unit="samples", enabled=is_speaker) as bar:
            found = hear(
                witness,
                samples,
                model=name,
                cache=cache,
                context=context,
                chunk=options.batch_size,
                on_samples=bar.update,
            )
            court.findings.append(replace(found, is_fitted=name in fitted))
    return court


def report(found: Likelihoods) -> str:
    """The table and the verdicts, for people."""
    documents = max(own.documents for own in found.findings)
    lines = [
        f"{found.samples} samples of {found.seq_length} tokens, {documents} documents; tokens 1 to {found.seq_length - 1} given "
        "token 0; nats per token",
        "",
    ]
    rows = [("model", "estimator", "what it is", "NLL", "±95%", "passes", "seconds")]
    for own in found.findings:
        rows.append((own.model, own.estimator, own.kind, f"{own.nll:.4f}", f"{own.reach_95:.4f}", str(own.passes),
                     f"{own.seconds:.1f}"))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [
        "",
        *_fits(found),
        *_brackets(found),
        *_near_ties(found),
        *(f"{own.answer}\n  {own.reason}" for own in found.verdicts),
    ]
    return "\n".join(lines).rstrip()


def _fits(found: Likelihoods) -> list[str]:
    """What fitted weights are, what they gained where they were chosen, and that values are of the other documents."""
    fits = [own for own in found.ensembles if own.is_fitted]
    rows = [f"  {own.name}: {own.members}; {own.before:.4f} there before, {own.after:.4f} with these" for own in fits]
    judged = next((own.documents for own in found.findings if fits and own.model == fits[0].name), 0)
    why = f"weights fitted on the selection half of the documents; the values above are of the other {judged}:"
    return [why, *rows, ""] if fits else []


def _brackets(found: Likelihoods) -> list[str]:
    """Where the mixture over random orders lies, for models of which both bounds are known; each end holds in 97.5 %."""
    from megatron.runs.likelihoods import FLOOR, MIXTURE

    ends = {(own.model, own.kind): own for own in found.findings if own.kind in (FLOOR, MIXTURE)}
    lines = []
    for model, kind in ends:
        if kind == FLOOR:
            low, high = ends[model, FLOOR], ends[model, MIXTURE]
            lines.append(
                f"{model}, drawn in random orders: {low.nll - low.reach_95:.4f} ≤ NLL ≤ {high.nll + high.reach_95:.4f} (95 %)"
            )
    return [*lines, ""] if lines else []


def _near_ties(found: Likelihoods) -> list[str]:
    """Where rounding may choose another order, and so another value."""
    rows = [
        f"  {own.model}, {own.estimator}: {own.near_ties:,} of {own.tokens:,} tokens"
        for own in found.findings
        if own.near_ties
    ]
    why = f"chosen by a margin below {found.near_tie_below:g}, which another batch size or layout may turn:"
    return [why, *rows, ""] if rows else []
