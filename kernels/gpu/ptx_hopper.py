# mypy: disable-error-code="empty-body, valid-type"
"""Instructions that only Hopper GPUs have (compute capability 9.0 and 9.0a), as in `ptx.py`.

What is a pure function of their operands, descriptors, swizzles, tensor maps, is in
`shared_layout.py` and `tensor_map.py`; what the simulator runs is in `ptx_hopper_simulated.py`.

Barriers in shared memory (mbarrier) say when a tile has come, the copy engine (TMA) brings it, and
`wgmma` multiplies it, four warps at once, without the threads' registers having held it.
"""

from functools import cache
from typing import Any

from . import ptx_hopper_simulated as simulated
from .checked import byte_offsets, checked, one_of, whole
from .inline_ptx import f32, i32, instruction, lines, ptx, u32, u64
from .ptx import SHORT, SIXTEEN_BITS

MOST_PENDING = 7  # groups of products that `wgmma.wait_group` can leave unfinished

# ----- barriers that count arrivals and bytes: 9.7.13.15, compute capability 9.0 -----


@ptx("mbarrier.init.shared::cta.b64 [{barrier}], {count};", simulated=simulated.mbarrier_init)
def mbarrier_init(barrier: u32, count: u32) -> None:
    """Make the 8 bytes at `barrier` one whose phase ends when `count` threads have arrived, and all
    bytes that they expect. Its first phase has parity 0.
    """


@ptx("fence.mbarrier_init.release.cluster;", simulated=simulated.nothing)
def fence_mbarrier_init_release_cluster() -> None:
    """9.7.13.4: barriers that are initialised so far are so for the copy engine as well."""


@ptx("mbarrier.arrive.shared::cta.b64 _, [{barrier}];", simulated=simulated.mbarrier_arrive)
def mbarrier_arrive(barrier: u32) -> None:
    """Arrive."""


@ptx(
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {size};",
    simulated=simulated.mbarrier_arrive_expect_tx,
)
def mbarrier_arrive_expect_tx(barrier: u32, size: u32) -> None:
    """Arrive, and let the phase last until `size` more bytes have been copied."""


@ptx(
    "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [{barrier}], {parity};"
    " @!p bra again; }",
    simulated=simulated.mbarrier_wait,
)
def mbarrier_wait_parity(barrier: u32, parity: u32) -> None:
    """Wait for the end of the phase of that parity: `try_wait` until it succeeds. A new barrier's
    phase before the first one has parity 1, and has ended.
    """


# ----- the copy engine (TMA): 9.7.9.25.4 and .5, compute capability 9.0 -----


@ptx(
    "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    " [{target}], [{tensor_map}, {{x}, {y}, {z}, {w}}], [{barrier}];",
    simulated=simulated.copy_in,
)
def cp_async_bulk_tensor_4d(
    target: u32, tensor_map: u64, barrier: u32, x: i32, y: i32, z: i32, w: i32
) -> None:
    """Begin to copy one box of a tensor of four dimensions from global to shared memory.

    `tensor_map` is the map's address (tensor_map.py), x, y, z, w is the box's first element, the
    innermost dimension first; what is outside of the tensor becomes zeros. The box's bytes count at
    the barrier. One thread calls it.
    """


@ptx(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [{target}], [{source}], {size}, [{barrier}];",
    simulated=simulated.copy_flat,
)
def cp_async_bulk(target: u32, source: u64, size: u32, barrier: u32) -> None:
    """Copy `size` bytes, a multiple of 16, from global to shared memory; both addresses are
    multiples of 16. The bytes count at the barrier.
    """


# ----- a warpgroup's matrices: 9.7.15, compute capability 9.0a -----


@cache
def wgmma_fence(*counts: int) -> Any:
    """`wgmma.fence.sync.aligned`, 9.7.15.7: before the first product, and wherever registers of one
    have been changed. It takes and returns accumulators of `counts` registers, so that no such
    change can be moved behind it.

    Raises:
        TypeError: a count that is no whole number.
        ValueError: a count below 1.

    """
    return _through("wgmma_fence", "wgmma.fence.sync.aligned;", counts)


