"""The small functions that the kernels share, by themselves."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.common import exp, sigmoid, softplus, tanh

FUNCTIONS = {"exp": torch.exp, "sigmoid": torch.sigmoid, "softplus": torch.nn.functional.softplus, "tanh": torch.tanh}
BLOCK = 1024


def function_kernel(x_ptr, out_ptr, size, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    if NAME == "exp":
        y = exp(x)
    elif NAME == "sigmoid":
        y = sigmoid(x)
    elif NAME == "softplus":
        y = softplus(x)
    else:
        y = tanh(x)
    tl.store(out_ptr + i, y, mask=i < size)


def run(name: str, x: Tensor) -> Tensor:
    """Decided here, in a test, whether that is interpreted, as for the functions it calls."""
    out = torch.full_like(x, torch.nan)
    triton.jit(function_kernel)[(triton.cdiv(len(x), BLOCK),)](x, out, len(x), NAME=name, BLOCK=BLOCK)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """A few units in the last place, however large or small the argument: what is left over is relative."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 1.9, 4000, dtype=torch.float64)  # up to 79: e⁻ˣ is no subnormal
    x = (size * (torch.randint(0, 2, size.shape, generator=generator) * 2 - 1)).to(dtype)
    if name == "softplus":
        exact = torch.logaddexp(x.double(), torch.zeros_like(x, dtype=torch.float64))
    else:
        exact = FUNCTIONS[name](x.double())
    error = (run(name, x.to(device)).cpu().double() - exact).abs() / exact.abs()
    assert error.max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_there_is_no_number(name: str, device: torch.device) -> None:
    x = torch.tensor([-torch.inf, -200.0, -0.0, 0.0, 200.0, torch.inf, torch.nan], device=device)
    torch.testing.assert_close(run(name, x), FUNCTIONS[name](x), equal_nan=True, rtol=1e-6, atol=0.0)
