"""A chain of runs: text encoder, autoencoder, and a generation model that is built on both."""

import dataclasses
import pathlib

from ddpm_jax.config import replace
from ddpm_jax.experiment.types import Config, Dataset, Recipe, with_parts
from ddpm_jax.fields import FieldError

RUNS = ("text_encoder", "autoencoder")  # fields of the generation model's task that the chain sets


@dataclasses.dataclass(frozen=True)
class Chain:
    """Text to image, trained from nothing: three runs, one after another.

    Attributes:
      data: The data set of all runs, with captions.
      text: The text encoder.
      autoencoder: The autoencoder.
      generator: The generation model in the autoencoder's latents.
    """

    data: Dataset
    text: Recipe
    autoencoder: Recipe
    generator: Recipe

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the config of every run by the name of its directory.

        Raises:
          FieldError: a part names a run that the chain trains.
        """
        task = self.generator.task
        for name in RUNS:
            if getattr(task, name) != getattr(type(task), name):
                raise FieldError(
                    f"generator.task.{name}={getattr(task, name)}: the chain trains it; leave it "
                    "out"
                )
        if self.autoencoder.task.needs().dual_encoder:
            raise FieldError("autoencoder.task.text_encoder=DIR: the chain trains it; leave it out")
        text, autoencoder = str(workdir / "text"), str(workdir / "autoencoder")
        places = {"task.text_encoder": text, "task.autoencoder": autoencoder}
        return {
            "text": self.text.on(self.data),
            "autoencoder": replace(self.autoencoder.on(self.data), {"task.text_encoder": text}),
            "generator": replace(self.generator.on(self.data), places),
        }

    def complete(self, part: str, configs: dict[str, Config]) -> Config:
        """Return a part's bound config with what follows from the other parts' configs."""
        if part != "generator":
            return configs[part]
        return with_parts(configs[part], configs["text"], configs["autoencoder"])
