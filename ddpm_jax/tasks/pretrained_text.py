"""Features of captions by a frozen text encoder of `transformers`, such as T5, CLIP or MiniLM.

The config gives the name of the encoder on the Hugging Face hub, or a directory. The user must run
`pip install 'ddpm_jax[pretrained]'`. The encoder runs once for each caption of a data set; the
features are stored in the user's cache directory.
"""

import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Array

from ddpm_jax.data.cache import cache_dir
from ddpm_jax.data.tfds_builders import reachable
from ddpm_jax.data.tokenizer import untokenize
from ddpm_jax.data.types import ENDLESS, Data, Split
from ddpm_jax.errors import UserError
from ddpm_jax.progress import log

LENGTH = 64  # maximum number of tokens of a caption
HUB_TIMEOUT_SECONDS = 2.0  # timeout of the connection to the Hugging Face hub
BATCH = 64  # number of captions in one call of the encoder
PART = 4096  # number of captions whose features are in memory at the same time
VERSION = "2"  # increase it when `encode` returns different features for the same text


class Features(NamedTuple):
    """Text features of N captions, with at most `LENGTH` tokens each.

    Attributes:
      tokens: The features of every token [N, L, D].
      mask: True for tokens of the text, False for padding [N, L].
      pooled: The mean of `tokens` over the tokens of the text [N, D].
    """

    tokens: np.ndarray | Array
    mask: np.ndarray | Array
    pooled: np.ndarray | Array

    def at(self, rows: np.ndarray) -> "Features":
        """Return the features of the captions at the indices `rows`, in float32."""
        tokens, mask, pooled = (array[rows] for array in self)
        return Features(tokens.astype(np.float32), mask, pooled.astype(np.float32))


class EncodedCaptions:
    """A sequence of captions whose features are read from disk when they are indexed.

    Args:
      texts: The texts of the captions [N].
      features: The features of the distinct texts.
      rows: The index of each caption's features in `features` [N].
    """

    def __init__(self, texts: Sequence[str], features: Features, rows: np.ndarray) -> None:
        self.texts, self._features, self._rows = texts, features, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, rows: slice) -> "EncodedCaptions": ...

    @overload
    def __getitem__(self, rows: np.ndarray) -> Features: ...

    def __getitem__(self, rows: slice | np.ndarray) -> "EncodedCaptions | Features":
        if isinstance(rows, slice):
            return EncodedCaptions(self.texts[rows], self._features, self._rows[rows])
        return self._features.at(self._rows[rows])


def load_encoder(name: str) -> tuple[Any, Any]:
    """Return the tokenizer and the encoder, given a name on the Hugging Face hub or a directory.

    They are cached in memory until the files of the directory change. The name may come from the
    config.json of an untrusted run. Therefore no code from the hub or the directory is executed: no
    custom classes, no pickles, no kernels.

    Raises:
      UserError: If `transformers` or PyTorch is not installed, or the encoder cannot be loaded.
    """
    return _load_encoder(name, _files_of(name))


@functools.lru_cache(maxsize=2)
def _load_encoder(name: str, files: str) -> tuple[Any, Any]:
    """Load the tokenizer and the encoder; cache them until `files` (`_files_of(name)`) changes."""
    del files
    missing = [m for m in ("transformers", "torch") if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(
            f"--config.task.pretrained={name} needs the package {' and '.join(missing)}, which is "
            "not installed; run: pip install 'ddpm_jax[pretrained]'"
        )
    offline = _check_name(name)
    from transformers import AutoModel, AutoTokenizer

    try:
        # If trust_remote_code is unset, transformers prompts the user and may then execute code.
        options = {"trust_remote_code": False, "local_files_only": offline}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModel.from_pretrained(
            name,
            use_safetensors=True,  # no pickles
            attn_implementation="eager",  # otherwise config.json may name a kernel on the hub
            **options,
        )
    except Exception as error:  # the errors of transformers have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--config.task.pretrained={name} cannot be loaded: {reason}; give the name of a text "
            "encoder on the Hugging Face hub, or a directory with its files"
        ) from None
    if tokenizer.pad_token is None:  # any token will do, since padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return tokenizer, getattr(model, "text_model", model).eval()


def _check_name(name: str) -> bool:
    """Check that an encoder is available, before the slow import of `transformers`.

    Returns:
      True if the encoder must be loaded without the hub, because it is a directory or because the
      hub does not answer.

    Raises:
      UserError: If the directory does not exist, or if the encoder is not in the hub's cache and
        the hub does not answer.
    """
    if pathlib.Path(name).is_dir():
        return True
    if name[:1] in (".", "/", "~") or name.count("/") > 1:
        raise UserError(
            f"--config.task.pretrained={name}: there is no such directory; give an existing "
            "directory, or a name on the Hugging Face hub, such as google-t5/t5-small"
        )
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    if reachable(constants.ENDPOINT, HUB_TIMEOUT_SECONDS):
        return False
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        cached = False
    if not cached:
        raise UserError(
            f"--config.task.pretrained={name} is not in the cache, and the hub "
            f"({constants.ENDPOINT}) does not answer; give the directory of an encoder, or try "
            "again with a connection to the hub"
        )
    return True


