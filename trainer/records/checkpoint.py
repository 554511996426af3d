"""Checkpoints: a Hugging Face folder plus the state of the run, from which an interrupted step is repeated exactly.

    output_dir/checkpoints/step_20/            config.json model.safetensors ... loads with `from_pretrained`
    output_dir/checkpoints/step_20/state/      state.pt (optimiser, generators, the loop's own data), manifest.json

A folder named `step_N` is complete unless something else damaged it, and a kill at any moment leaves the newest
complete one: see `trainer.records.checkpoint_folder`. Exactly the files of its manifest are read.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trainer import files, randomness
from trainer.errors import NotFinite, UserError
from trainer.learning import lora
from trainer.records import checkpoint_folder
from trainer.records.checkpoint_folder import STATE, TEMPORARY, DamagedCheckpoint, latest, verify

__all__ = ["latest", "load", "load_weights", "save", "verify"]

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes it


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

    Raises:
        NotFinite: a weight is not finite; nothing is written.
        OSError: the disk refuses; the checkpoints that were there are there still.
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
    folder.mkdir(exist_ok=True)
    checkpoint_folder.recover(output_dir)
    beside = folder / f"{TEMPORARY}step_{step}"
    try:
        beside.mkdir()
        with _as_os_errors(beside):
            # under the model's own names, as `load` wants them
            model.save_pretrained(str(beside), save_original_format=False)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(beside))
            _write_state(beside / STATE, optimiser, generators or {}, extra or {})
        checkpoint_folder.seal(beside, step=step, torch=torch.__version__)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # gives a full disk its space back
        raise
    target = checkpoint_folder.publish(beside, output_dir)
    if save_total_limit is not None:
        checkpoint_folder.keep_newest(output_dir, save_total_limit)
    return target


@contextmanager
def _as_os_errors(folder: Path) -> Iterator[None]:
    """Let an error of the disk that a library wrapped into one of its own be an `OSError` again."""
    try:
        with files.naming(folder):
            yield
    except (SafetensorError, RuntimeError) as error:
        told = _OS_ERROR.search(str(error))
        if told:
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(folder)) from error
        if isinstance(error.__context__, OSError):  # torch, which then finds its file too short
            raise error.__context__ from None
        raise


def load(
    path: Path,
    *,
    model: Any,
    optimiser: torch.optim.Optimizer | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint into the live objects, in place; give its step and `extra`.

    The global generators are set only when `optimiser` is given, that is when a run resumes.

    Raises:
        DamagedCheckpoint: it is not what was written; nothing has been changed.
        UserError: it belongs to another model or optimiser.
        OSError: a file cannot be read.
    """
    manifest = verify(path)
    load_weights(path, model, manifest["files"])
    if optimiser is None:
        return int(manifest["step"]), {}
    state = _read_state(path)
    _load_optimiser(path, optimiser, state["optimiser"])
    _set_generators(path, state["generators"], generators or {})
    return int(manifest["step"]), state["extra"]


def load_weights(path: Path, model: Any, names: Iterable[str]) -> None:
    """Load the safetensors among a folder's files `names` into `model`; tied weights that they leave out stay tied.

    A model with adapters takes adapters only: its base is what model.path gave.
    """
    wanted = lora.adapter_weights(model) if lora.adapted(model) else model.state_dict()
    stored = _read_weights(path, names)
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


def _write_state(
    folder: Path,
    optimiser: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    extra: Mapping[str, Any],
) -> None:
    folder.mkdir()
    named = {name: generator.get_state() for name, generator in generators.items()}
    random_state = {**randomness.get_state(), "named": named}
    state = {"optimiser": optimiser.state_dict(), "generators": random_state, "extra": dict(extra)}
    with files.naming(folder / "state.pt"), (folder / "state.pt").open("wb") as out:
        torch.save(state, out)  # given a path, it would not say what the disk said


def _read_weights(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for name in sorted(n for n in names if n.endswith(".safetensors")):
        try:
            with _as_os_errors(path / name):
                stored.update(load_file(path / name))
        except SafetensorError as error:
            raise DamagedCheckpoint(path, f"{name}: {error}") from None
    return stored


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE / "state.pt"
    with files.naming(file), file.open("rb") as stream:
        try:
            state: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises many kinds for a file that is not its own
            raise DamagedCheckpoint(path, f"{STATE}/state.pt: {type(error).__name__}") from None
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


def _set_generators(path: Path, state: dict[str, Any], named: Mapping[str, torch.Generator]) -> None:
    if set(state["named"]) != set(named):
        raise UserError(
            f"{path}: has generators {sorted(state['named'])}, needs {sorted(named)}; use another --output_dir"
        )
    randomness.set_state(state)
    for name, generator in named.items():
        generator.set_state(state["named"][name])


def _is_tied(name: str, wanted: Mapping[str, torch.Tensor], stored: Iterable[str]) -> bool:
    """Whether a stored tensor shares its memory with this one."""
    pointer = wanted[name].data_ptr()
    return any(n in wanted and wanted[n].data_ptr() == pointer for n in stored)


def _describe(tensor: torch.Tensor | None) -> str:
    return "has none" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
