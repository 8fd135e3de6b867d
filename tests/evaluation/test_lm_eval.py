"""The lm-eval adapters: equality with lm-eval's own hf model, resuming, ranks' split, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")


from megatron.errors import UserError
from megatron.evaluation.lm_eval.models import MegatronAR, MegatronMDM
from megatron.evaluation.lm_eval.tasks import task_loader
from megatron.generation.diffusion import DiffusionSettings
from tests.evaluation import tiny

NUMBER = {"halves": 80, "words": 80, "continue": 60, "texts": 14}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lm_eval")


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Path]:
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer")
    return {
        name: tiny.make_run(folder / name, tiny.config_for(name, tokenizer, vocab_size=600, seq_length=96), scale=3.0)
        for name in ("ar", "mdm")
    }


@pytest.fixture(scope="module")
def tasks(folder) -> dict[str, str]:
    files = {
        "halves": [
            *tiny.choice_items(NUMBER["halves"] - 1),
            {"query": "Return the", "choices": ["", "path"], "gold": 1},
        ],
        "words": tiny.last_word_items(NUMBER["words"]),
        "continue": tiny.generation_items(NUMBER["continue"]),
        "texts": [{"text": " ".join(tiny.sentences()[i * 4 : i * 4 + 4 + i % 5])} for i in range(NUMBER["texts"] - 2)]
        + [{"text": ""}, {"text": " \n "}],
    }
    return {name: str(tiny.write_jsonl(folder / f"{name}.jsonl", items)) for name, items in files.items()}


def evaluate(lm, names: list[str], **options) -> dict:
    from lm_eval.evaluator import simple_evaluate  # seconds to load

    return simple_evaluate(
        lm, tasks=names, task_manager=task_loader(names), log_samples=True, bootstrap_iters=0, **options
    )


def llama_of(run: Path):
    """LlamaForCausalLM with the tensors of a run, placed by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron.inference.model import load_model

    loaded = load_model(run)
    shape, state = loaded.config.model, loaded.model.tensors()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.padded_vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads, head_dim=shape.kv_channels,
            max_position_embeddings=shape.seq_length, rms_norm_eps=shape.layernorm_epsilon, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    weights = {
        "model.embed_tokens.weight": state["word_embeddings.weight"],
        "model.norm.weight": state["final_layernorm.weight"],
    }
    weights["lm_head.weight"] = state["word_embeddings.weight"]
    for layer in range(shape.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        qkv = state[ours + "self_attention.query_key_value.weight"].chunk(3)
        gate, up = state[ours + "mlp.dense_h_to_4h.weight"].chunk(2)
        weights |= {theirs + f"self_attn.{n}_proj.weight": t for n, t in zip("qkv", qkv)}
        weights |= {theirs + "self_attn.o_proj.weight": state[ours + "self_attention.dense.weight"]}
        weights |= {theirs + "mlp.gate_proj.weight": gate, theirs + "mlp.up_proj.weight": up}
        weights |= {theirs + "mlp.down_proj.weight": state[ours + "mlp.dense_4h_to_h.weight"]}
        weights |= {
            theirs + f"{n}.weight": state[ours + f"{n}.weight"] for n in ("input_layernorm", "post_attention_layernorm")
        }
    model.load_state_dict(weights, strict=True)
    # Its vocabulary ends where the tokenizer's does: padding rows are no tokens.
    model.generation_config.suppress_tokens = list(range(600, shape.padded_vocab_size))
    return model, loaded


def test_autoregressive_equals_the_hf_model(runs, tasks, folder) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    model, loaded = llama_of(runs["ar"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    # Its cache of one-token answers scores a text wrongly that occurs twice, split at different places, as a sentence
    # of two of these tasks does: it takes the first of the logits instead of the last ones. Off, so that it is right.
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=96, logits_cache=False)
    theirs = evaluate(hf, list(tasks.values()))
    ours = evaluate(MegatronAR(model=loaded, batch_size=16), list(tasks.values()))
    for name, path in tasks.items():
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["doc_id"] == other["doc_id"]
            if name == "continue":
                assert mine["resps"] == other["resps"], mine["arguments"]
            elif name == "texts":
                assert mine["resps"][0][0] == pytest.approx(other["resps"][0][0], abs=1e-3)  # hundreds of tokens
            else:
                for (value, greedy), (their_value, their_greedy) in zip(
                    [r[0] for r in mine["resps"]], [r[0] for r in other["resps"]], strict=True
                ):
                    assert value == pytest.approx(their_value, abs=1e-4)
                    assert greedy == their_greedy
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5), (path, metric)
        assert len(ours["samples"][name]) == NUMBER[name]
    lengths = [len(loaded.tokenizer.encode(" ".join(s["arguments"][0]))) for s in ours["samples"]["halves"]]
    assert max(lengths) > 96, "some items must be longer than the context, so that cutting is compared too"
    texts = {s["resps"][0][0] for s in ours["samples"]["continue"]}
    assert len(texts) > 20


def test_masked_scores_do_not_depend_on_batch_or_order(runs, tasks) -> None:
    reference = None
    for batch_size in (1, 16):
        lm = MegatronMDM(load=str(runs["mdm"]), num_mc=8, batch_size=batch_size)
        samples = evaluate(lm, [tasks["words"], tasks["halves"]], limit=6)["samples"]
        scores = [value for name in ("words", "halves") for s in samples[name] for r in s["resps"] for value in r[0]]
        reference = reference or scores
        assert scores == pytest.approx(reference, abs=1e-5)


def test_interrupted_evaluation_goes_on(runs, tasks, tmp_path, monkeypatch) -> None:
    options = {"load": str(runs["mdm"]), "num_mc": 8, "cache_dir": str(tmp_path)}
    monkeypatch.setattr(MegatronMDM, "chunk_groups", 4)
    lm = MegatronMDM(**options)
    scored = lm.score_groups
    calls = []

    def fail_late(groups):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(groups))
        return scored(groups)

    lm.score_groups = fail_late
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, [tasks["halves"]], limit=14)
    resumed = MegatronMDM(**options)
    again = resumed.score_groups
    counted = []
    resumed.score_groups = lambda groups: (counted.append(len(groups)), again(groups))[1]
    result = evaluate(resumed, [tasks["halves"]], limit=14)
    assert sum(calls) + sum(counted) == 14
    fresh = evaluate(MegatronMDM(load=str(runs["mdm"]), num_mc=8), [tasks["halves"]], limit=14)
    for one, other in zip(result["samples"]["halves"], fresh["samples"]["halves"], strict=True):
        assert [r[0][0] for r in one["resps"]] == pytest.approx([r[0][0] for r in other["resps"]], abs=1e-5)
    other_settings = MegatronMDM(**{**options, "num_mc": 16})
    assert other_settings.cache.key("a") != resumed.cache.key("a"), "other settings, other results"
    tokenizer = tiny.build_tokenizer_file(tmp_path / "tokenizer", 400)
    other_tokens = MegatronMDM(**options, tokenizer_type="HFTokenizer", tokenizer_model=str(tokenizer))
    assert other_tokens.cache.key("a") != resumed.cache.key("a"), "other tokens of the same texts, other results"


