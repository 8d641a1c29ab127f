"""Sample and evaluate with a task in tests, as the package's callers do."""

from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.experiment.requests import Request, resolve
from ddpm_jax.parallel import sharding
from ddpm_jax.task import Resources, Variables
from ddpm_jax.tasks.image_sampler import ImageSampler
from ddpm_jax.training.evaluation import EvaluationContext, evaluate

DEFAULT = Request()
NOTHING = Variables({}, {})  # of a task whose network has no parameters


def sample(task, variables, keys, request=DEFAULT, model=None, partitioner=None):
    """Images of a task, as `--mode=sample` makes them.

    Args:
      task: bound.
      variables: its variables.
      keys: one for every image.
      request: what is asked for.
      model: a guidance model.
      partitioner: the devices; None: those of the variables.
    """
    resolved = resolve(task, request, model)
    partitioner = partitioner or sharding.placed(variables.params)
    asked = resolved.request._replace(labels=resolved.labels(keys))
    return resolved.task.sample(
        Variables(*variables), keys, asked, resolved.guidance, partitioner.compile
    )


def edited(
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
    """Images that are noised to time t and sampled from there, as the edits of an evaluation are.

    Args:
      task: a bound `ImageDenoiser`.
      variables: its variables.
      keys: one for every image.
      labels: of every image; None: the network has no classes.
      t: in [0, 1].
      images: in [-1, 1].
      known: what pixels are kept to where `mask` is 1.
      mask: 1 where pixels are known, else 0.
      guidance: of the task.
      partitioner: the devices; None: those of the variables.
    """
    partitioner = partitioner or sharding.placed(variables.params)
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
    """The context of an evaluation of a task on a split."""
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
    """The evaluation of a task on a split; `options` are those of `context_of`."""
    return evaluate(context_of(task, variables, data, **options))
