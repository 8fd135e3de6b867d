"""One command-line flag: default, help, unit, range, spellings, and what it needs to have an effect."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.errors import UserError

# Larger numbers than this are slips of the keyboard, and overflow what is computed from them.
LARGEST = 10**15
# Optional accelerators: the package behind a choice.
PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute", "liger": "liger_kernel", "fusedadam": "apex"}


@dataclass(frozen=True)
class Range:
    """Numbers that an option takes: all finite ones between the bounds.

    Attributes:
        at_least, at_most: inclusive bounds.
        above, below: exclusive bounds.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))  # a whole number may be too long for a float
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and value <= (LARGEST if self.at_most is None else self.at_most)
        )

    def __str__(self) -> str:
        """Such as ``in [0, 1)``, ``at least 1 and finite``."""
        low, high = (self.at_least, self.above), (self.at_most, self.below)
        if any(x is not None for x in low) and any(x is not None for x in high):
            left = f"({_plain(self.above)}" if self.above is not None else f"[{_plain(self.at_least)}"
            right = f"{_plain(self.below)})" if self.below is not None else f"{_plain(self.at_most)}]"
            return f"in {left}, {right}"
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(
            [*(f"{word} {_plain(value)}" for word, value in words.items() if value is not None), "finite"]
        )

    def brief(self) -> str:
        """For ``--help``: without a limit of a million or more, which only stops slips of the keyboard."""
        is_guard = self.at_most is not None and self.at_most >= 10**6
        return str(replace(self, at_most=None) if is_guard else self).removesuffix(" and finite")


def _plain(value: float | None) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def option(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    unit: str = "",
    range: Range | None = None,
    needs: tuple[str, ...] = (),
    published: bool = False,
    no_effect: str = "",
    affects: str = "",
    chooses: bool = False,
    follows: str = "",
) -> Any:
    """Declare a field that is also a flag.

    Args:
        default: value when the flag is absent.
        help: one line for ``--help``.
        flags: spellings; the default is ``--field-name``. The first one is shown in error messages.
        choices: allowed values (compared without case).
        unit: what the number counts, shown as the metavar.
        range: numbers that are allowed; every number has one.
        needs: the flag has an effect only with one of these fields: ``name`` (set), ``name=value`` or ``name!=value``.
        published: launch scripts pass the flag where it has no effect, so it is then named at start instead of refused.
        affects: what a change of the setting between two starts of a run means; default: ``AFFECTS`` of its section.
            "results": other numbers, so it is refused unless asked for. "schedule": the same, but a branch may change it,
            because it only shapes the rate. "length" and "validation": other numbers that
            people change on purpose (a longer run, another estimator), so they are recorded. "layout", "output": the
            same numbers, elsewhere or faster. "identity": names of things that are compared by their content instead.
        chooses: the flag alone asks for its objective, as the launch scripts of arXiv 2507.15857 do.
        follows: "vocabulary": the size before padding, where the flag is absent.
        no_effect: why the flag, which launch scripts pass, never has an effect here.
    """
    metadata = {
        "help": help, "flags": flags, "choices": choices, "unit": unit, "range": range, "needs": needs,
        "published": published or bool(no_effect), "no_effect": no_effect, "affects": affects, "chooses": chooses,
        "follows": follows,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def spelling(item: Field) -> str:
    """The flag of a field, as messages name it."""
    return next(iter(item.metadata["flags"]), flag_of(item.name))


def flag_of(name: str) -> str:
    """The flag of a field that has no spelling of its own."""
    return "--" + name.replace("_", "-")


def default_of(item: Field) -> Any:
    """The value of a field when its flag is absent."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def check_range(item: Field, value: Any) -> None:
    """Check the value of one option; None and what has no range pass.

    Raises:
        UserError: it is outside.
    """
    allowed = item.metadata.get("range")
    if allowed is not None and value is not None and value not in allowed:
        text = str(value)
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise UserError(f"{spelling(item)} is {shown}", f"it must be {allowed}", "correct the number")


def is_installed(choice: str) -> bool:
    """Whether the package behind a choice is there; PyTorch's own always is."""
    if choice not in PACKAGES:
        return True
    name, _, part = PACKAGES[choice].partition(".")  # looked up whole, a part would import what it is a part of
    found = importlib.util.find_spec(name)
    places = (found.submodule_search_locations if found else None) or ()
    return found is not None and (not part or any((Path(place) / part).is_dir() for place in places))


def idle_options(flags: Sequence[tuple[Field, Any]]) -> Iterator[tuple[Field, str]]:
    """Options that were given but can have no effect in this combination, each with the reason.

    Args:
        flags: every flag and its value.
    """
    values = {item.name: value for item, value in flags}
    for item, value in flags:
        needs = item.metadata["needs"]
        if value == default_of(item):
            continue
        if item.metadata["no_effect"]:
            yield item, item.metadata["no_effect"]
        elif needs and not any(_is_met(need, values) for need in needs):
            yield item, "needs " + " or ".join(_as_flag(need) for need in needs)


def _is_met(need: str, values: dict[str, Any]) -> bool:
    name, _, value = need.partition("=")
    found = values.get(name.removesuffix("!"))
    return (str(found).lower() == value.lower()) != name.endswith("!") if value else bool(found)


def _as_flag(need: str) -> str:
    name, _, value = need.partition("=")
    flag = flag_of(name.removesuffix("!"))
    if name.endswith("!"):
        return f"no {flag}" if value == "true" else f"another {flag} than {value}"
    if value in ("false", "none"):
        return ("--no-" if value == "false" else "no --") + name.replace("_", "-")
    return f"{flag} {value}" if value and value != "true" else flag


POSITIVE, NOT_NEGATIVE, SEED = Range(at_least=1), Range(at_least=0), Range(at_least=0, at_most=2**32 - 1)
PROBABILITY, DROPOUT, EPSILON = Range(at_least=0, at_most=1), Range(at_least=0, below=1), Range(at_least=1e-30, below=1)
ABOVE_ZERO, MINUTES = Range(above=0), Range(above=0, at_most=60 * 24 * 365)
SIZE, TOKENS = Range(at_least=1, at_most=10**6), Range(at_least=1, at_most=10**9)
