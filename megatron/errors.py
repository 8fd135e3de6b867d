"""The only errors that a program prints without a traceback.

Three parts, always: what was given (or found), the rule, the fix. Whatever else is raised is a fault of this project or of
a library, and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class UserError(ValueError):
    """Wrong input: a flag, a file, a folder, a combination.

    Attributes:
        given: what was given or found.
        rule: what must hold.
        fix: what to do.
        exit_status: of a program that ends by it: 2.
    """

    exit_status: ClassVar[int] = 2

    def __init__(self, given: str, rule: str, fix: str) -> None:
        super().__init__(f"{given}; {rule}; {fix}")
        self.given, self.rule, self.fix = given, rule, fix

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Workers send it to their parents by pickle."""
        return type(self), (self.given, self.rule, self.fix)


class Failure(UserError):
    """The input was right, the world was not: a full disk, a hub out of reach, a run that diverged. Exit status 1."""

    exit_status: ClassVar[int] = 1


def require(condition: object, given: str, rule: str, fix: str) -> None:
    """Raise a :class:`UserError` unless ``condition`` holds."""
    if not condition:
        raise UserError(given, rule, fix)
