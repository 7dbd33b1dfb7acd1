"""Weights from the package `dnc` of PyPI, also known as pytorch-dnc."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnc_reference.checks import check_bool, check_size
from dnc_reference.interface import interface_sizes
from dnc_triton.layer import DNC
from dnc_triton.sequence.cells import CELLS
from dnc_triton.weights import Weights

# Field of the interface → its linear layer in the package's memory.py, in the order of the package's interface vector.
_INTERFACE_LAYERS = {
    "read_keys": "read_keys_transform",
    "read_strengths": "read_strengths_transform",
    "write_keys": "write_key_transform",
    "write_strengths": "write_strength_transform",
    "erase_vectors": "erase_vector_transform",
    "write_vectors": "write_vector_transform",
    "free_gates": "free_gates_transform",
    "allocation_gates": "allocation_gate_transform",
    "write_gates": "write_gate_transform",
    "read_modes": "read_modes_transform",
}
_SIZES = {"memory_size": "nr_cells", "word_size": "cell_size", "num_reads": "read_heads"}


class BoundedKeys(nn.Module):
    """tanh of the keys and write vectors, which come first in the interface vector: [..., S] → [..., S].

    Args:
        size: how many numbers they take up in the vector.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, vector: Tensor) -> Tensor:
        bounded, others = vector.split([self.size, vector.shape[-1] - self.size], -1)
        return torch.cat([torch.tanh(bounded), others], -1)

    def extra_repr(self) -> str:
        return str(self.size)


