"""The model card of an export: what a run was, from the files of its directory and nothing else."""

from dataclasses import asdict
from pathlib import Path

from experiments.evaluation.target import Target, trained_knob
from experiments.files import GIT, METRICS, RESULTS, START, read_json, read_rows
from experiments.training.checkpoint import read_state
from models.hf import is_sparse


def model_card(target: Target, *, dense: bool) -> str:
    """README.md of an export, in Markdown.

    Args:
        target: what is exported.
        dense: it holds a sparse model's weights as those of a dense one.
    """
    checkpoint, config = target.checkpoint, target.train
    start, git = (_read(target.home / name) for name in (START, GIT))
    state, data, name = read_state(checkpoint), start.get("data", {}), config.attention.name
    lines = [f"# {config.name}", "", f"Step {state['step']}, {state['tokens']:,} tokens of training."]
    if "init_from" in start:
        lines += ["", f"Began with the weights of {Path(start['init_from']['weights']).name}."]
    lines += [
        "",
        "## Attention",
        "",
        f"`{name}`" + (":" if is_sparse(config.attention) else ", exact causal attention."),
    ]
    if is_sparse(config.attention):
        lines += ["", *(f"- {key}: {value}" for key, value in asdict(config.attention).items() if key != "name")]
        lines += ["", "Causal sparsity, the share of earlier keys that is not read:", ""]
        lines += _sparsity(target)
        lines += ["", "## How to load it", "", _WARNING if dense else _HOW]
    lines += ["", "## Data", "", f"- {config.data.name}, rows of {config.data.seq_len} tokens"]
    lines += [f"- {key}: {data[key]}" for key in ("source", "documents", "tokens", "tokens_fingerprint") if key in data]
    commit = git.get("sha") or "not known"
    lines += [
        "",
        "## Code",
        "",
        f"Commit {commit}" + (", with changes that it does not hold." if git.get("dirty") else "."),
    ]
    return "\n".join(lines) + "\n"


_HOW = (
    "`init_from=FOLDER model=checkpoint attention=checkpoint` of the code base that made it; or transformers' "
    "`AutoModelForCausalLM` after `dashattn.integrations.transformers.register()`, which refuses what it cannot run. "
    "Other libraries do not know its `model_type`: with dense attention these weights are another model."
)
_WARNING = (
    "**These weights were trained with the sparse attention above and are written as those of a dense model**, which "
    "is another model: its scores are not the ones of the run. Parameters of the sparse attention are left out."
)


def _sparsity(target: Target) -> list[str]:
    run_dir, knob = target.run_dir, trained_knob(target.train)
    measured = {
        row["length"]: row["causal_sparsity"]
        for row in read_rows(run_dir / RESULTS)
        if row["checkpoint"] == target.checkpoint.name and row["knob"] == knob and row["task"] == "loss"
        if row.get("variant") is None  # in the form that it was trained on
    }
    if measured:
        return [f"- {value:.1%} of validation rows of {length} tokens" for length, value in sorted(measured.items())]
    training = [row for row in read_rows(run_dir / METRICS) if "causal_sparsity" in row]
    if training:
        return [f"- {training[-1]['causal_sparsity']:.1%} of training rows, at step {training[-1]['step']}"]
    return ["- not measured"]


def _read(path: Path) -> dict:
    """What a record of the run holds; nothing where there is none, as in a run that was copied in part.

    Raises:
        ValueError: it is damaged.
    """
    return read_json(path, "restore it, or remove it to export without it") if path.exists() else {}
