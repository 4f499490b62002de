"""Sweeps: every cell of a study is a training run and its evaluation; only what is missing is done.

A cell that fails stops no other; its last words stand in the table at the end and all it said in ``logs/``. A cell that
missing ones continue from (the study's ``base``) is done first. A cell that another process runs is left to it, and
done here if that does not get it done. With ``launcher=slurm`` what is missing is submitted.
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("sweep")  # before PyTorch is imported

import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import hydra
import torch
from filelock import FileLock
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dashattn.fields import user_path
from experiments.errors import REQUEUE, user_errors
from experiments.files import CONFIGS
from experiments.schema import to_config
from experiments.signals import Children
from experiments.sweep.cells import Cell, SweepConfig, cells, missing, register_sweep_config, take, write_plan
from experiments.sweep.check import check_cells
from experiments.sweep.run_cell import Outcome, run_cell
from experiments.sweep.submit import submit_sweep

LOOK_SECONDS = 0.5  # between looks at cells that another process runs


def run_sweep(config: SweepConfig, console: Console) -> dict[str, Outcome]:
    """Does what is missing, ``config.jobs`` cells at a time. A signal is passed on to them, and no other one starts.

    Raises:
        ValueError: a cell cannot work; then none was begun.
    """
    found = cells(config)
    output_dir = user_path(config.output_dir)
    lanes = gpu_lanes(visible_gpus(), config.gpus_per_cell)
    waiting = missing(found)
    notes = check_cells(waiting, config.gpus_per_cell, elsewhere=False)
    write_plan(output_dir, found)
    outcomes = {cell.name: Outcome("was done") for cell in found if cell.is_done()}
    console.print(f"{config.name}: {len(waiting)} cells to do, {len(outcomes)} done before", highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)

    running: dict[Future, tuple[Cell, tuple[str, ...], FileLock]] = {}
    elsewhere: set[str] = set()  # names of cells that another process was seen to run
    with Children() as children, ThreadPoolExecutor(config.jobs) as pool:
        # In the order of the configuration, so that what it names first is there first; a cell whose base is still
        # being trained lets those behind it pass.
        while waiting or running:
            for cell in list(waiting):
                base = Outcome("done") if cell.base is None else outcomes.get(cell.base)
                if base is None or len(running) >= config.jobs:
                    continue
                if base.status not in ("done", "was done"):
                    waiting.remove(cell)
                    outcomes[cell.name] = Outcome("skipped", message=f"{cell.base} {base.status}")
                    continue
                if children.received is not None:
                    waiting.remove(cell)
                    outcomes[cell.name] = Outcome("stopped", message="was not begun")
                    continue
                lock = take(cell)
                if lock is None:
                    if cell.name not in elsewhere:
                        console.print(f"  waits  {cell.name}  is run by another process", highlight=False, markup=False)
                    elsewhere.add(cell.name)
                    continue
                waiting.remove(cell)
                if cell.is_done():
                    lock.release()
                    outcomes[cell.name] = Outcome("was done", message="by another process")
                    continue
                console.print(f"  start  {cell.name}", highlight=False)
                taken = [lane for _, lane, _ in running.values()]
                gpus = min(lanes, key=taken.count)
                running[pool.submit(run_cell, cell, output_dir / "logs", children, gpus=gpus)] = cell, gpus, lock
            if not running and waiting:
                time.sleep(LOOK_SECONDS)
            look = LOOK_SECONDS if elsewhere else None
            for future in wait(running, timeout=look, return_when=FIRST_COMPLETED).done:
                cell, _, lock = running.pop(future)
                lock.release()
                outcome = outcomes[cell.name] = future.result()
                console.print(
                    f"  {outcome.status:6} {cell.name}  {outcome.seconds:.0f} s  {outcome.message}",
                    highlight=False,
                    markup=False,
                )
    return outcomes


def gpu_lanes(gpus: Sequence[str], per_cell: int) -> list[tuple[str, ...]]:
    """The GPUs that cells share out among them, ``per_cell`` at a time; a lane without any where there is none.

    Raises:
        ValueError: there are fewer than a cell needs.
    """
    if len(gpus) < per_cell and (gpus or per_cell > 1):
        raise ValueError(f"gpus_per_cell={per_cell}, and this machine shows {len(gpus)} GPUs: set it to what there is")
    return [tuple(gpus[i : i + per_cell]) for i in range(0, len(gpus) - per_cell + 1, per_cell)] or [()]


def visible_gpus() -> list[str]:
    """Names as of CUDA_VISIBLE_DEVICES, which may hold what is not a number."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(index) for index in range(count)]


def print_outcomes(outcomes: dict[str, Outcome], console: Console) -> None:
    table = Table("cell", "status", "seconds", "why")
    for name, outcome in outcomes.items():
        table.add_row(name, outcome.status, f"{outcome.seconds:.0f}" if outcome.seconds else "", outcome.message)
    console.print(table)


register_sweep_config()


@hydra.main(config_path=CONFIGS, config_name="sweep", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        if config.launcher is not None:
            print(submit_sweep(config))
            return
        console = Console()
        outcomes = run_sweep(config, console)
    print_outcomes(outcomes, console)
    statuses = {outcome.status for outcome in outcomes.values()}
    if "stopped" in statuses:
        raise SystemExit(REQUEUE)
    if statuses & {"failed", "skipped"}:
        raise SystemExit("some cells failed; the others are kept, and the same command tries again what is missing")


if __name__ == "__main__":
    main()
