"""The `padded` engine: whole turns in left-padded batches, with the cache that transformers makes for the model.

For models that the slots of `hf` cannot hold: layers with a recurrent state (the gated delta net of Qwen3.5) or a
sliding window, and attention kernels that take no custom mask (flash-attn). A recurrent state sums up all tokens read,
so it can neither be cut back to a shared prefix nor skip another row's tokens: every turn starts from an empty cache,
and padding is on the left, where the model's mask keeps it out of every state. This is correct but simple: the context
is prefilled again each turn, once for all siblings that share it, and a batch lasts as long as its longest turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sgcd_kernels import output_head
from trainer.data import Completion, Sampling
from trainer.engines.token_sampling import sample
from trainer.learning.model import layer_kinds

KNOWN = frozenset({"full_attention", "sliding_attention", "linear_attention"})


@dataclass(eq=False)
class _Turn:
    prompt: list[int]
    sampling: Sampling
    limit: int  # most tokens of the turn
    future: asyncio.Future[Completion]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class PaddedEngine:
    """Tokens in, tokens out, at most `slots` turns at a time.

    Args:
        model: a causal LM; it is shared, not copied.
        slots: turns that decode together.
        stop_ids: tokens that end a turn.
        max_length: the most tokens of context and turn; a turn that reaches it finishes with "length".
        seed: of `generator`, which samples; nothing else is kept between turns.

    Raises:
        ValueError: the model has layers of a kind that this engine was not tested with, or logits that `output_head`
            cannot compute.
    """

    def __init__(self, model: Any, *, slots: int, stop_ids: Iterable[int], max_length: int, seed: int = 0) -> None:
        if unknown := layer_kinds(model) - KNOWN:
            raise ValueError(f"no engine knows its layers of {', '.join(sorted(unknown))}")
        self.slots, self.max_length = slots, max_length
        self.model, self.head = model, output_head(model)
        self.device = self.head.weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.stop_ids = frozenset(stop_ids)
        self._waiting: list[_Turn] = []
        self._task: asyncio.Task[None] | None = None

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        """Sample `n` continuations of `prompt_ids`; each ends in a stop token or at a length limit."""
        if not prompt_ids:
            raise ValueError("prompt_ids: got no token, needs at least one")
        limit = min(sampling.max_tokens, self.max_length - len(prompt_ids))
        if limit < 1:
            return [Completion([], [], "length") for _ in range(n)]
        loop = asyncio.get_running_loop()
        turns = [_Turn(list(prompt_ids), sampling, limit, loop.create_future()) for _ in range(n)]
        self._waiting += turns
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        try:
            return [await turn.future for turn in turns]
        except asyncio.CancelledError:
            for turn in turns:
                turn.future.cancel()
            raise

    def load_weights(self, model: Any) -> None:
        """Use `model` from now on."""
        if model is not self.model:
            self.model, self.head = model, output_head(model)

    def sleep(self) -> None:
        """Nothing to free: caches live as long as their batch."""

    def wake(self) -> None:
        """Nothing to do."""

    async def _run(self) -> None:
        """Run batch after batch while requests wait. Any error is raised in every caller, so that none hangs."""
        batch: list[_Turn] = []
        try:
            while True:
                await self._settle()
                batch, self._waiting = self._waiting[: self.slots], self._waiting[self.slots :]
                if not batch:
                    return
                await self._decode(batch)
        except BaseException as error:
            for turn in (t for t in [*batch, *self._waiting] if not t.future.done()):
                turn.future.set_exception(error)
            self._waiting = []
            if not isinstance(error, Exception):
                raise

    async def _settle(self) -> None:
        """Let callers run until no new requests come, so that those whose turn just ended join the next batch."""
        quiet, before = 0, -1
        while quiet < 8:
            await asyncio.sleep(0)
            quiet, before = (quiet + 1 if len(self._waiting) == before else 0), len(self._waiting)
        self._waiting = [turn for turn in self._waiting if not turn.future.done()]

    async def _decode(self, turns: list[_Turn]) -> None:
        """Decode all of `turns`, a token per step; between steps other coroutines run."""
        prompts = list(dict.fromkeys(tuple(turn.prompt) for turn in turns))
        ids, seen = left_pad(prompts, self.device)
        positions = (seen.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache(config=self.model.config)
        states = self._forward(ids, seen, positions, cache)
        rows = torch.tensor([prompts.index(tuple(turn.prompt)) for turn in turns], device=self.device)
        while True:  # `rows` are those of the last forward that continue
            token = self._sample(turns, states[rows])
            alive = [i for i, turn in enumerate(turns) if not self._finished(turn)]
            if not alive:
                return
            await asyncio.sleep(0)
            turns, token, rows = [turns[i] for i in alive], token[alive], rows[alive]
            cache.reorder_cache(rows)
            seen = torch.nn.functional.pad(seen[rows], (0, 1), value=1)
            positions = positions[rows, -1:] + 1
            states = self._forward(token[:, None], seen, positions, cache)
            rows = torch.arange(len(turns), device=self.device)

    @torch.inference_mode()
    def _forward(self, ids: Tensor, seen: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:  # [R, H]
        out = self.model.get_decoder()(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        )
        states: Tensor = out.last_hidden_state[:, -1]
        return states

    @torch.inference_mode()
    def _sample(self, turns: Sequence[_Turn], states: Tensor) -> Tensor:
        """The next token of every turn, which it keeps."""
        logits = self.head.logits(states)
        temperature = torch.tensor([turn.sampling.temperature for turn in turns], device=self.device)
        top_p = torch.tensor([turn.sampling.top_p for turn in turns], device=self.device)
        token, logp = sample(logits, temperature, top_p, self.generator)
        for turn, one, its_logp in zip(turns, token.tolist(), logp.tolist()):
            turn.ids.append(one)
            turn.logprobs.append(its_logp)
        return token

    def _finished(self, turn: _Turn) -> bool:
        """Whether the turn is over or was cancelled; its future is resolved."""
        stopped = turn.ids[-1] in self.stop_ids
        if turn.future.done():
            return True
        if stopped or len(turn.ids) == turn.limit:
            turn.future.set_result(Completion(turn.ids, turn.logprobs, "stop" if stopped else "length"))
            return True
        return False


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:  # ids [R, T], seen [R, T]
    """Ids with zeros before them, and which of them are real."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=device)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, seen
