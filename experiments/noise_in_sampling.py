"""Why sampling adds noise: DDIM with eta from 0 to 1, and the ancestral sampler without noise.

    python launch.py --experiment=noise_in_sampling

One model is trained as in `ddpm_digits` and sampled in several ways with the same number of steps:
DDIM with eta 0 (an ODE solver, whose steps preserve the variance of x_t without noise), with eta up
to 1 (eta = 1 is the ancestral sampler), the ancestral sampler with the larger variance beta, and
the ancestral sampler with half of its noise or none. The last two replace a sample of p(x_s | x_t)
by its mean, or by a value nearer to the mean. Every such step loses variance that no later step
restores, and the samples are smoother than the data. (A test shows this for Gaussian data, whose
exact denoiser is known: after 200 steps without noise, less than a fifth of the std remains.)

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, test split, 500 images for each sampler, 100
steps, no guidance, in 10 minutes beside other programs: Frechet distance (classifier_digits; 9.9
+- 3.6 for 500 training images) and classifier accuracy (+- 0.7 to 1.1 %):

    ddim 0      7.5 +- 1.6   96.0 %        ancestral         7.5 +- 1.3    97.2 %
    ddim 0.25   8.8 +- 1.8   93.8          ancestral, beta   7.7 +- 1.3    96.4
    ddim 0.5    7.8 +- 1.5   96.0          half the noise    23.5 +- 2.1   100
    ddim 0.75   7.6 +- 1.3   96.6          no noise          67.2 +- 3.1   100
    ddim 1      7.5 +- 1.3   97.2

For this one model, eta has little effect, but missing noise has a large one: all digits are typical
and classified as their class, and they vary little.
"""

import dataclasses
import pathlib
import re
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from ddpm_jax import plots
from ddpm_jax.data.types import info_of
from ddpm_jax.diffusion.schedules import CosineBetas
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.feature_networks import load_features
from ddpm_jax.experiment.load import load_run
from ddpm_jax.experiment.requests import Request
from ddpm_jax.experiment.train import train_alone
from ddpm_jax.experiment.types import (
    Config,
    Context,
    Dataset,
    Experiment,
    Recipe,
    Report,
    bind,
)
from ddpm_jax.fields import MAY_CHANGE, FieldError, Json, NumSamples, SampleSteps, section
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.quality import MAX_TRAINING_IMAGES, quality
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.parallel.sharding import fetch, partitioner_of
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Resources
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.image_denoiser import SampleEvaluation
from ddpm_jax.tasks.image_sampler import Sampling, check_sampling
from ddpm_jax.training.ema import EMA, parameters_used
from ddpm_jax.training.optimizer import Adam
from ddpm_jax.training.settings import Train


