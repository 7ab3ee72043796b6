"""A Ray cluster of one node on this machine, which outlives the drivers that attach to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def answers(address: str) -> bool:
    """Tell whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return not probe.connect_ex((host, int(port)))


@contextmanager
def cluster(*, hidden: Path | None = None, **environment: str) -> Iterator[str]:
    """Start a cluster with two CPUs, yield its address, and end it.

    Args:
        hidden: A folder that is another, empty one to the cluster; that takes root, and Linux.
        environment: What its processes find in theirs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = f"--head --block --port {address.rpartition(':')[2]} --num-cpus 2 --include-dashboard false"
    ray = Path(sys.executable).parent / "ray"
    command = f"exec {sys.executable} {ray} start {options} --disable-usage-stats"
    if hidden is not None:
        command = f"mount -t tmpfs none {hidden} && {command}"
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", command] if hidden is not None else ["sh", "-c", command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not answers(address):
        time.sleep(0.2)
    try:
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)
