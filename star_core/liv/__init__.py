"""One torch module for each family of linear input-varying layers."""

from star_core.liv._base import LIV, Features
from star_core.liv.attention import Attention
from star_core.liv.build import Featurizer, build_featurizer, build_liv
from star_core.liv.convolution import GatedLongConv, GatedShortConv
from star_core.liv.differential import Differential
from star_core.liv.memoryless import GatedMemoryless
from star_core.liv.recurrence import Recurrence

__all__ = [
    "LIV",
    "Attention",
    "Differential",
    "Features",
    "Featurizer",
    "GatedLongConv",
    "GatedMemoryless",
    "GatedShortConv",
    "Recurrence",
    "build_featurizer",
    "build_liv",
]
