"""Compiling Triton kernels ahead of time: what the binaries hold, and that nothing became worse than committed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import aot
from bench.binaries import TARGETS, Binary, compile_for, occupancy_of
from bench.cards import CARDS, card_of, least_seconds
from bench.cases import Case, cases
from bench.loads import loads_of
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
    "from token to token: of one it takes 4 or 8 bytes a thread. Exponentials bind, five a state and token where the "
    "count for the data sheet has two"
)
_CARRY = "rows of states begin at multiples of 8 bytes alone, which gives the other kernels two channels"
_TOEPLITZ = (
    "half of the tiles are taps, whose lags run backwards; of a block's 64 x 64 taps 127 differ, and the others come "
    "from cache. Products bind: they grow with the square of the length, where the data sheet's count has a transform"
)
_IN_REGISTERS = (
    "mma.sync takes its factors in registers: tiles of 64 x 32, which are 16 bytes a thread, spill {} bytes in bfloat16"
)
_EVERYWHERE = tuple(one.name for one in TARGETS)
# Kernels of operators that memory bounds, which load the smaller part of their bytes 128 bits at a time: on which
# targets, and why.
NARROW = {
    "selective_ends": (("sm_90", "gfx942"), _TWO_CHANNELS),
    "selective_forward": (("sm_90", "gfx942"), _TWO_CHANNELS),
    "selective_pulls": (("sm_90", "gfx942"), _TWO_CHANNELS),
    "selective_backward": (("sm_90", "gfx942"), _TWO_CHANNELS),
    "selective_carry": (("sm_90", "gfx942"), _CARRY),
    "convolutions": (_EVERYWHERE, _TOEPLITZ),
    "tap_gradients": (("sm_80",), _TOEPLITZ),
    "conv_step": (
        _EVERYWHERE,
        "a channel's W - 1 inputs and its W taps lie together, 12 and 8 bytes at 4 taps: rows that 16 bytes do not "
        "divide, taken a tap at a time",
    ),
    "backward_keys": (
        ("gfx942",),
        "tiles of 16 x 64 are 8 bytes for each of 256 threads; with 32 keys and 128 threads a window of 128 reads q "
        "and dO 1.7 times as often, and 32 queries take registers for half as many waves",
    ),
    "ssd_head_gradients": (("sm_80",), _IN_REGISTERS.format(152)),
    "ssd_group_gradients": (("sm_80",), _IN_REGISTERS.format(24)),
}
# Kernels without any load of 128 bits on some target.
NONE_WIDE = {"selective_ends", "selective_forward", "selective_pulls", "selective_backward", "selective_carry"}


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


BINARY = Binary(
    registers=40, spill_bytes=0, shared_bytes=4096, occupancy=75, loads=4, wide_loads=4, load_bytes=2048,
    wide_bytes=2000, matrix="wgmma",
)  # fmt: skip


def test_new_rows_take_the_places_of_those_of_their_case() -> None:
    rows = [
        aot.Row(operator, "B2", dtype, kernel, "sm_90", 4, 2, 64, 1.0, "memory", BINARY)
        for operator in ("ssd", "swiglu")
        for dtype in aot.DTYPES
        for kernel in ("one", "two")
    ]
    renewed = [replace(rows[2], kernel="three", num_warps=8)]
    other = replace(rows[0], target="sm_80")
    assert aot.merged(renewed, rows) == [*rows[:2], *renewed, *rows[4:]]
    assert aot.merged([other], rows) == [*rows, other]


PTX = """
	.loc	1 7 11
	ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
	.loc	1 9 4, function_name $L__info_string0, inlined_at 1 30 5
	// begin inline asm
	.loc	1 10 4
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
	// end inline asm
	.loc	1 12 4
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
	.loc	1 12 4
	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x8, %r6;
