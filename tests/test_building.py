"""Building in one checkout, again and again: setup.py, in a project whose module is one line."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

for needed in ("pybind11", "setuptools"):
    pytest.importorskip(needed)
ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").is_file() or not all(map(shutil.which, ("cmake", "ninja", "c++"))):
    pytest.skip("cmake, ninja or a C++ compiler is not there", allow_module_level=True)
spec = spec_from_file_location("setup_of_imbsam_fast", ROOT / "setup.py")
setup = module_from_spec(spec)
spec.loader.exec_module(setup)


@pytest.fixture
def sources(tmp_path):
    for name in ("csrc/imbsam.h", "cmake/cuda.cmake", "CMakeLists.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def configure(source: Path, directory: Path, tools: Path) -> int:
    setup.prepare(directory, "key")
    command = ["cmake", "-GNinja", f"-S{source}", f"-B{directory}"]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True).returncode


def test_tools_of_the_last_build_may_have_vanished(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(nothing LANGUAGES NONE)\n"
    )
    for overlay in ("first", "second"):
        tools = tmp_path / overlay
        tools.mkdir()
        (tools / "ninja").symlink_to(shutil.which("ninja"))
        assert configure(tmp_path, tmp_path / "build", tools) == 0
        remembered = (tmp_path / "build" / "CMakeCache.txt").read_text()
        assert str(tools / "ninja") in remembered
        shutil.rmtree(tools)


def test_objects_are_kept_for_the_same_key_only(tmp_path):
    directory = tmp_path / "build"
    setup.prepare(directory, "a")
    made = directory / "CMakeFiles" / "_C.dir" / "a.o"
    found = directory / "CMakeFiles" / "3.22.1" / "CMakeCXXCompiler.cmake"
    for path in (made, found):
        path.parent.mkdir(parents=True)
        path.touch()
    (directory / "CMakeCache.txt").touch()
    setup.prepare(directory, "a")
    assert made.exists() and not found.exists() and not (directory / "CMakeCache.txt").exists()
    setup.prepare(directory, "b")
    assert not made.exists()


@pytest.mark.parametrize("path", ["csrc/imbsam.h", "cmake/cuda.cmake", "CMakeLists.txt"])
def test_the_key_goes_by_what_sources_contain(sources, path):
    before = setup.fingerprint(sources, os.environ)
    os.utime(sources / path, (0, 0))
    assert setup.fingerprint(sources, os.environ) == before
    (sources / path).write_text("changed")
    os.utime(sources / path, (0, 0))  # older than every object
    assert setup.fingerprint(sources, os.environ) != before


@pytest.mark.parametrize(
    "name",
    ["CXX", "CXXFLAGS", "CUDACXX", "IMBSAM_CUDA", "CMAKE_GENERATOR", "ARCHFLAGS"],
)
def test_the_key_goes_by_settings(sources, name):
    environment = {"PATH": os.environ["PATH"], "HOME": "/here"}
    before = setup.fingerprint(sources, environment)
    assert setup.fingerprint(sources, {**environment, "HOME": "/there"}) == before
    assert setup.fingerprint(sources, {**environment, name: "another"}) != before


def test_the_key_goes_by_the_compiler_behind_its_name(sources, tmp_path):
    real = tmp_path / "real"
    for version in ("12", "13"):
        (real / version).mkdir(parents=True)
        (real / version / "nvcc").touch(mode=0o755)
    link = tmp_path / "bin" / "nvcc"
    link.parent.mkdir()
    keys = set()
    for version in ("12", "13"):
        link.unlink(missing_ok=True)
        link.symlink_to(real / version / "nvcc")
        keys.add(setup.fingerprint(sources, {"PATH": str(link.parent)}))
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["SOABI", "include"])
def test_the_key_goes_by_the_python(sources, monkeypatch, name):
    before = setup.fingerprint(sources, os.environ)
    function = "get_config_var" if name == "SOABI" else "get_path"
    monkeypatch.setattr(setup.sysconfig, function, lambda _: "another")
    assert setup.fingerprint(sources, os.environ) != before


def test_builds_take_turns(tmp_path):
    lock = tmp_path / "build" / "lock"
    code = textwrap.dedent(f"""
        import sys, time, runpy
        turn = runpy.run_path({str(ROOT / "setup.py")!r}, run_name="setup")["turn"]
        from pathlib import Path
        with turn(Path({str(lock)!r})):
            print("in", flush=True)
            sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "in\n"
        entered = threading.Event()

        def second():
            with setup.turn(lock):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
        first.stdin.close()
        thread.join(30)
        assert entered.is_set()


