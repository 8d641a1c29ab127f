"""Text to image: guidance between two captions, two generation models, and the command line."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import override, replace
from ddpm_jax.data import batches, loader
from ddpm_jax.data.types import info_of
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import run
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.types import Options, bind, build
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.text_encoder import SIZES
from ddpm_jax.parallel.sharding import make
from ddpm_jax.task import Request
from ddpm_jax.tasks.autoencoder import autoencoder_task, latents
from ddpm_jax.tasks.text_to_image import Parts, Prompts, clip_scores, text_to_image_task
from helpers.text import drawn

DATA = loader.load("shapes")
CODES = 12
EXPERIMENT = load_experiment("generator_shapes")
MODELS = {
    "unet": {},
    "dit": {"task.generator.network": "dit"},
    "autoregressive": {"task.generator": "autoregressive"},
}
NETWORK = dict(
    channels=8, multipliers=(1,), blocks=1, attention_sizes=(8,), head_channels=0,
    width=16, depth=1, heads=2,
)  # fmt: skip


def generator(model, net, codes=0, batch_size=32, times_per_image=1):
    """A small generation model of the experiment on the autoencoder `net`."""
    small = {f"task.generator.network.{name}": value for name, value in NETWORK.items()}
    small |= {"task.generator.times_per_image": times_per_image, "task.generator.sampling.steps": 4}
    config = override(EXPERIMENT.config, MODELS[model], small, EXPERIMENT.alternatives)
    settings = config.task.generator.bind(net, codes, "float32")
    return settings.build(latents(net, codes), batch_size)


@functools.cache
def system(model="unet", judged=False):
    """(task, params, fixed) of a small system whose every parameter is drawn.

    If `judged`, another dual encoder tells its figures.
    """
    codes = CODES if model == "autoregressive" else 0
    text = DualEncoder("tiny", DATA.caption_length, (8,), 16)
    net = Autoencoder(DATA.shape, (8, 8), 2)

    tokens, images = jnp.zeros((1, DATA.caption_length), jnp.uint8), jnp.zeros((1, *DATA.shape))

    def trained():
        task = autoencoder_task(net, 256, codes=codes)
        params, fixed = jax.jit(task.init)(jax.random.key(1), batch(2))
        keys = jax.random.split(jax.random.key(2), 16)
        loss = jax.jit(functools.partial(task.loss, train=True, gather=lambda a: a))
        for start in range(3):
            told = loss(params, fixed, batch(16, 16 * start), keys)
            fixed = task.update(fixed, told[2])
        read = drawn(text.init, tokens, images)
        return {"text": read, "autoencoder": {"params": params, "fixed": fixed}}

    def other():
        return text, drawn(text.init, tokens, images, seed=5)

    parts = Parts(
        text, latents(net, codes), lambda: jax.eval_shape(trained), trained,
        SIZES["tiny"].features, judge=other if judged else None,
    )  # fmt: skip
    task = text_to_image_task(
        generator(model, net, codes), parts, DATA.shape, DATA.levels,
        caption_dropout=0.5,
        prompts=Prompts(lambda split: {"single": ["a red circle"] * 3}, align, (2.0,), 4),
    )  # fmt: skip
    fixed = jax.eval_shape(task.init, jax.random.key(0), batch(2))[1]
    return task, drawn(lambda *some: task.init(*some)[0], batch(2)), task.load(fixed)


def align(images, prompts):
    return {"aligned": np.arange(len(images)) == 0}


def batch(size, start=0):
    rows = np.arange(start, start + size)
    return jax.tree.map(jnp.asarray, batches.batch_of(DATA.train, rows, np.arange(size)))


KEYS = jax.random.split(jax.random.key(7), 4)
PROMPT = "a small red circle above a blue square"


def draw(it, **request):
    task, params, fixed = it
    return np.asarray(task.sample(params, fixed, KEYS, Request(**request)))


SLOW = pytest.param("dit", marks=pytest.mark.slow)


@pytest.mark.parametrize("model", ["unet", SLOW, "autoregressive"])
def test_guidance_leads_from_the_empty_caption_to_the_prompt(model):
    it = system(model)
    conditional = draw(it, prompt=PROMPT, guidance=1.0)
    unconditional = draw(it, prompt="", guidance=1.0)
    assert conditional.shape == (4, *DATA.shape)
    assert np.abs(conditional - unconditional).max() > 1e-3
    np.testing.assert_allclose(
        draw(it, prompt=PROMPT, guidance=0.0), unconditional, atol=1e-4, rtol=0
    )
    # A negative prompt stands where the empty caption does.
    other = draw(it, prompt="two green triangles", guidance=1.0)
    negative = draw(it, prompt=PROMPT, negative_prompt="two green triangles", guidance=0.0)
    np.testing.assert_allclose(negative, other, atol=1e-4, rtol=0)


def test_training_drops_captions_and_evaluation_does_not():
    task, params, fixed = system()
    keys = jax.random.split(jax.random.key(3), 64)
    images, captions = (jnp.tile(a, (64, *[1] * (a.ndim - 1))) for a in batch(1)[::3])
    one = batch(64)._replace(images=images, captions=captions)
    none = one._replace(captions=jnp.zeros_like(one.captions))

    @functools.partial(jax.jit, static_argnums=3)
    def loss(params, fixed, batch, train):
        return task.loss(params, fixed, batch, keys, train=train, gather=None)[0]

    told, untold = (loss(params, fixed, some, False) for some in (one, none))
    assert np.abs(told - untold).min() > 0
    trained = loss(params, fixed, one, True)
    dropped = np.isclose(trained, untold, rtol=1e-4) & ~np.isclose(trained, told, rtol=1e-4)
    assert 16 < dropped.sum() < 48  # a half, by more than 4 deviations either way
    np.testing.assert_allclose(np.where(dropped, untold, told), trained, rtol=1e-3)


@pytest.mark.parametrize("model", ["unet", SLOW])
def test_several_draws_of_an_image_are_as_many_images(model):
    """The loss of an image is the mean of those of copies of it and its caption, at times apart."""
    of = functools.partial(generator, model, Autoencoder(DATA.shape, (8, 8), 2), 0)
    rng = np.random.default_rng(0)
    z, tokens, pooled = (rng.normal(size=size) for size in ((4, 8, 8, 2), (4, 5, 64), (4, 64)))
    mask = jnp.arange(5) < jnp.array([[5], [2], [0], [3]])
    z, told = jnp.float32(z), Context(jnp.float32(tokens), mask, jnp.float32(pooled))
    several, params = of(4, 2), drawn(of(4, 2).init, told)
    loss = jax.jit(several.loss, static_argnums=5)
    found, _ = loss(params, z, told, jnp.arange(4), KEYS, True)
    z_of_each, told_each = jax.tree.map(lambda a: a.repeat(2, 0), (z, told))
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(KEYS).reshape(-1)
    one = jax.jit(of(8, 1).loss, static_argnums=5)
    apart = jnp.array([0, 4, 1, 5, 2, 6, 3, 7])  # eighths of time
    each, _ = one(params, z_of_each, told_each, apart, keys, True)
    np.testing.assert_allclose(found, each.reshape(4, 2).mean(1), rtol=1e-4)
    assert np.ptp(each.reshape(4, 2), 1).min() > 1e-3
    # Evaluation sees an image once.
    once = jax.jit(of(4, 1).loss, static_argnums=5)
    evaluated = (params, z, told, jnp.arange(4), KEYS, False)
    np.testing.assert_allclose(loss(*evaluated)[0], once(*evaluated)[0], rtol=1e-6)


@pytest.mark.slow
def test_an_evaluation_tells_of_every_set_and_scale():
    task, params, fixed = system()
    data = DATA._replace(test=DATA.test.first(8))
    found = task.evaluate(params, fixed, data, split="test", seed=0, full=True, spread=make())
    for name in ("aligned", "aligned_single", "clip_score", "fd_text_encoder"):
        for scale in ("2",):
            assert f"guidance_{scale}/{name}" in found.metrics
        assert f"{name}" in found.metrics
    assert found.metrics["aligned_single"] == pytest.approx(1 / 3)
    assert found.about["drawn"] == 4
    quick = task.evaluate(params, fixed, data, split="test", seed=0, full=False, spread=make())
    assert "aligned" in quick.metrics
    task, params, fixed = system(judged=True)
    judged = task.evaluate(params, fixed, data, split="test", seed=0, full=False, spread=make())
    assert judged.metrics["loss"] == quick.metrics["loss"]
    assert judged.metrics["clip_score"] != quick.metrics["clip_score"]


def test_a_clip_score_is_not_negative_pair_by_pair():
    cosines = np.array([-0.5, 0.0, 0.25, 1.0], np.float32)
    np.testing.assert_allclose(clip_scores(cosines), [0, 0, 25, 100])


def test_flags_that_mean_nothing_are_told():
    codes = system("autoregressive")
    for flag, value in (("sampler", "ddim"), ("steps", 20), ("label", 1)):
        with pytest.raises(UserError, match=f"--{flag} means nothing to this run"):
            draw(codes, prompt="", **{flag: value})
    with pytest.raises(UserError, match="--label means nothing"):
        draw(system(), prompt="", label=1)
    with pytest.raises(UserError, match="give --prompt="):
        draw(system())
    with pytest.raises(UserError, match='no "dpm"'):
        draw(system(), prompt="", sampler="dpm")


def test_a_model_that_its_latents_or_its_noise_do_not_suit_is_one_line():
    parts = {"task.autoencoder_network": Autoencoder(channels=(8, 8), latent_channels=2)}
    eps = {"task.generator.prediction": "eps"}
    for fields, says in (
        (MODELS["autoregressive"], r"network\.codes=0: .* quantised autoencoder"),
        (eps, r"prediction=eps: .* eps determines nothing of the image"),
        (
            {**eps, "task.generator.sampling.steps": "1001"},
            r"sampling\.steps=1001: .* schedule has 1000 steps",
        ),
    ):
        config = override(EXPERIMENT.config, fields, parts, EXPERIMENT.alternatives)
        with pytest.raises(UserError, match=rf"^--config\.task\.generator\.{says}"):
            build(bind(config, info_of(DATA)))


def test_a_model_that_cannot_be_built_is_told_before_its_parts_are_trained(tmp_path):
    experiment = load_experiment("text_to_image_shapes")
    for fields, says in (
        ({"generator.task.generator": "autoregressive"}, "quantised autoencoder"),
        ({"generator.task.generator.network.channels": "6"}, "channels=6: must divide by 4"),
    ):
        config = override(experiment.config, fields, {}, experiment.alternatives)
        with pytest.raises(UserError, match=says):
            run.train(experiment, config, tmp_path / "run", Options())
        assert not (tmp_path / "run").exists()
    scaling = load_experiment("text_encoder_scaling")
    digits = replace(scaling.config, {"data.name": "digits"})
    with pytest.raises(UserError, match=r"data=digits: .* is known of shapes alone"):
        run.train(scaling, digits, tmp_path / "run", Options())


@pytest.mark.slow
def test_the_command_trains_three_parts_resumes_each_and_draws(launch, tmp_path):
    command = ("--experiment=text_to_image_shapes", "--debug")
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    workdir = tmp_path / "runs" / "text_to_image_shapes-debug"
    whole = json.loads((workdir / "summary.json").read_text())
    assert set(whole["parts"]) == {"text", "autoencoder", "generator"}

    # Each part cut off after its first checkpoint, in turn, ends as it did.
    for part in ("text", "autoencoder", "generator"):
        shutil.rmtree(workdir / part / "checkpoints" / "6")
        (workdir / part / "summary.json").unlink()
        again = launch(*command)
        assert again.returncode == 0, again.stderr
        assert again.stderr.count("resuming at step") == 1
        assert json.loads((workdir / "summary.json").read_text()) == whole

    sample = (*command, "--mode=sample", "--num_samples=2", "--steps=2")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n红色的圆 🔴\n", encoding="utf-8")
    for flags, count in (
        (["--prompt="], 2),
        (["--prompt=" + "a red circle " * 800], 2),
        (["--prompt=红色的圆 🔴"], 2),
        (["--prompt=a red circle", "--negative_prompt=a blue square", "--guidance=3"], 2),
        ([f"--prompt_file={prompts}"], 4),
    ):
        out = tmp_path / "out.npz"
        result = launch(*sample, *flags, f"--out={out}")
        assert result.returncode == 0, result.stderr
        assert np.load(out)["images"].shape == (count, 32, 32, 3)
        assert ("only the first" in result.stderr) == (len(flags[0]) > 1000)
    result = launch(*sample, "--prompt=a red circle", f"--out={tmp_path / 'out.png'}")
    assert result.returncode == 0, result.stderr
    for flags, says in (
        ([], 'give --prompt="..."'),
        (["--prompt=a", f"--prompt_file={prompts}"], "give one of them"),
        (["--prompt_file=nowhere"], "cannot be read"),
    ):
        result = launch(*sample, *flags)
        assert result.returncode == 2
        assert says in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
