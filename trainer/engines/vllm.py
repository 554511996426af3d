"""The `vllm` engine: token ids to one or more vLLM servers over HTTP, and the policy's weights after each step.

vLLM batches continuously, so every episode just awaits its own turn; servers are taken in turn. New weights are written
as a Hugging Face folder that the servers can read, and each server reloads them, drops its prefix cache and says which
weights it has; only then is it asked for tokens. Every completion names the weights that sampled it.

What fails is never the policy's fault. A server that dies, errs, or hangs is left out, or started again if it is our
own, and the request goes to the next one, with the same seed: it is the same draw, so trying again does not favour
short answers. Where no server is there, the engine waits for one. Once that or the retries are spent the run stops
(`EngineLost`), with a checkpoint. A request that is merely slow, while its server still gives tokens, drops its rollout
after `timeout`, as a broken environment does.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from trainer.concurrency import run_together
from trainer.data import Completion, Sampling
from trainer.engines.vllm_server import Process, Server, ServerFailed, write_weights
from trainer.errors import EngineLost, EnvironmentBroken

log = logging.getLogger(__name__)
LONGEST_PAUSE = 30.0  # seconds between two tries
LEAST_PATIENCE = 2.0  # seconds for the single token that tells a slow request from a server that hangs


class VLLMEngine:
    """Tokens in, tokens out, by servers.

    Args:
        model: what is served: it is written to `folder` before the first request and after each `load_weights`.
        urls: servers, each started as `trainer.engines.vllm_launch.command` says.
        launched: a server of our own, which is started again when it dies or hangs.
        folder: where the weights go: a path at which the servers see the same files.
        stop_ids: tokens that end a turn.
        max_length: the most tokens of prompt and completion; a completion that reaches it finishes with "length".
        timeout: seconds of one request, of loading the weights, or of waiting while no server is there.
        max_retries: further tries of one request, each at the next server.
        pause: seconds before the first of them; it doubles from try to try.
        seed: of `generator`, which draws the seed of every request.
    """

    def __init__(
        self,
        model: Any,
        *,
        urls: Sequence[str] = (),
        launched: Process | None = None,
        folder: Path,
        stop_ids: Iterable[int],
        max_length: int,
        timeout: float = 600.0,
        max_retries: int = 3,
        pause: float = 1.0,
        seed: int = 0,
        remedy: str = "",
    ) -> None:
        self.servers = [Server(url.rstrip("/")) for url in urls]
        if launched:
            self.servers.append(Server(launched.url, process=launched, max_starts=max_retries))
        self.model, self.folder, self.max_length = model, folder.absolute(), max_length
        self.stop_ids = sorted(stop_ids)
        self.timeout, self.max_retries, self.pause = timeout, max_retries, pause
        self.remedy = remedy
        self.generator = torch.Generator().manual_seed(seed)
        self.version = ""
        self._run = uuid.uuid4().hex[:12]  # a label that no other run gives
        self._saves = self._running = self._turn = 0
        self._stale = True
        self._alone = False  # no server was there when last looked for
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- the engine protocol ------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        """Sample `n` continuations of `prompt_ids`; each ends in a stop token or at a length limit.

        Raises:
            EngineLost: no server gave an answer, however often it was asked.
            EnvironmentBroken: the answer took longer than `timeout`, though the server still gives tokens.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids: got no token, needs at least one")
        room = self.max_length - len(prompt_ids)
        if room <= 0 or sampling.max_tokens < 1:
            return [Completion([], [], "length") for _ in range(n)]
        seeds = torch.randint(2**62, (n,), generator=self.generator).tolist()
        self._running += 1
        try:
            await self._publish()
            requests = [self._request(prompt_ids, sampling, min(room, sampling.max_tokens), seed) for seed in seeds]
            return await run_together(self._complete(request) for request in requests)
        finally:
            self._running -= 1

    def load_weights(self, model: Any) -> None:
        """Sample from `model` from now on. The servers get it with the next request, before they are asked anything."""
        if self._running:
            raise RuntimeError("load_weights while rollouts are running: they would mix two policies")
        self.model, self._stale = model, True

    def sleep(self) -> None:
        """Let the servers give back what memory they can (level 1: the weights are kept on the host)."""
        self._tell("/sleep?level=1")

    def wake(self) -> None:
        """Undo `sleep`."""
        self._tell("/wake_up")

    # -- weights ------------------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Give new weights to every server. One that does not acknowledge them is left out until the next time."""
        async with self._state():
            if not self._stale:
                return
            self._saves += 1
            await whole(asyncio.to_thread(write_weights, self.model, self.folder))
            self.version = f"{self._run}-{self._saves}"
            outcomes = await asyncio.gather(*(self._load_patiently(s) for s in self.servers), return_exceptions=True)
            problems = [(s, o) for s, o in zip(self.servers, outcomes) if o is not None]
            for server, problem in problems:
                if not isinstance(problem, ServerFailed):
                    raise problem
                log.warning("%s is left out of this step: %s", server.url, problem)
            if len(problems) == len(self.servers):
                raise self._lost("; ".join(f"{server.url}: {problem}" for server, problem in problems))
            self._stale = False

    async def _load_patiently(self, server: Server) -> None:
        for attempt in range(self.max_retries + 1):
            try:
                return await server.load(self._http, self.folder, self.version, self.timeout)
            except ServerFailed:
                if attempt == self.max_retries:
                    raise
                await self._wait(attempt)
        return None

    # -- requests -----------------------------------------------------------------------------------------------------

    def _request(self, prompt_ids: Sequence[int], sampling: Sampling, limit: int, seed: int) -> dict[str, Any]:
        return {
            "token_ids": list(prompt_ids),
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": limit,
                "seed": seed,
                "logprobs": 0,  # of the sampled token alone
                "stop_token_ids": self.stop_ids,
                "ignore_eos": True,  # stop_ids are all that ends a turn, as in the hf engine
                "detokenize": False,
            },
        }

    async def _complete(self, request: dict[str, Any]) -> Completion:
        """One completion, from whichever server can give it."""
        problems: dict[str, str] = {}
        for attempt in range(self.max_retries + 1):
            server = self._next()
            losses = server.losses
            try:
                if server.version != self.version:
                    await server.load(self._http, self.folder, self.version, self.timeout)
                return await server.generate(self._http, request, self.stop_ids, self.timeout)
            except asyncio.TimeoutError:
                patience = max(LEAST_PATIENCE, self.timeout / 10)
                if server.losses == losses and await server.samples(self._http, request, patience):
                    raise EnvironmentBroken(
                        f"a turn took longer than engine.timeout = {self.timeout:g} s, {server.url} gives others tokens"
                    ) from None
                problems[server.url] = f"no answer within engine.timeout = {self.timeout:g} s"
                await self._leave_out(server, losses, problems[server.url], hangs=True)
            except ServerFailed as error:
                problems[server.url] = str(error)
                await self._leave_out(server, losses, problems[server.url])
            if attempt < self.max_retries:
                await self._wait(attempt)
        raise self._lost("; ".join(f"{url}: {problem}" for url, problem in problems.items()))

    async def _leave_out(self, server: Server, losses: int, why: str, *, hangs: bool = False) -> None:
        """Take a server out of turn until it has loaded the weights again, unless another request has done so since."""
        if server.losses != losses:
            return
        server.version, server.losses = "", losses + 1
        log.warning("%s is left out: %s", server.url, why)
        if hangs and server.process:
            async with server.lock:  # do not start the next one while this one dies
                await asyncio.to_thread(server.process.stop)

    def _next(self) -> Server:
        """The servers in turn, those that have the weights; any, if none has."""
        ready = [s for s in self.servers if s.version == self.version] or self.servers
        self._turn += 1
        return ready[self._turn % len(ready)]

    def _lost(self, what: str) -> EngineLost:
        return EngineLost(f"engine: {what}; {self.max_retries + 1} tries. {self.remedy}".strip())

    async def _wait(self, attempt: int) -> None:
        """Pause before the next try, and on while no server is there: one that is restarted needs up to minutes."""
        end, pause = time.monotonic() + self.timeout, self.pause * 2**attempt
        await asyncio.sleep(min(LONGEST_PAUSE, pause))
        while not any(await asyncio.gather(*(server.there(self._http) for server in self.servers))):
            urls = ", ".join(server.url for server in self.servers)
            if time.monotonic() > end:
                raise self._lost(f"no server was there for {self.timeout:g} s: {urls}")
            if not self._alone:
                log.warning("no server is there (%s); waiting for one. %s", urls, self.remedy)
            self._alone, pause = True, min(LONGEST_PAUSE, 2 * pause)
            await asyncio.sleep(min(pause, max(0.0, end - time.monotonic())))
        self._alone = False

    def _state(self) -> asyncio.Lock:
        """The lock of the event loop that is running; connections and locks do not outlive theirs."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._lock = loop, asyncio.Lock()
            # No proxy: the servers are the run's own. No limit: vLLM queues better than a client can.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            self._http = httpx.AsyncClient(trust_env=False, limits=limits, timeout=None)
            for server in self.servers:
                server.lock = asyncio.Lock()
        return self._lock

    def _tell(self, path: str) -> None:
        for server in self.servers:
            try:
                answer = httpx.post(server.url + path, timeout=self.timeout, trust_env=False)
            except httpx.HTTPError as error:
                log.warning("%s%s: %s", server.url, path, type(error).__name__)
                continue
            if not answer.is_success:  # a server without VLLM_SERVER_DEV_MODE or --enable-sleep-mode
                log.warning("%s%s: HTTP %d", server.url, path, answer.status_code)


async def whole(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` to its end, even when cancelled: its thread would go on writing files that its successor writes."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        if not task.done():
            await task
