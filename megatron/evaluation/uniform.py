"""Log-likelihoods of target tokens in a context under uniform-state diffusion: a lower bound, by drawn noise.

The context is clean; a draw noises the target twice, the second time at the other positions (``estimators.py`` does the same
with masks), and each pass is worth ``−Σ_i weight · ℓ_i·(1 − α)/(−α')`` over all target positions. The draws of a request are
stratified by the number of noised positions. The noise of draw k is a function of (seed, key, k): requests that share a key,
and a length, share their noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron.evaluation.estimators import noise, stratified_standard_error
from megatron.evaluation.exact import TokenScores
from megatron.evaluation.passes import Passes, undivided
from megatron.evaluation.scorer import Estimate, Request, batches, cut_context
from megatron.inference.logits import LogitsFn
from megatron.inference.model import InferenceModel
from megatron.objectives.base import UniformDecoding
from megatron.objectives.uniform_diffusion import noise_by_count
from megatron.parallel.context import ParallelContext
from megatron.parallel.uniform_bound import divergences
from megatron.randomness import radical_inverse
from megatron.runs.likelihoods import BOUND


class UniformScorer:
    """Bounds by ``num_draws`` antithetic pairs of passes.

    Args:
        logits_fn: bidirectional model; called without gradients.
        vocab_size: tokens V that noise draws from.
        max_length: longest row in tokens; longer requests lose the left end of their context.
        batch_size: rows per forward pass.
        device: of the input ids.
        seed: of the noise.
    """

    name, kind = "uniform-state bound, exact-count, stratified, antithetic", "bound"

    def __init__(
        self,
        logits_fn: LogitsFn,
        *,
        vocab_size: int,
        max_length: int,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        seed: int = 1234,
    ) -> None:
        self.logits_fn = logits_fn
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.on_pass: Callable[[int], None] = lambda rows: None  # progress: rows finished

    @classmethod
    def of(
        cls, loaded: InferenceModel, logits_fn: LogitsFn | None = None, *, batch_size: int = 32, seed: int = 1234
    ) -> UniformScorer:
        """The scorer of a loaded model, perhaps with other logits."""
        decoding = loaded.objective.decoding
        assert isinstance(decoding, UniformDecoding)
        return cls(
            logits_fn or loaded.logits,
            vocab_size=decoding.vocab_size,
            max_length=loaded.max_length,
            batch_size=batch_size,
            device=loaded.device,
            seed=seed,
        )

    def score(self, requests: Sequence[Request], *, num_draws: int) -> list[Estimate]:
        """A bound on the log-likelihood of every target, with its error over the noise."""
        times = [self._times(request, np.arange(num_draws)) for request in requests]
        values = [own.sum(-1) for own in self.token_values(requests, num_draws=num_draws)]
        return [
            Estimate(
                value=float(own.mean()),
                standard_error=stratified_standard_error(own, strata),
                kind=self.kind,
                estimator=self.name,
                num_passes=2 * num_draws,
                num_draws=num_draws,
            )
            for own, strata in zip(values, times)
        ]

    def token_values(self, requests: Sequence[Request], *, num_draws: int) -> list[np.ndarray]:
        """What each target token adds to the bound on the log-likelihood in each draw: float64 [draws, target] a request."""
        cut = [cut_context(request, self.max_length) for request in requests]
        order = sorted(range(len(cut)), key=lambda index: _size(cut[index]), reverse=True)
        passes = [(index, number) for index in order for number in range(2 * num_draws)]
        found = [np.zeros((2 * num_draws, len(request.target))) for request in cut]
        alike = [_size(cut[index]) for index, _ in passes]
        for start, stop in batches([target for _, target in alike], alike=alike, limit=self.batch_size):
            batch = passes[start:stop]
            values = self._forward([cut[index] for index, _ in batch], [number for _, number in batch])
            for (index, number), own in zip(batch, values):
                found[index][number] = own
            self.on_pass(len(batch))
        return [own.reshape(num_draws, 2, -1).mean(1) for own in found]

    @torch.inference_mode()
    def _forward(self, requests: Sequence[Request], numbers: Sequence[int]) -> np.ndarray:
        """Values [rows, target] of passes ``numbers``, one a request; all of one length."""
        context, target = _size(requests[0])
        drawn = [self._noise(request, number) for request, number in zip(requests, numbers)]
        tokens, is_noised, share, weight = (np.stack(column) for column in zip(*drawn))
        labels = np.array([request.target for request in requests])
        noised = np.where(is_noised, tokens, labels)
        prompts = np.array([request.context for request in requests], dtype=np.int64).reshape(len(requests), context)
        input_ids = torch.from_numpy(np.concatenate((prompts, noised), axis=1)).to(self.device)
        positions = torch.zeros_like(input_ids, dtype=torch.bool)
        positions[:, context:] = True
        logits = self.logits_fn(input_ids, positions=positions)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        pairs = torch.from_numpy(np.stack((labels.ravel(), noised.ravel()))).to(self.device)
        odds = torch.from_numpy((self.vocab_size * (1 - share) / share).repeat(target)).to(self.device)
        # Logits are whole, whatever the layout, so the vocabulary is not split here.
        values, _ = divergences(logits, pairs, odds, ParallelContext(), vocab_size=self.vocab_size)
        return -values.double().cpu().numpy().reshape(labels.shape) * weight[:, None]

    def _noise(self, request: Request, number: int) -> tuple[np.ndarray, np.ndarray, float, float]:
        """The noise of pass ``number``, which is half of a draw."""
        draw, is_second = divmod(number, 2)
        t = self._times(request, np.array([draw]))[0] / 2
        return noise_by_count(
            noise(self.seed, request.key, draw),
            1 - t if is_second else t,
            len(request.target),
            vocab_size=self.vocab_size,
            is_second=bool(is_second),
        )

    def _times(self, request: Request, draws: np.ndarray) -> np.ndarray:
        """Times in [0, 1), stratified, of draws by their numbers [draws]: float64 [draws]."""
        offset = float(noise(self.seed, request.key, -1).random())
        return (offset + radical_inverse(draws)) % 1.0


class UniformBound:
    """The same in pairs, as a :class:`megatron.evaluation.witnesses.Witness`."""

    kind = BOUND

    def __init__(self, logits_fn: LogitsFn, loaded: InferenceModel, batch_size: int, *, pairs: int) -> None:
        self.draws, self.name = pairs, f"bound, {2 * pairs} passes"
        self._scorer = UniformScorer.of(loaded, logits_fn, batch_size=batch_size)

    def scores(self, requests: Sequence[Request]) -> list[TokenScores]:
        """What each token adds to the bound."""
        drawn = self._scorer.token_values(requests, num_draws=self.draws)
        return [TokenScores(own.mean(0), np.zeros(own.shape[1], dtype=bool)) for own in drawn]

    def by_pass(self, requests: Sequence[Request]) -> list[Passes]:
        """The mean over all passes, each of which predicts every token."""
        return [undivided(own.logprobs) for own in self.scores(requests)]

    def passes(self, num_tokens: int) -> int:
        """Forward passes for a target."""
        return 2 * self.draws


def _size(request: Request) -> tuple[int, int]:
    return len(request.context), len(request.target)
