"""Configs: a run gets the values of file and command line, and every mistake is one helpful line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.properties import examples
from trainer import envs
from trainer.config import Config
from trainer.errors import UserError
from trainer.preflight import config_file

CONFIGS = Path(__file__).parents[3] / "configs"


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_file_and_command_line_in_that_order(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ncredit: {gamma: 0.5}\nmax_steps: 3\n")
    config = config_file.load(path, ["--credit.clip", "3", "--seed=2", "--learning-rate", "1e-4"])
    assert (config.seed, config.max_steps, config.learning_rate) == (2, 3, 1e-4)
    assert (config.credit.gamma, config.credit.clip) == (0.5, 3.0)
    assert config.num_generations == Config().num_generations


def test_a_base_is_laid_under_section_by_section(tmp_path: Path) -> None:
    write(tmp_path, "arm: grpo\ncredit: {gamma: 0.5, clip: 3}\nseed: 4\n", "base.yaml")
    write(tmp_path, "base: base.yaml\nseed: 5\n", "middle.yaml")
    config = config_file.load(write(tmp_path, "base: middle.yaml\ncredit: {gamma: 0.25}\n"))
    assert (config.arm, config.seed, config.credit.gamma, config.credit.clip) == ("grpo", 5, 0.25, 3.0)


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    with pytest.raises(UserError, match="leads back to itself"):
        config_file.load(write(tmp_path, "base: a.yaml\n", "b.yaml"))


def test_the_arms_differ_in_arm_and_place_only() -> None:
    base = config_file.dump(config_file.load(CONFIGS / "workday_sgcd.yaml"))
    for arm in ("grpo", "direct_sd"):
        other = config_file.dump(config_file.load(CONFIGS / f"workday_{arm}.yaml"))
        assert {k for k in base if base[k] != other[k]} == {"arm", "output_dir"}
        assert other["arm"] == arm


PAPER = {  # METHOD section 2, "Paper's runs": what it states, for both benchmarks and for each
    "num_generations": 8,
    "groups_per_step": 8,
    "learning_rate": 1e-6,
    "model.path": "models/Qwen3.5-4B",
    "model.max_length": 32_768,
    "env.max_response_tokens": 16_384,
    "credit.rule": "sgcd",
    "credit.gamma": 1.0,
    "credit.clip": 2.0,
    "dynamic_sample": True,
    "writer.name": "openai",
}
PAPERS = {
    "appworld": {"env.max_turns": 30, "env.max_observation_chars": 12_000, "temperature": 1.0, "top_p": 1.0},
    "tau3_airline": {
        "env.max_turns": 16,
        "env.max_observation_chars": 512,
        "temperature": 0.4,
        "env.eval_split": "test",
    },
}


@pytest.mark.parametrize("arm", ["grpo", "sgcd", "direct_sd"])
@pytest.mark.parametrize("env", PAPERS)
def test_the_papers_configs_say_what_the_paper_says(env: str, arm: str) -> None:
    config = config_file.dump(config_file.load(CONFIGS / "paper" / f"{env}_{arm}.yaml"))
    flat = dict(config_file._flatten(config))
    wanted = {**PAPER, **PAPERS[env], "arm": arm, "env.name": env, "output_dir": f"runs/paper_{env}_{arm}"}
    assert {key: flat[key] for key in wanted} == wanted
    sgcd = config_file.dump(config_file.load(CONFIGS / "paper" / f"{env}_sgcd.yaml"))
    own = {"arm", "output_dir"} | ({"distill_kind"} if arm == "direct_sd" else set())
    assert {key for key in config if config[key] != sgcd[key]} <= own


def test_the_papers_appworld_has_a_world_for_every_slot() -> None:
    config = config_file.load(CONFIGS / "paper" / "appworld_grpo.yaml")
    assert config.env.options["worlds"] >= config.engine.slots == config.groups_per_step * config.num_generations


def test_what_the_paper_leaves_open_is_marked() -> None:
    """Every key that the paper does not state is the benchmark's, or is marked R beside it or on the line above."""
    stated = {key.rsplit(".", 1)[-1] for key in (*PAPER, *(k for keys in PAPERS.values() for k in keys))}
    stated |= {"path", "made_by", "arm", "output_dir", "base", "name", "train_split"}
    for path in sorted((CONFIGS / "paper").glob("*.yaml")):
        above = ""
        for line in path.read_text().splitlines():
            code, _, comment = line.partition("#")
            key, _, value = code.partition(":")
            if value.strip() and key.strip() not in stated:
                marked = re.search(r"\bR\b|benchmark", comment + (above if above.startswith("#") else ""))
                assert marked or ("{" in value and all(k in stated for k in re.findall(r"(\w+):", value))), (
                    path.name,
                    line,
                )
            above = line.strip()


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_that_ships_is_valid(path: Path) -> None:
    config_file.load(path)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=examples(30))
