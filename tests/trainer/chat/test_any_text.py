"""Readers and renderers take any text, and what is written is read back as it was. `fuzz.py` is the long form."""

from __future__ import annotations

import ast
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import examples
from tests.trainer.chat import fuzz
from tests.trainer.chat.test_chatml import USER, call, parse, said
from trainer.chat.functions import value_of
from trainer.chat.literals import MAX_DEPTH, read_whole
from trainer.data import Message, Task
from trainer.text import encodable, encodable_data

HERMES, PYTHON, FUNCTIONS = "chatml/hermes", "chatml/python", "template/qwen3_5_nothink"
pieces = st.sampled_from([*fuzz.MARKERS, *fuzz.GRAMMAR, *fuzz.CHARACTERS, *fuzz.SURROGATES])
any_text = st.lists(pieces | st.text(st.characters(), max_size=4), max_size=12).map("".join)


def renderer(name: str) -> Any:
    if name not in fuzz.renderers():
        pytest.skip("the published templates come with trl, which is not installed; `make test` installs it")
    return fuzz.renderers()[name]


every_reader = pytest.mark.parametrize("name", fuzz.READERS)
every_renderer = pytest.mark.parametrize(
    "name", [HERMES, PYTHON, "template/qwen2_5", "template/qwen3", *fuzz.READERS[2:]]
)


@every_reader
@settings(max_examples=examples(60))
@given(text=any_text)
def test_any_text_can_be_read(name: str, text: str) -> None:
    renderer(name)
    fuzz.check_reading(name, text)


@every_renderer
@settings(max_examples=examples(40))
@given(text=any_text)
def test_any_text_is_read_back_as_it_was_written(name: str, text: str) -> None:
    renderer(name)
    fuzz.check_writing(name, text)
    fuzz.check_showing(name, text)


@settings(max_examples=examples(60))
@given(text=any_text)
def test_any_text_can_stand_in_code_and_in_words(text: str) -> None:
    fuzz.check_code(text)
    fuzz.check_compact(text)


def test_a_sample_of_the_fuzzed_texts() -> None:
    result = fuzz.run(300, random.randrange(10**9))
    assert result.exceptions == result.differences == []


@every_reader
@pytest.mark.parametrize(
    "head", ["", '<tool_call>{"name": "cd", "arguments": ', "[cd(x=", "<tool_call>\n<function=cd>\n<parameter=x>\n"]
)
@pytest.mark.parametrize("inside", ["[", '{"a":', "(", "-", "not ", "9", "'", "[cd(a=", "<tool_call>", "```python\n"])
def test_depth_and_length_are_no_faults_of_ours(name: str, head: str, inside: str) -> None:
    renderer(name)
    fuzz.check_reading(name, head + inside * 3_000)


@pytest.mark.parametrize("depth", [300, 3_000])
def test_the_compact_renderer_shows_any_depth(depth: int) -> None:
    for text in ('{"a":' * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth):
        fuzz.check_compact(text)


def function(*parameters: tuple[str, str], name: str = "cd") -> str:
    """A call in the layout of the template."""
    given = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def hermes(text: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'cd', 'arguments': {'folder': text}})}\n</tool_call>"


