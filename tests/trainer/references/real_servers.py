"""The writer against servers that other people wrote: vLLM's and llama-cpp-python's, each with a model of ours.

    python -m tests.trainer.references.real_servers vllm PYTHON         PYTHON has vllm
    python -m tests.trainer.references.real_servers llama_cpp PYTHON    PYTHON has llama-cpp-python[server] and gguf

The model says a thought with a draft in it, then a fenced answer, then more words, and its chat template refuses the
system role. `check` and the writer must get through all the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.trainer.references.chain_model import save_folder
from tests.trainer.references.endpoint_writers import MIXED, run
from tests.trainer.siblings import ToySuite, group, task
from trainer.config import WriterConfig
from trainer.preflight.checks import check_writer
from trainer.preflight.probe import Probe
from trainer.references import writers

START_UP = 900.0  # seconds; vLLM takes 150 on two free cores
VARIANTS: dict[str, list[list[str]]] = {
    "vllm": [[], ["--reasoning-parser", "deepseek_r1"]],
    "llama_cpp": [[]],
}


def command(server: str, python: str, folder: Path, port: int) -> list[str]:
    """The command that serves the model, which is made here."""
    if server == "vllm":
        save_folder(folder / "model")
        return [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")),
            *("--served-model-name", "chain", "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "8192", "--max-num-seqs", "4"),
        ]
    file = folder / "chain.gguf"
    subprocess.run([python, "-m", "tests.trainer.references.chain_model", str(file)], check=True)
    return [
        *(python, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", "chain"),
        *("--host", "127.0.0.1", "--port", str(port), "--n_ctx", "8192", "--verbose", "false"),
    ]


@contextlib.contextmanager
def serving(server: str, python: str, more: list[str]) -> Iterator[str]:
    """The address of a running server, and its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "log").open("w") as log:
            environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
            process = subprocess.Popen(
                [*command(server, python, folder, port), *more],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{port}/v1"
        try:
            begun = time.monotonic()
            while not answers(url):
                if process.poll() is not None or time.monotonic() - begun > START_UP:
                    raise SystemExit((folder / "log").read_text()[-3_000:])
                time.sleep(0.5)
            print(f"{server} {' '.join(more)} started in {time.monotonic() - begun:.0f} s", flush=True)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def main(server: str, python: str) -> None:
    for more in VARIANTS[server]:
        with serving(server, python, more) as url, TemporaryDirectory() as cache:
            config = WriterConfig(name="openai", base_url=url, model="chain", cache_dir=Path(cache), max_retries=0)
            print("check:", check_writer(Probe(Checked(config))), flush=True)  # type: ignore[arg-type]
            writer: Any = writers.load(config, ToySuite())
            groups = [group(*MIXED, of=task(f"s{i}", f"task {i}")) for i in range(4)]
            run(writer, *groups)
            for one in groups:
                print({key: one.reference_info.get(key) for key in ("error", "tokens", "seconds")}, flush=True)
            print(writer.shape)
            print(groups[0].reference, flush=True)
            assert all("1. look\n2. act" in one.reference for one in groups)


class Checked:
    """As much of a config as the check of the writer reads."""

    arm = "sgcd"

    def __init__(self, writer: WriterConfig) -> None:
        self.writer = writer


if __name__ == "__main__":
    main(*sys.argv[1:])
