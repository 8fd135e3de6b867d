"""Every example script prints a command whose flags parse, and shellcheck finds nothing to say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from prices import MARK, PRICE, first_line, phrase, phrase_of, phrase_of_passes

from megatron.config import Config
from megatron.objectives import OBJECTIVES, parse
from megatron.scaling.sweep.definition import load_sweep
from megatron.scaling.sweep.runner import command_line

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples_scaling"
PATTERNS = ("quickstart/*_*.sh", "training/*/*.sh", "evaluation/validate_*.sh")
RUNS = sorted(path for pattern in PATTERNS for path in EXAMPLES.glob(pattern))
PASSES = sorted([*EXAMPLES.glob("downstream/*.sh"), EXAMPLES / "evaluation/generate.sh"])
LAPTOPS = {*EXAMPLES.rglob("*laptop.*")}
SWEEPS = sorted({*EXAMPLES.glob("sweeps/*.yaml")} - LAPTOPS)
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), REPO / "install.sh", REPO / "tests/run.sh", REPO / ".ci/run"])
PROGRAMS = {"pretrain_gpt.py": "ar", "pretrain_mdm.py": "mdm"}


def dry_run_of(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.run(
        ["bash", str(script), *arguments, "--dry-run"],
        capture_output=True,
        text=True,
        env={**clean, "VIRTUAL_ENV": sys.prefix, **environment},
        timeout=120,
    )


def dry_run(script: Path, *arguments: str, **environment: str) -> list[str]:
    """The words of the command that a script would run. Without an environment, which would check them a second time."""
    result = dry_run_of(script, *arguments, **{"VIRTUAL_ENV": "/nonexistent", **environment})
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def split_command(words: list[str]) -> tuple[list[str], str, list[str]]:
    """(launcher, program name, flags)."""
    at = next(i for i, word in enumerate(words) if Path(word).name in PROGRAMS)
    return words[:at], Path(words[at]).name, words[at + 1 :]


def parsed(words: list[str], *, world_size: int = 1) -> Config:
    _, program, flags = split_command(words)
    return parse(flags, objective=PROGRAMS[program], world_size=world_size)


@pytest.mark.parametrize("script", RUNS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_flags_parse_on_one_node_of_eight(script: Path) -> None:
    words = dry_run(script, GPUS_PER_NODE="8")
    launcher, program, _ = split_command(words)
    assert Path(launcher[1]).name == "_torchrun.py"
    assert "--standalone" in launcher
    assert (REPO / program).name == program
    config = parsed(words, world_size=8)
    if script.parent.name != "ablations":  # those have objectives of their own
        assert config.objective.objective == ("mdm" if "mdm" in str(script.relative_to(EXAMPLES)) else "ar")
    assert config.run.load
    assert config.run.skip_train == script.name.startswith(("eval_", "validate_"))
    assert config.run.save == (None if config.run.skip_train else config.run.load)
    assert f": {phrase_of(config)} ({MARK})." in first_line(script)


def test_every_example_says_what_it_takes_and_costs() -> None:
    """Those that train and validate: above. The laptop's are measured."""
    for script in PASSES:
        assert f": {phrase_of_passes(script)} ({MARK})." in first_line(script), script
    for file in SWEEPS:
        sweep = load_sweep(file)
        # Small models fill no GPU: of these one shares it among runs, at a lower part of its peak.
        own = {"devices": 1, "mfu": 0.1} if file.stem == "crossover_1m" else {}
        assert sweep.price == {**PRICE, **own}
        most = "at most " * bool(sweep.spaces)  # a search may give trials up, or find short ones best
        assert f": {most}{phrase(sweep.flops, **own)} ({MARK})." in first_line(file), file
    told = {*RUNS, *PASSES, *SWEEPS, *LAPTOPS}
    others = {path.name for path in {*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.yaml")} - told}
    assert others == {"common.sh", "cluster.sh", "text.sh", "multi_node.sh"}
    assert all("minutes" in first_line(path) and "measured)." in first_line(path) for path in LAPTOPS)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_sweep_and_every_value_of_a_search_parses(file: Path) -> None:
    sweep = load_sweep(file)
    runs = list(sweep.runs)
    for space in sweep.spaces:
        for number, item in enumerate(space.coordinates):
            points = ((*space.origin[:number], index, *space.origin[number + 1 :]) for index in range(len(item.values)))
            runs += [space.run_at(point) for point in points]
        runs += [space.run_at(space.origin, seed=seed) for seed in space.seeds]
    world_size = 8 if sweep.launcher[0] == "torchrun" else 1
    for run in runs:
        config = parsed(command_line(sweep, run), world_size=world_size)
        assert config.objective.objective == run.objective
        assert (config.run.seed, config.run.save) == (run.seed, str(run.folder))
        assert config.run.train_epochs == (run.epochs if run.trunk is None else None)


def test_readme_has_the_same_table() -> None:
    table = (REPO / "README.md").read_text(encoding="utf-8").split("## Time and price")[1].split("\n## ")[0]
    named = {}  # a later row is an exception to one before
    for cell, figures in re.findall(r"^\| (`.*`) \| (.*) \|$", table, re.MULTILINE):
        found = {path: figures for pattern in re.findall(r"`(.*?)`", cell) for path in EXAMPLES.glob(pattern)}
        assert found, cell
        named |= found
    assert set(named) == {*RUNS, *PASSES, *SWEEPS, *LAPTOPS}
    for path, figures in named.items():
        said = first_line(path).replace(" on 8 H100", "").replace(" on 1 H100", ", on 1 H100")
        assert f": {figures}" in said, path


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BF16": "true"}, "BF16=true; it is 1 for bf16"),  # before: fp32 without a word
        (
            {"TOKENIZER_MODEL": "a", "TOKENIZER_FLAGS": "--tokenizer-type ByteTokenizer"},
            "TOKENIZER_MODEL and TOKENIZER_FLAGS",
        ),
    ],
)
def test_variables_without_effect_are_refused(variables: dict[str, str], message: str) -> None:
    command = ["bash", str(EXAMPLES / "quickstart/train_ar.sh"), "--dry-run"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr


def test_text_is_of_the_checkpoint_that_a_variable_names() -> None:
    words = dry_run(EXAMPLES / "evaluation/generate.sh", LOAD_TAG="best")
    assert words[words.index("--load-tag") + 1] == "best"


def test_quickstart_is_the_papers_recipe() -> None:
    """FACTS of the two published variants: sizes, epochs, batch, optimiser, schedule, dropout."""
    for kind, model, epochs in (("ar", "140M", 50), ("mdm", "425M", 500)):
        words = dry_run(EXAMPLES / f"quickstart/train_{kind}.sh", GPUS_PER_NODE="8", BF16="1")
        config = parsed(words, world_size=8)
        assert (config.model.model, config.run.train_epochs, config.model.seq_length) == (model, epochs, 2048)
        assert (config.run.micro_batch_size, config.run.global_batch_size, config.run.bf16) == (8, 256, True)
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (2e-4, 2e-5, "cosine")
        assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
        assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.lr_warmup_fraction) == (0.1, 1.0, 0.01)
        assert (config.model.attention_dropout, config.model.hidden_dropout) == (0.1, 0.1)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("training/ar/*.sh")))
