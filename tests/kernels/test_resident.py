"""The resident executor's CUDA source, run on a CPU by a stand-in for CUDA, against float64 autodiff."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import resident_shim
from tests.kernels.resident_shim import Net
from tests.oracle import maml_loop, relative_error

ROOT = Path(__file__).resolve().parents[2]
FLOAT64_BOUND = 1e-11  # sums of less than a hundred terms through a few steps round to some hundred units of 1e-16
EPS32 = torch.finfo(torch.float32).eps
NO_COMPILER = "g++ is not installed"

needs_compiler = pytest.mark.skipif(not resident_shim.compiler(), reason=NO_COMPILER)

SINUSOID = Net((1, 40, 40, 1), ("relu", "relu", "identity"), (True, True, True))
NETS = {
    "sinusoid": SINUSOID,
    "tanh": Net((1, 9, 6, 1), ("tanh", "tanh", "identity"), (True, True, True)),
    "one layer": Net((5, 3), ("identity",), (True,), "cross_entropy"),
    "classes": Net((3, 5, 7, 4), ("gelu", "tanh", "identity"), (True, False, True), "cross_entropy"),
    "ignored": Net((3, 8, 4), ("silu", "identity"), (False, True), "cross_entropy", ignored=2),
    "many classes": Net((2, 6, 37), ("sigmoid", "identity"), (True, True), "cross_entropy", mean=False),
    "binary": Net((4, 7, 5, 3), ("gelu", "sigmoid", "leaky_relu"), (True, False, True), "binary_cross_entropy"),
    "curved outputs": Net((2, 7, 2), ("leaky_relu", "silu"), (True, False), mean=False),
    "all outputs bend": Net((2, 7, 3), ("gelu", "gelu"), (False, False), "binary_cross_entropy", mean=False),
    "wide": Net((3, 70, 34, 33), ("relu", "tanh", "sigmoid"), (True, True, False)),
    "deep": Net((2, 3, 5, 2, 4, 3), ("tanh", "silu", "relu", "gelu", "identity"), (True,) * 5, "cross_entropy"),
    "small": Net((1, 1), ("tanh",), (True,)),
}


class Truth:
    """A meta-step by autodiff in float64, and the arguments of the same one elsewhere."""

    def __init__(
        self,
        net: Net,
        steps: int,
        *,
        rates: str = "scalar",
        second_order: bool = True,
        tasks: int = 2,
        support: int = 5,
        query: int = 3,
    ) -> None:
        self.net, self.steps, self.second_order = net, steps, second_order
        self.module = net.module(torch.float64)
        self.names = [name for name, _ in self.module.named_parameters()]
        self.support, self.query = net.data(tasks, support, torch.float64), net.data(tasks, query, torch.float64)
        size = (1, len(self.names)) if rates == "tensor" else (1, 1)
        self.alpha = (0.05 + 0.1 * torch.rand(size, dtype=torch.float64)).requires_grad_()
        lr = dict(zip(self.names, self.alpha[0], strict=True)) if rates == "tensor" else self.alpha[0, 0]
        self.lr = lr
        self.loss, self.losses, self.outputs, grads = maml_loop(
            self.module, net.criterion, self.support, self.query, lr, steps, first_order=not second_order
        )
        self.gradient = torch.cat([grads[name].reshape(-1) for name in self.names])
        learned = [grads[f"lr.{name}"] for name in self.names] if rates == "tensor" else [grads["lr"]]
        self.d_alpha = torch.stack(learned)[None] if rates == "tensor" else learned[0].reshape(1, 1)

    def run(self, dtype: torch.dtype = torch.float64, **options: object) -> resident_shim.Result:
        """The same by the resident executor."""

        def cast(x: Tensor) -> Tensor:
            return x.detach().to(dtype) if x.is_floating_point() else x

        return resident_shim.run(
            self.net,
            [cast(p) for p in self.module.parameters()],
            (cast(self.support[0]), cast(self.support[1])),
            (cast(self.query[0]), cast(self.query[1])),
            cast(self.alpha),
            self.steps,
            **{"second_order": self.second_order, **options},  # type: ignore[arg-type]
        )

    def compare(self, result: resident_shim.Result, bound: float) -> None:
        """Everything within ``bound``."""
        assert relative_error(result.loss, self.loss.detach()) < bound
        assert relative_error(result.losses, self.losses) < bound
        assert relative_error(result.outputs, self.outputs) < bound
        assert relative_error(result.gradient, self.gradient) < bound
        if self.steps:
            assert relative_error(result.d_alpha, self.d_alpha.detach()) < bound


@needs_compiler
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", NETS)
def test_meta_gradient(name: str, steps: int) -> None:
    truth = Truth(NETS[name], steps, rates="tensor" if len(name) % 2 else "scalar")
    truth.compare(truth.run(), FLOAT64_BOUND)


@needs_compiler
@pytest.mark.parametrize("name", ["classes", "binary", "curved outputs", "tanh"])
def test_float32_is_as_exact_as_pytorch(name: str) -> None:
    """Its error is that of the same work by autodiff in float32, or of as many roundings as a gradient has sums."""
    truth = Truth(NETS[name], 2)
    module = truth.net.module(torch.float32)
    module.load_state_dict({n: p.float() for n, p in truth.module.state_dict().items()})
    sets = [tuple(t.float() if t.is_floating_point() else t for t in s) for s in (truth.support, truth.query)]
    *_, grads = maml_loop(module, truth.net.criterion, *sets, truth.alpha[0, 0].item(), 2)
    peer = relative_error(torch.cat([grads[n].reshape(-1) for n in truth.names]), truth.gradient)
    # every element is a sum over rows of sums over features, some ten roundings long
    truth.compare(truth.run(torch.float32), 2 * peer + 16 * EPS32)


@needs_compiler
@pytest.mark.parametrize("name", ["classes", "binary", "tanh"])
@pytest.mark.parametrize("learned", [False, True])
def test_first_order(name: str, learned: bool) -> None:
    truth = Truth(NETS[name], 2, second_order=False)
    result = truth.run(learned=learned)
    if not learned:
        result.d_alpha = truth.d_alpha
    truth.compare(result, FLOAT64_BOUND)


@needs_compiler
@pytest.mark.parametrize(("tasks", "support", "query"), [(1, 1, 1), (1, 1, 4), (3, 7, 1), (2, 2, 35), (9, 3, 2)])
def test_numbers_of_tasks_and_rows(tasks: int, support: int, query: int) -> None:
    truth = Truth(NETS["classes"], 2, tasks=tasks, support=support, query=query)
    truth.compare(truth.run(), FLOAT64_BOUND)


@needs_compiler
def test_the_same_bits_in_every_order_on_any_number_of_threads_and_in_either_memory() -> None:
    truth = Truth(NETS["classes"], 3, support=7)
    first = truth.run(torch.float32)
    assert not first.spilled
    kept = [truth.run(torch.float32, seed=seed, threads=threads) for seed, threads in [(1, 64), (2, 96), (3, 128)]]
    least = next(limit for limit in range(1024, resident_shim.LARGEST, 64) if fits(truth, limit))
    spilled = truth.run(torch.float32, limit=least, seed=4)
    assert spilled.spilled
    truth.compare(truth.run(limit=2 * least), FLOAT64_BOUND)
    for other in [*kept, spilled]:
        for a, b in zip(first.tensors(), other.tensors(), strict=True):
            assert torch.equal(a, b)


def fits(truth: Truth, limit: int) -> bool:
    """Whether so many bytes of shared memory are enough."""
    try:
        truth.run(torch.float32, limit=limit)
    except ValueError:
        return False
    return True


@needs_compiler
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", NETS)
def test_a_factored_first_layer(name: str, steps: int) -> None:
    truth = Truth(NETS[name], steps, rates="scalar" if len(name) % 2 else "tensor", second_order=len(name) % 3 > 0)
    truth.compare(truth.run(factored=True), FLOAT64_BOUND)


@needs_compiler
def test_a_factored_first_layer_gives_the_same_bits_and_takes_no_memory_for_its_width() -> None:
    net = Net((97, 6, 4), ("tanh", "identity"), (True, True), "cross_entropy")
    truth = Truth(net, 3, support=7, query=9)
    with pytest.raises(ValueError, match="must fit into 10240 bytes"):
        truth.run(torch.float32, limit=10240)
    kept, spilled = {"factored": True, "limit": 10240}, {"factored": True, "limit": 8192}
    first = truth.run(torch.float32, **kept)
    others = [truth.run(torch.float32, seed=1, threads=threads, **kept) for threads in (64, 96)]
    others.append(truth.run(torch.float32, seed=2, **spilled))
    assert [one.spilled for one in (first, *others)] == [False, False, False, True]
    for other in others:
        for a, b in zip(first.tensors(), other.tensors(), strict=True):
            assert torch.equal(a, b)
    # each number of the Gram matrix sums 97 products
    truth.compare(first, 64 * EPS32)


@needs_compiler
def test_cotangents_of_the_losses() -> None:
    truth = Truth(NETS["classes"], 2)
    d_losses = torch.tensor([0.0, 2.0], dtype=torch.float64)
    alone = Truth.__new__(Truth)
    alone.__dict__.update(truth.__dict__)
    alone.support, alone.query = (tuple(t[1:] for t in s) for s in (truth.support, truth.query))
    given, one = truth.run(d_losses=d_losses), alone.run()
    assert relative_error(given.gradient, 2 * one.gradient) < FLOAT64_BOUND
    assert relative_error(given.d_alpha, 2 * one.d_alpha) < FLOAT64_BOUND


@needs_compiler
def test_rates_of_each_step() -> None:
    truth = Truth(NETS["tanh"], 3)
    alpha = torch.tensor([[0.1], [0.02], [0.3], [0.4]], dtype=torch.float64)  # one more than there are steps
    theta = {n: p.detach().requires_grad_() for n, p in truth.module.named_parameters()}
    rates = alpha.clone().requires_grad_()
    total = 0
    for t in range(2):
        phi = theta
        for k in range(3):
            inner = truth.net.criterion(
                torch.func.functional_call(truth.module, phi, (truth.support[0][t],)), truth.support[1][t]
            )
            g = torch.autograd.grad(inner, list(phi.values()), create_graph=True)
            phi = {n: p - rates[k, 0] * d for (n, p), d in zip(phi.items(), g, strict=True)}
        outer = truth.net.criterion(
            torch.func.functional_call(truth.module, phi, (truth.query[0][t],)), truth.query[1][t]
        )
        total = total + outer / 2
    *grads, d_alpha = torch.autograd.grad(total, [*theta.values(), rates])
    truth.alpha = alpha
    result = truth.run()
    assert relative_error(result.gradient, torch.cat([g.reshape(-1) for g in grads])) < FLOAT64_BOUND
    assert relative_error(result.d_alpha, d_alpha) < FLOAT64_BOUND
    assert result.d_alpha[3] == 0


@needs_compiler
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("second_order", [False, True])
def test_what_does_not_adapt_has_its_gradient(second_order: bool, factored: bool) -> None:
    """The executor's numbering has what adapts first: here the first layer alone."""
    net = Net((3, 4, 2), ("tanh", "identity"), (True, True))
    module = net.module(torch.float64)
    support, query = net.data(2, 4, torch.float64), net.data(2, 5, torch.float64)
    names = [n for n, _ in module.named_parameters()]
    loss, *_, grads = maml_loop(module, net.criterion, support, query, 0.2, 2, not second_order, names[:2])
    alpha = torch.full((1, 1), 0.2, dtype=torch.float64)
    parameters = list(module.parameters())
    options = {"adapted": 2, "second_order": second_order, "factored": factored}
    result = resident_shim.run(net, parameters, support, query, alpha, 2, **options)  # type: ignore[arg-type]
    assert relative_error(result.loss, loss.detach()) < FLOAT64_BOUND
    assert relative_error(result.gradient, torch.cat([grads[n].reshape(-1) for n in names])) < FLOAT64_BOUND


