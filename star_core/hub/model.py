"""`StarForCausalLM`: the backbone of a genome between transformers' embedding and output layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from star_core.backbone import Backbone
from star_core.hub.cache import StarCache
from star_core.hub.card import write_card
from star_core.hub.config import StarConfig
from star_core.hub.packing import PACKING, sequence_starts
from star_core.liv._base import OutputProjection, init_linear_
from star_core.model import LanguageModel
from star_kernels import linear_cross_entropy


class StarPreTrainedModel(PreTrainedModel):
    """What the models of a genome have in common: loading, saving with a model card, initial weights."""

    config_class = StarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The backbone calls norms by their weights, and hands tensors from LIV to LIV: it stays on one device.
    _no_split_modules: ClassVar[list[str]] = ["Backbone"]
    _is_stateful = True
    _can_compile_fullgraph = False
    config: StarConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what `LanguageModel` draws, leaving alone what was loaded."""
        loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        if isinstance(module, OutputProjection):
            init_linear_(module.weight, scale=(2 * self.config.num_hidden_layers) ** -0.5)
        elif isinstance(module, nn.Embedding | nn.Linear):
            # A row for each token here and in the output layer: variance 1/width.
            nn.init.normal_(module.weight, std=self.config.width**-0.5)
        elif isinstance(module, nn.ParameterList):
            for weight in module.parameters():
                nn.init.ones_(weight)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        for name in ("lam", "D", "skip"):
            factor = module._parameters.get(name)
            if factor is not None:
                nn.init.ones_(factor)
        for parameter, value in loaded:
            parameter.copy_(value)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Tell what needs no initial weights because another weight takes its place.

        A shared featurizer is one module under several names. Where a checkpoint has it under none of them, no other
        weight takes its place: it is missing.
        """
        names: dict[str, set[str]] = {}
        for target, source in self.all_tied_weights_keys.items():
            if self.get_parameter(target) is self.get_parameter(source):
                names.setdefault(source, {source}).add(target)
        absent = [source for source, group in names.items() if group <= set(loading_info.missing_keys)]
        super().mark_tied_weights_as_initialized(loading_info)
        for source in absent:
            self.get_parameter(source)._is_hf_initialized = False
            loading_info.missing_keys.add(source)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)
        for module in self.modules():
            if isinstance(module, Backbone):
                module.checkpoint_every = every_n_layers

    def save_pretrained(self, save_directory: str | PathLike[str], is_main_process: bool = True, **kwargs: Any) -> None:
        """Save configuration and weights, and a model card: README.md, unless the folder has one of another author.

        Args:
            save_directory: As the base class.
            is_main_process: As the base class.
            kwargs: As the base class.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and isinstance(self, StarForCausalLM):
            write_card(self, Path(save_directory))


