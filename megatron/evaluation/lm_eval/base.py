"""What ``megatron_ar`` and ``megatron_mdm`` share: tokens, groups of answers, cache, progress, ranks.

Requests are spread over data-parallel ranks by lm-eval itself; tensor-parallel peers work on the same requests.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from megatron.errors import UserError
from megatron.evaluation.requests import ResultCache, encode_pair
from megatron.evaluation.scorer import Estimate
from megatron.evaluation.summary import EstimateSummary
from megatron.generation.text import Completion
from megatron.inference.model import InferenceModel, load_model
from megatron.model.arithmetic import total_parameters

LOAD_OPTIONS = ("vocab_file", "merge_file", "tokenizer_model", "tokenizer_type")


class MegatronLM(TemplateLM):
    """What the two models share: loading, tokens, groups of answers, cache, progress, ranks.

    Args:
        load: run directory, tag directory or Hugging Face export.
        load_tag: checkpoint to load; default: the newest that verifies.
        model: a loaded model instead of ``load``.
        dtype: float32 (default), bfloat16 or float16.
        batch_size: rows per forward pass.
        max_length: longest input; default: the sequence length of training.
        max_gen_toks: tokens to generate where a task does not say.
        cache_dir: keep finished results here and continue from them; default: nothing is kept.
        tokenizer: vocab_file, merge_file, tokenizer_model, tokenizer_type of another tokenizer than the run's.
    """

    def __init__(
        self,
        load: str | None = None,
        *,
        load_tag: str | None = None,
        model: InferenceModel | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        cache_dir: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
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
            model = load_model(load, tag=load_tag, dtype=dtype, tokenizer_options=tokenizer or None)
        if device is not None and torch.device(device).type != model.device.type:
            model.model.to(device)
        self.loaded = model
        self.context = model.context
        self.batch_size = int(batch_size) if batch_size not in (None, "auto") else 32  # type: ignore[arg-type]
        self.max_length = min(max_length or model.max_length, model.max_length)
        self.max_gen_toks = max_gen_toks
        self.tokenizer = model.require_tokenizer()
        self.summary = EstimateSummary()
        self._rank, self._world_size, self._device = self.context.dp_rank, self.context.dp_size, model.device
        folder = Path(cache_dir) if cache_dir else None
        fingerprint = f"{model.identity} {self.fingerprint()}"
        self.cache = ResultCache(
            folder, fingerprint=fingerprint, rank=self.context.rank, write=self.context.tp_rank == 0
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """Every setting that changes a result, for the cache."""

    @abstractmethod
    def score_groups(self, groups: Sequence[Group]) -> list[list[Estimate]]:
        """Score the requests of each group (the answers of one question, or one request alone)."""

    @abstractmethod
    def complete(
        self, prompts: Sequence[list[int]], *, options: dict[str, Any], until: list[str], new: int
    ) -> list[Completion]:
        """Continue token prompts by up to ``new`` tokens."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """Context and target tokens that fit into one row."""

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """End of document, also the context of texts that have none."""
        if self.tokenizer.eod_id is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name} has no end-of-document token",
                "a text without context is scored after it",
                "use the tokenizer of the training data",
            )
        return self.tokenizer.eod_id

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
        for index, instance in enumerate(requests):
            context, continuation = instance.args[0], instance.args[1]
            place = (instance.task_name, instance.doc_id) if instance.doc_id is not None else ("text", context)
            group = groups.setdefault(place, Group(key=f"{place[0]}/{place[1]}"))
            group.add(index, instance.args[:2], self._encode(context, continuation))
        results = self._run_groups("loglikelihood", list(groups.values()), disable_tqdm=disable_tqdm)
        for index, instance in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", instance.args, results[index])
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts after EOD, in windows of the longest input."""
        groups = []
        for index, instance in enumerate(requests):
            (text,) = instance.args
            group = Group(key=f"{instance.task_name}/{instance.doc_id}", needs_greedy=False)
            group.add(index, (text,), ([self.eot_token_id], self.tok_encode(text)))
            groups.append(group)
        results = self._run_groups("loglikelihood_rolling", groups, disable_tqdm=disable_tqdm)
        for index, instance in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, results[index][0])
        return [results[index][0] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        groups = []
        for index, (strings, context, target) in enumerate(requests):
            group = Group(key=f"tokens/{index}")
            group.add(index, strings, (context, target))
            groups.append(group)
        results = self._run_groups("loglikelihood", groups, disable_tqdm=True)
        return [results[index] for index in range(len(requests))]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return encode_pair(self.tok_encode, context, continuation)
        target = self.tok_encode(continuation)
        if target and target[0] == self.eot_token_id and len(target) > 1:
            return target[:1], target[1:]
        return [self.eot_token_id], target

    def _run_groups(self, kind: str, groups: list[Group], *, disable_tqdm: bool) -> dict[int, tuple[float, bool]]:
        """Results by request index: from the cache, or scored in chunks that go to the cache at once."""
        results: dict[int, tuple[float, bool]] = {}
        waiting = []
        for group in groups:
            name = self.cache.key(kind, group.key, group.strings, group.needs_greedy)
            stored = self.cache.get(name)
            if stored is None:
                waiting.append((name, group))
            else:
                self._accept(group, [Estimate(**entry) for entry in stored], results)
        # Longest first: an estimate of the time left errs on the long side, and memory runs out at once or never.
        waiting.sort(key=lambda pair: -pair[1].longest)
        progress = tqdm(
            total=len(groups), initial=len(groups) - len(waiting), desc=f"{kind} ({self.describe()})", unit="question",
            disable=disable_tqdm or self.context.rank != 0,
        )  # fmt: skip
        for start in range(0, len(waiting), self.chunk_groups):
            chunk = waiting[start : start + self.chunk_groups]
            for (name, group), estimates in zip(chunk, self.score_groups([group for _, group in chunk])):
                self._accept(group, estimates, results)
                self.cache.put(name, [estimate.__dict__ for estimate in estimates])
            progress.update(len(chunk))
        progress.close()
        return results

    chunk_groups = 64

    def describe(self) -> str:
        """The estimator, for people."""
        return "exact: chain rule"

    def _accept(self, group: Group, estimates: Sequence[Estimate], results: dict[int, tuple[float, bool]]) -> None:
        for indices, estimate in zip(group.indices, estimates):
            results.update(dict.fromkeys(indices, (estimate.value, bool(estimate.is_greedy))))
            self.summary.add(group.task, estimate)

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of prompts up to a stop string."""
        results: dict[int, str] = {}
        by_options: dict[str, list[int]] = {}
        for index, instance in enumerate(requests):
            stored = self.cache.get(self.cache.key("generate_until", *instance.args))
            if stored is not None:
                results[index] = stored
            else:
                by_options.setdefault(repr(sorted(instance.args[1].items())), []).append(index)
        progress = tqdm(
            total=len(requests),
            initial=len(results),
            desc="generate_until",
            disable=disable_tqdm or self.context.rank != 0,
        )
        for indices in by_options.values():
            indices.sort(key=lambda index: -len(requests[index].args[0]))
            for start in range(0, len(indices), self.batch_size):
                chunk = indices[start : start + self.batch_size]
                texts = self._generate([requests[index].args[0] for index in chunk], requests[chunk[0]].args[1])
                for index, text in zip(chunk, texts):
                    results[index] = text
                    self.cache.put(self.cache.key("generate_until", *requests[index].args), text)
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                progress.update(len(chunk))
        progress.close()
        return [results[index] for index in range(len(requests))]

    def _generate(self, prompts: list[str], arguments: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        new = int(options.pop("max_gen_toks"))
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"a task generates {new} tokens",
                f"prompt and continuation share {self.max_length} positions",
                "lower max_gen_toks with --gen_kwargs max_gen_toks=N",
            )
        tokens = [(self.tok_encode(prompt) or [self.eot_token_id])[-room:] for prompt in prompts]
        return [completion.text for completion in self.complete(tokens, options=options, until=until, new=new)]

    # Ranks

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of every data-parallel rank, concatenated."""
        values = self._gather(tensor.detach().cpu())
        return torch.stack(values) if tensor.dim() == 0 else torch.cat(values)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The object of every data-parallel rank, on rank ``dst``."""
        values = self._gather(obj)
        return values if self.rank == dst else None

    def _gather(self, value: Any) -> list[Any]:
        return self.context.gather_objects(value)[self.context.tp_rank :: self.context.tp_size]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.context.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results besides the scores."""
        parameters = total_parameters(self.loaded.config.model)["total"]
        return {
            "model_source": self.loaded.source,
            "model_num_parameters": parameters,
            "model_dtype": str(next(self.loaded.model.parameters()).dtype),
            "likelihood": self.describe(),
            "settings": self.fingerprint(),
        }


class Group:
    """Requests that are scored together: the answers of one question."""

    def __init__(self, *, key: str, needs_greedy: bool | None = None) -> None:
        self.key = key
        self.task = key.rsplit("/", 1)[0]
        self.indices: list[list[int]] = []  # request numbers of each different answer
        self.strings: list[tuple[str, ...]] = []
        self.tokens: list[tuple[list[int], list[int]]] = []
        self._needs_greedy = needs_greedy

    def add(self, index: int, strings: Sequence[str], tokens: tuple[list[int], list[int]]) -> None:
        """Add request number ``index``: its texts and its (context, target) ids.

        An answer that is there already is scored once: lm-eval repeats requests to give all ranks as many, and two equal
        answers would race for ever.
        """
        if tuple(strings) in self.strings:
            self.indices[self.strings.index(tuple(strings))].append(index)
            return
        self.indices.append([index])
        self.strings.append(tuple(strings))
        self.tokens.append(tokens)

    @property
    def needs_greedy(self) -> bool:
        """Multiple choice ranks likelihoods; only a lone answer is asked whether it would be generated."""
        return len(self.indices) == 1 if self._needs_greedy is None else self._needs_greedy

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(len(context) + len(target) for context, target in self.tokens)
