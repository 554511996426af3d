"""The checks: each runs one small part of the real thing, and returns a line about what it found.

A check raises a `UserError` with the remedy, or `Skipped` if it depends on an earlier check that failed.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import plugins
from trainer.data import Group, Sampling, Task
from trainer.errors import ReportedError, UserError, all_of
from trainer.preflight import memory_footprint, run_costs
from trainer.preflight.memory_footprint import size
from trainer.preflight.probe import Probe, Skipped, require
from trainer.protocols import Suite

if TYPE_CHECKING:
    from trainer.config import Config

PACKAGES = ("torch", "transformers", "pydantic", "openai", "safetensors")
DRIFT = {"off": 1e-3, "bfloat16": 0.5, "auto": 0.5}  # by autocast: most that engine and trainer may differ
SERVED_DRIFT = 0.5  # another engine than hf has its own kernels, and a server by default bf16
PROBE_REFERENCE = "check first , then act"
LIMITS = (
    "The trainer is one process on one device: no FSDP, weights, gradients and moments in fp32, nothing offloaded. "
    "Take a larger device, --model.gradient_checkpointing true, a smaller model.max_length or tokens_per_microbatch, "
    "or model.lora"
)


def check_versions(probe: Probe) -> str:
    import torch

    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed; run: pip install 'sgcd-kernels[trainer]'") from None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return ", ".join([*found, device])


def check_backends(probe: Probe) -> str:
    from sgcd_kernels import backend_status

    status = backend_status()
    if not any(s.usable for s in status.values()):
        raise UserError("no backend of sgcd_kernels is usable: " + _list({n: s.reason for n, s in status.items()}))
    return "; ".join(f"{name}: {s.reason}" for name, s in sorted(status.items(), key=lambda pair: not pair[1].usable))


def check_run_directory(probe: Probe) -> str:
    from trainer.preflight import config_file
    from trainer.records import checkpoint

    config_file.refuse_another(probe.config)
    notes: list[str] = []
    newest = checkpoint.latest(probe.config.output_dir, notes.append)
    if newest is None:
        return f"{probe.config.output_dir}: a new run"
    return "; ".join([f"{probe.config.output_dir}: resumes after {newest.name}", *notes])


def check_reports(probe: Probe) -> str:
    from trainer.optional_packages import need

    all_of(*(lambda name=name: need(name) for name in probe.config.report_to))
    return ", ".join(["metrics.jsonl", *probe.config.report_to])


def check_memory(probe: Probe) -> str:
    """Whether the device can hold the run, before anything large is loaded."""
    if not (Path(probe.config.model.path) / "config.json").is_file():
        raise Skipped("needs the config.json of model.path; that file alone is enough")
    probe.facts = memory_footprint.facts(probe.config)
    probe.memory = memory_footprint.memory(probe.config, probe.facts)
    name, available = memory_footprint.device()
    comparison = f"{size(probe.memory.total)} at the fullest moment, {name} has {size(available)}"
    if probe.memory.total > available:
        raise UserError(f"model: needs {comparison}. {LIMITS}")
    probe.fits = True
    return comparison


def check_model(probe: Probe) -> str:
    from trainer.learning import model as policy

    policy.check_folder(probe.config.model)
    require(probe.fits, "memory")
    probe.model, _, probe.renderer = policy.load(probe.config.model)
    millions = sum(p.numel() for p in probe.model.parameters()) / 1e6
    return f"{type(probe.model).__name__}, {millions:.1f} M parameters, autocast {probe.config.model.autocast}"


def check_user_simulator(probe: Probe) -> str:
    """The endpoint of the user simulator, where an environment has one; without one there is no line."""
    from trainer.references.endpoint import reach

    options = probe.config.env.options
    answer = ""
    if options.get("user_base_url"):
        key = str(options.get("user_api_key_env", "OPENAI_API_KEY"))
        answer = reach("env.options.user_base_url", options["user_base_url"], str(options.get("user_model")), key)
    probe.user_simulator = True
    return answer


def check_environment(probe: Probe) -> str:
    from trainer import envs

    env = probe.config.env
    suite = envs.load(env.name, **env.options)
    splits = {"train_split": env.train_split, "eval_split": env.eval_split}
    all_of(*(lambda key=key, split=split: envs.check_split(suite, key, split) for key, split in splits.items()))
    require(probe.user_simulator, "user simulator")
    all_of(*(lambda split=split: _play(suite, split, env.timeout) for split in dict.fromkeys(splits.values())))
    probe.suite = suite
    places, wanted = getattr(suite, "worlds", None), rollouts_at_once(probe.config)
    if places is not None and places < wanted:
        probe.warnings.append(f"env.options.worlds: {places}, but {wanted} rollouts could play at once; others queue")
    return f"{env.name}: {_list(suite.splits)}; a task of each split was played"


def rollouts_at_once(config: Config) -> int:
    """How many episodes of a step the engine could sample at the same time."""
    return min(config.engine.slots, config.groups_per_step * config.num_generations)


def _play(suite: Suite, split: str, timeout: float) -> None:
    from trainer.evaluation.evaluate import refuse_one

    try:
        asyncio.run(refuse_one(suite, suite.tasks(split)[0], timeout))
    except ReportedError:
        raise
    except Exception as error:
        raise UserError(f"env: the first task of {split} broke: {error or type(error).__name__}") from None


def check_renderer(probe: Probe) -> str:
    """The student's prompt fits, its pieces spell it, and an empty reference changes nothing in it."""
    suite, renderer = require(probe.suite, "environment"), require(probe.renderer, "model")
    task = suite.tasks(probe.config.env.train_split)[0]
    messages, tools = asyncio.run(_reset(suite, task))
    ids = renderer.prompt(messages, tools)
    room = probe.config.model.max_length - len(ids)
    if room <= 0:
        raise UserError(
            f"model.max_length: {probe.config.model.max_length}, but a prompt has {len(ids)} tokens; raise it"
        )
    if "".join(renderer.pieces(ids)) != renderer.decode(ids):
        raise UserError("model.renderer: pieces and text of a prompt differ; is it the renderer of this tokenizer?")
    if renderer.prompt(messages, tools, "") != ids:
        raise UserError(
            "model.renderer: an empty reference changes the prompt; a teacher without one would not be blind"
        )
    if renderer.prompt(messages, tools, PROBE_REFERENCE) == ids:
        raise UserError("model.renderer: a reference does not reach the teacher's prompt")
    return f"a prompt has {len(ids)} tokens, {room} are left for the rollout"


