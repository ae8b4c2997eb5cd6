"""Retry-After, and how long is waited without it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import time
import urllib.parse
from email.utils import formatdate

import pytest

from megadpo.collect.client import JsonClient, RolloutFailure, retry_after
from tests.collect.policy_server import Fault, PolicyServer


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("inf", None), ("nan", None), ("soon", None), ("", None)],
)
def test_retry_after_in_seconds(value, seconds):
    assert retry_after(value) == seconds


def test_retry_after_as_a_date():
    assert retry_after(formatdate(time.time() + 20, usegmt=True)) == pytest.approx(20, abs=2)
    assert retry_after(formatdate(time.time() - 20, usegmt=True)) == 0.0


def post(server: PolicyServer, retries: list[str], **given: object) -> object:
    async def once() -> object:
        options = {"timeout_s": 5.0, "max_attempts": 3, "retry_wait_s": 0.01, "connections": 1, **given}
        async with JsonClient(server.url, kind="request", on_retry=retries.append, **options) as client:
            return await client.post("v1/responses", {"input": "x"})

    return asyncio.run(once())


def test_an_hour_is_not_waited_for():
    with PolicyServer(always=Fault(429, headers={"Retry-After": "86400"})) as server:
        with pytest.raises(RolloutFailure, match="Retry-After 86400 s") as failure:
            post(server, [])
        assert (failure.value.status, server.asked.total()) == (429, 1)


def test_attempts_are_counted_and_their_reasons_told():
    retries: list[str] = []
    with PolicyServer(always=Fault(503)) as server, pytest.raises(RolloutFailure, match="HTTP 503: told") as failure:
        post(server, retries)
    assert failure.value.attempts == 3 and retries == ["HTTP 503: told to fail"] * 2


def test_a_redirect_is_not_followed_and_not_tried_again():
    with PolicyServer(always=Fault(307, headers={"Location": "http://elsewhere/"})) as server:
        with pytest.raises(RolloutFailure, match="HTTP 307"):
            post(server, [])
        assert server.asked.total() == 1


LARGE = b'{"output": "' + b"x" * 2**20 + b'"}'


@pytest.mark.parametrize("packed", [False, True])
def test_a_body_larger_than_the_limit_ends_the_request(packed, monkeypatch):
    monkeypatch.setattr("megadpo.collect.client.MOST_BODY_BYTES", 2**19)
    body, headers = (gzip.compress(LARGE), {"Content-Encoding": "gzip"}) if packed else (LARGE, {})
    with PolicyServer(always=Fault(200, body=body, headers=headers)) as server:
        with pytest.raises(RolloutFailure, match="an answer of more than 0 MiB"):
            post(server, [])
        assert server.asked.total() == 1
    monkeypatch.setattr("megadpo.collect.client.MOST_BODY_BYTES", 2**21)
    with PolicyServer(always=Fault(200, body=body, headers=headers)) as server:
        assert post(server, []) == {"output": "x" * 2**20}


def test_a_body_slower_than_the_time_of_a_request_ends_it():
    with PolicyServer(always=Fault(200, body=b'{"output": []}', byte_delay_s=0.2)) as server:
        started = time.monotonic()
        with pytest.raises(RolloutFailure, match="no answer in 0.5 s"):
            post(server, [], timeout_s=0.5, max_attempts=1)
        assert time.monotonic() - started < 2


KEY = "sk-Abc/9876+very=secret0"


@pytest.mark.parametrize(
    "said",
    [
        f"bad key {KEY}",
        f"bad key {KEY.upper()}",
        f"bad key {KEY[:9]}...{KEY[-8:]}",
        f"bad key {KEY[::-1]}",
        f"bad header {base64.b64encode(f'Bearer {KEY}'.encode()).decode()}",
        f"bad header {base64.urlsafe_b64encode(f'user:{KEY}'.encode()).decode()}",
        f"bad key {urllib.parse.quote(KEY, safe='')}",
        f"bad key {KEY.encode().hex()}",
        f"bad header {f'Bearer {KEY}'!r}",
    ],
)
def test_a_key_that_a_server_repeats_in_any_form_is_hidden(said):
    retries: list[str] = []
    parts = [KEY[n : n + 6].lower() for n in range(len(KEY) - 5)]
    forms = [
        *parts,
        *(part[::-1] for part in parts),
        KEY.encode().hex()[:16],
        base64.b64encode(KEY.encode()).decode()[4:20],
    ]
    for status in (400, 503):
        body = json.dumps({"error": {"message": said}}).encode()
        with PolicyServer(always=Fault(status, body=body)) as server, pytest.raises(RolloutFailure) as failure:
            post(server, retries, api_key=KEY, max_attempts=2)
        told = " ".join([failure.value.reason, *retries])
        assert "(key)" in told and not [form for form in forms if form in told.lower()]
    answer = {"output": [{"text": f"{said}"}], KEY: 1, "n": [None, 2]}
    with PolicyServer(always=Fault(200, body=json.dumps(answer).encode())) as server:
        assert KEY.lower() not in json.dumps(post(server, [], api_key=KEY)).lower()
