"""A factor of pairs that is no product: the traced formula of a user's mask as code, one function call an operation.

The formula is a constant, a program (`tile_mask.program`): of each step what it does, and the steps that it does it to; or
("row" | "col" | "lag", which leaf), or ("number", x). The last step is the value. What is compiled is these steps alone, in
float64, as formulas are defined (docs/semantics.md). Leaves are rows' `[i, 1]`, columns' `[1, j]` and lags' `[i, j]`.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
SMALL = tl.constexpr(1e-5)
"""Below it three terms of a series are as exact as float64."""


@triton.constexpr_function
def held(PROGRAM, kind):
    """How many leaves of a kind the program reads at most."""
    return max([step[1] + 1 for step in PROGRAM or () if step[0] == kind], default=0)


@triton.constexpr_function
def count(PROGRAM):
    """How many steps it has."""
    return len(PROGRAM)


@triton.constexpr_function
def part(PROGRAM, step, k):
    """What a step does, or does it to; None where there is no more."""
    return PROGRAM[step][k] if k < len(PROGRAM[step]) else None


@triton.jit
def leaves(at, step, inside, COUNT: tl.constexpr):
    """The first leaves of a kind, each a step from the one before."""
    out = ()
    for k in tl.static_range(COUNT):
        out += (tl.load(at + k * step, mask=inside, other=0.0),)
    return out


@triton.jit
def value(PROGRAM: tl.constexpr, rows, cols, lags):
    """The value of the formula; a condition is 1 or 0."""
    found = ()
    for k in tl.static_range(count(PROGRAM)):
        found += (done(PROGRAM, k, found, rows, cols, lags),)
    return found[count(PROGRAM) - 1].to(tl.float64)


@triton.jit
def done(PROGRAM: tl.constexpr, STEP: tl.constexpr, found, rows, cols, lags):
    """The value of a step, given those of all before it."""
    NAME: tl.constexpr = part(PROGRAM, STEP, 0)
    A: tl.constexpr = part(PROGRAM, STEP, 1)
    B: tl.constexpr = part(PROGRAM, STEP, 2)
    C: tl.constexpr = part(PROGRAM, STEP, 3)
    if NAME == "row":
        return rows[A]
    elif NAME == "col":
        return cols[A]
    elif NAME == "lag":
        return lags[A]
    elif NAME == "number":
        return tl.full([1, 1], A, tl.float64)
    elif NAME == "where":
        return tl.where(holds(found[A]), found[B].to(tl.float64), found[C].to(tl.float64))
    elif NAME == "logical_not":
        return holds(found[A]) == 0
    elif NAME == "logical_and":
        return holds(found[A]) & holds(found[B])
    elif NAME == "logical_or":
        return holds(found[A]) | holds(found[B])
    elif NAME == "bitwise_not":
        return inverted(found[A])
    elif NAME == "bitwise_and":
        return as_is(bits(found[A]) & bits(found[B]))
    elif NAME == "bitwise_or":
        return as_is(bits(found[A]) | bits(found[B]))
    elif NAME == "bitwise_xor":
        return as_is(bits(found[A]) ^ bits(found[B]))
    elif B is None:
        return of_one(NAME, found[A].to(tl.float64))
    else:
        return of_two(NAME, found[A].to(tl.float64), found[B].to(tl.float64))


@triton.jit
def holds(x):
    """x as a condition: whether it is not 0."""
    if x.dtype == tl.int1:
        return x
    else:
        return x != 0.0


@triton.jit
def inverted(x):
    """All bits of a whole number, or a condition, the other way round."""
    if x.dtype == tl.float64:
        return -1.0 - x
    else:
        return x == 0


@triton.jit
def bits(x):
    """Whole numbers as integers, conditions as they are."""
    if x.dtype == tl.float64:
        return x.to(tl.int64)
    else:
        return x


@triton.jit
def as_is(x):
    """Integers as numbers, conditions as they are."""
    if x.dtype == tl.int64:
        return x.to(tl.float64)
    else:
        return x


@triton.jit
def of_one(NAME: tl.constexpr, x):
    """An operation on a number."""
    if NAME == "neg":
        return -x
    elif NAME == "abs":
        return tl.abs(x)
    elif NAME == "exp":
        return tl.exp(x)
    elif NAME == "exp2":
        return tl.exp2(x)
    elif NAME == "expm1":
        return tl.where(tl.abs(x) < SMALL, x * (1.0 + x * (0.5 + x / 6)), tl.exp(x) - 1.0)
    elif NAME == "log":
        return tl.log(x)
    elif NAME == "log2":
        return tl.log(x) / LN2
    elif NAME == "log1p":
        return tl.where(tl.abs(x) < SMALL, x * (1.0 - x * (0.5 - x / 3)), tl.log(1.0 + x))
    elif NAME == "sqrt":
        return tl.sqrt(x)
    elif NAME == "rsqrt":
        return 1.0 / tl.sqrt(x)
    elif NAME == "square":
        return x * x
    elif NAME == "reciprocal":
        return 1.0 / x
    elif NAME == "sin":
        return tl.sin(x)
    elif NAME == "cos":
        return tl.cos(x)
    elif NAME == "tanh":
        less = tl.exp(-2.0 * tl.abs(x))
        far = sign(x) * (1.0 - less) / (1.0 + less)
        return tl.where(tl.abs(x) < SMALL, x * (1.0 - x * x / 3), far)
    elif NAME == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    elif NAME == "floor":
        return tl.floor(x)
    elif NAME == "ceil":
        return tl.ceil(x)
    elif NAME == "sign":
        return sign(x)
    elif NAME == "double":
        return x
    else:
        tl.static_assert(False, "an operation that can be traced and is not written here")


@triton.jit
def of_two(NAME: tl.constexpr, x, y):
    """An operation on two numbers."""
    if NAME == "add":
        return x + y
    elif NAME == "sub":
        return x - y
    elif NAME == "mul":
        return x * y
    elif NAME == "div":
        return x / y
    elif NAME == "pow":
        return power(x, y)
    elif NAME == "minimum" or NAME == "clamp_max":
        return tl.where((x < y) | (x != x), x, y)
    elif NAME == "maximum" or NAME == "clamp_min":
        return tl.where((x > y) | (x != x), x, y)
    elif NAME == "floor_divide":
        return tl.floor(x / y)
    elif NAME == "remainder":
        return x - tl.floor(x / y) * y
    elif NAME == "eq":
        return x == y
    elif NAME == "ne":
        return x != y
    elif NAME == "lt":
        return x < y
    elif NAME == "le":
        return x <= y
    elif NAME == "gt":
        return x > y
    elif NAME == "ge":
        return x >= y
    else:
        tl.static_assert(False, "an operation that can be traced and is not written here")


@triton.jit
def sign(x):
    """1, 0 or −1."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def power(x, y):
    """x^y; of a negative x for whole y only."""
    size = tl.exp(y * tl.log(tl.abs(x)))
    whole, half = tl.floor(y) == y, y * 0.5
    turned = tl.where(tl.floor(half) == half, size, -size)
    found = tl.where(x < 0.0, tl.where(whole, turned, float("nan")), size)
    return tl.where(y == 0.0, 1.0, found)
