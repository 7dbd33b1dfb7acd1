"""What holds for every test: one seed, the same examples each time, and failures that show their values."""

import gc
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# A test fails or passes by the code alone, on every machine: no random seed, no clock, no examples from an earlier run.
# The tests on a GPU do without hypothesis, so that nothing has to be installed there.
if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=25)
    settings.load_profile("deterministic")

pytest.register_assert_rewrite("helpers")

# What these import: without it they are passed over, so that `pytest -m gpu` finds its tests on a machine without it.
NEEDED = {
    "reference/test_backward.py": "hypothesis",
    "reference/test_invariants.py": "hypothesis",
    "test_benchmarks_pictures.py": "matplotlib",
    "test_benchmarks_results.py": "matplotlib",
    "test_block_tasks.py": "matplotlib",
    "test_checkpoints.py": "tqdm",
    "test_cli.py": "tqdm",
    "test_graph_tasks.py": "networkx",
    "test_journal.py": "tensorboard",
    "test_language_tasks.py": "babel",
    "test_run_folder.py": "tqdm",
    "test_scores.py": "tqdm",
    "test_train.py": "tqdm",
    "test_training_distributed.py": "lightning_fabric",
    "test_training_failures.py": "tensorboard",
}
collect_ignore = [file for file, package in NEEDED.items() if not find_spec(package)]


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look through PyTorch's modules again and again."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    return [f"not collected: tests/{file}, {NEEDED[file]} is not installed" for file in collect_ignore]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first: at the end the other processes would have nothing left to do beside one.
    items.sort(key=lambda item: not item.path.name.startswith(("test_static", "test_train")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a run is drawn: it would take longer than a short training, and no test that asks for this looks."""
    for name in ("draw_learning_curve", "draw_memory", "write_page"):
        monkeypatch.setattr(f"dnc_triton.training.report.{name}", lambda *arguments, **named: None)


@pytest.fixture(scope="module")
def _compiled_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is compiled beside pytest's own notes, so that a second run compiles only what changed."""
    notes = getattr(request.config, "cache", None)  # None with -p no:cacheprovider
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(notes.mkdir("triton") if notes else tmp_path_factory.mktemp("triton")))
        yield
