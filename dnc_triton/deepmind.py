"""Weights from DeepMind's published DNC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dnc_reference.checks import check_size
from dnc_reference.interface import interface_sizes
from dnc_triton.layer import DNC
from dnc_triton.weights import Weights

# Field of the interface → its linear layer in DeepMind's access.py.
_INTERFACE_LAYERS = {
    "read_keys": "read_keys",
    "write_keys": "write_keys",
    "write_vectors": "write_vectors",
    "read_strengths": "read_strengths",
    "write_strengths": "write_strengths",
    "erase_vectors": "erase_vectors",
    "free_gates": "free_gate",
    "allocation_gates": "allocation_gate",
    "write_gates": "write_gate",
    "read_modes": "read_mode",
}


def from_deepmind(
    variables: Mapping[str, Any],
    *,
    memory_size: int,
    word_size: int,
    num_reads: int,
    num_writes: int = 1,
    clip: float | None = None,
    batch_first: bool = True,
    dtype: torch.dtype | None = None,
) -> DNC:
    """A `DNC` with the weights and the semantics of one built with DeepMind's published code.

    As in that code, strengths pass through softplus and no gradient flows from usage to earlier writes.

    Args:
        variables: name → array, named as in a checkpoint of DeepMind's code: ``dnc/lstm/w_gates`` and so on, with any
            scope in front and with or without ``:0`` behind. Weights are [in, out]. Other names, such as an
            optimiser's, are ignored. The sizes of input, controller and output follow from the arrays.
        memory_size, word_size, num_reads, num_writes: N, W, R, K of the original.
        clip: the `clip_value` of the original (20 in DeepMind's training script); None if it had none.
        batch_first: of the new layer. DeepMind's is time first.
        dtype: of the new layer; None for torch's default.

    Returns:
        the layer, on the CPU.

    Raises:
        ValueError: a variable is missing, occurs twice, or has a shape that does not fit the sizes given; a size or
            clip that `DNC` refuses.
        TypeError: variables is no mapping of names to floating arrays; a size, clip, batch_first or dtype of the wrong
            type.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables: expected a mapping of names to arrays, got {type(variables).__name__}")
    sizes: dict[str, Any] = dict(memory_size=memory_size, word_size=word_size)
    sizes |= dict(num_reads=num_reads, num_writes=num_writes)
    for name, size in sizes.items():
        check_size(name, size)
    arrays: dict[str, Any] = {}
    for full_name, value in variables.items():
        if not isinstance(full_name, str):
            raise TypeError(f"variables: expected names as keys, got {full_name!r}")
        name = full_name.removesuffix(":0")
        if name in arrays:
            raise ValueError(f"variables: expected {name!r} once, got it as {name!r} and as {name + ':0'!r}")
        arrays[name] = value
    scope, weights = _scope(arrays), Weights("variables", arrays, sizes)

    def take(name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return weights.take(scope + name, shape)

    gates, output = take("lstm/w_gates"), take("output_linear/w")
    if gates.dim() != 2 or output.dim() != 2:
        raise ValueError(
            f"variables: expected lstm/w_gates and output_linear/w to be matrices, got shapes {list(gates.shape)} "
            f"and {list(output.shape)}"
        )
    read_size, hidden_size, output_size = num_reads * word_size, gates.shape[1] // 4, output.shape[1]
    input_size = gates.shape[0] - read_size - hidden_size
    if input_size < 1 or gates.shape[1] != 4 * hidden_size:
        raise ValueError(
            f"variables: expected {scope}lstm/w_gates of shape [input + {num_reads}·{word_size} + hidden, 4·hidden] "
            f"for num_reads={num_reads} and word_size={word_size}, got {list(gates.shape)}"
        )

    dnc = DNC(
        input_size,
        hidden_size,
        output_size,
        **sizes,
        batch_first=batch_first,
        clip=clip,
        strength="softplus",
        stop_usage_gradient=True,
        device="cpu",
        dtype=dtype,
    )
    gates_bias = take("lstm/b_gates", (4 * hidden_size,)).clone()
    # Sonnet adds 1 to the forget gate when it runs; torch does not, so it goes into the bias. Sonnet's gates are in the
    # order i, g, f, o, torch's in the order i, f, g, o.
    gates_bias[2 * hidden_size : 3 * hidden_size] += 1
    gates, gates_bias = (torch.cat([x.chunk(4, -1)[gate] for gate in (0, 2, 1, 3)], -1) for x in (gates, gates_bias))
    fields = interface_sizes(num_reads, num_writes, word_size)
    layers = {field: f"memory_access/{layer}" for field, layer in _INTERFACE_LAYERS.items()}
    dnc.load_state_dict(
        {
            "controller.layers.0.weight_ih": gates[: input_size + read_size].T,
            "controller.layers.0.weight_hh": gates[input_size + read_size :].T,
            "controller.layers.0.bias_ih": gates_bias,
            "controller.layers.0.bias_hh": torch.zeros_like(gates_bias),
            "interface.weight": torch.cat([take(f"{layers[f]}/w", (hidden_size, fields[f])) for f in fields], -1).T,
            "interface.bias": torch.cat([take(f"{layers[f]}/b", (fields[f],)) for f in fields]),
            "output.weight": take("output_linear/w", (hidden_size + read_size, output_size)).T,
            "output.bias": take("output_linear/b", (output_size,)),
        }
    )
    return dnc


def _scope(arrays: Mapping[str, Any]) -> str:
    """What precedes ``lstm/w_gates``: the names of the module and of the scopes around it."""
    name = "lstm/w_gates"
    scopes = [key.removesuffix(name) for key in arrays if key == name or key.endswith("/" + name)]
    if len(scopes) != 1:
        raise ValueError(f"variables: expected one name that ends in {name!r}, got {len(scopes)} in {sorted(arrays)}")
    return scopes[0]
