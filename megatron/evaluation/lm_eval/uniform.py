"""``megatron_uniform``: uniform-state diffusion for lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model

from megatron.errors import UserError, require
from megatron.evaluation.likelihood import MAX_DRAWS, add_up
from megatron.evaluation.lm_eval.diffusion import DiffusionLM
from megatron.evaluation.lm_eval.groups import Group
from megatron.evaluation.requests import whole_number
from megatron.evaluation.scorer import Estimate, Request, batches, cut_context
from megatron.evaluation.uniform import UniformScorer
from megatron.generation.diffusion import DiffusionSettings
from megatron.generation.samplers import sampler_of
from megatron.generation.sampling import TokenSampling
from megatron.objectives.base import UniformDecoding


@register_model("megatron_uniform")
class MegatronUniform(DiffusionLM):
    """A uniform-state diffusion model: bounds with their errors, ancestral and greedy generation.

    Args:
        load: see :class:`MegatronLM`.
        num_mc: passes for every answer, in pairs.
        greedy: whether to say for every answer if greedy decoding gives it: "auto", or "never".
        seed: of the noise and of generated texts.
        gen_order, gen_steps: defaults of generation (see ``megatron.generation.uniform``).
        options: the rest of :class:`MegatronLM`.
    """

    is_drawn = True

    def __init__(
        self,
        load: str | None = None,
        *,
        num_mc: int = 128,
        greedy: str = "auto",
        seed: int = 1234,
        gen_order: str = "confidence",
        gen_steps: int | None = None,
        **options: Any,
    ) -> None:
        self.num_mc = whole_number("num_mc", num_mc)
        require(self.num_mc <= MAX_DRAWS, f"num_mc {num_mc}", f"at most {MAX_DRAWS} draws", "lower it")
        self.pairs = -(-self.num_mc // 2)
        self.greedy, self.generation = greedy, {"order": gen_order, "steps": gen_steps}
        super().__init__(load, seed=seed, **options)
        decoding = self.loaded.objective.decoding
        if not isinstance(decoding, UniformDecoding):
            raise UserError(
                f"{self.loaded.source} is a model of objective {self.loaded.config.objective.objective}",
                "megatron_uniform runs those of uniform_diffusion",
                "use megatron_ar or megatron_mdm",
            )
        self.scorer = UniformScorer(
            self.loaded.logits,
            vocab_size=decoding.vocab_size,
            max_length=self.max_length,
            batch_size=self.batch_size,
            device=self.device,
            seed=self.seed,
        )
        self.sampler = sampler_of(self.loaded)

    def fingerprint(self) -> str:
        """See :class:`MegatronLM`."""
        how = f"draws={self.num_mc} greedy={self.greedy} generation={self.generation}"
        return f"uniform {UniformScorer.name} {how} seed={self.seed} length={self.max_length}"

    def describe(self) -> str:
        """The estimator, for people."""
        return f"{self.scorer.kind}: {self.scorer.name}, {2 * self.pairs} passes"

    def score_groups(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        """See :class:`MegatronLM`."""
        pieces = [own for group in groups for own in self.requests(group)]
        scores = iter(self.scorer.score([one for own in pieces for one in own], num_draws=self.pairs))
        totals = iter([add_up([next(scores) for _ in own]) for own in pieces])
        return self.with_greedy_flags(groups, [[next(totals) for _ in group.indices] for group in groups])

    @property
    def has_greedy_flags(self) -> bool:
        """See :class:`DiffusionLM`."""
        return self.greedy == "auto"

    def are_greedy(self, requests: Sequence[Request]) -> list[bool]:
        """See :class:`DiffusionLM`."""
        cut = [cut_context(request, self.max_length) for request in requests]
        sizes = [(len(request.context), len(request.target)) for request in cut]
        order = sorted(range(len(cut)), key=sizes.__getitem__, reverse=True)
        found = [False] * len(cut)
        alike = [sizes[index] for index in order]
        for start, stop in batches([target for _, target in alike], alike=alike, limit=self.batch_size):
            indices = order[start:stop]
            rows = [[*cut[i].context, *([self.sampler.mask_id] * len(cut[i].target))] for i in indices]
            settings = DiffusionSettings(sampling=TokenSampling(seed=self.seed))
            filled = self.sampler.fill(rows, settings=settings, sample_numbers=[0] * len(rows))
            for index, tokens in zip(indices, filled):
                found[index] = tuple(tokens[len(cut[index].context) :]) == cut[index].target
        return found
