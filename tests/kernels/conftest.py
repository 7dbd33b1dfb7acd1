"""The tests of the kernels run them on the CPU, in Triton's interpreter.

Triton decides when it is imported whether its functions are interpreted, its own (`tl.sort`, `tl.sum`) as well as ours,
and asks again at each call; the dispatcher asks the environment too. So Triton and the kernels are imported here with
TRITON_INTERPRET=1, and each test of this directory runs with it: the other tests do not see it.

Where there is a GPU nothing is interpreted unless the environment already asks for it: tests/gpu runs the same tests on
the device, which an interpreted Triton could not.
"""

import os
import sys

import numpy as np
import pytest
import torch

VARIABLE = "TRITON_INTERPRET"
INTERPRETED = os.environ.get(VARIABLE) == "1" or not torch.cuda.is_available()


def _import_interpreted() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        from dnc_triton.kernels.gradients import weight_gradients_kernel
        from dnc_triton.kernels.lstm import lstm_forward_kernel
        from dnc_triton.kernels.products import product_kernel
        from dnc_triton.kernels.sequence import sequence_forward_kernel
        from dnc_triton.kernels.step import step_forward_kernel

    of_steps = step_forward_kernel, sequence_forward_kernel, lstm_forward_kernel, product_kernel
    functions = (*of_steps, weight_gradients_kernel, tl.sort)
    if not all(isinstance(function, InterpretedFunction) for function in functions):
        raise pytest.UsageError(f"Triton was imported without {VARIABLE}=1, by {sys.argv[0]} or one of its plugins")


def _lose_nan_as_a_device_does() -> None:
    """Compiled, `tl.maximum` and `tl.minimum` give the other argument where one is NaN; interpreted, they give NaN."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in [("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)]:
        assert hasattr(InterpreterBuilder, name)
        setattr(InterpreterBuilder, name, lambda self, a, b, function=function: self.binary_op(a, b, function))


if INTERPRETED:
    _import_interpreted()
    from quick import make_quick  # imports Triton

    make_quick()
    _lose_nan_as_a_device_does()


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip(f"there is a GPU: `pytest -m gpu tests/gpu` runs this on it, {VARIABLE}=1 on the CPU")
    monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
