"""What the kernels share: making one tile of logits, and the functions that Triton's language lacks.

Shapes in comments: T tokens and W words of a tile, K columns of a step of the product.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def row_numbers(rows, tokens, n):
    """Which rows of hidden the tokens are. Beyond the last token it is read again, and never written."""
    at = tl.minimum(tokens, n - 1)
    if rows is not None:
        at = tl.load(rows + at)
    return at.to(tl.int64)


@triton.jit
def hidden_rows(x, rows, tokens, n, x_stride):
    """Where the tile's tokens lie in hidden."""
    return x + row_numbers(rows, tokens, n) * x_stride  # [T]


@triton.jit
def weight_rows(w, words, vocab, w_stride):
    """Where the tile's words lie in the weight. Beyond the last word it is read again: see `finish`."""
    return w + tl.minimum(words, vocab - 1).to(tl.int64) * w_stride  # [W]


@triton.jit
def step_of(rows, start, width, EVEN: tl.constexpr, K: tl.constexpr):
    """Columns [start, start + K) of some rows, 0 beyond the last."""
    columns = start + tl.arange(0, K)
    if EVEN:
        return tl.load(rows[:, None] + columns[None, :])
    return tl.load(rows[:, None] + columns[None, :], mask=(columns < width)[None, :], other=0.0)


@triton.jit
def product(
    x, w, width, EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """hidden weight^T of one tile, [T, W] fp32."""
    z = tl.zeros((T, W), tl.float32)
    for start in range(0, width, K):
        a = step_of(x, start, width, EVEN, K).to(OPERAND)
        b = step_of(w, start, width, EVEN, K).to(OPERAND)
        z = tl.dot(a, tl.trans(b), z, input_precision=PRECISION)
    return z


@triton.jit
def shared_product(
    x, y, w, width, EVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Both heads' tiles where they have one weight: every step of it is loaded once."""
    z_p = tl.zeros((T, W), tl.float32)
    z_q = tl.zeros((T, W), tl.float32)
    for start in range(0, width, K):
        b = tl.trans(step_of(w, start, width, EVEN, K).to(OPERAND))
        z_p = tl.dot(step_of(x, start, width, EVEN, K).to(OPERAND), b, z_p, input_precision=PRECISION)
        z_q = tl.dot(step_of(y, start, width, EVEN, K).to(OPERAND), b, z_q, input_precision=PRECISION)
    return z_p, z_q


@triton.jit
def stacked_rows(x, y, rows, tile, n, x_stride, y_stride, T: tl.constexpr):
    """Where the tile's tokens lie in both heads' hidden states: eight of the student, the same eight of the teacher.

    A thread that holds row i of a matrix instruction's result holds row i + 8 too: both logits of a token and word.
    """
    row = tl.arange(0, 2 * T)
    at = row_numbers(rows, tile * T + row // 16 * 8 + row % 8, n)
    return tl.where(row // 8 % 2 == 0, x + at * x_stride, y + at * y_stride)  # [2 T]


@triton.jit
def unstack(z, T: tl.constexpr, W: tl.constexpr):
    """The student's and the teacher's tile of a product of stacked rows: no number leaves its thread."""
    z_p, z_q = tl.split(tl.permute(tl.reshape(z, (T // 8, 2, 8, W)), (0, 2, 3, 1)))
    return tl.reshape(z_p, (T, W)), tl.reshape(z_q, (T, W))


@triton.jit
def tile_of(token_tiles, others, group):
    """(tile of tokens, other index) of a program: `group` tiles of tokens together take one other after the other.

    What programs that run together read of hidden and weight then stays in the L2 cache: see `launch.token_group`.
    """
    program = tl.program_id(0)
    together = group * others
    first = program // together * group
    size = tl.minimum(token_tiles - first, group)
    return first + program % together % size, program % together // size


@triton.jit
def finish(z, words, vocab, bias, softcap, temperature, EVEN: tl.constexpr):
    """From a product to final logits: + bias, softcap, then temperature [T]; words beyond the last get -inf."""
    if bias is not None:
        z += tl.load(bias + tl.minimum(words, vocab - 1)).to(tl.float32)[None, :]
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    if temperature is not None:
        z = z / temperature[:, None]
    if not EVEN:
        z = tl.where((words < vocab)[None, :], z, -INFINITY)
    return z


@triton.jit
def unfinish(dz, z, softcap, temperature):
    """Carry a gradient of the final logits z back to the product."""
    if softcap is not None:
        y = z / softcap
        if temperature is not None:
            y = y * temperature[:, None]
        dz = dz * (1.0 - y * y)
    if temperature is not None:
        dz = dz / temperature[:, None]
    return dz


@triton.jit
def exp(x):
    """e^x; below 2^-126 it is 0. `tl.exp` keeps such numbers, at the price of three more instructions each."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def expm1(x):
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
def log1p(u):
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
def tanh(x):
    """Accurate relative to itself near 0."""
    t = expm1(-2.0 * tl.abs(x))
    y = -t / (t + 2.0)
    return tl.where(x < 0, -y, y)


@triton.jit
def mixture_ratios(log_p, log_q, beta):
    """ln(p / m) and ln(q / m) for m = beta q + (1 - beta) p; exactly 0 where p = q.

    Beyond 80 nats apart the smaller of the two adds nothing to any sum, so its ratio may stop there; two words of
    probability 0 have none.
    """
    delta = log_p - log_q
    delta = tl.where((log_p == -INFINITY) & (log_q == -INFINITY), 0.0, delta)
    delta = tl.where(delta > 80.0, 80.0, tl.where(delta < -80.0, -80.0, delta))
    return -log1p(beta * expm1(-delta)), -log1p((1.0 - beta) * expm1(delta))
