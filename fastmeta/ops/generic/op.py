"""Any ATen call without an operation of its own; its maps come from ``torch.func``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported
from fastmeta.ops.generic import reference

# Draws that do not depend differentiably on the tensor they are given: PyTorch's own derivative is zero.
DRAWS = frozenset(
    {
        *("bernoulli", "rand_like", "randn_like", "randint_like", "normal", "normal_functional", "uniform"),
        *("exponential", "cauchy", "geometric", "log_normal", "random", "poisson", "multinomial", "binomial"),
    }
)


class GenericOp(TaskOp):
    """The four maps of any ATen overload, over its floating inputs and outputs.

    Slower than an operation of its own, exact all the same. Saves its inputs. A call that draws random numbers draws
    for each task, and its results are constants to the other maps.

    Raises:
        Unsupported: a random function of differentiable inputs (its draw could not be replayed), complex numbers, a
            call that writes into its arguments, a draw that takes no tensor (``rand_like(x)`` would do).
    """

    name: ClassVar[str] = "generic"
    saved_names: ClassVar[tuple[str, ...]] = ("inputs",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if call.target._schema.is_mutable:
            raise Unsupported(f"{call.target} writes into its arguments")
        dtypes = [i.dtype for i in call.inputs] + [o.dtype for o in call.outputs]
        if any(dtype.is_complex for dtype in dtypes):
            raise Unsupported(f"{call.target} on complex numbers")
        self.random = draws(call)  # type: ignore[misc]  # of this call, where the class can only say "maybe"
        self.active = tuple(i.position for i in call.inputs if i.dtype.is_floating_point)
        self.results = tuple(i for i, o in enumerate(call.outputs) if o.dtype.is_floating_point)
        if self.random:
            if self.active and base_name(call) not in DRAWS:
                raise Unsupported(f"{call.target} draws random numbers inside a differentiable function")
            if not call.inputs:
                raise Unsupported(f"{call.target} draws without a tensor that says how many tasks there are")
            self.active = ()
        self.forward_mode = True

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        with self._environment():
            y = reference.forward(lambda x, c: self._outputs(x), tuple(x), ())
        return y, (() if self.random else tuple(x))

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        wanted = tuple(p for p in self.active if need[p])
        if not wanted or not self._any(d_y):
            return self._spread((), ())
        with self._environment():
            d_x = reference.backward(*self._function(saved, wanted), self._dense(d_y, saved))
        return self._spread(wanted, d_x)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        moving = tuple(p for p in self.active if x_dot[p] is not None)
        result: list[Tensor | None] = [None] * len(self.call.outputs)
        if moving and self.results:
            dots = tuple(x_dot[p] for p in moving)
            y_dot = self._either(reference.tangent, reference.tangent_reverse, *self._function(saved, moving), dots)
            for i, value in zip(self.results, y_dot, strict=True):
                result[i] = value
        return tuple(result), tuple(x_dot)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        moving = tuple(p for p in self.active if saved_dot[p] is not None)
        wanted = tuple(p for p in self.active if need[p])
        if not moving or not self._any(d_y):
            return self.backward(saved, d_y_dot, need)
        if not wanted:
            return self._spread((), ())
        both = tuple(p for p in self.active if p in moving or p in wanted)
        d_x_dot = self._either(
            reference.tangent_backward,
            reference.tangent_backward_reverse,
            *self._function(saved, both),
            tuple(torch.zeros_like(saved[p]) if saved_dot[p] is None else saved_dot[p] for p in both),
            self._dense(d_y, saved),
            self._dense(d_y_dot, saved),
        )
        return self._spread(wanted, [d for p, d in zip(both, d_x_dot, strict=True) if p in wanted])

    def _outputs(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        result = self.call.run(tensors)
        result = result if isinstance(result, (list, tuple)) else (result,)
        return tuple(r for r in result if isinstance(r, Tensor))

    def _function(
        self, saved: tuple[Any, ...], positions: tuple[int, ...]
    ) -> tuple[reference.Function, reference.Many, reference.Many]:
        """The call as a function of the inputs at ``positions`` alone, those inputs, and all the others."""
        others = tuple(p for p in range(len(saved)) if p not in positions)

        def f(x: tuple[Tensor, ...], c: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tensors = dict(zip((*positions, *others), (*x, *c), strict=True))
            y = self._outputs([tensors[p] for p in range(len(saved))])
            return tuple(y[i] for i in self.results)

        return f, tuple(_dense(saved[p]) for p in positions), tuple(saved[p] for p in others)

    def _either(self, forward: Callable[..., Any], reverse: Callable[..., Any], *args: Any) -> Any:
        """Forward mode, or reverse mode alone from the first time PyTorch has no forward derivative."""
        with self._environment():
            if self.forward_mode:
                try:
                    return forward(*args)
                except NotImplementedError as error:
                    if "forward AD" not in str(error):
                        raise
                    self.forward_mode = False
            return reverse(*args)

    def _any(self, d_y: Tensors) -> bool:
        return any(d_y[i] is not None for i in self.results)

    def _dense(self, d_y: Tensors, saved: tuple[Any, ...]) -> reference.Many:
        """The cotangents of the floating outputs, zeros where there is none."""
        tasks, outputs = saved[0].shape[0], self.call.outputs
        return tuple(
            saved[0].new_zeros((tasks, *outputs[i].shape), dtype=outputs[i].dtype) if d is None else d
            for i, d in ((i, d_y[i]) for i in self.results)
        )

    def _spread(self, positions: Sequence[int], values: Sequence[Tensor]) -> Tensors:
        result: list[Tensor | None] = [None] * len(self.call.inputs)
        for p, v in zip(positions, values, strict=True):
            result[p] = v
        return tuple(result)

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            # An overload without a batching rule runs task by task inside vmap, which is what one would do by hand.
            warn = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
            stack.callback(warn, True)
            warn(False)
            if base_name(self.call) == "scaled_dot_product_attention":
                from torch.nn.attention import SDPBackend, sdpa_kernel

                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the only one with a second derivative
            yield


def base_name(call: Call) -> str:
    """``aten::bernoulli.p`` -> ``bernoulli``."""
    return call.target._schema.name.split("::")[-1]


def draws(call: Call) -> bool:
    """Whether the call draws random numbers with the arguments it has."""
    if torch.Tag.nondeterministic_seeded not in call.target.tags:
        return False
    switches = [call.arguments[k] for k in ("train", "training") if k in call.arguments]
    rates = [call.arguments[k] for k in ("dropout", "dropout_p") if k in call.arguments]
    return not any(s is False for s in switches) and not any(r == 0 for r in rates)


def _dense(value: Tensor) -> Tensor:
    """A copy where elements share memory, as in an expanded input: forward mode cannot lay a tangent over those."""
    return value.contiguous() if 0 in value.stride() else value
