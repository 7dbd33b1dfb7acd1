"""What a sequence by kernels keeps for its backward, what it recomputes, and what it does without a backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_sequence_kept
import torch
from helpers import assert_close, assert_same_bits, total
from parity import launches_in_margins
from sequence_parity import most_allocated
from test_kernel_layer import CLOSE, INPUTS, OUTPUTS, each_backend
from test_kernel_sequence import BACKEND, draw, make, poisoned, run

from dnc_triton import DNC, dispatch
from dnc_triton.kernels import gradients, lstm, products, step_launch
from dnc_triton.kernels.layout import Layout, default_layout
from dnc_triton.sequence import one_launch, op, triton_memory, unroll
from dnc_triton.sequence.one_launch import OneLaunchSequence
from dnc_triton.sequence.settings import SequenceSettings


def test_a_long_sequence_without_gradients_keeps_little(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes in chunks. A product over fewer steps may sum in another order."""
    dnc = make(device, backend=BACKEND)
    inputs, state = draw(dnc, 7)
    call = {"lengths": [7, 4], "reset": torch.arange(14, device=device).view(2, 7) % 5 == 3}
    whole = dnc(inputs, state, **call)
    monkeypatch.setattr(OneLaunchSequence, "chunk", 3)
    entries = []
    allocate = OneLaunchSequence.allocate
    monkeypatch.setattr(
        OneLaunchSequence, "allocate", staticmethod(lambda *args: entries.append(args[2]) or allocate(*args))
    )
    with torch.no_grad():
        assert_close(dnc(inputs, state, **call), whole, rtol=1e-13, atol=1e-15)
    assert entries == [3, 3, 1]
    with torch.no_grad():
        outputs, state = dnc.step(inputs[:, 0], state)
    assert_close(outputs, whole[0][:, 0], **CLOSE)


@pytest.fixture
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not launched. What they are launched on is allocated all the same."""
    for module in (gradients, lstm, one_launch, products, step_launch):
        monkeypatch.setattr(module, "launch_or_compile", lambda *arguments, **options: None)


@pytest.mark.usefixtures("_nothing_runs")
@each_backend
def test_memory_without_gradients_does_not_grow_with_the_sequence(backend: str, device: torch.device) -> None:
    dnc = make(device, sizes=(32, 4, 2), backend=backend)

    def most(steps: int, *, keep: bool = False) -> int:
        """Without the outputs, in pieces and as a whole."""
        inputs, state = draw(dnc, steps)
        with torch.set_grad_enabled(keep):
            return most_allocated(lambda: dnc(inputs, state)) - 2 * inputs.numel() // INPUTS * OUTPUTS * 8

    short, long = most(192), most(512)
    assert long < 1.1 * short
    assert most(192, keep=True) > 2 * short  # it does count
    test_sequence_kept.check_nothing_is_kept(backend)


@pytest.mark.parametrize("slots", [5, 65])
def test_checkpoints_are_for_the_kernels_of_a_step(
    slots: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their default layout, for what was measured is one launch for all steps."""
    dnc = make(device, sizes=(slots, 3, 1), checkpoint=2, backend=BACKEND)
    inputs, state = draw(dnc, 2, batch=1)
    asked = []

    def run_sequence(settings: SequenceSettings, *given: Any) -> list[torch.Tensor]:
        asked.append((settings.layout, settings.checkpoint))
        return op.run_sequence(settings, *given)

    monkeypatch.setattr(unroll, "run_sequence", run_sequence)
    monkeypatch.setattr(OneLaunchSequence, "__init__", None)
    actual = run(dnc, inputs, state, BACKEND)
    assert asked == [(default_layout(slots), 2)]
    assert_close(actual, run(dnc, inputs, state, "reference"), **CLOSE, name="")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    ("backend", "checkpoint"),
    [
        pytest.param("triton_fused", 3, marks=pytest.mark.slow),  # in the interpreter
        pytest.param("triton_split", 2, marks=pytest.mark.slow),
        ("triton_split", 5),
    ],
)
def test_lean_is_full_to_the_last_bit(
    backend: str, checkpoint: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three launches links are recomputed in registers, over a few steps, which are other ones if lean."""
    full, lean = (make(device, checkpoint=every, dtype=dtype) for every in (None, checkpoint))
    inputs, state = draw(full, 6)
    reset = torch.tensor([[0, 1, 0, 0, 0, 1], [1, 0, 1, 0, 0, 0]], dtype=torch.bool, device=device)
    # In 16 bits without resets, after which too few updates follow each other for a rounding between two to be seen.
    call = {} if dtype == torch.bfloat16 else {"lengths": [6, 4], "reset": reset}
    check_lean(lean, full, lambda dnc: run(dnc, inputs, state, backend, **call), 6, monkeypatch)


def check_lean(lean: DNC, full: DNC, run: Callable[[DNC], Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, by twice as many steps forward."""
    launches: list[int] = []
    launch = triton_memory.launch_forward
    monkeypatch.setattr(
        triton_memory, "launch_forward", lambda *given, **options: (launches.append(1), launch(*given, **options))
    )
    results = []
    for dnc, expected in ((lean, 2 * steps), (full, steps)):
        launches.clear()
        results.append(run(dnc))
        assert len(launches) == expected
    assert_same_bits(*results)


def test_a_lean_backward_twice(device: torch.device) -> None:
    dnc = make(device, checkpoint=3, backend="triton_split")
    outputs, final = dnc(*draw(dnc, 5, batch=1))
    before = final.map(torch.clone)
    first, second = (
        torch.autograd.grad(total(outputs, final), list(dnc.parameters()), retain_graph=True) for _ in range(2)
    )
    assert_same_bits((first, final), (second, before))


@pytest.mark.parametrize("checkpoint", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["triton_fused", pytest.param("triton_split", marks=pytest.mark.slow)])
def test_lean_is_full_in_float64(
    backend: str, checkpoint: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stretches that end with the sequence and that do not."""
    full, lean = (make(device, checkpoint=every) for every in (None, checkpoint))
    inputs, state = draw(full, 3, batch=1)
    check_lean(lean, full, lambda dnc: run(dnc, inputs, state, backend), 3, monkeypatch)


@pytest.mark.parametrize(("forward", "backward"), [(2, 16), (16, 2)])
def test_steps_made_again_have_room_for_their_tiles(
    forward: int, backward: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be more of these than the backward has, or fewer."""
    layout = Layout(False, forward, 16, 1, backward_rows=backward)
    monkeypatch.setattr(dispatch, "layouts", lambda slots: [layout])
    dnc = make(device, sizes=(16, 1, 2), checkpoint=2)
    inputs, state = draw(dnc, 1)
    with launches_in_margins():
        actual = run(dnc, inputs, state, "triton_split")
    assert_close(actual, run(dnc, inputs, state, "reference"), **CLOSE, name="")


@pytest.mark.parametrize("steps", [*(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 2)), 6])
def test_links_that_are_not_kept(steps: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, the last and any number of steps after one that is kept."""
    behind: list[int] = []
    launch = triton_memory.launch_backward

    def launch_backward(*given: Any, **options: Any) -> None:
        behind.append(options["behind"])
        launch(*given, **options)

    monkeypatch.setattr(triton_memory, "launch_backward", launch_backward)
    dnc = make(device, sizes=(20, 4, 1))
    inputs, state = draw(dnc, steps)
    with poisoned():
        actual = run(dnc, inputs, state, "triton_split")
    assert behind == [step % 4 for step in reversed(range(steps))]
    assert_close(actual, run(dnc, inputs, state, "reference"), **CLOSE, name="")
