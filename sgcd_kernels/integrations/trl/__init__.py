"""TRL by our kernels: sibling-guided credit for GRPO, and the distillation trainers without logits.

from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer, linear_distillation

TRL and transformers are imported when one of the names is first asked for; a TRL release whose hooks are not known is
refused then, by name.
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


if not TYPE_CHECKING:  # or a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        check_version()
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
