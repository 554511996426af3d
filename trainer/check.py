"""`check`: proves the installation and a config before hours are spent on them, and says what the run will need.

Each check tries the real thing, small: the model loads, a task is played, its tokens are scored. It ends in a line:
what was found, or what to do. Checks go on after a failure, so that whoever mends one thing hears of the others too;
one that needs what failed is skipped.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import footprint, needs
from trainer.footprint import size
from trainer.types import Group, Renderer, Sampling, Suite, UserError, all_of

if TYPE_CHECKING:
    from trainer.config import Config

PACKAGES = ("torch", "transformers", "pydantic", "openai", "safetensors")
DRIFT = {"off": 1e-3, "bfloat16": 0.5, "auto": 0.5}  # by autocast: most that engine and trainer may differ
SERVED_DRIFT = 0.5  # a server has its own kernels, and by default bf16
COMES_WITH = {"renderer": "model", "room": "memory"}  # what is got -> the check that gets it
PROBE_REFERENCE = "check first , then act"
LACKS = (
    "The trainer is one process on one device: no FSDP, weights, gradients and moments in fp32, nothing offloaded. "
    "Take a larger device, --model.gradient_checkpointing true, a smaller model.max_length or tokens_per_microbatch, "
    "or model.lora"
)


class Skipped(Exception):
    """A check that needs something an earlier one did not get."""


@dataclass
class Probe:
    """What the checks have got so far."""

    config: Config
    found: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # of the check that runs: what is slow or odd, and no mistake

    def get(self, name: str) -> Any:
        if name not in self.found:
            raise Skipped(f"needs the {COMES_WITH.get(name, name)}")
        return self.found[name]

    @property
    def suite(self) -> Suite:
        suite: Suite = self.get("environment")
        return suite

    @property
    def model(self) -> Any:
        return self.get("model")

    @property
    def renderer(self) -> Renderer:
        renderer: Renderer = self.get("renderer")
        return renderer


def check(config: Config, mistakes: Sequence[str] = ()) -> bool:
    """Run every check, print a line for each thing found or missing; give whether all is well.

    `mistakes` are of the config itself; it holds defaults in their places.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)  # a command to copy must stay on its line
    probe, missing = Probe(config), len(mistakes)
    for line in mistakes:
        _print(console, "FAIL", "config", line)
    for name, run in CHECKS.items():
        with console.status(f"check {name}"):
            mark, lines = _attempt(run, probe)
        missing += len(lines) if mark == "FAIL" else 0
        for line in filter(None, lines):
            _print(console, mark, name, line)
        while probe.warnings:
            _print(console, "warn", name, probe.warnings.pop(0))
    if "memory" in probe.found:
        console.print("\nwhat the run needs, at most (docs/paper.md says how this is known)", markup=False)
        for line in _needs(probe):
            console.print(line, markup=False)
    if missing:
        what = "the line" if missing == 1 else f"the {missing} lines"
        console.print(f"\nnot ready: see {what} marked FAIL", markup=False)
    else:
        console.print("\nready to train", markup=False)
    return not missing


def _print(console: Any, mark: str, name: str, line: str) -> None:
    style = {"ok": "green", "FAIL": "bold red", "skip": "yellow", "warn": "yellow"}[mark]
    console.print(f"[{style}]{mark:<4}[/]  {name:<13}  ", end="")
    console.print(line, markup=False)


def _attempt(run: Callable[[Probe], str], probe: Probe) -> tuple[str, list[str]]:
    try:
        return "ok", [run(probe)]
    except Skipped as reason:
        return "skip", [str(reason)]
    except UserError as error:
        return "FAIL", error.lines
    except Exception as error:  # the lines are the report, whatever broke
        return "FAIL", [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]


def _needs(probe: Probe) -> list[str]:
    suite, config = probe.found.get("environment"), probe.config
    split = suite.splits.get(config.env.eval_split, 0) if suite else 0
    model, found = probe.found["memory"]
    return needs.report(config, model, found, split)


def versions(probe: Probe) -> str:
    import torch

    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed; run: pip install 'sgcd-kernels[trainer]'") from None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return ", ".join([*found, device])


def backends(probe: Probe) -> str:
    from sgcd_kernels import backend_status

    status = backend_status()
    if not any(s.usable for s in status.values()):
        raise UserError("no backend of sgcd_kernels is usable: " + _listed({n: s.reason for n, s in status.items()}))
    return "; ".join(f"{name}: {s.reason}" for name, s in sorted(status.items(), key=lambda pair: not pair[1].usable))


def run_directory(probe: Probe) -> str:
    from trainer import checkpoint, configfile

    configfile.refuse_another(probe.config)
    newest = checkpoint.latest(probe.config.output_dir)
    if newest is None:
        return f"{probe.config.output_dir}: a new run"
    manifest = checkpoint.verify(newest)
    return f"{probe.config.output_dir}: goes on after step {manifest['step']}"


