"""Settings for every test: how hypothesis draws its examples, and the marks of the courses' tasks.

`deadline=None`, because the first example of a test may compile a kernel. Where `CI` is set the
examples are the same in every run, so that a failure there is a failure here.
"""

import os
import signal

import pytest
from hypothesis import settings

from tests.course_tasks import marks_of

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """Also where the tests run in the background, or under nohup, which tell programs to ignore
    them.
    """
    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            for mark in marks_of(item.path.stem, item.originalname):
                item.add_marker(mark)
            thorough = getattr(getattr(item.cls, "family", None), "thorough", ())
            if item.originalname in thorough or item.name in thorough:
                item.add_marker(pytest.mark.thorough)
