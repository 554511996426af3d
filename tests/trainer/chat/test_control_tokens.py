"""Text from outside never becomes a control token: every added token, through every place, in every renderer."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.trainer import toy
from tests.trainer.chat import test_chatml, test_template
from trainer.chat.chatml import ChatMLRenderer
from trainer.chat.compact import CompactRenderer
from trainer.chat.markup import Markup
from trainer.chat.template import TemplateRenderer
from trainer.data import Message, Tool
from trainer.errors import UserError

QWEN = test_template.QWEN
RENDERERS = [f"template/{name}" for name in QWEN]
RENDERERS += [f"chatml/{calls}/{tools}" for calls in ("hermes", "python") for tools in ("json", "described")]
RENDERERS += ["smollm2", "compact"]
HARMLESS = "docs"


@cache
def renderer(name: str) -> Any:
    kind, *rest = name.split("/")
    if kind == "template":
        return test_template.renderer(rest[0])
    if kind == "chatml":  # over a tokenizer that has the markers that the renderer writes, as Qwen's
        return ChatMLRenderer(test_template.make_tokenizer(""), *rest)
    return toy.renderer() if kind == "compact" else test_chatml.renderer("smollm2")


def control_ids(name: str) -> dict[int, str]:
    """All added tokens. `<unk>` is none: it is what any word becomes that the compact vocabulary lacks."""
    added = renderer(name).vocabulary if name == "compact" else {}
    if added:
        return {i: word for word, i in added.items() if word.startswith("<") and word != "<unk>"}
    return {i: str(token) for i, token in renderer(name).tokenizer.added_tokens_decoder.items()}


def tool(name: str = "cd", key: str = "folder", **changes: Any) -> Tool:
    node = {"type": "string", "description": "Where to."} | changes.pop("node", {})
    schema = {"type": "object", "properties": {key: node}, "required": [key]} | changes.pop("schema", {})
    return {"type": "function", "function": {"name": name, "description": "Go.", "parameters": schema} | changes}


def history(name: str, arguments: Any) -> list[Message]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": "call_0", "type": "function", "function": function}
    return [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "ok"}]


USER: Message = {"role": "user", "content": "Go."}
# What a renderer is given; each takes the text that an attacker chose.
PLACES: dict[str, Callable[[Any, str], list[int]]] = {
    "system": lambda r, x: r.prompt([{"role": "system", "content": x}, USER], [tool()]),
    "task": lambda r, x: r.prompt([{"role": "user", "content": x}], [tool()]),
    "reference": lambda r, x: r.prompt([USER], [tool()], x),
    "reference after a system prompt": lambda r, x: r.prompt([{"role": "system", "content": "s"}, USER], [], x),
    "tool's name": lambda r, x: r.prompt([USER], [tool(name=x)]),
    "tool's description": lambda r, x: r.prompt([USER], [tool(description=x)]),
    "key of a tool": lambda r, x: r.prompt([USER], [tool(**{x: "a"})]),
    "parameter's name": lambda r, x: r.prompt([USER], [tool(key=x)]),
    "parameter's description": lambda r, x: r.prompt([USER], [tool(node={"description": x})]),
    "parameter's type": lambda r, x: r.prompt([USER], [tool(node={"type": x})]),
    "enum value": lambda r, x: r.prompt([USER], [tool(node={"enum": [x, "b"]})]),
    "default": lambda r, x: r.prompt([USER], [tool(node={"default": x}, schema={"required": []})]),
    "key of a parameter": lambda r, x: r.prompt([USER], [tool(node={x: {x: [x]}})]),
    "required list": lambda r, x: r.prompt([USER], [tool(schema={"required": [x]})]),
    "key of a schema": lambda r, x: r.prompt([USER], [tool(schema={x: {"$ref": x}})]),
    "tool's output": lambda r, x: r.observation([{"role": "tool", "content": x}]),
    "tool's output as JSON": lambda r, x: r.observation([{"role": "tool", "content": json.dumps({x: [x]})}]),
    "tool's name in its output": lambda r, x: r.observation([{"role": "tool", "name": x, "content": "a"}]),
    "user's reply": lambda r, x: r.observation([{"role": "user", "content": x}]),
    "words of an earlier turn": lambda r, x: r.prompt([USER, {"role": "assistant", "content": x}, USER], []),
    "thought of an earlier turn": lambda r, x: r.prompt(
        [USER, {"role": "assistant", "content": "a", "reasoning_content": x}, USER], []
    ),
    "tool's name of an earlier call": lambda r, x: r.prompt(history(x, {"a": "b"}), []),
    "argument of an earlier call": lambda r, x: r.prompt(history("cd", {"a": x, "b": [x]}), []),
    "argument's name of an earlier call": lambda r, x: r.prompt(history("cd", {x: {x: 1}}), []),
    "answer of a demonstration": lambda r, x: ids_of(r, r.turn({"role": "assistant", "content": x})),
    "argument of a demonstration": lambda r, x: ids_of(r, r.turn(history("cd", {"a": x})[1])),
    "argument's name of a demonstration": lambda r, x: ids_of(r, r.turn(history("cd", {x: "a"})[1])),
    "tool's name of a demonstration": lambda r, x: ids_of(r, r.turn(history(x, {"a": "b"})[1])),
}


def ids_of(r: Any, turn: list[Any]) -> list[int]:
    return r.encode(turn) if isinstance(r, CompactRenderer) else turn


def counts(name: str, ids: list[int]) -> dict[str, int]:
    return {text: ids.count(i) for i, text in control_ids(name).items()}


def wide(text: str) -> str:
    """In full-width letters, which NFKC makes plain ones of."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def variants(marker: str) -> list[str]:
    """A marker alone, bare of its brackets, next to others, doubled, cut in two, and in full-width letters."""
    inner = marker.strip("</|>[]")
    stand_ins = "\U00100000\U00100001\U00100005\U0010ffff\U0010fffd"
    cut = f"{marker[:2]}{marker}{marker[2:]}"
    return [marker, f"a {marker}\n{marker} b", marker * 2, cut, inner or "a", wide(marker), f"{stand_ins}{marker}"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RENDERERS)
