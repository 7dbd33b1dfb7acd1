"""What is measured side by side: for each peer a function from a case and a device to a network that runs.

Every peer has the same sizes and inputs. Those that compute the paper's DNC have the same parameters as well and are
checked against the oracle; PyPI's package and `nn.LSTM` compute something else, and are there to compare speed.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.configurations import Case, network_sizes
from dnc_reference import DNCCell
from dnc_triton import DNC, environment, explain
from dnc_triton.dispatch import BACKENDS, COMPILER

PYPI_DNC_VERSION = "2.0.0b1"
OURS = "dnc_triton"
EAGER = "reference"
SEED = 0
MIXED_ORDERS = "triton.mix_order_reduction"


def is_ours(peer: str) -> bool:
    """Whether it is this project's layer, on any backend but the eager reference."""
    return peer.removesuffix("_launched") in {OURS, *BACKENDS} - {EAGER}


class MissingPeerError(Exception):
    """A peer cannot run here; the message says what is missing, and how to get it."""


class DeclinedError(Exception):
    """A backend does not serve a call; the message is its reason."""


@dataclass(frozen=True)
class Network:
    """A peer in the sizes of a case.

    Attributes:
        module: has the parameters that are trained.
        run: inputs [B, T, I], the state of an earlier call or None → outputs, state.
        backend: inputs → which backend of ours will serve them, empty for the others. It answers for the present
            `torch.is_grad_enabled()` and raises DeclinedError if there is none.
        single: inputs of one step [B, I], a state → outputs [B, O], state; None if a step is `run` with T = 1.
    """

    module: nn.Module
    run: Callable[[Tensor, Any], tuple[Tensor, Any]]
    backend: Callable[[Tensor], str] = lambda inputs: ""
    single: Callable[[Tensor, Any], tuple[Tensor, Any]] | None = None

    def step(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step, as a user would take it: inputs [B, I] → outputs [B, O], state."""
        if self.single is not None:
            return self.single(inputs, state)
        outputs, state = self.run(inputs.unsqueeze(1), state)
        return outputs.squeeze(1), state


@dataclass(frozen=True)
class Peer:
    """One of the implementations measured side by side.

    Attributes:
        label: its name in tables and pictures.
        make: case, device → its network. Raises MissingPeerError.
        checked: whether it is checked against the oracle.
        compiles: whether its first call compiles for a minute or so, which has a time budget of its own.
        gpu_only: whether it makes no sense on a CPU.
        sweeps: whether it takes part in the sweeps.
        hides_memory: whether the memory counted for a call is not what it takes: PyTorch does not see all of it, or a
            compiler's own memory counts.
        has_memory: whether it is a DNC, and so has a floor.
        captured: whether it is also trained in a CUDA graph of the user's. The eager reference cannot be: in the
            backward of `cumprod` PyTorch waits for the device.
        apart: whether it has a process of its own on a GPU if others are measured too. It takes no part in sweeps
            then.
    """

    label: str
    make: Callable[[Case, torch.device], Network]
    checked: bool = True
    compiles: bool = False
    gpu_only: bool = False
    sweeps: bool = False
    hides_memory: bool = False
    has_memory: bool = True
    captured: bool = False
    apart: bool = False


def dnc_layer(case: Case, device: torch.device, backend: str) -> DNC:
    """The public layer in the sizes of a case; the parameters are the same on every device and backend."""
    torch.manual_seed(SEED)
    return DNC(**network_sizes(case), backend=backend).to(device)


def reference_cell(case: Case, device: torch.device, dtype: torch.dtype) -> DNCCell:
    """The reference's cell, with the parameters of `dnc_layer`."""
    cell = DNCCell(**network_sizes(case), device=device, dtype=dtype)
    cell.load_state_dict(dnc_layer(case, device, EAGER).state_dict())
    return cell


@contextmanager
def without_graphs() -> Iterator[None]:
    """In the block our layer launches step by step, and so does the later backward of what is computed in it."""
    before = os.environ.get(environment.GRAPHS)
    os.environ[environment.GRAPHS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[environment.GRAPHS]
        else:
            os.environ[environment.GRAPHS] = before


def make_layer(case: Case, device: torch.device, *, backend: str, graphs: bool = True) -> Network:
    """This project's layer on one backend, or on the one it chooses; with its CUDA graphs, or without."""
    layer = dnc_layer(case, device, backend)

    def serving(inputs: Tensor) -> str:
        if backend == "auto":
            chosen = [line for line in explain(layer, inputs).splitlines() if line.startswith("*")]
            return chosen[0].split()[1]
        supported, reason = BACKENDS[backend].supports(layer.problem(inputs))
        if not supported:
            raise DeclinedError(reason)
        return backend

    def launched(call: Callable[..., Any], *arguments: Any) -> Any:
        with without_graphs():
            return call(*arguments)

    if graphs:
        return Network(layer, layer, serving, layer.step)
    return Network(layer, partial(launched, layer), serving, partial(launched, layer.step))


def make_compiled(case: Case, device: torch.device, *, mode: str) -> Network:
    """The reference with `torch.compile`: only its step, as a whole sequence would compile for many minutes.

    Over a sequence the output layer is called once at the end, as in our layer. For a single step it is compiled too.

    Args:
        case: the sizes.
        device: where to run.
        mode: of `torch.compile`. "reduce-overhead" replays CUDA graphs.

    Raises:
        MissingPeerError: something that the compiler needs is missing.
    """
    if mode == "reduce-overhead" and device.type != "cuda":
        raise MissingPeerError("CUDA graphs need a GPU")
    _check_compiler(device)
    cell = reference_cell(case, device, torch.float32)
    step, whole_step = (compile_reference(call, case.memory_size, mode) for call in (cell.advance, cell.forward))

    def begin(inputs: Tensor, state: Any) -> Any:
        if mode == "reduce-overhead":  # graphs may reuse the memory of what the previous call returned
            torch.compiler.cudagraph_mark_step_begin()
        return cell.initial_state(len(inputs)) if state is None else state

    def keep(results: Any) -> Any:
        if mode == "reduce-overhead" and not torch.is_grad_enabled():  # they must outlive the graphs' memory
            return tree_map(torch.clone, results)
        return results

    def run(inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = begin(inputs, state)
        features = []
        for inputs_of_step in inputs.unbind(1):
            features_of_step, state = step(inputs_of_step, state)
            features.append(features_of_step)
        return cell.project(torch.stack(features, 1)), keep(state)

    def single(inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = keep(whole_step(inputs, begin(inputs, state)))
        return outputs, state

    return Network(cell, run, single=single)


def compile_reference(call: Callable[..., Any], memory_size: int, mode: str = "default") -> Any:
    """A function that computes steps of the reference, with `torch.compile`.

    On an H200, PyTorch 2.11's compiler failed an assertion from N = 192 on ("190 v.s. 189"), about reductions in
    different orders in the backward of `cumprod`. For more than 64 slots it is told not to fuse those.
    """
    from torch._inductor import list_mode_options, list_options  # takes seconds

    options = list_mode_options(mode)
    if memory_size > 64 and MIXED_ORDERS in list_options():
        options[MIXED_ORDERS] = False
    return torch.compile(call, options=options)


def _check_compiler(device: torch.device) -> None:
    """Raise MissingPeerError with what is missing, before the compiler says it in fifty lines."""
    named = os.environ.get("CC")  # where Triton looks; on a CPU CXX, which is in `COMPILER`
    names = [COMPILER] if device.type == "cpu" else [named] if named else ["gcc", "cc", "clang"]
    if not any(map(shutil.which, names)):
        raise MissingPeerError(f"torch.compile needs a compiler of C or C++, there is no {' or '.join(names)}")
    if device.type == "cuda" and not find_spec("triton"):
        raise MissingPeerError("torch.compile needs Triton on a GPU, which is not installed")


def make_pypi_dnc(case: Case, device: torch.device) -> Network:
    """The package `dnc` of PyPI, clipping at 20 as it does by default.

    Comparable in speed, not in numbers: its controller gets zeros in place of the words read last, and its outputs have
    the size of its inputs.

    Raises:
        MissingPeerError: it is not installed, or in another version.
    """
    install = f"install it with: pip install --no-deps dnc=={PYPI_DNC_VERSION}"
    try:
        version = importlib.metadata.version("dnc")
        import dnc  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        if error.name != "dnc":
            raise
        raise MissingPeerError(f"dnc is not installed; {install}") from error
    if version != PYPI_DNC_VERSION:
        raise MissingPeerError(f"dnc is installed in version {version}; {install}")
    network = dnc.DNC(
        case.input_size,
        case.hidden_size,
        num_layers=1,
        num_hidden_layers=case.num_layers,
        nr_cells=case.memory_size,
        cell_size=case.word_size,
        read_heads=case.num_reads,
        batch_first=True,
        device=device if device.type == "cuda" else None,
    )

    def run(inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = network(inputs, state, reset_experience=state is None)[:2]
        return outputs, state

    return Network(network, run)


def make_lstm(case: Case, device: torch.device) -> Network:
    """`nn.LSTM` of the same hidden size with an output layer; on a GPU cuDNN runs it. What a user of a DNC gives up."""
    lstm = nn.LSTM(case.input_size, case.hidden_size, case.num_layers, batch_first=True)
    module = nn.ModuleDict({"lstm": lstm, "output": nn.Linear(case.hidden_size, case.output_size)}).to(device)

    def run(inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, state = module["lstm"](inputs, state)
        return module["output"](hidden), state

    return Network(module, run)


# Ours first; the backends are those of the dispatcher's table.
PEERS: dict[str, Peer] = {
    OURS: Peer("dnc_triton", partial(make_layer, backend="auto"), sweeps=True, captured=True),
    **{
        name: Peer(
            f"dnc_triton, {name}",
            partial(make_layer, backend=name),
            captured=True,
            hides_memory=name == "torch_compiled",
        )
        for name in BACKENDS
        if name != EAGER
    },
    **{
        f"{name}_launched": Peer(
            f"dnc_triton, {name} without CUDA graphs",
            partial(make_layer, backend=name, graphs=False),
            gpu_only=True,
        )
        for name in ("triton_fused", "triton_split")
    },
    EAGER: Peer("reference, eager", partial(make_layer, backend=EAGER), sweeps=True),
    "compiled": Peer("reference, torch.compile", partial(make_compiled, mode="default"), compiles=True),
    "compiled_cuda_graphs": Peer(
        "reference, torch.compile with CUDA graphs",
        partial(make_compiled, mode="reduce-overhead"),
        compiles=True,
        gpu_only=True,
        hides_memory=True,
        # For a large memory it compiles for minutes, which only the end of its process cuts short. And with PyTorch
        # 2.11 it conflicted with our layer's own CUDA graphs while steps were timed, until those had workspaces of
        # their own (`sequence.engine`); since then trainings of both have been timed in one process, steps have not.
        apart=True,
    ),
    "pypi_dnc": Peer(f"PyPI dnc {PYPI_DNC_VERSION}", make_pypi_dnc, checked=False),
    "lstm": Peer("nn.LSTM", make_lstm, checked=False, sweeps=True, has_memory=False, captured=True),
}
