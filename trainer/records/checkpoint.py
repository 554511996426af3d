"""Checkpoints: a Hugging Face folder plus the state of the run, such that an interrupted step never happened.

    output_dir/checkpoints/step_20/            config.json model.safetensors ... loads with `from_pretrained`
    output_dir/checkpoints/step_20/state/      state.pt (optimiser, generators, the loop's own data), manifest.json

Everything is written into a folder beside, flushed to disk, and renamed; a folder named `step_N` is therefore complete
or damaged from outside, and a kill at any moment leaves the newest complete one in place. A folder is removed the
same way: renamed first, deleted after.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.errors import NotFinite, UserError
from trainer.learning import lora

STATE = "state"
MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_STEP = re.compile(r"step_(\d+)")


def save(
    output_dir: Path,
    step: int,
    *,
    model: Any,
    optimiser: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator] | None = None,
    extra: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    save_total_limit: int | None = None,
) -> Path:
    """Write the state after `step` finished steps; give the checkpoint's folder.

    `model` and `tokenizer` are whatever has transformers' `save_pretrained`. `generators` are saved beside the global
    ones of python, numpy and torch. `extra` is the loop's own plain data (numbers, strings, lists, dicts, tensors):
    task order, counters. What is logged after its checkpoint may be missing after a resume: put it into `extra`.
    """
    not_finite = next(
        (n for n, t in model.state_dict().items() if t.is_floating_point() and not t.isfinite().all()), None
    )
    if not_finite:
        raise NotFinite(
            f"{not_finite} is not finite after step {step}, which is not saved; lower learning_rate and resume from "
            "the checkpoint before"
        )
    folder = output_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    beside = folder / f"{_TEMPORARY}step_{step}"
    beside.mkdir()
    model.save_pretrained(str(beside), save_original_format=False)  # under the model's own names, as `load` wants them
    if tokenizer is not None:
        tokenizer.save_pretrained(str(beside))
    _write_state(beside, step, optimiser, generators or {}, extra or {})
    _flush(beside)
    target = folder / f"step_{step}"
    gone = _aside(target)
    if target.exists():  # a step that is saved again: the old one is there until the new one is
        target.rename(gone)
    beside.rename(target)
    _fsync(folder)
    shutil.rmtree(gone, ignore_errors=True)
    if save_total_limit is not None:
        for old in _complete(folder)[:-save_total_limit]:
            _discard(old)
    return target


def latest(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None. Leftovers of an interrupted save are skipped."""
    found = _complete(output_dir / "checkpoints")
    return found[-1] if found else None


def load(
    path: Path,
    *,
    model: Any,
    optimiser: torch.optim.Optimizer | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint into the live objects, in place; give its step and `extra`.

    The global generators are set only when `optimiser` is given, that is when a run resumes. `UserError` when the
    folder is damaged or belongs to another model or optimiser.
    """
    manifest = verify(path)
    load_weights(path, model)
    if optimiser is None:
        return int(manifest["step"]), {}
    state = _read_state(path)
    _load_optimiser(path, optimiser, state["optimiser"])
    _set_generators(path, state["generators"], generators or {})
    return int(manifest["step"]), state["extra"]


def load_weights(path: Path, model: Any) -> None:
    """Load a folder's safetensors into `model`, bit by bit; tied weights that the folder leaves out stay tied.

    A model with adapters takes adapters only: its base is what model.path gave.
    """
    wanted = lora.adapter_weights(model) if lora.adapted(model) else model.state_dict()
    stored = _read_weights(path)
    absent = [name for name in wanted if name not in stored and not _is_tied(name, wanted, stored)]
    wrong = [
        n for n, t in stored.items() if n not in wanted or wanted[n].shape != t.shape or wanted[n].dtype != t.dtype
    ]
    if absent or wrong:
        name = (wrong + absent)[0]
        raise UserError(
            f"{path}: does not match the model at {name} (checkpoint {_describe(stored.get(name))}, model "
            f"{_describe(wanted.get(name))}); use the model.path and dtype it was trained with, or another --output_dir"
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            wanted[name].copy_(tensor)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the sizes that were written; else a `UserError`."""
    try:
        manifest: dict[str, Any] = json.loads((path / STATE / MANIFEST).read_text())
        sizes: dict[str, int] = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise _damaged(path, f"no readable {STATE}/{MANIFEST}") from None
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise _damaged(path, f"{name} has {'gone' if found is None else f'{found} bytes'}, {size} were written")
    return manifest


def recorded(output_dir: Path) -> bool:
    """Whether a run left metrics or rollouts here."""
    metrics = output_dir / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any((output_dir / "rollouts").glob("step_*.jsonl"))


def rewind(output_dir: Path, step: int) -> float:
    """Make the run's records end at `step`: later metrics and rollouts belong to steps that will happen again.

    Gives the last step of the metrics that are left, -1 for none.
    """
    metrics = output_dir / "metrics.jsonl"
    kept: list[str] = []
    if metrics.exists():
        try:
            lines = metrics.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"output_dir: {metrics} cannot be read ({error}); remove it, or choose another") from None
        kept = [line for line in lines if _line_step(line) <= step]
        temporary = metrics.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(metrics)
    for file in (output_dir / "rollouts").glob("step_*.jsonl"):
        match = _STEP.fullmatch(file.stem)
        if match and int(match[1]) > step:
            file.unlink()
    return _line_step(kept[-1]) if kept else -1.0


