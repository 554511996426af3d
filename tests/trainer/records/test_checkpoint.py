"""A checkpoint brings back the same bits, survives a kill at any moment, and says so when it is damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer import files
from trainer.errors import NotFinite, UserError, file_failed
from trainer.records import checkpoint, checkpoint_folder, run_records


def tiny(width: int = 16, tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Run:
    """A training loop in small: every source of randomness that a real one has, moved on by every step."""

    def __init__(self, tied: bool = True) -> None:
        self.model = tiny(tied=tied)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.generators = {"engine": torch.Generator().manual_seed(7)}
        random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
        self.order = list(range(10))

    def step(self) -> None:
        random.shuffle(self.order)
        ids = torch.randint(32, (2, 8), generator=self.generators["engine"])
        noise = 1 + 0.1 * torch.rand(()) + float(np.random.rand()) + random.random()  # noqa: NPY002
        (self.model(input_ids=ids, labels=ids).loss * noise).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def save(self, out: Path, step: int, **options: Any) -> Path:
        extra = {"order": self.order}
        parts = {"model": self.model, "optimiser": self.optimiser, "generators": self.generators, "extra": extra}
        return checkpoint.save(out, step, **parts, **options)

    def load(self, path: Path) -> int:
        step, extra = checkpoint.load(path, model=self.model, optimiser=self.optimiser, generators=self.generators)
        self.order = extra["order"]
        return step


def bits(run: Run) -> dict[str, bytes]:
    weights = {name: t.detach().numpy().tobytes() for name, t in run.model.state_dict().items()}
    moments = {
        f"{i}.{k}": v.numpy().tobytes() for i, s in run.optimiser.state_dict()["state"].items() for k, v in s.items()
    }
    return {**weights, **moments, "order": bytes(run.order)}


@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_continues_to_the_same_bits(tmp_path: Path, tied: bool) -> None:
    straight = Run(tied)
    for step in range(1, 7):
        straight.step()
        if step == 3:
            path = straight.save(tmp_path, step)

    resumed = Run(tied)
    random.random(), torch.rand(5)  # wherever the generators stood before the load
    assert resumed.load(path) == 3
    for _ in range(3):
        resumed.step()
    assert bits(resumed) == bits(straight)


def test_the_folder_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = Run()
    run.step()
    path = run.save(tmp_path, 1)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), loaded.parameters(), strict=True))


def test_latest_is_by_number_and_the_limit_removes_the_oldest(tmp_path: Path) -> None:
    run = Run()
    assert checkpoint.latest(tmp_path) is None
    for step in (2, 9, 10, 11):
        run.save(tmp_path, step, save_total_limit=2)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_11"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_11"]


def test_saving_a_step_again_always_leaves_one_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing gigabytes takes seconds, in which a kill must find a checkpoint."""
    run, remove, seen = Run(), checkpoint_folder.shutil.rmtree, list[bool]()
    target = run.save(tmp_path, 1)

    def watched(path: Path, **options: Any) -> None:
        if path.exists():
            seen.append(target.is_dir())
        remove(path, **options)

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", watched)
    run.save(tmp_path, 1)
    assert seen == [True]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
from trainer.records import checkpoint, checkpoint_folder, run_records

class Weights(torch.nn.Linear):
    def save_pretrained(self, folder, **options):
        from safetensors.torch import save_file
        save_file(self.state_dict(), f"{folder}/model.safetensors")

model = Weights(64, 64)
optimiser = torch.optim.AdamW(model.parameters())
step = int(sys.argv[2])
while True:
    step += 1
    for p in model.parameters():
        p.data.fill_(step)
    checkpoint.save(Path(sys.argv[1]), step, model=model, optimiser=optimiser, extra={"step": step}, save_total_limit=2)
    print(step, flush=True)
