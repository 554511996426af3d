"""The config of a run, as typed fields. Names follow TRL where possible; *R* marks choices the paper leaves open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sgcd_kernels import CreditConfig
from sgcd_kernels.core.spelling import explain_choice
from trainer import plugins


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested data."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from (text for item in (*value, *value.values()) for text in _texts(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _texts(item))


class Section(BaseModel):
    """A group of fields that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _has_no_nul(cls, value: Any) -> Any:
        """No name of a file, argument of a process or text of a report can hold these characters."""
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for text in _texts(value) for char in text):
            raise ValueError("needs text without NUL characters and lone surrogates")
        return value


def check_name(value: str, names: Sequence[str], group: str) -> str:
    """`value` if it is one of `names` or may be a plug-in of the group."""
    if value in names or plugins.is_known(value, group):
        return value
    known = ", ".join(map(repr, [*names, *(point.name for point in plugins.installed(group))]))
    raise ValueError(f"got {value!r}, needs {known} or module:attribute{explain_choice(value, names)}")


class LoraConfig(Section):
    """Train low-rank adapters instead of the weights; names as in peft, `alpha` is its lora_alpha."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)  # adapters are scaled by alpha / rank
    target_modules: str | list[str] = "all-linear"  # all of the decoder, or names such as [q_proj, v_proj]


class ModelConfig(Section):
    path: str = "trainer/assets/workday-tiny"  # a Hugging Face folder
    made_by: str = ""  # the command that makes or fetches it, named in the error when it is missing
    renderer: Literal["compact", "chatml", "template"] = "compact"  # template: the tokenizer's own, as Qwen's
    chat_template_kwargs: dict[str, Any] = {}  # of renderer template, as in TRL: {enable_thinking: false}
    autocast: Literal["off", "bfloat16", "auto"] = "off"  # bf16 compute over fp32 weights; auto: if the hardware can
    attn_implementation: str = "sdpa"  # flash_attention_2: GPU only, with autocast
    use_liger_kernel: bool = False  # Liger's RMSNorm, SwiGLU and rotary kernels; GPU only
    gradient_checkpointing: bool = False  # recompute each layer's activations in the backward pass
    lora: LoraConfig | None = None
    max_length: int = Field(1024, gt=0, le=2**20)  # prompt + response, tokens
    cpu_threads: int = Field(0, ge=0, le=1024)  # of torch; 0 leaves it to torch, 1 is fastest for a model of a few MB


class EnvConfig(Section):
    name: str = "workday"  # or one of your own, as module:Suite (docs/environments.md)
    train_split: str = "train"
    eval_split: str = "dev"
    max_turns: int = Field(16, gt=0)
    max_observation_chars: int = Field(12_000, gt=0)
    max_response_tokens: int | None = Field(None, gt=0)  # of an episode after its prompt: turns and observations
    timeout: float = Field(60.0, gt=0)  # seconds for one reset or step; then the rollout is dropped
    options: dict[str, Any] = {}  # passed to the suite


class EngineConfig(Section):
    """`hf` samples in this process; `vllm` on the servers at `urls`, on one that is started with `python`, or here."""

    name: str = "hf"  # hf, vllm, or one of your own, as module:Engine
    options: dict[str, Any] = {}  # passed to an engine of your own
    slots: int = Field(128, gt=0, le=4096)  # sequences that decode together
    vllm_mode: Literal["server", "colocate"] = "server"  # colocate: in the trainer's process, which then needs vllm
    vllm_enable_sleep_mode: bool = False  # GPU: vLLM gives its memory back while the trainer updates
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, le=1)  # GPU: its share, started by the run or colocated
    urls: list[str] = []  # running vLLM servers, taken in turn; they see the same files as this machine
    python: str = ""  # the Python of an environment that has vllm
    server_args: list[str] = []  # further arguments of the vLLM that is started
    timeout: float = Field(600.0, gt=0)  # seconds of one request, of loading the weights, of waiting for a server
    max_retries: int = Field(3, ge=0)  # of a request, each at the next server; then the run stops with a checkpoint

    @field_validator("name")
    @classmethod
    def _names_an_engine(cls, value: str) -> str:
        return check_name(value, ("hf", "vllm"), plugins.ENGINES)

    @model_validator(mode="after")
    def _is_there(self) -> EngineConfig:
        if self.vllm_mode == "colocate" and (self.urls or self.python):
            raise ValueError(
                "vllm_mode: got colocate, which needs neither urls nor python: vLLM runs in the trainer's own"
            )
        if self.name == "vllm" and self.vllm_mode == "server" and bool(self.urls) == bool(self.python):
            raise ValueError(
                "vllm needs urls of running servers, or python, the interpreter that has vllm, or vllm_mode: colocate"
            )
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
                raise ValueError(f"urls: needs plain http(s) URLs, such as http://localhost:8000, got {url!r}")
        return self


class RewardConfig(Section):
    """One component of the reward: a function of the finished rollout, or `verifier`, the environment's own."""

    path: str  # module:function, importable from the working directory or installed; or verifier
    weight: float = 1.0
    name: str = Field("", pattern=r"^[\w.-]*$")  # in metrics and traces; default: the function's

    @field_validator("path")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if value != "verifier" and not plugins.is_known(value, plugins.REWARDS):
            raise ValueError(f"needs module:function or verifier, got {value!r}")
        return value


