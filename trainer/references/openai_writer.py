"""References from any OpenAI-compatible endpoint, through the official client.

The endpoint is not trusted: any failure (silence, 429, garbage, a megabyte, an echoed secret, orders to the reader)
loses only that reference, with the reason in `reference_info["error"]`, and never stops the run. Requests and answers
both pass the sanitiser. The API key is held only in the environment and in the client.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import openai
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

from trainer.chat.compact import CompactRenderer
from trainer.data import Group, Message
from trainer.errors import UserError
from trainer.protocols import Renderer, Suite
from trainer.references import writer_prompt as prompts
from trainer.references.bounded_reading import TooLong, read_bounded, refuse_floods
from trainer.references.completion_body import Completion, ErrorInBody, completion_of, read_completion
from trainer.references.endpoint import is_loopback, printable, refuse_cleartext, transport
from trainer.references.reply_cache import ReferenceCache, key_of
from trainer.references.request_shape import RequestShape, complaint_of
from trainer.references.retries import LONGEST_PAUSE, Budget, pause_after
from trainer.references.sanitiser import Sanitiser
from trainer.references.secret_values import SHORTEST_OWN
from trainer.references.writer_prompt import Refused
from trainer.references.writers import describe

if TYPE_CHECKING:
    from trainer.config import WriterConfig

log = logging.getLogger(__name__)
MOST_CHARS_PER_TOKEN = 8  # a prompt has at least one token per so many characters, whatever the endpoint reports
FRAME_TOKENS = 16  # that a chat template may put around a message
MAY_HAVE_WORKED = (500, 502, 504)  # also sent by a gateway whose model has answered too late
NOT_SENT = ("ConnectError", "ConnectTimeout")  # whichever HTTP library the client brings
POLL = 0.02  # seconds between checks of the budget
PROBE: list[Message] = [
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": "Say ready."},
]
PROBE_TOKENS = 16  # some models refuse a limit of one


class OpenAIWriter:
    """Asks an LLM for the reference of each mixed group, `concurrency` at a time."""

    name = "openai"

    def __init__(self, config: WriterConfig, suite: Suite, renderer: Renderer | None = None) -> None:
        self.config = config
        self.suite = suite
        self.words_only = isinstance(renderer, CompactRenderer)
        self.budget = Budget(config.token_budget)
        self.cache = ReferenceCache(config.cache_dir)
        self.shape = RequestShape()
        self._warned: set[str] = set()
        self._key = read_key(config, is_loopback(config.base_url))
        # Masked whatever their variables are called: the writer's key and that of an environment's endpoint.
        names = (config.api_key_env, getattr(suite, "api_key_env", ""))
        self._keys = [key for name in names if len(key := os.environ.get(name, "").strip()) >= SHORTEST_OWN]

    def state_dict(self) -> dict[str, Any]:
        """The tokens spent so far: `token_budget` is of the whole run, however often it is resumed."""
        return {"spent": self.budget.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state` was taken; a state without `spent` has spent nothing."""
        self.budget.spent = int(state.get("spent", 0))

    def __repr__(self) -> str:
        return f"OpenAIWriter(model={self.config.model!r})"  # the default would do, but never show the key

    async def write(self, groups: list[Group]) -> None:
        """Fill every group. The client lives for one batch, because an event loop may."""
        for group in groups:
            group.reference, group.reference_info = "", describe(self.name, group)
        mixed = [group for group in groups if group.contrasts]
        if not mixed:
            return
        gate = asyncio.Semaphore(self.config.concurrency)
        asked = [
            (group, messages) for group in mixed if (messages := self._prompt(group))
        ]  # before any deadline starts
        async with self._client() as client:
            await asyncio.gather(*(self._write_one(client, gate, *each) for each in asked))

    def _client(self) -> AsyncOpenAI:
        http = transport(self.config.base_url, self._key or "none", response=[refuse_floods])
        return AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.config.base_url,
            timeout=self.config.timeout,
            max_retries=0,  # `_ask` retries, because every try reserves from the budget
            http_client=http,
        )

    def _prompt(self, group: Group) -> list[Message]:
        """The request about a group; [] and a word in `reference_info` if it cannot be sanitised."""
        info = group.reference_info = {"writer": self.name, "cached": False, "tokens": 0, "seconds": 0.0}
        try:
            outgoing = self._sanitiser(self.suite.answer_literals(group.task))
            messages = prompts.build_prompt(group, outgoing, self.config.max_prompt_chars)
        except Exception as error:  # what cannot be sanitised is not sent
            info["error"] = "unclean"
            self._warn_once(f"unclean ({type(error).__name__} while a prompt was made)")
            return []
        info["sanitiser_hits"] = dict(outgoing.hits)
        return messages

    async def _write_one(
        self, client: AsyncOpenAI, gate: asyncio.Semaphore, group: Group, messages: list[Message]
    ) -> None:
        """Write one reference; any failure becomes a word in `reference_info`."""
        info = group.reference_info
        start = time.perf_counter()
        try:
            group.reference = await self._reference(client, gate, group, messages, info)
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
        info: dict[str, Any],
    ) -> str:
        key = key_of(prompts.VERSION, self.config.model, self.config.max_tokens, self.words_only, messages)
        tools = [tool["function"]["name"] for tool in group.rollouts[0].tools]
        answer = prompts.read_entry(self.cache.get(key))
        info["cached"] = answer is not None
        if answer is None:
            async with gate:
                answer = reply_in(await self._ask(client, messages, info))
        reply = prompts.only_tools(answer, tools)
        incoming = self._sanitiser(self.suite.answer_literals(group.task))
        if not self.words_only:  # the folder of the cache may be shared: an entry is trusted no more than an answer
            reply = prompts.clean_reply(answer, incoming, tools)
        reference = (
            prompts.render_words(reply) if self.words_only else prompts.render_prose(reply, 4 * self.config.max_tokens)
        )
        if not reference:
            raise Refused("empty")
        reply.masked = self._masked_literals(answer.masked, tools)
        info.update(literals=reply.masked, reply_hits=dict(incoming.hits))
        if not info["cached"]:
            self.cache.put(key, {"reply": reply.model_dump(), "model": self.config.model})
        return reference

    def _masked_literals(self, wanted: list[str], tools: list[str]) -> list[str]:
        """The literals that the endpoint wants masked and that may be: no secret, no tool, at least three characters.

        They exclude tokens from the credit, so a list of everything would make every weight 1.
        """
        clean = [self._sanitiser([]).text(text)[:80].strip() for text in wanted[: prompts.MAX_ITEMS]]
        return [text for text in clean if len(text) >= 3 and "[masked" not in text and text not in tools]

    async def _ask(self, client: AsyncOpenAI, messages: list[Message], info: dict[str, Any]) -> Completion:
        """One call within the budget of tokens and seconds.

        A request that the endpoint refuses because of a parameter is made again without it, which is no retry; what
        worked is kept for the rest of the run.
        """
        left = self._deadline()  # the client's time-out is between bytes: an endpoint that drips must not hold the run
        most = sum(len(m["content"].encode()) + FRAME_TOKENS for m in messages) + self.config.max_tokens
        shape, tries = self.shape, 1
        while True:
            await self._reserve(most)
            start = time.monotonic()
            try:
                completion = await self._try(client, shape, messages, most, left, info)
                self.shape = shape.after(completion.completion_tokens, self.config.max_tokens)
                return completion
            except openai.APIError as error:
                left -= time.monotonic() - start
                if left > 0 and (changed := shape.without(complaint_of(error))) is not None:
                    shape = changed
                    continue
                pause = pause_after(error, tries)
                left -= pause or 0.0
                if pause is None or left <= 0 or tries > self.config.max_retries:
                    raise
            tries += 1
            await asyncio.sleep(pause)

    async def _reserve(self, most: int) -> None:
        """Wait until so many tokens can be reserved: other requests release theirs by their deadline."""
        while not self.budget.reserve(most):
            if not self.budget.allows(most):
                raise Refused("budget_spent")
            await asyncio.sleep(POLL)

    async def _try(
        self,
        client: AsyncOpenAI,
        shape: RequestShape,
        messages: list[Message],
        most: int,
        left: float,
        info: dict[str, Any],
    ) -> Completion:
        """One request of at most `left` seconds. Its reserve counts as spent where the cost is unknown."""
        tokens = spent = most
        try:
            arguments = shape.arguments(self.config.model, messages, self.config.max_tokens)
            completion = await asyncio.wait_for(self._call(client, arguments), left)
            tokens = credible(completion.total_tokens, most)
            spent = max(tokens, sum(len(m["content"]) for m in messages) // MOST_CHARS_PER_TOKEN)
            return completion
        except openai.APIError as error:
            refused = isinstance(error, openai.APIStatusError) and error.status_code not in MAY_HAVE_WORKED
            if refused or type(error.__cause__).__name__ in NOT_SENT:
                tokens = spent = 0
            raise
        finally:
            self.budget.settle(most, spent)
            info["tokens"] += tokens

    async def _call(self, client: AsyncOpenAI, arguments: dict[str, Any]) -> Completion:
        create: Any = client.chat.completions.with_streaming_response.create
        try:
            async with create(**arguments) as response:
                request = response.http_request
                body = await read_bounded(response.http_response)
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, openai.APIStatusError):  # older clients wrap what a hook raises
                raise error.__cause__ from None
            raise
        try:
            return read_completion(body)
        except ErrorInBody as error:
            raise openai.APIError(str(error), request, body=error.body) from error

    async def probe(self) -> str:
        """Ask the endpoint for one word, as `write` would ask for a reference; return a line on what came back.

        Raises:
            UserError: nothing usable did. It says what, in the endpoint's words without secrets in them.
        """
        words = ""
        try:
            async with self._client() as client:
                while True:
                    try:
                        call = self._call(client, self.shape.arguments(self.config.model, PROBE, PROBE_TOKENS))
                        completion = await asyncio.wait_for(call, self.config.timeout)
                        before, self.shape = self.shape, self.shape.after(completion.completion_tokens, PROBE_TOKENS)
                        if self.shape == before:
                            break
                    except openai.APIError as error:
                        words = complaint_of(error)
                        if (changed := self.shape.without(words)) is None:
                            raise
                        self.shape = changed
        except Exception as error:
            said = f": {printable(self._sanitiser([]).text(words))}" if words else ""
            raise UserError(
                f"writer.base_url: {self.config.base_url} gives no answer to a chat request ({reason_of(error)}){said}"
            ) from None
        tokens = completion.total_tokens
        return f"a chat request was answered ({'no count of' if tokens is None else tokens} tokens)"

    def _deadline(self) -> float:
        """Seconds of one reference: every try, and the longest pause of our own choosing between two."""
        return self.config.timeout * (self.config.max_retries + 1) + LONGEST_PAUSE * self.config.max_retries

    def _sanitiser(self, literals: list[str]) -> Sanitiser:
        return Sanitiser(literals, secrets=self._keys)

    def _warn_once(self, reason: str) -> None:
        """Name each kind of failure once; the error's own text may quote what must not be logged."""
        if reason and reason not in self._warned:
            self._warned.add(reason)
            log.warning("writer %s: %s; such groups train with W = 1", self.config.model, reason)


