"""What can go wrong and is reported without a traceback, and the two faults that end a single episode.

`ReportedError` is what the command line turns into one line and exit code 2: either the user made a mistake
(`UserError`), or something that the run depends on failed (`RunFailed`), the disk included (`file_failed`). Anything
else is a bug and shows its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence


class ReportedError(Exception):
    """An error that is reported as one line, which names the thing and the remedy."""

    @property
    def lines(self) -> list[str]:
        """The lines to report: one."""
        return [" ".join(str(self).split())]


class UserError(ReportedError):
    """A mistake of the user: a wrong key, a missing file, a package that is not installed."""


class UserErrors(UserError):
    """Several mistakes, each on its own line, so that all of them can be corrected before the next attempt."""

    def __init__(self, errors: Sequence[ReportedError | str]) -> None:
        each = [line for error in errors for line in (UserError(error) if isinstance(error, str) else error).lines]
        super().__init__(each[0] + (f" (and {len(each) - 1} more)" if len(each) > 1 else ""))
        self._each = each

    @property
    def lines(self) -> list[str]:
        return list(self._each)


class PromptTooLong(UserError):
    """A task whose first prompt leaves no room for an answer. It can be left out as long as other tasks fit."""


class RunFailed(ReportedError):
    """What the run depends on failed, after every retry. It stops with a checkpoint, from which it can resume."""


_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close files of other processes, or raise fs.file-max",
    errno.EROFS: "mount that disk for writing",
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.ENOENT: "put it back where it was",
    errno.ENOTDIR: "put the folder back that it is in",
    errno.EISDIR: "move that folder away",
    errno.EEXIST: "move it away",
    errno.ENOTEMPTY: "move that folder away",
    errno.EIO: "have that disk looked at (dmesg says more)",
    errno.ESTALE: "mount that disk again",
}


def file_failed(error: OSError) -> RunFailed:
    """The one line of an error of the operating system. It never advises to delete what could not be read."""
    name = error.filename if isinstance(error.filename, str | bytes) else None
    what = f"{name!r}: " if isinstance(name, bytes) else f"{name}: " if name else ""
    why = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "see to it")
    after = "and give the same command again: a run resumes from its newest checkpoint"
    return RunFailed(f"{what}{why}; {remedy}, {after}")


class EngineLost(RunFailed):
    """No engine answers."""


class EnvironmentLost(RunFailed):
    """Every rollout breaks, whatever the task: the fault is in what all of them need, not in an episode."""


class NotFinite(RunFailed):
    """Gradients or weights are not finite."""


class EnvironmentBroken(Exception):
    """The environment failed, not the policy: the rollout is dropped and counted, never scored."""


class EnvironmentBug(EnvironmentBroken):
    """The environment raised something else than it may: a fault of its code, or of what that relies on."""


class RolloutBug(Exception):
    """Our own code (a reader, a renderer, the episode) failed on what a policy or an environment said. The rollout is
    dropped and counted like a broken one, and what it said is kept for a bug report."""


class PolicyCrashed(Exception):
    """The policy's own code ended its world: the episode ends there and fails. Raised by `step` alone.

    `reward` is what such a failure is worth; an environment whose rewards go below 0 gives its lowest.
    """

    def __init__(self, message: str = "", *, reward: float = 0.0) -> None:
        super().__init__(message)
        self.reward = reward


def all_of(*checks: Callable[[], object]) -> None:
    """Run every check, then raise what they found as one error."""
    errors: list[ReportedError] = []
    for check in checks:
        try:
            check()
        except ReportedError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)