def test_greedy_only_and_likelihood_only(runs, tasks) -> None:
    from megatron.evaluation.lm_eval.command import run_downstream

    with pytest.raises(ValueError, match="rank by"):
        run_downstream(["--load", str(runs["mdm"]), "--task_list", tasks["halves"], "--only_generate"])
    only = MegatronMDM(load=str(runs["mdm"]), only_greedy=True)
    flags = [s["resps"][0][0][1] for s in evaluate(only, [tasks["words"]], limit=12)["samples"]["words"]]
    both = MegatronMDM(load=str(runs["mdm"]), num_mc=4)
    assert flags == [s["resps"][0][0][1] for s in evaluate(both, [tasks["words"]], limit=12)["samples"]["words"]]


def test_requests_without_a_task_are_counted_together(runs) -> None:
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, (text, " path"), 0) for text in ("either/or", "the file")]
    lm = MegatronAR(load=str(runs["ar"]))
    lm.loglikelihood(requests, disable_tqdm=True)
    assert {task: own.number for task, own in lm.summary.tasks.items()} == {"text": 2}


def test_repeated_requests_change_nothing(runs) -> None:
    """lm-eval appends copies of a request so that all ranks have as many; a copy must not look like another answer."""
    from lm_eval.api.instance import Instance

    lm = MegatronMDM(load=str(runs["mdm"]), num_mc=16)
    tokens = lm.tok_encode("Return the path of")
    greedy = lm.sampler.fill([[*tokens, lm.loaded.mask_id]], settings=DiffusionSettings())[0][-1]
    answer = lm.tokenizer.decode([greedy])
    lone = Instance("loglikelihood", {}, ("Return the path of", answer), 0, ("words", 3, 1))
    once, copied = lm.loglikelihood([lone], disable_tqdm=True), lm.loglikelihood([lone, lone], disable_tqdm=True)
    assert copied == once * 2
    assert lm.summary.as_dict()["words"]["answers"] == 2