async def _reset(suite: Suite, task: Task) -> Any:
    environment = suite.make()
    try:
        return await environment.reset(task)
    finally:
        await environment.close()


def check_engine(probe: Probe) -> str:
    """The servers are there and fit the config, or the package that would start one is."""
    config = probe.config.engine
    if config.name == "hf":
        answer = f"hf: in this process, {config.slots} slots"
    elif config.name != "vllm":
        plugins.find("engine.name", config.name, plugins.ENGINES)
        answer = f"{config.name}: a plug-in"
    else:
        from trainer.engines import vllm_launch

        if config.vllm_mode == "colocate":
            answer = f"vllm {vllm_launch.check_here()}: in this process"
        elif config.urls:
            answer = vllm_launch.inspect(probe.config)
        else:
            found = vllm_launch.check_python(config.python)
            answer = f"vllm {found}: a server will be started with {config.python}"
    probe.engine = True
    return answer


def check_scoring(probe: Probe) -> str:
    """Two short rollouts, scored under a reference: divergences are finite, and engine and trainer agree."""
    import torch

    from sgcd_kernels import CreditConfig, output_head
    from trainer.learning.scoring import Scorer, prepare_samples

    if probe.config.top_p < 1:
        raise UserError(f"top_p: got {probe.config.top_p:g}, training needs 1: a cut distribution biases the gradient")
    require(probe.engine, "engine")
    suite, renderer = require(probe.suite, "environment"), require(probe.renderer, "model")
    group = asyncio.run(_sample_short_group(probe))
    group.reference = PROBE_REFERENCE
    samples = prepare_samples([group], [1.0, -1.0], suite, renderer)
    head = output_head(probe.model)
    scorer = Scorer(probe.model, head, renderer.pad_id, probe.config.temperature, CreditConfig())
    with torch.no_grad():
        batch = scorer.forward(samples)
        scored = batch.unpack(scorer.without_loss(batch, scorer.score(batch)))
    masks = [torch.tensor(s.rollout.generated) for s in scored]
    divergence = torch.cat([s.divergence[m] for s, m in zip(scored, masks)])
    if not bool(torch.isfinite(divergence).all()) or bool((divergence < 0).any()):
        raise UserError("scoring: a divergence is negative or not finite; is the model damaged?")
    drift = max(
        float((s.student_logp - torch.tensor(s.rollout.logprobs))[m].abs().max()) for s, m in zip(scored, masks)
    )
    if drift > (DRIFT[probe.config.model.autocast] if probe.config.engine.name == "hf" else SERVED_DRIFT):
        raise UserError(f"engine and trainer differ by {drift:.3g} in a log-prob; ratios would be biased")
    return f"{len(divergence)} tokens, mean divergence {divergence.mean():.3g}, engine and trainer agree to {drift:.1g}"


