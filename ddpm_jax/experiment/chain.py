"""A chain of three runs: a text encoder, an autoencoder, and a generation model built on both."""

import dataclasses
import pathlib

from ddpm_jax.config import replace
from ddpm_jax.experiment.types import Config, Dataset, Recipe, with_parts
from ddpm_jax.fields import FieldError

RUNS = ("text_encoder", "autoencoder")  # fields of the generator's task that the chain sets


@dataclasses.dataclass(frozen=True)
class Chain:
    """The config of text-to-image training from scratch: three runs, one after another.

    Attributes:
      data: The data set of all three runs, which must have captions.
      text: The recipe of the text encoder.
      autoencoder: The recipe of the autoencoder.
      generator: The recipe of the generation model in the autoencoder's latent space.
    """

    data: Dataset
    text: Recipe
    autoencoder: Recipe
    generator: Recipe

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the config of every run by the name of its directory.

        Raises:
          FieldError: If a recipe names a directory of a run that the chain itself trains.
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
        """Return a part's bound config; the generator gets the networks of the other parts."""
        if part != "generator":
            return configs[part]
        return with_parts(configs[part], configs["text"], configs["autoencoder"])
