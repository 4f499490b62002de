"""A copy of the code that jobs run: what it is known by, and that it still is that when a job begins."""

import shlex
import subprocess
from pathlib import Path

# Of names and contents. What is no plain file, a link say, counts by its name: none is in a copy that was just made.
_DIGEST = (
    "{ find . ! -type f -print0 | LC_ALL=C sort -z; "
    "find . -type f -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum; } | sha256sum | cut -c -32"
)


def digest(code: Path) -> str:
    """32 hex digits that differ with what any file below ``code`` holds and is called. A compiled file, which Python
    would run in place of its source, is a file."""
    shown = subprocess.run(["bash", "-c", _DIGEST], cwd=code, capture_output=True, text=True, check=True)
    return shown.stdout.strip()


def check(code: Path, pickled: str) -> list[str]:
    """Lines of a batch script that end the job before it runs anything that was changed since it was submitted.

    Slurm keeps the script itself; whoever may write to the run's directory can change the rest.

    Args:
        code: folder called ``code-DIGEST``.
        pickled: path of what submitit unpickles, as a word of the shell.
    """
    place, known = shlex.quote(str(code)), code.name.rpartition("-")[2]
    return [
        f'[ "$(cd {place} && {_DIGEST})" = {known} ] || {{ '
        f'echo "error: "{place}" holds other code than its name says: move it away and submit again" >&2; exit 1; }}',
        # An array's is put there while its first tasks may run already: submitit waits for it.
        f"[ ! -e {pickled} ] || [ -O {pickled} ] || {{ "
        f'echo "error: "{pickled}" was written by another user: remove it and submit again" >&2; exit 1; }}',
        # What Python compiles would be a change.
        "export PYTHONDONTWRITEBYTECODE=1",
    ]
