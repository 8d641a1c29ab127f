"""A table of wrong inputs, each of which must cause an error of one line and exit code 2.

A row is (arguments, text) or (arguments, text, prepare): the line on stderr must match the regular
expression `text`, and `prepare(folder)` writes files to the working directory first. The rows run
in this process, one after another; tests that need a separate process are at the end.
"""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from ddpm_jax.config_records import to_record
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.feature_networks import INCEPTION
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.parallel import cluster
from helpers.data_sets import png, write
from helpers.launching import ROOT, expect_one_line, user_environment

PNG = png()
DIGITS = ("--experiment=vae_digits", "--debug")
DDPM = ("--experiment=ddpm_digits", "--debug")
NOISE = ("--experiment=noise_in_sampling", "--debug")
BETAS = ("--experiment=beta_vae_mnist", "--debug", "--config.base.data=digits:28")
GENERATOR = ("--experiment=generator_shapes", "--debug")
CHAIN = ("--experiment=text_to_image_shapes", "--debug")
TOGETHER = (*DIGITS, "--distributed")
LONG = "x" * 300


def weights(make):
    """Return a function that writes the file of Inception weights to a cache of the test."""

    def prepare(folder):
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # the fixture restores it
        path = folder / "cache" / "ddpm_jax" / INCEPTION
        path.parent.mkdir(parents=True)
        make(path)

    return prepare


