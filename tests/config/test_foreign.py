"""Command lines of Megatron: every foreign flag is read as ours, named as without effect, or refused with the reason."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config import Config, build_parser
from megatron.config.foreign import DEFAULTS, Rule, rules
from megatron.errors import UserError
from megatron.objectives import OBJECTIVES, parse

REPO = Path(__file__).resolve().parents[2]
SHAPE = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"]
BASE = [*SHAPE, "--train-iters", "10", "--micro-batch-size", "2", "--global-batch-size", "8"]
KNOWN = {flag for action in build_parser(OBJECTIVES)._actions for flag in action.option_strings}


def read(*words: str, base: list[str] = BASE, world_size: int = 1) -> tuple[Config, str]:
    notes: list[str] = []
    config = parse([*base, *words], notes=notes, world_size=world_size)
    return config, "\n".join(notes)


def refused(*words: str) -> list[str]:
    with pytest.raises(UserError) as stop:
        parse([*BASE, *words])
    return str(stop.value).splitlines()


def test_all_unknown_flags_are_named_at_once_with_their_counterparts() -> None:
    wrong = ["--num-experts", "8", "--position-embedding-type", "alibi", "--data-path", "a", "--split=x"]
    wrong += [
        "--embed-layernorm",
        "--hiden-size",
        "8",
        "--frobnicate",
        "--lr-decay-iters",
        "2.5",
        "--use-distributed-optimizer",
        "3",
    ]
    head, *lines = refused(*wrong)
    assert "8 arguments are not accepted; see --help, and docs/migration.md" in head
    assert lines == [
        "  --num-experts 8: mixtures of experts are not built",
        "  --position-embedding-type alibi: ALiBi is another model, and is not built; instead: "
        "--use-rotary-position-embeddings",
        "  --data-path a --split=x: it takes a prefix or a blend, and --split shares such as 969,30,1",
        "  --embed-layernorm: a norm after the embedding is another model, and is not built",
        "  unknown argument '--hiden-size'; did you mean --hidden-size?",
        "  unknown argument '--frobnicate'; it is no flag of Megatron's either",
        "  --lr-decay-iters 2.5: it takes a whole number",
        "  --use-distributed-optimizer 3: it takes no value",
    ]


def test_suggestions_go_by_meaning_not_by_spelling() -> None:
    """--distributed-backend was once taken for --swiglu-backend."""
    text = "\n".join(refused("--distributed-backend", "mpi"))
    assert "nccl (CUDA) and gloo (CPU)" in text and "--swiglu-backend" not in text


@pytest.mark.parametrize("name", ["--rampup-batch-size", "--fp8-hybrid", "--qk-layernorm"])
def test_what_is_not_built_is_refused_with_the_reason(name: str) -> None:
    values = ["32", "32", "1000"] if name == "--rampup-batch-size" else []
    (line,) = refused(name, *values)
    assert f"{' '.join([name, *values])}: " in line and line.endswith("docs/migration.md for Megatron's flags")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--lr-decay-iters 20", "optimizer.lr_decay_samples", 160),
        ("--lr_decay_iters=20", "optimizer.lr_decay_samples", 160),
        ("--lr-decay-style wsd --lr-wsd-decay-iters 3", "optimizer.lr_wsd_decay_samples", 24),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 3", "optimizer.lr_decay_style", "WSD"),
        ("--lr-decay-style Inverse-Square-Root --lr-decay-iters 9", "optimizer.lr_decay_style", "inverse-square-root"),
        ("--lr-warmup-iters 2", "optimizer.lr_warmup_samples", 16),
        ("--lr-decay-tokens 3200 --lr-decay-iters 5", "optimizer.lr_decay_samples", 100),
        ("--lr-warmup-samples 8 --lr-warmup-tokens 3200", "optimizer.lr_warmup_samples", 100),
        ("--lr-decay-tokens 6400", "optimizer.lr_decay_samples", 200),
        ("--train-tokens 1024", "run.train_iters", 4),
        ("--train-tokens 1000000", "run.train_iters", 10),
        ("--fp16", "run.bf16", True),
        ("--position-embedding-type rope", "model.use_rotary_position_embeddings", True),
        ("--position-embedding-type learned_absolute", "model.use_rotary_position_embeddings", False),
        ("--norm_epsilon 1e-6", "model.layernorm_epsilon", 1e-6),
        ("--group-query-attention", "model.num_query_groups", 1),
        ("--group-query-attention --num-query-groups 2", "model.num_query_groups", 2),
        ("--tokenizer-type Llama2Tokenizer", "data.tokenizer_type", "SentencePieceTokenizer"),
        ("--tokenizer-type huggingfacetokenizer", "data.tokenizer_type", "HFTokenizer"),
        ("--tokenizer-name-or-path /tok", "data.tokenizer_model", "/tok"),
        ("--wandb-project p --wandb-entity-name team", "run.wandb_entity", "team"),
        ("--exit-interval 3", "run.exit_interval", 3),
        ("--recompute-granularity full --recompute-method uniform", "parallel.recompute_activations", True),
        ("--attention-backend flash --bf16", "model.attention_backend", "sdpa"),
        ("--attention-backend flash-attn --bf16", "model.attention_backend", "sdpa"),  # ours of before
        ("--optimizer adamw", "optimizer.optimizer", "adam"),
        ("--eval-only False", "run.skip_train", False),
        ("--seq_length 64", "model.seq_length", 64),
    ],
)
def test_other_spellings_mean_what_they_meant(words: str, field: str, value: object) -> None:
    section, name = field.split(".")
    config, _ = read(*words.split())
    assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("words", "train", "valid"),
    [
        (["--data-path", "a"], ["a@0.0:0.969"], ["a@0.969:0.999"]),
        (["--split", "90,10,0", "--data_path", "a.bin"], ["a@0.0:0.9"], ["a@0.9:1.0"]),
        (["--data-path=a", "--split", "100,0,0"], ["a@0.0:1.0"], []),
        (
            ["--data-path", "2", "a", "1", "b", "--split", "1, 1"],
            ["2", "a@0.0:0.5", "1", "b@0.0:0.5"],
            ["2", "a@0.5:1.0", "1", "b@0.5:1.0"],
        ),
    ],
)
def test_one_data_path_is_divided_by_split(words: list[str], train: list[str], valid: list[str]) -> None:
    config, said = read(*words)
    assert (config.data.train_data_path, config.data.valid_data_path) == (train, valid)
    assert said.startswith("read as ours:\n  --data")


@pytest.mark.parametrize(
    ("words", "other"),
    [
        ("--data-path A", "--valid-data-path B"),
        ("--data-path A", "--train-data-path B"),
        ("--batch-size 4", "--micro-batch-size 8"),
        ("--batch-size 4", "--micro_batch_size=8"),
        ("--lr-warmup-iters 5", "--lr-warmup-samples 7"),
        ("--lr-decay-iters 5", "--lr-decay-samples 7"),
        ("--norm-epsilon 1e-6", "--layernorm-epsilon 1e-5"),
        ("--position-embedding-type rope", "--no-use-rotary-position-embeddings"),
        ("--muon-use-nesterov", "--no-muon-nesterov"),
    ],
)
def test_two_flags_that_contradict_each_other_are_refused(words: str, other: str) -> None:
    """None is silently the last word, in whatever order they come."""
    for line in (f"{words} {other}", f"{other} {words}"):
        (text,) = refused(*line.split())
        assert " beside " in text and "keep one" in text


@pytest.mark.parametrize(
    "words",
    [
        "--data-path A --split 100,0,0 --valid-data-path B",
        "--batch-size 2",  # the one of the base
        "--fp16 --bf16",
        "--train-tokens 99999",  # the earlier of two ends counts
    ],
)
def test_two_flags_that_agree_are_taken(words: str) -> None:
    read(*words.split())


def test_split_beside_named_parts_has_no_effect() -> None:
    config, said = read("--train-data-path", "a", "--split", "100,0,0")
    assert config.data.train_data_path == ["a"] and "--split (there is no --data-path to divide)" in said


def test_steps_count_the_batch_of_the_layout_where_none_is_given() -> None:
    base = [*SHAPE, "--train-iters", "10", "--micro-batch-size", "2", "--tensor-model-parallel-size", "2"]
    config, _ = read("--lr-decay-iters", "5", base=base, world_size=8)
    assert config.optimizer.lr_decay_samples == 5 * 2 * 4


def test_a_constant_rate_needs_no_decay() -> None:
    config, said = read("--lr-decay-style", "constant", "--lr-decay-iters", "20")
    assert config.optimizer.lr_decay_samples is None and "--lr-decay-iters (a constant rate does not decay)" in said


def test_flags_of_ours_that_do_nothing_in_a_foreign_script_are_named_and_not_refused() -> None:
    """Megatron takes a final rate with a constant one, and an interval of validations without data for them."""
    words = ["--lr-decay-style", "constant", "--min-lr", "1e-6", "--eval-interval", "100", "--lr-decay-samples=80"]
    config, said = read(*words, "--DDP-impl", "local", "--data-path", "a", "--split", "100,0,0", "--position-embedding-type",
                        "learned_absolute", "--rotary-base", "20000")  # fmt: skip
    assert (config.optimizer.min_lr, config.run.eval_interval, config.optimizer.lr_decay_samples) == (0, None, None)
    assert "--min-lr (it needs another --lr-decay-style than constant)" in said
    assert "--eval-interval (it needs --valid-data-path" in said and "--rotary-base (it needs " in said
    with pytest.raises(UserError, match="--min-lr would have no effect"):
        parse([*BASE, "--lr-decay-style", "constant", "--min-lr", "1e-6"])


def test_first_lines_say_what_was_read_what_has_no_effect_and_which_defaults_differ() -> None:
    flags = [
        "--fp16",
        "--loss-scale",
        "12",
        "--hysteresis",
        "2",
        "--use-distributed-optimizer",
        "--swiglu",
        "--tensor-model-parallel-size",
        "2",
    ]
    _, said = read(*flags, world_size=2)
    assert said.splitlines() == [
        "read as ours:",
        "  --fp16 as --bf16 (runs as bf16: the same memory, no loss scale; numbers differ in rounding)",
        "without effect here:",
        "  --loss-scale, --hysteresis (bf16 needs no loss scale)",
        "  --use-distributed-optimizer (ZeRO stage 1 always shards the state of the optimizer)",
        "defaults that differ, --megatron-defaults takes theirs:",
        "  --normalization is rmsnorm (Megatron: layernorm)",
        "  --use-rotary-position-embeddings is True (Megatron: False)",
        "  --disable-bias-linear is True (Megatron: False)",
        "  --lr-decay-style is cosine (Megatron: linear)",
        "  --log-interval is 10 (Megatron: 100)",
        "  the vocabulary is padded to a multiple of 128 (Megatron: 256)",
    ]


def test_megatron_defaults_take_all_of_theirs_that_were_not_given() -> None:
    config, said = read("--megatron-defaults", "--valid-data-path", "/v", "--swiglu", "--lr-decay-style", "cosine")
    model, run = config.model, config.run
    assert (model.normalization, model.use_rotary_position_embeddings, model.disable_bias_linear) == (
        "layernorm",
        False,
        False,
    )
    assert (model.swiglu, config.optimizer.lr_decay_style) == (True, "cosine")
    assert (run.eval_interval, run.eval_iters, run.log_interval) == (1000, "100", 100)
    assert said.startswith("defaults of Megatron taken:\n  --normalization layernorm\n")
    config, _ = read("--megatron-defaults", "--tensor-model-parallel-size", "2", world_size=2)
    assert config.model.make_vocab_size_divisible_by == 256 and config.run.eval_interval is None


def test_default_names_are_fields_whose_default_is_another_here() -> None:
    config = Config()
    ours = {name: value for part in vars(config).values() for name, value in vars(part).items()}
    assert all(ours[name] != value for name, value in DEFAULTS.items())


def foreign_script() -> list[str]:
    """A launch script of Megatron-DeepSpeed with more than 14 flags that are not ours."""
    text = (
        "--fp16 --loss-scale 0 --initial-loss-scale 65536 --distributed-backend nccl --lr-decay-iters 10 --lr-warmup-iters 1 "
        "--position-embedding-type learned_absolute --no-masked-softmax-fusion --no-bias-gelu-fusion "
        "--no-gradient-accumulation-fusion --use-distributed-optimizer --transformer-impl local "
        "--recompute-granularity full --recompute-method uniform --dataloader-type single --no-query-key-layer-scaling "
        "--attention-softmax-in-fp32 --DDP-impl local --num-experts 1 --moe-loss-coeff 0.01 --use-flash-attn"
    )
    return text.split()


def test_a_foreign_script_parses_to_megatrons_model() -> None:
    config, said = read(*foreign_script(), "--megatron-defaults")
    model = config.model
    assert (model.normalization, model.swiglu, model.disable_bias_linear) == ("layernorm", False, False)
    assert not model.use_rotary_position_embeddings and config.optimizer.lr_decay_samples == 80
    for word in [word for word in foreign_script() if word.startswith("--")]:
        assert word in said, word


@pytest.mark.parametrize("rule", [rule for rule in rules() if rule.kind == "alias"], ids=lambda rule: rule.flag)
def test_every_alias_leads_to_a_flag_of_ours(rule: Rule) -> None:
    assert rule.here.split()[0] in KNOWN


def test_the_table_is_well_formed() -> None:
    closed: set[str] = set()
    for rule in rules():
        assert rule.kind in ("alias", "no effect", "refused") and rule.takes in ("0", "1", "any"), rule
        assert rule.reason or rule.kind == "alias", rule
        assert rule.value or rule.flag not in KNOWN, f"{rule.flag} is ours: only values of it may be foreign"
        assert rule.flag not in closed, f"{rule} is never reached"
        if not (rule.value or rule.given_with):
            closed.add(rule.flag)


def test_the_page_is_generated_from_the_table() -> None:
    spec = importlib.util.spec_from_file_location("make_migration", REPO / "docs/make_migration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPO / "docs/migration.md").read_text(encoding="utf-8") == module.page(), "python docs/make_migration.py"
    with pytest.raises(UserError) as caught:
        read("--num-experts", "8", "--position-embedding-type", "alibi")
    assert f"\nerror: {caught.value}\n" in module.page(), "what the page shows is what is said"


def test_a_command_line_of_ours_does_not_import_the_table() -> None:
    code = (
        "import sys; from megatron.objectives import parse;"
        f"parse({BASE!r}); assert 'megatron.config.foreign' not in sys.modules;"
        f"parse({[*BASE, '--fp16']!r}); assert 'megatron.config.foreign' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60, check=True)
