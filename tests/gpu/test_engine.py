"""The host runs ahead of the device."""

import time

import torch

from experiments.engine import to_host


def test_reading_a_number_waits_for_nothing_that_came_after_it():
    torch.cuda._sleep(1)  # loads the kernel
    value = torch.full((), 3.0, device="cuda") * 2
    read = to_host(value)
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    assert read() == 6.0
    assert time.perf_counter() - start < 0.2
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
