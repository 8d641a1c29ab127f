"""Resources of a run: networks of other runs that its sampling and its evaluation use.

They are feature networks, a guidance model, and the text encoder and autoencoder of a generation
model. This module checks the other runs and trains feature networks that are missing.
"""

import functools
from collections.abc import Collection

from ddpm_jax.config import replace
from ddpm_jax.data.types import Loaded
from ddpm_jax.experiment.feature_networks import check_features, load_features
from ddpm_jax.experiment.guidance_models import LABELS, check_guidance, guidance_of
from ddpm_jax.experiment.parts import (
    check_dual_encoder,
    check_parts_of,
    load_dual_encoder,
    load_parts,
)
from ddpm_jax.experiment.types import Config, Options, TrainAlone
from ddpm_jax.task import Resources


def prepare(config: Config, loaded: Loaded, pending: Collection[str] = ()) -> Config:
    """Check the other runs that a config names; return the config with their absolute paths.

    No run is trained.

    Args:
      config: Config whose task is bound to its data set.
      loaded: Data set of the run.
      pending: Directories of runs that the same command trains first; these are not checked.

    Raises:
      UserError: If a run does not exist, or its data or network does not fit the config.
    """
    config = replace(config, {"task": config.task.adapt_to(loaded.data)})
    needs = config.task.needs()
    if needs.guidance_model != LABELS:
        config = check_guidance(config, loaded)
    if needs.features:
        config = check_features(config, loaded)
    if needs.dual_encoder and needs.dual_encoder not in pending:
        config = check_dual_encoder(config, f"task.{needs.dual_encoder_field}")
    return check_parts_of(config) if needs.autoencoder else config


def load(config: Config, loaded: Loaded, options: Options, train: TrainAlone) -> Resources | None:
    """Return the resources of a run; train feature networks that are missing.

    Args:
      config: Config, as `prepare` returns it.
      loaded: Data set of the run.
      options: Options of the command line.
      train: Function that trains a run; it returns None if the user stopped the training.

    Returns:
      Functions that load the networks, or None if the user stopped the training of a feature
      network.
    """
    resources = for_sampling(config)
    if not config.task.needs().features:
        return resources
    features = load_features(config, loaded, options, train)
    return None if features is None else resources._replace(features=features)


def for_sampling(config: Config) -> Resources:
    """Return the resources of a config (as `prepare` returns it) without feature networks."""
    needs = config.task.needs()
    resources = Resources()
    if needs.guidance_model != LABELS:
        resources = resources._replace(guidance=guidance_of(config))
    if needs.dual_encoder:
        dual = functools.cache(functools.partial(load_dual_encoder, needs.dual_encoder))
        resources = resources._replace(dual_encoder=dual)
    if needs.autoencoder:
        resources = resources._replace(parts=functools.partial(load_parts, needs))
    return resources
