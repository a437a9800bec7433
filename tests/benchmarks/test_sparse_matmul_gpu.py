"""What `make gpu` does, as far as a machine without a GPU goes."""

import math
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest

from benchmarks import gpu, gpu_products, harness, sparse_matmul_gpu
from keras_weightmods.native.gpu import dispatch

pytestmark = pytest.mark.one_backend


class FakeBench:
    """Products by their names; a time for each method and algorithm."""

    chain = 1
    count = 40

    def __init__(self, best=20, fails=()):
        self.best, self.fails = best, fails
        self.won = []
        self.asked = []

    def methods(self, case):
        return [("dense", "bfloat16"), ("cusparselt", "bfloat16")]

    def algorithms(self, case, x):
        return range(self.count)

    def product(self, case, method, algorithm):
        return method, algorithm

    def program(self, case, method, x, algorithm):
        self.asked.append(algorithm)
        if algorithm in self.fails:
            raise RuntimeError("not this one")
        slow = 1e-3 if method[0] == "dense" else 1e-3 + 1e-5 * algorithm
        return 1e-4 if algorithm == self.best else slow

    def seconds(self, program, repeats):
        return program * repeats

    def is_alive(self):
        return True

    def describe(self):
        return {"device": "card", "versions": {"x": "1"}, "not_available": {}}


@pytest.fixture(autouse=True)
def no_errors(monkeypatch):
    monkeypatch.setattr(
        sparse_matmul_gpu, "relative_error", lambda *arguments: 0.0
    )


def measured(bench, case=(64, 16, "bfloat16")):
    return sparse_matmul_gpu.measure(bench, case, [], lambda *_: None)


def test_every_algorithm_is_tried_in_the_case():
    """17 and 20 win most large products on an H100."""
    bench = FakeBench(best=20, fails=(3, 4))
    result = measured(bench)
    assert result["algorithm"] == 20
    assert set(bench.asked) >= set(range(40))
    assert set(result["algorithms"]) == {
        str(a) for a in range(-1, 40) if a not in (3, 4)
    }
    assert result["microseconds"]["cusparselt"] < 200
    # The next case begins with what has won.
    bench.asked.clear()
    measured(bench)
    assert bench.asked[:4] == [-1, -1, -1, 20]


def test_jax_has_all_of_cusparselts_algorithms():
    bench = object.__new__(gpu_products.Jax)
    asked = []

    def algorithms(*product):
        asked.append(product)
        return 40

    bench.gpu = types.SimpleNamespace(cusparselt_algorithms=algorithms)
    assert [*bench.algorithms((64, 5, "int8"), None)] == [*range(40)]
    assert asked == [(0, 16, (64, 64), "int8")]


