"""`ModuleList` and `Sequential`, beside PyTorch's."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import Linear, Module, ModuleList, Parameter, Scalar, Sequential


class Tagged(Module):
    """A module that can be told from others."""

    def __init__(self, tag: int) -> None:
        super().__init__()
        self.tag = tag
        self.weight = Parameter(Scalar(float(tag)))

    def forward(self, x: float) -> float:
        return 10 * x + self.tag


ANY: Any = ModuleList  # called with what it does not take


def tags(row: Any) -> list[int]:
    return [module.tag for module in row]


# Each is done to a list of modules, and to a plain list of their tags.
CHANGES: dict[str, Callable[[Any, int, Callable[[int], Any]], Any]] = {
    "append": lambda row, i, make: row.append(make(50)),
    "insert": lambda row, i, make: row.insert(i, make(51)),
    "extend": lambda row, i, make: row.extend([make(52), make(53)]),
    "delete": lambda row, i, make: row.__delitem__(i),
    "delete slice": lambda row, i, make: row.__delitem__(slice(i, None, 2)),
    "set": lambda row, i, make: row.__setitem__(i, make(54)),
    "pop": lambda row, i, make: row.pop(i),
    "add": lambda row, i, make: row.__iadd__([make(55)]),
}


@pytest.mark.parametrize("kind", [ModuleList, Sequential])
@settings(max_examples=40)
@given(st.integers(0, 4), st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(-5, 5))))
def test_like_a_list(kind: Any, size: int, changes: list[tuple[str, int]]) -> None:
    made = [Tagged(number) for number in range(size)]
    row = ModuleList(made) if kind is ModuleList else Sequential(*made)
    plain = list(range(size))
    for name, index in changes:
        failed = []
        for target, make in ((row, Tagged), (plain, lambda tag: tag)):
            try:
                CHANGES[name](target, index, make)
            except IndexError:
                failed.append(target)
        assert len(failed) in (0, 2)
        assert tags(row) == plain and len(row) == len(plain)
        assert list(row._modules) == [str(n) for n in range(len(plain))]
    assert tags(row[1:]) == plain[1:] and tags(row[::-2]) == plain[::-2]
    assert type(row[:1]) is kind and tags(row[:].__add__([Tagged(9)])) == [*plain, 9]
    if plain:
        assert row[-1].tag == plain[-1] and row[np.int64(0)].tag == plain[0]
        assert row[0] in row and Tagged(plain[0]) not in row


def test_names_modes_and_moves() -> None:
    class Model(Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = ModuleList([Linear(2, 3), Linear(3, 1, bias=False)])

    model = Model()
    assert [name for name, _ in model.named_parameters()] == [
        "layers.0.weights",
        "layers.0.bias",
        "layers.1.weights",
    ]
    model.eval()
    assert not model.layers[1].training
    model.load_state_dict(model.state_dict())
    model.to(np.float32)
    assert {p.value.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    assert repr(model.layers) == "ModuleList(\n  (0): Linear()\n  (1): Linear()\n)"
    with pytest.raises(NotImplementedError, match="ModuleList defines no forward"):
        model.layers(1)


def test_sequential_beside_pytorch() -> None:
    torch = pytest.importorskip("torch")
    ours = Sequential(Linear(3, 4), minitorch.ReLU.apply, Sequential(Linear(4, 2)))
    theirs = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(4, 2))
    ).double()
    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    assert [name.replace("weights", "weight") for name, _ in ours.named_parameters()] == list(state)
    for name, parameter in ours.named_parameters():
        array = state[name.replace("weights", "weight")]
        parameter.load(array.T if array.ndim == 2 else array)
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(
        ours(minitorch.tensor(x)).to_numpy(), theirs(torch.tensor(x)).detach()
    )
    for part in (slice(1, None), slice(-1, None)):
        kept = [name for name, _ in theirs[part].named_parameters()]
        assert [n.replace("weights", "weight") for n, _ in ours[part].named_parameters()] == kept
    assert ours[2:].append(Linear(2, 2))[1].in_size == 2  # in PyTorch, it would replace the first


def test_sequential_with_names() -> None:
    row = Sequential(OrderedDict(first=Tagged(1), second=Tagged(2)))
    assert row(0) == 12 and row.second.tag == 2
    assert [name for name, _ in row.named_parameters()] == ["first.weight", "second.weight"]
    row[0] = Tagged(3)
    assert row.first.tag == 3 and row(0) == 32
    row.append(Tagged(4))
    assert row(0) == 324 and list(row._modules) == ["first", "second", "2"]
    for name in ("", "a.b", "training", "forward", 3):
        with pytest.raises(ValueError, match="a name of a module must be new and without a dot"):
            Sequential({name: Tagged(1)})
    assert Sequential()(7) == 7


def test_copies_have_modules_of_their_own() -> None:
    row = ModuleList([Tagged(1), Tagged(2)])
    for other in (copy.copy(row), copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        other.append(Tagged(3))
        assert tags(other) == [1, 2, 3] and tags(row) == [1, 2]
        assert other[0].weight is not row[0].weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ANY([3]), "ModuleList holds modules, got int"),
        (lambda: ANY([Linear]), "got the class Linear: make one"),
        (lambda: ANY([abs]), "ModuleList holds modules, got builtin_function_or_method"),
        (lambda: ModuleList(Linear(1, 1)), "modules must be several modules, got Linear"),
        (lambda: Sequential(Linear), "got the class Linear: make one"),
        (lambda: Sequential([Linear(1, 1)]), "Sequential holds modules, got list"),
        (lambda: ANY([Tagged(1)])["0"], "indexed by whole numbers and slices, got str"),
        (lambda: ANY([Tagged(1)])[1.0], "indexed by whole numbers and slices, got float"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_wrong_module_changes_nothing() -> None:
    row = ModuleList([Tagged(1)])
    with pytest.raises(TypeError):
        row.extend([Tagged(2), 3])
    with pytest.raises(TypeError):
        row.insert(0, 3)
    assert tags(row) == [1]
    with pytest.raises(IndexError, match="index 1 is out of range for 1 modules"):
        row[1]
