"""Controllers: they decide, from the input and from what was read last, what to ask of the memory next.

A controller is an `nn.Module` with
    initial_state(batch_size, *, device, dtype) -> a nest of tensors, batch first;
    forward(inputs [B, I], state) -> (hidden [B, H], state).
The built-in ones are stacks of the cells below; anything else that keeps these two promises serves as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

CellState = tuple[Tensor, ...]


class LSTMCell(RNNCellBase):
    """Long short-term memory, with the parameters, their order and their initial values of `torch.nn.LSTMCell`.

    i, f, g, o = W_ih x + b_ih + W_hh h + b_hh;  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c').

    Unlike torch's, it keeps h and c in the dtype of the state under autocast; only the products are rounded.
    """

    states = 2

    def __init__(self, input_size: int, hidden_size: int, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias=True, num_chunks=4, **factory)

    def forward(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        """inputs [B, I], state (hidden [B, H], cell [B, H]) → hidden [B, H], state."""
        hidden, cell = state
        gates = F.linear(inputs, self.weight_ih, self.bias_ih) + F.linear(hidden, self.weight_hh, self.bias_hh)
        i, f, g, o = gates.to(cell.dtype).chunk(4, dim=-1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return hidden, (hidden, cell)


class GRUCell(RNNCellBase):
    """Gated recurrent unit, with the parameters, their order and their initial values of `torch.nn.GRUCell`.

    r, z = σ(W_i x + b_i + W_h h + b_h);  n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h' = (1 − z) n + z h.
    """

    states = 1

    def __init__(self, input_size: int, hidden_size: int, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias=True, num_chunks=3, **factory)

    def forward(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        """inputs [B, I], state (hidden [B, H],) → hidden [B, H], state."""
        (hidden,) = state
        from_inputs = F.linear(inputs, self.weight_ih, self.bias_ih).to(hidden.dtype).chunk(3, dim=-1)
        from_hidden = F.linear(hidden, self.weight_hh, self.bias_hh).to(hidden.dtype).chunk(3, dim=-1)
        reset = torch.sigmoid(from_inputs[0] + from_hidden[0])
        update = torch.sigmoid(from_inputs[1] + from_hidden[1])
        new = torch.tanh(from_inputs[2] + reset * from_hidden[2])
        hidden = new + update * (hidden - new)
        return hidden, (hidden,)


class RNNCell(RNNCellBase):
    """Plain recurrence, with the parameters and their initial values of `torch.nn.RNNCell`.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh).
    """

    states = 1

    def __init__(self, input_size: int, hidden_size: int, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias=True, num_chunks=1, **factory)

    def forward(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        """inputs [B, I], state (hidden [B, H],) → hidden [B, H], state."""
        (hidden,) = state
        mixed = F.linear(inputs, self.weight_ih, self.bias_ih) + F.linear(hidden, self.weight_hh, self.bias_hh)
        hidden = torch.tanh(mixed.to(hidden.dtype))
        return hidden, (hidden,)


class FeedForwardCell(nn.Linear):
    """No recurrence: h = tanh(W x + b). All that such a DNC remembers, it remembers in its memory."""

    states = 0

    def forward(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:  # type: ignore[override]
        """inputs [B, I], state () → hidden [B, H], ()."""
        return torch.tanh(F.linear(inputs, self.weight, self.bias)), ()


class _LimitGradient(torch.autograd.Function):
    """The identity, whose gradient is bounded element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.bound = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.bound, ctx.bound), None


class _LimitGradientForwardMode(_LimitGradient):
    """With a forward-mode derivative; `torch.compile` refuses to trace a function that has one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


@torch.library.custom_op("dnc_reference::limit_gradient", mutates_args=())
def _limit_exported(x: Tensor, bound: float) -> Tensor:
    """The same for an exported program, as `torch.export` drops the backward of an autograd function."""
    return x.clone()


_limit_exported.register_fake(lambda x, bound: torch.empty_like(x))
_limit_exported.register_autograd(_LimitGradient.backward, setup_context=_LimitGradient.setup_context)


def _limit_gradient(x: Tensor, bound: float) -> Tensor:
    if torch.compiler.is_exporting():
        return _limit_exported(x, bound) if torch.is_grad_enabled() else x
    plain = torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    limit = _LimitGradient if plain else _LimitGradientForwardMode
    limited: Tensor = limit.apply(x, bound)
    return limited


CONTROLLERS: dict[str, Any] = {"lstm": LSTMCell, "gru": GRUCell, "rnn": RNNCell, "feedforward": FeedForwardCell}


class Controller(nn.Module):
    """A stack of cells of one kind: each layer's hidden vector is the next one's input, the last one's is the output.

    Args:
        kind: a key of `CONTROLLERS`.
        input_size: of the whole input, the read words included.
        hidden_size: H, of every layer.
        num_layers: at least 1.
        dropout: probability with which a number passed from one layer to the next is dropped, as in `nn.LSTM`.
        max_activation_gradient: bound on the absolute value of each element of the gradient with respect to each
            layer's hidden vector, which bounds what flows back through time; None for none.
    """

    def __init__(
        self,
        kind: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        *,
        max_activation_gradient: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        cell = CONTROLLERS[kind]
        self.states_per_layer = cell.states
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(cell(size, hidden_size, device=device, dtype=dtype) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        self.max_activation_gradient = None if max_activation_gradient is None else float(max_activation_gradient)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[CellState, ...]:
        """Zeros: per layer a tuple of tensors [B, H]; (hidden, cell), (hidden,) or ()."""
        shape = (batch_size, self.hidden_size)
        return tuple(
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(self.states_per_layer))
            for _ in self.layers
        )

    def forward(self, inputs: Tensor, state: tuple[CellState, ...]) -> tuple[Tensor, tuple[CellState, ...]]:
        """inputs [B, I], state as `initial_state` gives it → hidden [B, H], state."""
        hidden, states = inputs, []
        for index, (layer, layer_state) in enumerate(zip(self.layers, state, strict=True)):
            hidden, layer_state = layer(self.dropout(hidden) if index else hidden, layer_state)
            if self.max_activation_gradient is not None:
                hidden = _limit_gradient(hidden, self.max_activation_gradient)
                layer_state = (hidden, *layer_state[1:]) if layer_state else ()
            states.append(layer_state)
        return hidden, tuple(states)