def read_key(config: WriterConfig, loopback: bool) -> str:
    """The API key from the environment; a server on this machine needs none."""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key and not loopback:
        raise UserError(
            f"writer.api_key_env: ${config.api_key_env} is not set; run: export {config.api_key_env}=... "
            "(or use --writer.name contrast, which needs none)"
        )
    refuse_cleartext("writer.base_url", config.base_url, config.api_key_env)
    return key


def reply_in(completion: Completion) -> prompts.Reply:
    """The reply that a completion holds, which may have been cut off behind it; raises `Refused` if there is none."""
    try:
        return prompts.parse_reply(text_in(completion))
    except Refused:
        if completion.truncated:
            raise Refused("truncated") from None
        raise


def text_in(completion: Completion) -> str:
    """The text of a completion; raises `Refused` with the reason if it has none."""
    if not completion.text.strip():
        raise Refused("refused" if completion.refused else "empty")
    return completion.text


def text_of(answer: Any) -> str:
    """The words of a whole chat completion, without a thought before them; raises `Refused` if there are none."""
    if not isinstance(answer, ChatCompletion) or not answer.choices:
        raise Refused("not_json")
    completion = completion_of([answer.to_dict(warnings=False)])
    if completion.truncated:
        raise Refused("truncated")  # half a sentence
    text = prompts.without_thought(text_in(completion))
    if not text.strip():
        raise Refused("empty")
    return text


def credible(total: int | None, most: int) -> int:
    """Tokens as the endpoint counts them; the upper bound `most` where its count is not credible."""
    return total if total is not None and 0 < total <= most else most


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
    if isinstance(error.__cause__, ErrorInBody):
        return f"http_{error.__cause__.status}" if error.__cause__.status else "error_reply"
    return "not_json" if isinstance(error, ValueError) else "unexpected_reply"