def test_generation_of_a_masked_model_is_deterministic(runs, tasks) -> None:
    results = []
    for batch_size in (1, 8):
        lm = MegatronMDM(load=str(runs["mdm"]), batch_size=batch_size, gen_block_length=4)
        samples = evaluate(lm, [tasks["continue"]], limit=6)["samples"]["continue"]
        results.append([s["resps"][0][0] for s in samples])
    assert results[0] == results[1]
    assert all("\n" not in text and "." not in text for text in results[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda runs: MegatronAR(load=str(runs["mdm"])), "megatron_mdm"),
        (lambda runs: MegatronMDM(load=str(runs["ar"])), "megatron_ar"),
        (lambda runs: MegatronMDM(load=str(runs["mdm"]), estimator="mc"), "exact-count"),
        (lambda runs: MegatronAR(load=str(runs["ar"]), tokeniser="x"), "tokeniser"),
        (lambda runs: MegatronAR(), "load="),
    ],
)
def test_wrong_arguments(runs, make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(runs)


def test_the_program_writes_json_and_a_table(runs, tasks, tmp_path, capsys) -> None:
    from megatron.evaluation.lm_eval.command import run_downstream

    results = tmp_path / "out" / "results.json"
    flags = ["--load", str(runs["mdm"]), "--load-tag", "latest", "--task_list", f"{tasks['halves']},{tasks['words']}"]
    flags += [
        "--num-mc",
        "8",
        "--limit",
        "6",
        "--eval_method",
        "mc",
        "--only_mc_nll",
        "--inference",
        "--eval_fp32",
        "--lr",
        "0.1",
        "--seq-length",
        "4096",
    ]
    assert run_downstream([*flags, "--results_path", str(results), "--log_samples"]) == 0
    shown = capsys.readouterr().out
    assert "bound: exact-count, stratified" in shown
    assert "perplexity (upper bound)" in shown
    assert "--lr" in shown
    assert shown.count("max_length 4096: rows have 96 tokens") == 1
    written = json.loads(results.read_text())
    assert written["likelihoods"]["halves"]["answers"] == 24
    assert "acc,none" in written["results"]["halves"]
    assert "acc,none" not in written["results"]["words"], "no greedy decoding, no exact match"
    assert all("acc" not in own and own["metrics"] == ["perplexity"] for own in written["samples"]["words"])
    assert all("acc" in own for own in written["samples"]["halves"])
    assert run_downstream([*flags[:-2], "--eval_method", "ar", "--limit", "3"]) == 0
    assert "exact: left-to-right chain rule" in capsys.readouterr().out
    exact = [*flags[:-2], "--eval_method", "exact", "--policy", "margin", "--tokens_per_step", "4", "--limit", "3"]
    assert run_downstream(exact) == 0
    assert "exact: margin, 4 tokens a pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-layers", "9"], "checkpoint has 2"),
        (["--tensor-model-parallel-size", "2"], "torchrun"),
        (["--only_generate", "--only_mc_nll"], "exclude"),
        (["--policy", "margin"], "--eval_method exact"),
        (["--eval_method", "exact", "--estimator", "bernoulli"], "without an estimator"),
        (["--only_generate", "--estimator", "bernoulli"], "--estimator would have no effect"),
        (["--only_generate", "--no_adaptive"], "--no_adaptive would have no effect"),
        (["--eval_method", "ar", "--no_adaptive"], "--no_adaptive would have no effect"),
    ],
)
def test_wrong_flags(runs, tasks, flags, message) -> None:
    from megatron.evaluation.lm_eval.command import run_downstream

    with pytest.raises(ValueError, match=message):
        run_downstream(["--load", str(runs["mdm"]), "--task_list", tasks["words"], *flags])


