"""Bills: a mail says how much somebody is owed. Read it, then pay exactly that, once."""

from trainer.data import Outcome, Task
from trainer.envs.tools import Toolbox, call, say


class Bills:  # one episode
    async def reset(self, task):
        self.bill, self.read, self.paid, self.tools = task.data, False, [], Toolbox(self.mail_find, self.wallet_pay)
        return [{"role": "user", "content": task.instruction}], self.tools.schemas

    async def step(self, message):
        return await self.tools.answer(message), not message.get("tool_calls")  # words alone end the episode

    async def outcome(self):
        if self.paid == [self.bill]:
            return Outcome(1.0, success=True)
        return Outcome(0.3 if self.read and not self.paid else 0.0, success=False, reason=f"paid {self.paid}")

    async def close(self): ...

    def mail_find(self, sender: str):
        """Read a person's mail.

        Args:
            sender: the person"""
        if sender != self.bill["to"]:
            raise ValueError("not found")  # a mistake of the policy, which reads this
        self.read = True
        return {"amount": self.bill["amount"]}

    def wallet_pay(self, to: str, amount: int):
        """Pay a person.

        Args:
            to: the person
            amount: in whole units"""
        self.paid.append({"to": to, "amount": amount})
        return {"ok": "yes"}


class Suite:
    name, splits = "bills", {"train": 40, "dev": 10}
    make = Bills

    def tasks(self, split):
        bills = [(person, amount) for amount in range(20, 70) for person in ("dana", "omar")]
        return [
            Task(f"{to}-{n}", "bills", split, to, "state_changing", f"pay the invoice of {to}", {"to": to, "amount": n})
            for to, n in (bills[:40] if split == "train" else bills[-10:])
        ]

    def answer_literals(self, task):
        return [str(task.data["amount"])]

    def refusal(self):
        return say("sorry")

    def gold(self, task):
        return [call("mail_find", sender=task.data["to"]), call("wallet_pay", **task.data), say("done")]
