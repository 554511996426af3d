"""What the kernels share: making the logits of one tile, and the functions that Triton's language lacks.

A tile is BLOCK_N tokens by BLOCK_V vocab ids, made in steps of BLOCK_H columns. Kernels take the tuples of arguments
that `launch` defines: `Transform` and `Meta`, the compile-time constants.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
MIN_EXPONENT = tl.constexpr(-1e4)  # e^MIN_EXPONENT is 0, and 0 times it is 0 where 0 times -inf would be NaN


class HeadPlaces(NamedTuple):
    """Where the rows of a head's operands lie; `launch.variant` decides whether kernels know what divides this."""

    hidden: Any  # pointer to [N, H]
    hidden_stride: Any
    weight: Any  # pointer to [V, H]
    weight_stride: Any
    width: Any  # H


@triton.jit
def row_indices(rows, tokens, n):
    """The rows of hidden in which the tokens lie. Tokens beyond the last read its row, and are never written."""
    at = tl.minimum(tokens, n - 1)
    if rows is not None:
        at = tl.load(rows + at)
    return at.to(tl.int64)


@triton.jit
def hidden_rows(head, rows, tokens, n):
    """Pointers to the tokens' hidden states, [BLOCK_N]."""
    return head.hidden + row_indices(rows, tokens, n) * head.hidden_stride


@triton.jit
def weight_rows(head, vocab_ids, vocab):
    """Pointers to the vocab ids' rows of the weight, [BLOCK_V]. Ids beyond the last read its row: `apply_transform`."""
    return head.weight + tl.minimum(vocab_ids, vocab - 1).to(tl.int64) * head.weight_stride


@triton.jit
def stacked_rows(student, teacher, rows, tile, n, BLOCK_N: tl.constexpr):
    """Pointers to both heads' hidden states, [2 BLOCK_N]: eight tokens of the student, the same eight of the teacher.

    A thread that holds row i of a matrix instruction's result holds row i + 8 too: both logits of a token and vocab id.
    """
    row = tl.arange(0, 2 * BLOCK_N)
    at = row_indices(rows, tile * BLOCK_N + row // 16 * 8 + row % 8, n)
    of_student = row // 8 % 2 == 0
    return tl.where(
        of_student, student.hidden + at * student.hidden_stride, teacher.hidden + at * teacher.hidden_stride
    )


@triton.jit
def pair_rows(student, teacher, rows, tile, n, META: tl.constexpr):
    """Pointers to both heads' hidden states; if stacked, all of them as one operand, twice."""
    if META.STACKED:
        both = stacked_rows(student, teacher, rows, tile, n, META.BLOCK_N)
        x_p, x_q = both, both
    else:
        token = tile * META.BLOCK_N + tl.arange(0, META.BLOCK_N)
        x_p, x_q = hidden_rows(student, rows, token, n), hidden_rows(teacher, rows, token, n)
    return x_p, x_q


@triton.jit
def load_step(rows, start, width, DIVISIBLE: tl.constexpr, BLOCK_H: tl.constexpr):
    """Columns [start, start + BLOCK_H) of some rows, 0 beyond the last."""
    columns = start + tl.arange(0, BLOCK_H)
    if DIVISIBLE:
        return tl.load(rows[:, None] + columns[None, :])
    return tl.load(rows[:, None] + columns[None, :], mask=(columns < width)[None, :], other=0.0)


@triton.jit
def product(x, w, width, DIVISIBLE: tl.constexpr, OPERAND: tl.constexpr, ROWS: tl.constexpr, META: tl.constexpr):
    """hidden weight^T of one tile, [ROWS, BLOCK_V] fp32."""
    BLOCK_V: tl.constexpr = META.BLOCK_V
    z = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for start in range(0, width, META.BLOCK_H):
        a = load_step(x, start, width, DIVISIBLE, META.BLOCK_H).to(OPERAND)
        b = load_step(w, start, width, DIVISIBLE, META.BLOCK_H).to(OPERAND)
        z = tl.dot(a, tl.trans(b), z, input_precision=META.PRECISION)
    return z


@triton.jit
def shared_product(x_p, x_q, w, width, META: tl.constexpr):
    """Both heads' products where they have one weight: each step of it is loaded once."""
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_V: tl.constexpr = META.BLOCK_V
    z_p = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    z_q = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, width, META.BLOCK_H):
        b = tl.trans(load_step(w, start, width, META.DIVISIBLE_H, META.BLOCK_H).to(META.OPERAND))
        a = load_step(x_p, start, width, META.DIVISIBLE_H, META.BLOCK_H).to(META.OPERAND)
        z_p = tl.dot(a, b, z_p, input_precision=META.PRECISION)
        a = load_step(x_q, start, width, META.DIVISIBLE_H, META.BLOCK_H).to(META.OPERAND)
        z_q = tl.dot(a, b, z_q, input_precision=META.PRECISION)
    return z_p, z_q


