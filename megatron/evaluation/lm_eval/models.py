"""Models for lm-eval: ``megatron_ar`` and ``megatron_mdm``.

``python -m megatron.evaluation --model megatron_mdm --model_args load=RUN,num_mc=32 --tasks ...`` is ``lm_eval`` with
these two registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model

from megatron.errors import UserError, require
from megatron.evaluation.adaptive import Question, RaceSettings, Ranking, race, raced
from megatron.evaluation.blocks import scorer_of
from megatron.evaluation.estimators import LeftToRight, make_estimator
from megatron.evaluation.exact import PolicyScorer
from megatron.evaluation.likelihood import MAX_DRAWS, add_up
from megatron.evaluation.lm_eval.base import MegatronLM
from megatron.evaluation.lm_eval.diffusion import DiffusionLM
from megatron.evaluation.lm_eval.generation import token_sampling
from megatron.evaluation.lm_eval.groups import Group
from megatron.evaluation.requests import whole_number, windows
from megatron.evaluation.scorer import CausalScorer, Estimate, Request
from megatron.generation.blocks import sampler_of
from megatron.generation.diffusion import DiffusionSettings
from megatron.generation.sampling import TokenSampling
from megatron.generation.text import Completion, Wanted, continue_causal


@register_model("megatron_ar")
class MegatronAR(MegatronLM):
    """An autoregressive model: exact likelihoods, generation with a key/value cache."""

    def __init__(self, load: str | None = None, **options: Any) -> None:
        super().__init__(load, **options)
        self.loaded = self.loaded.decoded("causal")
        if not self.loaded.is_causal:
            name = self.loaded.config.objective.objective
            raise UserError(
                f"{self.loaded.source} is a diffusion model ({name})",
                "megatron_ar runs causal ones",
                "use megatron_mdm" if self.loaded.is_masked else "use megatron_uniform",
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

    def generation_settings(self, options: dict[str, Any], *, new: int) -> TokenSampling:
        """See :class:`MegatronLM`."""
        return token_sampling(options)

    def complete(self, prompts: Sequence[list[int]], *, settings: Any, wanted: Wanted) -> list[Completion]:
        """See :class:`MegatronLM`."""
        return continue_causal(
            self.loaded.decoder, self.tokenizer, prompts, wanted, sampling=settings, forbidden=self.loaded.unused_ids,
            device=self.device,
        )  # fmt: skip


@register_model("megatron_mdm")
class MegatronMDM(DiffusionLM):
    """A masked diffusion model: bounds with their errors, or the left-to-right chain rule.

    Args:
        load: see :class:`MegatronLM`.
        estimator: one of ``megatron.evaluation.estimators.ESTIMATORS``; default: exact-count.
        policy: score exactly under the sampler that uncovers by it, instead of by an estimator.
        tokens_per_step: tokens that it uncovers in a pass; default: 1.
        num_mc: draws of every answer, or the most of them where ``adaptive``; default: 128.
        adaptive: race where a task's metrics need nothing but the winner of a question (see adaptive.py); default: yes.
        greedy: whether to say for every answer if greedy decoding gives it: "auto", or "never".
        only_greedy: say that and compute no likelihoods.
        seed: of the masks and of generated texts.
        gen_order, gen_steps, gen_block_length, guidance: defaults of generation (see diffusion.py).
        options: the rest of :class:`MegatronLM`.
    """

    def __init__(
        self,
        load: str | None = None,
        *,
        estimator: str | None = None,
        policy: str | None = None,
        tokens_per_step: int | None = None,
        num_mc: int | None = None,
        adaptive: bool | None = None,
        greedy: str = "auto",
        only_greedy: bool = False,
        seed: int = 1234,
        gen_order: str = "confidence",
        gen_steps: int | None = None,
        gen_block_length: int | None = None,
        guidance: float = 0.0,
        **options: Any,
    ) -> None:
        self.estimator = make_estimator(estimator or "exact-count", seed=whole_number("seed", seed, at_least=0))
        self.num_mc = whole_number("num_mc", 128 if num_mc is None else num_mc)
        require(self.num_mc <= MAX_DRAWS, f"num_mc {num_mc}", f"at most {MAX_DRAWS} draws", "lower it")
        self.adaptive, self.greedy, self.only_greedy = adaptive in (None, True), greedy, only_greedy
        self.policy = policy
        self.tokens_per_step = whole_number("tokens_per_step", 1 if tokens_per_step is None else tokens_per_step)
        is_estimated = policy is None and not only_greedy
        _refuse_idle({"tokens_per_step": tokens_per_step}, policy is not None, "it is for a policy")
        _refuse_idle({"estimator": estimator}, is_estimated, "a policy and only_greedy need none")
        self.is_drawn = is_estimated and self.estimator.max_draws(2) != 1
        _refuse_idle(
            {"num_mc": num_mc, "adaptive": adaptive}, self.is_drawn, "only an estimator that draws masks heeds it"
        )
        self.generation = {
            "order": gen_order,
            "steps": gen_steps,
            "block_length": gen_block_length,
            "guidance": guidance,
        }
        super().__init__(load, seed=seed, **options)
        self.loaded = self.loaded.decoded("masked")
        self.scorer = scorer_of(self.loaded, max_length=self.max_length, batch_size=self.batch_size)
        self.sampler = sampler_of(self.loaded)
        self.exact: PolicyScorer | None = None
        if policy is not None:
            settings = DiffusionSettings(
                policy, sampling=TokenSampling(temperature=1.0), tokens_per_step=self.tokens_per_step
            )
            self.exact = PolicyScorer(self.sampler, settings, max_length=self.max_length, batch_size=self.batch_size)

    def fingerprint(self) -> str:
        """See :class:`MegatronLM`."""
        how = f"draws={self.num_mc} adaptive={self.adaptive} greedy={self.greedy} only_greedy={self.only_greedy}"
        how += "" if self.policy is None else f" policy={self.policy} together={self.tokens_per_step}"
        return f"mdm {self.estimator} {how} generation={self.generation} seed={self.seed} length={self.max_length}"

    def describe(self) -> str:
        """The estimator, for people."""
        if self.only_greedy:
            return "greedy decoding only"
        if self.exact is not None:
            return f"{self.exact.kind}: {self.exact.name}"
        draws = "" if self.estimator.max_draws(2) == 1 else f", {self.num_mc} draws"
        draws += ", races where only the winner counts" if draws and self.adaptive else ""
        return f"{self.estimator.kind}: {self.estimator.name}{draws}"

    def score_groups(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        """See :class:`MegatronLM`."""
        results: dict[int, list[Estimate]] = {}
        racing = [(group, group.ranking) for group in groups if group.ranking is not None and self._can_race(group)]
        if racing:
            settings = RaceSettings(first_draws=min(4, self.num_mc), max_draws=self.num_mc)
            questions = [self._question(group, ranking) for group, ranking in racing]
            tallies = race(self.scorer, questions, self.estimator, settings=settings)
            contenders = [group for group, _ in racing]
            estimates = [[raced(tally) for tally in own] for own in tallies]
            results = {id(g): own for g, own in zip(contenders, self.with_greedy_flags(contenders, estimates))}
        rest = [group for group in groups if id(group) not in results]
        results.update(zip(map(id, rest), self._score_plain(rest)))
        return [results[id(group)] for group in groups]

    def _can_race(self, group: Group) -> bool:
        """Several answers that fit one row each, and an estimator that samples."""
        fits = all(len(target) < self.row_length for _, target in group.tokens)
        sampled = self.estimator.max_draws(2) is None and not self.only_greedy and self.exact is None
        return self.adaptive and self.num_mc >= 8 and len(group.indices) > 1 and fits and sampled

    def _question(self, group: Group, ranking: Ranking) -> Question:
        choices = tuple(own[0] for own in self.requests(group))
        return Question(choices, ranking.lengths([strings[-1] for strings in group.strings]))

    def _score_plain(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        pieces = [own for group in groups for own in self.requests(group)]
        if self.only_greedy:
            totals = iter([not_computed() for _ in pieces])
        else:
            requests = [request for own in pieces for request in own]
            found = (
                self.scorer.score(requests, self.estimator, num_draws=self.num_mc)
                if self.exact is None
                else self.exact.score(requests)
            )
            scores = iter(found)
            totals = iter([add_up([next(scores) for _ in own]) for own in pieces])
        return self.with_greedy_flags(groups, [[next(totals) for _ in group.indices] for group in groups])

    @property
    def has_greedy_flags(self) -> bool:
        """See :class:`DiffusionLM`."""
        return self.greedy == "auto" or self.only_greedy

    def are_greedy(self, requests: Sequence[Request]) -> list[bool]:
        """See :class:`DiffusionLM`."""
        return self.scorer.is_greedy(requests, left_to_right=isinstance(self.estimator, LeftToRight))


def _refuse_idle(given: dict[str, Any], is_heeded: bool, rule: str) -> None:
    for name, value in given.items():
        require(value is None or is_heeded, f"{name} {value} would have no effect", rule, "drop it")


def not_computed() -> Estimate:
    """Stands for a likelihood that was not asked for."""
    return Estimate(float("nan"), float("nan"), "none", "not computed", 0, 0)