def from_pytorch_dnc(
    model: nn.Module | Mapping[str, Any],
    *,
    memory_size: int | None = None,
    word_size: int | None = None,
    num_reads: int | None = None,
    read_feedback: bool = False,
    dropout: float | None = None,
    batch_first: bool = True,
    dtype: torch.dtype | None = None,
) -> DNC:
    """A `DNC` with the weights and nearly the semantics of a `dnc.DNC` of PyPI's package `dnc` 2.0.0b1 or 1.1.0.

    The layer computes what the package's network does, except for the differences listed below. It passes keys and
    write vectors through tanh, as the package does and the paper does not: its `interface` is
    `nn.Sequential(linear, BoundedKeys)`, so it runs step by step, not as one operation. Strengths use softplus.

    Args:
        model: a `dnc.DNC` of 2.0.0b1, or the state_dict of one of 2.0.0b1 or 1.1.0, with any prefix before its names.
            Other names are ignored.
        memory_size, word_size, num_reads: N, W, R: the package's nr_cells, cell_size, read_heads. Required with a
            state_dict, which does not hold them; a module has its own.
        read_feedback: whether the controller sees what was read in the step before. The package's does not: in every
            step of a call it gets what the previous call read last, zeros in a first call. Hence False sets the weights
            of the read words to 0: over a sequence the outputs equal the package's, and training may find a use for the
            weights. True keeps them, for a model that was called one step at a time with the state of the step before.
        dropout: between the controller's layers; None for the module's own, or 0 with a state_dict, which has none.
        batch_first: of the new layer.
        dtype: of the new layer; None for torch's default.

    Returns:
        the layer, on the CPU, in the module's mode, train or eval, if one was given. Its state_dict does not fit a
        plain `DNC`: to load one, create the layer with this function.

    What the caller must make sure of, as a state_dict does not show it: that clip was 0 or at least 1; that an "rnn"
    had nonlinearity "tanh"; that the release was 1.1.0 or later. In releases up to 1.0.3 names and shapes are the
    same, but the cosine is divided by the word size, and up to 1.0.1 the softmax of the read modes is taken over the
    heads, which this layer cannot do.

    Equal: the controllers; the layout of the interface, head by head; strengths, gates, read modes; usage, retention,
    the allocation and its ε; erase, write, link, precedence, both directions, read; the output layer; the initial
    memory; the gradient, also that from usage to earlier writes.

    Not equal:
        - The norms of the content lookup: |x| = √(Σx² + ε) here, √Σx² there, ε = 1e-6. A word much longer than 0.001
          is looked up nearly the same, a shorter one is not. This alone keeps outputs from being the same to rounding.
        - Equally used slots: the lower comes first here; there the order is unspecified (`topk`). Slots that are the
          same otherwise may thus be swapped, which no output shows. Only here do usages with the same 1 − u count as
          equal.
        - softplus(x) above x = 20, where the package's omits log(1 + e⁻ˣ) ≤ 2e-9.
        - The controller's initial state: zeros here; random there in each call without a state, hidden and cell alike.
        - Outputs are [B, T, ·] with batch_first here; in 2.0.0b1 [T, B, ·] with it and [B, T, ·] without.
        - Padding: `lengths=` and packed batches work here; in 2.0.0b1 a packed batch raises an UnboundLocalError.
        - A state passed to the next sequence: its read words are seen by the first step here, by all steps there.
        - `bias=False` becomes biases of 0, which training may move.
        - clip: there only the controller's output is clipped. A bound of 1 or more does nothing to an LSTM, a GRU or a
          tanh, and the layer has none.

    Raises:
        ValueError: what has no counterpart here: num_layers above 1 (each reads once more within a step; num_layers
            here is the package's num_hidden_layers), nonlinearity "relu", clip between 0 and 1, the sparse memories of
            SAM and SDNC; a weight that is missing, unknown, or of a shape that does not fit the sizes; sizes that are
            not the module's own, or below 1; dropout out of range.
        TypeError: model is neither a `dnc.DNC` of 2.0.0b1 nor a mapping; a size or weight, or another argument, of the
            wrong type.

    Source: the package's dnc.py, memory.py and util.py.
    """
    check_bool("read_feedback", read_feedback)
    sizes: dict[str, Any] = {"memory_size": memory_size, "word_size": word_size, "num_reads": num_reads}
    if isinstance(model, nn.Module):
        sizes = _sizes_of(model, sizes)
        if dropout is None:
            dropout = float(model.dropout)  # type: ignore[arg-type]
        arrays: Mapping[str, Any] = model.state_dict()
    elif isinstance(model, Mapping):
        arrays = {str(name): value for name, value in model.items()}
    else:
        raise TypeError(f"model: expected a dnc.DNC or its state_dict, got {type(model).__name__}")
    for name, size in sizes.items():
        if size is None:
            raise TypeError(f"{name}: expected an integer, which a state_dict does not contain, got None")
        check_size(name, size)

    weights = Weights("model", arrays, sizes)
    scope, kind = _scope(arrays)
    layer = f"{scope}{kind}_layer_0."
    if f"{scope}{kind}_layer_1.weight_ih_l0" in arrays:
        raise ValueError("model: expected num_layers=1, for a DNC here reads once in a step, got more layers")
    memories = [f"{scope}rnn_layer_memory_{which}." for which in ("shared", "0")]
    memory = next((prefix for prefix in memories if any(name.startswith(prefix) for name in arrays)), memories[0])
    input_size, hidden_size, num_layers = _sizes_of_controller(weights, layer)

    dnc = DNC(
        input_size,
        hidden_size,
        input_size,  # the package's outputs have the size of its inputs
        **sizes,
        controller=kind,
        num_layers=num_layers,
        dropout=0.0 if dropout is None else dropout,
        batch_first=batch_first,
        strength="softplus",
        device="cpu",
        dtype=dtype,
    )
    read_size = dnc.feature_size - hidden_size
    rows = CELLS[kind].gates_per_unit * hidden_size
    ours = _controller(weights, layer, rows, input_size + read_size, hidden_size, num_layers)
    if not read_feedback:
        ours["controller.layers.0.weight_ih"][:, input_size:] = 0
    fields = interface_sizes(sizes["num_reads"], 1, sizes["word_size"])
    ours |= _interface(weights, memory, fields, hidden_size)
    ours["output.weight"] = weights.take(scope + "output.weight", (input_size, hidden_size + read_size))
    ours["output.bias"] = weights.take(scope + "output.bias", (input_size,))
    unused = sorted(name for name in weights.unused if name.startswith((layer, memory)))
    if unused:
        raise ValueError(f"model: expected no weights but those of a dense dnc.DNC, got also {unused}")

    dnc.load_state_dict(ours)
    bounded = sum(fields[name] for name in ("read_keys", "write_keys", "write_vectors"))
    dnc.interface = nn.Sequential(dnc.interface, BoundedKeys(bounded))  # type: ignore[assignment]
    return dnc.train(model.training) if isinstance(model, nn.Module) else dnc


