"""The beta-VAE on binarised MNIST: what a weight on the KL buys and costs.

    python launch.py --experiment=beta_vae_mnist

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2; 2,000 steps each, 6 minutes in all at commit
4aefa19, 19 at low priority beside other work), MNIST's 10,000 test images, nats; standard errors
are at most 0.5:

    beta            0.25     0.5       1       2       4       8
    reconstruction  50.58   58.58   69.80   84.31  108.07  146.77
    KL              63.15   41.98   26.26   15.89    8.59    3.68
    -ELBO          113.73  100.56   96.06  100.20  116.66  150.44
    active units       40      34      27      15      10       6

beta trades one term for the other, and only beta = 1 minimises their sum.

One `vae_mnist` run for each beta, in a sub-directory of its own: each resumes, and
`--mode=sample --workdir=runs/beta_vae_mnist/beta_4` draws from one.
"""

import dataclasses
import pathlib
from typing import Annotated

from ddpm_jax import plots
from ddpm_jax.config import marked
from ddpm_jax.data.types import Loaded
from ddpm_jax.experiment.inputs import Options, from_data, load_data, record_of
from ddpm_jax.experiment.preflight import check_parts, check_sizes
from ddpm_jax.experiment.train import opened, train_experiment
from ddpm_jax.fields import FROM_PARTS, MAY_CHANGE, Interval, Length, NonNegative
from ddpm_jax.parallel.processes import is_main
from ddpm_jax.progress import print_result
from ddpm_jax.system.files import write_with
from ddpm_jax.training.run_dir import can_write, write_json
from experiments import vae_mnist

DEBUG = vae_mnist.DEBUG | {"steps": 10, "betas": (0.25, 4.0)}


@dataclasses.dataclass(frozen=True)
class Config(vae_mnist.Config):
    """See `python launch.py --experiment=beta_vae_mnist --help`; `betas` stands in for `beta`."""

    steps: Length = 2000
    eval_every: Interval = 0
    iwae_images: Length = 200
    beta: Annotated[float, FROM_PARTS] = 1.0
    betas: tuple[NonNegative, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def run(config: Config, workdir: pathlib.Path, options: Options = Options()) -> None:
    """Train every beta, then write one table and one plot."""
    loaded = load_data(vae_mnist, config, workdir, options)
    config = from_data(config, loaded.data)
    record = record_of("beta_vae_mnist", config, loaded, options)
    check_parts((workdir / f"beta_{beta:g}", "vae_mnist") for beta in config.betas)
    names = [field.name for field in dataclasses.fields(vae_mnist.Config)]
    model = vae_mnist.Config(**{name: getattr(config, name) for name in names})
    check_sizes(vae_mnist.build(model), model, options.parallel)
    with opened(workdir, record, marked(config, MAY_CHANGE)):
        train_all(config, model, workdir, options, loaded)


def train_all(
    config: Config,
    model: vae_mnist.Config,
    workdir: pathlib.Path,
    options: Options,
    loaded: Loaded,
) -> None:
    """A `vae_mnist` run for each beta, unless it is there already."""
    found = []
    for beta in config.betas:
        one = dataclasses.replace(model, beta=beta)
        place = workdir / f"beta_{beta:g}"
        summary = train_experiment(vae_mnist, one, place, options, loaded)
        if summary is None:  # asked to stop
            return
        found.append((beta, summary))
    title = f"beta-VAE on {found[0][1]['data']}, {config.steps} steps each"
    rows = []
    for beta, summary in found:
        texts = dict(plots.metric_rows(summary["metrics"]))
        names = ("nll", "kl", "neg_elbo", "active_units")
        shown = [f"{name} {texts[f'test/{name}']}" for name in names if f"test/{name}" in texts]
        rows.append((f"beta {beta:g}", "  ".join(shown)))
    if not is_main():
        return
    print_result(plots.table(rows, title))
    with can_write(workdir):
        plot(workdir / "images" / "reconstruction_against_kl.png", found, title)
    table = {f"{beta:g}": summary["metrics"] for beta, summary in found}
    written = {
        "experiment": "beta_vae_mnist",
        "data": loaded.data.title,
        "data_note": loaded.note,
        "steps": config.steps,
        "betas": table,
    }
    write_json(workdir / "summary.json", written)
    print_result(f"  plot in {workdir / 'images'}, figures in {workdir / 'summary.json'}")


def plot(path: pathlib.Path, found: list[tuple[float, dict]], title: str) -> None:
    """Reconstruction over KL, a point for each beta; lines of equal ELBO behind them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.5))
    kl = [summary["metrics"]["test/kl"] for _, summary in found]
    nll = [summary["metrics"]["test/nll"] for _, summary in found]
    axis.plot(kl, nll, "o-")
    for (beta, _), x, y in zip(found, kl, nll, strict=True):
        axis.annotate(f"$\\beta$ = {beta:g}", (x, y), xytext=(6, 6), textcoords="offset points")
    best = min(x + y for x, y in zip(kl, nll, strict=True))
    low, high = min(kl), max(kl)
    axis.plot([low, high], [best - low, best - high], "k:", label=f"-ELBO = {best:.1f}")
    axis.set_xlabel("KL(q(z|x) || p(z)), nats")
    axis.set_ylabel("reconstruction -E[log p(x|z)], nats")
    axis.set_title(title)
    axis.margins(0.14, 0.08)
    axis.legend()
    figure.tight_layout()
    write_with(path, lambda file: figure.savefig(file, dpi=100, format="png"))
    plt.close(figure)
