"""The number of operations of a program, compared with numbers derived by hand."""

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
    """Return the operations of fn, for arrays of these shapes."""
    return flops(
        jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    )


class Stack(nn.Module):
    """8x8x3 images: dense to 4, 3x3 to 8, 3x3 with stride 2 to 16, attention, dense to 1."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = Conv(8, (3, 3))(x)
        x = Conv(16, (3, 3), strides=2)(x)
        tokens = x.reshape(len(x), 16, 2, 8)
        tokens = attention(tokens, tokens, tokens).reshape(len(x), 16, 16)
        return nn.Dense(1)(tokens)[..., 0].sum(-1)


# Products of one image, layer by layer.  A 3x3 window covers 3 n - 2 pairs of pixels along n = 8;
# with a stride of 2 (padding only at the end), 3 n / 2 - 1.
FIRST = 64 * 3 * 4
REST = 22**2 * 4 * 8 + 11**2 * 8 * 16 + 2 * (2 * 16 * 16 * 8) + 16 * 16
PARAMETERS = (3 * 4 + 4) + (9 * 4 * 8 + 8) + (9 * 8 * 16 + 16) + (16 + 1)
FORWARD = 2 * (FIRST + REST)
BACKWARD = 2 * (FIRST + 2 * REST)  # the images have no gradient


def test_the_operations_of_a_network_are_the_products_of_its_layers():
    params = jax.eval_shape(Stack().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    x = jax.ShapeDtypeStruct((5, 8, 8, 3), jnp.float32)
    assert flops(jax.make_jaxpr(Stack().apply)(params, x)) == 5 * FORWARD

    def loss(params, x):
        return Stack().apply(params, x).sum()

    assert flops(jax.make_jaxpr(jax.value_and_grad(loss))(params, x)) == 5 * (FORWARD + BACKWARD)
    # Without the value, only the product of the last layer is not needed.
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
def test_a_step_has_the_same_operations_in_every_mode(mode, devices, accumulate, stack):
    train = Train(batch_size=16, grad_accum_steps=accumulate)
    config = Config(Dataset("digits"), VAE(), train=train)
    partitioner, task = sharding.make(mode, jax.devices()[:devices]), StackTask()
    shape = (stack or 1, 16)
    batch = Batch(np.zeros((*shape, 8, 8, 3), np.uint8), np.zeros(shape, np.int32),
                  np.tile(np.arange(16, dtype=np.int32), (shape[0], 1)))  # fmt: skip
    step = functools.partial(step_module.train_step, task, config, 0)
    single = jax.tree.map(lambda a: a[0], batch)
    like = partitioner.abstract_state(
        jax.eval_shape(step_module.initializer(task, config, 0), single)
    )
    if stack:
        stacked = partitioner.feed(batch, axis=1)
        lowered = partitioner.lower(step_module.train_steps(step), like, stacked, 1)
    else:
        lowered = partitioner.lower(step, like, partitioner.feed(single))
    norm = 2 * PARAMETERS / (1 if mode == "pmap" else devices)  # for the norm of the gradient
    assert lowered.flops == 16 / devices * (FORWARD + BACKWARD) + norm


def test_the_operations_of_convolutions_with_strides_padding_dilation_and_groups():
    def conv(strides=(1,), padding=((0, 0),), **options):
        return lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NWC", "WIO", "NWC"), **options
        )

    # [2, 10, 4] with a window of 3 and 6 outputs: the number of position pairs, times 2 2 4 6.
    full, pair = ((2, 10, 4), (3, 4, 6)), 2 * 2 * 4 * 6
    assert count(conv(), *full) == 24 * pair
    assert count(conv(padding=((1, 1),)), *full) == 28 * pair
    assert count(conv(padding=((-1, 0),)), *full) == 21 * pair
    assert count(conv((2,), ((1, 0),)), *full) == 14 * pair
    assert count(conv(rhs_dilation=(2,)), *full) == 18 * pair
    assert (
        count(conv(lhs_dilation=(2,)), *full) == 26 * pair
    )  # of 17 outputs, 9 cover 2 and 8 cover 1
    grouped = ((2, 10, 4), (3, 2, 6))
    assert count(conv(feature_group_count=2), *grouped) == 24 * pair / 2
    batch_groups = ((6, 10, 4), (3, 4, 6))
    assert count(conv(batch_group_count=3), *batch_groups) == 24 * pair


def test_loops_count_every_iteration_and_branches_count_the_largest():
    def square(x):
        return x @ x

    single = count(square, (4, 4))
    assert single == 2 * 4**3
    assert (
        count(lambda x: jax.lax.scan(lambda x, _: (square(x), None), x, None, 5)[0], (4, 4))
        == 5 * single
    )
    assert count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, square, x), (4, 4)) == single
    branches = [lambda x: x, square, lambda x: square(square(x))]
    assert count(lambda x: jax.lax.switch(x[0, 0].astype(int), branches, x), (4, 4)) == 2 * single
    assert count(jax.jit(jax.checkpoint(square)), (4, 4)) == single
    assert count(lambda x: (square(x), x)[1], (4, 4)) == 0  # no result depends on it


def test_recomputed_blocks_are_counted():
    def loss(x, w):
        return jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))(x, w).sum()

    # Two products forward, both recomputed backward; the gradients are two of w and one of x w.
    assert count(jax.value_and_grad(loss, 1), (4, 4), (4, 4)) == 7 * 2 * 4**3


def test_the_utilisation_of_a_run_is_the_operations_of_a_step_times_steps_per_second():
    rate = hardware.utilisation(1e9, {"steps_per_second": 3.0})["flops_per_second_per_device"]
    assert rate == 3e9
    assert hardware.utilisation(0.0, {"steps_per_second": 3.0}) == {}
