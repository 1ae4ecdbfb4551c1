"""Layers and functions of networks against PyTorch's, as courses compare them: float32, 1e-5."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given

import minitorch
from minitorch import Parameter, Tensor, TensorBackend
from minitorch.testing import tensors

Array = npt.NDArray[Any]
FAST = TensorBackend(minitorch.FastOps)
BACKENDS = {"simple": TensorBackend(minitorch.SimpleOps), "fast": FAST}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def close(ours: Tensor | None, theirs: Any, atol: float = 1e-5) -> None:
    """Compare one of our tensors with one of PyTorch's."""
    assert ours is not None
    np.testing.assert_allclose(ours.to_numpy(), theirs.detach().numpy(), rtol=1e-5, atol=atol)


def leaf(array: Any, backend: TensorBackend = FAST) -> Tensor:
    """A float32 tensor that collects a gradient."""
    return minitorch.tensor_from_numpy(np.asarray(array, np.float32), backend, True)


def give(parameter: Parameter | None, theirs: Any) -> None:
    """Set a parameter to the values of one of PyTorch's."""
    assert parameter is not None
    parameter.value = leaf(theirs.detach().numpy(), parameter.value.backend)


# ----- MiniTorch's module 4 -----


@given(tensors((1, 1, 4, 6)))
def test_tiles_and_pooling(x: Tensor) -> None:
    tiles, height, width = minitorch.tile(x, (2, 3))
    assert tiles.shape == (1, 1, 2, 2, 6) and (height, width) == (2, 2)
    first = x.to_numpy()[0, 0, :2, :3]
    assert np.array_equal(tiles.to_numpy()[0, 0, 0, 0], first.reshape(-1))
    assert minitorch.avgpool2d(x, (2, 3))[0, 0, 0, 0] == pytest.approx(first.mean(), abs=1e-6)
    assert minitorch.maxpool2d(x, (2, 3))[0, 0, 0, 0] == first.max()


def test_a_kernel_that_does_not_divide_the_image() -> None:
    with pytest.raises(ValueError, match="must divide"):
        minitorch.tile(minitorch.zeros((1, 1, 4, 6)), (3, 3))


@each_backend
def test_argmax_and_ties(backend: str) -> None:
    x = minitorch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]], backend=BACKENDS[backend])
    assert minitorch.argmax(x, 1).to_numpy().tolist() == [[0, 1, 0], [1, 1, 0]]
    minitorch.max(x, 1).sum().backward()
    assert x.grad is not None and x.grad.to_numpy().tolist() == [[0, 1, 0], [1, 1, 0]]


@each_backend
def test_dropout_function(backend: str) -> None:
    x = minitorch.rand((100,), BACKENDS[backend]) + 1.0
    assert np.array_equal(minitorch.dropout(x, 0.0).to_numpy(), x.to_numpy())
    assert not minitorch.dropout(x, 1.0).to_numpy().any()
    assert minitorch.dropout(x, 1.0, ignore=True) is x
    half = minitorch.dropout(x, 0.5).to_numpy()
    kept = half != 0
    assert 20 < kept.sum() < 80 and np.array_equal(half[kept], x.to_numpy()[kept])


@each_backend
def test_softmax_of_extremes(backend: str) -> None:
    x = minitorch.tensor([[1e4, -1e4, 1e4], [-np.inf] * 3], backend=BACKENDS[backend])
    assert minitorch.softmax(x, 1).to_numpy().tolist() == [[0.5, 0, 0.5], [0, 0, 0]]
    sums = minitorch.logsumexp(x, 1).to_numpy()
    assert sums[0, 0] == pytest.approx(1e4 + np.log(2)) and sums[1, 0] == -np.inf


# ----- the transformer course -----