@given(
    seed=st.integers(0, 2**31 - 1),
    rate=st.floats(1e-9, 1.0),
    gamma=st.floats(0, 5),
    path=st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=20),
    high=st.none() | st.floats(0.01, 1),
)
def test_what_is_written_is_read_back(tmp_path: Path, **values: Any) -> None:
    tree = {"seed": values["seed"], "learning_rate": values["rate"], "credit": {"gamma": values["gamma"]}}
    config = Config.model_validate({**tree, "model": {"path": values["path"]}, "epsilon_high": values["high"]})
    config.output_dir = tmp_path
    config_file.claim(config)
    assert config_file.load(tmp_path) == config
    (tmp_path / "config.yaml").unlink()


MISTAKES = {
    "num_generation: 4": r"unknown key 'num_generation'; did you mean 'num_generations'\?",
    "gamma: 2": r"unknown key 'gamma'; did you mean 'credit.gamma'\?",
    "credit: {gama: 2}": r"unknown key 'credit.gama'; did you mean 'credit.gamma'\?",
    "writer: {nmae: none}": r"did you mean 'writer.name'\?",
    "qqqq: 1": "unknown key 'qqqq'; did you mean",
    "loss_type: gpro": r"loss_type: got 'gpro', needs .*; did you mean 'grpo'\?$",
    "loss_type: sapo": r"loss_type: got 'sapo', needs .*; 'sapo' is a loss of TRL, Liger and verl",
    "engine: {name: vlm}": r"engine.name: got 'vlm', needs .*; did you mean 'vllm'\?",
    "credit: {rule: sgdc}": r"credit.rule: got 'sgdc', needs .*; did you mean 'sgcd'\?",
    "credit: {rule: 3}": r"credit.rule: got 3, needs 'sgcd'.* or 'none'$",
    "num_generations: 1": "num_generations: got 1, needs greater than or equal to 2",
    "seed: many": "seed: got 'many', needs a valid integer",
    "max_steps: 2.5": "max_steps: got 2.5, needs a whole number",
    "learning_rate: .inf": "learning_rate: got inf, needs a finite number",
    "arm: sgdc": "arm: got 'sgdc', needs 'grpo', 'sgcd' or 'direct_sd'",
    "model: {dtype: bfloat16}": "unknown key 'model.dtype'",  # AdamW's weights are fp32; autocast computes in bf16
    "model: tiny": "model: got 'tiny', needs a section",
    "credit: 3": "credit: got 3, needs a section",
    "credit: {gamma: -1}": "credit: gamma is -1",
    "output_dir: 5": "output_dir: got 5, needs a path, such as runs/mine",
    "report_to: tensorboard": "report_to: got 'tensorboard', needs a list",
    "max_completion_length: 5000": "max_completion_length: got 5000, needs less than model.max_length",
    "writer: {base_url: localhost}": r"writer.base_url: needs an http\(s\) URL",
    "seed: 99999999999999999999999": "seed: got 99999999999999999999999, needs less than 2147483648",
    "seed: 18446744073709551615": "seed: got 18446744073709551615, needs less than",
    "seed: -1": "seed: got -1, needs greater than or equal to 0",
    "adam_beta1: 2": "adam_beta1: got 2, needs less than 1",
    "adam_beta2: 1": "adam_beta2: got 1, needs less than 1",
    "epsilon_high: -1": "epsilon_high: got -1, needs greater than 0",
    "env: {options: [1]}": r"env.options: got \[1\], needs a section",
    "engine: {slots: 1000000000000}": "engine.slots: got 1000000000000, needs less than or equal to 4096",
    "model: {max_length: 1000000000000}": "model.max_length: got .*, needs less than",
    "writer: {token_budget: -1}": "writer.token_budget: got -1, needs greater than 0",
    "writer: {base_url: 5}": r"writer.base_url: got \(not shown\), needs a valid string",
    "env: {options: &a {b: *a}}": r"c.yaml: is not valid YAML \(an alias stands inside what it names\)",
    "seed: 2024-13-45": r"is not valid YAML \(month must be in 1..12",
    "1: 2": "1: is not a name",
    "env: {options: {1: 2}}": "env.options.1: is not a name",
    "- a\n- b": "got a list, needs a mapping",
    "a: [1": "is not valid YAML",
    "a: b: c": r"is not valid YAML \(line 1",
    "base: nowhere.yaml": "nowhere.yaml: no such file",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[text]) as caught:
        config_file.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_mistake_on_the_command_line_is_located_there(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\n")
    with pytest.raises(UserError, match=r"^command line: seed: got 'x'"):
        config_file.load(path, ["--seed", "x"])
    for key, value in (
        ("--credit.clip", "0.5"),
        ("--credit.start", "0.01"),  # refused by a check of two fields
        ("--model.max_length", "10"),
        ("--report_to", "[foo]"),
        ("--epsilon_high", "-1"),
        ("--writer", "3"),
        ("--model.path.x", "1"),
    ):
        with pytest.raises(UserError, match=r"^command line: "):
            config_file.load(path, [key, value])
    broken = write(tmp_path, "credit: {gamma: -1}\n", "broken.yaml")
    with pytest.raises(UserError, match=r"broken\.yaml: credit: gamma"):
        config_file.load(broken, ["--credit.clip", "3", "--seed", "2"])
    with pytest.raises(UserError, match=r"--env\.options: '&a \[\*a\]' is not a YAML value"):
        config_file.load(path, ["--env.options", "&a [*a]"])
    with pytest.raises(UserError, match=r"--seed\.x: seed is a value, not a section"):
        config_file.load(path, ["--seed.x", "1"])


@pytest.mark.parametrize("field", ["api_key_env", "base_url"])
def test_a_key_in_the_config_is_refused_and_never_repeated(tmp_path: Path, field: str) -> None:
    secret = "sk-verysecret" if field == "api_key_env" else "https://user:verysecret@example.com/v1"
    with pytest.raises(UserError) as caught:
        config_file.load(write(tmp_path, f"writer: {{{field}: '{secret}'}}"))
    assert "verysecret" not in str(caught.value)


def test_a_run_may_resume_with_more_steps_and_reports(tmp_path: Path) -> None:
    config_file.claim(Config(output_dir=tmp_path, max_steps=5))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    config_file.claim(Config(output_dir=tmp_path, max_steps=50, eval_steps=1, trace_steps=1, save_steps=3))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["max_steps"] == 50


def test_a_run_may_reach_its_writer_another_way(tmp_path: Path) -> None:
    config_file.claim(Config(output_dir=tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    there = {"base_url": "http://localhost:1/v1", "timeout": 5, "max_retries": 0, "concurrency": 1, "api_key_env": "K"}
    config_file.claim(Config.model_validate({"output_dir": tmp_path, "writer": there}))
    with pytest.raises(UserError, match=r"writer\.model is 'gpt-5-mini' there and 'other' here"):
        config_file.claim(Config.model_validate({"output_dir": tmp_path, "writer": {"model": "other"}}))


@pytest.mark.parametrize(
    ("change", "key"), [({"seed": 3}, "seed"), ({"arm": "grpo"}, "arm"), ({"credit": {"gamma": 0.5}}, r"credit\.gamma")]
)
def test_a_run_directory_of_another_config_is_refused(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    config_file.claim(Config(output_dir=tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = (tmp_path / "config.yaml").read_bytes()
    other = Config.model_validate({"output_dir": tmp_path, **change})
    with pytest.raises(
        UserError, match=rf"holds another run: {key} is .* there and .* here; choose another --output_dir"
    ):
        config_file.claim(other)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_workday_takes_no_options() -> None:
    with pytest.raises(UserError, match=r"^env\.options: workday has no option 'foo'; it takes none$"):
        envs.load("workday", foo=1)


def test_a_run_that_never_took_a_step_gives_way(tmp_path: Path) -> None:
    config_file.claim(Config.model_validate({"output_dir": tmp_path, "model": {"path": "mistyped"}}))
    config_file.claim(Config(output_dir=tmp_path))
    assert config_file.load(tmp_path) == Config(output_dir=tmp_path)


def test_a_run_that_was_moved_knows_where_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    config_file.claim(Config(output_dir=old))
    old.rename(new)
    assert config_file.load(new).output_dir == new
    with pytest.raises(UserError, match="is no run directory"):
        config_file.load(tmp_path)
