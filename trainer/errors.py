"""What can go wrong and is reported without a traceback, and the two faults that end a single episode.

`ReportedError` is what the command line turns into one line and exit code 2: either the user made a mistake
(`UserError`), or something that the run depends on failed (`RunFailed`). Anything else is a bug and shows its
traceback.
"""

from __future__ import annotations

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
    """The policy's own code ended its world: the episode ends there and fails. Raised by `step` alone."""


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