"""


def test_a_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(0)
    done = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(done)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            lines = [int(child.stdout.readline())]
            try:
                child.wait(timeout=rng.uniform(0.0, 0.1))
            except subprocess.TimeoutExpired:
                child.kill()
            lines += [int(line) for line in child.stdout.read().split()]
        path = checkpoint.latest(tmp_path)
        assert path is not None
        linear = torch.nn.Linear(64, 64)
        done, extra = checkpoint.load(path, model=linear, optimiser=torch.optim.AdamW(linear.parameters()))
        assert done >= lines[-1], "a save that had returned was lost"
        assert extra == {"step": done}
        assert all(bool((p == done).all()) for p in linear.parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "state/state.pt", "state/manifest.json"])
def test_a_damaged_checkpoint_is_named_with_its_remedy(tmp_path: Path, name: str) -> None:
    path = Run().save(tmp_path, 1)
    file = path / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"step_1: damaged checkpoint .* put back a whole copy"):
        Run().load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "state/state.pt"])
def test_garbage_of_the_right_size_is_noticed(tmp_path: Path, name: str) -> None:
    run = Run()
    path = run.save(tmp_path, 1)
    file = path / name
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(UserError, match=rf"damaged checkpoint \({name}"):
        run.load(path)


@pytest.mark.parametrize(
    "other", [tiny(width=32), tiny().to(torch.bfloat16), torch.nn.Linear(2, 2)], ids=["width", "dtype", "architecture"]
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path, other: Any) -> None:
    path = Run().save(tmp_path, 1)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(UserError, match=r"does not match the model at .*another --output_dir"):
        checkpoint.load(path, model=other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_an_unknown_generator_is_refused(tmp_path: Path) -> None:
    run = Run()
    path = run.save(tmp_path, 1)
    run.generators["second"] = torch.Generator()
    with pytest.raises(UserError, match="has generators"):
        run.load(path)


def test_rewind_ends_the_records_at_the_step(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step in (5, 10, 15):
        (tmp_path / "rollouts" / f"step_{step}.jsonl").write_text("{}\n")
    lines = [json.dumps({"step": step, "reward": 0.5}) for step in range(13)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "rew')

    assert run_records.rewind(tmp_path, 10) == 10

    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert kept == lines[:11]
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == ["step_10.jsonl", "step_5.jsonl"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, bad: float) -> None:
    run = Run()
    whole = run.save(tmp_path, 1)
    with torch.no_grad():
        run.model.model.norm.weight[3] = bad
    with pytest.raises(NotFinite, match=r"model\.norm\.weight is not finite after step 2"):
        run.save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == whole


def test_records_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a folder"):
        run_records.rewind(tmp_path, 1)


def files_of(path: Path) -> list[str]:
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, rng = Run().save(tmp_path, 1), random.Random(0)
    for name in files_of(path):
        file = path / name
        whole = file.read_bytes()
        for position in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))}:
            bad = bytearray(whole)
            bad[position] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            with pytest.raises(checkpoint_folder.DamagedCheckpoint, match=r"step_1: damaged checkpoint"):
                checkpoint.verify(path)
        file.write_bytes(whole)
    assert checkpoint.verify(path).step == 1


def test_only_files_of_the_manifest_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run = Run()
    path = run.save(tmp_path, 1)
    before = bits(run)
    name, tensor = next(iter(run.model.state_dict().items()))
    save_file({name: torch.zeros_like(tensor)}, path / "zz.safetensors")
    (path / "adapter_model.safetensors").write_bytes(b"no tensors")
    run.load(path)
    assert bits(run) == before


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken(tmp_path: Path) -> None:
    path = Run().save(tmp_path, 1)
    path.rename(path.with_name("step_7"))
    with pytest.raises(UserError, match=r"step_7: damaged checkpoint \(it holds step 1\)"):
        checkpoint.verify(path.with_name("step_7"))


def test_the_newest_whole_checkpoint_is_taken_and_it_is_said(tmp_path: Path) -> None:
    run, said = Run(), list[str]()
    for step in (1, 2, 3):
        run.save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step_{step}" / "state" / "state.pt").unlink()
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "checkpoints" / "step_1"
    assert len(said) == 2
    assert all("(state/state.pt is gone)" in line and line.endswith("step_1 is used instead") for line in said)
    (tmp_path / "checkpoints" / "step_1" / "config.json").write_text("{}")
    with pytest.raises(checkpoint_folder.DamagedCheckpoint, match="step_3"):
        checkpoint.latest(tmp_path)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails, or a permission: the older checkpoint is not taken, and the line advises to delete nothing."""
    run = Run()
    run.save(tmp_path, 1), run.save(tmp_path, 2)
    plain = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        checkpoint.latest(tmp_path)
    (line,) = file_failed(caught.value).lines
    assert "step_2/model.safetensors: Permission denied; give this user access" in line and "delet" not in line


