"""What a causal LM does between its last hidden states and its logits, measured by running it.

transformers has no common name for a scale or a softcap of logits: each model's forward reads fields of its own config,
and models from elsewhere add theirs. So nothing is known by name here. The model's own forward runs twice on a stub
decoder, which returns hidden states of our choice: once with stand-in numbers in place of the head's, in fp64, which
gives scale and softcap to rounding, and once with the real ones, which every logit is compared with.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from sgcd_kernels.core.validation import check_dtype

STAND_IN = 64  # rows of the stand-in weight, at most
SIZES = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # of the products hidden weight^T, one per token
SATURATED = (1e8, 2e8)  # two more: under any softcap their logits are the same
SATURATED_HALF = (5e3, 1e4)  # fp16 ends at 65,504
REAL_SIZES = (0.0, 1.0, 10.0, 100.0)
CHUNK = 8192  # rows of a real weight that are widened at a time


class LogitOptions(TypedDict):
    """Keywords of every op that reads a head."""

    bias: Tensor | None  # [V]
    softcap: float | None
    temperature: float | Tensor  # a number, or per token


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap(scale * hidden @ weight^T + bias), where softcap(z) = c tanh(z / c): a causal LM's own.

    Parameters are read from the layer at each use, so an optimiser, FSDP or a merge may replace them in between.

    >>> import torch
    >>> head = OutputHead(torch.nn.Linear(8, 32, bias=False), scale=0.125, softcap=30.0)
    >>> head.options(temperature=0.7)
    {'bias': None, 'softcap': 240.0, 'temperature': 5.6}
    """

    layer: Any  # the module that holds the parameters
    scale: float = 1.0  # above 0
    softcap: float | None = None
    bias_scale: float = 1.0  # the bias is this times the layer's: a model may scale before or after adding it

    @property
    def weight(self) -> Tensor:  # [V, H]
        weight: Tensor = self.layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:  # [V]
        return _times(getattr(self.layer, "bias", None), self.bias_scale)

    def options(self, temperature: float | Tensor = 1.0) -> LogitOptions:
        """The keywords bias, softcap and temperature with which any op computes these logits from `weight`.

        The ops know no scale s, and need none: softcap(s x + b, c) / T = softcap(x + b / s, c / s) / (T / s).
        """
        bias = _times(getattr(self.layer, "bias", None), self.bias_scale / self.scale)
        softcap = None if self.softcap is None else self.softcap / self.scale
        return LogitOptions(bias=bias, softcap=softcap, temperature=temperature / self.scale)

    def logits(self, hidden: Tensor) -> Tensor:  # [..., H] -> [..., V]
        """Materialised logits, for a sampler: a few tokens."""
        bias = _times(getattr(self.layer, "bias", None), self.bias_scale / self.scale)
        logits = nn.functional.linear(hidden, self.weight, bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _times(bias: Tensor | None, factor: float) -> Tensor | None:
    return bias if bias is None or factor == 1.0 else bias * factor


def output_head(model: nn.Module, *, decoder: nn.Module | None = None) -> OutputHead:
    """Measure the head of a Hugging Face style causal LM.

    `model` needs `get_output_embeddings()`, `get_decoder()` and a forward that takes `input_ids` and returns `logits`
    (or a tuple that begins with them). `decoder`, by default `get_decoder()`, is the submodule whose last hidden states
    the caller will give to an op. Wrappers of peft, DDP and torch.compile are looked through. Nothing of the model is
    changed, and no random number is drawn. The cost is that of the head on four tokens; the decoder does not run.

    On the meta device the real weight cannot be compared, and a sharded one (a DTensor) is not; the stand-in is.

    Raises ValueError, with what the model does instead, for
    - a model without output embeddings, or a head that is quantised or has an adapter: `weight` would not be the head;
    - prompt, prefix and p-tuning: the decoder alone does not read their virtual tokens;
    - logits that are not softcap(scale * hidden @ weight^T + bias) of the decoder's hidden states, for a scale above 0:
      layers in between, a normalised weight, another bias, masked or missing vocab ids;
    - a forward that cannot be run this way.

    >>> output_head(torch.nn.Linear(8, 32))
    Traceback (most recent call last):
    ValueError: model is a Linear, needs get_output_embeddings() to give its head
    """
    model = _unwrapped(model)
    layer = head_layer(model)
    if decoder is None:
        decoder = _decoder(model)
    run = _Run(model, layer, decoder)
    with _undisturbed(model, layer.weight.device):
        head = run.measure()
        if not run.unreadable:
            run.compare(head, run.real(REAL_SIZES, head.scale))
        elif layer.weight.is_meta:
            run.check_rows()
    return head


def head_layer(model: nn.Module) -> Any:
    """The layer whose weight is the head's. Raises ValueError where its weight is not a plain [V, H] of floats."""
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if callable(find) else None
    if layer is None:
        raise ValueError(f"model is a {type(model).__name__}, needs get_output_embeddings() to give its head")
    if hasattr(layer, "base_layer"):  # peft's name for the wrapped layer, for adapters of all kinds
        raise ValueError(
            "the head has an adapter on it, needs none: its own weight is only the frozen part; leave the head out of "
            "target_modules, or train it whole (modules_to_save)"
        )
    layer = getattr(layer, "_orig_mod", layer)  # of torch.compile
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):  # PyTorch's own quantised layers have a method of that name
        raise ValueError(
            f"the head is a {type(layer).__name__}, needs a plain weight tensor: keep the head unquantised"
        )
    # bitsandbytes, GPTQ and fp8 are seen by their dtype; torchao, which reports a float one, by its class.
    if type(weight) not in (Tensor, nn.Parameter) and not _sharded(weight):
        kind = type(weight).__name__
        raise ValueError(f"the head's weight is a {kind}, needs a plain tensor: keep the head unquantised")
    check_dtype("the head's weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"the head's weight has shape {list(weight.shape)}, needs [V, H]")
    return layer


def _sharded(weight: Tensor) -> bool:
    return hasattr(weight, "placements")  # a DTensor, of plain tensors


def _unwrapped(model: Any) -> Any:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):  # peft
            adapter: Any = getattr(model, "active_peft_config", None)
            if getattr(adapter, "is_prompt_learning", False):
                raise ValueError(
                    f"model has a {adapter.peft_type.value} adapter, needs one within its decoder, such as LoRA: what "
                    "it puts before the prompt is not in the decoder's hidden states"
                )
            model = model.get_base_model()
        else:
            return model


