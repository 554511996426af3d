"""The C++ backend beside what it replaces: python -m bench.cpu_kernels [--op score] [--dtype bf16] [--shape 0].

Variants run interleaved in one process and medians are compared, so that whatever else the machine does falls on all
of them. Nothing is timed that has not first agreed with fp64. `bare` is the walk without its fold, the honest floor;
`mm` are the same products by torch.mm, their results thrown away.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sgcd_kernels import backend_status, linear_divergence, linear_logprob, linear_policy_loss

SHAPES = [(1024, 576, 49_152), (512, 1024, 151_936)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GATE = {"bf16": 1e-4, "fp32": 1e-4}  # nats, on log p(y) and KL
Variants = dict[str, Callable[[], object]]


class Inputs:
    """One shape, with tokens that student and teacher half agree on."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        n, h, v = shape
        g = torch.Generator().manual_seed(0)
        x = torch.randn(n, h, generator=g)
        self.x, self.t = x.to(dtype), (x + 0.3 * torch.randn(n, h, generator=g)).to(dtype)
        self.w = (torch.randn(v, h, generator=g) / h**0.5 * 2).to(dtype)
        self.y = torch.randint(v, (n,), generator=g)
        self.a = torch.randn(n, generator=g)
        self.old = linear_logprob(self.x, self.w, self.y).logp + 0.1 * torch.randn(n, generator=g)

    def mm(self, products: int) -> None:
        """One forward product each, or forward, dX and dW (and once more forward for 4)."""
        z = torch.mm(self.x, self.w.t())
        if products == 2:
            torch.mm(self.t, self.w.t())
        if products >= 3:
            torch.mm(z, self.w)
            torch.mm(z.t(), self.x)
        if products == 4:
            torch.mm(self.x, self.w.t())

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.x.detach().requires_grad_(), self.w.detach().requires_grad_()


def score(i: Inputs) -> Variants:
    return {
        "ours": lambda: linear_divergence(i.x, i.w, i.y, i.t, impl="cpp"),
        "mm": lambda: i.mm(2),
        "bare": lambda: torch.ops.sgcd_kernels.bare_walk(i.x, i.w, i.t),
        "eager": lambda: eager_score(i.x, i.w, i.y, i.t),
    }


