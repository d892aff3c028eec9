from __future__ import annotations

import pytest
import torch

from ser_core.errors import InputError
from ser_core.settings import Precision
from ser_core.training.device import choose_arithmetic, choose_device, repeatable


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    cpu = torch.device("cpu")
    assert choose_arithmetic(cpu, Precision.auto).dtype is torch.float32
    assert choose_arithmetic(cpu, Precision.bfloat16).dtype is torch.bfloat16
    with choose_arithmetic(cpu, Precision.bfloat16).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said_so() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="sees no GPU"):
        choose_device("cuda")


def test_switches_of_torch_are_put_back() -> None:
    """A stage in this process leaves threads and determinism as they were, also when it fails."""
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())

    def fail() -> None:
        with repeatable(torch.device("cpu"), 1):
            assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (1, True)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
