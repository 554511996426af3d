"""What the teacher reads: `trainer.v1.sgcd_sync.reference_func` names this function (docs/verl.md).

It sees one task with all its rollouts. Your own may ask a language model (`async def`: all groups are asked at once)
or look into `siblings.rows` for what the data set has on the task.
"""

from sgcd_kernels.integrations.trl.references import Siblings


def write(siblings: Siblings) -> str | None:
    """The shortest answer that succeeded, if another failed; nothing to learn from a group that is all alike."""
    best, worst = max(siblings.rewards), min(siblings.rewards)
    if best == worst:
        return None
    good = [text for text, reward in zip(siblings.completions, siblings.rewards, strict=True) if reward == best]
    return f"Another attempt at this task succeeded:\n{min(good, key=len)}"
