"""Types of config keys: ranges that the reader checks, and how messages describe a type."""

from __future__ import annotations

import dataclasses
import os
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from megadpo.config.variants import OneOf


@dataclass(frozen=True)
class Range:
    """Bounds of a number; None leaves that side open."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """True when the value is inside every bound."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = [(">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)]
        shown = [
            (sign, bound if isinstance(bound, int) else f"{bound:g}") for sign, bound in bounds if bound is not None
        ]
        return " and ".join(f"{sign} {bound}" for sign, bound in shown)


@dataclass(frozen=True)
class NotEmpty:
    """Marks a string that must not be blank."""


@dataclass(frozen=True)
class FitsPath:
    """Marks a string that names a file or folder, and limits its length."""

    most_bytes: int = 3000
    """Linux allows 4,095, including what is written below a folder."""
    most_name_bytes: int = 255

    def holds(self, value: str) -> bool:
        """True if a file system accepts it."""
        names = os.fsencode(value).split(b"/")
        return sum(len(name) + 1 for name in names) <= self.most_bytes and max(map(len, names)) <= self.most_name_bytes


PositiveInt = Annotated[int, Range(ge=1)]
CountOrZero = Annotated[int, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, le=2**31 - 1)]
"""Random generators take 32 bits, and each rank adds a small number to the seed."""
PositiveFloat = Annotated[float, Range(gt=0)]
FloatOrZero = Annotated[float, Range(ge=0)]
Proportion = Annotated[float, Range(ge=0, lt=1)]
Text = Annotated[str, NotEmpty()]
PathText = Annotated[str, NotEmpty(), FitsPath()]
"""A path, or a name of a model or data set, which may be a path."""


def names_files(annotation: Any) -> bool:
    """Whether values of this type name files, folders, models or data sets."""
    return isinstance(annotation, FitsPath) or any(names_files(one) for one in get_args(annotation))


Precision = Literal["bfloat16", "float32"]
"""NeMo RL's names. float16 is not offered: it needs a loss scaler, which bfloat16 makes unnecessary."""


def describe(annotation: Any) -> str:
    """A type in words, for messages."""
    options, bounds = unwrap(annotation)
    words = [_describe_one(option, bounds) for option in options if option is not type(None)]
    return " or ".join(words + (["null"] if type(None) in options else []))


def _describe_one(option: Any, bounds: list[Any]) -> str:
    if (names := next((mark.allowed() for mark in bounds if isinstance(mark, OneOf)), None)) is not None:
        return f"one of {', '.join(names)}"
    ranges = "".join(f" {bound}" for bound in bounds if isinstance(bound, Range))
    origin = get_origin(option)
    if origin is Literal:
        shown = ", ".join(literal_text(one) for one in get_args(option))
        return shown if len(get_args(option)) == 1 else f"one of {shown}"
    if origin is dict:
        return "a mapping of names to " + describe(get_args(option)[1])
    if origin is tuple:
        return "a list of " + describe(get_args(option)[0])
    if dataclasses.is_dataclass(option):
        return "a section"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(option, "any value") + ranges


def literal_text(value: object) -> str:
    """A value as YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def unwrap(annotation: Any) -> tuple[list[Any], list[Any]]:
    """(alternatives, bounds) of an annotation with Annotated and unions; None is the last alternative."""
    bounds: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *bounds = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        options: list[Any] = []
        for one in get_args(annotation):
            inner, more = unwrap(one)
            options += inner
            bounds += more
        return sorted(options, key=lambda option: option is type(None)), bounds
    return [annotation], bounds
