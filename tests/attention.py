"""Attention's tests: one table, rules x families.

A family is a row of tests/attention_families.py: a set of kernels, how it is called and with which
sizes. A rule is a method of `Rules`. pytest runs every rule for every family for which a file has a
class::

    class TestSimt(Rules):
        family = SIMT

Families of the GPU have theirs in tests/cuda, where each file also has the tests of what only its
kernels have. A rule with the mark `large` has shapes too large for the simulator.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from minitorch.kernels.philox import attention_dropout_mask
from tests.attention_calls import (
    NAMES,
    TOLERANCE,
    Array,
    Family,
    call_of,
    calls,
    check,
    compare,
    exact,
    large_mask,
    make_mask,
    random,
    reference,
    shapes_of,
)
from tests.attention_functions import FUNCTION_FEATURES, PAIR, reference_with_functions

# Arguments of a small call; `leading` are those of query and of key and value, and a mask's shape
# has "q" and "k" for the lengths.
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "causal, the last aligned": {"is_causal": "bottom-right"},
    "window": {"window": (9, 3)},
    "window before the last": {"window": (9, None), "is_causal": "bottom-right"},
    "negative scale": {"scale": -0.3},
    "scale 0": {"scale": 0.0},
    "no gradient of the logsumexp": {"dl": 0.0},
    "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5},
    "everything dropped": {"dropout_p": 1.0},
    "no number reaches the threshold": {"dropout_p": 1 - 1e-11},
    "boolean mask": {"mask": ("bool", "q", "k")},
    "additive mask": {"mask": ("additive", "q", "k")},
    "mask for every batch": {"mask": ("bool", 2, 1, "q", "k"), "leading": ((2, 1),) * 2},
    "mask whose batch has no single stride": {
        "mask": ("bool", 2, 1, 1, "q", "k"), "leading": ((2, 2, 1),) * 2,
    },
    "causal, mask, dropout": {
        "is_causal": True, "mask": ("additive", "q", "k"), "dropout_p": 0.5, "seed": 3,
    },
    "heads share keys, a mask that broadcasts, layouts": {
        "leading": ((2, 2), (2, 1)), "layouts": ("heads", "heads", "part", "plain"),
        "mask": ("additive", 2, 1, 1, "k"), "dropout_p": 0.3, "seed": 2**63 + 5,
        "enable_gqa": True, "is_causal": "bottom-right",
    },
    "heads share keys": {"leading": ((1, 2), (1, 1)), "enable_gqa": True},
    "keys of one batch for two": {"leading": ((2, 1), ())},
    "queries of one batch for two": {"leading": ((1, 1), (2, 1))},
    "layouts": {"leading": ((1, 2),) * 2, "layouts": ("heads", "part", "transposed", "heads")},
}  # fmt: skip

# Beyond it P of float16 has no room for scores (3e8); float64's reference rounds as much itself.
LARGEST_TIES = {"float16": 3e2, "float64": 3e2}
# Errors of rounding where P is 0 or 1, and of 16-bit numbers of such a sum.
ROUNDED = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 1e-5, "float64": 1e-12, "tf32x3": 1e-5}
large = pytest.mark.large


class Rules:
    """The rules, for a subclass's family."""

    family: Family

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parameters that a family has a list of."""
        family = self.family
        lists: dict[str, Any] = {
            "dtype": family.dtypes,
            "lengths": family.lengths,
            "head_sizes": family.head_sizes,
            "extreme_dtypes": family.extreme_dtypes,
            "extreme_dtype": dict.fromkeys(dtype for dtype, _ in family.extreme_dtypes),
            "large_scores": family.large_scores,
            "repeated": family.repeated,
        }
        own = " ".join(str(m.args[0]) for m in metafunc.definition.iter_markers("parametrize"))
        for name, values in lists.items():
            if name in metafunc.fixturenames and name not in own:
                metafunc.parametrize(name, values, ids=str)

    @pytest.fixture(autouse=True)
    def forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.family.force(monkeypatch)

    # ----- every argument -----

    @pytest.mark.parametrize("mask_kind", ["none", "bool", "additive"])
    def test_any_call(self, dtype: str, mask_kind: str) -> None:
        """The first one on the CPU compiles the kernels for its dtype, which takes 10 s."""
        if not self.family.examples:
            pytest.skip("too slow in the simulator")

        @settings(
            max_examples=self.family.examples,
            deadline=None,
            derandomize=self.family.derandomize,
            suppress_health_check=list(HealthCheck),
        )
        @given(call=calls(self.family, dtype, mask_kind))
        def any_call(call: dict[str, Any]) -> None:
            check(self.family, dtype=dtype, **call)

        any_call()

    @pytest.mark.parametrize("name", FEATURES)
    def test_feature(self, name: str) -> None:
        arguments = dict(FEATURES[name])
        if "dropout_p" in arguments and not self.family.dropout:
            pytest.skip("there is no dropout")
        shapes = shapes_of(self.family, *arguments.pop("leading", ((1, 1), (1, 1))))
        dtype = self.family.dtypes[0]
        self.name_mask(arguments, shapes, dtype)
        check(self.family, shapes, dtype, **arguments)

    def name_mask(self, arguments: dict[str, Any], shapes: Any, dtype: str) -> None:
        """A mask in the place of what FEATURES say of it."""
        if "mask" in arguments:
            kind, *sizes = arguments["mask"]
            lengths = {"q": shapes[0][-2], "k": shapes[1][-2]}
            arguments["mask"] = make_mask(kind, tuple(lengths.get(n, n) for n in sizes), dtype)

    @pytest.mark.parametrize("name", FUNCTION_FEATURES)
    def test_functions(self, name: str) -> None:
        """Score functions, mask functions, lists and gradients of captured tensors."""
        make, arguments = FUNCTION_FEATURES[name]
        arguments = dict(arguments)
        if not self.family.functions:
            pytest.skip("there are no functions")
        if "dropout_p" in arguments and not self.family.dropout:
            pytest.skip("there is no dropout")
        shapes = shapes_of(self.family, *arguments.pop("leading", PAIR))
        dtype = self.family.dtypes[0]
        self.name_mask(arguments, shapes, dtype)
        arrays = [random(*shape, seed=n) for n, shape in enumerate(shapes)]
        functions = make(shapes[0][-2], shapes[1][-2])
        call = call_of(self.family, arrays, dtype, functions=functions, **arguments)
        results = self.family.compute(call)
        compare(self.family, call, results, wanted=reference_with_functions(call))

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_every_dtype(self, dtype: str, is_causal: bool) -> None:
        check(self.family, shapes_of(self.family), dtype, is_causal=is_causal)

    # ----- lengths and sizes -----

    @pytest.mark.parametrize(("nq", "nk"), [(0, 5), (5, 0), (0, 0), (1, 1)])
    def test_short_sequences(self, nq: int, nk: int) -> None:
        _, _, d, dv = self.family.shape
        shapes = [(2, nq, d), (2, nk, d), (2, nk, dv)]
        check(self.family, shapes, self.family.dtypes[0], layouts=("transposed",) * 4)

    @large
    @pytest.mark.parametrize("is_causal", [False, "top-left", "bottom-right"])
    def test_lengths(self, lengths: tuple[int, int], is_causal: Any) -> None:
        nq, nk = lengths
        for size in {59, 64, 128} & {d for d, _ in self.family.head_sizes}:
            shapes = [(2, nq, size), (2, nk, size), (2, nk, 64)]
            check(self.family, shapes, self.family.dtypes[0], is_causal=is_causal)

    @large
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_head_sizes(self, head_sizes: tuple[int, int], dtype: str, is_causal: bool) -> None:
        d, dv = head_sizes
        nq, nk = (150 if self.family.longest[0] > 10 else self.family.longest[0]), 201
        shapes = [(1, 2, nq, d), (1, 2, nk, d), (1, 2, nk, dv)]
        check(self.family, shapes, dtype, is_causal=is_causal)

    @large
    @pytest.mark.parametrize("window", [(64, 10), (0, 0), (None, 100), (300, None)])
    @pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
    def test_windows(self, window: Any, is_causal: Any) -> None:
        """With 1,300 queries three warpgroups of Hopper's share a tile of head size 64."""
        nq = 1300 if self.family.longest[0] > 10 else 3
        shapes = [(1, 2, nq, 64), (1, 2, 1500, 64), (1, 2, 1500, 64)]
        check(self.family, shapes, self.family.dtypes[-1], window=window, is_causal=is_causal)

    # ----- what is not seen, kept or given -----

    @pytest.mark.parametrize("kind", ["bool", "additive"])
    def test_rows_that_see_no_key(self, kind: str) -> None:
        """Output 0, logsumexp -inf, gradients 0: also beside rows that see some."""
        nq, nk, d, dv = self.family.shape
        allowed = random(nq, nk) > 0
        allowed[[0, nq // 2, nq - 1]] = False
        mask = allowed if kind == "bool" else np.where(allowed, 0, -np.inf).astype(np.float32)
        check(self.family, shapes_of(self.family), self.family.dtypes[0], mask=mask)
        shapes = [(nq, d), (nq // 2, d), (nq // 2, dv)]
        check(self.family, shapes, self.family.dtypes[0], is_causal="bottom-right")

    def test_dropout_keeps_what_the_mask_says(self) -> None:
        """Queries of 0 and values that are the unit vectors make the output the mask itself."""
        if not self.family.dropout:
            pytest.skip("there is no dropout")
        nq, nk, p, seed = self.family.shape[0], 19, 0.4, 12345678901234567890
        arrays = [np.zeros((1, 3, nq, 8)), random(1, 3, nk, 8), np.eye(nk)[None, None].repeat(3, 1)]
        call = call_of(self.family, arrays, self.family.dtypes[0], dropout_p=p, seed=seed)
        out = self.family.compute(call)[0]
        np.testing.assert_array_equal(out[0] != 0, attention_dropout_mask(3, nq, nk, p, seed))

    @pytest.mark.parametrize("layout", ["part", "surrounded"])
    def test_nothing_outside_of_the_inputs_is_used(self, layout: str) -> None:
        """All around them is NaN, also in the columns behind those of a row."""
        arrays = [
            random(*shape, seed=n) for n, shape in enumerate(shapes_of(self.family, (1,), (1,)))
        ]
        results = []
        for there in (layout, "plain"):
            call = call_of(self.family, arrays, self.family.dtypes[0], (there,) * 4)
            results.append(self.family.compute(call)[:5])
        if layout == "surrounded":  # rows begin at multiples of 16 bytes, as the plain ones do
            for name, got, want in zip(NAMES, *results, strict=False):
                np.testing.assert_array_equal(got, want, err_msg=name)
        compare(self.family, call, (*results[0], None))

    # ----- numbers as large as they get -----

    def extreme_arrays(self, columns: int = 16, size: float = 1.0) -> list[Array]:
        nq, nk = self.family.extreme
        k, v = (random(1, 1, nk, columns, seed=n) for n in (1, 2))
        return [size * random(1, 1, nq, columns), size * k, v]

    def test_masks_as_large_as_numbers(self, extreme_dtypes: tuple[str, str]) -> None:
        dtype, of_mask = extreme_dtypes
        nq, nk = self.family.extreme
        mask = large_mask(
            max(nq, 9), nk, np.float32 if of_mask == "bfloat16" else np.dtype(of_mask).type
        )
        if of_mask == "bfloat16":
            edge = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
            mask = np.where(np.isinf(mask), mask, np.clip(mask, -edge, edge))
            mask = mask.astype(ml_dtypes.bfloat16)
        # Small ones for the logsumexp, which is as large as numbers get: the loss is finite.
        call = call_of(self.family, self.extreme_arrays(), dtype, mask=mask[-nq:], dl=1 / 128)
        bound = (
            max(TOLERANCE[dtype], TOLERANCE[of_mask])
            if of_mask in ("float16", "bfloat16")
            else None
        )
        compare(self.family, call, self.family.compute(call), tolerance=bound)

    @pytest.mark.parametrize(
        "columns", [16, pytest.param(64, marks=large), pytest.param(128, marks=large)]
    )
    def test_rows_of_one_key_at_large_scores(
        self, extreme_dtype: str, large_scores: dict[str, Any], columns: int
    ) -> None:
        """P is exactly 1 for the key that counts: dV is a sum of rows of dO."""
        arrays, bound = self.extreme_arrays(columns=columns, size=1e3), ROUNDED[extreme_dtype]
        call = call_of(self.family, arrays, extreme_dtype, dl=1 / 8, **large_scores)
        results = self.family.compute(call)
        compare(self.family, call, results, ("logsumexp", "dv"), bound)
        # In the forward pass P of 16 bits is a power of two that is near 1.
        compare(self.family, call, results, ("out",), 3 * bound)

    @pytest.mark.parametrize("size", [1e2, 1e4])
    def test_keys_that_tie_at_large_scores(self, extreme_dtype: str, size: float) -> None:
        """Every key is there five times, also in other tiles: each has its share, 1/5 ..."""
        size = min(size, LARGEST_TIES.get(extreme_dtype, size))
        q, k, v = self.extreme_arrays()
        nk = k.shape[-2]
        keys = np.concatenate([k[..., : nk // 5, :]] * 5, axis=-2)[..., : nk - 3, :]
        arrays = [size * q, size * keys, v[..., : keys.shape[-2], :]]
        call = call_of(self.family, arrays, extreme_dtype, dl=0.0)
        bound = 2 * ROUNDED[extreme_dtype]
        compare(self.family, call, self.family.compute(call), ("out", "logsumexp", "dv"), bound)

    def test_an_infinite_score(self, extreme_dtype: str) -> None:
        """As of PyTorch: no softmax (NaN), a logsumexp of infinity, no other row takes notice."""
        nq, nk = self.family.extreme
        mask = np.zeros((nq, nk), np.float32)
        mask[1, nk - 2], mask[2, 3], mask[3, [2, nk - 2]] = np.inf, np.nan, (np.inf, np.nan)
        mask[4, [2, nk - 2]] = np.nan, np.inf
        call = call_of(self.family, self.extreme_arrays(), extreme_dtype, mask=mask, dl=0.0)
        with np.errstate(all="ignore"):
            out, lse, dq, *_ = self.family.compute(call)
        ordinary = [0, *range(5, nq)]
        assert np.isposinf(lse[0, 0, 1]) and np.isnan(lse[0, 0, 2:5]).all()
        assert np.isfinite(lse[0, 0, ordinary]).all()
        for x in (out.astype(np.float64), dq.astype(np.float64)):
            assert np.isnan(x[0, 0, 1:5]).all() and np.isfinite(x[0, 0, ordinary]).all()

    # ----- rounding -----

    @large
    @pytest.mark.parametrize(("is_causal", "dropout_p"), [(False, 0.0), (True, 0.0), (False, 0.17)])
    def test_many_runs_give_the_same_bits(
        self, dtype: str, repeated: Any, is_causal: bool, dropout_p: float
    ) -> None:
        """After `test_flash_attn_race_condition` of Dao's FlashAttention."""
        if dropout_p and not self.family.dropout:
            pytest.skip("there is no dropout")
        of_query, of_key = repeated
        arrays = [random(*shape, seed=n) for n, shape in enumerate((of_query, of_key, of_key))]
        call = call_of(self.family, arrays, dtype, is_causal=is_causal, dropout_p=dropout_p, seed=3)
        first = None
        for _ in range(self.family.runs):
            bits = [None if x is None else x.tobytes() for x in self.family.compute(call)]
            first = first or bits
            assert bits == first

    @large
    @pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # PyTorch's, in its first thread
    @pytest.mark.parametrize("columns", [16, 32, 64, 128])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_error_within_twice_pytorchs(self, dtype: str, columns: int, is_causal: bool) -> None:
        if dtype.startswith("tf32"):
            pytest.skip("PyTorch has the products of float32, or of tf32 alone")
        nq = 257 if self.family.longest[0] > 10 else 8
        arrays = [random(2, 3, n, columns, seed=s) for s, n in enumerate((nq, 257, 257))]
        check_error(self.family, arrays, dtype, is_causal)


def check_error(
    family: Family, arrays: list[Array], dtype: str, is_causal: bool, names: Any = NAMES
) -> None:
    """Dao's criterion: the error against float64 of the named results is at most twice (three times
    for gradients) that of PyTorch's attention in the same dtype.
    """
    torch = pytest.importorskip("torch")
    if family.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    call = call_of(family, arrays, dtype, dl=0.0, is_causal=is_causal)
    out, _, *gradients = family.compute(call)[:5]
    torch.backends.cuda.matmul.allow_tf32 = False
    kind = getattr(torch, call.problem.dtype.name)
    q, k, v, do = (
        torch.tensor(exact(x), dtype=kind, device=family.device, requires_grad=True)
        for x in call.tensors
    )
    scores = (q / q.shape[-1] ** 0.5) @ k.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    standard = torch.softmax(scores, -1) @ v
    standard.backward(do)
    want = reference(call)
    wanted = (want.out, want.grad_query, want.grad_key, want.grad_value)
    theirs = [x.detach().double().cpu().numpy() for x in (standard, q.grad, k.grad, v.grad)]
    for name, got, other, truth in zip(
        ("out", "dq", "dk", "dv"), (out, *gradients), theirs, wanted, strict=True
    ):
        error = np.abs(exact(got) - truth).max()
        bound = (2 if name == "out" else 3) * np.abs(other - truth).max() + 1e-6
        assert error <= bound or name not in names, (name, error, bound)
