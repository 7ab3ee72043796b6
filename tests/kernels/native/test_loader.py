"""Which library is loaded, what happens when there is none, and the build without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from star_kernels import _native

ROOT = Path(__file__).resolve().parents[3]
REPORT = """
import warnings, torch, star_kernels
from star_kernels import _native
warnings.simplefilter("always")
x = torch.linspace(-3, 3, 20).reshape(2, 10)
with warnings.catch_warnings(record=True) as caught:
    for _ in range(2):
        y = star_kernels.swiglu(x, x)
torch.testing.assert_close(y, torch.nn.functional.silu(x) * x)
served = star_kernels.which("swiglu", x)
print(_native.available(), _native.isa() or "-", served, len(caught), _native.reason(), sep="|")
"""


def report(**environment: str) -> list[str]:
    package = Path(_native.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "PYTHONPATH": str(package), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.mark.skipif(not _native.available(), reason=f"no compiled operators: {_native.reason()}")
@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_narrower_instruction_set_can_be_asked_for(isa: str) -> None:
    if not (_native.folder() / f"star_{isa}.so").exists() or (isa == "avx2" and _native.isa() == "plain"):
        pytest.skip(f"no {isa} library that can run here")
    assert report(STAR_KERNELS_ISA=isa) == ["True", isa, "cpp", "0", ""]


def test_without_libraries_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    available, isa, served, warned, reason = report(STAR_KERNELS_LIBRARIES=str(tmp_path))
    assert (available, isa, served, warned) == ("False", "-", "reference", "1")
    assert reason == f"{tmp_path} holds no library for this processor; `pip install -e .` builds them"


def test_reason_recorded_by_the_build_is_reported(tmp_path: Path) -> None:
    (tmp_path / "not_built.txt").write_text("no working C++17 compiler\n")
    assert report(STAR_KERNELS_LIBRARIES=str(tmp_path))[-1] == "not built: no working C++17 compiler"


def test_file_that_is_no_library_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "star_plain.so").write_text("not a library")
    available, *_, reason = report(STAR_KERNELS_LIBRARIES=str(tmp_path), STAR_KERNELS_ISA="plain")
    assert available == "False"
    assert reason.startswith("the library could not be loaded: ")


def test_build_without_a_compiler_succeeds_and_says_why_once(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CXX": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiled operators not built") == 1
    recorded = (tmp_path / "star_kernels" / "_lib" / "not_built.txt").read_text()
    assert recorded.startswith(("no working C++17 compiler (CXX: false)", "cmake was not found"))
    assert not list(tmp_path.rglob("*.so"))
