# mypy: disable-error-code="empty-body, valid-type"
"""The GPU's own instructions that Python has no words for, one function each.

A function is named as PTX names the instruction, with dots turned into underscores, and described
in the chapter of NVIDIA's "PTX ISA" (9.0) that its docstring gives. `inline_ptx.py` says how they
are made, `ptx_simulated.py` what the simulator runs instead, `shared_layout.py` how matrices lie in
registers and in shared memory. What only Hopper GPUs have is in `ptx_hopper.py`.

A warp is 32 threads, its lanes; a warpgroup is four warps. "All" threads of a warp or warpgroup
call what has `sync.aligned` in its text. Addresses of shared memory are 32-bit numbers, those of
global memory 64-bit.
"""

from functools import cache
from typing import Any

from . import ptx_simulated as simulated
from .checked import byte_offsets, checked, one_of, whole
from .inline_ptx import b16, f32, instruction, ptx, u32, u64
from .runtime import SIMULATED, types

SHORT = {"float16": "f16", "bfloat16": "bf16", "tf32": "tf32"}  # PTX's names of types
SIXTEEN_BITS = ("float16", "bfloat16")
A_WORDS = {  # of mma's operand A in a lane
    ("m16n8k16", "float16"): 4, ("m16n8k16", "bfloat16"): 4,
    ("m16n8k8", "float16"): 2, ("m16n8k8", "bfloat16"): 2, ("m16n8k8", "tf32"): 4,
}  # fmt: skip

# ----- numbers: 9.7.3 to 9.7.9 -----


@ptx("ex2.approx.ftz.f32 {out}, {x};", pure=True, simulated=simulated.ex2)
def ex2_approx_ftz_f32(x: f32) -> f32:
    """2**x, right to 2 units of the last place; 0 for a result below the normal numbers."""


@ptx("lg2.approx.ftz.f32 {out}, {x};", pure=True, simulated=simulated.lg2)
def lg2_approx_ftz_f32(x: f32) -> f32:
    """log2(x), right to 22 bits."""


@ptx("mul.rn.f32 {out}, {x}, {y};", pure=True, simulated=simulated.product)
def mul_rn_f32(x: f32, y: f32) -> f32:
    """x * y, rounded: no part of a multiply-add, which the compiler may make of a bare product."""


@ptx("div.full.f32 {out}, {x}, {y};", pure=True, simulated=simulated.quotient)
def div_full_f32(x: f32, y: f32) -> f32:
    """x / y, right to 2 units of the last place for all numbers."""


@ptx("cvt.rn.f16x2.f32 {out}, {high}, {low};", pure=True, simulated=simulated.pack("float16"))
def cvt_rn_f16x2_f32(low: f32, high: f32) -> u32:
    """Two float16, rounded to the nearest: `low` in bits 0-15. From compute capability 8.0 on."""


@ptx("cvt.rn.bf16x2.f32 {out}, {high}, {low};", pure=True, simulated=simulated.pack("bfloat16"))
def cvt_rn_bf16x2_f32(low: f32, high: f32) -> u32:
    """Two bfloat16, rounded to the nearest: `low` in bits 0-15. From compute capability 8.0 on."""


@ptx(
    "{ .reg .b16 l, h; cvt.rn.f16.f32 l, {low}; cvt.rn.f16.f32 h, {high}; mov.b32 {out}, {l, h}; }",
    pure=True,
    simulated=simulated.pack("float16"),
)
def cvt_rn_f16_f32_pair(low: f32, high: f32) -> u32:
    """`cvt_rn_f16x2_f32` for any GPU."""


@ptx("cvt.rna.tf32.f32 {out}, {x};", pure=True, simulated=simulated.tf32)
def cvt_rna_tf32_f32(x: f32) -> u32:
    """x with 10 bits of fraction, as mma wants it; ties away from 0. From 8.0 on."""


@ptx("mad.wide.u32 {out}, {x}, {y}, {z};", pure=True, simulated=simulated.mad_wide)
def mad_wide_u32(x: u32, y: u32, z: u64) -> u64:
    """x * y + z, of two 32-bit numbers: an address."""


