"""Retry-After, and how long is waited without it."""

from __future__ import annotations

import asyncio
import time
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


def post(server: PolicyServer, retries: list[str]) -> object:
    async def once() -> object:
        options = {"timeout_s": 5.0, "max_attempts": 3, "retry_wait_s": 0.01, "connections": 1}
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
