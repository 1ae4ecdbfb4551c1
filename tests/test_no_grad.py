"""`no_grad` as a block and as a decorator: it holds where it was asked for, and nowhere else."""

import asyncio
import functools
import inspect
import sys
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

import pytest

import minitorch
from minitorch import is_grad_enabled, no_grad


def test_an_operation_inside_is_a_constant() -> None:
    x = minitorch.tensor([1.0])
    with no_grad():
        assert not (x * 2).requires_grad()
    assert (x * 2).requires_grad()


def test_one_instance_twice_and_an_exception() -> None:
    block = no_grad()
    with block, block:
        assert not is_grad_enabled()
    with pytest.raises(KeyError), block:
        raise KeyError
    assert is_grad_enabled()


def test_a_function_keeps_its_name_arguments_and_recursion() -> None:
    @no_grad()
    def factorial(n: int, *, one: int = 1) -> int:
        """n!"""
        assert not is_grad_enabled()
        return one if n < 2 else n * factorial(n - 1, one=one)

    assert factorial(5) == 120 and is_grad_enabled()
    assert (factorial.__name__, factorial.__doc__) == ("factorial", "n!")
    assert list(inspect.signature(factorial).parameters) == ["n", "one"]
    assert no_grad(is_grad_enabled)() is False  # without brackets, as in PyTorch


def test_methods_of_every_kind() -> None:
    class Model:
        @no_grad()
        def method(self) -> tuple[Any, bool]:
            return self, is_grad_enabled()

        @no_grad()
        @classmethod
        def of_class(cls) -> tuple[Any, bool]:
            return cls, is_grad_enabled()

        @staticmethod
        @no_grad()
        def static() -> bool:
            return is_grad_enabled()

    model = Model()
    assert model.method() == (model, False) and model.of_class() == (Model, False)
    assert model.static() is False and is_grad_enabled()


@pytest.mark.parametrize("wrong", [Generator, 3.0])
def test_what_is_no_function(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"no_grad decorates functions and methods, got \w+"):
        no_grad()(wrong)


def test_threads_do_not_meet() -> None:
    """One decorated function, one shared block; the threads leave in either order."""
    entered, first_has_left = threading.Barrier(2), threading.Event()
    block, seen = no_grad(), dict[str, list[bool]]()

    @no_grad()
    def work(name: str) -> bool:
        with block:
            entered.wait(10)
            if name == "second":
                first_has_left.wait(10)
            return is_grad_enabled()

    def run(name: str) -> None:
        inside = work(name)
        seen[name] = [inside, is_grad_enabled()]
        first_has_left.set()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": [False, True], "second": [False, True]}
    assert is_grad_enabled()


def test_a_thread_starts_with_gradients() -> None:
    seen: list[bool] = []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


# ----- generators -----


@no_grad()
def conversation(log: list[Any]) -> Generator[Any, Any, str]:
    try:
        log.append((yield is_grad_enabled()))
        yield is_grad_enabled()
    except ValueError:
        yield "caught", is_grad_enabled()
    finally:
        log.append(("closed", is_grad_enabled()))
    return "result"


def test_a_generator_and_its_caller_take_turns() -> None:
    log: list[Any] = []
    steps = conversation(log)
    assert inspect.isgeneratorfunction(conversation)
    assert next(steps) is False and is_grad_enabled()
    assert steps.send("sent") is False and is_grad_enabled()
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == "result"
    assert log == ["sent", ("closed", False)] and is_grad_enabled()


def test_exceptions_reach_a_generator() -> None:
    log: list[Any] = []
    steps = conversation(log)
    next(steps)
    assert steps.throw(ValueError()) == ("caught", False)
    steps.close()
    assert log == [("closed", False)]
    steps = conversation(log)
    next(steps)
    with pytest.raises(KeyError):
        steps.throw(KeyError())
    assert is_grad_enabled()