def cut(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    os.truncate(path, 5_000)


truncated_weights = weights(cut)
other_weights = weights(lambda path: path.write_bytes(b"<html>not found</html>"))
weights_folder = weights(lambda path: path.mkdir())

# Flags and config fields.
FLAGS = [
    ([], "--experiment=NAME is missing; give one of autoencoder_shapes"),
    (["--experiment=vae_mnits"], 'no "vae_mnits"; did you mean "vae_mnist"'),
    (["--experiment="], "--experiment"),
    (["vae_mnist"], '"vae_mnist" is not a flag'),
    (["--experment=vae_mnist"], 'unknown flag "--experment"; did you mean "experiment"'),
    ([*DIGITS, "--mode=predict"], 'no "predict"'),
    ([*DIGITS, "--parallel=magic"], 'no "magic"'),
    ([*DIGITS, "--seed=seven"], "--seed=seven: must be a whole number"),
    ([*DIGITS, "--seed=1e3"], "--seed=1e3: must be a whole number"),
    (["--mode=sample", "--workdir=x", "--guidance=two"], "--guidance=two: must be a number"),
    ([*DIGITS, "--seed=-1"], "--seed=-1"),
    ([*DIGITS, "--debug=perhaps"], "--debug=perhaps: must be true or false"),
    ([*DIGITS, "--workdir"], "workdir"),
    (
        [*DIGITS, "--config.stepps=3"],
        'unknown field "--config.stepps"; did you mean --config.train.steps',
    ),
    ([*DIGITS, "--config.train.steps=three"], "--config.train.steps=three: must be a whole number"),
    ([*DIGITS, "--config.train.steps=0"], "--config.train.steps=0: must be at least 1"),
    ([*DIGITS, "--config.train.steps"], "needs a value"),
    ([*DIGITS, "--config.train.batch_size=-4"], "--config.train.batch_size=-4: must be at least 1"),
    ([*DIGITS, "--config.optimizer.learning_rate=nan"], "learning_rate=nan: .*finite"),
    (
        [*DIGITS, "--config.task.likelihood=poisson"],
        'likelihood: .*no "poisson".*bernoulli, gaussian',
    ),
    ([*DIGITS, "--config.task.network.hidden=32,x"], "must be a whole number"),
    ([*DIGITS, "--config.task.network.hidden="], "one value or more"),
    ([*DIGITS, "--config.optimizer.beta2=2"], "must be at most"),
    ([*DIGITS, "--config.data=prefetch"], 'no data set "prefetch"'),
    ([*DIGITS, "--seed=99999999999999999999"], "--seed="),
    ([*DIGITS, "--nodebug=1"], "nodebug"),
    ([*DIGITS, "--workdir="], "--workdir= is empty"),
    ([*DIGITS, "--config.task.info.shape=9,9,1"], "unknown field .*; --help lists the fields"),
    ([*DIGITS, "--config.task.info=9,9,1"], "task.info follows from the data set"),
    ([*DDPM, "--config.task.network.outputs=3"], "outputs follows from the data set"),
    ([*DIGITS, "--config.data=mnits"], 'no data set "mnits"; did you mean "mnist"'),
    ([*DIGITS, "--config.data=mnist"], "data set mnist is not prepared"),
    ([*DIGITS, "--config.data=kmnist"], "TFDS needs TensorFlow to prepare it"),
    ([*DIGITS, "--config.data=folder:/no/such"], 'no folder "/no/such"'),
    ([*DIGITS, "--config.data=digits:huge"], "size must be a number"),
    (
        [*DIGITS, "--config.task.network.conv=true", "--config.task.network.hidden=4,4,4,4"],
        "is not divisible by 16",
    ),
    ([*DIGITS, "--workdir=/proc/nothing"], "cannot write to /proc/nothing"),
    (["--experiment=vae_fashion_mnist", "--debug"], "data set fashion_mnist is not prepared"),
    (["--mode=sample"], "needs --workdir=DIR or --experiment=NAME"),
    (["--mode=eval", "--experiment=vae_digits"], "no run in runs/vae_digits; train one"),
    (["--mode=sample", "--workdir=nowhere"], "no run in nowhere"),
    ([*DIGITS, "--num_samples=3"], "--num_samples has no effect without --mode=sample"),
    ([*DIGITS, "--split=validation"], "--split has no effect without --mode=eval"),
    (
        [*DIGITS, "--config.data.validation=1437"],
        "data.validation=1437: digits has 1437 training images",
    ),
    ([*DIGITS, "--config.data.validation=-1"], "must be at least 0"),
    (["--mode=sample", "--workdir=x", "--num_samples=0"], "--num_samples=0"),
    # Numbers out of range, and sizes that do not fit into memory.
    ([*DIGITS, "--config.train.batch_size=1e12"], "batch_size=1e12: must be at most 2,147,483,647"),
    ([*DIGITS, "--config.train.batch_size=2000000000"], "batch_size=2000000000.*GiB, and the"),
    (
        [*DIGITS, "--config.task.network.hidden=1e9"],
        "parameters, optimizer and averages of .* the memory has .* GiB",
    ),
    ([*DIGITS, "--config.task.network.hidden=1000000,1000000"], "the network is too large"),
    ([*DIGITS, "--config.task.network.latents=2147483647"], "the network is too large"),
    ([*DIGITS, "--config.optimizer.warmup_steps=1e30"], "must be at most 2,147,483,647"),
    ([*DIGITS, "--config.train.steps=" + "9" * 5000], "must be at most 2,147,483,647"),
    ([*DIGITS, "--config.train.log_every=9223372036854775808"], "must be at most 2,147,483,647"),
    ([*DIGITS, "--config.train.steps_per_call=1e9"], "steps_per_call=1000000000: is too large"),
    ([*DIGITS, "--config.task.eval_batch_size=2e9"], "eval_batch_size=2000000000: is too large"),
    ([*DIGITS, "--config.optimizer.learning_rate=1e308"], "that float32 holds"),
    ([*DIGITS, "--config.ema.half_life_images=1e-320"], "that float32 holds"),
    ([*DIGITS, "--config.ema.more_half_lives_images=1,1e39"], "that float32 holds"),
    ([*DDPM, "--config.task.evaluation.num_samples=1e12"], "must be at most 2,147,483,647"),
    (
        [*DDPM, "--config.task.evaluation.num_samples=2e9"],
        "num_samples=2000000000: the images would need",
    ),
    (
        [*DDPM, "--config.task.evaluation.num_samples_between=2e9"],
        "num_samples_between=2000000000: the images would need",
    ),
    ([*DDPM, "--config.task.network.channels=2000000000"], "the network is too large"),
    (
        [*DDPM, "--config.task.network=dit", "--config.task.network.depth=1e9"],
        "must be at most 1000",
    ),
    ([*DDPM, "--config.task.schedule.steps=1e12"], "must be at most 1e.06"),
    ([*DDPM, "--config.task.sampling.steps=1e7"], "must be at most 1e.06"),
    (
        ["--experiment=text_encoder_shapes", "--debug", "--config.task.hard_negatives=1e9"],
        "at most 1000",
    ),
    (
        [*CHAIN, "--config.generator.task.generator.network.channels=2000000000"],
        "the network is too large",
    ),
    (
        [*CHAIN, "--config.generator.train.batch_size=1e9"],
        "--config.generator.train.batch_size=1000000000: is too",
    ),
    (["--mode=sample", "--workdir=x", "--num_samples=99999999999"], "--num_samples=99999999999"),
    (["--mode=sample", "--workdir=x", "--steps=1000001"], "--steps=1000001"),
    (["--mode=sample", "--workdir=x", "--guidance=1e39"], r"--guidance=1e\+39: must be"),
    (["--mode=sample", "--workdir=x", "--guidance=nan"], "--guidance=nan: must be"),
    # Values that are only used after the training.
    ([*NOISE, "--config.samplers=ddim,nonsense"], 'samplers: there is no "nonsense"'),
    ([*NOISE, "--config.samplers=ddim:2"], "samplers=ddim:2: DDIM's eta must be between 0 and 1"),
    ([*NOISE, "--config.samplers=ancestral_learned"], "has not learned a variance"),
    (
        [*NOISE, "--config.steps=1001"],
        "--config.steps=1001: this run's schedule has 1000",
    ),
    (
        [*NOISE, "--config.model.task.sampling.guidance_model=nowhere"],
        "--config.model.task.sampling.guidance_model=.*nowhere: there is no run",
    ),
    (
        [*NOISE, "--config.model.task.evaluation.features=./nowhere"],
        "--config.model.task.evaluation.features=./nowhere: there is no finished run",
    ),
    (
        [*BETAS, "--config.values=1,1.00000001"],
        "values=1.0,1.00000001: two runs would share .*beta_1",
    ),
    ([*BETAS, "--config.values=2,1,2"], "two runs would share .*beta_2"),
    (
        [*BETAS, "--config.base.data.validation=2000"],
        "--config.base.data.validation=2000: digits:28 has 1437 training images",
    ),
    (
        [*BETAS, "--config.base.task.network.latents=2147483647"],
        "the network is too large",
    ),
    (
        [*CHAIN, "--config.autoencoder.train.batch_size=2e9"],
        "--config.autoencoder.train.batch_size=2000000000: is too large",
    ),
    (
        [*CHAIN, "--config.generator.task.evaluation.text_encoder=./nowhere"],
        "--config.generator.task.evaluation.text_encoder=.*nowhere: there is no finished run",
    ),
    ([*BETAS, "--config.values=1,-2"], "--config.values=-2: must be at least 0, as task.beta"),
    (
        [*BETAS, "--config.field=train.steps"],
        "--config.values=0.25: must be a whole number, as train.steps",
    ),
    ([*BETAS, "--config.field=nonsense"], "--config.field=nonsense: a run has no such field"),
    ([*BETAS, "--config.field=task.network"], "field=task.network: a run has no such field"),
    (
        [*BETAS, "--config.base.task.beta=3"],
        "--config.base.task.beta=3: each run takes this field from --config.values; ",
    ),
    ([*DIGITS, "--config.task=vae"], "several fields; .* as --config.task.network.latents=VALUE"),
    ([*BETAS, "--config.values=1e39"], "that float32 holds"),
    (
        [*DDPM, "--config.task.evaluation.features=/no/such"],
        "features=/no/such: there is no finished run of a class",
    ),
    (
        [*DDPM, "--config.task.evaluation.features=classifier_digit"],
        'no feature network "classifier_digit"; did you mean "classifier_digits"',
    ),
    ([*DDPM, "--config.task.evaluation.features=,"], "features=,: must be one value or more"),
    (
        [*DDPM, "--config.task.evaluation.features=inception"],
        "pt_inception.* is damaged or another file",
        truncated_weights,
    ),
    (
        [*DDPM, "--config.task.evaluation.features=inception"],
        "pt_inception.* is damaged or another file",
        other_weights,
    ),
    (
        [*DDPM, "--config.task.evaluation.features=inception"],
        "pt_inception.* cannot be read|another file",
        weights_folder,
    ),
    # Paths.
    ([*DIGITS, "--workdir=~nosuchuser/runs"], "there is no home directory of ~nosuchuser"),
    ([*DIGITS, "--data_dir=~nosuchuser"], "there is no home directory of ~nosuchuser"),
    ([*DIGITS, "--config.data=folder:~nosuchuser"], "there is no home directory of ~nosuchuser"),
    (
        [*DDPM, "--config.task.evaluation.features=~nosuchuser"],
        "there is no home directory of ~nosuchuser",
    ),
    (
        [*DDPM, "--config.task.sampling.guidance_model=~nosuchuser"],
        "there is no home directory of ~nosuchuser",
    ),
    (
        [*GENERATOR, "--config.task.text_encoder=~nosuchuser"],
        "there is no home directory of ~nosuchuser",
    ),
    (
        [*GENERATOR, "--config.task.pretrained=~nosuchuser"],
        "there is no home directory of ~nosuchuser",
    ),
    (["--mode=sample", "--workdir=~nosuchuser"], "there is no home directory of ~nosuchuser"),
    (["--mode=sample", "--workdir=x", "--out=~nosuchuser/a.png"], "no home directory"),
    (["--mode=sample", "--workdir=x", "--prompt_file=~nosuchuser"], "no home directory"),
    ([*DIGITS, f"--workdir={LONG}"], "File name too long"),
    ([*DIGITS, f"--workdir={'a/' * 3000}"], "File name too long"),
    ([*DIGITS, f"--data_dir={LONG}"], "File name too long"),
    ([*DIGITS, f"--config.data=folder:{LONG}"], "File name too long"),
    ([*DDPM, f"--config.task.evaluation.features={LONG}"], "File name too long"),
    ([*DDPM, f"--config.task.sampling.guidance_model={LONG}"], "File name too long"),
    (["--mode=eval", f"--workdir={LONG}"], "File name too long"),
    (["--mode=sample", "--workdir=x", f"--out={LONG}.png"], "File name too long"),
    (["--mode=sample", "--workdir=x", f"--prompt_file={LONG}"], "File name too long"),
    (["--mode=eval", "--workdir=\udcff"], "no run in"),
    ([*DIGITS, "--config.data=folder:\udcff"], "there is no folder"),
    (["--experiment=\udcff"], "--experiment: there is no"),
    # Processes.
    ([*TOGETHER, "--coordinator=foo"], "coordinator=foo: must be HOST:PORT"),
    ([*TOGETHER, "--coordinator=foo:99999"], "coordinator=foo:99999: must be HOST:PORT"),
    ([*TOGETHER, "--coordinator=:1234"], "coordinator=:1234: must be HOST:PORT"),
    ([*TOGETHER, "--coordinator=[::1:99"], "must be HOST:PORT, .* an IPv6 address in brackets"),
    ([*TOGETHER, "--coordinator=::1:99"], "must be HOST:PORT"),
    ([*TOGETHER, "--coordinator=http://foo:80"], "must be HOST:PORT"),
    ([*TOGETHER, "--coordinator=foo bar:80"], "must be HOST:PORT"),
    ([*TOGETHER, "--coordinator=foo:ssh"], "coordinator=foo:ssh: must be HOST:PORT"),
    ([*TOGETHER, "--num_processes=2", "--process_id=2"], "process_id=2: must be less than"),
    ([*TOGETHER, "--num_processes=1", "--process_id=7"], "process_id=7: must be less than"),
]

# A directory of a finished run: rows get its --workdir.
RUNS = [
    (["--experiment=vae_mnist", "--debug"], "holds a run of vae_digits, not of vae_mnist"),
    ([*DIGITS, "--config.task.network.latents=3"], "task.network.latents was 2, is 3"),
    ([*DIGITS, "--seed=5"], "seed was 0, is 5"),
    ([*DIGITS, "--config.data=digits:16"], "data name was digits, is digits:16"),
    ([*DIGITS, "--config.train.steps=7"], "already at step 20"),
    (["--mode=sample", "--steps=10"], "--steps has no effect for this run"),
    (["--mode=sample", "--guidance=2"], "--guidance has no effect"),
    (["--mode=sample", "--out=x.jpg"], "must end in .png or .npz"),
    (["--mode=sample", "--out=no/x.png"], "there is no folder no"),
    (
        ["--mode=eval", "--config.task.network.latents=3"],
        "--config.task.network.latents cannot change after the run",
    ),
    (["--mode=eval", "--experiment=vae_mnist"], "holds a run of vae_digits"),
    (["--experiment=beta_vae_mnist", "--debug"], "holds a run of vae_digits, not of beta_vae"),
    (["--mode=sample", "--num_samples=2147483647"], "num_samples=2147483647: the images would"),
    (
        [*DDPM, "--config.task.evaluation.features=classifier_digits"],
        "holds a run of vae_digits, not of ddpm_digits",
    ),
    ([*NOISE], "holds a run of vae_digits, not of noise_in_sampling"),
]

DIGITS_DATA = {"name": "digits", "title": "x", "shape": [8, 8, 1], "levels": 17}

# A run's config.json with values changed, or another text: the expected error.
DAMAGED = [
    ({"seed": "0"}, "config.json is damaged"),
    ({"seed": -1}, "the seed must be between 0"),
    ({"seed": 10**30}, "the seed must be between 0"),
    ({"debug": "yes"}, "the value of debug has a wrong type"),
    ({"data_dir": ["a"]}, "the value of data_dir has a wrong type"),
    ({"data_dir": "a\0b"}, "the value of data_dir holds control characters"),
    ({"data_note": "\x1b[31m"}, "the value of data_note holds control characters"),
    ({"data": {}}, "the data has no name"),
    ({"data": {"name": 3, "title": "x"}}, "the value of data name has a wrong type"),
    (
        {"data": {"name": "digits", "title": "x", "shape": 8}},
        "the value of data shape has a wrong type",
    ),
    ({"data": {**DIGITS_DATA, "shape": [8, 8]}}, "the data shape must be three whole numbers"),
    (
        {"data": {**DIGITS_DATA, "shape": [0, 8, 1]}},
        "the data shape must be three whole numbers from 1",
    ),
    (
        {"data": {**DIGITS_DATA, "shape": [10**30, 8, 1]}},
        "the data shape must be .* from 1 to 2,147,483,647",
    ),
    ({"data": {**DIGITS_DATA, "levels": 1}}, "the data levels must be at least 2"),
    ({"data": {**DIGITS_DATA, "caption_length": -1}}, "the data caption_length must be at least 0"),
    ({"data": {"name": "digits", "title": "x", "classes": [1]}}, "classes are not strings"),
    ({"config": {"train.steps": "20"}}, "its train.steps must be a whole number"),
    ({"config": {"train.steps": True}}, "its train.steps must be a whole number"),
    ({"config": {"train.steps": None}}, "its train.steps must be a whole number"),
    ({"config": {"task.network.latents": -1}}, "its task.network.latents must be at least 1"),
    ({"config": {"task.network.latents": 10**30}}, "its task.network.latents must be at most"),
    (
        {"config": {"optimizer.learning_rate": float("nan")}},
        "its optimizer.learning_rate must be a finite number",
    ),
    ({"config": {"optimizer.learning_rate": [1]}}, "its optimizer.learning_rate must be a number"),
    ({"config": {"task.network.hidden": 32}}, "its task.network.hidden must be a list"),
    ({"config": {"task.likelihood.type": "poisson"}}, "its task.likelihood must .* one of"),
    ({"config": {"task.likelihood": []}}, "its task.likelihood must .* one of"),
    ({"config": {"task.likelihood": {"std": None}}}, "its task.likelihood must .* one of"),
    ({"config": {"task.network": 3}}, "its task.network must be a section"),
    ({"config": {"train": None}}, "its train must be a section"),
    ({"config": {"optimizer.lr_schedule": "linear"}}, "its optimizer.lr_schedule must be one of"),
    ({"config": {"data.name": "a\nb"}}, "its data.name must be a text without control"),
    ({"config": {"nonsense": 1}}, "unknown config fields: nonsense"),
    ({"config": {"task.network.nonsense": 1}}, "unknown config fields: task.network.nonsense"),
    ({"config": {"task.likelihood.nonsense": 1}}, "unknown config .*: task.likelihood.nonsense"),
    ({"format": 1}, "has format 1, and commit .* train again in another --workdir"),
    ({"format": 3}, "has format 3, and this version reads format 2"),
    ({"part": "beta_4"}, "has no such part|part was beta_4"),
    ({"part": 3}, "the value of part has a wrong type"),
    ("", "config.json is damaged"),
    ("[]", "config.json is damaged"),
    ("[" * 100_000, "config.json is damaged"),
    ('{"seed": ' + "9" * 5000 + "}", "config.json is damaged"),
    (
        '{"format": 2, "seed": 0, "seed": 1, "experiment": "vae_digits", "config": {}, "data": {}}',
        "twice",
    ),
]

# The same for its summary.json.
DAMAGED_SUMMARIES = [
    ("[]", "the content is not a JSON object"),
    ("{}", "the value experiment is missing"),
    ("", "summary.json is damaged"),
    ("[" * 100_000, "summary.json is damaged"),
    ({"step": "20"}, "the value of step has a wrong type"),
    ({"parameters": None}, "the value of parameters has a wrong type"),
    ({"metrics": []}, "the value of metrics has a wrong type"),
    ({"metrics": {"test/loss": "x"}}, "the metric 'test/loss' is not a finite number"),
    ({"metrics": {"test/loss": float("nan")}}, "the metric 'test/loss' is not a finite number"),
]


def files(names, content=PNG):
    """Write image files into the folder `images`."""

    def make(folder):
        for name in names:
            write(folder / "images" / name, content)

    return make


def pipe(folder):
    """Make a folder with a named pipe that is called like an image."""
    (folder / "images").mkdir()
    os.mkfifo(folder / "images" / "a.png")


def table(name, *rows):
    """Write images and a file of captions; a row is an object or a line of text."""

    def make(folder):
        files(["0.png", "1.png", "2.png"])(folder)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        write(folder / "images" / name, "\n".join(lines).encode())

    return make


def texts(*captions):
    """Write images, each with its text file."""

    def make(folder):
        for number, caption in enumerate(captions):
            write(folder / "images" / f"{number}.png", png(number))
            write(folder / "images" / f"{number}.txt", caption.encode())

    return make


OWN = ("--experiment=vae_fashion_mnist", "--debug", "--config.data=folder:images")
CLASSIFIER = ("--experiment=classifier_digits", "--debug", "--config.data=folder:images")
TEXT = ("--experiment=text_encoder_shapes", "--debug", "--config.data=folder:images")

# Images and captions of the user.
DATA = [
    (OWN, 'no folder "images"; give an existing folder as --config.data=folder:PATH'),
    (OWN, "no images in .*images .supported endings", files(["a.txt"])),
    (OWN, r"no images in .*images .supported endings.*other endings: \.heic .2.", files(
        ["a.txt", "b.heic", "c/d.HEIC"])),
    (OWN, r"no images in .*images .supported endings.*other endings: \.ppm .1.", files(["a.ppm"])),
    (OWN, "no images in .*skipped 1 tables, such as labels.csv", files(["labels.csv"])),
    (OWN, "train2017 would be a class, but its name is like that of a split; rename",
     files(["train2017/a.png", "val2017/b.png"])),
    (OWN, "Test Set would be a class, but its name is like that of a split; rename",
     files(["Training Set/a/a.png", "Test Set/a/b.png"])),
    (OWN, "test_images would be a class, but its name is like that of a split",
     files(["train/a.png", "test_images/b.png"])),
    (OWN, "no images in .*images .supported endings",
     files([".a.png", ".b/c.png", "__MACOSX/d.png"])),
    (OWN, "no images in .*images.*not a regular file", pipe),
    (OWN, "none of the 2 images .* can be read: a.png .not an image",
     files(["a.png", "b.gif"], b"")),
    (OWN, "none of the 1 images .* can be read", files(["a.jpg"], b"<html>")),
    (OWN, "no folder .*images", lambda folder: write(folder / "images", b"a file")),
    (OWN, "no folder .*images", lambda folder: os.mkfifo(folder / "images")),
    ([*OWN[:2], "--config.data=folder:~nosuchuser/images"], "no home directory of ~nosuchuser"),
    ([*OWN[:2], "--config.data=folder:"], 'no folder ""'),
    ([*OWN[:2], "--config.data=folder:" + "a" * 5000], "File name too long"),
    (OWN, "2 folders of the validation split: valid, val",
     files(["train/a.png", "val/b.png", "valid/c.png"])),
    (OWN, "2 folders of the test split: test, testing",
     files(["train/a.png", "test/b.png", "testing/c.png"])),
    (OWN, "has val and test, but no folder train;", files(["test/a.png", "val/b.png"])),
    (OWN, "has dev, but no folder train;", files(["a/a.png", "dev/b.png"])),
    (OWN, "train and val are in .*birds; give folder:",
     files(["birds/train/a.png", "birds/val/b.png", "cats/train/c.png"])),
    (OWN, "birds has 2 folders of the test split: Test, test",
     files(["birds/train/a.png", "birds/test/b.png", "birds/Test/c.png"])),
    (TEXT, "has no captions.*; text-to-image needs", files(["0.png", "1.png", "2.png"])),
    (TEXT, "no captions", texts("", " ", "\n")),
    (TEXT, "no captions", texts("\ufeff", "\u2028", "\t")),
    (TEXT, "line 1: .*it has file_name, title",
     table("metadata.jsonl", {"file_name": "0.png", "title": "a"})),
    (TEXT, "line 2: .*it has path, text",
     table("metadata.jsonl", "", {"path": "0.png", "text": "a"})),
    (TEXT, "line 1: text must be a string, not 7",
     table("metadata.jsonl", {"file_name": "0.png", "text": 7})),
    (TEXT, "caption must be a string, not null",
     table("metadata.jsonl", {"file_name": "0.png", "caption": None})),
    (TEXT, r"prompt must be a string, not \[\]",
     table("metadata.jsonl", {"file_name": "0.png", "prompt": []})),
    (TEXT, "is outside of", table("metadata.jsonl", {"file_name": "../../0.png", "text": "a"})),
    (TEXT, "is outside of", table("metadata.jsonl", {"file_name": "/0.png", "text": "a"})),
    (TEXT, "is outside of",
     table("sub/metadata.jsonl", {"file_name": "..\\..\\0.png", "text": "a"})),
    (TEXT, "names no image of the folder",
     table("metadata.jsonl", {"file_name": "00.png", "text": "a"})),
    (TEXT, "names no image of the folder", table("sub/metadata.csv", "file_name,text", "0.png,a")),
    (TEXT, "metadata.jsonl, line 1: every line must be", table("metadata.jsonl", "[" * 100_000)),
    (TEXT, "metadata.jsonl, line 1: every line must be",
     table("metadata.jsonl", '{"file_name": "0.png", "text": "a"')),
    (TEXT, "it has file_name, label", table("metadata.csv", "file_name,label", "0.png,a")),
    (TEXT, "text must be a string, not null", table("metadata.csv", "file_name,text", "0.png")),
    (TEXT, "line 2: the row has 3 cells, .* put captions that contain commas in quotes",
     table("metadata.csv", "file_name,text", "0.png,a red, round thing")),
    (TEXT, "two columns have the same name: file_name, text, text",
     table("metadata.csv", "file_name,text, text", "0.png,a,b")),
    (TEXT, "it has file_name;text", table("metadata.csv", "file_name;text", "0.png;a")),
    (CLASSIFIER, "needs a data set with labels", files(["0.png", "1.png", "2.png"])),
    (CLASSIFIER, "none of the .* test images of .* has a class",
     files(["train/a/0.png", "train/b/1.png", "train/a/2.png", "test/3.png"])),
    (CLASSIFIER, "none of the .* train images of .* has a class",
     files(["train/0.png", "train/1.png", "test/a/3.png"])),
    ([*OWN[:2], "--config.data=captions"], 'no data set "captions"'),
    ([*OWN[:2], "--config.data=tfds:mnist"], 'no data set "tfds:mnist"'),
    ([*OWN[:2], "--config.data=../mnist"], "is a path, .*; give a folder of images as"),
    ([*OWN[:2], "--config.data=huggingface:mnist"], 'no data set "huggingface:mnist"'),
    ([*OWN[:2], "--config.data=mnist/a=1,b=2"], 'no data set "mnist/a=1,b=2"'),
    ([*OWN[:2], "--config.data=mnist",
     "--data_dir=~nosuchuser/data"], "no home directory of ~nosuchuser"),
]  # fmt: skip

# Directories and files of other programs, and paths that cannot hold a run.


def has(path, content="a text"):
    """Return a function that writes a file below a folder."""

    def prepare(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)

    return prepare


def has_folder(path):
    return lambda folder: (folder / path).mkdir(parents=True)


def has_pipe(path):
    return lambda folder: os.mkfifo(folder / path)


def has_link(path):
    """Return a function that makes a link to an existing file below a folder."""

    def prepare(folder):
        has("victim")(folder)
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(folder / "victim")

    return prepare


def has_dangling_link(path):
    return lambda folder: (folder / path).symlink_to("nowhere")


def has_arrays(path):
    return lambda folder: np.savez(folder / path, images=np.zeros(3))


HERE = [*DIGITS, "--workdir=run"]
SAMPLE_HERE = ["--mode=sample", "--workdir=run"]
PLACES = [
    (HERE, "run is not empty and holds no run .metrics.jsonl", has("run/metrics.jsonl")),
    (HERE, "run is not empty and holds no run .summary.json", has("run/summary.json")),
    (HERE, "run is not empty and holds no run .images", has("run/images/cat.jpg")),
    (HERE, "run is not empty and holds no run .thesis", has("run/thesis/chapter1.tex")),
    (HERE, "run is not empty and holds no run .images", has_folder("run/images")),
    (HERE, "run is not empty and holds no run .checkpoints", has("run/checkpoints/epoch1.pt")),
    (HERE, "run holds checkpoints but no config.json", has("run/checkpoints/3/model.pt")),
    (HERE, "config.json is damaged or was not written by", has("run/config.json", "{}")),
    (HERE, "config.json is damaged or was not written by", has("run/config.json", "[" * 9**5)),
    (HERE, "config.json is not a regular file", has_folder("run/config.json")),
    (SAMPLE_HERE, "config.json is not a regular file", has_folder("run/config.json")),
    (HERE, "run is a file; give a directory", has("run")),
    (HERE, "run holds other runs, such as one; give", has("run/one/config.json", "{}")),
    (HERE, "run is a link to nowhere, which does not exist", has_dangling_link("run")),
    ([*HERE, "--workdir=run/deeper"], "cannot (read|write)", has("run")),
    (HERE, "lock is a directory, but must be a file", has_folder("run/lock")),
    ([*DIGITS, r"--workdir=a\b"], "cannot store .* contains a backslash; give another --workdir"),
    ([*DIGITS, "--workdir=gs:/bucket"], "does not accept this path .*give another --workdir"),
    ([*DIGITS, "--workdir=run[0]"], "does not accept this path .*give another --workdir"),
    ([*DIGITS, "--workdir=" + os.fsdecode(b"\xff")], "not valid UTF-8; give another --workdir"),
    ([*DIGITS, "--workdir=" + "x" * 300], "File name too long"),
    ([*DIGITS, "--overwrite"], "--overwrite has no effect without --mode=sample"),
    ([*SAMPLE_HERE, "--guidance=nan"], "--guidance=nan: must be a finite number"),
    ([*SAMPLE_HERE, "--guidance=-inf"], "--guidance=-inf: must be a finite number"),
    ([*SAMPLE_HERE, "--guidance=1e999"], "--guidance=inf: must be a finite number"),
]

# Invalid output files of samples; rows get the --workdir of a run.
OUT = [
    (["--mode=sample", f"--out={name}"], says, *prepare)
    for name, says, *prepare in (
        ("cat.png", "exists and was not written by this program; give another", has("cat.png")),
        ("a.npz", "exists and was not written by this program", has_arrays("a.npz")),
        ("a.npz", "exists and was not written by this program", has("a.npz", "")),
        ("a.png", "a.png is a directory, not a file", has_folder("a.png")),
        ("a.npz", "a.npz is a pipe, not a file", has_pipe("a.npz")),
        ("a.png", "a.png is a link, not a file", has_link("a.png")),
        ("no/a.png", "there is no folder no"),
        ("cat/a.png", "cat is not a directory", has("cat")),
        ("/dev/null", "must end in .png or .npz"),
        ("x" * 300 + ".png", "File name too long"),
    )
]

# Faults of a run directory, made in a copy of a run.
FAULTS = [
    ([], "metrics.jsonl is a directory, but must be a file", has_folder("metrics.jsonl")),
    ([], "timing.jsonl is a directory", has_folder("timing.jsonl")),
    ([], "summary.json is a directory", has_folder("summary.json")),
    ([], "lock is neither a file nor a directory", has_pipe("lock")),
    ([], "images is a file, but must be a directory", has("images")),
    ([], "tensorboard is a file", has("tensorboard")),
    ([], "checkpoints is a file", has("checkpoints")),
    ([], "damaged is a file, but must be a directory", has("damaged")),
    ([], "summary.json is damaged .*remove that file", has("summary.json", '{"step": 20}')),
    (["--mode=eval"], "eval.json is a directory", has_folder("eval.json")),
    (["--mode=eval"], "images is a file", has("images")),
    (["--mode=sample"], "images is a file", has("images")),
    (["--mode=sample"], "checkpoints is a file", has("checkpoints")),
    (["--mode=sample"], "sampled.png is a directory", has_folder("images/sampled.png")),
    (["--mode=sample"], "config.json is not a regular file", has_pipe("config.json")),
]


def row_id(row):
    return ascii(" ".join(map(str, row[0])))[:120] or "nothing"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a finished tiny run."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, ROOT / "launch.py", *DIGITS, f"--workdir={workdir}"]
    subprocess.run(command, env=user_environment(), check=True, capture_output=True, timeout=240)
    return workdir


@pytest.mark.parametrize("row", [*FLAGS, *DATA, *PLACES], ids=row_id)
def test_a_wrong_input_is_an_error_of_one_line(launch_here, tmp_path, monkeypatch, row):
    arguments, says, *prepare = row
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])  # restored at the end
    for step in prepare:
        step(tmp_path)
    before = contents(tmp_path)
    expect_one_line(launch_here(*arguments), says)
    assert contents(tmp_path) == before


