"""Build of the compiled operators; the project's metadata is in pyproject.toml.

CMake builds one library for each instruction set into ``star_kernels/_lib``. A machine without a working compiler still
gets the package: the build says once that the compiled operators are missing, and why, and leaves the reason where the
loader reads it.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE_ROOTS = {"star_kernels": "kernels/star_kernels", "star_core": "star_core", "search": "search", "bench": "bench"}
REASON_FILE = "not_built.txt"


def packages() -> list[str]:
    """List every package of the four import roots, sub-packages included."""
    names = []
    for name, folder in PACKAGE_ROOTS.items():
        if (ROOT / folder).is_dir():
            names += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return names


def tool(name: str, folder_attribute: str) -> str | None:
    """Find a build tool: the pip package's own binary first, since its folder need not be on PATH, then PATH."""
    try:
        candidate = Path(getattr(importlib.import_module(name), folder_attribute)) / name
    except (ImportError, AttributeError):
        return shutil.which(name)
    return str(candidate) if candidate.exists() else shutil.which(name)


def run_step(command: list[str], log: Path) -> bool:
    """Run one build step, keeping its output; True if it succeeded. Raises RuntimeError if it could not be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]} could not be run: {error}") from error
    log.write_text(done.stdout)
    return done.returncode == 0


def build_libraries() -> list[Path]:
    """Configure and build; return the libraries. Raises RuntimeError with one sentence on why it could not be done."""
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    if cmake is None:
        raise RuntimeError("cmake was not found")
    compiler = " ".join(filter(None, (os.environ.get("CXX"), os.environ.get("CXXFLAGS"))))
    # A folder for each compiler: CMake keeps the first one it saw, while unchanged sources need not be compiled again.
    folder = ROOT / "build" / f"native-{sys.platform}-{platform.machine()}-{zlib.crc32(compiler.encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder)]
    ninja = tool("ninja", "BIN_DIR")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    # The second try starts afresh: the folder may hold another generator's or another checkout's configuration.
    if not run_step(configure, log) and not run_step([*configure, "--fresh"], log):
        raise RuntimeError(f"no working C++17 compiler (CXX: {compiler or 'not set'}); see {log}")
    if not run_step([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], log):
        raise RuntimeError(f"the C++ sources did not compile (CXX: {compiler or 'not set'}); see {log}")
    return sorted((folder / "lib").glob("*.so"))


class BuildNative(build_ext):
    """Run CMake instead of distutils' compiler, and let its failure pass with a message."""

    def library_folder(self) -> Path:
        """Return where the libraries go: the source tree for an editable install, the build tree otherwise."""
        if self.inplace or self.editable_mode:
            return ROOT / PACKAGE_ROOTS["star_kernels"] / "_lib"
        return Path(self.build_lib).resolve() / "star_kernels" / "_lib"

    def run(self) -> None:
        """Build, then put the libraries in place whole, or the reason why there are none."""
        target = self.library_folder()
        target.mkdir(parents=True, exist_ok=True)
        for stale in (*target.glob("*.so"), target / REASON_FILE):
            stale.unlink(missing_ok=True)
        if self.inplace or self.editable_mode:
            (target / ".gitignore").write_text("*\n")
        try:
            libraries = build_libraries()
        except RuntimeError as error:
            (target / REASON_FILE).write_text(f"{error}\n")
            print(f"star-arch: compiled operators not built, torch code serves instead: {error}", file=sys.stderr)
            return
        for library in libraries:
            # Through a rename: a process that has the old file mapped must not see it change.
            shutil.copy2(library, target / f"{library.name}.new")
            os.replace(target / f"{library.name}.new", target / library.name)

    def get_outputs(self) -> list[str]:
        """List what was built."""
        return [str(path) for path in sorted(self.library_folder().glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is copied from a build tree to the source tree: an editable build writes in place."""
        return {}


class PlatformWheel(bdist_wheel):
    """Tag the wheel by platform alone: the libraries use neither Python's nor torch's C++ interface."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=packages(),
    package_dir=PACKAGE_ROOTS,
    package_data={"": ["py.typed"], "search": ["templates/*"]},
    include_package_data=False,
    ext_modules=[Extension("star_kernels._lib", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
