"""``trace``: model and loss at one task's shapes become a flat graph of ATen calls."""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Output
from fastmeta.engine.objective import Objective

COLLECT, IS_ONE = "_collect_all_valid_cia_ops", "_is_preservable_cia_op"  # PyTorch's own; later versions may lack them
_TRACING = threading.Lock()  # a trace changes what is PyTorch's for a while, so one runs at a time
BROADCAST = "aten.broadcast_tensors.default"


class NotTraceable(Exception):
    """The objective cannot be traced to a graph that is sure to have its derivatives; the message says why."""


@dataclass(frozen=True)
class Node:
    """One call: which slots it reads and fills."""

    call: Call
    inputs: tuple[int, ...]  # slots, in the order of ``call.inputs``
    outputs: tuple[int, ...]  # slots, in the order of ``call.outputs``
    module: str = ""  # the submodule whose parameters it reads


@dataclass
class Graph:
    """A task's objective as data flow between numbered slots, in static single assignment.

    Attributes:
        parameters: slot of each parameter by name.
        buffers: slot of each buffer by name.
        data: slots of the batch's leaves, in pytree order.
        constants: value of each slot that the trace fixed.
        nodes: the calls in an order that can be executed.
        loss: slot of the loss.
        outputs: slots of the outputs' tensor leaves; ``outputs_spec`` rebuilds the pytree (``None`` where it is a
            leaf), in which ``outputs_kept`` marks the leaves that are tensors (the others are ``None``).
        mutations: slot of the new value of each buffer that the forward pass updates.
        values: what one task's value of each slot looks like.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    data: tuple[int, ...] = ()
    constants: dict[int, Tensor] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    loss: int = -1
    outputs: tuple[int, ...] = ()
    outputs_spec: Any = None
    outputs_kept: tuple[bool, ...] = ()
    mutations: dict[str, int] = field(default_factory=dict)
    values: list[Output] = field(default_factory=list)

    def new_slot(self, value: Tensor) -> int:
        """A fresh slot for values like ``value``."""
        self.values.append(Output(tuple(value.shape), value.dtype))
        return len(self.values) - 1


def trace(objective: Objective, parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Graph:
    """Trace ``objective`` at the shapes of ``batch``.

    Args:
        objective: model and loss.
        parameters: parameters by name; only shapes, dtypes and devices matter.
        buffers: buffers by name, likewise.
        batch: the batch of one task, without the task axis.

    Returns:
        The graph, without calls that nothing reads.

    Raises:
        NotTraceable: control flow or shapes depend on data, or a derivative would be lost on the way: a custom
            ``autograd.Function``, a ``no_grad`` region, a backward hook, a tensor outside the model that requires
            grad.
        TypeError, ValueError: the objective's own complaints about its loss.
    """
    for name, module in objective.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotTraceable(f"module {name or 'model'} has a backward hook, which a trace cannot see")
        if any(type(value) is torch.ScriptObject for value in vars(module).values()):
            raise NotTraceable(f"module {name or 'model'} holds packed weights, as quantised layers do, and no tensors")
    leaves, spec = pytree.tree_flatten(batch)
    root = _Root(objective, list(parameters), list(buffers), spec)
    arguments = (
        [p.detach() for p in parameters.values()],
        [b.detach() for b in buffers.values()],
        leaves,
    )
    with _TRACING, _untouched(objective), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.enable_grad(), _functions_raise():
                exported = torch.export.export(root, arguments, strict=False)
            if root.notes.lost:
                raise NotTraceable(root.notes.lost[0])
            keeps = keeps_attention((*arguments[0], *leaves))
            table = _decompositions(keeps, keeps and not _learns_a_mask(exported, len(parameters)))
            with _composites_of(exported, table):
                exported = exported.run_decompositions(table)
        except NotTraceable:
            raise
        except (TypeError, ValueError) as error:
            if str(error).startswith("MAML:"):
                raise
            raise NotTraceable(_first_line(error)) from error
        except Exception as error:  # export reports an untraceable model by many types
            raise NotTraceable(root.notes.lost[0] if root.notes.lost else _first_line(error)) from error
    graph = _convert(exported, list(parameters), list(buffers), len(leaves))
    graph.outputs_spec, graph.outputs_kept = root.notes.outputs_spec, root.notes.outputs_kept
    return graph


@dataclass
class _Notes:
    """What a trace found out; an object of its own, because export reverts what a forward writes into its module."""

    lost: list[str] = field(default_factory=list)
    outputs_spec: Any = None
    outputs_kept: tuple[bool, ...] = ()


class _Root(nn.Module):
    """What is exported: flat lists in, loss and flat outputs out. It hides the model, so its state stays an input."""

    def __init__(self, objective: Objective, parameters: list[str], buffers: list[str], spec: Any) -> None:
        super().__init__()
        self._hidden = (objective, parameters, buffers, spec)
        self.notes = _Notes()

    def forward(self, parameters: list[Tensor], buffers: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        objective, parameter_names, buffer_names, spec = self._hidden
        with _Watch(self.notes.lost):
            loss, outputs = objective(
                dict(zip(parameter_names, parameters, strict=True)),
                dict(zip(buffer_names, buffers, strict=True)),
                pytree.tree_unflatten(leaves, spec),
            )
        flat, structure = pytree.tree_flatten(outputs)
        self.notes.outputs_spec = None if structure.is_leaf() else structure
        if not all(isinstance(value, Tensor) for value in flat if value is not None):
            raise NotTraceable("the model returns values that are not tensors")
        self.notes.outputs_kept = tuple(value is not None for value in flat)
        return [loss, *[value for value in flat if value is not None]]


class _Watch(TorchFunctionMode):
    """Notes what a trace would silently drop from the derivative."""

    def __init__(self, lost: list[str]) -> None:
        super().__init__()
        self.lost = lost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled" and args and args[0] is False:
            self.lost.append("the forward pass switches gradients off (torch.no_grad)")
        elif name == "__get__" and getattr(func, "__self__", None) is Tensor.data:
            self.lost.append("the forward pass reads .data, which hides a tensor from the derivative")
        elif name == "register_hook":
            self.lost.append("the forward pass registers a tensor hook")
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, _fake_tensor()):
                self.lost.append(
                    f"a tensor of shape {tuple(value.shape)} that requires grad is neither a parameter of the model "
                    "nor of the loss"
                )
        return func(*args, **kwargs)


def _fake_tensor() -> type:
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


@contextlib.contextmanager
def _functions_raise() -> Iterator[None]:
    """A custom ``autograd.Function`` would be traced through its forward, which loses its backward: stop there."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise NotTraceable(f"the custom autograd.Function {cls.__name__} brings its own backward")

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _untouched(objective: Objective) -> Iterator[None]:
    """Put back plain attributes the forward pass assigns, such as the ``weight`` of a pruned module.

    Without this a module would be left holding the tracer's fake tensors.
    """
    kept = [(module, dict(module.__dict__)) for _, module in objective.modules()]
    try:
        yield
    finally:
        for module, attributes in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def keeps_attention(tensors: Sequence[Any]) -> bool:
    """Whether attention stays one call: on a CPU, and on a GPU with kernels for it."""
    floating = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    kinds = {(t.device, t.dtype) for t in floating if t.device.type != "cpu"}
    return not any(triton_support.missing_reason(*kind) for kind in kinds)


