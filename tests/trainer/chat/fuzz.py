"""Random texts through every reader and renderer: nothing raises, and what is written is read back as it was.

    python -m tests.trainer.chat.fuzz --texts 1000000 --seed 7 --workers 2

A text is a chain of markers, pieces of calls, and odd characters (control, bidi, surrogates), or a written turn with
some of it deleted, doubled or replaced. Each text is

- read as a sampled turn by every reader, and by AppWorld's reader of code;
- written as an argument and as an answer by every renderer, and read back;
- shown as a tool's output, a task and a description by every renderer.

Prints the texts, the readings of each reader, exceptions and non-identities, and the seed that brings them back.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import random
import secrets
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from tests.trainer import toy
from tests.trainer.chat import test_chatml, test_template
from trainer.chat.chatml import ChatMLRenderer
from trainer.data import Message, Tool
from trainer.envs.appworld.prompt import block, code_of
from trainer.text import encodable

MARKERS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<function=cd>",
    "<function=", "</function>", "<parameter=folder>", "<parameter=more>", "<parameter=x>", "<parameter=",
    "</parameter>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<call>", "<end>", "<user>", "```", "```python",
    "```json", "~~~", "assistant\n", "# Reference",
]  # fmt: skip
GRAMMAR = [
    '{"name": "cd", "arguments": {"folder": "a"}}', '{"name": ', '"arguments": ', "{'name': 'cd'", '"folder": ',
    '[cd(folder="a")]', "[cd(", "cd(", "[f(a={[]:1})]", "folder=", "more=", "{", "}", "[", "]", "(", ")", ",", ":",
    "=", '"', "'", '"""', "'''", "\\", "\\u", "\\ud83d", "\\ude00", "\\x", "\\N{", "true", "True", "null", "None",
    "NaN", "-Infinity", "1e999", "0x", "1_0", "012", "1j", "-", "+", ".", "0", "12", "9" * 30, "b'a'", "r'\\'",
    'f"{a}"', "lambda: 1", "**", "# don't", "print(", "\\\n",
]  # fmt: skip
CHARACTERS = [
    "\n", "\n", "\n\n", "\r", "\r\n", "\t", " ", "  ", "\0", "\x01", "\x0b", "\x0c", "\x1b[31m", "\x7f", "\x85",
    "\u2028", "\ufeff", "\u202e", "\u2066", "\u2069", "\u200b", "\u200d", "\ufffd", "\ufffe", "\U0010fffe", "a", "Z",
    "é", "ß", "日本", "😀", "e\u0301", "ﬁ", "²", "٣", "/", "<", ">", "<|", "&lt;", "%00", "${x}", "{{ 7 }}",
    "{% raw %}",
]  # fmt: skip
SURROGATES = ["\ud83d", "\ude00", "\udcff", "\ud800\ud800"]
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "cd",
        "description": "Change the folder.",
        "parameters": {"type": "object", "properties": {"folder": {"type": "string"}, "more": {"type": "string"}}},
    },
}


@dataclass
class Result:
    """What a worker has seen."""

    texts: int = 0
    reads: Counter[str] = field(default_factory=Counter)
    exceptions: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    inexpressible: int = 0  # texts that a format cannot carry, and were not asked of it

    def add(self, other: Result) -> None:
        self.texts += other.texts
        self.reads += other.reads
        self.exceptions += other.exceptions
        self.differences += other.differences
        self.inexpressible += other.inexpressible


def draw_text(rng: random.Random, surrogates: bool = True) -> str:
    """A text made of markers, pieces of grammar and odd characters."""
    kinds = [MARKERS, GRAMMAR, CHARACTERS, *([SURROGATES] if surrogates else [])]
    weights = [4, 3, 3, 1][: len(kinds)]
    pieces = [rng.choice(rng.choices(kinds, weights)[0]) for _ in range(rng.randrange(1, 12))]
    return "".join(pieces)


def mutate(rng: random.Random, text: str) -> str:
    """`text` with some of it deleted, doubled, moved or replaced."""
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randrange(1, 12))
        new = rng.choice(["", text[start:end] * 2, draw_text(rng, surrogates=False), text[start:end][::-1]])
        text = text[:start] + new + text[end:]
    return text