PARAMETER = "<parameter=folder>a</parameter>"
CLOSERS = "</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("name", "text", "calls", "words"),
    [
        (HERMES, hermes("put <think>a</think> here"), [{"folder": "put <think>a</think> here"}], ""),
        (HERMES, hermes("</tool_call> <tool_call>"), [{"folder": "</tool_call> <tool_call>"}], ""),
        (HERMES, "The tag is <think>, and the total is 42.", [], "The tag is <think>, and the total is 42."),
        (HERMES, "Use <tool_call>{...}</tool_call> here.", [], "Use <tool_call>{...}</tool_call> here."),
        (HERMES, "<think>why</think>\n\n" + hermes("a") + hermes("b") + "\nSo.",
         [{"folder": "a"}, {"folder": "b"}], "\nSo."),
        (HERMES, "<think>\nnever closed " + hermes("a"), [], ""),
        (HERMES, "So <think>" + hermes("a"), [{"folder": "a"}], "So <think>"),
        (PYTHON, '[cd(folder="<think>)]</think>")]', [{"folder": "<think>)]</think>"}], ""),
        (PYTHON, 'Hm.\n[cd(folder="a"), cd(folder=\'b\')]\n[cd()]\nSo.',
         [{"folder": "a"}, {"folder": "b"}, {}], "Hm.\nSo."),
        (PYTHON, '[cd(from="a", x-y=1)]', [{"from": "a", "x-y": 1}], ""),
        (PYTHON, "[print()](https://docs) prints.", [], "[print()](https://docs) prints."),
        (PYTHON, "[Notes (2)](https://docs)", [], "[Notes (2)](https://docs)"),
        (FUNCTIONS, function(("folder", "a</parameter>b")), [{"folder": "a</parameter>b"}], ""),
        (FUNCTIONS, function(("folder", "a\n</parameter>\n<parameter=x>\nb")),
         [{"folder": "a\n</parameter>\n<parameter=x>\nb"}], ""),
        (FUNCTIONS, function(("folder", f"a\n{CLOSERS}\nb")), [{"folder": f"a\n{CLOSERS}\nb"}], ""),
        (FUNCTIONS, function(("folder", "</parameter><parameter=more>"), ("more", "b")),
         [{"folder": "</parameter><parameter=more>", "more": "b"}], ""),
        (FUNCTIONS, f"Hm.\n\n{function(('folder', 'a'))}\n{function(('folder', 'b'))}",
         [{"folder": "a"}, {"folder": "b"}], "Hm."),
        (FUNCTIONS, f"{function(('folder', 'a'))}\nNow\n{function()}\nSo.", [{"folder": "a"}, {}], "\nNow\n\nSo."),
        (FUNCTIONS, f"<tool_call><function=cd>{PARAMETER}</function><function=cd></function></tool_call>",

         [{"folder": "a"}, {}], ""),
        (FUNCTIONS, "Use <tool_call> and </function>.", [], "Use <tool_call> and </function>."),
        (FUNCTIONS, "<think>a</think>: the prompt has closed the thought",
         [], "<think>a</think>: the prompt has closed the thought"),
        ("template/qwen3_5_think", "why</think>\n\n<think>a</think>", [], "<think>a</think>"),
    ],
)  # fmt: skip
def test_markers_in_data_are_data(name: str, text: str, calls: list[dict[str, Any]], words: str) -> None:
    message, problem = parse(renderer(name), text)
    assert ([arguments for _, arguments in said(message)], message["content"], problem) == (calls, words, "")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (FUNCTIONS, function(("folder", "a\n</parameter>\n<parameter=more>\nb"), ("more", "c")),
         "once"),  # two readings
        (FUNCTIONS, f"<tool_call><function=cd>{PARAMETER} b <parameter=more>c</parameter></function></tool_call>",

         "each stand in"),
        (PYTHON, "[f(a={[]:1})]", "keys of an object must be texts"),
        (PYTHON, "[f(a=1e999)]", "not JSON"),
        (PYTHON, f"[f(a=0x{'f' * 5_000})]", "too many digits"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "not JSON"),
        (HERMES, f'<tool_call>{{"name": "f", "arguments": {{"a": {"[" * 200}{"]" * 200}}}}}</tool_call>',
         "nested too deeply"),
        (HERMES, '<tool_call>{"name": "f"} and more</tool_call>', "after the object"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_so(name: str, text: str, problem: str) -> None:
    message, found = parse(renderer(name), text)
    assert problem in found and found.startswith("malformed tool call: ")
    assert message == {"role": "assistant", "content": text}


def test_an_invented_parameter_is_no_part_of_a_value_that_is_not_free_text() -> None:
    r = renderer(FUNCTIONS)

    def show(parameters: Any) -> None:
        r.prompt([USER], [{"type": "function", "function": {"name": "f", "parameters": parameters}}])

    schema = {"properties": {"size": {"type": "integer"}, "how": {"enum": ["a", "b"]}, "text": {"type": "string"}}}
    for key, value, read in (("size", "1", 1), ("how", "a", "a")):
        show(schema)
        message, problem = parse(r, function((key, value), ("invented", "c"), name="f"))
        assert (said(message), problem) == ([("f", {key: read, "invented": "c"})], "")
    opened = {**schema, "additionalProperties": {"type": "string"}}
    show(opened)
    message, _ = parse(r, function(("text", "a"), ("invented", "c"), name="f"))
    assert said(message) == [("f", {"text": "a", "invented": "c"})]


@every_renderer
def test_a_thought_is_written_apart_and_not_taken_for_words(name: str) -> None:
    r = renderer(name)
    if name in ("template/qwen2_5", FUNCTIONS):
        pytest.skip("a format without thoughts")
    thought = "maybe <tool_call> or [cd()]"
    message: Message = {
        "role": "assistant",
        "content": "Done.",
        "reasoning_content": thought,
        "tool_calls": [call("cd")],
    }
    parsed, problem = r.parse(r.turn(message))
    assert (parsed["content"], said(parsed), problem) == ("Done.", [("cd", {})], "")


# Values

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=6,
)


@settings(max_examples=examples(100))
@given(value=json_values, wanted=st.sampled_from(["json", "ascii", "python", "commas"]))
def test_values_are_read_in_each_spelling(value: Any, wanted: str) -> None:
    spelled = {
        "json": json.dumps(value, ensure_ascii=False),
        "ascii": json.dumps(value),
        "python": repr(value),
        "commas": repr([value])[:-1] + ",]",
    }[wanted]
    expected = [value] if wanted == "commas" else value
    if wanted in ("python", "commas"):
        assert ast.literal_eval(spelled) == expected
    assert read_whole(spelled) == encodable_data(expected)


