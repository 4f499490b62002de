"""The host runs ahead of the device."""

import torch

from experiments.training.engine import to_host


def test_reading_a_number_waits_for_nothing_that_came_after_it():
    torch.cuda._sleep(1)  # loads the kernel
    values = torch.full((2,), 3.0, device="cuda") * 2
    read = to_host(values)
    torch.cuda._sleep(2_000_000_000)  # about a second
    assert read() == [6.0, 6.0]
    assert not torch.cuda.current_stream().query()  # the device is still busy with what came after
    torch.cuda.synchronize()
