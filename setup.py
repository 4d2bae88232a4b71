"""Builds pyfast._C against the torch that is already installed; everything static is in
pyproject.toml.

PYFAST_CUDA=0 leaves CUDA out, PYFAST_CUDA=1 makes its absence an error.
"""

import os
import sys
import sysconfig
from glob import glob

from setuptools import setup


def find_torch():
    """The installed torch, even from pip's isolated build environment, which hides its site-packages."""
    try:
        import torch
    except ImportError:
        sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        sys.path += [site for site in sites if os.path.isdir(os.path.join(site, "torch"))]
        try:
            import torch
        except ImportError:
            return None
    return torch


def say(line):
    """Shown by `pip install -v`; `python -m pyfast info` tells the same afterwards."""
    print(f"pyfast: {line}", file=sys.stderr)


def cuda_missing(torch, cuda_home):
    if os.environ.get("PYFAST_CUDA") == "0":
        return "PYFAST_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if cuda_home is None:
        return "no nvcc found; install the CUDA toolkit or set CUDA_HOME"
    return None


def set_cuda_archs(torch):
    """Without a list torch asks the visible GPU, and fails where there is none."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0+PTX"


def extension(torch):
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    sources = sorted(glob("csrc/**/*.cpp", recursive=True))
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    if os.environ.get("PYFAST_CUDA", "0") not in ("0", "1"):
        raise SystemExit(f"pyfast: PYFAST_CUDA is {os.environ['PYFAST_CUDA']!r}; it must be 0 or 1")
    missing = cuda_missing(torch, CUDA_HOME)
    if missing and os.environ.get("PYFAST_CUDA") == "1":
        raise SystemExit(f"pyfast: PYFAST_CUDA=1, but {missing}")
    if not missing:
        set_cuda_archs(torch)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "this machine's")
        say(f"building CPU and CUDA kernels for torch {torch.__version__} ({CUDA_HOME}, {archs})")
    else:
        say(f"building CPU kernels for torch {torch.__version__}; no CUDA sources: {missing}")
    return (CppExtension if missing else CUDAExtension)(
        "pyfast._C",
        sources if missing else sources + cuda_sources,
        depends=glob("csrc/**/*.h", recursive=True),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[] if missing else [("PYFAST_CUDA", "1")],
        # at::parallel_for needs OpenMP to compile, but not to link: it must find torch's own copy
        # of the runtime. clang's calls are of its own runtime.
        extra_link_args=["-fopenmp"] if "clang" in os.environ.get("CXX", "") else [],
        # Comparisons of floats may be vectorized: nobody asks which of them raised a flag.
        extra_compile_args={
            "cxx": ["-O3", "-fno-trapping-math", "-fopenmp", "-fvisibility=hidden", "-g0"],
            "nvcc": ["-O3"],
        },
    )


def main():
    torch = find_torch()
    if torch is None:  # an empty environment: pip fetches torch for the build, and comes back
        setup(
            setup_requires=["torch>=2.11"], install_requires=["torch>=2.11"], license="Apache-2.0"
        )
        return
    from torch.utils.cpp_extension import BuildExtension

    series = ".".join(torch.__version__.split(".")[:2])
    setup(
        ext_modules=[extension(torch)],
        cmdclass={"build_ext": BuildExtension},
        # The binary speaks this torch's ABI and no other's.
        install_requires=[
            f"torch=={series}.*",
            "triton; platform_system == 'Linux'",
            "numpy",
            "safetensors>=0.8",
        ],
        license="Apache-2.0",  # here, since a setuptools before 77 refuses it in pyproject.toml
    )


main()
