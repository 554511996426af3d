"""What every test needs before anything is imported: Triton's interpreter and the profiles of Hypothesis."""

import importlib.util
import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # the kernels run in the interpreter, which Triton must be told before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("hypothesis"):  # vLLM's environment and a GPU machine may lack it
    importlib.import_module("tests.properties")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads the option; pytest-xdist hands it on to its workers
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().getrandbits(32))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if any("hypothesis" in report.keywords for report in terminalreporter.stats.get("failed", [])):
        terminalreporter.write_line(f"the same examples again: --hypothesis-seed={config.option.hypothesis_seed}")
