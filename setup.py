"""Builds imbsam_fast.ops._C with CMake; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-GNinja",
            f"-S{source}",
            f"-B{build}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIMBSAM_CUDA={os.environ.get('IMBSAM_CUDA', 'AUTO')}",
            f"-DIMBSAM_CUDA_ARCHITECTURES={os.environ.get('IMBSAM_CUDA_ARCHITECTURES', '')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("imbsam_fast.ops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_packages(include=["imbsam_fast*"]), "imbsam_fast.kernels"],
    package_dir={"imbsam_fast.kernels": "kernels"},
)
