"""The published configurations that are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """One network, and the batches it is measured on.

    Where the source gives a range, or more than two cores take quickly, a CPU runs a smaller B and T of our choice.

    Attributes:
        source: who published it.
        memory_size, word_size, num_reads, hidden_size: N, W, R, H.
        input_size, output_size: of the network.
        published_batch, published_steps: B and T as the source has them.
        cpu_batch, cpu_steps: B and T as run on a CPU.
        num_layers: LSTM layers of the controller, each of hidden_size.
    """

    source: str
    memory_size: int
    word_size: int
    num_reads: int
    hidden_size: int
    input_size: int
    output_size: int
    published_batch: str
    published_steps: str
    cpu_batch: int
    cpu_steps: int
    num_layers: int = 1


CONFIGURATIONS: dict[str, Configuration] = {
    "deepmind_repeat_copy": Configuration(
        source="DeepMind's code, defaults",
        memory_size=16,
        word_size=16,
        num_reads=4,
        hidden_size=64,
        input_size=6,
        output_size=5,
        published_batch="16",
        published_steps="9 to 20",
        cpu_batch=16,
        cpu_steps=20,
    ),
    "csordas_repeat_copy": Configuration(
        source="Csordás & Schmidhuber's code",
        memory_size=16,
        word_size=16,
        num_reads=1,
        hidden_size=32,
        input_size=9,
        output_size=9,
        published_batch="16",
        published_steps="at most 240",
        cpu_batch=16,
        cpu_steps=40,
    ),
    "sam_scaling": Configuration(
        source="Rae et al. 2016, supplement: N sweeps to 2048",
        memory_size=512,
        word_size=32,
        num_reads=4,
        hidden_size=100,
        input_size=8,
        output_size=8,
        published_batch="8",
        published_steps="10",
        cpu_batch=8,
        cpu_steps=10,
    ),
    "adnc_babi": Configuration(
        source="ADNC, README",
        memory_size=192,
        word_size=64,
        num_reads=4,
        hidden_size=256,
        input_size=159,
        output_size=159,
        published_batch="32",
        published_steps="at most 1000",
        cpu_batch=8,
        cpu_steps=20,
    ),
    "nature_babi": Configuration(
        source="Graves et al. 2016, extended data table 2",
        memory_size=256,
        word_size=64,
        num_reads=4,
        hidden_size=256,
        input_size=159,
        output_size=159,
        published_batch="1 in each of 16 workers",
        published_steps="about 70 to 400",
        cpu_batch=2,
        cpu_steps=30,
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
        published_batch="2",
        published_steps="as long as its graph",
        cpu_batch=2,
        cpu_steps=20,
    ),
}
