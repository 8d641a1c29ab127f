"""The config of three runs: a text encoder, an autoencoder, and a generation model using both."""

import dataclasses
import pathlib

from ddpm_jax.config import replace
from ddpm_jax.experiment.types import Config, Dataset, Recipe, with_parts
from ddpm_jax.fields import FieldError

RUNS = ("text_encoder", "autoencoder")  # fields of the generation model that `Chain.parts` sets


@dataclasses.dataclass(frozen=True)
class Chain:
    """The config of text-to-image training from scratch: three runs, trained one after another.

    Attributes:
      data: The data set of all three runs, which must have captions.
      text: The config of the text encoder, without the data set.
      autoencoder: The config of the autoencoder, without the data set.
      generator: The config of the generation model in the autoencoder's latent space, without the
        data set.
    """

    data: Dataset
    text: Recipe
    autoencoder: Recipe
    generator: Recipe

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the configs of the three runs by the names of their directories in `workdir`.

        Raises:
          FieldError: If a config names a trained text encoder or autoencoder, because this
            experiment trains both.
        """
        task = self.generator.task
        for name in RUNS:
            if getattr(task, name) != getattr(type(task), name):
                raise FieldError(
                    f"generator.task.{name}={getattr(task, name)}: this experiment trains the "
                    f"{name.replace('_', ' ')} itself; leave the field out"
                )
        if self.autoencoder.task.needs().dual_encoder:
            raise FieldError(
                "autoencoder.task.text_encoder=DIR: this experiment trains the text encoder "
                "itself; leave the field out"
            )
        text, autoencoder = str(workdir / "text"), str(workdir / "autoencoder")
        directories = {"task.text_encoder": text, "task.autoencoder": autoencoder}
        return {
            "text": self.text.on(self.data),
            "autoencoder": replace(self.autoencoder.on(self.data), {"task.text_encoder": text}),
            "generator": replace(self.generator.on(self.data), directories),
        }

    def complete(self, part: str, configs: dict[str, Config]) -> Config:
        """Return the config of a run; the generation model gets the other runs' networks."""
        if part != "generator":
            return configs[part]
        return with_parts(configs[part], configs["text"], configs["autoencoder"])
