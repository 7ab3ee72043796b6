"""Training over several processes, each with a part of every weight: FSDP2 (`torch.distributed.fsdp.fully_shard`).

Source: Zhao et al., PyTorch FSDP, 2023, arXiv 2304.11277; the second version, of a parameter at a time, is torch's own.
A step takes the same batch however many processes there are, each its share of the rows, so that losses are those of
`search.train.train` up to rounding; and on a CPU they are the same to the last bit for the same number of processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from search.data import Corpus
from search.train import (
    TrainConfig,
    TrainResult,
    accumulate,
    adamw,
    check_finite,
    check_held_out,
    learning_rate,
    make_result,
    token_loss,
    weight_decays,
)
from search.train_checkpoint import Progress, newest, restore, save
from star_core import LanguageModel


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, as one of them sees them.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        device: Where its shards are.
        mesh: All of them in a row.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Whether this is the one that prints, and writes what is no shard."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """Return this process's rows of a batch."""
        share = batch_size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, value: float) -> float:
        """Return the mean over the processes."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.world


@contextmanager
def connected(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, be the only one.

    Args:
        device: "cuda" or "cpu". Default: CUDA where there is a GPU.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    # gloo beside nccl: checkpoints and messages are the CPU's.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    try:
        world = dist.get_world_size()
        yield Ranks(dist.get_rank(), world, here, init_device_mesh(kind, (world,), mesh_dim_names=("shard",)))
    finally:
        dist.destroy_process_group()


def shard(model: LanguageModel, ranks: Ranks) -> None:
    """Give every process its part of every weight, in place; `model.loss` puts them together as it needs them.

    A LIV's weights are one group, there from the beginning of its call to its end. LIVs that share a featurizer are one
    group between them, there from the first call to the end of the last. Embedding, output layer and the norms of the
    residual stream are the root's, there throughout. Scalars, which have nothing to be divided along, stay whole.
    """
    whole = {parameter for parameter in model.parameters() if not parameter.ndim}
    for scalar in whole:
        scalar.data = scalar.data.to(ranks.device)
    for group in sharing_groups(model.backbone.livs):
        fully_shard(group, mesh=ranks.mesh, ignored_params=whole)
    fully_shard(model, mesh=ranks.mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "loss")


def sharing_groups(modules: Sequence[nn.Module] | nn.ModuleList) -> list[list[nn.Module]]:
    """Return the modules in groups that share no parameter with another group, in the order of their first."""
    groups: list[tuple[list[nn.Module], set[nn.Parameter]]] = []
    for module in modules:
        members, parameters = [module], set(module.parameters())
        for group in [group for group in groups if group[1] & parameters]:
            groups.remove(group)
            members, parameters = [*group[0], *members], group[1] | parameters
        groups.append((members, parameters))
    order = {module: place for place, module in enumerate(modules)}
    return sorted((members for members, _ in groups), key=lambda members: order[members[0]])


def train_sharded(
    model: LanguageModel,
    corpus: Corpus,
    config: TrainConfig,
    ranks: Ranks,
    *,
    seed: int,
    folder: Path,
    save_every: int,
    on_step: Callable[[int, float, float], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a language model that every process holds in full, and evaluate it on the held-out text.

    The same loop as `search.train.train`, which says what the settings mean. Weights are float32 and computed with in
    `config.precision`, as there: in bfloat16, step sizes and decay rates of recurrences would lose 0.4 % of their
    logarithm. Goes on from the newest checkpoint in `folder`, if there is one.

    Args:
        model: With the same weights in every process; sharded in place.
        corpus: Its vocabulary fits the model's; the same in every process.
        config: Budget and settings; `batch_size` is that of all processes together.
        ranks: The processes.
        seed: Chooses the batches, and with the rank torch's random numbers.
        folder: Where checkpoints are; seen by all processes.
        save_every: Steps between two checkpoints.
        on_step: Called in every process after each step with its number, its loss and its gradient norm.
        on_start: Called in every process with the number of steps that a checkpoint has brought.
    Raises:
        Diverged: a loss or gradient norm is not finite.
        ValueError: the batch can't be divided; the checkpoint is of another model.
        DataError: the corpus is too short for `seq_len`.
    """
    if config.batch_size % (ranks.world * config.accumulation):
        raise ValueError(
            f"batch_size: needs a multiple of {ranks.world} processes x {config.accumulation} parts, "
            f"got {config.batch_size}"
        )
    started = time.monotonic()
    decays = weight_decays(model)
    shard(model, ranks)
    parameters = dict(model.named_parameters())
    model.train()
    torch.manual_seed(seed + ranks.rank)
    optimizer = adamw(parameters, decays, config)
    progress = Progress(parameters, optimizer, ranks.rank, ranks.world)
    if (checkpoint := newest(folder)) is not None:
        restore(checkpoint, progress)
    losses = progress.losses
    if on_start is not None:
        on_start(len(losses))
    batches = corpus.batches(
        "train",
        config.batch_size,
        config.seq_len,
        seed,
        config.steps,
        skip=len(losses),
        rows=ranks.rows(config.batch_size),
    )
    for step, (tokens, targets) in enumerate(batches, len(losses) + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = ranks.mean(accumulate(model, tokens.to(ranks.device), targets.to(ranks.device), config))
        norm = clip_gradients(list(parameters.values()), config.clip, ranks)
        check_finite(step, loss, norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if on_step is not None:
            on_step(step, loss, norm)
        if step % save_every == 0 or step == config.steps:
            save(folder, progress)
    valid_loss = held_out_loss(model, corpus, config, ranks)
    return make_result(losses, valid_loss, corpus, config, time.monotonic() - started)


def clip_gradients(parameters: Sequence[nn.Parameter], clip: float, ranks: Ranks) -> float:
    """Clip the whole gradient to a norm, in place, and return the norm it had.

    Those of whole parameters, which FSDP leaves alone, are averaged over the processes first.
    """
    graded = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in graded if isinstance(parameter.data, DTensor)]
    whole = [parameter for parameter in graded if not isinstance(parameter.data, DTensor)]
    norms = [_norm(sharded)]
    if whole:
        together = torch.stack([_gradient(parameter) for parameter in whole])
        dist.all_reduce(together)
        for parameter, gradient in zip(whole, together / ranks.world, strict=True):
            _gradient(parameter).copy_(gradient)
        norms.append(_norm(whole))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for part in (sharded, whole):
        nn.utils.clip_grads_with_norm_(part, clip, norm)
    return float(norm)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    norm = nn.utils.get_total_norm([_gradient(parameter) for parameter in parameters])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def held_out_loss(model: LanguageModel, corpus: Corpus, config: TrainConfig, ranks: Ranks) -> float:
    """Return the loss of `search.train.evaluate_loss`, every process doing its share of the batches.

    Raises:
        Diverged: it is not a number, or too large for exp(loss) to be one.
    """
    size = max(1, config.batch_size // (ranks.world * config.accumulation))
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    batches = enumerate(corpus.validation_batches(size, config.seq_len, config.eval_tokens))
    with torch.no_grad():
        while turn := [batch for _, batch in zip(range(ranks.world), batches, strict=False)]:
            # All put the weights together as often; one that has no batch left takes the last, and does not count it.
            (_, (tokens, targets)) = turn[min(ranks.rank, len(turn) - 1)]
            loss = token_loss(model, tokens.to(ranks.device), targets.to(ranks.device), config.precision).double()
            if ranks.rank < len(turn):
                sums += torch.stack([loss * targets.numel(), loss.new_tensor(targets.numel())])
    model.train()
    dist.all_reduce(sums)
    return check_held_out((sums[0] / sums[1]).item())


def whole_weights(model: LanguageModel, ranks: Ranks) -> dict[str, Tensor]:
    """Return every weight in full, on the CPU, by its first name; empty in all processes but the first."""
    weights = {}
    for name, parameter in model.named_parameters():
        full = parameter.data.full_tensor() if isinstance(parameter.data, DTensor) else parameter.data
        if ranks.first:
            weights[name] = full.cpu()
    return weights
