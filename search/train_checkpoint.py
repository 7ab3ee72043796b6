"""Checkpoints of a sharded training, through torch.distributed.checkpoint: every process writes its own shards.

A checkpoint is a folder that appears once it is whole, `step-<number>`; the one before it is deleted afterwards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

_STATE = "state.json"


@dataclass
class Progress:
    """All that the next step depends on; the batches depend on the seed and on the number of steps alone.

    The optimizer's state is there from the beginning, at zero, so that a checkpoint has a place to be read into.

    Attributes:
        parameters: By name; each once.
        optimizer: AdamW, of all of them.
        rank: Number of this process, from 0.
        world: Number of processes.
        losses: Of the steps done, in nats a token.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    rank: int
    world: int
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }

    def tensors(self) -> dict[str, Any]:
        """Return what is written and read in place."""
        moments = {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters.items()}
        weights = {name: parameter.data for name, parameter in self.parameters.items()}
        return {"weights": weights, "moments": moments, "random": {str(self.rank): self._random()}}

    def _random(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def set_random(self, states: Mapping[str, Tensor]) -> None:
        """Put torch's random states back."""
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def save(folder: Path, progress: Progress) -> None:
    """Write a checkpoint; all processes call this together.

    Args:
        folder: Seen by all processes; made if it is not there.
        progress: What to write.
    """
    place = folder / f"step-{len(progress.losses):08d}"
    temporary = folder / "new"
    if progress.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    save_shards(progress.tensors(), checkpoint_id=temporary)
    if progress.rank == 0:
        state = {"world": progress.world, "losses": progress.losses}
        (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
        temporary.rename(place)
        for old in folder.glob("step-*"):
            if old != place:
                shutil.rmtree(old)
    dist.barrier()


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint; None where there is none."""
    return max(folder.glob("step-*"), default=None)


def restore(place: Path, progress: Progress) -> None:
    """Put a training back where `save` left it; all processes call this together.

    With another number of processes the shards are cut anew, and torch's random states are left as they are.

    Args:
        place: What `newest` returned.
        progress: Filled in place.
    Raises:
        ValueError: The checkpoint is of another model.
    """
    state = json.loads((place / _STATE).read_text(encoding="utf-8"))
    tensors = progress.tensors()
    same = state["world"] == progress.world
    if not same:
        del tensors["random"]
    try:
        load_shards(tensors, checkpoint_id=place)
    except CheckpointException as error:
        raise ValueError(f"{place} is the checkpoint of another model") from error
    if same:
        progress.set_random(tensors["random"][str(progress.rank)])
    progress.losses[:] = state["losses"]
