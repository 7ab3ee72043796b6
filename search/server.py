"""The server that every candidate's process is forked from.

It has torch imported and has never run it, so that a fork takes some 20 ms where a new interpreter takes two seconds.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
from multiprocessing.context import ForkServerContext

PRELOADED = ["search.workers", "torch._dynamo"]
"""What the server imports once for all; the first optimizer of a process imports torch._dynamo, for 1.4 s."""


def fork_context() -> ForkServerContext:
    """Return the context whose processes the server forks; it starts with the first of them at the latest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_server() -> None:
    """Start the server, unless it runs, and do not wait for its imports."""
    fork_context()
    multiprocessing.forkserver.ensure_running()
