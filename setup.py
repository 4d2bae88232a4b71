"""Build pyfast._C against the torch that is already installed.

Everything static is in pyproject.toml. The environment variable PYFAST_CUDA chooses what is built:
0 leaves CUDA out, 1 makes its absence an error, and without it CUDA is built where it is found.
"""

import os
import sys
import sysconfig
from glob import glob

from setuptools import setup


def find_torch():
    """Return the installed torch, or None.

    pip's isolated build environment hides the site-packages, so they are searched as well.
    """
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


def report(line):
    """Print a line that `pip install -v` shows. Later, `python -m pyfast info` says the same."""
    print(f"pyfast: {line}", file=sys.stderr)


def why_no_cuda(torch, cuda_home):
    """Return why CUDA is not built, or None if it is."""
    if os.environ.get("PYFAST_CUDA") == "0":
        return "PYFAST_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if cuda_home is None:
        return "no nvcc found; install the CUDA toolkit or set CUDA_HOME"
    return None


def set_cuda_archs(torch):
    """Set the list of GPU architectures where no GPU is visible.

    Without a list torch asks the visible GPU, and fails where there is none.
    """
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0+PTX"


def make_extension(torch):
    """Return the extension pyfast._C with its sources and compiler flags."""
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    sources = sorted(glob("csrc/**/*.cpp", recursive=True))
    cuda_sources = sorted(glob("csrc/**/*.cu", recursive=True))
    headers = sorted(glob("csrc/**/*.h", recursive=True))
    if os.environ.get("PYFAST_CUDA", "0") not in ("0", "1"):
        raise SystemExit(f"pyfast: PYFAST_CUDA is {os.environ['PYFAST_CUDA']!r}; it must be 0 or 1")
    missing = why_no_cuda(torch, CUDA_HOME)
    if missing and os.environ.get("PYFAST_CUDA") == "1":
        raise SystemExit(f"pyfast: PYFAST_CUDA=1, but {missing}")
    if not missing:
        set_cuda_archs(torch)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "this machine's")
        report(
            f"building CPU and CUDA kernels for torch {torch.__version__} ({CUDA_HOME}, {archs})"
        )
    else:
        report(f"building CPU kernels for torch {torch.__version__}; no CUDA sources: {missing}")
    return (CppExtension if missing else CUDAExtension)(
        "pyfast._C",
        sources if missing else sources + cuda_sources,
        depends=headers + cuda_sources,  # an sdist holds these too, also where CUDA is not built
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[] if missing else [("PYFAST_CUDA", "1")],
        # at::parallel_for needs OpenMP to compile. It must not be linked, so that torch's own copy
        # of the runtime is found. clang is different: it calls a runtime of its own.
        extra_link_args=["-fopenmp"] if "clang" in os.environ.get("CXX", "") else [],
        # -fno-trapping-math lets comparisons of floats be vectorized: nothing here reads the
        # floating-point flags that they raise.
        extra_compile_args={
            "cxx": ["-O3", "-fno-trapping-math", "-fopenmp", "-fvisibility=hidden", "-g0"],
            "nvcc": ["-O3"],
        },
    )


def main():
    torch = find_torch()
    if torch is None:
        # The environment is empty: pip fetches torch for the build, and calls this file again.
        setup(
            setup_requires=["torch>=2.11"], install_requires=["torch>=2.11"], license="Apache-2.0"
        )
        return
    from torch.utils.cpp_extension import BuildExtension

    series = ".".join(torch.__version__.split(".")[:2])
    setup(
        ext_modules=[make_extension(torch)],
        cmdclass={"build_ext": BuildExtension},
        # The binary has the ABI of this series of torch and of no other.
        install_requires=[
            f"torch=={series}.*",
            "triton; platform_system == 'Linux'",
            "numpy",
            "safetensors>=0.8",
        ],
        license="Apache-2.0",  # here, because setuptools before 77 refuses it in pyproject.toml
    )


main()
