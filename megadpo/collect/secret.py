"""Hides a server's API key in everything that is printed and written. (A server that refuses a key often repeats it, whole,
in part, or encoded.)"""

from __future__ import annotations

import base64
import re
import urllib.parse
from typing import Any

HIDDEN = "(key)"
_SHORTEST_PART = 6
"""A text with at least this many consecutive characters of the key is a part of it."""


class Secret:
    """One key. None: there is none, and nothing is hidden."""

    def __init__(self, key: str | None) -> None:
        self._forms = _forms(key) if key else []
        whole = "|".join(re.escape(form) for form in sorted(self._forms, key=len, reverse=True))
        self._whole = re.compile(whole, re.IGNORECASE) if whole else None

    def hidden(self, words: str) -> str:
        """The message `words` with (key) in place of the key in any form, and of each part of it."""
        if self._whole is None:
            return words
        words, shown, start = self._whole.sub(HIDDEN, words), "", 0
        lower = [form.lower() for form in self._forms]
        while start < len(words):
            end = start
            while end < len(words) and any(words[start : end + 1].lower() in form for form in lower):
                end += 1
            is_part = end - start >= _SHORTEST_PART
            shown += HIDDEN if is_part else words[start]
            start = end if is_part else start + 1
        return shown

    def hidden_in(self, value: Any) -> Any:
        """A JSON value with (key) in place of the whole key, in any form, in its texts and names."""
        if self._whole is None:
            return value
        if isinstance(value, str):
            return self._whole.sub(HIDDEN, value)
        if isinstance(value, list):
            return [self.hidden_in(one) for one in value]
        if isinstance(value, dict):
            return {self._whole.sub(HIDDEN, name): self.hidden_in(one) for name, one in value.items()}
        return value


def _forms(key: str) -> list[str]:
    """The key in all forms that servers and proxies write: as it is, reversed, percent-encoded, in hexadecimal, and in base64
    at each of the three offsets at which it may start."""
    raw = key.encode()
    forms = [key, key[::-1], urllib.parse.quote(key, safe=""), raw.hex()]
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
        inner = encoded[(before * 8 + 5) // 6 : len(encoded) - 1]  # its first and last characters hold other bits too
        forms += [inner, inner.replace("+", "-").replace("/", "_")]
    return [form for form in dict.fromkeys(forms) if form == key or len(form) >= _SHORTEST_PART]