def reporters(probe: Probe) -> str:
    from trainer.extras import need

    all_of(*(lambda name=name: need(name) for name in probe.config.report_to))
    return ", ".join(["metrics.jsonl", *probe.config.report_to])


def memory(probe: Probe) -> str:
    """Whether the device can hold the run; said before anything large is loaded."""
    if not (Path(probe.config.model.path) / "config.json").is_file():
        raise Skipped("needs the config.json of model.path; that file alone is enough")
    facts = footprint.facts(probe.config)
    found = footprint.memory(probe.config, facts)
    probe.found["memory"] = (facts, found)
    name, there_is = footprint.device()
    there = f"{size(found.total)} at the fullest moment, {name} has {size(there_is)}"
    if found.total > there_is:
        raise UserError(f"model: needs {there}. {LACKS}")
    probe.found["room"] = True
    return there


def model(probe: Probe) -> str:
    from trainer import model as policy

    policy.check_folder(probe.config.model)
    probe.get("room")
    loaded, tokenizer, renderer = policy.load(probe.config.model)
    probe.found |= {"model": loaded, "tokenizer": tokenizer, "renderer": renderer}
    millions = sum(p.numel() for p in loaded.parameters()) / 1e6
    return f"{type(loaded).__name__}, {millions:.1f} M parameters, autocast {probe.config.model.autocast}"


def customer(probe: Probe) -> str:
    """The endpoint that plays the customer, where an environment has one; else there is no line."""
    from trainer.credit.endpoint import reach

    options = probe.config.env.options
    if not options.get("user_base_url"):
        probe.found["customer"] = None
        return ""
    key = str(options.get("user_api_key_env", "OPENAI_API_KEY"))
    said = reach("env.options.user_base_url", options["user_base_url"], str(options.get("user_model")), key)
    probe.found["customer"] = options["user_base_url"]
    return said


def environment(probe: Probe) -> str:
    from trainer import envs
    from trainer.evaluate import check_split

    env = probe.config.env
    suite = envs.load(env.name, **env.options)
    splits = {"train_split": env.train_split, "eval_split": env.eval_split}
    all_of(*(lambda key=key, split=split: check_split(suite, key, split) for key, split in splits.items()))
    probe.get("customer")
    all_of(*(lambda split=split: _play(suite, split, env.timeout) for split in dict.fromkeys(splits.values())))
    probe.found["environment"] = suite
    places, wanted = getattr(suite, "worlds", None), rollouts_at_once(probe.config)
    if places is not None and places < wanted:
        probe.warnings.append(f"env.options.worlds: {places}, but {wanted} rollouts could play at once; others queue")
    return f"{env.name}: {_listed(suite.splits)}; a task of each split was played"


def rollouts_at_once(config: Config) -> int:
    """Episodes of a step that the engine could sample together."""
    return min(config.engine.slots, config.groups_per_step * config.num_generations)


def _play(suite: Suite, split: str, timeout: float) -> None:
    from trainer.evaluate import refuse_one

    try:
        asyncio.run(refuse_one(suite, suite.tasks(split)[0], timeout))
    except asyncio.TimeoutError:
        raise UserError(
            f"env: the first task of {split} took longer than env.timeout = {timeout:g} s for one call"
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"env: the first task of {split} broke: {error or type(error).__name__}") from None


def renderer(probe: Probe) -> str:
    """The student's prompt fits, says what it says in pieces too, and an empty reference changes nothing in it."""
    task = probe.suite.tasks(probe.config.env.train_split)[0]
    messages, tools = asyncio.run(_first_messages(probe, task))
    ids = probe.renderer.prompt(messages, tools)
    room = probe.config.model.max_length - len(ids)
    if room <= 0:
        raise UserError(
            f"model.max_length: {probe.config.model.max_length}, but a prompt has {len(ids)} tokens; raise it"
        )
    if "".join(probe.renderer.pieces(ids)) != probe.renderer.decode(ids):
        raise UserError("model.renderer: pieces and text of a prompt differ; is it the renderer of this tokenizer?")
    if probe.renderer.prompt(messages, tools, "") != ids:
        raise UserError(
            "model.renderer: an empty reference changes the prompt; a teacher without one would not be blind"
        )
    taught = probe.renderer.prompt(messages, tools, PROBE_REFERENCE)
    if taught == ids:
        raise UserError("model.renderer: a reference does not reach the teacher's prompt")
    return f"a prompt has {len(ids)} tokens, {room} are left for the rollout"


async def _first_messages(probe: Probe, task: Any) -> Any:
    world = probe.suite.make()
    try:
        return await world.reset(task)
    finally:
        await world.close()


