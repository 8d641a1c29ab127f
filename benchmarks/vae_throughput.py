"""Compare the training throughput of `vae_mnist` with the same MLP VAE in PyTorch.

    pip install -r benchmarks/requirements.txt
    python benchmarks/vae_throughput.py [--data_dir=DIR]

Both run on the same cores and take complete steps, as in training: binarisation, two MLPs, ELBO,
Adam, the average of the parameters.  The runs alternate, because the speed of a machine changes
from minute to minute.  The medians and the ratio of both rates in each round are printed.
"""

import argparse
import functools
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from ddpm_jax.config import replace
from ddpm_jax.data.batches import training_batches
from ddpm_jax.data.loader import load
from ddpm_jax.data.prefetch import prefetch
from ddpm_jax.data.types import Batch, Data, info_of
from ddpm_jax.errors import MissingData
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.types import Config, bind, checked_task
from ddpm_jax.parallel import sharding, xla_flags
from ddpm_jax.training import step as step_module
from ddpm_jax.training.program import calls


def jax_runner(config: Config, data: Data):
    """Return run(steps) -> seconds, which trains as `fit` does, with several steps in a call."""
    task, train = checked_task(config), config.train
    partitioner = sharding.make("jit")
    rows = data.train.rows(np.arange(1000))
    examples = Batch(rows.images, rows.labels, np.arange(1000))
    state = partitioner.place(step_module.init_state(task, config, examples, 0))
    program = step_module.train_steps(functools.partial(step_module.train_step, task, config, 0))
    first = next(training_batches(data.train, 0, train.batch_size, [(0, 1)], train.steps_per_call))
    call = partitioner.lower(
        program, partitioner.abstract_state(state), partitioner.feed(first, axis=1), 1
    )()

    def run(steps: int) -> float:
        nonlocal state
        plan = list(calls(0, replace(config, {"train.steps": steps})))
        batches = training_batches(data.train, 0, train.batch_size, plan, train.steps_per_call)
        start = time.perf_counter()
        for (first, last), batch in zip(
            plan, prefetch(batches, lambda batch: partitioner.feed(batch, axis=1)), strict=True
        ):
            state, metrics = call(state, batch, last - first)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run


def torch_runner(config: Config, data: Data):
    """Return run(steps) -> seconds in PyTorch, with a fused Adam and a foreach average."""
    import torch
    from torch import nn

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    pixels = int(np.prod(data.shape))
    net, batch_size = config.task.network, config.train.batch_size

    def mlp(inputs: int, widths: tuple[int, ...], outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.GELU(approximate="tanh")]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    model = nn.ModuleList(
        [
            mlp(pixels, net.hidden, 2 * net.latents),
            mlp(net.latents, net.hidden[::-1], pixels),
        ]
    )
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    adam = torch.optim.Adam(
        parameters,
        lr=config.optimizer.learning_rate,
        betas=(0.9, config.optimizer.beta2),
        fused=True,
    )
    images = torch.from_numpy(np.array(data.train.images).reshape(-1, pixels))

    def run(steps: int) -> float:
        encoder, decoder = model
        start = time.perf_counter()
        order = torch.randperm(len(images)).repeat(1 + steps * batch_size // len(images))
        for step in range(steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
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
    """Run both alternately and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    xla_flags.tune_cpu()  # as launch.py does
    experiment = load_experiment("vae_mnist")
    try:
        data = load(experiment.config.data.name, arguments.data_dir)
    except MissingData:
        data = load(experiment.fallback, None)
    config: Config = bind(experiment.config, info_of(data))
    runners = {"jax": jax_runner(config, data), "torch": torch_runner(config, data)}
    for run in runners.values():
        run(config.train.steps_per_call)  # compile and warm up
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(arguments.rounds):
        for name in sorted(runners, reverse=index % 2 == 1):
            rates[name].append(arguments.steps / runners[name](arguments.steps))
        print("  ".join(f"{name} {values[-1]:6.1f} steps/s" for name, values in rates.items()))
    ratios = [a / b for a, b in zip(rates["jax"], rates["torch"], strict=True)]
    print(
        f"{data.title}, batch {config.train.batch_size}: "
        + ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in rates.items())
        + f" steps/s; jax / torch {statistics.median(ratios):.2f} "
        f"(from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
