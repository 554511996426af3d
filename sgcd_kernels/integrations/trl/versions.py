"""Which TRL releases have the hooks that this integration uses."""

from __future__ import annotations

import importlib.metadata

SUPPORTED = ("1.15", "1.16")  # the fused head of 1.15 is the first that returns per-token log-probs without logits


def check_version() -> None:
    """Raise ImportError if TRL is missing, or is a release that was not tested."""
    supported = " and ".join(f"{release}.x" for release in SUPPORTED)
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"trl is not installed; sgcd_kernels.integrations.trl fits {supported}") from None
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise ImportError(f"trl is {found}, sgcd_kernels.integrations.trl fits {supported}")
