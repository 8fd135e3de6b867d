"""Log-likelihoods of target tokens in a context, by masked passes (:class:`MaskedScorer`) or causally.

A score is a function of its own request, the estimator and the seed: rows of one forward pass have the same length
(bidirectional) or are padded where a causal model cannot look (on the right), so batch mates, padding, chunk size and
the number of processes change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from megatron.errors import UserError, require
from megatron.evaluation.estimators import Draws, Estimator, for_length
from megatron.inference.logits import LogitsFn

MAX_SCORED_POSITIONS = 8192  # logits rows at a time: 1.6 GB in fp32 for 50,304 tokens
PAD_ID = 0  # any token: it is never attended


@dataclass(frozen=True)
class Request:
    """``target`` is scored given ``context``; requests with one ``key`` share their noise (common random numbers)."""

    context: tuple[int, ...]
    target: tuple[int, ...]
    key: str = ""


@dataclass(frozen=True)
class Estimate:
    """A log-likelihood in nats, never without what it is.

    Attributes:
        value: log-likelihood of all target tokens, or a lower bound on it, in nats.
        standard_error: of ``value``, over the sampling of masks; 0 when there is none, nan where it is not known (a single
            draw, a race).
        kind: ``exact``, ``bound`` or ``ranking`` (biased by a race; see adaptive.py).
        estimator: name of the estimator.
        num_passes: forward passes (of one row) that were run for it.
        num_draws: draws averaged.
        is_greedy: whether greedy decoding would give the target; None where it was not asked for.
    """

    value: float
    standard_error: float
    kind: str
    estimator: str
    num_passes: int
    num_draws: int = 1
    is_greedy: bool | None = None

    def __str__(self) -> str:
        error = "" if self.standard_error == 0 else f" ± {self.standard_error:.4f} (standard error over masks)"
        return f"{self.value:.4f}{error} nats ({self.kind}: {self.estimator}, {self.num_draws} draws)"


@dataclass
class Tally:
    """Draws of one request so far."""

    request: Request
    estimator: Estimator
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    strata: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_sums: np.ndarray | float = 0.0  # [target] what each token has added to all values
    token_logprobs: dict[bytes, np.ndarray] = field(default_factory=dict)  # packed mask -> log p per target position

    @property
    def num_passes(self) -> int:
        """Distinct passes run: a mask that comes twice is run once."""
        return len(self.token_logprobs)

    def is_complete(self) -> bool:
        """Whether more draws would add nothing."""
        limit = self.estimator.max_draws(len(self.request.target))
        return limit is not None and len(self.values) >= limit

    def standard_error(self) -> float:
        """Standard error of the mean of the draws; 0 when they are all there are."""
        return 0.0 if self.is_complete() else self.estimator.standard_error(self.values, self.strata)

    @property
    def token_values(self) -> np.ndarray:
        """What each target token adds to the mean of the draws, float64 [target]."""
        return np.asarray(self.token_sums / len(self.values))

    def logprobs(self, draws: Draws) -> np.ndarray:
        """log p of the scored tokens in each pass of some of its draws, 0 for others: float64 [draws, passes, target]."""
        scored, found = draws.weights != 0, np.zeros(draws.weights.shape)
        for place in zip(*scored.any(-1).nonzero()):
            found[place] = self.token_logprobs[pass_name(draws.masks[place], scored[place])]
        return found

    def estimate(self) -> Estimate:
        """The estimate from the draws so far."""
        return Estimate(
            value=float(self.values.mean()),
            standard_error=self.standard_error(),
            kind=self.estimator.kind,
            estimator=self.estimator.name,
            num_passes=self.num_passes,
            num_draws=len(self.values),
        )


class MaskedScorer:
    """Runs estimators on a masked diffusion model.

    Args:
        logits_fn: bidirectional model; called without gradients.
        mask_id: id of the mask token.
        max_length: longest row in tokens; longer requests lose the left end of their context.
        batch_size: rows per forward pass.
        device: of the input ids.
        chunk_size: requests planned at a time (bounds memory; changes no score).
    """

    def __init__(
        self,
        logits_fn: LogitsFn,
        *,
        mask_id: int,
        max_length: int,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        chunk_size: int = 256,
    ) -> None:
        self.logits_fn = logits_fn
        self.mask_id = mask_id
        self.max_length = max_length
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.chunk_size = chunk_size
        self.on_pass: Callable[[int], None] = lambda rows: None  # progress: rows finished

    def score(self, requests: Sequence[Request], estimator: Estimator, *, num_draws: int) -> list[Estimate]:
        """Estimate every request with ``num_draws`` draws (fewer where fewer say all)."""
        return [estimate for chunk in self.score_chunks(requests, estimator, num_draws=num_draws) for estimate in chunk]

    def score_chunks(
        self, requests: Sequence[Request], estimator: Estimator, *, num_draws: int
    ) -> Iterator[list[Estimate]]:
        """The same, ``chunk_size`` requests at a time."""
        for start in range(0, len(requests), self.chunk_size):
            tallies = [
                self.tally(request, estimator, num_draws=num_draws)
                for request in requests[start : start + self.chunk_size]
            ]
            self.extend(tallies, num_draws=num_draws)
            yield [tally.estimate() for tally in tallies]

    def tally(self, request: Request, estimator: Estimator, *, num_draws: int) -> Tally:
        """An empty tally of the request, cut to ``max_length``; short targets enumerate all masks (see for_length)."""
        cut = cut_context(request, self.max_length)
        return Tally(cut, self.estimator_for(cut, estimator, num_draws=num_draws))

    def estimator_for(self, request: Request, estimator: Estimator, *, num_draws: int) -> Estimator:
        """What estimates this request."""
        return for_length(estimator, len(request.target), num_draws=num_draws)

    def masked_logits(self, input_ids: torch.Tensor, clean: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [selected, vocab] of ``input_ids``, the tokens ``clean`` [batch, seq] with some of them masked."""
        return self.logits_fn(input_ids, positions=positions)

    def open_positions(self, masked: torch.Tensor) -> torch.Tensor:
        """Which of the ``masked`` tokens [batch, seq] decoding may uncover next."""
        return masked

    def extend(self, tallies: Sequence[Tally], *, num_draws: int) -> None:
        """Run draws until every tally has ``num_draws`` of them (or all that its estimator has)."""
        planned: list[tuple[Tally, Draws]] = []
        for tally in tallies:
            limit = tally.estimator.max_draws(len(tally.request.target))
            count = (num_draws if limit is None else min(num_draws, limit)) - len(tally.values)
            if count > 0:
                request = tally.request
                draws = tally.estimator.draws(
                    len(request.target), key=request.key, start=len(tally.values), count=count
                )
                planned.append((tally, draws))
        self._run_passes(planned)
        for tally, draws in planned:
            shares = (draws.weights * tally.logprobs(draws)).sum(1)  # eq. (1) of estimators.py, what each token adds
            tally.values = np.concatenate([tally.values, shares.sum(-1)])
            tally.token_sums = tally.token_sums + shares.sum(0)
            tally.strata = np.concatenate([tally.strata, draws.strata])

    def _run_passes(self, planned: Iterable[tuple[Tally, Draws]]) -> None:
        rows: list[tuple[Tally, np.ndarray, bytes]] = []
        for tally, draws in planned:
            scored = draws.weights != 0
            for mask, wanted in zip(
                draws.masks.reshape(-1, draws.masks.shape[-1]), scored.reshape(-1, scored.shape[-1])
            ):
                name = pass_name(mask, wanted)
                if wanted.any() and name not in tally.token_logprobs:
                    tally.token_logprobs[name] = np.zeros(len(mask))  # filled below
                    rows.append((tally, np.stack([mask, wanted]), name))
        rows.sort(key=lambda row: len(row[0].request.context) + len(row[0].request.target), reverse=True)
        lengths = [len(tally.request.context) + len(tally.request.target) for tally, _, _ in rows]
        for start, stop in batches([int(own[1].sum()) for _, own, _ in rows], alike=lengths, limit=self.batch_size):
            self._forward(rows[start:stop])
            self.on_pass(stop - start)

    @torch.inference_mode()
    def _forward(self, batch: list[tuple[Tally, np.ndarray, bytes]]) -> None:
        tokens = np.array([[*tally.request.context, *tally.request.target] for tally, _, _ in batch])
        masked, wanted = (np.zeros(tokens.shape, dtype=bool) for _ in range(2))
        for row, (tally, (mask, scored), _) in enumerate(batch):
            masked[row, len(tally.request.context) :] = mask
            wanted[row, len(tally.request.context) :] = scored
        clean, hidden, positions = (torch.from_numpy(part).to(self.device) for part in (tokens, masked, wanted))
        logits = self.masked_logits(clean.masked_fill(hidden, self.mask_id), clean, positions)
        logprobs = target_logprobs(logits, clean[positions])
        rows, columns = wanted.nonzero()
        for row, column, logprob in zip(rows.tolist(), columns.tolist(), logprobs.tolist()):
            tally, _, name = batch[row]
            tally.token_logprobs[name][column - len(tally.request.context)] = logprob

    @torch.inference_mode()
    def is_greedy(self, requests: Sequence[Request], *, left_to_right: bool = False) -> list[bool]:
        """Whether greedy decoding, one token a pass, gives the target: the most confident position first (as LLaDA's
        evaluation asks), or from left to right.

        A request drops out at its first wrong token, so wrong answers cost a pass or two.
        """
        states = []
        for index, request in enumerate(requests):
            context = cut_context(request, self.max_length).context
            masks = [self.mask_id] * len(request.target)
            states.append(_Greedy(index, [*context, *masks], request.target, len(context)))
        verdicts = [False] * len(states)
        active = states
        while active:
            active.sort(key=lambda state: len(state.tokens), reverse=True)
            lengths, targets = ([len(part) for part in parts] for parts in zip(*((s.tokens, s.target) for s in active)))
            for start, stop in batches(targets, alike=lengths, limit=self.batch_size):
                self._greedy_step(active[start:stop], left_to_right=left_to_right)
            for state in active:
                verdicts[state.index] = state.is_right
            active = [state for state in active if state.is_right and self.mask_id in state.tokens[state.start :]]
        return verdicts

    def _greedy_step(self, states: list[_Greedy], *, left_to_right: bool) -> None:
        input_ids = torch.tensor([state.tokens for state in states], device=self.device)
        positions = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, state in enumerate(states):
            positions[row, state.start :] = input_ids[row, state.start :] == self.mask_id
        positions = self.open_positions(positions)
        logits = self.logits_fn(input_ids, positions=positions).float()
        logits[:, self.mask_id] = -torch.inf  # decoding never gives the mask token
        confidence, best = torch.log_softmax(logits, -1).max(-1)
        counts = positions.sum(-1).tolist()
        self.on_pass(len(states))
        parts = zip(states, confidence.split(counts), best.split(counts), positions)
        for state, own_confidence, own_best, own_positions in parts:
            pick = 0 if left_to_right else int(own_confidence.argmax())
            position = int(own_positions.nonzero()[pick])
            state.tokens[position] = int(own_best[pick])
            state.is_right = state.tokens[position] == state.target[position - state.start]