async def _sample_short_group(probe: Probe) -> Group:
    from trainer import engines
    from trainer.rollout.episode import RolloutSetup
    from trainer.rollout.siblings import run_group

    config, suite, renderer = probe.config, require(probe.suite, "environment"), require(probe.renderer, "model")
    task = suite.tasks(config.env.train_split)[0]
    beside = config.output_dir.parent / f".check-{config.output_dir.name}"  # a server's weights and log, not a run's
    slots = config.engine.model_copy(update={"slots": 2})
    small = config.model_copy(update={"engine": slots, "output_dir": beside})
    sampling = Sampling(config.temperature, config.top_p, min(16, config.max_completion_length))
    env = config.env.model_copy(update={"max_turns": 2})
    beside.mkdir(parents=True, exist_ok=True)
    try:
        engine = engines.make(small, probe.model, renderer)
        setup = RolloutSetup(engine, suite, renderer, sampling, env, config.model.max_length)
        group = await run_group(setup, task, 2)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if len(group.rollouts) < 2:
        raise UserError(f"env: a rollout of the first task broke twice: {group.problem}")
    return group


def check_writer(probe: Probe) -> str:
    """The endpoint is there, has the model, and answers a short request of the kind that asks for a reference."""
    from trainer.references import writers
    from trainer.references.endpoint import reach

    config = probe.config.writer
    if probe.config.arm == "grpo":
        return "not used by this arm"
    answers: list[str] = []
    loaded: list[Any] = []
    suite: Any = probe.suite  # the writer asks it for the key of its endpoint, if there is a suite
    if config.name != "openai":
        kind = (
            "a plug-in" if isinstance(writers.load(config, suite, probe.renderer), writers.CheckedWriter) else "offline"
        )
        return f"{config.name}: {kind}"
    all_of(
        lambda: loaded.append(writers.load(config, suite, probe.renderer)),
        lambda: answers.append(reach("writer.base_url", config.base_url, config.model, config.api_key_env)),
    )
    return f"{answers[0]}; {asyncio.run(loaded[0].probe())}"


def check_rewards(probe: Probe) -> str:
    from trainer.rollout import rewards

    config = probe.config
    grading = rewards.load(config.rewards, config.success_threshold)
    threshold = config.success_threshold
    success = "as the verifier says, else above the group's mean" if threshold is None else f"from {threshold:g}"
    return f"{' + '.join(f'{r.weight:g} x {r.name}' for r in grading.rewards)}; success {success}"


def check_disk(probe: Probe) -> str:
    config, facts = probe.config, require(probe.facts, "memory")
    need = sum(part.size for part in run_costs.disk(config, facts))
    place = next(p for p in (config.output_dir.absolute(), *config.output_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(f"output_dir: {size(free)} free, the run needs {size(need)}; lower save_total_limit or move it")
    return f"{size(free)} free, the run needs {size(need)}"


def _list(pairs: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


CHECKS: dict[str, Callable[[Probe], str]] = {
    "versions": check_versions,
    "backends": check_backends,
    "run directory": check_run_directory,
    "reports": check_reports,
    "memory": check_memory,
    "model": check_model,
    "user simulator": check_user_simulator,
    "environment": check_environment,
    "rewards": check_rewards,
    "renderer": check_renderer,
    "engine": check_engine,
    "scoring": check_scoring,
    "writer": check_writer,
    "disk": check_disk,
}
