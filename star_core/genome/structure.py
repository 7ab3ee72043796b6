"""What the integers of operator and featurizer genomes stand for."""

from __future__ import annotations

from enum import IntEnum


class TokenMixing(IntEnum):
    """How T_ij depends on the tokens i and j, for fixed channels.

    In an operator genome it is the structure of the layer's T; in a featurizer genome, of the map from the residual
    stream to the feature group, where DIAGONAL means that each token's features come from that token alone.
    """

    DIAGONAL = 1
    """T_ij = 0 unless i = j."""
    LOW_RANK = 2
    """T_ij = C_i B_j; with a softmax, sigma(C_i B_j), which is dense."""
    SCALED_TOEPLITZ = 3
    """T_ij = C_i K_{i-j} B_j."""
    SEMI_SEPARABLE = 4
    """T_ij = C_i A_{i-1} ... A_{j+1} B_j: sequentially semi-separable."""


class Sparsity(IntEnum):
    """Which of the entries that the token mixing allows are kept."""

    NONE = 1
    """All causal ones."""
    BANDED = 2
    """Those near the diagonal: a sliding window, or a filter of a few taps."""


class Nonlinearity(IntEnum):
    """What is applied to T (operator) or to the feature group (featurizer)."""

    NONE = 1
    SOFTMAX = 2
    RELU = 3
    SWISH = 4
    """x sigmoid(x), also called SiLU."""


class ChannelMixing(IntEnum):
    """How T^ab depends on the channels a and b, for fixed tokens."""

    DIAGONAL = 1
    """Each channel alone."""
    DENSE = 2
    """Every channel with every other."""
    GROUPED = 3
    """Dense within groups of channels: heads."""


class Residual(IntEnum):
    """Where a LIV f and its norms stand beside the residual stream x. Ours: the paper's LIVs are all pre-normed."""

    PRE_NORM = 1
    """x + f(norm(x)): Xiong et al., 2020, arXiv 2002.04745."""
    POST_NORM = 2
    """norm(x + f(x)): Vaswani et al., 2017, arXiv 1706.03762."""
    SANDWICH = 3
    """x + norm(f(norm(x))): Ding et al., CogView, 2021, arXiv 2105.13290, section 2.4."""
    PARALLEL = 4
    """The next LIV g reads the same x, through its own norm: x + f(norm(x)) + g(norm(x)). Black et al., GPT-NeoX-20B,
    2022, arXiv 2204.06745, section 2.1."""
