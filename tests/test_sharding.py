"""docs/sharding.md: three collectives are all that a row-sharded step needs, and its numbers are what its code prints.

The devices are simulated: each computes from its own rows, from what every device has, and from what the collectives
give it. So the page's list of what is local and what is not is checked against the reference.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import blocks
from torch import Tensor

from dnc_reference import Interface, MemoryState, addressing, memory_step

PAGE = Path(__file__).parent.parent / "docs" / "sharding.md"
B, W, R = 2, 5, 3


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's code defines, and as `printed` what it prints."""
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks(PAGE.read_text()):
            if block.language == "python":
                exec(block.text, namespace)
    return namespace | {"printed": printed.getvalue()}


def test_the_tables_are_what_the_code_prints(page):
    rows = page["printed"].splitlines()
    assert len(rows) >= 8
    text = PAGE.read_text()
    assert [row for row in rows if row not in text] == []


@dataclass
class Device:
    """What one device has: rows of its own, and vectors over all slots that every device has."""

    rows: slice
    memory: Tensor  # [B, N/P, W]
    usage: Tensor  # [B, N/P]
    link: Tensor  # [B, N/P, N]
    precedence: Tensor  # [B, N]
    read_weights: Tensor  # [B, R, N]
    write_weights: Tensor  # [B, N]


class Wires:
    """Collectives over lists with an entry per device; they count the numbers a device receives per batch row."""

    def __init__(self) -> None:
        self.received, self.calls = 0, 0

    def gather(self, pieces: list[list[Tensor]]) -> list[list[Tensor]]:
        """Everybody gets everybody's pieces: per piece the list over devices."""
        self.calls += 1
        self.received += sum(piece[0].numel() for device in pieces[1:] for piece in device)
        return [list(column) for column in zip(*pieces, strict=True)]

    def reduce_scatter(self, partial: list[Tensor]) -> list[Tensor]:
        """The sum over devices, each gets its part of the last axis."""
        self.calls += 1
        parts = sum(partial).chunk(len(partial), -1)
        self.received += parts[0][0].numel() * (len(partial) - 1)
        return list(parts)


def sharded_step(interface: Interface, devices: list[Device], wires: Wires) -> tuple[Tensor, list[Device]]:
    # 1: usage and the scores of the write lookup, from everybody's own rows.
    sent = []
    for d in devices:
        retention = addressing.retention(interface.free_gates, d.read_weights[..., d.rows])
        usage = addressing.update_usage(d.usage, d.write_weights[:, None, d.rows], retention)
        scores = addressing.cosine_similarity(d.memory, interface.write_keys) * interface.write_strengths.unsqueeze(-1)
        sent.append([usage, scores])
    usages, scores = wires.gather(sent)
    usage = torch.cat(usages, -1)
    allocation = addressing.allocation_weights(usage).unsqueeze(1)
    content = torch.cat(scores, -1).softmax(-1)
    write = addressing.write_weights(content, allocation, interface.allocation_gates, interface.write_gates)

    # 2: own rows of memory and link; the backward weights are a sum over rows.
    new, forwards, partial = [], [], []
    for d in devices:
        memory = addressing.update_memory(
            d.memory, write[..., d.rows], interface.erase_vectors, interface.write_vectors
        )
        own, full = write[:, 0, d.rows].unsqueeze(-1), write[:, 0].unsqueeze(-2)
        link = (1 - own - full) * d.link + own * d.precedence.unsqueeze(-2)
        link[..., d.rows].diagonal(dim1=-2, dim2=-1).zero_()
        precedence = addressing.update_precedence(d.precedence, write[:, 0])
        new.append(Device(d.rows, memory, usage[:, d.rows], link, precedence, d.read_weights, write[:, 0]))
        forwards.append(d.read_weights @ link.mT)
        partial.append(d.read_weights[..., d.rows] @ link)
    backwards = wires.reduce_scatter(partial)

    # 3: what is needed to finish the read softmax and the read, without asking again.
    sent = []
    modes = interface.read_modes.unsqueeze(-1)
    for d, forward, backward in zip(new, forwards, backwards, strict=True):
        directed = modes[:, :, 0] * backward + modes[:, :, 1] * forward
        scores = addressing.cosine_similarity(d.memory, interface.read_keys) * interface.read_strengths.unsqueeze(-1)
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp()
        sums = weights.sum(-1, keepdim=True)
        sent.append([directed, weights, largest, sums, directed @ d.memory, weights @ d.memory])
    directed, weights, largest, sums, directed_words, content_words = wires.gather(sent)
    overall = torch.stack(largest).amax(0)
    scales = [(one - overall).exp() for one in largest]
    total = sum(s * scale for s, scale in zip(sums, scales, strict=True))
    scales = [modes[:, :, 2] * scale / total for scale in scales]
    content = torch.cat([w * scale for w, scale in zip(weights, scales, strict=True)], -1)
    words = sum(directed_words) + sum(w * scale for w, scale in zip(content_words, scales, strict=True))
    for d in new:
        d.read_weights = torch.cat(directed, -1) + content
    return words, new


def random_interface() -> Interface:
    shapes = Interface.shapes(B, W, R)
    fields = {name: torch.rand(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("read_keys", "write_keys", "write_vectors"):
        fields[name] = torch.randn(shapes[name], dtype=torch.float64)
    fields["read_strengths"] = 1 + 9 * fields["read_strengths"]
    fields["read_modes"] = fields["read_modes"].softmax(-1)
    return Interface(**fields)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_three_collectives_make_a_step(count, page):
    slots, steps = 12, 6
    state = MemoryState.zeros(B, slots, W, R, dtype=torch.float64)
    rows = [slice(i * slots // count, (i + 1) * slots // count) for i in range(count)]
    devices = [Device(r, state.memory[:, r], state.usage[:, r], state.link[:, 0, r], state.precedence[:, 0],
                      state.read_weights, state.write_weights[:, 0]) for r in rows]  # fmt: skip
    for _ in range(steps):
        interface, wires = random_interface(), Wires()
        expected, state = memory_step(interface, state)
        words, devices = sharded_step(interface, devices, wires)
        torch.testing.assert_close(words, expected, rtol=0, atol=1e-12)
        assert wires.calls == 3
        assert wires.received == page["received"](slots, W, R, count)
    whole = MemoryState(
        torch.cat([d.memory for d in devices], 1),
        torch.cat([d.usage for d in devices], 1),
        torch.cat([d.link for d in devices], 1).unsqueeze(1),
        devices[0].precedence.unsqueeze(1),
        devices[-1].read_weights,
        devices[0].write_weights.unsqueeze(1),
    )
    torch.testing.assert_close(whole, state, rtol=0, atol=1e-12)
