"""Attention of PyTorch tensors of every kind, under its transforms, and what is said of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitorch
from tests.torch_calls import draw, gradients, inputs, reference, torch

flash_attention = minitorch.flash_attention
NOT_TWICE = "a first derivative and no second"
NOT_FORWARD = "no forward-mode derivative"


# ----- tensors of every kind -----


class Mine(torch.Tensor):  # type: ignore[misc]
    """A subclass that has nothing of its own."""


class Recording(torch.Tensor):  # type: ignore[misc]
    """A subclass that answers by itself."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function, len(args), kwargs


def test_subclasses() -> None:
    q, k, v = inputs()
    expected = flash_attention(q, k, v)
    out = flash_attention(q.detach().as_subclass(Mine), k, v)
    assert type(out) is Mine
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)
    assert k.grad is None
    out.sum().backward()
    assert k.grad is not None
    mask = torch.ones(3, 5, dtype=torch.bool).as_subclass(Mine)
    assert all(type(x) is Mine for x in flash_attention(q, k, v, attn_mask=mask, return_lse=True))
    parameters = [torch.nn.Parameter(x.detach()) for x in (q, k, v)]
    out = flash_attention(*parameters)
    assert type(out) is torch.Tensor and out.requires_grad
    assert minitorch.as_tensor(q.detach().as_subclass(Mine)).shape == (2, 3, 4)
    answer = flash_attention(q, k.detach().as_subclass(Recording), v, is_causal=True)
    assert answer == (flash_attention, 3, {"is_causal": True})


def test_signs_that_torch_keeps_aside() -> None:
    x = torch.complex(draw(2, 3, 4, grad=False), draw(2, 3, 4, seed=1, grad=False)).conj().imag
    assert x.is_neg()
    plain = x.resolve_neg().clone()
    torch.testing.assert_close(flash_attention(x, x, x), reference(plain, plain, plain))
    for convert in (minitorch.as_tensor, minitorch.from_dlpack):
        np.testing.assert_array_equal(convert(x).to_numpy(), plain.numpy())
    q, k, v = inputs()
    mask = x[..., :1].expand(2, 3, 5)
    assert mask.is_neg()
    ours = flash_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, reference(q, k, v, attn_mask=mask))
    a, b = (torch.autograd.grad(f(q, k, v), q, x)[0] for f in (flash_attention, reference))
    torch.testing.assert_close(a, b)
    arrays = [y.detach().numpy() for y in (q, k, v)]
    np.testing.assert_allclose(
        flash_attention(*arrays, attn_mask=mask), ours.detach().numpy(), rtol=1e-12
    )


@pytest.mark.parametrize("kind", ["transposed", "expanded", "strided", "empty batch", "no queries"])
def test_layouts(kind: str) -> None:
    x = draw(2, 4, 3, 6)
    view: Callable[[Any], Any] = {
        "transposed": lambda x: x.permute(0, 2, 1, 3),
        "expanded": lambda x: x[:1, :1].expand(3, 2, 3, 6),
        "strided": lambda x: x[:, ::2, :, 1::2],
        "empty batch": lambda x: x[:0],
        "no queries": lambda x: x[:, :, :0],
    }[kind]

    def both(f: Callable[..., Any]) -> Any:
        return gradients(lambda y: f(view(y), view(y), view(y)), x)[0]

    torch.testing.assert_close(both(flash_attention), both(reference))


def test_rows_without_keys() -> None:
    q, k = draw(2, 3, 4), draw(2, 0, 4)
    out = flash_attention(q, k, k)
    assert not out.any()
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k))] == [q.shape, k.shape]


