"""What the words of the code keep to."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("dashattn", "models", "data", "slurm", "experiments", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + sorted(ROOT.glob("*.py"))
SINGLE_BACKTICKS = re.compile(r"(?<!`)`[^`\n]+`(?!`)")


def prose(source):
    """Docstrings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def test_code_stands_in_double_backticks():
    found = {
        path.relative_to(ROOT).as_posix(): singles
        for path in SOURCES
        if (singles := [single for text in prose(path.read_text()) for single in SINGLE_BACKTICKS.findall(text)])
    }
    assert found == {}


def test_kernel_files_begin_with_their_shapes():
    sources = (ROOT / "dashattn").rglob("*.py")
    kernels = [path for path in sources if re.search(r"^@(triton|gluon)\.jit", path.read_text(), re.MULTILINE)]
    assert len(kernels) > 15
    assert [path for path in kernels if "\nShapes" not in ast.get_docstring(ast.parse(path.read_text()))] == []