def test_training_examples_are_matched_pairs(name: str) -> None:
    """The causal and the masked-diffusion script of one name differ in the program and the run's name only."""
    commands = [dry_run(EXAMPLES / f"training/{kind}/{name}", RUN_DIR="/runs/x") for kind in ("ar", "mdm")]
    differing = [(a, b) for a, b in zip(*commands, strict=True) if a != b]
    assert [(Path(a).name, Path(b).name) for a, b in differing] == [tuple(PROGRAMS)]


# Script → the objective it chooses and the flags in which it differs from the plain run.
ABLATIONS = {
    "ar_permuted_orders": ("permuted_ar", {"num_order_list": 16, "use_predefined_order": True}),
    "ar_attention_masking": ("masked_attention_ar", {"randmask_ratio": 0.5}),
    "ar_input_masking": ("masked_input_ar", {"input_mask_ratio": 0.5}),
    "ar_mir": ("mir_ar", {}),
    "ar_augmented": ("augmented_ar", {}),
    "mdm_dual": ("dual", {}),
    "mdm_left_to_right": ("mdm", {"ar_ratio": 0.5}),
    "mdm_low_noise_start": ("mdm", {"low_noise_start": True, "low_noise_iter": 2000, "low_noise_ratio": 0.5}),
    "mdm_noise_schedule": ("mdm", {"noise_schedule": "cosine"}),
    "mdm_maskgit": ("maskgit", {}),
    "mdm_exact_count": ("exact_count_mdm", {}),
    "mdm_random_length": ("mdm", {"random_length_ratio": 0.01}),
    "mdm_block_diffusion": ("block_diffusion", {"block_size": 16}),
}


def test_every_ablation_is_listed() -> None:
    assert {path.stem for path in (EXAMPLES / "training/ablations").glob("*.sh")} == set(ABLATIONS)


