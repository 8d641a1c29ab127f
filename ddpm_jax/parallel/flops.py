"""Floating-point operations of a program, counted in the program as it was traced.

XLA's own count of a compiled program lacks what it hands to libraries, such as convolutions to
cuDNN.  The count here is the same on every platform.
"""

import math
from collections.abc import Iterator

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters import partial_eval


def flops(program: ClosedJaxpr) -> float:
    """Count the operations of a program's matrix products and convolutions, on all devices.

    A multiplication and its addition are two operations.  Of a convolution only the products with
    elements of its input count, not those with padding or with the holes of a dilated input, as in
    XLA's HloCostAnalysis.  The body of `lax.scan` counts as often as it runs, the body of a
    `while` loop, whose number of rounds is unknown, once; of the branches of `lax.cond`, the one
    with the most operations counts.  What no result depends on does not count.

    Args:
      program: as jax traces it.

    Returns:
      The number of operations.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _flops(jaxpr)


def _flops(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _of_product(equation)
        elif name == "conv_general_dilated":
            total += _of_convolution(equation)
        else:
            inner = [_flops(body) for body in _bodies(params)]
            if name == "cond":
                total += max(inner)
            elif name == "scan":
                total += params["length"] * sum(inner)
            elif name == "shard_map":  # its body is of one device
                total += math.prod(params["mesh"].shape.values()) * sum(inner)
            else:
                total += sum(inner)
    return total


def _bodies(params: dict[str, object]) -> Iterator[Jaxpr]:
    """Yield the programs within an equation."""
    for value in params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, ClosedJaxpr):
                yield body.jaxpr
            elif isinstance(body, Jaxpr):
                yield body


def _of_product(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    size = math.prod(_shape(equation.outvars[0]))
    products: int = math.prod(left[axis] for axis in contracted)
    return 2.0 * size * products


def _shape(variable: Var | Literal) -> tuple[int, ...]:
    return tuple(variable.aval.shape)  # type: ignore[attr-defined]


def _of_convolution(equation: JaxprEqn) -> float:
    params = equation.params
    x, kernel = map(_shape, equation.invars)
    out = _shape(equation.outvars[0])
    numbers = params["dimension_numbers"]
    # A kernel's inputs are those of a group; a group of the batch has its own outputs.
    channels = kernel[numbers.rhs_spec[1]]
    total: float = 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * channels
    for number, (low, _) in enumerate(params["padding"]):
        side = x[numbers.lhs_spec[2 + number]]
        places = np.arange(out[numbers.out_spec[2 + number]]) * params["window_strides"][number]
        window = np.arange(kernel[numbers.rhs_spec[2 + number]]) * params["rhs_dilation"][number]
        at, dilation = places[:, None] + window - low, params["lhs_dilation"][number]
        total *= int(((at >= 0) & (at <= (side - 1) * dilation) & (at % dilation == 0)).sum())
    return total
