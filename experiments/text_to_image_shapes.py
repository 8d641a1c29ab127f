r"""Text to image with three runs: a text encoder, an autoencoder, and a generation model.

    python launch.py --experiment=text_to_image_shapes
    python launch.py --experiment=text_to_image_shapes --mode=sample --guidance=4 \
        --num_samples=8 --prompt="two yellow triangles above a blue circle" --out=out.png

Each part is a run in a separate directory (`text`, `autoencoder`, `generator`). An interrupted part
resumes, and a finished part is not trained again. The part `generator` samples the images.

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, from a fresh clone: 96 min on one core,
while another training ran on the other core. The text encoder took 9 min 31 s, the autoencoder
6 min 48 s, and the generation model 79 min 58 s with its evaluation at six guidance scales. On both
cores without other programs, commit 4aefa19 took 40 min 44 s including compilation.

With guidance 2 (chosen on validation prompts), these shares of samples show everything that the
prompt states (128 test prompts of each type, 256 captions): one shape 93 %, one shape with a
held-out pair of colour and shape (not in the training images) 84 %, two shapes and their relation
81 %, two shapes with a held-out pair 66 %, test captions 69 %. The text encoder retrieves the image
among 64 images for 88.1 +- 0.7 % of captions, and gives 78.6 +- 0.9 % of images a higher similarity
to their caption than to a hard negative. The autoencoder's PSNR is 32.02 +- 0.05 dB.

Other results of the parts, and the division of the time: docs/results/text_encoder_shapes.md,
docs/results/autoencoder_shapes.md, docs/results/generator_shapes.md
"""

import shutil

from ddpm_jax import plots
from ddpm_jax.diffusion.schedules import CosineBetas
from ddpm_jax.experiment.chain import Chain
from ddpm_jax.experiment.types import Context, Dataset, Experiment, Recipe, Report
from ddpm_jax.fields import Json
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.unet import UNet
from ddpm_jax.tasks.autoencoder import LatentAutoencoder
from ddpm_jax.tasks.autoregressive import Autoregressive
from ddpm_jax.tasks.captioned import TextToImage
from ddpm_jax.tasks.contrastive import Contrastive
from ddpm_jax.tasks.generation import TextToImageEvaluation
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.latent_diffusion import LatentDiffusion
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam, Muon
from ddpm_jax.training.records import reporting_write_errors
from ddpm_jax.training.settings import Train

CONFIG = Chain(
    data=Dataset("shapes"),
    # The text encoder and the autoencoder train for fewer steps than in `text_encoder_shapes` and
    # `autoencoder_shapes`, because the generation model gains more from the same time.
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
        train=Train(steps=400, batch_size=128, eval_every=400, checkpoint_every=200),
    ),
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
        train=Train(steps=4000, batch_size=16, eval_every=3000, checkpoint_every=1000),
    ),
    generator=Recipe(
        task=TextToImage(
            generator=LatentDiffusion(
                network=UNet(
                    space_to_depth=1,
                    channels=48,
                    multipliers=(1, 2),
                    blocks=1,
                    attention_sizes=(4, 8),
                    head_channels=24,
                    dropout=0.0,
                    text_refiner_blocks=1,
                ),
                schedule=CosineBetas(steps=1000),
                noise_shift=0.7,
                prediction="v",
                loss_weight="v",
                times_per_image=2,
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
                num_prompts=128,
                guidance_scales=(1.0, 1.5, 3.0, 4.0, 6.0),
            ),
        ),
        optimizer=Muon(
            learning_rate=1.5e-3,
            warmup_steps=200,
            lr_schedule="cosine",
            grad_clip_norm=1.0,
        ),
        ema=EMA(half_life_images=20_000.0),
        train=Train(steps=5300, batch_size=32, eval_every=1800, checkpoint_every=500),
    ),
)
# Metrics of each run in the printed table.
HEADLINES = {
    "text": ("accuracy_among_64", "hard_negative_accuracy"),
    "autoencoder": ("psnr", "ssim"),
    "generator": ("aligned_single", "aligned_relation", "aligned", "clip_score"),
}


def report(config: Chain, summaries: dict[str, dict[str, Json]], context: Context) -> Report:
    """Return a table of the main metrics of the three runs; copy the generation model's images."""
    del config
    with reporting_write_errors(context.workdir):
        (context.workdir / "images").mkdir(exist_ok=True)
        for image in (context.workdir / "generator" / "images").glob("*[a-z].png"):
            shutil.copy(image, context.workdir / "images")
    rows = []
    for part, names in HEADLINES.items():
        texts = dict(plots.metric_rows(summaries[part]["metrics"]))
        cells = [f"{name} {texts[f'test/{name}']}" for name in names if f"test/{name}" in texts]
        rows.append((part, "  ".join(cells)))
    return Report("text to image", rows, {}, {"parts": summaries})


EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "text.train.steps": 6,
        "text.train.eval_every": 4,
        "text.train.checkpoint_every": 4,
        "text.train.log_every": 2,
        "text.train.batch_size": 16,
        "text.task.network.size": "tiny",
        "text.task.network.channels": (8,),
        "text.task.hard_negatives": 0,
        "autoencoder.train.steps": 6,
        "autoencoder.train.eval_every": 4,
        "autoencoder.train.checkpoint_every": 4,
        "autoencoder.train.log_every": 2,
        "autoencoder.train.batch_size": 16,
        "autoencoder.task.network.channels": (8, 8),
        "autoencoder.task.network.blocks": 1,
        "generator.train.steps": 6,
        "generator.train.eval_every": 4,
        "generator.train.checkpoint_every": 4,
        "generator.train.log_every": 2,
        "generator.train.batch_size": 16,
        "generator.task.generator.network.channels": 8,
        "generator.task.generator.network.multipliers": (1,),
        "generator.task.generator.network.blocks": 1,
        "generator.task.generator.network.attention_sizes": (),
        "generator.task.generator.network.head_channels": 4,
        "generator.task.generator.network.text_refiner_blocks": 1,
        "generator.task.generator.network.width": 32,
        "generator.task.generator.network.depth": 1,
        "generator.task.generator.network.heads": 2,
        "generator.task.generator.sampling.steps": 2,
        "generator.task.evaluation.num_samples": 16,
        "generator.task.evaluation.num_prompts": 4,
        "generator.task.evaluation.guidance_scales": (2.0,),
    },
    alternatives={
        "generator.task.generator": (
            Autoregressive(
                CodeTransformer(width=192, depth=6, heads=6, text_refiner_blocks=1),
                guidance=2.0,
                temperature=1.0,
            ),
        ),
        "generator.task.generator.network": (
            DiT(patch=1, width=192, depth=6, heads=6, text_refiner_blocks=1),
        ),
    },
    report=report,
    samples="generator",
)