def eager_score(x: Tensor, w: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    p, q = (x @ w.T).float(), (t @ w.T).float()
    log_p, log_q = F.log_softmax(p, -1), F.log_softmax(q, -1)
    prob_p, prob_q = log_p.exp(), log_q.exp()
    at = y[:, None]
    return (
        (prob_p * (log_p - log_q)).sum(-1),
        (prob_q * (log_q - log_p)).sum(-1),
        (log_p / 2 + log_q / 2).exp().sum(-1),
        log_p.gather(1, at)[:, 0],
        log_q.gather(1, at)[:, 0],
        -(prob_p * log_p).sum(-1),
        -(prob_q * log_q).sum(-1),
        torch.logsumexp(p, -1),
        torch.logsumexp(q, -1),
    )


def logprob_forward(i: Inputs) -> Variants:
    return {
        "ours": lambda: linear_logprob(i.x, i.w, i.y, impl="cpp"),
        "mm": lambda: i.mm(1),
        "bare": lambda: torch.ops.sgcd_kernels.bare_walk(i.x, i.w, None),
        "eager": lambda: F.log_softmax((i.x @ i.w.T).float(), -1).gather(1, i.y[:, None]),
    }


def logprob(i: Inputs) -> Variants:
    def ours() -> None:
        x, w = i.leaves()
        linear_logprob(x, w, i.y, impl="cpp").logp.backward(i.a)

    def eager() -> None:
        x, w = i.leaves()
        F.log_softmax((x @ w.T).float(), -1).gather(1, i.y[:, None])[:, 0].backward(i.a)

    return {"ours": ours, "mm": lambda: i.mm(4), "eager": eager}


def policy_loss(i: Inputs) -> Variants:
    """`ours` makes its own normaliser (4 products), `reused` takes the scoring pass's (3)."""
    lse = linear_logprob(i.x, i.w, i.y, impl="cpp").lse

    def ours(lse: Tensor | None) -> None:
        x, w = i.leaves()
        linear_policy_loss(x, w, i.y, i.a, old_logp=i.old, loss_type="dapo", lse=lse, impl="cpp")[0].backward()

    def eager() -> None:
        x, w = i.leaves()
        logp = F.log_softmax((x @ w.T).float(), -1).gather(1, i.y[:, None])[:, 0]
        ratio = (logp - i.old).exp()
        torch.minimum(ratio * i.a, ratio.clamp(0.8, 1.2) * i.a).mean().neg().backward()

    variants: Variants = {
        "ours": lambda: ours(None),
        "reused": lambda: ours(lse),
        "mm": lambda: i.mm(3),
        "eager": eager,
    }
    try:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss
    except ImportError:
        return variants
    liger = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")

    def theirs() -> None:  # 8 sequences, one a chunk
        x, w = i.leaves()
        n = i.y.numel() // 8
        mask = torch.ones(8, n)
        loss, _ = liger(x.view(8, n, -1), w, i.y.view(8, n), mask, i.a[:8], old_per_token_logps=i.old.view(8, n))
        loss.backward()

    return variants | {"liger": theirs}


OPS = {"score": score, "logprob_forward": logprob_forward, "logprob": logprob, "policy_loss": policy_loss}


def gate(i: Inputs, dtype: str) -> tuple[float, float]:
    """The errors of KL(p || q) against fp64, ours and eager's, on some tokens; refuses to go on if ours is large."""
    rows = slice(0, 16)
    x, t, w, y = i.x[rows], i.t[rows], i.w, i.y[rows]
    exact = eager_double(x, w, t)
    ours = linear_divergence(x, w, y, t, impl="cpp").reverse_kl
    errors = tuple(float((kl.double() - exact).abs().max()) for kl in (ours, eager_score(x, w, y, t)[0]))
    if errors[0] > GATE[dtype]:
        raise SystemExit(f"error {errors[0]:.1e} against fp64, needs at most {GATE[dtype]:.0e}: nothing was timed")
    return errors[0], errors[1]


def eager_double(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    w = w.double()
    log_p, log_q = F.log_softmax(x.double() @ w.T, -1), F.log_softmax(t.double() @ w.T, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def medians(variants: Variants, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shape", type=int, choices=range(len(SHAPES)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    status = backend_status()["cpp"]
    if not status.usable:
        raise SystemExit(status.reason)
    torch.set_num_threads(args.threads)
    for dtype in [args.dtype] if args.dtype else DTYPES:
        for shape in [SHAPES[args.shape]] if args.shape is not None else SHAPES:
            inputs = Inputs(shape, DTYPES[dtype])
            errors = gate(inputs, dtype)
            for op in [args.op] if args.op else OPS:
                report(op, dtype, shape, medians(OPS[op](inputs), args.rounds), errors, args, status.reason)


def report(
    op: str,
    dtype: str,
    shape: tuple[int, int, int],
    times: dict[str, float],
    errors: tuple[float, float],
    args: argparse.Namespace,
    path: str,
) -> None:
    """Print a line and append it to the day's file."""
    others = {name: value for name, value in times.items() if name != "ours"}
    ratios = {f"ours/{name}": times["ours"] / value for name, value in others.items()}
    if "reused" in times:
        ratios["reused/mm"] = times["reused"] / times["mm"]
    print(f"{op} {dtype} {shape}", *(f"{k} {v * 1e3:.0f} ms" for k, v in times.items()), flush=True)
    print(
        "   ",
        *(f"{name} {value:.2f}" for name, value in ratios.items()),
        f"KL error {errors[0]:.0e} eager {errors[1]:.0e}",
    )
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    file = Path(__file__).parent / "results" / f"cpu_kernels_{datetime.date.today()}_{sha or 'none'}.csv"
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.writer(out)
        if new:
            writer.writerow(
                "op dtype N H V variant milliseconds rounds threads path torch sha kl_error eager_kl_error".split()
            )
        for name, value in times.items():
            row = [op, dtype, *shape, name, f"{value * 1e3:.2f}", args.rounds, args.threads, path.split(", ")[-1]]
            writer.writerow([*row, torch.__version__, sha, f"{errors[0]:.1e}", f"{errors[1]:.1e}"])


if __name__ == "__main__":
    main()
