"""What the CPU's kernels need to know of the processor that numba compiles for."""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config


@dataclass(frozen=True)
class VectorTarget:
    """What the kernels need to know of the processor that numba compiles for."""

    float32_lanes: int  # float32 elements in a vector register
    has_fma: bool  # a fused multiply-add instruction exists
    architecture: str  # "x86", "arm" or "other"
    block_rows: int  # rows of the register block of `matrix_product_block`
    block_vectors: int = 2  # vectors in each of its rows

    def lanes(self, bits: int) -> int:
        """Elements of `bits` bits in a vector register."""
        return self.float32_lanes * 32 // bits


def probe_target(triple: str, cpu_name: str, features: str) -> VectorTarget:
    """Ask LLVM which registers and instructions it would use for a wide multiply-add.

    Asking the compiler covers named processors and hand-written feature lists, for which no table
    says what they imply.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    vector = ir.VectorType(ir.FloatType(), 16)
    function = ir.Function(module, ir.FunctionType(vector, [vector] * 3), "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    fma = cgutils.get_or_insert_function(module, function.function_type, "llvm.fma.v16f32")
    builder.ret(builder.call(fma, function.args))
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu_name, features)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    lanes = 16 if "zmm" in assembly else 8 if "ymm" in assembly else 4
    # 32 registers (AVX-512, 64-bit Arm) hold a block of 8 rows, 16 registers one of 4.
    arm, x86 = triple.startswith(("aarch64", "arm64")), triple.startswith(("x86_64", "i686"))
    return VectorTarget(
        float32_lanes=lanes,
        has_fma="vfmadd" in assembly or "fmla" in assembly,
        architecture="arm" if arm else "x86" if x86 else "other",
        block_rows=8 if lanes == 16 or arm else 4,
    )


def host_target() -> VectorTarget:
    """The target numba compiles for: this machine, or NUMBA_CPU_NAME and NUMBA_CPU_FEATURES."""
    cpu_name, features = config.CPU_NAME, config.CPU_FEATURES
    if features is None:
        features = "" if cpu_name else llvm.get_host_cpu_features().flatten()
    return probe_target(llvm.get_process_triple(), cpu_name or llvm.get_host_cpu_name(), features)


TARGET = host_target()
