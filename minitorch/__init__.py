"""MiniTorch with FlashAttention: tensors, autodiff, networks, and kernels to read.

Every public name is importable from here. `minitorch.datasets` is the dictionary of data sets, as
in MiniTorch, and hides the module of that name.
"""

# How thread pools wait must be set before they are loaded.
from . import threads as _threads  # isort: skip  # noqa: F401

# Binds numba.cuda, which numba does not do by itself: programs ask numba.cuda.is_available().
from .kernels.gpu import runtime as _runtime  # isort: skip  # noqa: F401

from . import (
    attention_masks,
    cuda,
    modules_transfomer,
    operators,
    scalar_functions,
    score_mods,
    testing,
)
from .attention import attention_dropout_mask
from .autodiff import (
    Context,
    Variable,
    backpropagate,
    central_difference,
    is_grad_enabled,
    no_grad,
    topological_sort,
)
from .block_mask import BlockMask, create_block_mask
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .containers import ModuleList, Sequential
from .cuda_kernel_ops import CudaKernelOps
from .cuda_ops import CudaOps, mm_practice, sum_practice
from .datasets import Graph, datasets, make_pts
from .dtypes import get_default_dtype, set_default_dtype
from .factories import (
    _tensor,
    ones,
    ones_tensor_from_numpy,
    rand,
    tensor,
    tensor_from_numpy,
    zeros,
    zeros_tensor_from_numpy,
)
from .fast_conv import (
    Conv1dFun,
    Conv2dFun,
    conv1d,
    conv2d,
    tensor_conv1d,
    tensor_conv2d,
)
from .fast_ops import FastOps
from .function import Function, History
from .fused_functions import Attn_Softmax, LayerNorm, LogSoftmax, LogSumExp, Softmax
from .grad_check import grad_central_difference, grad_check
from .grad_scaler import GradScaler
from .interop.foreign import as_tensor, flash_attention, from_dlpack
from .mask_functions import and_masks, create_mask, noop_mask, or_masks
from .module import Module, Parameter
from .modules_basic import Dropout, Embedding, LayerNorm1d, Linear
from .movement_functions import BroadcastTo, Concatenate, Copy, Permute, Slice, View
from .nn import (
    GELU,
    argmax,
    avgpool2d,
    dropout,
    layer_norm,
    logsoftmax,
    logsumexp,
    max,
    maxpool2d,
    one_hot,
    softmax,
    softmax_loss,
    tile,
)
from .operators import prod
from .optim import SGD, Adam, AdamW, CosineSchedule
from .optimizer import Optimizer, clip_grad_norm_
from .rng import get_rng_state, manual_seed, set_rng_state
from .scalar import Scalar, derivative_check
from .scalar_functions import ScalarFunction, ScalarHistory
from .score_mods import attention_sinks
from .tensor import Tensor, TensorLike
from .tensor_data import (
    MAX_DIMS,
    Index,
    IndexingError,
    OutIndex,
    Shape,
    Storage,
    Strides,
    TensorData,
    UserIndex,
    UserShape,
    UserStrides,
    broadcast_index,
    index_to_position,
    shape_broadcast,
    strides_from_shape,
    to_index,
)
from .tensor_functions import (
    EQ,
    LT,
    Add,
    All,
    Cast,
    Exp,
    FlashAttention,
    Inv,
    IsClose,
    Log,
    MaskedFill,
    MatMul,
    Max,
    Mul,
    Neg,
    PowerScalar,
    ReLU,
    Sigmoid,
    Sum,
    Tanh,
)
from .tensor_ops import MapProto, SimpleBackend, SimpleOps, TensorBackend, TensorOps
from .testing import MathTest, MathTestVariable
from .transformer import (
    DecoderLM,
    FeedForward,
    KeyValueCache,
    MultiHeadAttention,
    TransformerLayer,
)

version = "0.4"

__all__ = [
    "EQ",
    "GELU",
    "LT",
    "MAX_DIMS",
    "SGD",
    "Adam",
    "AdamW",
    "Add",
    "All",
    "Attn_Softmax",
    "BlockMask",
    "BroadcastTo",
    "Cast",
    "CheckpointError",
    "Concatenate",
    "Context",
    "Conv1dFun",
    "Conv2dFun",
    "Copy",
    "CosineSchedule",
    "CudaKernelOps",
    "CudaOps",
    "DecoderLM",
    "Dropout",
    "Embedding",
    "Exp",
    "FastOps",
    "FeedForward",
    "FlashAttention",
    "Function",
    "GradScaler",
    "Graph",
    "History",
    "Index",
    "IndexingError",
    "Inv",
    "IsClose",
    "KeyValueCache",
    "LayerNorm",
    "LayerNorm1d",
    "Linear",
    "Log",
    "LogSoftmax",
    "LogSumExp",
    "MapProto",
    "MaskedFill",
    "MatMul",
    "MathTest",
    "MathTestVariable",
    "Max",
    "Module",
    "ModuleList",
    "Mul",
    "MultiHeadAttention",
    "Neg",
    "Optimizer",
    "OutIndex",
    "Parameter",
    "Permute",
    "PowerScalar",
    "ReLU",
    "Scalar",
    "ScalarFunction",
    "ScalarHistory",
    "Sequential",
    "Shape",
    "Sigmoid",
    "SimpleBackend",
    "SimpleOps",
    "Slice",
    "Softmax",
    "Storage",
    "Strides",
    "Sum",
    "Tanh",
    "Tensor",
    "TensorBackend",
    "TensorData",
    "TensorLike",
    "TensorOps",
    "TransformerLayer",
    "UserIndex",
    "UserShape",
    "UserStrides",
    "Variable",
    "View",
    "_tensor",
    "and_masks",
    "argmax",
    "as_tensor",
    "attention_dropout_mask",
    "attention_masks",
    "attention_sinks",
    "avgpool2d",
    "backpropagate",
    "broadcast_index",
    "central_difference",
    "clip_grad_norm_",
    "conv1d",
    "conv2d",
    "create_block_mask",
    "create_mask",
    "cuda",
    "datasets",
    "derivative_check",
    "dropout",
    "flash_attention",
    "from_dlpack",
    "get_default_dtype",
    "get_rng_state",
    "grad_central_difference",
    "grad_check",
    "index_to_position",
    "is_grad_enabled",
    "layer_norm",
    "load_checkpoint",
    "logsoftmax",
    "logsumexp",
    "make_pts",
    "manual_seed",
    "max",
    "maxpool2d",
    "mm_practice",
    "modules_transfomer",
    "no_grad",
    "noop_mask",
    "one_hot",
    "ones",
    "ones_tensor_from_numpy",
    "operators",
    "or_masks",
    "prod",
    "rand",
    "save_checkpoint",
    "scalar_functions",
    "score_mods",
    "set_default_dtype",
    "set_rng_state",
    "shape_broadcast",
    "softmax",
    "softmax_loss",
    "strides_from_shape",
    "sum_practice",
    "tensor",
    "tensor_conv1d",
    "tensor_conv2d",
    "tensor_from_numpy",
    "testing",
    "tile",
    "to_index",
    "topological_sort",
    "version",
    "zeros",
    "zeros_tensor_from_numpy",
]
