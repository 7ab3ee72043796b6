"""GLA's and Gated DeltaNet's layers: by formula everywhere, and by fla's own modules where they are installed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.layers import GatedDeltaNet, GatedLinearAttention
from tests.kernels import oracles
from tests.kernels.checks import assert_close
from tests.kernels.samples import normal
from tests.kernels.test_compat_peers import peer
from tests.star_core.layers import checks

WIDTH = 12
GLA: dict[str, dict[str, Any]] = {
    "default": {"num_heads": 3},
    "shared-keys": {"num_heads": 6, "num_kv_heads": 2, "expand_k": 1.0, "use_short_conv": True},
    "one-key-head": {"num_heads": 3, "num_kv_heads": 1, "feature_map": "relu", "mode": "fused_chunk"},
    "convolved": {"num_heads": 2, "use_short_conv": True, "conv_size": 3, "conv_bias": True, "clamp_min": -0.05},
    "gate-apart": {"num_heads": 3, "gate_fn": "relu", "gate_logit_normalizer": 4, "gate_low_rank_dim": 5},
    "not-fused": {"num_heads": 3, "fuse_norm": False, "norm_eps": 1e-3},
    "no-weight": {"num_heads": 3, "elementwise_affine": False},
    "no-gate": {"num_heads": 3, "use_output_gate": False, "expand_v": 2.0},
}
NARROW = {"head_dim": 4, "num_heads": 2}
GDN: dict[str, dict[str, Any]] = {
    "default": NARROW,
    "more-values": NARROW | {"num_v_heads": 6, "expand_v": 1.5, "conv_size": 3, "conv_bias": True},
    "no-conv": NARROW | {"use_short_conv": False, "mode": "fused_recurrent"},
    "no-gate": NARROW | {"use_gate": False, "norm_eps": 1e-3},
    "sigmoid": NARROW | {"output_gate_activation": "sigmoid", "allow_neg_eigval": True},
}
LAYERS = [
    *(pytest.param(GatedLinearAttention, one, id=f"gla-{name}") for name, one in GLA.items()),
    *(pytest.param(GatedDeltaNet, one, id=f"gdn-{name}") for name, one in GDN.items()),
]


class Output(nn.Module):
    """The layer without what it returns beside its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y, maps, _ = self.layer(x, **options)
        assert maps is None
        return y


def make(kind: Any, options: dict[str, Any]) -> Any:
    return checks.randomised(kind(hidden_size=WIDTH, layer_idx=1, **options))


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return normal("x", batch, length, WIDTH)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def short(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}_proj.weight"].T
    if f"{name}_conv1d.weight" in p:
        taps = p[f"{name}_conv1d.weight"][:, 0]
        y, _ = oracles.causal_conv1d(y, taps, p.get(f"{name}_conv1d.bias"), activation="silu")
    return y


