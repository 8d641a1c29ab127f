"""The beta-VAE on binarised MNIST: reconstruction error and KL for several weights of the KL.

    python launch.py --experiment=beta_vae_mnist

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2): 2,000 steps for each beta took 6 minutes in total at
commit 4aefa19 (19 minutes at low priority beside other programs). Values are in nats, on MNIST's
10,000 test images, with standard errors of at most 0.5:

    beta            0.25     0.5       1       2       4       8
    reconstruction  50.58   58.58   69.80   84.31  108.07  146.77
    KL              63.15   41.98   26.26   15.89    8.59    3.68
    -ELBO          113.73  100.56   96.06  100.20  116.66  150.44
    active units       40      34      27      15      10       6

A larger beta lowers the KL and raises the reconstruction error, and only beta = 1 minimises their
sum, the -ELBO.

There is one run for each beta, with the settings of `vae_mnist`, in a separate sub-directory. An
interrupted run resumes. `--mode=sample --workdir=runs/beta_vae_mnist/beta_4` samples from the model
with beta = 4.
"""

import numpy as np

from ddpm_jax import plots
from ddpm_jax.experiment.types import Config, Context, Dataset, Experiment, Report, Sweep
from ddpm_jax.fields import Json
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam
from ddpm_jax.training.settings import Train
from ddpm_jax.variational.likelihoods import Bernoulli, Gaussian

CONFIG = Sweep(
    base=Config(
        data=Dataset("mnist"),
        task=VAE(
            network=VAENetwork(latents=40, hidden=(500, 500)),
            likelihood=Bernoulli(),
            eval_batch_size=500,
            iwae_images=200,
        ),
        optimizer=Adam(
            learning_rate=3e-3,
            warmup_steps=500,
            lr_schedule="cosine",
            beta2=0.99,
            weight_decay=0.02,
        ),
        ema=EMA(half_life_images=90_000.0),
        train=Train(
            steps=2000, batch_size=256, eval_every=0, checkpoint_every=500, steps_per_call=50
        ),
    ),
    field="task.beta",
    values=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
)


def report(config: Sweep, summaries: dict[str, dict[str, Json]], context: Context) -> Report:
    """Return a table of the metrics of every beta, and a plot of the error against KL."""
    runs = list(zip(config.values, summaries.values(), strict=True))
    title = f"beta-VAE on {runs[0][1]['data']}, {config.base.train.steps} steps each"
    metrics = {f"beta {beta:g}": summary["metrics"] for beta, summary in runs}
    rows = plots.comparison_rows(metrics, ("nll", "kl", "neg_elbo", "active_units"), "test/")
    record = {
        "data_note": context.loaded.note,
        "steps": config.base.train.steps,
        "betas": {f"{beta:g}": summary["metrics"] for beta, summary in runs},
    }
    return Report(title, rows, {"reconstruction_against_kl": plot(runs, title)}, record)


def plot(runs: list[tuple[float, dict[str, Json]]], title: str) -> np.ndarray:
    """Return a plot uint8 [H, W, 3] of reconstruction error against KL, one point for each beta.

    The dotted line joins points whose ELBO equals the best ELBO of the runs.

    Args:
      runs: Pairs (beta, content of the run's summary.json).
      title: Title of the plot.
    """
    figure, axis = plots.new_axis(6.0, 4.5)
    kl = [summary["metrics"]["test/kl"] for _, summary in runs]
    nll = [summary["metrics"]["test/nll"] for _, summary in runs]
    axis.plot(kl, nll, "o-")
    for (beta, _), x, y in zip(runs, kl, nll, strict=True):
        axis.annotate(f"$\\beta$ = {beta:g}", (x, y), xytext=(6, 6), textcoords="offset points")
    best = min(x + y for x, y in zip(kl, nll, strict=True))
    low, high = min(kl), max(kl)
    axis.plot([low, high], [best - low, best - high], "k:", label=f"-ELBO = {best:.1f}")
    axis.set_xlabel("KL(q(z|x) || p(z)), nats")
    axis.set_ylabel("reconstruction -E[log p(x|z)], nats")
    axis.set_title(title)
    axis.margins(0.14, 0.08)
    axis.legend()
    return plots.figure_pixels(figure)


EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "values": (0.25, 4.0),
        "base.train.steps": 10,
        "base.train.eval_every": 10,
        "base.train.checkpoint_every": 10,
        "base.train.log_every": 5,
        "base.train.steps_per_call": 5,
        "base.task.network.hidden": (32,),
        "base.task.iwae_images": 20,
    },
    alternatives={"base.task.likelihood": (Gaussian(std=0.5),)},
    fallback="digits:28",  # used if MNIST is not available
    report=report,
)
