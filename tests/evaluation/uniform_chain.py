"""A uniform-state diffusion model of few tokens, enumerated: the bound, and the chain that the ancestral sampler runs."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from megatron.parallel.context import ParallelContext
from megatron.parallel.uniform_bound import divergences

VOCAB, LENGTH = 5, 4
STATES = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))  # [625, 4]


@torch.no_grad()
def predictions(model) -> np.ndarray:
    """log p_θ at every position of every state, fp64 [states, length, vocab]."""
    logits = model(torch.from_numpy(STATES))
    return logits.double().log_softmax(-1).numpy()


def ancestral_distribution(model, steps: int) -> np.ndarray:
    """Probability of every state after ``steps`` ancestral steps from uniform noise, by Bayes' rule, fp64 [states]."""
    probs, law = np.exp(predictions(model)), np.full(len(STATES), 1 / len(STATES))
    same = np.eye(VOCAB)
    for index in range(steps):
        now, later = index / steps, (index + 1) / steps
        stays = now / later
        forward = stays * same + (1 - stays) / VOCAB  # [z_s, z_t]
        clean = later * same + (1 - later) / VOCAB  # [x, z_s]
        prior = probs @ clean  # [states, length, z_s]
        joint = prior * forward[:, STATES].transpose(1, 2, 0)
        each = joint / joint.sum(-1, keepdims=True)
        # Given the state, positions move on their own: Σ law · e₁ ⊗ e₂ ⊗ e₃ ⊗ e₄.
        halves = [(each[:, at, :, None] * each[:, at + 1, None, :]).reshape(len(STATES), -1) for at in (0, 2)]
        law = ((law[:, None] * halves[0]).T @ halves[1]).ravel()
    return law


def density(logprobs: np.ndarray, tokens: np.ndarray, noised: np.ndarray, visible: float) -> np.ndarray:
    """ℓ for α' = −1 of any number of positions: eq. (1) of the module by its terms. ``logprobs`` [n, V] → [n]."""
    size = logprobs.shape[-1]
    truth = size * visible * (np.arange(size) == tokens[:, None]) + 1 - visible
    model = size * visible * np.exp(logprobs) + 1 - visible
    rows = np.arange(len(tokens))
    own, theirs = truth[rows, noised][:, None], model[rows, noised][:, None]
    logs = (truth / own * np.log(theirs * truth / (model * own))).sum(-1)
    return -1 / (size * visible) * (size / own[:, 0] - size / theirs[:, 0] - logs)


def shares(nodes: int = 80, reach: float = 25.0) -> tuple[np.ndarray, np.ndarray]:
    """Visible shares α in (0, 1) and weights of an integral over them: Gauss-Legendre in log α/(1 − α)."""
    at, weight = np.polynomial.legendre.leggauss(nodes)
    alpha = 1 / (1 + np.exp(-reach * at))
    return alpha, weight * reach * alpha * (1 - alpha)


def exact_bounds(model, rows: np.ndarray) -> np.ndarray:
    """The bound on −log p of some rows, enumerated over all noise and integrated over time: [rows, length] by position."""
    shape = (len(rows), *STATES.shape)  # rows, states, positions
    logits = torch.from_numpy(np.broadcast_to(predictions(model), (*shape, VOCAB)).reshape(-1, VOCAB))
    tokens, noised = np.broadcast_to(rows[:, None], shape), np.broadcast_to(STATES, shape)
    pairs = torch.from_numpy(np.stack((tokens.ravel(), noised.ravel())))
    found = np.zeros(rows.shape)
    for visible, weight in zip(*shares()):
        seen = np.where(tokens == noised, visible + (1 - visible) / VOCAB, (1 - visible) / VOCAB).prod(-1)
        odds = torch.full((pairs.shape[1],), VOCAB * visible / (1 - visible), dtype=torch.float64)
        own, _ = divergences(logits.clone(), pairs, odds, ParallelContext(), vocab_size=VOCAB)
        found += weight / (1 - visible) * (seen[..., None] * own.numpy().reshape(shape)).sum(1)
    return found