@ptx("wgmma.commit_group.sync.aligned;", simulated=simulated.nothing)
def wgmma_commit_group() -> None:
    """The products since the last commit are a group."""


@cache
def wgmma_wait_group(pending: int, *counts: int) -> Any:
    """`wgmma.wait_group.sync.aligned`: wait until at most `pending` of the last groups run.

    It takes and returns the accumulators that are complete then, of `counts` registers: whatever
    uses them has to use the result. `wgmma_wait_group(1, 64)(scores)`, or of several
    `dk, dv = wgmma_wait_group(0, 64, 64)(dk, dv)`.

    Raises:
        TypeError: a number that is not whole.
        ValueError: `pending` is not within 0 ... 7, or a count is below 1.

    """
    whole("pending", pending, 0, MOST_PENDING)
    return _through("wgmma_wait_group", f"wgmma.wait_group.sync.aligned {pending};", counts)


@cache
def wgmma_wait_group_after(pending: int, count: int) -> Any:
    """`acc = f(acc, x)`: `wgmma_wait_group` that does not begin to wait before x is there.

    The assembler moves a wait in front of all that does not depend on it, so that no arithmetic
    would run beside the products. It cannot know that x is never this one of the NaNs (arithmetic
    gives another), and it moves no wait past a trap.

    Raises:
        TypeError: a number that is not whole.
        ValueError: `pending` is not within 0 ... 7, or the count is below 1.

    """
    whole("pending", pending, 0, MOST_PENDING)
    whole("count", count, 1)
    acc = f32[count]
    return instruction(
        "wgmma_wait_group_after",
        "{ .reg .pred p; .reg .b32 b; mov.b32 b, {x}; setp.eq.u32 p, b, 0x7FC12345; @p trap;"
        f" wgmma.wait_group.sync.aligned {pending}; }}",
        {"acc": acc, "x": f32}, acc, tied="acc", simulated=simulated.first,
    )  # fmt: skip


def _through(name: str, text: str, counts: tuple[int, ...]) -> Any:
    for count in counts:
        whole("a count of registers", count, 1)
    accumulators = {f"acc{n}": f32[count] for n, count in enumerate(counts)}
    return instruction(
        name,
        text,
        accumulators,
        tuple(accumulators.values()),
        tied=tuple(accumulators),
        simulated=simulated.same,
    )


def _check_product(n: int, dtype: str, b_offsets: tuple[int, ...]) -> None:
    whole("n", n, 8, 256, step=8)
    one_of("dtype", dtype, SIXTEEN_BITS)
    byte_offsets("b_offsets", b_offsets)


def _products(
    n: int, dtype: str, offsets: list[tuple[int, ...]], a: str, trans: str, first: int | str
) -> str:
    """The text of the products of all steps along k: descriptors begin at their offsets. The first
    one adds to the sums if `first`, a number or an operand, is not 0.

    Opaque to LLVM, which would keep the sums of descriptors and offsets in registers.
    """
    names = ("a", "b") if a == "descriptor" else ("b",)
    text = [".reg .pred p;", f".reg .b64 {', '.join(f'd{x}' for x in names)};"]
    short = SHORT[dtype]
    for step, places in enumerate(zip(*offsets, strict=True)):
        for name, offset in zip(names, places, strict=True):
            text.append(f"add.s64 d{name}, {{{name}}}, {offset >> 4};")
        left = "da" if a == "descriptor" else f"{{a[{4 * step}:{4 * step + 4}]}}"
        text.append(f"setp.ne.b32 p, {1 if step else first}, 0;")
        text.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{short}.{short} {{acc}}, {left}, db, p,"
            f" 1, 1, {trans};"
        )
    return lines(text)


