"""From a JAX function to an ONNX graph, for the operations that the detectors are made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

OPSET, IR_VERSION = 18, 8  # read by onnxruntime from 1.14 on

# One ONNX operator each, with the same operands.
ELEMENTWISE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow", "neg": "Neg",
    "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "sqrt": "Sqrt", "sign": "Sign", "abs": "Abs",
    "logistic": "Sigmoid", "and": "And", "or": "Or", "not": "Not", "tanh": "Tanh", "floor": "Floor",
    "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip
UNCHANGED = ("stop_gradient", "copy", "copy_p", "optimization_barrier")
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


def to_onnx(function: Callable[..., dict[str, Any]], inputs: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """Converts a function to an `onnx.ModelProto`, with the arrays that it closes over as weights.

    The graph follows the function's jaxpr, operation by operation. What does not depend on the inputs is computed here.
    Args:
      function: from the inputs, in their order, to named outputs.
      inputs: name, shape and dtype. The first axis may be one symbolic dimension, the same for all.
    Raises: NotImplementedError, naming the operation, if there is no ONNX for it here.
    """
    with jax.default_matmul_precision("highest"):  # of what is computed here, also on a TPU
        closed, specs = jax.make_jaxpr(function, return_shape=True)(*inputs.values())
    graph = _Graph(inputs)
    outputs = graph.run(closed.jaxpr, closed.consts, [graph.inputs[name] for name in inputs])
    return graph.finish(dict(zip(sorted(specs), outputs, strict=True)), specs)


class _Value(NamedTuple):
    """An array of the function.

    Attributes:
      name: in the graph; empty for a constant.
      shape: as JAX sees it; where `is_whole` is False, the stored array has some axes of length 1.
      dtype: of the elements.
      constant: the array, where it is known.
      is_whole: False: the stored array is still to be broadcast to the shape, by the operation that uses it.
    """

    name: str
    shape: tuple
    dtype: np.dtype
    constant: np.ndarray | None = None
    is_whole: bool = True


class _Graph:
    """The nodes so far. A method `_name` converts the operation `name`."""

    def __init__(self, inputs: dict[str, jax.ShapeDtypeStruct]):
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}
        self.inputs = {name: _Value(name, spec.shape, np.dtype(spec.dtype)) for name, spec in inputs.items()}
        self._names: dict[int, str] = {}

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[_Value]) -> list[_Value]:
        """Converts all operations of a jaxpr and returns its results."""
        values = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        for eqn in jaxpr.eqns:
            operands = [_constant(v.val) if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
            values.update(zip(eqn.outvars, self._convert(eqn, operands), strict=True))
        return [_constant(v.val) if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]

    def finish(self, outputs: dict[str, _Value], specs: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """The model, without the nodes that no output needs."""
        from onnx import TensorProto, helper, numpy_helper

        for name, value in outputs.items():
            self._node("Identity", [self._whole(value)], specs[name], name=name)
        needed, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                nodes.append(node)

        def info(name: str, spec: Any) -> Any:
            kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8}
            shape = ["B" if _is_symbol(n) else n for n in spec.shape]
            return helper.make_tensor_value_info(name, kinds[np.dtype(spec.dtype).name], shape)

        graph = helper.make_graph(
            nodes[::-1],
            "detector",
            [info(name, value) for name, value in self.inputs.items()],
            [info(name, specs[name]) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items() if name in needed],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _convert(self, eqn: Any, operands: list[_Value]) -> list[_Value]:
        name, params, out = eqn.primitive.name, eqn.params, eqn.outvars[0].aval
        if name in CALLS:
            inner = params[CALLS[name]]
            closed = isinstance(inner, core.ClosedJaxpr)
            return self.run(inner.jaxpr if closed else inner, inner.consts if closed else (), operands)
        if name in UNCHANGED:
            return operands
        if name != "broadcast_in_dim" and all(v.constant is not None and v.is_whole for v in operands):
            results = eqn.primitive.bind(*(v.constant for v in operands), **params)
            return [_constant(x) for x in (results if eqn.primitive.multiple_results else [results])]
        if name in ELEMENTWISE:
            return [self._elementwise(ELEMENTWISE[name], operands, out)]
        method = getattr(self, f"_{name}", None)
        if method is None:
            raise NotImplementedError(f"the model uses the operation {name!r}, which has no conversion to ONNX here")
        if name == "top_k":
            return self._top_k(operands[0], eqn.outvars, **params)
        return [method(out, *operands, **params)]

    # ---------------------------------------------------------------------------------------- pieces of the graph

    def _node(self, op: str, inputs: Sequence[str], out: Any, name: str | None = None, **attributes: Any) -> _Value:
        """Adds a node with one output, of the shape and dtype of `out`."""
        from onnx import helper

        name = name or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return _Value(name, tuple(out.shape), np.dtype(out.dtype))

    def _weight(self, array: Any, dtype: Any = None) -> str:
        """The name of a constant; an array that is used several times is one."""
        array = np.asarray(array, dtype)
        name = self._names.setdefault(id(array), f"constant_{len(self.weights)}")
        self.weights[name] = array  # which keeps its id from being used again
        return name

    def _stored(self, value: _Value) -> str:
        """The name of what is stored of a value, perhaps still to be broadcast."""
        return value.name if value.constant is None else self._weight(value.constant)

    def _whole(self, value: _Value) -> str:
        """The name of a value in its full shape."""
        if value.is_whole:
            return self._stored(value)
        if not any(map(_is_symbol, value.shape)):
            shape = self._weight(value.shape, np.int64)
        else:
            size = _Value("", (1,), np.dtype(np.int64))
            batch = self._node("Shape", [next(iter(self.inputs))], size, start=0, end=1).name
            parts = [batch if _is_symbol(n) else self._weight([n], np.int64) for n in value.shape]
            shape = self._node("Concat", parts, size, axis=0).name
        return self._node("Expand", [self._stored(value), shape], value).name

    def _elementwise(self, op: str, operands: Sequence[_Value], out: Any) -> _Value:
        """ONNX broadcasts by itself; only if no operand has the result's shape, all must be what they stand for."""
        has_shape = any(v.is_whole and tuple(v.shape) == tuple(out.shape) for v in operands)
        names = [self._stored(v) if has_shape else self._whole(v) for v in operands]
        return self._node(op, names, out)

    def _reshaped(self, value: _Value, shape: Sequence[Any], out: Any) -> _Value:
        if sum(map(_is_symbol, shape)) > 1:
            raise NotImplementedError(f"a reshape to {shape} has no conversion to ONNX here")
        if value.constant is not None and value.is_whole:
            return _constant(value.constant.reshape(shape))
        target = self._weight([-1 if _is_symbol(n) else n for n in shape], np.int64)
        return self._node("Reshape", [self._whole(value), target], out)

    def _transposed(self, value: _Value, permutation: Sequence[int]) -> _Value:
        out = jax.ShapeDtypeStruct([value.shape[i] for i in permutation], value.dtype)
        if value.constant is not None and value.is_whole:
            return _constant(value.constant.transpose(permutation))
        if tuple(permutation) == tuple(range(len(permutation))):
            return value
        return self._node("Transpose", [self._whole(value)], out, perm=list(permutation))

    # --------------------------------------------------------------------------------- operations, by JAX's names

    def _square(self, out, x):
        return self._elementwise("Mul", [x, x], out)

    def _rsqrt(self, out, x, **_):
        return self._elementwise("Reciprocal", [self._elementwise("Sqrt", [x], out)], out)

    def _integer_pow(self, out, x, y):
        return self._elementwise("Pow", [x, _constant(np.array(y, x.dtype))], out)

    def _ne(self, out, x, y):
        return self._elementwise("Not", [self._elementwise("Equal", [x, y], out)], out)

    def _rem(self, out, x, y):
        return self._node("Mod", [self._whole(x), self._whole(y)], out, fmod=1)

    def _is_finite(self, out, x):
        huge = _constant(np.array(np.finfo(x.dtype).max, x.dtype))
        return self._elementwise("LessOrEqual", [self._elementwise("Abs", [x], x), huge], out)

    def _select_n(self, out, which, if_false, if_true):
        return self._elementwise("Where", [which, if_true, if_false], out)

    def _convert_element_type(self, out, x, **_):
        from onnx import helper

        kind = helper.np_dtype_to_tensor_dtype(np.dtype(out.dtype))
        return self._node("Cast", [self._whole(x)], out, to=kind)

    def _broadcast_in_dim(self, out, x, *, shape, broadcast_dimensions, **_):
        """Only adds axes of length 1: what uses the value broadcasts it, if it must."""
        thin = [x.shape[broadcast_dimensions.index(i)] if i in broadcast_dimensions else 1 for i in range(len(shape))]
        is_whole = tuple(thin) == tuple(shape)
        if x.constant is not None and x.is_whole:
            if np.issubdtype(x.dtype, np.integer) and not any(map(_is_symbol, shape)):
                return _constant(np.broadcast_to(x.constant.reshape(thin), shape))  # indices must be known
            return _Value("", tuple(shape), x.dtype, x.constant.reshape(thin), is_whole)
        return self._reshaped(x, thin, jax.ShapeDtypeStruct(shape, x.dtype))._replace(is_whole=is_whole)

    def _reshape(self, out, x, *, new_sizes, dimensions, **_):
        assert dimensions is None
        return self._reshaped(x, new_sizes, out)

    def _squeeze(self, out, x, **_):
        return self._reshaped(x, out.shape, out)

    def _expand_dims(self, out, x, **_):
        return self._reshaped(x, out.shape, out)

    def _transpose(self, out, x, *, permutation):
        return self._transposed(x, permutation)

    def _concatenate(self, out, *parts, dimension):
        return self._node("Concat", [self._whole(x) for x in parts], out, axis=dimension)

    def _stack(self, out, *parts, axis):
        thin = jax.ShapeDtypeStruct([*out.shape[:axis], 1, *out.shape[axis + 1 :]], out.dtype)
        return self._concatenate(out, *(self._reshaped(x, thin.shape, thin) for x in parts), dimension=axis)

    def _slice(self, out, x, *, start_indices, limit_indices, strides):
        axes = [i for i in range(len(x.shape)) if tuple(x.shape)[i] != tuple(out.shape)[i]]
        steps = strides or [1] * len(x.shape)
        lists = [[values[i] for i in axes] for values in (start_indices, limit_indices)]
        lists += [axes, [steps[i] for i in axes]]
        return self._node("Slice", [self._whole(x), *(self._weight(v, np.int64) for v in lists)], out)

    def _pad(self, out, x, value, *, padding_config):
        if any(inner or low < 0 or high < 0 for low, high, inner in padding_config):
            raise NotImplementedError(f"the padding {padding_config} has no conversion to ONNX here")
        pads = self._weight([p[0] for p in padding_config] + [p[1] for p in padding_config], np.int64)
        return self._node("Pad", [self._whole(x), pads, self._whole(value)], out)

    def _gather(self, out, x, indices, *, dimension_numbers, slice_sizes, **_):
        """Picks along one axis, along rows and columns at once, or per picture. No index is out of range."""
        axes, collapsed = dimension_numbers.start_index_map, dimension_numbers.collapsed_slice_dims
        if dimension_numbers.operand_batching_dims == (0,) and axes == collapsed == (1,):  # [B, Q, ...], [B, K, 1]
            wide = self._convert_element_type(jax.ShapeDtypeStruct(indices.shape, np.int64), indices)
            return self._node("GatherND", [self._whole(x), self._whole(wide)], out, batch_dims=1)
        if len(axes) == 1 and axes == collapsed:
            thin = jax.ShapeDtypeStruct(indices.shape[:-1], indices.dtype)
            picked = self._reshaped(indices, thin.shape, thin)
            return self._node("Gather", [self._whole(x), self._whole(picked)], out, axis=axes[0])
        if len(axes) == 1 and not collapsed and indices.constant is not None:  # one slice
            picked = self._weight(indices.constant + np.arange(slice_sizes[axes[0]]), np.int64)
            return self._node("Gather", [self._whole(x), picked], out, axis=axes[0])
        if len(axes) == 2 and axes == collapsed and indices.constant is not None and indices.constant.ndim == 3:
            grid = indices.constant
            rows, columns = grid[:, :1, :1], grid[:1, :, 1:]
            if np.array_equal(grid, np.concatenate(np.broadcast_arrays(rows, columns), -1)):
                name = self._whole(x)
                for axis, picked in zip(axes, (rows, columns), strict=True):
                    value = self._node("Gather", [name, self._weight(picked.ravel(), np.int64)], out, axis=axis)
                    name = value.name
                return value
        raise NotImplementedError(f"the indexing {dimension_numbers} has no conversion to ONNX here")

    def _over_axes(self, op: str, out: Any, x: _Value, axes: Sequence[int]) -> _Value:
        return self._node(op, [self._whole(x), self._weight(axes, np.int64)], out, keepdims=0)

    def _reduce_sum(self, out, x, *, axes, **_):
        return self._over_axes("ReduceSum", out, x, axes)

    def _reduce_max(self, out, x, *, axes, **_):
        return self._over_axes("ReduceMax", out, x, axes)

    def _argmax(self, out, x, *, axes, **_):
        (axis,) = axes
        return self._convert_element_type(out, self._node("ArgMax", [self._whole(x)], out, axis=axis, keepdims=0))

    def _cumsum(self, out, x, *, axis, reverse):
        return self._node("CumSum", [self._whole(x), self._weight(axis, np.int64)], out, reverse=int(reverse))

    def _top_k(self, x, outvars, *, k, axis, **_):
        from onnx import helper

        values, indices = f"TopK_{len(self.nodes)}", f"TopK_{len(self.nodes)}_indices"
        inputs = [self._whole(x), self._weight([k], np.int64)]
        self.nodes.append(helper.make_node("TopK", inputs, [values, indices], name=values, axis=axis))
        first, second = (v.aval for v in outvars)
        wide = _Value(indices, tuple(second.shape), np.dtype(np.int64))
        return [_Value(values, tuple(first.shape), first.dtype), self._convert_element_type(second, wide)]

    def _conv_general_dilated(self, out, x, kernel, **params):
        dimensions, batch_groups = params["dimension_numbers"], params["batch_group_count"]
        if batch_groups != 1 or any(n != 1 for n in params["lhs_dilation"]):
            raise NotImplementedError("a transposed or batch-grouped convolution has no conversion to ONNX here")
        low_high = np.array(params["padding"]).T  # ONNX lists all starts, then all ends
        inputs = [self._transposed(x, dimensions.lhs_spec), self._transposed(kernel, dimensions.rhs_spec)]
        y = self._node(
            "Conv",
            [self._whole(v) for v in inputs],
            jax.ShapeDtypeStruct([out.shape[i] for i in dimensions.out_spec], out.dtype),
            strides=list(params["window_strides"]),
            dilations=list(params["rhs_dilation"]),
            pads=low_high.ravel().tolist(),
            group=params["feature_group_count"],
        )
        return self._transposed(y, np.argsort(dimensions.out_spec).tolist())

    def _reduce_window_max(self, out, x, *, window_dimensions, window_strides, padding, **dilations):
        """Over the two axes in the middle."""
        edges = (window_dimensions[0], window_dimensions[-1], window_strides[0], window_strides[-1])
        if len(out.shape) != 4 or set(edges) != {1} or any(n != 1 for steps in dilations.values() for n in steps):
            raise NotImplementedError(f"pooling over windows of {window_dimensions} has no conversion to ONNX here")
        y = self._node(
            "MaxPool",
            [self._whole(self._transposed(x, (0, 3, 1, 2)))],
            jax.ShapeDtypeStruct([out.shape[i] for i in (0, 3, 1, 2)], out.dtype),
            kernel_shape=list(window_dimensions[1:3]),
            strides=list(window_strides[1:3]),
            pads=np.array(padding[1:3]).T.ravel().tolist(),
        )
        return self._transposed(y, (0, 2, 3, 1))

    def _dot_general(self, out, x, y, *, dimension_numbers, **_):
        """A matrix product of the last two axes; those before them are shared, or only the left operand has them."""
        ((contract_x,), (contract_y,)), (batch_x, batch_y) = dimension_numbers
        free_x = [i for i in range(len(x.shape)) if i != contract_x and i not in batch_x]
        free_y = [i for i in range(len(y.shape)) if i != contract_y and i not in batch_y]
        if len(free_y) > 1 or (batch_x and len(free_x) > 1):
            raise NotImplementedError(f"the product {dimension_numbers} has no conversion to ONNX here")
        x = self._transposed(x, [*batch_x, *free_x, contract_x])
        y = self._transposed(y, [*batch_y, contract_y, *free_y])
        if not free_x:
            x = self._reshaped(x, [*x.shape[:-1], 1, x.shape[-1]], x)
        if not free_y:
            y = self._reshaped(y, [*y.shape, 1], y)
        product = self._node("MatMul", [self._whole(x), self._whole(y)], out)
        return product if free_x and free_y else self._reshaped(product, out.shape, out)


def _constant(array: Any) -> _Value:
    array = np.asarray(array)
    return _Value("", array.shape, array.dtype, array)


def _is_symbol(size: Any) -> bool:
    return not isinstance(size, int | np.integer)
