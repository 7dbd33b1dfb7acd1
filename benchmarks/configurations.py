"""What is measured: published networks by name, and sweeps of one size at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# The sizes of a network, as configurations, cases and `DNC` call them.
SIZES = ("memory_size", "word_size", "num_reads", "hidden_size", "num_layers", "input_size", "output_size")


class LeftOutError(Exception):
    """Something that was asked for is not measured; the message says why."""


@dataclass(frozen=True)
class Configuration:
    """One network, and the batches it is measured on.

    Where the source gives a range, or more than two cores run quickly, a CPU runs a smaller B and T of our choice.

    Attributes:
        source: who published it.
        memory_size, word_size, num_reads, hidden_size: N, W, R, H.
        input_size, output_size: of the network.
        cpu_batch, cpu_steps: B and T as run on a CPU; 0 if a CPU would take too long.
        gpu_batch, gpu_steps: B and T as run on a GPU.
        num_layers: LSTM layers of the controller, each of hidden_size.
    """

    source: str
    memory_size: int
    word_size: int
    num_reads: int
    hidden_size: int
    input_size: int
    output_size: int
    cpu_batch: int
    cpu_steps: int
    gpu_batch: int
    gpu_steps: int
    num_layers: int = 1


@dataclass(frozen=True)
class Case:
    """One network on one batch: what is timed.

    Attributes:
        configuration: its name; in a sweep with what was changed, "base/N=64".
        sweep: the letter of the size that is varied, or empty.
        source: who published the network.
        batch, steps, memory_size, word_size, num_reads, hidden_size: B, T, N, W, R, H.
        num_layers, input_size, output_size: of the network.
    """

    configuration: str
    sweep: str
    source: str
    batch: int
    steps: int
    memory_size: int
    word_size: int
    num_reads: int
    hidden_size: int
    num_layers: int
    input_size: int
    output_size: int


CONFIGURATIONS: dict[str, Configuration] = {
    "deepmind_repeat_copy": Configuration(
        source="DeepMind's code, defaults",
        memory_size=16,
        word_size=16,
        num_reads=4,
        hidden_size=64,
        input_size=6,
        output_size=5,
        # As published: B = 16, T = 9 to 20.
        cpu_batch=16,
        cpu_steps=20,
        gpu_batch=16,
        gpu_steps=20,
    ),
    "nature_babi_wide": Configuration(
        source="Graves et al. 2016, extended data table 2, in a batch that fills a GPU",
        memory_size=256,
        word_size=64,
        num_reads=4,
        hidden_size=256,
        input_size=159,
        output_size=159,
        # As published: B = 1 in each of 16 workers, T about 70 to 400.
        cpu_batch=0,
        cpu_steps=0,
        gpu_batch=64,
        gpu_steps=100,
    ),
    "csordas_repeat_copy": Configuration(
        source="Csordás & Schmidhuber's code",
        memory_size=16,
        word_size=16,
        num_reads=1,
        hidden_size=32,
        input_size=9,
        output_size=9,
        # As published: B = 16, T at most 240.
        cpu_batch=16,
        cpu_steps=40,
        gpu_batch=16,
        gpu_steps=40,
    ),
    "sam_scaling": Configuration(
        source="Rae et al. 2016, supplement: N sweeps to 2048",
        memory_size=512,
        word_size=32,
        num_reads=4,
        hidden_size=100,
        input_size=8,
        output_size=8,
        # As published: B = 8, T = 10.
        cpu_batch=8,
        cpu_steps=10,
        gpu_batch=8,
        gpu_steps=10,
    ),
    "sam_scaling_2048": Configuration(
        source="Rae et al. 2016, supplement: the end of its sweep over N",
        memory_size=2048,
        word_size=32,
        num_reads=4,
        hidden_size=100,
        input_size=8,
        output_size=8,
        # As published: B = 8, T = 10.
        cpu_batch=0,
        cpu_steps=0,
        gpu_batch=8,
        gpu_steps=10,
    ),
    "adnc_babi": Configuration(
        source="ADNC, README",
        memory_size=192,
        word_size=64,
        num_reads=4,
        hidden_size=256,
        input_size=159,
        output_size=159,
        # As published: B = 32, T at most 1000.
        cpu_batch=8,
        cpu_steps=20,
        gpu_batch=32,
        gpu_steps=200,
    ),
    "nature_babi": Configuration(
        source="Graves et al. 2016, extended data table 2",
        memory_size=256,
        word_size=64,
        num_reads=4,
        hidden_size=256,
        input_size=159,
        output_size=159,
        # As published: B = 1 in each of 16 workers, T about 70 to 400.
        cpu_batch=2,
        cpu_steps=30,
        gpu_batch=16,
        gpu_steps=100,
    ),
    "nature_traversal": Configuration(
        source="Graves et al. 2016",
        memory_size=256,
        word_size=50,
        num_reads=5,
        hidden_size=256,
        num_layers=3,
        input_size=92,
        output_size=90,
        # As published: B = 2, T as long as its graph.
        cpu_batch=2,
        cpu_steps=20,
        gpu_batch=2,
        gpu_steps=50,
    ),
}

# What the sweeps vary, one size at a time.
BASE = Configuration(
    source="of no publication: a middling network to vary",
    memory_size=128,
    word_size=32,
    num_reads=4,
    hidden_size=128,
    input_size=32,
    output_size=32,
    cpu_batch=8,
    cpu_steps=10,
    gpu_batch=8,
    gpu_steps=20,
)
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "B": {"cpu": (1, 4, 16, 64), "cuda": (1, 4, 16, 64)},
    "N": {"cpu": (16, 64, 128, 256, 512), "cuda": (16, 64, 256, 512, 1024, 2048)},
    "T": {"cpu": (5, 10, 30, 100), "cuda": (10, 30, 100, 300, 1000)},
}
SWEPT = {"B": "batch", "N": "memory_size", "T": "steps"}


def case_of(name: str, configuration: Configuration, device: str) -> Case:
    """A configuration with its batch for a device.

    Raises:
        LeftOutError: it is not for this device.
    """
    batch, steps = (
        (configuration.cpu_batch, configuration.cpu_steps)
        if device == "cpu"
        else (configuration.gpu_batch, configuration.gpu_steps)
    )
    if not batch:
        raise LeftOutError(f"{name}: too large for a CPU, it is measured on a GPU")
    return Case(
        configuration=name,
        sweep="",
        source=configuration.source,
        batch=batch,
        steps=steps,
        **network_sizes(configuration),
    )


def network_sizes(network: Configuration | Case) -> dict[str, int]:
    """`SIZES` of a network, by name."""
    return {name: getattr(network, name) for name in SIZES}


def sweep_cases(sweeps: Sequence[str], device: str) -> list[Case]:
    """The cases of sweeps, given by letter: the base with one size changed."""
    base = case_of("base", BASE, device)
    cases = []
    for sweep in sweeps:
        for value in SWEEPS[sweep][device]:
            changed = {"configuration": f"base/{sweep}={value}", "sweep": sweep, SWEPT[sweep]: value}
            cases.append(replace(base, **changed))  # type: ignore[arg-type]
    return cases