@dataclasses.dataclass(frozen=True)
class SamplerStudy:
    """The config of the study: one model that is sampled with several samplers.

    Attributes:
      data: The data set, which must have labels.
      model: The diffusion model, which must be conditional and evaluated by a classifier.
      num_samples: Number of images that each sampler samples.
      steps: Number of sampling steps of every sampler.
      samplers: Names of the samplers, with their arguments.
    """

    data: Dataset
    model: Recipe[Diffusion]
    num_samples: NumSamples = 500
    steps: Annotated[SampleSteps, MAY_CHANGE] = 100
    samplers: tuple[str, ...] = ("ddim",)

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the config of the only run, the diffusion model, by the name of its directory.

        Raises:
          FieldError: If a sampler does not fit the model, or the model is not conditional or not
            evaluated by a classifier.
        """
        del workdir
        task = self.model.task
        if not task.conditional:
            raise FieldError(
                "model.task.conditional=false: this experiment compares samples of every class; "
                "leave it at true"
            )
        if not [name for name in task.evaluation.features if name != "inception"]:
            raise FieldError(
                "model.task.evaluation.features: must name a classifier, in whose features samples "
                "are compared; give classifier_digits"
            )
        with section("model.task.schedule"):
            steps = task.schedule.make().steps
        for name in self.samplers:
            try:
                check_sampling(
                    Sampling(
                        name,
                        self.steps,
                    ),
                    steps,
                    task.variance == "learned",
                )
            except FieldError as error:
                raise FieldError(re.sub(r"^sampler\b", "samplers", str(error))) from None
        return {"model": self.model.on(self.data)}

    def complete(self, part: str, configs: dict[str, Config]) -> Config:
        """Return the config of the diffusion model unchanged, after checking that it has labels.

        Raises:
          UserError: If the data set has no labels.
        """
        config = configs[part]
        if not config.task.info.classes:
            raise UserError(
                f"data set {config.task.info.name} has no labels, but this experiment compares "
                "samples of every class; give a data set with labels"
            )
        return config


CONFIG = SamplerStudy(
    data=Dataset("digits"),
    model=Recipe(
        task=Diffusion(
            network=UNet(
                space_to_depth=1,
                channels=32,
                multipliers=(1, 2),
                blocks=2,
                attention_sizes=(4,),
                head_channels=0,
                dropout=0.1,
                scale_shift=False,
            ),
            schedule=CosineBetas(steps=1000),
            prediction="v",
            variance="beta",
            times="stratified",
            loss_weight="simple",
            conditional=True,
            label_dropout=0.1,
            flip=False,
            sampling=Sampling(
                "dpmpp_2m",
                steps=20,
                spacing="logsnr",
                guidance=1.2,
                x0_thresholding="clip",
            ),
            evaluation=SampleEvaluation(
                batch_size=120,
                times_per_image=16,
                num_samples=500,
                num_samples_between=0,
                features=("classifier_digits",),
            ),
        ),
        optimizer=Adam(
            learning_rate=2e-3,
            warmup_steps=100,
            lr_schedule="cosine",
            grad_clip_norm=1.0,
        ),
        ema=EMA(half_life_images=20_000.0),
        train=Train(steps=800, batch_size=64, eval_every=400, checkpoint_every=250),
    ),
    num_samples=500,
    steps=100,
    samplers=(
        "ddim",
        "ddim:0.25",
        "ddim:0.5",
        "ddim:0.75",
        "ddim:1",
        "ancestral",
        "ancestral_beta",
        "ancestral:0.5",
        "ancestral:0",
    ),
)


def compare_samplers(
    config: SamplerStudy, context: Context, network: FeatureNetwork
) -> tuple[dict[str, dict[str, float]], list[np.ndarray]]:
    """Return the metrics by sampler, and up to ten images [n, H, W, C] in [-1, 1] per sampler.

    Args:
      config: Config of the study.
      context: Directory, options and data set of the experiment.
      network: Feature network in which samples are compared with the data.
    """
    # Without resources, the guidance is classifier-free, whose neutral scale is 1.
    trained = dataclasses.replace(load_run(context.workdir / "model"), resources=Resources())
    classes = trained.task.info.classes
    per_class = max(1, config.num_samples // classes)
    key, compile = (
        purpose_key(context.options.seed, SAMPLE),
        partitioner_of(trained.variables).compile,
    )
    metrics: dict[str, dict[str, float]] = {}
    examples: list[np.ndarray] = []
    for name in config.samplers:
        resolved = trained.resolve(Request(sampler=name, steps=config.steps, guidance=1.0))
        batches = []
        for label in range(classes):
            keys = example_keys(key, 0, jnp.arange(label * per_class, (label + 1) * per_class))
            request = resolved.request._replace(labels=jnp.full(per_class, label))
            x = resolved.task.sample(trained.variables, keys, request, resolved.guidance, compile)
            batches.append(fetch(x))
        images, labels = np.concatenate(batches), np.repeat(np.arange(classes), per_class)
        examples.append(images[::per_class][:10])
        metrics[name] = quality(network, images, labels, context.loaded.data).metrics
        metrics[name]["std"] = float(images.std(0).mean())
    return metrics, examples


def report(config: SamplerStudy, summaries: dict[str, dict[str, Json]], context: Context) -> Report:
    """Return a table of metrics and a grid of samples; each sampler has a row in both."""
    del summaries
    data, model = context.loaded.data, config.model.on(config.data)
    model = bind(model, info_of(data))
    loaders = load_features(model, context.loaded, context.options, train_alone)
    if not loaders:
        raise UserError(
            "the training of the classifier was stopped; run the same command again to resume it"
        )
    network = loaders[0]()
    samplers, examples = compare_samplers(config, context, network)
    title = f"{config.steps} steps each, on {data.title}"
    fd = f"fd_{network.name}"
    names = (fd, "classifier_accuracy", "nearest_ratio", "std")
    rows = plots.comparison_rows(samplers, names)
    texts = dict(plots.metric_rows(samplers[config.samplers[-1]]))
    train = to_images(data.train.random_subset(MAX_TRAINING_IMAGES).images, data.levels)
    train_std = float(train.std(0).mean())
    train_fd = texts.get(f"{fd}_of_training", "left out")
    rows.append(("training set", f"{fd} {train_fd}  std {train_std:.4g}"))
    columns = min(10, model.task.info.classes)
    figures = {"samples_by_sampler": plots.grid(np.concatenate(examples), columns=columns)}
    ddim = {name: metrics for name, metrics in samplers.items() if name[:4] == "ddim"}
    etas = {float(n.partition(":")[2] or 0): m[fd] for n, m in ddim.items() if fd in m}
    if len(etas) > 1:
        points = np.array(sorted(etas))
        curve = {f"Frechet distance ({network.name})": np.array([etas[eta] for eta in points])}
        figures["distance_against_eta"] = plots.lines(points, curve, "eta of DDIM", title)
    record = {
        "steps": config.steps,
        "parameters": parameters_used(model.ema),
        "features": {network.name: network.about},
        "std_of_training_images": train_std,
        "samplers": samplers,
    }
    return Report(title, rows, figures, record)


EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "model.train.steps": 3,
        "model.train.eval_every": 4,
        "model.train.checkpoint_every": 4,
        "model.train.log_every": 2,
        "model.train.batch_size": 16,
        "model.task.network.channels": 8,
        "model.task.network.blocks": 1,
        "model.task.network.multipliers": (1,),
        "model.task.sampling.steps": 4,
        "model.task.evaluation.times_per_image": 2,
        "model.task.evaluation.num_samples": 40,
        "model.task.network.attention_sizes": (),
        "num_samples": 40,
        "steps": 3,
        "samplers": ("ancestral:0",),
    },
    alternatives={"model.task.network": (DiT(patch=2, width=128, depth=6, heads=4, dropout=0.1),)},
    report=report,
)
