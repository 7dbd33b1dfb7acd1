"""The whole network, unfused: controller, interface, memory and output, for one step and over a sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dnc_reference.checks import check_bool, check_bound, check_floating, check_number, check_open_size, check_size
from dnc_reference.controller import CONTROLLERS, Controller
from dnc_reference.interface import activate_interface, check_strength, interface_sizes
from dnc_reference.memory import memory_step, without_autocast
from dnc_reference.types import DNCState, MemoryState

# How many steps share one copy of a weight that autocast has rounded. Gradients with respect to it are summed in its
# narrow dtype, which over a long sequence would lose the last terms; a copy for every step would take much memory.
ROUNDED_FOR = 16
InterfaceStep = Callable[..., tuple[Tensor, MemoryState]]


def interface_step(
    vector: Tensor,
    state: MemoryState,
    *,
    num_reads: int,
    num_writes: int,
    strength: str,
    stop_usage_gradient: bool,
) -> tuple[Tensor, MemoryState]:
    """The memory's part of a step, from the raw interface vector: activate it, then `memory_step`.

    Args:
        vector: [B, S], S the sum of `interface_sizes`.
        state: the memory before the step.
        num_reads, num_writes: R, K.
        strength: "oneplus" or "softplus".
        stop_usage_gradient: as in `memory_step`.

    Returns:
        read words [B, R, W] and the memory after the step.

    Raises:
        as `activate_interface` and `memory_step`.

    Source: Graves et al. 2016, Methods.
    """
    interface = activate_interface(
        vector, num_reads=num_reads, num_writes=num_writes, word_size=state.memory.shape[-1], strength=strength
    )
    return memory_step(interface, state, stop_usage_gradient=stop_usage_gradient)


class DNCCell(nn.Module):
    """One step of a Differentiable Neural Computer: its parameters and its equations.

    Args:
        input_size, hidden_size, output_size: of the input, of each controller layer, of the output.
        memory_size, word_size, num_reads, num_writes: N, W, R, K.
        controller: a key of `CONTROLLERS`, or a factory ``(input_size, hidden_size) -> nn.Module`` of a controller as
            `dnc_reference.controller` describes it. Its input is the step's input and the R·W numbers read last.
        num_layers, dropout: of a built-in controller, as in `nn.LSTM`.
        clip: bound on the absolute value of the controller's output and state and of the output; None for none.
        strength: "oneplus", as in the paper, or "softplus", as in DeepMind's published code.
        stop_usage_gradient: as in `memory_step`.
        max_activation_gradient: bound on each element of the gradient with respect to the hidden vectors of a built-in
            controller, at every step; None for none. The paper has 10. If the loss is scaled, as by a `GradScaler`,
            the scaled gradient is bounded: scale ``controller.max_activation_gradient`` by the same factor.
        device, dtype: of the parameters and the state; None for torch's defaults.

    Raises:
        ValueError: a size below 1, an unknown controller or strength, dropout outside [0, 1), a bound not above 0;
            num_layers, dropout or max_activation_gradient with a controller of your own.
        TypeError: a size that is no integer, a flag that is no bool, dropout or a bound that is no number, a dtype that
            PyTorch does not compute in; a controller that is neither a name nor a factory of one.

    Source: Graves et al. 2016, Methods, "Controller network", with the layers stacked as in `nn.LSTM`: the paper also
    feeds the input to every layer and every layer to the output. `clip`: DeepMind's published code, dnc.py.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        memory_size: int = 128,
        word_size: int = 64,
        num_reads: int = 4,
        num_writes: int = 1,
        controller: str | Callable[[int, int], nn.Module] = "lstm",
        num_layers: int = 1,
        dropout: float = 0.0,
        clip: float | None = None,
        strength: str = "oneplus",
        stop_usage_gradient: bool = False,
        max_activation_gradient: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(input_size=input_size, hidden_size=hidden_size, output_size=output_size, memory_size=memory_size)
        sizes.update(word_size=word_size, num_reads=num_reads, num_writes=num_writes, num_layers=num_layers)
        for name, size in sizes.items():
            check_size(name, size)
        check_strength(strength)
        check_bound("clip", clip)
        check_bound("max_activation_gradient", max_activation_gradient)
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        check_bool("stop_usage_gradient", stop_usage_gradient)
        if dtype is not None:
            check_floating("dtype", dtype)

        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, output_size
        self.memory_size, self.word_size = memory_size, word_size
        self.num_reads, self.num_writes = num_reads, num_writes
        # `torch.compile` takes only Python's own numbers, not NumPy's for example.
        self.num_layers, self.clip = num_layers, None if clip is None else float(clip)
        self.strength, self.stop_usage_gradient = strength, stop_usage_gradient
        self.controller_kind = controller if isinstance(controller, str) else "custom"

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        read_size = num_reads * word_size
        built_in: dict[str, Any] = dict(num_layers=num_layers, dropout=dropout)
        built_in["max_activation_gradient"] = max_activation_gradient
        self.controller = _make_controller(controller, input_size + read_size, hidden_size, **built_in, **factory)
        self.interface = nn.Linear(hidden_size, self.interface_size, **factory)
        self.output = nn.Linear(self.feature_size, output_size, **factory)
        if dropout > 0 and num_layers == 1:
            warnings.warn(f"dropout: {dropout} has no effect with num_layers=1, it acts between layers", stacklevel=3)

    @property
    def dropout(self) -> float:
        """That of the controller, to be changed in `controller.dropout.p`; 0 for a controller of your own."""
        return float(getattr(self.controller.dropout, "p", 0)) if isinstance(self.controller, Controller) else 0.0

    @property
    def max_activation_gradient(self) -> float | None:
        """That of the controller, to be changed there; None for a controller of your own."""
        return self.controller.max_activation_gradient if isinstance(self.controller, Controller) else None

    @property
    def interface_size(self) -> int:
        """S, the length of the interface vector."""
        return sum(interface_sizes(self.num_reads, self.num_writes, self.word_size).values())

    @property
    def feature_size(self) -> int:
        """H + R·W, the input size of the output layer."""
        return self.hidden_size + self.num_reads * self.word_size

    def like(self) -> Tensor:
        """A tensor with the dtype and device of the parameters, which are those of the state.

        Raises:
            TypeError: no parameter is floating point.
        """
        # Not `self.output.weight`: a parametrization may compute it, or not have been converted along with its parts.
        weight = self.output._parameters.get("weight")
        if weight is not None and weight.is_floating_point():
            return weight
        for parameter in self.parameters():  # the user may have put another module in the place of the output layer
            if parameter.is_floating_point():
                return parameter
        replicated = getattr(self.output, "weight", None)  # of a replica, which has no parameters
        if isinstance(replicated, Tensor) and replicated.is_floating_point():
            return replicated
        raise TypeError("parameters: expected at least one of a floating dtype, to give the state its dtype and device")

    def initial_state(self, batch_size: int) -> DNCState:
        """The state before the first step: zeros, in the parameters' dtype and on their device.

        Raises:
            TypeError: `batch_size` is no integer.
            ValueError: it is negative.
        """
        check_open_size("batch_size", batch_size)
        like = self.like()
        factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        return DNCState(
            controller=self.controller.initial_state(batch_size, **factory),  # type: ignore[operator]
            memory=MemoryState.zeros(
                batch_size, self.memory_size, self.word_size, self.num_reads, self.num_writes, **factory
            ),
            read_words=torch.zeros(batch_size, self.num_reads, self.word_size, **factory),
        )

    def forward(self, inputs: Tensor, state: DNCState) -> tuple[Tensor, DNCState]:
        """One step: inputs [B, input_size] → output [B, output_size], state."""
        features, state = self.advance(inputs, state)
        return self.project(features), state

    def advance(
        self, inputs: Tensor, state: DNCState, *, interface_step: InterfaceStep = interface_step
    ) -> tuple[Tensor, DNCState]:
        """One step without the output layer, on which nothing in the recurrence depends.

        Args:
            inputs: [B, input_size].
            state: of the step before.
            interface_step: computes the memory's part; has the signature of `interface_step`.

        Returns:
            features [B, H + R·W], the controller's output and the words read; the state after the step.

        Raises:
            TypeError, ValueError: the controller did not return an output [B, H] and a state, or the interface layer
                did not return [B, S]; and as `interface_step`.
        """
        hidden, controller_state, vector = self.control(inputs, state)
        # Under autocast the controller's products are rounded; the memory is not.
        with without_autocast(inputs.device):
            read_words, memory = interface_step(
                vector,
                state.memory,
                num_reads=self.num_reads,
                num_writes=self.num_writes,
                strength=self.strength,
                stop_usage_gradient=self.stop_usage_gradient,
            )
        features = torch.cat([hidden, read_words.flatten(1)], dim=-1)
        return features, DNCState(controller_state, memory, read_words)

    def control(self, inputs: Tensor, state: DNCState) -> tuple[Tensor, Any, Tensor]:
        """The controller's part of a step: its output [B, H], its new state, and the interface vector [B, S]."""
        dtype = state.read_words.dtype

        def carried(x: Any) -> Any:  # in the dtype of the state, whatever autocast made of it
            return self._clip(x.to(dtype)) if isinstance(x, Tensor) and x.is_floating_point() else x

        returned = self.controller(torch.cat([inputs, state.read_words.flatten(1)], dim=-1), state.controller)
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise TypeError(
                f"controller: expected it to return an output and a state, got {type(returned).__name__}"
                + (f" of {len(returned)}" if isinstance(returned, (tuple, list)) else "")
            )
        hidden, controller_state = returned
        if not isinstance(hidden, Tensor):
            raise TypeError(f"controller: expected it to return a tensor as its output, got {type(hidden).__name__}")
        if hidden.shape != (inputs.shape[0], self.hidden_size):
            raise ValueError(
                f"controller: expected it to return an output of shape {[inputs.shape[0], self.hidden_size]}, "
                f"got {list(hidden.shape)}"
            )
        hidden, controller_state = carried(hidden), tree_map(carried, controller_state)
        vector = self.interface(hidden)
        if not isinstance(vector, Tensor):
            raise TypeError(f"interface: expected it to return a tensor, got {type(vector).__name__}")
        if vector.shape != (inputs.shape[0], self.interface_size):
            raise ValueError(
                f"interface: expected it to return a tensor of shape {[inputs.shape[0], self.interface_size]}, "
                f"got {list(vector.shape)}"
            )
        return hidden, controller_state, vector.to(dtype)

    def project(self, features: Tensor) -> Tensor:
        """The output layer: features [..., H + R·W] → [..., output_size]."""
        return self._clip(self.output(features))

    def _clip(self, x: Tensor) -> Tensor:
        """x within the bound. Exactly at the bound the gradient passes, as by TensorFlow's `clip_by_value`.

        PyTorch's `clamp` did the same before 2.14; since then it passes none there.
        """
        return x if self.clip is None else torch.where(x.abs() <= self.clip, x, x.clamp(-self.clip, self.clip))

    def extra_repr(self) -> str:
        """The sizes, and of the other arguments those that are not the default."""
        shown = ["memory_size", "word_size", "num_reads", "num_writes", "controller_kind"]
        defaults = dict(num_layers=1, dropout=0.0, clip=None, strength="oneplus", stop_usage_gradient=False)
        defaults["max_activation_gradient"] = None
        shown += [name for name, default in defaults.items() if getattr(self, name) != default]
        sizes = f"{self.input_size}, {self.hidden_size}, {self.output_size}"
        return ", ".join([sizes, *(f"{name.removesuffix('_kind')}={getattr(self, name)!r}" for name in shown)])


