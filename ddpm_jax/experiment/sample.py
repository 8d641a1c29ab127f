"""Sample images of a trained run into a file."""

import functools
import pathlib
import types
from typing import Any

from ddpm_jax import errors
from ddpm_jax.errors import RunError
from ddpm_jax.experiment.inputs import Options
from ddpm_jax.experiment.load import load_state
from ddpm_jax.experiment.sample_files import SampleFile, check_out
from ddpm_jax.parallel import processes
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.progress import print_result, tell
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Request
from ddpm_jax.training import step
from ddpm_jax.training.run_dir import (
    can_write,
    check_entries,
)

SAMPLE_BATCH = 64


def sample_experiment(
    experiment: types.ModuleType,
    config: Any,
    workdir: pathlib.Path,
    options: Options,
    request: Request,
    count: int,
    out: pathlib.Path | None,
    prompts: tuple[str, ...] = (),
    overwrite: bool = False,
) -> pathlib.Path:
    """Draw images with the newest checkpoint's averaged parameters, into a .png or .npz.

    Image i is the same whatever `count` is, and another with every `--seed`.

    Args:
      count: how many images; of each of `prompts`, if there are any, a row of a .png each.
      overwrite: replace a file that this program did not write.

    Raises:
      RunError: the images are not finite, or cannot be written.
    """
    default = workdir / "images" / "drawn.png"
    out = out or default

    def check() -> None:
        check_entries(workdir)
        check_out(out, default, overwrite)

    processes.from_main(check)
    config, state = load_state(experiment, workdir, config, options.parallel)
    task = experiment.build(config)
    key = purpose_key(options.seed, SAMPLE)
    spread = devices.make(options.parallel)
    params, size = step.averaged(state, config), spread.round_up(SAMPLE_BATCH)
    texts = prompts or (request.prompt,)
    file = SampleFile(out, texts, count)
    batches = len(texts) * -(-count // size)
    spread = _logging_first(
        spread,
        f"sampling {file.total} images in {batches} batch{'es' * (batches > 1)} of {size}; the "
        "program for it is compiled first",
    )
    try:
        with file.kept() as clock:
            for text in texts:
                asked = request._replace(prompt=text)
                for start in range(0, count, size):  # one shape, compiled once
                    keys = example_keys(key, 0, spread.indices(start, size))
                    images = devices.fetch(task.sample(params, state.fixed, keys, asked, spread))
                    labels = task.labels and devices.fetch(task.labels(keys, asked))
                    own = slice(count - start)
                    file.add(images[own], None if labels is None else labels[own])
                    if file.total > size:
                        clock.show(file.size)
    except errors.NonFinite as error:
        raise RunError(
            f"{error}: the sampler diverged; try another --guidance, --steps or --sampler"
        ) from None
    with can_write(out):
        processes.from_main(file.write)
    name = experiment.__name__.rpartition(".")[2]
    print_result(f"{file.size} images of {name}, step {int(state.step)}: {out}")
    return out


def _logging_first(spread: devices.Parallel, line: str) -> devices.Parallel:
    """The same, but it logs a line before the first program is compiled.

    By then a task has checked what it was asked for.
    """
    log = functools.cache(tell)

    def compile(*arguments: Any, **options: Any) -> Any:
        log(line)
        return spread.compile(*arguments, **options)

    return spread._replace(compile=compile)
