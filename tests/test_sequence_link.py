"""A large link on a CPU by link.cpp: against its equations, and in the compiled sequence."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_same_bits
from sequence_parity import FORWARD, assert_parity, draw, make, operation, oracle, outcome, total
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dnc_triton import dispatch
from dnc_triton.sequence import compiled, native_link
from dnc_triton.sequence.native_link import link_backward, link_forward

pytestmark = pytest.mark.skipif(not dispatch.HAS_COMPILER, reason="no C++ compiler")

# Less than a vector, no multiple of one, more than one chunk of rows; a batch of one.
SIZES = [(2, 1, 1), (2, 5, 1), (3, 37, 3), (2, 130, 4), (1, 300, 8)]


def problem(batch: int, slots: int, reads: int, dtype: torch.dtype, *, grad: bool = False) -> list[Tensor]:
    """Link [B, 1, N, N], precedence and write weights [B, 1, N], read weights [B, R, N]."""
    torch.manual_seed(0)
    shapes = ((1, slots, slots), (1, slots), (1, slots), (reads, slots))
    before, *others = (torch.rand(batch, *shape, dtype=torch.float64) / slots for shape in shapes)
    before.diagonal(dim1=2, dim2=3).zero_()
    return [x.to(dtype).requires_grad_(grad) for x in (before, *others)]


def followed(before: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> tuple[Tensor, ...]:
    """The equations: the new link, backward and forward weights."""
    before = before.squeeze(1)
    column, off_diagonal = write_weights.mT, ~torch.eye(before.shape[-1], dtype=torch.bool)
    new = (before + column * (precedence - before) - write_weights * before) * off_diagonal
    return new.unsqueeze(1), read_weights @ new, read_weights @ new.mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_backward_are_what_the_equations_say(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    close = {torch.float64: dict(rtol=1e-13, atol=1e-15), torch.float32: dict(rtol=1e-5, atol=1e-6)}[dtype]
    given = problem(*sizes, dtype)
    new = torch.full_like(given[0], torch.nan)
    made = new, *link_forward(*given, new)
    leaves = problem(*sizes, torch.float64, grad=True)
    expected = followed(*leaves)
    for actual, right in zip(made, expected, strict=True):
        torch.testing.assert_close(actual, right.detach().to(dtype), **close)

    gradients = [torch.randn_like(x) for x in expected]
    right = torch.autograd.grad(expected, leaves, gradients)
    d_link, d_backward, d_forward = (x.to(dtype) for x in gradients)
    linked = torch.cat([d_forward, given[3], d_backward], 1)
    d_read, d_write, d_precedence = link_backward(given[0].squeeze(1), *given[1:3], linked, d_link.squeeze(1))
    for actual, expects in zip((d_link, d_precedence, d_write, d_read), right, strict=True):
        torch.testing.assert_close(actual, expects.to(dtype), rtol=close["rtol"], atol=50 * close["atol"])


# Sizes around those of a vector, of rows that are taken together, and of a chunk of rows.
IN_BOUNDS = """
#include "link.cpp"
#include <vector>

