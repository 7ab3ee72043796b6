"""A training that stops at one rung and goes on at the next: all that its next step depends on, in one file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import nn


def save(path: str | PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """Write all that the next step depends on; the batches depend on the seed and the number of steps alone.

    Args:
        path: Appears there once it is whole.
        model: Trained in place, with the optimizer.
        optimizer: Of all its parameters.
        losses: Of the steps done so far, in nats a token.
    """
    place = Path(path)
    device = next(model.parameters()).device
    temporary = place.with_name(f"{place.name}.new")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "random": torch.get_rng_state(),
        "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    # By a file object, which tells a full disk as an OSError; given a path, torch raises a RuntimeError without reason.
    with temporary.open("wb") as file:
        torch.save(state, file)
    temporary.replace(place)


def restore(path: str | PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Put a training back where `save` left it; torch's random state too.

    Returns:
        The losses of the steps done so far, in nats a token.
    Raises:
        ValueError: The checkpoint is of another model.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"start: {path} is the checkpoint of another model") from error
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["device_random"] is not None:
        torch.cuda.set_rng_state(state["device_random"], next(model.parameters()).device)
    return list(state["losses"])