def _decoder(model: Any) -> nn.Module:
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise ValueError(
            f"model is a {type(model).__name__}, needs get_decoder() to give the part that ends in hidden states"
        )
    return decoder


class _Products(NamedTuple):
    """What a run gives: everything of K vocab ids and T tokens in fp64."""

    hidden: Tensor  # [T, H], in the dtype that ran
    products: Tensor  # [T, K] hidden weight^T
    norms: Tensor  # [T, K] |hidden| |weight|: what rounding errors of a product are relative to
    bias: Tensor | None  # [K] the layer's
    logits: Tensor  # [T, K] the model's
    eps: float  # of the coarsest dtype that the model computed in, as far as one can see


@dataclass
class _Run:
    """Runs of one model's forward after its decoder."""

    model: Any
    layer: Any
    decoder: nn.Module

    @property
    def unreadable(self) -> bool:
        """Whether the real weight has no numbers, or not all of them on this rank."""
        return bool(self.layer.weight.is_meta or _sharded(self.layer.weight))

    def measure(self) -> OutputHead:
        try:
            run = self.stand_in()
        except (ValueError, LookupError) as error:
            if self.unreadable:
                raise error if isinstance(error, ValueError) else self._refusal(str(error)) from None
            # Some forwards need every row of the head, or its dtype; then the real one is all there is to measure.
            half = self.layer.weight.dtype == torch.float16
            run = self.real((*SIZES, *(SATURATED_HALF if half else SATURATED)))
        found = fit(run)
        if found is None:
            raise self._refusal("its logits do not depend on them")
        scale, softcap, bias_scale = found
        head = OutputHead(self.layer, scale, softcap, bias_scale)
        self.compare(head, run)
        if scale <= 0:
            raise self._refusal(f"it multiplies by a scale of {scale:g}, needs one above 0")
        return head

    def stand_in(self) -> _Products:
        """A run with a few rows of other numbers in place of the head's, in fp64."""
        real, real_bias = self.layer.weight, getattr(self.layer, "bias", None)
        device = torch.device("cpu") if real.is_meta else real.device
        rows, width = min(STAND_IN, real.shape[0]), real.shape[1]
        weight = _normal(0, rows, width).to(device)
        weight *= torch.linspace(0.5, 2.0, rows, dtype=weight.dtype, device=device)[:, None]  # normalising would show
        hidden = _hidden((*SIZES, *SATURATED), weight.norm(dim=1), width)
        swaps, bias = [(real, weight)], None
        if real_bias is not None:
            bias = _normal(1, rows).to(device) / 10
            swaps.append((real_bias, bias))
        with _swapped(self.model, swaps), _without_hooks(self.layer) if _sharded(real) else contextlib.nullcontext():
            logits = self._logits(hidden, rows)
        return _products(hidden, [weight], bias, logits)

    def real(self, sizes: tuple[float, ...], scale: float = 1.0) -> _Products:
        """A run with the model's own weight, in its own dtype."""
        weight, bias = self.layer.weight.detach(), getattr(self.layer, "bias", None)
        parts = weight.split(CHUNK)
        norms = torch.cat([part.float().norm(dim=1) for part in parts]).double()
        most = SATURATED_HALF[1] if weight.dtype == torch.float16 else math.inf
        wanted = tuple(min(size / scale, most) for size in sizes)
        hidden = _hidden(wanted, norms, weight.shape[1]).to(weight.dtype)
        return _products(hidden, parts, bias, self._logits(hidden, weight.shape[0]))

    def check_rows(self) -> None:
        """Refuse a model without numbers whose logits are not one per row of its head."""
        weight = self.layer.weight
        self._logits(torch.empty(len(REAL_SIZES), weight.shape[1], dtype=weight.dtype, device="meta"), weight.shape[0])

    def _logits(self, hidden: Tensor, rows: int) -> Tensor:  # [T, H] -> [T, rows]
        ids = torch.arange(len(hidden), device=self.layer.weight.device)[None] % rows
        try:
            with _returning(self.decoder, hidden[None]):
                out = self._call(input_ids=ids)
            logits: Tensor = out[0] if getattr(out, "logits", None) is None else out.logits
            shape, wanted = list(logits.shape), [1, len(hidden), rows]
        except Exception as error:
            raise self._refusal(f"its forward cannot be run ({_line(error)})") from error
        if shape != wanted:
            raise self._refusal(f"it gives logits {shape}, not {wanted}")
        return logits[0].to(hidden.device)

    def _call(self, input_ids: Tensor) -> Any:
        """The model's forward, with its hooks, which may change logits; a sharded model's would gather its weights."""
        run = self.model.forward if _sharded(self.layer.weight) else self.model
        return run(input_ids=input_ids)

    def compare(self, head: OutputHead, run: _Products) -> None:
        """Refuse a head that does not give the model's logits, up to rounding."""
        want = head.scale * run.products
        if run.bias is not None:
            want += head.bias_scale * run.bias
        summed = torch.finfo(torch.float32).eps  # products of 16 bits are summed in fp32
        if run.hidden.is_cuda and run.hidden.dtype == torch.float32:
            summed = 2**-11  # TF32, where it is switched on
        bound = 16 * run.eps * want.abs() + 64 * min(run.eps, summed) * abs(head.scale) * run.norms
        if head.softcap is not None:
            want = head.softcap * torch.tanh(want / head.softcap)
            slope = 1 - (want / head.softcap).square()
            bound = 16 * run.eps * head.softcap + slope * bound
        bound += torch.finfo(torch.float32).tiny
        off = (run.logits - want).abs()
        right = off <= bound
        if not bool(right.all()):
            worst = float(torch.where(off.isfinite(), off, torch.inf).max())
            where = "" if bool(right[0].all()) else "; at hidden states of 0 they are not the layer's bias"
            raise self._refusal(f"its logits differ by up to {worst:.3g}{where}")

    def _refusal(self, what: str) -> ValueError:
        between = self._between()
        layers = f"; between them runs {between}" if between else ""
        return ValueError(
            f"{type(self.model).__name__} does not compute softcap(scale * hidden @ weight^T + bias) from the hidden "
            f"states of its decoder: {what}{layers}"
        )

    def _between(self) -> str:
        """The layers, but for the head, that the model runs after its decoder."""
        weight = self.layer.weight
        names = {id(module): name for name, module in self.model.named_modules()}
        called: dict[str, str] = {}

        def record(module: nn.Module, _: Any) -> None:
            leaf = next(module.children(), None) is None
            if leaf and id(module) in names and module is not self.layer and after:
                called[names[id(module)]] = type(module).__name__

        after: list[bool] = []
        hidden = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        ids = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        hook = nn.modules.module.register_module_forward_pre_hook(record)
        try:
            with _returning(self.decoder, hidden, lambda: after.append(True)):
                self._call(input_ids=ids)
        except Exception:  # the layers until then are the answer
            pass
        finally:
            hook.remove()
        return ", ".join(f"{name} ({kind})" for name, kind in called.items())