@pytest.mark.parametrize("options", [
    {"policy": "margin", "estimator": "bernoulli"}, {"policy": "margin", "num_mc": 8}, {"tokens_per_step": 4},
    {"only_greedy": True, "num_mc": 8}, {"estimator": "left-to-right", "num_mc": 8},
    {"estimator": "left-to-right", "adaptive": False}, {"only_greedy": True, "estimator": "bernoulli"},
], ids=" ".join)  # fmt: skip
def test_a_model_argument_without_effect_is_refused(runs, options) -> None:
    with pytest.raises(UserError, match=f"{list(options)[-1]} .* would have no effect; .*; drop it"):
        MegatronMDM(load=str(runs["mdm"]), **options)


def test_a_number_of_draws_that_nothing_draws_and_bf16_on_a_cpu_are_named(runs, tasks, capsys) -> None:
    from megatron.evaluation.lm_eval.command import run_downstream

    for name, flags, is_drawn in (("ar", [], False), ("mdm", [], True), ("mdm", ["--eval_method", "ar"], False)):
        words = ["--load", str(runs[name]), "--task_list", tasks["words"], "--limit", "2", "--num-mc", "2", "--bf16"]
        assert run_downstream([*words, *flags]) == 0
        shown = capsys.readouterr().out
        assert ("--num-mc: no masks are drawn here" in shown) is not is_drawn
        assert "--bf16: evaluated in float32 (on a CPU)" in shown


@pytest.fixture(scope="module")
def indexed():
    """A loader that knows lm-eval's own tasks; indexing them takes seconds."""
    return task_loader(["sciq"])


def test_a_data_set_that_cannot_be_fetched_says_how(indexed, monkeypatch) -> None:
    import datasets

    def refuse(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("lambada", "hellaswag"):
        with pytest.raises(ValueError, match=rf"(?s)task {name}: .*no network.*--fetch_only"):
            indexed.load([name])
    with pytest.raises(ValueError, match="no_such_task"):
        indexed.load(["no_such_task"])


def test_all_nine_tasks_are_configured(indexed) -> None:
    from megatron.evaluation.lm_eval.tasks import PAPER_TASKS, parse_task_list

    assert len(parse_task_list("all")) == 9
    assert [name for name, _ in PAPER_TASKS.values() if name not in indexed.all_tasks] == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "empty"),
        ("{", "not JSON"),
        ("[1]", "list"),
        ('{"a": 1}', "fields"),
        ('{"query": "", "choices": [], "gold": 0}\n{"query": ""}', "line 2"),
    ],
)
def test_bad_local_tasks(tmp_path, lines, message) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        task_loader([str(path)]).load([str(path)])


def test_lm_eval_command_line_knows_the_models(runs) -> None:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import get_model

    import megatron.evaluation.__main__ as program

    assert program.cli_evaluate is cli_evaluate
    assert (get_model("megatron_ar"), get_model("megatron_mdm")) == (MegatronAR, MegatronMDM)
    lm = get_model("megatron_mdm").create_from_arg_string(
        f"load={runs['mdm']},num_mc=8", {"batch_size": 4, "device": "cpu"}
    )
    assert (lm.num_mc, lm.batch_size, lm.device.type) == (8, 4, "cpu")


def test_token_logprobs_use_the_padded_vocabulary(runs) -> None:
    """As in training: the softmax runs over all rows of the embedding."""
    lm = MegatronAR(load=str(runs["ar"]))
    text = "Return the path"
    ((value, _),) = lm._loglikelihood_tokens([(("", text), [0], lm.tok_encode(text))])
    tokens = torch.tensor([[0, *lm.tok_encode(text)]])
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(
            lm.loaded.logits(tokens)[0, :-1].double(), tokens[0, 1:], reduction="sum"
        )
    assert value == pytest.approx(-float(loss), abs=1e-4)
