"""The built wheel: imported and tested under another torch without being rebuilt, and installed without a compiler.

Both tests build from a copy of the sources in build/packaging, whose compiled files are kept for the next time.
`STAR_OTHER_PYTHON` names an interpreter with another torch than this one's, pytest and hypothesis; the kernel tests run
there on the wheel that was built here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "packaging"
SOURCES = ("kernels", "star_core", "search", "bench", "tests", "setup.py", "pyproject.toml", "CMakeLists.txt")
DOCUMENTS = ("MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
# What runs on a machine without compiled operators: every family of them, in plain torch.
TORCH_PATH = ("test_norm.py", "test_memoryless.py", "test_short_conv.py", "test_diagonal.py", "test_loss.py")
REPORT = """
import warnings, torch, star_kernels
from star_kernels import _native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.linspace(-3, 3, 20).reshape(2, 10).requires_grad_()
    for _ in range(2):
        y = star_kernels.swiglu(x, x)
        y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.silu(x) * x)
print(torch.__version__, star_kernels.__file__, star_kernels.which("swiglu", x), len(caught), _native.reason(), sep="|")
"""


def run(command: list[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command to its end and return what it wrote; fail with that if it fails."""
    done = subprocess.run(
        command,
        cwd=cwd or ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}"
    return done.stdout


def pip(*arguments: str, **environment: str) -> str:
    pytest.importorskip("setuptools", minversion="77", reason="builds without isolation: needs the build's own tools")
    return run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], environment)


@pytest.fixture(scope="module")
def sources() -> Path:
    """Copy what a checkout holds, with its dates, so that unchanged files are not compiled again."""
    copy = WORK / "source"
    copy.mkdir(parents=True, exist_ok=True)
    for stale in copy.iterdir():
        if stale.name != "build":
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    for stale in [*copy.glob("build/lib*"), *copy.glob("build/bdist*")]:
        shutil.rmtree(stale)
    for name in (*SOURCES, *DOCUMENTS):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_lib", "*.egg-info")
            )
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


def install(target: Path, what: Path, **environment: str) -> str:
    """Install without dependencies into a folder of its own."""
    shutil.rmtree(target, ignore_errors=True)
    return pip("install", "-v", "--no-deps", "--no-build-isolation", "--target", str(target), str(what), **environment)


def report(python: str, target: Path) -> list[str]:
    """Return the torch, the package's place, who serves swiglu, how many warnings that gave, and why not compiled."""
    return run([python, "-c", REPORT], {"PYTHONPATH": str(target)}, WORK).strip().split("|")


def kernel_tests(python: str, target: Path, *files: str) -> None:
    """Run kernel tests on the installed package, not on the sources beside them."""
    chosen = [str(ROOT / "tests" / "kernels" / name) for name in files]
    options = ["-p", "no:cacheprovider", "-o", "pythonpath=.", "-W", "ignore", "-x"]
    run([python, "-m", "pytest", *options, *chosen], {"PYTHONPATH": str(target)})


def test_wheel_serves_another_torch_unchanged(sources: Path) -> None:
    python = os.environ.get("STAR_OTHER_PYTHON")
    if not python:
        pytest.skip("STAR_OTHER_PYTHON names no interpreter with another torch")
    wheels, target = WORK / "wheels", WORK / "site"
    shutil.rmtree(wheels, ignore_errors=True)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(sources))
    (wheel,) = wheels.glob("*.whl")
    assert "-py3-none-" in wheel.name
    install(target, wheel)
    version, place, served, warned, reason = report(python, target)
    assert version != torch.__version__, f"STAR_OTHER_PYTHON: {python} has this interpreter's torch, needs another"
    assert Path(place).is_relative_to(target)
    assert (served, warned, reason) == ("cpp", "0", "")
    kernel_tests(python, target, "")


def test_install_without_a_compiler_leaves_the_torch_path(sources: Path) -> None:
    target = WORK / "site-without-compiler"
    said = install(target, sources, CXX="false")
    lines = [line.strip() for line in said.splitlines() if "compiled operators not built" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("star-arch: compiled operators not built, torch code serves instead: no working C++17")
    _, place, served, warned, reason = report(sys.executable, target)
    assert Path(place).is_relative_to(target)
    assert (served, warned) == ("reference", "1")
    assert reason.startswith("not built: no working C++17 compiler (CXX: false)")
    kernel_tests(sys.executable, target, *TORCH_PATH)
