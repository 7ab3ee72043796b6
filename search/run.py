"""What `python -m search.run` runs: `search.command`, with the server of its processes started first.

The server needs three seconds for its imports, and so does the command line for its own: they take them side by side.
That is also why this module imports next to nothing: every candidate's process imports it again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from search.server import start_server


def main(argv: Sequence[str] | None = None) -> int:
    """Run a search; return the exit code, as `search.command.main` does."""
    arguments = sys.argv[1:] if argv is None else argv
    if not {"inline", "ray", "slurm"}.intersection(arguments):
        start_server()
    from search import command

    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