def _line_step(line: str) -> float:
    """The step of one line of metrics.jsonl; a line cut short by a kill counts as later than every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _write_state(
    folder: Path,
    step: int,
    optimiser: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    extra: Mapping[str, Any],
) -> None:
    (folder / STATE).mkdir()
    state = {"optimiser": optimiser.state_dict(), "generators": _get_generators(generators), "extra": dict(extra)}
    torch.save(state, folder / STATE / "state.pt")
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    (folder / STATE / MANIFEST).write_text(
        json.dumps({"step": step, "torch": torch.__version__, "files": files}, indent=1)
    )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            stored.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"{file.name}: {error}") from None
    return stored


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path / STATE / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise _damaged(path, f"{STATE}/state.pt: {type(error).__name__}") from None
    return state


def _load_optimiser(path: Path, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`Optimizer.load_state_dict` takes moments of any shape, so the shapes are compared here."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        for tensor in moments.values():
            same = (
                not torch.is_tensor(tensor)
                or tensor.dim() == 0
                or (index < len(parameters) and tensor.shape == parameters[index].shape)
            )
            if not same:
                raise UserError(f"{path}: its optimiser belongs to another model; use another --output_dir")
    try:
        optimiser.load_state_dict(state)
    except ValueError as error:
        raise UserError(f"{path}: its optimiser does not fit ({error}); use another --output_dir") from None


def _get_generators(named: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The state of every source of randomness, as types that `torch.load(weights_only=True)` reads."""
    import numpy as np

    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - it is saved, not used
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "named": {name: generator.get_state() for name, generator in named.items()},
    }


def _set_generators(path: Path, state: dict[str, Any], named: Mapping[str, torch.Generator]) -> None:
    import numpy as np

    if set(state["named"]) != set(named):
        raise UserError(
            f"{path}: has generators {sorted(state['named'])}, needs {sorted(named)}; use another --output_dir"
        )
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for name, generator in named.items():
        generator.set_state(state["named"][name])


def _is_tied(name: str, wanted: Mapping[str, torch.Tensor], stored: Iterable[str]) -> bool:
    """Whether a stored tensor shares its memory with this one."""
    pointer = wanted[name].data_ptr()
    return any(n in wanted and wanted[n].data_ptr() == pointer for n in stored)


def _describe(tensor: torch.Tensor | None) -> str:
    return "has none" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged checkpoint ({why}); delete this folder and the run resumes from the one before")


def _complete(folder: Path) -> list[Path]:
    """Checkpoint folders by rising step."""
    matches = [(p, _STEP.fullmatch(p.name)) for p in folder.glob("step_*") if p.is_dir()]
    return [p for p, m in sorted(((p, m) for p, m in matches if m), key=lambda pair: int(pair[1][1]))]


def _sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal left."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def _discard(path: Path) -> None:
    gone = _aside(path)
    path.rename(gone)
    shutil.rmtree(gone)


def _aside(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}old-{path.name}")


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
