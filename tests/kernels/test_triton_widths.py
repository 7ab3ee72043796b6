"""Recurrences and attention wider than a program's block, with each kind of GPU's settings, in Triton's interpreter.

The other tests' heads fit into one block, and the interpreter takes the settings of one GPU: here keys, values,
channels and states need two blocks and more each, the last of them partly filled.
"""

from __future__ import annotations

import pytest
import torch

from star_kernels import _triton
from star_kernels._triton import Gpu
from star_kernels.attention import triton_problem
from tests.kernels.checks import Case, assert_close, call, gradients, upstream
from tests.kernels.samples import normal, uniform

if not _triton.interpreting():
    pytest.skip("kernels run on the CPU with TRITON_INTERPRET=1 alone", allow_module_level=True)

GPUS = {
    "mma.sync": Gpu("cuda", 80, 163 * 1024),
    "wgmma": Gpu("cuda", 90, 227 * 1024),
    "tcgen05": Gpu("cuda", 100, 227 * 1024),
    "mfma": Gpu("hip", "gfx942", 64 * 1024),
}
NAN = float("nan")
LENGTH, HEADS, KEYS, VALUES = 70, 1, 72, 80  # two sequences, of which one is longer than a chunk of 64 tokens


def _memory(operator: str) -> Case:
    q, k = (normal(name, 1, LENGTH, HEADS, KEYS) for name in "qk")
    tensors = {
        "q": q,
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": normal("v", 1, LENGTH, HEADS, VALUES),
        "initial_state": normal("state", 2, HEADS, KEYS, VALUES),
    }
    decay = (1, LENGTH, HEADS, KEYS) if operator == "gated_linear_attention" else (1, LENGTH, HEADS)
    tensors["log_decay"] = -uniform("log_decay", *decay, high=0.5)
    if operator == "gated_delta_rule":
        tensors["beta"] = uniform("beta", 1, LENGTH, HEADS)
    return Case(tensors, {})


def _ssd() -> Case:
    heads, groups = 2 * HEADS, HEADS
    return Case(
        {
            "x": normal("x", 1, LENGTH, heads, VALUES),
            "dt": uniform("dt", 1, LENGTH, heads, low=0.05, high=0.5),
            "A": -uniform("A", heads, low=0.2, high=2.0),
            "B": normal("B", 1, LENGTH, groups, KEYS),
            "C": normal("C", 1, LENGTH, groups, KEYS),
            "D": normal("D", heads),
            "z": normal("z", 1, LENGTH, heads, VALUES),
            "initial_state": normal("state", 2, heads, VALUES, KEYS),
        },
        {},
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("matrix", GPUS)
@pytest.mark.parametrize("operator", ["ssd", "gated_linear_attention", "gated_delta_rule"])
def test_several_blocks(operator: str, matrix: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_recorded_for", GPUS[matrix])
    case = _ssd() if operator == "ssd" else _memory(operator)
    options = {**case.options, "cu_seqlens": torch.tensor([0, 3, LENGTH])}
    leaves = case.leaves(dtype)
    exact_leaves = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    outputs = call(operator, "triton", leaves, options)
    exact = call(operator, "reference", exact_leaves, options)
    # Rounded to 8 bits: outputs and gradients once, and factors of chunks' products on the way.
    tolerance = 1e-10 if dtype is torch.float64 else 3e-2
    dy = upstream(outputs)
    found = gradients(outputs, leaves, dy)
    wanted = gradients(exact, exact_leaves, tuple(one.double() for one in dy))
    for index, (one, want) in enumerate(zip(outputs, exact, strict=True)):
        assert_close(one, want, f"output {index}", tolerance)
    for name, want in wanted.items():
        assert_close(found[name], want, f"gradient of {name}", tolerance)


def _attention(operator: str) -> dict[str, torch.Tensor]:
    names = ("q", "k") if operator == "attention" else ("q1", "k1", "q2", "k2")
    tensors = {name: normal(name, 1, LENGTH, 2 if name[0] == "q" else 1, KEYS) for name in names}
    if operator == "differential_attention":
        tensors["lam"] = normal("lam", 2)
    return {**tensors, "v": normal("v", 1, LENGTH, 1, VALUES)}


@pytest.mark.parametrize("matrix", GPUS)
@pytest.mark.parametrize("operator", ["attention", "differential_attention"])
def test_attention_of_wide_heads(operator: str, matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 72 and 80 channels, which float32's parts take in three slices of 32."""
    monkeypatch.setattr(_triton, "_recorded_for", GPUS[matrix])
    tensors = _attention(operator)
    leaves = {name: one.float().requires_grad_() for name, one in tensors.items()}
    exact_leaves = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    outputs = call(operator, "triton", leaves, {"window": 50})
    exact = call(operator, "reference", exact_leaves, {"window": 50})
    dy = upstream(outputs)
    found = gradients(outputs, leaves, dy)
    wanted = gradients(exact, exact_leaves, tuple(one.double() for one in dy))
    assert_close(outputs[0], exact[0], "output", 3e-6)
    for name, want in wanted.items():
        assert_close(found[name], want, f"gradient of {name}", 3e-6)


@pytest.mark.parametrize("where", ["q", "k", "v", "dy"])
@pytest.mark.parametrize("operator", ["attention", "differential_attention"])
def test_slices_let_nan_no_further(operator: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _attention(operator)
    dy = normal("dy", 1, LENGTH, 2, VALUES).float()
    given = {**tensors, "dy": dy}
    given.get(where, given.get(f"{where}1", dy))[:, 40, :, 3] = NAN
    found = []
    for width in (triton_problem._SLICE, 1024):
        monkeypatch.setattr(triton_problem, "_SLICE", width)
        leaves = {name: one.float().requires_grad_() for name, one in tensors.items()}
        found.append(gradients(call(operator, "triton", leaves, {"window": 20}), leaves, (dy,)))
    sliced, whole = found
    assert any(one.isnan().any() for one in whole.values())
    for name, want in whole.items():
        assert torch.equal(sliced[name].isnan(), want.isnan()), name
        assert_close(sliced[name].nan_to_num(), want.nan_to_num(), name, 3e-6)
    assert sliced["v"][0, :20].isfinite().all()


def test_a_step_of_a_long_convolution_over_many_parts() -> None:
    """A history of 400 tokens is four parts of 128, of which two are added at once."""
    case = {
        "state": normal("state", 2, 400, 40),
        "x": normal("x", 2, 40),
        "filter": normal("filter", 40, 450),
        "gate_out": normal("gate_out", 2, 40),
        "skip": normal("skip", 40),
    }
    found, wanted = (call("long_conv_step", backend, case, {}) for backend in ("triton", "reference"))
    for index, (one, want) in enumerate(zip(found, wanted, strict=True)):
        assert_close(one, want, f"output {index}", 1e-12)
