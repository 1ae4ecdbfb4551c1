"""Modules: filing, walking, names, saving and loading."""

from typing import Any

import numpy as np
import pytest

from minitorch.datasets import Graph, datasets
from minitorch.factories import tensor
from minitorch.module import Module, Parameter
from minitorch.scalar import Scalar


class Leaf(Module):
    weight: Any

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(tensor([[1.0, 2.0, 3.0]]))
        self.bias: Parameter | None = None
        self.size = 3

    def forward(self, x: Any, factor: float = 1) -> Any:
        return x * factor


class Tree(Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = Leaf()
        self.right = Leaf()
        self.scale = Parameter(Scalar(2.0), name="scale")
        self.add_parameter("extra_0", 5)


def test_names_and_order() -> None:
    names = [name for name, _ in Tree().named_parameters()]
    assert names == ["scale", "extra_0", "left.weight", "right.weight"]


def test_a_shared_parameter_is_listed_once() -> None:
    tree = Tree()
    tree.right.weight = tree.left.weight
    assert len(tree.parameters()) == 3
    assert {"left.weight", "right.weight"} <= set(tree.state_dict())


def test_a_name_stands_for_one_thing() -> None:
    leaf = Leaf()
    leaf.weight = None
    assert leaf.parameters() == [] and leaf.weight is None
    leaf.weight = Parameter(1.0)
    leaf.weight = Leaf()
    assert [type(m) for m in leaf.modules()] == [Leaf]
    assert [name for name, _ in leaf.named_parameters()] == ["weight.weight"]
    del leaf.weight
    assert leaf.modules() == []


def test_unknown_names_are_missing() -> None:
    leaf = Leaf()
    assert leaf.bias is None and not hasattr(leaf, "__array__") and not hasattr(leaf, "nonsense")
    with pytest.raises(AttributeError, match="Leaf has no attribute wieght: did you mean weight"):
        _ = leaf.wieght
    with pytest.raises(AttributeError, match="Leaf has no attribute siz: did you mean size"):
        _ = leaf.siz
    with pytest.raises(AttributeError, match=r"Leaf has no attribute x$"):
        _ = leaf.x
    assert getattr(leaf, "nonsense", 5) == 5


def test_a_plain_list_of_layers_is_refused() -> None:
    """It would not be trained, saved or moved."""
    for container, kind in (
        ([Leaf()], "list of modules"),
        ((1, (Leaf(),)), "tuple of modules"),
        ({"a": {"b": Parameter(1.0)}}, "dict of parameters"),
        ({Leaf()}, "set of modules"),
    ):
        tree = Tree()
        with pytest.raises(TypeError, match=f"Tree.layers is a {kind}, which would not be trained"):
            tree.layers = container
        assert not hasattr(tree, "layers")


def test_a_list_that_grows_is_noticed() -> None:
    tree = Tree()
    tree.layers = []
    assert len(tree.parameters()) == 4
    tree.layers.append(Leaf())
    for call in (
        tree.parameters,
        tree.state_dict,
        tree.zero_grad,
        lambda: tree.load_state_dict({}),
    ):
        with pytest.raises(TypeError, match=r"Tree.layers is a list of modules.*ModuleList"):
            call()


def test_lists_that_may_be_kept() -> None:
    tree = Tree()
    tree.weights = [[tree.add_parameter(f"w_{i}", Scalar(float(i)))] for i in range(3)]
    tree.leaves = (tree.left, tree.right)
    tree.deeper = {"weight": tree.left.weight}
    tree.data = [[0.0] * 10] * 1000
    around: list[Any] = []
    around.append(around)
    tree.around = around
    assert len(tree.parameters()) == 7


def test_super_init_must_come_first() -> None:
    class Hasty(Module):
        def __init__(self) -> None:
            self.weight = Parameter(1.0)

    with pytest.raises(AttributeError, match=r"super\(\).__init__\(\)"):
        Hasty()


def test_train_and_eval_reach_every_module() -> None:
    tree = Tree()
    tree.eval()
    assert not tree.training and not tree.left.training
    tree.train()
    assert tree.training and tree.right.training


def test_calling_a_module() -> None:
    assert Leaf()(2, factor=3) == 6
    with pytest.raises(NotImplementedError, match="Module defines no forward"):
        Module()()


def test_repr_shows_the_tree() -> None:
    assert repr(Leaf()) == "Leaf()"
    assert repr(Tree()) == "Tree(\n  (left): Leaf()\n  (right): Leaf()\n)"


def test_a_parameter_tells_its_value_to_require_a_gradient() -> None:
    value = tensor([1.0], requires_grad=False)
    parameter = Parameter(value, name="w")
    assert value.requires_grad() and value.name == "w"
    assert repr(parameter) == repr(value) and str(parameter) == str(value)


def test_zero_grad() -> None:
    tree = Tree()
    (tree.left.weight.value.sum()).backward()
    (tree.scale.value * 2).backward()
    tree.zero_grad()
    assert tree.left.weight.value.grad is None
    assert tree.scale.value.derivative is None


def test_state_dict_goes_around() -> None:
    source, target = Tree(), Tree()
    source.left.weight.update(tensor([[7.0, 8.0, 9.0]]))
    source.scale.update(Scalar(-1.0))
    state = source.state_dict()
    target.load_state_dict(state)
    state["left.weight"][:] = 0  # a copy on both sides
    assert source.left.weight.value.to_numpy().tolist() == [[7.0, 8.0, 9.0]]
    assert target.left.weight.value.to_numpy().tolist() == [[7.0, 8.0, 9.0]]
    assert target.left.weight.value.requires_grad()
    assert target.scale.value.data == -1.0


def test_loading_keeps_the_dtype() -> None:
    leaf = Leaf()
    leaf.weight.update(tensor(np.zeros((1, 3), np.float32)))
    leaf.load_state_dict({"weight": np.ones((1, 3))})
    assert leaf.weight.value.dtype == np.float32


def test_a_long_list_of_misfits_is_cut() -> None:
    leaf = Leaf()
    with pytest.raises(ValueError, match=r"unexpected: a0, a1, a2 and 37 more$"):
        leaf.load_state_dict({**leaf.state_dict(), **{f"a{n}": np.ones(1) for n in range(40)}})


def test_loading_takes_arrays_of_any_layout() -> None:
    leaf = Leaf()
    leaf.weight.update(tensor(np.zeros((2, 3))))
    array = np.arange(6.0).reshape(3, 2).T
    leaf.load_state_dict({"weight": array})
    assert np.array_equal(leaf.weight.value.to_numpy(), array)


def test_loading_names_everything_that_is_wrong_and_changes_nothing() -> None:
    tree = Tree()
    state = {"left.weight": np.zeros((2, 2)), "scale": np.array(9.0), "nonsense": np.zeros(1)}
    with pytest.raises(ValueError) as error:
        tree.load_state_dict(state)
    for part in (
        "missing: extra_0, right.weight",
        "unexpected: nonsense",
        "left.weight has shape (2, 2), wanted (1, 3)",
    ):
        assert part in str(error.value)
    assert tree.scale.value.data == 2.0
    with pytest.raises(ValueError, match="shape"):
        tree.load_state_dict(state, strict=False)
    del state["left.weight"]
    tree.load_state_dict(state, strict=False)
    assert tree.scale.value.data == 9.0


@pytest.mark.parametrize("name", datasets)
def test_data_sets(name: str) -> None:
    graph = datasets[name](101)
    assert graph.N == len(graph.X) == len(graph.y) == 101
    assert set(graph.y) == {0, 1}
    assert all(0 <= x1 <= 1 and 0 <= x2 <= 1 for x1, x2 in graph.X)


def test_labels() -> None:
    label = {name: dict(zip(g.X, g.y, strict=True)) for name, g in _drawn().items()}
    for (x1, x2), y in label["Xor"].items():
        assert y == ((x1 < 0.5) != (x2 < 0.5))
    for (x1, _), y in label["Split"].items():
        assert y == (abs(x1 - 0.5) > 0.3)
    for (x1, x2), y in label["Diag"].items():
        assert y == (x1 + x2 < 0.5)


def _drawn() -> dict[str, Graph]:
    return {name: datasets[name](200) for name in ("Xor", "Split", "Diag")}
