"""Names that lead anywhere and files that hold anything: one line, exit code 2, at once, and none of their text."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from trainer import yaml_files
from trainer.commands import main, only_writer
from trainer.errors import UserError
from trainer.preflight import config_file

SECRET = "hunter2"


def bomb(levels: int = 12) -> str:
    names = [f"k{n}" for n in range(levels)]
    lines = [f"{names[0]}: &{names[0]} [x, x]"]
    return "\n".join([*lines, *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise(names))])


def merge_bomb(levels: int = 12) -> str:
    return "\n".join(
        ["k0: &k0 {a: 1}", *(f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}" for n in range(1, levels))]
    )


CONTENTS: dict[str, tuple[bytes, str]] = {
    "a shadow file": (f"root:{SECRET}:1::\ndaemon:*{SECRET}:1\n".encode(), "is not valid YAML|got a str"),
    "keys that are no names": (f"root:{SECRET}: 1\n".encode(), r"unknown key \(not shown"),
    "an unknown alias": (f"a: *{SECRET}\n".encode(), r"\(line 1: syntax error\)"),
    "an unknown tag": (f"a: !{SECRET} b\n".encode(), r"\(line 1: syntax error\)"),
    "an unknown directive": (f"%TAG !{SECRET}! x\n--- !{SECRET}\n".encode(), "syntax error"),
    "a broken quote": (f'a: "{SECRET}\n'.encode(), "syntax error"),
    "a number that is none": (b"a: " + b"9" * 10_000, "is not valid YAML"),
    "a date that is none": (b"a: 2020-99-99", "is not valid YAML"),
    "aliases that multiply": (bomb().encode(), "aliases make more than"),
    "merges that multiply": (merge_bomb().encode(), "aliases make more than"),
    "an alias inside itself": (b"a: &a [*a]", "inside what it names"),
    "deep nesting": (b"[" * 100_000, "nests too deeply"),
    "deep mappings": (b"{a: " * 50_000, "nests too deeply"),
    "a huge file": (b"#" * 2**20, "larger than"),
    "bytes": (bytes(range(256)), "cannot be read"),
    "NUL characters": (b"a: \0", "is not valid YAML"),
    "a NUL in a value": (b'output_dir: "a\\0b"', "output_dir: needs text without NUL"),
    "a NUL in a list": (b'engine: {server_args: ["a\\0b"]}', "engine.server_args: needs text without NUL"),
    "half a character": (b'output_dir: "\\ud83d"', "output_dir: needs text without"),
    "a key twice": (b"seed: 1\nseed: 2\n", r"\(line 2: the key 'seed' stands twice\)"),
    "a key twice in a section": (b"credit: {gamma: 1, gamma: 2}", "the key 'gamma' stands twice"),
    "a key twice in a list": (b"rewards:\n- {path: verifier, weight: 1, weight: 2}", "the key 'weight' stands twice"),
    "a key in two spellings": (b"env: {options: {1: a, 0x1: b}}", "the key '1' stands twice"),
    "a base that is a list": (b"base: [a.yaml]", "base: needs the name of one YAML file"),
    "a base with a NUL": (b'base: "a\\0.yaml"', "NUL"),
    "a base that is a device": (b"base: /dev/urandom", "is no YAML file"),
    "a base that is a folder": (b"base: .", "is no YAML file"),
    "a base with a long name": (b"base: " + b"a" * 5_000 + b".yaml", "cannot be read"),
    "a base that is the file itself": (b"base: config.yaml", "leads back to itself"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("as_base", [False, True], ids=["config", "base"])
def test_what_a_file_holds(tmp_path: Path, name: str, as_base: bool, capsys: Any) -> None:
    content, message = CONTENTS[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    if as_base:
        path = tmp_path / "above.yaml"
        path.write_text("base: config.yaml\n")
    assert_one_line(["train", str(path)], message, capsys)


def assert_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert len(said) < 1_000
    assert SECRET not in said
    with pytest.raises(UserError, match=message):
        config_file.load(Path(arguments[1]), arguments[2:])


def test_what_a_name_leads_to(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "secret.txt").write_text(f"password: {SECRET}\n")
    (tmp_path / "link.yaml").symlink_to("secret.txt")
    (tmp_path / "random.yaml").symlink_to("/dev/urandom")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere.yaml")
    for target in ("secret.txt", "link.yaml", "pipe.yaml", "random.yaml", "loop.yaml", "dangling.yaml", "folder.yaml",
                   "/etc/passwd", "a" * 5_000, "a/" * 2_500 + "a.yaml", "/dev/zero", "/proc/self/environ"):  # fmt: skip
        above = tmp_path / "above.yaml"
        above.write_text(f"base: {target}\n")
        for path in (above, tmp_path / target) if target != "folder.yaml" else (above,):
            assert_one_line(["train", str(path)], "is no|cannot be read|no such file", capsys)


def test_a_long_row_of_bases(tmp_path: Path, capsys: Any) -> None:
    for n in range(40):
        (tmp_path / f"{n}.yaml").write_text(f"base: {n + 1}.yaml\n")
    assert_one_line(["train", str(tmp_path / "0.yaml")], "at most 16 files", capsys)


def test_a_bomb_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(bomb(40))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))

    command = [sys.executable, "-m", "trainer.run", "train", str(tmp_path / "config.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr


def test_anchors_and_merges_are_still_taken(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &a {b: 1, c: 2}\ny: {<<: *a, b: 3}\nz: *a\n")
    assert yaml_files.read(tmp_path / "a.yaml") == {"x": {"b": 1, "c": 2}, "y": {"b": 3, "c": 2}, "z": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["--seed", "1", "--seed", "2"], "--seed"),
        (["--max-steps", "1", "--max_steps=2"], "--max_steps"),
        (["--credit.gamma", "1", "--credit", "{gamma: 2}"], "--credit"),
        (["--credit", "{gamma: 2}", "--credit.gamma", "1"], "--credit.gamma"),
        (["--credit", "{gamma: 2, gamma: 1}"], "the key 'gamma' stands twice"),
        (["--seed", bomb()], "--seed: .* aliases make"),
    ],
)
def test_an_option_that_is_given_twice(tmp_path: Path, overrides: list[str], name: str, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert_one_line(["train", str(tmp_path / "config.yaml"), *overrides], name, capsys)


def test_the_lock_follows_no_link_and_empties_nothing(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(target)
    with pytest.raises(UserError, match=r"\.lock is a link"), only_writer(run):
        pass
    (run / ".lock").unlink()
    (run / ".lock").hardlink_to(target)
    with only_writer(run), pytest.raises(UserError, match="another process"), only_writer(run):
        pass
    assert target.read_text() == "kept"
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with only_writer(run):
        pass
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be written"), only_writer(run):
        pass
