"""The layers of a controller over a sequence: each kind's steps forward, and its steps backward without autograd.

The same cells as `dnc_reference.controller`. The products with the network's input are made for all steps before the
loop and are in `pre`, with the biases. At every step a cell adds what comes from below (the words read last for the
first layer, the hidden vector of the layer below for the others) and its own recurrence. A weight's gradient is one
product over all steps after the loop, from what the loop leaves in `d_pre` and `d_pre_hidden`.

Letters in every shape: T steps, B batch, H hidden size, G the size of all gates.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dnc_triton.sequence.product import Product


class Cell:
    """A layer without a state of its own, and what all kinds have in common: h = tanh(pre + W below).

    Args:
        gates: [T, B, G]: what is added up before the loop, which the forward turns into the gates themselves.
        below, recurrent: the products with what comes from below and with the layer's own hidden vector.
        hidden_bias: [G], what a GRU adds to the product with the hidden vector; for others it is in `gates`.
        clip: bound on the absolute value of hidden vector and state, or None.
        max_gradient: bound on that of the hidden vector's gradient, or None.
        kept: `count_kept` buffers [T, B, H] for what a backward needs besides the gates.
    """

    gates_per_unit = 1
    states = 0  # [B, H] each, the hidden vector first
    more_kept = 0  # besides what a clip needs

    def __init__(
        self,
        gates: Tensor,
        below: Product,
        recurrent: Product | None,
        hidden_bias: Tensor,
        clip: float | None,
        max_gradient: float | None,
        kept: list[Tensor],
    ) -> None:
        self.below, self.recurrent, self.hidden_bias, self.clip = below, recurrent, hidden_bias, clip
        self.max_gradient = max_gradient
        self.all_gates, self.pre = gates, gates.unbind(0)
        self.hidden_size = gates.shape[-1] // self.gates_per_unit
        self.kept, self.unclipped = kept[: self.more_kept], kept[self.more_kept :]
        self.d_pre = self.d_pre_hidden = gates  # until a backward makes its own

    @classmethod
    def count_kept(cls, clip: float | None) -> int:
        """How many buffers: those of the kind and, with a clip, one for each of its unclipped results."""
        return cls.more_kept + (0 if clip is None else max(cls.states, 1))

    def forward(self, step: int, below: Tensor, prev: list[Tensor], new: list[Tensor]) -> None:
        """One step.

        Args:
            step: which.
            below: [B, ·].
            prev: the layer's state before, [B, H] each, the hidden vector first.
            new: where the hidden vector and the rest of the state go, likewise.
        """
        gates = self._gates(step, below, prev).tanh_()
        new[0].copy_(gates)
        self._clip(step, new)

    def begin_backward(self, prev: list[Tensor]) -> None:
        """What depends on the forward alone, for all steps at once, from the states before them, [T, B, H] each."""
        self.make_d_pre()
        self.by = (1 - self.all_gates * self.all_gates).unbind(0)

    def above(self, step: int, new: list[Tensor]) -> Tensor:
        """What the layer above is given: the hidden vector before it is clipped, [B, H]."""
        return new[0] if self.clip is None else self.unclipped[0][step]

    def backward(
        self, step: int, d: list[Tensor], d_above: Tensor | None, d_below: Tensor, addend: Tensor | None
    ) -> None:
        """The adjoint of one step.

        Args:
            step: which.
            d: gradients of the new state, the hidden vector first; when this returns, of the state before.
            d_above: gradient of what the layer above was given, if there is one.
            d_below: [B, ·], where the gradient of what comes from below goes.
            addend: [B, ·], what is added to that, or None.
        """
        d_hidden = self._unclip(step, d, d_above)
        torch.mul(d_hidden, self.by[step], out=self.d_pre_steps[step])
        self.below.backward(self.d_pre_steps[step], d_below, addend)
        if self.recurrent is None:
            d_hidden.zero_()
        else:
            self.recurrent.backward(self.d_pre_steps[step], d_hidden)

    def backward_highest(
        self,
        step: int,
        d: list[Tensor],
        d_out: Tensor,
        interface: Product,
        d_vectors: Tensor,
        d_below: Tensor,
        addend: Tensor | None,
    ) -> None:
        """The adjoint of one step of the highest layer: output and interface vector are made from its hidden vector.

        Args:
            step, d, d_below, addend: as in `backward`.
            d_out: gradient of the hidden vector by way of the output, [B, H].
            interface: the product that makes interface vectors.
            d_vectors: gradient of these, [B, S].
        """
        d[0].add_(d_out)
        interface.add_backward(d_vectors, d[0])
        self.backward(step, d, None, d_below, addend)

    def _gates(self, step: int, below: Tensor, prev: list[Tensor]) -> Tensor:
        gates = self.pre[step]
        self.below.add_to(gates, below, gates)
        if self.recurrent is not None:
            self.recurrent.add_to(gates, prev[0], gates)
        return gates

    def make_d_pre(self) -> None:
        """Buffers for all steps, where `backward` leaves the gradients of the raw gates."""
        gates = self.all_gates  # laid out like these, for their alignment
        self.d_pre = self.d_pre_hidden = gates.new_empty_strided(gates.shape, gates.stride())
        self.d_pre_steps = self.d_pre.unbind(0)

    def each_d_pre(self) -> list[Tensor]:
        """Those buffers, each once."""
        return [self.d_pre]

    def _clip(self, step: int, new: list[Tensor]) -> None:
        if self.clip is not None:
            for tensor, unclipped in zip(new, self.unclipped, strict=True):
                unclipped[step] = tensor
                tensor.clamp_(-self.clip, self.clip)

    def _unclip(self, step: int, d: list[Tensor], d_above: Tensor | None) -> Tensor:
        """The gradient of the unclipped hidden vector, with what the layer above, given it, sends back; bounded."""
        if self.clip is not None:
            for gradient, beyond in zip(d, self._beyond, strict=True):
                gradient.masked_fill_(beyond[step], 0)  # an infinite one too
        if d_above is not None:
            d[0].add_(d_above)
        if self.max_gradient is not None:
            d[0].clamp_(-self.max_gradient, self.max_gradient)
        return d[0]

    @cached_property
    def _beyond(self) -> list[Tensor]:
        """Where a clip lets no gradient through, for all steps at once: a NaN is not within the bound either."""
        assert self.clip is not None
        return [~(tensor.abs() <= self.clip) for tensor in self.unclipped]


class RNN(Cell):
    """h' = tanh(pre + W below + U h)."""

    states = 1


