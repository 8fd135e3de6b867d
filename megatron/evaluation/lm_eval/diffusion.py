"""What the diffusion models of lm-eval share: answers in windows, which of them are greedy, generation by a sampler."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from megatron.evaluation.lm_eval.base import MegatronLM
from megatron.evaluation.lm_eval.generation import GENERATION, generation_settings
from megatron.evaluation.lm_eval.groups import Group
from megatron.evaluation.requests import windows
from megatron.evaluation.scorer import Estimate, Request
from megatron.generation.diffusion import DiffusionSettings
from megatron.generation.text import Completion, Sampler, Wanted, continue_masked


class DiffusionLM(MegatronLM):
    """See :class:`MegatronLM`.

    Attributes:
        sampler: generates.
        generation: defaults of its order, steps, block_length and guidance, which ``--gen_kwargs`` replaces.
    """

    heeded = (*MegatronLM.heeded, *GENERATION)
    sampler: Sampler
    generation: dict[str, Any]

    @property
    def row_length(self) -> int:
        """Every token is an input."""
        return self.max_length

    @property
    @abstractmethod
    def has_greedy_flags(self) -> bool:
        """Whether it is said of answers if greedy decoding gives them."""

    @abstractmethod
    def are_greedy(self, requests: Sequence[Request]) -> list[bool]:
        """Whether greedy decoding gives the target of each request."""

    def requests(self, group: Group) -> list[list[Request]]:
        """The rows that score each answer of a group: one, or several windows."""
        return [windows(*pair, row_length=self.row_length, key=group.key) for pair in group.tokens]

    def with_greedy_flags(self, groups: Sequence[Group], estimates: list[list[Estimate]]) -> list[list[Estimate]]:
        """The estimates with ``is_greedy``: every window of the answer is what greedy decoding gives, where that is asked."""
        if not self.has_greedy_flags:
            return estimates
        pieces = [self.requests(group) if group.needs_greedy else [] for group in groups]
        flags = iter(self.are_greedy([request for group in pieces for own in group for request in own]))
        verdicts = [[False not in [next(flags) for _ in own] for own in group] for group in pieces]
        return [
            [dataclasses.replace(e, is_greedy=flag) for e, flag in zip(own, given)] if given else own
            for own, given in zip(estimates, verdicts)
        ]

    def generation_settings(self, options: dict[str, Any], *, new: int) -> DiffusionSettings:
        """See :class:`MegatronLM`."""
        settings = generation_settings(options, self.generation)
        self.sampler.check(settings, num_masked=new)
        return settings

    def complete(self, prompts: Sequence[list[int]], *, settings: Any, wanted: Wanted) -> list[Completion]:
        """See :class:`MegatronLM`."""
        return continue_masked(self.sampler, self.tokenizer, prompts, wanted, settings=settings)
