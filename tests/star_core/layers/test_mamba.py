"""Mamba's and Mamba-2's layers: by formula everywhere, and by mamba-ssm's own modules where they are installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers import Mamba, Mamba2
from tests.kernels import oracles
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal
from tests.kernels.test_compat_peers import peer
from tests.star_core.layers import checks

WIDTH = 12
MAMBA: dict[str, dict[str, Any]] = {
    "default": {},
    "small": {"d_state": 3, "d_conv": 2, "expand": 1.5, "dt_rank": 5, "dt_init": "constant", "dt_scale": 0.5},
    "biases": {"bias": True, "conv_bias": False, "use_fast_path": False},
    "one-tap": {"d_conv": 1},
}
SMALL = {"d_state": 6, "headdim": 4}
MAMBA2: dict[str, dict[str, Any]] = {
    "default": SMALL,
    "groups": SMALL | {"ngroups": 3, "d_conv": 3, "conv_init": 0.5},
    "norm-first": SMALL | {"norm_before_gate": True, "ngroups": 2},
    "no-norm": SMALL | {"rmsnorm": False, "bias": True},
    "skip-per-channel": SMALL | {"D_has_hdim": True, "conv_bias": False},
    "skip-per-channel-no-norm": SMALL | {"D_has_hdim": True, "rmsnorm": False},
    "limit": SMALL | {"dt_limit": (0.02, 0.1), "A_init_range": (1, 4), "chunk_size": 64, "use_mem_eff_path": False},
    "gated-unit": SMALL | {"d_ssm": 16},
}
LAYERS = [
    *(pytest.param(Mamba, one, id=f"mamba-{name}") for name, one in MAMBA.items()),
    *(pytest.param(Mamba2, one, id=f"mamba2-{name}") for name, one in MAMBA2.items()),
]


def make(kind: type[nn.Module], options: dict[str, Any]) -> Any:
    return checks.randomised(kind(WIDTH, layer_idx=3, **options))


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return normal("x", batch, length, WIDTH)


def mamba_formula(layer: Any, u: Tensor) -> Tensor:
    p = dict(layer.named_parameters())
    x, z = F.linear(u, p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, -1)
    x, _ = oracles.causal_conv1d(x, p["conv1d.weight"][:, 0], p.get("conv1d.bias"), activation="silu")
    rank, n = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    low, b, c = (x @ p["x_proj.weight"].T).split([rank, n, n], -1)
    dt = F.softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    y, _ = oracles.selective_scan(x, dt, -p["A_log"].exp(), b[:, :, None], c[:, :, None], D=p["D"], z=z)
    return F.linear(y, p["out_proj.weight"], p.get("out_proj.bias"))


def mamba2_formula(layer: Any, u: Tensor, options: dict[str, Any]) -> Tensor:
    p = dict(layer.named_parameters())
    p_dim, n, groups = options["headdim"], options["d_state"], options.get("ngroups", 1)
    heads, shared = p["A_log"].shape[0], groups * n
    inner = heads * p_dim
    rest = 2 * WIDTH - inner
    made = F.linear(u, p["in_proj.weight"], p.get("in_proj.bias"))
    gate, up, z, xbc, dt = made.split([rest, rest, inner, inner + 2 * shared, heads], -1)
    xbc, _ = oracles.causal_conv1d(xbc, p["conv1d.weight"][:, 0], p.get("conv1d.bias"), activation="silu")
    x, b, c = xbc.split([inner, shared, shared], -1)
    x, b, c = x.unflatten(-1, (heads, p_dim)), b.unflatten(-1, (groups, n)), c.unflatten(-1, (groups, n))
    dt = F.softplus(dt + p["dt_bias"]).clamp(*options.get("dt_limit", (0.0, float("inf"))))
    y, _ = oracles.ssd(x, dt, -p["A_log"].exp(), b, c)
    y = (y + (p["D"].view(heads, -1) * x)).flatten(-2)
    if not options.get("rmsnorm", True):
        y = y * F.silu(z)
    else:
        first = options.get("norm_before_gate", False)
        y = y if first else y * F.silu(z)
        parts = y.unflatten(-1, (groups, -1))
        y = (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * p["norm.weight"]
        y = y * F.silu(z) if first else y
    return F.linear(torch.cat([F.silu(gate) * up, y], -1), p["out_proj.weight"], p.get("out_proj.bias"))


@pytest.mark.parametrize("kind, options", LAYERS)
def test_formula(kind: Any, options: dict[str, Any]) -> None:
    layer, x = make(kind, options), tokens()
    want = mamba_formula(layer, x) if kind is Mamba else mamba2_formula(layer, x, options)
    assert_close(layer(x), want, "output")


@pytest.mark.parametrize("kind, options", LAYERS)
def test_every_cut_gives_the_same(kind: Any, options: dict[str, Any]) -> None:
    layer, x = make(kind, options), tokens()
    checks.assert_decodes(layer, x)
    checks.assert_state_is_replaced(layer, x)
    checks.assert_packs(layer, x)


@pytest.mark.parametrize("kind, options", LAYERS)
def test_gradients(kind: Any, options: dict[str, Any]) -> None:
    layer = make(kind, options)
    checks.assert_gradients(layer, layer, tokens())


@pytest.mark.parametrize("kind, options", [(Mamba, {}), (Mamba2, SMALL)])
def test_gradcheck_and_round_trip(kind: Any, options: dict[str, Any]) -> None:
    layer = make(kind, options)
    checks.assert_gradcheck(layer, tokens(1, 3))
    checks.assert_round_trip(layer, kind(WIDTH, **options).double(), lambda one: one(tokens()))


@pytest.mark.parametrize("kind, options", LAYERS)
@torch.no_grad()
def test_mamba_ssms_protocol(kind: Any, options: dict[str, Any]) -> None:
    layer, x = make(kind, options), tokens()
    want = layer(x)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    got = [layer(x[:, :5], inference_params=params)]
    conv_state, ssm_state = params.key_value_memory_dict[3]
    assert conv_state.dtype == ssm_state.dtype == torch.float64
    for t in range(5, 8):
        params.seqlen_offset = t
        got.append(layer(x[:, t : t + 1], inference_params=params))
    row, *same = layer.step(x[:, 8:], conv_state, ssm_state)
    assert same[0] is conv_state
    assert same[1] is ssm_state
    assert_close(torch.cat([*got, row], 1), want, "prefill and steps")
    # At offset 0 a sequence begins, whatever the states hold.
    params.seqlen_offset = 0
    assert_close(layer(x[:, :4], inference_params=params), want[:, :4], "begun again")
    params.seqlen_offset = 4
    assert_close(layer(x[:, 4:], inference_params=params), want[:, 4:], "several tokens after the first ones")


@pytest.mark.parametrize("kind, options", [(Mamba, {}), (Mamba2, SMALL)])
def test_packed_prefill_into_inference_params(kind: Any, options: dict[str, Any]) -> None:
    layer, x = make(kind, options), tokens(1)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    layer(x[:, :8], cu_seqlens=torch.tensor([0, 5, 8]), inference_params=params)
    params.seqlen_offset = 8
    rows = torch.cat([x[:, 8:], x[:, :1]])
    got = layer(rows, inference_params=params)
    assert_close(got[:1], layer(torch.cat([x[:, :5], x[:, 8:]], 1))[:, -1:], "first")
    assert_close(got[1:], layer(torch.cat([x[:, 5:8], x[:, :1]], 1))[:, -1:], "second")
    assert not params.key_value_memory_dict[3][1].requires_grad


def test_rows_laid_end_to_end_and_indexed() -> None:
    layer, x = make(Mamba2, SMALL), tokens()
    assert torch.equal(layer(x.flatten(0, 1), seqlen=9), layer(x).flatten(0, 1))
    index = torch.tensor([[0] * 3 + [1] * 6, [4] * 9])
    state: dict[str, Tensor] = {}
    got = layer(x, seq_idx=index, state=state)
    want = torch.cat([layer(x[:1, :3]), layer(x[:1, 3:])], 1)
    assert_close(got[:1], want, "first row")
    assert_close(got[1:], layer(x[1:]), "second row")
    alone: dict[str, Tensor] = {}
    layer(x[:1, 3:], state=alone)
    for name, one in alone.items():
        assert_close(state[name][:1], one, name)
    again = layer(x, seq_idx=index, state=state)
    assert_close(again[:1, 3:], got[:1, 3:], "a row's state goes to its first sequence alone")
    assert not torch.allclose(again[:1, :3], got[:1, :3])
    ends = torch.tensor([0, 3, 9])
    assert torch.equal(layer(x[:1], seq_idx=index[:1], cu_seqlens=ends), layer(x[:1], cu_seqlens=ends))


def test_half_precision_and_states() -> None:
    for kind, options in ((Mamba, {}), (Mamba2, SMALL)):
        layer = kind(WIDTH, dtype=torch.bfloat16, **options)
        state: dict[str, Tensor] = {}
        y = layer(tokens().bfloat16(), state=state)
        assert y.dtype == torch.bfloat16
        assert {one.dtype for one in state.values()} == {torch.float32}
        assert {one.dtype for one in layer.allocate_inference_cache(2, 16)} == {torch.float32}
        assert {one.dtype for one in layer.allocate_inference_cache(2, 16, torch.float16)} == {torch.float16}
        assert layer.D.dtype == torch.float32


def test_bad_arguments() -> None:
    layer, x = make(Mamba, {}), tokens()
    second = make(Mamba2, SMALL)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    states = layer.allocate_inference_cache(1)
    checks.assert_refuses(
        [
            (lambda: layer(x[0]), r"hidden_states has shape \(9, 12\), needs \(B, T, 12\)"),
            (lambda: second(x[..., :5]), r"u has shape \(2, 9, 5\), needs \(B, T, 12\)"),
            (lambda: second(x, seqlen=9), r"u has shape \(2, 9, 12\), needs \(B T, 12\) beside seqlen"),
            (lambda: second(x[0], seqlen=4), r"seqlen is 4, needs a divisor of the tokens of u == 9"),
            (lambda: layer(x, params, state={}), "state and inference_params are both given"),
            (lambda: Mamba(WIDTH)(x.float(), params), "layer_idx is None, needs the layer's number"),
            (lambda: second(x, seq_idx=x[..., 0].long(), inference_params=params), "needs cu_seqlens"),
            (lambda: layer.step(x, *states), r"hidden_states has shape \(2, 9, 12\), needs \(B, 1, d_model\)"),
            (lambda: layer.step(x[:, :1], *states), r"conv_state has shape \(1, 24, 4\), needs \(2, 24, 4\)"),
            (lambda: Mamba(WIDTH, expand=1.3), r"expand \* d_model is 15\.6.*, needs a whole number"),
            (lambda: Mamba(WIDTH, dt_rank="low"), "dt_rank is 'low', needs a number or 'auto'"),
            (lambda: Mamba(WIDTH, dt_init="ones"), "dt_init is 'ones', needs 'random' or 'constant'"),
            (lambda: Mamba(WIDTH, dt_min=0.2), r"dt_min and dt_max are 0\.2 and 0\.1, need"),
            (lambda: Mamba2(WIDTH), "headdim is 64, needs a divisor of d_ssm == 24"),
            (lambda: Mamba2(WIDTH, headdim=4, ngroups=4), "ngroups is 4, needs a divisor of d_ssm / headdim == 6"),
            (lambda: Mamba2(WIDTH, headdim=4, d_ssm=28), r"d_ssm is 28, needs 1 \.\. expand \* d_model == 24"),
            (lambda: Mamba2(WIDTH, headdim=4, process_group=object()), "process_group is given, needs None"),
            (lambda: Mamba2(WIDTH, headdim=4, A_init_range=(0, 1)), r"A_init_range is \(0, 1\), needs 0 < low"),
            (lambda: Mamba2(WIDTH, headdim=4, dt_limit=(2, 1)), r"dt_limit is \(2, 1\), needs 0 <= low <= high"),
        ]
    )
    with pytest.raises(TypeError, match=r"hidden_states is list, needs a torch\.Tensor"):
        layer([1.0])


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [(Mamba, {}), (Mamba2, SMALL)])
def test_compiles_to_one_graph(kind: Any, options: dict[str, Any]) -> None:
    checks.assert_compiles(kind(WIDTH, **options), tokens().float())


def peers_mamba(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return mamba-ssm's layer on the plain torch functions that it falls back to."""
    module = peer("mamba_ssm.modules.mamba_simple")
    reference = peer("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    monkeypatch.setattr(module, "selective_scan_fn", reference)
    for name in ("causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"):
        monkeypatch.setattr(module, name, None)
    return module.Mamba(WIDTH, layer_idx=3, **options)


def peers_mamba2(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return mamba-ssm's layer on the references that lie beside its Triton kernels."""
    module = peer("mamba_ssm.modules.mamba2")
    combined = peer("mamba_ssm.ops.triton.ssd_combined")
    interface = peer("mamba_ssm.ops.selective_scan_interface")
    norms = peer("mamba_ssm.ops.triton.layernorm_gated")
    convolution = peer("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    monkeypatch.setattr(interface, "selective_scan_fn", interface.selective_scan_ref)

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **rest: Any) -> Tensor:
        assert not rest.pop("return_final_states")
        assert not rest.pop("return_varlen_states")
        assert rest.pop("seq_idx") is rest.pop("cu_seqlens") is None
        return combined.ssd_selective_scan(x, dt, A, B, C, **rest)

    def rms_norm(x: Tensor, weight: Tensor, bias: None, z: Tensor, **rest: Any) -> Tensor:
        return norms.rms_norm_ref(x, weight, bias, z=z, **rest)

    monkeypatch.setattr(module, "mamba_chunk_scan_combined", scan)
    monkeypatch.setattr(module, "causal_conv1d_fn", convolution)
    monkeypatch.setattr(norms, "rmsnorm_fn", rms_norm)
    return module.Mamba2(WIDTH, layer_idx=3, **(options | {"use_mem_eff_path": False}))


@pytest.mark.parametrize("kind, options", LAYERS)
def test_values_of_mamba_ssm(kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    peers = peers_mamba if kind is Mamba else peers_mamba2
    theirs = peers(options | {"use_fast_path": False} if kind is Mamba else options, monkeypatch)
    with torch.no_grad():
        for name, one in theirs.named_parameters():
            one.add_(0.3 * normal(name, *one.shape))
    ours = kind(WIDTH, layer_idx=3, **options)
    ours.load_state_dict(theirs.state_dict())
    assert {name: one.shape for name, one in ours.named_parameters()} == {
        name: one.shape for name, one in theirs.named_parameters()
    }
    x = tokens().float()
    # mamba-ssm computes in float32 here.
    assert_close(ours(x), theirs(x), "output", 2e-5)


@pytest.mark.parametrize("options", [pytest.param(one, id=name) for name, one in MAMBA.items()])
@torch.no_grad()
def test_mamba_ssm_and_we_go_on_from_one_anothers_states(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = peers_mamba(options, monkeypatch)
    ours = Mamba(WIDTH, layer_idx=3, **options)
    ours.load_state_dict(theirs.state_dict())
    x = tokens().float()
    want = ours(x)
    for first, second in ((ours, theirs), (theirs, ours)):
        params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={3: ours.allocate_inference_cache(2)})
        got = [first(x[:, :5], inference_params=params)]
        for t, layer in zip(range(5, 9), (second, first, second, first), strict=True):
            params.seqlen_offset = t
            got.append(layer(x[:, t : t + 1], inference_params=params))
        assert_close(torch.cat(got, 1), want, "handed over", 2e-5)


def test_mamba_ssms_constructors(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    for kind, theirs in (
        (Mamba, peer("mamba_ssm.modules.mamba_simple").Mamba),
        (Mamba2, peer("mamba_ssm.modules.mamba2").Mamba2),
    ):
        ours, wanted = (inspect.signature(one).parameters for one in (kind, theirs))
        assert {name: one.default for name, one in ours.items()} == {name: one.default for name, one in wanted.items()}
        assert list(ours) == list(wanted)
