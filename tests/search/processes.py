"""Everything that a command starts, however deep and in whatever session: found by a mark in its environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_MARK = "STAR_TEST_MARK"


class Marked:
    """A command of Python's, and all that it starts."""

    def __init__(self, arguments: Sequence[str], **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment, _MARK: self.mark},
        )

    def alive(self) -> list[int]:
        """Return the processes that run, the command's own first."""
        found = []
        wanted = f"{_MARK}={self.mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is not ours; what has ended and is not waited for has no text
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return sorted(found)

    def kill(self) -> None:
        """Kill the command, and nothing that it has started."""
        self.process.kill()
        self.process.communicate()

    def kill_all(self) -> None:
        """Kill the command and all that it has started."""
        while alive := self.alive():
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
        self.process.communicate()

    def left(self, seconds: float) -> list[str]:
        """Return the command lines of what still runs after some seconds: nothing, as soon as nothing does."""
        deadline = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        lines = []
        for pid in alive:
            with suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        return lines

    def finish(self, seconds: float = 600.0) -> str:
        """Wait for the command's end, which has to be a good one; return what it has printed."""
        output, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, output
        return output
