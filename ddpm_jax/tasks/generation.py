"""Protocols of a text-to-image system: its generation model and its task.

A generation model samples the latents of an autoencoder given the features of a caption: by
diffusion (Rombach et al. 2022), or by autoregressive sampling of the codes of a quantised
autoencoder (Ramesh et al. 2021).
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
    """A generation model: a frozen dataclass, whose methods are pure functions."""

    @property
    def request_fields(self) -> tuple[str, ...]:
        """The names of the fields of a request that have an effect, besides the prompts."""

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the settings."""

    def bind(self, latents: Latents, precision: str, batch_size: int) -> "Generator":
        """Return the model with its network set up for the latents of an autoencoder."""

    def check(self) -> None:
        """Check that the fields of the bound model fit each other and the latents.

        Raises:
          FieldError: If a field does not fit another field or the latents.
        """

    def check_request(self, request: SampleRequest) -> None:
        """Check that the model supports the fields of a request.

        Raises:
          FieldError: If a field has a value that is not supported.
        """

    def init(self, key: Key[Array, ""], context: Context) -> PyTree:
        """Return the initial parameters, for captions' features of the shapes of `context`."""

    def target(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Array:
        """Return the latents or the code indices of each image, which the model learns to sample.

        Args:
          frozen: The variables {"params", "extra"} of the autoencoder.
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
        """Return the loss of every example, and metrics of every example by name.

        Args:
          params: The parameters of the model.
          target: The latents or codes that the method `target` returns.
          context: The features of the captions.
          index: The position of each example in its batch [B].
          keys: Random keys, one for each example.
          train: If true, dropout is on.
        """

    def make_guidance(self, scale: float | None) -> Guidance:
        """Return the guidance by captions; if `scale` is None, at the scale of the settings."""

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
        """Return images in [-1, 1], one for each key.

        Args:
          params: The parameters of the model.
          frozen: The variables {"params", "extra"} of the autoencoder.
          keys: Random keys, one for each image.
          context: The features of the captions.
          null_context: The null conditioning of guidance: features of the empty caption or of a
            negative prompt.
          guidance: The guidance that `make_guidance` returns.
          request: The sampler and the number of steps.
          compile: The function that compiles functions of the task.
        """

    def about(self) -> Record:
        """Return the settings of sampling, for the record of an evaluation."""


@dataclasses.dataclass(frozen=True)
class TextToImageEvaluation:
    """Settings of the evaluation of a text-to-image system.

    Attributes:
      batch_size: Number of images in one batch of an evaluation.
      num_samples: Number of held-out captions that the final evaluation samples, one image for
        each; the other evaluations sample at most 64.
      num_prompts: Number of prompts in each of the four prompt sets of the data set shapes (one
        shape or two, seen or held-out), whose alignment the final evaluation measures.
      guidance_scales: Guidance scales at which the final evaluation computes the metrics of
        samples, besides the guidance scale of sampling; "none" adds no scale.
      text_encoder: Run directory of the text encoder that computes CLIP scores and Frechet
        distances, or "none" for the text encoder of this run; metrics of two runs are comparable
        only if the same text encoder computes them.
    """

    batch_size: EvalBatch = 128
    num_samples: NumSamples = 256
    num_prompts: NumSamples = 128
    guidance_scales: Annotated[tuple[float, ...], EMPTY_ALLOWED, MAY_CHANGE] = ()
    text_encoder: RunPath = "none"


@runtime_checkable
class CaptionTask(SamplingTask, Protocol):
    """A text-to-image task, as the functions of its evaluation use it."""

    @property
    def evaluation(self) -> TextToImageEvaluation:
        """The settings of the evaluation."""

    @property
    def generator(self) -> Generator:
        """The generation model."""

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder that conditions the generation model."""

    @property
    def text_network(self) -> DualEncoder:
        """The trained text encoder, with its image tower."""

    @property
    def prompts(self) -> Prompts:
        """The prompts that the final evaluation samples."""

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
        """Return images in [-1, 1] of prepared captions, one for each caption.

        Args:
          variables: The variables of the trained task.
          keys: Random keys, one for each image.
          captions: The captions that the text encoder has prepared, one for each image.
          null: The prepared captions that guidance leads away from, one for each image.
          request: The sampler and the number of steps.
          guidance: The guidance that the generation model's `make_guidance` returns.
          compile: The function that compiles functions of the task.
        """
