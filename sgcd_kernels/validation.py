"""Checks shared by the ops. Every refusal names the argument, what it got and what it needs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_choice(name: str, value: str, options: Sequence[str]) -> None:
    """Refuse a word that is not one of `options`, suggesting the nearest."""
    if value in options:
        return
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} is {value!r}, needs one of {', '.join(options)}{hint}")


def check_float(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuse a number outside [low, high] ((low, high] if `open_low`), or not finite."""
    bounds = f"{'(' if open_low else '['}{low}, {high}]"
    number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    above = number > low if open_low else number >= low
    # Not math.isfinite, which torch.compile cannot trace where it takes the number for a variable.
    if not (-math.inf < number < math.inf and above and number <= high):
        raise ValueError(f"{name} is {value!r}, needs a finite number in {bounds}")


def check_int(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse what is no integer, or lies outside [low, high]."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and low <= int(value) <= high):  # type: ignore[call-overload]
        raise ValueError(f"{name} is {value!r}, needs an integer in [{low}, {high}]")


def check_jsd_beta(beta: float) -> None:
    """At an end the JSD is constantly 0, and very near one nothing is left of it but rounding."""
    if not 1e-6 <= beta <= 1 - 1e-6:
        hint = "for beta 0 or 1 as TRL means them use forward_kl or reverse_kl"
        raise ValueError(f"beta is {beta!r}, needs 1e-06 <= beta <= 1 - 1e-06 for a jsd; {hint}")


def check_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor, and a DTensor, whose shards mean different things to FSDP and to these ops."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}), needs a tensor")
    if hasattr(value, "placements"):  # not isinstance: that would import all of torch.distributed.tensor
        raise ValueError(
            f"{name} is a DTensor, needs a plain tensor: under FSDP2 call from the forward of the module that owns it, "
            f"under vocab-parallelism give {name}.to_local() and group (docs/parallel.md)"
        )


def detached(value: Tensor | None) -> Tensor | None:
    """An input that gets no gradient."""
    return None if value is None else value.detach()


