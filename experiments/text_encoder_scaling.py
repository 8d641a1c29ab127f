"""Which helps more, a larger text encoder or a larger generation model? (Imagen, fig. 4)

    python launch.py --experiment=text_encoder_scaling

The notes say: the text encoder (Saharia et al. 2022).  Here every pair of text encoder and
generation model is trained for as many steps on `shapes`, on one shared autoencoder, and drawn at
several guidance scales: a family of curves of alignment against Frechet distance for the text
encoders under the largest generation model, and one for the generation models under the largest
text encoder.  Distances are all told with the largest text encoder's image tower.

All figures are of commit 4aefa19: there was no validation split (every choice was made on the test
split), four pairs of colour and kind were held out, not six, and "as told" left out sizes and
background, which is `aligned_except_size_and_background` today.

What came out, on one NVIDIA H200 (jax 0.11.2, seed 0, 22 min beside five other trainings, with
`--config.channels=16,32,64 --config.steps=1200 --config.batch_size=64 --config.refine=2
--config.prompts=128`; a text encoder trained for 800 steps, the autoencoder for 6,000): 1,200 steps
a pair, 256 test captions (+- 2.2 % where 14 are as told) and 128 prompts of a shape.

    text encoder    U-Net, parameters    test captions    one shape    least Frechet distance
    tiny            16 ch., 0.25 M           2.0 %          10 %               0.181
    tiny            32 ch., 0.99 M           3.5            20                 0.089
    tiny            64 ch., 3.9 M           14.1            47                 0.046
    small           16 ch., 0.26 M           1.6            12                 0.178
    small           32 ch., 1.0 M            5.9            22                 0.084
    small           64 ch., 3.9 M           14.5            50                 0.049

(Each at its best scale.)  The notes' claim does not hold here: a larger text encoder moves neither
the share of images that are as told nor the distance by more than their errors, a larger generation
model moves both by multiples.  But for one thing, which asks most of a text encoder: two shapes in
their relation, at 64 channels, are drawn in 10 % with the tiny and in 17 with the small one, +- 3.

Two things set this apart from Imagen's figure.  1,200 steps are few: the U-Net of 64 channels draws
72 % of test captions as told after 4,200, so that pairs are told apart by how soon they learn.  And
a text encoder that was trained on the very captions of the task knows them at either size (92.7 and
93.5 % of captions find their image among 64), as none does that has to know a language.

On 2 CPU cores (AMD EPYC, jax 0.10.2, seed 0), by the command as it stands, 47 min in all, the first
22 of them with other work beside: a pair took 2 min 35 s, 4 min 14 s and 5 min 48 s with the tiny
text encoder and 2 min 48 s, 4 min 9 s and 5 min 42 s with the small one, its evaluation at six
scales included, or, on a day when the machine was half as fast as at other times, 9 min 7 s for
the largest.

    text encoder    U-Net, parameters    test loss    least Frechet distance    one shape
    tiny            16 ch., 0.23 M         0.534               0.217               6 %
    tiny            32 ch., 0.91 M         0.431               0.138              16
    tiny            48 ch., 2.0 M          0.396               0.090              16
    small           16 ch., 0.24 M         0.532               0.232              16
    small           32 ch., 0.92 M         0.430               0.132              22
    small           48 ch., 2.0 M          0.399               0.102              19

(+- 0.005 of a loss, +- 7 % of a shape.)  The same came out of two fifths of the images: the
generation model's size more than halves the distance, the text encoder's moves it little, and now
up, now down.  Alignment is too early to tell after 1,000 steps of 32 images: of test captions 2 to
4 % are drawn as told, of relations none.
"""

import dataclasses
import pathlib
import types
from typing import Annotated, Any

from ddpm_jax import plots
from ddpm_jax.config import marked
from ddpm_jax.data import shapes
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.inputs import Options, from_data, load_data, own_config, record_of
from ddpm_jax.experiment.preflight import check_parts
from ddpm_jax.experiment.train import opened, train_experiment
from ddpm_jax.fields import MAY_CHANGE, AtLeast, Count, Few, Length, MoreLayers, ValidationImages
from ddpm_jax.parallel.processes import is_main
from ddpm_jax.progress import print_result
from ddpm_jax.training.run_dir import can_write, write_json
from experiments import autoencoder_shapes, generator_shapes, text_encoder_shapes
from experiments.text_encoder_shapes import TextSize