READERS = ("chatml/hermes", "chatml/python", "template/qwen3_5_think", "template/qwen3_5_nothink")  # all that differ


def deep(rng: random.Random) -> str:
    """A text that nests deeply or is one enormous token."""
    inside = rng.choice(
        ["[", "{", "(", '{"a":', "[cd(a=", "-", "not ", "a.", "f(", "'", "\\", "9", "<tool_call>", "<think>"]
    )
    head = rng.choice(
        ["", '<tool_call>{"name": "cd", "arguments": ', "[cd(folder=", "<tool_call>\n<function=cd>\n<parameter=x>\n"]
    )
    return head + inside * rng.choice([50, 500, 2000])


@cache
def renderers() -> dict[str, Any]:
    """Every renderer of the chat formats, by the name of its format."""
    made: dict[str, Any] = {
        f"chatml/{calls}": ChatMLRenderer(test_chatml.make_tokenizer(), calls) for calls in ("hermes", "python")
    }
    for name in ("qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink"):
        try:
            made[f"template/{name}"] = test_template.renderer(name)
        except BaseException as skipped:  # pytest's own: trl, which has the templates, is not installed
            if type(skipped).__name__ != "Skipped":
                raise
    for renderer in made.values():
        renderer.prompt([test_chatml.USER], [TOOL])
    return made


@cache
def byte_ids(name: str) -> list[int]:
    """The id of each byte as a token of its own."""
    bytes_of = renderers()[name]._text._bytes
    found = {value: token for token, value in bytes_of.items() if len(value) == 1}
    return [found[bytes([byte])] for byte in range(256)]


def check_reading(name: str, text: str) -> None:
    """A reader takes any text, and gives a message that every file and environment takes."""
    renderer, of_byte = renderers()[name], byte_ids(name)
    ids = [of_byte[byte] for byte in encodable(text).encode()]
    message, problem = renderer.parse(ids)
    json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
    problem.encode()
    for call in message.get("tool_calls") or []:
        assert isinstance(json.loads(call["function"]["arguments"], parse_constant=_refuse), dict)
    assert len(renderer.classes(ids)) == len(ids)


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def check_compact(text: str) -> None:
    renderer = _compact()
    ids = renderer.encode(text.split())
    json.dumps(renderer.parse(ids), allow_nan=False).encode()
    assert len(renderer.classes(ids)) == len(ids)
    renderer.observation([{"role": "tool", "content": text}])
    renderer.prompt([{"role": "user", "content": text}], [], text)


@cache
def _compact() -> Any:
    return toy.renderer()


def check_code(text: str) -> None:
    """AppWorld's reader takes any text, and finds code that parses whole, whatever it spells."""
    code_of({"role": "assistant", "content": text})
    code = f"x = {text!r}\nprint(x)"
    assert code_of({"role": "assistant", "content": f"Hm.\n```python\n{code}\n```\nDone."}) == (code, False), "one line"
    if "\r" not in text and not _inside_quotes(text):
        code = f'x = """\n{text}\n"""\nprint(x)'
        assert code_of({"role": "assistant", "content": f"Hm.\n```python\n{code}\n```\nDone."}) == (code, False), "many"
    plain = text.strip()
    if plain:
        assert code_of({"role": "assistant", "content": block(plain)})[0] == plain, "block"


def _inside_quotes(text: str) -> bool:
    """Whether Python reads `text` otherwise between triple quotes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d"
            ast.literal_eval(f'"""\n{encodable(text)}\n"""'.replace("\0", ""))
    except (ValueError, SyntaxError):
        return True
    return '"""' in text


