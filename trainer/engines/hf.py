"""The `hf` engine: continuous batching over a transformers causal LM, inside the trainer's process.

Episodes are coroutines that await `generate`. One background task runs a *tick* after another while requests wait; a
tick is one forward of one token for every active row. Rows differ in length and start and stop independently, so no
request waits for a batch to end. Multi-turn episodes are cheap because:

- A row keeps its cache after a turn. The next turn's prompt extends it, so only the observation is prefilled.
- Siblings have the same prompt; it is prefilled once and its cache copied. Other tasks share at least the tools' text:
  the longest prefix that any row holds is copied too.
- Many unread tokens are prefilled in one padded forward; a few are read along with the decoding rows, one token per
  tick, which needs neither padding nor another forward.

The engine shares the trainer's module, so new weights need no transfer: `load_weights` drops the caches of the old
ones. If environments answer in the same order each time, the same seed gives the same bits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgcd_kernels import output_head
from trainer.data import Completion, Sampling
from trainer.engines.kv_cache import SlotCache
from trainer.engines.token_sampling import sample
from trainer.learning.model import layer_kinds

PREFILL_FROM = 16  # least unread tokens for a separate prefill (measured: 4 takes 4 % more time, 64 takes 17 %)
SHARE_FROM = 16  # a shared prefix shorter than this is not worth a copy
PREFILL_CELLS = 8_000_000  # bound on rows * tokens * width of one prefill: its attention mask has that many cells


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    sampling: Sampling
    future: asyncio.Future[Completion]


@dataclass
class _Row:
    """The host's record of a slot; its lengths and tokens are in tensors."""

    request: _Request | None = None
    history: list[int] = field(default_factory=list)  # an idle row's tokens; all but the last are cached
    used: int = 0  # tick of the last use


