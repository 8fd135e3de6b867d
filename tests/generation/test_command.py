"""tools/generate.py on tiny checkpoints: continuation, infilling, display, seeds, what is refused."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch

from megatron.errors import UserError
from megatron.generation.command import run_generate
from megatron.generation.diffusion import Step
from megatron.generation.display import UncoverDisplay
from tests.evaluation import tiny
from tests.generation.test_autoregressive import Letters


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", 400)
    return {
        name: str(tiny.make_run(folder / name, tiny.config_for(name, tokenizer, vocab_size=400, seq_length=48)))
        for name in ("ar", "mdm")
    }


def run(capsys, *flags: str) -> str:
    assert run_generate([*flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["ar", "mdm"])
def test_continuation_is_deterministic_by_seed(runs, capsys, name) -> None:
    flags = [
        "--load",
        runs[name],
        "--prompt",
        "Return the path",
        "--max-new-tokens",
        "10",
        "--temperature",
        "1",
        "--json",
    ]
    one, again, other = (run(capsys, *flags, "--num-samples", "2", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == again != other
    first, second = (json.loads(line) for line in one.splitlines())
    assert first["tokens"] != second["tokens"]
    assert all(token < 400 for token in first["tokens"])


def test_infilling_keeps_the_given_text(runs, capsys) -> None:
    shown = run(capsys, "--load", runs["mdm"], "--prompt", "Return the", "--infix", " of the file.", "--max-new-tokens", "4",
                "--temperature", "1")  # fmt: skip
    assert shown.startswith("Return the")
    assert shown.rstrip("\n").endswith(" of the file.")
    shown = run(
        capsys, "--load", runs["mdm"], "--prompt", "If[MASK:3] is true,[MASK:2] is raised.", "--order", "entropy"
    )
    assert shown.startswith("If")
    assert " is true," in shown
    assert shown.rstrip("\n").endswith(" is raised.")


def test_steps_are_shown(runs, capsys) -> None:
    shown = run(capsys, "--load", runs["mdm"], "--prompt", "a", "--max-new-tokens", "6", "--steps", "3", "--show-steps")
    lines = shown.splitlines()
    assert [line.split("]")[0] for line in lines[:3]] == ["[step 1, 4 masked", "[step 2, 2 masked", "[step 3, 0 masked"]
    assert lines[0].count("_") >= 4


def test_display_redraws_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = UncoverDisplay(Letters(), mask_id=99, stream=stream)
    display(Step(0, torch.tensor([[0, 99, 2]]), torch.tensor([[False, False, True]])))
    assert "a_\x1b[1;32mc\x1b[0m" in stream.getvalue()
    display(Step(1, torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, False]])))
    assert "\x1b[1F\x1b[J" in stream.getvalue()
    assert stream.getvalue().endswith("a\x1b[1;32mb\x1b[0mc\n")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = UncoverDisplay(Letters(), mask_id=99, stream=(stream := Terminal()))
    for token in (99, 1):
        plain(Step(0, torch.tensor([[0, token, 2]]), torch.tensor([[False, token == 1, False]])))
    assert re.fullmatch(r"\[step 1, 1 masked\] a_c\n\x1b\[1F\x1b\[J\[step 1, 0 masked\] abc\n", stream.getvalue())


def test_display_counts_the_lines_that_wide_letters_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    display = UncoverDisplay(Letters(), mask_id=99, stream=io.StringIO())
    assert [display._height(letter * 60 + "\n") for letter in "a日"] == [1, 2]


def test_stop_strings_cut_the_text(runs, capsys) -> None:
    flags = ["--load", runs["ar"], "--prompt", "Return", "--max-new-tokens", "20"]
    text = run(capsys, *flags).rstrip("\n")
    stop = text[len("Return") + 4 : len("Return") + 6]
    cut = run(capsys, *flags, "--stop", stop).rstrip("\n")
    assert cut == "Return" + text[len("Return") :].split(stop)[0]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ar", ["--infix", "x"], "causal"),
        ("ar", ["--prompt", "a [MASK]"], "causal"),
        ("mdm", ["--max-new-tokens", "48"], "share 48"),
        ("mdm", ["--prompt", "[MASK:60]"], "holds 48"),
        ("mdm", ["--temperature", "-1"], "temperature"),
        ("mdm", ["--prompt", "a [MASK:3]"], "--max-new-tokens 24 beside"),
        ("mdm", ["--prompt", "a [MASK:3]", "--prompt", "b"], "with .MASK. and without"),
        ("mdm", ["--top-k", "3"], "--temperature 0"),
        ("mdm", ["--num-samples", "2"], "all samples would be one text"),
        ("ar", ["--num-samples", "2"], "all samples would be one text"),
        ("mdm", ["--load-tag", "global_step9"], "global_step9"),
        ("mdm", ["--prompt", "[MASK:2000000000]"], "holds 48"),
        ("mdm", ["--prompt", "[MASK:" + "9" * 5000 + "]"], "holds 48"),
        ("mdm", ["--prompt", "[MASK:0]"], "at least one"),
        ("mdm", ["--infix", "x", "--max-new-tokens", "1000000000"], "holds 48"),
        ("mdm", ["--steps", "2", "--block-length", "2"], "12 blocks"),
        ("mdm", ["--prompt-file", "/nowhere"], "no file"),
        ("mdm", ["--prompt-file", "/dev/null"], "no file"),
        ("mdm", ["--prompt-file", ""], "no file"),
        ("ar", ["--prompt", "a", "--tokenizer-type", "NullTokenizer"], "--vocab-size"),
    ],
)
def test_wrong_requests_are_refused(runs, name, flags, message) -> None:
    with pytest.raises(ValueError, match=message):
        run_generate(["--load", runs[name], "--max-new-tokens", "24", *flags])


NUMBERS = {
    "--temperature": ["nan", "inf", "-1", "1e999"],
    "--top-p": ["nan", "0", "-0.5", "1.5", "inf"],
    "--top-k": ["-1"],
    "--guidance": ["nan", "inf"],
    "--seed": ["-5"],
    "--max-new-tokens": ["0", "-3", "99999999999999999999"],
    "--num-samples": ["0", "-1", "10000000000"],
    "--batch-size": ["0", "-8"],
    "--steps": ["0", "-1", "1" + "0" * 30],
    "--block-length": ["0", "1" + "0" * 30],
}


def test_numbers_out_of_range_are_refused_before_anything_is_loaded() -> None:
    for flag, values in NUMBERS.items():
        for value in values:
            with pytest.raises(UserError, match=flag[2:].replace("-", "[-_]")) as refused:
                run_generate(["--load", "/nowhere", "--prompt", "a", f"{flag}={value}"])
            assert refused.value.exit_status == 2


@pytest.mark.parametrize("flag", ["--prompt", "--infix", "--stop"])
def test_a_text_that_is_no_utf_8_is_refused(flag) -> None:
    """Python passes bytes of the command line that it cannot read on as lone surrogates."""
    with pytest.raises(UserError, match=f"{flag} .*; text is UTF-8; "):
        run_generate(["--load", "/nowhere", flag, "a\udcff"])


@pytest.mark.parametrize("temperature", ["1e-320", "1e-5", "1e300"])
def test_extreme_temperatures_draw_tokens(runs, capsys, temperature) -> None:
    flags = ["--load", runs["ar"], "--prompt", "Return", "--max-new-tokens", "8", "--json"]
    drawn = json.loads(run(capsys, *flags, "--temperature", temperature))["tokens"]
    assert len(drawn) == 8 and all(0 <= token < 400 for token in drawn)
    if float(temperature) < 1e-300:
        assert drawn == json.loads(run(capsys, *flags))["tokens"], "so cold that only the likeliest token is left"


def test_samples_at_temperature_0_differ_in_a_random_order(runs, capsys) -> None:
    flags = ["--load", runs["mdm"], "--prompt", "Return", "--max-new-tokens", "12", "--num-samples", "4", "--json"]
    texts = [json.loads(line)["text"] for line in run(capsys, *flags, "--order", "random").splitlines()]
    assert len(set(texts)) > 1


def test_a_prompt_file_without_prompts_is_refused(runs, tmp_path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    with pytest.raises(UserError, match=r"blank\.txt holds no prompt"):
        run_generate(["--load", runs["ar"], "--prompt-file", str(tmp_path / "blank.txt")])


def test_prompt_files_break_at_line_feeds_only(runs, tmp_path, capsys) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffReturn\u2028the\r\n\nIf\x85so\n".encode())
    shown = run(capsys, "--load", runs["ar"], "--prompt-file", str(path), "--max-new-tokens", "2", "--json")
    assert [json.loads(line)["prompt"] for line in shown.splitlines()] == ["Return\u2028the", "If\x85so"]


def test_an_end_of_document_in_a_gap_keeps_what_was_given(runs, capsys, monkeypatch) -> None:
    """The gap ends there; the suffix and the text before a stop string of its own stay."""
    from megatron.generation.diffusion import DiffusionSampler

    fill = DiffusionSampler.fill

    def end_early(self, rows, **options):
        filled = fill(self, rows, **options)
        for row, tokens in zip(rows, filled):
            gap = [index for index, token in enumerate(row) if token == self.mask_id]
            tokens[gap[1]] = row[0]  # EOD
        return filled

    monkeypatch.setattr(DiffusionSampler, "fill", end_early)
    flags = [
        "--load",
        runs["mdm"],
        "--prompt",
        "Return. The",
        "--infix",
        " of the file. Or not.",
        "--max-new-tokens",
        "4",
    ]
    shown = run(capsys, *flags, "--temperature", "1").rstrip("\n")
    assert shown.startswith("Return. The")
    assert shown.endswith(" of the file. Or not.")
    assert "endoftext" not in shown
    assert run(capsys, *flags, "--temperature", "1", "--stop", ".").rstrip("\n").endswith(" of the file. Or not.")