def replays_dropout(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention with dropout is a call that the operation takes: nothing else draws it again in every map."""
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    return query.device.type == "cuda" and alike and key.shape[-2] > 0


def _learns_a_mask(exported: torch.export.ExportedProgram, parameters: int) -> bool:
    """Whether some attention adds a mask that a parameter, of which there are so many, reaches."""
    own = set(exported.graph_signature.user_inputs[:parameters])
    reached: set[Any] = set()
    for node in exported.graph.nodes:
        if node.name in own or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if mask in reached and mask.meta["val"].is_floating_point():
                return True
    return False


def _decompositions(keeps: bool, keeps_dropout: bool) -> dict[Any, Any]:
    """What is taken apart: attention, whose fused kernels have no second derivative, recurrent layers, group norm."""
    aten = torch.ops.aten
    recurrent = [aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input]
    own = {
        aten.scaled_dot_product_attention.default: partial(_attention, keeps=keeps, keeps_dropout=keeps_dropout),
        aten.group_norm.default: _group_norm,
        aten.instance_norm.default: _instance_norm,
    }
    return {**own, **get_decompositions(recurrent)}


@contextlib.contextmanager
def _composites_of(exported: torch.export.ExportedProgram, table: dict[Any, Any]) -> Iterator[None]:
    """Spare ``run_decompositions`` most of its time: it prepares all of 500 composite operations to stay whole.

    Those that the graph calls, and those that what is taken apart may call, are enough; the result is the same. Where
    this PyTorch collects them otherwise, it takes its time. A caller's own ``run_decompositions`` in another thread may
    meanwhile take apart a composite operation that it would keep.
    """
    from torch.export import exported_program

    if not all(hasattr(exported_program, name) for name in (COLLECT, IS_ONE)):
        yield
        return
    aten = torch.ops.aten
    wanted = {node.target for node in exported.graph.nodes} | table.keys()
    wanted |= {aten.linear.default, aten.layer_norm.default, aten.matmul.default, aten.softmax.int}
    is_one = getattr(exported_program, IS_ONE)
    few = {op for op in wanted if isinstance(op, torch._ops.OpOverload) and is_one(op)}
    collect = getattr(exported_program, COLLECT)
    setattr(exported_program, COLLECT, lambda: few)
    try:
        yield
    finally:
        setattr(exported_program, COLLECT, collect)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """A layer norm over each group; ATen's own asks for a memory format, which ``vmap`` cannot answer."""
    groups = input.reshape(input.shape[0], num_groups, -1)
    y = torch.nn.functional.layer_norm(groups, groups.shape[-1:], eps=eps).reshape(input.shape)
    channels = (-1, *[1] * (input.dim() - 2))
    if weight is not None:
        y = y * weight.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """A group norm of one channel a group; by running statistics it stays as it is."""
    if not use_input_stats or running_mean is not None:
        return NotImplemented
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    keeps: bool = False,
    keeps_dropout: bool = False,
) -> Any:
    """Products and a softmax, or the call as it is where ``keeps`` and the operation for it say so."""
    replayed = keeps_dropout and replays_dropout(query, key, value)
    if keeps and not enable_gqa and (dropout_p == 0 or replayed):
        return NotImplemented
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        rows, columns = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf)
        else:
            scores = scores + attn_mask
    weights = torch.softmax(scores, -1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value)


