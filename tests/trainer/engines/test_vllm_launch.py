"""Servers that the run starts itself: it starts them again when they die, and they die with it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.trainer import toy
from tests.trainer.engines.vllm_servers import DRAW, PROMPT, Process, config, drift, records
from trainer import envs, loop
from trainer.config import Config, EngineConfig
from trainer.engines import process_guard, vllm_launch
from trainer.engines.vllm import VLLMEngine
from trainer.errors import EngineLost, UserError
from trainer.learning.update import Learner
from trainer.records import checkpoint

ROOT = Path(__file__).parents[3]
STUB = (
    "import sys; sys.path.insert(0, {root!r}); from tests.trainer.engines.vllm_stub import serve; "
    "serve({folder!r}, {port})"
)


COMMAND = vllm_launch.command  # before it is replaced


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub where vLLM would be; everything around it is what runs in earnest."""

    def command(config: Config, port: int, model: str = "") -> list[str]:
        return [sys.executable, "-c", STUB.format(root=str(ROOT), folder=model, port=port)]

    monkeypatch.setattr(vllm_launch, "command", command)
    monkeypatch.setattr(vllm_launch, "check_python", lambda python: "0.32.0")
    monkeypatch.setitem(envs.SUITES, "parity", toy.__name__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    toy.model(seed=99).save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return path


def owning(folder: Path, out: Path, **fields: Any) -> Config:
    """A config whose server is the run's own, and the run's folder."""
    out.mkdir(parents=True, exist_ok=True)
    made = config(folder, out, ["http://a"], **fields)
    own = EngineConfig(name="vllm", python=sys.executable, timeout=60.0, max_retries=2)
    return made.model_copy(update={"engine": own})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[vllm_launch.Launched]]:
    """Every server that is started; they end with the test."""
    made: list[vllm_launch.Launched] = []
    init = vllm_launch.Launched.__init__

    def remember(self: vllm_launch.Launched, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(vllm_launch.Launched, "__init__", remember)
    yield made
    for each in made:
        each.stop()


def child(process: subprocess.Popen[Any]) -> int:
    """The server itself: the guard's only child."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def kill(server: vllm_launch.Launched) -> None:
    """kill -9 of the server, as the kernel does it when memory runs out."""
    assert server._process is not None
    os.kill(child(server._process), signal.SIGKILL)


def gone(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
    return True


def eventually(true: Any, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(true())


def test_a_server_that_is_killed_in_a_step_is_started_again(
    folder: Path, tmp_path: Path, launched: list[vllm_launch.Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 while it samples: the resumed step makes the same draws."""
    made = owning(folder, tmp_path / "run", eval_steps=0)
    generate, asked = VLLMEngine.generate, 0

    async def doomed(self: VLLMEngine, *args: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 20:
            kill(launched[0])
        return await generate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VLLMEngine, "generate", doomed)
        loop.train(made)
    steady = Process(folder)
    steady.wait()
    try:
        loop.train(whole := config(folder, tmp_path / "whole", [steady.url], eval_steps=0))
    finally:
        steady.kill()
    lines = records(made.output_dir)
    assert [line["step"] for line in lines] == [1, 2] and lines == records(whole.output_dir)
    for line in lines:
        assert line["rollout/errored"] == 0
        assert line["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_server_that_always_dies_ends_the_run_with_a_checkpoint(
    folder: Path, tmp_path: Path, launched: list[vllm_launch.Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = owning(folder, tmp_path / "run", eval_steps=0)
    starts: list[int] = []

    def broken(config: Config, port: int, model: str = "") -> list[str]:
        starts.append(port)
        return [sys.executable, "-c", "raise MemoryError('no room')"]

    sample = loop.Run.sample_siblings

    async def doomed(run: loop.Run, clock: Any, logger: Any) -> Any:
        if run.step == 1:
            monkeypatch.setattr(vllm_launch, "command", broken)
            kill(launched[0])
        return await sample(run, clock, logger)

    monkeypatch.setattr(loop.Run, "sample_siblings", doomed)
    with pytest.raises(EngineLost, match=r"was started again 2 times.*3 tries.*vllm.log"):
        loop.train(made)
    assert len(starts) == 2, "sixteen requests, two starts"
    assert "MemoryError: no room" in (made.output_dir / "vllm.log").read_text()
    newest = checkpoint.latest(made.output_dir)
    assert newest is not None and newest.name == "step_1"


def test_a_server_that_hangs_is_started_again(
    folder: Path, tmp_path: Path, launched: list[vllm_launch.Launched]
) -> None:
    made = owning(folder, tmp_path / "run")
    made = made.model_copy(update={"engine": made.engine.model_copy(update={"timeout": 5.0})})
    model = toy.model(seed=7)
    eng = vllm_launch.engine(made, model, toy.renderer())
    wanted = asyncio.run(eng.generate(PROMPT, 4, DRAW))
    eng.generator.manual_seed(0)
    httpx.post(launched[0].url + "/fault", json={"kind": "hang", "times": 1_000})
    first = launched[0].url
    again = asyncio.run(eng.generate(PROMPT, 4, DRAW))
    assert again == wanted and drift(model, again) < 1e-4
    assert launched[0].url != first


def test_the_guard_takes_everything_with_it_when_its_parent_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the trainer: the server and what the server started end too."""
    notes = tmp_path / "pids"
    serve = f"trap '' TERM; sleep 600 & echo $$ $! > {notes}; wait"  # does not care for SIGTERM, and has a child
    code = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-I', {process_guard.__file__!r}, str(os.getpid()), 'sh', '-c', {serve!r}],"
        " start_new_session=True)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert eventually(lambda: notes.is_file() and notes.read_text().endswith("\n"))
        pids = [int(word) for word in notes.read_text().split()]
        time.sleep(0.5)
        assert not any(gone(pid) for pid in pids), "as long as the trainer lives, so do they"
    finally:
        parent.kill()
        parent.wait()
    assert eventually(lambda: all(gone(pid) for pid in pids))


def test_stop_takes_everything_with_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "health").touch()

    def command(config: Config, port: int, model: str) -> list[str]:
        return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]

    monkeypatch.setattr(vllm_launch, "command", command)
    server = vllm_launch.Launched(owning(folder, tmp_path), folder)
    server.start()
    assert server._process is not None
    pids = [server._process.pid, child(server._process)]
    assert server.healthy()
    server.stop()
    assert all(gone(pid) for pid in pids) and not server.healthy()
    server.stop()


def test_a_start_that_fails_says_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of this start, not of one before it in the same log."""
    server = vllm_launch.Launched(owning(folder, tmp_path), folder)
    for word in ("first", "second"):
        code = f"raise ValueError('the {word} one')"
        monkeypatch.setattr(vllm_launch, "command", lambda config, port, model, code=code: [sys.executable, "-c", code])
        with pytest.raises(UserError, match=rf"did not start \(ValueError: the {word} one\); its log is"):
            server.start()


def test_a_cpu_server_gets_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cores of a small machine, an OpenMP that does not spin, a bound on its cache; never what is set already."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    python = str(tmp_path / "bin" / "python")
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1})
    space = {"VLLM_CPU_KVCACHE_SPACE": "4"}
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "1,3"}
    assert vllm_launch.for_cpu(python) == {**space, **bound, "LD_PRELOAD": str(tmp_path / "lib" / "libiomp5.so")}
    assert vllm_launch.for_cpu() == {**space, **bound}, "this process runs already"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert vllm_launch.for_cpu() == {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert vllm_launch.for_cpu(python) == {}


def test_arguments_follow_the_config(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = owning(folder, tmp_path)
    plain = vllm_launch.arguments(made, "somewhere")
    assert "--enable-sleep-mode" not in plain and plain[plain.index("--max-model-len") + 1] == "200"
    own = made.engine.model_copy(update={"vllm_enable_sleep_mode": True, "server_args": ["--block-size", "64"]})
    given = vllm_launch.arguments(made.model_copy(update={"engine": own}), "somewhere")
    assert "--enable-sleep-mode" in given and given[-2:] == ["--block-size", "64"], "the config has the last word"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    shared = vllm_launch.arguments(made, "somewhere")
    assert shared[shared.index("--gpu-memory-utilization") + 1] == "0.3", "beside the trainer"
    apart = made.engine.model_copy(update={"python": "", "urls": ["http://a:1"]})
    assert "--gpu-memory-utilization" not in vllm_launch.arguments(made.model_copy(update={"engine": apart}), "x")


def test_colocation_needs_nothing_else(folder: Path) -> None:
    with pytest.raises(ValueError, match="got colocate, which needs neither"):
        EngineConfig(name="vllm", vllm_mode="colocate", python="x")


@pytest.mark.parametrize("sleeps", [False, True])
def test_the_engine_sleeps_while_the_trainer_updates(
    folder: Path, tmp_path: Path, sleeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to, and in this order: sleep, update, wake, new weights."""
    steady = Process(folder)
    steady.wait()
    made = config(folder, tmp_path, [steady.url], eval_steps=0, max_steps=1)
    own = made.engine.model_copy(update={"vllm_enable_sleep_mode": sleeps})
    said: list[str] = []
    for owner, name in ((VLLMEngine, "sleep"), (VLLMEngine, "wake"), (VLLMEngine, "load_weights"), (Learner, "update")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: (said.append(name), real(*a))[1])
    try:
        loop.train(made.model_copy(update={"engine": own}))
    finally:
        steady.kill()
    wanted = ["sleep", "update", "wake", "load_weights"] if sleeps else ["update", "load_weights"]
    assert said[: len(wanted)] == wanted


def test_the_log_of_a_server_of_ours_does_not_grow_by_requests(folder: Path, tmp_path: Path) -> None:
    made = owning(folder, tmp_path)
    assert set(vllm_launch.QUIET) <= set(COMMAND(made, 1, "weights"))
    assert not set(vllm_launch.QUIET) & set(COMMAND(made, 1)), "a server of the user's says what he likes"
