"""Generation tasks of lm-eval: each request with its own arguments and random stream, batches of those that agree."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from megatron.config.usage import suggestion
from megatron.errors import UserError, require
from megatron.evaluation.lm_eval.groups import Refusals, stream_names, stream_number
from megatron.evaluation.requests import ResultCache, as_whole, whole_number
from megatron.generation.diffusion import DiffusionSettings
from megatron.generation.sampling import TokenSampling
from megatron.generation.text import Completion, Wanted
from megatron.parallel.context import ParallelContext
from megatron.screen import Progress

GENERATION = ("order", "steps", "block_length", "guidance")
SAMPLING = ("temperature", "top_k", "top_p", "do_sample", "seed")
LENGTH = (
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # lm-eval's names of one number


@dataclass(frozen=True)
class Generation:
    """One text to generate.

    Attributes:
        index: number of the request.
        name: of its result in the cache.
        tokens: the prompt, cut to leave room.
        stream: number of its random stream.
        how: settings, stop strings and number of new tokens; requests that agree in them share batches.
    """

    index: int
    name: str
    tokens: list[int]
    stream: int
    how: tuple[Hashable, tuple[str, ...], int]


class GeneratingLM(TemplateLM):
    """The part of :class:`megatron.evaluation.lm_eval.base.MegatronLM`, which sets the attributes, that generates text."""

    cache: ResultCache
    refusals: Refusals
    context: ParallelContext
    batch_size: int
    max_length: int
    max_gen_toks: int
    seed: int
    heeded: tuple[str, ...] = (*LENGTH, *SAMPLING)  # generation arguments

    def require_heeded(self, arguments: dict[str, Any]) -> None:
        """Check arguments that a person gave; those of a task may be meant for other models.

        Raises:
            UserError: one that generation here does not know.
        """
        idle = [name for name in arguments if name not in self.heeded]
        require(
            not idle,
            f"generation argument {(idle or [''])[0]!r}",
            f"this model heeds {', '.join(self.heeded)}",
            suggestion((idle or [""])[0], self.heeded) or "drop it from --gen_kwargs",
        )

    @abstractmethod
    def generation_settings(self, options: dict[str, Any], *, new: int) -> Hashable:
        """lm-eval's generation arguments as settings of the sampler.

        Raises:
            UserError: an argument that is out of range.
        """

    @abstractmethod
    def complete(self, prompts: Sequence[list[int]], *, settings: Any, wanted: Wanted) -> list[Completion]:
        """Continue token prompts, each with its own random stream."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of prompts up to a stop string; every repeat of a request has its own random stream."""
        results: dict[int, str] = {}
        batches: dict[tuple[Hashable, tuple[str, ...], int], list[Generation]] = {}
        for index, (instance, stream) in enumerate(zip(requests, stream_names(requests))):
            try:
                generation = self._generation(index, instance, stream)
            except UserError as error:
                self.refusals.add(instance, error)
                results[index] = ""
                continue
            stored = self.cache.get(generation.name)
            if stored is None:
                batches.setdefault(generation.how, []).append(generation)
            else:
                results[index] = stored
        progress = Progress(
            "generate_until", len(requests), unit="texts", start=len(results),
            enabled=not disable_tqdm and self.context.rank == 0,
        )  # fmt: skip
        for (settings, until, new), waiting in batches.items():
            waiting.sort(key=lambda generation: -len(generation.tokens))
            for start in range(0, len(waiting), self.batch_size):
                chunk = waiting[start : start + self.batch_size]
                wanted = Wanted(new, until, self.batch_size, [own.stream for own in chunk])
                completions = self.complete([own.tokens for own in chunk], settings=settings, wanted=wanted)
                for own, completion in zip(chunk, completions):
                    results[own.index] = completion.text
                    self.cache.put(own.name, completion.text)
                progress.update(len(chunk))
        progress.close()
        return self.hand_over("generate_until", requests, results)

    def _generation(self, index: int, instance: Instance, stream: str) -> Generation:
        prompt, arguments = instance.args[:2]
        settings, until, new = self.read_generation_arguments(arguments)
        room = self.max_length - new
        require(
            room >= 1,
            f"a task generates {new} tokens",
            f"prompt and continuation share {self.max_length} positions",
            "lower max_gen_toks with --gen_kwargs max_gen_toks=N",
        )
        tokens = (self.tok_encode(prompt) or [self.eot_token_id])[-room:]
        name = self.cache.key("generate_until", prompt, repr((settings, until, new)), stream)
        return Generation(index, name, tokens, stream_number(stream), (settings, until, new))

    def read_generation_arguments(self, arguments: dict[str, Any]) -> tuple[Hashable, tuple[str, ...], int]:
        """Settings of the sampler, stop strings and number of new tokens.

        Raises:
            UserError: an argument of a wrong kind or out of range.
        """
        try:
            options: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
            until = tuple(map(str, handle_stop_sequences(options.pop("until", None), eos=None)))
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"generation arguments {arguments} ({error})", "they are numbers and texts", "correct --gen_kwargs"
            ) from error
        new = whole_number("max_gen_toks", options.pop("max_gen_toks"))
        return self.generation_settings({"seed": self.seed, **options}, new=new), until, new

    def hand_over(self, kind: str, requests: list[Instance], results: dict[int, Any]) -> list[Any]:
        """Results in the order of the requests; lm-eval's cache hears of those that were not refused."""
        for index, instance in enumerate(requests):
            if not hasattr(instance, "refused"):
                self.cache_hook.add_partial(kind, instance.args, results[index])
        return [results[index] for index in range(len(requests))]


def generation_settings(options: dict[str, Any], defaults: Mapping[str, Any]) -> DiffusionSettings:
    """lm-eval's generation arguments as settings of a diffusion sampler.

    Args:
        options: the arguments.
        defaults: order, steps, block_length and guidance where they are silent.

    Raises:
        UserError: an argument that is no number or out of range.
    """
    own = {**defaults, **{name: value for name, value in options.items() if name in GENERATION}}
    return DiffusionSettings(
        order=str(own["order"]), steps=_number(own, "steps", as_whole, None),
        block_length=_number(own, "block_length", as_whole, None), guidance=_number(own, "guidance", float, 0.0),
        sampling=token_sampling(options),
    )  # fmt: skip


def token_sampling(options: dict[str, Any]) -> TokenSampling:
    """lm-eval's generation arguments as settings.

    Raises:
        UserError: an argument that is no number or out of range.
    """
    return TokenSampling(
        temperature=_number(options, "temperature", float, 0.0) if options.get("do_sample", True) else 0.0,
        top_k=_number(options, "top_k", as_whole, 0),
        top_p=_number(options, "top_p", float, 1.0),
        seed=_number(options, "seed", as_whole, 1234),
    )


def _number(options: dict[str, Any], name: str, kind: Callable[[Any], Any], default: Any) -> Any:
    value = options.get(name)
    try:
        return default if value is None else kind(value)
    except (ValueError, TypeError, OverflowError):
        rule = "it is a whole number" if kind is as_whole else "it is a number"
        raise UserError(f"{name} {value!r}", rule, "correct --gen_kwargs") from None
