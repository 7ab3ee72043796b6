"""transformers' own generic tests of a model and of generation, where its sources are at hand.

They are not part of its wheel. `TRANSFORMERS_SOURCE` names an unpacked source distribution (the model tests alone) or a
clone (those of generation too) of the installed version:

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers CLONE
    TRANSFORMERS_SOURCE=CLONE python -m pytest tests/star_core/hub/test_transformers_suite.py -rs

Without a clone, test_generation.py and test_generation_interface.py hold what its GenerationTesterMixin asks for.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any, ClassVar

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("parameterized")

import torch  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from star_core.hub import StarConfig, StarForCausalLM, StarModel  # noqa: E402

SOURCE = os.environ.get("TRANSFORMERS_SOURCE", "")
PACKAGE = "transformers_tests"
# Every family, shared featurizers, shared tensors and a differential class.
GENOME = "1.1.1.1.4-5.1.2.1.1-5.1.2.1.1-8.1.1.1.1-9.1.1.1.1-1.1.1.1.4-16.1.1.1.1"

if not (Path(SOURCE) / "tests" / "test_modeling_common.py").is_file():
    pytest.skip(
        "TRANSFORMERS_SOURCE names no folder with transformers' tests/test_modeling_common.py", allow_module_level=True
    )


def _suite(module: str, mixin: str) -> type:
    """Return a mixin of their tests; an empty class where the sources do not have it."""
    path = Path(SOURCE) / "tests" / (module.replace(".", "/") + ".py")
    if path.is_file():
        found: type = getattr(importlib.import_module(f"{PACKAGE}.{module}"), mixin)
        return found
    # Modules import one another's mixins by name, so a missing one needs a place.
    parent = f"{PACKAGE}.{module.rpartition('.')[0]}"
    sys.modules.setdefault(parent, types.ModuleType(parent))
    stand_in = types.ModuleType(f"{PACKAGE}.{module}")
    empty = type(mixin, (), {"stands_in": True})
    setattr(stand_in, mixin, empty)
    sys.modules[f"{PACKAGE}.{module}"] = stand_in
    return empty


# Their tests know by these names which classes are language models, and give those labels.
modeling_auto.MODEL_MAPPING_NAMES[StarConfig.model_type] = StarModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[StarConfig.model_type] = StarForCausalLM.__name__
_package = types.ModuleType(PACKAGE)
_package.__path__ = [str(Path(SOURCE) / "tests")]
sys.modules[PACKAGE] = _package
# Export to other runtimes is not offered: data-dependent shapes of padded batches.
_exports = types.ModuleType(f"{PACKAGE}.exporters.test_export")
_exports.ExportTesterMixin = type("ExportTesterMixin", (), {})  # type: ignore[attr-defined]
sys.modules[f"{PACKAGE}.exporters"] = types.ModuleType(f"{PACKAGE}.exporters")
sys.modules[_exports.__name__] = _exports
GenerationTesterMixin = _suite("generation.test_utils", "GenerationTesterMixin")
ModelTesterMixin = _suite("test_modeling_common", "ModelTesterMixin")


class StarModelTester:
    """The sizes and inputs that their tests ask for."""

    is_training = True
    batch_size = 3
    seq_length = 7

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.hidden_size = 32
        self.vocab_size = 99
        self.num_hidden_layers = 7
        self.num_attention_heads = 4

    def get_config(self) -> StarConfig:
        return StarConfig(
            genome=GENOME,
            width=self.hidden_size,
            head_dim=self.hidden_size // self.num_attention_heads,
            vocab_size=self.vocab_size,
            time_scale=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[StarConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


OWN_CHECKPOINTS = (
    "looks for transformers' GradientCheckpointingLayer; star_core does not import transformers and recomputes LIVs "
    "itself: held by tests/star_core/test_ragged.py and hub/test_training.py"
)
# Their tests that cannot hold for any model of ours.
SKIPPED = {
    "test_gradient_checkpointing_enable_disable": OWN_CHECKPOINTS,
    "test_training_gradient_checkpointing": OWN_CHECKPOINTS,
    "test_training_gradient_checkpointing_use_reentrant_false": OWN_CHECKPOINTS,
    "test_training_gradient_checkpointing_use_reentrant_true": OWN_CHECKPOINTS,
    "test_num_layers_is_small": "allows 2 layers, and every family with its ways of sharing takes 7, of width 32",
}


class TestStar(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc,valid-type]
    all_model_classes = (StarModel, StarForCausalLM)
    all_generative_model_classes = (StarForCausalLM,)
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True  # dated by a copyright line, which our files do not have
    test_resize_embeddings = True
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        if self._testMethodName in SKIPPED:
            self.skipTest(SKIPPED[self._testMethodName])
        self.model_tester = StarModelTester(self)
