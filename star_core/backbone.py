"""From a genome to its layers: the residual stream, its norms, and what LIVs share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from star_core.cache import Cache, StateSpec
from star_core.config import ModelConfig
from star_core.genome import Genome, Residual, validate
from star_core.genome.extension import NO_SIZES, SizeGenes
from star_core.liv import LIV, Features, build_featurizer, build_liv
from star_core.liv.own import LIVShape
from star_core.ragged import Ragged, attention_mask_of
from star_kernels import add_rms_norm, rms_norm


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
