"""A server that answers as vLLM's does, samples from real weights, and fails on request; run in a process of its own.

The endpoints and answers are those of vLLM 0.32 (`make test-vllm` holds the engine to a true server). POST /fault
{"kind": ..., "times": n} makes the next n requests of that endpoint fail; what was sampled is at GET /seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM

ON_GENERATE = {"die", "hang", "slow", "http_500", "http_429", "not_json", "drop", "refuse", "wrong_version", "mixed"}
ON_GENERATE |= {"lost_logprob", "aborted", "nan", "empty", "no_dev_mode"}
ON_LOAD = {"load_500", "cache_held", "label_lost"}


class State:
    def __init__(self, folder: str) -> None:
        self.model: Any = None
        self.label = "default"
        self.faults: dict[str, int] = {}
        self.seen: list[dict[str, Any]] = []
        self.loads = 0
        self.asleep = ""  # the level that it was sent to sleep with
        self.told: list[str] = []
        self.lock = threading.Lock()
        self.load(folder)

    def load(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def fault(self, kinds: set[str]) -> str:
        """The fault that this request meets, counted down."""
        with self.lock:
            for kind in kinds & self.faults.keys():
                self.faults[kind] -= 1
                if not self.faults[kind]:
                    del self.faults[kind]
                return kind
        return ""


@torch.no_grad()
def sample(state: State, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
    """One choice of /inference/v1/generate with output_mode tokens."""
    generator = torch.Generator().manual_seed(params["seed"])
    ids, content, finish = list(prompt), [], "length"
    for _ in range(params["max_tokens"]):
        logits = state.model(torch.tensor([ids])).logits[0, -1]
        logp = (logits / (params["temperature"] or 1.0)).log_softmax(-1)
        drawn_token = torch.multinomial(logp.exp(), 1, generator=generator)
        token = int(logp.argmax() if params["temperature"] == 0 else drawn_token)
        ids.append(token)
        entry = {"token_id": token, "logprob": min(0.0, float(logp[token])), "rank": 1}
        content.append({**entry, "top_logprobs": [entry]})
        if token in params["stop_token_ids"]:
            finish = "stop"
            break
    drawn = ids[len(prompt) :]
    span = {"version": state.label, "start": 0, "end": len(drawn)}
    stop = drawn[-1] if finish == "stop" else None
    return {
        "index": 0,
        "finish_reason": finish,
        "stop_reason": stop,
        "token_ids": drawn,
        "logprobs": {"content": content},
        "weight_versions": [span],
    }


def spoilt(choice: dict[str, Any], fault: str) -> dict[str, Any]:
    """`choice` as a server that is not well might give it."""
    span = choice["weight_versions"][0]
    if fault == "wrong_version":
        return {**choice, "weight_versions": [{**span, "version": "somebody-elses"}]}
    if fault == "mixed":
        return {**choice, "weight_versions": [{**span, "version": "older"}, span]}
    if fault == "lost_logprob":
        return {**choice, "logprobs": {"content": choice["logprobs"]["content"][1:]}}
    if fault == "aborted":
        return {**choice, "finish_reason": "abort"}
    if fault == "nan":
        content = [{**c, "logprob": float("nan")} for c in choice["logprobs"]["content"]]
        return {**choice, "logprobs": {"content": content}}
    if fault == "empty":
        return {**choice, "token_ids": [], "logprobs": {"content": []}}
    return choice


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, format: str, *args: Any) -> None: ...

    def reply(self, body: Any, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        answers = {
            "/weight_info": {"weight_version": self.state.label},
            "/v1/models": {"data": [{"id": "stub", "max_model_len": 200}]},
            "/seen": {"seen": self.state.seen, "loads": self.state.loads, "told": self.state.told},
            "/is_sleeping": {"is_sleeping": bool(self.state.asleep)},
        }
        self.reply(answers.get(path, b""), 200 if path in answers or path == "/health" else 404)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size) or b"{}")
        with contextlib.suppress(OSError):  # the client hung up
            {
                "/fault": self.on_fault,
                "/inference/v1/generate": self.on_generate,
                "/collective_rpc": self.on_rpc,
                "/reset_prefix_cache": self.on_reset,
                "/update_weight_version": self.on_version,
                "/sleep": self.on_sleep,
                "/wake_up": self.on_sleep,
            }[path](body)

    def on_fault(self, body: dict[str, Any]) -> None:
        with self.state.lock:
            self.state.faults = {body["kind"]: body["times"]} if body["times"] else {}
        self.reply({})

    def on_generate(self, body: dict[str, Any]) -> None:
        fault = self.state.fault(ON_GENERATE)
        if fault == "die":
            os._exit(1)
        if fault == "hang" or self.state.asleep:
            time.sleep(3600)
        if fault == "no_dev_mode":
            self.reply({"detail": "Not Found"}, 404)
            return
        if fault == "slow":
            time.sleep(12.0)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault in ("http_500", "http_429"):
            self.reply({"error": {"message": "boom"}}, int(fault[5:]))
            return
        if "token_ids" not in body or fault == "refuse":
            self.reply({"error": {"message": "prompt is longer than max_model_len"}}, 400)
            return
        if fault == "not_json":
            self.reply(b"<html>proxy error</html>")
            return
        with self.state.lock:
            choice = sample(self.state, body["token_ids"], body["sampling_params"])
            self.state.seen.append({"prompt": body["token_ids"], "label": self.state.label, "ids": choice["token_ids"]})
        self.reply({"request_id": "x", "output_mode": "tokens", "choices": [spoilt(choice, fault)]})

    def on_sleep(self, body: dict[str, Any]) -> None:
        self.state.told.append(self.path)
        self.state.asleep = self.path.partition("?level=")[2]
        self.reply({})

    def on_rpc(self, body: dict[str, Any]) -> None:
        if self.state.fault({"load_500"}):
            self.reply({"error": "out of memory"}, 500)
            return
        assert body["method"] == "reload_weights" and not self.state.asleep
        with self.state.lock:
            if "load_lost" in self.state.faults:  # says that it has loaded, and has not
                self.reply({"results": [None]})
                return
            self.state.load(body["kwargs"]["weights_path"])
            self.state.loads += 1
        self.reply({"results": [None]})

    def on_reset(self, body: dict[str, Any]) -> None:
        self.reply({"success": not self.state.fault({"cache_held"})})

    def on_version(self, body: dict[str, Any]) -> None:
        if not self.state.fault({"label_lost"}):
            self.state.label = body["new_version"]
        self.reply({"success": True, "new_version": body["new_version"]})


def serve(folder: str, port: int) -> None:
    """Serve the model in `folder` until killed."""
    torch.set_num_threads(1)
    Handler.state = State(folder)
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever(poll_interval=0.05)
