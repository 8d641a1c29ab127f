"""An autoregressive model of the codebook indices of images (Ramesh et al. 2021)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion.guidance import ClassifierFree, Guidance
from ddpm_jax.fields import BOUND, MAY_CHANGE, AtLeast, FieldError, section
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.layers import Context
from ddpm_jax.system.record import Record
from ddpm_jax.task import Compile, SampleRequest
from ddpm_jax.tasks.autoencoder import Latents


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """An autoregressive model of the codebook indices k_i of an image, given its caption.

    p(k | caption) = prod_i p(k_i | k_1 ... k_(i-1), caption)

    A quantised autoencoder encodes an image to these indices, which are ordered row by row from the
    top. The loss is -log p in nats per index. Guidance extrapolates l = log p before an index is
    sampled (Crowson 2021; Gafni et al. 2022, sec. 3.4): l = l_null + scale (l_caption - l_null).

    Attributes:
      network: The transformer that predicts the next codebook index.
      guidance: Scale of classifier-free guidance; 1 means no guidance, and with larger values the
        images follow the caption more closely.
      temperature: Divisor of log p, at least 0.001, when codebook indices are sampled; 1 samples
        from the model, and smaller values make likely indices more frequent.
      latents: Encoder and decoder of the trained autoencoder.
    """

    network: CodeTransformer = CodeTransformer()
    guidance: Annotated[float, MAY_CHANGE] = 1.0
    temperature: Annotated[float, AtLeast(1e-3), MAY_CHANGE] = 1.0
    latents: Annotated[Latents, BOUND] = Latents(Autoencoder(), 0)

    def bind(self, latents: Latents, precision: str, batch_size: int) -> "Autoregressive":
        """Return the model with its network set up for the codebook of an autoencoder."""
        del batch_size
        network = self.network.clone(codes=latents.codes, dtype=jnp.dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, latents=latents)

    def check(self) -> None:
        """Check that the network can be built, and that the autoencoder has a codebook.

        Raises:
          FieldError: If the network cannot be built or the autoencoder has no codebook.
        """
        with section("network"):
            self.network.check()
        if not self.latents.codes:
            raise FieldError(
                "network.codes=0: the autoregressive model needs an autoencoder with a codebook, "
                "and this autoencoder has Gaussian latents; train one with --config.task.codes=256"
            )

    @property
    def request_fields(self) -> tuple[str, ...]:
        """The names of the sampling options that the model supports, besides the prompts."""
        return ("guidance",)

    def check_request(self, request: SampleRequest) -> None:
        """Accept every request; no value of a sampling option is invalid for this model."""
        del request

    def init(self, key: Key[Array, ""], context: Context) -> PyTree:
        """Return initial parameters; `context` gives the shapes of the text features."""
        rows, columns, _ = self.latents.shape
        codes = jnp.zeros((len(context.mask), rows * columns), jnp.int32)
        return self.network.init(key, codes, context)

    def target(
        self, frozen: PyTree, images: Float[Array, "batch h w c"]
    ) -> Int[Array, "batch rows columns"]:
        """Encode images in [-1, 1] to codebook indices, which the model learns to sample."""
        return self.latents.code_indices(frozen, images)

    def loss(
        self,
        params: PyTree,
        target: Int[Array, "batch rows columns"],
        context: Context,
        index: Int[Array, "batch"],
        keys: Key[Array, "batch"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        """Return -log p(indices | caption) in nats per index, and {"accuracy": [B]}.

        The accuracy is the share of positions whose index is the most probable one.

        Args:
          params: The parameters of the network.
          target: The codebook indices.
          context: The text features of the captions (`nn.layers.Context`).
          index: Not used.
          keys: Random keys, one for each example.
          train: If True, dropout is on.
        """
        del index
        codes = target.reshape(len(target), -1)
        logits = self._logits(params, codes, context, keys if train else None)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], -1)[..., 0]
        correct = (logits.argmax(-1) == codes).mean(-1, dtype=jnp.float32)
        return -log_p.mean(-1), {"accuracy": correct}

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the config."""
        return self.guidance

    def make_guidance(self, scale: float | None) -> Guidance:
        """Return guidance by captions, with the scale of the config if `scale` is None."""
        scale = self.guidance if scale is None else scale
        return Guidance() if scale == ClassifierFree.neutral else Guidance(ClassifierFree(scale))

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
          params: The parameters of the network.
          frozen: The variables {"params": ..., "extra": ...} of the trained autoencoder.
          keys: Random keys, one for each image.
          context: The text features of the captions (`nn.layers.Context`).
          null_context: The text features of the empty caption or of a negative prompt, from which
            guidance leads away.
          guidance: The guidance method and scale that `make_guidance` returns.
          request: Not used.
          compile: Compiles a function as `jax.jit` does, once for all its calls.
        """
        del request
        sample = compile(Autoregressive.sample_codes, static_argnums=0)
        return sample(self, params, frozen, keys, context, null_context, guidance, self.temperature)

    def sample_codes(
        self,
        params: PyTree,
        frozen: PyTree,
        keys: Key[Array, "batch"],
        context: Context,
        null_context: Context,
        guidance: Guidance,
        temperature: float | Array,
    ) -> Float[Array, "batch h w c"]:
        """Sample codebook indices one after another, and decode them to images in [-1, 1].

        Args:
          params: The parameters of the network.
          frozen: The variables {"params": ..., "extra": ...} of the trained autoencoder.
          keys: Random keys, one for each image.
          context: The text features of the captions (`nn.layers.Context`).
          null_context: The text features of the empty caption or of a negative prompt, from which
            guidance leads away.
          guidance: The guidance; if its method is None, `null_context` is not used.
          temperature: The divisor of log p before an index is sampled.
        """
        size, method = len(keys), guidance.method
        rows, columns, _ = self.latents.shape
        if method is not None:
            context = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), context, null_context)

        def sample_next(codes: Array, position: Array) -> tuple[Array, None]:
            inputs = codes if method is None else jnp.concatenate([codes, codes])
            log_p = jax.nn.log_softmax(self._logits(params, inputs, context)[:, position])
            if method is not None:
                log_p = log_p[size:] + method.scale * (log_p[:size] - log_p[size:])
            code_keys = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys)
            code = jax.vmap(jax.random.categorical)(code_keys, log_p / temperature)
            return codes.at[:, position].set(code.astype(codes.dtype)), None

        codes = jnp.zeros((size, rows * columns), jnp.int32)
        codes, _ = jax.lax.scan(sample_next, codes, jnp.arange(rows * columns))
        z = self.latents.embed_codes(frozen, codes.reshape(size, rows, columns))
        return self.latents.decode(frozen, z)

    def _logits(
        self,
        params: PyTree,
        codes: Int[Array, "batch positions"],
        context: Context,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch positions codes"]:
        logits = self.network.apply(params, codes, context, keys)
        assert isinstance(logits, jax.Array)
        return logits

    def about(self) -> Record:
        """Return the sampling fields of the config by name; an evaluation stores them."""
        return {"guidance": self.guidance, "temperature": self.temperature}