@pytest.mark.parametrize("moment", ["between renames", "before the first", "half removed"])
def test_folders_that_a_kill_left_get_their_names_back(tmp_path: Path, moment: str) -> None:
    run = Run()
    path = run.save(tmp_path, 1)
    beside, old = path.with_name(".writing-step_1"), path.with_name(".writing-old-step_1")
    if moment == "between renames":
        path.rename(old)
        beside.mkdir()
        (beside / "config.json").write_text("{")
    elif moment == "before the first":
        path.rename(beside)
    else:
        path.rename(old)
        (old / "config.json").unlink()
    checkpoint_folder.recover(tmp_path)
    left = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert left == ([] if moment == "half removed" else ["step_1"])
    assert checkpoint_folder.was_there(tmp_path) == "step_1"


def test_a_link_in_the_place_of_a_draft_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (tmp_path / "page.tmp").symlink_to(precious)
    files.write(tmp_path / "page", "text")
    assert precious.read_text() == "keep" and (tmp_path / "page").read_text() == "text"


def test_rewind_keeps_lines_that_cannot_be_read_and_cuts_behind_the_step(tmp_path: Path) -> None:
    lines = [b'{"step": 1}\n', b'{"st\xff": 2}\n', b'{"step": 3}\n', b"garbage\n", b'{"step": 4}\n', b'{"step": 5']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert run_records.rewind(tmp_path, 3) == 3
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:3])


