"""Every likelihood of one model or several on the same tokens, and whether one is better than another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.loading import add_load_kind
from megatron.config.parser import Parser
from megatron.config.ranges import real, whole
from megatron.errors import UserError, require
from megatron.screen import Progress

if TYPE_CHECKING:  # loaded after the flags are read, so that --help is fast
    from megatron.evaluation.court import Court, Samples
    from megatron.inference.model import InferenceModel
    from megatron.parallel.context import ParallelContext
    from megatron.runs.likelihoods import Likelihoods

POLICIES = "left-to-right,confidence,entropy,random,confidence-reversed"
COUNT = whole(1, 10**9)


def build_parser() -> argparse.ArgumentParser:
    """Flags of tools/likelihood.py."""
    parser = Parser(
        description=__doc__,
        examples=(
            "megatron likelihood runs/ar runs/mdm --output verdict.json",
            "megatron likelihood runs/ar runs/mdm --samples 48 --tokens-per-step 1,4",
        ),
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run, one tag of it, or export; the first is compared with")
    add("--load-tag", metavar="TAG", help="checkpoint of all runs; default: the best by validation where it is kept")
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
    from megatron.inference.processes import start_processes

    context = start_processes(options.tensor_model_parallel_size)
    judge(options, settings, context)
    context.barrier()
    return 0


def judge(options: argparse.Namespace, settings: list[Any], context: ParallelContext) -> None:
    """Load, score, print, write; a collective call."""
    models = _models(options, context)
    samples = _samples(options, models)
    court = _hear_all(options, models, samples, settings, context)
    if context.is_first_rank:
        found = court.record(samples)
        print("\n".join(f"{name}: {model.source}{_packing(model)}" for name, model in models.items()))
        print(report(found))
        if options.output:
            found.save(options.output)


def _packing(model: InferenceModel) -> str:
    """What is to be said of a model that knows documents only one at a time."""
    data = model.config.data
    flags = [
        f"--{name.replace('_', '-')}" for name in ("reset_position_ids", "reset_attention_mask") if getattr(data, name)
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


def _models(options: argparse.Namespace, context: ParallelContext) -> dict[str, InferenceModel]:
    """The models by the names that the table gives them."""
    from megatron.data.identity import tokenizer_fingerprint
    from megatron.inference.model import load_model

    paths = list(dict.fromkeys(options.runs))
    names = [path.name for path in paths]
    models = {}
    for path, name in zip(paths, names):
        model = load_model(path, tag=options.load_tag or _best(path), kind=options.load_kind, context=context)
        shown = name if names.count(name) == 1 else str(path)
        for form in filter(None, (model, model.beside)):  # of a dual model both
            way = "AR" if form.is_causal else "masked diffusion"
            models[shown if model.beside is None else f"{shown} as {way}"] = form
    lengths = {name: model.max_length for name, model in models.items()}
    require(
        len(set(lengths.values())) == 1,
        ", ".join(f"{name} has samples of {length} tokens" for name, length in lengths.items()),
        "likelihoods are compared on the same samples",
        "name models of one sequence length",
    )
    masks = {model.mask_id for model in models.values() if model.is_masked}
    makers = {
        name: tokenizer_fingerprint(model.tokenizer, without=masks) for name, model in models.items() if model.tokenizer
    }
    require(
        len(set(makers.values())) <= 1,
        f"{', '.join(makers)} have different tokenizers",
        "likelihoods are compared on the same tokens",
        "name models of one tokenizer",
    )
    return models


def _best(path: Path) -> str | None:
    """The tag of the best validation where it is kept; else None, the newest."""
    from megatron.checkpoint.select import select

    try:
        return "best" if select(path, "best", checksums=False).tag is not None else None
    except UserError:
        return None


def _samples(options: argparse.Namespace, models: dict[str, InferenceModel]) -> Samples:
    from megatron.data.dataset import build_dataset
    from megatron.data.identity import check_vocabulary, tokenizer_fingerprint
    from megatron.evaluation.court import Samples
    from megatron.randomness import VALIDATION_SEED

    first = next(iter(models.values()))
    paths = options.valid_data_path or list(first.config.data.valid_data_path or [])
    if not paths:
        raise UserError(
            f"no --valid-data-path, and {first.source} was trained without one",
            "likelihoods are of text that no model has seen",
            "pass --valid-data-path PREFIX",
        )
    for model in models.values():
        rows = (model.config.model.padded_vocab_size or 0) - len(model.unused_ids)
        masks = (model.mask_id,) if model.is_masked else ()  # an export adds that token, which the data need not know
        makers = [tokenizer_fingerprint(model.tokenizer, without=ids) for ids in ((), masks) if model.tokenizer]
        check_vocabulary(paths, vocab_size=rows, fingerprints=makers)
    dataset = build_dataset(
        paths, num_samples=None, seq_length=first.max_length, seed=VALIDATION_SEED, name="valid",
        cache_path=options.data_cache_path,
    )  # fmt: skip
    return Samples.of(dataset, min(options.samples or len(dataset), len(dataset)), seq_length=first.max_length)


def _hear_all(options: argparse.Namespace, models: dict[str, InferenceModel], samples: Samples, settings: list[Any],
              context: ParallelContext) -> Court:  # fmt: skip
    from megatron.evaluation.court import Court, hear
    from megatron.evaluation.requests import ResultCache
    from megatron.evaluation.witnesses import witnesses

    court = Court()
    how = {"pairs": options.num_mc, "orders": options.orders, "batch_size": options.batch_size}
    folder = options.output.with_name(f"{options.output.name}.cache") if options.output else None
    plan = [(name, model, witness) for name, model in models.items() for witness in witnesses(model, settings, **how)]
    for name, model, witness in plan:
        cache = ResultCache(folder, fingerprint=model.identity, rank=context.rank, write=context.tp.rank == 0)
        total = len(range(context.dp.rank, len(samples.tokens), context.dp.size))
        title, is_speaker = f"{name}: {witness.name}", context.is_first_rank
        with Progress(title, total, unit="samples", enabled=is_speaker) as bar:
            court.findings.append(
                hear(
                    witness,
                    samples,
                    model=name,
                    cache=cache,
                    context=context,
                    chunk=options.batch_size,
                    on_samples=bar.update,
                )
            )
    return court


def report(found: Likelihoods) -> str:
    """The table and the verdicts, for people."""
    lines = [
        f"{found.samples} samples of {found.seq_length} tokens, {found.findings[0].documents} documents; tokens 1 to "
        f"{found.seq_length - 1} given token 0; nats per token",
        "",
    ]
    rows = [("model", "estimator", "what it is", "NLL", "±95%", "passes", "seconds")]
    for own in found.findings:
        rows.append((own.model, own.estimator, own.kind, f"{own.nll:.4f}", f"{own.reach_95:.4f}", str(own.passes),
                     f"{own.seconds:.1f}"))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += ["", *_brackets(found), *_near_ties(found), *(f"{own.answer}\n  {own.reason}" for own in found.verdicts)]
    return "\n".join(lines).rstrip()


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
