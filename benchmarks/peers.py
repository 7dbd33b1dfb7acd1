"""Who is measured: one function each, from a configuration and inputs to a callable that runs forward and backward.

Every peer has the same sizes, inputs and loss, the mean square of its outputs, and gradients of all its parameters.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.configurations import Configuration
from dnc_triton import DNC

ForwardBackward = Callable[[], None]
PYPI_DNC_VERSION = "2.0.0b1"


class MissingPeerError(Exception):
    """A peer is not installed; the message says how to install it."""


def dnc_layer(configuration: Configuration) -> DNC:
    """The public layer in the sizes of a configuration, on the reference backend."""
    return DNC(
        configuration.input_size,
        configuration.hidden_size,
        configuration.output_size,
        memory_size=configuration.memory_size,
        word_size=configuration.word_size,
        num_reads=configuration.num_reads,
        num_layers=configuration.num_layers,
        backend="reference",
    )


def dnc_triton(configuration: Configuration, inputs: Tensor) -> ForwardBackward:
    """This project's layer."""
    layer = dnc_layer(configuration)
    return _forward_backward(layer, lambda: layer(inputs)[0])


def pypi_dnc(configuration: Configuration, inputs: Tensor) -> ForwardBackward:
    """The package `dnc` of PyPI, clipping at 20 as it does by default.

    A peer in speed, not in numbers: its controller gets zeros where the words read last should be, and its outputs are
    as wide as its inputs.

    Raises:
        MissingPeerError: it is not installed, or in another version.
    """
    install = f"install it with: pip install --no-deps dnc=={PYPI_DNC_VERSION}"
    try:
        version = importlib.metadata.version("dnc")
        import dnc
    except ModuleNotFoundError as error:
        if error.name != "dnc":
            raise
        raise MissingPeerError(f"dnc is not installed; {install}") from error
    if version != PYPI_DNC_VERSION:
        raise MissingPeerError(f"dnc is installed in version {version}; {install}")
    network = dnc.DNC(
        configuration.input_size,
        configuration.hidden_size,
        num_layers=1,
        num_hidden_layers=configuration.num_layers,
        nr_cells=configuration.memory_size,
        cell_size=configuration.word_size,
        read_heads=configuration.num_reads,
        batch_first=True,
    )
    return _forward_backward(network, lambda: network(inputs, None, reset_experience=True)[0])


OURS = "dnc_triton"
PEERS: dict[str, Callable[[Configuration, Tensor], ForwardBackward]] = {
    OURS: dnc_triton,
    f"dnc (PyPI) {PYPI_DNC_VERSION}": pypi_dnc,
}


def _forward_backward(module: nn.Module, outputs: Callable[[], Tensor]) -> ForwardBackward:
    def forward_backward() -> None:
        module.zero_grad(set_to_none=True)
        outputs().square().mean().backward()

    return forward_backward
