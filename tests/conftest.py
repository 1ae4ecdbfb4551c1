"""Settings for every test: how hypothesis draws its examples, and the marks of the courses' tasks.

`deadline=None`, because the first example of a test may compile a kernel. Where `CI` is set the
examples are the same in every run, so that a failure there is a failure here.
"""

import os

import pytest
from hypothesis import settings

from tests.course_tasks import marks_of

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            for mark in marks_of(item.path.stem, item.originalname):
                item.add_marker(mark)
            thorough = getattr(getattr(item.cls, "family", None), "thorough", ())
            if item.originalname in thorough or item.name in thorough:
                item.add_marker(pytest.mark.thorough)