def engine(probe: Probe) -> str:
    """The servers are there and fit the config, or the package that would start one is."""
    config = probe.config.engine
    if config.name == "hf":
        said = f"hf: in this process, {config.slots} slots"
    else:
        from trainer.engines import vllm_launch

        if config.vllm_mode == "colocate":
            said = f"vllm {vllm_launch.check_here()}: in this process"
        elif config.urls:
            said = vllm_launch.inspect(probe.config)
        else:
            found = vllm_launch.check_python(config.python)
            said = f"vllm {found}: a server will be started with {config.python}"
    probe.found["engine"] = config.name
    return said


def scoring(probe: Probe) -> str:
    """Two short rollouts, scored under a reference: divergences are finite, and engine and trainer agree."""
    import torch

    from trainer.clock import Clock
    from trainer.packing import LossTokens, forward
    from trainer.scoring import Scorer, prepare

    if probe.config.top_p < 1:
        raise UserError(f"top_p: got {probe.config.top_p:g}, training needs 1: a cut distribution biases the gradient")
    probe.get("engine")
    group = asyncio.run(_short_group(probe))
    group.reference = PROBE_REFERENCE
    pupils = prepare([group], [1.0, -1.0], probe.suite, probe.renderer)
    pad = probe.renderer.pad_id
    with torch.no_grad():
        student = forward(probe.model, [r.prompt_ids for r in group.rollouts], group.rollouts, pad)
    tokens = LossTokens.of(group.rollouts, student.device)
    scorer = Scorer(probe.model, pad, probe.config.temperature, probe.config.credit, Clock())
    scored = scorer.score(pupils, tokens, student).scored
    masks = [torch.tensor(s.rollout.generated) for s in scored]
    divergence = torch.cat([s.divergence[m] for s, m in zip(scored, masks)])
    if not bool(torch.isfinite(divergence).all()) or bool((divergence < 0).any()):
        raise UserError("scoring: a divergence is negative or not finite; is the model damaged?")
    drift = max(
        float((s.student_logp - torch.tensor(s.rollout.logprobs))[m].abs().max()) for s, m in zip(scored, masks)
    )
    if drift > (SERVED_DRIFT if probe.config.engine.name == "vllm" else DRIFT[probe.config.model.autocast]):
        raise UserError(f"engine and trainer differ by {drift:.3g} in a log-prob; ratios would be biased")
    return f"{len(divergence)} tokens, mean divergence {divergence.mean():.3g}, engine and trainer agree to {drift:.1g}"


async def _short_group(probe: Probe) -> Group:
    from trainer import engines
    from trainer.rollout import run_group

    config = probe.config
    task = probe.suite.tasks(config.env.train_split)[0]
    length = config.model.max_length
    beside = config.output_dir.parent / f".check-{config.output_dir.name}"  # a server's weights and log, not a run's
    slots = config.engine.model_copy(update={"slots": 2})
    small = config.model_copy(update={"engine": slots, "output_dir": beside})
    sampling = Sampling(config.temperature, config.top_p, min(16, config.max_completion_length))
    env = config.env.model_copy(update={"max_turns": 2})
    try:
        engine = engines.make(small, probe.model, probe.renderer)
        group, _ = await run_group(engine, probe.suite, probe.renderer, task, sampling, env, length, 2)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if len(group.rollouts) < 2:
        raise UserError(f"env: a rollout of the first task broke twice: {group.problem}")
    return group


def writer(probe: Probe) -> str:
    from trainer.credit import writers
    from trainer.credit.endpoint import reach

    config = probe.config
    if config.arm == "grpo":
        return "not used by this arm"
    if config.writer.name != "openai":
        return f"{config.writer.name}: offline"
    said: list[str] = []
    chosen = config.writer
    suite: Any = probe.found.get("environment")
    all_of(
        lambda: writers.load(chosen, suite, probe.found.get("renderer")),
        lambda: said.append(reach("writer.base_url", chosen.base_url, chosen.model, chosen.api_key_env)),
    )
    return said[0]


def disk(probe: Probe) -> str:
    config = probe.config
    facts, _ = probe.get("memory")
    need = sum(part.size for part in needs.disk(config, facts))
    place = next(p for p in (config.output_dir.absolute(), *config.output_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(f"output_dir: {size(free)} free, the run needs {size(need)}; lower save_total_limit or move it")
    return f"{size(free)} free, the run needs {size(need)}"


def _listed(pairs: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


CHECKS: dict[str, Callable[[Probe], str]] = {
    "versions": versions,
    "backends": backends,
    "run directory": run_directory,
    "reports": reporters,
    "memory": memory,
    "model": model,
    "customer": customer,
    "environment": environment,
    "renderer": renderer,
    "engine": engine,
    "scoring": scoring,
    "writer": writer,
    "disk": disk,
}
