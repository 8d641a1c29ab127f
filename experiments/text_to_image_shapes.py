"""Text to image, trained from nothing: text encoder, autoencoder, generation model.

    python launch.py --experiment=text_to_image_shapes
    python launch.py --experiment=text_to_image_shapes --mode=sample --guidance=4 --num_samples=8
        --prompt="two yellow triangles above a blue circle" --out=out.png

Each part is a run in a directory of its own (`text`, `autoencoder`, `generator`), resumes and, once
finished, is not trained again; the last one draws.

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, on days when the machine was half as fast as
at other times: the text encoder took 21 min 23 s (15 min 32 s the day before, with nothing beside
it), the autoencoder 9 min 41 s (trained once, the day before) and the generation model, with its
evaluation, 73 min 13 s; tests ran beside all but the autoencoder for a while.  The same steps of
the autoencoder took 4 min 58 s when an earlier text encoder (1,200 steps) and generation model
(4,500) were trained, and all three took 57 min 36 s: today's have not been timed so.  In one go, on
another slow day: 800, 4,500 and 2,400 steps, 61 min 0 s (one shape 88 % as told, held out 65,
relation 54, test captions 49; guidance 2).  On one NVIDIA H200, beside five other trainings, as
many steps as here took 11 min.  All of these are of before the autoencoder's variance was bounded
and Muon's steps were taken in the small matrix (`ddpm_jax/muon.py`).  The figures are in
`text_encoder_shapes`, `autoencoder_shapes` and `generator_shapes`.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Annotated, Any, Literal

from ddpm_jax.config import MAY_CHANGE, AtLeast, Count, Length, marked
from ddpm_jax.parallel import is_main
from ddpm_jax.run import (
    Options,
    from_data,
    load_data,
    opened,
    own_config,
    record_of,
    train_experiment,
)
from experiments import autoencoder_shapes, generator_shapes, text_encoder_shapes
from experiments.text_encoder_shapes import TextSize

DRAWS = "generator"  # the part that `--mode=sample` and `--mode=eval` are about
DEBUG = dict(text_steps=6, autoencoder_steps=6, steps=6, text_size="tiny", channels=8)


@dataclasses.dataclass(frozen=True)
class Config:
    """See `--help`; each part's other fields are of its own experiment."""

    data: str = "shapes"
    text_steps: Length = text_encoder_shapes.Config().steps
    autoencoder_steps: Length = autoencoder_shapes.Config().steps
    steps: Length = generator_shapes.Config().steps  # of the generation model
    text_size: TextSize = text_encoder_shapes.Config().text_size
    codes: Annotated[int, AtLeast(0)] = 0  # of the autoencoder's codebook; 0: Gaussian latents
    model: Literal["unet", "dit", "autoregressive"] = "unet"
    channels: Count = generator_shapes.Config().channels  # of the U-Net
    guidance: Annotated[float, MAY_CHANGE] = generator_shapes.Config().guidance


def run(config: Config, workdir: pathlib.Path, options: Options = Options()) -> None:
    """Train the three parts, one after another; what is finished is told and left alone."""
    loaded = load_data(text_encoder_shapes, config.data, workdir, options)
    config = from_data(config, loaded.data)
    places = {part: str(workdir.absolute() / part) for part in ("text", "autoencoder")}
    text: dict[str, Any] = dict(steps=config.text_steps, text_size=config.text_size)
    autoencoder: dict[str, Any] = dict(
        steps=config.autoencoder_steps, codes=config.codes, text=places["text"]
    )
    generator: dict[str, Any] = dict(
        steps=config.steps,
        model=config.model,
        channels=config.channels,
        guidance=config.guidance,
        **places,
    )
    parts = [
        (part, experiment, own_config(experiment, options.debug, data=config.data, **fields))
        for part, experiment, fields in (
            ("text", text_encoder_shapes, text),
            ("autoencoder", autoencoder_shapes, autoencoder),
            ("generator", generator_shapes, generator),
        )
    ]
    generator_shapes.check(loaded.data, *(own for _, _, own in parts))
    record = record_of("text_to_image_shapes", config, loaded, options)
    with opened(workdir, record, marked(config, MAY_CHANGE)):
        found = {}
        for part, experiment, own in parts:
            summary = train_experiment(experiment, own, workdir / part, options, loaded)
            if summary is None:  # asked to stop
                return
            found[part] = summary
        if is_main():
            (workdir / "images").mkdir(exist_ok=True)
            for picture in (workdir / DRAWS / "images").glob("*[a-z].png"):
                shutil.copy(picture, workdir / "images")
            path = workdir / "summary.json"
            path.write_text(
                json.dumps({"experiment": "text_to_image_shapes", "parts": found}, indent=2) + "\n"
            )
            print(f"  the three parts in {workdir}, figures of all in {path}")
