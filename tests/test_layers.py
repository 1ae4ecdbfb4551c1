"""The shape of the code: imports point downwards, exports are explicit, files stay small."""

import ast
import functools
import graphlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitorch

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top. A module imports from its own layer and from those below; `kernels`
# stands under them all.
LAYERS: list[tuple[str, str]] = [
    (
        "data and mathematics",
        "arguments dtypes ieee operators rng tensor_data threads interop.dlpack cuda.allocator "
        "cuda.device_array cuda.driver cuda.precision",
    ),
    (
        "engine and backends",
        "autodiff cuda_kernel_ops cuda_ops fast_fused fast_ops fused_checks fused_ops storage_ops "
        "tensor_ops cuda cuda.attention cuda.cublas cuda.cublas_lt cuda.elementwise "
        "cuda.graph cuda.matmul cuda.storage "
        "cuda.transfer cuda.views",
    ),
    (
        "tensors",
        "attention attention_masks attention_variants block_mask block_states captured_arrays "
        "copies factories fast_conv function fused_functions grad_check indexing mask_functions "
        "movement_functions numpy_protocol scalar scalar_functions score_mods score_symbols "
        "score_trace tensor tensor_functions tensor_graph interop interop.arrays interop.foreign "
        "interop.torch_attention cuda.explanation",
    ),
    (
        "networks",
        "checkpoint containers datasets grad_scaler module modules_basic modules_transfomer nn "
        "optim optimizer transformer cuda.capturable",
    ),
    ("tools", "__init__ __main__ doctor testing"),
]
# MiniTorch's courses read these names from `tensor_functions`, which finds them when asked; PyTorch
# is imported when the first of its tensors comes; `cuda` finds what needs tensors when asked.
ALLOWED_UPWARDS = {
    ("tensor_functions", "factories"),
    ("tensor_functions", "grad_check"),
    ("interop.foreign", "interop.torch_attention"),
}

# In `kernels`: what is below imports nothing of what is above, and beside each other these know
# nothing of each other.
FAMILIES = ("cpu", "simt", "mma", "hopper", "decode")

MOST_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_KERNEL_LINES = 160


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from run_time_nodes(child)


