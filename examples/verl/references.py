"""A reference writer for verl: `trainer.v1.sgcd_sync.reference_func` names this function (docs/verl.md).

It gets one task with all its rollouts. Your own may call a language model (if it is `async def`, the calls for all
groups run concurrently) or use the task's row of the data set, `siblings.rows`.
"""

from sgcd_kernels.integrations.trl.references import Siblings


def write(siblings: Siblings) -> str | None:
    """The shortest successful answer, if another one failed; None if all outcomes are the same."""
    best, worst = max(siblings.rewards), min(siblings.rewards)
    if best == worst:
        return None
    good = [text for text, reward in zip(siblings.completions, siblings.rewards, strict=True) if reward == best]
    return f"Another attempt at this task succeeded:\n{min(good, key=len)}"
