"""What is printed holds no control characters from elsewhere, and no key travels in the clear."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import ModelConfig, WriterConfig
from trainer.console import VisibleConsole
from trainer.errors import UserError
from trainer.learning import model as policy
from trainer.references.endpoint import reach, refuse_cleartext
from trainer.references.openai_writer import read_key
from trainer.terminal import visible

EVIL = "a\x1b[31mb\x9b2Jc\x07d\x1b]0;title\x07\u202ee\u2066\r\x00\x7f\U000e0041"


def test_control_characters_are_shown_as_code_points() -> None:
    assert visible("plain text, 日本 é 😀\n\tnext") == "plain text, 日本 é 😀\n\tnext"
    assert visible(EVIL) == (r"a\x1b[31mb\x9b2Jc\x07d\x1b]0;title\x07\u202ee\u2066\r\x00\x7f\U000e0041")
    assert visible("\ud83d") == r"\ud83d"
    for code in [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x200E, 0x2028, 0xFEFF]:
        assert visible(chr(code)).isascii(), code


def test_a_console_keeps_its_own_colours_only() -> None:
    out = io.StringIO()
    console = VisibleConsole(file=out, force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)
    console.print("[red]mine[/]", end="")
    console.print(EVIL, markup=False)
    assert out.getvalue() == f"\x1b[31mmine\x1b[0m{visible(EVIL)}\n"


def test_warnings_and_tracebacks_are_shown_so_too() -> None:
    code = (
        "from trainer import terminal; import logging; terminal.guard(); evil = '\\x1b[31m\\u202e'\n"
        "logging.getLogger('trainer.x').warning('a %s', evil)\nraise ValueError(evil)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("a \\x1b[31m\\u202e\nTraceback")
    assert ended.stderr.endswith("ValueError: \\x1b[31m\\u202e\n")


def test_an_error_names_a_file_without_its_escapes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.run", "train", str(tmp_path / "\x1b[31m.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "\x1b" not in ended.stderr
    assert "\\x1b[31m.yaml: no such file" in ended.stderr


@pytest.mark.parametrize("url", ["http://example.com/v1", "http://10.0.0.5:8000/v1", "http://[2001:db8::1]/v1",
                                 "http://localhost.example.com/v1", "HTTP://example.com"])  # fmt: skip
def test_a_key_never_travels_in_the_clear(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("A_KEY", "sk-hunter2")
    for ask in (
        lambda: refuse_cleartext("x", url, "A_KEY"),
        lambda: reach("x", url, "m", "A_KEY"),
        lambda: read_key(WriterConfig(name="openai", base_url=url, api_key_env="A_KEY"), False),
    ):
        with pytest.raises(UserError, match="plain http") as caught:
            ask()
        assert "hunter2" not in str(caught.value)
        assert len(caught.value.lines) == 1
    for placeholder in ("none", "EMPTY"):
        monkeypatch.setenv("A_KEY", placeholder)
        refuse_cleartext("x", url, "A_KEY")


@pytest.mark.parametrize(
    "url", ["https://example.com/v1", "http://localhost:8000/v1", "http://127.0.0.1/", "http://[::1]:1"]
)
def test_a_key_may_go_over_https_or_to_this_machine(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("A_KEY", "sk-hunter2")
    refuse_cleartext("x", url, "A_KEY")


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_not_run_and_nobody_is_asked(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree("trainer/assets/workday-tiny", folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    config["model_type"] = config["model_type"] if known else "evil"
    (folder / "config.json").write_text(json.dumps(config))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    names["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    if known:
        with caplog.at_level(logging.WARNING):
            policy.load(ModelConfig(path=str(folder)))
        assert "brings Python code of its own (auto_map), which is not run" in caplog.text
    else:
        with pytest.raises(UserError, match=r"code of its own.*not run"):
            policy.load(ModelConfig(path=str(folder)))
    assert not (tmp_path / "ran").exists()