@cache
def pack_pair(dtype: str, turing: bool = False) -> Any:
    """The conversion of two float32 to a packed pair of "float16" or "bfloat16".

    Raises:
        ValueError: another dtype.

    """
    one_of("dtype", dtype, SIXTEEN_BITS)
    if turing and dtype == "float16":
        return cvt_rn_f16_f32_pair
    return {"float16": cvt_rn_f16x2_f32, "bfloat16": cvt_rn_bf16x2_f32}[dtype]


@ptx(
    "shfl.sync.bfly.b32 {out}, {x}, {lane_mask}, 0x1f, 0xffffffff;",
    simulated=simulated.shuffle_xor,
)
def shfl_sync_bfly_f32(x: f32, lane_mask: u32) -> f32:
    """9.7.9.6: the x of the lane whose number differs in the bits of `lane_mask`."""


@ptx(
    "shfl.sync.bfly.b32 {out}, {x}, {lane_mask}, 0x1f, 0xffffffff;",
    simulated=simulated.shuffle_xor,
)
def shfl_sync_bfly_b32(x: u32, lane_mask: u32) -> u32:
    """9.7.9.6: the x of the lane whose number differs in the bits of `lane_mask`."""


@ptx(
    "shfl.sync.idx.b32 {out}, {x}, {lane}, 0x1f, 0xffffffff;",
    simulated=simulated.shuffle_index,
)
def shfl_sync_idx_b32(x: u32, lane: u32) -> u32:
    """9.7.9.6: the x of that lane."""


@ptx("mov.b32 {out}, {x};", simulated=simulated.same)
def opaque(x: u32) -> u32:
    """x, of which the compiler no longer knows where it is from: what is computed of it is computed
    here, and not once before a loop, in registers that stay taken.
    """


# ----- barriers of threads -----


@ptx("bar.sync {barrier}, {threads};", simulated=simulated.bar_sync)
def bar_sync(barrier: u32, threads: u32) -> None:
    """9.7.13.1: wait at one of the 16 named barriers until `threads` threads, a multiple of 32,
    have arrived at it. `cuda.syncthreads` is number 0.
    """


@ptx("bar.arrive {barrier}, {threads};", simulated=simulated.bar_arrive)
def bar_arrive(barrier: u32, threads: u32) -> None:
    """9.7.13.1: arrive at a named barrier, and go on."""


# ----- addresses, and single words: 9.7.9 -----


@ptx("ld.shared.b32 {out}, [{address}];", simulated=simulated.load_shared(1))
def ld_shared_b32(address: u32) -> u32:
    """The word at an address of shared memory, a multiple of 4."""


@ptx("ld.shared.v2.f32 {out}, [{address}];", simulated=simulated.load_shared(2, "float32"))
def ld_shared_v2_f32(address: u32) -> f32[2]:
    """Two float32 at a multiple of 8."""


@ptx("st.shared.b32 [{address}], {x};", simulated=simulated.store_shared)
def st_shared_b32(address: u32, x: u32) -> None:
    """A word to an address of shared memory, a multiple of 4."""


@ptx("st.shared.v4.b32 [{address}], {x};", simulated=simulated.store_shared)
def st_shared_v4_b32(address: u32, x: u32[4]) -> None:
    """16 bytes to an address of shared memory, a multiple of 16."""


@ptx("ld.global.nc.b32 {out}, [{address}];", simulated=simulated.load_global(1))
def ld_global_nc_b32(address: u64) -> u32:
    """The word at an address of global memory, a multiple of 4, which no kernel writes."""


@ptx("ld.global.f32 {out}, [{address}];", simulated=simulated.load_global(1, "float32"))
def ld_global_f32(address: u64) -> f32:
    """The float32 at an address of global memory, a multiple of 4."""


@ptx("ld.global.v4.b32 {out}, [{address}];", simulated=simulated.load_global(4))
def ld_global_v4_b32(address: u64) -> u32[4]:
    """16 bytes at an address of global memory, a multiple of 16."""


