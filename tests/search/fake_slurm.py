"""A SLURM of one machine and no queue: as sbatch, srun, sacct or scancel, by the name that this file is called by.

The folder in STAR_TEST_SLURM holds a file for each job, with the number of the process that runs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel")
FOLDER = "STAR_TEST_SLURM"


def install(folder: Path) -> dict[str, str]:
    """Put the commands into a folder; return the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        script.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", FOLDER: str(folder / "jobs")}


def jobs(folder: Path) -> dict[str, int]:
    """Return the processes of all jobs there were, by job."""
    return {path.name: int(path.read_text()) for path in sorted((folder / "jobs").iterdir())}


def is_running(pid: int) -> bool:
    """Tell whether a process runs, and is not merely waited for."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _sbatch(folder: Path, script: str) -> None:
    job = str(time.time_ns() // 1_000_000)  # submitit remembers jobs by their numbers, from one test to the next
    names = ("PROCID", "LOCALID", "NODEID")
    environment = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}
    environment |= {f"SLURM_{name}": "0" for name in names}
    process = subprocess.Popen(
        ["bash", script],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    (folder / job).write_text(str(process.pid))
    print(f"Submitted batch job {job}")


def _main(command: str, arguments: list[str]) -> None:
    folder = Path(os.environ[FOLDER])
    if command == "sbatch":
        _sbatch(folder, arguments[-1])
    if command == "srun":
        program = arguments.index("--error") + 2
        os.execvp(arguments[program], arguments[program:])
    if command == "sacct":
        print("JobID|State|NodeList")
        for path in folder.iterdir():
            print(f"{path.name}|{'RUNNING' if is_running(int(path.read_text())) else 'FAILED'}|here")
    if command == "scancel":
        with suppress(ProcessLookupError):
            os.killpg(int((folder / arguments[0]).read_text()), signal.SIGKILL)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
