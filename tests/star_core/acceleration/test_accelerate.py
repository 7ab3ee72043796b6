"""What `accelerate` says, what it leaves alone, and that `restore` gives everything back."""

import copy
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from bench.accelerate_models import ARCHITECTURES, TINY, build
from star_core import AccelerationReport, accelerate, restore
from tests.star_core.acceleration.models import LOGITS, largest_difference, pair, tokens

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`")


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in model.modules()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restore_gives_everything_back(name: str) -> None:
    model = build(name, TINY)
    before, weights = attributes(model), list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == weights
    assert attributes(model) != before
    assert restore(model)
    assert attributes(model) == before
    assert not restore(model)


def test_a_model_without_transformers_is_left_alone() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.variance_epsilon = 1e-6

    model = nn.Sequential(LlamaRMSNorm(), nn.Linear(4, 4))
    report = accelerate(model)
    assert report == AccelerationReport((), ())
    assert "no module of transformers" in str(report)
    assert not restore(model)


def test_a_subclass_from_elsewhere_is_its_authors() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Mine(LlamaMLP):
        pass

    model = build("llama", TINY)
    model.model.layers[0].mlp = Mine(model.config)
    assert "model.layers.0.mlp" not in {one.path for one in accelerate(model).replaced}


@pytest.mark.parametrize("function", [accelerate, restore])
def test_only_modules_are_taken(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model is dict, needs a torch\.nn\.Module"):
        function({})


def test_the_report_names_paths_operators_and_reasons() -> None:
    report = accelerate(build("recurrent_gemma", TINY))
    replaced = {one.path: one.operators for one in report.replaced}
    assert replaced[""] == ("linear_cross_entropy",)
    assert replaced["model.layers.0.temporal_block.rg_lru"] == ("rg_lru",)
    reasons = {one.path: one.reason for one in report.kept}
    assert reasons["model.layers.0.mlp_block"] == "no operator gates with GELUTanh"
    lines = str(report).splitlines()
    assert lines[0] == f"replaced {len(report.replaced)} modules, kept {len(report.kept)}"
    assert "  2 x RecurrentGemmaRglru: rg_lru" in lines
    assert "  3 x RecurrentGemmaMlp: kept: no operator gates with GELUTanh" in lines
    assert repr(report) == str(report)


def test_twice_is_once() -> None:
    model = build("bamba", TINY)
    before = attributes(model)
    assert accelerate(model) == accelerate(model)
    restore(model)
    assert attributes(model) == before


def test_a_part_of_a_model_can_be_accelerated() -> None:
    model = build("mamba", TINY)
    report = accelerate(model.backbone.layers[1])
    assert {one.path for one in report.replaced} == {"norm", "mixer"}
    assert restore(model)


def test_a_copy_runs_and_restores_by_itself() -> None:
    accelerated, untouched, _ = pair("lfm2")
    copied = copy.deepcopy(accelerated)
    ids = tokens(1, 9)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
        assert not copied(ids).logits.any()
        assert restore(copied)
        assert largest_difference(accelerated(ids).logits, untouched(ids).logits) <= LOGITS
    assert restore(accelerated)


def test_a_model_saved_whole_comes_back_untouched(tmp_path: Any) -> None:
    accelerated, untouched, report = pair("lfm2")
    torch.save(accelerated, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids, labels=ids).loss, untouched(ids, labels=ids).loss)
    assert accelerate(loaded) == report


def test_the_signature_of_forward_stays() -> None:
    accelerated, untouched, _ = pair("lfm2")
    assert inspect.signature(accelerated.forward) == inspect.signature(untouched.forward)


def test_weights_saved_from_one_load_in_the_other(tmp_path: Any) -> None:
    accelerated, untouched, _ = pair("mamba2")
    accelerated.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in untouched.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("name", "settings", "kind", "reason"),
    [
        ("mamba", {"hidden_act": "gelu"}, "MambaMixer", "no short convolution with the activation 'gelu'"),
        ("mamba2", {"hidden_act": "relu"}, "Mamba2Mixer", "no short convolution with the activation 'relu'"),
        ("qwen3_next", {"hidden_act": "gelu"}, "Qwen3NextGatedDeltaNet", "with the activation 'gelu'"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "LlamaMLP", "no operator gates with GELUTanh"),
        ("gemma2", {}, "Gemma2Attention", "its attention does more than the one known here"),
        ("jamba", {}, "JambaAttention", "its rotary positions are not the plain ones"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "LlamaAttention",
            "its rotary positions are not the plain ones",
        ),
    ],
    ids=str,
)
def test_what_is_not_served_keeps_its_own_forward(name: str, settings: Any, kind: str, reason: str) -> None:
    accelerated, untouched, report = pair(name, **settings)
    reasons = {one.reason for one in report.kept if one.kind == kind}
    assert len(reasons) == 1
    assert reason in reasons.pop()
    ids = tokens(1, 9)
    with torch.no_grad():
        assert largest_difference(accelerated(ids).logits, untouched(ids).logits) <= LOGITS


def kept_reason(model: Any, path: str) -> str:
    return {one.path: one.reason for one in accelerate(model).kept}[path]


def test_another_formula_under_a_known_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    def twice(self: Any, x: Tensor) -> Tensor:
        return 2.0 * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", twice)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    model = build("llama", TINY)
    assert "another formula" in kept_reason(model, "model.norm")
    assert "another formula" in kept_reason(model, "model.layers.0.mlp")


def test_a_mixer_written_another_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba2 import modeling_mamba2

    monkeypatch.delattr(modeling_mamba2, "mamba2_chunk_scan")
    reason = kept_reason(build("mamba2", TINY), "backbone.layers.0.mixer")
    assert reason == "this version of transformers writes it another way (no mamba2_chunk_scan)"


def test_a_forward_that_fails_on_random_tokens_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba.modeling_mamba import MambaMixer

    def refuse(self: Any, *args: Any) -> Tensor:
        raise ValueError("not today")

    monkeypatch.setattr(MambaMixer, "forward", refuse)
    reason = kept_reason(build("mamba", TINY), "backbone.layers.0.mixer")
    assert reason == "its own forward does not take random tokens: not today"


def test_weights_that_are_not_numbers_are_kept() -> None:
    model = build("mamba", TINY)
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.fill_(torch.nan)
    reason = kept_reason(model, "backbone.layers.0.mixer")
    assert reason == "its own forward does not give finite numbers on random tokens"


def test_what_others_replaced_is_kept() -> None:
    model = build("mamba", TINY)
    mixer = model.backbone.layers[0].mixer
    mixer.forward = theirs = lambda *args, **kwargs: None
    assert "something else has replaced its forward" in kept_reason(model, "backbone.layers.0.mixer")
    restore(model)
    assert mixer.forward is theirs


def test_weights_on_the_meta_device_are_kept() -> None:
    model = build("mamba", TINY).to("meta")
    assert kept_reason(model, "backbone.layers.0.mixer") == "its weights are on the meta device"
    assert kept_reason(model, "") == "its weights are on the meta device"


def test_a_projection_that_is_no_plain_linear_layer_is_kept() -> None:
    class Wrapped(nn.Linear):
        pass

    model = build("mamba", TINY)
    mixer = model.backbone.layers[0].mixer
    mixer.dt_proj = Wrapped(mixer.dt_proj.in_features, mixer.dt_proj.out_features)
    assert "its dt_proj is not a plain linear layer" in kept_reason(model, "backbone.layers.0.mixer")


def test_probing_leaves_no_trace() -> None:
    model = build("recurrent_gemma", TINY)
    model.backbone = None  # An attribute of no meaning: only the modules count.
    block = model.model.layers[0].temporal_block
    block.conv1d_state = state = torch.ones(1)
    random_state = torch.get_rng_state()
    accelerate(model)
    assert block.conv1d_state is state
    assert block.rg_lru.recurrent_states is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", ["mamba", "mamba2", "lfm2", "qwen3_next"])
def test_packed_sequences_go_to_the_original(name: str) -> None:
    """Without its compiled package the original refuses them, in its own words."""
    accelerated, untouched, _ = pair(name)
    layers = {"mamba": "mixer", "mamba2": "mixer", "lfm2": "conv", "qwen3_next": "linear_attn"}
    x = torch.randn(1, 6, TINY.width)
    for model in (accelerated, untouched):
        inside = model.backbone if hasattr(model, "backbone") else model.model
        mixer = getattr(inside.layers[0], layers[name])
        with pytest.raises(ValueError, match="packed sequences"):
            mixer(x, seq_idx=torch.zeros(1, 6, dtype=torch.int32))


def test_star_core_does_not_import_transformers() -> None:
    script = "import sys, star_core; sys.exit('transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("name", ["mamba", "mamba2", "lfm2", "qwen3_next", "recurrent_gemma", "diffllama", "llama"])
def test_it_compiles_to_as_few_graphs_as_the_original(name: str) -> None:
    accelerated, untouched, _ = pair(name)
    ids = tokens(2, 13)
    graphs = []
    for model in (accelerated, untouched):
        torch._dynamo.reset()
        with torch.no_grad():
            graphs.append(torch._dynamo.explain(model)(ids, use_cache=False).graph_count)
    assert graphs[0] <= graphs[1]
