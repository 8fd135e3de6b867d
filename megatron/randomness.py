"""Every random stream of the project: a function of (seed, purpose, index) and of nothing else.

So a draw is the same on every tensor- and pipeline-parallel rank, different for every sample, and the same after a resume
or in another layout. Philox (Salmon et al., SC 2011) gives an independent stream to every (key, counter); what is drawn on
the device takes its seed from :func:`named_seed`.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np

# The order of validation samples does not follow --seed: runs with different seeds are judged on the same samples.
VALIDATION_SEED = 1234
EVAL_SEED = 20_250_715


class Purpose(IntEnum):
    """What the numbers of a stream are for; streams of two purposes share none."""

    NOISE = 0  # masks of a sample; which order a sample takes
    TIMES = 1  # diffusion times: index is the step, or the sample where times are independent
    ORDER = 2  # a token order
    LENGTH = 3  # where a sample is cut


def generator(seed: int, purpose: Purpose | str, index: int) -> np.random.Generator:
    """Random numbers of one sample, step, order or draw.

    Args:
        seed: seed of the run, or :data:`EVAL_SEED`.
        purpose: what the numbers are for; a string names any further stream (such as the key of an evaluated request).
        index: which one, from 0.
    """
    if isinstance(purpose, str):
        stream = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    else:
        stream = int(purpose)
    return np.random.Generator(np.random.Philox(key=(seed & (2**64 - 1)) | (stream << 64), counter=index << 128))


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed for a generator of the device: of a tensor's initial weights, of dropout, of a sampled text.

    Args:
        seed: seed of the run.
        name: purpose and index, such as ``layers.0.mlp.dense_4h_to_h.weight`` or ``sampling:3``.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def radical_inverse(indices: np.ndarray) -> np.ndarray:
    """Bit-reversed indices in [0, 1), fp64 (the van der Corput sequence).

    The first 2^n values are the grid i/2^n, any prefix is spread evenly, and any 2^n consecutive values hold one in every
    interval of length 2^-n.
    """
    rest = np.array(indices, dtype=np.int64)
    inverse, digit = np.zeros(rest.shape), 0.5
    while rest.any():
        inverse += digit * (rest & 1)
        rest >>= 1
        digit /= 2
    return inverse


def diffusion_times(
    seed: int, sample_ids: np.ndarray, *, global_batch_size: int, scheme: int, stratified: bool = True
) -> np.ndarray:
    """Diffusion times t in [0, 1) of training samples, fp64 [batch].

    Stratified over the global batch of B samples: every step holds exactly one time in each of B strata, each t is still
    uniform, and the variance of the loss falls (Kingma et al., arXiv 2107.00630, appendix I.1).

    Args:
        seed: seed of the noise.
        sample_ids: [batch] indices in the training stream.
        global_batch_size: samples in a step, B.
        scheme: order of the strata among the samples of a step, see :data:`megatron.config.schema.NOISE_SCHEME`.
        stratified: False draws every t independently.
    """
    if not stratified:
        return np.array([generator(seed, Purpose.TIMES, int(i)).random() for i in sample_ids])
    steps, places = np.divmod(sample_ids, global_batch_size)
    times = np.empty(len(sample_ids))
    for step in set(steps.tolist()):
        own = steps == step
        random = generator(seed, Purpose.TIMES, step)
        if scheme == 1:
            times[own] = (random.random() + places[own] / global_batch_size) % 1.0
        else:
            times[own] = _balanced_times(random, global_batch_size)[places[own]]
    return times


def _balanced_times(random: np.random.Generator, count: int) -> np.ndarray:
    """Stratified times of one step, fp64 [count], balanced over every even run of samples.

    Samples 2j and 2j + 1 take mirrored strata, whose mean is the middle of the range, and the pairs follow each other in
    radical-inverse order. So with any even micro-batch every data-parallel rank masks the same number of tokens up to the
    coins of the tokens, in every micro-batch. A random shift by pairs, a random reflection and one offset within all strata
    make each time uniform; an odd count has a sample in the middle and is shifted by any number of samples.
    """
    pairs = count // 2
    strata = np.full(count, pairs)
    strata[0 : 2 * pairs : 2] = np.argsort(np.argsort(radical_inverse(np.arange(pairs))))
    strata[1 : 2 * pairs : 2] = count - 1 - strata[0 : 2 * pairs : 2]
    shift = int(random.integers(count)) if count % 2 else 2 * int(random.integers(pairs))
    times = (np.roll(strata, shift) + random.random()) / count
    below_one = np.nextafter(1.0, 0.0)
    times = np.minimum(times, below_one)  # the sum may round up to the next stratum
    return times if random.random() < 0.5 else below_one - times


def evaluation_times(sample_ids: np.ndarray, *, draw: int = 0, num_draws: int = 1, seed: int = EVAL_SEED) -> np.ndarray:
    """Diffusion times t in [0, 1) for evaluation, fp64 [batch]: functions of the sample and the draw alone.

    The radical inverse plus a fixed random shift: any first 2^k samples hold one time in every interval of length 2^-k, so
    the range is covered for any number of samples, without knowing a batch size. The draws of one sample are spread evenly.

    Args:
        sample_ids: [batch] indices in the validation set.
        draw: index of the draw.
        num_draws: how many there are.
        seed: of the shift; another one only where the noise itself is studied.
    """
    shift = generator(seed, Purpose.TIMES, 0).random()
    return (shift + radical_inverse(sample_ids) + draw / num_draws) % 1.0