@pytest.mark.parametrize(
    ("spelled", "value"),
    [
        ("{'content': 'a, }'}", {"content": "a, }"}),
        ("{'content': 'a, }', \"done\": true,}", {"content": "a, }", "done": True}),
        ('{"a": "True, None,]",}', {"a": "True, None,]"}),
        ("{\"a\": \"it's\", 'b': '\"q\"', \"c\": '''x'y'''}", {"a": "it's", "b": '"q"', "c": "x'y"}),
        ("{\"a\": \"one\ntwo\", 'b': 'one\ntwo'}", {"a": "one\ntwo", "b": "one\ntwo"}),
        ("(1, (2), (3,), [])", [1, 2, [3], []]),
        ("{1: 'a', None: 'b', True: 'c'}", {"1": "a", "null": "b", "true": "c"}),
        ('"\\ud83d\\ude00 \\ud83d"', "😀 \ufffd"),
        ("'\\ud83d\\ude00'", "😀"),
        ("[-1, +2, .5, 1e-5, 1_000, 0x1F]", [-1, 2, 0.5, 1e-5, 1000, 31]),
    ],
)
def test_no_character_of_a_string_is_repaired(spelled: str, value: Any) -> None:
    assert read_whole(spelled) == value


def test_values_nest_so_deep_and_no_deeper() -> None:
    assert json.dumps(read_whole("[" * MAX_DEPTH + "]" * MAX_DEPTH))
    with pytest.raises(ValueError, match="nested too deeply"):
        read_whole("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


NODE = {
    "$defs": {"node": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "string"}]}, "a/b": {"type": "integer"}},
    "definitions": {"n": {"oneOf": [{"type": "integer"}, {"$ref": "#/definitions/m"}]}, "m": {"const": None}},
}
OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "123", "123"),
        ({"type": "string"}, "null", "null"),
        (OPTIONAL, "123", "123"),
        (OPTIONAL, "None", None),
        (OPTIONAL, "null", None),
        (OPTIONAL, "true", "true"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "integer", "nullable": True}, "None", None),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"type": ["string", "integer"]}, "12", 12),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "12.0", 12.0),
        ({"type": "integer"}, "12.5", "12.5"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "-Infinity", "-Infinity"),
        ({"type": "number"}, "12", 12),
        ({"type": "integer"}, "9" * 5_000, "9" * 5_000),
        ({"type": "array"}, "[1, NaN]", "[1, NaN]"),
        ({"type": "array"}, "['a', None]", ["a", None]),
        ({"type": "object"}, "{'a': 1}", {"a": 1}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"oneOf": [{"type": "array"}, {"type": "string"}]}, "[1]", [1]),
        ({"oneOf": [{"type": "array"}, {"type": "string"}]}, "['a']", "['a']"),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]}, "12", "12"),
        ({"allOf": [OPTIONAL, {"not": {"const": 1}}]}, "1", "1"),
        ({"anyOf": [{"anyOf": [OPTIONAL, {"type": "boolean"}]}]}, "true", True),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"enum": [1, None]}, "null", None),
        ({"enum": [1]}, "true", "true"),
        ({"const": "7"}, "7", "7"),
        ({"const": 7}, "7", 7),
        ({"$ref": "#/$defs/node"}, "12", "12"),
        ({"$ref": "#/$defs/a~1b"}, "12", 12),
        ({"$ref": "#/definitions/n"}, "null", None),
        ({"$ref": "#/definitions/n"}, "1.5", "1.5"),
        ({"$ref": "https://example.com/a"}, "1", 1),
        ({"$ref": "#/nowhere"}, "1", 1),
        ({"type": "any"}, "1", 1),
        ({"type": "str"}, "1", "1"),
        ({"type": "Text"}, "null", "null"),
        ({"type": ["str", "None"]}, "null", None),
        ({"type": "int"}, "1.5", "1.5"),
        ({"type": "float"}, "1", 1),
        ({"type": "bool"}, "True", True),
        ({"type": "dict"}, "{'a': None}", {"a": None}),
        ({"type": "list"}, "(1, 2)", [1, 2]),
        ({}, '"a"', '"a"'),
        (None, "[1]", [1]),
        (None, "\ud83d", "\ud83d"),
    ],
)
def test_a_parameter_is_read_as_its_schema_says(schema: Any, text: str, value: Any) -> None:
    read = value_of(text, schema, NODE)
    assert (read, type(read)) == (value, type(value))


def test_parameters_are_found_through_the_whole_schema() -> None:
    r = renderer(FUNCTIONS)
    schema = {"$ref": "#/$defs/args", "$defs": {"args": {"allOf": [{"properties": {"a": {"type": "string"}}}]}}}
    r.prompt(
        [{"role": "user", "content": "x"}], [{"type": "function", "function": {"name": "deep", "parameters": schema}}]
    )
    message, _ = parse(r, function(("a", "12"), name="deep"))
    assert said(message) == [("deep", {"a": "12"})]


# Text from outside


def test_lone_surrogates_are_replaced_and_pairs_joined() -> None:
    assert encodable("a\ud83d\ude00b\ud83dc\udcff") == "a😀b\ufffdc\ufffd"
    assert encodable_data({"\ud83d": ["\udcff", 1, None]}) == {"\ufffd": ["\ufffd", 1, None]}
    task = Task("\ud83d", "e", "train", "s", "information", "go\ud83d")
    assert (task.id, task.instruction) == ("\ufffd", "go\ufffd")