@dataclass
class _Greedy:
    index: int
    tokens: list[int]
    target: tuple[int, ...]
    start: int
    is_right: bool = True


class CausalScorer:
    """Exact log-likelihoods of an autoregressive model, inputs cut as lm-eval's ``hf`` model cuts them.

    Args:
        logits_fn: causal model.
        max_length: longest input in tokens (the last target token is never an input).
        batch_size: rows per forward pass.
        device: of the input ids.
    """

    name = "chain rule"
    kind = "exact"

    def __init__(
        self,
        logits_fn: LogitsFn,
        *,
        max_length: int,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.logits_fn = logits_fn
        self.max_length = max_length
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.on_pass: Callable[[int], None] = lambda rows: None

    def score(self, requests: Sequence[Request]) -> list[Estimate]:
        """Log-likelihood of every target and whether it is what greedy decoding gives."""
        return [
            Estimate(float(own.sum()), 0.0, self.kind, self.name, 1, is_greedy=bool(is_best.all()))
            for own, is_best in self._score(requests)
        ]

    def token_logprobs(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """log p of each target token, float64 [target] a request."""
        return [own.cpu().numpy() for own, _ in self._score(requests)]

    def _score(self, requests: Sequence[Request]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """log p of each target token and whether it is the most likely one, by request."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context) - len(requests[i].target))
        results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        targets = [len(requests[index].target) for index in order]
        for start, stop in batches(targets, limit=self.batch_size):
            indices = order[start:stop]
            results.update(zip(indices, self._forward([requests[index] for index in indices])))
            self.on_pass(len(indices))
        return [results[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Request]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = [_causal_row(request, self.max_length) for request in batch]
        input_ids = torch.full((len(rows), max(map(len, rows)) - 1), PAD_ID, dtype=torch.int64)
        positions = torch.zeros_like(input_ids, dtype=torch.bool)
        labels: list[int] = []
        for index, (row, request) in enumerate(zip(rows, batch)):
            input_ids[index, : len(row) - 1] = torch.tensor(row[:-1])
            positions[index, len(row) - 1 - len(request.target) : len(row) - 1] = True
            labels.extend(request.target)
        targets = torch.tensor(labels, device=self.device)
        logits = self.logits_fn(input_ids.to(self.device), positions=positions.to(self.device))
        logprobs = target_logprobs(logits, targets)
        is_best = logits.argmax(-1) == targets
        counts = [len(request.target) for request in batch]
        return list(zip(logprobs.split(counts), is_best.split(counts)))


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of ``targets`` [n] under ``logits`` [n, vocab]: fp32 softmax, returned as [n] float64."""
    logits = logits.float()
    return (logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)).double()


def _causal_row(request: Request, max_length: int) -> tuple[int, ...]:
    if not request.context or not request.target or len(request.target) > max_length:
        raise UserError(
            f"a request has {len(request.context)} context and {len(request.target)} target tokens",
            f"a causal score needs at least one of each and at most {max_length} targets",
            "use EOD as context and windows() for long targets",
        )
    return (request.context + request.target)[-(max_length + 1) :]


def pass_name(masked: np.ndarray, scored: np.ndarray) -> bytes:
    """Both, bool [target], in few bytes."""
    return np.packbits(np.stack([masked, scored])).tobytes()


def cut_context(request: Request, max_length: int) -> Request:
    """The request with what fits of its context, the right end; a target that is empty, or does not fit itself, is refused."""
    require(
        0 < len(request.target) <= max_length,
        f"a target of {len(request.target)} tokens",
        f"it has 1 to {max_length}",
        "score it in windows (windows() in megatron/evaluation/requests.py does)",
    )
    return replace(request, context=request.context[max(len(request.context) + len(request.target) - max_length, 0) :])


def batches(scored: Sequence[int], *, limit: int, alike: Sequence[object] | None = None) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of rows that share a forward pass, so that its logits fit into memory.

    Args:
        scored: positions of each row whose logits are wanted; a pass has at most MAX_SCORED_POSITIONS, or one row.
        limit: rows of a pass at most.
        alike: what the rows of a pass must have in common, such as their length; None: nothing.
    """
    start = total = 0
    for index, own in enumerate(scored):
        is_full = index - start >= limit or total + own > MAX_SCORED_POSITIONS
        if index > start and (is_full or (alike is not None and alike[index] != alike[start])):
            yield start, index
            start, total = index, 0
        total += own
    if scored:
        yield start, len(scored)
