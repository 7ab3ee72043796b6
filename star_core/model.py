"""From a genome to a network: the backbone of LIVs, and the language model around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from os import PathLike
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from star_core.cache import Cache, StateSpec
from star_core.config import ModelConfig
from star_core.genome import Genome, Residual, validate
from star_core.genome.extension import NO_SIZES, SizeGenes
from star_core.liv import LIV, Features, build_featurizer, build_liv
from star_core.liv._base import OutputProjection
from star_core.liv.own import LIVShape
from star_core.ragged import Ragged, attention_mask_of
from star_kernels import add_rms_norm, linear_cross_entropy, rms_norm


class Backbone(nn.Module):
    """The LIVs of a genome, each added to the residual stream; pre-normed, unless the genome moves their norms.

    Featurizers that LIVs share are one module; tensors that LIVs share are computed once a pass, by the first of them.

    Attributes:
        gradient_checkpointing: Whether training keeps the residual stream and shared tensors alone, and computes a
            LIV's inner tensors a second time in the backward pass.
        checkpoint_every: Do so for one LIV in this many.

    Raises:
        ValueError: The genome is not valid, or the sizes do not fit one of its classes.
    """

    def __init__(self, genome: Genome, config: ModelConfig) -> None:
        super().__init__()
        if violations := validate(genome):
            raise ValueError(f"genome: {genome} is not valid: {'; '.join(item.message for item in violations)}")
        config = config.with_sizes(genome.sizes)
        beyond_paper = genome.sizes != NO_SIZES or any(liv.extension for liv in genome.livs)
        if beyond_paper and (violations := validate(genome, SizeGenes(config.width, head_dim=config.head_dim))):
            raise ValueError(f"width: {genome} does not fit: {'; '.join(item.message for item in violations)}")
        self.genome = genome
        self.eps = config.norm_eps
        self.gradient_checkpointing = False
        self.checkpoint_every = 1
        # The name under which transformers puts its own.
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        qk_norm_eps = config.norm_eps if config.qk_norm else None
        shape = LIVShape(
            config.width, config.head_dim, config.time_scale, config.rope_base, config.ffn_width, qk_norm_eps
        )
        classes = genome.classes
        sharing = genome.sharing()
        self.tensor_source = [dict(sources) for sources in sharing.tensor_source]
        # A featurizer has weights for a group as soon as one LIV that it serves computes that group.
        computed: dict[int, set[str]] = {}
        for index, first in enumerate(sharing.featurizer_source):
            groups = {"k", "v", "B", "C", "K"} - self.tensor_source[index].keys()
            computed.setdefault(first, set()).update(groups)
        featurizers = {first: build_featurizer(classes[first], shape, groups) for first, groups in computed.items()}
        self.livs = nn.ModuleList(
            build_liv(liv, shape, featurizers[first], self.tensor_source[index].keys())
            for index, (liv, first) in enumerate(zip(classes, sharing.featurizer_source, strict=True))
        )
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(config.width)) for _ in range(len(classes) + 1))
        self.placements = [cls.residual for cls in classes]
        # Norms of LIVs' outputs start as small as GPT-2's rule makes the other LIVs' weights.
        self.out_norms = nn.ParameterDict(
            {
                str(index): nn.Parameter(torch.full((config.width,), (2 * len(classes)) ** -0.5))
                for index, placement in enumerate(self.placements)
                if placement is Residual.SANDWICH
            }
        )
        # Features are kept no longer than the last LIV that reuses them.
        self.last_use: dict[int, int] = {}
        for index, sources in enumerate(self.tensor_source):
            self.last_use.update(dict.fromkeys(sources.values(), index))

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        *,
        residuals: list[Tensor] | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Run `x` through every LIV and the final norm.

        Args:
            x: [B, T, width].
            cache: Continue from what it holds, and extend it.
            attention_mask: [B, T], booleans or integers: 0 for padding, anywhere in a row. Padding is left out of the
                computation, so that real tokens come out as without it, and gives zeros.
            residuals: Filled with the residual stream before each LIV and after the last, each [B, T, width]: `x`, and
                then zeros where there is padding.
            starts: [B, T], bool: tokens that begin a further sequence in their row, which sees nothing of those before.
        Returns:
            [B, T, width].
        Raises:
            ValueError: The shape of `attention_mask`; a cache of another batch size, without room, or beside `starts`.
                TypeError: The dtype of `attention_mask`.
        """
        batch, tokens, _ = x.shape
        ragged = self._ragged(x, cache, attention_mask, starts)
        if ragged is None or ragged.cu_seqlens is None:
            y = self._run(x, cache, ragged, residuals)
        else:
            y = ragged.scatter(self._run(ragged.gather(x), cache, ragged, residuals), (batch, tokens))
            if residuals is not None:
                residuals[:] = [x, *(ragged.scatter(residual, (batch, tokens)) for residual in residuals[1:])]
        if cache is not None:
            cache.advance(tokens, ragged)
        return y

    def _ragged(
        self, x: Tensor, cache: Cache | None, attention_mask: Tensor | None, starts: Tensor | None
    ) -> Ragged | None:
        """Say where the tokens of `x` lie if the rows are not equally long, with and after them."""
        batch, tokens, _ = x.shape
        if cache is not None:
            cache.require_room(batch, 0)
        lengths = None if cache is None else cache.lengths
        mask = None if attention_mask is None else attention_mask_of(attention_mask, (batch, tokens), x.device)
        if starts is not None:
            if cache is not None:
                raise ValueError("cache: needs None where a row holds several sequences, which have no decoding state")
            return Ragged.pack(torch.ones_like(starts) if mask is None else mask, None, starts)
        if mask is None or bool(mask.all()):
            if cache is not None:
                cache.require_room(batch, tokens)
                if lengths is not None and tokens == 1:
                    return Ragged.step(lengths, cache.length)
            if lengths is None:
                return None
            mask = torch.ones((batch, tokens), dtype=torch.bool, device=x.device)
        if cache is not None and cache.length and lengths is None:
            lengths = torch.full((batch,), cache.length, device=x.device)
        ragged = Ragged.pack(mask, lengths)
        if cache is not None:
            cache.require_room(batch, ragged.longest - cache.length)
        return ragged

    def _run(self, x: Tensor, cache: Cache | None, ragged: Ragged | None, residuals: list[Tensor] | None) -> Tensor:
        offset = 0 if cache is None else cache.length
        # Not with a cache: a second forward pass would write to it again.
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        features: dict[int, Features] = {}

        def call(index: int, h: Tensor) -> Tensor:
            liv, state = self.livs[index], None if cache is None else cache.states[index]
            reused = self._reused(index, features)
            if recomputes and index % self.checkpoint_every == 0:
                y, shared = self._recomputed(liv, h, reused, ragged)
            else:
                y, shared = liv(h, reused=reused, state=state, offset=offset, ragged=ragged)
            if index in self.last_use:
                features[index] = shared
            for source in [source for source in features if self.last_use[source] <= index]:
                del features[source]
            return y

        if any(placement is not Residual.PRE_NORM for placement in self.placements):
            return self._run_placed(x, call, residuals)
        h, residual = rms_norm(x, self.norms[0], eps=self.eps), x
        for index in range(len(self.livs)):
            if residuals is not None:
                residuals.append(residual)
            h, residual = add_rms_norm(call(index, h), residual, self.norms[index + 1], eps=self.eps)
        if residuals is not None:
            residuals.append(residual)
        return h

    def _run_placed(self, x: Tensor, call: Callable[[int, Tensor], Tensor], residuals: list[Tensor] | None) -> Tensor:
        """Run every LIV with its norms where its genes put them; see `Residual`."""
        beside: Tensor | None = None  # outputs of parallel LIVs, which the next one does not read
        for index, placement in enumerate(self.placements):
            if residuals is not None:
                residuals.append(x)
            norm = self.norms[index]
            y = call(index, x if placement is Residual.POST_NORM else rms_norm(x, norm, eps=self.eps))
            if placement is Residual.SANDWICH:
                y = rms_norm(y, self.out_norms[str(index)], eps=self.eps)
            beside = y if beside is None else beside + y
            if placement is not Residual.PARALLEL:
                x, beside = x + beside, None
            if placement is Residual.POST_NORM:
                x = rms_norm(x, norm, eps=self.eps)
        if residuals is not None:
            residuals.append(x)
        return rms_norm(x, self.norms[len(self.placements)], eps=self.eps)

    def _recomputed(
        self, liv: nn.Module, h: Tensor, reused: Features, ragged: Ragged | None
    ) -> tuple[Tensor, Features]:
        """Call `liv` so that the backward pass runs it a second time."""
        names: list[str] = []

        def run(h: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            y, shared = liv(h, reused=dict(zip(reused, tensors, strict=True)), ragged=ragged)
            names[:] = shared
            # Tensors alone, none of them a parameter itself: torch's reentrant checkpoints know no other outputs.
            return (y, *(tensor.view_as(tensor) for tensor in shared.values()))

        y, *tensors = self._gradient_checkpointing_func(run, h, *reused.values())
        return y, dict(zip(names, tensors, strict=True))

    def _reused(self, index: int, features: dict[int, Features]) -> Features:
        """Gather what LIV `index` reuses: "k", or "positive.k" and "negative.k" of a differential LIV."""
        return {
            name: tensor
            for group, source in self.tensor_source[index].items()
            for name, tensor in features[source].items()
            if name.rpartition(".")[2] == group
        }

    def state_specs(self, batch_size: int, max_length: int, dtype: torch.dtype) -> list[dict[str, StateSpec]]:
        """Return what each LIV keeps for `max_length` tokens of `batch_size` sequences."""
        specs = []
        for liv in self.livs:
            assert isinstance(liv, LIV)
            specs.append(liv.state_spec(batch_size, max_length, dtype))
        return specs

    @torch.no_grad()
    def grow(self, cache: Cache, max_length: int) -> None:
        """Make room in `cache` for `max_length` tokens, keeping what it holds.

        Raises:
            ValueError: It holds more tokens than that.
        """
        if max_length < cache.length:
            raise ValueError(
                f"max_length: needs at least the {cache.length} tokens that the cache holds, got {max_length}"
            )
        cache.resize(self.state_specs(cache.batch_size, max_length, self.norms[0].dtype), max_length)
        if cache.length:
            for liv, state in zip(self.livs, cache.states, strict=True):
                assert isinstance(liv, LIV)
                liv.refill(state)


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
        """Continue `prompt` by sampling.

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
        tokens, step = [prompt], prompt
        for _ in range(max_new_tokens):
            logits = self(step, cache)[:, -1]
            step = _sample(logits, temperature, top_k, generator)
            tokens.append(step)
        return torch.cat(tokens, dim=1)

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