class HFEngine:
    """Tokens in, tokens out, `slots` sequences at a time.

    Args:
        model: a causal LM with full attention in every layer; it is shared, not copied.
        slots: rows of the cache.
        stop_ids: tokens that end a turn.
        max_length: the most tokens a row may hold; a completion that reaches it finishes with "length".
        seed: of `generator`, which samples. A checkpoint needs only its state: caches affect speed alone.

    Raises:
        ValueError: the model keeps state that is not a plain key-value cache; the `padded` engine is for it. Or its
            logits are none that `output_head` can compute.
    """

    def __init__(self, model: Any, *, slots: int, stop_ids: Iterable[int], max_length: int, seed: int = 0) -> None:
        if (kinds := layer_kinds(model)) != {"full_attention"}:
            raise ValueError(f"model: engine hf needs full attention in every layer, got {', '.join(sorted(kinds))}")
        self.slots, self.max_length = slots, max_length
        self.prefill_from = PREFILL_FROM
        self.model, self.head = model, output_head(model)
        self.device = self.head.weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.stop_ids = torch.tensor(sorted(stop_ids), device=self.device)
        self.cache = SlotCache(slots, max_length)
        self.fed_tokens = self.sampled_tokens = self.prefilled_tokens = self.ticks = 0
        self._waiting: deque[_Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._returning = 0  # callers that got a turn and may ask for the next one
        self._reset()

    # -- the engine protocol ------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        """Sample `n` continuations of `prompt_ids`; each ends in a stop token or at a length limit."""
        if not prompt_ids:
            raise ValueError("prompt_ids: got no token, needs at least one")
        if len(prompt_ids) >= self.max_length or sampling.max_tokens < 1:
            return [Completion([], [], "length") for _ in range(n)]
        loop = asyncio.get_running_loop()
        requests = [_Request(list(prompt_ids), sampling, loop.create_future()) for _ in range(n)]
        self._waiting.extend(requests)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        try:
            return [await request.future for request in requests]
        except asyncio.CancelledError:
            self._abandon(requests)
            raise

    def load_weights(self, model: Any) -> None:
        """Use `model` from now on, and drop the keys and values of the old weights."""
        if any(row.request for row in self._rows):
            raise RuntimeError("load_weights while rollouts are running: their caches would mix two policies")
        if model is not self.model:
            self.model, self.head = model, output_head(model)
        self._reset()

    def sleep(self) -> None:
        """Free the cache's memory until the next request."""
        self._reset()
        self.cache.drop()

    def wake(self) -> None:
        """Nothing to do: memory is allocated on use."""

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Tick while requests wait. Any error is raised in every caller, so that none hangs."""
        try:
            while True:
                await self._settle()
                if not self._waiting and not any(row.request for row in self._rows):
                    return
                with torch.inference_mode():
                    self._admit()
                    self._tick()
        except BaseException as error:
            for request in [*self._waiting, *(row.request for row in self._rows if row.request)]:
                if not request.future.done():
                    request.future.set_exception(error)
            self._waiting.clear()
            self._reset()
            if not isinstance(error, Exception):
                raise

    async def _settle(self) -> None:
        """Let callers run, so that those whose turn just ended can request the next one before the tick."""
        await asyncio.sleep(0)
        for _ in range(8):
            if self._returning <= 0:
                break
            before = len(self._waiting)
            await asyncio.sleep(0)
            self._returning -= len(self._waiting) - before
        self._returning = 0

    def _reset(self) -> None:
        """Every row empty."""
        width = self.max_length + 1
        slots, device = self.slots, self.device
        self._rows = [_Row() for _ in range(slots)]
        self.tokens = torch.zeros(slots, width, dtype=torch.long, device=device)
        self.logps = torch.zeros(slots, width, device=device)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)  # cached tokens
        self.known = torch.zeros(slots, dtype=torch.long, device=device)  # cached, unread and sampled tokens
        self.limit = torch.zeros(slots, dtype=torch.long, device=device)  # `known` at which the turn must end
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.temperature = torch.ones(slots, device=device)
        self.top_p = torch.ones(slots, device=device)

    def _abandon(self, requests: list[_Request]) -> None:
        """Forget requests whose caller was cancelled."""
        gone = {id(request) for request in requests}
        self._waiting = deque(r for r in self._waiting if id(r) not in gone)
        for index, row in enumerate(self._rows):
            if id(row.request) in gone:
                self._rows[index] = _Row()
                self.length[index] = 0
                self.active[index] = False

    # -- assigning rows -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting requests rows: the row that holds their earlier turns, else the one idle for longest."""
        if not self._waiting:
            return
        fresh, started = [], []
        for request in self._waiting:
            index = self._retained(request.prompt)
            if index is None:
                fresh.append(request)
            else:
                self._start(index, request, len(self._rows[index].history) - 1)
                started.append(index)
        idle = [i for i, row in enumerate(self._rows) if row.request is None]
        idle.sort(key=lambda i: self._rows[i].used)
        self._waiting = deque(fresh[len(idle) :])
        started += self._place(fresh[: len(idle)], idle)
        self._prefill(started)
        self._compact()

    def _retained(self, prompt: list[int]) -> int | None:
        """The idle row whose whole history is a prefix of `prompt`."""
        for index, row in enumerate(self._rows):
            size = len(row.history)
            if 0 < size < len(prompt) and prompt[size - 1] == row.history[-1] and prompt[:size] == row.history:
                return index
        return None

    def _place(self, requests: list[_Request], idle: list[int]) -> list[int]:
        """Start new sequences. The first of identical prompts is prefilled; the others copy its cache."""
        siblings: dict[tuple[int, ...], list[tuple[int, _Request]]] = {}
        for index, request in zip(idle, requests):
            siblings.setdefault(tuple(request.prompt), []).append((index, request))
        prompts = list(siblings)
        leaders = []
        for prompt in prompts:
            index, request = siblings[prompt][0]
            cached = self._borrow(index, request.prompt)
            self._start(index, request, cached)
            leaders.append(index)
            if len(leaders) == 1 < len(prompts) and _shared(*prompts[:2]) - cached >= SHARE_FROM:
                self._prefill(leaders)  # now, so that the others find the shared prefix
        self._prefill(leaders)
        for (leader, _), *others in siblings.values():
            if others:
                cached = int(self.length[leader])
                self.cache.copy(leader, [index for index, _ in others], 0, cached)
                for index, request in others:
                    self._start(index, request, cached)
        return leaders

    def _borrow(self, index: int, prompt: list[int]) -> int:
        """Copy the longest prefix of `prompt` that any row holds into row `index`; return its length."""
        wanted = torch.tensor(prompt[:-1], device=self.device)
        same = (self.tokens[:, : len(wanted)] == wanted).long().cumprod(1).sum(1)
        shared, source = torch.minimum(same, self.length).max(0)
        if int(shared) < SHARE_FROM:
            return 0
        if int(source) != index:
            self.cache.copy(int(source), [index], 0, int(shared))
        return int(shared)

    def _start(self, index: int, request: _Request, cached: int) -> None:
        """Put `request` into a row whose first `cached` tokens are already in the cache."""
        size = len(request.prompt)
        self._rows[index] = _Row(request, used=self.ticks)
        self.tokens[index, cached:size] = torch.tensor(request.prompt[cached:], device=self.device)
        self.length[index] = cached
        self.known[index] = size
        self.limit[index] = min(size + request.sampling.max_tokens, self.max_length)
        self.temperature[index] = request.sampling.temperature
        self.top_p[index] = request.sampling.top_p
        self.active[index] = True

    def _compact(self) -> None:
        """Move active rows to the front, so that a tick works on a view of the cache with few idle rows."""
        active = [i for i, row in enumerate(self._rows) if row.request]
        holes = (i for i, row in enumerate(self._rows) if not row.request)
        while active and len(active) < 0.75 * (active[-1] + 1):
            high, low = active.pop(), next(holes)
            self._swap(high, low)
            active.insert(0, low)

    def _swap(self, a: int, b: int) -> None:
        self.cache.swap(a, b, int(torch.maximum(self.length[a], self.length[b])))
        order = torch.tensor([b, a], device=self.device)
        pair = torch.tensor([a, b], device=self.device)
        for name in ("tokens", "logps", "length", "known", "limit", "active", "temperature", "top_p"):
            state = getattr(self, name)
            state[pair] = state[order]
        self._rows[a], self._rows[b] = self._rows[b], self._rows[a]

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, positions: Tensor, rows: slice | Tensor, width: int) -> Tensor:
        """Hidden states of tokens [R, T] at `positions` of their rows; each sees what is at or before it."""
        weight = self.head.weight
        self.cache.reserve(width)
        self.cache.plan(rows, positions, width)
        unseen = torch.arange(width, device=self.device) > positions[..., None]
        mask = torch.zeros(unseen.shape, dtype=weight.dtype, device=self.device)
        mask.masked_fill_(unseen, torch.finfo(weight.dtype).min)
        decoder = self.model.get_decoder()
        states: Tensor = decoder(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return states

    def _prefill(self, started: list[int]) -> None:
        """Read all but the last unread token of the rows that have many; the last one is fed by the tick."""
        unread = [(int(self.known[i] - self.length[i]) - 1, i) for i in started]
        unread = sorted(((n, i) for n, i in unread if n >= self.prefill_from), reverse=True)
        while unread:
            longest, width = unread[0][0], max(int(self.known[i]) for _, i in unread) - 1
            many = max(1, PREFILL_CELLS // (longest * width))
            self._prefill_rows([i for _, i in unread[:many]], longest)
            unread = unread[many:]

    def _prefill_rows(self, indices: list[int], longest: int) -> None:
        rows = torch.tensor(indices, device=self.device)
        end = self.known[rows] - 1
        positions = self.length[rows, None] + torch.arange(longest, device=self.device)
        ids = self.tokens[rows[:, None], positions.clamp_max(self.max_length)]
        self._forward(ids, positions, rows, int(end.max()))
        self.prefilled_tokens += int((end - self.length[rows]).sum())
        self.length[rows] = end

    def _tick(self) -> None:
        """Feed one token to every active row; sample where nothing is left to read."""
        rows = max(i for i, row in enumerate(self._rows) if row.request) + 1
        active, length = self.active[:rows], self.length[:rows]
        width = int(length.masked_fill(~active, 0).max()) + 1
        ids = self.tokens[:rows].gather(1, length[:, None])
        states = self._forward(ids, length[:, None], slice(0, rows), width)
        length += active
        ready = (active & (length == self.known[:rows])).nonzero()[:, 0]
        self.ticks += 1
        self.fed_tokens += int(active.sum())
        if len(ready):
            self._sample(ready, states[ready, -1])

    def _sample(self, ready: Tensor, states: Tensor) -> None:
        logits = self.head.logits(states)
        token, logp = sample(logits, self.temperature[ready], self.top_p[ready], self.generator)
        known = self.known[ready]
        self.tokens[ready, known] = token
        self.logps[ready, known] = logp
        self.known[ready] = known + 1
        self.sampled_tokens += len(ready)
        stopped = torch.isin(token, self.stop_ids)
        done = stopped | (known + 1 >= self.limit[ready])
        for which in done.nonzero()[:, 0].tolist():
            self._finish(int(ready[which]), bool(stopped[which]))

    def _finish(self, index: int, stopped: bool) -> None:
        """Return the turn to its caller; the row keeps its cache for a next turn."""
        row = self._rows[index]
        assert row.request is not None
        start, end = len(row.request.prompt), int(self.known[index])
        ids = self.tokens[index, start:end].tolist()
        logprobs = self.logps[index, start:end].tolist()
        if not row.request.future.done():
            row.request.future.set_result(Completion(ids, logprobs, "stop" if stopped else "length"))
            self._returning += 1
        self._rows[index] = _Row(history=row.request.prompt + ids, used=self.ticks)
        self.active[index] = False


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
