"""Every command of README and docs: of blocks, as bash reads them, and of code within lines."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
# Data comes first: other pages use what these make.
FIRST = ["docs/data.md", "docs/scaling.md", "docs/training.md", "docs/converting.md"]
EVERY = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
PAGES = [REPO / name for name in FIRST] + [page for page in EVERY if str(page.relative_to(REPO)) not in FIRST]
PROGRAMS = ("python", "bash", "torchrun", "sbatch", "pip", "megatron", "env")
# bash itself splits words, follows loops and fills in variables; each program only says how it was called.
SAY = "".join(f"{name}() {{ printf '%s\\t' {name} \"$@\"; echo; }}\n" for name in PROGRAMS)


@dataclass(frozen=True)
class Command:
    """One command, or the Python of a page, whose blocks follow on each other.

    Attributes:
        page: where it stands, and its number there.
        words: of the command line; of Python: ``python-block`` and the code.
        variables: ``NAME=VALUE`` before it.
        is_whole: stands in a block, to be run as it is; within a line of text it may be the part that matters there.
    """

    page: str
    words: tuple[str, ...]
    is_whole: bool
    variables: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page} {' '.join(self.words)[:60]}"


@cache
def commands() -> list[Command]:
    """All of them, page by page."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(REPO))
        text = page.read_text(encoding="utf-8")
        lines: list[tuple[str, ...]] = []
        python: list[str] = []
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if language == "python":
                python.append(block)
            elif language in ("", "bash") and re.search(rf"^(\w+=\S+ )*({'|'.join(PROGRAMS)}) ", block, re.MULTILINE):
                lines += _of_block(block)
        lines += [("python-block", "\n".join(python))] if python else []
        for number, words in enumerate(dict.fromkeys(lines), 1):
            start = next(at for at, word in enumerate(words) if word != "env" and not re.match(r"[A-Z_]+=", word))
            found.append(Command(f"{name}:{number}", words[start:], True, words[1:start]))
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        codes = dict.fromkeys(re.findall(r"`([^`\n]+)`", prose))
        found += [Command(name, tuple(words), False) for code in codes if (words := _of_code(code))]
    return found


def _of_block(block: str) -> list[tuple[str, ...]]:
    block = re.sub(r"^((?:[A-Z_]+=\S+ )+)", r"env \1", block.replace("…", ""), flags=re.MULTILINE)
    script = SAY + "set -euf\n" + block
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and not done.stderr, f"{block}\n{done.stderr}"
    lines = [line.split("\t")[:-1] for line in done.stdout.splitlines() if line.endswith("\t")]
    return [tuple(_without_options(words)) for words in lines]


def _of_code(code: str) -> list[str]:
    """The words of a command that stands in a line of text; none where it is something else."""
    if not re.match(rf"({'|'.join(PROGRAMS)}|\./\w+\.sh|tools/\w+\.py|pretrain_\w+\.py) \S", code):
        return []
    code = re.sub(r"(\w)(\\\|\w+|\|[\w-]+)+", r"\1", code)  # alternatives: the first
    words = _without_options(shlex.split(code))
    words = words[: words.index(">")] if ">" in words else words
    if words[0].endswith(".py"):
        words.insert(0, "python")
    return ["bash", words[0][2:], *words[1:]] if words[0].startswith("./") else words


def _without_options(words: list[str]) -> list[str]:
    """Without ``[--flag VALUE]``, which says what else may be given, and without dots that say "and so on"."""
    kept, inside = [], False
    for word in words:
        inside = inside or bool(re.match(r"\[[^\s]*$", word) and not word.startswith("[MASK"))
        if not inside and word not in ("...", "…"):
            kept.append(word)
        inside = inside and not word.endswith("]")
    return kept