class WriterConfig(Section):
    """The writer of references. Its API key is read from the environment variable named here, and never stored."""

    name: str = "contrast"  # openai, none, wrong_task, empty_shell, or one of your own, as module:Writer
    options: dict[str, Any] = {}  # passed to a writer of your own
    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-5-mini"
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = Field(60.0, gt=0)  # seconds per call
    max_retries: int = Field(3, ge=0)
    concurrency: int = Field(8, gt=0)
    max_prompt_chars: int = Field(48_000, gt=0)
    max_tokens: int = Field(1_024, gt=0)  # of one reference, the thoughts of a model that thinks included
    token_budget: int | None = Field(None, gt=0)  # of the whole run, prompt and completion; None is no limit
    cache_dir: Path = Path(".cache/references")

    @field_validator("name")
    @classmethod
    def _names_a_writer(cls, value: str) -> str:
        return check_name(value, ("contrast", "openai", "none", "wrong_task", "empty_shell"), plugins.WRITERS)

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, value: str) -> str:
        """The resolved config is written to disk, so a key that was put here by mistake must be refused."""
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) or value.startswith(("sk_", "hf_")):
            raise ValueError("needs the name of an environment variable, such as OPENAI_API_KEY, not the key itself")
        return value

    @field_validator("base_url")
    @classmethod
    def _is_an_endpoint(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("needs an http(s) URL, such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("needs a plain URL without credentials or a query; keys come from writer.api_key_env")
        return value


Arm = Literal["grpo", "sgcd", "direct_sd"]


class Config(Section):
    """One run. `arm` selects the credit signal and nothing else."""

    arm: Arm = "sgcd"
    output_dir: Path = Path("runs/sgcd")
    seed: int = Field(0, ge=0, lt=2**31)
    resume_from_checkpoint: bool = True  # continue from the newest checkpoint in output_dir, if there is one

    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    engine: EngineConfig = EngineConfig()
    credit: CreditConfig = CreditConfig()
    writer: WriterConfig = WriterConfig()

    # sampling
    num_generations: int = Field(8, ge=2)  # siblings of a task
    groups_per_step: int = Field(16, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(64, gt=0)  # tokens of one assistant turn
    dynamic_sample: bool = True  # keep sampling until groups_per_step groups are mixed
    max_resample_times: int = Field(3, ge=0)  # R: then train on the mixed groups found

    # reward
    rewards: list[RewardConfig] = []  # their weighted sum trains; none: the environment's verifier alone
    # Reward from which a rollout counts as a success, for references and figures. Default: the verifier's word where it
    # gives one, else above the mean of its group.
    success_threshold: float | None = None

    # loss
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"] = "dapo"
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(0.28, gt=0)
    scale_rewards: bool = True  # divide the advantage by the group's standard deviation
    distill_kind: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # the direct_sd arm
    distill_beta: float = Field(0.5, gt=0, lt=1)
    vllm_importance_sampling_correction: bool = True  # weight a token by min(p_trainer / p_engine, clip_max)
    vllm_importance_sampling_clip_max: float = Field(2.0, gt=0)

    # optimiser
    max_steps: int = Field(40, ge=0)
    learning_rate: float = Field(3e-4, gt=0)
    lr_warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    tokens_per_microbatch: int = Field(8_192, gt=0)

    # reports
    eval_steps: int = Field(20, ge=0)  # 0: only at the end
    eval_on_start: bool = True
    eval_samples: int = Field(1, gt=0)  # rollouts of each evaluation task; pass@1 is their mean
    eval_temperature: float = Field(1.0, ge=0)
    save_steps: int = Field(20, ge=0)  # 0: only at the end
    save_total_limit: int = Field(2, gt=0)
    trace_steps: int = Field(5, ge=0)  # every how many steps all siblings are written to rollouts/
    trace_total_limit: int = Field(100, gt=0)  # of these files, the newest are kept
    report_to: list[Literal["tensorboard", "wandb"]] = []

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.max_completion_length >= self.model.max_length:
            raise ValueError(
                f"max_completion_length: got {self.max_completion_length}, "
                f"needs less than model.max_length = {self.model.max_length}"
            )
        if self.engine.name == "vllm" and self.model.lora is not None:
            raise ValueError("model.lora: got adapters, needs engine.name hf: a vLLM server is given whole weights")
        return self
