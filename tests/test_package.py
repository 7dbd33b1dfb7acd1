"""What is installed, and what an import brings in."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dnc_triton

ROOT = Path(__file__).parent.parent


def run(*command, cwd: Path, **environment: str) -> str:
    """Standard output of a command that has to succeed."""
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def python(code: str, cwd: Path, **environment: str):
    """What a fresh interpreter prints, as JSON. It sees the working tree only through what is installed."""
    return json.loads(run(sys.executable, "-c", code, cwd=cwd, **environment))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as a release is: a source distribution, and the wheel from that."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT))
    if importlib.util.find_spec("hatchling"):
        run(*build, "--no-isolation", cwd=folder)
    else:
        try:
            run(*build, cwd=folder)
        except AssertionError as error:
            pytest.skip(f"hatchling is not installed, and fetching it failed: {error}")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with what the wheel installs and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    install = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", str(folder))
    run(sys.executable, "-m", "pip", *install, str(wheel), cwd=folder)
    return folder


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_is_of_the_version_that_is_imported(wheel):
    assert wheel.name == f"dnc_triton-{dnc_triton.__version__}-py3-none-any.whl"


def test_the_wheel_puts_two_names_into_site_packages(wheel, installed):
    names = {"dnc_triton", "dnc_reference", f"dnc_triton-{dnc_triton.__version__}.dist-info"}
    assert {name.split("/")[0] for name in contents(wheel)} == names
    assert {path.name for path in installed.iterdir()} == names


def test_the_wheel_has_all_modules_types_and_the_license(wheel):
    names = contents(wheel)
    for package, source in (("dnc_triton", ROOT / "dnc_triton"), ("dnc_reference", ROOT / "reference/dnc_reference")):
        sources = [path for kind in ("py", "cpp", "html", "toml") for path in source.rglob(f"*.{kind}")]
        assert {f"{package}/{path.relative_to(source).as_posix()}" for path in sources} <= names
        assert f"{package}/py.typed" in names
    assert f"dnc_triton-{dnc_triton.__version__}.dist-info/licenses/LICENSE" in names


def test_what_is_installed_imports_and_runs(installed, tmp_path):
    code = """
import dnc_triton, dnc_reference, json, torch
dnc = dnc_triton.DNC(3, 5, 2, memory_size=4, word_size=3, num_reads=2)
outputs, state = dnc(torch.randn(2, 3, 3))
outputs.sum().backward()
print(json.dumps([dnc_triton.__file__, dnc_reference.__file__, list(outputs.shape)]))
"""
    *files, shape = python(code, tmp_path, PYTHONPATH=str(installed))
    assert files == [str(installed / name / "__init__.py") for name in ("dnc_triton", "dnc_reference")]
    assert shape == [2, 3, 2]


def test_public_names():
    promised = {"DNC", "DNCState", "MemoryState", "Interface", "memory_step", "use_backend", "explain"}
    promised |= {"from_deepmind", "from_pytorch_dnc", "Trace"}
    assert set(dnc_triton.__all__) == promised
    assert all(getattr(dnc_triton, name).__doc__ for name in promised)


EXTRAS = {"lightning_fabric", "matplotlib", "tensorboard", "tqdm", "plotly", "babel"}


def test_the_reference_imports_neither_triton_nor_the_product(tmp_path):
    """All of it, not only what its `__init__` needs."""
    code = """
import importlib, json, pkgutil, sys
import numpy, torch
before = set(sys.modules)
import dnc_reference
for info in pkgutil.walk_packages(dnc_reference.__path__, "dnc_reference."):
    importlib.import_module(info.name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    new = {name.split(".")[0] for name in python(code, tmp_path)}
    assert "dnc_reference" in new
    assert not new & {"triton", "dnc_triton"}


def test_an_import_compiles_nothing_and_touches_no_gpu(tmp_path):
    """Triton, which starts a driver, stays out; so does CUDA, whose set-up would break a fork; nothing is written.

    Progress bars and pictures are for the command line: neither is needed to use the layer.
    """
    code = f"""
import json, os, sys
import torch

def touched(*arguments, **options):
    raise AssertionError("a GPU was asked for")

torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = touched
torch.cuda.get_device_capability = torch.cuda.get_device_name = torch.cuda.current_device = touched
before = set(sys.modules)
import dnc_triton
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([sorted(new & {EXTRAS | {"triton"}}), torch.cuda.is_initialized(), os.listdir()]))
"""
    folders = {"TRITON_CACHE_DIR": str(tmp_path), "DNC_TRITON_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    assert python(code, tmp_path, **folders) == [[], False, []]


@pytest.mark.parametrize("absent", [["triton"], sorted(EXTRAS)], ids=["triton", "extras"])
def test_runs_where_something_is_absent(absent, tmp_path):
    """Triton has no wheels for macOS and Windows; there the layer runs on what is left."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))  # importing them raises ModuleNotFoundError, as if they were not installed
import json, torch, dnc_triton
dnc = dnc_triton.DNC(3, 5, 2, memory_size=4, word_size=3, num_reads=2)
inputs = torch.randn(2, 3, 3)
outputs, state = dnc(inputs, lengths=[1, 3])
outputs.sum().backward()
print(json.dumps([dnc_triton.explain(dnc, inputs), bool(dnc.output.weight.grad.isfinite().all())]))
"""
    explanation, finite = python(code, tmp_path, DNC_TRITON_BACKEND="auto")
    assert "* torch_sequence" in explanation
    assert finite
