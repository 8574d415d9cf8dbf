"""What the project asks of its own files."""

import ast
from pathlib import Path

import pytest

from fewbits.core.registry import get_method, list_methods

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "fewbits").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small_and_documented(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400 and path.stem not in {"utils", "helpers", "common", "misc"}
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60 + len((ast.get_docstring(node) or "").splitlines()), node.name
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)


@pytest.mark.parametrize("name", list_methods())
def test_a_method_has_its_paper_its_test_and_its_page(name):
    method = get_method(name)
    assert method.paper.title and method.__doc__
    assert (ROOT / "tests/methods" / method.family() / f"test_{name}.py").is_file()
    assert (ROOT / "docs/methods" / method.family() / f"{name}.md").is_file()
    if method.baseline is not None:
        assert method.baseline in list_methods()
