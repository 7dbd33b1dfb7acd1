"""In a forked process, locks that another thread held are free."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest

from dnc_triton.lock import ForkSafeLock
from dnc_triton.sequence import compiler, pool


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # is multi-threaded, since Python 3.12
@pytest.mark.parametrize("lock", [pool._lock, compiler._one_at_a_time], ids=["pool", "compiler"])
def test_a_process_that_is_forked_while_another_thread_holds_it(lock: ForkSafeLock) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.held():
            held.set()
            done.wait()

    def take() -> None:
        with lock.held():
            pass

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    process = multiprocessing.get_context("fork").Process(target=take)
    process.start()
    process.join(timeout=30)
    process.kill()
    done.set()
    thread.join()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("forks", [True, False])
def test_it_can_be_taken_twice_by_a_thread_and_by_one_at_a_time(forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows too, where no process is forked."""
    if not forks:
        monkeypatch.delattr(os, "register_at_fork", raising=False)
    lock, entered = ForkSafeLock(), threading.Event()

    def take() -> None:
        with lock.held():
            entered.set()

    other = threading.Thread(target=take)
    with lock.held():
        with lock.held():
            other.start()
        assert not entered.wait(0.1)
    other.join(timeout=30)
    assert entered.is_set()