def check_writing(name: str, text: str) -> bool:
    """A value and an answer are read back as they were written; whether the format can carry the value."""
    renderer, clean = renderers()[name], encodable(text)
    if name.startswith("template"):
        clean = unicodedata.normalize("NFC", clean)  # as Qwen's tokenizer does
    spells_call = name.startswith("template/qwen3_5") and _forges(clean)
    arguments = {"folder": clean, "more": "b"}
    if not spells_call:
        made = renderer.turn(
            {"role": "assistant", "content": "Hm.", "tool_calls": [test_chatml.call("cd", **arguments)] * 2}
        )
        message, problem = renderer.parse(made)
        said = test_chatml.said(message)
        assert (said, problem, message["content"]) == ([("cd", arguments)] * 2, "", "Hm."), (name, said, problem)
    if not _looks_like_call(clean):
        message, problem = renderer.parse(renderer.turn({"role": "assistant", "content": clean}))
        expected = clean
        if name.startswith("template/qwen3_5"):
            expected = clean.strip()  # by the template
        elif name == "template/qwen3":
            expected = clean.lstrip("\n")
        if name != "template/qwen2_5" or not clean.lstrip().startswith("<think>"):  # it has no thoughts to set apart
            assert (message["content"], problem) == (expected, ""), (name, message["content"], problem)
    return not spells_call


def _forges(text: str) -> bool:
    """Whether a value may spell the rest of a call in the layout of the template."""
    return any(f"\n</parameter>\n{rest}" in f"\n{text}\n" for rest in ("<parameter=", "</function>\n"))


def _looks_like_call(text: str) -> bool:
    """Whether an answer may be a call."""
    return "<tool_call>" in text or "[" in text


def check_showing(name: str, text: str) -> None:
    """Any text can stand in a tool's output, a task, a reference, a description and a name."""
    renderer = renderers()[name]
    tool = {"type": "function", "function": {**TOOL["function"], "description": text}}
    messages: list[Message] = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    assert renderer.prompt(messages, [tool], text)
    assert renderer.observation([{"role": "tool", "tool_call_id": "call_0", "content": text}])


def run(texts: int, seed: int, first: int = 0) -> Result:
    """Check texts number `first` to `first + texts - 1` of a seed."""
    result = Result()
    names = list(renderers())
    rotation = [name for name in names if name.startswith("chatml")] * 3 + names  # templates take ten times as long
    for number in range(first, first + texts):
        rng = random.Random(f"{seed}/{number}")
        text = deep(rng) if number % 2000 == 0 else draw_text(rng)
        written = rotation[number % len(rotation)]
        turn = text
        if number % 3 == 0:
            ids = renderers()[written].turn(
                {"role": "assistant", "content": "", "tool_calls": [test_chatml.call("cd", folder=text)]}
            )
            turn = mutate(rng, renderers()[written].decode(ids[:-1]))
        checks = [
            *((f"read {name}", partial(check_reading, name, turn)) for name in READERS if name in names),
            ("read compact", partial(check_compact, text)),
            ("read code", partial(check_code, text)),
            (f"write {written}", partial(check_writing, written, text)),
            (f"show {written}", partial(check_showing, written, text)),
        ]
        for what, check in checks:
            result.reads[what] += 1
            try:
                result.inexpressible += check() is False
            except AssertionError as error:
                result.differences.append(f"{what}, text {seed}/{number}: {text!r}: {error}")
            except Exception as error:
                result.exceptions.append(f"{what}, text {seed}/{number}: {text!r}: {error!r}")
        result.texts += 1
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    started, total = time.perf_counter(), Result()
    size = max(1, min(1_000, -(-options.texts // options.workers)))
    parts = [(min(size, options.texts - at), options.seed, at) for at in range(0, options.texts, size)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for part in pool.imap_unordered(_run, parts):
            total.add(part)
            print(
                f"{total.texts} texts, {len(total.exceptions)} exceptions, {len(total.differences)} differences",
                flush=True,
            )
    seconds = time.perf_counter() - started
    for line in [*total.exceptions, *total.differences][:20]:
        print(line)
    print(f"seed {options.seed}: {total.texts} texts in {seconds:.0f} s ({total.texts / seconds:.0f} per second)")
    for what, count in sorted(total.reads.items()):
        print(f"  {what}: {count}")
    print(f"exceptions {len(total.exceptions)}, not the identity {len(total.differences)}, "
          f"values that a format cannot carry {total.inexpressible}")  # fmt: skip
    raise SystemExit(bool(total.exceptions or total.differences))


def _run(part: tuple[int, int, int]) -> Result:
    return run(*part)


if __name__ == "__main__":
    main()
