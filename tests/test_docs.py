"""What README and docs name exists: files, flags, tests, links; and what they quote is what is there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from megatron.config import Config
from megatron.config.foreign import rules
from megatron.config.option import spelling
from megatron.objectives import OBJECTIVES
from megatron.runs.record import TrainRow, ValidRow

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
# Where a path in a page may begin: beside the page, in the repository, in the package, in the tests.
ROOTS = (REPO, REPO / "megatron", REPO / "tests")
# Flags of programs that others wrote; of the worked example, which is not registered; and one that is wrong on purpose.
FOREIGN_FLAGS = {
    *(
        "--nproc-per-node",
        "--nnodes",
        "--standalone",
        "--nodes",
        "--gpus-per-node",
        "--tasks",
        "--time",
        "--signal",
        "--batch",
        "--test-only",
        "--device",
    ),
    *(rule.flag for rule in rules() if not rule.value),
    *("--model_args", "--batch_size", "--gen_kwargs", "--log_samples", "--span-length", "--hiden-size"),
}
IDS = [str(page.relative_to(REPO)) for page in PAGES]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """Without blocks of Python, whose strings are no promises."""
    return re.sub(r"```python\n.*?```", "", text_of(page), flags=re.DOTALL)


@cache
def known_flags() -> set[str]:
    """Flags of training, of every objective, and whatever a program or script of ours spells."""
    options = [item for section in fields(Config) for item in fields(section.default_factory)]  # type: ignore[arg-type]
    options += [item for cls in OBJECTIVES.values() for item in fields(cls.Options)]
    found = {name for item in options if item.metadata for name in (*item.metadata["flags"], spelling(item))}
    found |= {"--no-" + name.removeprefix("--") for name in found}
    sources = [
        *REPO.glob("megatron/**/*.py"),
        *REPO.glob("tools/*.py"),
        *REPO.glob("*.sh"),
        REPO / "tests/run.sh",
        REPO / "tests/gpu_without_gpu/check.py",
    ]
    for path in [*sources, *REPO.glob("examples_scaling/**/*.sh")]:
        spelled = r"[\"']{0}[\"']" if path.suffix == ".py" else r"(?<![\w-]){0}(?=[\s)|=\]])"
        found |= set(re.findall(spelled.format(r"(--[a-z][\w-]*)"), path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_flag_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w*-])", prose_of(page)))
    assert not {flag for flag in named if not flag.endswith("-")} - known_flags() - FOREIGN_FLAGS


def paths_in(page: Path) -> Iterator[str]:
    """Paths of files of ours: with a slash and a known ending, or a whole folder; patterns with a star too."""
    pattern = r"(?<![\w/.{$~-])((?:megatron|tools|tests|examples_scaling|docs|training|parallel|data|checkpoint)/[\w/.*{},-]+)"
    for found in re.findall(pattern, prose_of(page)):
        name = found.rstrip(".,/")
        if re.search(r"\.(py|sh|yaml)$", name) or (name.startswith(("megatron/", "tests/")) and "..." not in found):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_exists(page: Path) -> None:
    roots = (*ROOTS, REPO / "examples_scaling")
    missing = {name for name in paths_in(page) if not any(any(root.glob(name)) for root in roots)}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_modules_of_a_room_lie_in_it(page: Path) -> None:
    """In a row of a table: files that are named behind a folder, or behind the path of another one."""
    missing = []
    for row in re.findall(r"^\| `.*", text_of(page), re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", row):
            folder = name[: name.rindex("/") + 1] if "/" in name else folder
            path = name if "/" in name else folder + name
            missing += [path] * (bool(folder) and not any((root / path).exists() for root in ROOTS))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_named_test_exists(page: Path) -> None:
    missing = []
    for file, name in re.findall(r"([\w/]+\.py)::(\w+)", text_of(page)):
        path = REPO / "tests" / file.removeprefix("tests/")
        if not path.is_file() or not re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            missing.append(f"{file}::{name}")
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_resolves(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            missing.append(target)
    assert not missing


def anchors_of(page: Path) -> set[str]:
    """Names of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_fault_names_a_test_once() -> None:
    rows = re.findall(r"^\| [A-E]\d.*", text_of(REPO / "docs/reliability.md"), re.MULTILINE)
    named = [re.findall(r"`([\w/]+\.py[:\w]*)`", row) for row in rows]
    assert rows and not [tests for tests in named if not tests or len(tests) > len(set(tests))]


def test_the_worked_example_is_quoted_as_it_is() -> None:
    code = (REPO / "docs/examples/span_mdm.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in text_of(REPO / "docs/objectives.md")


def test_no_page_has_an_open_place() -> None:
    found = {page.name: re.findall(r"\b(?:TODO|FIXME|[A-Z]+_TABLE)\b", text_of(page)) for page in PAGES}
    assert not {name: places for name, places in found.items() if places}


def test_the_house_is_drawn_as_it_is_checked() -> None:
    """Rooms and their levels in docs/architecture.md are those of tests/test_architecture.py."""
    spec = importlib.util.spec_from_file_location("architecture", REPO / "tests/test_architecture.py")
    assert spec is not None and spec.loader is not None
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    drawing = text_of(REPO / "docs/architecture.md").split("```")[1]
    rows = re.findall(r"^ *(\d+)  (\w+(?: · \w+)*)", drawing, re.MULTILINE)
    drawn = {int(level): set(rooms.split(" · ")) for level, rooms in rows}
    assert drawn == {level: set(rooms) for level, rooms in enumerate(architecture.ORDER)}


def test_every_program_is_named_in_the_readme() -> None:
    programs = {f"tools/{path.name}" for path in (REPO / "tools").glob("[!_]*.py")}
    named = {word for code in re.findall(r"`([^`\n]+)`", text_of(PAGES[0])) for word in code.split()}
    assert programs - named == {
        "tools/check_environment.py",
        "tools/download.py",
    }  # doors of install.sh and download.sh


def test_every_field_of_a_metrics_line_is_told() -> None:
    named = set(re.findall(r"`(\w+)`", text_of(REPO / "docs/metrics.md")))
    assert not {item.name for row in (TrainRow, ValidRow) for item in fields(row)} - named - {"kind"}


def test_every_page_is_linked_from_the_readme() -> None:
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\((docs/\w+\.md)", text_of(PAGES[0])))
