"""A real HTTP server on the loopback interface that answers as vLLM does, and fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Key = tuple[str, int | None]
"""(prompt, seed): with num_repeats_add_seed, one rollout."""


@dataclass
class Fault:
    """What is done instead of an answer, once."""

    status: int | None = None
    """None: the connection is dropped."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": {"message": "told to fail"}}'
    delay_s: float = 0.0
    byte_delay_s: float = 0.0
    """After each byte of the body."""
    half_body: bool = False
    """Promise a body and drop the connection in its middle."""


@dataclass
class PolicyServer:
    """Start with `with`. Everything that was asked and answered is noted."""

    delay_s: float = 0.0
    model: str = "tiny"
    lists_models: bool = True
    samples: bool = True
    """false: the answer depends on the prompt alone, as with transformers serve where generation_config.json says so."""
    faults: dict[Key, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    always: Fault | None = None
    """For every request."""
    asked: Counter[Key] = field(default_factory=Counter)
    answered: Counter[Key] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    verified: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0
    """So many answers of /verify say that the sample counts for nothing."""
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> PolicyServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                listed = [{"id": server.model}] if server.lists_models else []
                server.reply(self, 200, json.dumps({"object": "list", "data": listed}).encode())

            def do_POST(self) -> None:
                server.post(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A killed collector resets its connections; its own tests say what must then hold."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def post(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        if request.path == "/verify":
            return self._verify(request, body)
        prompt = body["input"] if "input" in body else body["messages"][-1]["content"]
        key = (prompt if isinstance(prompt, str) else prompt[-1]["content"], body.get("seed"))
        with self.lock:
            self.asked[key] += 1
            self.bodies.append(body)
            self.paths.append(request.path)
            self.headers.append(dict(request.headers))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            fault = self.always or (self.faults[key].pop(0) if self.faults[key] else None)
        try:
            time.sleep(fault.delay_s if fault and fault.delay_s else self.delay_s)
            if fault is not None:
                return self._fail(request, fault)
            said = key if self.samples else (key[0], None)
            answer = chat_answer(said) if request.path == "/v1/chat/completions" else responses_answer(said)
            with self.lock:
                self.answered[key] += 1
            return self.reply(request, 200, json.dumps(answer).encode())
        finally:
            with self.lock:
                self.in_flight -= 1

    def _verify(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            self.verified.append(body)
            self.headers.append(dict(request.headers))
            fault = self.faults[("/verify", None)].pop(0) if self.faults[("/verify", None)] else None
        if fault is not None:
            return self._fail(request, fault)
        text = body["response"]["output"][-1]["content"][0]["text"]
        right = text.startswith(body["expected"])
        result = {**body, "reward": float(right), "extracted": text}
        with self.lock:
            if self.masked:
                self.masked -= 1
                result |= {"reward": 0.0, "mask_sample": True, "failure_reason": "the judge was away"}
        return self.reply(request, 200, json.dumps(result).encode())

    def _fail(self, request: BaseHTTPRequestHandler, fault: Fault) -> None:
        if fault.status is None:
            request.close_connection = True
            request.connection.close()
        elif fault.half_body:
            request.send_response(fault.status)
            request.send_header("Content-Length", "1000")
            request.end_headers()
            request.wfile.write(b'{"choices": [')
            request.close_connection = True
        else:
            self.reply(request, fault.status, fault.body, fault.headers, fault.byte_delay_s)

    def reply(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        byte_delay_s: float = 0.0,
    ) -> None:
        try:
            request.send_response(status)
            for name, value in (headers or {}).items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            for number in range(len(body) if byte_delay_s else 0):
                request.wfile.write(body[number : number + 1])
                time.sleep(byte_delay_s)
            if not byte_delay_s:
                request.wfile.write(body)
        except OSError:  # the collector has been killed
            request.close_connection = True


def answer_of(key: Key) -> str:
    return f"{key[0]} -> {key[1]}"


def chat_answer(key: Key) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer_of(key), "reasoning_content": "let me see"}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }


def responses_answer(key: Key) -> dict[str, Any]:
    part = {"type": "output_text", "text": answer_of(key), "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return {"id": "resp_1", "object": "response", "status": "completed", "model": "tiny", "output": [message]}
