"""What the sanitiser masks, and what it leaves."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.speed import cpu_seconds
from tests.trainer.siblings import ToySuite, call, seen, task, with_messages
from tests.trainer.stub_endpoint import StubEndpoint
from trainer.config import WriterConfig
from trainer.data import Message
from trainer.references import writers
from trainer.references.literals import spans
from trainer.references.sanitiser import MAX_TOLD, Sanitiser, luhn
from trainer.references.writer_prompt import build_prompt

PLANTED = [
    ("secret", "use sk-proj-AbCdEf0123456789xyz now", "AbCdEf0123456789xyz"),
    ("secret", "Authorization: Bearer abc.DEF-123456", "abc.DEF-123456"),
    ("secret", "AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("secret", "ghp_0123456789abcdefABCDEF", "ghp_0123456789abcdefABCDEF"),
    ("secret", "https://ann:hunter2@host/db", "hunter2"),
    ("secret", "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.sflKxwRJ", "sflKxwRJ"),
    ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----", "MIIEow"),
    ("credential", "password = hunter2 ok", "hunter2"),
    ("credential", "the password is hunter2", "hunter2"),
    ("credential", '{\\"api_key\\": \\"q9w8e7\\"}', "q9w8e7"),
    ("credential", "access_token=q9w8e7&page=2", "q9w8e7"),
    ("credential", "DB_PASSWORD: 'q9 w8'", "q9 w8"),
    ("credential", "cvv: 123", "123"),
    ("payment", "card 4111 1111 1111 1111 is on file", "4111 1111 1111 1111"),
    ("payment", "5500-0000-0000-0004", "5500-0000-0000-0004"),
    ("account", "pay to GB82 WEST 1234 5698 7654 32 today", "WEST 1234"),
    ("account", "DE89370400440532013000", "DE89370400440532013000"),
    ("account", "with credit_card_4421486", "4421486"),
    ("account", "account number 12345678", "12345678"),
    ("account", "account_id: Z-99812", "Z-99812"),
    ("account", "078-05-1120 is the number", "078-05-1120"),
    ("account", "routing 021000021", "021000021"),
    ("credential", "Your one-time code: 482910", "482910"),
    ("credential", "2FA code 482910", "482910"),
    ("credential", "username=ann&pwd%5B%5D=hunter2Zq", "hunter2Zq"),
    ("secret", "glpat-AbCdEf0123456789xyz", "AbCdEf0123456789xyz"),
    ("secret", "npm_AbCdEf0123456789xyzAbCdEf0123456789", "AbCdEf0123456789xyz"),
    ("secret", "SG.abcdefghijk.lmnopqrstu", "abcdefghijk"),
    ("secret", "dop_v1_abcdef0123456789", "abcdef0123456789"),
    ("secret", "ya29.a0AfH6SMBx-abcdef", "a0AfH6SMBx"),
    ("payment", "3.782822463100050e14", "3.78282246310005"),
    ("email", "write to ann.lee@example.org", "ann.lee@example.org"),
    ("evaluator", "Evaluation report\nassert state.sent == 3\n\nnext", "state.sent"),
    ("evaluator", "<evaluator_output>wanted: 7</evaluator_output>", "wanted"),
    ("evaluator", "ground truth: 7 birds", "7 birds"),
    ("evaluator", "gold action: pay(dana)", "pay(dana)"),
    ("evaluator", "reward: 0.0", "0.0"),
]


@pytest.mark.parametrize(("kind", "text", "secret"), PLANTED)
def test_what_is_planted_is_masked_and_counted(kind: str, text: str, secret: str) -> None:
    cleaner = Sanitiser()
    assert secret not in cleaner.text(text)
    assert cleaner.hits[kind] >= 1
    wrapped = json.dumps({"outer": json.dumps({"note": text})})
    assert secret not in json.dumps(cleaner.message(seen(wrapped)), ensure_ascii=False)
    assert secret not in json.dumps(cleaner.message(call("look", {"note": text})), ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        "mail_find sender dana",
        "max_tokens=5 and 12 tokens: fine",
        "author: Bob, 3 of 4 rooms, 2024-05-01 09:30",
        "the order 4111111111111112 has no valid checksum",
        '{"ok": "yes", "label": "inbox"}',
    ],
)
def test_what_is_harmless_stays(text: str) -> None:
    cleaner = Sanitiser(["paris"])
    assert cleaner.text(text) == text
    assert not cleaner.hits


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("x", "Basic economy flights cannot be modified; all others, including basic economy, can change cabin."),
        (
            "x",
            "The app uses basic authentication. Bearer certificates are not refundable, basic/standard fares neither.",
        ),
        ("x", '{"secretary": "Jonathan Miller", "cookies": "chocolate", "tokenizer": "bpe"}'),
        ("0", "Departs 2024-05-16 10:30, arrives 11:45; open 08:30 - 12:15 and 13:30 - 18:45."),
        ("1", "from 2024-05-31 12:00 to 2024-06-02"),
        ("1", "[50, 77, 20, 31]"),
        ("2", '{"song_ids": [12,50,77,20,31]}'),
        ("5", "scores: 35 40 22 71 90, [12, 53, 20, 31], times: 08:35 09:10 10:20 11:45"),
        ("5", "a certificate of $5,000 and 5,000 miles"),
        ("3", "it costs $3,000"),
    ],
)
def test_what_airlines_and_apps_say_stays(answer: str, text: str) -> None:
    cleaner = Sanitiser([answer])
    assert cleaner.text(text) == text
    assert cleaner.lines([text]) == [text]
    assert not cleaner.hits


@pytest.mark.parametrize("token", ["abc.DEF-123456", "QWxhZGRpbjpvcGVu", "opensesame=", "openSesame", "ab-cdef" * 8])
def test_what_looks_like_a_token_is_none_of_ordinary_words(token: str) -> None:
    for scheme in ("Bearer", "basic"):
        assert Sanitiser().text(f"use {scheme} {token} now") == "use [masked secret] now"
    assert "sesame" not in Sanitiser().text("Authorization: Bearer opensesame")


@pytest.mark.parametrize(
    ("number", "row"), [("125", "[49, 50, 53, 32]"), ("Q7a", "chr(81)+chr(55)+chr(97)+chr(10)"), ("42", "782034322078")]
)
def test_a_short_answer_in_codes_is_masked(number: str, row: str) -> None:
    assert "[masked answer]" in Sanitiser([number]).text(f"it is {row}")


def test_keys_of_json_speak_for_their_values() -> None:
    record = {"passWord": "q1", "evaluation": {"wanted": ["q2"]}, "balance": 17.5, "gold_actions": ["q3"], "day": "mon"}
    masked = Sanitiser().message(seen(json.dumps(record)))["content"]
    assert masked["day"] == "mon"
    assert not [q for q in ("q1", "q2", "q3", "17.5") if q in json.dumps(masked)]


def test_only_known_fields_of_a_message_are_looked_at() -> None:
    message: Message = {**seen("fine"), "evaluation": "HIDDEN", "metadata": {"gold": "HIDDEN"}}
    assert Sanitiser().message(message) == {"role": "tool", "content": "fine"}
    assert (
        Sanitiser().message({"role": "assistant", "content": None, "tool_calls": [None, {}]})["calls"][0]["name"]
        == "None"
    )


@pytest.mark.parametrize(
    "spelling",
    ["12500", "12,500", "12500.0", "12500.00", '"12500"', "USD 12500.", "n\\n12500\\t", "\\\\u002012500", "id_12500_x"],
)
def test_spellings_of_a_number(spelling: str) -> None:
    assert "500" not in Sanitiser(["12500"]).text(spelling)
    assert Sanitiser(["12500"]).text("125001 and 912500") == "125001 and 912500"


@pytest.mark.parametrize(
    "spelling",
    [
        "Zoë  Li",
        "ZOË LI",
        "Zo\\u00eb Li",
        "Zo\\\\u00eb\\\\nLi",
        "Zo%C3%AB%20Li",
        "Zoe\u0308 Li",
        "Z\u200boë Li",
        "(Zoë\tLi)",
    ],
)
def test_spellings_of_a_name(spelling: str) -> None:
    assert "Li" not in Sanitiser(["Zoë Li"]).text(spelling)
    assert spans("Zoë Lind", ["Zoë Li"]) == []


SHOWN = {  # a value beside its name, and the value
    '{"password": "n0t-a-secret"}': "n0t-a-secret",
    "[{'account_name': 'x', 'password': 'n0t-a-secret'}]": "n0t-a-secret",
    '{"access_token": ["Jk7dd-zz", {"old": "Jk7dd-zy"}]}': "Jk7dd-zy",
    '{"password": "swordfish"}': "swordfish",
    "password='correct horse battery'": "correct horse battery",
    "your PIN is 48213": "48213",
    "curl -H 'Authorization: Bearer abc.DEF-123456'": "abc.DEF-123456",
    "https://ann:hunter2@host/db": "hunter2",
    '{"account_id": "Z-99812x"}': "Z-99812x",
    "account number 12345678": "12345678",
}
AGAIN = ["{{'simple_note': '{}'}}", "login_all('ann', '{}')", "I use {} for it.", '{{"note": "{}"}}', "x|{}|y"]


@pytest.mark.parametrize("shown", SHOWN, ids=range(len(SHOWN)))  # pytest puts an id into the environment
@pytest.mark.parametrize("frame", AGAIN)
@pytest.mark.parametrize("spell", [str, lambda t: base64.b64encode(t.encode()).decode(), lambda t: "-".join(t)])
def test_a_credential_that_was_shown_once_leaves_nowhere(shown: str, frame: str, spell: Callable[[str], str]) -> None:
    """Before its name was seen, and after; in its own sibling, in another one, and in the task."""
    secret = SHOWN[shown]
    again = frame.format(spell(secret))
    traces: list[tuple[list[Message], float]] = [
        ([seen(again), call("look", {"x": again})], 0.0),
        ([seen(shown), {"role": "assistant", "content": again}], 1.0),
    ]
    cleaner = Sanitiser()
    body = build_prompt(with_messages(*traces, of=task(instruction=again)), cleaner, 48_000)[1]["content"]
    assert secret not in body and spell(secret) not in body
    assert sum(cleaner.hits.values()) >= 5


def test_a_group_of_too_many_credentials_stays_here(tmp_path: Path) -> None:
    """Up to a bound they are looked for in reasonable time; beyond it nothing leaves."""
    secrets = [f"kx{i}-zq{i * i}" for i in range(MAX_TOLD + 1)]
    named, bare = "\n".join(f"password: {x}" for x in secrets[1:]), " ".join(secrets[1:] * 10)
    half = with_messages(([seen(named[: len(named) // 2]), seen(bare[: len(bare) // 2])], 1.0), ([], 0.0))
    whole = with_messages(([seen(named), seen(bare)], 1.0), ([], 0.0))
    less, more = (cpu_seconds(lambda g=g: build_prompt(g, Sanitiser(), 480_000), runs=2) for g in (half, whole))
    assert more < 6 * less  # twice the credentials in twice the text
    cleaner = Sanitiser()
    body = build_prompt(whole, cleaner, 480_000)[1]["content"]
    assert "zq" not in body
    assert cleaner.hits["credential"] >= 11 * MAX_TOLD
    made = with_messages(([seen(f"{named}\npassword: {secrets[0]}")], 1.0), ([], 0.0))
    with StubEndpoint() as endpoint:
        config = WriterConfig(name="openai", base_url=endpoint.base_url, cache_dir=tmp_path, max_retries=0)
        asyncio.run(writers.load(config, ToySuite()).write([made]))
    assert (endpoint.bodies, made.reference_info["error"]) == ([], "unclean")


@pytest.mark.parametrize(
    "shown",
    [
        '{"password": null, "token": true, "secret": "None", "pin": 12}',
        '{"password": "string", "api_key": "required", "cookie": ""}',
        "the password is wrong, the token expires in 3600 seconds on 2024-05-20",
        "the password has 12 letters and the pin is from 2024",
        '{"balance": 1500.25, "account": "checking"}',
        '{"account_name": "venmo", "token_type": "bearer"}',
    ],
)
def test_what_ordinary_text_is_made_of_is_not_learned(shown: str) -> None:
    text = "None of it is true or null: a string is required, wrong, venmo, bearer, checking, 12, 2024, 3600, 1500.25"
    text += ", 2024-05-20, letters, seconds, expires"
    made = with_messages(([seen(shown), seen(text)], 1.0), ([], 0.0))
    assert json.dumps(text) in build_prompt(made, Sanitiser(), 48_000)[1]["content"]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        ("[{'name': 'show_account_passwords', 'description': 'Show passwords.'}]", "the description of the request"),
        ('{\n  "name": "show_account_passwords",\n  "description": "Show passwords."\n},', "the description of it"),
        ("passwords = {'spotify': 'x1', 'amazon': 'y2'}", "apis.spotify.show_song_library()"),
        ('get_token("venmo_app"), get_token("venmo")', "the venmo_app, and venmo"),
        ('{"parameters": ["password", "username"]}', "the username is theirs"),
        ("the fields ['password', 'username']", "the username is theirs"),
        ("Your access token expired at 2023-05-18T12:00:00. Flight HAT170 is next", "Flight HAT170 departs"),
        ("The payment method for reservation 4WQ150 is gift_card_123.", "reservation 4WQ150"),
        ("the secretary: 'Jonathan'; cookies: 'chocolate'", "Jonathan likes chocolate"),
    ],
)
def test_the_neighbours_of_a_credential_are_not_learned(shown: str, text: str) -> None:
    made = with_messages(([seen(shown), seen(text)], 1.0), ([], 0.0))
    assert json.dumps(text) in build_prompt(made, Sanitiser(), 48_000)[1]["content"]


@pytest.mark.parametrize(
    "shown",
    [
        "if password == 'hunter2Zq':",
        "the password for account 4WQ150 is hunter2Zq",
        "password hunter2Zq is wrong",
        "Authorization: Token hunter2Zq",
        "password: hunter2Zq for the app",
        "passwords = ['hunter2Zq', 'other']",
        '["password", "hunter2Zq"]',
    ],
)
def test_a_credential_among_words_is_learned(shown: str) -> None:
    made = with_messages(([seen(shown), seen("say hunter2Zq")], 1.0), ([], 0.0))
    assert '"say [masked credential]"' in build_prompt(made, Sanitiser(), 48_000)[1]["content"]


def test_secrets_of_this_process_are_known_by_name_by_place_and_by_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "/pLanted/kEy+9x",
        "SHORT_TOKEN": "zq77ab",
        "DATABASE_URL": "postgres://ann:pl%40nted77@db/x",
        "CUSTOMER_LLM": "zq-planted-cust-1",
        "WRITER_LLM": "zq-planted-writer-1",
    }
    for name, value in {**secrets, "TOKEN_FILE": str(tmp_path), "TOKEN_TYPE": "opaque"}.items():
        monkeypatch.setenv(name, value)
    planted = [*secrets.values(), "pl@nted77"]
    said = f"{planted} and the file {tmp_path} and an opaque one"
    made = with_messages(([seen(said)], 1.0), ([], 0.0))
    suite = ToySuite()
    suite.api_key_env = "CUSTOMER_LLM"  # type: ignore[attr-defined]
    with StubEndpoint() as endpoint:
        config = WriterConfig(
            name="openai", base_url=endpoint.base_url, cache_dir=tmp_path, max_retries=0, api_key_env="WRITER_LLM"
        )
        asyncio.run(writers.load(config, suite).write([made]))
    body = endpoint.bodies[0].decode()
    assert not [value for value in planted if value in body]
    assert f"the file {tmp_path} and an opaque one" in body


def test_luhn() -> None:
    assert luhn("4111111111111111")
    assert not luhn("4111111111111112")


@pytest.mark.parametrize(
    "unit",
    [
        "ab_cd-",
        "sk-a",
        "evaluator ",
        "\\",
        '\\"',
        "1",
        "1 ",
        "a@",
        'password="',
        "<evaluator ",
        "AB12",
        "eyJa",
        " ",
        "evaluator\n",
    ],
)
def test_no_text_is_slow(unit: str) -> None:
    """Beside prose of that length."""

    def clean(text: str) -> None:
        Sanitiser(["Paris", '"q"x', "12500"]).text(text * (100_000 // len(text)))

    assert cpu_seconds(lambda: clean(unit), runs=1) < 10 * cpu_seconds(lambda: clean("The room is free on Monday. "))
