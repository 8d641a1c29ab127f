r"""The generation model of `text_to_image_shapes`; needs a trained text encoder and autoencoder.

    python launch.py --experiment=generator_shapes --config.task.text_encoder=DIR \
        --config.task.autoencoder=DIR

`--config.task.generator.network=dit` trains a DiT instead of the U-Net.
`--config.task.generator=autoregressive` trains a transformer on the codebook indices of an
autoencoder that was trained with `--config.task.codes=256`.

Measured on one CPU core (AMD EPYC, jax 0.10.2; another training ran on the second core), seed 0:
the default U-Net, 5,300 steps of 32 images, took 79 min 58 s with its evaluation. Samples
use SDE-DPM-Solver++(2M) with 20 steps and guidance 2 for 128 test prompts of each type and 256 test
captions. The percentages are shares of samples that show everything that the prompt states; a
held-out pair is a pair of colour and shape that is not in the training images:

    prompts with one shape                                          93 +- 2 %
    one shape, held-out pair of colour and shape                    84 +- 3 %
    prompts with two shapes and their relation                      81 +- 4 %
    two shapes, with a held-out pair of colour and shape            66 +- 4 %
    test captions                                                   69 +- 3 %
    CLIP score (of test images: 87.9)                               86.7 +- 0.6
    Frechet distance in the features of the text encoder's run
    (of training images: 0.061)                                     0.034 +- 0.008

Other guidance scales, samplers, networks and data sets, and the choice of the settings:
docs/results/generator_shapes.md
"""

from ddpm_jax.diffusion.schedules import CosineBetas
from ddpm_jax.experiment.types import Config, Dataset, Experiment
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.tasks.autoregressive import Autoregressive
from ddpm_jax.tasks.captioned import TextToImage
from ddpm_jax.tasks.generation import TextToImageEvaluation
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.latent_diffusion import LatentDiffusion
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Muon
from ddpm_jax.training.settings import Train

CONFIG = Config(
    data=Dataset("shapes"),
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
)
EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "train.steps": 6,
        "train.eval_every": 4,
        "train.checkpoint_every": 4,
        "train.log_every": 2,
        "train.batch_size": 16,
        "task.generator.network.channels": 8,
        "task.generator.network.multipliers": (1,),
        "task.generator.network.blocks": 1,
        "task.generator.network.attention_sizes": (),
        "task.generator.network.head_channels": 0,
        "task.generator.network.text_refiner_blocks": 1,
        "task.generator.network.width": 32,
        "task.generator.network.depth": 1,
        "task.generator.network.heads": 2,
        "task.generator.sampling.steps": 2,
        "task.evaluation.num_samples": 16,
        "task.evaluation.num_prompts": 4,
        "task.evaluation.guidance_scales": (2.0,),
    },
    alternatives={
        "task.generator": (
            Autoregressive(
                CodeTransformer(width=192, depth=6, heads=6, text_refiner_blocks=1),
                guidance=2.0,
                temperature=1.0,
            ),
        ),
        "task.generator.network": (
            DiT(patch=1, width=192, depth=6, heads=6, text_refiner_blocks=1),
        ),
    },
)