def frozen(value: Tensor) -> Tensor:
    """Without a graph, and fit to enter another: what inference mode has made must be copied for that."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value.detach()


def check_hidden(name: str, hidden: Tensor) -> torch.Size:
    """Accept [N, H] or [B, T, H] of a float dtype; give the leading shape."""
    check_tensor(name, hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {list(hidden.shape)}, needs [N, H] or [B, T, H]")
    check_dtype(name, hidden)
    return hidden.shape[:-1]


def check_weight(name: str, weight: Tensor, hidden_name: str, hidden: Tensor) -> None:
    """Accept [V, H] of a float dtype, H and device those of `hidden`."""
    check_tensor(name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        needs = f"[V, {hidden.shape[-1]}] with V > 0 to fit {hidden_name} {list(hidden.shape)}"
        raise ValueError(f"{name} has shape {list(weight.shape)}, needs {needs}")
    check_dtype(name, weight)
    check_device(name, weight, hidden_name, hidden)


def check_dtype(name: str, value: Tensor) -> None:
    """Accept what the ops compute with."""
    if value.dtype not in FLOATS:
        hint = "" if value.dtype.is_complex or value.dtype == torch.bool else "; what is quantised must be dequantised"
        raise ValueError(f"{name} is {value.dtype}, needs a float dtype (fp16, bf16, fp32, fp64){hint}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, needs {other.device}, where {other_name} is")


def per_token(name: str, value: Tensor, leading: torch.Size, device: torch.device) -> Tensor:  # [N]
    """Accept one value a token, shaped like the leading dimensions of hidden."""
    check_tensor(name, value)
    if value.shape != leading:
        raise ValueError(f"{name} has shape {list(value.shape)}, needs {list(leading)}, one value a token")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, needs {device}, where hidden is")
    return value.reshape(-1)


def check_per_token(values: Mapping[str, Tensor | None], leading: torch.Size, device: torch.device) -> None:
    """Accept one value a token of each that is given."""
    for name, value in values.items():
        if value is not None:
            per_token(name, value, leading, device)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    *,
    prefix: str = "",
) -> torch.Size:
    """Check the description of one head; give the leading shape. The values of a temperature tensor come later."""
    hidden_name = f"{prefix}hidden"
    leading = check_hidden(hidden_name, hidden)
    check_weight(f"{prefix}weight", weight, hidden_name, hidden)
    if bias is not None:
        check_tensor(f"{prefix}bias", bias)
        check_dtype(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias has shape {list(bias.shape)}, needs [{weight.shape[0]}], one value a word")
        check_device(f"{prefix}bias", bias, hidden_name, hidden)
    if softcap is not None:
        check_float("softcap", softcap, 0.0, open_low=True)
    if not isinstance(temperature, Tensor):
        check_float("temperature", temperature, 0.0, open_low=True)
    elif temperature.dim() != 0:
        per_token("temperature", temperature, leading, hidden.device)
    return leading


def tempering(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """As an op takes it: (values, number), of which the values count where there are any."""
    return (temperature.detach(), 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))


def positive_temperature(number: float, values: Tensor | None) -> float | Tensor:
    """`number`, or `values` where given: one for all, or flat one a token; refuse what is not positive."""
    if values is None:
        return number
    if values.dim() == 0:
        check_float("temperature", float(values), 0.0, open_low=True)
        return float(values)
    flat = frozen(values).reshape(-1)
    if flat.numel() and not bool((flat > 0).all() & flat.isfinite().all()):
        raise ValueError(f"temperature has a minimum of {float(flat.min())}, needs finite numbers > 0")
    return flat


def check_targets(targets: Tensor, leading: torch.Size, device: torch.device, mask: Tensor | None = None) -> None:
    """Accept integers and a mask, one a token."""
    check_tensor("targets", targets)
    if targets.dtype not in INTEGERS:
        raise ValueError(f"targets is {targets.dtype}, needs an integer dtype")
    per_token("targets", targets, leading, device)
    if mask is not None:
        per_token("mask", mask, leading, device)


def flat_targets(targets: Tensor, vocab: int, ignore: int, mask: Tensor | None = None) -> Tensor:  # [N]
    """Accept values in [0, V) or `ignore`; give them flat, int64.

    Where `mask` is false the target may be anything (padding, a placeholder) and comes back as `ignore`.
    """
    flat = targets.reshape(-1).long()
    if mask is not None:
        flat = flat.masked_fill(mask.reshape(-1) == 0, ignore)
    wrong = (flat != ignore) & ((flat < 0) | (flat >= vocab))
    if bool(wrong.any()):
        value = int(flat[wrong][0])
        raise ValueError(f"targets holds {value}, needs 0 <= y < {vocab} (the rows of weight) or ignore_index {ignore}")
    return flat


def check_bounds(cu_seqlens: Tensor) -> None:
    """Accept integers [B + 1]; their values come later."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in INTEGERS:
        got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens is {got}, needs integers [B + 1]")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, *, values: bool = True) -> Tensor:  # [B + 1]
    """Accept the cumulative lengths 0 = c_0 <= c_1 <= ... <= c_B = N of packed sequences; give them as int64.

    Looking at the values waits for a GPU that holds them; without `values` only shape and dtype are checked.
    """
    check_bounds(cu_seqlens)
    cu = cu_seqlens.long()
    if values and (int(cu[0]) != 0 or int(cu[-1]) != tokens or bool((cu.diff() < 0).any())):
        got = f"from {int(cu[0])} to {int(cu[-1])}"
        raise ValueError(f"cu_seqlens goes {got}, needs to rise from 0 to {tokens}, the number of tokens")
    return cu


def check_advantages(advantages: Tensor, leading: torch.Size, sequences: int) -> None:
    """Accept one a token or one a sequence."""
    check_tensor("advantages", advantages)
    if advantages.shape != leading and advantages.shape != (sequences,):
        got, needs = list(advantages.shape), f"{list(leading)} (a token) or [{sequences}] (a sequence)"
        raise ValueError(f"advantages has shape {got}, needs {needs}")


def kept_rows(keep: Tensor) -> Tensor | None:  # [N] bool -> [n] or None
    """The indices of the tokens to compute, or None when that is all of them.

    Their number is all that waits for a GPU: shapes depend on it. `nonzero` would ask for it once more.
    """
    total, count = keep.numel(), int(keep.sum())
    if count == total:
        return None
    place = torch.where(keep, keep.cumsum(0) - 1, count)  # the tokens left out are all written to one place more
    rows = place.new_empty(count + 1).scatter_(0, place, torch.arange(total, device=keep.device))
    return rows[:count]


def take(values: Tensor, rows: Tensor | None) -> Tensor:
    """The computed rows of a packed tensor."""
    return values if rows is None else values.index_select(0, rows)