def test_the_oldest_traces_go(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step in (1, 5, 10, 100):
        (tmp_path / "rollouts" / f"step_{step}.jsonl").touch()
    run_records.keep_newest(tmp_path, 2)
    assert [p.name for p in run_records.traces(tmp_path)] == ["step_10.jsonl", "step_100.jsonl"]


def reseal(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write another manifest with a right checksum, as another version or somebody with an editor would."""
    manifest = path / "state" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["crc32"]
    change(content)
    manifest.write_text(json.dumps({**content, "crc32": checkpoint_folder._crc32_of(content)}))


NO_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no step": lambda m: m.pop("step"),
    "step 0": lambda m: m.update(step=0),
    "step as text": lambda m: m.update(step="1"),
    "step as truth": lambda m: m.update(step=True),
    "no files": lambda m: m.pop("files"),
    "empty files": lambda m: m.update(files={}),
    "files as list": lambda m: m.update(files=["config.json"]),
    "file as text": lambda m: m["files"].update({"config.json": "x"}),
    "file as null": lambda m: m["files"].update({"config.json": None}),
    "negative size": lambda m: m["files"]["config.json"].update(bytes=-1),
    "parent": lambda m: m["files"].update({"../../x": m["files"]["config.json"]}),
    "absolute": lambda m: m["files"].update({"/etc/hostname": m["files"]["config.json"]}),
    "null byte": lambda m: m["files"].update({"a\0b": m["files"]["config.json"]}),
    "surrogate": lambda m: m["files"].update({"\ud800": m["files"]["config.json"]}),
    "long name": lambda m: m["files"].update({"a" * 5000: m["files"]["config.json"]}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Run().save(tmp_path_factory.mktemp("saved"), 1)


def copy(saved: Path, to: Path) -> Path:
    return Path(shutil.copytree(saved, to / "checkpoints" / saved.name))


@pytest.mark.parametrize("kind", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_damage(saved: Path, tmp_path: Path, kind: str) -> None:
    path = copy(saved, tmp_path)
    reseal(path, NO_MANIFESTS[kind])
    with pytest.raises(checkpoint_folder.DamagedCheckpoint) as caught:
        checkpoint.verify(path)
    said = str(caught.value).replace(str(path), "").replace("a" * 5000, "")
    assert len(said) < 200 and said.isascii() and said.isprintable()


@pytest.mark.parametrize("other", [0, 2, "1", None])
def test_another_version_of_the_manifest_is_refused_and_not_called_damaged(
    saved: Path, tmp_path: Path, other: Any
) -> None:
    path = copy(saved, tmp_path)
    reseal(path, lambda m: m.update(format=other))
    with pytest.raises(UserError, match="another version of this package wrote it") as caught:
        checkpoint.latest(tmp_path)
    assert not isinstance(caught.value, checkpoint_folder.DamagedCheckpoint)


def test_a_link_in_a_circle_is_damage(saved: Path, tmp_path: Path) -> None:
    path = copy(saved, tmp_path)
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("config.json")
    with pytest.raises(checkpoint_folder.DamagedCheckpoint, match=r"config\.json is gone"):
        checkpoint.verify(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("extra"),
        lambda s: s["generators"].update(python=(3, (1, 2), None)),
        lambda s: s["generators"].update(numpy=("PCG64", [1], 0, 0, 0.0)),
        lambda s: s["generators"].update(torch=torch.zeros(3, dtype=torch.uint8)),
        lambda s: s.update(optimiser={"state": {"a": 5}}),
        lambda s: s.clear(),
    ],
)
def test_a_state_that_this_process_cannot_take_is_one_line(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    """It is whole, and of other packages or of more devices."""
    path = copy(saved, tmp_path)
    state = torch.load(path / "state" / "state.pt", weights_only=True)
    change(state)
    torch.save(state, path / "state" / "state.pt")
    described = checkpoint_folder._describe(path / "state" / "state.pt").model_dump()
    reseal(path, lambda m: m["files"].update({"state/state.pt": described}))
    with pytest.raises(UserError, match=r"its state/state\.pt does not fit") as caught:
        Run().load(path)
    assert len(caught.value.lines) == 1 and not isinstance(caught.value, checkpoint_folder.DamagedCheckpoint)


def test_weights_that_are_not_finite_are_damage(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy(saved, tmp_path)
    weights = load_file(path / "model.safetensors")
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    described = checkpoint_folder._describe(path / "model.safetensors").model_dump()
    reseal(path, lambda m: m["files"].update({"model.safetensors": described}))
    with pytest.raises(checkpoint_folder.DamagedCheckpoint, match="is not finite"):
        Run().load(path)


@pytest.mark.parametrize(
    "name", ["step_01", "step_0", "step_-1", "step_\u0661", "step_" + "9" * 240, "step_1 (copy)", "step_1\n"]
)
def test_a_step_has_one_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_folder.found(tmp_path) == [] and checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize(
    "line", ['{"step": ' + "9" * 400 + "}", '{"step": NaN}', '{"step": "x"}', "[]", "[" * 9999, "\0"]
)
def test_a_line_of_metrics_without_a_step_is_passed_over(tmp_path: Path, line: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n' + line + "\n")
    assert run_records.last_step(tmp_path) == 1 == run_records.rewind(tmp_path, 1)
    assert metrics.read_text() == '{"step": 1}\n'


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    from trainer.records import rollout_files
    from trainer.records.metric_logger import MetricLogger

    for name in ("metrics.jsonl", checkpoint_folder.NEWEST):
        os.mkfifo(tmp_path / name)
    readers: list[Callable[[], Any]] = [
        lambda: run_records.rewind(tmp_path, 1),
        lambda: checkpoint_folder.was_there(tmp_path),
        lambda: MetricLogger(tmp_path, total_steps=1),
        lambda: list(rollout_files.read_step(tmp_path / "metrics.jsonl")),
    ]
    for read in readers:
        with pytest.raises(OSError, match="Not a regular file") as caught:
            read()
        assert "move it away" in str(file_failed(caught.value))


def test_a_folder_in_the_place_of_a_file_is_what_the_line_names(tmp_path: Path) -> None:
    (tmp_path / "view.html").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        files.write(tmp_path / "view.html", "page")
    assert caught.value.filename == str(tmp_path / "view.html") and files.names(tmp_path) == ["view.html"]
