"""What differs between two runs. All runs here are SYNTHETIC (see synthetic_runs.py)."""

from __future__ import annotations

import json

import pytest

from megatron.runs.matching import differences
from megatron.runs.reading import load_run
from megatron.runs.replicates import is_replicate
from megatron.scaling.report.page import write_report
from runs.synthetic_runs import write_run


def test_matched_pair_check_finds_only_what_differs(tmp_path):
    first = load_run(write_run(tmp_path / "ar", "ar", epochs=10))
    second = load_run(write_run(tmp_path / "mdm", "mdm", epochs=10))
    assert differences(first, second) == []
    file = tmp_path / "mdm/run.json"
    info = json.loads(file.read_text())
    info["config"]["optimizer"]["lr"] = 3e-3
    info["config"]["run"]["micro_batch_size"] = 4
    file.write_text(json.dumps(info))
    found = differences(first, load_run(tmp_path / "mdm"))
    assert [str(item) for item in found if not item.layout] == ["optimizer.lr: 0.001 against 0.003"]
    assert [item.field for item in found if item.layout] == ["run.micro_batch_size"]


def change(folder, **changes):
    """Rewrite fields of run.json; ``section__name`` is a field of the configuration."""
    info = json.loads((folder / "run.json").read_text())
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            info["config"][section][field] = value
        else:
            info[name] = value
    (folder / "run.json").write_text(json.dumps(info))
    return load_run(folder)


def data(*corpora):
    return [
        {"prefix": prefix, "weight": weight, "documents": 10, "tokens": 1000, "idx_sha256": digest}
        for prefix, weight, digest in corpora
    ]


def weights(first, second):
    return {item.field: item.weight for item in differences(first, second)}


@pytest.fixture
def two(tmp_path):
    return write_run(tmp_path / "ar", "ar", epochs=2), write_run(tmp_path / "mdm", "mdm", epochs=2)


def test_data_are_compared_by_content(two):
    same = {"train": data(("/a/train", 0.9, "11"), ("/a/more", 0.1, "22")), "valid": data(("/a/valid", 1, "33"))}
    first = change(two[0], data=same)
    scaled = {**same, "train": data(("/a/train", 9, "11"), ("/a/more", 1, "22"))}
    assert weights(first, change(two[1], data=scaled)) == {}, "0.9 to 0.1 is 9 to 1"
    swapped = {**same, "train": data(("/a/train", 0.1, "11"), ("/a/more", 0.9, "22"))}
    assert weights(first, change(two[1], data=swapped)) == {"data.train": "result"}
    rebuilt = {**same, "valid": data(("/a/valid", 1, "44"))}
    assert weights(first, change(two[1], data=rebuilt)) == {"data.valid": "result"}
    ours, theirs = ({**same, "train": [{**part, "bin_sample": digest} for part in same["train"]]} for digest in "ab")
    assert weights(change(two[0], data=ours), change(two[1], data=theirs)) == {"data.train": "result"}, "other tokens"
    assert weights(first, change(two[1], data=theirs)) == {}, "older records hold no sample of the tokens"
    moved = {**same, "valid": data(("/b/valid", 1, "33"))}
    assert weights(first, change(two[1], data=moved, data__valid_data_path=["b/valid"])) == {
        "data.valid, place": "layout"
    }


def test_validation_on_the_training_data_is_no_matched_pair(two):
    """Data given by file: AR validated on one set, MDM on its own training data."""
    record = {"train": data(("/a/train", 1, "11")), "valid": data(("/a/valid", 1, "33"))}
    files = {"data__valid_data_path": None, "data__valid_data_path_file": "valid.txt"}
    first = change(two[0], data=record, **files)
    second = change(two[1], data={**record, "valid": record["train"]}, **files)
    assert weights(first, second) == {"data.valid": "result"}
    assert "not matched" in write_report([first, second], two[0].parent / "out").read_text()


def test_files_of_old_records_are_unknown_not_equal(two):
    by_file = {"data__valid_data_path": None, "data__valid_data_path_file": "valid.txt"}
    first, second = change(two[0], **by_file), change(two[1], **by_file)
    assert weights(first, second) == {"data.valid": "unknown"}
    page = write_report([first, second], two[0].parent / "out").read_text()
    assert "matched: only the objective differs" not in page
    assert "unknown" in page
    assert weights(first, change(two[1], data__valid_data_path_file="train.txt")) == {"data.valid": "result"}
    blend = change(two[1], data__valid_data_path=["0.5", "a", "0.5", "b"], data__valid_data_path_file=None)
    assert weights(first, blend) == {"data.valid": "result"}


def test_another_estimator_of_validation_is_named(two, tmp_path):
    """Between two bounds; an exact likelihood has none. Runs of before it was recorded were validated with coins."""
    other = write_run(tmp_path / "other", "mdm", epochs=2)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        row.update({"estimator": "exact-count-antithetic"} if row["kind"] == "valid" else {})
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    ar, old, new = load_run(two[0]), load_run(two[1]), change(other, run__valid_estimator="exact-count-antithetic")
    assert [str(item) for item in differences(old, new)] == [
        "validation estimator: 'bernoulli' against 'exact-count-antithetic'"
    ]
    assert not is_replicate(old, new) and differences(ar, new) == [] == differences(ar, old)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokenizer": {"fingerprint": "b"}}, {"tokenizer": "result"}),
        ({"noise_scheme": 2}, {"noise scheme": "result"}),
        ({"run__load": "elsewhere"}, {"start": "result"}),
        ({"run__load": "runs/mdm"}, {}),
        ({"run__save_interval": 7, "run__load_tag": "global_step5"}, {}),
        ({"model__padded_vocab_size": 384}, {"model.padded_vocab_size": "result"}),
        ({"data__tokenizer_model": "copy/of/tokenizer"}, {}),
        ({"run__async_save": True, "run__save_best": True, "run__overwrite": True, "optimizer__max_skipped_steps": 3,
          "model__model": "7M", "data__verify_data": True, "run__wandb_project": "x", "data__data_cache_path": "x"}, {}),
        ({"optimizer__cpu_optimizer": True, "model__attention_backend": "fa3"},
         {"optimizer.cpu_optimizer": "layout", "model.attention_backend": "layout"}),
        ({"run__load": "elsewhere", "run__finetune": True}, {"start": "result"}),
        ({"parallel__tensor_model_parallel_size": 2}, {"parallel.tensor_model_parallel_size": "layout"}),
        ({"attempts": [{"changed": {}}, {"changed": {"optimizer.lr": [1e-3, 1e-4]}}]},
         {"settings changed on the way": "result"}),
        ({"attempts": [{"changed": {"run.log_interval": [1, 2]}}]}, {}),
    ],
)  # fmt: skip
def test_everything_that_can_change_a_number_is_compared(two, changes, expected):
    first = change(two[0], tokenizer={"fingerprint": "a"})
    change(two[1], tokenizer={"fingerprint": "a"})
    assert weights(first, change(two[1], **changes)) == expected


def test_a_setting_that_an_older_record_lacks_was_its_default(tmp_path):
    old, new = (load_run(write_run(tmp_path / name, "ar", epochs=4)) for name in ("old", "new"))
    assert "ema_decay" not in old.info["config"]["optimizer"]
    new.info["config"]["optimizer"].update(muon_momentum=0.95, ema_decay=None)
    assert not differences(old, new)
    new.info["config"]["optimizer"].update(ema_decay=0.99)
    assert [str(item) for item in differences(old, new)] == ["optimizer.ema_decay: None against 0.99"]
