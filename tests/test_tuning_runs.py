"""What runs when backends are measured, here on a CPU and without a clock; and where times are kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import small_layer
import torch
from torch import Tensor

from dnc_triton import tuning
from dnc_triton.dispatch import BACKENDS
from dnc_triton.problem import Problem

PROBLEM = replace(small_layer.PROBLEM, batch=3, steps=5)  # measured as the powers of two above them: 4 and 8
REFERENCE = BACKENDS["reference"]


def gradients_of(
    random: Callable[[Problem], Callable], operation: Callable, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor | None, ...]]:
    """The gradients that a run asks for."""
    asked: list[tuple[Tensor | None, ...]] = []
    exact = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **options: asked.append(exact(*given, **options)))
    random(problem)(operation)
    return asked


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_sequence_is_measured_with_its_backward_where_gradients_are_needed(
    needs_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unroll(cell, inputs, state, *, checkpoint):
        seen.append((inputs.shape, state.memory.memory.shape, checkpoint))
        return REFERENCE.unroll(cell, inputs, state, checkpoint=checkpoint)

    seen: list[tuple] = []
    problem = replace(PROBLEM, needs_gradient=needs_gradient)
    asked = gradients_of(tuning._random_sequence, unroll, problem, monkeypatch)
    assert seen == [((8, 4, problem.hidden_size), (4, problem.memory_size, problem.word_size), "auto")]
    assert len(asked) == needs_gradient
    for gradients in asked:  # of all parameters
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_step_is_measured_with_its_backward_where_gradients_are_needed(
    needs_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory_step(interface, state, *, stop_usage_gradient):
        assert all(tensor.min() >= 0 and tensor.max() <= 1 for tensor in state)
        assert all((weights.sum(-1) <= 1).all() for weights in (state.read_weights, state.write_weights))
        seen.append((interface.write_keys.shape[0], stop_usage_gradient))
        return REFERENCE.memory_step(interface, state, stop_usage_gradient=stop_usage_gradient)

    seen: list[tuple] = []
    problem = replace(PROBLEM, controller=None, needs_gradient=needs_gradient)
    asked = gradients_of(tuning._random_step, memory_step, problem, monkeypatch)
    assert seen == [(4, False)]
    assert len(asked) == needs_gradient
    for gradients in asked:  # of the interface and the state
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_batches_are_alike_up_to_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    buckets = [tuning._bucket(replace(PROBLEM, batch=batch)) for batch in (0, 1, 2, 3, 4, 5, 8, 9)]
    assert [buckets.index(bucket) for bucket in buckets] == [0, 0, 2, 3, 3, 5, 5, 7]


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"DNC_TRITON_CACHE": "/named", "XDG_CACHE_HOME": "/caches", "HOME": "/home/me"}, "/named"),
        ({"DNC_TRITON_CACHE": "~/named", "HOME": "/home/me"}, "/home/me/named"),
        ({"XDG_CACHE_HOME": "/caches", "HOME": "/home/me"}, "/caches/dnc_triton"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/dnc_triton"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "/home/me"}, "/home/me/.cache/dnc_triton"),
        ({"HOME": "/home/me"}, "/home/me/.cache/dnc_triton"),
    ],
    ids=["named", "in the home", "of caches", "empty", "relative", "by default"],
)
def test_times_are_kept_in_the_users_cache(
    variables: dict[str, str], directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DNC_TRITON_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tuning.cache_directory() == Path(directory)


@pytest.mark.parametrize("variables", [{}, {"DNC_TRITON_CACHE": "~/times"}], ids=["by default", "named"])
def test_a_user_without_a_home_has_them_among_temporary_files(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in some containers, where a number is all there is of a user."""

    def nowhere(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("home", "expanduser"):
        monkeypatch.setattr(Path, name, nowhere)
    for name in ("DNC_TRITON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tuning.cache_directory() == tmp_path / "dnc_triton"
