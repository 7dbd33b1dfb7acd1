"""What Triton's interpreter, which runs kernels on a CPU, gets wrong for us."""

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def keep_truth() -> None:
    """Let a comparison of two scalars stay boolean where it is spread over a mask.

    The interpreter gives its result the dtype of what was compared, and the mask is filled with numbers of that dtype:
    of int32, which Triton 3.9 was the first to refuse.
    """
    spread = InterpreterBuilder.create_splat

    def spread_truth(self: Any, block_type: Any, scalar: Any) -> Any:
        if scalar.data.dtype == np.bool_:
            scalar = TensorHandle(scalar.data, tl.int1)
        return spread(self, block_type, scalar)

    InterpreterBuilder.create_splat = spread_truth
