"""Block after block: an exact likelihood, what is drawn follows it, and finished blocks are computed once."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.errors import UserError
from megatron.generation.blocks import BlockSampler, block_sizes
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings
from megatron.generation.flags import POLICIES
from megatron.generation.sampling import TokenSampling
from megatron.inference.blocks import BlockModel
from megatron.inference.decoder import GrowingCache
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import BlockCausal, BlockDiffusion, Causal, Full
from megatron.parallel.tensor import ParameterFactory

VOCAB, LENGTH = 5, 4
TEXTS = list(itertools.product(range(VOCAB), repeat=LENGTH))
PLAIN = TokenSampling(temperature=1.0, seed=3)


def network(*, vocab: int = VOCAB + 1, seq: int = LENGTH, hidden: int = 16, **options) -> GPTModel:
    """In fp64, with weights so large that predictions are far from uniform."""
    shape = ModelConfig(
        **{"num_layers": 2, "num_attention_heads": 2, "init_method_std": 0.35, **options},
        hidden_size=hidden, ffn_hidden_size=2 * hidden, seq_length=seq, padded_vocab_size=vocab,
    )  # fmt: skip
    return GPTModel(Shape.of(shape), ParameterFactory(seed=3)).double().eval()


def blocks_of(
    size: int, model: GPTModel, *, causal: bool = False, mask_id: int = VOCAB, cached: bool = True
) -> BlockSampler:
    asked = BlockModel(model, BlockDiffusion(size, causal), mask_id=mask_id)
    return BlockSampler(asked, mask_id=mask_id, block_size=size, filling=asked.filling if cached else None)


def likelihoods(sampler: DiffusionSampler, settings: DiffusionSettings, texts=TEXTS, given: int = 0) -> list[float]:
    masked = torch.arange(len(texts[0])).expand(len(texts), -1) >= given
    return sampler.log_likelihoods(texts, masked, settings=settings).values.sum(-1).tolist()


MODEL = network(seq=6)  # room for the end of the last block
WAYS = [
    {},
    {"tokens_per_step": 2},
    {"tokens_per_step": 3},
    {"tokens_per_step": 4},
    {"steps": 4},
    {"sampling": TokenSampling(temperature=0.7, top_k=3, seed=3)},
    {"sampling": TokenSampling(temperature=1.3, top_p=0.8, seed=3)},
]


@pytest.mark.parametrize("size", [1, 2, 3, 4], ids="blocks of {}".format)
@pytest.mark.parametrize("order", POLICIES)
def test_likelihoods_sum_to_one(order, size) -> None:
    sampler = blocks_of(size, MODEL, causal=size == 3)
    for way in WAYS:
        settings = DiffusionSettings(order=order, **{"sampling": PLAIN, **way})
        assert math.fsum(map(math.exp, likelihoods(sampler, settings))) == pytest.approx(1.0, abs=1e-10), way


@torch.no_grad()
def test_blocks_of_one_token_are_the_chain_rule() -> None:
    """A causal model that reads the true past and a mask token in the place of the next one."""
    for order in ("left-to-right", "confidence", "random"):
        found = likelihoods(blocks_of(1, MODEL), DiffusionSettings(order=order, sampling=PLAIN), TEXTS[::50])
        for text, value in zip(TEXTS[::50], found):
            total = 0.0
            for place, token in enumerate(text):
                logits = MODEL.logits(Inputs(torch.tensor([[*text[:place], VOCAB]])), Causal())[0, -1]
                total += logits[:VOCAB].log_softmax(-1)[token].item()
            assert value == pytest.approx(total, abs=1e-10)


@pytest.mark.parametrize("order", POLICIES)
def test_one_block_is_masked_diffusion(order) -> None:
    plain = DiffusionSampler(
        lambda ids, positions=None: MODEL.logits(Inputs(ids), Full(), positions=positions), mask_id=VOCAB
    )
    for way in WAYS:
        settings = DiffusionSettings(order=order, **{"sampling": PLAIN, **way})
        found = likelihoods(blocks_of(LENGTH, MODEL), settings, TEXTS[::9])
        assert found == pytest.approx(likelihoods(plain, settings, TEXTS[::9]), abs=1e-10)
    rows = [[VOCAB] * LENGTH] * 50
    assert blocks_of(LENGTH, MODEL).fill(rows, settings=settings) == plain.fill(rows, settings=settings)


@pytest.mark.parametrize("order", POLICIES)
@pytest.mark.parametrize("way", [{}, {"tokens_per_step": 2}], ids=["1", "2"])
def test_what_is_drawn_has_the_likelihood_that_is_said(order, way, monkeypatch) -> None:
    """20,000 texts of each policy, drawn with cached blocks, against its own exact distribution, chi-square."""
    monkeypatch.setattr(GrowingCache, "BLOCK", 2)  # 20,000 caches for the 256 tokens of others would be a gigabyte
    sampler = blocks_of(2, network(vocab=4, seq=4, hidden=8), mask_id=3)
    texts = [(1, *rest) for rest in itertools.product(range(3), repeat=3)]
    settings = DiffusionSettings(order=order, sampling=PLAIN, order_number=4, **way)
    exact = [math.exp(value) for value in likelihoods(sampler, settings, texts, given=1)]
    assert math.fsum(exact) == pytest.approx(1.0, abs=1e-10)
    number = 20_000
    counts = Counter(map(tuple, sampler.fill([[1, 3, 3, 3]] * number, settings=settings)))
    chi2 = sum((counts[text] - number * p) ** 2 / (number * p) for text, p in zip(texts, exact))
    assert chi2 < 54, "26 degrees of freedom: p > 0.001"


def test_a_block_sees_the_finished_ones_and_nothing_behind() -> None:
    sampler, settings = blocks_of(2, MODEL), DiffusionSettings(sampling=PLAIN)
    masked = torch.ones(2, LENGTH, dtype=torch.bool)
    one, other = sampler.log_likelihoods([(0, 1, 2, 3), (0, 1, 4, 4)], masked, settings=settings).values
    assert torch.equal(one[:2], other[:2])
    one, other = sampler.log_likelihoods([(0, 1, 2, 3), (0, 2, 2, 3)], masked, settings=settings).values
    assert (one[2:] != other[2:]).all()


VARIANTS = {
    "default": {},
    "grouped": {"num_query_groups": 1},
    "learned positions": {"use_rotary_position_embeddings": False, "max_position_embeddings": 40},
}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal past"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_cached_blocks_equal_uncached(options, causal) -> None:
    """The same tokens, and logits within 1e-5 in fp32: for prompts that end anywhere, and rows that do."""
    model = network(vocab=32, seq=24, **options).float()
    asked = BlockModel(model, BlockDiffusion(4, causal), mask_id=31)
    seen: dict[str, list[torch.Tensor]] = {"cached": [], "uncached": []}

    def watched(logits_fn, name):
        def logits(ids, *, positions=None, **clean):
            found = logits_fn(ids, positions=positions, **clean)
            seen[name].append(found)
            return found

        return logits

    samplers = {
        "cached": BlockSampler(asked, mask_id=31, block_size=4, filling=lambda: watched(asked.filling(), "cached")),
        "uncached": BlockSampler(watched(asked, "uncached"), mask_id=31, block_size=4),
    }
    for given, length, way in (
        (1, 24, {}),
        (6, 21, {"tokens_per_step": 2}),
        (8, 24, {"order": "ancestral", "steps": 16}),
    ):
        prompt = torch.randint(31, (3, given), generator=torch.Generator().manual_seed(given)).tolist()
        rows = [[*own, *([31] * (length - given))] for own in prompt]
        settings = DiffusionSettings(**{"order": "confidence", "sampling": PLAIN, **way})
        filled = {name: sampler.fill(rows, settings=settings) for name, sampler in samplers.items()}
        assert filled["cached"] == filled["uncached"]
        assert len({tuple(row) for row in filled["cached"]}) == 3 and not any(31 in row for row in filled["cached"])
    assert len(seen["cached"]) == len(seen["uncached"]) > 40
    for one, other in zip(seen["cached"], seen["uncached"]):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_cache_answers_rightly_when_the_text_before_changes() -> None:
    asked = BlockModel(MODEL, BlockDiffusion(2), mask_id=VOCAB)
    filling, wanted = asked.filling(), torch.tensor([[False, False, True, True]])
    for row in ([0, 1, 5, 5], [0, 2, 5, 5], [0, 2, 5, 3], [5, 5, 5, 5]):
        for own in (wanted, wanted.flip(1)):
            ids = torch.tensor([row])
            torch.testing.assert_close(filling(ids, positions=own), asked(ids, positions=own), atol=1e-10, rtol=0)
    two = torch.tensor([[0, 1, 5, 5], [1, 1, 5, 5]])
    torch.testing.assert_close(filling(two, positions=wanted.expand(2, 4)), asked(two, positions=wanted.expand(2, 4)))


def test_a_pass_costs_the_positions_of_its_own_block() -> None:
    model = network(vocab=32, seq=64)
    widths: list[int] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].input_ids.shape[1]))
    sampler = blocks_of(4, model, mask_id=31)
    sampler.fill([[1] * 8 + [31] * 56], settings=DiffusionSettings(tokens_per_step=2))
    assert widths == [8, *([4, 4, 4] * 14)[:-1]], (
        "the prompt; then two passes a block, and the block once it is finished"
    )


def test_cached_blocks_cost_a_third_of_uncached_ones() -> None:
    """16 blocks of 16 tokens, two tokens a pass, 4 rows, 4 layers of width 256, fp32: processor seconds, in turns.

    Uncached passes run what a block needs to see and no more: all tokens up to its end, once, under a block-causal mask.
    ``python -m pytest -s`` prints the figure of docs/benchmarks.md.
    """
    model, size, number = network(vocab=512, seq=256, hidden=256, num_layers=4, num_attention_heads=4).float(), 16, 16
    asked, mask = BlockModel(model, BlockDiffusion(size), mask_id=511), BlockCausal(size)

    def uncached(ids, *, positions):
        end = -(-int(positions.any(0).nonzero()[-1] + 1) // size) * size
        return model.logits(Inputs(ids[:, :end]), mask, positions=positions[:, :end])

    ways = {
        "cached": BlockSampler(asked, mask_id=511, block_size=size, filling=asked.filling),
        "uncached": BlockSampler(asked, mask_id=511, block_size=size, filling=lambda: uncached),
    }
    rows = [[row, *([511] * (size * number - 1))] for row in range(4)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts = {}
    for _ in range(2):
        for name, sampler in ways.items():
            began = time.process_time()  # of this process alone, whatever else the machine does
            texts[name] = sampler.fill(rows, settings=DiffusionSettings(tokens_per_step=2))
            seconds[name].append(time.process_time() - began)
    assert texts["cached"] == texts["uncached"]
    ratio = sum(seconds["cached"]) / sum(seconds["uncached"])
    print(f"\ncached {seconds['cached']}, uncached {seconds['uncached']} processor seconds; ratio {ratio:.3f}")
    assert ratio <= 0.35


def test_blocks_stop_early() -> None:
    sampler = blocks_of(2, MODEL)
    stopped = sampler.fill([[0, 5, 5, 5]], settings=DiffusionSettings(), stop=lambda row, tokens: len(tokens) >= 2)
    assert 5 not in stopped[0][:2] and stopped[0][2:] == [5, 5]


def test_sizes_of_blocks() -> None:
    assert [block_sizes(*case) for case in ((0, 4, 2), (1, 4, 2), (3, 6, 4), (1, 1, 4), (5, 0, 4))] == [
        [2, 2], [1, 2, 1], [1, 4, 1], [1], [],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "settings", "named"),
    [
        ([0, 5, 5, 1], {}, "given tokens behind tokens to be filled in; block diffusion .* nothing behind; drop "),
        ([0, 5, 5, 5], {"block_length": 3}, "block_length 3; the model has blocks of 2 tokens"),
        ([0, 5, 5, 5], {"guidance": 0.5}, "guidance 0.5; the model has blocks of 2 tokens"),
        ([0, 5, 5, 5], {"steps": 1}, "1 steps for 2 blocks"),
    ],
)
def test_what_a_model_of_blocks_cannot_do_is_said(row, settings, named) -> None:
    sampler = blocks_of(2, MODEL)
    with pytest.raises(UserError, match=named):
        sampler.fill([row], settings=DiffusionSettings(**settings))
    if "steps" not in settings:
        masked = torch.tensor([row]) == 5
        with pytest.raises(UserError, match=named):
            sampler.log_likelihoods([[0, 1, 2, 3]], masked, settings=DiffusionSettings(sampling=PLAIN, **settings))


def test_rows_that_end_within_a_block_have_the_rest_masked() -> None:
    """Not cut off: in training a block is always whole."""
    asked = BlockModel(MODEL, BlockDiffusion(4), mask_id=VOCAB)
    wanted = torch.tensor([[False, True, True]])
    ids = torch.tensor([[0, 5, 5]])
    whole = asked(F.pad(ids, (0, 1), value=VOCAB), positions=F.pad(wanted, (0, 1)))
    torch.testing.assert_close(asked(ids, positions=wanted), whole)
    torch.testing.assert_close(asked.filling()(ids, positions=wanted), whole)
    assert asked(ids).shape == (1, 3, VOCAB + 1)
