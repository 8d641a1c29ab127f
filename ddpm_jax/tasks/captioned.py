"""The task `TextToImage`: a generation model on a trained text encoder and autoencoder.

    caption -> text encoder -> features -> generation model -> latents -> decoder -> image

The three networks are trained one after another. In this task the text encoder and the autoencoder
are frozen. Their variables are in `Variables.extra` and thus in every checkpoint, so that a
checkpoint is enough to sample from. Only a pretrained text encoder is not stored there.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo, info_of
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.fields import BOUND, FROM_PARTS, PATH, AtLeast, AtMost, FieldError, RunPath, section
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import Context, inner_dtype
from ddpm_jax.rng import split_keys
from ddpm_jax.task import (
    AllGather,
    Compile,
    Evaluate,
    GuidanceModel,
    LossOutput,
    Needs,
    SampleRequest,
    SamplingTask,
    Variables,
)
from ddpm_jax.tasks.autoencoder import LatentAutoencoder, Latents
from ddpm_jax.tasks.autoregressive import Autoregressive
from ddpm_jax.tasks.contrastive import Contrastive, check_captions
from ddpm_jax.tasks.generation import TextToImageEvaluation
from ddpm_jax.tasks.latent_diffusion import LatentDiffusion
from ddpm_jax.tasks.pretrained_text import absolute_name, width_of
from ddpm_jax.tasks.shape_prompts import Prompts, prompts_of
from ddpm_jax.tasks.text_encoders import (
    BytesEncoder,
    PretrainedEncoder,
    TextEncoder,
    encode_captions,
    repeat,
)
from ddpm_jax.tasks.text_to_image import EVALUATIONS


@dataclasses.dataclass(frozen=True)
class TextToImage(SamplingTask):
    """Text to image: a generation model conditioned on the features of a frozen text encoder.

    Attributes:
      generator: The generation model: diffusion in the autoencoder's latents, or an autoregressive
        model of its codes.
      text_encoder: Run directory of the trained text encoder.
      autoencoder: Run directory of the trained autoencoder.
      pretrained: Name or directory of a frozen text encoder of the package `transformers`, which
        replaces the features of `text_encoder` (`text_encoder` then only computes metrics); empty
        for none. It needs a finite data set.
      caption_dropout: Share of captions, from 0 to 1, that training replaces by the empty caption;
        guidance needs a value above 0.
      evaluation: The settings of the evaluation.
      text_network: The network of the text encoder.
      autoencoder_network: The network of the autoencoder.
      codes: Number of codes in the autoencoder's codebook; 0 for Gaussian latents.
      feature_width: Number of features per token of the pretrained text encoder; 0 without one.
      parts_bound: True if the fields that follow from the parts are set.
      info: The description of the data set.
      batch_size: Number of training images in one step.
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
    parts_bound: Annotated[bool, FROM_PARTS] = False
    info: Annotated[DataInfo, BOUND] = UNBOUND
    batch_size: Annotated[int, BOUND] = 0

    run_type: ClassVar[str] = "text to image"

    def needs(self) -> Needs:
        """Return the names of the runs of the parts, and of an encoder that computes metrics."""
        dual = self.evaluation.text_encoder
        return Needs(
            text_encoder=self.text_encoder,
            autoencoder=self.autoencoder,
            dual_encoder="" if dual == "none" else dual,
            dual_encoder_field="evaluation.text_encoder",
        )

    def adapt_to(self, data: Data) -> "TextToImage":
        """Return the task unchanged, if the data set has captions.

        Raises:
          UserError: If the data set has no captions.
        """
        check_captions(info_of(data))
        return self

    def with_parts(self, text: Contrastive, autoencoder: LatentAutoencoder) -> "TextToImage":
        """Return the task with the fields that follow from the tasks of its parts."""
        name = absolute_name(self.pretrained)
        return dataclasses.replace(
            self,
            pretrained=name,
            feature_width=width_of(name) if name else 0,
            text_network=text.network,
            autoencoder_network=autoencoder.network,
            codes=autoencoder.codes,
            parts_bound=True,
        )

    def prepare_data(self, data: Data) -> Data:
        """Return the data with captions in the form that the text encoder reads."""
        return self.encoder.prepare_data(data)

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "TextToImage":
        """Return the task for a data set, a precision and a batch size."""
        inner = inner_dtype(precision)
        autoencoder = self.autoencoder_network.clone(shape=info.shape, dtype=inner, parent=None)
        text = self.text_network.clone(length=info.caption_length, dtype=inner, parent=None)
        return dataclasses.replace(
            self,
            generator=self.generator.bind(Latents(autoencoder, self.codes), precision, batch_size),
            text_network=text,
            autoencoder_network=autoencoder,
            info=info,
            batch_size=batch_size,
        )

    def check(self) -> None:
        """Check that the fields of the bound task fit each other and the data.

        Raises:
          UserError: If the data set has no captions.
          FieldError: If fields contradict each other or do not fit the latents.
        """
        check_captions(self.info)
        self._check_guidance(self.generator.guidance_scale)
        with section("generator"):
            self.generator.check()

    def _check_guidance(self, scale: float) -> None:
        """Raise FieldError if the scale is not 1, but training never drops captions."""
        if not self.caption_dropout and scale != 1.0:
            raise FieldError(
                "caption_dropout=0: the network is never trained without captions, so "
                f"classifier-free guidance of scale {scale:g} is not possible; give guidance 1, or "
                "train with a caption_dropout above 0",
                "generator.sampling.guidance",
                "generator.guidance",
            )

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder that conditions the generation model."""
        if self.pretrained:
            return PretrainedEncoder(self.pretrained, self.feature_width)
        return BytesEncoder(self.text_network)

    @property
    def prompts(self) -> Prompts:
        """The prompts that the final evaluation samples."""
        return prompts_of(self.info.name, self.evaluation.num_prompts)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return initial parameters of the generation model, and zeros for the frozen parts."""
        del batch
        length, width = self.text_network.length, self.encoder.width
        mask = jnp.zeros((1, length), bool)
        context = Context(jnp.zeros((1, length, width)), mask, jnp.zeros((1, width)))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self._shapes_of_parts())
        return Variables(self.generator.init(key, context), zeros)

    def _shapes_of_parts(self) -> PyTree:
        key, shape = jax.random.key(0), self.info.shape
        tokens = jnp.zeros((1, self.text_network.length), jnp.uint8)
        text = jax.eval_shape(self.text_network.init, key, tokens, jnp.zeros((1, *shape)))
        batch = Batch(jnp.zeros((2, *shape), jnp.uint8), jnp.zeros(2, jnp.int32), jnp.arange(2))
        task = LatentAutoencoder(self.autoencoder_network, codes=self.codes, info=self.info)
        params, extra = jax.eval_shape(task.init, key, batch)
        return {"text": text, "autoencoder": {"params": params, "extra": extra}}

    def load_extra(self, extra: PyTree, load: Callable[[], PyTree] | None) -> PyTree:
        """Return the frozen parts of a new run, in the dtypes that `init` returns.

        Raises:
          RuntimeError: If `load` is None.
        """
        if load is None:
            raise RuntimeError(
                "a new text-to-image run needs the parameters of its text encoder and autoencoder, "
                "but Resources.parts is None; give a function that loads them"
            )
        return jax.tree.map(lambda old, new: np.asarray(new, old.dtype), extra, load())

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the loss of the generation model for every image given its caption.

        Args:
          variables: The parameters of the generation model, and the frozen parts.
          batch: Images with their prepared captions.
          keys: Random keys, one for each example.
          train: If true, captions are dropped at random and dropout is on.
          all_gather: Not used.
        """
        del all_gather
        (caption_keys, loss_keys), captions = split_keys(keys, 2), batch.captions
        if train:
            dropped = jax.vmap(jax.random.bernoulli, (0, None))(caption_keys, self.caption_dropout)
            captions = self.encoder.drop(captions, dropped)
        images = to_images(batch.images, self.info.levels)
        target = self.generator.target(variables.extra["autoencoder"], images)
        context = self.encoder.encode(variables.extra["text"], captions)
        losses, metrics = self.generator.loss(
            variables.params, target, context, batch.index, loss_keys, train=train
        )
        return LossOutput(losses, metrics, {})

    def evaluations(self) -> tuple[Evaluate["TextToImage"], ...]:
        """Return the functions that evaluate the task."""
        return EVALUATIONS

    @property
    def request_fields(self) -> tuple[str, ...]:
        """The names of the fields of a request that have an effect."""
        return (*self.generator.request_fields, "prompt", "negative_prompt")

    def check_request(self, request: SampleRequest) -> None:
        """Check that a request has a prompt and that the generation model supports its fields.

        Raises:
          FieldError: If the prompt is missing or a field is not supported.
        """
        self.generator.check_request(request)
        if request.prompt is None:
            raise FieldError(
                'prompt="..." is missing: a text-to-image run needs a text that images should show'
            )

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> Guidance:
        """Return the guidance by captions.

        Args:
          scale: The guidance scale; if None, the scale of the settings.
          model: Not used, since no other network guides this one.

        Raises:
          FieldError: If the network is never trained without captions and the scale is not 1.
        """
        del model
        if scale is not None:
            self._check_guidance(scale)
        return self.generator.make_guidance(scale)

    def sample(
        self,
        variables: Variables,
        keys: Key[Array, "batch"],
        request: SampleRequest,
        guidance: Guidance,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Return images in [-1, 1] of a request's prompt, one for each key.

        Args:
          variables: The variables of the trained task.
          keys: Random keys, one for each image.
          request: The prompt, the negative prompt, the sampler and the number of steps.
          guidance: The guidance that the method `guidance` returns.
          compile: The function that compiles functions of the task.

        Raises:
          FieldError: If the prompt is missing or a field of the request is not supported.
        """
        self.check_request(request)
        prompt, negative = request.prompt or "", request.negative_prompt or ""
        self.encoder.report_length(prompt)
        captions, null = (
            repeat(self.encoder.prepare([text]), len(keys)) for text in (prompt, negative)
        )
        return self.sample_captions(variables, keys, captions, null, request, guidance, compile)

    def sample_captions(
        self,
        variables: Variables,
        keys: Key[Array, "batch"],
        captions: PyTree,
        null: PyTree,
        request: SampleRequest,
        guidance: Guidance,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Return images in [-1, 1] of prepared captions, one for each key.

        Args:
          variables: The variables of the trained task.
          keys: Random keys, one for each image.
          captions: The captions that the text encoder has prepared, one for each key.
          null: The prepared captions that guidance leads away from, one for each image.
          request: The sampler and the number of steps; its prompts are not used.
          guidance: The guidance that the method `guidance` returns.
          compile: The function that compiles functions of the task.
        """
        text, frozen = variables.extra["text"], variables.extra["autoencoder"]
        encode = compile(encode_captions, static_argnums=0)
        context, null_context = (encode(self.encoder, text, part) for part in (captions, null))
        return self.generator.sample(
            variables.params, frozen, keys, context, null_context, guidance, request, compile
        )
