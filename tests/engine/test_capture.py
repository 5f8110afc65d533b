"""A meta-step replayed from a CUDA graph gives what it gives without, to the last bit."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.engine.capture import MOVES, Captures, _Kind
from fastmeta.engine.evaluation import Evaluation, MetaGradient, Solution


def small(seed: int = 0, **options) -> fm.MAML:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(options.pop("p", 0.0)), nn.Linear(8, 3)).cuda()
    settings = {"lr": 0.1, "steps": 2, "executor": "reference"} | options
    return fm.MAML(model, F.cross_entropy, **settings)


def tasks(seed: int = 0, count: int = 3, n: int = 5) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, n, 6, generator=generator)
        return x.cuda(), torch.randint(3, (count, n), generator=generator).cuda()

    return fm.TaskBatch(support=batch(), query=batch())


def assert_same(a, b) -> None:
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name


def both(**options) -> tuple[fm.MAML, fm.MAML]:
    return small(**options), small(**options, cuda_graph=False)


def test_what_an_evaluation_holds_is_taken_apart_in_order():
    x = [torch.full((), float(i)) for i in range(7)]
    gradient = MetaGradient([x[4]], [None, x[5]], None)
    evaluation = Evaluation(x[0], x[1], x[2], [x[3]], gradient, [{"mean": x[6]}])
    tensors, together = evaluation.apart()
    assert [t.item() for t in tensors] == [float(i) for i in range(7)]
    doubled = together(t * 2 for t in tensors)
    assert doubled.loss.item() == 0
    assert doubled.support_losses.item() == 4
    assert doubled.outputs[0].item() == 6
    assert doubled.meta_gradient.outer[0] is None
    assert doubled.meta_gradient.outer[1].item() == 10
    assert doubled.meta_gradient.alpha is None
    assert doubled.mutations[0]["mean"].item() == 12
    solution = Solution(*torch.arange(20.0, 24.0))
    solved = MetaGradient([x[3]], [x[4]], None, solution=solution)
    tensors, together = Evaluation(x[0], x[1], x[2], [], solved, [{"mean": x[6]}]).apart()
    assert [t.item() for t in tensors] == [0, 1, 2, 3, 4, 20, 21, 22, 23, 6]
    again = together(tensors)
    assert again.meta_gradient.solution == solution
    assert again.mutations[0]["mean"].item() == 6
    tensors, together = Evaluation(x[0], x[1], x[2], [], None, []).apart()
    assert len(tensors) == 3
    assert together(tensors).gradient is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 0},
        {"first_order": True},
        {"plan": "factored"},
        {"chunk_size": 2},
        {"parameters": ["3.*"]},
        {"lr": {"0.weight": 0.1, "0.bias": 0.2, "3.weight": 0.3, "3.bias": 0.0}},
    ],
    ids=str,
)
def test_replays_equal_eager_steps_on_new_values(options):
    captured, eager = both(**options)
    for seed in range(4):
        with torch.no_grad():
            for a, b in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
                a.add_(0.01 * seed)
                b.copy_(a)
        assert_same(captured.value_and_grad(tasks(seed)), eager.value_and_grad(tasks(seed)))
    assert "captured in a CUDA graph" in str(captured.explain(tasks()))
    assert "not captured" not in str(captured.explain(tasks()))
    assert "not captured in a CUDA graph (it was asked not to be)" in str(eager.explain(tasks()))


@pytest.mark.gpu
def test_backward_hooks_and_other_objectives():
    captured, eager = both()
    for seed in range(6):
        gradients = []
        for maml in (captured, eager):
            out = maml(tasks(seed))
            objective = out.loss if seed < 3 else (out.task_losses * torch.tensor([1.0, 2, 3], device="cuda")).sum()
            (objective if seed < 5 else objective + out.logits.square().mean()).backward()
            gradients.append([p.grad.clone() for p in maml.model.parameters()])
            maml.zero_grad()
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_learned_rates_one_a_step_and_one_a_parameter():
    for lr in (torch.tensor([0.1, 0.2]), torch.tensor(0.1)):
        rates = [nn.Parameter(lr.clone().cuda()) for _ in range(2)]
        captured, eager = small(lr=rates[0]), small(lr=rates[1], cuda_graph=False)
        for seed in range(4):
            assert_same(captured.value_and_grad(tasks(seed)), eager.value_and_grad(tasks(seed)))
            with torch.no_grad():
                for rate in rates:
                    rate.mul_(1.1)
    names = ("0.weight", "0.bias", "3.weight", "3.bias")
    tables = [{n: nn.Parameter(torch.tensor(0.1, device="cuda")) for n in names} for _ in range(2)]
    captured, eager = small(lr=tables[0]), small(lr=tables[1], cuda_graph=False)
    for seed in range(4):
        assert_same(captured.value_and_grad(tasks(seed)), eager.value_and_grad(tasks(seed)))


@pytest.mark.gpu
def test_results_are_the_callers_own():
    maml = small()
    for seed in range(3):
        maml.value_and_grad(tasks(seed))
    loss, gradients = maml.value_and_grad(tasks(0))
    kept = loss.clone(), {n: g.clone() for n, g in gradients.items()}
    gradients["0.weight"].add_(1)
    again = maml.value_and_grad(tasks(0))
    maml.value_and_grad(tasks(1))
    assert_same(again, kept)


@pytest.mark.gpu
def test_shapes_and_steps_have_graphs_of_their_own():
    captured, eager = both()
    for _ in range(3):
        for count, steps in ((3, 1), (2, 1), (3, 3)):
            batch = tasks(count, count=count)
            assert_same(captured.value_and_grad(batch, steps=steps), eager.value_and_grad(batch, steps=steps))


@pytest.mark.gpu
def test_parameters_that_move_are_followed_and_then_no_longer():
    captured, eager = both()
    earlier = []  # kept, so that no memory is used again

    def step(seed: int) -> None:
        for maml in (captured, eager):
            for i, p in enumerate(maml.model.parameters()):
                torch.manual_seed(100 * seed + i)
                earlier.append(p.data)
                p.data = torch.randn_like(p)
        assert_same(captured.value_and_grad(tasks(seed)), eager.value_and_grad(tasks(seed)))

    for seed in range(MOVES + 1):  # the first runs eagerly
        step(seed)
    with pytest.warns(UserWarning, match="the parameters lie elsewhere"):
        step(MOVES + 1)
    step(MOVES + 2)
    assert "the parameters lie elsewhere in memory at every meta-step" in str(captured.explain(tasks()))


def test_who_gives_up_says_so():
    kind = _Kind(captures=MOVES)
    with pytest.warns(UserWarning, match="eagerly from now on, because the parameters lie elsewhere"):
        Captures()._capture(kind, None, None, [], [], None)
    assert "the parameters lie elsewhere" in kind.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and once is enough
        Captures()._capture(kind, None, None, [], [], None)


@pytest.mark.gpu
def test_precision_and_other_graphs_are_kept_apart():
    maml = small()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest", "high"):
            torch.set_float32_matmul_precision(precision)
            want = small(cuda_graph=False).value_and_grad(tasks())
            assert_same(maml.value_and_grad(tasks()), want)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_dropout_draws_anew_and_a_second_run_draws_the_same():
    captured, eager = both(p=0.5)
    seen = []
    for seed in range(5):
        torch.manual_seed(seed)
        a = captured(tasks())
        torch.manual_seed(seed)
        b = eager(tasks())
        assert torch.equal(a.logits, b.logits)
        seen.append(a.loss.item())
        weight = torch.tensor([1.0, 2, 3], device="cuda")
        (a.task_losses * weight).sum().backward()
        (b.task_losses * weight).sum().backward()
        for p, q in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert len(set(seen)) == 5
    torch.manual_seed(0)
    assert len({captured(tasks()).loss.item() for _ in range(3)}) == 3


@pytest.mark.gpu
def test_running_statistics_follow():
    results = []
    for graph in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).cuda()
        maml = fm.MAML(model, F.cross_entropy, steps=2, update_running_stats=True, cuda_graph=graph)
        for seed in range(4):
            maml.value_and_grad(tasks(seed))
        results.append([b.clone() for b in model.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_streams_and_threads_take_turns():
    captured, eager = both()
    want = [eager.value_and_grad(tasks(seed)) for seed in range(4)]
    got: list = [None] * 4
    for seed in range(2):
        captured.value_and_grad(tasks(seed))

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        batch = tasks(seed)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                got[seed] = captured.value_and_grad(batch)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@pytest.mark.gpu
def test_what_waits_for_the_device_is_not_captured():
    maml = small(check_finite=True)
    for _ in range(3):
        maml.value_and_grad(tasks())
    assert "not captured in a CUDA graph (check_finite looks at every loss)" in str(maml.explain(tasks()))


@pytest.mark.gpu
def test_a_loss_that_cannot_be_captured_runs_eagerly_and_says_why():
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets)

    torch.manual_seed(0)
    maml = fm.MAML(nn.Linear(6, 3).cuda(), loss, executor="reference")
    batch = tasks()
    maml.value_and_grad(batch)
    _, programs = maml.prepare(batch)
    op = programs.support.instructions[0].op  # looks at the values from now on
    run = op.forward

    def looking(x):
        x[0].sum().item()
        return run(x)

    op.forward = looking
    with pytest.warns(UserWarning, match="runs eagerly from now on, because it cannot be captured") as seen:
        results = [maml.value_and_grad(batch) for _ in range(3)]
    assert len(seen) == 1
    assert_same(results[0], results[2])
    assert "it cannot be captured" in str(maml.explain(batch))
    torch.manual_seed(0)
    drawn = torch.randn(3, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3, device="cuda"), drawn)


@pytest.mark.gpu
def test_inside_a_callers_own_graph():
    maml, batch = small(), tasks()
    want = maml.value_and_grad(batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        maml.value_and_grad(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = maml.value_and_grad(batch)
    graph.replay()
    assert_same(got, want)


@pytest.mark.gpu
def test_conjugate_gradients_are_captured():
    def learner(**options) -> fm.IMAML:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).cuda()
        return fm.IMAML(model, F.cross_entropy, 0.1, 3, strength=1.0, cg_steps=5, **options)

    ours, eager = learner(), learner(cuda_graph=False)
    for seed in range(4):
        batch = tasks(seed=seed)
        assert_same(ours.value_and_grad(batch), eager.value_and_grad(batch))
        for own, other in zip(ours.solution.tensors(), eager.solution.tensors(), strict=True):
            assert torch.equal(own, other)
    assert "captured in a CUDA graph" in ours.explain(tasks()).executor


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.Identity, nn.Softplus], ids=lambda a: a.__name__)
def test_joined_layers_give_the_numbers_of_their_parts(activation):
    def learner(**options) -> fm.MAML:
        torch.manual_seed(0)
        # too wide for a block's shared memory, so that the resident executor leaves it to the task-batched kernels
        model = nn.Sequential(nn.Linear(6, 300), activation(), nn.Linear(300, 300), activation(), nn.Linear(300, 3))
        dtype = options.pop("dtype", torch.float32)
        settings = {"lr": 0.1, "steps": 3, "plan": "dense"} | options
        return fm.MAML(model.to("cuda", dtype), F.cross_entropy, **settings)

    def batch(dtype: torch.dtype) -> fm.TaskBatch:
        return tasks(n=33).to(dtype=dtype)

    for options in ({}, {"first_order": True}, {"parameters": ["2.*"]}, {"lr": torch.tensor(0.1, requires_grad=True)}):
        exact = learner(dtype=torch.float64, executor="reference", **options).value_and_grad(batch(torch.float64))[1]
        plain = learner(executor="reference", **options).value_and_grad(batch(torch.float32))[1]
        maml = learner(**options)
        got = [maml.value_and_grad(batch(torch.float32))[1] for _ in range(3)][-1]
        assert "linear_block" in str(maml.explain(batch(torch.float32)))
        size = sum(float(g.norm()) ** 2 for g in exact.values()) ** 0.5
        for name, want in exact.items():
            own = (plain[name] - want).norm()
            # the parts' own error, doubled, and roundings of sums of up to 300 products in another order
            assert (got[name] - want).norm() <= 2 * own + 1e-6 * size, name
