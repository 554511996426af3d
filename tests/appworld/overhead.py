"""What the adapter adds to AppWorld's own time: python tests/appworld/overhead.py ROOT (made by make_root.py)

The world's process times itself; what the trainer's clock sees beyond that is the adapter's: forks, HTTP, files.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from statistics import median

from trainer.envs.appworld.prompt import block
from trainer.envs.appworld.suite import AppWorldSuite

LOGIN = """
password = apis.supervisor.show_account_passwords()[0]["password"]
token = apis.simple_note.login(username=apis.supervisor.show_profile()["email"], password=password)["access_token"]
"""
ONE = "notes = apis.simple_note.search_notes(access_token=token, page_limit=20)\nprint(notes)"
EACH = ONE + "\nfor note in notes:\n    print(apis.simple_note.show_note(note_id=note['note_id'], access_token=token))"
END = "apis.supervisor.complete_task(answer=2)"


async def measure(suite: AppWorldSuite, body: str, steps: int) -> dict[str, float]:
    task = suite.tasks("train")[0]
    environment = suite.make()
    await environment.open()
    spent: dict[str, float] = defaultdict(float)
    start = time.perf_counter()
    await environment.reset(task)
    process = environment._live()
    for code in [LOGIN, *[body] * steps, END]:
        own, at = process.seconds, time.perf_counter()
        await environment.step({"role": "assistant", "content": block(code)})
        spent["steps"] += time.perf_counter() - at
        spent["steps, own"] += process.seconds - own
    assert (await environment.outcome()).reward == 1
    await environment.close()
    spent["episode"] = time.perf_counter() - start
    spent["episode, own"] = environment.seconds
    return spent


async def main(root: str, steps: int = 20, repeats: int = 7) -> None:
    suite = AppWorldSuite(root=root, worlds=1)
    await measure(suite, ONE, 1)
    for name, body in (("1 call", ONE), ("7 calls", EACH)):
        rows = [await measure(suite, body, steps) for _ in range(repeats)]
        for what in ("steps", "episode"):
            shares = sorted(row[what] / row[f"{what}, own"] - 1 for row in rows)
            own = median(row[f"{what}, own"] for row in rows)
            extra = median(row[what] - row[f"{what}, own"] for row in rows)
            spread = f"{shares[0]:.1%} to {shares[-1]:.1%}"
            print(f"{name} a step, {what}: own {own:.3f} s, added {extra:.4f} s, {median(shares):.1%} ({spread})")
    suite.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
