"""Counter-based random numbers: noise is a function of (seed, stream, index) and of nothing else.

So it is the same on every tensor- and pipeline-parallel rank, different for every sample, and the same after a resume
or in another layout. Philox (Salmon et al., SC 2011) gives an independent stream to every (key, counter).
"""

from __future__ import annotations

import numpy as np

# Separate streams, so that the times of a step and the masks of a sample never share numbers.
STREAM_SAMPLE = 0
STREAM_STEP = 1
STREAM_ORDER = 2
STREAM_LENGTH = 3
EVAL_SEED = 20_250_715


def generator(seed: int, index: int, stream: int = STREAM_SAMPLE) -> np.random.Generator:
    """Random numbers of one sample (or step, or order).

    Args:
        seed: seed of the run, or :data:`EVAL_SEED`.
        index: index of the sample in the training stream (or the step, or the order).
        stream: what the numbers are for.
    """
    return np.random.Generator(np.random.Philox(key=(seed & (2**64 - 1)) | (stream << 64), counter=index << 128))


def diffusion_times(
    seed: int, sample_ids: np.ndarray, *, global_batch_size: int, stratified: bool = True
) -> np.ndarray:
    """Diffusion times t in [0, 1) of samples, fp64 [batch].

    Stratified over the global batch, ``t_i = (u_step + i / B) mod 1`` with i the index within the step: every step
    covers the whole range, each t is still uniform, and the variance of the loss falls (Kingma et al.,
    arXiv 2107.00630, appendix I.1).

    Args:
        seed: seed of the noise.
        sample_ids: [batch] indices in the training stream.
        global_batch_size: samples in a step, B.
        stratified: False draws every t independently.
    """
    if not stratified:
        times = np.array([generator(seed, int(i), STREAM_STEP).random() for i in sample_ids])
    else:
        steps = sample_ids // global_batch_size
        start = {step: generator(seed, int(step), STREAM_STEP).random() for step in np.unique(steps)}
        times = np.array([start[step] for step in steps]) + (sample_ids % global_batch_size) / global_batch_size
    return times % 1.0


def evaluation_times(sample_ids: np.ndarray, *, draw: int = 0, num_draws: int = 1) -> np.ndarray:
    """Diffusion times t in [0, 1) for evaluation, fp64 [batch]: functions of the sample and the draw alone.

    The van der Corput sequence (radical inverse in base 2) plus a fixed random shift: any first 2^k samples hold one time
    in every interval of length 2^-k, so the range is covered for any number of samples, without knowing a batch size. The
    draws of one sample are spread evenly.

    Args:
        sample_ids: [batch] indices in the validation set.
        draw: index of the draw.
        num_draws: how many there are.
    """
    inverse, rest, digit = np.zeros(len(sample_ids)), np.asarray(sample_ids).copy(), 0.5
    while rest.any():
        inverse += digit * (rest & 1)
        rest >>= 1
        digit /= 2
    shift = generator(EVAL_SEED, 0, STREAM_STEP).random()
    return (shift + inverse + draw / num_draws) % 1.0
