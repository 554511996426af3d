"""Record the bits of what the library computes, and compare two recordings: for changes that must not alter a result.

    python scripts/result_bits.py record before.json          # about 5 minutes: every op, dtype, backend and option
    python scripts/result_bits.py record --train before.json  # about 1 minute: five steps of the embedded world
    python scripts/result_bits.py compare before.json after.json

A recording holds a SHA-256 of every output, metric and gradient of the calls in `scripts/result_cases.py`, or of every
final weight, sampled token, token weight and metric of a training run. `compare` exits with 1 where a hash differs or
is missing. A metric that has another name and the same bits is listed as renamed; outputs that are new are listed too.

Only recordings of one machine and one set of versions can be compared, so each says what it was made on. Triton's
kernels run on a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
# Metrics of a training run that say how long something took or how much memory it held.
MEASURED = ("time/", "perf/", "memory/", "seconds", "cached", "tokens_per_second")
TRAIN = {
    "max_steps": 5,
    "eval_on_start": "false",
    "eval_steps": 0,
    "eval_samples": 1,
    "save_steps": 0,
    "trace_steps": 1,
}
Bits = dict[str, str]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's kernels are imported
sys.path.insert(0, str(ROOT))  # this checkout, not a package that is installed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--train", action="store_true", help="of a training run instead of the ops")
    recording.add_argument("--only", default="", help="calls whose name contains this")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args(arguments)
    if args.command == "compare":
        return compare(json.loads(args.before.read_text()), json.loads(args.after.read_text()))
    bits = record_training() if args.train else record_ops(args.only)
    args.file.write_text(json.dumps({"machine": describe_machine(), "bits": bits}, indent=1) + "\n")
    print(f"{len(bits)} hashes in {args.file}")
    return 0


def record_ops(only: str = "") -> Bits:
    """Hashes of all calls whose name contains `only`."""
    from scripts.result_cases import cases

    torch.set_num_threads(THREADS)
    bits = record_calls(cases(), only)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(record_rank, args=(folder, only), nprocs=2)
        for rank in range(2):
            bits |= json.loads((Path(folder) / f"{rank}.json").read_text())
    return bits


def record_calls(cases: Iterable[tuple[str, Callable[[], dict[str, Tensor]]]], only: str = "") -> Bits:
    bits: Bits = {}
    for name, call in cases:
        if only not in name:
            continue
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of credit that is inert, which some calls mean to be
                outputs = call()
        except Exception as error:
            raise RuntimeError(f"the call {name!r} failed") from error
        if (seconds := time.perf_counter() - began) > 2:
            print(f"{seconds:5.1f} s  {name}")
        for output, value in outputs.items():
            key = f"{name} | {output}"
            assert key not in bits, key
            bits[key] = hash_tensor(value)
    return bits


def record_rank(rank: int, folder: str, only: str) -> None:
    """In one of two processes that share a head."""
    from scripts.result_cases import sharded_cases

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    bits = record_calls(sharded_cases(rank, dist.group.WORLD), only)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(bits))
    dist.destroy_process_group()


def hash_tensor(x: Tensor) -> str:
    """Of dtype, shape and bytes."""
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{x.dtype} {list(x.shape)} ".encode() + raw.numpy().tobytes()).hexdigest()


def hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def record_training() -> Bits:
    """Hashes of five steps of `make train`: what was sampled, scores and token weights, metrics, the final weights."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        overrides = {**TRAIN, "output_dir": run, "writer.cache_dir": Path(folder) / "references"}
        flags = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "trainer.run", "train", "configs/workday_sgcd.yaml", *flags]
        subprocess.run(command, cwd=ROOT, check=True)
        return dict([*hash_weights(run), *hash_metrics(run), *hash_traces(run)])


def hash_weights(run: Path) -> Iterator[tuple[str, str]]:
    from safetensors.torch import load_file

    for file in sorted(run.glob(f"checkpoints/step_{TRAIN['max_steps']}/*.safetensors")):
        for name, value in sorted(load_file(file).items()):
            yield f"weights | {name}", hash_tensor(value)


def hash_metrics(run: Path) -> Iterator[tuple[str, str]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if isinstance(value, (int, float)) and not any(part in name for part in MEASURED):
                yield f"metrics of step {record['step']} | metric {name}", hash_json(value)


def hash_traces(run: Path) -> Iterator[tuple[str, str]]:
    """Each field of the siblings, over all siblings of a step."""
    for file in sorted(run.glob("rollouts/*.jsonl")):
        groups = [json.loads(line) for line in file.read_text().splitlines()]
        yield f"trace {file.stem} | reference", hash_json([group["reference"] for group in groups])
        siblings = [sibling for group in groups for sibling in group["siblings"]]
        for field in sorted({name for sibling in siblings for name in sibling}):
            yield f"trace {file.stem} | metric {field}", hash_json([sibling.get(field) for sibling in siblings])


def describe_machine() -> dict[str, Any]:
    from sgcd_kernels import backend_status

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "processor": about.get("model name", platform.processor()),
        "processor flags": about.get("flags", ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if backend_status()["triton"].usable else "",
        "threads": THREADS,
        "backends": {name: status.usable for name, status in backend_status().items()},
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs; 1 if a result has other bits or is gone."""
    for name, value in before["machine"].items():
        if name != "commit" and after["machine"].get(name) != value:
            print(f"warning: {name} differs, so bits may too: {value!r} and {after['machine'].get(name)!r}")
    old, new = before["bits"], after["bits"]
    gone, added = old.keys() - new.keys(), new.keys() - old.keys()
    renamed = find_renamed({key: old[key] for key in gone}, {key: new[key] for key in added})
    differing = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    missing = sorted(gone - renamed.keys())
    for title, keys in (("differs", differing), ("missing", missing)):
        for key in keys:
            print(f"{title}: {key}")
    for key, name in sorted(renamed.items()):
        print(f"renamed: {key} -> {name.partition(' | ')[2]}")
    for key in sorted(added - set(renamed.values())):
        print(f"new: {key}")
    same = len(old) - len(differing) - len(missing)
    print(f"{same} of {len(old)} the same, {len(differing)} differ, {len(missing)} missing")
    return 1 if differing or missing else 0


def find_renamed(gone: Bits, added: Bits) -> dict[str, str]:
    """Of metrics that are gone, those with the same bits under a new name in the same call."""
    renamed: dict[str, str] = {}
    for key, value in sorted(gone.items()):
        call, _, name = key.partition(" | ")
        if name.startswith("metric "):
            taken = set(renamed.values())
            found = (k for k, v in sorted(added.items()) if k.startswith(f"{call} | metric ") and v == value)
            match = next((k for k in found if k not in taken), None)
            if match is not None:
                renamed[key] = match
    return renamed


if __name__ == "__main__":
    sys.exit(main())
