"""Argument checks of the ops. Every error names the argument, what was given and what is needed.

Kinds, shapes, dtypes, devices and options are checked before an op is called, also while torch.compile traces. The
values of tensors (targets, temperatures, `cu_seqlens`) are checked inside the op.

`check_tensor` is the one place that says what a tensor is: strided, and of no subclass whose memory means something
else. Tensors per token lie where hidden lies; small ones (`check_beside`) may be on the CPU instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from sgcd_kernels.core.lm_head import LMHead, Projection, group_name, shard_range
from sgcd_kernels.core.spelling import explain_choice

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NUMBERS = (*FLOATS, *INTEGERS)
FLAGS = (*NUMBERS, torch.bool)
PLAIN_TENSORS = (Tensor, nn.Parameter)
# Subclasses of PyTorch's that behave as plain tensors: those of its compiler, and one that waits for a collective.
_TRANSPARENT = ("torch._subclasses.", "torch.distributed._functional_collectives")
# Numbers and their reciprocals are far from the ends of fp32, in which the ops compute.
SMALLEST, LARGEST = 1e-20, 1e20
INT64 = torch.iinfo(torch.int64)


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, cut if long. Some have none (integers of 5,000 digits)."""
    try:
        text = repr(value)
    except Exception:  # whatever a stranger's class raises
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def in_tensor(number: object) -> bool:
    """Whether a number is given in a tensor: its value is read, and checked, inside the op only."""
    return isinstance(number, Tensor)