def unroll(
    cell: DNCCell,
    inputs: Tensor,
    state: DNCState,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    interface_step: InterfaceStep = interface_step,
) -> tuple[Tensor, DNCState]:
    """A cell over a sequence, step by step.

    Args:
        cell: the network.
        inputs: [T, B, input_size].
        state: before the first step.
        lengths: [B] integer: row b runs for lengths[b] steps; after that its outputs are 0 and its state stays. What
            the inputs hold there, even NaN, changes no output, state or gradient.
        reset: [T, B] bool: True puts that row's state back to the initial one before that step.
        interface_step: as in `DNCCell.advance`.

    Returns:
        outputs [T, B, output_size] and the state after each row's last step.

    Raises:
        as `DNCCell.advance`. Lengths and resets are not checked here, but by `dnc_triton.DNC`.

    Source: Graves et al. 2016, Methods.
    """
    steps, batch = inputs.shape[:2]
    if steps == 0:
        return cell.project(inputs.new_empty(batch, 0, cell.feature_size)).transpose(0, 1), state
    running = None
    if lengths is not None:
        running = torch.arange(steps, device=inputs.device).unsqueeze(1) < lengths  # [T, B]
        inputs = torch.where(running.unsqueeze(-1), inputs, 0)
        reset = None if reset is None else reset & running
    initial = None if reset is None else cell.initial_state(batch)

    features = []
    for step in range(steps):
        if step % ROUNDED_FOR == 0 and not torch.compiler.is_compiling():
            torch.clear_autocast_cache()
        if reset is not None and initial is not None:
            state = initial.where(reset[step], state)
        step_features, new_state = cell.advance(inputs[step], state, interface_step=interface_step)
        state = new_state if running is None else new_state.where(running[step], state)
        features.append(step_features)
    # Batch first, as for every other part: hooks on it may rely on that, for per-sample gradients, say.
    outputs = cell.project(torch.stack(features, 1)).transpose(0, 1)
    if running is not None:
        outputs = torch.where(running.unsqueeze(-1), outputs, 0)
    return outputs, state