@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (2, 1, 5), (1, 2, 3, 5)])
def test_gradients_of_masks(shape: tuple[int, ...]) -> None:
    leaves = inputs(1)
    mask = draw(*shape, seed=9)
    ours, theirs = (
        gradients(lambda q, k, v, m, f=f: f(q, k, v, attn_mask=m), *leaves, mask)
        for f in (flash_attention, reference)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    small = mask.detach().float().requires_grad_()
    (grad,) = torch.autograd.grad(flash_attention(*leaves, attn_mask=small).sum(), small)
    assert grad.dtype == torch.float32 and grad.shape == shape


def test_masks_of_numpy() -> None:
    q, k, v = inputs()
    kept = np.random.default_rng(0).random((3, 5)) < 0.6
    kept[:, 0] = True
    added = np.random.default_rng(1).normal(size=(3, 5))
    for mask in (kept, added, added.astype(">f4"), np.broadcast_to(added[:1], (3, 5))):
        native = torch.tensor(np.array(mask, mask.dtype.newbyteorder("=")))
        given = mask.copy()
        out = flash_attention(q, k, v, attn_mask=given)
        given[:] = 0  # what backward needs is a copy
        expected = flash_attention(q, k, v, attn_mask=native)
        ours, theirs = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))
        for a, b in zip((out, *ours), (expected, *theirs), strict=True):
            torch.testing.assert_close(a, b)
    tensor = minitorch.tensor(added)
    with pytest.raises(TypeError, match=r"attn_mask .* minitorch\.Tensor that requires"):
        flash_attention(q, k, v, attn_mask=tensor)
    torch.testing.assert_close(
        flash_attention(q, k, v, attn_mask=tensor.detach()),
        flash_attention(q, k, v, attn_mask=torch.tensor(added)),
    )


