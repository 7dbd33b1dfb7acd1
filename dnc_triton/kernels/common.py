"""Small device functions that the kernels share. `sizes` is a `Sizes`; arithmetic is in its COMPUTE."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dnc_reference import addressing

if triton.knobs.runtime.interpret:
    from dnc_triton.kernels.interpreted import keep_truth

    keep_truth()

NORM_EPSILON = tl.constexpr(addressing.NORM_EPSILON)
SIMILARITY_EPSILON = tl.constexpr(addressing.SIMILARITY_EPSILON)
USAGE_EPSILON = tl.constexpr(addressing.USAGE_EPSILON)


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """The first statement of a kernel that may overlap the launch before it: if so, it waits here for that one's end.

    The next launch may begin from here on, and not before: so at most two run at once, and none of them writes what one
    further back might still read.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def term(a, b):
    """a b, rounded, as a term of a sum across threads.

    A plain product may be fused with the addition of what comes from another thread, whose own product was rounded.
    Threads that hold the same element then have sums that differ in the last bit, and the result is that of whichever
    writes last. A fused multiply-add with 0 rounds the product first.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def tile_term(a, b, sizes: tl.constexpr):
    """`term` where a thread may hold a single element of a tile's row or column, else the plain product.

    A thread that holds several adds up its own first, and none of that is fused with another thread's.
    """
    return term(a, b) if sizes.ALONE else a * b


@triton.jit
def exp(x):
    """eˣ to about two units in the last place, as PyTorch has it; in float32 infinite from x = 88.377 on.

    The hardware computes 2ʸ for y = x / log 2; rounding y alone costs |x| units in float32.
    """
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        x = tl.where(x < -128.0, -128.0, tl.where(x > 128.0, 128.0, x))  # 0 and infinity; a NaN stays one
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        # log 2 in two parts, of which the first has so few bits that n times it is exact.
        y = term(tl.exp((x - n * 0.693359375) - n * -2.12194440054690583e-4), tl.exp2(n))
    return y


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ), without overflow on either side."""
    small = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh(x):
    """tanh x, to full relative precision near 0 as well."""
    y = -2.0 * tl.abs(x)
    u = exp(y)
    # eʸ − 1 where y is small and eʸ rounds: (u − 1) y / log(u).
    near = (u > 0.5) & (u < 1.0)
    less = tl.where(near, (u - 1.0) * y / tl.log(tl.where(near, u, 0.5)), tl.where(u == 1.0, y, u - 1.0))
    size = -less / (2.0 + less)
    return tl.where(x >= 0, size, -size)


@triton.jit
def clipped(x, CLIP: tl.constexpr, COMPUTE: tl.constexpr):
    """x between −CLIP and CLIP; a NaN stays one."""
    if CLIP is not None:
        bound = tl.full([], CLIP, COMPUTE)
        x = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    return x


@triton.jit
def d_clipped(d, x, CLIP: tl.constexpr, COMPUTE: tl.constexpr):
    """Adjoint of `clipped`; x is its input."""
    if CLIP is not None:
        d = tl.where(tl.abs(x) <= tl.full([], CLIP, COMPUTE), d, 0.0)
    return d


@triton.jit
def softplus(x):
    """log(1 + eˣ), without overflow."""
    small = exp(-tl.abs(x))
    # log(1 + s) to full relative precision where s is small and 1 + s rounds: log(t) s / (t − 1).
    total = 1.0 + small
    rest = tl.where(total == 1.0, small, tl.log(total) * small / tl.where(total == 1.0, 1.0, total - 1.0))
    return tl.maximum(x, 0.0) + rest


@triton.jit
def gate(x, sizes: tl.constexpr):
    """A gate or erase vector from the interface, activated if it is raw."""
    if sizes.RAW:
        x = sigmoid(x)
    return x


@triton.jit
def d_gate(d, activated, sizes: tl.constexpr):
    """Adjoint of `gate`, from the activated value."""
    if sizes.RAW:
        d = d * activated * (1.0 - activated)
    return d


@triton.jit
def strength(x, sizes: tl.constexpr):
    """A strength from the interface; if raw, its softplus, plus 1 for oneplus."""
    if sizes.RAW:
        x = sizes.STRENGTH_OFFSET + softplus(x)
    return x


@triton.jit
def d_strength(d, x, sizes: tl.constexpr):
    """Adjoint of `strength`; x is its input."""
    if sizes.RAW:
        d = d * sigmoid(x)
    return d


@triton.jit
def softmax(logits, mask, AXIS: tl.constexpr):
    """Softmax along an axis over what the mask lets through, 0 elsewhere. Masked-out rows are all 0."""
    logits = tl.where(mask, logits, float("-inf"))
    largest = tl.max(logits, AXIS, keep_dims=True)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    exponential = exp(logits - largest)
    total = tl.sum(exponential, AXIS, keep_dims=True)
    return tl.where(mask, exponential / tl.where(total == 0.0, 1.0, total), 0.0)


@triton.jit
def rounded(x, ptr):
    """x as it will be read back from memory of this type: what follows must see what the next step sees."""
    return x.to(ptr.dtype.element_ty).to(x.dtype)


@triton.jit
def read_modes(modes_ptr, offs_r, mask_r, sizes: tl.constexpr):
    """Backward, forward and content mode of each of these heads, activated."""
    backward = tl.load(modes_ptr + 3 * offs_r, mask=mask_r, other=0.0).to(sizes.COMPUTE)
    forward = tl.load(modes_ptr + 3 * offs_r + 1, mask=mask_r, other=0.0).to(sizes.COMPUTE)
    content = tl.load(modes_ptr + 3 * offs_r + 2, mask=mask_r, other=0.0).to(sizes.COMPUTE)
    if sizes.RAW:
        largest = tl.maximum(tl.maximum(backward, forward), content)
        backward, forward, content = exp(backward - largest), exp(forward - largest), exp(content - largest)
        total = backward + forward + content
        backward, forward, content = backward / total, forward / total, content / total
    return backward, forward, content


@triton.jit
def add_parts(total, ptr, mask, STRIDE: tl.constexpr, COUNT: tl.constexpr, AT_ONCE: tl.constexpr = 16):
    """`total` plus COUNT parts, STRIDE apart, added in order; AT_ONCE of them are loaded at a time."""
    LOADS: tl.constexpr = AT_ONCE if COUNT > AT_ONCE else COUNT
    for first in range(0, COUNT, LOADS):
        for offset in tl.static_range(LOADS):
            part = first + offset
            total += tl.load(ptr + part * STRIDE, mask=mask & (part < COUNT), other=0.0)
    return total