def absolute_name(name: str) -> str:
    """Return the absolute path if `name` is an existing directory, else `name` unchanged."""
    directory = pathlib.Path(name).expanduser()
    return str(directory.absolute()) if name and directory.is_dir() else name


def width_of(name: str) -> int:
    """Load an encoder, and return its number of features per token."""
    return int(load_encoder(name)[1].config.hidden_size)


def encode(name: str, texts: Sequence[str]) -> Features:
    """Return the features of texts in float16, as NumPy arrays.

    The mask of an empty text is False for all tokens, and its pooled features are 0.
    """
    import torch

    tokenizer, model = load_encoder(name)
    length = min(LENGTH, getattr(tokenizer, "model_max_length", LENGTH))
    parts = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        tokens = tokenizer(
            batch, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.no_grad():
            out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        hidden, mask = out.last_hidden_state.numpy(), tokens["attention_mask"].numpy() > 0
        mask &= np.array([bool(text) for text in batch])[:, None]
        weights = mask / np.maximum(mask.sum(1, keepdims=True), 1)
        pooled = np.einsum("bl,bld->bd", weights, hidden)
        parts.append((hidden.astype(np.float16), mask, pooled.astype(np.float16)))
    return Features(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def with_features(name: str, data: Data) -> Data:
    """Replace the captions of a data set by their features, from the cache if possible.

    Raises:
      UserError: If the data set has no captions or is not finite.
    """
    if not data.caption_length:
        raise UserError(
            f"--config.task.pretrained={name} needs captions, and data set {data.name} has no "
            "captions; give --config.data=folder:PATH, where PATH has images with captions"
        )
    if len(data.train.images) >= ENDLESS:
        raise UserError(
            f"--config.task.pretrained={name} needs a finite data set, since it encodes every "
            f"caption once, and {data.name} is endless; give --config.data=folder:PATH or a TFDS "
            "data set with captions"
        )

    def encode_split(split: Split) -> Split:
        texts = untokenize(split.captions[np.arange(len(split.images))])
        distinct = sorted(set(texts))
        row_of = {text: row for row, text in enumerate(distinct)}
        rows = np.array([row_of[text] for text in texts])
        return split._replace(
            captions=EncodedCaptions(texts, _cached_features(name, distinct), rows)
        )

    validation = None if data.validation is None else encode_split(data.validation)
    return data._replace(
        train=encode_split(data.train), test=encode_split(data.test), validation=validation
    )


def _cached_features(name: str, texts: list[str]) -> Features:
    """Return the features of texts from the cache; compute and cache them if they are missing."""
    parts = [name, _version(name), VERSION, str(LENGTH), *texts]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    directory = cache_dir() / "features"
    paths = [directory / f"{key}_{field}.npy" for field in Features._fields]
    features = _read(paths, len(texts))
    if features is None:
        if any(path.exists() for path in paths):
            log(f"the cached features {directory / key}_*.npy are damaged; they are computed again")
        log(f"encoding {len(texts)} captions with {name}; the features are cached in {directory}")
        directory.mkdir(parents=True, exist_ok=True)
        _write(name, texts, paths)
        features = _read(paths, len(texts))
    assert features is not None
    return features


def _write(name: str, texts: list[str], paths: list[pathlib.Path]) -> None:
    """Compute and write the features of texts, `PART` texts at a time."""
    drafts = [path.with_suffix(".tmp.npy") for path in paths]
    files: list[np.memmap] = []
    for start in range(0, len(texts), PART):
        part = encode(name, texts[start : start + PART])
        files = files or [
            np.lib.format.open_memmap(draft, "w+", array.dtype, (len(texts), *array.shape[1:]))
            for draft, array in zip(drafts, part, strict=True)
        ]
        for file, array in zip(files, part, strict=True):
            file[start : start + len(array)] = array
    for file, draft, path in zip(files, drafts, paths, strict=True):
        file.flush()
        draft.rename(path)  # atomic: the file is complete or missing


def _version(name: str) -> str:
    """Return the commit of an encoder on the hub, or the state of the files of a directory."""
    if pathlib.Path(name).is_dir():
        return _files_of(name)
    try:
        return str(getattr(load_encoder(name)[1].config, "_commit_hash", None))
    except UserError:  # `encode` raises it if the features are not in the cache
        return ""


def _files_of(name: str) -> str:
    """Return sizes and modification times of a directory's files; empty for a name on the hub."""
    directory = pathlib.Path(name)
    if not directory.is_dir():
        return ""
    stats = [(path, path.stat()) for path in sorted(directory.rglob("*")) if path.is_file()]
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _read(paths: list[pathlib.Path], count: int) -> Features | None:
    """Read the features of `count` texts; return None if a file is missing or invalid."""
    try:
        features = Features(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths))
    except (OSError, EOFError, ValueError):
        return None
    size, length, width = (*features.tokens.shape, 0, 0, 0)[:3]
    shapes = [array.shape for array in features]
    if size != count or shapes != [(size, length, width), (size, length), (size, width)]:
        return None
    return features
