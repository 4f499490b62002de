"""Train one model: compose -> check -> build -> loop.

    python train.py                                        # a debug model on Python's standard library, on a CPU
    python train.py attention=dash model=60m steps=2000
    torchrun --standalone --nproc-per-node 8 train.py ...  # ranks share rows_per_batch
    deepspeed --no_local_rank --num_gpus 8 train.py ...    # the same by DeepSpeed's launcher
    python train.py launcher=slurm launcher.nodes=2 ...    # submit it as a job
    python train.py --cfg job                              # show everything that can be set

Starting a run in its own directory again resumes it from the latest checkpoint. Ctrl-C, SIGTERM, SIGUSR1 and
SIGUSR2 save at the next step and exit with code 75, which asks to be started again; a second one exits at once.
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("train")  # before PyTorch is imported

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import hydra
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dashattn.fields import user_path
from experiments.config import TrainConfig, register_configs, to_train_config
from experiments.errors import Preempted, run_faults, user_errors
from experiments.files import CONFIGS
from experiments.host_memory import limit_memory
from experiments.signals import StopRequest
from experiments.sweep.submit import submit_run
from experiments.training.build import build
from experiments.training.check import check
from experiments.training.run import (
    Run,
    hold_sparsity,
    is_measured,
    is_validated,
    judge,
    log,
    owes_validation,
    read_step,
    save,
    stop_without_data,
    take_step,
    tell_end,
    validate,
)

register_configs()


def train(config: TrainConfig, overrides: Sequence[str] = ()) -> Path:
    """Do a run, or what is left of it. Returns the run directory.

    Raises:
        ValueError: if the configuration cannot work or the run directory holds another run; nothing is changed then.
        Stopped: the run ended before its last step.
    """
    with StopRequest() as request, ExitStack() as resources:
        run = build(check(config), overrides, resources)
        if run is not None:
            loop(run, request)
    return user_path(config.run_dir)


def loop(run: Run, request: StopRequest) -> None:
    """Train from the step the run stands at to its last one. Step k in rows and names: k optimizer steps are done.

    A step is read, taken and judged; then come, where they are due, its row, a checkpoint, the validation. All ranks go
    through the same branches: what decides them is the same in every rank, or agreed upon in ``read_step``. Only a step
    that is logged is waited for to its end; in others the host goes on while the device updates the weights.

    Raises:
        Stopped: the run ended earlier, with all on disk that is needed to go on.
    """
    config = run.config
    request.saves = run.metrics.stopping
    if owes_validation(config, run.run_dir):
        validate(run, run.run_dir.step)
    for step in range(run.run_dir.step + 1, config.steps + 1):
        is_last = step == config.steps
        read = read_step(run, is_to_stop=request.received is not None)
        # Every rank leaves here if one has no data: those that went on would wait for it in the next collective.
        if read.failures:
            raise stop_without_data(run, step, read) from read.error
        # What is saved is logged, too: saving restarts the clock, which would forget the steps since the last row.
        is_saved = is_last or read.stops > 0 or (config.save_every > 0 and step % config.save_every == 0)
        is_logged = is_saved or step == 1 or step % config.log_every == 0
        with_stats = is_logged and config.stats_every > 0 and (is_last or step % config.stats_every == 0)
        is_to_hold = is_measured(run, step, read)

        done = take_step(run, step, read, with_norms=is_logged, with_stats=with_stats or is_to_hold)
        anomaly = judge(run, step, read, done)
        run.metrics.advance(step)
        # A resumed run begins after its checkpoint and drops the rows behind it. So this step's row is written before
        # the step is saved: nobody would make up for it. A skipped step stands in anomalies.jsonl; its
        # row here would hold a loss or a norm that is no number.
        if is_logged and anomaly != "skipped":
            log(run, step, read, done)
        if is_to_hold and anomaly != "skipped":
            hold_sparsity(run, done)
        if is_saved:
            save(run, step)
        if is_validated(config, step):  # a resumed run makes up for it
            validate(run, step)
        run.tracer.step()
        # A run that was asked to stop in its last step is complete, and must not ask to be started again.
        if read.stops and not is_last:
            by = request.received.name if request.received else "a signal to another rank"
            raise Preempted(f"stopped by {by} and saved at step {step}: the same command goes on from there")
    tell_end(run)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: DictConfig) -> None:
    overrides = HydraConfig.get().overrides.task
    with run_faults(), StopRequest() as request, ExitStack() as resources:
        # Until the run is built a ValueError is the user's to mend and ends in one line; in the loop it is a fault of
        # ours, whose traceback is needed.
        with user_errors():
            config = to_train_config(cfg)
            if config.launcher is not None:
                print(f"submitted job {submit_run(config, overrides)}")
                return
            config = check(config)
            limit_memory(config.device)
            run = build(config, overrides, resources)
        if run is not None:
            loop(run, request)


if __name__ == "__main__":
    main()
    # After the last of several jobs (``-m``): DeepSpeed keeps the process group for the next one.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
