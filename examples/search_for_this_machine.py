"""Search models for this machine, and let the best one write.

    pip install 'star-arch[search]'
    python examples/search_for_this_machine.py

The same as `python -m search.run --preset smoke`: four baselines and two generations of four genomes, each trained for
a second or two on speeches, then timed beside a Transformer++. That shows the way, no more: `--preset laptop` is
the least that finds something. Prints, in half a minute, the search's own table, and then:

    1 perplexity 9.5, 1.41 x the reference's time per token, 129.0 KiB of cache: 8.1.1.1.1-17.1.1.1.1-...
    2 ...
    the best, f25de19b4efa533d with 130,626 parameters, writes:
    Fellow citizens, ansios of is barion the of of som blalstes aste the pite so wh aur shathongrome ...
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import torch

import star_core
from search import run


def main() -> int:
    """Search, list the front, load its best member and generate bytes."""
    folder = Path("runs") / f"example-{datetime.now():%Y%m%d-%H%M%S}"
    if code := run.main(["--preset", "smoke", "--out", str(folder)]):
        return code

    front = json.loads((folder / "front.json").read_text(encoding="utf-8"))
    for number, winner in enumerate(front, start=1):
        metrics = winner["metrics"]
        print(
            f"{number} perplexity {metrics['perplexity']:.1f}, "
            f"{metrics['decode_ms_per_token_ratio']:.2f} x the reference's time per token, "
            f"{metrics['cache_bytes'] / 1024:.1f} KiB of cache: {winner['genome']}"
        )

    best = front[0]["genome_hash"]  # sorted by the first objective, perplexity
    model = star_core.load(folder / "best" / f"{best}.safetensors")
    print(f"the best, {best} with {model.num_parameters():,} parameters, writes:")
    prompt = torch.tensor([list(b"Fellow citizens, ")])
    written = model.generate(prompt, 120, top_k=10, generator=torch.Generator().manual_seed(0))
    print(bytes(written[0].tolist()).decode(errors="replace"))
    return 0


if __name__ == "__main__":  # the processes that train the candidates import this file too
    sys.exit(main())
