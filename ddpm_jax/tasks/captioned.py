"""The task `TextToImage`: a generation model on a trained text encoder and autoencoder."""

import dataclasses
import functools
import pathlib
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo, info_of
from ddpm_jax.fields import BOUND, FROM_PARTS, PATH, AtLeast, AtMost, FieldError, RunPath, section
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.nn.text_encoder import SIZES
from ddpm_jax.task import Needs, Resources, Task
from ddpm_jax.tasks.autoencoder import LatentAutoencoder, latents
from ddpm_jax.tasks.autoregressive import Autoregressive
from ddpm_jax.tasks.contrastive import Contrastive, check_captions
from ddpm_jax.tasks.latent_diffusion import LatentDiffusion
from ddpm_jax.tasks.pretrained_text import encode, encoded, width_of
from ddpm_jax.tasks.shape_prompts import prompts_of
from ddpm_jax.tasks.text_to_image import Parts, TextToImageEvaluation, text_to_image_task


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """Text to image: a generation model under the captions of a frozen text encoder.

    Attributes:
      generator: The generation model: diffusion in the autoencoder's latents, or autoregressive
        over its codes.
      text_encoder: Run directory of the text encoder.
      autoencoder: Run directory of the autoencoder.
      pretrained: A frozen text encoder of `transformers`, by name or folder, in the place of the
        text encoder, which then computes metrics alone; empty: none. It needs a finite data set.
      caption_dropout: Share of captions that training replaces by the empty one.
      evaluation: What is evaluated.
      text_network: The text encoder's network.
      autoencoder_network: The autoencoder's network.
      codes: Codes of the autoencoder's codebook; 0: Gaussian latents.
      feature_width: Width of the pretrained text encoder's features; 0: there is none.
      parts_known: Whether the fields that follow from the parts are set.
      info: The data set.
      batch_size: Training images of one step.
    """

    generator: LatentDiffusion | Autoregressive = LatentDiffusion()
    text_encoder: RunPath = "runs/text_encoder_shapes"
    autoencoder: RunPath = "runs/autoencoder_shapes"
    pretrained: Annotated[str, PATH] = ""
    caption_dropout: Annotated[float, AtLeast(0.0), AtMost(1.0)] = 0.1
    evaluation: TextToImageEvaluation = TextToImageEvaluation()
    text_network: Annotated[DualEncoder, FROM_PARTS] = DualEncoder()
    autoencoder_network: Annotated[Autoencoder, FROM_PARTS] = Autoencoder()
    codes: Annotated[int, AtLeast(0), FROM_PARTS] = 0
    feature_width: Annotated[int, AtLeast(0), FROM_PARTS] = 0
    parts_known: Annotated[bool, FROM_PARTS] = False
    info: Annotated[DataInfo, BOUND] = UNBOUND
    batch_size: Annotated[int, BOUND] = 0

    provides: ClassVar[str] = "text to image"

    def needs(self) -> Needs:
        """Return the names of other runs: its parts, and a text encoder that computes metrics."""
        dual = self.evaluation.text_encoder
        return Needs(
            text_encoder=self.text_encoder,
            autoencoder=self.autoencoder,
            dual_encoder="" if dual == "none" else dual,
            dual_encoder_field="evaluation.text_encoder",
        )

    def fit_to(self, data: Data) -> "TextToImage":
        """Return the settings as they are.

        Raises:
          UserError: the data set has no captions.
        """
        check_captions(info_of(data))
        return self

    def with_parts(self, text: Contrastive, autoencoder: LatentAutoencoder) -> "TextToImage":
        """Return the settings with what follows from the tasks of the parts."""
        folder = pathlib.Path(self.pretrained).expanduser()
        name = str(folder.absolute()) if self.pretrained and folder.is_dir() else self.pretrained
        return dataclasses.replace(
            self,
            pretrained=name,
            feature_width=width_of(name) if name else 0,
            text_network=text.network,
            autoencoder_network=autoencoder.network,
            codes=autoencoder.codes,
            parts_known=True,
        )

    def adapt(self, data: Data) -> Data:
        """Return the data, with a pretrained encoder's features for captions if there is one."""
        return encoded(self.pretrained, data) if self.pretrained else data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "TextToImage":
        """Return the task for a data set, a precision and a batch size."""
        inner = inner_dtype(precision)
        autoencoder = self.autoencoder_network.clone(shape=info.shape, dtype=inner, parent=None)
        text = self.text_network.clone(length=info.caption_length, dtype=inner, parent=None)
        return dataclasses.replace(
            self,
            generator=self.generator.bind(autoencoder, self.codes, precision),
            text_network=text,
            autoencoder_network=autoencoder,
            info=info,
            batch_size=batch_size,
        )

    def build(self, resources: Resources = Resources()) -> Task:
        """Return the functions of the bound task.

        Raises:
          UserError: the data set has no captions.
          FieldError: fields contradict each other or the latents.
        """
        check_captions(self.info)
        if not self.caption_dropout and self._guidance() != 1.0:
            raise FieldError(
                "caption_dropout=0: the network is never trained without captions, so that they "
                "cannot guide it; give guidance 1, or a dropout above 0",
                "generator.sampling.guidance",
                "generator.guidance",
            )
        parts = self.parts(resources)
        with section("generator"):
            generator = self.generator.build(parts.latents, self.batch_size)
        evaluation = self.evaluation
        return text_to_image_task(
            generator,
            parts,
            self.info.shape,
            self.info.levels,
            caption_dropout=self.caption_dropout,
            eval_batch=evaluation.batch_size,
            prompts=prompts_of(
                self.info.name,
                evaluation.num_prompts,
                evaluation.guidance_scales,
                evaluation.num_samples,
            ),
        )

    def _guidance(self) -> float:
        """The scale of guidance that samples are made with."""
        generator = self.generator
        if isinstance(generator, LatentDiffusion):
            return generator.sampling.guidance
        return generator.guidance

    def parts(self, resources: Resources) -> Parts:
        """Return what the generation model is built on."""
        reader = functools.partial(encode, self.pretrained) if self.pretrained else None
        width = self.feature_width or SIZES[self.text_network.size].features
        return Parts(
            self.text_network,
            latents(self.autoencoder_network, self.codes),
            self._shapes_of_parts,
            resources.parts or _no_parts,
            width,
            reader,
            resources.dual_encoder,
        )

    def _shapes_of_parts(self) -> Any:
        """The shapes of the parts' parameters, as `Parts.blank` returns them."""
        info = self.info
        text = jax.eval_shape(
            self.text_network.init,
            jax.random.key(0),
            jnp.zeros((1, self.text_network.length), jnp.uint8),
            jnp.zeros((1, *info.shape)),
        )
        task = LatentAutoencoder(self.autoencoder_network, codes=self.codes, info=info).build()
        batch = Batch(
            jnp.zeros((2, *info.shape), jnp.uint8), jnp.zeros(2, jnp.int32), jnp.arange(2)
        )
        params, fixed = jax.eval_shape(task.init, jax.random.key(0), batch)
        return {"text": text, "autoencoder": {"params": params, "fixed": fixed}}


def _no_parts() -> Any:
    raise RuntimeError("a new run of a generation model needs the parameters of its parts")
