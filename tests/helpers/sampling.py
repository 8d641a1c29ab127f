"""Functions that sample and evaluate a task in tests, as the command line does."""

from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.experiment.requests import Request, resolve
from ddpm_jax.parallel import sharding
from ddpm_jax.task import Resources, Variables
from ddpm_jax.tasks.image_sampler import ImageSampler
from ddpm_jax.training.evaluation import EvaluationContext, evaluate

DEFAULT = Request()
NO_VARIABLES = Variables({}, {})  # variables of a task whose network has no parameters


def sample(task, variables, keys, request=DEFAULT, model=None, partitioner=None):
    """Return images of a task, as `--mode=sample` samples them.

    Args:
      task: The bound task.
      variables: The variables of the task.
      keys: Random keys, one for each image.
      request: The request of the user.
      model: The guidance model; if None, there is none.
      partitioner: The partitioner; if None, the one that the variables are placed by.
    """
    resolved = resolve(task, request, model)
    partitioner = partitioner or sharding.partitioner_of(variables.params)
    labelled = resolved.request._replace(labels=resolved.labels(keys))
    return resolved.task.sample(
        Variables(*variables), keys, labelled, resolved.guidance, partitioner.compile
    )


def edit_images(
    task,
    variables,
    keys,
    labels,
    t,
    images,
    known,
    mask,
    guidance=Guidance(),
    partitioner=None,
):
    """Return images that are edited by `ImageSampler.sdedit`, as in an evaluation.

    Args:
      task: The bound `ImageDenoiser`.
      variables: The variables of the task.
      keys: Random keys, one for each image.
      labels: Class labels; if None, the network is not class-conditional.
      t: The time in [0, 1] at which sampling starts.
      images: The images in [-1, 1].
      known: The values of the pixels whose `mask` is 1.
      mask: 1 for pixels that are set to `known`, else 0.
      guidance: The guidance of sampling.
      partitioner: The partitioner; if None, the one that the variables are placed by.
    """
    partitioner = partitioner or sharding.partitioner_of(variables.params)
    sdedit = partitioner.compile(ImageSampler.sdedit, static_argnums=0)
    null = task.null(labels)
    inputs = variables.params, guidance, keys, labels, null, t, images, known, mask
    return sdedit(task.sampler(), *inputs)


def context_of(
    task,
    variables,
    data,
    split="test",
    seed=0,
    full=True,
    partitioner=None,
    resources=Resources(),
):
    """Return the context of an evaluation of a task on a split."""
    return EvaluationContext(
        task,
        Variables(*variables),
        data,
        split=split,
        seed=seed,
        full=full,
        partitioner=partitioner or sharding.make(),
        resources=resources,
    )


def evaluated(task, variables, data, **options):
    """Return the evaluation of a task on a split; `options` are arguments of `context_of`."""
    return evaluate(context_of(task, variables, data, **options))