DEBUG = dict(
    batch_size=16,
    autoencoder_steps=4,
    text_steps=4,
    steps=4,
    log_every=2,
    text_sizes=("tiny",),
    channels=(8, 12),
    head_channels=0,
    prompts=4,
    scales=(2.0,),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python launch.py --experiment=text_encoder_scaling --help`."""

    data: str = "shapes"
    validation: ValidationImages = None
    autoencoder_steps: Length = autoencoder_shapes.Config().steps
    text_steps: Length = text_encoder_shapes.Config().steps
    steps: Length = 1000  # of every generation model: less than 10 minutes a pair on two cores
    batch_size: Count = 32  # of its
    draws: Few = 1  # times at which it is trained on each image of a batch
    refine: MoreLayers = 1  # blocks of its own that read the caption's features
    text_sizes: tuple[TextSize, ...] = ("tiny", "small")  # from small to large
    channels: tuple[Count, ...] = (16, 32, 48)  # of the U-Nets, from small to large
    head_channels: Annotated[int, AtLeast(0)] = 16  # of their attention
    prompts: Count = 32  # of each kind that the exact judge sees
    scales: Annotated[tuple[float, ...], MAY_CHANGE] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    # The scale of the table, which is not chosen by the test prompts that the table is of.
    guidance: Annotated[float, MAY_CHANGE] = 2.0
    log_every: Annotated[int, AtLeast(1), MAY_CHANGE] = 100  # steps of each part


def run(config: Config, workdir: pathlib.Path, options: Options = Options()) -> None:
    """Train the autoencoder, the text encoders and every pair; what is finished is left alone."""
    if not shapes.is_named(config.data):
        raise UserError(
            f"--config.data={config.data}: only of shapes can be told whether an image shows what "
            "its caption says"
        )
    loaded = load_data(text_encoder_shapes, config, workdir, options)
    config = from_data(config, loaded.data)
    record = record_of("text_encoder_scaling", config, loaded, options)
    workdir = workdir.absolute()

    def own(experiment: types.ModuleType, **fields: Any) -> Any:
        shared = {name: getattr(config, name) for name in ("data", "validation", "log_every")}
        return own_config(experiment, options.debug, **shared, **fields)

    def train(name: str, experiment: types.ModuleType, **fields: Any) -> dict | None:
        made = own(experiment, **fields)
        return train_experiment(experiment, made, workdir / name, options, loaded)

    for channels in config.channels:  # before the first is trained
        model = own(
            generator_shapes,
            channels=channels,
            batch_size=config.batch_size,
            draws=config.draws,
            prompts=config.prompts,
            refine=config.refine,
            head_channels=config.head_channels,
        )
        generator_shapes.check(
            loaded.data, own(text_encoder_shapes), own(autoencoder_shapes), model
        )

    trained = {"autoencoder": "autoencoder_shapes"}
    trained |= {f"text_{size}": "text_encoder_shapes" for size in config.text_sizes}
    trained |= {
        f"{size}_{channels}": "generator_shapes"
        for size in config.text_sizes
        for channels in config.channels
    }
    check_parts((workdir / name, experiment) for name, experiment in trained.items())
    with opened(workdir, record, marked(config, MAY_CHANGE)):
        if train("autoencoder", autoencoder_shapes, steps=config.autoencoder_steps) is None:
            return
        for size in config.text_sizes:
            text = f"text_{size}"
            if train(text, text_encoder_shapes, steps=config.text_steps, text_size=size) is None:
                return
        found: dict[tuple[str, int], dict] = {}
        for size in config.text_sizes:
            for channels in config.channels:
                summary = train(
                    f"{size}_{channels}",
                    generator_shapes,
                    steps=config.steps,
                    batch_size=config.batch_size,
                    draws=config.draws,
                    refine=config.refine,
                    channels=channels,
                    head_channels=config.head_channels,
                    prompts=config.prompts,
                    scales=config.scales,
                    guidance=config.guidance,
                    text=str(workdir / f"text_{size}"),
                    judge=str(workdir / f"text_{config.text_sizes[-1]}"),
                    autoencoder=str(workdir / "autoencoder"),
                )
                if summary is None:  # asked to stop
                    return
                found[size, channels] = summary
        if is_main():
            tell_all(config, workdir, found)


def curve(summary: dict) -> tuple[list[float], list[float], list[str]]:
    """(share aligned, Frechet distance, guidance scale) of every scale, in its order."""
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


def tell_all(config: Config, workdir: pathlib.Path, found: dict[tuple[str, int], dict]) -> None:
    """One table of all pairs and the two families of curves."""
    rows = []
    for (size, channels), summary in found.items():
        aligned, distance, scales = curve(summary)
        at = scales.index(f"{config.guidance:g}")
        rows.append(
            (
                f"text {size}, {channels} channels",
                f"aligned {aligned[at]:.3f} at guidance {scales[at]}, "
                f"Frechet distance (text_encoder) {distance[at]:.4f}; least {min(distance):.4f}",
            )
        )
    title = f"{config.steps} steps each"
    print_result(plots.table(rows, title))
    labels = ("share aligned", "Frechet distance (text_encoder)")
    widest, largest = config.channels[-1], config.text_sizes[-1]
    families = {
        "text_encoders": {f"text {s}": curve(found[s, widest]) for s in config.text_sizes},
        "generation_models": {f"{c} channels": curve(found[largest, c]) for c in config.channels},
    }
    for name, lines in families.items():
        picture = plots.paths(lines, labels, f"{name.replace('_', ' ')}, {title}")
        with can_write(workdir):
            plots.save_png(workdir / "images" / f"{name}.png", picture)
    pairs = {f"{size}_{channels}": s["metrics"] for (size, channels), s in found.items()}
    written = {"experiment": "text_encoder_scaling", "steps": config.steps, "pairs": pairs}
    write_json(workdir / "summary.json", written)
    print_result(f"  pictures in {workdir / 'images'}, figures in {workdir / 'summary.json'}")
