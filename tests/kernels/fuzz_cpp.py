"""Call the raw operators with random arguments, many of them wrong: python fuzz_cpp.py SEED CALLS SECONDS.

Prints how many calls worked and how many were refused. Run by test_cpp_entry in a process of its own.
"""

import random
import sys
import time

import torch

from sgcd_kernels import backend_status

assert backend_status()["cpp"].usable
ops, r = torch.ops.sgcd_kernels, random.Random(int(sys.argv[1]))
FLOATS = [torch.float32] * 6 + [torch.bfloat16] * 4 + [torch.float16, torch.float64, torch.int64, torch.bool]


def tensor(shape, dtypes):
    dtype = r.choice(dtypes)
    shape = [max(0, s + r.choice([0] * 30 + [-1, 1])) for s in shape]
    if r.random() < 0.03:
        shape = shape[1:] if r.random() < 0.5 else [1, *shape]
    x = torch.randn(shape) * r.choice([1, 1, 1, 30, 1e30])
    if x.numel() and r.random() < 0.05:
        x.view(-1)[r.randrange(x.numel())] = r.choice([float("nan"), float("inf"), -float("inf")])
    x = x.to(dtype)
    how = r.random()
    if how < 0.03 and x.dim() == 2:
        return x.t().contiguous().t()
    if how < 0.05 and x.dim() == 2:
        return x[:1].expand(max(1, x.shape[0]), x.shape[1])
    if how < 0.06 and x.dim():
        return x[::2]
    if how < 0.065:
        return torch.empty(1, dtype=dtype).expand([2**33] + [1] * max(0, x.dim() - 1))  # huge, and holds nothing
    if how < 0.07:
        return x.to("meta")
    if how < 0.075:
        return x.to_sparse() if dtype.is_floating_point and x.dim() else x
    return x


def maybe(x, chance=0.4):
    return x if r.random() < chance else None


def integers(n, low, high, chance=0.03):
    x = torch.randint(low, max(high, low + 1), (max(0, n + r.choice([0] * 30 + [-1, 1])),))
    if x.numel() and r.random() < chance:
        x[r.randrange(len(x))] = r.choice([-1, -100, 2**31, 2**31 - 1, -(2**63), 2**63 - 1, high])
    return x.int() if r.random() < 0.02 else x


def number(usual):
    return r.choice([usual] * 20 + [0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30])


def random_calls():
    """(operator, a function that makes its arguments) for each operator, around one random shape."""
    n, h, v = r.choice([0, 1, 2, 3, 63, 64, 65, 70]), r.choice([1, 2, 3, 8, 33]), r.choice([1, 2, 63, 64, 65, 130])
    f = FLOATS if r.random() < 0.2 else [r.choice(FLOATS[:10])]
    rows = maybe(integers(r.randrange(0, n + 2), 0, n), 0.3)
    m = n if rows is None else len(rows)
    f32 = [torch.float32] * 40 + FLOATS

    def head():
        return tensor([n, h], f), tensor([v, h], f), maybe(tensor([v], f32))

    def each():
        return tensor([m], f32)

    shared = (maybe(each()), r.choice([0.0, 5.0, number(5.0)]))
    needs = [r.random() < 0.6 for _ in range(r.choice([3] * 30 + [2]))]
    return {
        "head_stats": lambda: (*head(), rows, integers(m, 0, v, 0.3), *shared),
        "pair_stats": lambda: (*head(), *head(), rows, integers(m, 0, v, 0.3), *shared),
        "mixture_stats": lambda: (
            *head(),
            *head(),
            rows,
            tensor([4, m], f32),
            *shared,
            number(0.5),
            True,
            r.random() < 0.5,
        ),
        "bare_walk": lambda: (*head()[:2], maybe(tensor([n, h], f))),
        "logprob_grads": lambda: (
            *head(),
            rows,
            integers(m, 0, v, 0.3),
            *shared,
            each(),
            each(),
            each(),
            *((each(), each()) if r.random() < 0.4 else (maybe(each(), 0.05), None)),
            needs,
            r.random() < 0.3,
        ),
        "distill_grads": lambda: (
            *head(),
            *head(),
            rows,
            *shared,
            each(),
            each(),
            each(),
            each(),
            number(0.5),
            r.choice([0, 1, 2, 3, -1]),
            needs,
        ),
    }


done, limit = [0, 0], time.time() + float(sys.argv[3])
for _ in range(int(sys.argv[2])):
    name, make = r.choice(list(random_calls().items()))
    try:
        arguments = make()
    except (RuntimeError, TypeError):
        continue  # the generator asked torch for something that does not exist
    try:
        getattr(ops, name)(*arguments)
        done[0] += 1
    except (ValueError, NotImplementedError, RuntimeError):
        done[1] += 1
    if time.time() > limit:
        break
print(*done)
