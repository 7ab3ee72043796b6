"""Every valid genome builds, trains and decodes, and its accounts equal what is allocated."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from star_core import Cache, Genome, LanguageModel, ModelConfig, count_parameters, load
from star_core.genome import POOL
from star_core.genome.baselines import BASELINES
from tests.star_core.strategies import genomes

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=19, time_scale=16)


def tokens_for(seed: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def decode_all(model: LanguageModel, tokens: torch.Tensor, chunks: list[int]) -> tuple[torch.Tensor, Cache]:
    cache = model.new_cache(tokens.shape[0], tokens.shape[1])
    parts, start = [], 0
    with torch.no_grad():
        for chunk in chunks:
            parts.append(model(tokens[:, start : start + chunk], cache))
            start += chunk
    return torch.cat(parts, dim=1), cache


def assert_same_logits(got: torch.Tensor, want: torch.Tensor) -> None:
    # float32 sums in another order; logits are of size 1.
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


seen_classes: Counter[int] = Counter()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(genome=genomes(2, 6), seed=st.integers(0, 2**31))
def test_random_genomes_build_train_and_decode(genome: Genome, seed: int) -> None:
    seen_classes.update(genes.liv_class for genes in genome.livs)
    model = LanguageModel(genome, CONFIG, seed=seed)
    tokens = tokens_for(seed, 2, 10)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert torch.isfinite(loss)
    loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not without, f"no gradient: {without}"

    with torch.no_grad():
        full = model(tokens)
    stepped, cache = decode_all(model, tokens, [1] * 10)
    assert_same_logits(stepped, full)
    chunked, _ = decode_all(model, tokens, [4, 1, 3, 2])
    assert_same_logits(chunked, full)

    assert cache.nbytes == model.cache_bytes(2, 10)
    allocated = {p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(allocated.values()) == 4 * model.num_parameters()
    assert count_parameters(genome, CONFIG) == model.num_parameters()


def test_random_genomes_covered_every_class() -> None:
    if not seen_classes:
        pytest.skip("runs after the test of random genomes")
    assert set(seen_classes) == set(POOL)


@pytest.mark.parametrize("liv_class", list(POOL))
def test_each_class_is_causal(liv_class: int) -> None:
    model = LanguageModel(Genome.parse(f"{liv_class}.1.1.1.1-{liv_class}.1.1.1.1"), CONFIG, seed=0)
    tokens = tokens_for(0, 1, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    # FFT convolutions spread rounding errors over all positions; everything else is exact.
    assert_same_logits(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("11211-11211", ("backbone.livs.0.featurizer.project.weight", "backbone.livs.1.featurizer.project.weight")),
        ("51211-51211", ("backbone.livs.0.featurizer.A_log", "backbone.livs.1.featurizer.A_log")),
        ("81211-81211", ("backbone.livs.0.featurizer.filter.log_decay", "backbone.livs.1.featurizer.filter.log_decay")),
        ("91211-91211", ("backbone.livs.0.featurizer.weight", "backbone.livs.1.featurizer.weight")),
    ],
)
def test_shared_featurizers_are_one_parameter(text: str, shared: tuple[str, str]) -> None:
    model = LanguageModel(Genome.parse(text), CONFIG, seed=0)
    first, second = (model.get_parameter(name) for name in shared)
    assert first is second
    apart = LanguageModel(Genome.parse(text.replace("1211", "1111")), CONFIG, seed=0)
    assert model.num_parameters() < apart.num_parameters()


@pytest.mark.parametrize(
    ("liv_class", "strategy", "held"),
    [(1, 2, {"v"}), (1, 3, {"k"}), (1, 4, set()), (8, 2, {"history", "K"}), (8, 3, {"history"}), (8, 4, {"history"})],
)
def test_shared_tensors_are_held_once(liv_class: int, strategy: int, held: set[str]) -> None:
    genome = Genome.parse(f"{liv_class}111{strategy}-91111-{liv_class}111{strategy}")
    model = LanguageModel(genome, CONFIG, seed=0)
    cache = model.new_cache(1, 8)
    assert set(cache.states[2]) == held
    assert set(cache.states[0]) > held or set(cache.states[0]) == {"history", "K"}
    alone = LanguageModel(Genome.parse(f"{liv_class}1111-91111-{liv_class}1111"), CONFIG, seed=0)
    assert model.num_parameters() < alone.num_parameters()
    assert model.cache_bytes(1, 8) <= alone.cache_bytes(1, 8)


def test_shared_tensors_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(Genome.parse("11114-91111-11114"), CONFIG, seed=0)
    source, reuser = model.backbone.livs[0], model.backbone.livs[2]
    assert source.featurizer.project.sizes == {"q": 32, "k": 32, "v": 32}  # type: ignore[union-attr]
    assert reuser.featurizer.project.sizes == {"q": 32}  # type: ignore[union-attr]


def test_differential_starts_as_the_plain_difference() -> None:
    model = LanguageModel(Genome.parse("18.1.1.1.1".replace("18", "16") + "-9.1.1.1.1"), CONFIG, seed=0)
    liv = model.backbone.livs[0]
    x = torch.randn(1, 6, 32)
    positive, negative = liv.positive(x)[0], liv.negative(x)[0]  # type: ignore[operator,union-attr]
    torch.testing.assert_close(liv(x)[0], positive - negative)
    assert (positive - negative).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines_build(name: str) -> None:
    model = LanguageModel(BASELINES[name](8), CONFIG, seed=0)
    assert torch.isfinite(model.loss(tokens_for(0, 1, 9), tokens_for(1, 1, 9)))


def test_save_and_load(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = LanguageModel(Genome.parse("21211-31112-21221-32112-81111-53211-53211"), CONFIG, seed=3)
    model.save(tmp_path / "model.safetensors")
    read = load(tmp_path / "model.safetensors")
    tokens = tokens_for(5, 2, 9)
    assert read.genome == model.genome
    assert read.config == CONFIG
    assert torch.equal(read(tokens), model(tokens))
    assert read.num_parameters() == model.num_parameters()


def test_load_of_another_file_fails_clearly(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no genome"):
        load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("liv_class", [1, 3, 4], ids=lambda liv_class: POOL[liv_class].name)
def test_attention_keeps_queries_and_keys_for_training_once(liv_class: int) -> None:
    """The product that queries, keys and values are cut from is not kept: of q and k, the rotated ones alone are."""
    model = LanguageModel(Genome.parse(f"{liv_class}.1.1.1.1"), CONFIG, seed=0)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = tokens_for(0, 2, 64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    product = model.backbone.livs[0].featurizer.project.weight.shape[0]  # type: ignore[union-attr, index]
    assert 2 * 63 * product * 4 not in kept.values()
    assert 2 * 63 * CONFIG.width * 4 in kept.values()
    loss.backward()


def test_generate_greedy_equals_full_passes() -> None:
    model = LanguageModel(Genome.parse("11111-51111-71111-81111-91111"), CONFIG, seed=1)
    prompt = tokens_for(2, 2, 5)
    out = model.generate(prompt, 6, temperature=0)
    want = prompt
    for _ in range(6):
        want = torch.cat((want, model(want)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, want)


def test_generate_samples_among_the_likeliest() -> None:
    model = LanguageModel(Genome.parse("71111-91111"), CONFIG, seed=1)
    prompt = tokens_for(2, 64, 3)
    out = model.generate(prompt, 1, top_k=2, generator=torch.Generator().manual_seed(0))
    best = model(prompt)[:, -1].topk(2).indices
    assert (out[:, -1:] == best).any(dim=1).all()
    again = model.generate(prompt, 1, top_k=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    first = LanguageModel(Genome.parse("11111-91111"), CONFIG, seed=4)
    assert torch.equal(torch.rand(3), want)
    second = LanguageModel(Genome.parse("11111-91111"), CONFIG, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ModelConfig(width=30, head_dim=8), "head_dim: needs an even divisor of width = 30, got 8"),
        (lambda: ModelConfig(width=27, head_dim=9), "head_dim: needs an even divisor"),
        (lambda: ModelConfig(vocab_size=0), "vocab_size: needs a positive integer, got 0"),
        (lambda: LanguageModel(Genome.parse("31111"), ModelConfig(width=16, head_dim=8)), "SA-3 needs a multiple of"),
        (lambda: LanguageModel(Genome.parse("91112-91112"), CONFIG), "is not valid"),
        (lambda: small()(torch.zeros(3, dtype=torch.int64)), r"tokens: needs \[B, T\] int64, got \[3\]"),
        (lambda: small()(torch.zeros(1, 3)), "torch.float32"),
        (lambda: small().new_cache(0, 4), "batch_size: needs at least 1, got 0"),
        (lambda: small()(tokens_for(0, 2, 3), small().new_cache(1, 8)), "a batch of 2 does not fit"),
        (lambda: small()(tokens_for(0, 1, 9), small().new_cache(1, 8)), "exceed its max_length of 8"),
        (lambda: small().generate(tokens_for(0, 1, 2), -1), "max_new_tokens >= 0"),
        (lambda: small().generate(torch.zeros(1, 0, dtype=torch.int64), 2), "prompt: needs"),
    ],
)
def test_bad_input_fails_clearly(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def small() -> LanguageModel:
    return LanguageModel(Genome.parse("11111-91111"), CONFIG, seed=0)


def test_cache_reset_forgets() -> None:
    model = LanguageModel(Genome.parse("11111-51111-71111-81111-21111"), CONFIG, seed=0)
    tokens = tokens_for(0, 1, 6)
    cache = model.new_cache(1, 8)
    first = model(tokens, cache)
    cache.reset()
    assert cache.length == 0
    assert torch.equal(model(tokens, cache), first)
