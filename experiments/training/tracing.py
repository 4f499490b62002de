"""A profiler trace of a few steps, on request: run_dir/traces/step-N.json.gz, for https://ui.perfetto.dev."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARMUP = 3, 1  # steps of a launch before the first traced one: compilation, autotuning, the profiler's own start


class Tracer:
    """Traces ``steps`` steps of this launch after the first few; none of them when ``steps`` is 0."""

    def __init__(self, run_dir: Path, steps: int, first_step: int, device: torch.device):
        """``first_step``: number of the launch's first step."""
        self._profile = None
        if steps == 0:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        path = run_dir / "traces" / f"step-{first_step + WAIT + WARMUP:08d}.json.gz"
        path.parent.mkdir(exist_ok=True)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        )
        self._profile.start()

    def step(self) -> None:
        """A step is done."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Write what was traced so far."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
