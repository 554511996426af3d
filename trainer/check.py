"""`check`: proves the installation and a config before hours are spent on them.

Each check tries the real thing, small: the model loads, a task is played, its tokens are scored. It ends in a line of
a table: what was found, or what to do. Checks go on after a failure; one that needs what failed is skipped.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from trainer.types import Group, Renderer, Sampling, Suite, UserError

if TYPE_CHECKING:
    from trainer.config import Config

PACKAGES = ("torch", "transformers", "pydantic", "openai", "safetensors")
BYTES_PER_PARAMETER = 12  # weights and two moments in fp32
DRIFT = {"off": 1e-3, "bfloat16": 0.5, "auto": 0.5}  # by autocast: most that engine and trainer may differ
SERVED_DRIFT = 0.5  # a server has its own kernels, and by default bf16
PROBE_REFERENCE = "check first , then act"


class Skipped(Exception):
    """A check that needs something an earlier one did not get."""


@dataclass
class Probe:
    """What the checks have got so far."""

    config: Config
    found: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        if name not in self.found:
            raise Skipped(f"needs the {name}")
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


def check(config: Config) -> bool:
    """Run every check, print the table; give whether all that ran passed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("check", "", "found, or what to do", title_justify="left")
    probe, passed = Probe(config), True
    for name, run in CHECKS.items():
        with console.status(f"check {name}"):
            mark, text = _attempt(run, probe)
        passed &= mark != "FAIL"
        table.add_row(name, mark, text)
    console.print(table)
    console.print("ready to train" if passed else "not ready: see the lines marked FAIL")
    return passed


def _attempt(run: Callable[[Probe], str], probe: Probe) -> tuple[str, str]:
    try:
        return "ok", run(probe)
    except Skipped as reason:
        return "skip", str(reason)
    except UserError as error:
        return "FAIL", str(error)
    except Exception as error:  # the table is the report, whatever broke
        return "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
    return _listed({name: s.reason for name, s in status.items()})


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

    for name in probe.config.report_to:
        need(name)
    return ", ".join(["metrics.jsonl", *probe.config.report_to])


def model(probe: Probe) -> str:
    from trainer import model as policy

    loaded, tokenizer, renderer = policy.load(probe.config.model)
    probe.found |= {"model": loaded, "tokenizer": tokenizer, "renderer": renderer}
    millions = sum(p.numel() for p in loaded.parameters()) / 1e6
    return f"{type(loaded).__name__}, {millions:.1f} M parameters, autocast {probe.config.model.autocast}"


def environment(probe: Probe) -> str:
    from trainer import envs
    from trainer.evaluate import check_split, refuse

    env = probe.config.env
    suite = probe.found["environment"] = envs.load(env.name, **env.options)
    for key, split in (("train_split", env.train_split), ("eval_split", env.eval_split)):
        check_split(suite, key, split)
        if not asyncio.run(refuse(suite, suite.tasks(split)[:1], env.timeout)):
            raise UserError(f"env: the first task of {split} broke; see the warning above")
    return f"{env.name}: {_listed(suite.splits)}; a task of each split was played"


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
        return f"hf: in this process, {config.slots} slots"
    from trainer.engines import vllm_launch

    if config.vllm_mode == "colocate":
        return f"vllm {vllm_launch.check_here()}: in this process"
    if config.urls:
        return vllm_launch.inspect(probe.config)
    return f"vllm {vllm_launch.check_python(config.python)}: a server will be started with {config.python}"


def scoring(probe: Probe) -> str:
    """Two short rollouts, scored under a reference: divergences are finite, and engine and trainer agree."""
    import torch

    from trainer.clock import Clock
    from trainer.packing import LossTokens, forward
    from trainer.scoring import Scorer, prepare

    if probe.config.top_p < 1:
        raise UserError(f"top_p: got {probe.config.top_p:g}, training needs 1: a cut distribution biases the gradient")
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
    from trainer import model as policy
    from trainer.rollout import run_group

    config = probe.config
    task = probe.suite.tasks(config.env.train_split)[0]
    length = config.model.max_length
    beside = config.output_dir.parent / f".check-{config.output_dir.name}"  # a server's weights and log, not a run's
    slots = config.engine.model_copy(update={"slots": 2})
    small = config.model_copy(update={"engine": slots, "output_dir": beside})
    sampling = Sampling(config.temperature, config.top_p, min(16, config.max_completion_length))
    env = config.env.model_copy(update={"max_turns": 2})
    engine = policy.engine(small, probe.model, probe.renderer)
    group, _ = await run_group(engine, probe.suite, probe.renderer, task, sampling, env, length, 2)
    shutil.rmtree(beside, ignore_errors=True)
    if len(group.rollouts) < 2:
        raise UserError("env: a rollout of the first task broke twice; see the warning above")
    return group


def writer(probe: Probe) -> str:
    from trainer.credit import writers

    config = probe.config
    if config.arm == "grpo":
        return "not used by this arm"
    writers.load(config.writer, probe.suite, probe.found.get("renderer"))
    return _reach(config) if config.writer.name == "openai" else f"{config.writer.name}: offline"


def _reach(config: Config) -> str:
    """Ask the endpoint for its models: costs nothing, and shows that it is there and takes the key."""
    import httpx

    from trainer.credit.openai_writer import is_loopback, read_key

    url = config.writer.base_url.rstrip("/") + "/models"
    loopback = is_loopback(config.writer.base_url)
    headers = {"Authorization": f"Bearer {read_key(config.writer, loopback) or 'none'}"}
    try:
        answer = httpx.get(url, headers=headers, timeout=min(10.0, config.writer.timeout), trust_env=not loopback)
    except (httpx.HTTPError, ValueError) as error:  # its text may quote headers: name the kind only
        raise UserError(f"writer.base_url: {config.writer.base_url} does not answer ({type(error).__name__})") from None
    if answer.status_code in (401, 403):
        raise UserError(f"writer: the endpoint refuses the key in ${config.writer.api_key_env}")
    return f"{config.writer.base_url} answers ({answer.status_code}), model {config.writer.model}"


def disk(probe: Probe) -> str:
    config = probe.config
    parameters = sum(p.numel() for p in probe.model.parameters() if p.requires_grad)
    need = (config.save_total_limit + 1) * BYTES_PER_PARAMETER * parameters
    place = next(p for p in (config.output_dir.absolute(), *config.output_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"output_dir: {_size(free)} free, checkpoints need {_size(need)}; lower save_total_limit or move it"
        )
    return f"{_size(free)} free, checkpoints need {_size(need)}"


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{n / 2**20:.0f} MB"


def _listed(pairs: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


CHECKS: dict[str, Callable[[Probe], str]] = {
    "versions": versions,
    "backends": backends,
    "run directory": run_directory,
    "reports": reporters,
    "model": model,
    "environment": environment,
    "renderer": renderer,
    "engine": engine,
    "scoring": scoring,
    "writer": writer,
    "disk": disk,
}
