"""The number of floating-point operations (FLOPs) of a program, counted in the jaxpr.

A count of the jaxpr is the same on every platform.  XLA also counts the operations of a compiled
program, but without library calls, such as the convolutions of cuDNN.
"""

import math
from collections.abc import Iterator

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters import partial_eval


def flops(program: ClosedJaxpr) -> float:
    """Return the number of operations in matrix products and convolutions, summed over devices.

    A multiplication followed by an addition is two operations.  In convolutions, products with
    padding or with the zeros between the elements of a dilated input are not counted, as in XLA's
    HloCostAnalysis.  The body of `lax.scan` is counted for every iteration.  The body of
    `lax.while_loop` is counted once, because the number of iterations is unknown.  For `lax.cond`,
    the branch with the most operations is counted.  Operations on which no output of the program
    depends are not counted.

    Args:
      program: The program, as `jax.make_jaxpr` returns it.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _flops(jaxpr)


def _flops(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product_flops(equation)
        elif name == "conv_general_dilated":
            total += _convolution_flops(equation)
        else:
            inner = [_flops(body) for body in _bodies(params)]
            if name == "cond":
                total += max(inner)
            elif name == "scan":
                total += params["length"] * sum(inner)
            elif name == "shard_map":  # the body is the program of one device
                total += math.prod(params["mesh"].shape.values()) * sum(inner)
            else:
                total += sum(inner)
    return total


def _bodies(params: dict[str, object]) -> Iterator[Jaxpr]:
    """Yield the jaxprs in the parameters of an equation, such as the body of a loop."""
    for value in params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, ClosedJaxpr):
                yield body.jaxpr
            elif isinstance(body, Jaxpr):
                yield body


def _product_flops(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    size = math.prod(_shape(equation.outvars[0]))
    products: int = math.prod(left[axis] for axis in contracted)
    return 2.0 * size * products


def _shape(variable: Var | Literal) -> tuple[int, ...]:
    return tuple(variable.aval.shape)  # type: ignore[attr-defined]


def _convolution_flops(equation: JaxprEqn) -> float:
    params = equation.params
    x, kernel = map(_shape, equation.invars)
    out = _shape(equation.outvars[0])
    numbers = params["dimension_numbers"]
    # Each output is a sum over the window and over the input channels of one group.
    channels = kernel[numbers.rhs_spec[1]]
    total: float = 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * channels
    for axis, (low, _) in enumerate(params["padding"]):
        side = x[numbers.lhs_spec[2 + axis]]
        starts = np.arange(out[numbers.out_spec[2 + axis]]) * params["window_strides"][axis]
        window = np.arange(kernel[numbers.rhs_spec[2 + axis]]) * params["rhs_dilation"][axis]
        index, dilation = starts[:, None] + window - low, params["lhs_dilation"][axis]
        inside = (index >= 0) & (index <= (side - 1) * dilation)
        total *= int((inside & (index % dilation == 0)).sum())
    return total
