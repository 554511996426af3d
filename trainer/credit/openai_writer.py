"""References from any OpenAI-compatible endpoint, through the official client.

The endpoint is not trusted: whatever it does (silence, 429, garbage, a megabyte, an echoed secret, orders to the
reader) costs that one reference, named by a word in `reference_info["error"]`, and never the run. What is sent has
passed the sanitiser; what comes back passes it again. The API key lives in the environment and in the client only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletion

from trainer.chat.compact import CompactRenderer
from trainer.credit import prompt as prompts
from trainer.credit.cache import ReferenceCache, key_of
from trainer.credit.endpoint import is_loopback
from trainer.credit.prompt import Refused
from trainer.credit.sanitiser import Sanitiser
from trainer.types import Group, Message, Renderer, Suite, UserError

if TYPE_CHECKING:
    from trainer.config import WriterConfig

log = logging.getLogger(__name__)
MAX_BODY = 4 << 20  # bytes of an answer
CHARS_PER_TOKEN = 3  # a low estimate of text per token, so that the budget errs to the safe side
MOST_CHARS_PER_TOKEN = 8  # a high one: no endpoint has read a prompt with fewer tokens, whatever it says


class Budget:
    """Tokens of the whole run. A call reserves its worst case first, so concurrent calls cannot overspend."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.spent = 0
        self._reserved = 0

    def reserve(self, tokens: int) -> bool:
        if self.limit is not None and self.spent + self._reserved + tokens > self.limit:
            return False
        self._reserved += tokens
        return True

    def settle(self, reserved: int, spent: int) -> None:
        self._reserved -= reserved
        self.spent += spent