def contents(folder):
    """Return the content of every file below a folder, except empty files such as locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path: path.read_bytes() for path in files if path.stat().st_size}


@pytest.mark.parametrize("row", [*RUNS, *OUT], ids=row_id)
def test_a_wrong_input_about_a_run_is_an_error_of_one_line_and_changes_no_file(
    launch_here, trained, tmp_path, row
):
    arguments, says, *prepare = row
    for step in prepare:
        step(tmp_path)
    before = [contents(folder) for folder in (trained, tmp_path)]
    expect_one_line(launch_here(*arguments, f"--workdir={trained}"), says)
    assert [contents(folder) for folder in (trained, tmp_path)] == before


@pytest.mark.parametrize("row", FAULTS, ids=row_id)
def test_a_fault_of_a_run_directory_is_an_error_of_one_line(launch_here, trained, tmp_path, row):
    arguments, says, damage = row
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run" / word for word in says.split()[:1]):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    damage(tmp_path / "run")
    mode = arguments or [*DIGITS, "--config.train.steps=25"]
    expect_one_line(launch_here(*mode, "--workdir=run"), says)


def test_a_run_without_a_checkpoint_is_an_error_of_one_line(launch_here, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((trained / "config.json").read_bytes())
    result = launch_here("--mode=sample", "--workdir=run")
    expect_one_line(result, "no checkpoint in run yet")


def test_a_damaged_config_is_an_error_of_one_line(launch_here, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"experiment": "vae_')
    expect_one_line(launch_here("--mode=eval", "--workdir=run"), "config.json is damaged")


def rewrite(path, change):
    """Replace a JSON file by a text, or change values; values of "config" are named by paths."""
    if isinstance(change, dict):
        values = json.loads(path.read_text())
        fields = change.get("config", {})
        values |= {name: value for name, value in change.items() if name != "config"}
        for field, value in fields.items():
            *sections, name = field.split(".")
            functools.reduce(dict.__getitem__, sections, values["config"])[name] = value
        change = json.dumps(values)
    path.write_text(change)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("change", "says"), DAMAGED, ids=lambda value: ascii(value)[:60])
def test_a_record_with_invalid_values_is_an_error_of_one_line(
    launch_here, trained, tmp_path, change, says, mode
):
    (tmp_path / "run" / "checkpoints" / "20").mkdir(parents=True)
    shutil.copy(trained / "config.json", tmp_path / "run")
    rewrite(tmp_path / "run" / "config.json", change)
    arguments = DIGITS if mode == "train" else [f"--mode={mode}"]
    expect_one_line(launch_here(*arguments, "--workdir=run"), says)


@pytest.mark.parametrize(("change", "says"), DAMAGED_SUMMARIES, ids=lambda v: ascii(v)[:60])
def test_a_summary_with_invalid_values_is_an_error_of_one_line(
    launch_here, trained, tmp_path, change, says
):
    shutil.copytree(trained, tmp_path / "run")
    rewrite(tmp_path / "run" / "summary.json", change)
    expect_one_line(launch_here(*DIGITS, "--workdir=run"), says)


def test_a_feature_network_of_other_images_is_refused(launch_here, trained, tmp_path):
    result = launch_here(*DDPM, f"--config.task.evaluation.features={trained}")
    expect_one_line(result, "holds a run of vae_digits, which is not a classifier")
    run = tmp_path / "classifier"
    shutil.copytree(trained, run)
    record = json.loads((run / "config.json").read_text())
    config = to_record(load_experiment("classifier_digits").config)
    for data, says in (
        ({"shape": [28, 28, 1]}, "was trained on images of shape"),
        ({"classes": ["a", "b", "c"]}, "was trained on 3 classes, and the data set has 10"),
    ):
        data = {**record["data"], **data}
        other = {**record, "experiment": "classifier_digits", "config": config, "data": data}
        rewrite(run / "config.json", json.dumps(other))
        expect_one_line(launch_here(*DDPM, f"--config.task.evaluation.features={run}"), says)


def test_no_classifier_is_trained_for_a_directory_of_another_run(
    launch_here, trained, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for experiment, path in ((DDPM, "task"), (NOISE, "model.task")):
        features = f"--config.{path}.evaluation.features=classifier_digits"
        result = launch_here(*experiment, features, f"--workdir={trained}")
        expect_one_line(result, "holds a run of vae_digits")
    assert not list(tmp_path.glob("cache/ddpm_jax/feature_networks/*"))


def test_an_unknown_host_is_an_error_within_seconds(monkeypatch):
    monkeypatch.setattr(cluster, "RESOLVE_SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(UserError, match="no host of the name"):
        cluster.check_host("no.such.host.invalid:1234")
    assert time.monotonic() - begun < 5
    cluster.check_host("localhost:1234")
    cluster.check_host("[::1]:1234")


# Tests in a separate process.


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: jax finds no devices"),
        ({"JAX_PLATFORMS": "nonsense"}, "JAX_PLATFORMS=nonsense: jax finds no devices"),
        ({"JAX_PLATFORM_NAME": "nonsense"}, "JAX_PLATFORM_NAME=nonsense: jax finds no devices"),
        ({"XLA_FLAGS": "--xla_nonsense=1"}, "Unknown flag in XLA_FLAGS: --xla_nonsense=1"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=0"},
            "XLA_FLAGS: --xla_force_host_platform_device_count=0: must be from 1 to 1024",
        ),
        ({"JAX_NUM_CPU_DEVICES": "0"}, " variable JAX_NUM_CPU_DEVICES=0: must be from 1 to 1024$"),
        ({"JAX_NUM_CPU_DEVICES": "99999999"}, "JAX_NUM_CPU_DEVICES=99999999: must be from 1"),
        ({"JAX_NUM_CPU_DEVICES": "abc"}, "variable JAX_NUM_CPU_DEVICES=abc is not allowed"),
        ({"JAX_ENABLE_X64": "maybe"}, "variable JAX_ENABLE_X64=maybe is not allowed"),
        ({"JAX_DEBUG_NANS": ""}, "variable JAX_DEBUG_NANS= is not allowed"),
        (
            {"JAX_TRACER_ERROR_NUM_TRACEBACK_FRAMES": "x"},
            "^error: environment variable JAX_TRACER_ERROR_NUM_TRACEBACK_FRAMES=x is not allowed",
        ),
        ({"JAXTYPING_DISABLE": "perhaps"}, "variable JAXTYPING_DISABLE=perhaps is not allowed"),
        ({"JAX_DEFAULT_DEVICE": "zz"}, "variable JAX_DEFAULT_DEVICE=zz is not allowed"),
        ({"JAX_DISABLE_JIT": "1"}, "variable JAX_DISABLE_JIT=1 is for debugging jax"),
        ({"JAX_TRANSFER_GUARD": "disallow"}, "variable JAX_TRANSFER_GUARD=disallow is for debug"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_environment_variable_is_an_error_of_one_line(launch, environment, says):
    expect_one_line(launch(*DIGITS, **environment), says)


def shell(tmp_path, line, **environment):
    """Run a line of bash in which $LAUNCH is replaced by the command."""
    command = f"{sys.executable} {ROOT / 'launch.py'}"
    return subprocess.run(
        ["bash", "-c", line.replace("$LAUNCH", command)],
        cwd=tmp_path, env=user_environment(**environment), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("$LAUNCH --help | true; exit ${PIPESTATUS[0]}", "Broken pipe"),
        ("$LAUNCH --help > /dev/full", "No space left on device"),
        ("$LAUNCH --help >&-", "it is closed"),
    ],
)
def test_a_closed_or_full_standard_output_is_an_error_of_one_line(tmp_path, line, says):
    expect_one_line(shell(tmp_path, line), f"cannot write to standard output: {says}", code=1)


@pytest.mark.slow
def test_a_run_whose_output_streams_are_closed_writes_all_files(tmp_path):
    train = f"$LAUNCH {' '.join(DIGITS)} --workdir=run"
    result = shell(tmp_path, f"{train} >&-")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("stopped: cannot write to standard output")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 20
    result = shell(tmp_path, f"{train}2 2>&- >out; exit $?")
    assert result.returncode == 0
    assert (tmp_path / "run2" / "summary.json").exists()
    assert "images in" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_error_is_shown_in_any_encoding(launch, encoding):
    result = launch(
        "--experiment=va\u00e9\u4e2d", LC_ALL="C", PYTHONIOENCODING=encoding, PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )  # fmt: skip
    expect_one_line(result, "--experiment: there is no")


def is_caught(process, number):
    """Return True if a process has a handler for a signal."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def ctrl_c(tmp_path, arguments, word, signals, **environment):
    """Start a command, send signals after it wrote `word`; return (exit code, seconds, stderr)."""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "launch.py", *arguments],
            cwd=tmp_path, env=user_environment(**environment), stdout=log, stderr=log,
        )  # fmt: skip
    wait_for(tmp_path / "log", word, process)
    while process.poll() is None and not is_caught(process, signal.SIGTERM):  # training has started
        time.sleep(0.02)
    begun = time.monotonic()
    for number in signals:
        process.send_signal(number)
        wait_for(tmp_path / "log", "waiting for the current step", process, 2)
    code = process.wait(timeout=120)
    return code, time.monotonic() - begun, (tmp_path / "log").read_text()