@needs_compiler
def test_evaluation_alone() -> None:
    truth = Truth(NETS["binary"], 2)
    result = truth.run(gradient=False)
    assert relative_error(result.losses, truth.losses) < FLOAT64_BOUND
    assert relative_error(result.outputs, truth.outputs) < FLOAT64_BOUND
    assert result.gradient.isnan().all()


@needs_compiler
def test_support_losses() -> None:
    truth = Truth(NETS["classes"], 2)
    result = truth.run()
    for t in range(2):
        x, y = truth.support[0][t], truth.support[1][t]
        first = truth.net.criterion(truth.module(x), y)
        assert relative_error(result.support_losses[0, t], first.detach()) < FLOAT64_BOUND
    again = Truth.__new__(Truth)
    again.__dict__.update(truth.__dict__)
    again.query = truth.support
    assert relative_error(result.support_losses[1], again_at_one(again)) < FLOAT64_BOUND


def again_at_one(truth: Truth) -> Tensor:
    """Losses on the query set after one step."""
    truth.steps = 1
    return truth.run().losses


@needs_compiler
def test_a_label_that_is_no_class_is_not_overlooked() -> None:
    truth = Truth(NETS["classes"], 1)
    truth.support[1][1, 2] = 99
    result = truth.run()
    assert result.losses[0].isfinite()
    assert result.losses[1].isnan()
    assert result.gradient.isnan().any()


