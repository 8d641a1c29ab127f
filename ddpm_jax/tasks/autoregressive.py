"""An autoregressive model of the codes of a quantised autoencoder (Ramesh et al. 2021)."""

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
    """An autoregressive model of the codes of a quantised autoencoder.

    p(codes | caption) = prod_i p(code_i | code_1 ... code_(i-1), caption)

    The codes of an image are ordered row by row from the top. The loss is -log p in nats per code.
    Guidance extrapolates l = log p before a code is sampled (Crowson 2021; Gafni et al. 2022, sec.
    3.4): l = l_null + scale (l_caption - l_null).

    Attributes:
      network: The transformer that predicts the next code.
      guidance: Scale of classifier-free guidance; 1 means no guidance, and larger values follow the
        caption more closely.
      temperature: Temperature, at least 0.001, of the distribution that codes are sampled from; 1
        samples from the model, and smaller values prefer likely codes.
      latents: The latents of the autoencoder.
    """

    network: CodeTransformer = CodeTransformer()
    guidance: Annotated[float, MAY_CHANGE] = 1.0
    temperature: Annotated[float, AtLeast(1e-3), MAY_CHANGE] = 1.0
    latents: Annotated[Latents, BOUND] = Latents(Autoencoder(), 0)

    def bind(self, latents: Latents, precision: str, batch_size: int) -> "Autoregressive":
        """Return the model with its network set up for the codes of an autoencoder."""
        del batch_size
        network = self.network.clone(codes=latents.codes, dtype=jnp.dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, latents=latents)

    def check(self) -> None:
        """Check that the network can be built, and that the autoencoder has codes.

        Raises:
          FieldError: If the network cannot be built or the autoencoder has no codebook.
        """
        with section("network"):
            self.network.check()
        if not self.latents.codes:
            raise FieldError(
                "network.codes=0: the autoregressive model needs a quantised autoencoder, and this "
                "one has Gaussian latents; train an autoencoder with --config.task.codes=256"
            )

    @property
    def request_fields(self) -> tuple[str, ...]:
        """The names of the fields of a request that have an effect, besides the prompts."""
        return ("guidance",)

    def check_request(self, request: SampleRequest) -> None:
        """Accept every request, since none of its fields can be invalid for codes."""
        del request

    def init(self, key: Key[Array, ""], context: Context) -> PyTree:
        """Return the initial parameters, for captions' features of the shapes of `context`."""
        rows, columns, _ = self.latents.shape
        codes = jnp.zeros((len(context.mask), rows * columns), jnp.int32)
        return self.network.init(key, codes, context)

    def target(
        self, frozen: PyTree, images: Float[Array, "batch h w c"]
    ) -> Int[Array, "batch rows columns"]:
        """Return the code indices of images in [-1, 1]."""
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
        """Return -log p(codes | caption) in nats per code, and the accuracy, of every example.

        The accuracy is the share of the codes that are the most probable ones.

        Args:
          params: The parameters of the network.
          target: The code indices.
          context: The features of the captions.
          index: Not used.
          keys: Random keys, one for each example.
          train: If true, dropout is on.
        """
        del index
        codes = target.reshape(len(target), -1)
        logits = self._logits(params, codes, context, keys if train else None)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], -1)[..., 0]
        correct = (logits.argmax(-1) == codes).mean(-1, dtype=jnp.float32)
        return -log_p.mean(-1), {"accuracy": correct}

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the settings."""
        return self.guidance

    def make_guidance(self, scale: float | None) -> Guidance:
        """Return the guidance by captions; if `scale` is None, at the scale of the settings."""
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
        """Return images in [-1, 1], one for each key.

        Args:
          params: The parameters of the network.
          frozen: The variables {"params", "extra"} of the autoencoder.
          keys: Random keys, one for each image.
          context: The features of the captions.
          null_context: The features that guidance leads away from (the null conditioning).
          guidance: The guidance that `make_guidance` returns.
          request: Not used.
          compile: The function that compiles functions of the task.
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
        """Return images in [-1, 1] after sampling their codes one after another.

        Args:
          params: The parameters of the network.
          frozen: The variables {"params", "extra"} of the autoencoder.
          keys: Random keys, one for each image.
          context: The features of the captions.
          null_context: The features that guidance leads away from (the null conditioning).
          guidance: The guidance; without a method, the null conditioning is not evaluated.
          temperature: The temperature of the distribution that codes are sampled from.
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
        """Return the settings of sampling, for the record of an evaluation."""
        return {"guidance": self.guidance, "temperature": self.temperature}
