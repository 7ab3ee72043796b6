"""The aliases beside the peers themselves, where those are installed: signatures, and values of their references.

They install from source without CUDA (`CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE pip install
--no-build-isolation --no-deps causal-conv1d`, and likewise with `MAMBA_` and `FLASH_ATTENTION_`); an empty module then
stands in for the missing extension, so that their Python code imports.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import compat
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal, uniform
from tests.kernels.test_compat import SIGNATURES, signature

EXTENSIONS = ("causal_conv1d_cuda", "selective_scan_cuda", "flash_attn_2_cuda")
HOMES = {
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "chunk_gla": "fla.ops.gla",
    "fused_recurrent_gla": "fla.ops.gla",
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
    "flash_attn_func": "flash_attn",
    "flash_attn_varlen_func": "flash_attn",
}
# The peers' references compute in float32.
TOLERANCE = 2e-5


def peer(module: str) -> Any:
    """Import a peer's module, or skip."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    for extension in EXTENSIONS:
        if importlib.util.find_spec(extension) is None:
            sys.modules[extension] = types.ModuleType(extension)
            sys.modules[extension].__spec__ = importlib.util.spec_from_loader(extension, None)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} does not import here: {error}")


def floats(name: str, *shape: int) -> Tensor:
    return normal(name, *shape).float()


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert signature(getattr(peer(HOMES[name]), name)) == signature(getattr(compat, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_conv1d(dtype: torch.dtype) -> None:
    reference = peer("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    x, weight, bias = floats("x", 2, 6, 9).to(dtype), floats("weight", 6, 4), floats("bias", 6)
    state = floats("state", 2, 6, 3).to(dtype)
    tolerance = TOLERANCE if dtype == torch.float32 else 0.01
    seq_idx = torch.tensor([[0, 0, 0, 1, 2, 2, 2, -1, -1], [3, 3, 3, 3, 3, 3, 4, 4, 4]], dtype=torch.int32)
    for options in (
        {"bias": bias, "activation": "silu"},
        {"bias": bias, "initial_states": state, "return_final_states": True},
        {"seq_idx": seq_idx, "initial_states": state, "activation": "swish"},
        {"seq_idx": seq_idx, "bias": bias},
    ):
        got, want = compat.causal_conv1d_fn(x, weight, **options), reference(x, weight, **options)
        for one, expected in zip(*(out if isinstance(out, tuple) else (out,) for out in (got, want)), strict=True):
            assert one.dtype == expected.dtype
            assert_close(one, expected, str(options.keys()), tolerance)


@pytest.mark.parametrize("tokens", [None, 1, 2, 6])
@pytest.mark.parametrize("seen", [None, (0, 0), (4, 9)])
def test_causal_conv1d_update(tokens: int | None, seen: tuple[int, int] | None) -> None:
    reference = peer("causal_conv1d.causal_conv1d_interface").causal_conv1d_update_ref
    x = floats("x", 2, 6) if tokens is None else floats("x", 2, 6, tokens)
    weight, bias, room = floats("weight", 6, 4), floats("bias", 6), 6
    ours, theirs = (floats("state", 2, 6, room) for _ in range(2))
    cache_seqlens = None if seen is None else torch.tensor(seen, dtype=torch.int32)
    got = compat.causal_conv1d_update(x, ours, weight, bias, "silu", cache_seqlens)
    assert_close(got, reference(x, theirs, weight, bias, "silu", cache_seqlens), "y", TOLERANCE)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("b_shape", [(6, 3), (2, 3, 7), (2, 2, 3, 7)], ids=str)
@pytest.mark.parametrize("c_shape", [(6, 3), (2, 3, 7), (2, 3, 3, 7)], ids=str)
def test_selective_scan(b_shape: tuple[int, ...], c_shape: tuple[int, ...]) -> None:
    reference = peer("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    u, delta, z = (floats(name, 2, 6, 7) for name in ("u", "delta", "z"))
    A, D, bias = -uniform("A", 6, 3).float(), floats("D", 6), floats("bias", 6)
    arguments = (u, delta, A, floats("B", *b_shape), floats("C", *c_shape), D, z, bias, True, True)
    for got, want in zip(compat.selective_scan_fn(*arguments), reference(*arguments), strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, "output", TOLERANCE)


@pytest.mark.parametrize("heads", [(), (4,)], ids=str)
def test_selective_state_update(heads: tuple[int, ...]) -> None:
    reference = peer("mamba_ssm.ops.triton.selective_state_update").selective_state_update_ref
    x, dt, z = (floats(name, 2, *heads, 3) for name in ("x", "dt", "z"))
    A, D, bias = -uniform("A", *heads, 3, 5).float(), floats("D", *heads, 3), floats("bias", *heads, 3)
    B, C = (floats(name, 2, *((2,) if heads else ()), 5) for name in "BC")
    ours, theirs = (floats("state", 2, *heads, 3, 5) for _ in range(2))
    got = compat.selective_state_update(ours, x, dt, A, B, C, D, z, bias, True)
    assert_close(got, reference(theirs, x, dt, A, B, C, D, z, bias, True), "y", TOLERANCE)
    assert_close(ours, theirs, "state", TOLERANCE)


@pytest.mark.parametrize("skip", [(4,), (4, 3)], ids=str)
def test_mamba_chunk_scan_combined(skip: tuple[int, ...]) -> None:
    reference = peer("mamba_ssm.ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    x, z, dt = floats("x", 2, 16, 4, 3), floats("z", 2, 16, 4, 3), floats("dt", 2, 16, 4)
    A, B, C = -uniform("A", 4).float(), floats("B", 2, 16, 2, 5), floats("C", 2, 16, 2, 5)
    options = {"D": floats("D", *skip), "z": z, "dt_bias": floats("bias", 4), "dt_softplus": True}
    got = compat.mamba_chunk_scan_combined(x, dt, A, B, C, 8, **options)
    assert_close(got, reference(x, dt, A, B, C, 8, **options), "y", TOLERANCE)


@pytest.mark.parametrize("name", ["chunk_gla", "fused_recurrent_gla"])
def test_gated_linear_attention(name: str) -> None:
    reference = peer("fla.ops.gla.naive").naive_recurrent_gla
    q, k, v, g = *(floats(one, 2, 9, 3, 4) for one in "qk"), floats("v", 2, 9, 3, 5), -uniform("g", 2, 9, 3, 4).float()
    options = {"initial_state": floats("state", 2, 3, 4, 5), "output_final_state": True}
    want = reference(q, k, v, g, **options)
    for got, expected in zip(getattr(compat, name)(q, k, v, g, **options), want, strict=True):
        assert_close(got, expected, "output", TOLERANCE)


def test_gated_delta_rule() -> None:
    reference = peer("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    q, k = (torch.nn.functional.normalize(floats(one, 2, 9, 3, 4), dim=-1) for one in "qk")
    v, g, beta = floats("v", 2, 9, 3, 5), -uniform("g", 2, 9, 3).float(), uniform("beta", 2, 9, 3).float()
    options = {"initial_state": floats("state", 2, 3, 4, 5), "output_final_state": True}
    want = reference(q, k, v, beta=beta, g=g, **options)
    for got, expected in zip(compat.chunk_gated_delta_rule(q, k, v, g, beta, **options), want, strict=True):
        assert_close(got, expected, "output", TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "window_size": (2, 0)}, {"causal": True, "softcap": 3.0}],
    ids=str,
)
def test_flash_attention(options: dict[str, Any]) -> None:
    reference = peer("flash_attn.utils.testing").attention_ref
    q, k, v = floats("q", 2, 5, 4, 6), floats("k", 2, 8, 2, 6), floats("v", 2, 8, 2, 6)
    want = reference(q, k, v, **options)
    assert_close(
        compat.flash_attn_func(q, k, v, **options), want[0] if isinstance(want, tuple) else want, "o", TOLERANCE
    )