def test_the_terminal_is_told_what_pip_hides():
    inner = textwrap.dedent(f"""
        import runpy
        terminal = runpy.run_path({str(ROOT / "setup.py")!r}, run_name="setup")["terminal"]
        with terminal() as tell:
            print("captured")
            tell("nvcc made a.cu, 1 of 9, 3 s")
    """)
    outer = f"import subprocess as s, sys; s.check_output([sys.executable, '-c', {inner!r}])"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", outer])
    seen = b""
    with suppress(OSError):  # Linux's end of a terminal
        while more := os.read(terminal, 1000):
            seen += more
    assert os.waitpid(child, 0)[1] == 0
    assert seen.split() == b"imbsam-fast: nvcc made a.cu, 1 of 9, 3 s".split()


@pytest.mark.parametrize("platform", ["win32", "cygwin"])
def test_windows_is_refused_by_name(platform):
    with pytest.raises(SystemExit, match=rf"Windows \(sys.platform is '{platform}'\), expected"):
        setup.check_platform(platform)


def test_linux_and_macos_are_not_refused():
    for platform in ("linux", "darwin"):
        setup.check_platform(platform)


MODULE = """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "value", VALUE);
  return module;
}
"""
LISTS = """cmake_minimum_required(VERSION 3.22)
project(small LANGUAGES CXX)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
Python_add_library(_C MODULE WITH_SOABI csrc/bindings.cpp)
"""


def small_project(folder: Path) -> Path:
    """A checkout with our setup.py and pyproject.toml, and a module that compiles in a second."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in ("imbsam_fast", "imbsam_fast/ops", "kernels"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    (folder / "CMakeLists.txt").write_text(LISTS)
    (folder / "csrc").mkdir()
    return folder


class Checkout:
    """Wheels of a project, each made with tools that vanish afterwards."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.builds = 0

    def write(self, value: int) -> None:
        (self.source / "csrc" / "bindings.cpp").write_text(MODULE.replace("VALUE", str(value)))

    def start(self, hook: str = "build_wheel") -> tuple[Path, subprocess.Popen]:
        self.builds += 1
        place = self.source.parent / f"build{self.builds}"
        (place / "tools").mkdir(parents=True)
        for tool in ("cmake", "ninja"):
            (place / "tools" / tool).symlink_to(shutil.which(tool))
        path = f"{place / 'tools'}{os.pathsep}{os.environ['PATH']}"
        code = f"import setuptools.build_meta as backend; backend.{hook}({str(place)!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.source,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return place, process

    def finish(self, place: Path, process: subprocess.Popen) -> Path:
        """The folder in which the wheel is unpacked."""
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        shutil.rmtree(place / "tools")
        (wheel,) = place.glob("*.whl")
        shutil.unpack_archive(wheel, place / "unpacked", "zip")
        return place / "unpacked"


def value_of(unpacked: Path) -> int:
    code = "from imbsam_fast.ops import _C; print(_C.value)"
    found = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        cwd=unpacked,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


@pytest.mark.slow  # five builds, of two seconds each
def test_wheels_are_built_again_changed_and_side_by_side(tmp_path):
    (tmp_path / "source").mkdir()
    checkout = Checkout(small_project(tmp_path / "source"))
    gone = checkout.source / "imbsam_fast" / "gone.py"
    gone.touch()
    checkout.write(1)
    checkout.finish(*checkout.start("build_editable"))
    assert value_of(checkout.source) == 1
    first = checkout.finish(*checkout.start())
    assert value_of(first) == 1 and (first / "imbsam_fast" / "gone.py").exists()
    gone.unlink()
    second = checkout.finish(*checkout.start())  # whose tools are not those of the first
    assert value_of(second) == 1 and not (second / "imbsam_fast" / "gone.py").exists()
    checkout.write(2)
    os.utime(checkout.source / "csrc" / "bindings.cpp", (0, 0))  # as unpacked from an archive
    both = [checkout.start() for _ in range(2)]
    assert [value_of(checkout.finish(*started)) for started in both] == [2, 2]
