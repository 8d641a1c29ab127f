"""Text to image, trained from nothing: text encoder, autoencoder, generation model.

    python launch.py --experiment=text_to_image_shapes
    python launch.py --experiment=text_to_image_shapes --mode=sample --guidance=4 --num_samples=8
        --prompt="two yellow triangles above a blue circle" --out=out.png

Each part is a run in a directory of its own (`text`, `autoencoder`, `generator`), resumes and, once
finished, is not trained again; the last one draws.

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, from a fresh clone: 96 min on one of the
cores, with another training on the other one, of which the text encoder took 9 min 31 s, the
autoencoder 6 min 48 s and the generation model, with its evaluation at six guidance scales, 79 min
58 s.  Alone on both cores, nothing compiled before, it took 40 min 44 s at commit 4aefa19.

Of 128 prompts of the test split of each kind (guidance 2, chosen on validation prompts), one shape
is drawn as its prompt says in 93 %, with a held-out pair of colour and kind in 84, two in their
relation in 81 and with a held-out pair in 66; of 256 test captions 69.  Of captions 88.1 +- 0.7 %
find their image among 64, and 78.6 +- 0.9 % of images lie nearer to their caption than to an
altered one; reconstructions have 32.02 +- 0.05 dB.  How the time was divided, and what else it
gave, is in `generator_shapes`; each part's other figures are in `text_encoder_shapes` (800 steps)
and `autoencoder_shapes` (6,000).
"""

import dataclasses
import pathlib
import shutil
from typing import Annotated, Any, Literal

from ddpm_jax.config import marked
from ddpm_jax.experiment.inputs import Options, from_data, load_data, own_config, record_of
from ddpm_jax.experiment.preflight import check_parts
from ddpm_jax.experiment.train import opened, train_experiment
from ddpm_jax.fields import MAY_CHANGE, AtLeast, Count, Few, Length, MoreLayers, ValidationImages
from ddpm_jax.parallel.processes import is_main
from ddpm_jax.progress import print_result
from ddpm_jax.training.run_dir import can_write, write_json
from experiments import autoencoder_shapes, generator_shapes, text_encoder_shapes
from experiments.text_encoder_shapes import TextSize

DRAWS = "generator"  # the part that `--mode=sample` and `--mode=eval` are about
DEBUG = dict(
    text_steps=6,
    autoencoder_steps=6,
    steps=6,
    log_every=2,
    batch_size=16,
    text_size="tiny",
    channels=8,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """See `--help`; each part's other fields are of its own experiment."""

    data: str = "shapes"
    validation: ValidationImages = None
    # Fewer than either takes alone: the generation model makes more of the minutes.
    text_steps: Length = 400
    autoencoder_steps: Length = 4000
    steps: Length = generator_shapes.Config().steps  # of the generation model
    text_size: TextSize = text_encoder_shapes.Config().text_size
    codes: Annotated[int, AtLeast(0)] = 0  # of the autoencoder's codebook; 0: Gaussian latents
    model: Literal["unet", "dit", "autoregressive"] = "unet"
    batch_size: Count = generator_shapes.Config().batch_size  # of the generation model
    draws: Few = generator_shapes.Config().draws  # of diffusion: times of each image
    channels: Count = generator_shapes.Config().channels  # of the U-Net; half as many a head
    refine: MoreLayers = generator_shapes.Config().refine  # blocks on captions
    guidance: Annotated[float, MAY_CHANGE] = generator_shapes.Config().guidance
    log_every: Annotated[int, AtLeast(1), MAY_CHANGE] = 100  # steps of each part


def run(config: Config, workdir: pathlib.Path, options: Options = Options()) -> None:
    """Train the three parts, one after another; what is finished is told and left alone."""
    loaded = load_data(text_encoder_shapes, config, workdir, options)
    config = from_data(config, loaded.data)
    places = {part: str(workdir.absolute() / part) for part in ("text", "autoencoder")}
    text: dict[str, Any] = dict(steps=config.text_steps, text_size=config.text_size)
    autoencoder: dict[str, Any] = dict(
        steps=config.autoencoder_steps, codes=config.codes, text=places["text"]
    )
    generator: dict[str, Any] = dict(
        steps=config.steps,
        batch_size=config.batch_size,
        draws=config.draws,
        model=config.model,
        channels=config.channels,
        head_channels=config.channels // 2,
        refine=config.refine,
        guidance=config.guidance,
        **places,
    )
    shared = {name: getattr(config, name) for name in ("data", "validation", "log_every")}
    parts = [
        (
            part,
            experiment,
            own_config(experiment, options.debug, **shared, **fields),
        )
        for part, experiment, fields in (
            ("text", text_encoder_shapes, text),
            ("autoencoder", autoencoder_shapes, autoencoder),
            ("generator", generator_shapes, generator),
        )
    ]
    generator_shapes.check(loaded.data, *(own for _, _, own in parts))
    names = {part: experiment.__name__.rpartition(".")[2] for part, experiment, _ in parts}
    check_parts((workdir / part, name) for part, name in names.items())
    record = record_of("text_to_image_shapes", config, loaded, options)
    with opened(workdir, record, marked(config, MAY_CHANGE)):
        found = {}
        for part, experiment, own in parts:
            summary = train_experiment(experiment, own, workdir / part, options, loaded)
            if summary is None:  # asked to stop
                return
            found[part] = summary
        if is_main():
            with can_write(workdir):
                (workdir / "images").mkdir(exist_ok=True)
                for picture in (workdir / DRAWS / "images").glob("*[a-z].png"):
                    shutil.copy(picture, workdir / "images")
            path = workdir / "summary.json"
            write_json(path, {"experiment": "text_to_image_shapes", "parts": found})
            print_result(f"  the three parts in {workdir}, figures of all in {path}")
