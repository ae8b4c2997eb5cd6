"""What a user is told when a config or a data file is refused: every problem at once, each with its fix."""

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
    """Dotted config field, or file:line."""
    value: object
    """What was found there."""
    expected: str
    """What would have been accepted."""
    fix: str
    """What to do about it."""

    def __str__(self) -> str:
        shown = " ".join(repr(self.value).split())
        if len(shown) > _LONGEST_VALUE:
            shown = shown[:_LONGEST_VALUE] + "..."
        return f"{self.where}: got {shown}; expected {self.expected}; fix: {self.fix}"


class UserError(Exception):
    """Something the user can put right. Carries every problem found, not only the first."""

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
    """A checkpoint could not be written; complete ones are untouched. Its text says what, where, and how much room it
    takes."""


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for a Problem: its first line, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def covered(path: str, paths: frozenset[str]) -> bool:
    """True when `path`, a section above it, or something inside it is in `paths`."""
    return any(path == one or path.startswith(one + ".") or one.startswith((path + ".", path + "[")) for one in paths)


class Attempts:
    """Several things that may each be refused, so that the user hears of all of them at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._kind: type[UserError] = ConfigError

    def __call__(self, make: Callable[[], Made]) -> Made | None:
        """What `make` gives; None where it raises a UserError, whose problems are kept."""
        try:
            return make()
        except UserError as error:
            if not self.problems:
                self._kind = type(error)
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None

    def refuse(self) -> None:
        """Raises a UserError, of the first one's class, with every problem kept; does nothing where there is none."""
        if self.problems:
            raise self._kind(self.problems)
