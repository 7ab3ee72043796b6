"""Compiling Triton kernels ahead of time: what the binaries hold, and that nothing became worse than committed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import aot
from bench.binaries import TARGETS, Binary, compile_for, occupancy_of
from bench.cases import Case, cases
from bench.roofline import CARDS, card_of, least_seconds
from bench.work import Work
from star_kernels._tuning import Run, variants

SM_80, SM_90, _, GFX942 = TARGETS

# Kernels whose sums are matrix products.
MATRIX = {
    "forward", "backward_queries", "backward_keys", "attend_parts", "convolutions", "tap_gradients", "ssd_states",
    "ssd_outputs", "ssd_head_gradients", "ssd_group_gradients", "gla_states", "gla_mix", "gla_key_gradients",
    "delta_prepare", "delta_states", "delta_outputs", "delta_pairs", "delta_gradients",
}  # fmt: skip

_TWO_CHANNELS = (
    "a warp keeps its channels' states in registers, two channels a thread with all or many of their states, and runs "
    "from token to token: of one it takes 4 or 8 bytes a thread; exponentials bind"
)
# Kernels without a load of 128 bits on some target, and why.
NARROW = {
    "selective_ends": _TWO_CHANNELS,
    "selective_forward": _TWO_CHANNELS,
    "selective_pulls": _TWO_CHANNELS,
    "selective_backward": _TWO_CHANNELS,
    "selective_carry": "rows of states begin at multiples of 8 bytes alone, which gives the other kernels two channels",
}


def test_occupancy_is_bounded_by_registers_shared_memory_and_warps() -> None:
    assert occupancy_of(SM_90, 4, 32, 0) == 100
    assert occupancy_of(SM_90, 4, 128, 0) == 25
    assert occupancy_of(SM_90, 8, 255, 0) == 12
    assert occupancy_of(SM_80, 4, 32, 82 * 1024) == 12
    assert occupancy_of(GFX942, 4, 128, 0) == 50
    assert occupancy_of(GFX942, 4, 512, 0) == 12


def test_roofline_takes_what_binds() -> None:
    h100 = card_of("NVIDIA H100 80GB HBM3")
    assert h100 is not None
    assert card_of("GeForce GTX 970") is None
    memory = Work(bytes=3_350_000_000, footprint=0, flops=1000)
    assert least_seconds(memory, torch.bfloat16, h100) == (pytest.approx(1e-3), "memory")
    assert least_seconds(Work(8, 8, flops=989 * 10**9), torch.bfloat16, h100) == (pytest.approx(1e-3), "matrix")
    assert least_seconds(Work(8, 8), torch.bfloat16, h100, launches=4) == (pytest.approx(1e-5), "launch")
    assert least_seconds(Work(8, 8, exps=10**9), torch.float32, h100)[1] == "vector"
    assert len({card.name for card in CARDS}) == len(CARDS)


def test_a_regression_is_named() -> None:
    binary = Binary(registers=40, spill_bytes=0, shared_bytes=4096, occupancy=75, loads=4, wide_loads=4, matrix="wgmma")
    row = aot.Row("ssd", "B2", "bfloat16", "_forward", "sm_90", 4, 2, 64, 1.0, binary)
    assert not aot.regressions([row], [row])
    for change, words in (
        ({"spill_bytes": 16}, "spills 16 bytes"),
        ({"registers": 60}, "registers 40 to 60"),
        ({"shared_bytes": 9000}, "shared_bytes 4096 to 9000"),
        ({"wide_loads": 0}, "128 bits"),
        ({"matrix": ""}, "wgmma to none"),
    ):
        (found,) = aot.regressions([replace(row, binary=replace(binary, **change))], [row])
        assert words in found
        assert "_forward of ssd B2 on sm_90" in found


def test_a_kernel_compiled_twice_for_a_case_is_held_to_its_own_row() -> None:
    binary = Binary(registers=40, spill_bytes=0, shared_bytes=4096, occupancy=75, loads=4, wide_loads=4, matrix="wgmma")
    one = aot.Row("ssd", "B2", "bfloat16", "_states", "sm_90", 4, 2, 64, 1.0, binary)
    other = replace(one, binary=replace(binary, registers=180, spill_bytes=64))
    assert not aot.regressions([one, other], [one, other])
    assert len(aot.regressions([other, one], [one, other])) == 2


@pytest.fixture(scope="module")
def _triton_installed() -> None:
    pytest.importorskip("triton")


@pytest.mark.usefixtures("_triton_installed")
def test_recording_launches_nothing_and_ends() -> None:
    import star_kernels
    from star_kernels import _triton

    x, weight = torch.randn(3, 20), torch.randn(20)
    with _triton.recording() as launches:
        star_kernels.rms_norm(x, weight, backend="triton")
    assert [one.kernel.__name__ for one in launches] == ["_norm_forward"]
    assert launches[0].arguments["width"] == 20
    if not _triton.interpreting():
        with pytest.raises(ValueError, match="backend='triton'"):
            star_kernels.rms_norm(x, weight, backend="triton")


@pytest.mark.usefixtures("_triton_installed")
def test_a_binary_shows_wide_loads() -> None:
    case = cases("swiglu", "B2 T64 D1024 bfloat16")[0]
    rows = aot.compile_case(case, [SM_90, GFX942])
    assert {row.kernel for row in rows} == {"_unit_forward", "_unit_backward"}
    for row in rows:
        assert row.binary.spill_bytes == 0
        assert row.binary.wide_loads == row.binary.loads > 0
        assert not row.binary.matrix
        assert 10 < row.binary.registers < 80


@pytest.mark.usefixtures("_triton_installed")
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 103, 110, 120, 121])
def test_matrix_instruction_of_a_gpu_is_what_triton_compiles_to(arch: int) -> None:
    target = replace(SM_90, name=f"sm_{arch}", arch=arch)
    case = cases("attention", "B2 T2048 H8 D128 bfloat16")[0]
    launch, _ = aot.launches_of(case, target)[0]
    assert compile_for(launch, target).matrix == target.gpu.matrix


def _held_against_the_committed_table(grid: list[tuple[int, str]], targets: list[aot.Target]) -> None:
    import triton

    rows = [row for found in aot.compile_all(grid, targets, jobs=2) for row in found]
    assert rows
    committed, version = aot.read(aot.COMMITTED), aot.version(aot.COMMITTED)
    if version == triton.__version__:
        assert not aot.regressions(rows, committed)
    known = {(row.operator, row.kernel) for row in committed}
    assert {(row.operator, row.kernel) for row in rows} <= known, "run `python -m bench.aot --write`"


def test_the_committed_table_keeps_to_what_is_wanted_of_every_kernel() -> None:
    rows = aot.read(aot.COMMITTED)
    targets = {one.name: one for one in TARGETS}
    assert {row.target for row in rows} == set(targets)
    assert {row.dtype for row in rows} == set(aot.DTYPES)
    for row in rows:
        label, target = f"{row.kernel} of {row.case} on {row.target}", targets[row.target]
        assert row.binary.spill_bytes == 0, label
        assert row.binary.shared_bytes <= target.most_shared, label
        # A product of few rows takes Ampere's instruction on NVIDIA's later cards too.
        few = "mfma" if target.backend == "hip" else "mma.sync"
        wanted = {target.gpu.matrix, few} if row.kernel in MATRIX else {""}
        assert row.binary.matrix in wanted, label
        assert row.binary.wide_loads > 0 or row.kernel in NARROW, label
    assert {row.kernel for row in rows} >= MATRIX
    assert {row.kernel for row in rows if not row.binary.wide_loads} == set(NARROW)


@pytest.mark.usefixtures("_triton_installed")
def test_default_configurations_in_bfloat16_on_two_targets() -> None:
    _held_against_the_committed_table(aot.grid_of(aot.CASES, ["bfloat16"]), [SM_90, GFX942])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_triton_installed")
def test_what_tuning_compares_compiles() -> None:
    refused = []
    for case in aot.CASES:
        half = Case(case.operator, case.sizes, case.options, torch.bfloat16)
        for launch, _ in aot.launches_of(half, SM_90):
            default = Run(launch.num_warps, launch.num_stages)
            for one in variants(default)[1:]:
                try:
                    compile_for(replace(launch, **one._asdict()), SM_90)
                except RuntimeError as error:
                    refused.append(f"{case.operator} {launch.kernel.__name__} {one}: {error}")
    assert not refused


@pytest.mark.slow
@pytest.mark.usefixtures("_triton_installed")
def test_every_configuration_everywhere() -> None:
    _held_against_the_committed_table(aot.grid_of(aot.CASES), list(TARGETS))
    for found in aot.compile_all(aot.grid_of(aot.EXTREMES), TARGETS, jobs=2):
        for row in found:
            target = next(one for one in TARGETS if one.name == row.target)
            assert row.binary.shared_bytes <= target.most_shared, f"{row.kernel} of {row.case} on {row.target}"