def _sizes_of_controller(weights: Weights, layer: str) -> tuple[int, int, int]:
    """Input size, hidden size and number of layers."""
    first, recurrent = (weights.take(layer + name) for name in ("weight_ih_l0", "weight_hh_l0"))
    for name, matrix in (("weight_ih_l0", first), ("weight_hh_l0", recurrent)):
        if matrix.dim() != 2:
            raise ValueError(f"model: expected {layer}{name} to be a matrix, got shape {list(matrix.shape)}")
    num_reads, word_size = weights.sizes["num_reads"], weights.sizes["word_size"]
    input_size = first.shape[1] - num_reads * word_size
    if input_size < 1:
        raise ValueError(
            f"model: expected {layer}weight_ih_l0 to have more columns than the {num_reads * word_size} for "
            f"num_reads={num_reads} and word_size={word_size}, got shape {list(first.shape)}"
        )
    layers = [name for name in weights.arrays if re.fullmatch(re.escape(layer) + r"weight_ih_l\d+", name)]
    return input_size, recurrent.shape[1], len(layers)


def _controller(
    weights: Weights, layer: str, rows: int, columns: int, hidden_size: int, num_layers: int
) -> dict[str, Tensor]:
    """The weights of a controller by our names; `columns` are those of its first layer, `rows` those of every layer."""
    ours, has_bias = {}, layer + "bias_ih_l0" in weights.arrays
    for index in range(num_layers):
        shapes = {"ih": (rows, hidden_size if index else columns), "hh": (rows, hidden_size)}
        for name, shape in shapes.items():
            weight, bias = (f"{layer}{part}_{name}_l{index}" for part in ("weight", "bias"))
            to = f"controller.layers.{index}"
            ours[f"{to}.weight_{name}"] = weights.take(weight, shape).clone()
            ours[f"{to}.bias_{name}"] = weights.take(bias, (rows,)) if has_bias else torch.zeros(rows, device="cpu")
    return ours


def _interface(weights: Weights, memory: str, fields: dict[str, int], hidden_size: int) -> dict[str, Tensor]:
    """The interface layer by our names and in our order; the package has one layer for all fields or one for each."""
    ours = {}
    for part, columns in (("weight", (hidden_size,)), ("bias", ())):
        if f"{memory}interface_weights.{part}" in weights.arrays:
            vector = weights.take(f"{memory}interface_weights.{part}", (sum(fields.values()), *columns))
            pieces = vector.split([fields[name] for name in _INTERFACE_LAYERS])
            of_field = dict(zip(_INTERFACE_LAYERS, pieces, strict=True))
        else:
            names = {field: f"{memory}{_INTERFACE_LAYERS[field]}.{part}" for field in fields}
            of_field = {field: weights.take(name, (fields[field], *columns)) for field, name in names.items()}
        ours[f"interface.{part}"] = torch.cat([of_field[field] for field in fields])
    return ours


def _sizes_of(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a `dnc.DNC`, which must have a counterpart here."""
    others = ("num_layers", "dropout", "clip", "rnn_type", "nonlinearity", "share_memory_between_layers")
    if not all(hasattr(model, name) for name in (*_SIZES.values(), *others)):
        raise TypeError(
            f"model: expected a dnc.DNC of release 2.0.0b1 (one of 1.1.0 by its state_dict), got {type(model).__name__}"
        )
    if hasattr(model, "sparse_reads"):
        raise ValueError(f"model: expected a dense memory, there are no sparse ones here, got {type(model).__name__}")
    if model.num_layers != 1:
        raise ValueError(
            f"model: expected num_layers=1, for a DNC here reads once in a step, got num_layers={model.num_layers}"
        )
    if str(model.rnn_type).lower() == "rnn" and model.nonlinearity != "tanh":
        raise ValueError(f"model: expected nonlinearity='tanh', the only one here, got {model.nonlinearity!r}")
    if not (model.clip == 0 or model.clip >= 1):  # type: ignore[operator]
        raise ValueError(
            "model: expected clip=0 or one of at least 1, for here the state that is carried is clipped as well, "
            f"got clip={model.clip!r}"
        )
    sizes = {name: getattr(model, attribute) for name, attribute in _SIZES.items()}
    for name, size in given.items():
        if size is None:
            continue
        check_size(name, size)
        if size != sizes[name]:
            raise ValueError(f"{name}: expected None or the module's own {sizes[name]}, got {size!r}")
    return sizes


def _scope(weights: Mapping[str, Any]) -> tuple[str, str]:
    """The prefix of the controller's name, and its kind."""
    found = [re.fullmatch(r"(|.*\.)(lstm|gru|rnn)_layer_0\.weight_ih_l0", name) for name in weights]
    scopes = [(match[1], match[2]) for match in found if match]
    if len(scopes) != 1:
        raise ValueError(
            "model: expected one weight named lstm_layer_0.weight_ih_l0, or gru or rnn for lstm, "
            f"got {len(scopes)} in {sorted(weights)}"
        )
    return scopes[0]
