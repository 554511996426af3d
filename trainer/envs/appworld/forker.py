"""A process that forks worlds: run as a script by another Python (never imported by the trainer), stdlib only.

    python -I -B forker.py WORLD.py FOLDER

It loads WORLD.py once, which may take long, and then forks a process for every line {"root": ..., "token": ...} on its
standard input, answering {"port": ...} at once; {"kill": token} ends one, and {"ended": token} asks how one has ended
by itself: {"code": its exit code, -N after signal N, null while it lives}. Each forked process makes `World(root)` and
serves POST requests: /METHOD with a JSON object of arguments and the token as bearer. With one world per process, no
episode can affect the interpreter of the next.

Nothing outlives the trainer: when standard input ends, because the trainer exited or was killed, the forker kills its
worlds, removes FOLDER and exits; when the forker is killed, the kernel kills its worlds.

A world may freeze `time.time()` and similar clocks, so nothing here uses them; `clock_gettime` is never frozen.
"""

from __future__ import annotations

import ctypes
import gc
import hmac
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
MEMORY = 4 << 30  # bytes of address space a world may take beyond the forker's: an endless list is the policy's mistake
PATIENCE = 30  # seconds to wait for the rest of a request that has begun


def now() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def load(path: str) -> Any:
    """The `World` class of a file; what its import did to the environment is undone (a .env of the user's, say)."""
    before = dict(os.environ)
    spec = importlib.util.spec_from_file_location("world", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(before)
    return module.World


def seed(value: str) -> None:
    """Let a world begin from the run's seed: Python seeds `random` anew, from the system, in every forked process."""
    random.seed(int(value))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(int(value))


def main(path: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the world's modules print goes to the log
    try:
        make = load(path)
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that it shares with the others
        print(json.dumps({"ready": True}), file=answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    worlds: dict[str, int] = {}  # token -> pid
    killed: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        killed = [pid for pid in killed if not os.waitpid(pid, os.WNOHANG)[0]]
        if "kill" in request:
            killed += end(worlds, request["kill"])
            print("{}", file=answers)
            continue
        if "ended" in request:
            print(json.dumps({"code": ended(worlds, request["ended"])}), file=answers)
            continue
        listener = socket.create_server(("127.0.0.1", 0))
        pid = os.fork()
        if not pid:
            answers.close()
            become_world(make, listener, request)
        port = listener.getsockname()[1]
        listener.close()
        worlds[request["token"]] = pid
        print(json.dumps({"port": port}), file=answers)
    for token in list(worlds):
        killed += end(worlds, token)
    for pid in killed:
        os.waitpid(pid, 0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # at once: tearing down what was imported is useless


def end(worlds: dict[str, int], token: str) -> list[int]:
    """Kill one world, which runs no code from then on, and give its pid, to be reaped.

    Until it is reaped its pid is its own, so this never hits another process. Not waited for: taking down its memory
    is 30 ms of another episode.
    """
    if (pid := worlds.pop(token, None)) is None:
        return []
    os.kill(pid, signal.SIGKILL)
    return [pid]


def ended(worlds: dict[str, int], token: str) -> int | None:
    """How a world ended by itself. It is reaped here and forgotten, for its pid may be another's from then on."""
    pid, status = os.waitpid(worlds[token], os.WNOHANG) if token in worlds else (0, 0)
    if not pid:
        return None
    del worlds[token]
    return os.waitstatus_to_exitcode(status)


def become_world(make: Any, listener: socket.socket, request: dict[str, str]) -> None:
    """What the forked process does; never returns."""
    code = 1
    try:
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(request["root"])
        seed(os.environ.get("SGCD_SEED", "0"))
        serve(make(request["root"]), listener, request["token"])
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve(world: Any, listener: socket.socket, token: str) -> None:
    """Answer requests one after another, in the main thread: a world may need its signals."""

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE

        def do_POST(self) -> None:
            if not hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {token}"):
                self.reply(403, {"error": "wrong token"})
                return
            arguments = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            start = now()
            try:
                status, body = 200, {"result": getattr(world, self.path.strip("/"))(**arguments)}
            except (MemoryError, RecursionError):
                os._exit(1)  # what ran here has left no memory; SystemExit and its like end the process too
            except Exception as error:
                status, body = 500, {"error": f"{type(error).__name__}: {error}"}
            try:
                self.reply(status, {**body, "seconds": now() - start})
            except OSError:
                os._exit(1)  # the other end is gone, or what ran here has closed the connection

        def reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.wfile.write(b"HTTP/1.0 %d -\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)

    server = HTTPServer(listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    while True:
        server.handle_request()


if __name__ == "__main__":
    main(*sys.argv[1:])
