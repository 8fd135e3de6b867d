"""The house as it stands: rooms import downward only, one training run stays small, functions stay readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.objectives import OBJECTIVES

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "megatron"
# From the ground up; rooms of one line know nothing of each other.
ORDER = [
    ["errors"],
    ["files", "randomness", "screen"],
    ["statistics"],
    ["config"],
    ["parallel"],
    ["model"],
    ["objectives"],
    ["data"],
    ["checkpoint"],
    ["runs"],
    ["training", "inference"],
    ["generation"],
    ["evaluation"],
    ["convert"],
    ["hub", "scaling"],
    ["wiring", "commands", "testing"],
    ["api", "__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
WIRING = "wiring"  # the one place through which a room may reach a higher one
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES, MAX_COMPLEXITY, MAX_TRAIN_LINES = 400, 60, 12, 170
# The aim is 4,500 lines in 55 files, which is not reached (docs/architecture.md, Size): a lid on what stands, to be lowered.
# It counts what is imported on request only, too: help, flags of Megatron's, configuration files (0 to 9 files of 80).
MAX_RUN_LINES, MAX_RUN_FILES = 9_190, 83


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imported(path: Path) -> Iterator[str]:
    """Every module of ours that a file names in an import, wherever: at the top, in functions, under TYPE_CHECKING, or as the
    text that ``import_module`` is given."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in whole if name in MODULES)
            if node.module in MODULES:
                yield node.module
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value in MODULES:
            yield node.value.value  # a name for such a text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            yield from (word.value for word in node.args if isinstance(word, ast.Constant) and word.value in MODULES)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def arrows() -> Iterator[tuple[str, str, str]]:
    """(file, room that imports, room that is imported)."""
    for module, path in MODULES.items():
        for target in imported(path):
            if room(module) and room(target) and room(module) != room(target):
                yield str(path.relative_to(REPO)), room(module), room(target)


# fmt: off
TOP = {
    ".ci", ".github", ".gitignore", ".shellcheckrc", "CITATION.cff", "LICENSE", "README.md", "docs", "download.sh",
    "examples_scaling", "install.sh", "megatron", "pretrain_gpt.py", "pretrain_mdm.py", "pyproject.toml", "setup.py", "tests",
    "tools",
}
# fmt: on


def test_nothing_else_lies_at_the_top() -> None:
    """Users know these names; what a command left there by chance is no part of the project."""
    done = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip("no checkout of git")
    assert {path.partition("/")[0] for path in done.stdout.splitlines()} == TOP


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} - {""} <= set(LEVEL)


def test_imports_point_downward_only() -> None:
    upward = [
        f"{file}: {source} imports {target}"
        for file, source, target in arrows()
        if LEVEL[target] >= LEVEL[source] and target != WIRING
    ]
    assert not upward, "\n".join(sorted(set(upward)))
    pairs = {(source, target) for _, source, target in arrows() if target != WIRING}
    assert not {pair for pair in pairs if pair[::-1] in pairs}


def test_only_inference_reaches_up_through_the_wiring() -> None:
    reaching = {source for _, source, target in arrows() if target == WIRING and LEVEL[source] < LEVEL[WIRING]}
    assert reaching <= {"inference"}


def test_the_package_itself_imports_nothing_and_knows_only_its_surface() -> None:
    """The one file that names a room above all others: in its annotations, and when a name is asked for."""
    assert set(imported(MODULES["megatron"])) == {"megatron.api"}
    code = (
        "import sys, megatron; sys.exit(any(name.startswith(('megatron.', 'torch', 'numpy')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0


def test_config_and_objectives_import_no_torch() -> None:
    code = (
        "import sys, megatron.config, megatron.objectives, megatron.model.batch, megatron.model.mask;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0


def test_deepspeed_stays_in_its_room() -> None:
    pattern = re.compile(r"^\s*(import|from) deepspeed\b", re.MULTILINE)
    found = {str(path.relative_to(PACKAGE)) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))}
    assert {name.rsplit("/", 1)[0] for name in found} == {"training/deepspeed"}


def test_fsdp_stays_in_its_room() -> None:
    pattern = re.compile(r"^\s*(import|from) torch\.distributed\.(fsdp|tensor)\b", re.MULTILINE)
    found = {str(path.relative_to(PACKAGE)) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))}
    assert {name.rsplit("/", 1)[0] for name in found} == {"training/fsdp2"}


def code_lines(path: Path) -> int:
    """Lines of code: no blanks, comments, docstrings."""
    text = path.read_text(encoding="utf-8")
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_text and isinstance(first.value.value, str):
                documentation.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    numbered = enumerate(text.splitlines(), 1)
    return sum(
        1
        for number, line in numbered
        if line.strip() and not line.strip().startswith("#") and number not in documentation
    )


def reached(start: str) -> set[str]:
    """Modules that an import of ``start`` can lead to, with the packages around them."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        if module != "megatron":  # names megatron.api, which it imports when asked: see the test below
            waiting += imported(MODULES[module])
        waiting += [parent for parent in [module.rpartition(".")[0]] if parent in MODULES]
    return found


def test_one_training_run_stays_small() -> None:
    """What pretrain_mdm.py imports, lazily or not, with its objective, which the registry names by a string."""
    modules = reached("megatron.training.main") | reached("megatron.objectives.mdm")
    lines = {module: code_lines(MODULES[module]) for module in modules}
    lines["megatron.objectives"] -= len(OBJECTIVES)  # a registry line of a new objective is no growth
    table = "\n".join(f"{count:5} {module}" for module, count in sorted(lines.items(), key=lambda item: -item[1]))
    assert sum(lines.values()) <= MAX_RUN_LINES, f"{sum(lines.values())} lines of code\n{table}"
    assert len(modules) <= MAX_RUN_FILES, f"{len(modules)} files\n{table}"


PROGRAMS = [*SOURCES, *sorted((REPO / "tools").glob("*.py")), *sorted(REPO.glob("*.py"))]


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(REPO)): len(path.read_text(encoding="utf-8").splitlines()) for path in PROGRAMS}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_functions_are_short() -> None:
    long = []
    for path in PROGRAMS:
        for node in functions(path):
            is_train = (path.name, node.name) == ("train.py", "train")
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > (MAX_TRAIN_LINES if is_train else MAX_FUNCTION_LINES):
                long.append(f"{path.relative_to(REPO)}: {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_functions_are_simple() -> None:
    """Cyclomatic complexity, as ruff counts it."""
    command = ["ruff", "check", "--isolated", "--select", "C901", "--output-format", "concise"]
    command += ["--config", f"lint.mccabe.max-complexity={MAX_COMPLEXITY}", "megatron", "tools"]
    result = subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["model", "objectives", "parallel"])
def test_no_any(name: str) -> None:
    found = [
        f"{path.relative_to(REPO)}:{node.lineno}"
        for path in sorted((PACKAGE / name).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    assert not found, found


def test_public_functions_are_typed_and_documented() -> None:
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        for node in public:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any(argument.annotation is None for argument in arguments) or node.returns is None:
                missing.append(f"{path.relative_to(REPO)}: {node.name} is not fully typed")
            if ast.get_docstring(node) is None:
                missing.append(f"{path.relative_to(REPO)}: {node.name} has no docstring")
    assert not missing, "\n".join(missing)
