"""A pool of world processes of limited size; each process is forked for one episode and killed after it.

The pool starts one forker (see `forker.py`), and another when that one has died. It is not bound to an event loop,
because a program may run several one after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.errors import EnvironmentBroken
from trainer.randomness import SEED

FORKER = Path(__file__).with_name("forker.py")
START_SECONDS = 300.0  # to import the benchmark; seen: 6 to 20
SECONDS = 20.0  # for it to fork or to end a process; seen: 0.02
DEATH_SECONDS = 5.0  # for a process that has stopped to answer to be gone; seen: 0.03
KEPT = ("PATH", "LANG", "LC_ALL", "TZ", SEED)  # of our environment: the code of a policy runs there, so no keys


class WorldDied(EnvironmentBroken):
    """A world's process ended during a request."""


class WorldProcess:
    """One forked process, called over loopback HTTP: one POST per connection.

    The requests are written by hand, because a client library took 2 ms, more than 5 % of a step of 30 ms.
    """

    def __init__(self, token: str, port: int):
        self.token = token
        self.seconds = 0.0  # that the world itself took for all calls so far
        self.starved = starved()  # at its birth
        self._port = port

    async def call(self, method: str, **arguments: Any) -> Any:
        """What `World.method(**arguments)` returns.

        Raises:
            EnvironmentBroken: it raised, or the process is gone.
            WorldDied: the process went while it was at it.
        """
        gone = f"{method}: the world's process died"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError as error:
            raise EnvironmentBroken(f"{gone} ({type(error).__name__})") from error
        try:
            status, body = await self._post(reader, writer, f"/{method}", json.dumps(arguments).encode())
        except (OSError, ValueError) as error:
            raise WorldDied(f"{gone} ({type(error).__name__})") from error
        finally:
            writer.close()
        if status != 200:
            raise EnvironmentBroken(f"{method}: {body['error']}")
        self.seconds += body["seconds"]
        return body["result"]

    async def _post(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, data: bytes
    ) -> tuple[int, Any]:
        head = f"POST {path} HTTP/1.0\r\nAuthorization: Bearer {self.token}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        return int(head.split(" ")[1]) if head else 0, json.loads(body)


def starved() -> int | None:
    """How many processes this machine's kernel has killed for lack of memory; None if it does not report it."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


class Pool:
    """At most `size` worlds at once.

    Args:
        python: the interpreter that has the benchmark.
        world: the file that holds its `World`.
        size: how many episodes may have a world; who wants one more waits.
        prepare: what to put into a forker's `folder` before it starts.
    """

    def __init__(self, python: Path, world: Path, size: int, prepare: Callable[[Path], None] = lambda folder: None):
        self.folder = Path()  # of the running forker, for what worlds write; gone with it
        self._prepare = prepare
        self.size = size
        self._command = [str(python), "-I", "-B", str(FORKER), str(world.absolute())]
        self._forker: subprocess.Popen[bytes] | None = None
        self._talk = ThreadPoolExecutor(1, "forker")  # one thread: requests go out one by one, in order
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places = asyncio.Semaphore(size)

    async def enter(self) -> None:
        """Wait for a place, and for the forker where none runs yet. `leave` gives the place back."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # another asyncio.run: those that held a place in the last one are gone
            self._loop, self._places = loop, asyncio.Semaphore(self.size)
        await self._places.acquire()
        try:
            await loop.run_in_executor(self._talk, self._start)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        self._places.release()

    async def fork(self, root: Path) -> WorldProcess:
        """A new process with a `World(root)`, to be ended with `kill`."""
        token = secrets.token_hex(16)
        try:
            answer = await self._ask({"root": str(root), "token": token})
        except asyncio.CancelledError:
            self._talk.submit(self._exchange, {"kill": token})  # in order: after the fork, if that has begun
            raise
        return WorldProcess(token, answer["port"])

    async def kill(self, world: WorldProcess) -> None:
        """End the process: it runs no code from then on."""
        await self._ask({"kill": world.token})

    async def ended_itself(self, world: WorldProcess) -> bool:
        """Whether a world that died during a request died because of the code that it ran, and not with its forker.

        True if the process has closed the connection and lives; also after a SIGKILL, unless the kernel has killed any
        process for lack of memory since the world began, or does not report whether it has.

        Raises:
            EnvironmentBroken: the forker is gone, and all worlds with it.
        """
        code = None
        for _ in range(round(DEATH_SECONDS / 0.05)):
            code = (await self._ask({"ended": world.token}))["code"]
            if code is not None:
                break
            await asyncio.sleep(0.05)
        spared = world.starved is not None and world.starved == starved()
        return spared or code not in (None, -signal.SIGKILL)

    def discard(self, world: WorldProcess | None, folder: Path | None) -> None:
        """End the process, then remove its folder, without holding the caller."""
        if world:
            self._talk.submit(self._exchange, {"kill": world.token})  # if this fails, forker and world are gone
        if folder:
            self._talk.submit(shutil.rmtree, folder, ignore_errors=True)

    def close(self) -> None:
        """End the forker and every world; the end of this process does the same."""
        self._talk.submit(self._stop).result()

    async def _ask(self, request: dict[str, Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._talk, self._exchange, request)

    # What follows runs in the one thread.

    def _start(self) -> None:
        if self._forker is not None and self._forker.poll() is None:
            return
        self._stop()
        self.folder = Path(tempfile.mkdtemp(prefix="sgcd-worlds-"))
        self._prepare(self.folder)
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        with (self.folder / "log").open("wb") as words:
            self._forker = subprocess.Popen(
                [*self._command, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env={**environment, "HOME": str(self.folder), "TMPDIR": str(self.folder)},
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for the trainer; worlds end when it has
            )
        ready = self._read(START_SECONDS)
        if "error" in ready:
            self._stop()
            raise EnvironmentBroken(f"{self._command[0]} cannot load {self._command[-1]}: {ready['error']}")

    def _stop(self) -> None:
        if self._forker is None:
            return
        forker, self._forker = self._forker, None
        assert forker.stdin and forker.stdout
        with contextlib.suppress(OSError):
            forker.stdin.close()
        try:
            forker.wait(SECONDS)
        except subprocess.TimeoutExpired:
            forker.kill()
            forker.wait()
        forker.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # where it was killed

    def _exchange(self, request: dict[str, Any]) -> Any:
        if self._forker is None:
            raise EnvironmentBroken("there is no forker of worlds")
        assert self._forker.stdin
        try:
            self._forker.stdin.write(json.dumps(request).encode() + b"\n")
            self._forker.stdin.flush()
        except OSError as error:
            raise EnvironmentBroken(f"the forker of worlds died{self._last_words()}") from error
        return self._read(SECONDS)

    def _read(self, seconds: float) -> Any:
        """The forker's next line. A forker that says nothing is ended, so that the next episode starts another."""
        assert self._forker and self._forker.stdout
        ready, _, _ = select.select([self._forker.stdout], [], [], seconds)
        line = self._forker.stdout.readline() if ready else b""
        if line.endswith(b"\n"):
            return json.loads(line)
        self._forker.kill()
        self._forker.wait()
        what = "died" if ready else f"was silent for {seconds:g} s"
        raise EnvironmentBroken(f"the forker of worlds {what}{self._last_words()}")

    def _last_words(self) -> str:
        try:
            lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"; its last line: {lines[-1][:300]}" if lines else ""
