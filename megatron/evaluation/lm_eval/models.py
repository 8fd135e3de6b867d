"""Models for lm-eval: ``megatron_ar`` and ``megatron_mdm``.

``python -m megatron.evaluation --model megatron_mdm --model_args load=RUN,num_mc=32 --tasks ...`` is ``lm_eval`` with
these two registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model

from megatron.errors import UserError
from megatron.evaluation.adaptive import Question, RaceSettings, race
from megatron.evaluation.estimators import LeftToRight, make_estimator
from megatron.evaluation.lm_eval.base import Group, MegatronLM
from megatron.evaluation.requests import windows
from megatron.evaluation.scorer import CausalScorer, Estimate, MaskedScorer
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings
from megatron.generation.sampling import TokenSampling
from megatron.generation.text import Completion, continue_causal, continue_masked


@register_model("megatron_ar")
class MegatronAR(MegatronLM):
    """An autoregressive model: exact likelihoods, generation with a key/value cache."""

    def __init__(self, load: str | None = None, **options: Any) -> None:
        super().__init__(load, **options)
        if self.loaded.is_masked:
            raise UserError(
                f"{self.loaded.source} is a masked diffusion model", "megatron_ar runs causal ones", "use megatron_mdm"
            )
        self.scorer = CausalScorer(
            self.loaded.logits, max_length=self.max_length, batch_size=self.batch_size, device=self.device
        )

    @property
    def row_length(self) -> int:
        """One more than the inputs: the last target is none."""
        return self.max_length + 1

    def fingerprint(self) -> str:
        """See :class:`MegatronLM`."""
        return f"ar length={self.max_length}"

    def score_groups(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        """See :class:`MegatronLM`."""
        pieces = [
            windows(context, target, row_length=self.row_length, key=group.key)
            for group in groups
            for context, target in group.tokens
        ]
        scores = iter(self.scorer.score([request for request_pieces in pieces for request in request_pieces]))
        totals = iter([add_up([next(scores) for _ in request_pieces]) for request_pieces in pieces])
        return [[next(totals) for _ in group.indices] for group in groups]

    def complete(
        self, prompts: Sequence[list[int]], *, options: dict[str, Any], until: list[str], new: int
    ) -> list[Completion]:
        """See :class:`MegatronLM`."""
        return continue_causal(
            self.loaded.decoder, self.tokenizer, prompts, max_new_tokens=new, sampling=token_sampling(options),
            stop_strings=until, batch_size=self.batch_size, forbidden=self.loaded.unused_ids, device=self.device,
        )  # fmt: skip


@register_model("megatron_mdm")
class MegatronMDM(MegatronLM):
    """A masked diffusion model: bounds with error bars, or the left-to-right chain rule.

    Args:
        load: see :class:`MegatronLM`.
        estimator: one of ``megatron.evaluation.estimators.ESTIMATORS``.
        num_mc: draws of every answer, or the most of them where ``adaptive``.
        adaptive: more draws only for questions whose ranking is undecided (multiple choice).
        greedy: whether to decode single answers for exact match: "auto", or "never".
        only_greedy: decode single answers and compute no likelihoods.
        seed: of the masks.
        gen_order, gen_steps, gen_block_length, guidance: defaults of generation (see diffusion.py).
        options: the rest of :class:`MegatronLM`.
    """

    def __init__(
        self,
        load: str | None = None,
        *,
        estimator: str = "exact-count",
        num_mc: int = 128,
        adaptive: bool = True,
        greedy: str = "auto",
        only_greedy: bool = False,
        seed: int = 1234,
        gen_order: str = "confidence",
        gen_steps: int | None = None,
        gen_block_length: int | None = None,
        guidance: float = 0.0,
        **options: Any,
    ) -> None:
        self.estimator = make_estimator(estimator, seed=seed)
        self.num_mc, self.adaptive, self.greedy, self.only_greedy, self.seed = (
            num_mc,
            adaptive,
            greedy,
            only_greedy,
            seed,
        )
        self.generation = {
            "order": gen_order,
            "steps": gen_steps,
            "block_length": gen_block_length,
            "guidance": guidance,
        }
        super().__init__(load, **options)
        self.scorer = MaskedScorer(
            self.loaded.logits, mask_id=self.loaded.mask_id, max_length=self.max_length, batch_size=self.batch_size,
            device=self.device,
        )  # fmt: skip
        self.sampler = DiffusionSampler(
            self.loaded.logits, mask_id=self.loaded.mask_id, forbidden=self.loaded.unused_ids, device=self.device
        )

    @property
    def row_length(self) -> int:
        """Every token is an input."""
        return self.max_length

    def fingerprint(self) -> str:
        """See :class:`MegatronLM`."""
        how = f"draws={self.num_mc} adaptive={self.adaptive} greedy={self.greedy} only_greedy={self.only_greedy}"
        return f"mdm {self.estimator} {how} generation={self.generation} seed={self.seed} length={self.max_length}"

    def describe(self) -> str:
        """The estimator, for people."""
        if self.only_greedy:
            return "greedy decoding only"
        draws = "" if self.estimator.max_draws(2) == 1 else f", {'up to ' if self.adaptive else ''}{self.num_mc} draws"
        return f"{self.estimator.kind}: {self.estimator.name}{draws}"

    def score_groups(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        """See :class:`MegatronLM`."""
        raced = [g for g in groups if self.adaptive and self.num_mc >= 8 and len(g.indices) > 1 and self._can_race(g)]
        results: dict[int, list[Estimate]] = {}
        if raced:
            settings = RaceSettings(first_draws=min(4, self.num_mc), max_draws=self.num_mc)
            for group, tallies in zip(
                raced, race(self.scorer, [self._question(g) for g in raced], self.estimator, settings=settings)
            ):
                results[id(group)] = [tally.estimate() for tally in tallies]
        rest = [group for group in groups if id(group) not in results]
        results.update(zip(map(id, rest), self._score_plain(rest)))
        return [results[id(group)] for group in groups]

    def _can_race(self, group: Group) -> bool:
        """Answers that fit one row each, and an estimator that samples."""
        fits = all(len(target) < self.row_length for _, target in group.tokens)
        return fits and self.estimator.max_draws(2) is None and not self.only_greedy

    def _question(self, group: Group) -> Question:
        choices = [
            windows(context, target, row_length=self.row_length, key=group.key)[0] for context, target in group.tokens
        ]
        return Question(tuple(choices), tuple(float(max(len(strings[-1].strip()), 1)) for strings in group.strings))

    def _score_plain(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        pieces = [
            (group, windows(context, target, row_length=self.row_length, key=group.key))
            for group in groups
            for context, target in group.tokens
        ]
        if self.only_greedy:
            totals = [not_computed() for _ in pieces]
        else:
            scores = iter(
                self.scorer.score([r for _, own in pieces for r in own], self.estimator, num_draws=self.num_mc)
            )
            totals = [add_up([next(scores) for _ in own]) for _, own in pieces]
        wanted = [
            index for index, (group, own) in enumerate(pieces)
            if group.needs_greedy and len(own) == 1 and (self.greedy == "auto" or self.only_greedy)
        ]  # fmt: skip
        in_order = isinstance(self.estimator, LeftToRight)
        flags = self.scorer.is_greedy([pieces[index][1][0] for index in wanted], left_to_right=in_order)
        for index, flag in zip(wanted, flags):
            totals[index] = Estimate(**{**totals[index].__dict__, "is_greedy": flag})
        remaining = iter(totals)
        return [[next(remaining) for _ in group.indices] for group in groups]

    def complete(
        self, prompts: Sequence[list[int]], *, options: dict[str, Any], until: list[str], new: int
    ) -> list[Completion]:
        """See :class:`MegatronLM`; ``--gen_kwargs`` order, steps, block_length and guidance replace the defaults."""
        own: dict[str, Any] = {name: options.get(name, default) for name, default in self.generation.items()}
        settings = DiffusionSettings(**own, sampling=token_sampling(options))
        return continue_masked(
            self.sampler, self.tokenizer, prompts, max_new_tokens=new, settings=settings, stop_strings=until,
            batch_size=self.batch_size,
        )  # fmt: skip


def token_sampling(options: dict[str, Any]) -> TokenSampling:
    """lm-eval's generation arguments as settings."""
    return TokenSampling(
        temperature=float(options.get("temperature", 0.0) or 0.0) if options.get("do_sample", True) else 0.0,
        top_k=int(options.get("top_k", 0) or 0),
        top_p=float(options.get("top_p", 1.0) or 1.0),
        seed=int(options.get("seed", 1234)),
    )


def add_up(pieces: Sequence[Estimate]) -> Estimate:
    """The sum over the windows of one text; their errors are independent."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    return Estimate(
        value=sum(piece.value for piece in pieces),
        standard_error=sum(piece.standard_error**2 for piece in pieces) ** 0.5,
        kind=first.kind,
        estimator=first.estimator,
        num_passes=sum(piece.num_passes for piece in pieces),
        num_draws=first.num_draws,
        is_greedy=None if first.is_greedy is None else all(piece.is_greedy for piece in pieces),
    )


def not_computed() -> Estimate:
    """Stands for a likelihood that was not asked for."""
    return Estimate(float("nan"), float("nan"), "none", "not computed", 0, 0)