def fit(run: _Products) -> tuple[float, float | None, float] | None:
    """(scale, softcap, bias_scale) of the logits; None if no scale fits. The last two tokens are the saturated ones."""
    low, high = (float(x.abs().max()) for x in run.logits[-2:])
    softcap = None
    linear, usable = run.logits, run.logits.isfinite()
    if high < 1.5 * low:
        softcap = _simplest(high, run.eps)
        usable &= linear.abs() < 0.9 * softcap
        linear = softcap * torch.atanh((linear / softcap).clamp(-0.95, 0.95))
    bias_scale = 1.0
    if run.bias is not None and bool(run.bias.any()):
        at_zero, bias = linear[0][usable[0]], run.bias[usable[0]]
        if bool(bias.any()):
            bias_scale = _simplest(float((at_zero * bias).sum() / (bias * bias).sum()), run.eps)
        linear = linear - bias_scale * run.bias
    full = usable.sum(1) * 2 >= usable.shape[1]
    row = int(full.nonzero()[-1]) if bool(full[1:].any()) else 0
    x = run.products[row]
    chosen = usable[row] & (x.abs() >= x.abs().median()) & (x != 0)
    if not bool(chosen.any()):
        return None
    scale = float((linear[row] / x)[chosen].median())
    return _simplest(scale, run.eps), softcap, bias_scale


