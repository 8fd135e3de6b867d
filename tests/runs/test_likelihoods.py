"""Records of likelihoods: written, read, and put into words."""

from __future__ import annotations

import json

import pytest

from megatron.errors import UserError
from megatron.runs.likelihoods import BOUND, EXACT, Likelihoods, Value, VerdictRecord

VALUES = [Value("ar", "chain rule", EXACT, 3.8, 0.02, 0.05, 40, 1),
          Value("mdm", "bound, 16 passes", BOUND, 4.3, 0.07, 0.14, 40, 16, near_ties=0, tokens=500)]  # fmt: skip
VERDICT = VerdictRecord(
    "ar", "mdm", ["chain rule", "bound, 16 passes"], "undecided at 95 %", 0.02, 0.05, "all documents", "a bound"
)


def test_a_record_comes_back_as_it_was(tmp_path) -> None:
    written = Likelihoods(160, 128, VALUES, [VERDICT], near_tie_below=2e-5)
    written.save(tmp_path / "new/likelihood.json")
    assert Likelihoods.load(tmp_path / "new/likelihood.json") == written


def test_one_of_before_near_ties_were_counted_is_read(tmp_path) -> None:
    Likelihoods(160, 128, VALUES, [VERDICT]).save(tmp_path / "old.json")
    record = json.loads((tmp_path / "old.json").read_text())
    del record["near_tie_below"]
    for row in record["findings"]:
        del row["near_ties"], row["tokens"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert [own.near_ties for own in Likelihoods.load(tmp_path / "old.json").findings] == [0, 0]


def test_a_verdict_in_words() -> None:
    assert VERDICT.answer == "mdm below ar: undecided at 95 %"
    expected = "+0.0200 ± 0.0500 (bound, 16 passes against chain rule), paired, on all documents; rests on a bound"
    assert VERDICT.reason == expected


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"findings": [{"model": 1}], "verdicts": []}', '{"findings": 3, "verdicts": []}', "{}"]
)
def test_another_file_is_named(tmp_path, text) -> None:
    (tmp_path / "likelihood.json").write_text(text)
    with pytest.raises(UserError, match=r"likelihood\.json.* it holds what megatron likelihood --output wrote"):
        Likelihoods.load(tmp_path / "likelihood.json")


ODD = {"nll": "4.3", "reach_95": None, "documents": 1.5, "model": 3, "kind": None, "near_ties": True}


@pytest.mark.parametrize("name", ODD)
def test_a_value_of_another_type_is_named(tmp_path, name) -> None:
    Likelihoods(160, 128, VALUES, [VERDICT]).save(tmp_path / "likelihood.json")
    record = json.loads((tmp_path / "likelihood.json").read_text())
    record["findings"][0][name] = ODD[name]
    (tmp_path / "likelihood.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{name} is .* it holds what megatron likelihood --output wrote"):
        Likelihoods.load(tmp_path / "likelihood.json")


@pytest.mark.parametrize(("name", "value"), [("samples", "many"), ("seq_length", None), ("near_tie_below", [])])
def test_a_head_of_another_type_is_named(tmp_path, name, value) -> None:
    (tmp_path / "likelihood.json").write_text(
        json.dumps({"samples": 1, "seq_length": 2, "findings": [], "verdicts": [], name: value})
    )
    with pytest.raises(UserError, match=f"{name} is "):
        Likelihoods.load(tmp_path / "likelihood.json")


@pytest.mark.parametrize(("name", "value"), [("estimators", ["one"]), ("estimators", "ab"), ("gap", "x")])
def test_a_verdict_of_another_type_is_named(tmp_path, name, value) -> None:
    Likelihoods(160, 128, VALUES, [VERDICT]).save(tmp_path / "likelihood.json")
    record = json.loads((tmp_path / "likelihood.json").read_text())
    record["verdicts"][0][name] = value
    (tmp_path / "likelihood.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{name} is "):
        Likelihoods.load(tmp_path / "likelihood.json")
