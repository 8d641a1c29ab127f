"""A generation model over the codes of a quantised autoencoder (Ramesh et al. 2021)."""

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
    """A generation model over the codes of a quantised autoencoder.

    p(codes | caption) = prod_i p(code_i | codes before it, caption), row by row from the top.

    The loss is -log p in nats per code. Guidance extrapolates log p (Crowson 2021; Gafni et al.
    2022, sec. 3.4) before a code is sampled: l = l_null + scale (l_caption - l_null).

    Attributes:
      network: The transformer over codes.
      guidance: Scale of guidance; 1: none.
      temperature: Temperature of the sampled codes.
      latents: The autoencoder's latents.
    """

    network: CodeTransformer = CodeTransformer()
    guidance: Annotated[float, MAY_CHANGE] = 1.0
    temperature: Annotated[float, AtLeast(1e-3), MAY_CHANGE] = 1.0
    latents: Annotated[Latents, BOUND] = Latents(Autoencoder(), 0)

    def bind(self, latents: Latents, precision: str, batch_size: int) -> "Autoregressive":
        """Return the generation model for the codes of an autoencoder."""
        del batch_size
        network = self.network.clone(codes=latents.codes, dtype=jnp.dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, latents=latents)

    def check(self) -> None:
        """Check that the network can be built, and that the autoencoder has codes.

        Raises:
          FieldError: it cannot, or the autoencoder has none.
        """
        with section("network"):
            self.network.check()
        if not self.latents.codes:
            raise FieldError(
                "network.codes=0: the autoregressive generation model needs a quantised "
                "autoencoder, trained with task.codes=256"
            )

    @property
    def request_fields(self) -> tuple[str, ...]:
        """Names of what can be asked for, besides captions."""
        return ("guidance",)

    def check_request(self, request: SampleRequest) -> None:
        """Check that codes can be sampled as a request says: they can."""
        del request

    def init(self, key: Key[Array, ""], context: Context) -> PyTree:
        """Return the first parameters; `context` has the shapes of captions' features."""
        rows, columns, _ = self.latents.shape
        codes = jnp.zeros((len(context.mask), rows * columns), jnp.int32)
        return self.network.init(key, codes, context)

    def target(
        self, frozen: PyTree, images: Float[Array, "batch h w c"]
    ) -> Int[Array, "batch rows columns"]:
        """Return the codes of images in [-1, 1]."""
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
        """Return -log p(codes | caption) in nats per code, and the share of codes most likely.

        Args:
          params: parameters of the network.
          target: codes.
          context: features of the captions.
          index: number of every example in its batch, which is not used.
          keys: one for every example.
          train: whether dropout is used.
        """
        del index
        codes = target.reshape(len(target), -1)
        logits = self._logits(params, codes, context, keys if train else None)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], -1)[..., 0]
        correct = (logits.argmax(-1) == codes).mean(-1, dtype=jnp.float32)
        return -log_p.mean(-1), {"accuracy": correct}

    @property
    def guidance_scale(self) -> float:
        """The scale of guidance of the settings."""
        return self.guidance

    def make_guidance(self, scale: float | None) -> Guidance:
        """Return the guidance by captions; None: at the scale of the settings."""
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
        """Return images in [-1, 1], one for every key.

        Args:
          params: parameters of the network.
          frozen: {"params", "extra"} of the autoencoder.
          keys: one for every image.
          context: features of the captions.
          null_context: features of what guidance leads away from.
          guidance: as `make_guidance` returns it.
          request: how codes are sampled, which has no other fields.
          compile: compiles functions.
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
        """Return images in [-1, 1] whose codes are sampled one after another.

        Args:
          params: parameters of the network.
          frozen: {"params", "extra"} of the autoencoder.
          keys: one for every image.
          context: features of the captions.
          null_context: features of what guidance leads away from.
          guidance: its scale extrapolates; None of it needs no second half of the batch.
          temperature: of the sampled codes.
        """
        size, method = len(keys), guidance.method
        rows, columns, _ = self.latents.shape
        if method is not None:
            context = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), context, null_context)

        def sample_next(codes: Array, place: Array) -> tuple[Array, None]:
            inputs = codes if method is None else jnp.concatenate([codes, codes])
            log_p = jax.nn.log_softmax(self._logits(params, inputs, context)[:, place])
            if method is not None:
                log_p = log_p[size:] + method.scale * (log_p[:size] - log_p[size:])
            place_keys = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
            code = jax.vmap(jax.random.categorical)(place_keys, log_p / temperature)
            return codes.at[:, place].set(code.astype(codes.dtype)), None

        codes = jnp.zeros((size, rows * columns), jnp.int32)
        codes, _ = jax.lax.scan(sample_next, codes, jnp.arange(rows * columns))
        z = self.latents.embed_codes(frozen, codes.reshape(size, rows, columns))
        return self.latents.decode(frozen, z)

    def _logits(
        self,
        params: PyTree,
        codes: Int[Array, "batch places"],
        context: Context,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch places codes"]:
        logits = self.network.apply(params, codes, context, keys)
        assert isinstance(logits, jax.Array)
        return logits

    def about(self) -> Record:
        """Return how codes are sampled by the settings, for the record."""
        return {"guidance": self.guidance, "temperature": self.temperature}
