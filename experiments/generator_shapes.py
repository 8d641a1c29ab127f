"""The generation model of `text_to_image_shapes`, on a trained text encoder and autoencoder.

    python launch.py --experiment=generator_shapes --config.text=DIR --config.autoencoder=DIR
    python launch.py --experiment=generator_shapes --config.model=autoregressive ...

Measured on a CPU core (AMD EPYC, jax 0.10.2; another training on the second one), seed 0, as
`text_to_image_shapes` trains it, on 400 steps of a text encoder and 4,000 of an autoencoder (32.0
dB): the U-Net, 5,300 steps of 32 images at two times each with Muon, 79 min 58 s with its
evaluation (alone on both cores at commit 4aefa19, 3.1 steps/s, 32 min 17 s).  DPM-Solver++(2M) in
its SDE form, 20 steps; 128 prompts of each kind, 256 captions (+- one standard error).

Guidance was chosen on the validation split (`--mode=eval --split=validation`), whose held-out pairs
are others than the test split's:

    guidance                                  1      1.5    2      3      4      6
    everything as the prompt says, %:
      one shape                               91     93     95     97     97     85     +- 2
      held-out colours of one shape           70     78     79     80     84     63     +- 4
      two shapes and their relation           56     69     70     77     72     60     +- 4
      the same, held out                      48     66     69     71     71     40     +- 4
      captions                                45     62     66     72     68     50     +- 3
    CLIP score                                79.7   84.7   86.1   86.6   85.8   82.9   +- 0.6
    Frechet distance, text_encoder            0.050  0.030  0.031  0.039  0.045  0.072  +- 0.007

2 and 3 draw as many captions to within errors (66 +- 3 and 72 +- 3 %), and 2 comes nearer to the
images: it is the default.  On the test split, then:

    guidance                                  1      1.5    2      3      4      6
    everything as the prompt says, %:
      one shape                               87     90     93     91     90     83     +- 2
      held-out colours of one shape           65     78     84     93     92     86     +- 3
      two shapes and their relation           67     76     81     78     70     48     +- 4
      the same, held out                      43     56     66     74     61     44     +- 4
      captions                                49     61     69     67     65     48     +- 3
      captions, but for size and background   54     62     69     67     66     50     +- 3
    CLIP score (of test images: 87.9)         81.8   85.6   86.7   86.7   86.0   82.8   +- 0.6
    Frechet distance, text_encoder (of as
    many training images: 0.061, which
    hold no held-out pair)                    0.043  0.031  0.034  0.038  0.050  0.076  +- 0.008

All other figures are of commit 4aefa19: there was no validation split (every choice was made on the
test split), four pairs of colour and kind were held out, not six, and "as told" left out sizes and
background, which is `aligned_except_size_and_background` today.

An image's two times lie a half apart.  On one pair of parts (32.5 dB) the test loss with neighbours
in their place was 0.304, 0.272 and 0.263 after 1,800, 3,600 and 5,300 steps, with times apart
0.299, 0.268 and 0.259; at guidance 2 as the prompt said were 98, 81, 83, 65 and 71 %, and 98, 83,
77, 67 and 69, which is the same to within errors.

Of more prompts, by two samplers, at guidance 2 (256 of one shape, 2,048 of a relation, and of a
held-out one 2,048 by the first and 1,024 by the second):

                                        one shape   held out    relation    held out
    DPM-Solver++(2M), SDE, 20 steps    96.9+-1.1   85.5+-2.2   80.1+-0.9   68.5+-1.0
    ancestral, 250 steps               96.1+-1.2   83.6+-2.3   82.8+-0.8   69.4+-1.4

12 times the evaluations draw two shapes 1 to 3 % better.  (One shape of 1,024 prompts, by the
first: 94.8 +- 0.7 and 85.2 +- 1.1.  The model of the run before, of 448 prompts: 96.0, 82.8, 80.3,
64.2 and 95.6, 83.7, 82.6, 68.5.)  Where the 20 steps lie matters little: of 2,048 prompts of a
relation, half of them held out, 74.7 +- 1.0 % are drawn as told by these, and by those with more of
them at high noise, 1 - (1 - t)^1.5 in the place of t or evenly spread logsnr from -7 to 3, 75.0 and
76.0.

On one NVIDIA H200 (jax 0.11.2, beside up to five other trainings), of 1,024 prompts of each kind
(+- 0.6 to 1.5 %), a U-Net of 64 channels (32 a head) after 4,200 steps of 64 images (that of
the next table), at guidance 2 by other samplers:

                                        one shape   held out   relation   held out
    DPM-Solver++(2M), SDE, 20 steps        96.6        83.9       75.7       65.5
      40                                   96.0        82.6       76.9       66.2
      100                                  96.3        84.0       77.1       66.2
      20, spacing linspace                 95.2        83.1       73.6       62.1
      20, logsnr                           92.2        77.7       72.7       63.0
    its ODE, 20 steps                      92.4        81.2       68.1       59.8
    DDIM, 250 steps                        92.9        80.6       69.0       60.0
    ancestral, 250 steps                   96.2        84.6       78.3       67.6

100 steps of the ODE's form drew what 20 of it did (an earlier run, on the CPU), and 250 of DDIM are
no better: what the ancestral steps have more is their noise, which the SDE's form has, too.

The other models, there, 128 prompts of each kind, guidance 2 (in brackets the Frechet distance),
all with `refine` 2, batches of 64, one draw of each image, a text encoder of 800 steps and an
autoencoder of 6,000; the U-Nets with 64 channels, 32 a head:

                                        one shape   held out   relation   held out   test captions
    U-Net, 4,200 steps, 3.9 M parameters    99          80         79         69         72  (0.036)
    DiT, 4,200, 6.6 M                       91          67         58         39         48  (0.034)
    autoregressive, 256 codes, 8,000, 5.2 M 95          76         88         70         75  (0.033)
    U-Net, `shapes:64`, 8,000, 3.8 M       100         100         91         94         94  (0.038)

Guidance past 2 undoes what is autoregressive: 61 % of test captions at 3, 41 at 4, 5 at 6, where
the U-Net has 75, 71 and 53.  The text encoder and the autoencoder took 3 min there, the U-Net 8,
the transformer over codes 9, that of 64 pixels 11: waiting for shapes, which one thread draws.

Captioned emoji (3,083 to train on and 355 to test with, a folder, 64 pixels on white; Noto Emoji):

    python launch.py --experiment=text_encoder_shapes --config.data=folder:EMOJI --config.steps=1500
    python launch.py --experiment=autoencoder_shapes --config.data=folder:EMOJI --config.steps=10000
        --config.batch_size=32 --config.kl_weight=2e-3 --config.text=runs/text_encoder_shapes
    python launch.py --experiment=generator_shapes --config.data=folder:EMOJI --config.steps=12000
        --config.batch_size=64 --config.draws=1 --config.channels=128 --config.multipliers=1,2,2
        --config.blocks=2 --config.dropout=0.1 --config.attention_sizes=8,16
        --config.head_channels=64 --config.refine=2 --config.eval_every=4000

97 s, 69 s (28.6 dB) and 1,107 s there, 31 M parameters.  Training captions are drawn from memory,
to the pixel nearly the same each time.  Of test captions the kind is drawn, not the thing, where
nothing like it was seen ("keycap: 2" is a keycap with an 0), and the thing where its parts were
("person: dark skin tone").  The test loss was 0.174 after 4,000 steps and 0.323 at the end, while
the CLIP score rose from 42 to 64 (of the images, 59).  Frechet distance 0.053 (of as many training
images, 0.073).

What half an hour of two slow CPU cores is best spent on: about as many steps as each takes so long
for, there, 1,024 prompts of each kind, guidance 2, seed 0.  (Steps were timed of 64 channels and of
48 in 32 x 2, and estimated of the others; 48 channels in batches of 64 have some 10 % more time.
An image's times were neighbours.)
Batches of 64, or of 32 whose images are seen at two times each (`draws`: text encoder, autoencoder
and drawing work once), two heads on the first level (one of 32 channels), a text encoder of 800
steps, an autoencoder of 4,000, `refine` 2, a `shift` of 0.7 and a learning rate of 1.5e-3 where
nothing else is said:

                                                one shape   held out   relation   held out
    64 channels, 2,500 steps                        85         57         58         37
      text encoder of 600 / 400 steps            86 / 89    61 / 68    63 / 59    41 / 41
      learning rate 3e-3                            83         60         49         31
      32 x 2, 2,700                                 79         52         47         29
    48 channels, 3,800                              90         74         68         54
      learning rate 3e-3                            93         79         69         55
      32 x 2, 4,200                                 92         78         73         54
        `shift` 0.5                                 87         70         66         48
        learning rate 1e-3 / 2.2e-3 / 3e-3    87 / 90 / 91  71 / 75 / 70  64 / 69 / 65  42 / 51 / 49
        multipliers 1,3; 3,700                      86         65         61         44
        `refine` 1, 4,500                           92         76         74         56
      32 x 1, 6,300                                 90         66         67         44
      16 x 4, 4,400                                 81         53         54         32
    40 channels, 32 x 2, 5,200                      92         70         68         49
    32 channels, 6,000                              86         64         64         45

and with the minutes that 400 steps of the text encoder save, 48 channels:

    4,600 steps                                     94         79         77         64
    32 x 2, 5,000 (and with seed 1)              93 (93)    78 (78)    75 (77)    60 (60)
      `refine` 1, 5,300: today's, but for times     96         83         79         67

What it took, each found with what comes before it:

    a text encoder that reads relations (as today's; see `text_encoder_shapes`), more of them in
    training, and noisier times (`shift` 0.5 instead of 1), for a relation is decided at high noise:
    one shape 91, held out 61, relation 68 (before 94, 49 and 9 after 4,500 steps)
    words' own features beside those behind the text encoder's blocks (`TextEncoder`), more
    altered captions of kinds and numbers, and a `shift` of 0.7:  98, 86 and 84, and after a third
    of the steps 55 % of test captions, as many as before at the end

The features behind the blocks had lost what they were not asked for: linear regression found the
shape in them, at the word for it, in 97 % of prompts of two shapes and in 93 % of held-out ones,
and in the pooled ones of a single held-out shape in 78 %.  Which share of the gain each of the
three changes has was not measured.

What perfect features gave before all that, with a `shift` of 1: with captions' attributes (a slot
for each group's number, size, colour and kind, the relation and the background) in the place of the
text encoder's, and so no blocks to refine them, 3,190 steps drew 88 % of single shapes as told,
74 % of held-out ones and 41 % of relations (guidance 2).  With those features Muon's training loss
after 1,500 steps, 0.295, was Adam's after 3,000.  The latents' 8x8 level is needed: folded to 4x4,
they cost a fifth of the test loss.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Training, marked
from ddpm_jax.data import shapes
from ddpm_jax.data.types import Data, Loaded
from ddpm_jax.diffusion.schedules import Spacing, shifted
from ddpm_jax.experiment.inputs import Options, from_data
from ddpm_jax.experiment.parts import finished, load_part, with_parts
from ddpm_jax.experiment.preflight import check_sizes
from ddpm_jax.fields import (  # fmt: skip
    FROM_PARTS,
    MAY_CHANGE,
    PATH,
    AtLeast,
    AtMost,
    CaptionLength,
    Count,
    Few,
    Interval,
    Layers,
    Length,
    MoreLayers,
    NoiseSteps,
    NonNegative,
    Positive,
    RunPath,
    SampleSteps,
    Share,
)
from ddpm_jax.metrics.alignment import judge
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.text_encoder import SIZES
from ddpm_jax.nn.unet import UNet
from ddpm_jax.task import Task
from ddpm_jax.tasks.autoencoder import latents
from ddpm_jax.tasks.autoregressive import Autoregressive, autoregressive
from ddpm_jax.tasks.generation import Generator
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.latent_diffusion import diffusion
from ddpm_jax.tasks.pretrained_text import encode, encoded, width_of
from ddpm_jax.tasks.text_to_image import Parts, Prompts, text_to_image_task
from ddpm_jax.training.step import averaged, state_shapes
from experiments import autoencoder_shapes, text_encoder_shapes
from experiments.ddpm_digits import WEIGHTS, Noise, Weight, noise_schedule

DEBUG = dict(
    steps=6, eval_every=4, checkpoint_every=4, log_every=2, batch_size=16, channels=8, blocks=1,
    multipliers=(1,), sample_steps=2, draw=16, prompts=4, scales=(2.0,), depth=1, width=32, heads=2,
    head_channels=0, refine=1, attention_sizes=(4,),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """See `python launch.py --experiment=generator_shapes --help`."""

    data: str = "shapes"
    steps: Length = 5300
    batch_size: Count = 32
    optimizer: Literal["adam", "muon"] = "muon"
    learning_rate: Positive = 1.5e-3
    warmup: Annotated[int, AtLeast(0)] = 200
    decay: Literal["none", "cosine"] = "cosine"
    clip: NonNegative = 1.0
    ema_half_life: NonNegative = 20_000.0
    eval_every: Interval = 1800
    checkpoint_every: Interval = 500
    # The parts: run directories, and what follows from them.
    text: RunPath = "runs/text_encoder_shapes"
    autoencoder: RunPath = "runs/autoencoder_shapes"
    caption_length: CaptionLength = 0
    text_size: Annotated[str, FROM_PARTS] = ""
    tower_channels: Annotated[tuple[int, ...], FROM_PARTS] = ()
    joint: Annotated[int, FROM_PARTS] = 0
    ae_channels: Annotated[tuple[int, ...], FROM_PARTS] = ()
    latent: Annotated[int, FROM_PARTS] = 0
    ae_blocks: Annotated[int, FROM_PARTS] = 0
    codes: Annotated[int, FROM_PARTS] = 0
    # Features of a frozen text encoder of somebody else's, a name or a folder that `transformers`
    # knows, in the place of `text`'s, which then only tells figures; needs a finite data set.
    pretrained: Annotated[str, PATH] = ""
    # Another text encoder's run that tells CLIP scores and Frechet distances in the place of
    # `text`'s: what is told so can be compared, whatever text encoder a model was trained on.
    judge: RunPath = "none"
    width_of_features: Annotated[int, FROM_PARTS] = 0
    model: Literal["unet", "dit", "autoregressive"] = "unet"
    # The U-Net.
    fold: Count = 1
    channels: Count = 48
    multipliers: tuple[Count, ...] = (1, 2)
    blocks: Layers = 1
    attention_sizes: tuple[Count, ...] = (4, 8)
    head_channels: Annotated[int, AtLeast(0)] = 24
    # The DiT; and, but for `patch`, the autoregressive transformer.
    patch: Count = 1
    width: Count = 192
    depth: Layers = 6
    heads: Count = 6
    # Any.
    refine: MoreLayers = 1  # blocks of its own that read the caption's features
    dropout: Share = 0.0
    remat: bool = False  # blocks are computed again in the backward pass
    caption_dropout: Annotated[float, AtLeast(0.0), AtMost(1.0)] = 0.1
    # The process.
    draws: Few = 2  # times and noises at which diffusion is trained on each image of a batch
    noise: Noise = "cosine_betas"
    noise_steps: NoiseSteps = 1000
    shift: Positive = 0.7  # times alpha / sigma: below 1, more of the times are noisy
    prediction: Literal["eps", "x0", "v"] = "v"
    weight: Weight = "v"
    # Sampling and evaluation, which may change from one evaluation to the next.
    sampler: Annotated[str, MAY_CHANGE] = "dpmpp_2m_sde"
    sample_steps: SampleSteps = 20
    spacing: Annotated[Spacing, MAY_CHANGE] = "trailing"
    guidance: Annotated[float, MAY_CHANGE] = 2.0
    temperature: Annotated[float, AtLeast(1e-3), MAY_CHANGE] = 1.0  # of codes' draws
    scales: Annotated[tuple[float, ...], MAY_CHANGE] = (1.0, 1.5, 3.0, 4.0, 6.0)  # tried at the end
    draw: Length = 256  # images of test captions
    prompts: Length = 128  # of each kind that the exact judge sees


SETS = (
    "single",
    "single held out",
    "relation",
    "relation held out",
)  # `shapes.scene`'s
AUTOENCODER = ("ae_channels", "latent", "ae_blocks", "codes")  # its fields that follow from it


def aligned(images: Any, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether each image shows what its caption says, strictly, and but for size and background."""
    verdicts = [judge(x, text) for x, text in zip(images, captions, strict=True)]
    names = ("aligned", "aligned_except_size_and_background")
    return {name: np.array([getattr(v, name) for v in verdicts]) for name in names}


