"""Whether the credit of a step is what the config asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgcd_kernels.credit.rules import never_acts
from trainer.data import Group, Scored

if TYPE_CHECKING:
    from trainer.config import Config


def invalid_credit(groups: Sequence[Group], scored: Sequence[Sequence[Scored]], config: Config) -> str:
    """Why this step's credit is not what the config asked for, or "": such a run is invalid and must say so."""
    with_teacher = [s for g, row in zip(groups, scored) if g.reference for s in row]
    if not with_teacher:
        return scarce_references(groups, config)
    if any(s.divergence.requires_grad or s.weights.requires_grad for s in with_teacher):
        return "the divergence carries a gradient"
    if config.arm != "direct_sd" and never_acts(config.credit):  # then nothing is scored
        return ""
    if all(bool((s.divergence == 0).all()) for s in with_teacher):
        return "every divergence is 0: the teacher does not read the reference"
    if config.arm != "direct_sd" and all(bool((s.weights == 1).all()) for s in with_teacher):
        return "every weight is 1: no divergence reaches credit.d_floor * credit.start"
    return ""


def scarce_references(groups: Sequence[Group], config: Config) -> str:
    """Say that most groups that should have a reference have none, and why; "" where enough have one."""
    mixed = [g for g in groups if g.mixed]
    bare = [g for g in mixed if not g.reference]
    if config.writer.name == "none" or 2 * len(bare) <= len(mixed):
        return ""
    reasons = Counter(str(g.reference_info.get("error", "nothing written")) for g in bare).most_common()
    causes = ", ".join(f"{reason} {n}" for reason, n in reasons)
    remedy = "; raise writer.max_tokens, thoughts count too" if "truncated" in dict(reasons) else ""
    return f"{len(bare)} of {len(mixed)} mixed groups have no reference and train with W = 1 ({causes}{remedy})"
