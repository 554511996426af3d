"""The colocated `vllm` engine: vLLM inside the trainer's process, for a trainer that lives in vLLM's own environment.

No HTTP, no second process, no file: prompts are token lists, and new weights are handed over as the tensors they are.
vLLM's loop is ours: a background task takes one step after another while anybody waits, and lets the episodes run in
between, so that those whose turn has ended are back with the next one before the following step.

What fails here fails in our own process, so there is nothing to try again: the run stops (`EngineLost`), with a
checkpoint.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from trainer.data import Completion, Sampling
from trainer.errors import EngineLost

RETURN = 8  # rounds of the event loop in which a caller whose turn has ended may come back with the next one


class ColocatedEngine:
    """Tokens in, tokens out, by a vLLM engine in this process.

    Args:
        model: what is sampled from; vLLM keeps a copy of its own, which is renewed after each `load_weights`.
        engine: a vllm.v1.engine.llm_engine.LLMEngine that was started from this model's untied folder.
        stop_ids: tokens that end a turn.
        max_length: the most tokens of prompt and completion; a completion that reaches it finishes with "length".
        seed: of `generator`, which draws the seed of every request.
    """

    def __init__(self, model: Any, *, engine: Any, stop_ids: Iterable[int], max_length: int, seed: int = 0) -> None:
        self.model, self.max_length = model, max_length
        self.stop_ids = sorted(stop_ids)
        self.generator = torch.Generator().manual_seed(seed)
        self._vllm = engine
        self._names = itertools.count()
        self._waiting: dict[str, asyncio.Future[Completion]] = {}
        self._task: asyncio.Task[None] | None = None
        self._stale = True

    # -- the engine protocol ------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], n: int, sampling: Sampling) -> list[Completion]:
        """Sample `n` continuations of `prompt_ids`; each ends in a stop token or at a length limit.

        Raises:
            EngineLost: vLLM failed.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids: got no token, needs at least one")
        room = self.max_length - len(prompt_ids)
        if room <= 0 or sampling.max_tokens < 1:
            return [Completion([], [], "length") for _ in range(n)]
        seeds = torch.randint(2**62, (n,), generator=self.generator).tolist()
        asked: dict[str, asyncio.Future[Completion]] = {}
        try:
            self._publish()
            for seed in seeds:
                name, params = str(next(self._names)), self._params(sampling, min(room, sampling.max_tokens), seed)
                self._vllm.add_request(name, {"prompt_token_ids": list(prompt_ids)}, params)
                asked[name] = self._waiting[name] = asyncio.get_running_loop().create_future()
            if self._task is None or self._task.done():
                self._task = asyncio.get_running_loop().create_task(self._run())
            return [await future for future in asked.values()]
        except Exception as error:
            raise EngineLost(f"engine: vLLM failed ({type(error).__name__}: {error})") from error
        finally:
            if given_up := [name for name in asked if self._waiting.pop(name, None)]:
                self._vllm.abort_request(given_up)

    def load_weights(self, model: Any) -> None:
        """Sample from `model` from now on; vLLM gets its weights with the next request."""
        if self._waiting:
            raise RuntimeError("load_weights while rollouts are running: they would mix two policies")
        self.model, self._stale = model, True

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake` (level 1: the weights are kept on the host, the cache is dropped)."""
        if self._waiting:
            raise RuntimeError("sleep while rollouts are running: they would be lost")
        self._vllm.sleep(1)

    def wake(self) -> None:
        """Undo `sleep`."""
        self._vllm.wake_up()

    # -- vLLM ---------------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Give vLLM the new weights, and have it forget the keys and values of the old ones. None reach a sleeper."""
        if self._vllm.is_sleeping():
            self.wake()
        if not self._stale:
            return
        tensors = iter(self.model.state_dict().items())  # a tied head is in it too, under its own name
        self._vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        if not self._vllm.reset_prefix_cache():
            raise RuntimeError("reset_prefix_cache: keys and values of the old weights are still there")
        self._stale = False

    def _params(self, sampling: Sampling, limit: int, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=limit,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # stop_ids are all that ends a turn, as in the hf engine
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _run(self) -> None:
        """Step while anybody waits. Whatever goes wrong reaches every caller: none may hang."""
        try:
            while self._waiting:
                finished = [output for output in self._vllm.step() if output.finished]
                for output in finished:
                    future = self._waiting.get(output.request_id)
                    if future and not future.done():  # done: its caller has been cancelled
                        future.set_result(read_output(output.outputs[0], self.stop_ids))
                    self._waiting.pop(output.request_id, None)
                for _ in range(RETURN if finished else 1):
                    await asyncio.sleep(0)
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()


def read_output(output: Any, stop_ids: Sequence[int]) -> Completion:
    """One of vLLM's CompletionOutputs, if it is whole.

    Raises:
        RuntimeError: it is not; the text says in what.
    """
    ids = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs)]
    if not ids or len(logprobs) != len(ids) or not all(math.isfinite(p) and p <= 0 for p in logprobs):
        raise RuntimeError(f"{len(ids)} tokens with log-probs {logprobs[:5]}...")
    stopped = output.finish_reason == "stop"
    if output.finish_reason not in ("stop", "length") or stopped != (ids[-1] in stop_ids):
        raise RuntimeError(f"finished with {output.finish_reason!r} at token {ids[-1]}")
    return Completion(ids, logprobs, "stop" if stopped else "length")