def check_choice(name: str, value: str, options: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> None:
    """Refuse a name that is not one of `options`; say what was meant, or what it is `elsewhere` (`explain_choice`)."""
    if isinstance(value, str) and value in options:
        return
    hint = explain_choice(value, options, elsewhere) if isinstance(value, str | None) else ""
    raise ValueError(f"{name} is {shown(value)}, needs one of {', '.join(options)}{hint}")


def check_float(name: str, value: object, low: float, high: float = LARGEST) -> None:
    """Refuse a number outside [low, high]. A tensor of one element passes: its value is checked inside the op."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if value.numel() != 1 or value.dtype not in NUMBERS:
            raise ValueError(f"{name} is a tensor of shape {list(value.shape)} and {value.dtype}, needs one number")
        return
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    # Not math.isfinite, which torch.compile cannot trace when it treats the number as a variable.
    if not low <= number <= high:
        raise ValueError(f"{name} is {shown(value)}, needs a finite number in [{low}, {high}]")


def check_int(name: str, value: object, low: float = INT64.min, high: float = INT64.max) -> None:
    """Refuse anything but an integer in [low, high]."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and low <= int(value) <= high):  # type: ignore[call-overload]
        raise ValueError(f"{name} is {shown(value)}, needs an integer in [{low}, {high}]")


def check_beta(beta: float | Tensor, for_jsd: bool) -> None:
    """The weight of a mixture. At 0 or 1 the JSD is constantly 0, and very close to them it is only rounding error."""
    check_float("beta", beta, 0.0, 1.0)
    if for_jsd and not in_tensor(beta) and not 1e-6 <= beta <= 1 - 1e-6:
        hint = "for beta 0 or 1 as TRL means them use forward_kl or reverse_kl"
        raise ValueError(f"beta is {beta!r}, needs 1e-06 <= beta <= 1 - 1e-06 for a jsd; {hint}")


def check_tensor(name: str, value: object) -> None:
    """Refuse anything but a plain tensor.

    A DTensor's shards mean different things to FSDP and to these ops; what other subclasses, sparse and nested tensors
    mean by their memory, the ops do not know.
    """
    kind = type(value)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {shown(value)} ({kind.__name__}), needs a tensor")
    if kind in PLAIN_TENSORS and value.layout is torch.strided and not value.is_nested:
        return
    if hasattr(value, "placements"):  # not isinstance: that would import all of torch.distributed.tensor
        raise ValueError(
            f"{name} is a DTensor, needs a plain tensor: under FSDP2 call from the forward of the module that owns it, "
            f"under vocab-parallelism give {name}.to_local() and group (docs/parallel.md)"
        )
    if value.is_nested:
        raise ValueError(f"{name} is a nested tensor, needs a plain one: packed tokens have cu_seqlens")
    if kind not in PLAIN_TENSORS and not kind.__module__.startswith(_TRANSPARENT):
        raise ValueError(f"{name} is a {kind.__name__}, a subclass of Tensor; needs a plain tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has the layout {value.layout}, needs a dense tensor")


def check_dtype(name: str, value: Tensor) -> None:
    """Accept the dtypes that the ops compute with."""
    if value.dtype not in FLOATS:
        hint = "" if value.dtype.is_complex or value.dtype == torch.bool else "; what is quantised must be dequantised"
        raise ValueError(f"{name} is {value.dtype}, needs a float dtype (fp16, bf16, fp32, fp64){hint}")


def check_numeric(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Accept values per token or sequence: `NUMBERS`, `FLAGS` or `INTEGERS`."""
    if value.dtype not in dtypes:
        needs = "an integer dtype" if dtypes is INTEGERS else "a real dtype" + (" or bool" if dtypes is FLAGS else "")
        raise ValueError(f"{name} is {value.dtype}, needs {needs}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, needs {other.device}, where {other_name} is")


def check_beside(name: str, value: object, other_name: str, other: Tensor) -> None:
    """Refuse a small tensor (lengths, values per sequence, one number) neither on the CPU nor where `other` is."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != other.device:
        places = " or ".join(dict.fromkeys(("cpu", str(other.device))))
        raise ValueError(f"{name} is on {value.device}, needs {places}, where {other_name} is")


def check_per_token(
    name: str,
    value: Tensor | None,
    leading: torch.Size,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = NUMBERS,
) -> None:
    """Accept None, or one value per token, shaped like the leading dimensions of hidden."""
    if value is None:
        return
    check_tensor(name, value)
    if value.shape != leading:
        raise ValueError(f"{name} has shape {list(value.shape)}, needs {list(leading)}, one value per token")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, needs {device}, where hidden is")
    check_numeric(name, value, dtypes)


def check_all_per_token(
    values: Mapping[str, Tensor | None],
    leading: torch.Size,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = NUMBERS,
) -> None:
    for name, value in values.items():
        check_per_token(name, value, leading, device, dtypes)


def check_hidden(name: str, hidden: Tensor) -> torch.Size:
    """Accept [N, H] or [B, T, H] of a float dtype; return the leading shape."""
    check_tensor(name, hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {list(hidden.shape)}, needs [N, H] or [B, T, H]")
    check_dtype(name, hidden)
    return hidden.shape[:-1]


def check_head(hidden: Tensor, head: LMHead, *, prefix: str = "", hidden_name: str = "hidden") -> torch.Size:
    """Check hidden states and their head; return the leading shape. `checked_head` checks a tensor's values."""
    hidden_name, weight_name, bias_name = f"{prefix}{hidden_name}", f"{prefix}weight", f"{prefix}bias"
    leading = check_hidden(hidden_name, hidden)
    check_weight(weight_name, head.weight, hidden_name, hidden)
    if head.bias is not None:
        check_tensor(bias_name, head.bias)
        check_dtype(bias_name, head.bias)
        if head.bias.shape != head.weight.shape[:1]:
            needs = f"[{head.weight.shape[0]}], one value per vocab id"
            raise ValueError(f"{bias_name} has shape {list(head.bias.shape)}, needs {needs}")
        check_device(bias_name, head.bias, hidden_name, hidden)
    if head.softcap is not None:
        check_float("softcap", head.softcap, SMALLEST)
        check_beside("softcap", head.softcap, hidden_name, hidden)
    if isinstance(head.temperature, Tensor) and head.temperature.dim() != 0:
        check_per_token("temperature", head.temperature, leading, hidden.device)
    else:
        check_float("temperature", head.temperature, SMALLEST)
        check_beside("temperature", head.temperature, hidden_name, hidden)
    group_name(head.group)
    return leading


def check_weight(name: str, weight: Tensor, hidden_name: str, hidden: Tensor) -> None:
    """Accept [V, H] of a float dtype, with the H and the device of `hidden`."""
    check_tensor(name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        needs = f"[V, {hidden.shape[-1]}] with V > 0 to fit {hidden_name} {list(hidden.shape)}"
        raise ValueError(f"{name} has shape {list(weight.shape)}, needs {needs}")
    check_dtype(name, weight)
    check_device(name, weight, hidden_name, hidden)


def check_pair(
    student_hidden: Tensor, head: LMHead, teacher_hidden: Tensor, teacher: LMHead, name: str = "student_hidden"
) -> torch.Size:
    """Check two heads over one vocabulary; return the leading shape. `name` is what the caller calls the first."""
    leading = check_head(student_hidden, head, hidden_name=name)
    check_tensor("teacher_hidden", teacher_hidden)
    if teacher_hidden.shape[:-1] != leading:
        got, needs = list(teacher_hidden.shape[:-1]), list(leading)
        raise ValueError(f"teacher_hidden has leading shape {got}, needs {needs} as {name}")
    check_device("teacher_hidden", teacher_hidden, name, student_hidden)
    check_head(teacher_hidden, teacher, prefix="teacher_")
    if teacher.weight.shape[0] != head.weight.shape[0]:
        vocab, needed = teacher.weight.shape[0], head.weight.shape[0]
        raise ValueError(f"teacher_weight has V = {vocab}, needs V = {needed} as weight")
    return leading


def check_targets(targets: Tensor, leading: torch.Size, device: torch.device, mask: Tensor | None = None) -> None:
    """Accept integers, and a mask, per token."""
    check_tensor("targets", targets)
    check_numeric("targets", targets, INTEGERS)
    check_per_token("targets", targets, leading, device, INTEGERS)
    check_per_token("mask", mask, leading, device, FLAGS)


def check_cu_seqlens(cu_seqlens: Tensor, other_name: str, other: Tensor) -> None:
    """Accept integers [B + 1]; their values are checked by `cu_seqlens_values`."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in INTEGERS:
        got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens is {got}, needs integers [B + 1]")
    check_beside("cu_seqlens", cu_seqlens, other_name, other)


def check_per_token_or_sequence(
    name: str,
    value: Tensor,
    leading: torch.Size,
    sequences: int,
    like: tuple[str, Tensor],
    dtypes: Sequence[torch.dtype] = NUMBERS,
) -> None:
    """Accept one value per token or one per sequence, on the CPU or where `like`, a name and its tensor, is."""
    check_tensor(name, value)
    if value.shape != leading and value.shape != (sequences,):
        got, needs = list(value.shape), f"{list(leading)} (per token) or [{sequences}] (per sequence)"
        raise ValueError(f"{name} has shape {got}, needs {needs}")
    check_numeric(name, value, dtypes)
    check_beside(name, value, *like)


def checked_head(head: LMHead) -> LMHead:
    """Refuse temperatures and a softcap outside [SMALLEST, LARGEST]; return temperatures per token flat."""
    temperature = head.temperature
    if head.softcap is not None:
        check_float("softcap", head.softcap, SMALLEST)
    if not isinstance(temperature, Tensor):
        check_float("temperature", temperature, SMALLEST)
        return head
    flat = temperature.detach().reshape(-1)
    wrong = ~((flat >= SMALLEST) & (flat <= LARGEST))  # not <, which a NaN would pass
    if bool(wrong.any()):
        raise ValueError(f"temperature holds {float(flat[wrong][0])}, needs numbers in [{SMALLEST}, {LARGEST}]")
    return replace(head, temperature=flat)


def checked_targets(targets: Tensor, head: LMHead, ignore_index: int, mask: Tensor | None = None) -> Tensor:  # [N]
    """Accept values in [0, V) or `ignore_index`; return them flat, as int64.

    Where `mask` is false the target may be anything (padding, a placeholder) and comes back as `ignore_index`.
    """
    vocab = shard_range(head)[1]
    flat = targets.reshape(-1).long()
    if mask is not None:
        flat = flat.masked_fill(mask.reshape(-1) == 0, ignore_index)
    wrong = (flat != ignore_index) & ((flat < 0) | (flat >= vocab))
    if bool(wrong.any()):
        needs = f"needs 0 <= y < {vocab} (the rows of weight) or ignore_index {ignore_index}"
        raise ValueError(f"targets holds {int(flat[wrong][0])}, {needs}")
    return flat


def project_targets(
    hidden: Tensor, head: LMHead, targets: Tensor, ignore_index: int, mask: Tensor | None = None
) -> tuple[Projection, Tensor]:
    """(the head on the tokens that are neither ignored nor masked, their targets [n]), values checked."""
    flat = checked_targets(targets, head, ignore_index, mask)
    x = Projection.of(hidden, checked_head(head)).on(flat != ignore_index)
    return x, x.gather(flat)


def cu_seqlens_values(cu_seqlens: Tensor, tokens: int, *, look: bool = True) -> Tensor:  # [B + 1]
    """Accept the cumulative lengths 0 = c_0 <= c_1 <= ... <= c_B = N of packed sequences; return them as int64.

    Without `look` the values are not read, for which the host would have to wait for the GPU.
    """
    cu = cu_seqlens.long()
    if look and (int(cu[0]) != 0 or int(cu[-1]) != tokens or bool((cu.diff() < 0).any())):
        got = f"from {int(cu[0])} to {int(cu[-1])}"
        raise ValueError(f"cu_seqlens goes {got}, needs to rise from 0 to {tokens}, the number of tokens")
    return cu
