"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Compiles the extension anew with both, into a folder of its own, and runs the tests of the ops and of the state store on
it. First a child process makes the kernels read memory that was declared bad: unless that ends it, nothing is sanitised
and the run fails. Linux with gcc only.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "build" / "sanitized"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
TESTS = [
    "test_ops.py",
    "test_squared_norm.py",
    "test_transfer.py",
    "test_state_store.py",
    "test_copy_engine.py",
]
NAME = "ds_grass._C"

POISONED = """
import ctypes
import tests.sanitized as sanitized
sanitized.load()
import torch
from ds_grass import ops
x = torch.ones(10_000)
ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(x.data_ptr() + 20_000), ctypes.c_size_t(64))
ops.squared_norm(x)
"""


def main() -> int:
    compile_extension()
    environment = sanitizing_environment()
    done = subprocess.run(
        [sys.executable, "-c", POISONED], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if "use-after-poison" not in done.stderr or done.returncode == 0:
        print(
            done.stdout + done.stderr, "the sanitizer did not notice memory that was declared bad", sep="\n"
        )
        return 1
    files = [str(REPOSITORY / "tests" / "unit" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.sanitized", *files, *sys.argv[1:]]
    return subprocess.run(command, cwd=REPOSITORY, env=environment).returncode


def compile_extension() -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(FOLDER),
               "--build-temp", str(FOLDER / "objects")]  # fmt: skip
    environment = {
        **os.environ,
        "CFLAGS": FLAGS,
        "LDFLAGS": FLAGS,
        "GRASS_BUILD_NATIVE": "1",
        "GRASS_BUILD_CUDA": "0",
    }
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)


def sanitizing_environment() -> Mapping[str, str]:
    """The sanitizers' libraries must be there before Python is; Python itself leaks, and that is not looked for."""
    libraries = [
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "2",
    }


def load() -> None:
    """Let the sanitised extension be the one that `ds_grass.ops` finds."""
    (path,) = FOLDER.rglob("_C*.so")
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_file_location(NAME, str(path), loader=loader)
    import torch  # noqa: F401  whose libraries it needs

    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[NAME])


def pytest_configure() -> None:
    """As a plugin of the child's pytest."""
    load()


def pytest_report_header() -> str:
    return f"sanitised kernels: {sys.modules[NAME].__file__}"


if __name__ == "__main__":
    sys.exit(main())