def imports(path: Path, package: str) -> Iterator[str]:
    """Full names of the modules and names that a file imports, relative ones resolved."""
    for node in run_time_nodes(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            yield base
            yield from (f"{base}.{name.name}" for name in node.names)


def library_modules() -> dict[str, Path]:
    """The modules of the library, without `kernels`, by their names below `minitorch`."""
    found = {}
    for path in (ROOT / "minitorch").rglob("*.py"):
        parts = path.relative_to(ROOT / "minitorch").with_suffix("").parts
        if parts[0] != "kernels":
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def imported_modules(name: str) -> set[str]:
    """The modules of the library, without `kernels`, that a module of it imports."""
    known = library_modules()
    path = known[name]
    found = {i.removeprefix("minitorch.") for i in imports(path, package_of(path))} & set(known)
    # `from .cuda import driver` means the module; the package runs first, and imports none of ours
    # that needs this one.
    parents = {module.rpartition(".")[0] for module in (*found, name)}
    return found - parents - {name}


def test_every_module_has_a_layer() -> None:
    placed = [name for _, names in LAYERS for name in names.split()]
    assert sorted(placed) == sorted(library_modules()), "give each module one layer in LAYERS"


@pytest.mark.parametrize("name", sorted(library_modules()))
def test_imports_point_downwards(name: str) -> None:
    height = {m: number for number, (_, names) in enumerate(LAYERS) for m in names.split()}
    mine = height.get(name, len(LAYERS))  # a module without a layer fails the test above
    upwards = {other for other in imported_modules(name) if height.get(other, 0) > mine}
    assert {(name, other) for other in upwards} <= ALLOWED_UPWARDS


def test_no_circle_of_imports() -> None:
    graph = {
        name: {other for other in imported_modules(name) if (name, other) not in ALLOWED_UPWARDS}
        for name in library_modules()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def test_kernels_know_arrays_and_nothing_of_the_library() -> None:
    allowed = {"numpy", "numba", "llvmlite", *sys.stdlib_module_names}
    for path in source_files("kernels"):
        package = ".".join(["kernels", *path.relative_to(ROOT / "kernels").parent.parts])
        for name in imports(path, package):
            top = name.split(".")[0]
            assert top == "kernels" or top in allowed, f"{path} imports {name}"
            assert name != "kernels.." and not name.startswith("minitorch"), path


def kernel_imports(folder: str) -> Iterator[tuple[Path, str]]:
    """Modules of `kernels` that a file below a folder of it imports, named from there."""
    for path in source_files(f"kernels/{folder}"):
        for name in imports(path, package_of(path)):
            if name.startswith("kernels."):
                yield path, name.removeprefix("kernels.")


def test_no_family_imports_another() -> None:
    for family in FAMILIES:
        for path, name in kernel_imports(f"flash_attention/{family}"):
            parts = name.split(".")
            other = parts[1] if parts[0] == "flash_attention" and len(parts) > 1 else family
            assert other == family or other not in FAMILIES, f"{path} imports {name}"


def test_the_machinery_of_kernels_knows_no_operation() -> None:
    for folder in ("cpu", "gpu"):
        for path, name in kernel_imports(folder):
            assert name.split(".")[0] in ("cpu", "gpu"), f"{path} imports {name}"


def test_one_file_imports_the_cuda_target() -> None:
    """So that another compiler of the same language is one line away."""
    for path in source_files("minitorch", "kernels", "project"):
        found = {name for name in imports(path, "x.y.z") if name.startswith("numba.cuda")}
        assert not found or path.name == "runtime.py", (
            f"{path}: take cuda from kernels/gpu/runtime.py"
        )


@pytest.mark.parametrize("simulated", ["0", "1"])
def test_numba_cuda_is_optional(simulated: str) -> None:
    """Without it numba's own CUDA target is imported; -S leaves out the file that replaces it."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), *sys.path]}\n"
        "import minitorch, numba.cuda\n"
        "assert 'numba_cuda' not in numba.cuda.__file__\n"
        "backend = minitorch.TensorBackend(minitorch.CudaKernelOps)\n"
        "x = minitorch.tensor([1.0, 2.0], backend=backend)\n"
        "x.sum().backward()\n"
        "assert x.grad.to_numpy().tolist() == [1.0, 1.0]\n"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": simulated},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_the_library_knows_neither_projects_nor_tests() -> None:
    for path in source_files("minitorch"):
        for name in imports(path, package_of(path)):
            assert name.split(".")[0] not in ("project", "tests", "kernels"), f"{path}: {name}"


def test_no_star_imports() -> None:
    for path in source_files("minitorch", "kernels", "project", "tests"):
        assert not any(name.endswith(".*") for name in imports(path, "x.y.z")), path


def test_all_is_what_is_exported() -> None:
    exported = {
        name
        for name, value in vars(minitorch).items()
        if not name.startswith("_") and type(value).__name__ != "module"
    }
    assert len(minitorch.__all__) == len(set(minitorch.__all__))
    missing = [name for name in minitorch.__all__ if not hasattr(minitorch, name)]
    assert not missing
    assert exported <= set(minitorch.__all__)


def test_a_line_has_one_array_in_shared_memory() -> None:
    """numba's simulator knows an array by its line: two would be one. (Those of size 0 are.)"""
    for path in source_files("kernels"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            own = line.count("shared.array(") - line.count("shared.array(0,")
            assert own <= 1, f"{path}:{number}"


@pytest.mark.parametrize("folder", ["minitorch", "kernels", "project", "tests"])
def test_files_stay_small(folder: str) -> None:
    for path in source_files(folder):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, f"{path} has {lines} lines: cut it in two"


@pytest.mark.parametrize("folder", ["minitorch", "kernels", "project"])
def test_functions_fit_on_a_screen(folder: str) -> None:
    most = MOST_KERNEL_LINES if folder == "kernels" else MOST_FUNCTION_LINES
    for path in source_files(folder):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                lines = own_lines(node)
                assert lines <= most, f"{path}: {node.name} has {lines} lines"


def own_lines(function: ast.FunctionDef) -> int:
    """Lines of the body, without the docstring and the bodies of functions defined inside."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    inner = (node for part in body for node in ast.walk(part) if isinstance(node, ast.FunctionDef))
    lines = set(range(body[0].lineno, (body[-1].end_lineno or 0) + 1))
    for other in inner:
        lines -= set(range(other.body[0].lineno, (other.end_lineno or 0) + 1))
    return len(lines)


def build(command: str, source: Path, out: Path) -> Path:
    """Call the build backend as pip does, without a new environment."""
    code = f"import setuptools.build_meta as b, sys; print(b.{command}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return out / run.stdout.splitlines()[-1]


def test_wheel_and_source_archive(tmp_path: Path) -> None:
    """The wheel holds `minitorch` alone, kernels included, and is the same from the archive."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("minitorch", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)

    archive = build("build_sdist", source, tmp_path)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "direct").mkdir()
    (tmp_path / "indirect").mkdir()
    contents = [
        set(zipfile.ZipFile(build("build_wheel", where, out)).namelist())
        for where, out in ((source, tmp_path / "direct"), (unpacked, tmp_path / "indirect"))
    ]
    assert contents[0] == contents[1]
    files = {name for name in contents[0] if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"minitorch"}
    wanted = {p.relative_to(ROOT).as_posix() for p in source_files("minitorch")}
    wanted |= {f"minitorch/{p.relative_to(ROOT).as_posix()}" for p in source_files("kernels")}
    assert files == wanted | {"minitorch/py.typed"}
