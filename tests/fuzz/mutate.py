"""Seeded damage to trees, texts and bytes, and the rule that all of it is held to: read, or refused in words, in time."""

from __future__ import annotations

import copy
import random
import signal
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from megadpo.config.problems import UserError

LONGEST_S = 30

STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.5, -0.0, 10**30, -(10**30), float("nan"), float("inf"), 5e-324),
    *("", " ", "\n", "\0", "x" * 10_000, "null", "true", "1e999", ".inf", "0x10", "1_000", "12:30:45", "2026-11-21"),
    *("../../etc/passwd", "/dev/null", "/dev/zero", "~", "a/" * 3000, "\ud800", "\u202e", "\N{PILE OF POO}", "é" * 50),
    *("${oc.env:NOT_SET}", "${a.b}", "${", "{0..9999999999}", "{{ 7 * 7 }}", "{% for x in y %}", "%s%n", "[unclosed"),
    *([], {}, [[]], [None], [[[[[[[[[1]]]]]]]]], {"": ""}, {"a": {"b": {"c": {}}}}, ["a", 1, None, {}], [1] * 1000),
    *({"role": "user"}, {"role": "assistant", "content": None}, [{"role": "", "content": ""}], {"a": "b" * 1000}),
]
BYTES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b'"',
    b"'",
    b"!!",
    b"&a ",
    b"*a ",
    b"---\n",
]


def damaged_tree(tree: Any, rng: random.Random, changes: int) -> Any:
    """A copy of nested dicts and lists with some places replaced, taken out, renamed, doubled, wrapped or exchanged."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(changes):
        places = [*_places(tree)]
        node, key = rng.choice(places)
        kind = rng.choice(["replace", "replace", "replace", "delete", "rename", "wrap", "exchange", "add"])
        if kind == "replace":
            node[key] = copy.deepcopy(rng.choice(STRANGE))
        elif kind == "wrap":
            node[key] = rng.choice([[node[key]], {"value": node[key]}])
        elif kind == "exchange":
            other, place = rng.choice(places)
            node[key] = copy.deepcopy(other[place])
        elif node is tree:
            continue
        elif kind == "delete":
            del node[key]
        elif isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(rng.choice(STRANGE)))
        elif kind == "add":
            node[rng.choice(["extra", "", "a.b", "${x}", "\n"])] = copy.deepcopy(rng.choice(STRANGE))
        else:
            node[f"{key}{rng.choice(['s', '_', ' ', 'X'])}"] = node.pop(key)
    return tree[""]


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *_places(node[key])]]


def damaged_bytes(content: bytes, rng: random.Random, changes: int) -> bytes:
    """Content with some bytes flipped, put in, cut out, doubled or cut off."""
    for _ in range(changes):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.randrange(1, 40))
        kind = rng.choice(["flip", "insert", "cut", "double", "end"])
        if kind == "flip" and start < len(content):
            content = content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :]
        elif kind == "insert":
            content = content[:start] + rng.choice(BYTES) * rng.choice([1, 1, 50]) + content[start:]
        elif kind == "cut":
            content = content[:start] + content[end:]
        elif kind == "double":
            content = content[:end] + content[start:]
        elif kind == "end" and rng.random() < 0.3:
            content = content[:start]
    return content


class TooLong(Exception):
    """A case took longer than LONGEST_S."""


def outcome(read: Callable[[], object]) -> tuple[str, str]:
    """ "read", "refused" or "failed", and then why: any other exception than a UserError with words, or more time than
    LONGEST_S."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"not done after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_S)
    try:
        read()
    except UserError as error:
        return ("refused", "") if str(error).strip() else ("failed", "a refusal without words")
    except Exception:
        return "failed", traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "read", ""
