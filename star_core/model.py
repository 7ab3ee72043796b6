"""From a genome to a network: the backbone of LIVs, and the language model around it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from star_core.backbone import Backbone
from star_core.cache import Cache
from star_core.config import ModelConfig
from star_core.genome import Genome
from star_core.graph_decoding import stepper
from star_core.liv._base import OutputProjection
from star_kernels import linear_cross_entropy


class LanguageModel(nn.Module):
    """A causal language model with the backbone that a genome describes, and one embedding for input and output.

    Its `config` holds the sizes that the genome decides in place of those given.

    Unless the configuration says otherwise, the output layer is the embedding, which is scaled by sqrt(width) on its
    way in, as in Gemma (arXiv 2403.08295), so that tied weights of variance 1/width give a residual stream and logits
    of variance 1.

    Args:
        genome: What to build.
        config: Its sizes.
        seed: Seeds the initial weights; None takes torch's global generator as it stands.

    Raises:
        ValueError: As `Backbone`.
    """

    def __init__(self, genome: Genome, config: ModelConfig, *, seed: int | None = None) -> None:
        super().__init__()
        config = config.with_sizes(genome.sizes)
        self.config = config
        with _seeded(seed):
            self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.width) * config.width**-0.5)
            # also the output layer, whose scale decides the logits
            self.embedding._no_weight_decay = True  # type: ignore[attr-defined]
            self.backbone = Backbone(genome, config)
            self.output: nn.Parameter | None = None
            if not config.tie_embeddings:
                self.output = nn.Parameter(torch.randn_like(self.embedding) * config.width**-0.5)
                self.output._no_weight_decay = True  # type: ignore[attr-defined]
            scale = (
                2 * len(genome)
            ) ** -0.5  # every LIV adds to the residual stream: GPT-2's rule (Radford et al. 2019, 2.3)
            with torch.no_grad():
                for module in self.modules():
                    if isinstance(module, OutputProjection):
                        module.weight.mul_(scale)

    @property
    def genome(self) -> Genome:
        """The genome that this model was built from."""
        return self.backbone.genome

    @property
    def output_weight(self) -> Tensor:
        """The output layer, [vocab_size, width]: the embedding, or a weight of its own."""
        return self.embedding if self.output is None else self.output

    def hidden(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Return the normed last hidden states, [B, T, width], of `tokens` [B, T] int64; see `forward`."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens: needs [B, T] int64, got {list(tokens.shape)} {tokens.dtype}")
        x = F.embedding(tokens, self.embedding)
        if self.config.scale_embeddings:
            x = x * self.config.width**0.5
        h: Tensor = self.backbone(x, cache, attention_mask)
        return h

    def forward(self, tokens: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Return next-token logits.

        Args:
            tokens: [B, T], int64.
            cache: Continue after the tokens it has seen, and extend it. Default: a full pass.
            attention_mask: [B, T], booleans or integers: 0 for padding, left, right or between. Real tokens come out
                as without it, and the cache keeps none of it.
        Returns:
            Logits [B, T, vocab_size], float32; zeros where there is padding.
        Raises:
            ValueError: Shape or dtype of `tokens`, shape of `attention_mask`; a cache of another batch size, or without
                room. TypeError: dtype of `attention_mask`.
        """
        return F.linear(self.hidden(tokens, cache, attention_mask), self.output_weight).float()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy in nats of `targets` [B, T] given `tokens` [B, T]; targets of -100 do not
        count."""
        h = self.hidden(tokens)
        return linear_cross_entropy(h.flatten(0, 1), self.output_weight, targets.flatten())

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Allocate the decoding state for `max_length` tokens of `batch_size` sequences."""
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name}: needs at least 1, got {value}")
        specs = self.backbone.state_specs(batch_size, max_length, self.embedding.dtype)
        return Cache(specs, batch_size=batch_size, max_length=max_length, device=self.embedding.device)

    def cache_bytes(self, batch_size: int, length: int) -> int:
        """Return the bytes that `new_cache(batch_size, length)` holds, without allocating them."""
        specs = self.backbone.state_specs(batch_size, length, self.embedding.dtype)
        return sum(spec.nbytes for spec_of in specs for spec in spec_of.values())

    def num_parameters(self) -> int:
        """Return the number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `prompt` by sampling; on a GPU in steps that a captured graph replays (see `graph_decoding`).

        Args:
            prompt: [B, T], int64, T >= 1.
            max_new_tokens: Tokens to add.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Sample among the k likeliest only. Default: among all.
            generator: Source of randomness. Default: torch's global one.
        Returns:
            [B, T + max_new_tokens], int64: the prompt and what follows.
        Raises:
            ValueError: An empty prompt, a negative count or temperature, top_k below 1.
        """
        if prompt.ndim != 2 or prompt.shape[1] < 1:
            raise ValueError(f"prompt: needs [B, T] with T >= 1, got {list(prompt.shape)}")
        if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "generate: needs max_new_tokens >= 0, temperature >= 0 and top_k >= 1, "
                f"got {max_new_tokens}, {temperature}, {top_k}"
            )
        if max_new_tokens == 0:
            return prompt.clone()
        cache = self.new_cache(prompt.shape[0], prompt.shape[1] + max_new_tokens)
        tokens, logits = [prompt], self(prompt, cache)[:, -1]
        step = stepper(self, cache)
        for _ in range(max_new_tokens - 1):
            tokens.append(_sample(logits, temperature, top_k, generator))
            logits = step(tokens[-1])
        return torch.cat([*tokens, _sample(logits, temperature, top_k, generator)], dim=1)

    def save(self, path: str | PathLike[str]) -> None:
        """Write weights, genome and sizes to one safetensors file."""
        metadata = {"format": "pt", "genome": str(self.genome), "config": json.dumps(asdict(self.config))}
        save_model(self, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a model that `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is not one that `save` wrote.
        """
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        if not {"genome", "config"} <= metadata.keys():
            raise ValueError(f"path: {path} holds no genome; needs a file that LanguageModel.save wrote")
        model = cls(Genome.parse(metadata["genome"]), ModelConfig(**json.loads(metadata["config"])))
        load_model(model, str(path))
        return model


def count_parameters(genome: Genome, config: ModelConfig) -> int:
    """Return the number of parameters of a model without allocating it."""
    with torch.device("meta"):
        return LanguageModel(genome, config).num_parameters()


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed torch's CPU generator for the block, and put it back as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