@ptx("st.global.f32 [{address}], {x};", simulated=simulated.store_global)
def st_global_f32(address: u64, x: f32) -> None:
    """A float32 to an address of global memory, a multiple of 4."""


@ptx("st.global.v4.b32 [{address}], {x};", simulated=simulated.store_global)
def st_global_v4_b32(address: u64, x: u32[4]) -> None:
    """16 bytes to an address of global memory, a multiple of 16."""


@ptx("st.global.b32 [{address}], {x};", simulated=simulated.store_global)
def st_global_b32(address: u64, x: u32) -> None:
    """A word to an address of global memory, a multiple of 4."""


def _store_if(kind: str, register: Any) -> Any:
    """`(valid, address, x)`: x to an address of global memory, a multiple of its size, where
    `valid`.
    """
    text = "{ .reg .pred p; setp.ne.u32 p, {valid}, 0; @p st.global.KIND [{address}], {x}; }"
    return instruction(
        f"st_global_{kind.replace('.', '_')}_if", text.replace("KIND", kind),
        {"valid": u32, "address": u64, "x": register}, simulated=simulated.store_global_if,
    )  # fmt: skip


st_global_b16_if, st_global_b32_if = _store_if("b16", b16), _store_if("b32", u32)
st_global_f32_if, st_global_v2_f32_if = _store_if("f32", f32), _store_if("v2.f32", f32[2])
st_global_v4_b32_if = _store_if("v4.b32", u32[4])


@ptx("atom.global.add.u32 {out}, [{address}], {x};", simulated=simulated.atomic_add)
def atom_global_add_u32(address: u64, x: u32) -> u32:
    """9.7.13.5: add x to a word of global memory; what was there before."""


@ptx("mov.b32 {out}, {x};", pure=True, simulated=simulated.halves)
def mov_b32_halves(x: u32) -> b16[2]:
    """The low and the high half of a word."""


# ----- a warp's matrices: 9.7.14 -----


@cache
def ldmatrix(offsets: tuple[int, ...] = (0,), count: int = 4, trans: bool = False) -> Any:
    """`ldmatrix.sync.aligned.m8n8.x{count}{.trans}.shared.b16`, 9.7.14.5.15, from 7.5 on.

    A function of an address that loads `count` matrices of 8 x 8 16-bit elements, once for each of
    the offsets in bytes (constants, for which no register is needed), and gives their registers,
    count * len(offsets) of them. The address that lane 8 m + r gives is that of row r of matrix m,
    16 bytes at a multiple of 16. Of each matrix lane t gets row t // 4, columns 2 (t % 4) and
    2 (t % 4) + 1; with `trans` column t // 4, rows 2 (t % 4) and 2 (t % 4) + 1.

    Raises:
        TypeError: a number that is not whole.
        ValueError: no offset, or one that is no multiple of 16; a count other than 1, 2 or 4.

    """
    byte_offsets("offsets", offsets)
    whole("count", count)
    checked("count", count, count in (1, 2, 4), "1, 2 or 4")
    suffix = f"x{count}" + ".trans" * trans
    one = "ldmatrix.sync.aligned.m8n8.{}.shared.b16 {{out[{}:{}]}}, [{{address}}+{}];"
    text = [one.format(suffix, count * n, count * n + count, x) for n, x in enumerate(offsets)]
    return instruction(
        f"ldmatrix_{suffix.replace('.', '_')}", " ".join(text), {"address": u32},
        u32[count * len(offsets)], simulated=simulated.ldmatrix(offsets, count, trans),
    )  # fmt: skip


ldmatrix_x1, ldmatrix_x2, ldmatrix_x4 = (ldmatrix(count=n) for n in (1, 2, 4))
ldmatrix_x2_trans, ldmatrix_x4_trans = (ldmatrix(count=n, trans=True) for n in (2, 4))


