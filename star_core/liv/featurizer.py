"""Featurizers: the weights that turn the residual stream into the feature groups of a LIV.

One featurizer serves every LIV of its sharing group, so the groups to compute are an argument of the call: a LIV that
reuses another's keys asks for the queries and values alone, and where no LIV of the group computes a feature group,
the featurizer has no weights for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from star_core.cache import State, StateSpec, read, write
from star_core.liv._base import cu_seqlens_of, init_linear_, is_step, state_dtype
from star_core.ragged import Ragged
from star_kernels import causal_conv1d, causal_conv1d_step, rms_norm


class GroupLinear(nn.Module):
    """Project to several feature groups with one weight whose rows lie in the groups' order.

    A call for all groups is one matrix product; a call for some of them is one for each.
    """

    def __init__(self, in_features: int, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.weight = nn.Parameter(torch.empty(sum(self.sizes.values()), in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights."""
        init_linear_(self.weight)

    def forward(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the named groups of `x` [..., in_features], each [..., size]."""
        if list(names) == list(self.sizes):
            return dict(
                zip(names, torch.split(F.linear(x, self.weight), list(self.sizes.values()), dim=-1), strict=True)
            )
        rows = dict(zip(self.sizes, torch.split(self.weight, list(self.sizes.values())), strict=True))
        return {name: F.linear(x, rows[name]) for name in names}


class ShortConv(nn.Module):
    """Causal depthwise convolution of a feature group along time: a Toeplitz token mixing with explicit taps."""

    def __init__(self, channels: int, taps: int, *, bias: bool = False, activation: str | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw taps of standard deviation 1/sqrt(taps), with zero bias."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def state_spec(self, batch_size: int) -> StateSpec:
        """The last taps - 1 inputs of every channel."""
        channels, taps = self.weight.shape
        return StateSpec((batch_size, channels, taps - 1), state_dtype(self.weight.dtype))

    def forward(self, x: Tensor, state: State | None, name: str, ragged: Ragged | None) -> Tensor:
        """Convolve `x` [B, T, channels], continuing from and updating `state[name]` where there is a state."""
        cu_seqlens = cu_seqlens_of(ragged)
        if state is None:
            return causal_conv1d(x, self.weight, self.bias, activation=self.activation, cu_seqlens=cu_seqlens)[0]
        held = read(state, name)
        if is_step(x, state, ragged):
            y, final = causal_conv1d_step(held, x[:, 0], self.weight, self.bias, activation=self.activation)
            y = y[:, None]
        else:
            y, final = causal_conv1d(
                x, self.weight, self.bias, activation=self.activation, initial_state=held, cu_seqlens=cu_seqlens
            )
        write(state, name, final)
        return y


class HeadNorm(nn.Module):
    """RMSNorm over the channels of each head, one weight for all heads.

    Source: Dehghani et al., ViT-22B, 2023, arXiv 2302.05442 (query-key normalisation), with RMSNorm as in LFM2.
    """

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Norm `x` [..., head_dim]."""
        return rms_norm(x, self.weight, eps=self.eps)


def head_norms(names: Collection[str], head_dim: int, eps: float | None) -> nn.ModuleDict:
    """Return a norm for each of q and k among `names`; none where `eps` is None."""
    return nn.ModuleDict({} if eps is None else {name: HeadNorm(head_dim, eps) for name in ("q", "k") if name in names})


class Convolved(nn.Module):
    """What featurizers with short convolutions share: one for each of some groups, and their states.

    Attributes:
        convs: The convolutions by the name of their group.
    """

    convs: nn.ModuleDict

    def state_spec(self, names: Collection[str], batch_size: int) -> dict[str, StateSpec]:
        """States of the short convolutions of the named groups."""
        return {f"conv_{name}": self._conv(name).state_spec(batch_size) for name in names if name in self.convs}

    def convolved(self, name: str, group: Tensor, state: State | None, ragged: Ragged | None) -> Tensor:
        """Return a group after its short convolution, or as it is where it has none."""
        return self._conv(name)(group, state, f"conv_{name}", ragged) if name in self.convs else group

    def _conv(self, name: str) -> ShortConv:
        conv = self.convs[name]
        assert isinstance(conv, ShortConv)
        return conv


class AttentionFeaturizer(Convolved):
    """Queries, keys and values of softmax attention, optionally through a short convolution each (classes 1 to 4).

    Args:
        width: Width of the residual stream.
        heads: Heads of each group, such as {"q": 8, "k": 2, "v": 2}; groups left out are never computed.
        head_dim: Channels of a head.
        taps: Length of the short convolutions; 0 for none.
        norm_eps: Added to the mean square in the norm of queries and keys; None for no norm.
    """

    def __init__(
        self, width: int, heads: Mapping[str, int], head_dim: int, taps: int, *, norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.heads = dict(heads)
        self.project = GroupLinear(width, {name: count * head_dim for name, count in heads.items()})
        self.convs = nn.ModuleDict(
            {name: ShortConv(count * head_dim, taps) for name, count in heads.items()} if taps else {}
        )
        self.norms = head_norms(heads, head_dim, norm_eps)

    def forward(
        self, x: Tensor, names: Sequence[str], state: State | None, ragged: Ragged | None = None
    ) -> dict[str, Tensor]:
        """Return the named groups of `x` [B, T, width], each [B, T, heads, head_dim]."""
        groups: dict[str, Tensor] = self.project(x, names)
        for name in names:
            groups[name] = self.convolved(name, groups[name], state, ragged)
        split = {name: torch.unflatten(group, -1, (self.heads[name], self.head_dim)) for name, group in groups.items()}
        if torch.is_grad_enabled() and "v" in split and len(split) > 1 and not (self.convs or self.norms):
            # A view of the product would keep q and k until the backward pass, which needs them rotated alone: 21 % of
            # a training step's peak memory at 8 x 512 tokens, for 1 % of its time.
            split["v"] = split["v"].clone()
        return {name: self.norms[name](group) if name in self.norms else group for name, group in split.items()}


def init_step_sizes_(bias: Tensor) -> None:
    """Fill a bias so that its softplus, the step size at a zero input, is log-uniform in [1e-3, 1e-1]."""
    with torch.no_grad():
        # The inverse of softplus is x + log(1 - exp(-x)).
        dt = torch.empty_like(bias).uniform_(-6.907755, -2.302585).exp_()  # log 1e-3 to log 1e-1
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def step_rank(width: int) -> int:
    """Return the rank of a selective recurrence's step sizes, Mamba's choice for a width."""
    return max(1, width // 16)


class RecurrenceFeaturizer(nn.Module):
    """Values, output gate, step sizes, B, C and A of a selective recurrence (classes 5 and 6).

    Source: Gu and Dao, Mamba, 2023, arXiv 2312.00752, section 3.6 and algorithm 2: values go through a short
    convolution and SiLU, and dt, B and C are dense functions of the result. The step sizes start log-uniform in
    [1e-3, 1e-1], A at -1 ... -N.

    Args:
        width: Width of the residual stream.
        inner: Channels of the recurrence.
        state_size: State of a channel, N.
        groups: Those of "B" and "C" that some LIV of the sharing group computes.
        taps: Length of the short convolution.
        activation: What follows it: "silu", or None for nothing.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        state_size: int,
        groups: Sequence[str],
        taps: int,
        *,
        activation: str | None = "silu",
    ) -> None:
        super().__init__()
        self.dt_rank = step_rank(width)
        self.state_size = state_size
        self.project = GroupLinear(width, {"x": inner, "z": inner})
        self.conv = ShortConv(inner, taps, bias=True, activation=activation)
        self.select = GroupLinear(inner, {"dt": self.dt_rank} | dict.fromkeys(groups, state_size))
        self.dt_weight = nn.Parameter(torch.empty(inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, state_size))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]  # decay would pull every time constant to 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the step sizes and set A, as the source does."""
        nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_step_sizes_(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.state_size + 1, dtype=torch.float32).log().expand_as(self.A_log))

    def forward(
        self, x: Tensor, names: Sequence[str], state: State | None, ragged: Ragged | None = None
    ) -> dict[str, Tensor]:
        """Return "x", "z", "dt" [B, T, inner] (dt before bias and softplus), "A" [inner, N] < 0, and the named
        ones of "B", "C" [B, T, 1, N]."""
        groups: dict[str, Tensor] = self.project(x, ("x", "z"))
        groups["x"] = self.conv(groups["x"], state, "conv_x", ragged)
        selected = self.select(groups["x"], ("dt", *names))
        # Contiguous as [rank, inner]: with a rank of 4, a matrix library takes five times as long over the gradients of
        # the other layout (0.29 ms against 0.05 for 1024 tokens of 128 channels).
        groups["dt"] = selected["dt"] @ self.dt_weight.t().contiguous()
        groups["A"] = -self.A_log.to(state_dtype(self.A_log.dtype)).exp()
        for name in names:
            groups[name] = selected[name].unsqueeze(-2)
        return groups


class ConvolutionFeaturizer(nn.Module):
    """Values, both gates and the filter of a gated convolution (classes 7 and 8).

    Args:
        width: Width of the residual stream and of every group.
        groups: Those of "v", "B", "C" (projections) and "K" (filter) that some LIV of the sharing group computes.
        filter: Module that makes the filter; None where no LIV of the sharing group computes it.
    """

    def __init__(self, width: int, groups: Sequence[str], filter: ExplicitFilter | ImplicitFilter | None) -> None:
        super().__init__()
        self.project = GroupLinear(width, dict.fromkeys(groups, width))
        self.filter = filter

    def state_spec(self, names: Collection[str], batch_size: int) -> dict[str, StateSpec]:
        """No state."""
        return {}

    def forward(
        self, x: Tensor, names: Sequence[str], state: State | None = None, ragged: Ragged | None = None
    ) -> dict[str, Tensor]:
        """Return the named groups of `x` [B, T, width], each [B, T, width]."""
        groups: dict[str, Tensor] = self.project(x, names)
        return groups


class ExplicitFilter(nn.Module):
    """A short filter whose taps are parameters, [channels, taps]."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw taps of standard deviation 1/sqrt(taps)."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, length: int) -> Tensor:
        """Return the taps, whatever the `length` of the sequence."""
        return self.weight


class ImplicitFilter(nn.Module):
    """A causal filter as long as the sequence, a small network of the position: K(t) = MLP(features(t)) * exp(-decay
    t).

    Source: Poli et al., Hyena Hierarchy, 2023, arXiv 2302.10866, section 3.3: positional features, sine activations,
    a window of exponential decay. Differs from it in: the time scale is a setting and not the length of the input, so
    that a longer input leaves the first taps as they were and decoding equals the full pass; no shift is added to the
    window.

    Args:
        channels: Filters to make.
        time_scale: Tokens that the positional features call 1.
    """

    bands = 8
    hidden = 32
    frequency = 4.0

    def __init__(self, channels: int, time_scale: int) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.inner = nn.Linear(1 + 2 * self.bands, self.hidden)
        self.middle = nn.Linear(self.hidden, self.hidden)
        self.outer = nn.Linear(self.hidden, channels, bias=False)
        self.log_decay = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the network; set the windows to fall by a factor e over 4 tokens to half the time scale, evenly in
        the logarithm."""
        for layer in (self.inner, self.middle):
            init_linear_(layer.weight)
            nn.init.zeros_(layer.bias)
        # A window of tau tokens passes about tau taps of variance v^2: v = 1/sqrt(tau) keeps the output's size. The
        # median tau is used.
        init_linear_(self.outer.weight, scale=(4.0 * max(self.time_scale, 8) / 2) ** -0.25)
        with torch.no_grad():
            count = self.log_decay.numel()
            slowest, fastest = torch.tensor(2.0 / max(self.time_scale, 8)).log(), torch.tensor(0.25).log()
            self.log_decay.copy_(slowest + (fastest - slowest) * (torch.arange(count) + 0.5) / count)

    def forward(self, length: int) -> Tensor:
        """Return the first `length` taps, [channels, length], in the weights' dtype; positions and window are
        float32."""
        t = torch.arange(length, device=self.log_decay.device, dtype=torch.float32)
        phase = t[:, None] / self.time_scale * torch.arange(1, self.bands + 1, device=t.device) * torch.pi
        features = torch.cat((t[:, None] / self.time_scale, phase.sin(), phase.cos()), dim=1)
        dtype = self.outer.weight.dtype
        hidden = torch.sin(self.frequency * self.inner(features.to(dtype)))
        hidden = torch.sin(self.frequency * self.middle(hidden))
        window = torch.exp(-self.log_decay.float().exp()[:, None] * t)
        taps: Tensor = self.outer(hidden).T.float() * window
        return taps.to(dtype)


class MemorylessFeaturizer(GroupLinear):
    """Gate and value of a gated memoryless unit (class 9)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, {"gate": hidden, "value": hidden})
