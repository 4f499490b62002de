"""Evaluates one checkpoint: ``python evaluate.py run=outputs/NAME tasks=[loss,position] sparsities=[0.5,0.75]``.

Rows are added to results.jsonl in the run directory, or where ``output`` says; what is there already is not computed
again, and several evaluations of a run may go side by side. All that was asked for, new or not, is shown at the end.
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("evaluate")  # before PyTorch is imported

import hydra
import torch
from omegaconf import DictConfig

from experiments.errors import user_errors
from experiments.evaluation.config import register_evaluate_config
from experiments.evaluation.display import Display
from experiments.evaluation.evaluate import Evaluation, find_target
from experiments.files import CONFIGS, RESULTS
from experiments.host_memory import limit_memory
from experiments.schema import to_config

register_evaluate_config()


@hydra.main(config_path=CONFIGS, config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        target = find_target(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        limit_memory(target.train.device)
        evaluation, display, count = Evaluation(config, target), Display(), 0
        with display:
            for row in evaluation.run(display.advance):
                count += 1
                display.show(row)
        display.show_table(evaluation.rows())
        print(f"{count} new rows in {target.rows_dir / RESULTS}")


if __name__ == "__main__":
    main()