def prompts(config: Config) -> Prompts:
    """What the exact judge sees, where there is one: of the data set that it knows."""
    scales, draw = config.scales, config.draw
    if not shapes.is_named(config.data):
        return Prompts(scales=scales, draw=draw)

    def sets(split: str) -> dict[str, list[str]]:
        return {
            only.replace(" ", "_"): [
                shapes.scene(f"{split} prompts", i, only).caption for i in range(config.prompts)
            ]
            for only in SETS
        }

    return Prompts(sets, aligned, scales, draw)


def parts(config: Config) -> Parts:
    """What the generation model is built on."""
    text = text_encoder_shapes.network(config)
    net = autoencoder_shapes.network(config)

    def blank():
        tokens = jnp.zeros((1, text.length), jnp.uint8)
        images = jnp.zeros((1, *config.shape))
        read = jax.eval_shape(text.init, jax.random.key(0), tokens, images)
        theirs = autoencoder_shapes.Config(
            **{name: getattr(config, name) for name in ("shape", "levels", *AUTOENCODER)}
        )
        state = state_shapes(autoencoder_shapes.build(theirs), theirs)
        return {"text": read, "autoencoder": {"params": state.params, "fixed": state.fixed}}

    def load():
        theirs, state = load_part(text_encoder_shapes, config.text)
        ours, other = load_part(autoencoder_shapes, config.autoencoder)
        return {
            "text": averaged(state, theirs),
            "autoencoder": {"params": averaged(other, ours), "fixed": other.fixed},
        }

    reader = functools.partial(encode, config.pretrained) if config.pretrained else None
    width = config.width_of_features or SIZES[config.text_size].features
    judge = functools.partial(autoencoder_shapes.dual_encoder, config.judge)
    told_by = None if config.judge == "none" else judge
    return Parts(text, latents(net, config.codes), blank, load, width, reader, told_by)


