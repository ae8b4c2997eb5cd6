"""A chat template that would take all time or memory is refused."""

from __future__ import annotations

import pytest

from megadpo.config.problems import ConfigError, DataError
from megadpo.data.tokens.tokenization import PairTokenizer
from tests.data.tokens.test_tokenization import MESSAGES
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer

DOUBLED = "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("on_bad_row", ["refuse", "drop"])
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'x' * 9999999999 }}", "more than 1024 MiB of memory"),
        ("{{ '%9999999999d' % 1 }}", "more than 1024 MiB of memory"),
        (DOUBLED, "more than 1024 MiB of memory"),
        ("{{ 'x' * 70000000 }}", "writes more than 64 MiB"),
        (LOOPS, "more than 2 s"),
    ],
)
def test_too_much(template: str, words: str, on_bad_row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.config.bounded.MOST_SECONDS", 2.0)
    encoder = PairTokenizer(tiny_tokenizer(chat_template=template + CHATML))
    with pytest.raises(DataError, match=words):
        encoder.encode([MESSAGES], on_bad_row=on_bad_row)  # type: ignore[arg-type]


def test_what_jinja_cannot_read() -> None:
    for template in ("{{" + "(" * 5000, "{{ " + "9" * 5000 + " }}"):
        with pytest.raises(ConfigError, match="a Jinja template"):
            PairTokenizer(tiny_tokenizer(chat_template=template))