def default_of_flag(objective: str, name: str) -> object:
    return vars(OBJECTIVES[objective].Options())[name]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_the_plain_run_in_its_objective_only(name: str) -> None:
    objective, changes = ABLATIONS[name]
    scripts = [f"training/{name.split('_')[0]}/140m_100M.sh", f"training/ablations/{name}.sh"]
    plain, changed = (parsed(dry_run(EXAMPLES / script, RUN_DIR="/runs/x")) for script in scripts)
    assert changed.objective.objective == objective
    given = {
        flag: value for flag, value in changed.objective.options.items() if value != default_of_flag(objective, flag)
    }
    assert given == changes
    assert replace(changed, objective=plain.objective) == plain


def test_environment_and_arguments_override() -> None:
    script = EXAMPLES / "training/ar/140m_100M.sh"
    settings = {"MODEL": "7M", "LR": "1e-3", "TRAIN_SAMPLES": "640", "RUN_DIR": "/tmp/a b", "WANDB_PROJECT": "p"}
    words = dry_run(script, "--log-interval", "3", **settings)
    assert words.count("--log-interval") == 2  # the script's own comes first, the caller's wins
    config = parsed(words)
    assert (config.model.model, config.optimizer.lr, config.run.log_interval) == ("7M", 1e-3, 3)
    assert (config.run.train_samples, config.run.train_epochs, config.run.save) == (640, None, "/tmp/a b")
    assert (config.run.wandb_project, config.run.wandb_exp_name) == ("p", "ar_140m_100M")


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"GPUS_PER_NODE": "1"}, "python"),
        ({"GPUS_PER_NODE": "2", "LAUNCHER": "deepspeed"}, "deepspeed --master_port 29500 --num_gpus 2"),
        (
            {"GPUS_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0"},
            "_torchrun.py --nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr n0 --master-port 29500",
        ),
    ],
)
def test_launcher_follows_the_machine(environment: dict[str, str], launcher: str) -> None:
    words = split_command(dry_run(EXAMPLES / "training/ar/140m_100M.sh", **environment))[0]
    if len(words) > 1 and words[1].endswith(".py"):
        del words[0]  # the interpreter of the environment
    assert " ".join([Path(words[0]).name, *words[1:]]) == launcher


def test_unknown_launcher_is_an_error() -> None:
    with pytest.raises(AssertionError, match="LAUNCHER=mpi; the launchers are auto, python, torchrun and deepspeed; "):
        dry_run(EXAMPLES / "training/ar/140m_100M.sh", LAUNCHER="mpi")


