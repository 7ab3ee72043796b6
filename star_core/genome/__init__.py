"""Genomes: sequence models written as numbers, in three nested strings of integers (featurizer, operator, backbone)."""

from star_core.genome.backbone import Genome
from star_core.genome.baselines import BASELINES, gqa_transformer_pp, lfm2, striped_mamba, transformer_pp
from star_core.genome.describe import describe
from star_core.genome.extension import Extension, SizeGenes
from star_core.genome.featurizers import FEATURIZERS, FeatureGroup, FeaturizerGenome
from star_core.genome.genes import GENES, LIVGenes
from star_core.genome.mutations import LEVELS, MUTATIONS, Bounds, Level
from star_core.genome.operators import OperatorGenome
from star_core.genome.pool import POOL, Family, LIVClass
from star_core.genome.sharing import Sharing
from star_core.genome.structure import ChannelMixing, Nonlinearity, Residual, Sparsity, TokenMixing
from star_core.genome.validity import gene_values, repair, validate
from star_core.genome.variation import crossover, mutate, random_genome, vary
from star_core.genome.violations import Violation

__all__ = [
    "BASELINES",
    "FEATURIZERS",
    "GENES",
    "LEVELS",
    "MUTATIONS",
    "POOL",
    "Bounds",
    "ChannelMixing",
    "Extension",
    "Family",
    "FeatureGroup",
    "FeaturizerGenome",
    "Genome",
    "LIVClass",
    "LIVGenes",
    "Level",
    "Nonlinearity",
    "OperatorGenome",
    "Residual",
    "Sharing",
    "SizeGenes",
    "Sparsity",
    "TokenMixing",
    "Violation",
    "crossover",
    "describe",
    "gene_values",
    "gqa_transformer_pp",
    "lfm2",
    "mutate",
    "random_genome",
    "repair",
    "striped_mamba",
    "transformer_pp",
    "validate",
    "vary",
]
