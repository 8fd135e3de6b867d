"""What is installed and what is missing, of packages (needs only pip; used by install.sh) and of the machine.

python tools/check_environment.py [--with eval,test]             a table; exit status 1 when a package is missing
python tools/check_environment.py --missing [--with eval,test]   only the missing requirements, one a line, for pip
python tools/doctor.py                                           the table, and this machine: drivers, limits, disk, ...
python tools/doctor.py --preflight TRAINING FLAGS --gpus 64      whether a run fits on GPUs that need not be here
"""

from __future__ import annotations

import platform
import re
import runpy
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from megatron.config.parser import Parser
from megatron.config.usage import suggestion
from megatron.errors import UserError
from megatron.screen import wrapped

DISTRIBUTION = "megatron-mdm"
ROOT = Path(__file__).resolve().parents[2]
# Optional accelerators: distribution names, and what runs in their place.
ACCELERATORS = {
    "apex": (("apex",), "torch's fused AdamW"),
    "fa3": (("flash-attn-3",), "torch's own attention (SDPA)"),
    "fa4": (("flash-attn-4",), "torch's own attention (SDPA)"),
    "liger": (("liger-kernel",), "PyTorch's SwiGLU"),
}


def parsed(requirement: str) -> Any:
    """The name and the versions of a requirement such as ``torch>=2.11,<2.14``."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # a fresh virtual environment has only pip, which carries a copy
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[no-redef,assignment]
    return Requirement(requirement)


def installed_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def satisfied(requirement: str) -> bool:
    """Tell whether an installed distribution meets a requirement such as ``torch>=2.11,<2.14``."""
    wanted = parsed(requirement)
    version = installed_version(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def requirement_tables() -> tuple[list[str], dict[str, list[str]]]:
    """What is needed, and extras by name: of setup.py in a checkout, elsewhere of the installed distribution."""
    if (ROOT / "setup.py").is_file():
        tables: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="requirements")
        return tables["INSTALL_REQUIRES"], tables["EXTRAS_REQUIRE"]
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in metadata.requires(DISTRIBUTION) or []:
        item, _, marker = line.partition(";")
        found = re.search(r"""extra == ["']([^"']+)["']""", marker)
        (extras.setdefault(found.group(1), []) if found else needed).append(item.strip())
    return needed, extras


def requirements(extras: list[str]) -> dict[str, list[str]]:
    """Return the requirements by group: ``needed`` first, then each extra asked for."""
    needed, known = requirement_tables()
    return {"needed": needed, **{name: known[name] for name in extras}}


def extra_names(text: str) -> list[str]:
    """Split ``--with`` values into extras of setup.py; accelerators are left to install.sh."""
    known = [*requirement_tables()[1], *ACCELERATORS]
    names = [name for name in text.replace(",", " ").split() if name]
    for name in names:
        if name not in known:
            raise UserError(
                f"--with {name}",
                f"the choices are {', '.join(known)}",
                suggestion(name, known) or "separate several with commas",
            )
    return [name for name in dict.fromkeys(names) if name not in ACCELERATORS]


def missing(groups: dict[str, list[str]]) -> list[str]:
    """Return every requirement that no installed distribution meets, each once."""
    return list(dict.fromkeys(item for items in groups.values() for item in items if not satisfied(item)))


def print_table(groups: dict[str, list[str]]) -> None:
    """Print one line a requirement: name, installed version, and what is asked for when that is not met."""
    print(f"Python {platform.python_version()}  {sys.executable}")
    for group, items in groups.items():
        print(f"{group}:")
        for item in items:
            name = parsed(item).name
            version = installed_version(name)
            state = "ok" if satisfied(item) else f"MISSING (needs {item})"
            print(f"  {name:<16} {version or '-':<14} {state}")
    print("optional accelerators:")
    for name, (distributions, fallback) in ACCELERATORS.items():
        version = next(filter(None, map(installed_version, distributions)), None)
        print(f"  {name:<16} {version or '-':<14} {'ok' if version else f'absent: {fallback}'}")


def print_namesakes() -> None:
    """Say that another distribution brings a package of our name: which of the two is imported depends on the folder."""
    for name in ("megatron-core", "megatron-lm"):
        version = installed_version(name)
        if version is not None:
            print(
                wrapped(
                    f"note: {name} {version} is installed and has a package called megatron too; ours is {ROOT / 'megatron'}. "
                    f"Programs of this checkout use ours; to import ours elsewhere: pip uninstall {name}, or another environment"
                )
            )


def main() -> int:
    """Command line; returns the exit status."""
    if "--preflight" in sys.argv[1:]:
        return int(import_module("megatron.commands.preflight").main())
    parser = Parser(
        description="Compare installed packages with what this project needs, and say what of this machine would hold up a run.",
        examples=("megatron doctor", "megatron doctor --with eval,test", "megatron doctor --preflight --help"),
    )
    parser.add_argument(
        "--preflight", action="store_true", help="with training flags: does the run fit, and what does it take"
    )
    parser.add_argument("--with", dest="extras", default="", metavar="NAMES", help="extras too: eval,logging,test")
    parser.add_argument("--missing", action="store_true", help="print only missing requirements, one a line")
    options = parser.parse_args()
    groups = requirements(extra_names(options.extras))
    if options.missing:
        print("\n".join(missing(groups)))
        return 0
    if not extra_names(options.extras):  # the table shows every extra, but only what is needed decides
        groups |= requirements(["eval", "logging", "test"])
        print_table(groups)
        print_namesakes()
        if installed_version("torch"):
            print("this machine:")
            print("\n".join(import_module("megatron.commands.environment").lines()))
        return 1 if missing(requirements([])) else 0
    print_table(groups)
    print_namesakes()
    return 1 if missing(groups) else 0
