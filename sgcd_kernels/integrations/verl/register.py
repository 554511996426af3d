"""Importing this registers the plug-ins with verl: the module to name as `external_lib`.

- policy losses `sgcd`, `sgcd_gspo`, `sgcd_cispo`, ...: verl's own on weighted advantages
- the engine of language models under fsdp2, under the device vendor's name, which verl looks up before its own engine

Raises ImportError for an unsupported verl, naming the supported releases.
"""

from sgcd_kernels.integrations.verl.versions import check_version

check_version()

from verl.workers.engine import EngineRegistry  # noqa: E402  # after the check, which explains what would fail here

from sgcd_kernels.integrations.verl.engine import SGCDEngine  # noqa: E402
from sgcd_kernels.integrations.verl.policy_loss import register_policy_losses  # noqa: E402

POLICY_LOSSES = register_policy_losses()
EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor=["nvidia", "amd"])(
    SGCDEngine
)