@needs_compiler
def test_no_row_that_counts() -> None:
    truth = Truth(NETS["ignored"], 1)
    truth.query[1][0] = 2
    assert truth.run().losses.isnan().tolist() == [True, False]  # as PyTorch has it


FACTORED = Net((50, 40, 40, 3), ("tanh", "tanh", "identity"), (True, True, True))
BARRIER, WARP = "__syncthreads();\n", "__syncwarp();\n"
STEP = f"    pass<smooth>(plan, io, block, k);\n    {BARRIER}"
ADJOINT = f"    if (plan.second_order) tangent_pass<smooth>(plan, block, k);\n    {BARRIER}"
KEPT = f"  if (!plan.kept) return;\n  {BARRIER}"
STAGING = f"  if (block.warp < 2) stage_labels(plan, io, block);\n  {BARRIER}"
BEHIND = f"    put_behind<P>(a, l.a_stride, l.out, one_behind<R>(plan, i), rows.lane);\n    {WARP}"
DIVERGENT = {
    "threads of a block at different barriers": f"    if (block.warp == 0) {BARRIER}",
    "part of a warp at an operation of warps": f"    if (block.lane < 7) {WARP}",
}
# Of each fault, the file and the place that it is made in, and what is there with it.
FAULTS = {
    "no barrier before the step": ("kernel.cuh", STEP, STEP.replace(BARRIER, ";\n")),
    "no barrier before the adjoint's step": ("kernel.cuh", ADJOINT, ADJOINT.replace(BARRIER, ";\n")),
    "no barrier before the adjoint": ("kernel.cuh", KEPT, KEPT.replace(BARRIER, ";\n")),
    "no barrier after the staging": ("kernel.cuh", STAGING, STAGING.replace(BARRIER, ";\n")),
    "no wait of a warp": ("passes.cuh", BEHIND, BEHIND.replace(WARP, ";\n")),
    **{
        name: ("kernel.cuh", STEP, STEP.replace(BARRIER, f";\n{more}    {BARRIER}")) for name, more in DIVERGENT.items()
    },
}


