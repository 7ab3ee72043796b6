"""Layers of other libraries by their own names: the same constructors and parameters, on the kernels of this one."""

from star_core.layers._state import State
from star_core.layers.differential_attention import MultiheadDiffAttn
from star_core.layers.gated_delta_net import GatedDeltaNet
from star_core.layers.gated_linear_attention import GatedLinearAttention
from star_core.layers.hyena import HyenaOperator
from star_core.layers.mamba import Mamba
from star_core.layers.mamba2 import Mamba2
from star_core.layers.short_conv import Lfm2ShortConv

__all__ = [
    "GatedDeltaNet",
    "GatedLinearAttention",
    "HyenaOperator",
    "Lfm2ShortConv",
    "Mamba",
    "Mamba2",
    "MultiheadDiffAttn",
    "State",
]
