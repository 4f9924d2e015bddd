"""The Triton backend without a GPU: results in Triton's interpreter, machine code for every target."""

import json
import operator
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench.gpu import compile_kernels
from bench.gpu.compile_kernels import Case, Kernel
from bench.gpu.interpreted import mend
from bench.gpu.launches import forced, kept
from devkit.paths import ROOT
from tfmq.geometry import Geometry
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Tile

UNIT = Path(__file__).parent
CAPABILITIES = [c for c in compile_kernels.SHARED_MEMORY if c not in compile_kernels.AROUND]
# What the package index has wheels of Triton for, and so what the developer's requirements install it on.
HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64"
needs_triton = pytest.mark.skipif(
    not HAS_WHEELS, reason=f"no Triton for {sys.platform} {platform.machine()}: its kernels are tested on Linux x86-64"
)


# --- results --------------------------------------------------------------------------------------------------------


@needs_triton
def test_results_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton reads the switch when it is imported."""
    names = "test_kernels", "test_leaf", "test_last_input", "interpreted_triton"
    files = [UNIT / f"{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.interpreted", *map(str, files)]
    # The interpreter is slow; random input off the grid is in interpreted_triton.py, with more shapes.
    command += ["-k", "triton and not test_parity_on_random_input"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed > 100, done.stdout[-2000:]
    assert not (tmp_path / "tfmq").exists()  # nothing was timed


@needs_triton
@pytest.mark.parametrize("scoped", [True, False], ids=["from 3.6 on", "before"])
def test_a_scalar_of_the_interpreter_is_a_number_with_any_numpy(monkeypatch: pytest.MonkeyPatch, scoped: bool) -> None:
    """Triton before 3.7 turned an array of one entry into a number, which numpy 2.4 refuses."""
    import numpy
    from triton.runtime import interpreter

    class Scope:
        def set_attr(self, of: type, name: str, value: object) -> None:
            setattr(of, name, value)

    class Scalar:
        handle = types.SimpleNamespace(data=numpy.array([[3]]))

    def as_before(tensor: type, *scope: Scope) -> None:
        for put in [s.set_attr for s in scope] or [setattr]:
            put(tensor, "__index__", lambda self: int(self.handle.data))

    scope = [Scope()] if scoped else []
    as_before(Scalar, *scope)
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        with pytest.raises(TypeError, match="0-dimensional"):
            operator.index(Scalar())
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", as_before)
    mend()
    mend()  # once is enough
    interpreter._patch_lang_tensor(Scalar, *scope)
    assert operator.index(Scalar()) == 3


@needs_triton
def test_the_host_counts_in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own functions are made for kernels: on the host they took a tenth of a layer's time."""
    import triton

    from tfmq.geometry import StaticInput
    from tfmq.kernels.triton import launch as triton_launch

    for n in (*range(1, 70), 127, 128, 129, 1 << 20, (1 << 20) + 1):
        assert triton_launch.power_of_2(n) == triton.next_power_of_2(n)
        assert all(triton_launch.cdiv(n, k) == triton.cdiv(n, k) for k in (1, 3, 16, 128))
    for name in ("cdiv", "next_power_of_2"):
        monkeypatch.setattr(triton, name, None)
    grid = StaticInput(torch.ones(1), torch.zeros(1, dtype=torch.int32), None)
    weight = triton_backend.prepare(torch.zeros(8, 32, dtype=torch.int8), torch.ones(8), Geometry((8, 32)))
    x = torch.zeros(5, 32)
    with kept(found := {}):
        with forced(Tile(64, 64, 64, 2, 4, 2)):
            triton_backend.linear_static(x, weight, grid, None)
        triton_backend.linear_dynamic(x, weight, None, None)
        triton_launch.group_norm(torch.zeros(1, 8, 4, 4), 2, torch.ones(8), torch.zeros(8), 1e-5)
    assert {launch.kernel.__name__ for launch in found.values()} == names_of_kernels()


# --- machine code ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def names_of_kernels() -> set[str]:
    """All that a launch could start."""
    import triton

    from tfmq.kernels.triton import norm as triton_norm
    from tfmq.kernels.triton import product as triton_product
    from tfmq.kernels.triton import quantize as triton_quantize

    modules = triton_norm, triton_product, triton_quantize
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


