"""Train one Mamba layer to remember: at each token, say the value that came with the last mark.

    python examples/train_a_layer.py

The layer is used as any other of torch.nn: here between two linear ones, 10 thousand parameters in all. What it learned
on 64 tokens holds on 512, and it runs token by token with a state of constant size. Prints, within seconds:

    loss at 64 tokens: 1.0046 before, 0.0009 after; at 512 tokens: 0.0010
    token by token: the same outputs within 1e-06
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from star_core.layers import Mamba


def marked_values(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Draw values and marks, [batch, tokens, 2], and the value at the last mark so far, [batch, tokens, 1]."""
    values, marks = torch.randn(batch, tokens), torch.rand(batch, tokens) < 0.1
    last = torch.where(marks, torch.arange(tokens), 0).cummax(dim=1).values
    return torch.stack([values, marks.float()], dim=-1), values.gather(1, last).unsqueeze(-1)


def main() -> None:
    """Train, and look at what was learned."""
    torch.manual_seed(0)
    embed, layer, head = nn.Linear(2, 32), Mamba(32), nn.Linear(32, 1)
    model = nn.Sequential(embed, layer, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    short, long = marked_values(64, 64), marked_values(64, 512)
    before = F.mse_loss(model(short[0]), short[1]).item()
    for _ in range(500):
        x, target = marked_values(32, 64)
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.inference_mode():
        after, longer = (F.mse_loss(model(x), target).item() for x, target in (short, long))
        print(f"loss at 64 tokens: {before:.4f} before, {after:.4f} after; at 512 tokens: {longer:.4f}")
        state: dict[str, Tensor] = {}  # the layer starts from an empty one, and leaves what it remembers in it
        rows = [head(layer(embed(token), state=state)) for token in short[0].split(1, dim=1)]
        difference = (torch.cat(rows, dim=1) - model(short[0])).abs().max().item()
    print(f"token by token: the same outputs within {difference:.0e}")


if __name__ == "__main__":
    main()