@pytest.mark.parametrize(
    "environment",
    [{name: value, "LAUNCHER": launcher} for name, value, launcher in (
        ("HOSTFILE", "hosts", "torchrun"), ("HOSTFILE", "hosts", "python"),
        ("NNODES", "2", "python"), ("NNODES", "2", "deepspeed"),
    )],
)  # fmt: skip
def test_a_launcher_that_would_train_on_one_of_several_nodes_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match=r"(HOSTFILE=hosts|NNODES=2) with LAUNCHER="):
        dry_run(EXAMPLES / "training/ar/140m_100M.sh", **environment)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"HOSTFILE": "hosts", "NNODES": "1"}, "NNODES=1 with HOSTFILE=hosts; it has 2 hosts; "),
        ({"HOSTFILE": "hosts", "GPUS_PER_NODE": "8"}, "GPUS_PER_NODE=8 with HOSTFILE=hosts; it has 4 slots on 2 hosts; "),
        ({"LAUNCHER": "python", "GPUS_PER_NODE": "8"}, "GPUS_PER_NODE=8 with LAUNCHER=python; python starts one process"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 with NNODES=1; nodes count from 0; "),
        ({"NNODES": "2", "NODE_RANK": "x"}, "NODE_RANK=x with NNODES=2; nodes count from 0; "),
        ({"SLURM_STEP_NUM_NODES": "2", "HOSTFILE": "hosts"}, "HOSTFILE=hosts in a SLURM job; its nodes are those"),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0", "NNODES": "3", "MASTER_ADDR": "n0"},
         "NNODES=3 in a step of 2 nodes; its nodes are those of the job; "),
    ],
)  # fmt: skip
def test_a_variable_that_another_one_overrules_is_refused(
    environment: dict[str, str], told: str, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    if "HOSTFILE" in environment:
        environment = {**environment, "HOSTFILE": str(tmp_path / "hosts")}
    done = dry_run_of(EXAMPLES / "training/ar/140m_100M.sh", **environment)
    assert done.returncode == 2 and told in done.stderr.replace(f"{tmp_path}/", ""), done.stderr


def test_a_variable_that_says_what_the_other_one_says_is_accepted(tmp_path: Path) -> None:
    """As exported by the profile of a cluster."""
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    names = {"HOSTFILE": str(tmp_path / "hosts"), "NNODES": "2", "GPUS_PER_NODE": "2"}
    assert "--hostfile" in dry_run(EXAMPLES / "training/ar/140m_100M.sh", **names)


@pytest.mark.parametrize(
    ("script", "environment", "told"),
    [
        ("training/ar/140m_100M.sh", {"EPOCHS": "2", "TRAIN_SAMPLES": "99"}, ["EPOCHS (TRAIN_SAMPLES takes its place)"]),
        ("training/ar/140m_100M.sh", {"CHECKPOINT": "x", "LOAD_TAG": "best"}, ["CHECKPOINT, LOAD_TAG (only an evaluation"]),
        ("training/ar/140m_100M.sh", {"GPUS_PER_NODE": "1", "RANK_LOGS": "x", "MASTER_ADDR": "a"},
         ["RANK_LOGS (only torchrun", "MASTER_ADDR (it is for several"]),
        ("evaluation/validate_ar.sh", {"LR": "1", "EPOCHS": "2", "SEED": "3"}, ["EPOCHS, LR (only a training reads it)"]),
        ("evaluation/generate.sh", {"TP_SIZE": "2", "LR": "1", "MASTER_PORT": "29500"}, ["LR, TP_SIZE (tools/generate.py"]),
        ("training/multi_node.sh", {"SETUP": "x", "STOP_MINUTES": "1", "NNODES": "2", "GPUS_PER_NODE": "1"},
         ["SETUP, STOP_MINUTES (only a SLURM"]),
        ("training/ar/140m_100M.sh", {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}, []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_variable_that_nothing_reads_is_named(script: str, environment: dict[str, str], told: list[str]) -> None:
    words = ["training/ar/140m_100M.sh"] if "multi_node" in script else []
    done = dry_run_of(EXAMPLES / script, *words, **environment)
    assert done.returncode == 0, done.stderr
    idle = [line for line in done.stderr.splitlines() if line.startswith("without effect here: ") and "--" not in line]
    for line in told:
        assert any(f"without effect here: {line}" in found for found in idle), done.stderr
    assert bool(told) or not idle


@pytest.mark.parametrize(
    "script",
    sorted({*EXAMPLES.rglob("*.sh")} - {EXAMPLES / name for name in ("common.sh", "cluster.sh", "quickstart/text.sh")}),
    ids=lambda path: path.stem,
)
def test_help_says_what_the_script_does_and_starts_nothing(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(script), "--help"], capture_output=True, text=True, timeout=10, cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "VIRTUAL_ENV": "/nonexistent", "RUN_DIR": str(tmp_path / "run")},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    purpose = script.read_text().splitlines()[1].removeprefix("# ")
    assert done.stdout.startswith(purpose)
    told = done.stdout.partition("Variables:\n")[2]
    for text in (script.read_text(), (EXAMPLES / "common.sh").read_text()):
        assert set(re.findall(r"\$\{([A-Z0-9_]+):?=", text)) <= {word.partition("=")[0] for word in told.split()}
    own = re.findall(r"\$\{([A-Z0-9_]+):=([^ ${}]+)\}", script.read_text())
    assert {f"{name}={value}" for name, value in dict(reversed(own)).items()} <= set(
        told.split()
    )  # not those of common.sh
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ""),
    ],
)
def test_memory_of_a_gpu_grows_in_pieces_unless_the_user_says_otherwise(environment: dict[str, str], seen: str) -> None:
    line = f'source {EXAMPLES}/common.sh; bash -c "echo \\${{PYTORCH_ALLOC_CONF:-}}"'
    clean = {"PATH": os.environ["PATH"], "RUN_NAME": "name"}
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env={**clean, **environment}, check=True
    )
    assert result.stdout.strip() == seen


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_shellcheck(script: Path) -> None:
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (bash install.sh --with test)")
    result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, cwd=REPO, check=False)
    assert result.returncode == 0, result.stdout


def test_scripts_are_short_and_harmless() -> None:
    for script in EXAMPLES.rglob("*.sh"):
        text = script.read_text()
        limit = {"common.sh": 200, "cluster.sh": 125, "multi_node.sh": 35, "laptop.sh": 40}.get(script.name, 25)
        assert len(text.splitlines()) <= limit, f"{script} is longer than {limit} lines"
        assert "/dev/shm" not in text
        assert "NCCL_IB_DISABLE" not in text