@pytest.mark.parametrize("shape", [(2, 5), (64, 128), (3, 4, 8)])
def test_gelu_and_logsumexp(shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    pairs: list[tuple[Any, Any]] = [
        (minitorch.GELU, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        (lambda x: minitorch.logsumexp(x, 1), lambda x: torch.logsumexp(x, 1, keepdim=True)),
    ]
    for ours, theirs in pairs:
        x, y = leaf(array), torch.tensor(array, requires_grad=True)
        close(ours(x), theirs(y))
        ours(x).sum().backward()
        theirs(y).sum().backward()
        close(x.grad, y.grad)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("classes", [2, 128, 10000])
def test_softmax_loss(batch: int, classes: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    array = rng.normal(size=(batch, classes)).astype(np.float32)
    target = rng.integers(0, classes, batch)
    x, y = leaf(array), torch.tensor(array, requires_grad=True)
    loss = minitorch.softmax_loss(x, leaf(target))
    theirs = torch.nn.functional.cross_entropy(y, torch.tensor(target), reduction="none")
    close(loss, theirs)
    loss.sum().backward()
    theirs.sum().backward()
    close(x.grad, y.grad)


def test_one_hot_and_bad_classes() -> None:
    rows = minitorch.one_hot(minitorch.tensor([[2.0, 0.0]]), 3)
    assert rows.to_numpy().tolist() == [[[0, 0, 1], [1, 0, 0]]]
    for bad in (3.0, -1.0, 0.5):
        with pytest.raises(ValueError, match="whole numbers from 0 to 2"):
            minitorch.one_hot(minitorch.tensor([bad]), 3)
        with pytest.raises(ValueError, match="target must hold"):
            minitorch.softmax_loss(minitorch.zeros((1, 3)), minitorch.tensor([bad]))


def test_embedding() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Embedding(20, 7)
    ours = minitorch.Embedding(num_embeddings=20, embedding_dim=7, backend=FAST)
    give(ours.weights, theirs.weight)
    ids = np.random.default_rng(0).integers(0, 20, (3, 11))
    out, expected = ours(leaf(ids)), theirs(torch.tensor(ids))
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    close(ours.weights.value.grad, theirs.weight.grad)
    with pytest.raises(ValueError, match="from 0 to 19"):
        ours(leaf([[20.0]]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(64,), (2, 5)])
def test_linear(bias: bool, rows: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Linear(32, 16, bias=bias)
    ours = minitorch.Linear(in_size=32, out_size=16, bias=bias, backend=FAST)
    give(ours.weights, theirs.weight.T)
    array = np.random.default_rng(0).normal(size=(*rows, 32)).astype(np.float32)
    x, y = leaf(array), torch.tensor(array, requires_grad=True)
    if bias:
        give(ours.bias, theirs.bias)
    else:
        assert ours.bias is None
    out, expected = ours(x), theirs(y)
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    close(x.grad, y.grad)
    close(ours.weights.value.grad, theirs.weight.grad.T)
    if ours.bias is not None:
        close(ours.bias.value.grad, theirs.bias.grad)


def test_linear_wants_a_bias_that_is_true_or_false() -> None:
    with pytest.raises(TypeError, match=r"bias must be True or False.*write backend="):
        minitorch.Linear(7, 2, FAST)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"bias must be True or False, got 0\.5"):
        minitorch.Linear(7, 2, 0.5)  # type: ignore[arg-type]
    assert minitorch.Linear(7, 2, np.False_, FAST).bias is None  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [3, 128])
def test_layer_norm(dim: int) -> None:
    torch = pytest.importorskip("torch")
    ours, theirs = minitorch.LayerNorm1d(dim, 1e-5, FAST), torch.nn.LayerNorm(dim, 1e-5)
    array = np.random.default_rng(0).normal(size=(9, dim)).astype(np.float32)
    x, y = leaf(array), torch.tensor(array, requires_grad=True)
    weights = np.random.default_rng(1).normal(size=(9, dim)).astype(np.float32)
    out, expected = ours(x), theirs(y)
    close(out, expected)
    out.backward(minitorch.tensor_from_numpy(weights, FAST))
    expected.backward(torch.tensor(weights))
    close(x.grad, y.grad)
    close(ours.weights.value.grad, theirs.weight.grad)
    close(ours.bias.value.grad, theirs.bias.grad)


def test_dropout_module() -> None:
    x = minitorch.ones((10, 10))
    state: Any = np.random.get_state()
    assert minitorch.Dropout(0.0)(x) is x
    after: Any = np.random.get_state()
    assert np.array_equal(after[1], state[1])
    layer = minitorch.Dropout(0.25)
    np.random.seed(10)
    out = layer(x).to_numpy()
    np.random.seed(10)
    expected = np.random.binomial(1, 0.75, (10, 10)) / 0.75
    np.testing.assert_allclose(out, expected)
    layer.eval()
    assert layer(x) is x


@pytest.mark.parametrize("rate", [2.0, -0.1, np.nan, np.inf, -np.inf, "0.5", None, 0.5j])
def test_what_is_no_probability(rate: Any) -> None:
    """One rule for every kind of dropout, and nothing is drawn or changed before it speaks."""
    x = minitorch.ones((1, 2, 2), FAST)
    layer = minitorch.Dropout(0.5)
    layer.p_dropout = rate
    before = minitorch.get_rng_state()
    calls: dict[str, Any] = {
        "rate": lambda: minitorch.dropout(x, rate),
        "rate is": lambda: minitorch.dropout(x, rate, ignore=True),
        "p_dropout": lambda: minitorch.Dropout(rate),
        "p_dropout is": lambda: layer(x),
        "p_dropout is ": lambda: minitorch.MultiHeadAttention(2, 1, p_dropout=rate),
        "dropout_p": lambda: x.flash_attention(x, x, dropout_p=rate),
        "dropout_p is": lambda: minitorch.attention_dropout_mask((2, 2), rate),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=name):
            call()
    after = minitorch.get_rng_state()
    before.pop("python"), after.pop("python")  # the projections' weights are drawn first
    assert before == after


def test_rates_that_are_probabilities() -> None:
    x = minitorch.ones((200,), FAST)
    rates: tuple[Any, ...] = (0, 1, 0.0, 1.0, np.float32(0.5), np.float64(0.5), np.int64(1))
    for rate in rates:
        share = float(minitorch.dropout(x, rate).mean().item())
        assert share == pytest.approx(1 - float(rate), abs=0.2)
        assert minitorch.Dropout(rate)(x).mean().item() == pytest.approx(float(rate < 1), abs=0.4)


def give_attention(ours: minitorch.MultiHeadAttention, theirs: Any) -> None:
    """Set the four projections to those of torch.nn.MultiheadAttention."""
    parts = theirs.in_proj_weight.chunk(3)
    for layer, weight in zip(
        (ours.q_projection, ours.k_projection, ours.v_projection), parts, strict=True
    ):
        give(layer.weights, weight.T)
    give(ours.out_projection.weights, theirs.out_proj.weight.T)


@pytest.mark.parametrize(
    ("batch", "length", "width", "heads"), [(1, 2, 64, 1), (4, 33, 64, 4), (2, 128, 32, 2)]
)
def test_multi_head_attention(batch: int, length: int, width: int, heads: int) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    ours = minitorch.MultiHeadAttention(width, heads, True, 0.0, bias=False, backend=FAST)
    give_attention(ours, theirs)
    array = np.random.default_rng(0).random((batch, length, width)).astype(np.float32)
    x, y = leaf(array), torch.tensor(array, requires_grad=True)
    mask = torch.triu(torch.full((length, length), -torch.inf), 1)
    out, (expected, _) = ours(x), theirs(y, y, y, attn_mask=mask)
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    close(x.grad, y.grad)
    close(ours.out_projection.weights.value.grad, theirs.out_proj.weight.grad.T, atol=1e-4)
    for layer in (ours.q_projection, ours.k_projection, ours.v_projection):
        assert layer.weights.value.grad is not None


@pytest.mark.parametrize("fused", [False, True])
def test_transformer_layer(fused: bool) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(
        d_model=32, nhead=4, dim_feedforward=256, dropout=0.0, batch_first=True, norm_first=True,
        activation=lambda x: torch.nn.functional.gelu(x, approximate="tanh"), bias=False,
    )  # fmt: skip
    ours = minitorch.TransformerLayer(
        32, 4, p_dropout=0.0, ln_eps=1e-5, bias=False, backend=FAST, use_fused_kernel=fused
    )
    give_attention(ours.attention, theirs.self_attn)
    give(ours.ff.linear_in.weights, theirs.linear1.weight.T)
    give(ours.ff.linear_out.weights, theirs.linear2.weight.T)
    array = np.random.default_rng(0).normal(size=(2, 17, 32)).astype(np.float32)
    x, y = leaf(array), torch.tensor(array, requires_grad=True)
    mask = torch.triu(torch.full((17, 17), -torch.inf), 1)
    out, expected = ours(x), theirs(y, mask)
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    close(x.grad, y.grad)


@each_backend
def test_decoder(backend: str) -> None:
    model = minitorch.DecoderLM(
        n_vocab=10, n_embd=6, n_head=3, n_positions=8, n_layer=1, p_dropout=0.0,
        ln_eps=1e-5, bias=True, backend=BACKENDS[backend],
    )  # fmt: skip
    ids = minitorch.tensor([[1, 5, 9, 0]], backend=BACKENDS[backend])
    logits = model(ids)
    assert logits.shape == (1, 4, 10)
    logits.sum().backward()
    assert model.token_embeddings.weights.value.grad is not None
    assert model.position_embeddings.weights.value.grad is not None
    changed = model(minitorch.tensor([[1, 5, 9, 7]], backend=BACKENDS[backend])).to_numpy()
    np.testing.assert_allclose(changed[:, :3], logits.to_numpy()[:, :3], rtol=1e-12)


def test_the_classic_depth_is_four() -> None:
    model = minitorch.DecoderLM(10, 4, 2, 8, backend=FAST)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert {f"t_layer_{i}" for i in (1, 2, 3, 4)} <= names and "t_layer_5" not in names


@each_backend
def test_fused_softmax_and_layer_norm(backend: str) -> None:
    """What the kernel tests of the transformer course call."""
    f = BACKENDS[backend]
    rng = np.random.default_rng(0)
    x = minitorch.tensor(rng.normal(size=(2, 3, 4, 5)), f)
    for shape in ((2, 1, 1, 5), (1, 1, 4, 5)):
        mask = minitorch.tensor(np.where(rng.random(shape) < 0.3, -1e8, 0.0), f, False)
        before = x.to_numpy()
        out = x.attn_softmax(mask)
        expected = minitorch.softmax(x + mask, 3)
        np.testing.assert_allclose(out._tensor._storage, expected.to_numpy().reshape(-1))
        assert np.array_equal(x.to_numpy(), before)
        grads = minitorch.Attn_Softmax.backward(out.history.ctx, x)  # type: ignore[union-attr,arg-type]
        assert len(grads) == 2 and grads[0].shape == x.shape
    rows, gamma, beta = (minitorch.tensor(rng.normal(size=s), f) for s in ((6, 8), (8,), (8,)))
    out = rows.layernorm(gamma, beta)
    by_hand = gamma * minitorch.layer_norm(rows, 1e-8) + beta
    np.testing.assert_allclose(out.to_numpy(), by_hand.to_numpy(), rtol=1e-9)
    assert len(minitorch.LayerNorm.backward(out.history.ctx, rows)) == 3  # type: ignore[union-attr,arg-type]
    fused, var, mean = f.layernorm_fw(rows, gamma, beta)
    assert np.array_equal(fused.to_numpy(), out.to_numpy())
    np.testing.assert_allclose(var.to_numpy(), rows.to_numpy().var(1))
    assert len(f.layernorm_bw(rows, rows, gamma, beta, var, mean)) == 3