@cache
def wgmma_ss(
    n: int,
    dtype: str,
    a_offsets: tuple[int, ...] = (0,),
    b_offsets: tuple[int, ...] = (0,),
    trans_a: bool = False,
    trans_b: bool = False,
    accumulate: bool = True,
) -> Any:
    """`wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype}`, 9.7.15.5, A and B in shared
    memory: `acc = f(acc, a, b)` begins acc + A B, or with accumulate=False `acc = f(a, b)` A B.

    Args:
        n: columns of B and of the sums, a multiple of 8 up to 256.
        dtype: "float16" or "bfloat16".
        a_offsets: where in bytes A's part of each step of 16 along k begins, from the place in
            descriptor `a`; multiples of 16 (`shared_layout.steps_along`).
        b_offsets: likewise of B, as many.
        trans_a: A lies with its rows (m) along shared memory's rows of 128 bytes, not k.
        trans_b: B lies with its columns (n) along them: the values V in P V, stored (keys, D).
        accumulate: whether there are sums to add to.

    Of the sums, (64, n) float32, warp w of the warpgroup has rows 16 w ... 16 w + 15, and lane t of
    it, g = t // 4, q = t % 4, in register 4 j + 2 r + c element (g + 8 r, 8 j + 2 q + c).
    They are valid after `wgmma_wait_group`.

    Raises:
        TypeError: a number that is not whole.
        ValueError: an argument that is not as said above.

    """
    _check_product(n, dtype, b_offsets)
    byte_offsets("a_offsets", a_offsets)
    wanted = f"as many as b_offsets, {len(b_offsets)}"
    checked("a_offsets", a_offsets, len(a_offsets) == len(b_offsets), wanted)
    checked("accumulate", accumulate, accumulate in (True, False), "True or False")
    acc = f32[n // 2]
    text = _products(
        n, dtype, [a_offsets, b_offsets], "descriptor", f"{int(trans_a)}, {int(trans_b)}",
        int(accumulate),
    )  # fmt: skip
    run = simulated.wgmma(n, dtype, [a_offsets, b_offsets], (trans_a, trans_b), accumulate)
    return _product(f"wgmma_m64n{n}k16_ss", text, {"a": u64, "b": u64}, acc, accumulate, run)


@cache
def wgmma_rs(
    n: int,
    dtype: str,
    b_offsets: tuple[int, ...] = (0,),
    trans_b: bool = False,
    accumulate: bool | None = True,
) -> Any:
    """As `wgmma_ss`, with A in registers: `acc = f(acc, a, b)`; with accumulate=None
    `acc = f(acc, a, b, keep)`, which begins A B alone where `keep` is 0.

    `a` is a tuple of 4 * len(b_offsets) words, for each step along k those of mma's m16n8k16: the
    sums of another product, packed (`register_tile`).

    Raises:
        TypeError: a number that is not whole.
        ValueError: an argument that is not as said there.

    """
    _check_product(n, dtype, b_offsets)
    checked("accumulate", accumulate, accumulate in (True, False, None), "True, False or None")
    acc, words = f32[n // 2], u32[4 * len(b_offsets)]
    first = "{keep}" if accumulate is None else int(accumulate)
    text = _products(n, dtype, [b_offsets], "registers", str(int(trans_b)), first)
    run = simulated.wgmma(n, dtype, [b_offsets], (False, trans_b), accumulate)
    return _product(f"wgmma_m64n{n}k16_rs", text, {"a": words, "b": u64}, acc, accumulate, run)


def _product(
    name: str, text: str, operands: dict[str, Any], acc: Any, accumulate: bool | None, run: Any
) -> Any:
    if accumulate is False:
        return instruction(name, text.replace("{acc}", "{out}"), operands, acc, simulated=run)
    keep = {"keep": u32} if accumulate is None else {}
    return instruction(name, text, {"acc": acc} | operands | keep, acc, tied="acc", simulated=run)


@cache
def setmaxnreg(direction: str, count: int) -> Any:
    """`setmaxnreg.{inc,dec}.sync.aligned.u32`, 9.7.19.5: let each thread of the warpgroup have
    `count` registers from here on, 24 to 256 in steps of 8. The kernel is compiled with launch
    bounds, and all threads together keep within the 65536 of a multiprocessor.

    Raises:
        TypeError: a count that is no whole number.
        ValueError: another direction, or another count.

    """
    one_of("direction", direction, ("inc", "dec"))
    whole("count", count, 24, 256, step=8)
    return instruction(
        f"setmaxnreg_{direction}",
        f"setmaxnreg.{direction}.sync.aligned.u32 {count};",
        {},
        simulated=simulated.nothing,
    )
