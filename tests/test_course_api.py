"""The names that courses' own tests use: where they are and what arguments they take."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np
import pytest

import minitorch

# Import path -> names, of MiniTorch's modules 0 to 4 and of the transformer course.
NAMES = {
    "minitorch": """
        Tensor TensorData TensorBackend SimpleBackend SimpleOps FastOps CudaOps CudaKernelOps
        UserShape UserIndex IndexingError Context History Function Scalar ScalarHistory
        ScalarFunction Module Parameter MathTest MathTestVariable tensor tensor_from_numpy rand
        zeros ones prod shape_broadcast central_difference derivative_check grad_check
        topological_sort backpropagate Conv1dFun Conv2dFun conv1d conv2d tensor_conv1d
        tensor_conv2d avgpool2d maxpool2d tile argmax Max max Softmax softmax LogSoftmax
        logsoftmax dropout GELU logsumexp one_hot softmax_loss layer_norm Attn_Softmax LayerNorm
        Embedding Dropout Linear LayerNorm1d MultiHeadAttention FeedForward TransformerLayer
        DecoderLM SGD Adam Optimizer datasets Graph make_pts operators scalar_functions testing
        version Neg Inv Add Mul PowerScalar Tanh Sigmoid ReLU Log Exp Sum All LT EQ IsClose
        Permute View Copy MatMul index_to_position to_index broadcast_index strides_from_shape
        MAX_DIMS _tensor zeros_tensor_from_numpy ones_tensor_from_numpy grad_central_difference
        Variable
    """,
    "minitorch.operators": """
        mul id add neg lt eq max is_close sigmoid relu log exp log_back inv inv_back relu_back pow
        tanh map zipWith reduce negList addLists sum prod EPS
    """,
    "minitorch.scalar_functions": """
        ScalarFunction ScalarHistory wrap_tuple unwrap_tuple Add Log Mul Inv Neg Sigmoid ReLU Exp
        LT EQ
    """,
    "minitorch.tensor_ops": """
        TensorOps TensorBackend SimpleOps SimpleBackend MapProto tensor_map tensor_zip
        tensor_reduce
    """,
    "minitorch.fast_ops": "FastOps tensor_map tensor_zip tensor_reduce tensor_matrix_multiply",
    "minitorch.cuda_ops": "CudaOps",
    "minitorch.cuda_kernel_ops": "CudaKernelOps",
    "minitorch.nn": "softmax dropout tile max argmax avgpool2d maxpool2d logsoftmax",
    "minitorch.tensor_functions": "ones zeros rand tensor tensor_from_numpy grad_check Function",
    "minitorch.modules_transfomer": "MultiHeadAttention FeedForward TransformerLayer DecoderLM",
    "minitorch.transformer": "MultiHeadAttention FeedForward TransformerLayer DecoderLM",
    "minitorch.testing": "MathTest MathTestVariable",
}

BACKEND = """
    neg_map sigmoid_map relu_map log_map exp_map id_map id_cmap inv_map tanh_map add_zip mul_zip
    lt_zip eq_zip is_close_zip relu_back_zip log_back_zip inv_back_zip pow_scalar_zip add_reduce
    mul_reduce max_reduce matrix_multiply attn_softmax_fw attn_softmax_bw layernorm_fw
    layernorm_bw cuda
"""

TENSOR = """
    requires_grad_ requires_grad to_numpy shape size dims item detach zeros _new make
    _ensure_tensor _type_ tuple expand zero_grad_ accumulate_derivative is_leaf is_constant
    parents chain_rule backward all is_close sigmoid relu log exp tanh sum mean var permute view
    contiguous attn_softmax layernorm flash_attention flash_attention_causal __pow__ __matmul__
    __getitem__ __setitem__ __rtruediv__
"""

# Leading arguments by name, as tests pass them.
SIGNATURES: list[tuple[Any, str]] = [
    (minitorch.Embedding, "num_embeddings embedding_dim backend"),
    (minitorch.Dropout, "p_dropout"),
    (minitorch.Linear, "in_size out_size bias backend"),
    (minitorch.LayerNorm1d, "dim eps backend"),
    (
        minitorch.MultiHeadAttention,
        "n_embd n_head causal p_dropout bias backend use_fused_kernel",
    ),
    (minitorch.FeedForward, "n_embd middle_dim p_dropout bias backend"),
    (
        minitorch.TransformerLayer,
        "n_embd n_head p_dropout ln_eps bias backend use_fused_kernel",
    ),
    (
        minitorch.DecoderLM,
        "n_vocab n_embd n_head n_positions p_dropout ln_eps bias backend use_fused_kernel",
    ),
    (minitorch.SGD, "parameters lr"),
    (minitorch.Adam, "parameters lr beta1 beta2 eps"),
    (minitorch.tensor, "ls backend requires_grad"),
    (minitorch.rand, "shape backend requires_grad"),
    (minitorch.tensor_from_numpy, "ls backend requires_grad"),
    (minitorch.dropout, "input rate ignore"),
    (minitorch.Scalar, "v back name"),
    (minitorch.TensorData, "storage shape strides"),
    (minitorch.Tensor, "v back name backend"),
    (minitorch.central_difference, "f vals arg epsilon"),
]


@pytest.mark.parametrize("path", NAMES)
def test_names(path: str) -> None:
    module = importlib.import_module(path)
    assert [name for name in NAMES[path].split() if not hasattr(module, name)] == []


def test_backend_and_tensor() -> None:
    for ops in (minitorch.SimpleOps, minitorch.FastOps, minitorch.CudaOps, minitorch.CudaKernelOps):
        backend = minitorch.TensorBackend(ops)
        assert [name for name in BACKEND.split() if not hasattr(backend, name)] == []
    x = minitorch.zeros((1,))
    assert [name for name in TENSOR.split() if not hasattr(x, name)] == []


@pytest.mark.parametrize(
    ("function", "names"), SIGNATURES, ids=lambda v: getattr(v, "__name__", "")
)
def test_signatures(function: Any, names: str) -> None:
    wanted = names.split()
    given = list(inspect.signature(function).parameters)
    assert given[: len(wanted)] == wanted


def test_importing_the_package_binds_numba_cuda() -> None:
    import numba

    assert numba.cuda.is_available() in (True, False)


def test_constants_inside_the_library_are_not_tracked() -> None:
    x = minitorch.tensor([1.0, 2.0])
    y = 3 * x + 1 - x.sum()
    leaves = [v for v in minitorch.topological_sort(y) if v.is_leaf()]
    assert leaves == [x] and leaves[0] is x


def test_topological_order() -> None:
    """Reversed depth-first, parents in argument order: a course's tests compare it."""
    a, b = minitorch.tensor([[0.5]]), minitorch.tensor([[0.25]])
    c = 3 * a * a + 4 * b * a - a
    values = [v.to_numpy().item() for v in reversed(list(minitorch.topological_sort(c)))]  # type: ignore[attr-defined]
    a3, b4 = 3 * 0.5, 4 * 0.25
    expected = [0.5, a3, a3 * 0.5, 0.25, b4, b4 * 0.5, a3 * 0.5 + b4 * 0.5, -0.5]
    np.testing.assert_allclose(values, [*expected, a3 * 0.5 + b4 * 0.5 - 0.5])


def test_is_close_takes_tensors() -> None:
    x = minitorch.tensor([1.0, 2.0])
    assert minitorch.operators.is_close(x, x + 0.001)  # type: ignore[arg-type]
    assert not minitorch.operators.is_close(x, x + 0.1)  # type: ignore[arg-type]
