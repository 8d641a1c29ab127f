"""Protocols of text to image: the generation model, and the task that contains it.

A generation model samples the latents of an autoencoder, conditioned on the text features of a
caption. It is a diffusion model (Rombach et al. 2022), or an autoregressive model of the codebook
indices of a quantised autoencoder (Ramesh et al. 2021).
"""

import dataclasses
from typing import Annotated, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.fields import EMPTY_ALLOWED, MAY_CHANGE, EvalBatch, NumSamples, RunPath
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import Context
from ddpm_jax.system.record import Record
from ddpm_jax.task import Compile, SampleRequest, SamplingTask, Variables
from ddpm_jax.tasks.autoencoder import Latents
from ddpm_jax.tasks.shape_prompts import Prompts
from ddpm_jax.tasks.text_encoders import TextEncoder


@runtime_checkable
class Generator(Protocol):
    """A generation model of latents, given a caption: a frozen dataclass with pure methods."""

    @property
    def request_fields(self) -> tuple[str, ...]:
        """The names of the sampling options that the model supports, besides the prompts."""

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the config."""

    def bind(self, latents: Latents, precision: str, batch_size: int) -> "Generator":
        """Return the model with its network set up for the latents of an autoencoder."""

    def check(self) -> None:
        """Check that the fields fit each other and the latents, after `bind`.

        Raises:
          FieldError: If a field does not fit another field or the latents.
        """

    def check_request(self, request: SampleRequest) -> None:
        """Check that the model supports the sampling options of a request.

        Raises:
          FieldError: If an option has a value that is not supported.
        """

    def init(self, key: Key[Array, ""], context: Context) -> PyTree:
        """Return initial parameters; `context` gives the shapes of the text features."""

    def target(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Array:
        """Return the latents or codebook indices of each image, which the model learns to sample.

        Args:
          frozen: The variables {"params": ..., "extra": ...} of the trained autoencoder.
          images: Images [B, H, W, C] in [-1, 1].
        """

    def loss(
        self,
        params: PyTree,
        target: Array,
        context: Context,
        index: Int[Array, "batch"],
        keys: Key[Array, "batch"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        """Return the loss of every example [B], and by name the metrics of every example [B].

        Args:
          params: The parameters of the model.
          target: The latents or codebook indices that the method `target` returns.
          context: The text features of the captions (`nn.layers.Context`).
          index: The position of each example in the training batch or in the evaluated split [B].
          keys: Random keys, one for each example.
          train: If True, dropout is on.
        """

    def make_guidance(self, scale: float | None) -> Guidance:
        """Return guidance by captions, with the scale of the config if `scale` is None."""

    def sample(
        self,
        params: PyTree,
        frozen: PyTree,
        keys: Key[Array, "batch"],
        context: Context,
        null_context: Context,
        guidance: Guidance,
        request: SampleRequest,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Sample one image in [-1, 1] for each key, conditioned on captions.

        Args:
          params: The parameters of the model.
          frozen: The variables {"params": ..., "extra": ...} of the trained autoencoder.
          keys: Random keys, one for each image.
          context: The text features of the captions (`nn.layers.Context`).
          null_context: The text features of the empty caption or of a negative prompt, from which
            guidance leads away.
          guidance: The guidance method and scale that `make_guidance` returns.
          request: Sampling options; its sampler and number of steps are used, if they are not None.
          compile: Compiles a function as `jax.jit` does, once for all its calls.
        """

    def about(self) -> Record:
        """Return the sampling fields of the config by name; an evaluation stores them."""


@dataclasses.dataclass(frozen=True)
class TextToImageEvaluation:
    """Fields of the evaluation of a text-to-image task.

    Attributes:
      batch_size: Number of images in one batch of an evaluation.
      num_samples: Number of images that the final evaluation samples, one for each held-out
        caption; evaluations during training sample at most 64 images.
      num_prompts: Number of prompts in each of the four prompt sets of the data set shapes (one
        shape or two shapes, seen or held-out combinations). The final evaluation samples an image
        of each prompt and computes the share of images that show what the prompt says.
      guidance_scales: Further guidance scales at which the final evaluation computes the metrics
        of samples, besides the guidance scale of sampling; "none" adds no scale.
      text_encoder: Run directory of the text encoder that computes CLIP scores and Frechet
        distances; with "none", the text encoder of this run computes them. Metrics of two runs are
        comparable only if the same text encoder computes them.
    """

    batch_size: EvalBatch = 128
    num_samples: NumSamples = 256
    num_prompts: NumSamples = 128
    guidance_scales: Annotated[tuple[float, ...], EMPTY_ALLOWED, MAY_CHANGE] = ()
    text_encoder: RunPath = "none"


@runtime_checkable
class CaptionTask(SamplingTask, Protocol):
    """The properties and methods of a text-to-image task that its evaluation uses."""

    @property
    def evaluation(self) -> TextToImageEvaluation:
        """The fields of the evaluation."""

    @property
    def generator(self) -> Generator:
        """The generation model."""

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder that conditions the generation model."""

    @property
    def text_network(self) -> DualEncoder:
        """The network of the trained text encoder and its image encoder."""

    @property
    def prompts(self) -> Prompts:
        """The prompts for which the final evaluation samples images, to check what these show."""

    def sample_captions(
        self,
        variables: Variables,
        keys: Key[Array, "batch"],
        captions: PyTree,
        null: PyTree,
        request: SampleRequest,
        guidance: PyTree,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Sample one image in [-1, 1] for each prepared caption and its key.

        Args:
          variables: The parameters and the extra variables (not trained by gradients) of the task.
          keys: Random keys, one for each image.
          captions: The captions, converted by `encoder.prepare`, one for each key.
          null: The empty captions or negative prompts, converted in the same way, one for each key.
          request: Sampling options; its sampler and number of steps are used, if they are not None.
          guidance: The guidance that `make_guidance` of the generation model returns.
          compile: Compiles a function as `jax.jit` does, once for all its calls.
        """
