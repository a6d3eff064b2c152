"""Processes that do not outlive the one that started them, even when that one is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading

from vla_rl.runtime.platform import set_offline, set_single_thread


def enter_worker() -> None:
    """Set up a worker process: one thread, no hub, and exit when the parent dies (kill -9 included)."""
    set_single_thread()
    set_offline()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