def _make_controller(
    controller: str | Callable[[int, int], nn.Module],
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int,
    dropout: float,
    max_activation_gradient: float | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    if isinstance(controller, str):
        if controller not in CONTROLLERS:
            names = ", ".join(map(repr, CONTROLLERS))
            raise ValueError(f"controller: expected one of {names} or a factory of your own, got {controller!r}")
        return Controller(
            controller,
            input_size,
            hidden_size,
            num_layers,
            dropout,
            max_activation_gradient=max_activation_gradient,
            device=device,
            dtype=dtype,
        )
    if isinstance(controller, nn.Module) or not callable(controller):
        raise TypeError(f"controller: expected a name or a factory, got {type(controller).__name__}")
    if num_layers != 1 or dropout != 0:
        raise ValueError(
            "num_layers, dropout: expected 1 and 0 with a controller of your own, which has its own layers, "
            f"got {num_layers} and {dropout}"
        )
    if max_activation_gradient is not None:
        raise ValueError(
            f"max_activation_gradient: expected None with a controller of your own, got {max_activation_gradient!r}"
        )
    module = controller(input_size, hidden_size)
    if not isinstance(module, nn.Module) or not callable(getattr(module, "initial_state", None)):
        raise TypeError(
            "controller: expected the factory to return an nn.Module with a method "
            f"initial_state(batch_size, *, device, dtype), got {type(module).__name__}"
        )
    return module.to(device=device, dtype=dtype)
