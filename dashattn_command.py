"""The console script ``dashattn``, which finds the project that it is part of: see experiments/cli.py."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    root = Path(__file__).resolve().parent
    if not (root / "experiments" / "cli.py").is_file():
        sys.exit(
            "error: only the attention library is installed here: clone the repository and run "
            "`pip install --editable '.[train]'` in it for the commands"
        )
    sys.path.insert(0, str(root))
    runpy.run_module("experiments.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
