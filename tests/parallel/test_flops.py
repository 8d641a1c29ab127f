"""The count of a program's operations, against counts by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Batch
from ddpm_jax.experiment.types import Config, Dataset
from ddpm_jax.nn.layers import Conv, attention
from ddpm_jax.parallel import hardware, sharding
from ddpm_jax.parallel.flops import flops
from ddpm_jax.task import LossOutput, Variables
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.training import step as step_module
from ddpm_jax.training.settings import Train
from helpers.tasks import SmallTask


def count(fn, *shapes):
    """Of fn of arrays of these shapes."""
    return flops(
        jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    )


class Stack(nn.Module):
    """8x8 pixels of 3: dense to 4, 3x3 to 8, 3x3 with stride 2 to 16, attention, dense to 1."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = Conv(8, (3, 3))(x)
        x = Conv(16, (3, 3), strides=2)(x)
        tokens = x.reshape(len(x), 16, 2, 8)
        tokens = attention(tokens, tokens, tokens).reshape(len(x), 16, 16)
        return nn.Dense(1)(tokens)[..., 0].sum(-1)


# Products of one image, layer by layer.  A 3x3 window sees 3 n - 2 pairs of pixels along n = 8;
# with a stride of 2 (padding at the end alone) 3 n / 2 - 1.
FIRST = 64 * 3 * 4
REST = 22**2 * 4 * 8 + 11**2 * 8 * 16 + 2 * (2 * 16 * 16 * 8) + 16 * 16
PARAMETERS = (3 * 4 + 4) + (9 * 4 * 8 + 8) + (9 * 8 * 16 + 16) + (16 + 1)
FORWARD = 2 * (FIRST + REST)
BACKWARD = 2 * (FIRST + 2 * REST)  # the images have no gradient


def test_a_network_forward_is_its_layers_products():
    params = jax.eval_shape(Stack().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    x = jax.ShapeDtypeStruct((5, 8, 8, 3), jnp.float32)
    assert flops(jax.make_jaxpr(Stack().apply)(params, x)) == 5 * FORWARD

    def loss(params, x):
        return Stack().apply(params, x).sum()

    assert flops(jax.make_jaxpr(jax.value_and_grad(loss))(params, x)) == 5 * (FORWARD + BACKWARD)
    # Without the value the last layer's product is not needed; all others' are.
    assert flops(jax.make_jaxpr(jax.grad(loss))(params, x)) == 5 * (FORWARD + BACKWARD - 2 * 256)


class StackTask(SmallTask):
    def init(self, key, batch):
        return Variables(Stack().init(key, jnp.zeros((1, 8, 8, 3))), {})

    def loss(self, variables, batch, keys, *, train, all_gather):
        images = batch.images.astype(jnp.float32)
        return LossOutput(Stack().apply(variables.params, images), {}, {})


@pytest.mark.parametrize("mode", sharding.MODES)
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("accumulate", "stack"), [(1, 0), (2, 0), (1, 3), (2, 3)])
def test_a_step_is_counted_alike_in_every_mode(mode, devices, accumulate, stack):
    train = Train(batch_size=16, grad_accum_steps=accumulate)
    config = Config(Dataset("digits"), VAE(), train=train)
    partitioner, task = sharding.make(mode, jax.devices()[:devices]), StackTask()
    shape = (stack or 1, 16)
    batch = Batch(np.zeros((*shape, 8, 8, 3), np.uint8), np.zeros(shape, np.int32),
                  np.tile(np.arange(16, dtype=np.int32), (shape[0], 1)))  # fmt: skip
    step = functools.partial(step_module.train_step, task, config, 0)
    one = jax.tree.map(lambda a: a[0], batch)
    like = partitioner.like(jax.eval_shape(step_module.initializer(task, config, 0), one))
    if stack:
        stacked = partitioner.feed(batch, axis=1)
        lowered = partitioner.lower(step_module.train_steps(step), like, stacked, 1)
    else:
        lowered = partitioner.lower(step, like, partitioner.feed(one))
    norm = 2 * PARAMETERS / (1 if mode == "pmap" else devices)  # of the gradient
    assert lowered.flops == 16 / devices * (FORWARD + BACKWARD) + norm


def test_convolutions_of_every_kind():
    def conv(strides=(1,), padding=((0, 0),), **options):
        return lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NWC", "WIO", "NWC"), **options
        )

    # [2, 10, 4] with a window of 3 and 6 outputs: so many pairs of places, times 2 2 4 6.
    full, each = ((2, 10, 4), (3, 4, 6)), 2 * 2 * 4 * 6
    assert count(conv(), *full) == 24 * each
    assert count(conv(padding=((1, 1),)), *full) == 28 * each
    assert count(conv(padding=((-1, 0),)), *full) == 21 * each
    assert count(conv((2,), ((1, 0),)), *full) == 14 * each
    assert count(conv(rhs_dilation=(2,)), *full) == 18 * each
    assert count(conv(lhs_dilation=(2,)), *full) == 26 * each  # of 17 outputs, 9 see 2 and 8 see 1
    grouped = ((2, 10, 4), (3, 2, 6))
    assert count(conv(feature_group_count=2), *grouped) == 24 * each / 2
    of_batch = ((6, 10, 4), (3, 4, 6))
    assert count(conv(batch_group_count=3), *of_batch) == 24 * each


def test_loops_and_branches():
    def square(x):
        return x @ x

    one = count(square, (4, 4))
    assert one == 2 * 4**3
    assert (
        count(lambda x: jax.lax.scan(lambda x, _: (square(x), None), x, None, 5)[0], (4, 4))
        == 5 * one
    )
    assert count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, square, x), (4, 4)) == one
    branches = [lambda x: x, square, lambda x: square(square(x))]
    assert count(lambda x: jax.lax.switch(x[0, 0].astype(int), branches, x), (4, 4)) == 2 * one
    assert count(jax.jit(jax.checkpoint(square)), (4, 4)) == one
    assert count(lambda x: (square(x), x)[1], (4, 4)) == 0  # no result depends on it


def test_recomputed_blocks_count():
    def loss(x, w):
        return jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))(x, w).sum()

    # Two products forward, both again, as they are not kept; backward two of w and one of x w.
    assert count(jax.value_and_grad(loss, 1), (4, 4), (4, 4)) == 7 * 2 * 4**3


def test_the_costs_reported_of_a_run_are_of_one_step():
    rate = hardware.utilisation(1e9, {"steps_per_second": 3.0})["flops_per_second_per_device"]
    assert rate == 3e9
    assert hardware.utilisation(0.0, {"steps_per_second": 3.0}) == {}
