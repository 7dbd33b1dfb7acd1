"""What is compiled without a GPU is what is launched on one: its types, constants and options. Nothing compiles.

All of this is in another process, where nothing is interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from small_layer import PROBLEM
from stand_in import Driver, launch_up_to_running

triton = pytest.importorskip("triton")

from triton.runtime.jit import JITFunction, KernelInterface  # noqa: E402

from benchmarks.static import cases as static_cases  # noqa: E402
from benchmarks.static.cases import FEATURES, SHAPES, TRITON_TYPES, Case, sequence, step  # noqa: E402
from benchmarks.static.compiling import compile_case, compiling_map  # noqa: E402
from dnc_triton import DNC, dispatch, trial  # noqa: E402
from dnc_triton.kernels import launcher  # noqa: E402
from dnc_triton.kernels.layout import Layout, layouts  # noqa: E402
from dnc_triton.sequence import one_launch, small_product  # noqa: E402

SLOTS, WORD, READS = SHAPE = (64, 32, 4)
HIDDEN = 64
LENGTHS, RESET = torch.tensor([3, 2]), torch.zeros(2, 3, dtype=torch.bool)
OPTIONS = dict(num_warps=4, maxnreg=None, launch_pdl=False, enable_fp_fusion=None)


def train(
    backend: str,
    *,
    hidden: int = HIDDEN,
    layers: int = 1,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    bounds: tuple[float, float] | tuple[None, None] = (20.0, 10.0),
    autocast: bool = False,
    **rows: torch.Tensor,
) -> None:
    """Train a layer on a backend, with what otherwise only a GPU has."""
    clip, most = bounds
    sizes = dict(memory_size=SLOTS, word_size=WORD, num_reads=READS, num_layers=layers)
    dnc = DNC(
        FEATURES, hidden, FEATURES, **sizes, backend=backend, clip=clip, max_activation_gradient=most, dtype=dtype
    )
    with (
        patch.dict(small_product.MOST_WORK, cpu=2**25 if layers == 1 else 0),
        patch.dict(one_launch.MOST_ROWS, cpu=1024),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        outputs, _ = dnc(torch.randn(batch, 3, FEATURES, dtype=dtype), **rows)
        outputs.sum().backward()


def step_once(backend: str, layout: Layout, shape: tuple[int, int, int]) -> None:
    """A step whose interface is activated already."""
    sizes = dict(zip(("memory_size", "word_size", "num_reads"), shape, strict=True))
    problem = replace(PROBLEM, batch=2, steps=1, controller=None, **sizes)
    trial.random_call(problem)(dispatch.BACKENDS[backend].with_layout(layout).memory_step)


def launches() -> dict[str, tuple[Callable[[], None], list[Case]]]:
    """What is launched, and the cases that it is compiled as."""
    rows = {"lengths": dict(lengths=LENGTHS), "reset": dict(reset=RESET)}
    rows["lengths reset"] = rows["lengths"] | rows["reset"]
    told = {"": {}, **rows, "unclipped": dict(bounds=(None, None)), "autocast": dict(autocast=True)}
    assert tuple(sorted(told)) == tuple(sorted(static_cases.SEQUENCE_VARIANTS))
    found = {
        f"sequence {variant}": (
            partial(train, "triton_sequence", **given),
            sequence(SHAPE, HIDDEN, "sm_90", variant=variant),
        )
        for variant, given in told.items()
    }
    double = sequence(SHAPE, HIDDEN, "sm_90", dtype="float64")
    found["sequence float64"] = partial(train, "triton_sequence", dtype=torch.float64), double
    found["weights"] = partial(train, "triton_sequence"), static_cases._weights((*SHAPE, HIDDEN), "sm_90")
    found["lstm"] = partial(train, "triton_split", hidden=256, layers=2), static_cases._lstm("sm_90")
    products = static_cases._small_products((WORD, READS, HIDDEN), "sm_90")
    found["products"] = partial(train, "triton_split", batch=64), products
    for backend in ("triton_fused", "triton_split"):
        layout = next(layout for layout in layouts(SLOTS) if layout.fused == (backend == "triton_fused"))
        for dtype in TRITON_TYPES:
            of_dtype = partial(train, backend, dtype=getattr(torch, dtype))
            plain, marked = (step(SHAPE, "sm_90", layout=layout, dtype=dtype, variant=name) for name in ("", "marked"))
            found[f"{backend} {dtype}"] = of_dtype, plain
            found[f"{backend} {dtype} marked"] = partial(of_dtype, **rows["lengths reset"]), marked
        activated = step(SHAPE, "sm_90", layout=layout, variant="activated")
        found[f"{backend} activated"] = partial(step_once, backend, layout, SHAPE), activated
    spread = static_cases.spread(SHAPES[-1])
    activated = step(SHAPES[-1], "sm_90", layout=spread, variant="activated")
    found["spread"] = partial(step_once, "triton_split", spread, SHAPES[-1]), activated
    return found


def what_decides(kernel: Any, signature: Any, constants: Any, attributes: Any, options: dict[str, Any]) -> Any:
    """All that decides what code a kernel is compiled to."""
    names = kernel.arg_names
    types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    aligned = {names[place] for (place, *_), said in attributes.items() if ["tt.divisibility", 16] in said}
    values = {names[place]: value for (place, *_), value in constants.items()}
    if "sizes" in values and not values["sizes"].RAW:  # then nothing looks at the offset
        values["sizes"] = values["sizes"]._replace(STRENGTH_OFFSET=0.0)
    return kernel.__name__, types, values, aligned, {name: options.get(name, usual) for name, usual in OPTIONS.items()}


def compared(name: str) -> tuple[list[str], set[str], set[str]]:
    """The cases that are compiled as nothing that is launched, or are said to have another grid; the kernels that are
    launched; those that are compiled."""
    run, cases = launches()[name]
    assert cases
    launched, compiled, grids = [], [], []

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        grids.append(grid[1:] if name == "products" else grid)  # of another batch: several rows a program
        return launch_up_to_running(kernel, grid)

    def compile_launched(
        kernel: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        launched.append((grids[-1], what_decides(kernel, signature, constants, attributes, options.__dict__)))

    def compile_source(source: Any, target: Any, options: Any) -> Any:
        compiled.append(what_decides(source.fn, source.signature, source.constants, source.attrs, options))
        return SimpleNamespace(asm={}, metadata=SimpleNamespace(shared=0))

    triton.runtime.driver.set_active(Driver())
    with (
        patch.dict("os.environ", {"TRITON_INTERPRET": "1"}),  # for the dispatcher alone: it is a CPU
        patch.object(JITFunction, "_do_compile", compile_launched),
        patch.object(KernelInterface, "__getitem__", launch),
        patch.object(launcher, "can_overlap", lambda device: True),
        patch.object(triton, "compile", compile_source),
    ):
        run()
        for case in cases:
            compile_case(case)
    asked = [case.grid[1:] if name == "products" else case.grid for case in cases]
    others = [str(case) for case, *launch in zip(cases, asked, compiled, strict=True) if tuple(launch) not in launched]
    return others, {decides[0] for _, decides in launched}, {decides[0] for decides in compiled}


@pytest.fixture(scope="module")
def found():
    names = list(launches())
    return dict(zip(names, compiling_map(compared, names, jobs=1), strict=True))


@pytest.mark.parametrize("name", launches())
def test_what_is_compiled_is_what_is_launched(found, name):
    others, _, _ = found[name]
    assert others == []


def test_every_kernel_that_is_launched_is_compiled(found):
    _, launched, compiled = zip(*found.values(), strict=True)
    assert set.union(*launched) == set.union(*compiled)
