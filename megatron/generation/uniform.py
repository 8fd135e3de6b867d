"""Sampling from a uniform-state diffusion model: rows of random tokens become text, each of whose tokens may change again.

Time t falls from 1 to 0 in equal steps, the visible share α = 1 − t rises. ``ancestral`` draws every step from the reverse
process of the noise with the model's prediction p_θ in the place of the token (Austin et al., arXiv 2107.03006, equation 3;
Sahoo et al., arXiv 2506.10892): from t to s < t, with β = α_t/α_s,

    p(z_s = j | z_t) ∝ [β·1(j = z_t) + (1 − β)/V] · [α_s·p_θ(j) + (1 − α_s)/V]                                             (1)

independently over positions; its likelihood is what the training loss bounds. ``greedy`` (temperature 0) predicts all
positions in every step and lets the surest α_s of them hold their likeliest tokens; the others hold the noise that they began
with, and none is final before the last step. Given tokens may stand anywhere, and are never noised and never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron.errors import require
from megatron.generation.diffusion import DiffusionSettings, Step, StopFn
from megatron.generation.flags import KNOWN
from megatron.generation.policies import first_ranked, known_ranks, sureness
from megatron.generation.sampling import drawn_from, row_uniforms
from megatron.inference.logits import LogitsFn


class UniformSampler:
    """Fills rows of equal length; the interface of :class:`megatron.generation.diffusion.DiffusionSampler`.

    Args:
        logits_fn: bidirectional model.
        vocab_size: tokens V that noise draws from; no other is ever drawn.
        device: of the token ids.

    Attributes:
        mask_id: stands in rows where a token is wanted; the model never sees it.
    """

    mask_id = -1

    def __init__(self, logits_fn: LogitsFn, *, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.logits_fn = logits_fn
        self.vocab_size = vocab_size
        self.device = torch.device(device)

    def check(self, settings: DiffusionSettings, *, num_masked: int) -> None:
        """See :func:`check_settings`."""
        check_settings(settings)

    @torch.inference_mode()
    def fill(
        self,
        rows: Sequence[Sequence[int]],
        *,
        settings: DiffusionSettings,
        stop: StopFn | None = None,
        on_step: Callable[[Step], None] | None = None,
        sample_numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Put a token wherever ``mask_id`` stands in ``rows`` (equal lengths).

        Args:
            rows: token ids.
            settings: order (``ancestral``, or what a greedy step ranks by), steps, sampling; temperature above 0 is ancestral.
            stop: not asked: no token is final before the last step.
            on_step: called after every step with what changed in it.
            sample_numbers: random stream of each row; default 0, 1, 2, ...

        Raises:
            UserError: settings of masked diffusion alone.
        """
        is_ancestral = check_settings(settings)
        tokens = torch.tensor([list(row) for row in rows], device=self.device)
        wanted = tokens == self.mask_id
        numbers = range(len(rows)) if sample_numbers is None else sample_numbers
        streams = settings.sampling.generators(numbers, self.device)
        # A number per position of the row, wanted or not: so a row draws the same beside any other.
        noise = (_uniforms(streams, tokens) * self.vocab_size).long().clamp(max=self.vocab_size - 1)
        tokens = torch.where(wanted, noise, tokens)
        own = numbers if settings.order_number is None else [settings.order_number] * len(rows)
        places = _uniforms(settings.sampling.generators(own, self.device, purpose="order"), tokens)
        steps = num_steps(settings, int(wanted.sum(-1).max()))
        for index in range(steps):
            before, visible = tokens, ((index / steps), (index + 1) / steps)
            if is_ancestral:
                tokens = self._draw(before, wanted, visible, settings, _uniforms(streams, tokens))
            else:
                tokens = self._settle(before, wanted, visible[1], settings, noise, places)
            if on_step is not None:
                on_step(Step(index, tokens, wanted & ((tokens != before) | (index == 0))))
        return tokens.tolist()

    def _draw(
        self,
        tokens: torch.Tensor,
        wanted: torch.Tensor,
        visible: tuple[float, float],
        settings: DiffusionSettings,
        uniforms: torch.Tensor,
    ) -> torch.Tensor:
        """One ancestral step, eq. (1)."""
        probs = drawn_from(self._logits(tokens, wanted), settings.sampling).softmax(-1)
        reverse = reverse_probs(probs, tokens[wanted], visible).cumsum(-1)
        found = torch.searchsorted(reverse, uniforms[wanted][:, None] * reverse[:, -1:], right=True).squeeze(-1)
        drawn = tokens.clone()
        drawn[wanted] = found.clamp(max=self.vocab_size - 1)
        return drawn

    def _settle(
        self,
        tokens: torch.Tensor,
        wanted: torch.Tensor,
        visible: float,
        settings: DiffusionSettings,
        noise: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """One greedy step; ``places``: [batch, seq] numbers of the random order."""
        logits = self._logits(tokens, wanted)
        if settings.order in KNOWN:
            ranks = known_ranks(settings.order, places)
        else:
            ranks = torch.zeros(tokens.shape, dtype=torch.float64, device=self.device)
            ranks[wanted] = sureness(settings.order, logits)
        best = tokens.clone()
        best[wanted] = logits.argmax(-1)
        counts = (wanted.sum(-1) * visible).ceil().long()
        return torch.where(wanted & ~first_ranked(ranks, wanted, counts), noise, best)

    def _logits(self, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Logits [wanted, V]."""
        return self.logits_fn(tokens, positions=wanted)[:, : self.vocab_size]


def reverse_probs(probs: torch.Tensor, tokens: torch.Tensor, visible: tuple[float, float]) -> torch.Tensor:
    """Eq. (1), not normalised.

    Args:
        probs: [n, V] p_θ.
        tokens: [n] z_t.
        visible: α_t and α_s, α_t < α_s.
    """
    now, later = visible
    stays, size = now / later, probs.shape[-1]
    found = probs * later + (1 - later) / size
    here = tokens[:, None]
    return (found * ((1 - stays) / size)).scatter_add(-1, here, found.gather(-1, here) * stays)


def num_steps(settings: DiffusionSettings, wanted: int) -> int:
    """Forward passes for rows in which ``wanted`` tokens are asked for."""
    return settings.steps or -(-wanted // (settings.tokens_per_step or 1))


def check_settings(settings: DiffusionSettings) -> bool:
    """Whether they ask for the ancestral sampler.

    Raises:
        UserError: they ask for what only masked diffusion has.
    """
    is_drawn, order = settings.sampling.temperature > 0, settings.order
    rule = "a uniform-state model may change every token until the last step"
    for name in ("block_length", "guidance"):
        value = getattr(settings, name)
        require(not value, f"{name} {value}", rule, "leave it out, or load a masked diffusion model")
    require(
        order in ("ancestral", "confidence") or not is_drawn,
        f"order {order} with temperature {settings.sampling.temperature:g}",
        f"{rule}, and what it draws is ancestral",
        "use temperature 0 or order ancestral",
    )
    return is_drawn or order == "ancestral"


def _uniforms(streams: Sequence[torch.Generator], tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([row_uniforms(stream, tokens.shape[1]) for stream in streams])
