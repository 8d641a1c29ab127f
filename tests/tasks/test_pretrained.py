"""Tests of pretrained text encoders with a tiny BERT; they need torch and transformers."""

import json
import pickle
import shutil
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data import batches, loader, splits
from ddpm_jax.errors import UserError
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.tasks import pretrained_text
from ddpm_jax.tasks.text_encoders import BytesEncoder, PretrainedEncoder

TEXTS = ["a red circle", "", "two blue squares above a green triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a tiny BERT, whose tokens are words, in the layout of the hub."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("encoder")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red circle two blue squares above green triangle"
    (path / "vocab.txt").write_text("\n".join(words.split()))
    config = transformers.BertConfig(
        vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


def test_features_do_not_depend_on_the_batch_and_padding_is_masked(folder):
    together = pretrained_text.encode(folder, TEXTS)
    assert together.tokens.shape == (3, pretrained_text.LENGTH, 16)
    assert together.mask.sum(1).tolist() == [5, 0, 9]  # words, [CLS] and [SEP]
    assert not together.pooled[1].any()  # an empty text has no features
    for row, text in enumerate(TEXTS):
        alone = pretrained_text.encode(folder, [text])
        mask = alone.mask[0]
        np.testing.assert_allclose(alone.tokens[0][mask], together.tokens[row][mask], atol=2e-3)
        np.testing.assert_allclose(alone.pooled[0], together.pooled[row], atol=2e-3)


def test_captions_of_a_data_set_are_encoded_once(folder, monkeypatch):
    data = loader.load("shapes")
    data = splits.with_validation(data, 0)
    data = data._replace(train=data.train.first(20), test=data.test.first(5))
    adapted = pretrained_text.with_features(folder, data)
    rows = np.array([3, 0, 3])
    batch = batches.batch_of(adapted.train, rows, np.arange(3))
    assert batch.captions.tokens.shape == (3, pretrained_text.LENGTH, 16)
    assert batch.captions.tokens.dtype == np.float32
    np.testing.assert_array_equal(batch.captions.tokens[0], batch.captions.tokens[2])
    expected = pretrained_text.encode(folder, [adapted.train.captions.texts[3]])
    np.testing.assert_allclose(batch.captions.pooled[0], expected.pooled[0], atol=2e-3)
    assert adapted.test.first(2).captions.texts == adapted.test.captions.texts[:2]

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(pretrained_text, "encode", never)
    again = pretrained_text.with_features(folder, data)
    np.testing.assert_array_equal(again.train.rows(rows).captions.mask, batch.captions.mask)


def test_a_generation_model_is_trained_on_pretrained_features(folder, launch, tmp_path):
    names = ["red", "blue", "green"]
    for number in range(30):
        shade = np.eye(3, dtype=np.uint8)[number % 3] * 200 + 20
        pixels = np.broadcast_to(shade, (16, 16, 3)).astype(np.uint8)
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        from PIL import Image

        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"a {names[number % 3]} circle")
    data = f"--config.data=folder:{tmp_path / 'images'}"
    for part in ("text_encoder", "autoencoder"):
        result = launch(f"--experiment={part}_shapes", "--debug", data)
        assert result.returncode == 0, result.stderr
    result = launch(
        "--experiment=generator_shapes", "--debug", data, f"--config.task.pretrained={folder}",
        f"--config.task.text_encoder={tmp_path}/runs/text_encoder_shapes-debug",
        f"--config.task.autoencoder={tmp_path}/runs/autoencoder_shapes-debug",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "captions with" in result.stderr
    result = launch(
        "--mode=sample", "--experiment=generator_shapes", "--debug", "--prompt=a red circle",
        "--num_samples=2", f"--out={tmp_path / 'out.npz'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_an_encoder_is_loaded_again_only_if_its_files_change(folder, tmp_path):
    path = tmp_path / "encoder"
    shutil.copytree(folder, path)
    first = pretrained_text.load_encoder(str(path))
    assert pretrained_text.load_encoder(str(path)) is first
    change_json(path / "config.json", hidden_act="relu")
    second = pretrained_text.load_encoder(str(path))
    assert second is not first
    assert second[1].config.hidden_act == "relu"


def test_a_dropped_caption_has_the_features_of_the_empty_caption(folder):
    encoder = PretrainedEncoder(folder, pretrained_text.width_of(folder))
    assert encoder.width == 16
    prepared = encoder.prepare(TEXTS)
    dropped = encoder.drop(jax.tree.map(jnp.asarray, prepared), jnp.array([True, False, False]))
    context = encoder.encode({}, dropped)
    assert not context.mask[0].any()
    assert not context.pooled[0].any()
    np.testing.assert_array_equal(context.mask[1:], prepared.mask[1:])
    np.testing.assert_array_equal(context.pooled[1:], prepared.pooled[1:])
    data = loader.load("shapes")
    small = data._replace(
        train=data.train.first(4), validation=data.validation.first(4), test=data.test.first(4)
    )
    texts = encoder.texts(encoder.prepare_data(small).test, 3)
    assert texts == BytesEncoder(DualEncoder(length=data.caption_length)).texts(data.test, 3)


def test_features_are_stacked_as_images_are():
    data = loader.load("shapes")
    train = data.train.first(12)
    features = pretrained_text.Features(
        np.ones((12, 5, 3)), np.ones((12, 5), bool), np.ones((12, 3))
    )
    captions = pretrained_text.EncodedCaptions(["a"] * 12, features, np.arange(12))
    batch = next(batches.training_batches(train._replace(captions=captions), 0, 4, [(0, 2)], 2))
    assert batch.images.shape == (2, 4, *data.shape)
    assert batch.captions.tokens.shape == (2, 4, 5, 3)
    assert batch.captions.mask.shape == (2, 4, 5)


def test_features_are_computed_in_parts_and_cached(monkeypatch):
    encoded = []

    def encode(name, texts):
        encoded.extend(texts)
        size = np.array([len(text) for text in texts])
        tokens = np.broadcast_to(size[:, None, None], (len(texts), 4, 3)).astype(np.float16)
        return pretrained_text.Features(tokens, np.ones((len(texts), 4), bool), tokens[:, 0])

    monkeypatch.setattr(pretrained_text, "encode", encode)
    monkeypatch.setattr(pretrained_text, "PART", 2)
    data = loader.load("shapes")
    data = data._replace(
        train=data.train.first(5), validation=data.validation.first(2), test=data.test.first(3)
    )
    for _ in range(2):
        captions = pretrained_text.with_features("an encoder of a test", data).train.captions
        lengths = [len(text) for text in captions.texts]
        np.testing.assert_array_equal(captions[np.arange(5)].pooled[:, 0], lengths)
    assert len(encoded) == len(set(encoded)) == 10  # each of 5 + 2 + 3 captions once


def test_an_endless_data_set_and_a_missing_directory_raise_a_user_error(folder):
    with pytest.raises(UserError, match="needs a finite data set"):
        pretrained_text.with_features(folder, loader.load("shapes"))
    for name in ("/nowhere/at/all", "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match="there is no such directory"):
            pretrained_text.load_encoder(name)


def test_a_hub_that_does_not_answer_raises_a_user_error_within_5_seconds(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        for name in ("google-t5/t5-small", "no name of the hub"):
            begun = time.monotonic()
            with pytest.raises(UserError, match=r"is not in the cache, and the hub .* does not"):
                pretrained_text.load_encoder(name)
            assert time.monotonic() - begun < 5


# The name of an encoder may come from the record of an untrusted run: no code is executed.

CLASSES = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig):
    model_type = "evil"
class Model(BertModel):
    config_class = Config
class Tokenizer(BertTokenizer):
    pass
"""


class Attack:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return open, (self._marker, "w")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_code(path, model_type):
    """Refer to custom classes in the files of an encoder, for a known or an unknown model type."""
    named = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    tokenizer = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    change_json(path / "config.json", auto_map={**named, **tokenizer}, model_type=model_type)
    change_json(path / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tokenizer")


def pickled(path, marker):
    (path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "vocab.pkl"):
        (path / name).write_bytes(pickle.dumps({"weight": Attack(marker)}))


def pickled_by_another_name(path, marker):
    (path / "model.safetensors").write_bytes(pickle.dumps({"weight": Attack(marker)}))


@pytest.mark.parametrize(
    "attack",
    [
        lambda path, marker: with_code(path, "evil"),
        lambda path, marker: with_code(path, "bert"),
        pickled,
        pickled_by_another_name,
        lambda path, marker: change_json(path / "config.json", attn_implementation="evil/kernel"),
    ],
    ids=["code", "code-of-a-known-type", "pickle", "pickle-as-safetensors", "kernel"],
)
def test_no_code_of_an_encoder_is_executed(folder, tmp_path, monkeypatch, attack):
    """The user may answer "y" to every prompt of `transformers`."""
    path, marker = tmp_path / "run" / "encoder", tmp_path / "marker"
    shutil.copytree(folder, path)
    (path / "evil.py").write_text(CLASSES.format(marker=str(marker)))
    attack(path, str(marker))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    try:
        pretrained_text.encode(str(path), TEXTS)
    except UserError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017
    assert not marker.exists()


def test_the_attacks_succeed_where_code_is_trusted(folder, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    path, marker = tmp_path / "encoder", tmp_path / "marker"
    shutil.copytree(folder, path)
    (path / "evil.py").write_text(CLASSES.format(marker=str(marker)))
    with_code(path, "evil")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    transformers.AutoConfig.from_pretrained(str(path))
    assert marker.exists()
