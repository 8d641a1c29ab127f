"""The text encoder of `text_to_image_shapes`, trained contrastively on captions and images (CLIP).

    python launch.py --experiment=text_encoder_shapes

This experiment trains the text encoder for 800 steps. `text_to_image_shapes` trains it for 400
steps, which are enough for the generation model.

Measured on one CPU core (AMD EPYC, jax 0.10.2; another training ran on the second core), seed 0:
400 steps of 128 pairs took 9 min 31 s. On 2,048 test pairs, half of which have a pair of colour and
shape that is not in the training images, 88.1 +- 0.7 % of captions retrieve their image among 64
images, and 78.6 +- 0.9 % of images have a higher similarity to their caption than to a hard
negative, which is a caption with one wrong statement.

Other numbers of steps, and the types of hard negatives: docs/results/text_encoder_shapes.md
"""

from ddpm_jax.experiment.types import Config, Dataset, Experiment
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.tasks.contrastive import Contrastive
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Muon
from ddpm_jax.training.settings import Train

CONFIG = Config(
    data=Dataset("shapes"),
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
)
EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "train.steps": 6,
        "train.eval_every": 4,
        "train.checkpoint_every": 4,
        "train.log_every": 2,
        "train.batch_size": 16,
        "task.network.size": "tiny",
        "task.network.channels": (8,),
        "task.hard_negatives": 0,
    },
)
