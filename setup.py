"""Build the kernels: one object for each instruction set and number type, in one module.

The rest of the configuration is in pyproject.toml. Without a C++ compiler the package is installed
without them, and says so.
"""

import hashlib
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, PlatformError

NATIVE = Path("sklearn_maml", "native")
SOURCES = sorted([*NATIVE.glob("*.h"), *NATIVE.glob("*.cpp")])
# of processors of one architecture, beside what all of them have; chosen from at run time
X86_LEVELS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
FLAGS = [
    "-std=c++11",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
]
# one file for all versions of Python from 3.11 on, except those without the interpreter's lock
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildKernels(build_ext):
    """Compile the same sources many times."""

    def build_extension(self, ext):
        """Build the kernels, or say that they are missing."""
        try:
            if self.compiler.compiler_type == "msvc":
                raise PlatformError("the kernels need g++ or clang++")
            self.build_kernels(ext)
        except (BaseError, CCompilerError, OSError) as error:
            print(
                "\n*** sklearn_maml is installed WITHOUT its compiled kernels. Everything works, "
                "but long fits of\n*** multilayer perceptrons take several times as long. Install "
                "a C++ compiler and reinstall to have them.\n*** "
                f"Reason: {error}\n",
                file=sys.stderr,
            )

    def build_kernels(self, ext):
        """Compile and link."""
        path = Path(self.get_ext_fullpath(ext.name))
        newest = max(source.stat().st_mtime for source in map(Path, ext.depends))
        if not self.force and path.exists() and path.stat().st_mtime > newest:
            return
        x86 = self.plat_name.endswith(("x86_64", "amd64"))  # and nothing else: not universal2
        levels = {"base": [], **(X86_LEVELS if x86 else {})}
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()
        macros = [("HAS_X86_LEVELS", str(int(x86))), ("SOURCES", f'"{digest}"')]
        if LIMITED:
            macros.append(("Py_LIMITED_API", "0x030B0000"))
        jobs = [(NATIVE / "module.cpp", "module", macros, [])]
        for level, flags in levels.items():
            for real in ("float", "double"):
                kind = [("REAL", real), ("REAL_IS_DOUBLE", str(int(real == "double")))]
                for name in ("mlp.cpp", "head.cpp"):
                    kind_of = [("LEVEL", level), *kind]
                    jobs.append((NATIVE / name, f"{level}-{real}", kind_of, flags))
        objects = self.compile_all(jobs)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(path), target_lang="c++", extra_postargs=["-pthread"]
        )

    def compile_all(self, jobs):
        """Return the paths of the objects."""

        def compile_one(job):
            source, folder, macros, flags = job
            return self.compiler.compile(
                [str(source)],
                output_dir=str(Path(self.build_temp, folder)),
                macros=macros,
                include_dirs=[sysconfig.get_path("include")],
                extra_postargs=[*FLAGS, *flags],
            )

        with ThreadPoolExecutor(self.parallel or 2) as pool:
            return [path for paths in pool.map(compile_one, jobs) for path in paths]


setup(
    ext_modules=[
        Extension(
            "sklearn_maml.native._kernels",
            sources=[str(source) for source in SOURCES if source.suffix == ".cpp"],
            depends=[*map(str, SOURCES), "setup.py"],
            py_limited_api=LIMITED,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
