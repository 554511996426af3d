"""The kinds of work: for each template its phrases, the hidden conditions that change what is right, and the plan.

A plan is a generator that yields calls and is sent observations; it is at once the gold solution and, when a hurried
worker skips its checks, the source of realistic mistakes. No instruction mentions a check: knowing what must be looked
at before acting is the skill to be learned.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.envs.workday.world import BOSS, DAYS, HOURS, TEAM, State


@dataclass(frozen=True)
class Call:
    """One step of a plan. A check may be skipped by a hurried worker, who then goes on as if it had said `assume`."""

    name: str
    arguments: dict[str, Any]
    kind: Literal["read", "check", "write"]
    assume: Mapping[str, Any] = field(default_factory=dict)


Plan = Generator[Call, dict[str, Any], str]  # returns the final answer
Params = dict[str, Any]


def read(name: str, /, **arguments: Any) -> Call:
    return Call(name, arguments, "read")


def check(name: str, assume: Mapping[str, Any], /, **arguments: Any) -> Call:
    return Call(name, arguments, "check", assume)


def write(name: str, /, **arguments: Any) -> Call:
    return Call(name, arguments, "write")


def trusted(name: str) -> Call:
    return check("contacts_get", {"trust": "trusted"}, name=name)


def present(name: str) -> Call:
    return check("away_get", {"away": "no"}, name=name)


def pay_invoice(p: Params) -> Plan:
    person = p["person"]
    mail = yield read("mail_find", sender=person)
    if (yield trusted(person)).get("trust") == "blocked":
        yield write("mail_flag", sender=person)
        yield write("mail_send", to=BOSS, subject="fraud")
        return "flagged"
    if (yield check("wallet_history", {"payment": "unpaid"}, name=person)).get("payment") == "paid":
        return "already"
    if (yield check("wallet_limit", {"limit": "open"})).get("limit") == "used":
        yield write("mail_send", to=BOSS, subject="approval")
        return "waiting"
    yield write("wallet_pay", to=person, amount=mail.get("amount"))
    yield write("mail_archive", sender=person)
    return "done"


def refund(p: Params) -> Plan:
    person = p["person"]
    mail = yield read("mail_find", sender=person)
    if (yield check("wallet_history", {"payment": "paid"}, name=person)).get("payment") == "unpaid":
        yield write("mail_send", to=person, subject="reject")
        return "rejected"
    if (yield trusted(person)).get("trust") == "blocked":
        yield write("mail_flag", sender=person)
        yield write("mail_send", to=BOSS, subject="fraud")
        return "flagged"
    if (yield check("wallet_limit", {"limit": "open"})).get("limit") == "used":
        yield write("mail_send", to=BOSS, subject="approval")
        return "waiting"
    yield write("wallet_request", person=person, amount=mail.get("amount"))
    yield write("mail_archive", sender=person)
    return "done"


def share_file(p: Params) -> Plan:
    person, topic = p["person"], p["topic"]
    found = yield read("files_find", topic=topic)
    file = found.get("file")
    if (yield check("files_info", {"status": "final"}, file=file)).get("status") == "draft":
        yield write("mail_send", to=person, subject="later")
        return "waiting"
    if (yield trusted(person)).get("trust") == "blocked":
        yield write("notes_write", topic=topic, text="refused")
        return "refused"
    seen = yield present(person)
    to = seen.get("deputy") if seen.get("away") == "yes" else person
    yield write("files_share", file=file, to=to)
    yield write("mail_send", to=to, subject="file")
    return "done"


def book_meeting(p: Params) -> Plan:
    person, day, hour = p["person"], p["day"], p["hour"]
    if (yield check("calendar_day", {"day": "open"}, day=day)).get("day") == "full":
        yield write("mail_send", to=person, subject="reschedule")
        return "waiting"
    seen = yield present(person)
    to = seen.get("deputy") if seen.get("away") == "yes" else person
    if (yield check("rooms_state", {"room": "free"}, day=day)).get("room") == "taken":
        yield write("mail_send", to=to, subject="online")
    else:
        yield write("rooms_book", day=day, hour=hour)
    yield write("calendar_book", person=to, day=day, hour=hour)
    return "done"


def move_meeting(p: Params) -> Plan:
    person, day = p["person"], p["day"]
    event = yield read("calendar_find", person=person)
    if (yield present(person)).get("away") == "yes":
        yield write("calendar_cancel", person=person)
        yield write("mail_send", to=person, subject="later")
        return "cancelled"
    if (yield check("calendar_day", {"day": "open"}, day=day)).get("day") == "full":
        yield write("mail_send", to=person, subject="reschedule")
        return "waiting"
    if (yield check("rooms_state", {"room": "free"}, day=day)).get("room") == "taken":
        yield write("mail_send", to=person, subject="online")
    else:
        yield write("rooms_book", day=day, hour=event.get("hour"))
    yield write("calendar_move", person=person, day=day, hour=event.get("hour"))
    return "done"


def delete_file(p: Params) -> Plan:
    topic = p["topic"]
    found = yield read("files_find", topic=topic)
    file = found.get("file")
    info = yield check("files_info", {"status": "final"}, file=file)
    if info.get("status") == "locked":
        yield write("mail_send", to=info["owner"], subject="unlock")
        return "waiting"
    if (yield check("notes_read", {"rule": "allow"}, topic=topic)).get("rule") == "deny":
        return "kept"
    if (yield check("todo_find", {"work": "closed"}, topic=topic)).get("work") == "open":
        yield write("files_copy", file=file)
    yield write("files_delete", file=file)
    yield write("notes_write", topic=topic, text="deleted")
    return "done"


def publish_report(p: Params) -> Plan:
    topic = p["topic"]
    found = yield read("files_find", topic=topic)
    file = found.get("file")
    info = yield check("files_info", {"status": "final"}, file=file)
    if info.get("status") == "draft":
        yield write("todo_assign", topic=topic, to=info["owner"])
        return "waiting"
    if (yield check("notes_read", {"rule": "allow"}, topic=topic)).get("rule") == "deny":
        yield write("mail_send", to=BOSS, subject="approval")
        return "waiting"
    if (yield check("todo_find", {"work": "closed"}, topic=topic)).get("work") == "open":
        yield write("todo_close", topic=topic)
    yield write("files_share", file=file, to=TEAM)
    yield write("mail_send", to=TEAM, subject="file")
    return "done"


def hand_over(p: Params) -> Plan:
    person, topic = p["person"], p["topic"]
    if (yield check("todo_find", {"work": "open"}, topic=topic)).get("work") == "closed":
        return "already"
    if (yield trusted(person)).get("trust") == "blocked":
        yield write("mail_send", to=BOSS, subject="staffing")
        return "refused"
    seen = yield present(person)
    to = seen.get("deputy") if seen.get("away") == "yes" else person
    yield write("todo_assign", topic=topic, to=to)
    yield write("mail_send", to=to, subject="handover")
    return "done"


def invite_vendor(p: Params) -> Plan:
    person, topic, day, hour = p["person"], p["topic"], p["day"], p["hour"]
    if (yield check("notes_read", {"rule": "allow"}, topic=topic)).get("rule") == "deny":
        yield write("mail_send", to=person, subject="reject")
        return "rejected"
    if (yield trusted(person)).get("trust") == "blocked":
        yield write("notes_write", topic=topic, text="refused")
        return "refused"
    if (yield check("calendar_day", {"day": "open"}, day=day)).get("day") == "full":
        yield write("mail_send", to=person, subject="reschedule")
        return "waiting"
    yield write("calendar_book", person=person, day=day, hour=hour)
    yield write("mail_send", to=person, subject="invite")
    return "done"


def meeting_hour(p: Params) -> Plan:
    person = p["person"]
    event = yield read("calendar_find", person=person)
    if (yield present(person)).get("away") == "yes":
        return "answer none"
    mail = yield check("mail_find", {"subject": "hello"}, sender=person)
    return f"answer {mail['hour'] if mail.get('subject') == 'moved' else event.get('hour')}"


def open_amount(p: Params) -> Plan:
    person = p["person"]
    mail = yield read("mail_find", sender=person)
    if (yield trusted(person)).get("trust") == "blocked":
        return "answer none"
    if (yield check("wallet_history", {"payment": "unpaid"}, name=person)).get("payment") == "paid":
        return "answer zero"
    return f"answer {mail.get('amount')}"


def who_handles(p: Params) -> Plan:
    topic = p["topic"]
    todo = yield read("todo_find", topic=topic)
    owner = str(todo.get("owner"))
    if (yield trusted(owner)).get("trust") == "blocked":
        return f"answer {BOSS}"
    seen = yield present(owner)
    return f"answer {seen.get('deputy') if seen.get('away') == 'yes' else owner}"


Condition = Callable[[State, Params], None]


def block(state: State, p: Params) -> None:
    state["contacts"][p["person"]]["trust"] = "blocked"


def send_away(state: State, p: Params) -> None:
    state["away"][p["person"]] = {"away": "yes", "deputy": p["deputy"]}


def mark(table: str, key: str, value: str) -> Condition:
    """Return a condition that sets state[table][p[key]] to `value`."""

    def condition(state: State, p: Params) -> None:
        state[table][p[key]] = value

    return condition


def set_limit_used(state: State, p: Params) -> None:
    state["limit"] = "used"


def set_status(status: str) -> Condition:
    def condition(state: State, p: Params) -> None:
        state["files"][state["topic_file"][p["topic"]]]["status"] = status

    return condition


def deny(state: State, p: Params) -> None:
    state["notes"][p["topic"]]["rule"] = "deny"


def set_work(work: str) -> Condition:
    def condition(state: State, p: Params) -> None:
        state["todo"][p["topic"]]["work"] = work

    return condition


def move_by_mail(state: State, p: Params) -> None:
    old = state["events"][p["person"]]["hour"]
    state["mail"][p["person"]] = {"subject": "moved", "hour": p["hour"] if p["hour"] != old else HOURS[(old - 7) % 10]}


def of_owner(condition: Condition) -> Condition:
    """Apply `condition` to whoever owns the work on the topic."""

    def owned(state: State, p: Params) -> None:
        owner = state["todo"][p["topic"]]["owner"]
        condition(state, {**p, "person": owner, "deputy": p["deputy"] if p["deputy"] != owner else p["other"]})

    return owned


def other_day(state: State, p: Params) -> None:
    """Put the meeting on a day to move it from: a move to where it is would be no move."""
    event = state["events"][p["person"]]
    if event["day"] == p["day"]:
        event["day"] = DAYS[(DAYS.index(p["day"]) + 1) % len(DAYS)]


def plain_mail(state: State, p: Params) -> None:
    state["mail"][p["person"]]["subject"] = "hello"


def other_owner(state: State, p: Params) -> None:
    """Let the work belong to somebody who is not about to get it, and the file to a third person."""
    state["todo"][p["topic"]]["owner"] = p["other"]
    state["files"][state["topic_file"][p["topic"]]]["owner"] = p["deputy"]


def open_work(state: State, p: Params) -> None:
    other_owner(state, p)
    state["todo"][p["topic"]]["work"] = "open"


def nothing(state: State, p: Params) -> None:
    """Leave an ordinary day."""


@dataclass(frozen=True)
class Template:
    """One kind of work. `conditions` are alternatives; `usual` prepares what the normal case needs."""

    plan: Callable[[Params], Plan]
    phrases: tuple[str, ...]
    conditions: tuple[Condition, ...]
    usual: Condition = nothing
    asks: bool = False  # an information task: the answer is verified

    @property
    def name(self) -> str:
        return self.plan.__name__


full_day, room_taken = mark("days", "day", "full"), mark("rooms", "day", "taken")
paid, unpaid = mark("paid", "person", "paid"), mark("paid", "person", "unpaid")

TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Template(
            pay_invoice, ("pay the invoice of {person}", "{person} sent a bill , pay it"), (block, paid, set_limit_used)
        ),
        Template(
            refund,
            ("ask {person} for the money back", "get our refund from {person}"),
            (unpaid, block, set_limit_used),
            usual=paid,
        ),
        Template(
            share_file,
            ("share the {topic} file with {person}", "{person} needs the {topic} file"),
            (set_status("draft"), block, send_away),
        ),
        Template(
            book_meeting,
            ("book a meeting with {person} on {day} at {hour}", "meet {person} {day} {hour}"),
            (full_day, send_away, room_taken),
        ),
        Template(
            move_meeting,
            ("move the meeting with {person} to {day}", "see {person} on {day} instead"),
            (send_away, full_day, room_taken),
            usual=other_day,
        ),
        Template(
            delete_file,
            ("delete the {topic} file", "clean up the file about {topic}"),
            (set_status("locked"), deny, set_work("open")),
        ),
        Template(
            publish_report,
            ("publish the {topic} report", "give the team the {topic} file"),
            (set_status("draft"), deny, set_work("open")),
            usual=other_owner,
        ),
        Template(
            hand_over,
            ("hand the {topic} work to {person}", "let {person} take over {topic}"),
            (set_work("closed"), block, send_away),
            usual=open_work,
        ),
        Template(
            invite_vendor,
            ("invite {person} about {topic} on {day} at {hour}", "have {person} present {topic} {day} {hour}"),
            (deny, block, full_day),
        ),
        Template(
            meeting_hour,
            ("at which hour is the meeting with {person} ?", "when do we see {person} ?"),
            (send_away, move_by_mail, nothing),
            usual=plain_mail,
            asks=True,
        ),
        Template(
            open_amount,
            ("how much do we owe {person} ?", "what is open with {person} ?"),
            (block, paid, nothing),
            asks=True,
        ),
        Template(
            who_handles,
            ("who handles {topic} ?", "whom do we ask about {topic} ?"),
            (of_owner(block), of_owner(send_away), nothing),
            asks=True,
        ),
    )
}


def draw(rng: random.Random, people: list[str], topics: list[str]) -> Params:
    """Return what one instruction is about; removes nothing from the lists."""
    person, deputy, other = rng.sample(people, 3)
    return {
        "person": person,
        "deputy": deputy,
        "other": other,
        "topic": rng.choice(topics),
        "day": rng.choice(DAYS),
        "hour": rng.choice(HOURS),
    }
