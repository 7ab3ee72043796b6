"""Models of transformers of any width, with random weights: what `star_core.accelerate` is measured and tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        width: Of the residual stream.
        layers: How many; the last of them is attention in the hybrids, or as the architecture has it.
        vocab_size: Tokens.
        head_dim: Of attention, and of the linear attentions' keys and values.
        scan_head_dim: Of Mamba-2's heads.
        state: Of Mamba-2's; Mamba-1's is an eighth of it.
        groups: Of Mamba-2's B and C.
    """

    width: int
    layers: int
    vocab_size: int
    head_dim: int
    scan_head_dim: int
    state: int
    groups: int

    @property
    def heads(self) -> int:
        """Return the number of attention heads."""
        return self.width // self.head_dim

    @property
    def hybrid(self) -> list[str]:
        """Return the layers of a hybrid with attention at its end, the others named "mamba"."""
        return ["mamba"] * (self.layers - 1) + ["attention"]


LARGE = Size(width=768, layers=4, vocab_size=256, head_dim=64, scan_head_dim=64, state=128, groups=1)
"""What is measured: bytes as tokens, as everywhere in this project, so that the layers make the time."""

TINY = Size(width=32, layers=3, vocab_size=97, head_dim=8, scan_head_dim=16, state=32, groups=2)
"""What is tested."""

Settings = dict[str, Any]


def _attention(size: Size) -> Settings:
    return {
        "intermediate_size": 2 * size.width,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
    }


def _mamba(size: Size) -> Settings:
    return {"state_size": size.state // 8}


def _mamba2(size: Size) -> Settings:
    return {
        "state_size": size.state,
        "head_dim": size.scan_head_dim,
        "num_heads": 2 * size.width // size.scan_head_dim,
        "n_groups": size.groups,
    }


def _mamba2_inside(size: Size) -> Settings:
    """Name Mamba-2's sizes as Bamba, FalconH1 and GraniteMoeHybrid do."""
    return {
        "mamba_n_heads": 2 * size.width // size.scan_head_dim,
        "mamba_d_head": size.scan_head_dim,
        "mamba_n_groups": size.groups,
        "mamba_d_state": size.state,
    }


def _bamba(size: Size) -> Settings:
    return _attention(size) | _mamba2_inside(size) | {"attn_layer_indices": [size.layers - 1]}


def _falcon_h1(size: Size) -> Settings:
    return _attention(size) | _mamba2_inside(size) | {"mamba_d_ssm": 2 * size.width, "mamba_rms_norm": True}


def _granite(size: Size) -> Settings:
    sizes = {"layer_types": size.hybrid, "shared_intermediate_size": 2 * size.width}
    return _attention(size) | _mamba2_inside(size) | sizes | {"num_local_experts": 4, "num_experts_per_tok": 2}


def _nemotron(size: Size) -> Settings:
    return _attention(size) | {
        "layers_block_type": size.hybrid,
        "head_dim": size.head_dim,
        "mamba_num_heads": 2 * size.width // size.scan_head_dim,
        "mamba_head_dim": size.scan_head_dim,
        "n_groups": size.groups,
        "ssm_state_size": size.state,
    }


def _zamba2(size: Size) -> Settings:
    return _attention(size) | {
        "num_key_value_heads": size.heads,
        "layers_block_type": ["mamba", "hybrid", *["mamba"] * (size.layers - 2)],
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "mamba_d_state": size.state,
        "mamba_ngroups": size.groups,
        "n_mamba_heads": 2 * size.width // size.scan_head_dim,
        "mamba_headdim": size.scan_head_dim,
    }


def _jamba(size: Size) -> Settings:
    experts = {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2}
    attention = {"attn_layer_period": size.layers, "attn_layer_offset": size.layers - 1}
    return (
        _attention(size) | attention | experts | {"mamba_d_state": size.state // 8, "mamba_dt_rank": size.width // 16}
    )


def _recurrent_gemma(size: Size) -> Settings:
    return _attention(size) | {"num_key_value_heads": 1, "head_dim": size.head_dim, "lru_width": size.width}


def _lfm2(size: Size) -> Settings:
    layers = ["conv"] * (size.layers - 1) + ["full_attention"]
    return _attention(size) | {"layer_types": layers, "block_auto_adjust_ff_dim": False}


def _qwen3_5(size: Size) -> Settings:
    return _attention(size) | {
        "head_dim": size.head_dim,
        "layer_types": ["linear_attention"] * (size.layers - 1) + ["full_attention"],
        "linear_num_value_heads": size.heads,
        "linear_num_key_heads": size.heads // 2,
        "linear_key_head_dim": size.head_dim,
        "linear_value_head_dim": size.head_dim,
    }


def _qwen3_next(size: Size) -> Settings:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2}
    widths = {"moe_intermediate_size": size.width, "shared_expert_intermediate_size": size.width}
    return _qwen3_5(size) | experts | widths


ARCHITECTURES: dict[str, tuple[str, Callable[[Size], Settings]]] = {
    "mamba": ("mamba", _mamba),
    "falcon_mamba": ("falcon_mamba", _mamba),
    "mamba2": ("mamba2", _mamba2),
    "bamba": ("bamba", _bamba),
    "zamba2": ("zamba2", _zamba2),
    "jamba": ("jamba", _jamba),
    "falcon_h1": ("falcon_h1", _falcon_h1),
    "nemotron_h": ("nemotron_h", _nemotron),
    "granitemoehybrid": ("granitemoehybrid", _granite),
    "recurrent_gemma": ("recurrent_gemma", _recurrent_gemma),
    "lfm2": ("lfm2", _lfm2),
    "qwen3_next": ("qwen3_next", _qwen3_next),
    "qwen3_5": ("qwen3_5_text", _qwen3_5),
    "diffllama": ("diffllama", _attention),
    "llama": ("llama", _attention),
    "qwen3": ("qwen3", lambda size: _attention(size) | {"head_dim": size.head_dim}),
    "gemma2": ("gemma2", lambda size: _attention(size) | {"head_dim": size.head_dim}),
}
"""For each architecture, transformers' name of its configuration and the settings of a size."""


def build(name: str, size: Size, *, seed: int = 0, **settings: Any) -> Any:
    """Make a causal language model with weights drawn so that every part of it matters.

    transformers' own initial weights leave norms at one or zero and make logits of 0.01, with which a wrong formula
    looks right: here products keep their inputs' size and every vector is moved by up to 0.2.

    Args:
        name: A key of `ARCHITECTURES`.
        size: How large.
        seed: Of the weights.
        settings: What the configuration has beside, such as `time_step_limit`.
    """
    import transformers

    kind, sizes = ARCHITECTURES[name]
    tokens = {"vocab_size": size.vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given = tokens | {"hidden_size": size.width, "num_hidden_layers": size.layers} | sizes(size) | settings
    if "layers_block_type" in given and kind == "nemotron_h":
        del given["num_hidden_layers"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **given))
        for path, weight in model.named_parameters():
            if weight.ndim < 2 or path.endswith("A_log"):
                weight.add_(torch.rand_like(weight) * 0.4 - 0.2)
            else:
                weight.normal_(std=0.5 if "embed" in path else weight.shape[-1] ** -0.5)
    return model