class Changed:
    """The library without kernels for layers that are known, and with the one of ``FAULTS`` that is chosen, or none."""

    def __init__(self, folder: Path) -> None:
        for part in ("csrc", "tests/csrc"):
            shutil.copytree(ROOT / part, folder / part)
        resident = folder / "csrc" / "resident"
        text = (resident / "cuda.cu").read_text()
        begin = text.index("using Common = ")
        known = text[begin : text.index(";", begin) + 1]
        assert known.count("Regressor<") == len(COMMON)
        (resident / "cuda.cu").write_text(text.replace(known, "using Common = Kinds<>;"))
        places = dict.fromkeys((file, place) for file, place, _ in FAULTS.values())
        for file, place in places:
            text = (resident / file).read_text()
            assert text.count(place) == 1, text.count(place)
            chosen = [
                f"if (chosen == {i}) {{\n{with_fault}}} else "
                for i, (*where, with_fault) in enumerate(FAULTS.values(), 1)
                if (file, place) == tuple(where)
            ]
            (resident / file).write_text(text.replace(place, f"{''.join(chosen)}{{\n{place}}}\n"))
        shim = folder / "tests" / "csrc" / "cuda_shim.h"
        text = shim.read_text()
        assert text.count("namespace shim {\n") == 1
        shim.write_text(
            text.replace("namespace shim {\n", 'extern "C" int chosen;\nint chosen = 0;\nnamespace shim {\n')
        )
        self.path = resident_shim.build(folder, folder, "-O0")
        self.library = ctypes.CDLL(str(self.path))

    def with_fault(self, name: str | None) -> ctypes.CDLL:
        ctypes.c_int.in_dll(self.library, "chosen").value = [None, *FAULTS].index(name)
        return self.library


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Changed:
    return Changed(tmp_path_factory.mktemp("changed"))


