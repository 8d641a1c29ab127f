"""Why is noise added while sampling?  eta from 0 to 1, and the ancestral sampler without it.

    python launch.py --experiment=noise_in_sampling

Trains one `ddpm_digits` model and draws from it in several ways, as many steps each: DDIM
with eta 0 (an ODE: no noise, and none needed, for its step keeps x_t's variance), with eta up
to 1 (which is the ancestral sampler), the ancestral sampler with the larger variance beta,
and the ancestral sampler with its noise left out or halved.  The last two take the mean of
p(x_s | x_t) for a draw of it: every step loses variance that nothing gives back, and what
comes out is smoother than any image.  (Of Gaussian data, whose exact denoiser is known, a
test shows it: 200 such steps leave less than a fifth of the deviation.)

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, 500 images each, 100 steps, no guidance,
test split, in 10 minutes beside other work: Frechet distance (classifier_digits; 500 training
images 9.9 +- 3.6), share recognised (+- 0.7 to 1.1 %).

    ddim 0      7.5 +- 1.6   96.0 %        ancestral         7.5 +- 1.3    97.2 %
    ddim 0.25   8.8 +- 1.8   93.8          ancestral, beta   7.7 +- 1.3    96.4
    ddim 0.5    7.8 +- 1.5   96.0          half the noise    23.5 +- 2.1   100
    ddim 0.75   7.6 +- 1.3   96.6          no noise          67.2 +- 3.1   100
    ddim 1      7.5 +- 1.3   97.2

So eta hardly matters here (one model), and noise left out does: typical digits, all recognised, and
little variety.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from ddpm_jax import plots
from ddpm_jax.config import marked
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.feature_networks import load_judge, with_judge
from ddpm_jax.experiment.inputs import Options, from_data, load_data, record_of
from ddpm_jax.experiment.load import load_state
from ddpm_jax.experiment.preflight import check_parts, check_sizes
from ddpm_jax.experiment.train import opened, train_experiment
from ddpm_jax.fields import MAY_CHANGE, Length, SampleSteps
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.quality import WHOLE, quality
from ddpm_jax.parallel.processes import is_main
from ddpm_jax.parallel.sharding import fetch
from ddpm_jax.progress import print_result
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Request
from ddpm_jax.tasks.image_sampler import Sampling, check_sampling
from ddpm_jax.training.ema import parameters_used
from ddpm_jax.training.run_dir import can_write, write_json
from ddpm_jax.training.step import averaged
from experiments import classifier_digits, ddpm_digits

DEBUG = ddpm_digits.DEBUG | dict(steps=3, compare_steps=3, judge="auto", samplers=("ancestral:0",))


@dataclasses.dataclass(frozen=True)
class Config(ddpm_digits.Config):
    """See `--help`; the fields that are not these are those of the model that is trained."""

    draw: Length = 500  # images of each way
    compare_steps: SampleSteps = 100
    samplers: tuple[str, ...] = (
        "ddim", "ddim:0.25", "ddim:0.5", "ddim:0.75", "ddim:1",
        "ancestral", "ancestral_beta", "ancestral:0.5", "ancestral:0",
    )  # fmt: skip


def run(config: Config, workdir: pathlib.Path, options: Options = Options()) -> None:
    """Train the model unless it is there, then draw in every way."""
    loaded = load_data(ddpm_digits, config, workdir, options)
    config = from_data(config, loaded.data)
    if not loaded.data.classes or config.judge == "none" or not config.conditional:
        raise UserError(
            "noise_in_sampling draws every class and judges it by a classifier: give a data set "
            "with labels, and neither --config.judge=none nor --config.conditional=false"
        )
    fields = {field.name for field in dataclasses.fields(ddpm_digits.Config)}
    check_all(config, loaded, fields, workdir, options)
    record = record_of("noise_in_sampling", config, loaded, options)
    with opened(workdir, record, marked(config, MAY_CHANGE)):
        judged = with_judge(classifier_digits, config, loaded, options)
        if judged is None:
            return
        model = ddpm_digits.Config(**{name: getattr(judged, name) for name in fields})
        place = workdir / "model"
        if train_experiment(ddpm_digits, model, place, options, loaded) is not None:
            compare(judged, model, place, workdir, options, loaded)


def check_all(
    config: Config, loaded: Loaded, fields: set[str], workdir: pathlib.Path, options: Options
) -> None:
    """Raises UserError, before anything is trained, unless the model and every sampler fit."""
    model = ddpm_digits.Config(**{name: getattr(config, name) for name in fields})
    model = ddpm_digits.prepare(model, loaded, options)
    check_sizes(ddpm_digits.build(model), model, options.parallel)
    steps, learned = ddpm_digits.noise_schedule(config).steps, config.variance == "learned"
    for name in config.samplers:
        way = Sampling(name, config.compare_steps)
        check_sampling(way, "--config.samplers", "--config.compare_steps", steps, learned)
    check_parts([(workdir / "model", "ddpm_digits")])


def compare(
    config: Config,
    model: ddpm_digits.Config,
    place: pathlib.Path,
    workdir: pathlib.Path,
    options: Options,
    loaded: Loaded,
) -> None:
    """A row of figures and of pictures for every way of drawing."""
    model = dataclasses.replace(model, guide="labels")  # and a scale of 1: no guidance
    model, state = load_state(ddpm_digits, place, model)
    task, params = ddpm_digits.build(model), averaged(state, model)
    judge = load_judge(classifier_digits, config.judge)
    each = max(1, config.draw // model.classes)
    key = purpose_key(options.seed, SAMPLE)
    found, shown = {}, []
    for name in config.samplers:
        request = Request(sampler=name, steps=config.compare_steps, guidance=1.0)
        parts = []
        for label in range(model.classes):
            keys = example_keys(key, 0, jnp.arange(label * each, (label + 1) * each))
            drawn = task.sample(params, state.fixed, keys, request._replace(label=label))
            parts.append(fetch(drawn))
        images, labels = np.concatenate(parts), np.repeat(np.arange(model.classes), each)
        shown.append(images[::each][:10])
        found[name] = quality(judge, images, labels, loaded.data).metrics
        found[name]["deviation"] = float(images.std(0).mean())
    title = f"{config.compare_steps} steps each, on {loaded.data.title}"
    fd = f"fd_{judge.name}"
    shown_metrics = (fd, "recognised", "nearest_ratio", "deviation")
    rows = []
    for name, metrics in found.items():
        texts = dict(plots.metric_rows(metrics))
        rows.append((name, "  ".join(f"{m} {texts[m]}" for m in shown_metrics if m in texts)))
    train = to_images(loaded.data.train.some(WHOLE).images, loaded.data.levels)
    of_data = float(train.std(0).mean())
    of_training = texts.get(f"{fd}_of_training", "left out")
    rows.append(("training set", f"{fd} {of_training}  deviation {of_data:.4g}"))
    if not is_main():
        return
    print_result(plots.table(rows, title))
    sheet = plots.grid(np.concatenate(shown), columns=min(10, model.classes))
    with can_write(workdir):
        plots.save_png(workdir / "images" / "a_row_each.png", sheet)
    ddim = {name: metrics for name, metrics in found.items() if name[:4] == "ddim"}
    etas = {float(n.partition(":")[2] or 0): m[fd] for n, m in ddim.items() if fd in m}
    if len(etas) > 1:
        points = np.array(sorted(etas))
        curve = {f"Frechet distance ({judge.name})": np.array([etas[eta] for eta in points])}
        picture = plots.lines(points, curve, "eta of DDIM", title)
        with can_write(workdir):
            plots.save_png(workdir / "images" / "distance_against_eta.png", picture)
    written = {
        "experiment": "noise_in_sampling",
        "data": loaded.data.title,
        "steps": config.compare_steps,
        "parameters": parameters_used(model),
        "features": {judge.name: judge.about},
        "deviation_of_training_images": of_data,
        "samplers": found,
    }
    write_json(workdir / "summary.json", written)
    print_result(f"  pictures in {workdir / 'images'}, figures in {workdir / 'summary.json'}")
