"""Builds the optional extension pyembed._cpu; everything else about the package is in pyproject.toml.

The kernels choose their instruction set at run time, so there are no -march flags; they know no torch, so that one build serves every
torch version. A build that fails only warns, and the reference ops serve, unless PYEMBED_REQUIRE_NATIVE=1.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# for tests/test_sanitizers.py: reads and writes out of bounds and undefined behaviour end the process
SANITIZE = []
if os.environ.get("PYEMBED_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,vptr,object-size", "-fno-sanitize-recover=all", "-O1", "-g1"]

CPU = Pybind11Extension(
    "pyembed._cpu",
    [
        f"csrc/cpu/{name}.cpp"
        for name in ("bindings", "isa_generic", "isa_avx2", "isa_avx512", "isa_avx512_vnni", "isa_avx512_bf16", "isa_amx")
    ],
    depends=glob("csrc/**/*.h", recursive=True),
    cxx_std=17,
    # without contraction a * b + c rounds as it is written; where a fused product is meant, the source says fma
    # gcc 12 warns about its own headers
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-Wno-maybe-uninitialized", *SANITIZE],
    extra_link_args=["-fopenmp", *SANITIZE],
)


class BuildNative(build_ext):
    """Compiles the files of an extension side by side, and survives without a compiler."""

    def run(self):
        if SANITIZE and (self.inplace or self.editable_mode):
            raise SystemExit("PYEMBED_SANITIZE=1 does not replace the extension in place: python setup.py build_ext --build-lib DIRECTORY")
        super().run()

    def build_extension(self, ext):
        compile_one_by_one = self.compiler.compile

        def compile_together(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [obj for objs in pool.map(lambda source: compile_one_by_one([source], **options), sources) for obj in objs]

        self.compiler.compile = compile_together
        try:
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get("PYEMBED_REQUIRE_NATIVE") == "1":
                raise
            print(f"warning: {ext.name} was not built, so slower ops will serve in its place: {error}", file=sys.stderr)
        finally:
            self.compiler.compile = compile_one_by_one


# optional: a copy of what was not built (in an editable install) is not an error either
CPU.optional = os.environ.get("PYEMBED_REQUIRE_NATIVE") != "1"

setup(ext_modules=[CPU], cmdclass={"build_ext": BuildNative})