COMMON = {
    f"{width} {activation}": Net((1, width, width, 1), (activation, activation, "identity"), (True, True, True))
    for width in (40, 64)
    for activation in ("relu", "tanh")
}


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"rates": "tensor"}, {"second_order": False}], ids=str)
@pytest.mark.parametrize("name", COMMON)
def test_kernels_for_known_layers_give_the_same_numbers(name: str, options: dict[str, Any], changed: Changed) -> None:
    any_layers = changed.with_fault(None)
    truth = Truth(COMMON[name], 2, **options)
    little = (40 if name.startswith("40") else 80) << 10  # bytes of shared memory that hold no step but the present one
    spilled = []
    for more in ({}, {"limit": little}, {"threads": 64}, {"gradient": False}):
        own = truth.run(torch.float32, seed=1, **more)
        other = truth.run(torch.float32, seed=1, of=any_layers, **more)
        spilled.append(own.spilled)
        for got, want in zip(own.tensors(), other.tensors(), strict=True):
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert spilled == [False, truth.second_order, False, False]  # of first order it holds one step alone
    assert relative_error(truth.run(torch.float32).loss, truth.loss.detach()) < 64 * EPS32


@needs_compiler
@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in DIVERGENT])
def test_a_missing_barrier_is_found(fault: str, changed: Changed) -> None:
    """Without it some order of threads gives another result."""
    threads = 128 if "barrier" in fault else 0
    for net, factored in ((SINUSOID, False), (FACTORED, True)):
        truth = Truth(net, 2)

        def error(library: ctypes.CDLL, seed: int, truth: Truth = truth, factored: bool = factored) -> float:
            result = truth.run(of=library, seed=seed, threads=threads, factored=factored)
            return float(relative_error(result.gradient, truth.gradient))

        assert error(changed.with_fault(None), 0) < FLOAT64_BOUND
        library = changed.with_fault(fault)
        assert not max(error(library, seed) for seed in range(3)) < FLOAT64_BOUND


@needs_compiler
@pytest.mark.parametrize("fault", DIVERGENT)
def test_a_divergent_barrier_aborts(fault: str, changed: Changed) -> None:
    code = (
        "import ctypes\nfrom tests.kernels.test_resident import FAULTS, SINUSOID, Truth\n"
        f"library = ctypes.CDLL({str(changed.path)!r})\n"
        f"ctypes.c_int.in_dll(library, 'chosen').value = {[None, *FAULTS].index(fault)}\n"
        "Truth(SINUSOID, 1).run(of=library)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"cuda shim: {fault}" in done.stderr
