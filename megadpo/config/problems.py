"""Errors for users: a config or a data file is refused with all its problems at once, each with a fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Made = TypeVar("Made")

EXIT_REFUSED = 2
"""Exit code of a run whose config or data was refused (0 is success, anything else a crash)."""
EXIT_NOT_SAVED = 74
"""Exit code of a run that ends because it can't save (EX_IOERR)."""

_LONGEST_VALUE = 200


@dataclass(frozen=True)
class Problem:
    """One refusal."""

    where: str
    """Dotted config key, or file:line."""
    value: object
    """The refused value."""
    expected: str
    """What would be accepted."""
    fix: str
    """What the user can do."""

    def __str__(self) -> str:
        shown = " ".join(repr(self.value).split())
        if len(shown) > _LONGEST_VALUE:
            shown = shown[:_LONGEST_VALUE] + "..."
        return f"{self.where}: got {shown}; expected {self.expected}; fix: {self.fix}"


class UserError(Exception):
    """An error that the user can correct, with every problem found."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        if not self.problems:
            raise AssertionError("a UserError needs at least one Problem")
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class ConfigError(UserError):
    """The config, the layout or the model folder is refused."""


class DataError(UserError):
    """A data file is refused."""


class SaveError(Exception):
    """A checkpoint could not be written; complete ones are untouched. The text says why, where, and how many bytes it
    needs."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or the error's class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def covered(path: str, paths: frozenset[str]) -> bool:
    """True when `path`, a section above it, or something inside it is in `paths`."""
    return any(path == one or path.startswith(one + ".") or one.startswith((path + ".", path + "[")) for one in paths)


class Attempts:
    """Collects the problems of several steps, to report all of them at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._kind: type[UserError] = ConfigError

    def __call__(self, make: Callable[[], Made]) -> Made | None:
        """The result of `make()`; None if it raises a UserError, whose problems are kept."""
        try:
            return make()
        except UserError as error:
            if not self.problems:
                self._kind = type(error)
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None

    def refuse(self) -> None:
        """Raises a UserError of the first one's class with all problems, if there are any."""
        if self.problems:
            raise self._kind(self.problems)
