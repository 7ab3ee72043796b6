"""Models of genomes as transformers' own: saved, loaded, sampled from and trained through its interfaces.

Importing this module registers `StarConfig`, `StarModel` and `StarForCausalLM` with transformers' Auto classes under
the model type "star". It needs the extra `hub`; `import star_core` alone never imports transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from star_core.hub.cache import StarCache
from star_core.hub.card import model_card
from star_core.hub.config import StarConfig
from star_core.hub.model import StarForCausalLM, StarModel, StarPreTrainedModel, from_winner

__all__ = [
    "StarCache",
    "StarConfig",
    "StarForCausalLM",
    "StarModel",
    "StarPreTrainedModel",
    "from_winner",
    "model_card",
]

AutoConfig.register(StarConfig.model_type, StarConfig)
AutoModel.register(StarConfig, StarModel)
AutoModelForCausalLM.register(StarConfig, StarForCausalLM)