int main() {
    typedef std::vector<NUMBER> Numbers;  // on the heap, each by itself
    for (int64_t n : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 127, 128, 129, 257})
        for (int64_t b : {1, 3}) {
            const int64_t chunks = (n + CHUNK - 1) / CHUNK, rows = b * READS * n;
            Numbers link(b * n * n), other(b * n * n), precedence(b * n), weights(b * n), d_precedence(b * n);
            Numbers reads(rows), backward(rows), forward(rows), linked(3 * rows), d_weights(b * n), d_reads(rows);
            Numbers sums(b * chunks * READS * n), more_sums(b * chunks * (READS + 2) * n);
            link_forward(3, b, n, sums.data(), link.data(), precedence.data(), weights.data(), reads.data(),
                         other.data(), backward.data(), forward.data());
            link_backward(3, b, n, more_sums.data(), link.data(), precedence.data(), weights.data(), linked.data(),
                          other.data(), d_reads.data(), d_weights.data(), d_precedence.data());
        }
}
"""


@pytest.mark.parametrize(
    ("number", "reads", "planted"),
    [("float", 3, False), ("double", 1, False), ("double", 1, True)],
    ids=["float", "double", "with a mistake"],
)
def test_it_stays_within_its_arrays_and_the_language(number: str, reads: int, planted: bool, tmp_path: Path) -> None:
    """By GCC's or Clang's sanitizers: without them what is read beyond the end is seldom seen in a result."""
    program = tmp_path / "run"
    sanitizers = [dispatch.COMPILER, "-O0", "-std=c++17", "-fopenmp", "-fsanitize=address,undefined"]
    sanitizers += ["-fno-sanitize-recover=undefined", "-o", str(program)]
    run = partial(subprocess.run, capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    (tmp_path / "nothing.cpp").write_text("int main() {}")
    if run([*sanitizers, str(tmp_path / "nothing.cpp")]).returncode or run([program]).returncode:
        pytest.skip(f"{dispatch.COMPILER} has no sanitizers or no OpenMP that work here")
    source = Path(native_link.__file__).with_name("link.cpp").read_text()
    loop = "j + LANES <= pass.slots"
    assert loop in source
    (tmp_path / "link.cpp").write_text(source.replace(loop, "j < pass.slots") if planted else source)
    (tmp_path / "main.cpp").write_text(IN_BOUNDS)
    values = [f"-DNUMBER={number}", f"-DREADS={reads}", f"-DCHUNK={native_link._CHUNK}"]
    run([*sanitizers, *values, str(tmp_path / "main.cpp")], check=True)
    ended = run([program])
    if planted:
        assert "AddressSanitizer: heap-buffer-overflow" in ended.stderr
    else:
        assert (ended.returncode, ended.stderr) == (0, "")


def test_the_same_bits_by_any_number_of_threads() -> None:
    given = problem(3, 300, 4, torch.float32)
    linked, d_link = torch.randn(3, 12, 300), torch.randn(3, 300, 300)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            new, d = torch.empty_like(given[0]), d_link.clone()
            results.append((new, *link_forward(*given, new), d, *link_backward(given[0], *given[1:3], linked, d)))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert_same_bits(others, results[0])


@pytest.mark.skipif(shutil.which("nm") is None, reason="nothing to look into a library with")
def test_a_library_shows_no_more_than_its_two_functions() -> None:
    """Others, with other numbers of read heads, have parts of the same names."""
    library = native_link._library(torch.float32, 4)._name
    table = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True)
    shown = [line.split() for line in table.stdout.splitlines() if line[:1].isalnum()]  # what has an address in it
    assert [name.lstrip("_") for _, _, *names in shown for name in names] == ["link_backward", "link_forward"]


def test_a_nan_stays_in_its_row() -> None:
    given = problem(2, 40, 2, torch.float32)
    right = torch.empty_like(given[0])
    link_forward(*given, right)
    given[0][1, 0, 3, 4] = given[2][1, 0, 7] = torch.nan
    new = torch.empty_like(right)
    backward, forward = link_forward(*given, new)
    assert_same_bits(new[0], right[0])
    assert new[1, 0, 3, 4].isnan()
    assert new[1, 0, 7].isnan().sum() == 39, "the diagonal is 0, as in the reference"
    assert backward[1, :, 4].isnan().all()
    assert forward[1, :, 3].isnan().all()


class InMargins(TorchFunctionMode):
    """What is allocated meanwhile lies in a larger buffer of a number that nothing here computes."""

    BESIDE, SIZE = -7.5, 4096

    def __init__(self) -> None:
        super().__init__()
        self.beside: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        return self.place(made) if function in (torch.empty_like, Tensor.new_empty) else made

    def place(self, tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 2 * self.SIZE,), self.BESIDE, dtype=tensor.dtype)
        before, inside, after = buffer.split([self.SIZE, tensor.numel(), self.SIZE])
        self.beside += [before, after]
        return inside.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("sizes", [*SIZES, (2, 128, 1), (1, 256, 3)], ids=str)
def test_nothing_beside_a_buffer_is_touched(sizes: tuple[int, int, int]) -> None:
    """The room for sums over rows too, with chunks that are full to the last row."""
    batch, slots, reads = sizes
    around = InMargins()
    before, *others = map(around.place, problem(*sizes, torch.float32))
    read, row = others[2], others[0]
    linked, d_link = around.place(torch.randn(batch, 3 * reads, slots)), around.place(torch.randn_like(before))
    with around:
        made = [torch.empty_like(x) for x in (before, read, read)]
        native_link._call("link_forward", reads, reads, [before, *others, *made])
        made = [d_link, *(torch.empty_like(x) for x in (read, row, row))]
        native_link._call("link_backward", reads, reads + 2, [before, *others[:2], linked, *made])
    assert len(around.beside) == 2 * 14
    assert all((margin == around.BESIDE).all() for margin in around.beside)


def test_what_is_read_may_have_any_strides() -> None:
    given = problem(2, 5, 2, torch.float64)
    linked, d_link = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)
    results = []
    for lies in (torch.Tensor.contiguous, lambda x: torch.stack([x, x], -1)[..., 0]):
        new, d = torch.empty_like(given[0]), d_link.clone()
        before, *others = map(lies, given)
        results.append((new, *link_forward(before, *others, new)))
        results[-1] += (d, *link_backward(before.squeeze(1), *others[:2], lies(linked), d))
    assert_same_bits(*results)


def test_operators() -> None:
    given = problem(2, 5, 2, torch.float64)
    torch.library.opcheck(link_forward, (*given, torch.empty_like(given[0])))
    linked, d_link = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)
    torch.library.opcheck(link_backward, (given[0].squeeze(1), *given[1:3], linked, d_link))


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (torch.empty(8, slots, 1, device="meta") for slots in (256, 255))
    assert native_link.serves(large)
    assert not native_link.serves(small)
    assert not native_link.serves(large.bfloat16())
    monkeypatch.setattr("sys.platform", "win32")
    assert not native_link.serves(large)


# --- in the compiled sequence


@pytest.fixture(name="all_are_large")
def _all_are_large(monkeypatch: pytest.MonkeyPatch):
    """What is compiled meanwhile is not used by others, nor is what was compiled before used here."""
    caches = compiled._compile, compiled._compile_alone
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(native_link, "LEAST_NUMBERS", 1)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("all_are_large")
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parity(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    exact = native_link._call
    monkeypatch.setattr(native_link, "_call", lambda name, *others: called.append(name) or exact(name, *others))
    dnc = make("torch_compiled", clip=0.1, memory_size=9)
    inputs, state = draw(dnc)
    if backward:
        assert_parity(dnc, inputs, state)
    else:
        with torch.no_grad():
            assert_close(operation(dnc, inputs, state), oracle(dnc, inputs, state), **FORWARD)
    assert set(called) == {"link_forward", *["link_backward"] * backward}


@pytest.mark.slow  # compiles for a minute, as does the next one
@pytest.mark.usefixtures("all_are_large")
def test_lean_and_full() -> None:
    lean, full = (make("torch_compiled", clip=0.1, memory_size=9, checkpoint=every) for every in (2, None))
    assert_same_bits(*(outcome(operation, each, *draw(each)) for each in (lean, full)))


@pytest.mark.slow
@pytest.mark.usefixtures("all_are_large")
@pytest.mark.parametrize("choice", [dict(controller="gru"), dict(num_reads=1, memory_size=70)], ids=str)
def test_parity_with_masks_and_by_steps(choice: dict) -> None:
    dnc = make("torch_compiled", stop_usage_gradient=True, **choice)
    inputs, state = draw(dnc)
    reset = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    if "memory_size" not in choice:  # with many empty slots an ulp apart, no order is right
        reset[2, 1] = reset[0, 0] = True
    assert_parity(dnc, inputs, state, lengths=[5, 2, 4], reset=reset)
    with torch.inference_mode():
        whole, last = dnc(inputs, state)
        for step, given in enumerate(inputs):
            output, state = dnc.step(given, state)
            torch.testing.assert_close(output, whole[step], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(total(state), total(last), rtol=1e-10, atol=1e-11)


@pytest.mark.slow  # compiles
def test_large_links_are_written_where_they_belong() -> None:
    """No copy of one before link.cpp writes to it, and none after."""
    from test_sequence_compiled import count_allocations

    dnc = make("torch_compiled", memory_size=512, dtype=torch.float32)
    inputs, state = draw(dnc, steps=4, batch=2)
    size = state.memory.link.nbytes
    with torch.no_grad():
        dnc.step(inputs[0], state)
        assert count_allocations(size, dnc.step, inputs[0], state) == 0, "its own is large enough for the pool"
    dnc(inputs, state)[0].sum().backward()
    assert count_allocations(size, dnc, inputs, state) == 0
    outputs = dnc(inputs, state)[0].sum()
    assert count_allocations(size, outputs.backward) == 0
