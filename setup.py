"""Builds imbsam_fast.ops._C with CMake; everything else is in pyproject.toml.

Builds in one checkout take turns. CMake configures each of them afresh, for what it would remember
may be gone: pip makes cmake and ninja anew for every install. Objects are kept
as long as the sources, the compilers and their settings are the same.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()
SETTINGS = re.compile(
    r"(CC|CXX|CUDACXX|CUDAHOSTCXX|(C|CXX|CPP|CUDA|LD|ARCH)FLAGS|NVCC\w*|MACOSX_DEPLOYMENT_TARGET|"
    r"CMAKE_\w+|IMBSAM_\w+)"
)


def check_platform(platform: str) -> None:
    """Refuse what the kernels were never compiled for."""
    if platform in ("win32", "cygwin"):
        raise SystemExit(
            f"imbsam-fast does not build on Windows (sys.platform is {platform!r}), expected Linux "
            "or macOS; under WSL 2 it builds as on Linux (docs/support.md)"
        )


@contextmanager
def turn(lock: Path) -> Iterator[None]:
    """Wait until no other process builds in this checkout."""
    import fcntl  # not on Windows

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(source: Path, environment: Mapping[str, str]) -> str:
    """What objects depend on besides the commands that make them, as a hexadecimal digest."""
    digest = hashlib.sha256()
    folders = [path for name in ("csrc", "cmake") for path in sorted((source / name).rglob("*"))]
    for path in (source / "CMakeLists.txt", *folders):
        if path.is_file():
            digest.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes() + b"\0")
    for name, value in sorted(environment.items()):
        if SETTINGS.fullmatch(name):
            digest.update(f"{name}={value}\0".encode())
    compilers = [environment.get("CXX", "c++"), environment.get("CUDACXX", "nvcc")]
    found = [shutil.which(c, path=environment.get("PATH")) or "" for c in compilers]
    python = [sysconfig.get_config_var("SOABI"), sysconfig.get_path("include")]
    digest.update("\0".join([*map(os.path.realpath, found), *map(str, python)]).encode())
    return digest.hexdigest()


def prepare(directory: Path, key: str) -> None:
    """Leave of an earlier build in `directory` its objects, or nothing where it had another key."""
    stamp = directory / "fingerprint"
    if not stamp.is_file() or stamp.read_text() != key:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "CMakeCache.txt").unlink(missing_ok=True)
    for compilers in directory.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(compilers)
    stamp.write_text(key)


@contextmanager
def terminal() -> Iterator[Callable[[str], None]]:
    """A function that tells whoever waits: pip shows neither output nor errors of a build."""
    tty: IO[str] | None = None
    if not sys.stdout.isatty():
        with suppress(OSError):  # nobody waits
            tty = open("/dev/tty", "w")  # noqa: SIM115
    try:
        # No new line at the end, where pip's spinner goes on turning.
        yield lambda text: tty and print(f"\n  imbsam-fast: {text}  ", end="", file=tty, flush=True)
    finally:
        if tty:
            tty.close()


def compile_all(directory: Path) -> None:
    """Run ninja, with a line a finished file; nvcc's minutes are told to the terminal too."""
    command = ["cmake", "--build", str(directory)]
    environment = {**os.environ, "NINJA_STATUS": "[%f of %t, %e s] "}
    with (
        terminal() as tell,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"\[(.*)\] Building CUDA object .*/([\w.]+)\.o$", line):
                tell(f"nvcc made {found[2]}, {found[1]}")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


class Build(build):
    def run(self) -> None:
        # What lies there may be of files that the sources no longer have.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        directory = SOURCE / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        kind = "Debug" if self.debug else "Release"
        prepare(directory, f"{kind} {fingerprint(SOURCE, os.environ)}")
        configure = [
            "cmake",
            "-GNinja",
            f"-S{SOURCE}",
            f"-B{directory}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIMBSAM_CUDA={os.environ.get('IMBSAM_CUDA', 'AUTO')}",
            f"-DIMBSAM_CUDA_ARCHITECTURES={os.environ.get('IMBSAM_CUDA_ARCHITECTURES', '')}",
            f"-DCMAKE_BUILD_TYPE={kind}",
        ]
        subprocess.run(configure, check=True)
        compile_all(directory)


if __name__ == "__main__":
    check_platform(sys.platform)
    with turn(SOURCE / "build" / "lock"):
        setup(
            ext_modules=[Extension("imbsam_fast.ops._C", sources=[])],
            cmdclass={"build": Build, "build_ext": CMakeBuild},
            packages=[*find_packages(include=["imbsam_fast*"]), "imbsam_fast.kernels"],
            package_dir={"imbsam_fast.kernels": "kernels"},
        )