class OpenAIWriter:
    """Asks an LLM for the reference of each mixed group, `concurrency` at a time."""

    name = "openai"

    def __init__(self, config: WriterConfig, suite: Suite, renderer: Renderer | None = None) -> None:
        self.config = config
        self.suite = suite
        self.words_only = isinstance(renderer, CompactRenderer)
        self.budget = Budget(config.token_budget)
        self.cache = ReferenceCache(config.cache_dir)
        self._warned: set[str] = set()
        self._loopback = is_loopback(config.base_url)
        self._key = read_key(config, self._loopback)

    def state_dict(self) -> dict[str, Any]:
        """The tokens spent so far: `token_budget` is of the whole run, however often it is resumed."""
        return {"spent": self.budget.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; what was written before the budget was kept has spent nothing."""
        self.budget.spent = int(state.get("spent", 0))

    def __repr__(self) -> str:
        return f"OpenAIWriter(model={self.config.model!r})"  # the default would do, but never show the key

    async def write(self, groups: list[Group]) -> None:
        """Fill every group. The client lives for one batch, because an event loop may."""
        for group in groups:
            group.reference, group.reference_info = "", {"writer": self.name}
        mixed = [group for group in groups if group.mixed]
        if not mixed:
            return
        gate = asyncio.Semaphore(self.config.concurrency)
        async with self._client() as client:
            await asyncio.gather(*(self._write_one(client, gate, group) for group in mixed))

    def _client(self) -> AsyncOpenAI:
        # A proxy of the environment must not see what is meant for this machine. No redirects: a prompt goes where the
        # config says. No compression: a megabyte of zeros must not become a gigabyte here.
        transport = DefaultAsyncHttpxClient(
            trust_env=not self._loopback, follow_redirects=False, event_hooks={"response": [refuse_floods]}
        )
        return AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.config.base_url,
            timeout=self.config.timeout,
            max_retries=self.config.max_retries,  # 408, 409, 429, 5xx, time-outs; Retry-After is honoured
            http_client=transport,
            default_headers={"Accept-Encoding": "identity"},
        )

    async def _write_one(self, client: AsyncOpenAI, gate: asyncio.Semaphore, group: Group) -> None:
        """Write one reference; any failure becomes a word in `reference_info`."""
        info: dict[str, Any] = {"writer": self.name, "cached": False, "tokens": 0, "seconds": 0.0}
        group.reference_info = info
        try:
            literals = self.suite.answer_literals(group.task)
            outgoing = self._sanitiser(literals)
            messages = prompts.build_prompt(group, outgoing, self.config.max_prompt_chars)
        except Exception as error:  # what cannot be cleaned does not leave
            info["error"] = "unclean"
            self._warn_once(f"unclean ({type(error).__name__} while a prompt was made)")
            return
        info["sanitiser_hits"] = dict(outgoing.hits)
        start = time.perf_counter()
        try:
            group.reference = await self._reference(client, gate, group, messages, literals, info)
        except Refused as refusal:
            info["error"] = refusal.reason
        except Exception as error:
            info["error"] = reason_of(error)
        info["seconds"] = time.perf_counter() - start
        self._warn_once(info.get("error", ""))

    async def _reference(
        self,
        client: AsyncOpenAI,
        gate: asyncio.Semaphore,
        group: Group,
        messages: list[Message],
        literals: list[str],
        info: dict[str, Any],
    ) -> str:
        key = key_of(prompts.VERSION, self.config.model, self.config.max_tokens, self.words_only, messages)
        tools = [tool["function"]["name"] for tool in group.rollouts[0].tools]
        most = 4 * self.config.max_tokens
        if entry := self.cache.get(key):  # the folder may be shared: an entry is trusted no more than an answer
            info.update(cached=True, literals=self._shields(entry.get("literals"), tools))
            return self._sanitiser(literals).known(str(entry["reference"]))[:most]
        async with gate:
            text = await self._ask(client, messages, info)
        reply = prompts.parse_reply(text)
        incoming = self._sanitiser(literals)
        reference = prompts.render_reply(reply, incoming, tools, words_only=self.words_only, max_chars=most)
        info.update(literals=self._shields(reply.masked, tools), reply_hits=dict(incoming.hits))
        self.cache.put(key, {"reference": reference, "literals": info["literals"], "model": self.config.model})
        return reference

    def _shields(self, wanted: Any, tools: list[str]) -> list[str]:
        """The strings among those an endpoint wants masked that may be: no secret, no tool, nothing of a letter or two.

        They take tokens out of the credit, so a list of everything would make every weight 1.
        """
        texts = [text for text in wanted if isinstance(text, str)] if isinstance(wanted, list) else []
        clean = [self._sanitiser([]).text(text)[:80].strip() for text in texts[: prompts.MAX_ITEMS]]
        return [text for text in clean if len(text) >= 3 and "[masked" not in text and text not in tools]

    async def _ask(self, client: AsyncOpenAI, messages: list[Message], info: dict[str, Any]) -> str:
        """One call within the budget of tokens and seconds; gives the text of the answer."""
        chars = sum(len(m["content"]) for m in messages)
        estimate = chars // CHARS_PER_TOKEN + self.config.max_tokens
        if not self.budget.reserve(estimate):
            raise Refused("budget_spent")
        tokens = least = 0
        try:
            # The client's time-out is between bytes; this one is the whole call with its retries, so that an endpoint
            # that drips cannot hold the run.
            answer = await asyncio.wait_for(self._call(client, messages), self._deadline())
            tokens, least = usage_of(answer, estimate), chars // MOST_CHARS_PER_TOKEN
        except (asyncio.TimeoutError, openai.APIConnectionError) as error:
            if type(error.__cause__).__name__ != "ConnectError":  # it may have worked, and charged, at every try
                tokens = estimate * (self.config.max_retries + 1)
            raise
        finally:
            self.budget.settle(estimate, max(tokens, least))
            info["tokens"] = tokens
        return text_of(answer)

    async def _call(self, client: AsyncOpenAI, messages: list[Message]) -> Any:
        create: Any = client.chat.completions.with_streaming_response.create
        asked = create(model=self.config.model, messages=messages, max_completion_tokens=self.config.max_tokens, n=1)
        async with asked as response:
            body = await read_bounded(response)
        answer = json.loads(body)
        return ChatCompletion.construct(**answer) if isinstance(answer, dict) else None

    def _deadline(self) -> float:
        """Seconds of one reference: every try, and the longest pause that the client makes of its own between two."""
        return self.config.timeout * (self.config.max_retries + 1) + 8.0 * self.config.max_retries

    def _sanitiser(self, literals: list[str]) -> Sanitiser:
        return Sanitiser(literals, secrets=[self._key] if self._key else [])

    def _warn_once(self, reason: str) -> None:
        """Name each kind of failure once; the error's own text may quote what must not be logged."""
        if reason and reason not in self._warned:
            self._warned.add(reason)
            log.warning("writer %s: %s; such groups train with W = 1", self.config.model, reason)


class TooLong(Exception):
    """An answer of more bytes than any reference needs, or one that would unpack to who knows how many."""


async def refuse_floods(response: Any) -> None:
    """Refuse by its headers an answer that is too large or compressed, before a byte of it is read."""
    packed = response.headers.get("Content-Encoding", "identity").lower() != "identity"
    length = response.headers.get("Content-Length", "")
    if packed or (length.isdecimal() and int(length) > MAX_BODY):
        raise TooLong


async def read_bounded(response: Any) -> bytes:
    """The body, if it is no longer than `MAX_BODY`."""
    body = bytearray()
    try:
        async for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_BODY:
                raise TooLong
    except Exception as error:  # whichever HTTP library the client brings, its errors are its own
        raise openai.APIConnectionError(request=response.http_request) from error
    return bytes(body)


def read_key(config: WriterConfig, loopback: bool) -> str:
    """The API key from the environment; a server on this machine needs none."""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key and not loopback:
        raise UserError(
            f"writer.api_key_env: ${config.api_key_env} is not set; run: export {config.api_key_env}=... "
            "(or use --writer.name contrast, which needs none)"
        )
    return key


def text_of(answer: Any) -> str:
    """The text of a chat completion, or the word for why there is none."""
    if not isinstance(answer, ChatCompletion) or not answer.choices:
        raise Refused("not_json")
    choice = answer.choices[0]
    if getattr(choice, "finish_reason", None) == "length":
        raise Refused("truncated")
    content = getattr(getattr(choice, "message", None), "content", None)
    if not isinstance(content, str) or not content.strip():
        raise Refused("empty")
    return content


def usage_of(answer: Any, estimate: int) -> int:
    """Tokens as the endpoint counts them; where it says nothing credible, the estimate."""
    total = getattr(getattr(answer, "usage", None), "total_tokens", None)
    return total if isinstance(total, int) and 0 < total <= 4 * estimate else estimate


def reason_of(error: Exception) -> str:
    """One word for what the endpoint did."""
    if isinstance(error, asyncio.TimeoutError | openai.APITimeoutError):
        return "timeout"
    if TooLong in (type(error), type(error.__cause__)):
        return "too_long"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    if isinstance(error, openai.RateLimitError):
        return "rate_limited"
    if isinstance(error, openai.APIStatusError):
        return f"http_{error.status_code}"
    return "not_json" if isinstance(error, ValueError) else "unexpected_reply"
