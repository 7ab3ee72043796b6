"""Put the compiled operators under a transformers model, see what that changes, and take them away again.

    pip install 'star-arch[hub]'
    python examples/accelerate_mamba.py

The model is a small Mamba with random weights. On a CPU transformers runs its scan in plain torch, token by token;
`star_core.accelerate` replaces the mixers and the norms in place, and keeps the weights. Prints, in ten
seconds:

    replaced 10 modules, kept 0
      1 x MambaForCausalLM: linear_cross_entropy
      5 x MambaRMSNorm: rms_norm
      4 x MambaMixer: causal_conv1d, selective_scan
    prefill, 512 tokens: 176.9 ms before, 17.3 ms after
    training step, 2 x 128 tokens: 572.6 ms before, 33.4 ms after
    logits: 1e-05 apart at most, of a standard deviation of 1.6
    restored: 0e+00 apart
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging

import star_core


def milliseconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a call, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    """Measure, accelerate, measure again, compare, restore."""
    logging.set_verbosity_error()  # or transformers says that it runs its slow path, which is the point here
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=256, num_hidden_layers=4, vocab_size=256)
    model = MambaForCausalLM(config).eval()
    prompt, batch = torch.randint(256, (1, 512)), torch.randint(256, (2, 128))

    @torch.inference_mode()
    def prefill() -> Tensor:
        logits: Tensor = model(prompt, use_cache=False).logits
        return logits

    def training_step() -> None:
        model.zero_grad()
        model(batch, labels=batch, use_cache=False).loss.backward()

    logits = prefill()
    before = milliseconds(prefill), milliseconds(training_step)
    print(star_core.accelerate(model))
    after = milliseconds(prefill), milliseconds(training_step)
    names = "prefill, 512 tokens", "training step, 2 x 128 tokens"
    for name, slow, fast in zip(names, before, after, strict=True):
        print(f"{name}: {slow:.1f} ms before, {fast:.1f} ms after")

    difference = (prefill() - logits).abs().max()
    print(f"logits: {difference:.0e} apart at most, of a standard deviation of {logits.std():.2g}")
    star_core.restore(model)
    print(f"restored: {(prefill() - logits).abs().max():.0e} apart")


if __name__ == "__main__":
    main()
