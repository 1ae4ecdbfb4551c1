"""Every mark of the courses that `pyproject.toml` declares collects tests."""

import ast
import functools
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.course_tasks import TASKS, marks_of

FOLDER = Path(__file__).resolve().parent


@functools.cache
def all_tests() -> list[str]:
    return [
        f"{path.stem}::{node.name}"
        for path in FOLDER.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_declared_marks_are_those_of_the_table(pytestconfig: pytest.Config) -> None:
    declared = {str(line).split(":")[0] for line in pytestconfig.getini("markers")}
    assert {m for m in declared if m.startswith(("task", "a1_", "a2_"))} == set(TASKS)


@pytest.mark.parametrize("mark", TASKS)
def test_every_name_in_the_table_is_a_test(mark: str) -> None:
    known = all_tests()
    for pattern in TASKS[mark].split():
        assert any(fnmatchcase(test, pattern) for test in known), f"{mark}: no test {pattern}"


def test_collected_tests_have_their_marks(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        if isinstance(item, pytest.Function):
            wanted = set(marks_of(item.path.stem, item.originalname))
            assert wanted == {m.name for m in item.iter_markers()} & set(TASKS), item.nodeid


def test_marks_of_one_test() -> None:
    assert marks_of("test_scalar", "test_central_difference") == ["task1_1"]
    assert marks_of("test_scalar", "test_of_no_task") == []
