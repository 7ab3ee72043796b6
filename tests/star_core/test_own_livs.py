"""Layers of genomes beyond the paper's: every combination that validates builds, trains, and decodes as it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from star_core import Genome, LanguageModel, ModelConfig, count_parameters, load
from star_core.genome import Bounds, Nonlinearity, SizeGenes, crossover, random_genome, repair, validate
from star_core.genome.mutations import _operators
from star_core.liv import build_featurizer, build_liv
from star_core.liv._band import view_of
from star_core.liv.own import LIVShape
from star_core.liv.pointwise import pointwise_attention
from tests.star_core.test_ragged import MASKS, check_against_rows_alone, close, tokens_for

CONFIG = ModelConfig(width=32, head_dim=8, vocab_size=19, time_scale=16)
SIZES = SizeGenes(width=32, head_dim=8)
BOUNDS = Bounds(depths=(2, 5), widths=(64,), head_dims=(4, 16), windows=(3, 4, 8), sizes=SIZES)

FAMILIES = {
    "softmax, band": "11111[operator=12223,window=3]",
    "softmax, one head": "11111[operator=12122]",
    "softmax, heads of one channel": "11111[operator=12121]",
    "softmax, wide keys and values": "31111[k=111224,q=111221,v=111234]",
    "ReLU": "31111[operator=32133]",
    "ReLU, band": "41111[operator=42233,window=4]",
    "swish": "21111[operator=22143,taps=3]",
    "no nonlinearity, band": "11111[operator=12213,window=5]",
    "linear": "11111[operator=12113,q=113211,k=113211]",
    "linear, one head, gated": "11111[operator=12112,z=114211]",
    "gated linear": "31111[operator=34113,q=321211]",
    "gated linear, heads of one channel": "11111[operator=14111]",
    "delta rule": "21111[operator=24112,z=114211]",
    "RG-LRU": "91111[operator=94141,value=321231]",
    "recurrence": "51111[B=321281,C=321281,dt=321211,x=321211,z=111211,taps=3]",
    "short filter": "71111[B=324221,C=111221,v=111121,K=321152]",
    "cut implicit filter": "81111[operator=83211,window=6]",
    "long filter": "81111[v=321221,B=111321,C=111121,K=311114]",
    "ReGLU": "91111[operator=91132]",
    "bilinear, blocks": "91111[operator=91112,gate=111321,value=111121]",
    "differential": "10.1.1.1.1[operator=12233,window=3]",
    "differential memoryless": "10.1.1.1.1[operator=91142]",
}
EVERY_FAMILY = "-".join(text for text in FAMILIES.values() if text[:2] != "10") + "-91111"


def model_of(text: str, depth: int = 2) -> LanguageModel:
    return LanguageModel(Genome.parse("-".join([text] * depth)), CONFIG, seed=0)


def decoded(model: LanguageModel, tokens: Tensor, chunks: list[int]) -> Tensor:
    cache = model.new_cache(*tokens.shape)
    with torch.no_grad():
        parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
    assert cache.nbytes == model.cache_bytes(*tokens.shape)
    return torch.cat(parts, dim=1)


def check(genome: Genome, seed: int) -> tuple[float, float]:
    """Build, train ten steps, decode; return the first and the last loss."""
    model = LanguageModel(genome, CONFIG, seed=seed)
    assert count_parameters(genome, CONFIG) == model.num_parameters()
    tokens = tokens_for(seed, 2, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        if not losses:
            idle = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
            assert not idle, f"no gradient: {idle}"
        optimizer.step()
        losses.append(loss.item())
    assert all(np.isfinite(losses)), losses
    # Exactly, but for the order of sums in float64; logits are rounded to float32.
    model.double()
    with torch.no_grad():
        full = model(tokens)
    for chunks in ([1] * 13, [5, 1, 4, 3]):
        torch.testing.assert_close(decoded(model, tokens, chunks), full, rtol=1e-6, atol=1e-6)
    return losses[0], losses[-1]


def check_random_genomes(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    families: Counter[str] = Counter()
    valid = repaired = 0
    previous = random_genome(rng, 4, level="featurizer", bounds=BOUNDS)
    for index in range(count):
        drawn = random_genome(rng, 4, level="featurizer", bounds=BOUNDS)
        crossed, _ = crossover(drawn, previous, rng, level="featurizer")
        fine = not validate(crossed, SIZES)
        genome = repair(crossed, rng, SIZES)
        valid, repaired = valid + fine, repaired + (genome is not crossed)
        first, last = check(genome, index)
        assert last < first - 0.05, (str(genome), first, last)
        families.update(cls.family for cls in genome.classes)
        previous = drawn
    print(f"{count} genomes: {valid / count:.1%} of the crossed valid, {repaired / count:.1%} repaired; {families}")
    assert valid + repaired == count
    assert len(families) == 9


def test_random_genomes_of_every_gene_train_and_decode() -> None:
    check_random_genomes(40, 0)


@pytest.mark.slow
def test_many_random_genomes_of_every_gene_train_and_decode() -> None:
    check_random_genomes(500, 1)


@pytest.mark.slow
def test_every_operator_trains_and_decodes() -> None:
    operators = [str(operator) for family in _operators().values() for operator in family]
    assert len(operators) > 100
    for number, operator in enumerate(operators):
        first, last = check(Genome.parse(f"1.1.1.1.1[operator={operator}]-91111"), number)
        assert last < first


@pytest.mark.parametrize("text", FAMILIES.values(), ids=list(FAMILIES))
def test_each_family_is_causal_and_packs_rows_of_unequal_length(text: str) -> None:
    model = model_of(text)
    tokens = tokens_for(0, 1, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().max() > 1e-3
    mask, chunk = torch.tensor(MASKS["between"]), tokens_for(1, 3, 4)
    late = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    step = tokens_for(2, 3, 1)
    parts = [(tokens_for(0, 3, 7), mask), (step, None), (step + 0, None), (chunk, late), (chunk, None), (step, None)]
    check_against_rows_alone(model, parts)


@pytest.mark.parametrize("text", FAMILIES.values(), ids=list(FAMILIES))
def test_rows_move_and_memory_grows(text: str) -> None:
    model = model_of(text)
    tokens, mask = tokens_for(0, 3, 7), torch.tensor(MASKS["left"])
    small, large, step = model.new_cache(3, 7), model.new_cache(3, 24), tokens_for(1, 3, 1)
    rows = torch.tensor([2, 0, 0])
    with torch.no_grad():
        for cache in (small, large):
            model(tokens, cache, mask)
        model.backbone.grow(small, 24)
        assert small.nbytes == large.nbytes
        moved = model.new_cache(3, 24)
        model(tokens[rows], moved, mask[rows])
        for _ in range(3):
            close(model(step, small), model(step, large))
        large.reset()
        model(tokens, large, mask)
        large.reorder(rows)
        for _ in range(2):
            close(model(step, large), model(step, moved))


@pytest.mark.parametrize("text", FAMILIES.values(), ids=list(FAMILIES))
def test_gradients_reach_the_new_tokens_through_a_cache(text: str) -> None:
    model = model_of(text)
    parameters = list(model.parameters())
    for mask in (None, torch.tensor(MASKS["left"])):
        cache = model.new_cache(3, 12)
        first = model(tokens_for(0, 3, 7), cache, mask)
        want = torch.autograd.grad(model(tokens_for(0, 3, 7), attention_mask=mask).square().sum(), parameters)
        steps = [model(tokens_for(number, 3, length), cache) for number, length in ((1, 2), (2, 1), (3, 1))]
        got = torch.autograd.grad(first.square().sum(), parameters, retain_graph=True)
        for one, expected in zip(got, want, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-3)
        for step in steps:
            # The taps of a filter that a network makes are constant after the first call.
            movable = [one for name, one in model.named_parameters() if ".filter." not in name]
            gradients = torch.autograd.grad(step.square().sum(), movable, allow_unused=True)
            assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
            assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > len(movable) // 2


@pytest.mark.parametrize("text", FAMILIES.values(), ids=list(FAMILIES))
def test_each_family_runs_in_bfloat16_and_under_autocast(text: str) -> None:
    model = model_of(text)
    tokens = tokens_for(0, 2, 9)
    want = model(tokens).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    model.to(torch.bfloat16)
    for got in (model(tokens).detach(), decoded(model, tokens, [4, 1, 4])):
        # 8 bits of mantissa, through two LIVs and a norm of each; logits are of size 1
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.3)


def test_canonical_genomes_are_the_same_networks() -> None:
    rng = np.random.default_rng(5)
    for seed in range(12):
        genome = random_genome(rng, 4, level="featurizer", bounds=BOUNDS)
        tokens = tokens_for(seed, 1, 9)
        with torch.no_grad():
            models = [LanguageModel(one, CONFIG, seed=seed) for one in (genome, genome.canonical())]
            assert torch.equal(models[0](tokens), models[1](tokens))


def test_a_window_bounds_the_cache() -> None:
    banded, full, linear = (
        model_of(text) for text in ("11111[operator=12223,window=8]", "11111", "11111[operator=12113]")
    )
    assert banded.cache_bytes(1, 8) == full.cache_bytes(1, 8)
    assert banded.cache_bytes(1, 800) == banded.cache_bytes(1, 8)
    assert full.cache_bytes(1, 800) == 100 * full.cache_bytes(1, 8)
    assert linear.cache_bytes(1, 800) == linear.cache_bytes(1, 8)
    assert model_of("81111[operator=83211,window=6]").cache_bytes(1, 800) == 2 * 4 * 32 * (5 + 6)


def test_shared_keys_serve_other_nonlinearities_and_are_held_once() -> None:
    genome = Genome.parse("11114-11114[operator=12133]-11113[operator=12143]")
    model = LanguageModel(genome, CONFIG, seed=0)
    assert [set(state) for state in model.new_cache(1, 4).states] == [{"k", "v"}, set(), {"k"}]
    tokens = tokens_for(0, 2, 9)
    close(decoded(model, tokens, [3, 1, 5]), model(tokens).detach())
    banded = model_of("11114[operator=12233,window=3]", 3)
    assert [set(state) for state in banded.new_cache(1, 9).states] == [{"k", "v"}, set(), set()]
    close(decoded(banded, tokens, [3, 1, 1, 4]), banded(tokens).detach())
    mask = torch.tensor(MASKS["between"])
    check_against_rows_alone(banded, [(tokens_for(0, 3, 7), mask), (tokens_for(1, 3, 1), None)] * 2)


def test_one_featurizer_serves_two_nonlinearities() -> None:
    model = LanguageModel(Genome.parse("11211[operator=12133]-11211[operator=12143]"), CONFIG, seed=0)
    first, second = (model.get_parameter(f"backbone.livs.{index}.featurizer.dense.weight") for index in range(2))
    assert first is second


@pytest.mark.parametrize("nonlinearity", [Nonlinearity.NONE, Nonlinearity.RELU, Nonlinearity.SWISH])
@pytest.mark.parametrize("window", [None, 1, 5, 300])
def test_pointwise_attention_is_its_definition(nonlinearity: Nonlinearity, window: int | None) -> None:
    """Over more tokens than a stretch of queries, with its gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 300, heads, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, size in ((4, 6), (2, 6), (2, 5))
    )
    view = view_of(torch.empty(2, 300, 1), None, 0, None, window)
    y = pointwise_attention(q, k, v, view, nonlinearity=nonlinearity, window=window)
    scores = torch.einsum("bqhk,bshk->bhqs", q, k.repeat_interleave(2, dim=2)) * 6**-0.5
    function = {Nonlinearity.RELU: torch.relu, Nonlinearity.SWISH: torch.nn.functional.silu}
    scores = function.get(nonlinearity, lambda x: x)(scores)
    seen = torch.ones(300, 300, dtype=torch.bool).tril().triu(-(window or 300) + 1)
    weights = scores.masked_fill(~seen, 0.0) / seen.sum(1)[:, None]
    want = torch.einsum("bhqs,bshv->bqhv", weights, v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_pointwise_attention_keeps_no_map() -> None:
    """What autograd saves grows with the tokens, not with their square."""

    def saved(tokens: int) -> int:
        sizes: list[int] = []
        q = torch.randn(1, tokens, 2, 8, requires_grad=True)
        view = view_of(q, None, 0, None, None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            pointwise_attention(q, q, q, view, nonlinearity=Nonlinearity.RELU, window=None)
        return max(sizes, default=0)

    assert saved(2048) < 2048 * 2048  # a quarter of one head's map


def test_linear_attention_is_the_sum_of_its_products() -> None:
    (cls,) = Genome.parse("11111[operator=12113,q=113211,k=113211]").classes
    shape = LIVShape(32, 8, 16, 10000.0)
    torch.manual_seed(0)
    liv = build_liv(cls, shape, build_featurizer(cls, shape, {"k", "v"}), ()).double()
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    y, shared = liv(x)
    q = torch.relu(x @ liv.featurizer.dense.weight[:32].T).view(10, 4, 8)  # type: ignore[union-attr,index]
    scores = torch.einsum("qhk,shk->hqs", q, shared["k"][0]).tril() * 8**-0.5
    o = torch.einsum("hqs,shv->qhv", scores, shared["v"][0])
    normed = torch.nn.functional.rms_norm(o, (8,), eps=1e-6).flatten(-2)
    torch.testing.assert_close(y[0], liv.out(normed), rtol=1e-8, atol=1e-8)  # type: ignore[operator]


def test_norms_stand_where_the_genes_say() -> None:
    text = "11111[residual=2]-71111[residual=3]-51111[residual=4]-91111[residual=4]-71111-11111[residual=2]"
    model = LanguageModel(Genome.parse(text), CONFIG, seed=0)
    backbone = model.backbone
    with torch.no_grad():
        for norm in (*backbone.norms, *backbone.out_norms.values()):
            norm.copy_(torch.rand(32) + 0.5)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (32,), weight, eps=CONFIG.norm_eps)

    def f(index: int, x: Tensor) -> Tensor:
        y: Tensor = backbone.livs[index](x)[0]
        return y

    x0 = torch.randn(2, 9, 32)
    n = list(backbone.norms)
    x1 = normed(x0 + f(0, x0), n[0])
    x2 = x1 + normed(f(1, normed(x1, n[1])), backbone.out_norms["1"])
    x3 = x2 + f(2, normed(x2, n[2])) + f(3, normed(x2, n[3])) + f(4, normed(x2, n[4]))
    x4 = normed(x3 + f(5, x3), n[5])
    residuals: list[Tensor] = []
    close(backbone(x0, residuals=residuals), normed(x4, n[6]))
    for got, want in zip(residuals, (x0, x1, x2, x2, x2, x3, x4), strict=True):
        close(got, want)


@pytest.mark.parametrize("use_mask", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_mask: bool) -> None:
    text = "11114[operator=12233,window=3,residual=4]-11114[operator=12233,window=3]-91111[operator=94141,residual=3]"
    model = LanguageModel(Genome.parse(text), CONFIG, seed=0)
    tokens, mask = tokens_for(0, 3, 7), torch.tensor(MASKS["left"]) if use_mask else None
    parameters = list(model.parameters())
    want = torch.autograd.grad(model(tokens, attention_mask=mask).square().mean(), parameters)
    model.backbone.gradient_checkpointing = True
    got = torch.autograd.grad(model(tokens, attention_mask=mask).square().mean(), parameters)
    assert all(torch.equal(one, expected) for one, expected in zip(got, want, strict=True))


def test_a_genome_decides_sizes() -> None:
    model = LanguageModel(Genome.parse("width=64,ffn=2,head_dim=16;11111-91111"), CONFIG, seed=0)
    assert model.config == replace(CONFIG, width=64, head_dim=16, ffn_width=128)
    assert model.embedding.shape == (19, 64)
    assert LanguageModel(Genome.parse("ffn=3;91111"), CONFIG).num_parameters() == model_of("91111", 1).num_parameters()
    own = LanguageModel(Genome.parse("ffn=2;91111[gate=111211,value=111211]"), CONFIG)
    assert own.get_parameter("backbone.livs.0.featurizer.dense.weight").shape == (64, 32)


def test_save_and_load(tmp_path) -> None:  # type: ignore[no-untyped-def]
    genome = Genome.parse("width=64;" + EVERY_FAMILY)
    model = LanguageModel(genome, CONFIG, seed=3)
    model.save(tmp_path / "model.safetensors")
    read = load(tmp_path / "model.safetensors")
    tokens = tokens_for(5, 2, 9)
    assert read.genome == genome
    assert read.config == model.config
    assert torch.equal(read(tokens), model(tokens))


def test_normed_queries_and_keys() -> None:
    model = LanguageModel(
        Genome.parse("11114[operator=12233,window=4]-11114[operator=12233,window=4]"), replace(CONFIG, qk_norm=True)
    )
    assert set(model.backbone.livs[0].norms) == {"q", "k"}  # type: ignore[arg-type]
    assert set(model.backbone.livs[1].norms) == {"q"}  # type: ignore[arg-type]
    tokens = tokens_for(0, 2, 9)
    close(decoded(model, tokens, [2, 1, 6]), model(tokens).detach())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("11111[head_dim=12]", "width: .* does not fit: LIV 0: width is 32; needs a multiple of head_dim = 12"),
        ("11111[k=111218,v=111218]", "does not fit: LIV 0: repeat of k is 8; needs a divisor of 4 heads"),
        ("width=36;11111", "head_dim: needs an even divisor of width = 36, got 8"),
        ("11111[residual=4]", "is not valid: LIV 0: residual is 4"),
    ],
)
def test_genomes_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(Genome.parse(text), CONFIG)
