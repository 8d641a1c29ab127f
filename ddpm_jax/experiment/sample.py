"""Sample images of a trained run into a file."""

import pathlib
from collections.abc import Callable

from ddpm_jax import errors
from ddpm_jax.errors import RunError
from ddpm_jax.experiment.requests import Request
from ddpm_jax.experiment.sample_files import SampleFile, check_out
from ddpm_jax.experiment.trained import SAMPLE_BATCH, TrainedRun
from ddpm_jax.experiment.types import Options
from ddpm_jax.parallel import processes, sharding
from ddpm_jax.progress import log, print_result
from ddpm_jax.training.records import can_write, check_entries


def sample(
    load: Callable[[], TrainedRun],
    workdir: pathlib.Path,
    options: Options,
    request: Request,
    count: int,
    out: pathlib.Path | None,
    prompts: tuple[str, ...] = (),
    overwrite: bool = False,
) -> pathlib.Path:
    """Sample images with the newest checkpoint's averaged parameters, into a .png or .npz.

    Image i is the same whatever `count` is, and another with every `--seed`.

    Args:
      load: returns the trained run; called once the output is known to be writable.
      workdir: the run's directory.
      options: what the command line says besides.
      request: how to sample.
      out: the file; None: `images/sampled.png` of the run.
      prompts: texts, in the place of the request's.
      count: how many images; of each of `prompts`, if there are any, a row of a .png each.
      overwrite: replace a file that this program did not write.

    Raises:
      RunError: the images are not finite, or cannot be written.
    """
    default = workdir / "images" / "sampled.png"
    out = out or default

    def check() -> None:
        check_entries(workdir)
        check_out(out, default, overwrite)

    processes.from_main(check)
    trained, partitioner = load(), sharding.make(options.parallel)
    texts, size = prompts or (request.prompt,), partitioner.round_up(SAMPLE_BATCH)
    file = SampleFile(out, texts, count)
    number = len(texts) * -(-count // size)
    for text in texts:
        trained.resolve(request._replace(prompt=text))  # what is asked for can be done
    log(
        f"sampling {file.total} images in {number} batch{'es' * (number > 1)} of {size}; the "
        "program for it is compiled first"
    )
    try:
        with file.kept() as clock:
            for text in texts:
                asked = request._replace(prompt=text)
                for images, labels in trained.batches(
                    count, asked, options.seed, partitioner=partitioner
                ):
                    file.add(images, labels)
                    if file.total > size:
                        clock.show(file.size)
    except errors.NonFinite as error:
        raise RunError(
            f"{error}: the sampler diverged; try another --guidance, --steps or --sampler"
        ) from None
    with can_write(out):
        processes.from_main(file.write)
    print_result(f"{file.size} images of {trained.title}, step {trained.step}: {out}")
    return out
