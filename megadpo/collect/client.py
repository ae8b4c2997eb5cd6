"""HTTP requests with retries: httpx for the connection, tenacity for the waits.

A request is retried after a refused or broken connection, a time-out, status 408, 425, 429 or any 5xx, and a body that isn't
a JSON object. The wait is the server's `Retry-After` if there is one (RFC 9110, 10.2.3). Else it doubles from
`retry_wait_s` up to a minute, with jitter, so that many requests are not sent at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import time
from collections.abc import Callable
from typing import Any

import httpx
import tenacity

from megadpo.collect.secret import Secret

MOST_BODY_BYTES = 64 * 2**20
"""The most bytes of an answer, uncompressed: as many as a line of a file may have."""

_CONNECT_S = 10.0
_LONGEST_WAIT_S = 60.0
_LONGEST_RETRY_AFTER_S = 3600.0
_RETRIED = {408, 425, 429}
_SHOWN = 300


class TryAgain(Exception):
    """A failure after which a request is retried. Its text is the reason."""

    def __init__(self, reason: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after_s = retry_after_s


class RolloutFailure(Exception):
    """One rollout failed, and is not retried. The collection continues; the reason goes to the file of failures."""

    def __init__(self, kind: str, reason: str, *, status: int | None = None, attempts: int = 1) -> None:
        super().__init__(reason)
        self.kind = kind
        """`request`: the model's server failed; `reward`: the reward failed."""
        self.reason = reason
        self.status = status
        """HTTP status, if there was an answer."""
        self.attempts = attempts


class JsonClient:
    """Sends JSON to one server. Use it as an async context manager.

    kind: that of its RolloutFailures. on_retry: called with the reason before each wait.
    """

    def __init__(
        self,
        base_url: str,
        *,
        kind: str,
        timeout_s: float,
        max_attempts: int,
        retry_wait_s: float,
        connections: int,
        api_key: str | None = None,
        on_retry: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._kind = kind
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._retry_wait_s = retry_wait_s
        self._secret = Secret(api_key)
        self._on_retry = on_retry
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # _send limits the whole request; httpx's own limit starts again with every byte
            timeout=httpx.Timeout(None, connect=min(_CONNECT_S, timeout_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> JsonClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def post(self, path: str, body: Any, read: Callable[[dict[str, Any]], Any] = lambda answer: answer) -> Any:
        """POSTs until there is an answer; returns `read(answer)`. `read` may raise TryAgain, or ValueError for an unusable
        answer. Raises RolloutFailure after the last attempt."""
        return await self._ask("POST", path, body, read, self._max_attempts, self._timeout_s)

    async def get(self, path: str, *, max_attempts: int, timeout_s: float) -> Any:
        """GETs in the same way."""
        return await self._ask("GET", path, None, lambda answer: answer, max_attempts, timeout_s)

    async def _ask(
        self, method: str, path: str, body: Any, read: Callable[[Any], Any], max_attempts: int, timeout_s: float
    ) -> Any:
        attempts = 0
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(TryAgain),
                stop=tenacity.stop_after_attempt(max_attempts),
                wait=self._wait_s,
                before_sleep=self._note_retry,
                reraise=True,
            ):
                attempts += 1
                with attempt:
                    return read(await self._send(method, path, body, timeout_s))
        except TryAgain as error:
            raise self._failure(str(error), error.status, attempts) from error
        except ValueError as error:
            raise self._failure(str(error), None, attempts) from error
        except RolloutFailure as error:
            error.attempts = attempts
            raise
        raise AssertionError("tenacity ends with a result or an exception")

    async def _send(self, method: str, path: str, body: Any, timeout_s: float) -> dict[str, Any]:
        try:
            response = await asyncio.wait_for(self._whole_answer(method, path, body), timeout_s)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise TryAgain(f"no answer in {timeout_s:g} s") from error
        except httpx.RequestError as error:  # connection errors and truncated bodies
            raise TryAgain(f"{type(error).__name__}: {error or 'connection lost'}") from error
        status = response.status_code
        if status in _RETRIED or status >= 500:
            retry_after_s = retry_after(response.headers.get("Retry-After"))
            if retry_after_s is not None and retry_after_s > _LONGEST_RETRY_AFTER_S:
                raise self._failure(
                    f"HTTP {status} with Retry-After {retry_after_s:.0f} s, which is too long", status, 1
                )
            raise TryAgain(f"HTTP {status}: {_shown(response)}", status=status, retry_after_s=retry_after_s)
        if not response.is_success:
            raise self._failure(f"HTTP {status}: {_shown(response)}", status, 1)
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise TryAgain(f"HTTP {status} without a JSON object: {_shown(response)}", status=status)
        hidden: dict[str, Any] = self._secret.hidden_in(answer)
        return hidden

    async def _whole_answer(self, method: str, path: str, body: Any) -> httpx.Response:
        """The answer with its uncompressed body. Raises RolloutFailure if the body has more than MOST_BODY_BYTES."""
        async with self._http.stream(method, path, json=body) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MOST_BODY_BYTES:
                    reason = f"an answer of more than {MOST_BODY_BYTES // 2**20} MiB"
                    raise self._failure(reason, response.status_code, 1)
            headers = {name: value for name, value in response.headers.items() if name != "content-encoding"}
            return httpx.Response(response.status_code, headers=headers, content=bytes(content))

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        jitter = tenacity.wait_random(0, self._retry_wait_s)
        backoff = (tenacity.wait_exponential(self._retry_wait_s, _LONGEST_WAIT_S) + jitter)(state)
        if isinstance(error, TryAgain) and error.retry_after_s is not None:
            return error.retry_after_s + min(backoff, self._retry_wait_s) / 10
        return backoff

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._on_retry(self._secret.hidden(str(error)))

    def _failure(self, reason: str, status: int | None, attempts: int) -> RolloutFailure:
        return RolloutFailure(self._kind, self._secret.hidden(reason), status=status, attempts=attempts)


def retry_after(value: str | None) -> float | None:
    """The seconds of a `Retry-After` header, a number or a date. None if it is missing or invalid."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


def _shown(response: httpx.Response) -> str:
    try:
        answer = response.json()
        error = answer.get("error", answer) if isinstance(answer, dict) else answer
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError):
        text = response.text
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
