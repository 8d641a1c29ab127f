"""The contracts of a text-to-image system with its generation model and its evaluation.

A generation model is trained on an autoencoder's latents under a caption's features, and samples
such latents: by diffusion (Rombach et al. 2022), or one code of a quantised autoencoder after
another (Ramesh et al. 2021).
"""

import dataclasses
from typing import Annotated, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.fields import MAY_CHANGE, OR_NONE, EvalBatch, NumSamples, RunPath
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
        """Names of what can be asked for, besides captions."""

    @property
    def guidance_scale(self) -> float:
        """The scale of guidance of the settings."""

    def bind(self, latents: Latents, precision: str, batch_size: int) -> "Generator":
        """Return the generation model for the latents of an autoencoder."""

    def check(self) -> None:
        """Check that the fields of the bound model fit each other and the latents.

        Raises:
          FieldError: they do not.
        """

    def check_request(self, request: SampleRequest) -> None:
        """Check that latents can be sampled as a request says.

        Raises:
          FieldError: they cannot.
        """

    def init(self, key: Key[Array, ""], context: Context) -> PyTree:
        """Return the first parameters; `context` has the shapes of captions' features."""

    def target(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Array:
        """Return what is generated, of each image in [-1, 1]: latents or codes.

        Args:
          frozen: {"params", "extra"} of the autoencoder.
          images: in [-1, 1].
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
        """Return the loss of every example, and other quantities by name.

        Args:
          params: parameters of the model.
          target: as the method of this name returns it.
          context: features of the captions.
          index: number of every example in its batch.
          keys: one for every example.
          train: whether dropout is used.
        """

    def make_guidance(self, scale: float | None) -> Guidance:
        """Return the guidance by captions; None: at the scale of the settings."""

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
        """Return images in [-1, 1], one for every key.

        Args:
          params: parameters of the model.
          frozen: {"params", "extra"} of the autoencoder.
          keys: one for every image.
          context: features of the captions.
          null_context: what guidance leads away from: features of the empty caption, or of a
            negative prompt.
          guidance: as `make_guidance` returns it.
          request: how latents are sampled.
          compile: compiles functions.
        """

    def about(self) -> Record:
        """Return how latents are sampled by the settings, for the record."""


@dataclasses.dataclass(frozen=True)
class TextToImageEvaluation:
    """What is evaluated of a text-to-image system.

    Attributes:
      batch_size: Images of one batch of an evaluation.
      num_samples: Samples of test captions.
      num_prompts: Prompts of each kind whose samples the exact network of shapes sees.
      guidance_scales: Scales of guidance that the final evaluation tries.
      text_encoder: Run directory of the text encoder that computes CLIP scores and Frechet
        distances; none: the generator's own. With one encoder, generators on different text
        encoders are comparable.
    """

    batch_size: EvalBatch = 128
    num_samples: NumSamples = 256
    num_prompts: NumSamples = 128
    guidance_scales: Annotated[tuple[float, ...], OR_NONE, MAY_CHANGE] = ()
    text_encoder: RunPath = "none"


@runtime_checkable
class CaptionTask(SamplingTask, Protocol):
    """What an evaluation needs of a text-to-image task."""

    @property
    def evaluation(self) -> TextToImageEvaluation:
        """What is evaluated."""

    @property
    def generator(self) -> Generator:
        """The generation model."""

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder that conditions it."""

    @property
    def text_network(self) -> DualEncoder:
        """The trained text encoder, with its image tower."""

    @property
    def prompts(self) -> Prompts:
        """The prompts of the final evaluation."""

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
        """Return images of prepared captions, as the task's `sample` does of one prompt.

        Args:
          variables: of the trained task.
          keys: one for every image.
          captions: as the text encoder prepares them.
          null: what guidance leads away from, likewise.
          request: how images are sampled.
          guidance: as the generation model makes it.
          compile: compiles functions.
        """