def _convert(exported: Any, parameters: list[str], buffers: list[str], leaves: int) -> Graph:
    """Turn an exported program into a :class:`Graph`."""
    signature = exported.graph_signature
    order = list(signature.user_inputs)
    graph = Graph()
    slots: dict[Any, Any] = {}  # fx node -> slot, or a list of slots for a call with several results
    placeholders = {}
    constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                raise NotTraceable(f"the batch holds a {type(value).__name__} where a tensor is expected")
            slots[node] = placeholders[node.name] = graph.new_slot(value)
            if node.name in constants:
                stored = {**exported.constants, **exported.state_dict}[constants[node.name]]
                graph.constants[slots[node]] = stored.detach()
        elif node.op == "call_function":
            _convert_call(graph, slots, node)
        elif node.op == "output":
            results = [slots[r] for r in node.args[0]]
        else:
            raise NotTraceable(f"the trace holds a {node.op} node ({node.name})")
    sources = [placeholders[name] for name in order]
    if len(sources) != len(parameters) + len(buffers) + leaves:
        raise NotTraceable("the trace has lost some of the objective's inputs")
    graph.parameters = dict(zip(parameters, sources, strict=False))
    graph.buffers = dict(zip(buffers, sources[len(parameters) :], strict=False))
    graph.data = tuple(sources[len(parameters) + len(buffers) :])
    names = {slot: name for name, slot in graph.buffers.items()}
    tensors = []
    for spec, slot in zip(signature.output_specs, results, strict=True):
        if spec.kind.name == "USER_INPUT_MUTATION":
            target = placeholders[spec.target]
            if target not in names:
                raise NotTraceable("the forward pass writes into its inputs or parameters")
            graph.mutations[names[target]] = slot
        elif spec.kind.name == "USER_OUTPUT":
            tensors.append(slot)
        else:
            raise NotTraceable(f"the trace has an output of kind {spec.kind.name}")
    graph.loss, graph.outputs = tensors[0], tuple(tensors[1:])
    drop_unread(graph)
    _name_modules(graph)
    return graph


def _convert_call(graph: Graph, slots: dict[Any, Any], node: Any) -> None:
    if node.target is operator.getitem:
        slots[node] = slots[node.args[0]][node.args[1]]
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        raise NotTraceable(f"the trace holds {node.target}, which is not an ATen call")
    value = node.meta.get("val")
    if value is None:  # an assertion on metadata
        return
    if str(node.target) == BROADCAST and all(
        a.meta["val"].shape == b.shape for a, b in zip(node.args[0], value, strict=True)
    ):
        slots[node] = [slots[a] for a in node.args[0]]  # F.mse_loss asks it of tensors that have one shape, too
        return
    args, kwargs = pytree.tree_map_only(torch.fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    results = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(r, Tensor) or r is None for r in results):
        raise NotTraceable(f"{node.target} returns a number that depends on data")
    if any(isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool) for a in pytree.tree_leaves((args, kwargs))):
        raise NotTraceable(f"{node.target} takes a number that depends on data")
    call = Call.bind(node.target, args, kwargs, value)
    outputs = [graph.new_slot(r) if isinstance(r, Tensor) else None for r in results]
    slots[node] = outputs if isinstance(value, (list, tuple)) else outputs[0]
    inputs = [slots[n] for n in _tensor_arguments(node)]
    graph.nodes.append(Node(call, tuple(inputs), tuple(o for o in outputs if o is not None)))


def _tensor_arguments(node: Any) -> Sequence[Any]:
    """The nodes a call reads, in the schema's order, as :meth:`Call.bind` numbers them."""
    found: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.fx.Node):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for v in value:
                walk(v)

    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            walk(node.args[i])
        elif argument.name in node.kwargs:
            walk(node.kwargs[argument.name])
    return found


def _name_modules(graph: Graph) -> None:
    """Name each call by the submodule whose parameters it reads."""
    owners = {slot: name.rpartition(".")[0] for name, slot in graph.parameters.items()}
    for i, node in enumerate(graph.nodes):
        read = [owners[slot] for slot in node.inputs if slot in owners]
        if read:
            graph.nodes[i] = replace(node, module=read[0])


def drop_unread(graph: Graph) -> None:
    """Leave out the calls whose results nothing reads."""
    read = {graph.loss, *graph.outputs, *graph.mutations.values()}
    kept = []
    for node in reversed(graph.nodes):
        if read.intersection(node.outputs):
            read.update(node.inputs)
            kept.append(node)
    graph.nodes = kept[::-1]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"
