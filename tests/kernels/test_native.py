"""The C kernels are compiled once, at first use; whatever goes wrong leaves torch's kernels and says nothing loud."""

import os
import subprocess
import sys

import pytest
import torch

from sae.kernels.native import build, native

CHECK = "from sae.kernels.native import native; print(native() is not None)"


def started(tmp_path, code=CHECK, **environment):
    """Start another interpreter with its own cache folder."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"SAE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def libraries(tmp_path):
    return sorted((tmp_path / "cache").rglob("*"))


@pytest.mark.skipif(native() is None, reason="no compiler on this machine")
def test_processes_that_start_together_end_with_one_library(tmp_path):
    outputs = [process.communicate() for process in [started(tmp_path), started(tmp_path)]]
    assert outputs == [("True\n", "")] * 2
    assert [path.suffix for path in libraries(tmp_path)] == ["", ".so"]


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler", f"{sys.executable} -c pass"])
def test_a_compiler_that_fails_leaves_the_torch_kernels(tmp_path, compiler):
    output, errors = started(tmp_path, CC=compiler).communicate()
    assert (output, errors) == ("False\n", "")
    assert [path for path in libraries(tmp_path) if path.is_file()] == []


def test_a_cache_that_cannot_be_written_leaves_the_torch_kernels(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert started(tmp_path).communicate() == ("False\n", "")


def test_a_broken_library_leaves_the_torch_kernels(tmp_path):
    code = "import sae.kernels.native.build as b; p = b.Path('{}'); b._library = lambda compiler: p; print(b.native())"
    (tmp_path / "broken.so").write_text("no library")
    assert started(tmp_path, code.format(tmp_path / "broken.so")).communicate() == ("None\n", "")


def test_the_environment_switches_the_library_off(monkeypatch):
    monkeypatch.setenv("GOLDENGATE_NATIVE", "0")
    assert native() is None


@pytest.mark.skipif(native() is None or sys.platform != "linux", reason="no compiler, or no /proc")
def test_one_openmp_runtime_is_loaded():
    """In a process of its own: other packages bring a runtime of theirs into this one."""
    code = (
        "from sae.kernels.native import native\n"
        "assert native() is not None\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in lines if 'gomp' in line or 'iomp' in line or 'libomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_the_target_follows_what_torch_would_use(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert build._target() == ("-march=x86-64-v3",)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert build._target() == ()
