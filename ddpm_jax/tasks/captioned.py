"""The task `TextToImage`: a generation model with a trained text encoder and autoencoder.

    caption -> text encoder -> features -> generation model -> latents -> decoder -> image

The three networks are trained one after another. In this task, the text encoder and the autoencoder
(the "parts") are frozen: gradients do not train them. Their variables are in `Variables.extra` and
thus in every checkpoint, so that sampling needs only the checkpoint. The exception is a pretrained
text encoder, which a checkpoint does not contain.
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
      generator: The generation model: diffusion of the autoencoder's latents, or an autoregressive
        model of its codebook indices.
      text_encoder: Run directory of the trained text encoder.
      autoencoder: Run directory of the trained autoencoder.
      pretrained: Name or directory of a text encoder of the package `transformers`, whose features
        then condition the generation model (`text_encoder` then only computes metrics). It needs a
        finite data set. If empty, the features of `text_encoder` are used.
      caption_dropout: Share of captions, from 0 to 1, that training replaces by the empty caption;
        classifier-free guidance needs a value above 0.
      evaluation: Fields of the evaluation, such as the number of samples.
      text_network: The network of the text encoder and its image encoder.
      autoencoder_network: The network of the autoencoder.
      codes: Number of vectors in the autoencoder's codebook; 0 for Gaussian latents.
      feature_width: Number of features per token of the pretrained text encoder; 0 if `pretrained`
        is empty.
      parts_bound: True if the fields that `with_parts` sets from the parts are set.
      info: Description of the data set: image shape, number of classes and caption length.
      batch_size: Number of images in one training step, over all devices.
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
        """Return the runs of the text encoder, the autoencoder, and the encoder for metrics."""
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
        """Return the task with the networks of a trained text encoder and autoencoder."""
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
        """Return the data with captions converted to the input of the text encoder."""
        return self.encoder.prepare_data(data)

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "TextToImage":
        """Return the task with its networks set up for the data set and the precision."""
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
        """Check that the fields fit each other, the data set and the latents.

        Raises:
          UserError: If the data set has no captions.
          FieldError: If fields contradict each other or do not fit the latents.
        """
        check_captions(self.info)
        self._check_guidance(self.generator.guidance_scale)
        with section("generator"):
            self.generator.check()

    def _check_guidance(self, scale: float) -> None:
        """Raise FieldError if the guidance scale is not 1 and caption_dropout is 0."""
        if not self.caption_dropout and scale != 1.0:
            raise FieldError(
                "caption_dropout=0: the network is never trained without captions, so "
                f"classifier-free guidance of scale {scale:g} is not possible; give guidance 1, or "
                "train a new run with caption_dropout above 0",
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
        """The prompts for which the final evaluation samples images, to check what these show."""
        return prompts_of(self.info.name, self.evaluation.num_prompts)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return initial parameters of the generation model, and zeros for the frozen networks."""
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
        """Return the trained text encoder and autoencoder as the extra variables of a new run.

        `load` returns their variables, which are converted to the dtypes of `extra`.

        Raises:
          RuntimeError: If `load` is None.
        """
        if load is None:
            raise RuntimeError(
                "a new text-to-image run needs the parameters of its text encoder and autoencoder, "
                "but Resources.parts is None; pass Resources(parts=FUNCTION that loads them)"
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
          variables: The parameters of the generation model; the extra variables are those of the
            frozen networks.
          batch: Images with captions in the form that the text encoder takes.
          keys: Random keys, one for each example.
          train: If True, captions are dropped at random and dropout is on.
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
        """Return the functions that compute the metrics and images of an evaluation."""
        return EVALUATIONS

    @property
    def request_fields(self) -> tuple[str, ...]:
        """The names of the sampling options that the task supports."""
        return (*self.generator.request_fields, "prompt", "negative_prompt")

    def check_request(self, request: SampleRequest) -> None:
        """Check that the sampling options contain a prompt and fit the generation model.

        Raises:
          FieldError: If the prompt is missing or an option is not supported.
        """
        self.generator.check_request(request)
        if request.prompt is None:
            raise FieldError(
                'prompt="..." is missing: give the text that the images should show, such as '
                'prompt="a small red circle"'
            )

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> Guidance:
        """Return the guidance by captions (classifier-free guidance), for `sample`.

        Args:
          scale: The guidance scale; if None, the scale of the config.
          model: Not used, because a guidance model is not supported.

        Raises:
          FieldError: If caption_dropout is 0 and the scale is not 1.
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
        """Sample one image in [-1, 1] for each key, conditioned on the prompt of the request.

        Args:
          variables: The parameters and the extra variables (not trained by gradients) of the task.
          keys: Random keys, one for each image.
          request: The prompt, the negative prompt, the sampler and the number of steps. Without a
            negative prompt, guidance leads away from the empty caption.
          guidance: The guidance that the method `guidance` returns.
          compile: Compiles a function as `jax.jit` does, once for all its calls.

        Raises:
          FieldError: If the prompt is missing or a sampling option is not supported.
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
        """Sample one image in [-1, 1] for each prepared caption and its key.

        Args:
          variables: The parameters and the extra variables (not trained by gradients) of the task.
          keys: Random keys, one for each image.
          captions: The captions, converted by `encoder.prepare`, one for each key.
          null: The empty captions or negative prompts, converted in the same way, one for each key.
          request: The sampler and the number of steps; the prompts in it are not used.
          guidance: The guidance that the method `guidance` returns.
          compile: Compiles a function as `jax.jit` does, once for all its calls.
        """
        text, frozen = variables.extra["text"], variables.extra["autoencoder"]
        encode = compile(encode_captions, static_argnums=0)
        context, null_context = (encode(self.encoder, text, part) for part in (captions, null))
        return self.generator.sample(
            variables.params, frozen, keys, context, null_context, guidance, request, compile
        )
