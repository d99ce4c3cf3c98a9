"""Builds the package, with the C++ extension where PyTorch and a compiler are at hand.

The extension is built against the installed PyTorch (``pip install --no-build-isolation``) and is optional: without
PyTorch, without a compiler or with ``GKD_FAST_NO_EXTENSION=1`` the package installs without it.
``GKD_FAST_SANITIZE=1`` builds it with the address and undefined-behaviour sanitizers.
"""

import os
import platform
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for suffix in ("*.h", "*.inc") for path in Path("csrc").rglob(suffix))


def extension_options() -> dict:
    if os.environ.get("GKD_FAST_NO_EXTENSION") == "1":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("gkd_fast: PyTorch is not installed here, so the C++ extension is left out")
        return {}
    sanitize = os.environ.get("GKD_FAST_SANITIZE") == "1"
    flags = ["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi"]
    if platform.system() == "Linux":
        # at::parallel_for is a pragma in a header. Not linked with: the OpenMP runtime is the one PyTorch brings.
        flags.append("-fopenmp")
    link = ["-Wl,--exclude-libs,ALL"] if os.name == "posix" else []
    if sanitize:
        checks = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
        # Python's own flags define signed overflow, which would leave nothing to check there. GCC's expensive
        # optimisations fuse multiplications and additions, so that results are those of the usual build.
        flags += ["-O1", "-fexpensive-optimizations", "-g1", "-fno-wrapv", "-fno-omit-frame-pointer", *checks]
        link = checks

    class Build(BuildExtension):
        """Records the PyTorch version beside the extension, to be compared before it is loaded."""

        def run(self):
            super().run()
            for folder in {Path(self.build_lib) / "gkd_fast", Path("gkd_fast")}:
                if any(folder.glob("_C.*")):
                    (folder / "_C.torch-version.txt").write_text(torch.__version__ + "\n")

    extension = CppExtension(
        "gkd_fast._C",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=flags,
        extra_link_args=link,
        optional=not sanitize,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=False)}}


setup(**extension_options())
