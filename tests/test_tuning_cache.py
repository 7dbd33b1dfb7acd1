"""Under which key times are kept, and where."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_layer import PROBLEM

from dnc_triton import tuning


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