@cache
def mma(shape: str, dtype: str) -> Any:
    """`mma.sync.aligned.{shape}.row.col.f32.{dtype}.{dtype}.f32`, 9.7.14.5: `mma(sums, a, b)` is
    sums + A B, of a warp; sums float32 (16, 8), A (16, k), B (k, 8).

    Args:
        shape: "m16n8k16" for 16 bits from compute capability 8.0 on, "m16n8k8" for float16 from 7.5
            on, for bfloat16 and tf32 from 8.0 on.
        dtype: "float16", "bfloat16" or "tf32".

    Lane t, g = t // 4, q = t % 4, has of the sums rows g and g + 8, columns 2 q and 2 q + 1, in the
    order (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). Of the 16-bit operands its registers
    have two elements that are neighbours along k, at k0 = 2 q:

        A, m16n8k16    (g, k0), (g + 8, k0), (g, k0 + 8), (g + 8, k0 + 8)
        A, m16n8k8     (g, k0), (g + 8, k0)
        B              (k0, g), and for m16n8k16 (k0 + 8, g)

    Those of tf32 have one element: A (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); B (q, g),
    (q + 4, g).

    Raises:
        ValueError: there is no such product.

    """
    known = ", ".join(map(str, A_WORDS))
    checked("(shape, dtype)", (shape, dtype), (shape, dtype) in A_WORDS, f"one of {known}")
    words, short = A_WORDS[shape, dtype], SHORT[dtype]
    name = f"mma.sync.aligned.{shape}.row.col.f32.{short}.{short}.f32"
    return instruction(
        f"mma_{shape}_{short}", f"{name} {{sums}}, {{a}}, {{b}}, {{sums}};",
        {"sums": f32[4], "a": u32[words], "b": u32[words // 2]}, f32[4],
        tied="sums", pure=True, simulated=simulated.mma(dtype),
    )  # fmt: skip


mma_m16n8k16_f16, mma_m16n8k16_bf16 = mma("m16n8k16", "float16"), mma("m16n8k16", "bfloat16")
mma_m16n8k8_f16, mma_m16n8k8_tf32 = mma("m16n8k8", "float16"), mma("m16n8k8", "tf32")

# ----- copies that run on their own: 9.7.9.25, compute capability 8.0 -----


@ptx("cp.async.cg.shared.global [{target}], [{source}], 16, {size};", simulated=simulated.cp_async)
def cp_async_cg_16(target: u32, source: u64, size: u32) -> None:
    """Begin to copy 16 bytes from global to shared memory, past the L1 cache: `size` of them are
    read, the others are zeros. Both addresses are multiples of 16.
    """


@ptx("cp.async.commit_group;", simulated=simulated.nothing)
def cp_async_commit_group() -> None:
    """The thread's copies since the last commit are a group."""


@cache
def cp_async_wait_group(pending: int) -> Any:
    """A function that waits until at most `pending` of the thread's last groups are unfinished.

    Raises:
        TypeError: `pending` is no whole number.
        ValueError: it is negative.

    """
    whole("pending", pending)
    return instruction(
        "cp_async_wait_group", f"cp.async.wait_group {pending};", {}, simulated=simulated.nothing
    )


# ----- addresses of arrays -----

if SIMULATED:
    shared_address, global_address = simulated.shared_address, simulated.global_address
else:
    from .inline_ptx import emit
    from .runtime import intrinsic

    @ptx("{ .reg .u64 t; cvta.to.shared.u64 t, {x}; cvt.u32.u64 {out}, t; }", pure=True)
    def _to_shared(x: u64) -> u32:
        """From an address of any memory."""

    def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
        data = context.make_array(kind)(context, builder, array).data
        return builder.ptrtoint(data, context.get_value_type(types.uint64))

    @intrinsic
    def shared_address(typingctx, array):
        """Of an array in shared memory, uint32; dynamic shared memory begins at a multiple of 1024
        in a kernel without static shared arrays.
        """

        def codegen(context, builder, signature, args):
            address = _data(context, builder, signature.args[0], args[0])
            return emit(_to_shared.assembly, builder, [[address]])[0][0]

        return types.uint32(array), codegen

    @intrinsic
    def global_address(typingctx, array):
        """Of an array in global memory, uint64."""

        def codegen(context, builder, signature, args):
            return _data(context, builder, signature.args[0], args[0])

        return types.uint64(array), codegen
