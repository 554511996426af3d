"""Errors that are reported as one line: the user's mistakes, and failures that are not his."""

from __future__ import annotations

import pytest

from trainer import commands
from trainer.errors import EngineLost, EnvironmentLost, NotFinite, PromptTooLong, ReportedError, UserError, UserErrors


@pytest.mark.parametrize("kind", [EngineLost, EnvironmentLost, NotFinite])
def test_a_failure_of_the_run_is_one_line_and_no_mistake_of_the_user(
    kind: type[ReportedError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise kind("engine: gone;\n  3 tries")

    monkeypatch.setattr(commands, "dispatch", fail)
    assert not issubclass(kind, UserError)
    assert commands.main([]) == 2
    assert capsys.readouterr().err == "error: engine: gone; 3 tries\n"


def test_several_mistakes_are_a_line_each() -> None:
    error = UserErrors(["one", UserErrors([PromptTooLong("two"), "three"])])
    assert error.lines == ["one", "two", "three"]
    assert str(error) == "one (and 2 more)"
