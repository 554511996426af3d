"""A real HTTP endpoint on 127.0.0.1 that speaks the chat-completions protocol, and can misbehave in every known way."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

GOOD = {
    "checks": [{"tool": "look", "establishes": "the day has room"}],
    "steps": ["look", "act"],
    "avoid": [{"tool": "shout", "why": "it changes what was not asked for"}],
    "deviate": {"after": "look", "why": "failures act without looking"},
    "masked": [],
}


def completion(content: str | None, finish: str = "stop", tokens: int = 100) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": tokens - 10, "completion_tokens": 10, "total_tokens": tokens}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice], "usage": usage}
    return json.dumps(body).encode()


def good_reply(**changes: Any) -> bytes:
    return completion(json.dumps({**GOOD, **changes}))


class Reply:
    """What the stub does with one request."""

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        *,
        headers: dict[str, str] | None = None,
        delay: float = 0.0,
        drop: bool = False,
        cut: int | None = None,
        drip: float = 0.0,
    ) -> None:
        self.body, self.status, self.delay, self.drop, self.cut, self.drip = body, status, delay, drop, cut, drip
        self.headers = {"Content-Type": "application/json", **(headers or {})}


class StubEndpoint:
    """Serves `script` one reply a request (a callable sees the request's body); the last reply repeats."""

    def __init__(self, *script: Reply | Callable[[dict[str, Any]], Reply]) -> None:
        self.script = list(script) or [Reply(good_reply())]
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.wire: list[bytes] = []  # the whole request: its line, its headers, its body
        self.times: list[float] = []
        self.peak = 0
        self._busy = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint._serve(self)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(poll_interval=0.01), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StubEndpoint:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self._lock:
            step = self.script[min(len(self.bodies), len(self.script) - 1)]
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.wire.append(f"{handler.requestline}\r\n{handler.headers.as_string()}".encode() + body)
            self.times.append(time.monotonic())
            self._busy += 1
            self.peak = max(self.peak, self._busy)
        try:
            self._answer(handler, step if isinstance(step, Reply) else step(json.loads(body)))
        except OSError:
            pass  # the client hung up, as it should on a time-out
        finally:
            with self._lock:
                self._busy -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        time.sleep(reply.delay)
        if reply.drop:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if reply.drip:
            for i in range(len(reply.body)):
                handler.wfile.write(reply.body[i : i + 1])
                handler.wfile.flush()
                time.sleep(reply.drip)
        elif reply.cut is not None:
            handler.wfile.write(reply.body[: reply.cut])
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.wfile.write(reply.body)
