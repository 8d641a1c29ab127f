"""Measure which share of its time the ancestral sampler spends outside the network.

    python benchmarks/sampler_overhead.py [--steps=1000] [--rounds=5] [--batch=16]

The sampler of an untrained `ddpm_mnist` (its network, T = 1,000 cosine betas, x0 clipped) is
compared with a `lax.scan` that only calls the same network equally often.  Both run alternately.
Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), 4 images, 3 rounds: 2.7 % (0.5 to 4.6).
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from ddpm_jax.data.types import DataInfo
from ddpm_jax.diffusion import grids, samplers, schedules
from ddpm_jax.diffusion.prediction import clip_x0, to_prediction
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.types import bind
from ddpm_jax.parallel import xla_flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    xla_flags.tune_cpu()
    config = load_experiment("ddpm_mnist").config
    net = bind(config, DataInfo("mnist", (28, 28, 1), 256, 10)).task.network
    table = schedules.from_betas(schedules.cosine_betas(1000))
    logsnrs = grids.grid(table, arguments.steps)
    labels = jnp.zeros(arguments.batch, jnp.int32)
    key = jax.random.key(0)
    xT = jax.random.normal(key, (arguments.batch, 28, 28, 1))
    params = jax.jit(net.init)(key, xT[:1], jnp.zeros(1), labels[:1])
    compiled = []

    def network(params, xt, logsnr):
        return net.apply(params, xt, jnp.full(len(xt), table.time(logsnr)), labels)

    @jax.jit
    def sampling(params, xT):
        compiled.append(1)

        def denoise(xt, logsnr):
            out = network(params, xt, logsnr)
            return jax.vmap(functools.partial(to_prediction, "v"), (0, 0, None))(out, xt, logsnr)

        keys = jax.random.split(key, arguments.batch)
        return samplers.sample(samplers.ancestral(), clip_x0(denoise), logsnrs, keys, xT)

    @jax.jit
    def calling(params, xT):
        def step(x, logsnr):
            return network(params, x, logsnr), None

        return jax.lax.scan(step, xT, logsnrs[:-1])[0]

    def seconds(run):
        start = time.perf_counter()
        jax.block_until_ready(run(params, xT))
        return time.perf_counter() - start

    for run in (sampling, calling):
        seconds(run)
    shares = []
    for index in range(arguments.rounds):
        total, network_alone = seconds(sampling), seconds(calling)
        shares.append(1 - network_alone / total)
        print(
            f"round {index}: sampler {total:.2f} s, network {network_alone:.2f} s, {shares[-1]:.1%}"
        )
    print(
        f"outside the network: {statistics.median(shares):.1%} (median; {min(shares):.1%} to "
        f"{max(shares):.1%}), {arguments.steps} steps of {arguments.batch} images, compiled "
        f"{len(compiled)} time"
    )


if __name__ == "__main__":
    main()