class LSTM(Cell):
    """i, f, g, o = pre + W below + U h;  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c').

    Kept: tanh(g), tanh(c').
    """

    gates_per_unit = 4
    states = 2
    more_kept = 2

    def forward(self, step: int, below: Tensor, prev: list[Tensor], new: list[Tensor]) -> None:
        gates = self._gates(step, below, prev)
        i, f, g, o = gates.chunk(4, -1)
        tanh_g, tanh_cell = self.kept[0][step], self.kept[1][step]
        torch.tanh(g, out=tanh_g)
        gates.sigmoid_()
        hidden, cell = new
        torch.mul(f, prev[1], out=cell).addcmul_(i, tanh_g)
        torch.tanh(cell, out=tanh_cell)
        torch.mul(o, tanh_cell, out=hidden)
        self._clip(step, new)

    def begin_backward(self, prev: list[Tensor]) -> None:
        self.make_d_pre()
        i, f, _, o = self.all_gates.chunk(4, -1)
        g, tanh_cell = self.kept
        self.by_ifg = torch.stack([g * i * (1 - i), prev[1] * f * (1 - f), i * (1 - g * g)], dim=2).unbind(0)
        self.by_o = (tanh_cell * o * (1 - o)).unbind(0)
        self.by_cell = (o * (1 - tanh_cell * tanh_cell)).unbind(0)
        self.forget = f.unbind(0)
        d_ifg, d_o = self.d_pre.unflatten(-1, (4, -1)).split([3, 1], 2)
        self.d_ifg, self.d_o = d_ifg.unbind(0), d_o.squeeze(2).unbind(0)

    def backward(
        self, step: int, d: list[Tensor], d_above: Tensor | None, d_below: Tensor, addend: Tensor | None
    ) -> None:
        d_hidden, d_cell = self._unclip(step, d, d_above), d[1]
        d_cell.addcmul_(d_hidden, self.by_cell[step])
        torch.mul(d_cell.unsqueeze(1), self.by_ifg[step], out=self.d_ifg[step])
        torch.mul(d_hidden, self.by_o[step], out=self.d_o[step])
        d_cell.mul_(self.forget[step])
        self.below.backward(self.d_pre_steps[step], d_below, addend)
        assert self.recurrent is not None
        self.recurrent.backward(self.d_pre_steps[step], d_hidden)