def _simplest(value: float, eps: float) -> float:
    """The number of fewest digits that is equal to `value` up to rounding."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((x for x in rounded if abs(x - value) <= 4 * eps * abs(value)), value)


def _products(hidden: Tensor, parts: Any, bias: Tensor | None, logits: Tensor) -> _Products:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    products = torch.cat([hidden.to(wide) @ part.to(wide).T for part in parts], dim=1).double()
    norms = hidden.double().norm(dim=1)[:, None] * torch.cat([part.to(wide).norm(dim=1) for part in parts]).double()
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(hidden.dtype).eps)
    return _Products(hidden, products, norms, None if bias is None else bias.detach().double(), logits.double(), eps)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")


def _hidden(sizes: tuple[float, ...], norms: Tensor, width: int) -> Tensor:  # [T, H] fp64
    """One token per size: its products with rows of such norms are about as large."""
    usual = float(norms.square().mean().sqrt()) or 1.0
    states = _normal(2, len(sizes), width)
    states[-1] = states[-2]  # then the logits of the two saturated tokens differ as their sizes do, but for a softcap
    return (states * torch.tensor(sizes, dtype=torch.float64, device="cpu")[:, None] / usual).to(norms.device)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _States(tuple[Tensor, ...]):
    """A decoder's output, whichever way a model reads it: only the hidden states are there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


@contextlib.contextmanager
def _returning(decoder: nn.Module, states: Tensor, called: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let `decoder` return `states`, [1, T, H].

    Its class is replaced, so that hooks (FSDP's, accelerate's, a user's) and compiled calls are left out.
    """

    def stub(self: Any, *args: Any, **kwargs: Any) -> _States:
        called()
        return _States((states,))

    with _of_class(decoder, __call__=stub, forward=stub):
        yield


@contextlib.contextmanager
def _without_hooks(layer: nn.Module) -> Iterator[None]:
    """A sharded layer's hooks would put its own parameters back."""
    with _of_class(layer, __call__=lambda self, *args, **kwargs: self.forward(*args, **kwargs)):
        yield


@contextlib.contextmanager
def _of_class(module: nn.Module, **methods: Any) -> Iterator[None]:
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), methods)
    try:
        yield
    finally:
        module.__class__ = kind


@contextlib.contextmanager
def _swapped(model: nn.Module, swaps: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put other numbers in place of parameters, wherever the model holds them: an embedding may be tied to the head."""
    places = [
        (module._parameters, name, own, other)
        for module in model.modules()
        for name, own in module._parameters.items()
        for real, other in swaps
        if own is real
    ]
    if len({id(own) for _, _, own, _ in places}) < len(swaps):
        raise LookupError("the head's weight is computed, not a parameter")
    try:
        for parameters, name, _, other in places:
            parameters[name] = nn.Parameter(other, requires_grad=False)
        yield
    finally:
        for parameters, name, own, _ in places:
            parameters[name] = own


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the model eagerly, in evaluation mode, outside autograd and autocast; restore modes and random states."""
    training = [module for module in model.modules() if module.training]
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    kind = "cpu" if device.type == "meta" else device.type
    forked = torch.random.fork_rng([device], device_type=kind) if kind != "cpu" else torch.random.fork_rng([])
    with torch.no_grad(), torch.autocast(kind, enabled=False), forked, eager:
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
