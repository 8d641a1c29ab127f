"""Text encoders that a generation model can be conditioned on."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt8

from ddpm_jax.data.tokenizer import PADDING, size, tokenize, untokenize
from ddpm_jax.data.types import Data, Split
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.text_encoder import SIZES
from ddpm_jax.progress import log_once
from ddpm_jax.tasks.pretrained_text import EncodedCaptions, Features, encode, with_features


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text encoder; hashable, to be a static argument of `jax.jit`.

    A batch contains prepared captions: the input of `encode`, a pytree of arrays [B, ...].
    """

    @property
    def width(self) -> int:
        """The number of features per token."""

    def prepare_data(self, data: Data) -> Data:
        """Return the data set with prepared captions."""

    def prepare(self, texts: Sequence[str]) -> PyTree:
        """Convert texts to prepared captions (the input of `encode`), outside of `jax.jit`."""

    def encode(self, params: PyTree, prepared: PyTree) -> Context:
        """Return the text features of prepared captions.

        Args:
          params: The parameters of the text encoder and its image encoder.
          prepared: The captions, as `prepare` returns them.
        """

    def drop(self, prepared: PyTree, dropped: Bool[Array, "batch"]) -> PyTree:
        """Replace the prepared captions by the empty caption where `dropped` is True."""

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first `count` captions of a split."""

    def report_length(self, text: str) -> None:
        """Log a warning if the encoder truncates a text."""


@dataclasses.dataclass(frozen=True)
class BytesEncoder:
    """The text encoder that a `Contrastive` task has trained; its tokens are bytes.

    Attributes:
      network: The network of the text encoder and its image encoder.
    """

    network: DualEncoder

    @property
    def width(self) -> int:
        """The number of features per token."""
        return SIZES[self.network.size].features

    def prepare_data(self, data: Data) -> Data:
        """Return the data set unchanged, because its captions are already tokens."""
        return data

    def prepare(self, texts: Sequence[str]) -> UInt8[np.ndarray, "batch length"]:
        """Return the tokens [B, L] of texts."""
        return tokenize(texts, self.network.length)

    def encode(self, params: PyTree, prepared: UInt8[Array, "batch length"]) -> Context:
        """Return the text features of tokens.

        Args:
          params: The parameters of the text encoder and its image encoder.
          prepared: The tokens [B, L].
        """
        context = self.network.apply(params, prepared, method="encode_text")
        assert isinstance(context, Context)
        return context

    def drop(
        self, prepared: UInt8[Array, "batch length"], dropped: Bool[Array, "batch"]
    ) -> UInt8[Array, "batch length"]:
        """Replace the tokens by padding (the empty caption) where `dropped` is True."""
        return jnp.where(dropped[:, None], PADDING, prepared).astype(prepared.dtype)

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first `count` captions of a split."""
        examples = split.first(count)
        return untokenize(examples.rows(np.arange(len(examples.images))).captions)

    def report_length(self, text: str) -> None:
        """Log a warning if a text has more bytes than the encoder reads."""
        length = self.network.length
        if size(text) > length:
            log_once(
                f"a prompt has {size(text)} bytes, and the text encoder reads only the first "
                f"{length}; shorten the prompt, since the other bytes have no effect"
            )


@dataclasses.dataclass(frozen=True)
class PretrainedEncoder:
    """A frozen encoder of `transformers`. Prepared captions are its features, computed in advance.

    Attributes:
      name: The name of the encoder on the Hugging Face hub, or its directory.
      width: The number of features per token.
    """

    name: str
    width: int

    def prepare_data(self, data: Data) -> Data:
        """Replace the captions of a data set by their text features."""
        return with_features(self.name, data)

    def prepare(self, texts: Sequence[str]) -> Features:
        """Return the text features of texts, as `encode` of `pretrained_text` computes them."""
        return encode(self.name, texts)

    def encode(self, params: PyTree, prepared: Features) -> Context:
        """Convert prepared features to a `Context` of JAX arrays; `params` is not used."""
        del params
        return Context(*map(jnp.asarray, prepared))

    def drop(self, prepared: Features, dropped: Bool[Array, "batch"]) -> Features:
        """Replace the features by those of the empty caption where `dropped` is True."""
        keep = ~dropped[:, None]
        pooled = jnp.where(keep, prepared.pooled, 0)
        return prepared._replace(mask=prepared.mask & keep, pooled=pooled)

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first `count` captions of a split from `prepare_data`."""
        captions = split.first(count).captions
        assert isinstance(captions, EncodedCaptions)
        return list(captions.texts)

    def report_length(self, text: str) -> None:
        """Log nothing; the tokenizer of the encoder truncates long texts without a warning."""


def encode_captions(encoder: TextEncoder, params: PyTree, prepared: PyTree) -> Context:
    """Return the text features of prepared captions. When compiled, `encoder` is static."""
    return encoder.encode(params, prepared)


def repeat(prepared: PyTree, count: int) -> PyTree:
    """Repeat one prepared caption `count` times along the batch axis."""
    return jax.tree.map(lambda array: np.repeat(array, count, 0), prepared)
