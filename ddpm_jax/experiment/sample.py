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
from ddpm_jax.training.records import check_entries, reporting_write_errors


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
    """Sample images with a trained run and write them to a .png or .npz file; return its path.

    Image i depends on the seed and on i, but not on the number of images.

    Args:
      load: Function that returns the trained run. It is called after the output file is checked.
      workdir: Directory of the run.
      options: Options of the command line.
      request: Options of sampling.
      count: Number of images; if there are prompts, the number of images of each prompt.
      out: Output file; if None, `images/sampled.png` in the run directory.
      prompts: Prompts that replace the prompt of the request. Each prompt has a row in a .png.
      overwrite: If true, replace the output file even if another program wrote it.

    Raises:
      RunError: If the images are not finite, or cannot be written.
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
    batches = len(texts) * -(-count // size)
    for text in texts:
        trained.resolve(request._replace(prompt=text))  # report an invalid request before sampling
    log(
        f"sampling {file.total} images in {batches} batch{'es' * (batches > 1)} of {size}; the "
        "sampling program is compiled first"
    )
    try:
        with file.write_on_exit() as clock:
            for text in texts:
                text_request = request._replace(prompt=text)
                for images, labels in trained.batches(
                    count, text_request, options.seed, partitioner=partitioner
                ):
                    file.add(images, labels)
                    if file.total > size:
                        clock.show(file.size)
    except errors.NonFinite as error:
        raise RunError(
            f"{error}: the sampler diverged; try another --guidance, --steps or --sampler"
        ) from None
    with reporting_write_errors(out):
        processes.from_main(file.write)
    print_result(f"{file.size} images of {trained.title}, step {trained.step}: {out}")
    return out