@needs_triton
@pytest.mark.parametrize("capability", compile_kernels.SHARED_MEMORY)
def test_every_kernel_compiles(cache: None, capability: int) -> None:
    """There is machine code, it fits the GPU, and keeps its sums in registers."""
    found = list(compile_kernels.kernels(capability))
    assert [(kernel.case, kernel.name, kernel.failed) for kernel in found if kernel.failed] == []
    assert all(kernel.built.registers > 0 for kernel in found)
    if capability in compile_kernels.AROUND:
        assert {kernel.name for kernel in found} == {"quantize_kernel", "quantize_rows_kernel", "finish_kernel"}
        return
    assert {kernel.name for kernel in found} == names_of_kernels()
    products = [kernel for kernel in found if kernel.name == "product_kernel"]
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    for kernel in products:
        lines = [line for line in kernel.built.ptx.splitlines() if instruction in line]
        assert lines and all(".s32.s8.s8" in line for line in lines), f"{kernel.case}: no int8 tensor core instruction"
        # A short product of odd sizes has one step, and nothing to fetch ahead.
        assert "cp.async" in kernel.built.ptx or "odd" in kernel.case, f"{kernel.case}: loads are not pipelined"


@needs_triton
def test_what_does_not_compile_is_named(cache: None) -> None:
    """A tile that no GPU holds, a call that raises: both are reported, and the cases behind them still come."""
    good = compile_kernels.cases(86)[0]
    huge = good._replace(name="huge", tile=Tile(128, 256, 128, 1, 8, 4))

    def broken() -> None:
        raise ValueError("no such layer")

    found = list(compile_kernels.kernels(86, [huge, Case("broken", broken), good]))
    failures = {kernel.case: kernel.failed for kernel in found if kernel.failed}
    assert set(failures) == {"huge", "broken"}
    assert "shared memory" in failures["huge"] or "spilled" in failures["huge"]
    assert failures["broken"] == "ValueError: no such layer"
    assert "linear static" in {kernel.case for kernel in found if kernel.failed is None}


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_shipped_tiles_fit(capability: int) -> None:
    """Shared memory of every tile by its own arithmetic; the largest is among what is compiled above."""
    tiles = triton_tune.tiles_of((capability // 10, capability % 10))
    for tile in tiles:
        assert tile.stages * (tile.m + tile.n) * tile.k <= compile_kernels.SHARED_MEMORY[capability]
        assert tile.m * tile.n <= 128 * 32 * tile.warps
    assert compile_kernels.largest(capability) in {case.tile for case in compile_kernels.cases(capability)}


def wide(kernel: Kernel, what: str) -> tuple[int, int]:
    """Reads (ld) or writes (st) of global memory in the code: all of them, and those of 16 bytes each."""
    found = re.findall(rf"\b{what}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", kernel.built.ptx)
    return len(found), sum(int(count or 1) * int(bits) == 128 for count, bits in found)


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_results_are_written_16_bytes_at_a_time(cache: None, capability: int) -> None:
    tile = Tile(128, 128, 64, 1, 8, 3)
    each = 128 * 128 // (32 * tile.warps)  # results of a thread
    known = {case.name: case for case in compile_kernels.cases(capability)}
    cases = [known[name]._replace(tile=tile) for name in ("conv 3 x 3", "linear per token", "linear static, plain")]
    split = known["conv 3 x 3"]._replace(name="split", tile=tile._replace(split=2))
    made = {(k.case, k.name): k for k in compile_kernels.kernels(capability, [*cases, split])}
    for case in cases:
        assert wide(made[case.name, "product_kernel"], "st") == (each // 8,) * 2  # of 8 float16
    assert wide(made["split", "product_kernel"], "st") == (each // 4,) * 2  # of 4 int32
    finish, each = made["split", "finish_kernel"], 32 * 64 // (32 * 4)
    assert wide(finish, "st") == (each // 8,) * 2
    assert wide(finish, "ld")[1] >= 2 * each // 4  # both shares, beside what is read per column


@needs_triton
@pytest.mark.parametrize("balanced", [True, False])
def test_the_input_of_a_layer_is_read_16_bytes_at_a_time(cache: None, balanced: bool) -> None:
    """By the strides that the launch really has: of a Linear, and of an image in channels_last order."""
    from tfmq.geometry import StaticInput
    from tfmq.kernels.triton import launch as triton_launch

    grid = StaticInput(torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.ones(320) if balanced else None)
    rows = torch.empty(100, 320, dtype=torch.float16)
    image = torch.empty(2, 320, 8, 8, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    cases = [
        Case("rows", lambda: triton_launch.quantize_matrix(rows, grid, 320)),
        Case("image", lambda: triton_launch.quantize_image(image, grid, 320, (1, 1))),
    ]
    for case in cases:
        (kernel,) = compile_kernels.kernels(89, [case])
        assert wide(kernel, "ld")[1] >= 128 * 32 // (32 * 8) // 8
        assert not re.search(r"ld\.global(\.\w+)*?\.b16\b", kernel.built.ptx), "one float16 at a time"


@needs_triton
def test_no_int8_product_compiles_for_turing(cache: None, capfd: pytest.CaptureFixture) -> None:
    product = next(case for case in compile_kernels.cases(80) if case.name == "linear static")
    (found,) = [kernel for kernel in compile_kernels.kernels(75, [product]) if kernel.name in ("", "product_kernel")]
    assert found.failed
    capfd.readouterr()
    assert triton_backend.CAPABILITY > (7, 5)


@needs_triton
def test_the_matrix_of_versions_runs_to_its_end(tmp_path: Path) -> None:
    """With the Triton that is here, for one capability; installing is left out. Another version than was asked for, one
    that crashes and one that cannot be installed are failures."""
    import triton

    out, here = tmp_path / "matrix.json", triton.__version__
    program = (
        "import os, sys; from bench.gpu import compile_matrix as m\n"
        "from pathlib import Path\n"
        f"m.FOLDER = Path({str(tmp_path)!r})\n"
        "m.install = lambda version, _: 'cannot be installed' if version == '3.0.0' else None\n"
        "right = m.compile_all\n"
        "def compile_all(version, *rest):\n"
        "    m.CHILD = 'import os; os.abort()' if version == '3.8.0' else CHILD\n"
        "    return right(version, *rest)\n"
        "CHILD, m.compile_all = m.CHILD, compile_all\n"
        "sys.exit(m.main())\n"
    )
    versions = f"{here},3.0.0,3.8.0,3.9.9"
    command = [sys.executable, "-c", program, "--versions", versions, "--capabilities", "75", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    good, missing, crashed, other = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert good["failed"] == [] and good["kernels"] >= 3 and good["most_registers"] > 0
    assert missing["failed"] == ["cannot be installed"] and missing["kernels"] == 0
    assert "exit code -6" in crashed["failed"][0]
    assert other["failed"] == [f"this was Triton {here}"]
    assert all(failure in done.stdout for cell in (missing, crashed, other) for failure in cell["failed"])


def test_the_pack_runs_without_triton() -> None:
    """`import triton` fails in the child: the table still answers, with a sentence."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from tfmq.kernels import table\n"
        "from tfmq.kernels.triton import backend as triton_backend\n"
        "torch.cuda.get_device_capability = lambda *_: (9, 0)\n"
        "torch.cuda.get_device_name = lambda *_: 'a GPU'\n"
        "print(triton_backend.missing(torch.device('cuda')))\n"
        "print(table.pick(table.LINEAR_STATIC, torch.device('cuda'), table.Geometry((4, 4))).name)\n"
        "print('tfmq.kernels.triton.launch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["Triton is not installed", "float_product", "False"], done.stderr


@needs_triton
def test_a_schema_that_torch_cannot_read_leaves_eager_mode_alone() -> None:
    program = (
        "import torch\n"
        "inner = torch.library.custom_op\n"
        "def refuse(name, *rest, **more):\n"
        "    if name.startswith('tfmq::'): raise ValueError('unsupported type')\n"
        "    return inner(name, *rest, **more)\n"
        "torch.library.custom_op = refuse\n"
        "from tfmq.kernels.triton import backend as triton_backend\n"
        "print(triton_backend.unusable())\n"
        "from tfmq.kernels.triton import ops as triton_ops\n"
        "print(triton_ops.REGISTERED)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["None", "False"], done.stderr
    assert "torch.compile breaks its graphs" in done.stderr


# --- the benchmark --------------------------------------------------------------------------------------------------


@needs_triton
def test_the_benchmark_of_operations_runs_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    command = [sys.executable, "-m", "bench.speed_ops", "--device", "cpu", "--smoke", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))["models"]["smoke"]
    for operation in found["ops"]:
        assert operation["failed"] == [], done.stderr
        assert {"fp16", "int_mm", "quantize", "product_w8a8", "ours_w8a8", "ours_w4a8"} <= set(operation["median_us"])
        assert operation["product_rate_over_int_mm"] > 0
        assert ("ours_w8a8_nchw" in operation["median_us"]) == (operation["kind"] == "conv")
    assert {operation["kind"] for operation in found["ops"]} == {"conv", "linear"}
    assert found["mean_ratio"].keys() == set().union(*(operation["ratio"] for operation in found["ops"]))


def test_the_benchmark_does_not_measure_a_cpu() -> None:
    command = [sys.executable, "-m", "bench.speed_ops", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "--smoke" in done.stderr
