from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ser_core.errors import InputError
from ser_core.settings.execution import Precision
from ser_core.training.device import choose_arithmetic, choose_device, deterministic


@pytest.mark.parametrize("units", ["amx_bf16", "avx512_bf16", "avx512_f"])
def test_a_cpu_computes_in_bfloat16_only_where_it_has_units_for_it(monkeypatch: pytest.MonkeyPatch, units: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, units: True})
    cpu = torch.device("cpu")
    expected = torch.bfloat16 if units.endswith("bf16") else torch.float32
    assert choose_arithmetic(cpu, Precision.auto).dtype is expected
    assert choose_arithmetic(cpu, Precision.float32).dtype is torch.float32
    assert choose_arithmetic(cpu, Precision.bfloat16).dtype is torch.bfloat16
    with choose_arithmetic(cpu, Precision.bfloat16).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_an_input_error() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="sees no GPU"):
        choose_device("cuda")


def test_torch_settings_are_restored() -> None:
    """Number of threads and determinism are restored after a stage, also if it fails."""
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())

    def fail() -> None:
        with deterministic(torch.device("cpu"), 1):
            assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (1, True)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


GROWTH = """
import resource, sys
from ser_core.training.device import keep_freed_memory
import torch
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MB, above what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.slow
def test_freed_memory_stays_in_the_process() -> None:
    """With `keep_freed_memory` allocating a large tensor again causes no page faults; without it, it does."""
    pages = {
        way: int(subprocess.run([sys.executable, "-c", GROWTH, way], check=True, capture_output=True, text=True).stdout)
        for way in ("keep", "plain")
    }
    assert pages["keep"] < 100 < pages["plain"]