def gla_formula(layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
    p = dict(layer.named_parameters())
    heads = options["num_heads"]
    shared = heads // (options.get("num_kv_heads") or heads)
    q, k, v = (short(p, name, x) for name in ("q", "k", "v"))
    decay = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
    decay = F.logsigmoid(decay) / options.get("gate_logit_normalizer", 16)
    if "clamp_min" in options:
        decay = decay.clamp(min=options["clamp_min"])
    q = q.unflatten(-1, (heads, -1))
    k, v, decay = (one.unflatten(-1, (heads // shared, -1)) for one in (k, v, decay))
    order = [h // shared for h in range(heads)]
    k, v, decay = (one[:, :, order] for one in (k, v, decay))
    if "feature_map" in options:
        q, k = q.relu(), k.relu()
    o, _ = oracles.gated_linear_attention(q, k, v, decay)
    o = normed(o, p.get("g_norm_swish_gate.weight", p.get("g_norm.weight")), options.get("norm_eps", 1e-5)).flatten(-2)
    if options.get("use_output_gate", True):
        gate = x @ p["g_proj.weight"].T
        o = o * (gate.relu() if options.get("gate_fn") == "relu" else F.silu(gate))
    return o @ p["o_proj.weight"].T


def gdn_formula(layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
    p = dict(layer.named_parameters())
    heads = options["num_heads"]
    values = options.get("num_v_heads", heads)
    q, k, v = (short(p, name, x) for name in ("q", "k", "v"))
    if not options.get("use_short_conv", True):
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    q, k = (one.unflatten(-1, (heads, -1))[:, :, [h // (values // heads) for h in range(values)]] for one in (q, k))
    q, k = (one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in (q, k))
    beta = torch.sigmoid(x @ p["b_proj.weight"].T) * (2 if options.get("allow_neg_eigval") else 1)
    decay = -p["A_log"].exp() * F.softplus(x @ p["a_proj.weight"].T + p["dt_bias"])
    o, _ = oracles.gated_delta_rule(q, k, v.unflatten(-1, (values, -1)), decay, beta)
    o = normed(o, p["o_norm.weight"], options.get("norm_eps", 1e-5)).flatten(-2)
    if options.get("use_gate", True):
        gate = x @ p["g_proj.weight"].T
        o = o * (gate.sigmoid() if "output_gate_activation" in options else F.silu(gate))
    return o @ p["o_proj.weight"].T


def formula(kind: Any) -> Any:
    return gla_formula if kind is GatedLinearAttention else gdn_formula


@pytest.mark.parametrize("kind, options", LAYERS)
def test_formula(kind: Any, options: dict[str, Any]) -> None:
    layer, x = make(kind, options), tokens()
    assert_close(Output(layer)(x), formula(kind)(layer, x, options), "output")


@pytest.mark.parametrize("kind, options", LAYERS)
def test_every_cut_gives_the_same(kind: Any, options: dict[str, Any]) -> None:
    call, x = Output(make(kind, options)), tokens()
    checks.assert_decodes(call, x)
    checks.assert_state_is_replaced(call, x)
    checks.assert_packs(call, x)


@pytest.mark.parametrize("kind, options", LAYERS)
def test_gradients(kind: Any, options: dict[str, Any]) -> None:
    layer = make(kind, options)
    checks.assert_gradients(layer, Output(layer), tokens())


@pytest.mark.parametrize("kind, options", [(GatedLinearAttention, GLA["convolved"]), (GatedDeltaNet, NARROW)])
def test_gradcheck_and_round_trip(kind: Any, options: dict[str, Any]) -> None:
    layer = make(kind, options)
    checks.assert_gradcheck(Output(layer), tokens(1, 3))
    other = kind(hidden_size=WIDTH, **options).double()
    checks.assert_round_trip(layer, other, lambda one: Output(one)(tokens()))


@pytest.mark.parametrize("kind, options", LAYERS)
def test_padding_is_left_out(kind: Any, options: dict[str, Any]) -> None:
    call, x = Output(make(kind, options)), tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 9])
    state: dict[str, Tensor] = {}
    got = call(x, attention_mask=mask, state=state)
    alone: dict[str, Tensor] = {}
    assert_close(got[:1, 2:8], call(x[:1, 2:8], state=alone), "padded row")
    assert_close(got[1:], call(x[1:]), "full row")
    assert bool((got[:1, [0, 1, 8]] == 0).all())
    for name, one in alone.items():
        assert_close(state[name][:1], one, name)
    step = call(x[:, :1], attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1), state=state)
    assert_close(step[:1], call(x[:1, :1], state=alone), "the step after padding")


class Plain:
    """The least that is a cache in fla's sense."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = [{"recurrent_state": None, "conv_state": None}]
        self.seen = 0

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.layers[index]

    def update(self, *, layer_idx: int, offset: int, **states: Any) -> None:
        self.layers[layer_idx : layer_idx + 1] = [states]
        self.seen += offset


@pytest.mark.parametrize("whose", ["plain", "fla"])
@pytest.mark.parametrize("kind, options", [(GatedLinearAttention, GLA["default"]), (GatedDeltaNet, NARROW)])
@torch.no_grad()
def test_flas_cache(kind: Any, options: dict[str, Any], whose: str) -> None:
    layer, x = make(kind, options), tokens()
    cache: Any = Plain() if whose == "plain" else peer("fla.models.cache_utils").Cache()
    if whose == "fla":
        cache.update(recurrent_state=torch.zeros(1), layer_idx=0, offset=5)
    pieces = []
    for piece in x.split([5, 1, 1, 2], dim=1):
        y, _, same = layer(piece, past_key_values=cache, use_cache=True)
        assert same is cache
        pieces.append(y)
    want = layer(x)[0]
    assert_close(torch.cat(pieces, 1), want, "prefill and steps")
    held = cache[1]["recurrent_state"].clone()
    layer(x[:, :1], past_key_values=cache)
    assert torch.equal(cache[1]["recurrent_state"], held)


def test_half_precision_and_states() -> None:
    for kind, options in ((GatedLinearAttention, GLA["convolved"]), (GatedDeltaNet, NARROW)):
        layer = kind(hidden_size=WIDTH, **options).bfloat16()
        state: dict[str, Tensor] = {}
        y, _, _ = layer(tokens().bfloat16(), state=state)
        assert y.dtype == torch.bfloat16
        assert {one.dtype for one in state.values()} == {torch.float32}


def test_activations() -> None:
    x = tokens()
    for name, function in (
        ("sigmoid", torch.sigmoid),
        ("logsigmoid", F.logsigmoid),
        ("silu", F.silu),
        ("sqrelu", lambda one: one.relu() ** 2),
        ("gelu", lambda one: F.gelu(one, approximate="tanh")),
    ):
        layer = make(GatedLinearAttention, {"num_heads": 3, "gate_fn": name})
        plain = make(GatedLinearAttention, {"num_heads": 3, "use_output_gate": False})
        plain.load_state_dict(layer.state_dict(), strict=False)
        plain.o_proj, projection = nn.Identity(), layer.o_proj
        want = projection(plain(x)[0] * function(layer.g_proj(x)))
        assert_close(layer(x)[0], want, name)


def test_bad_arguments() -> None:
    layer, x = make(GatedLinearAttention, GLA["default"]), tokens()
    sized = {"hidden_size": WIDTH}
    checks.assert_refuses(
        [
            (lambda: layer(x[0]), r"hidden_states has shape \(9, 12\), needs \(B, T, 12\)"),
            (lambda: layer(x, output_attentions=True), "output_attentions is True, needs False"),
            (lambda: layer(x, past_key_values=Plain(), state={}), "state and past_key_values are both given"),
            (lambda: layer(x, x[..., 0, None] > 0), r"attention_mask has shape \(2, 9, 1\), needs \(B, T\) = \(2, 9\)"),
            (lambda: layer(x, x[:, :4, 0] > 0), r"attention_mask has shape \(2, 4\), needs \(B, T\)"),
            (lambda: layer(x, x[:1, :, 0] > 0), r"attention_mask: needs \[B, T\] = \[2, 9\]"),
            (
                lambda: GatedDeltaNet(**sized, **NARROW)(x.float(), past_key_values=Plain()),
                "layer_idx is None, needs the layer's number",
            ),
            (lambda: GatedLinearAttention("scan", **sized), "mode is 'scan', needs one of 'chunk', 'fused_recurrent'"),
            (lambda: GatedLinearAttention(gate_fn="bias_gelu"), "gate_fn is 'bias_gelu', needs one of 'relu'"),
            (lambda: GatedLinearAttention(feature_map="elu"), "feature_map is 'elu', needs one of"),
            (
                lambda: GatedLinearAttention(num_heads=4, num_kv_heads=3),
                "num_kv_heads is 3, needs a divisor of num_heads",
            ),
            (lambda: GatedLinearAttention(**sized, expand_k=0.3), r"hidden_size \* expand_k is 3\.5.*, needs a whole"),
            (lambda: GatedLinearAttention(**sized), r"num_heads is 4, needs a divisor of hidden_size \* expand_k == 6"),
            (lambda: GatedDeltaNet(mode="fused_chunk"), "mode is 'fused_chunk', needs one of 'chunk'"),
            (lambda: GatedDeltaNet(output_gate_activation="relu"), "output_gate_activation is 'relu', needs one of"),
            (lambda: GatedDeltaNet(num_v_heads=9), "num_heads is 6, needs a divisor of num_v_heads == 9"),
            (lambda: GatedDeltaNet(head_dim=5, expand_v=1.5), r"head_dim \* expand_v is 7\.5, needs a whole number"),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [(GatedLinearAttention, GLA["default"]), (GatedDeltaNet, NARROW)])
def test_compiles_to_one_graph(kind: Any, options: dict[str, Any]) -> None:
    checks.assert_compiles(kind(hidden_size=WIDTH, **options), tokens().float())


def flas(kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return fla's layer with its own naive recurrences, and torch's formulas in the place of other Triton kernels."""
    name = "gla" if kind is GatedLinearAttention else "gated_deltanet"
    module = peer(f"fla.layers.{name}")

    def convolve(self: Any, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        turned = F.conv1d(x.transpose(1, 2), self.weight, self.bias, padding=self.padding, groups=self.groups)
        return F.silu(turned[..., : x.shape[1]]).transpose(1, 2), None

    def gate(self: Any, x: Tensor, g: Tensor) -> Tensor:
        y = normed(x, self.weight, self.eps)
        return y * (g.sigmoid() if self.activation == "sigmoid" else F.silu(g))

    monkeypatch.setattr(module.ShortConvolution, "forward", convolve)
    monkeypatch.setattr(module.FusedRMSNormGated, "forward", gate)
    monkeypatch.setattr(module.RMSNorm, "forward", lambda self, x: normed(x, self.weight, self.eps))
    if kind is GatedLinearAttention:
        naive = peer("fla.ops.gla.naive").naive_recurrent_gla
        monkeypatch.setattr(module, "fused_recurrent_gla", lambda q, k, v, gk, **_: naive(q, k, v, gk))
    else:
        monkeypatch.setattr(module.GatedDeltaNet, "_use_fused_qkv_conv", lambda self, **_: False)
        delta = peer("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule

        def chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **rest: Any) -> tuple[Tensor, None]:
            assert rest["use_qk_l2norm_in_kernel"]
            assert rest["use_gate_in_kernel"]
            assert rest["use_beta_sigmoid_in_kernel"]
            shared = v.shape[2] // q.shape[2]
            q, k = (one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in (q, k))
            q, k = (one.repeat_interleave(shared, 2) for one in (q, k))
            decay = -rest["A_log"].exp() * F.softplus(g + rest["dt_bias"])
            beta = beta.sigmoid() * (2 if rest["allow_neg_eigval"] else 1)
            return delta(q, k, v, beta, decay)[0], None

        monkeypatch.setattr(module, "chunk_gated_delta_rule", chunk)
    return getattr(module, kind.__name__)(hidden_size=WIDTH, layer_idx=1, **options)


@pytest.mark.parametrize("kind, options", LAYERS)
@pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")
def test_values_of_fla(kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = flas(kind, options | ({"mode": "chunk"} if "mode" in options else {}), monkeypatch)
    with torch.no_grad():
        for name, one in theirs.named_parameters():
            one.add_(0.3 * normal(name, *one.shape))
    ours = kind(hidden_size=WIDTH, layer_idx=1, **options)
    ours.load_state_dict(theirs.state_dict())
    x = tokens().float()
    if options.get("gate_fn", "swish") == "swish" and not options.get("fuse_norm", True):
        # Its silu outside the fused norm is compiled for a GPU.
        monkeypatch.setattr(theirs, "gate_fn", F.silu)
    # fla computes in float32.
    assert_close(Output(ours)(x), theirs(x)[0], "output", 2e-5)


@pytest.mark.parametrize("kind", [GatedLinearAttention, GatedDeltaNet])
def test_flas_constructors(kind: Any) -> None:
    theirs = getattr(peer("fla.layers"), kind.__name__)
    ours, wanted = (inspect.signature(one).parameters for one in (kind, theirs))
    known = {name: one.default for name, one in wanted.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    assert {name: one.default for name, one in ours.items()} == known
    assert list(ours) == list(known)
