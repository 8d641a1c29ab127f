"""Scaling of the text encoder and of the generation model: a comparison as in Imagen, fig. 4.

    python launch.py --experiment=text_encoder_scaling

Saharia et al. (2022) find that a larger text encoder helps more than a larger generation model. In
this experiment, every pair of a text encoder and a generation model is trained for the same number
of steps on `shapes`, with one shared autoencoder, and sampled at several guidance scales. The
result is two families of curves of alignment against Frechet distance: one for the text encoders
with the largest generation model, and one for the generation models with the largest text encoder.
All distances are computed in the features of the image encoder that was trained with the largest
text encoder.

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, with the command above, in 2 h 37 min at low
priority beside other programs (47 min on an idle machine). A larger generation model lowers the
smallest Frechet distance over the guidance scales by more than half (0.222, 0.123, 0.083 with the
tiny text encoder; 0.222, 0.097, 0.079 with the small one; +- 0.012 to 0.022). A larger text encoder
changes it by no more than its standard error. A longer training on a GPU gave the same result.
Imagen's finding is therefore not reproduced on this data set.

The tables and the differences from Imagen: docs/results/text_encoder_scaling.md
"""

import dataclasses
import pathlib
from typing import Any, Literal, TypeAlias

from ddpm_jax import plots
from ddpm_jax.config import get, replace
from ddpm_jax.data import shapes
from ddpm_jax.diffusion.schedules import CosineBetas
from ddpm_jax.experiment.types import (
    Config,
    Context,
    Dataset,
    Experiment,
    Recipe,
    Report,
    with_parts,
)
from ddpm_jax.fields import Count, FieldError, Json
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.unet import UNet
from ddpm_jax.tasks.autoencoder import LatentAutoencoder
from ddpm_jax.tasks.captioned import TextToImage
from ddpm_jax.tasks.contrastive import Contrastive
from ddpm_jax.tasks.generation import TextToImageEvaluation
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.latent_diffusion import LatentDiffusion
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam, Muon
from ddpm_jax.training.settings import Train

RunConfig: TypeAlias = Config[Any]  # a config of any of the three tasks


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The config of the study: every size of text encoder with every size of generation model.

    Attributes:
      data: The data set, which must be shapes or shapes:SIZE.
      autoencoder: The config of the autoencoder that all generation models share.
      text: The config of the text encoders; `text_sizes` replaces the field `size`.
      generator: The config of the generation models; `channels` replaces the field `channels`.
      text_sizes: Sizes of the text encoders, from small to large. Metrics use the largest one.
      channels: Channels of the generation models' U-Nets, from small to large.
    """

    data: Dataset
    autoencoder: Recipe[LatentAutoencoder]
    text: Recipe[Contrastive]
    generator: Recipe[TextToImage]
    text_sizes: tuple[Literal["tiny", "small", "base"], ...] = ("tiny", "small")
    channels: tuple[Count, ...] = (16, 32, 48)

    def parts(self, workdir: pathlib.Path) -> dict[str, RunConfig]:
        """Return the config of every run by the name of its directory.

        Raises:
          FieldError: If the data set is not shapes, two runs would share a directory, or the
            generation model is not a U-Net.
        """
        if not shapes.is_shapes(self.data.name):
            raise FieldError(
                f"data={self.data.name}: alignment with the caption can be computed for shapes "
                "only; give data=shapes or shapes:64"
            )
        for name, sizes in (("text_sizes", self.text_sizes), ("channels", self.channels)):
            if len(set(sizes)) < len(sizes):
                raise FieldError(
                    f"{name}={','.join(map(str, sizes))}: two runs would share a directory; give "
                    "distinct values"
                )
        network = getattr(self.generator.task.generator, "network", None)
        if not isinstance(network, UNet):
            raise FieldError(
                "generator.task.generator: must be a U-Net, because the channels of U-Nets are "
                "varied; leave it at latent_diffusion with network=unet"
            )
        runs: dict[str, RunConfig] = {"autoencoder": self.autoencoder.on(self.data)}
        for size in self.text_sizes:
            text = self.text.on(self.data)
            runs[f"text_{size}"] = replace(text, {"task.network.size": size})
        for size in self.text_sizes:
            for channels in self.channels:
                values: dict[str, str | int] = {
                    "task.text_encoder": str(workdir / f"text_{size}"),
                    "task.autoencoder": str(workdir / "autoencoder"),
                    "task.evaluation.text_encoder": str(workdir / f"text_{self.text_sizes[-1]}"),
                    "task.generator.network.channels": channels,
                }
                runs[f"{size}_{channels}"] = replace(self.generator.on(self.data), values)
        return runs

    def complete(self, part: str, configs: dict[str, RunConfig]) -> RunConfig:
        """Return the config of a run; a generation model gets the other runs' networks."""
        size = part.partition("_")[0]
        if size not in self.text_sizes:
            return configs[part]
        return with_parts(configs[part], configs[f"text_{size}"], configs["autoencoder"])