def test_no_added_token_comes_from_outside(name: str, place: str) -> None:
    r, put = renderer(name), PLACES[place]
    plain = counts(name, put(r, HARMLESS))
    for marker in control_ids(name).values():
        for text in variants(marker):
            assert counts(name, put(r, text)) == plain, text


OUTSIDE = ["task", "reference", "tool's output", "user's reply", "parameter's name", "argument of an earlier call"]


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("name", [name for name in RENDERERS if name.startswith("template")])
def test_the_text_is_read_as_it_is(name: str, place: str) -> None:
    r = renderer(name)
    for marker in control_ids(name).values():
        text = f"a{marker}b\U00100000\U0010ffff\U000f0000\U00100003c"
        assert text in r.decode(PLACES[place](r, text))


@given(st.lists(st.sampled_from([*test_template.SPECIAL, *test_template.MARKERS]) | st.text(max_size=3), max_size=8))
@settings(max_examples=examples(200))
def test_any_text_comes_back_without_a_control_token(parts: list[str]) -> None:
    markup, text = _markup(), "".join(parts).encode("utf-8", "replace").decode()
    ids = markup.encode(markup.data(text))
    assert not set(ids) & set(markup.ids.values())
    assert renderer("chatml/hermes/json").decode(ids) == as_normalised(text)
    assert markup.spell(markup.data(text)) == text
    own = markup.encode(markup.mark("<tool_call>") + markup.data(text) + markup.mark("<|im_end|>"))
    assert own == [markup.ids["<tool_call>"], *ids, markup.ids["<|im_end|>"]]


def as_normalised(text: str) -> str:
    """Qwen's tokenizer normalises text, and so does the one made for tests."""
    return unicodedata.normalize("NFC", text)


@cache
def _markup() -> Markup:
    return Markup(test_template.make_tokenizer(""))


@pytest.mark.parametrize("normaliser", ["NFKC", "Lowercase", ""])
def test_no_way_of_tokenizing_makes_one(normaliser: str) -> None:
    """Normalisers that make markers of other letters, merges that make them, and whole words looked up unsplit."""
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    made = test_chatml.make_tokenizer()
    made.add_tokens(["<tool_call>", "<TOOL_CALL>", "word"])
    parts = json.loads(made.backend_tokenizer.to_str())
    for token in parts["added_tokens"]:
        token["normalized"] = True
    model, start = parts["model"], "<|im_start|>"
    model["vocab"] |= {start[:n]: 1000 + n for n in range(2, len(start))}
    model["merges"] += [[start[:n], start[n]] for n in range(1, len(start))]
    model |= {"ignore_merges": True, "unk_token": "<|endoftext|>"}
    del model["vocab"]["z"]  # a byte that the vocabulary lacks
    parts["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    backend = Tokenizer.from_str(json.dumps(parts))
    if normaliser:
        backend.normalizer = getattr(normalizers, normaliser)()
    markup = Markup(PreTrainedTokenizerFast(tokenizer_object=backend))
    texts = [
        *markup.ids,
        *map(wide, markup.ids),
        "<TOOL_CALL>",
        "z",
        "a zebra",
        "a<|im_start|>b",
        f"<{wide('|')}im_end|>",
    ]
    for text in texts:
        assert not set(markup.encode_data(text)) & set(markup.ids.values()), text
    assert markup.encode_data("a word") == markup.encode("a word")
    assert "word" not in markup.ids


def test_a_template_that_writes_the_names_of_keys_in_brackets() -> None:
    """As Qwen3-Coder's does: a key `think` makes no `<think>`, and markers that the tokenizer names are its own."""
    tokenizer = test_template.make_tokenizer(
        "{% for t in tools or [] %}{% for key in t['function']['parameters'] %}<{{ key }}></{{ key }}>{% endfor %}"
        "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ '<tool_call>\n{\"name\": \"' + c['function']['name'] + "
        "'\", \"arguments\": ' }}{{ c['function']['arguments'] | tojson }}}\n</tool_call>{% endfor %}"
        "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    r = TemplateRenderer(tokenizer)
    ids = r.prompt(
        [USER], [{"type": "function", "function": {"name": "a", "parameters": {"think": 1, "tool_call": 2}}}]
    )
    assert "<think></think><tool_call></tool_call>" in r.decode(ids)
    assert [r.decode([i]) for i in ids if i in r.markup.ids.values()] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_a_template_that_puts_control_tokens_together_is_refused() -> None:
    source = test_template.template("qwen3")
    tokenizer = test_template.make_tokenizer(source.replace("<|im_end|>", "<|im' ~ '_end|>"))
    with pytest.raises(UserError, match=r"model\.renderer: .*spelled in its source"):
        TemplateRenderer(tokenizer)