class GRU(Cell):
    """r, z = σ(pre + W below + U h + b);  n = tanh(pre + W below + r (U h + b));  h' = (1 − z) n + z h.

    Kept: U h + b of n.
    """

    gates_per_unit = 3
    states = 1
    more_kept = 1

    def forward(self, step: int, below: Tensor, prev: list[Tensor], new: list[Tensor]) -> None:
        gates, hidden = self.pre[step], new[0]
        size = self.hidden_size
        assert self.recurrent is not None
        self.below.add_to(gates, below, gates)
        from_hidden = self.recurrent.add_to(self.hidden_bias, prev[0], self._from_hidden)
        reset_update, n = gates[:, : 2 * size], gates[:, 2 * size :]
        reset_update.add_(from_hidden[:, : 2 * size]).sigmoid_()
        self.kept[0][step].copy_(from_hidden[:, 2 * size :])
        n.addcmul_(gates[:, :size], from_hidden[:, 2 * size :]).tanh_()
        torch.lerp(n, prev[0], gates[:, size : 2 * size], out=hidden)
        self._clip(step, new)

    @cached_property
    def _from_hidden(self) -> Tensor:
        """Work space."""
        return torch.empty_like(self.pre[0])

    def make_d_pre(self) -> None:
        super().make_d_pre()
        self.d_pre_hidden = self.d_pre.new_empty_strided(self.d_pre.shape, self.d_pre.stride())
        self.d_hidden_steps = self.d_pre_hidden.unbind(0)

    def each_d_pre(self) -> list[Tensor]:
        return [self.d_pre, self.d_pre_hidden]

    def begin_backward(self, prev: list[Tensor]) -> None:
        self.make_d_pre()
        r, z, n = self.all_gates.chunk(3, -1)
        by_n = (1 - z) * (1 - n * n)
        by = [by_n * self.kept[0] * r * (1 - r), (prev[0] - n) * z * (1 - z), by_n]
        self.by = torch.stack(by, dim=2).unbind(0)  # [B, 3, H]
        self.reset, self.update = r.unbind(0), z.unbind(0)
        self.passed_on = torch.empty_like(self.kept[0][0])
        self.d_gates = self.d_pre.unflatten(-1, (3, -1)).unbind(0)

    def backward(
        self, step: int, d: list[Tensor], d_above: Tensor | None, d_below: Tensor, addend: Tensor | None
    ) -> None:
        d_hidden = self._unclip(step, d, d_above)
        assert self.recurrent is not None
        torch.mul(d_hidden.unsqueeze(1), self.by[step], out=self.d_gates[step])
        self.below.backward(self.d_pre_steps[step], d_below, addend)
        d_from_hidden = self.d_hidden_steps[step].copy_(self.d_pre_steps[step])
        d_from_hidden[:, 2 * self.hidden_size :].mul_(self.reset[step])
        torch.mul(d_hidden, self.update[step], out=self.passed_on)
        self.recurrent.backward(d_from_hidden, d_hidden)
        d_hidden.add_(self.passed_on)


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN, "feedforward": Cell}