"""
TTGIR = """
#loc = loc("kernel.py":1:0)
#loc1 = loc("kernel.py":7:11)
#loc2 = loc("kernel.py":9:4)
#loc3 = loc("kernel.py":30:5)
#loc4 = loc("kernel.py":12:4)
module attributes {"ttg.num-warps" = 4 : i32, "ttg.threads-per-warp" = 32 : i32} {
  %a = tt.load %0 : !tt.ptr<bf16> loc(#loc1)
  %b_5 = tt.load %1, %2, %3 : tensor<64x32x!tt.ptr<f32>, #blocked> loc(#loc6)
  %c = ttg.async_copy_global_to_local %4, %5 mask %6 {contiguity = 4 : i32} : tensor<64x!tt.ptr<f32>, #b> -> <64xf32> loc(#loc4)
}
#loc5 = loc(callsite(#loc2 at #loc3))
#loc6 = loc("b"(#loc5))
"""  # noqa: E501


def test_bytes_are_counted_by_tiles_and_their_width_by_instructions() -> None:
    loads = loads_of({"ptx": PTX, "ttgir": TTGIR}, "cuda")
    assert (loads.count, loads.wide) == (4, 2)
    assert loads.places == {(7, 11): (2, 0), (9, 4): (8192, 8192), (12, 4): (256, 171)}
    assert (loads.bytes, loads.wide_bytes) == (8450, 8363)


def test_amd_loads_are_read_by_name_and_a_load_of_two_branches_counts_for_all_threads() -> None:
    text = "\t.loc\t1 9 4\n\tbuffer_load_dwordx4 v[1:4], v5\n\t.loc\t1 99 1\n\tglobal_load_ushort v1, v[2:3], off\n"
    loads = loads_of({"amdgcn": text, "ttgir": TTGIR}, "hip")
    assert loads.places == {(9, 4): (8192, 8192), (99, 1): (256, 0)}


def test_a_regression_is_named() -> None:
    row = aot.Row("ssd", "B2", "bfloat16", "_forward", "sm_90", 4, 2, 64, 1.0, "memory", BINARY)
    assert not aot.regressions([row], [row])
    for change, words in (
        ({"spill_bytes": 16}, "spills 16 bytes"),
        ({"registers": 60}, "registers 40 to 60"),
        ({"shared_bytes": 9000}, "shared_bytes 4096 to 9000"),
        ({"wide_bytes": 1000}, "1000 of 2048 bytes"),
        ({"matrix": ""}, "wgmma to none"),
    ):
        (found,) = aot.regressions([replace(row, binary=replace(BINARY, **change))], [row])
        assert words in found
        assert "_forward of ssd B2 on sm_90" in found


def test_a_kernel_compiled_twice_for_a_case_is_held_to_its_own_row() -> None:
    one = aot.Row("ssd", "B2", "bfloat16", "_states", "sm_90", 4, 2, 64, 1.0, "memory", BINARY)
    other = replace(one, binary=replace(BINARY, registers=180, spill_bytes=64))
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
        assert row.binary.wide_bytes == row.binary.load_bytes > 0
        assert row.bound == "memory"
        assert not row.binary.matrix
        assert 10 < row.binary.registers < 80


@pytest.mark.usefixtures("_triton_installed")
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 103, 110, 120, 121])
def test_matrix_instruction_of_a_gpu_is_what_triton_compiles_to(arch: int) -> None:
    target = replace(SM_90, name=f"sm_{arch}", arch=arch)
    case = cases("attention", "B2 T2048 H8 D128 bfloat16")[0]
    launch, _ = aot.launches_of(case, target)[0][0]
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
    assert {row.kernel for row in rows} >= MATRIX
    assert {row.kernel for row in rows if not row.binary.wide_loads} == NONE_WIDE


def test_kernels_that_memory_bounds_load_most_bytes_128_bits_at_a_time() -> None:
    bound = [row for row in aot.read(aot.COMMITTED) if row.bound == "memory"]
    assert len({row.kernel for row in bound}) > 30
    narrow = {(row.kernel, row.target) for row in bound if not aot.is_wide(row.binary)}
    assert narrow == {(kernel, target) for kernel, (targets, _) in NARROW.items() for target in targets}


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
        for launch, _ in aot.launches_of(half, SM_90)[0]:
            default = Run(launch.num_warps, launch.num_stages)
            for one in variants(default)[1:]:
                try:
                    compile_for(replace(launch, **one._asdict()), SM_90)
                except RuntimeError as error:
                    refused.append(f"{case.operator} {launch.kernel.__name__} {one}: {error}")
    assert not refused


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_triton_installed")
def test_every_configuration_everywhere() -> None:
    _held_against_the_committed_table(aot.grid_of(aot.CASES), list(TARGETS))
    for found in aot.compile_all(aot.grid_of(aot.EXTREMES), TARGETS, jobs=2):
        for row in found:
            target = next(one for one in TARGETS if one.name == row.target)
            assert row.binary.shared_bytes <= target.most_shared, f"{row.kernel} of {row.case} on {row.target}"
