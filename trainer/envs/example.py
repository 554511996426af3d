"""Bills: a mail says how much somebody is owed. Read it, then pay exactly that, once."""

import random

from trainer.data import Outcome, Task
from trainer.envs.tools import Toolbox, call, say


class Bills:
    """One episode."""

    async def reset(self, task):
        self.bill, self.has_read, self.payments = task.data, False, []
        self.tools = Toolbox(self.mail_find, self.wallet_pay)
        return [{"role": "user", "content": task.instruction}], self.tools.schemas

    async def step(self, message):
        return await self.tools.answer(message), not message.get("tool_calls")  # words alone end the episode

    async def outcome(self):
        if self.payments == [(self.bill["to"], self.bill["amount"])]:
            return Outcome(1.0, success=True)
        if self.has_read and not self.payments:
            return Outcome(0.3, success=False, reason="read, not paid")
        return Outcome(0.0, success=False, reason="paid wrongly" if self.payments else "nothing done")

    async def close(self): ...

    def mail_find(self, sender: str):
        """Read a person's mail.

        Args:
            sender: the person
        """
        if sender != self.bill["to"]:
            raise ValueError("not found")  # the policy's mistake: it reads {"error": "not found"}
        self.has_read = True
        return {"subject": "invoice", "amount": self.bill["amount"]}

    def wallet_pay(self, to: str, amount: int):
        """Pay a person.

        Args:
            to: the person
            amount: in whole units
        """
        self.payments.append((to, amount))
        return {"ok": "yes"}


class Suite:
    name, splits = "bills", {"train": 40, "dev": 10}

    def tasks(self, split):
        draw = random.Random(split)
        return [self.task(split, i, draw.choice("dana omar rosa".split()), draw.randint(20, 79)) for i in range(self.splits[split])]

    def task(self, split, i, to, amount):
        ask = f"pay the invoice of {to}"
        return Task(f"{split}-{i}", self.name, split, to, "state_changing", ask, {"to": to, "amount": amount})

    def make(self):
        return Bills()

    def answer_literals(self, task):
        return [str(task.data["amount"])]

    def refusal(self):
        return say("sorry")

    def gold(self, task):
        return [call("mail_find", sender=task.data["to"]), call("wallet_pay", **task.data), say("done")]