@pytest.fixture
def torch_bench(monkeypatch):
    """torch's products on a CPU, by what stands for its cuSPARSELt."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "set_grad_enabled", lambda wanted: None)
    monkeypatch.setattr(torch, "_cslt_compress", lambda kernel: kernel)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *_, **__: 20)
    return torch, gpu_products.Torch(dry_run=True)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "int8"])
def test_torch_takes_what_cusparselt_finds_the_fastest(
    torch_bench, monkeypatch, x_dtype
):
    """Without being asked it takes the algorithm 0."""
    torch, bench = torch_bench
    used = []

    def multiply(compressed, x, alpha=None, alg_id=0, **_):
        used.append(alg_id)
        return (compressed.float() @ x.float()).T.to(torch.bfloat16)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    case, x = (64, 5, x_dtype), gpu_products.activations(5, 64)
    method = "cusparselt", gpu_products.TYPES[x_dtype][0]
    found, _ = sparse_matmul_gpu.tune(bench, case, method, x)
    assert set(used) == {0, 20}
    assert found in (-1, 20)


def test_a_chain_goes_through_as_many_copies(torch_bench, monkeypatch):
    _, bench = torch_bench
    asked = []

    def copies_of(method, case):
        asked.append(method)
        return 3

    monkeypatch.setattr(gpu_products, "copies_of", copies_of)
    bench.dry_run, bench.chain = False, 4
    used = []

    def product(case, method, algorithm):
        copies = bench.copies(case, method)

        def multiply(x, weights):
            used.append(weights[0].data_ptr())
            return x

        return multiply, bench.torch.float32, copies

    monkeypatch.setattr(bench, "product", product)
    x = gpu_products.activations(2, 64)
    method = "cusparselt", "bfloat16"
    bench.program((64, 2, "bfloat16"), method, x)
    assert asked == [method]
    assert len({*used[:3]}) == 3
    assert used[3] == used[0]


def test_tuning_ends_with_its_time(monkeypatch):
    monkeypatch.setattr(sparse_matmul_gpu, "TUNE_SECONDS", 0.0)
    result = measured(FakeBench(best=39))
    # The one that cuSPARSELt proposes is always among them.
    assert result["algorithm"] == -1
    assert list(result["algorithms"]) == ["-1"]


@pytest.mark.parametrize("size", [4096, 8192])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["dense", "decode", "cusparselt"])
def test_copies_do_not_fit_into_a_cache(size, x_dtype, name):
    for value_dtype in gpu_products.TYPES[x_dtype]:
        count = gpu_products.copies_of((name, value_dtype), (size, 1, x_dtype))
        bits = 8 * gpu_products.BYTES[gpu_products.read_type(name, x_dtype)]
        if name == "decode":
            bits = 4 * gpu_products.BYTES[value_dtype] + 1
        elif name == "cusparselt":
            bits *= 9 / 16
        # Twice the second-level cache of an H100, more than that of a B200.
        assert count * size * size * bits / 8 >= 126 * 2**20
        assert count <= gpu_products.CHAIN


@pytest.fixture
def work(monkeypatch, tmp_path):
    """Runs the worker over the fake bench, for some cases."""

    def run(bench, seconds=1000.0, types=("bfloat16",), device="card"):
        monkeypatch.setattr(gpu_products, "Jax", lambda dry_run: bench)
        monkeypatch.setattr(sparse_matmul_gpu, "SIZES", (64,))
        monkeypatch.setattr(sparse_matmul_gpu, "ROWS", (16, 32))
        about = {**FakeBench().describe(), "device": device}
        monkeypatch.setattr(bench, "describe", lambda: about)
        arguments = types_of_arguments(tmp_path, seconds, types)
        sparse_matmul_gpu.work(arguments)
        return harness.read_json(arguments.json)["frameworks"]["jax"]

    return run


def types_of_arguments(folder, seconds, chosen):
    return types.SimpleNamespace(
        worker="jax",
        seconds=seconds,
        dry_run=False,
        types=chosen,
        json=folder / "report.json",
        table=folder / "table.json",
    )


def test_each_case_is_written_when_it_is_done(work, monkeypatch, tmp_path):
    seen = []

    class Watched(FakeBench):
        def methods(self, case):
            report = harness.read_json(tmp_path / "report.json")
            seen.append(len(report["frameworks"]["jax"]["cases"]))
            return super().methods(case)

    section = work(Watched())
    assert seen == [0, 1]
    assert [case["rows"] for case in section["cases"]] == [16, 32]
    table = dispatch.read_table(tmp_path / "table.json")
    assert [e["algorithm"] for e in table["card"][:1]] == [20]
    # bfloat16, int8 and int4 values.
    assert len(table["card"]) == 6


def test_what_was_measured_is_not_measured_again(work):
    work(FakeBench())
    again = FakeBench()
    section = work(again, types=("bfloat16", "float16"))
    assert len(section["cases"]) == 4
    assert {case["x_dtype"] for case in section["cases"]} == {
        "bfloat16",
        "float16",
    }
    # Those of another card are no part of it.
    section = work(FakeBench(), device="another card")
    assert len(section["cases"]) == 2


def test_a_method_that_ended_a_process_is_left_out(work, tmp_path):
    class Ends(FakeBench):
        def product(self, case, method, algorithm):
            if method[0] == "cusparselt":
                raise KeyboardInterrupt  # not caught: as if killed
            return super().product(case, method, algorithm)

    with pytest.raises(KeyboardInterrupt):
        work(Ends())
    assert sparse_matmul_gpu.give_up(tmp_path / "report.json", "jax")
    section = work(Ends())
    assert [list(case["failures"]) for case in section["cases"]] == [
        ["cusparselt"],
        ["cusparselt"],
    ]
    assert not sparse_matmul_gpu.give_up(tmp_path / "report.json", "jax")
    text = sparse_matmul_gpu.page(harness.read_json(tmp_path / "report.json"))
    assert "| rows | dense, us |" in text


def test_only_what_is_missing_is_installed(monkeypatch):
    installed = []
    lacking = ["keras", "namex", "optree"]
    find_spec = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util,
        "find_spec",
        lambda name: None if name in lacking else find_spec(name),
    )

    def run(*arguments, check):
        installed.extend(arguments)
        lacking.clear()

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.sys, "path", [*sys.path])
    gpu.install_missing()
    assert installed[-3:] == ["keras>=3.15", "namex", "optree"]
    assert "--no-deps" in installed
    assert installed[installed.index("--target") + 1] == gpu.PACKAGES


def test_environment_keeps_what_is_there(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    variables = gpu.environment()
    assert variables["PYTHONPATH"].split(os.pathsep)[-1] == "/theirs"
    assert variables["PATH"].endswith(os.environ["PATH"])
    assert variables["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"


def test_tests_on_a_gpu_take_float16_last(monkeypatch, tmp_path):
    steps = []

    def test(backend, dtypes, until):
        steps.append(("test", backend, dtypes))
        return "passed"

    monkeypatch.setattr(gpu, "test", test)
    monkeypatch.setattr(gpu, "install_missing", lambda: None)
    monkeypatch.setattr(gpu, "build", lambda: steps.append("build"))
    monkeypatch.setattr(
        gpu, "measure", lambda args, dtypes, until: steps.append(dtypes)
    )
    monkeypatch.setattr(gpu, "run", lambda *arguments: steps.append("page"))
    monkeypatch.setattr(sys, "argv", ["gpu", f"--results={tmp_path}"])
    with pytest.raises(SystemExit, match="0"):
        gpu.main()
    first, last = ("bfloat16", "int8", "float32"), ("float16",)
    assert steps == [
        "build",
        *[("test", backend, first) for backend in ("jax", "torch")],
        first,
        *[("test", backend, last) for backend in ("jax", "torch")],
        last,
        "page",
    ]


def test_each_process_of_tests_is_told_its_types(monkeypatch):
    told = []

    def run(*arguments, timeout, **variables):
        told.append(variables)
        return 0

    monkeypatch.setattr(gpu, "run", run)
    for dtypes in (("bfloat16", "int8"), ("float16",)):
        assert gpu.test("torch", dtypes, math.inf) == "passed"
    variable = "KERAS_WEIGHTMODS_GPU_TYPES"
    assert [each[variable] for each in told] == ["bfloat16,int8", "float16"]


def test_nine_minutes_hold_the_build(monkeypatch, tmp_path):
    now, untils = [1000.0], []
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu, "install_missing", lambda: None)
    monkeypatch.setattr(gpu, "build", lambda: now.append(now.pop() + 60))
    for name in ("test", "measure"):
        monkeypatch.setattr(
            gpu, name, lambda *about: untils.append(about[-1]) or "passed"
        )
    monkeypatch.setattr(gpu, "run", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["gpu", f"--results={tmp_path}"])
    with pytest.raises(SystemExit, match="0"):
        gpu.main()
    assert len(untils) == 6
    assert max(untils) - 1000 + gpu.GRACE_SECONDS <= 9 * 60


def test_what_hangs_is_ended_with_what_it_has_started(tmp_path):
    """A worker that goes on would keep the GPU."""
    path = tmp_path / "ticks"
    loop = f"while :; do echo >> {path}; sleep 0.05; done"
    code = f"import subprocess; subprocess.run(['sh', '-c', {loop!r}])"
    assert gpu.run("-c", code, timeout=2) is None
    ticks = path.stat().st_size
    time.sleep(0.3)
    assert path.stat().st_size == ticks
    assert gpu.run("-c", "raise SystemExit(3)") == 3
    with pytest.raises(subprocess.CalledProcessError):
        gpu.run("-c", "raise SystemExit(3)", check=True)


def test_dry_run(tmp_path):
    """All of it, in processes of their own, by torch on the CPU."""
    script = pathlib.Path(gpu.__file__)
    package = pathlib.Path(dispatch.__file__)
    table_of_package = package.with_name("dispatch.json")
    before = table_of_package.read_bytes()
    command = [sys.executable, script, "--dry-run", "--frameworks=torch"]
    subprocess.run([*command, "--results", tmp_path], check=True)
    report = harness.read_json(tmp_path / "sparse_matmul_gpu.json")
    assert set(report["tests"].values()) == {"skipped"}
    section = report["frameworks"]["torch"]
    assert [case["rows"] for case in section["cases"]] == [1, 8]
    assert all("dense" in case["microseconds"] for case in section["cases"])
    assert all("decode/int8" in case["failures"] for case in section["cases"])
    table = dispatch.read_table(tmp_path / "dispatch.json")
    assert len(table[gpu_products.NO_GPU]) == 6
    page = (tmp_path / "sparse_matmul_gpu.md").read_text()
    assert "## torch on no GPU, a dry run" in page
    assert table_of_package.read_bytes() == before