def generator(config: Config, standing_on: Parts) -> Generator:
    """The generation model that the config chooses."""
    common: dict[str, Any] = dict(
        refine=config.refine, dropout=config.dropout, dtype=jnp.dtype(config.precision)
    )
    if config.model == "autoregressive":
        codes = CodeTransformer(config.codes, config.width, config.depth, config.heads, **common)
        codes.check()
        how = Autoregressive(config.guidance, config.temperature)
        return autoregressive(codes, standing_on.latents, how)
    common |= dict(outputs=config.latent, remat=config.remat)
    net: UNet | DiT = (
        DiT(
            patch=config.patch, width=config.width, depth=config.depth, heads=config.heads, **common
        )
        if config.model == "dit"
        else UNet(
            fold=config.fold,
            channels=config.channels,
            multipliers=config.multipliers,
            blocks=config.blocks,
            attention_sizes=config.attention_sizes,
            head_channels=config.head_channels,
            **common,
        )
    )
    sampling = Sampling(
        config.sampler,
        config.sample_steps,
        config.spacing,
        config.guidance,
        limit="none",  # latents have no range
    )
    return diffusion(
        net,
        shifted(noise_schedule(config), config.shift),
        standing_on.latents,
        kind=config.prediction,
        weight=WEIGHTS[config.weight],
        sampling=sampling,
        batch_size=config.batch_size,
        draws=config.draws,
    )