class StarModel(StarPreTrainedModel):
    """Embedding and backbone of a genome, without an output layer."""

    def __init__(self, config: StarConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.backbone = Backbone(config.parsed_genome(), config.model_config())
        self._tied_weights_keys = _shared_names(self)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return which weights are others' under a second name: those of shared featurizers, always."""
        if all_submodels:
            tied: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=True)
            return tied
        return dict(self._tied_weights_keys)

    def new_cache(self, batch_size: int, max_length: int) -> StarCache:
        """Allocate the decoding state for `max_length` tokens of `batch_size` sequences."""
        specs = self.backbone.state_specs(batch_size, max_length, self.dtype)
        return StarCache(specs, batch_size=batch_size, max_length=max_length, device=self.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StarCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        starts: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Return the normed last hidden states.

        Args:
            input_ids: [B, T], int64; or `inputs_embeds`, [B, T, width].
            attention_mask: [B, T] or [B, columns of the cache + T], 0 for padding, left, right or between. Real tokens
                come out as without it. Its last T columns are read; a single token behind a filled cache is real.
            cache: Continue from what it holds; it grows where it must.
            inputs_embeds: See `input_ids`.
            use_cache: Whether to return the decoding state. Default: the configuration's, and not in training.
            output_hidden_states: Whether to return the residual stream before each LIV, and the normed one after the
                last. Default: the configuration's.
            return_dict: False for a tuple. Default: the configuration's.
            starts: [B, T], bool: tokens that begin a further sequence in their row, as `sequence_starts` finds them.
                There is no decoding state then.
        Returns:
            `last_hidden_state` [B, T, width], the cache, `hidden_states`.
        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; shapes that do not fit; a cache where a row
                holds several sequences.
            TypeError: A cache of another class; dtype of `attention_mask`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: needs either input_ids or inputs_embeds, not both and not neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.scale_embeddings:
            x = x * self.config.width**0.5
        if starts is not None and use_cache is None:
            use_cache = False
        cache = self._cache(cache, use_cache, x)
        tokens = x.shape[1]
        if attention_mask is not None:
            attention_mask = _new_columns(attention_mask, tokens, cache)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        residuals: list[Tensor] | None = [] if output_hidden_states else None
        h = self.backbone(x, cache, attention_mask, residuals=residuals, starts=starts)
        if cache is not None:
            cache.columns += tokens
        hidden_states = None if residuals is None else (*residuals[:-1], h)
        output = BaseModelOutputWithPast(last_hidden_state=h, cache=cache, hidden_states=hidden_states)
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _cache(self, cache: StarCache | None, use_cache: bool | None, x: Tensor) -> StarCache | None:
        """Return the state to continue from, with room for `x`; None where none is wanted."""
        if cache is None:
            wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
            return self.new_cache(x.shape[0], max(1, x.shape[1])) if wanted else None
        _check_cache(cache)
        needed = cache.length + x.shape[1]
        if needed > cache.max_length:
            # Twice as much, so that a token-by-token loop moves the state a few times only.
            self.backbone.grow(cache, max(needed, 2 * cache.max_length))
        return cache


class StarForCausalLM(StarPreTrainedModel, GenerationMixin):
    """The language model of a genome, as `LanguageModel`, for transformers' `generate`, `Trainer` and Auto classes."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # `num_items_in_batch`

    def __init__(self, config: StarConfig) -> None:
        super().__init__(config)
        self.model = StarModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_star(cls, model: LanguageModel, *, measured: Mapping[str, float] | None = None) -> Self:
        """Copy a `LanguageModel`, such as a search's winner that `star_core.load` read.

        Args:
            model: What to copy; its dtype and device are kept.
            measured: Numbers for the model card, as `StarConfig` takes them.
        """
        sizes = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
        tied = sizes.pop("tie_embeddings")
        copy = cls(StarConfig(genome=str(model.genome), measured=measured, tie_word_embeddings=tied, **sizes))
        copy.to(device=model.embedding.device, dtype=model.embedding.dtype)
        copy.model.backbone.load_state_dict(model.backbone.state_dict())
        with torch.no_grad():
            copy.model.embed_tokens.weight.copy_(model.embedding)
            copy.lm_head.weight.copy_(model.output_weight)
        copy.train(model.training)
        return copy

    def to_star(self) -> LanguageModel:
        """Copy the model to a `LanguageModel`, whose `save` writes one file that `star_core.load` reads."""
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        sizes = replace(self.config.model_config(), tie_embeddings=tied)
        copy = LanguageModel(self.config.parsed_genome(), sizes)
        copy.to(device=self.device, dtype=self.dtype)
        copy.backbone.load_state_dict(self.model.backbone.state_dict())
        with torch.no_grad():
            copy.embedding.copy_(self.model.embed_tokens.weight)
            if copy.output is not None:
                copy.output.copy_(self.lm_head.weight)
        return copy.train(self.training)

    def new_cache(self, batch_size: int, max_length: int) -> StarCache:
        """Allocate the decoding state for `max_length` tokens of `batch_size` sequences."""
        return self.model.new_cache(batch_size, max_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StarCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        skip_logits: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Tensor | None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return next-token logits and, given labels, the loss.

        Rows may hold several sequences end to end, as `DataCollatorWithFlattening` makes them of a batch: nothing is
        computed for padding, and logits, loss and gradients are those of the padded batch. No sequence sees another,
        whatever the LIV class. There is no decoding state then.

        Args:
            input_ids: As `StarModel.forward`, like all that is not named here.
            attention_mask: See there.
            cache: See there.
            inputs_embeds: See there.
            labels: [B, T], int64: the tokens themselves, which are shifted here; -100 does not count, nor does what
                padding predicts (the first token behind left padding) or the sequence before in the row.
            use_cache: See there.
            output_hidden_states: See there.
            return_dict: See there.
            logits_to_keep: How many of the last tokens get logits, or an index of those that do; 0 for all.
            num_items_in_batch: Divide the sum of losses by this. Default: by the number of targets.
            skip_logits: Whether to leave out the logits, which the loss does not need: it never holds them all.
                Default: where there are labels in training.
            position_ids: [B, T] or [1, T], integers: where one is not the one before plus one, a further sequence
                begins. They say nothing else: a token's place is counted from its sequence's first.
            kwargs: `shift_labels`, [B, T], int64: targets already shifted, in place of `labels`. Not a parameter of its
                own, or `Trainer` would wait for it in every batch that it evaluates. `seq_idx`, `cu_seq_lens_q`,
                `cu_seq_lens_k`: as `position_ids`, by the sequence that a token belongs to ([B, T]) or by boundaries
                ([S + 1], from 0 to T; B = 1). `max_length_q`, `max_length_k`: not needed.
        Returns:
            `loss`, `logits` [B, T, vocab_size] float32, the cache, `hidden_states`.
        Raises:
            ValueError, TypeError: As `StarModel.forward`; an unknown argument.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        packing = {name: kwargs.pop(name) for name in PACKING if name in kwargs}
        if kwargs:
            raise TypeError(f"StarForCausalLM.forward: unexpected keyword argument {', '.join(map(repr, kwargs))}")
        starts = None
        if (given := input_ids if inputs_embeds is None else inputs_embeds) is not None:
            shape = (given.shape[0], given.shape[1])
            new = None if attention_mask is None else attention_mask[:, -shape[1] :]
            starts = sequence_starts(shape, new, position_ids=position_ids, **packing)
        outputs = self.model(
            input_ids,
            attention_mask,
            cache,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
            starts=starts,
        )
        h = outputs.last_hidden_state
        has_labels = labels is not None or shift_labels is not None
        if starts is not None and labels is not None:
            labels = labels.masked_fill(starts, -100)
        loss = self._loss(h, labels, shift_labels, attention_mask, num_items_in_batch) if has_labels else None
        logits = None
        if not (self.training and has_labels if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            logits = self.lm_head(h[:, kept if isinstance(logits_to_keep, int) else logits_to_keep]).float()
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def _loss(
        self,
        h: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        attention_mask: Tensor | None,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if shift_labels.shape != h.shape[:2]:
            raise ValueError(f"labels: needs [B, T] = {list(h.shape[:2])}, got {list(shift_labels.shape)}")
        if attention_mask is not None:
            shift_labels = shift_labels.masked_fill(attention_mask[:, -h.shape[1] :] == 0, -100)
        inputs = (h.flatten(0, 1), self.lm_head.weight, shift_labels.flatten().to(h.device))
        if num_items_in_batch is None:
            return linear_cross_entropy(*inputs)
        return linear_cross_entropy(*inputs, reduction="sum") / num_items_in_batch

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` our own decoding state, with room for all of it from the start.

        Raises:
            ValueError: Another kind of cache is asked for. TypeError: A cache of another class.
        """
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation: needs None, got {generation_config.cache_implementation!r}; "
                "a STAR model decodes with its own cache"
            )
        if (given := model_kwargs.get("cache")) is not None:
            _check_cache(given)
            given._is_user_defined = True  # as the base class does: it outlives `generate`
            return
        if generation_config.use_cache is False:
            return
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["cache"] = self.new_cache(batch_size * copies, max(1, max_cache_length))


def from_winner(path: str | PathLike[str], *, measured: Mapping[str, float] | None = None) -> StarForCausalLM:
    """Read a search's winner, `best/<hash>.safetensors` of its run folder, as a transformers model.

    Args:
        path: File that `LanguageModel.save` wrote.
        measured: Numbers for the model card, as `StarConfig` takes them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not one that `LanguageModel.save` wrote.
    """
    return StarForCausalLM.from_star(LanguageModel.load(path), measured=measured)


def _shared_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a parameter to its first one."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (source := first.setdefault(id(parameter), name)) != name:
            tied[name] = source
    return tied


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, StarCache):
        raise TypeError(f"cache: needs a StarCache, as model.new_cache makes, got {type(cache).__name__}")


def _new_columns(mask: Tensor, tokens: int, cache: StarCache | None) -> Tensor | None:
    """Cut the columns of the new tokens out of a mask that may cover the cached ones too."""
    if tokens == 1 and cache is not None and cache.columns:
        return None
    return mask[:, -tokens:] if mask.ndim == 2 and mask.shape[1] > tokens else mask


def _wants_dict(config: StarConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict) if return_dict is None else return_dict
