"""Evaluates one checkpoint: ``python evaluate.py run=outputs/NAME tasks=[loss,position] knobs=[0.5,1,2]``.

Rows are appended to results.jsonl in the run directory; what is there already is not computed again.
"""

import hydra
import torch
from omegaconf import DictConfig

from experiments.config import to_config
from experiments.errors import user_errors
from experiments.evaluation import evaluate, find_target, register_evaluate_config

register_evaluate_config()


@hydra.main(config_path="configs", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        target = find_target(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        count = 0
        for row in evaluate(config, target):
            count += 1
            where = "" if row["position"] is None else f" at positions {row['position'][0]}-{row['position'][1]}"
            knob = "" if row["knob"] is None else f"  {row['knob_name']} {row['knob']:g}"
            print(f"{row['task']} {row['score']:.4f}{where}{knob}  causal sparsity {row['causal_sparsity']:.1%}")
        print(f"{count} new rows in {target.run_dir}/results.jsonl")


if __name__ == "__main__":
    main()
