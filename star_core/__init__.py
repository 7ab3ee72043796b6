"""Genomes of sequence models, and the trainable, cached-decoding networks they decode to."""

from star_core.acceleration import AccelerationReport, accelerate, restore
from star_core.backbone import Backbone
from star_core.cache import Cache
from star_core.config import ModelConfig
from star_core.genome import Genome
from star_core.model import LanguageModel, count_parameters

load = LanguageModel.load

__all__ = [
    "AccelerationReport",
    "Backbone",
    "Cache",
    "Genome",
    "LanguageModel",
    "ModelConfig",
    "accelerate",
    "count_parameters",
    "load",
    "restore",
]