def wait_for(path, word, process, seconds=90):
    begun = time.monotonic()
    while word not in path.read_text() and time.monotonic() - begun < seconds:
        if process.poll() is not None:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_the_program_while_it_compiles(tmp_path, first):
    slow = ["--config.task.evaluation.features=none", "--config.task.network.blocks=8"]
    slow += ["--config.task.network.multipliers=1,2"]
    arguments = ["--experiment=ddpm_digits", *slow]
    code, seconds, log = ctrl_c(
        tmp_path, arguments, "run directory: ", [first, signal.SIGINT],
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert code == 130, log
    assert seconds < 10
    assert "press Ctrl-C again to end at once" in log
    assert log.splitlines()[-1] == "interrupted: by Ctrl-C"
    assert "Traceback" not in log


def test_ctrl_c_ends_sampling_at_once(tmp_path, trained):
    arguments = ["--mode=sample", f"--workdir={trained}", "--num_samples=2000000", "--out=a.npz"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "launch.py", *arguments],
            cwd=tmp_path, env=user_environment(), stdout=log, stderr=log,
        )  # fmt: skip
    wait_for(tmp_path / "log", "image 64", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert (tmp_path / "log").read_text().splitlines()[-1] == "interrupted: by Ctrl-C"


@pytest.mark.parametrize(
    ("arguments", "says"), [FLAGS[1], ([*DIGITS, "--config.train.steps=0"], "1")]
)
def test_a_wrong_input_is_an_error_of_one_line_in_a_separate_process(launch, arguments, says):
    expect_one_line(launch(*arguments), says)
