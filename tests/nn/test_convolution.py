"""The convolution of all networks equals that of Flax, and its gradients are fast in CPU loops."""

import functools
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.nn.layers import Conv

# (input, features, kernel, options): all kinds that the networks use, and more.
CASES = [
    ((2, 8, 8, 3), 4, (3, 3), {}),
    ((2, 8, 8, 3), 4, (3, 3), {"strides": 2}),
    ((2, 8, 6, 3), 4, (1, 1), {}),
    ((2, 7, 6, 3), 4, (1, 1), {"strides": 2}),
    ((2, 9, 9, 3), 4, (3, 3), {"padding": "VALID", "strides": 2}),
    ((2, 8, 8, 3), 4, (5, 2), {"padding": [(3, 0), (1, 4)], "strides": (3, 1)}),
    ((2, 8, 8, 3), 4, (1, 7), {}),
    ((2, 11, 3), 4, (5,), {}),
    ((2, 8, 8, 3), 4, (3, 3), {"kernel_dilation": 2, "strides": 2}),
    ((2, 5, 8, 3), 4, (3, 3), {"input_dilation": 2, "padding": [(2, 0), (1, 3)]}),
    ((2, 8, 8, 4), 4, (3, 3), {"feature_group_count": 2, "use_bias": False}),
]


def test_outputs_and_gradients_equal_those_of_flax(x64):
    layers = [[make(f, k, **o) for make in (Conv, nn.Conv)] for _, f, k, o in CASES]

    @jax.jit
    def evaluate(key):
        values = []
        for pair, (shape, *_) in zip(layers, CASES, strict=True):
            x = jax.random.normal(key, shape)
            params = pair[1].init(key, x)

            def loss(layer, params, x):
                y = layer.apply(params, x)
                return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

            for layer in pair:
                layer_loss = functools.partial(loss, layer)
                gradient, y = jax.grad(layer_loss, (0, 1), has_aux=True)(params, x)
                values.append((gradient, y, layer.init(key, x)))
        return values

    values = evaluate(jax.random.key(0))
    for (gradient, y, first), expected in zip(values[::2], values[1::2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, (y, first), expected[1:])
        chex.assert_trees_all_close(gradient, expected[0], rtol=0, atol=1e-12)


def test_second_derivatives_equal_those_of_flax(x64):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))
    params = nn.Conv(3, (3, 3), strides=2).init(jax.random.key(1), x)

    @functools.partial(jax.jit, static_argnums=0)
    def twice(make, params, x):
        def slope(params, x):
            layer = make(3, (3, 3), strides=2)
            dx = jax.grad(lambda x: jnp.sin(layer.apply(params, x)).sum())(x)
            return jnp.square(dx).sum()

        return jax.grad(slope, (0, 1))(params, x)

    chex.assert_trees_all_close(
        twice(Conv, params, x), twice(nn.Conv, params, x), rtol=0, atol=1e-12
    )


def test_every_convolution_in_a_cpu_loop_has_its_dimensions_in_the_order_of_the_fast_kernels():
    layer = Conv(8, (3, 3), strides=2)
    x = jnp.ones((4, 8, 8, 3))
    params = layer.init(jax.random.key(0), x)

    def total(params, x):
        def step(sum_, _):
            gradient = jax.grad(lambda params, x: layer.apply(params, x).sum(), (0, 1))(params, x)
            return jax.tree.map(jnp.add, sum_, gradient), None

        return jax.lax.scan(step, (params, x), None, length=3)[0]

    lines = jax.jit(total).lower(params, x).as_text().splitlines()
    orders = {line.split("dim_numbers = ")[1].split(", window")[0] for line in lines
              if "stablehlo.convolution" in line}  # fmt: skip
    assert orders == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.slow
def test_a_step_in_a_loop_takes_at_most_1_5_times_as_long_as_a_single_step(launch, tmp_path):
    """Time gradient accumulation and several steps per call, through the command line."""
    options = ("", "grad_accum_steps=2", "grad_accum_steps=4", "steps_per_call=10")

    def seconds_per_step(number, option):
        workdir = tmp_path / f"{number}{option}"
        result = launch(
            "--experiment=ddpm_digits", f"--workdir={workdir}",
            "--config.task.evaluation.features=none", "--config.train.steps=80",
            "--config.train.log_every=20", "--config.train.eval_every=0",
            "--config.task.evaluation.num_samples=100",
            "--config.task.evaluation.times_per_image=1", "--config.task.sampling.steps=2",
            "--config.optimizer.warmup_steps=10",
            *([f"--config.train.{option}"] if option else []), timeout=900,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        lines = (workdir / "timing.jsonl").read_text().splitlines()
        rates = [json.loads(line).get("steps_per_second", 0) for line in lines]
        return 1 / max(rates)  # the fastest interval between log lines

    rounds = [[seconds_per_step(number, option) for option in options] for number in range(2)]
    plain, *loops = np.min(rounds, axis=0)
    assert max(loops) <= 1.5 * plain, rounds