def prepare(config: Config, loaded: Loaded, options: Options) -> Config:
    """The config with what follows from its parts; a trained run's has it already."""
    text_encoder_shapes.check_captions(config)
    if config.judge != "none":
        place, _ = finished(config, "judge", text_encoder_shapes)
        config = dataclasses.replace(config, judge=place)
    if config.text_size:
        return config
    folder = pathlib.Path(config.pretrained).expanduser()
    if config.pretrained and folder.is_dir():
        config = dataclasses.replace(config, pretrained=str(folder.absolute()))
    config = with_parts(config, text=text_encoder_shapes, autoencoder=autoencoder_shapes)
    if not config.pretrained:
        return config
    return dataclasses.replace(config, width_of_features=width_of(config.pretrained))


def check(data: Data, text: Any, autoencoder: Any, config: Config) -> None:
    """Raises UserError unless all three can be built and fit, before the first is trained."""
    text, autoencoder, config = (from_data(some, data) for some in (text, autoencoder, config))
    check_sizes(text_encoder_shapes.build(text), text)
    check_sizes(autoencoder_shapes.build(autoencoder), autoencoder)
    known = {
        name: getattr(part, name)
        for part in (text, autoencoder)
        for name in marked(config, FROM_PARTS)
        if hasattr(part, name)
    }
    config = dataclasses.replace(config, **known)
    check_sizes(build(config), config)


def dress(config: Config, data: Data) -> Data:
    """The data, with a pretrained encoder's features for captions if there is one."""
    return encoded(config.pretrained, data) if config.pretrained else data


def build(config: Config) -> Task:
    """The task that this experiment trains."""
    standing_on = parts(config)
    return text_to_image_task(
        generator(config, standing_on),
        standing_on,
        config.shape,
        config.levels,
        caption_dropout=config.caption_dropout,
        prompts=prompts(config),
    )
