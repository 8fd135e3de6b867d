"""What ``megatron_ar`` and ``megatron_mdm`` share: tokens, groups of answers, generation, cache, progress, ranks.

Requests are spread over data-parallel ranks by lm-eval itself; tensor-parallel peers work on the same requests.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from megatron.config.shape import Shape
from megatron.data.identity import tokenizer_fingerprint
from megatron.errors import UserError
from megatron.evaluation.lm_eval.generation import GeneratingLM
from megatron.evaluation.lm_eval.groups import REFUSED, Group, Refusals, place_of
from megatron.evaluation.requests import ResultCache, encode_request, end_of_document, whole_number
from megatron.evaluation.scorer import Estimate
from megatron.evaluation.summary import EstimateSummary
from megatron.inference.model import InferenceModel, load_model
from megatron.model.arithmetic import total_parameters
from megatron.screen import Progress, say

LOAD_OPTIONS = ("vocab_file", "merge_file", "tokenizer_model", "tokenizer_type")
DEFAULT_BATCH_SIZE = 32


class MegatronLM(GeneratingLM):
    """What the two models share: loading, tokens, groups of answers, cache, progress, ranks.

    Args:
        load: run directory, tag directory or Hugging Face export.
        load_tag: checkpoint to load; default: the newest that verifies.
        load_kind: of the weights: weight (as trained) or ema (their average).
        model: a loaded model instead of ``load``.
        dtype: float32 (default), bfloat16 or float16.
        batch_size: rows per forward pass; "auto" and "auto:N" take the default of 32.
        max_batch_size: rows per forward pass at most.
        seed: of generated texts, where a task does not say (and of the masks of a masked model).
        device: such as "cpu" or "cuda:0"; where there is no such device, the model stays where it was loaded.
        max_length: longest input; default, and at most: the sequence length of training.
        max_gen_toks: tokens to generate where a task does not say.
        cache_dir: keep finished results here and continue from them; default: nothing is kept.
        tokenizer: vocab_file, merge_file, tokenizer_model, tokenizer_type of another tokenizer than the run's.

    Attributes:
        is_drawn: whether likelihoods are estimated from so many draws of noise as ``num_mc`` says.
    """

    is_drawn = False

    def __init__(
        self,
        load: str | None = None,
        *,
        load_tag: str | None = None,
        load_kind: str | None = None,
        model: InferenceModel | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        cache_dir: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        seed: int = 1234,
        **tokenizer: str,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(tokenizer) - set(LOAD_OPTIONS)):
            raise UserError(
                f"model argument {unknown[0]!r} is not known", "see the class docstring", "correct --model_args"
            )
        if model is None:
            if load is None:
                raise UserError("no model was given", "a path is needed", "pass --model_args load=RUN_DIRECTORY")
            model = load_model(load, tag=load_tag, kind=load_kind, dtype=dtype, tokenizer_options=tokenizer or None)
        self.loaded = model
        self.context = model.context
        _move(model, device)
        self.batch_size = rows_of(batch_size, at_most=max_batch_size)
        length = model.max_length if max_length is None else max_length
        self.max_length = min(wanted := whole_number("max_length", length, at_least=2), model.max_length)
        if wanted > model.max_length and self.context.rank == 0:
            say(f"max_length {wanted}: rows have {model.max_length} tokens, as the model was trained with")
        self.max_gen_toks = whole_number("max_gen_toks", max_gen_toks)
        self.seed = whole_number("seed", seed, at_least=0)
        self.tokenizer = model.require_tokenizer()
        self.summary = EstimateSummary()
        self.refusals = Refusals()
        self._rank, self._world_size, self._device = self.context.dp.rank, self.context.dp.size, model.device
        folder = Path(cache_dir) if cache_dir else None
        fingerprint = f"{model.identity} {tokenizer_fingerprint(self.tokenizer)} {self.fingerprint()}"
        self.cache = ResultCache(
            folder, fingerprint=fingerprint, rank=self.context.rank, write=self.context.tp.rank == 0
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """Every setting that changes a result, for the cache."""

    @abstractmethod
    def score_groups(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        """Score the requests of each group (the answers of one question, or one request alone)."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """Context and target tokens that fit into one row."""

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """End of document, also the context of texts that have none."""
        return end_of_document(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's request cache."""
        return self.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; no special tokens are ever added."""
        return self.tokenizer.encode(string)

    # Likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, or bounds on them, and whether greedy decoding gives the continuation."""
        groups: dict[Any, Group] = {}
        results: dict[int, tuple[float, bool]] = {}
        for index, instance in enumerate(requests):
            place = place_of(instance)
            try:
                tokens = encode_request(self.tokenizer, *instance.args[:2])
            except UserError as error:
                self.refusals.add(instance, error)
                results[index] = (REFUSED, False)
                continue
            ranking = getattr(instance, "ranking", None)
            group = groups.setdefault(place, Group(key=f"{place[0]}/{place[1]}", task=place[0], ranking=ranking))
            group.add(index, instance.args[:2], tokens)
        results |= self._run_groups("loglikelihood", list(groups.values()), disable_tqdm=disable_tqdm)
        return self.hand_over("loglikelihood", requests, results)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts after EOD, in windows of the longest input; an empty text has log-likelihood 0."""
        groups = []
        results: dict[int, float] = {}
        for index, instance in enumerate(requests):
            (text,) = instance.args
            try:
                tokens = self.tok_encode(text)
                results[index] = 0.0
                if tokens:
                    place = place_of(instance)
                    group = Group(key=f"{place[0]}/{place[1]}", task=place[0], needs_greedy=False)
                    group.add(index, (text,), ([self.eot_token_id], tokens))
                    groups.append(group)
            except UserError as error:
                self.refusals.add(instance, error)
                results[index] = REFUSED
        scored = self._run_groups("loglikelihood_rolling", groups, disable_tqdm=disable_tqdm)
        results |= {index: value for index, (value, _) in scored.items()}
        return self.hand_over("loglikelihood_rolling", requests, results)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        groups = []
        for index, (strings, context, target) in enumerate(requests):
            group = Group(key=f"tokens/{index}", task="tokens")
            group.add(index, strings, (context, target))
            groups.append(group)
        results = self._run_groups("loglikelihood", groups, disable_tqdm=True)
        return [results[index] for index in range(len(requests))]

    def _run_groups(self, kind: str, groups: list[Group], *, disable_tqdm: bool) -> dict[int, tuple[float, bool]]:
        """Results by request index: from the cache, or scored in chunks that go to the cache at once."""
        results: dict[int, tuple[float, bool]] = {}
        waiting = []
        for group in groups:
            name = self.cache.key(kind, group.key, group.strings, group.needs_greedy, repr(group.ranking))
            stored = self.cache.get(name)
            if stored is None:
                waiting.append((name, group))
            else:
                self._accept(group, [Estimate(**entry) for entry in stored], results)
        # Longest first: an estimate of the time left errs on the long side, and memory runs out at once or never.
        waiting.sort(key=lambda pair: -pair[1].longest)
        with Progress(
            f"{kind} ({self.describe()})", len(groups), unit="questions", start=len(groups) - len(waiting),
            enabled=not disable_tqdm and self.context.rank == 0,
        ) as progress:  # fmt: skip
            for start in range(0, len(waiting), self.chunk_groups):
                chunk = waiting[start : start + self.chunk_groups]
                for (name, group), estimates in zip(chunk, self.score_groups([group for _, group in chunk])):
                    self._accept(group, estimates, results)
                    self.cache.put(name, [estimate.__dict__ for estimate in estimates])
                progress.update(len(chunk))
        return results

    chunk_groups = 64

    def describe(self) -> str:
        """The estimator, for people."""
        return "exact: chain rule"

    def _accept(self, group: Group, estimates: Sequence[Estimate], results: dict[int, tuple[float, bool]]) -> None:
        for indices, estimate in zip(group.indices, estimates):
            results.update(dict.fromkeys(indices, (estimate.value, bool(estimate.is_greedy))))
            self.summary.add(group.task, estimate)

    # Ranks

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of every data-parallel rank, concatenated."""
        values = self._gather(tensor.detach().cpu())
        return torch.stack(values) if tensor.dim() == 0 else torch.cat(values)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The object of every data-parallel rank, on rank ``dst``."""
        values = self._gather(obj)
        for value in values if isinstance(obj, dict) else ():
            for task, metrics in obj.items():
                if isinstance(metrics, dict):  # a rank all of whose items of a task were refused has no metric of it
                    value[task] = {**{name: [] for name in metrics}, **value[task]}
        return values if self.rank == dst else None

    def _gather(self, value: Any) -> list[Any]:
        return self.context.gather_objects(value)[self.context.tp.rank :: self.context.tp.size]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.context.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results besides the scores."""
        parameters = sum(total_parameters(Shape.of(own.config.model))["total"] for own in self.loaded.parts)
        return {
            "model_source": self.loaded.source,
            "model_num_parameters": parameters,
            "model_dtype": str(next(self.loaded.model.parameters()).dtype),
            "likelihood": self.describe(),
            "settings": self.fingerprint(),
        }


def rows_of(batch_size: int | str | None, *, at_most: int | None = None) -> int:
    """Rows per forward pass from lm-eval's batch size, which is a number, "auto" or "auto:N".

    Raises:
        UserError: something else.
    """
    if batch_size is None or str(batch_size).split(":")[0] == "auto":
        rows = DEFAULT_BATCH_SIZE
    else:
        rows = whole_number("batch_size", batch_size)
    return rows if at_most is None else min(rows, whole_number("max_batch_size", at_most))


def _move(model: InferenceModel, device: str | None) -> None:
    """Move the model to another kind of device, as far as there is one: lm-eval asks for CUDA wherever it runs."""
    try:
        wanted = model.device.type if device is None else torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"device {device!r}", "it is a device of torch", 'use "cpu" or "cuda:0"') from error
    if wanted == "cuda" and not torch.cuda.is_available():
        print(f"device {device}: CUDA is not available here; the model runs on {model.device}", flush=True)
    elif wanted != model.device.type:
        model.model.to(device)
