"""A pretrained text encoder, tried with one that is made here; needs torch and transformers."""

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
    """A tiny BERT with a word a token, saved as a hub's models are."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    place = tmp_path_factory.mktemp("encoder")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red circle two blue squares above green triangle"
    (place / "vocab.txt").write_text("\n".join(words.split()))
    config = transformers.BertConfig(
        vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(place)
    transformers.BertTokenizerFast(str(place / "vocab.txt")).save_pretrained(place)
    return str(place)


def test_features_do_not_depend_on_the_batch_and_padding_is_none(folder):
    together = pretrained_text.encode(folder, TEXTS)
    assert together.tokens.shape == (3, pretrained_text.LENGTH, 16)
    assert together.mask.sum(1).tolist() == [5, 0, 9]  # with a token at either end
    assert not together.pooled[1].any()  # an empty text has no features
    for row, text in enumerate(TEXTS):
        alone = pretrained_text.encode(folder, [text])
        mask = alone.mask[0]
        np.testing.assert_allclose(alone.tokens[0][mask], together.tokens[row][mask], atol=2e-3)
        np.testing.assert_allclose(alone.pooled[0], together.pooled[row], atol=2e-3)


def test_a_data_sets_captions_are_read_once(folder, monkeypatch):
    data = loader.load("shapes")
    data = splits.with_validation(data, 0)
    data = data._replace(train=data.train.first(20), test=data.test.first(5))
    found = pretrained_text.encoded(folder, data)
    rows = np.array([3, 0, 3])
    batch = batches.batch_of(found.train, rows, np.arange(3))
    assert batch.captions.tokens.shape == (3, pretrained_text.LENGTH, 16)
    assert batch.captions.tokens.dtype == np.float32
    np.testing.assert_array_equal(batch.captions.tokens[0], batch.captions.tokens[2])
    expected = pretrained_text.encode(folder, [found.train.captions.texts[3]])
    np.testing.assert_allclose(batch.captions.pooled[0], expected.pooled[0], atol=2e-3)
    assert found.test.first(2).captions.texts == found.test.captions.texts[:2]

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(pretrained_text, "encode", never)
    again = pretrained_text.encoded(folder, data)
    np.testing.assert_array_equal(again.train.rows(rows).captions.mask, batch.captions.mask)


def test_a_generation_model_is_trained_on_it(folder, launch, tmp_path):
    names = ["red", "blue", "green"]
    for number in range(30):
        shade = np.eye(3, dtype=np.uint8)[number % 3] * 200 + 20
        pixels = np.broadcast_to(shade, (16, 16, 3)).astype(np.uint8)
        place = tmp_path / "images" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        from PIL import Image

        Image.fromarray(pixels).save(place)
        place.with_suffix(".txt").write_text(f"a {names[number % 3]} circle")
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


def test_an_encoder_is_loaded_once_until_its_folder_changes(folder, tmp_path):
    place = tmp_path / "encoder"
    shutil.copytree(folder, place)
    first = pretrained_text.load_encoder(str(place))
    assert pretrained_text.load_encoder(str(place)) is first
    changed(place / "config.json", hidden_act="relu")
    second = pretrained_text.load_encoder(str(place))
    assert second is not first
    assert second[1].config.hidden_act == "relu"


def test_a_batch_holds_features_whose_dropped_captions_are_empty(folder):
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
    texts = encoder.texts(encoder.adapt(small).test, 3)
    assert texts == BytesEncoder(DualEncoder(length=data.caption_length)).texts(data.test, 3)


def test_features_are_stacked_as_images_are():
    data = loader.load("shapes")
    train = data.train.first(12)
    features = pretrained_text.Features(
        np.ones((12, 5, 3)), np.ones((12, 5), bool), np.ones((12, 3))
    )
    captions = pretrained_text.Encoded(["a"] * 12, features, np.arange(12))
    batch = next(batches.training_batches(train._replace(captions=captions), 0, 4, [(0, 2)], 2))
    assert batch.images.shape == (2, 4, *data.shape)
    assert batch.captions.tokens.shape == (2, 4, 5, 3)
    assert batch.captions.mask.shape == (2, 4, 5)


def test_features_are_kept_a_part_at_a_time_and_read_once(monkeypatch):
    asked = []

    def encode(name, texts):
        asked.extend(texts)
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
        found = pretrained_text.encoded("an encoder of a test", data).train.captions
        lengths = [len(text) for text in found.texts]
        np.testing.assert_array_equal(found[np.arange(5)].pooled[:, 0], lengths)
    assert len(asked) == len(set(asked)) == 10  # each of the 5, 2 and 3 once


def test_an_endless_set_and_a_missing_encoder_are_one_line(folder):
    with pytest.raises(UserError, match="has no end"):
        pretrained_text.encoded(folder, loader.load("shapes"))
    for name in ("/nowhere/at/all", "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match="there is no such folder"):
            pretrained_text.load_encoder(name)


def test_a_hub_that_does_not_answer_is_one_line_within_five_seconds(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, answers none
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        for name in ("google-t5/t5-small", "no name of the hub"):
            begun = time.monotonic()
            with pytest.raises(UserError, match=r"is not in the cache, and the hub .* does not"):
                pretrained_text.load_encoder(name)
            assert time.monotonic() - begun < 5


# A folder or a name of a stranger's run record: nothing in it is executed.

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
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return open, (self._marker, "w")


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_code(place, model_type):
    """Custom classes of all kinds, for a known or for an unknown kind of model."""
    named = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    tokenizer = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    changed(place / "config.json", auto_map={**named, **tokenizer}, model_type=model_type)
    changed(place / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tokenizer")


def pickled(place, marker):
    (place / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "vocab.pkl"):
        (place / name).write_bytes(pickle.dumps({"weight": Attack(marker)}))


def pickled_by_another_name(place, marker):
    (place / "model.safetensors").write_bytes(pickle.dumps({"weight": Attack(marker)}))


@pytest.mark.parametrize(
    "attack",
    [
        lambda place, marker: with_code(place, "evil"),
        lambda place, marker: with_code(place, "bert"),
        pickled,
        pickled_by_another_name,
        lambda place, marker: changed(place / "config.json", attn_implementation="evil/kernel"),
    ],
    ids=["code", "code-of-a-known-kind", "pickle", "pickle-as-safetensors", "kernel"],
)
def test_no_code_of_an_encoder_is_executed(folder, tmp_path, monkeypatch, attack):
    """It may lie in a stranger's run directory, and whoever runs it may answer "y" to all."""
    place, marker = tmp_path / "run" / "encoder", tmp_path / "marker"
    shutil.copytree(folder, place)
    (place / "evil.py").write_text(CLASSES.format(marker=str(marker)))
    attack(place, str(marker))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    try:
        pretrained_text.encode(str(place), TEXTS)
    except UserError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017
    assert not marker.exists()


def test_the_attacks_succeed_where_code_is_trusted(folder, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    place, marker = tmp_path / "encoder", tmp_path / "marker"
    shutil.copytree(folder, place)
    (place / "evil.py").write_text(CLASSES.format(marker=str(marker)))
    with_code(place, "evil")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    transformers.AutoConfig.from_pretrained(str(place))
    assert marker.exists()