def test_dtypes_stay_inside_autocast() -> None:
    q, k, v = (x.float() for x in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = flash_attention(q, k, v, return_lse=True)
        assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
        (grad,) = torch.autograd.grad(out.sum() + lse.sum(), q)
    assert grad.dtype == torch.float32
    with torch.device("meta"):  # the default for new tensors
        assert flash_attention(q, k, v, dropout_p=0.5).device.type == "cpu"


# ----- torch.func -----


def test_function_transforms() -> None:
    leaves = [*inputs(), draw(3, 5, seed=7)]

    def loss(f: Callable[..., Any]) -> Any:
        return lambda q, k, v, m: (f(q, k, v, attn_mask=m) ** 2).sum()

    numbers = (0, 1, 2, 3)
    transforms: list[Callable[[Any], Any]] = [
        lambda f: torch.func.grad(loss(f), argnums=numbers)(*leaves),
        lambda f: torch.func.jacrev(lambda *x: f(*x[:3], attn_mask=x[3]), argnums=numbers)(*leaves),
        lambda f: torch.func.vjp(lambda *x: f(*x[:3], attn_mask=x[3]), *leaves)[1](leaves[0]),
    ]
    for transform in transforms:
        for ours, theirs in zip(transform(flash_attention), transform(reference), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_functional_call() -> None:
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    x = draw(2, 3, 4, grad=False)

    def loss(parameters: Any, f: Callable[..., Any]) -> Any:
        y = torch.func.functional_call(layer, parameters, (x,))
        return f(y, y, y).sum()

    ours, theirs = (
        torch.func.grad(loss)(dict(layer.named_parameters()), f)
        for f in (flash_attention, reference)
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize(
    "dims",
    [(0, 0, 0, 0), (0, None, None, None), (1, 0, None, None), (None, None, 0, 0), (-1, 0, 2, 1)],
)
def test_vmap(dims: Any) -> None:
    shared = [*inputs(grad=False), draw(3, 5, seed=7, grad=False)]
    mapped = [
        x if d is None else draw(6, *x.shape, seed=n, grad=False).movedim(0, d)
        for n, (x, d) in enumerate(zip(shared, dims, strict=True))
    ]
    found = []
    for f in (flash_attention, reference):

        def call(q: Any, k: Any, v: Any, m: Any, f: Any = f) -> Any:
            return f(q, k, v, attn_mask=m)

        per_sample = torch.func.grad(lambda *x: (call(*x) ** 2).sum(), argnums=(0, 1, 2, 3))
        out = torch.vmap(call, in_dims=dims)(*mapped)
        found.append((out, *torch.vmap(per_sample, in_dims=dims)(*mapped)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nested_vmap_inside_autograd() -> None:
    q, (_, k, v) = draw(2, 3, 2, 3, 4), inputs()

    def twice(f: Callable[..., Any]) -> Any:
        inner = torch.vmap(f, in_dims=(0, None, None))
        return lambda q, k, v: torch.vmap(inner, in_dims=(0, None, None))(q, k, v)

    ours, theirs = (gradients(twice(f), q, k, v) for f in (flash_attention, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_and_dropout() -> None:
    q, k, v = inputs()

    def call(x: Any) -> Any:
        return flash_attention(x, k, v, dropout_p=0.5, seed=7)

    batch = torch.stack([q, q]).detach()
    first, second = torch.vmap(call, randomness="different")(batch)
    assert not torch.equal(first, second)
    for randomness in ("same", "error"):
        with pytest.raises(RuntimeError, match="randomness='different'"):
            torch.vmap(call, randomness=randomness)(batch)
    # A Jacobian is of one forward pass, hence of one mask.
    jacobian = torch.func.jacrev(call)(q)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(call, q))
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap"):
        torch.autograd.functional.jacobian(call, q, vectorize=True)


# ----- torch.compile -----


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_compiled_around_the_call() -> None:
    graphs: list[list[str]] = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append([node.name for node in module.graph.nodes])
        return module.forward

    def model(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(q * 2, k, v, is_causal=True).sin()

    leaves = inputs()
    compiled = torch.compile(model, backend=backend)
    for ours, theirs in zip(gradients(compiled, *leaves), gradients(model, *leaves), strict=True):
        assert torch.equal(ours, theirs)
    assert [any(name in graph for graph in graphs) for name in ("mul", "sin")] == [True, True]
    assert len(graphs) == 2
    whole = torch.compile(lambda q: flash_attention(q, q, q), backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match="disable"):
        whole(leaves[0])


# ----- what is said -----

WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int32": (lambda x: x.int(), "dtype .* got int32"),
    "complex64": (lambda x: x.to(torch.complex64), "dtype .* got complex64"),
    "float16": (lambda x: x.half(), "dtype .* got float16"),
    "bfloat16": (lambda x: x.bfloat16(), "dtype .* got bfloat16"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "dtype .* got float8_e4m3fn"),
    "sparse": (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
    "meta": (lambda x: x.to("meta"), "got device meta"),
    "list": (lambda x: x.tolist(), "got list"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_errors_name_the_argument(kind: str, name: str) -> None:
    make, text = WRONG[kind]
    q, k, v = inputs(grad=False)
    arguments = {"query": q, "key": k, "value": v, "attn_mask": draw(3, 5, grad=False)}
    arguments[name] = make(arguments[name])
    with pytest.raises((TypeError, ValueError), match=f"{name} .*{text}"):
        flash_attention(**arguments)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_errors_of_mixtures() -> None:
    q, k, v = inputs(grad=False)
    tensor = minitorch.tensor(q.numpy())
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, as query is, got numpy"):
        flash_attention(q, k.numpy(), v)
    with pytest.raises(TypeError, match=r"value must be a torch\.Tensor.* got minitorch\.Tensor"):
        flash_attention(q, k, tensor)
    with pytest.raises(TypeError, match=r"key must be a .*Tensor, got torch\.Tensor"):
        flash_attention(tensor, k, tensor)
    with pytest.raises(TypeError, match=r"attn_mask .* got torch\.Tensor"):
        tensor.flash_attention(tensor, tensor, attn_mask=q[0, :, :3])
    with pytest.raises(TypeError, match="one dtype, got float64, float32, float64"):
        flash_attention(q, k.float(), v)
    with pytest.raises(TypeError, match="no option causal"):
        flash_attention(q, k, v, causal=True)
    with pytest.raises(ValueError, match=r"x is .* requires? grad"):
        minitorch.as_tensor(q.clone().requires_grad_())
    mode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode()
    with mode:
        fake = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="x has no elements in memory"):
        minitorch.as_tensor(fake)
    with pytest.raises(ValueError, match="query has no elements in memory"):
        flash_attention(fake, fake, fake)
