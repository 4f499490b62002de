"""``--help``, answered from configs/ alone: nobody waits for PyTorch, Hydra and the composition of all values."""

import sys
from pathlib import Path
from string import Template

import yaml

from experiments.files import CONFIGS


def answer_help(config_name: str) -> None:
    """End the process with the help that configs/NAME.yaml holds, if the command line asks for it.

    Called before the imports that take long, by what is started as NAME. Hydra would print the same, but for its list
    of groups, which has the schemas among the choices and no defaults.
    """
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        print(help_page(config_name))
        raise SystemExit


def help_page(config_name: str) -> str:
    """Hydra's template, with the groups and their choices, the default first."""
    config = yaml.safe_load(Path(CONFIGS, f"{config_name}.yaml").read_text())
    defaults = {}
    for entry in config["defaults"]:
        if isinstance(entry, dict):
            defaults |= {group: choice for group, choice in entry.items() if not group.startswith("override ")}
    groups = "\n".join(f"  {group}: {', '.join(_choices(group, default))}" for group, default in defaults.items())
    return Template(config["hydra"]["help"]["template"]).substitute(APP_CONFIG_GROUPS=groups)


def _choices(group: str, default: str | None) -> list[str]:
    choices = sorted(file.stem for file in Path(CONFIGS, group).glob("*.yaml"))
    if default is None:
        return ["null", *choices]
    return sorted(choices, key=lambda choice: choice != default)
