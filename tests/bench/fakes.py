"""Providers that misbehave, for the tests: `python -m bench run --with tests/bench/fakes.py`."""

from __future__ import annotations

import multiprocessing
import os
import signal

import torch

from bench.inputs import Inputs
from bench.providers import Outputs, provides
from bench.providers.eager import divergence

HUNGER = 200 << 20  # bytes


@provides("divergence", "right")
def right(i: Inputs, mode: str) -> Outputs:
    return divergence(i, mode)


@provides("divergence", "throws")
def throws(i: Inputs, mode: str) -> Outputs:
    raise ValueError("no such\nthing")


@provides("divergence", "greedy")
def greedy(i: Inputs, mode: str) -> Outputs:
    torch.empty(1 << 50)
    return divergence(i, mode)


@provides("divergence", "wrong")
def wrong(i: Inputs, mode: str) -> Outputs:
    return {name: value * 1.001 for name, value in divergence(i, mode).items()}


@provides("divergence", "nan")
def nan(i: Inputs, mode: str) -> Outputs:
    return {name: value * float("nan") for name, value in divergence(i, mode).items()}


@provides("divergence", "empty")
def empty(i: Inputs, mode: str) -> Outputs:
    return {"reverse_kl": divergence(i, mode)["reverse_kl"]}


@provides("divergence", "hungry")
def hungry(i: Inputs, mode: str) -> Outputs:
    torch.ones(HUNGER // 4).sum()
    return divergence(i, mode)


@provides("divergence", "dies")
def dies(i: Inputs, mode: str) -> Outputs:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


@provides("divergence", "dies-later")
def dies_later(i: Inputs, mode: str) -> Outputs:
    """Survives its trial in a child process, and takes the worker with it."""
    if multiprocessing.parent_process() is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return divergence(i, mode)