def test_blocks_of_two_generators_may_cross() -> None:
    def numbers() -> Iterator[bool]:
        with no_grad():
            yield is_grad_enabled()

    first, second = numbers(), numbers()
    assert [next(first), next(second)] == [False, False]
    assert list(first) == []
    assert not is_grad_enabled()  # the second is still inside its block
    assert list(second) == []
    assert is_grad_enabled()


# ----- coroutines -----


@no_grad()
async def coroutine() -> list[bool]:
    seen = [is_grad_enabled()]
    await asyncio.sleep(0)
    return [*seen, is_grad_enabled()]


def test_a_coroutine() -> None:
    async def main() -> None:
        task = asyncio.create_task(coroutine())
        await asyncio.sleep(0)  # the task is in the middle
        assert is_grad_enabled()
        assert await task == [False, False]
        assert list(await asyncio.gather(coroutine(), coroutine())) == [[False, False]] * 2
        assert is_grad_enabled()

    assert inspect.iscoroutinefunction(coroutine)
    asyncio.run(main())


def test_a_coroutine_that_is_driven_by_hand() -> None:
    steps = coroutine()
    steps.send(None)
    assert is_grad_enabled()
    with pytest.raises(StopIteration) as stop:
        steps.send(None)
    assert stop.value.value == [False, False] and is_grad_enabled()


def test_an_asynchronous_generator() -> None:
    log: list[Any] = []

    @no_grad()
    async def numbers() -> AsyncGenerator[Any, Any]:
        try:
            log.append((yield is_grad_enabled()))
            await asyncio.sleep(0)
            yield is_grad_enabled()
        except ValueError:
            yield "caught", is_grad_enabled()
        finally:
            log.append(("closed", is_grad_enabled()))

    async def main() -> None:
        assert [item async for item in numbers()] == [False, False]
        steps = numbers()
        assert await anext(steps) is False and is_grad_enabled()
        assert await steps.asend("sent") is False and is_grad_enabled()
        assert await steps.athrow(ValueError()) == ("caught", False)
        await steps.aclose()
        with pytest.raises(KeyError):
            steps = numbers()
            await anext(steps)
            await steps.athrow(KeyError())

    assert inspect.isasyncgenfunction(numbers)
    asyncio.run(main())
    assert log == [None, ("closed", False), "sent", ("closed", False), ("closed", False)]
    assert is_grad_enabled()


def test_an_asynchronous_generator_that_is_left_early() -> None:
    """The loop closes it once: at its end, or when nobody holds it any more."""
    complaints: list[Any] = []
    closed: list[bool] = []

    @no_grad()
    async def numbers() -> AsyncGenerator[bool, None]:
        try:
            while True:
                yield is_grad_enabled()
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            closed.append(is_grad_enabled())

    kept = []

    async def main(keeps: bool) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
        hooks = sys.get_asyncgen_hooks()
        steps = numbers()
        async for inside in steps:
            assert not inside and sys.get_asyncgen_hooks() == hooks
            break
        if keeps:
            kept.append(steps)
        del steps
        for _ in range(4):  # the loop closes it now if nobody holds it
            await asyncio.sleep(0)
        assert closed == ([] if keeps else [False, False])

    asyncio.run(main(True))
    assert complaints == [] and closed == [False]
    asyncio.run(main(False))
    assert complaints == [] and closed == [False, False] and is_grad_enabled()


def test_objects_that_are_called() -> None:
    class Coroutine:
        async def __call__(self) -> bool:
            await asyncio.sleep(0)
            return is_grad_enabled()

    class Steps:
        def __call__(self) -> Iterator[bool]:
            yield is_grad_enabled()

    class AsyncSteps:
        async def __call__(self) -> AsyncGenerator[bool, None]:
            yield is_grad_enabled()

    async def main() -> None:
        assert await no_grad()(Coroutine())() is False
        assert await no_grad()(functools.partial(Coroutine()))() is False
        assert [inside async for inside in no_grad()(AsyncSteps())()] == [False]

    asyncio.run(main())
    assert list(no_grad()(Steps())()) == [False] and is_grad_enabled()
