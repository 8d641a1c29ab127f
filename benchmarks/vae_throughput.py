"""Training throughput of `vae_mnist` beside the same MLP VAE in PyTorch, on the same cores.

    pip install -r benchmarks/requirements.txt
    python benchmarks/vae_throughput.py [--data_dir=DIR]

Both take real steps: binarisation, two MLPs, ELBO, Adam, the parameters' average.  Both
run as they do in training, on the same batches; the runs alternate, because a machine's
speed changes from minute to minute, and the medians and the ratio of each pair are told.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from ddpm_jax.data.batches import training_batches
from ddpm_jax.data.loader import load
from ddpm_jax.data.prefetch import prefetch
from ddpm_jax.data.types import Batch, Data, MissingData
from ddpm_jax.experiment.inputs import from_data
from ddpm_jax.parallel import sharding, xla_flags
from ddpm_jax.training import loop
from ddpm_jax.training import step as step_module
from experiments import vae_mnist


def jax_runner(config: vae_mnist.Config, data: Data):
    """run(steps) -> seconds, as in `fit`: batches from the host, many steps in a call."""
    task = vae_mnist.build(config)
    spread = sharding.make("jit")
    examples = Batch(data.train.images[:1000], data.train.labels[:1000], np.arange(1000))
    state = spread.place(step_module.init_state(task, config, examples, 0))
    program = step_module.train_steps(functools.partial(step_module.train_step, task, config, 0))
    first = next(
        training_batches(data.train, 0, config.batch_size, [(0, 1)], config.steps_per_call)
    )
    call = spread.lower(program, spread.like(state), spread.feed(first, axis=1), 1)()

    def run(steps: int) -> float:
        nonlocal state
        plan = list(loop.calls(0, dataclasses.replace(config, steps=steps)))
        batches = training_batches(data.train, 0, config.batch_size, plan, config.steps_per_call)
        start = time.perf_counter()
        for (first, last), batch in zip(
            plan, prefetch(batches, lambda batch: spread.feed(batch, axis=1)), strict=True
        ):
            state, metrics = call(state, batch, last - first)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run


def torch_runner(config: vae_mnist.Config, data: Data):
    """run(steps) -> seconds, with the data set in memory, a fused Adam and a foreach average."""
    import torch
    from torch import nn

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    pixels = int(np.prod(config.shape))

    def mlp(inputs: int, widths: tuple[int, ...], outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.GELU(approximate="tanh")]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    model = nn.ModuleList(
        [
            mlp(pixels, config.hidden, 2 * config.latents),
            mlp(config.latents, config.hidden[::-1], pixels),
        ]
    )
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    adam = torch.optim.Adam(
        parameters, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True
    )
    images = torch.from_numpy(np.array(data.train.images).reshape(-1, pixels))

    def run(steps: int) -> float:
        encoder, decoder = model
        start = time.perf_counter()
        order = torch.randperm(len(images)).repeat(1 + steps * config.batch_size // len(images))
        for step in range(steps):
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            grey = images[rows].float() / 255
            x = torch.bernoulli(grey)
            mean, logvar = encoder(x).chunk(2, -1)
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            nll = nn.functional.binary_cross_entropy_with_logits(decoder(z), x, reduction="none")
            kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1)
            loss = (nll.sum(-1) + kl.sum(-1)).mean()
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 0.002)
        loss.item()
        return time.perf_counter() - start

    return run


def main() -> None:
    """Alternate, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    xla_flags.tune_cpu()  # as launch.py does
    config = vae_mnist.Config()
    try:
        data = load(config.data, arguments.data_dir)
    except MissingData:
        data = load(vae_mnist.FALLBACK, None)
    config = from_data(config, data)
    runners = {"jax": jax_runner(config, data), "torch": torch_runner(config, data)}
    for run in runners.values():
        run(config.steps_per_call)  # compiles, warms up
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(arguments.rounds):
        for name in sorted(runners, reverse=number % 2 == 1):
            rates[name].append(arguments.steps / runners[name](arguments.steps))
        print("  ".join(f"{name} {found[-1]:6.1f} steps/s" for name, found in rates.items()))
    ratios = [a / b for a, b in zip(rates["jax"], rates["torch"], strict=True)]
    print(
        f"{data.title}, batch {config.batch_size}: "
        + ", ".join(f"{name} {statistics.median(found):.1f}" for name, found in rates.items())
        + f" steps/s; jax / torch {statistics.median(ratios):.2f} "
        f"(from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