@triton.jit
def unstack(z, META: tl.constexpr):
    """The student's and the teacher's tile of a product of stacked rows: no number leaves its thread."""
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_V: tl.constexpr = META.BLOCK_V
    z_p, z_q = tl.split(tl.permute(tl.reshape(z, (BLOCK_N // 8, 2, 8, BLOCK_V)), (0, 2, 3, 1)))
    return tl.reshape(z_p, (BLOCK_N, BLOCK_V)), tl.reshape(z_q, (BLOCK_N, BLOCK_V))


@triton.jit
def head_logits(x, head, vocab_ids, vocab, transform, temperature, META: tl.constexpr):
    """The final logits of one tile, [BLOCK_N, BLOCK_V]. `x` is what `hidden_rows` gave."""
    w = weight_rows(head, vocab_ids, vocab)
    z = product(x, w, head.width, META.DIVISIBLE_H, META.OPERAND, META.BLOCK_N, META)
    return apply_transform(z, vocab_ids, vocab, transform.bias, transform.softcap, temperature, META.DIVISIBLE_V)


@triton.jit
def pair_logits(x_p, x_q, student, teacher, vocab_ids, vocab, transform, temperature, META: tl.constexpr):
    """Both heads' final logits of one tile. `x_p` and `x_q` are what `pair_rows` gave."""
    w_p, w_q = weight_rows(student, vocab_ids, vocab), weight_rows(teacher, vocab_ids, vocab)
    if META.STACKED:
        z = product(x_p, w_p, student.width, META.DIVISIBLE_H, META.OPERAND, 2 * META.BLOCK_N, META)
        z_p, z_q = unstack(z, META)
    elif META.SHARED:
        z_p, z_q = shared_product(x_p, x_q, w_p, student.width, META)
    else:
        z_p = product(x_p, w_p, student.width, META.DIVISIBLE_H, META.OPERAND, META.BLOCK_N, META)
        z_q = product(x_q, w_q, teacher.width, META.DIVISIBLE_TEACHER_H, META.TEACHER_OPERAND, META.BLOCK_N, META)
    softcap = transform.softcap
    z_p = apply_transform(z_p, vocab_ids, vocab, transform.bias, softcap, temperature, META.DIVISIBLE_V)
    z_q = apply_transform(z_q, vocab_ids, vocab, transform.teacher_bias, softcap, temperature, META.DIVISIBLE_V)
    return z_p, z_q


@triton.jit
def apply_transform(z, vocab_ids, vocab, bias, softcap, temperature, DIVISIBLE_V: tl.constexpr):
    """From a product to final logits: + bias, softcap, then temperature [BLOCK_N]; ids beyond the last get -inf."""
    if bias is not None:
        z += tl.load(bias + tl.minimum(vocab_ids, vocab - 1)).to(tl.float32)[None, :]
    if softcap is not None:
        z = softcap * tanhf(z / softcap)
    if temperature is not None:
        z = z / temperature[:, None]
    if not DIVISIBLE_V:
        z = tl.where((vocab_ids < vocab)[None, :], z, -INFINITY)
    return z


@triton.jit
def transform_backward(dz, z, softcap, temperature):
    """Carry a gradient of the final logits `z` back to the product."""
    if softcap is not None:
        ratio = z / softcap
        if temperature is not None:
            ratio = ratio * temperature[:, None]
        dz = dz * (1.0 - ratio * ratio)
    if temperature is not None:
        dz = dz / temperature[:, None]
    return dz


@triton.jit
def grouped_order(token_tiles, others, group_n):
    """(token tile, other index) of a program: groups of `group_n` token tiles take one other index after the other.

    What programs that run together read of hidden and weight then stays in the L2 cache: see `launch.token_tile_group`.
    """
    program = tl.program_id(0)
    per_group = group_n * others
    first = program // per_group * group_n
    size = tl.minimum(token_tiles - first, group_n)
    return first + program % per_group % size, program % per_group // size


@triton.jit
def load_temperature(transform, token, n):
    """One per token, [BLOCK_N]; None where all are 1."""
    temperature = None
    if transform.temperature is not None:
        temperature = tl.load(transform.temperature + token, mask=token < n, other=1.0)
    return temperature


@triton.jit
def load_column(values, token, n):
    """One value per token, as a column."""
    return tl.load(values + token, mask=token < n, other=0.0)[:, None]


@triton.jit
def minus_lse(z, lse, lse_low, token, n):
    """Log-probs of a tile, given the log-sum-exp as two numbers per token; None stands for 0."""
    log_p = z - load_column(lse, token, n)
    if lse_low is not None:
        log_p = log_p - load_column(lse_low, token, n)
    return log_p


@triton.jit
def store_statistic(out, split, field, token, value, n, FIELDS: tl.constexpr):
    """out[split, field, token] = value, of [splits, FIELDS, n]."""
    tl.store(out + (split * FIELDS + field).to(tl.int64) * n + token, value, mask=token < n)


@triton.jit
def store_logit_grad(out, out_stride, dz, token, column, n, count, DIVISIBLE_V: tl.constexpr):
    at = out + token.to(tl.int64)[:, None] * out_stride + column[None, :]
    if DIVISIBLE_V:  # a mask along the row would make sixteen-byte stores two-byte ones
        tl.store(at, dz.to(out.dtype.element_ty), mask=(token < n)[:, None])
    else:
        tl.store(at, dz.to(out.dtype.element_ty), mask=(token < n)[:, None] & (column < count)[None, :])


@triton.jit
def own_targets(targets, token, n, vocab):
    """Targets, or -1 where another rank's shard has them: ids that fill up this shard's last tile must not match."""
    target = tl.load(targets + token, mask=token < n, other=-1)
    return tl.where(target < vocab, target, -1)


@triton.jit
def any_target(target, first_id, BLOCK_V: tl.constexpr):
    """Whether the target of any token lies in the tile that begins at `first_id`."""
    return tl.max(((target >= first_id) & (target < first_id + BLOCK_V)).to(tl.int32), 0) > 0


@triton.jit
def target_logits(z, vocab_ids, target):
    """The targets' logits where they lie in this tile, else 0."""
    hit = vocab_ids[None, :] == target[:, None]
    return tl.sum(tl.where(hit, z, 0.0), 1)


@triton.jit
def rescaled(m, rest, s, new_m):
    """Online softmax: rest and s relative to the maximum `new_m`, and the shift of exponents; 0 before the first tile.

    rest = l - 1 goes without one vocab id at the maximum: see `core.statistics`. Where the maximum has grown, or before
    the first tile (rest -1), that 1 is in the next tile's l, and is subtracted here. (To sum each tile without its 1
    takes more registers than the kernels have.)
    """
    filled = rest != -1.0  # also if it is NaN
    shift = tl.where(filled, m - new_m, 0.0)
    shrink = exp_ftz(shift)
    l = rest + 1.0  # noqa: E741
    new_s = tl.where(shrink > 0, (s + shift * l) * shrink, 0.0)
    return tl.where(shift == 0, rest, l * shrink - 1.0), new_s, shift


@triton.jit
def any_nan(sums):
    """Whether a tile must be summed again with guards.

    0 ln 0 = 0, but 0 times an infinite logit is NaN. Guarding each product would make a third of the update's
    instructions, so tiles are summed without guards, and only those with a logit of -inf once more.
    """
    return tl.max((sums != sums).to(tl.int32), 0) > 0


@triton.jit
def mixture_ratios(log_p, log_q, beta):
    """ln(p / m) and ln(q / m) for m = beta q + (1 - beta) p; exactly 0 where p = q.

    Beyond 80 nats apart the smaller of the two adds nothing to any sum, so its ratio may stop there; two vocab ids of
    probability 0 have none.
    """
    delta = log_p - log_q
    delta = tl.where((log_p == -INFINITY) & (log_q == -INFINITY), 0.0, delta)
    delta = tl.where(delta > 80.0, 80.0, tl.where(delta < -80.0, -80.0, delta))
    return -log1pf(beta * expm1f(-delta)), -log1pf((1.0 - beta) * expm1f(delta))


@triton.jit
def exp_ftz(x):
    """e^x; below 2^-126 it is 0. `tl.exp` keeps such numbers, at the price of three more instructions each."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def expm1f(x):
    """e^x - 1, accurate relative to itself near 0: e^(n ln 2) e^r - 1 with |r| <= ln 2 / 2 and a Taylor series."""
    x = tl.where(x < -20.0, -20.0, x)  # there it is -1
    n = tl.floor(x * LOG2_E + 0.5)
    r = x - n * 0.693359375  # ln 2 in two parts: n times the first is exact
    r = r + n * 2.12194440e-4
    p = r * (1.0 / 40320) + 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r * r + r
    two = tl.exp2(n)
    return two * p + (two - 1.0)


@triton.jit
def log1pf(u):
    """ln(1 + u), accurate relative to itself near 0: 2 artanh(s), s = u / (u + 2), as a series where |s| <= 1/5."""
    s = u / (u + 2.0)
    square = s * s
    p = square * (2.0 / 11) + 2.0 / 9
    p = p * square + 2.0 / 7
    p = p * square + 2.0 / 5
    p = p * square + 2.0 / 3
    near = p * square * s + (s + s)
    return tl.where(tl.abs(s) <= 0.2, near, tl.log(1.0 + u))


@triton.jit
def tanhf(x):
    """Accurate relative to itself near 0."""
    t = expm1f(-2.0 * tl.abs(x))
    y = -t / (t + 2.0)
    return tl.where(x < 0, -y, y)
