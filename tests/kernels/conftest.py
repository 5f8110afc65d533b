"""Triton's interpreter without what it does again and again: it computes the same in a third of the time.

Without its debug mode it also looks for integers that overflow, in ten operations each, and then keeps silent. Here it
looks in two of NumPy's, and says so.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

EXACT = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield  # tests of Triton's kernels say for themselves that it is missing; others need none
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        _patch_language_once(interpreter, patch)
        _share_types(interpreter, patch)
        semantic = type(interpreter.interpreter_semantic)  # of which some versions make more than this one
        patch.setattr(semantic, "binary_op_sanitize_overflow_impl", staticmethod(no_overflow))
        yield


def no_overflow(left: Any, right: Any, operation: Callable[..., Any]) -> None:
    """An integer sum, difference or product must fit into the type of its operands."""
    if left.type.scalar.int_bitwidth >= 64:
        return
    kind = left.type.scalar
    exact = EXACT[operation.__name__](*(side.handle.data.astype(numpy.int64) for side in (left, right)))
    fits = exact.size == 0 or (kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value())
    assert fits, f"{kind} overflow detected for operation {operation.__name__}"


def _patch_language_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """The language's functions are exchanged for the interpreter's once a launch and module, not at every call."""
    exchange, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(function: Callable[..., Any]) -> Any:
        place = id(function.__globals__)
        if place in done:
            return None  # what a launch gives back is of its own call, which is the first
        done.add(place)
        return exchange(function)

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        done.clear()
        return launch(self, *arguments, **options)

    patch.setattr(interpreter, "_patch_lang", once)
    patch.setattr(interpreter.GridExecutor, "__call__", launched)


def _share_types(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Types of blocks, and all that tensors of one shape have in common, are made once; but those of pointers."""
    tensor, block = interpreter.tl.tensor, interpreter.tl.block_type
    make, numpy_type = tensor.__init__, functools.cache(interpreter._get_np_dtype)
    shared = functools.cache(lambda kind, *shape: block(kind, list(shape)))
    made: dict[tuple[int, ...], dict[str, Any]] = {}

    def block_of(kind: Any, shape: Any) -> Any:
        return block(kind, shape) if kind.is_ptr() else shared(kind, *shape)

    def begin(self: Any, handle: Any, kind: Any) -> None:
        shape = tuple(kind.shape) if kind.is_block() else ()
        if shape not in made:
            make(self, handle, kind)
            made[shape] = dict(vars(self))
        vars(self).update(made[shape], handle=handle, type=kind, dtype=kind.scalar)

    def numpy_type_of(kind: Any) -> Any:
        return numpy.dtype(numpy.uint64) if kind.scalar.is_ptr() else numpy_type(kind.scalar)

    patch.setattr(tensor, "__init__", begin)
    patch.setattr(block, "with_element_ty", lambda self, kind: block_of(kind, self.shape))
    patch.setattr(interpreter.interpreter_builder, "get_block_ty", block_of)
    patch.setattr(interpreter, "_get_np_dtype", numpy_type_of)
