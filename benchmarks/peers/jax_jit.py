"""JAX, jitted: tasks by vmap or by lax.map.

Convolutions are written as products with patches. XLA's own convolution of one task's few images was measured 4 to 25
times slower on a CPU, and vmap over per-task weights makes grouped convolutions of it, slower still. On a GPU, form
``gpu``, vmap it is in any case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.base import Step, Unavailable, Unsupported, Variant
from benchmarks.workloads import Problem

Layer = Callable[[dict[str, Any], Any], Any]


def prepare(problem: Problem, form: str, *, wait: bool = True) -> Step:
    """One of the forms; without ``wait`` a step returns before its arrays are there."""
    try:
        import jax
    except ImportError as error:
        raise Unavailable(str(error)) from error

    if form == "vmap" and any(isinstance(m, nn.Conv2d) for m in problem.model.modules()):
        raise Unsupported("with convolutions lax.map over tasks is 2.5 times faster or more")
    layers = [_layer(name, m) for name, m in problem.model.named_children()]
    value = _loss(problem.loss)

    def inner(p: dict[str, Any], x: Any, y: Any) -> Any:
        for layer in layers:
            x = layer(p, x)
        return value(x, y)

    def task(p: dict[str, Any], xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
        for _ in range(problem.steps):
            g = jax.grad(inner)(p, xs, ys)
            p = jax.tree.map(lambda a, b: a - problem.lr * b, p, g)
        return inner(p, xq, yq)

    def over_tasks(p: dict[str, Any], *tensors: Any) -> Any:
        if form == "map":
            # The gradient is taken inside the loop, so that no task's residuals outlive it.
            return jax.tree.map(lambda g: g.mean(0), jax.lax.map(lambda t: jax.grad(task)(p, *t), tensors))
        return jax.grad(lambda q: jax.vmap(task, (None, 0, 0, 0, 0))(q, *tensors).mean())(p)

    return _bind(jax.jit(over_tasks), jax.block_until_ready if wait else lambda arrays: arrays, problem)


def _bind(gradient: Callable[..., Any], awaited: Callable[[Any], Any], problem: Problem) -> Step:

    theta = {n: _array(p.detach()) for n, p in problem.model.named_parameters()}
    tensors = [_array(t) for t in (*problem.support, *problem.query)]
    again = functools.partial(_bind, gradient, awaited)
    return Step(lambda: awaited(gradient(theta, *tensors)), _to_torch, again)


def _array(t: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray((t if t.is_floating_point() else t.int()).numpy())


def _to_torch(result: dict[str, Any]) -> dict[str, Tensor]:
    return {n: torch.from_numpy(np.array(g)) for n, g in result.items()}


def _loss(loss: Callable[..., Tensor]) -> Callable[[Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    if loss is F.mse_loss:
        return lambda out, y: ((out - y) ** 2).mean()
    if loss is F.cross_entropy:
        return lambda out, y: -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], axis=1).mean()
    raise Unsupported(f"no translation of {loss} to JAX")


def _layer(name: str, module: nn.Module) -> Layer:
    """One torch module as a function of (parameters, input), images NCHW as in torch."""
    import jax

    weight, bias = f"{name}.weight", f"{name}.bias"
    if isinstance(module, nn.Linear):
        return lambda p, x: x @ p[weight].T + p[bias]
    if isinstance(module, nn.ReLU):
        return lambda p, x: jax.nn.relu(x)
    if isinstance(module, nn.Tanh):
        return lambda p, x: jax.numpy.tanh(x)
    if isinstance(module, nn.Flatten):
        return lambda p, x: x.reshape(x.shape[0], -1)
    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.padding == (1, 1):
        return lambda p, x: _conv(x, p[weight]) + p[bias][:, None, None]
    if isinstance(module, nn.BatchNorm2d) and not module.track_running_stats:
        return functools.partial(_batch_norm, weight, bias, module.eps)
    if isinstance(module, nn.MaxPool2d) and module.kernel_size == 2:
        return lambda p, x: _max_pool(x)
    raise Unsupported(f"no translation of {module} to JAX")


def _conv(x: Any, w: Any) -> Any:
    import jax.numpy as jnp

    h, v = x.shape[2:]
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, :, i : i + h, j : j + v] for i in range(3) for j in range(3)]
    return jnp.einsum("ok,nkhw->nohw", w.transpose(0, 2, 3, 1).reshape(w.shape[0], -1), jnp.concatenate(shifted, 1))


def _batch_norm(weight: str, bias: str, eps: float, p: dict[str, Any], x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    mean = x.mean((0, 2, 3), keepdims=True)
    var = jnp.square(x - mean).mean((0, 2, 3), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps) * p[weight][:, None, None] + p[bias][:, None, None]


def _max_pool(x: Any) -> Any:
    """2x2 maxima; of equal values the first in row order gets the gradient, as in torch."""
    import jax.numpy as jnp

    h, v = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    a, b, c, d = (x[:, :, i:h:2, j:v:2] for i in (0, 1) for j in (0, 1))
    top, low = jnp.where(a >= b, a, b), jnp.where(c >= d, c, d)
    return jnp.where(top >= low, top, low)


VMAP = Variant("jax.vmap", "jax", "compiled", functools.partial(prepare, form="vmap"), "jitted JAX, vmap over tasks")
MAP = Variant("jax.map", "jax", "compiled", functools.partial(prepare, form="map"), "jitted JAX, lax.map over tasks")
