"""TRL on these kernels: sibling-guided credit for GRPO, and the distillation trainers without logits.

from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer, linear_distillation

TRL and transformers are imported on first use of one of these names. A TRL release that was not tested raises an
ImportError that names the supported ones.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sgcd_kernels.integrations.trl.versions import check_version

if TYPE_CHECKING:
    from sgcd_kernels.integrations.trl.config import SGCDConfig
    from sgcd_kernels.integrations.trl.distillation import linear_distillation
    from sgcd_kernels.integrations.trl.references import Siblings
    from sgcd_kernels.integrations.trl.trainer import SGCDTrainer

__all__ = ["SGCDConfig", "SGCDTrainer", "Siblings", "linear_distillation"]

_MODULES = {
    "SGCDConfig": "config",
    "SGCDTrainer": "trainer",
    "Siblings": "references",
    "linear_distillation": "distillation",
}


if not TYPE_CHECKING:  # else a type checker would accept any name as one of this module

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        check_version()
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