CONFIG = Scaling(
    data=Dataset("shapes"),
    autoencoder=Recipe(
        task=LatentAutoencoder(
            network=Autoencoder(channels=(32, 128), latent_channels=4, blocks=1),
            kl_weight=2e-2,
            codes=0,
            commitment_weight=0.25,
            eval_batch_size=128,
        ),
        optimizer=Adam(
            learning_rate=3e-3,
            warmup_steps=100,
            lr_schedule="cosine",
            grad_clip_norm=1.0,
        ),
        ema=EMA(half_life_images=5_000.0),
        train=Train(steps=6000, batch_size=16, eval_every=3000, checkpoint_every=1000),
    ),
    text=Recipe(
        task=Contrastive(
            network=DualEncoder(size="small", channels=(32, 64, 128), embedding_dim=64),
            hard_negatives=1,
        ),
        optimizer=Muon(
            learning_rate=1e-3,
            warmup_steps=100,
            lr_schedule="cosine",
            grad_clip_norm=1.0,
        ),
        ema=EMA(half_life_images=10_000.0),
        train=Train(steps=800, batch_size=128, eval_every=400, checkpoint_every=200),
    ),
    generator=Recipe(
        task=TextToImage(
            generator=LatentDiffusion(
                network=UNet(
                    space_to_depth=1,
                    channels=16,
                    multipliers=(1, 2),
                    blocks=1,
                    attention_sizes=(4, 8),
                    head_channels=16,
                    dropout=0.0,
                    text_refiner_blocks=1,
                ),
                schedule=CosineBetas(steps=1000),
                noise_shift=0.7,
                prediction="v",
                loss_weight="v",
                times_per_image=1,
                sampling=Sampling(
                    "dpmpp_2m_sde",
                    steps=20,
                    spacing="trailing",
                    guidance=2.0,
                    x0_thresholding="none",
                ),
            ),
            caption_dropout=0.1,
            evaluation=TextToImageEvaluation(
                batch_size=128,
                num_samples=256,
                num_prompts=32,
                guidance_scales=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
            ),
        ),
        optimizer=Muon(
            learning_rate=1.5e-3,
            warmup_steps=200,
            lr_schedule="cosine",
            grad_clip_norm=1.0,
        ),
        ema=EMA(half_life_images=20_000.0),
        train=Train(steps=1000, batch_size=32, eval_every=1800, checkpoint_every=500),
    ),
    text_sizes=("tiny", "small"),
    channels=(16, 32, 48),
)


def report(config: Scaling, summaries: dict[str, dict[str, Json]], context: Context) -> Report:
    """Return a table with a row per pair of networks, and a plot for each family of curves."""
    del context
    pairs = {
        (size, channels): summaries[f"{size}_{channels}"]
        for size in config.text_sizes
        for channels in config.channels
    }
    guidance = get(config, "generator.task.generator.sampling.guidance")
    rows = []
    for (size, channels), summary in pairs.items():
        aligned, distance, scales = curve(summary)
        index = scales.index(f"{guidance:g}")
        rows.append(
            (
                f"text {size}, {channels} channels",
                f"aligned {aligned[index]:.3f}, Frechet distance (text_encoder) "
                f"{distance[index]:.4f} at guidance {scales[index]}; smallest distance "
                f"{min(distance):.4f}",
            )
        )
    title = f"{config.generator.train.steps} steps each"
    labels = ("share aligned", "Frechet distance (text_encoder)")
    widest, largest = config.channels[-1], config.text_sizes[-1]
    families = {
        "text_encoders": {f"text {s}": curve(pairs[s, widest]) for s in config.text_sizes},
        "generation_models": {f"{c} channels": curve(pairs[largest, c]) for c in config.channels},
    }
    figures = {
        name: plots.paths(lines, labels, f"{name.replace('_', ' ')}, {title}")
        for name, lines in families.items()
    }
    metrics = {f"{size}_{channels}": s["metrics"] for (size, channels), s in pairs.items()}
    return Report(title, rows, figures, {"steps": config.generator.train.steps, "pairs": metrics})


def curve(summary: dict[str, Json]) -> tuple[list[float], list[float], list[str]]:
    """Return the share of aligned samples, the Frechet distance, and the guidance scale as lists.

    The entries are sorted by scale. `summary` is the content of the run's summary.json.
    """
    metrics = {name.removeprefix("test/"): value for name, value in summary["metrics"].items()}
    scales = sorted(
        {float(name.partition("/")[0][9:]) for name in metrics if name.startswith("guidance_")}
    )
    names = [f"guidance_{scale:g}" for scale in scales]
    return (
        [metrics[f"{name}/aligned"] for name in names],
        [metrics[f"{name}/fd_text_encoder"] for name in names],
        [f"{scale:g}" for scale in scales],
    )


EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "text.train.steps": 4,
        "text.train.eval_every": 4,
        "text.train.checkpoint_every": 4,
        "text.train.log_every": 2,
        "text.train.batch_size": 16,
        "text.task.network.size": "tiny",
        "text.task.network.channels": (8,),
        "text.task.hard_negatives": 0,
        "autoencoder.train.steps": 4,
        "autoencoder.train.eval_every": 4,
        "autoencoder.train.checkpoint_every": 4,
        "autoencoder.train.log_every": 2,
        "autoencoder.train.batch_size": 16,
        "autoencoder.task.network.channels": (8, 8),
        "autoencoder.task.network.blocks": 1,
        "generator.train.steps": 4,
        "generator.train.eval_every": 4,
        "generator.train.checkpoint_every": 4,
        "generator.train.log_every": 2,
        "generator.train.batch_size": 16,
        "channels": (8, 12),
        "generator.task.generator.network.multipliers": (1,),
        "generator.task.generator.network.blocks": 1,
        "generator.task.generator.network.attention_sizes": (),
        "generator.task.generator.network.head_channels": 0,
        "generator.task.generator.network.text_refiner_blocks": 1,
        "generator.task.generator.sampling.steps": 2,
        "generator.task.evaluation.num_samples": 16,
        "generator.task.evaluation.num_prompts": 4,
        "generator.task.evaluation.guidance_scales": (2.0,),
        "text_sizes": ("tiny",),
    },
    report=report,
)
