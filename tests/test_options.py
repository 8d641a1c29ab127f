"""Error messages for options that are mistyped, contradict each other or have no effect."""

import json
import pathlib

import pytest

from ddpm_jax.data import loader
from ddpm_jax.errors import ConfigError, UserError
from ddpm_jax.experiment.effects import NO_EFFECT, start_with_user_field
from ddpm_jax.fields import FieldError, section
from helpers.launching import expect_one_line

DIGITS, DDPM = "--experiment=vae_digits --debug", "--experiment=ddpm_digits --debug"
WRONG = [
    # Frequent mistakes, whose messages state the right path.
    ("--batch_size=32", r"unknown flag .--batch_size.; give --config\.train\.batch_size=VALUE"),
    (f"{DIGITS} --learning_rate=1e-4", r"give --config\.optimizer\.learning_rate=VALUE"),
    (f"{DIGITS} --lr=1e-4", r"give --config\.optimizer\.learning_rate=VALUE"),
    (f"{DIGITS} --epochs=3", r"give --config\.train\.steps=VALUE"),
    (f"{DIGITS} --num_epochs=3", r"give --config\.train\.steps=VALUE"),
    (f"{DIGITS} --data=mnist", r"give --config\.data=VALUE"),
    (f"{DIGITS} --dataset=mnist", r"give --config\.data=VALUE"),
    (f"{DIGITS} --latents=3", r"give --config\.task\.network\.latents=VALUE"),
    (f"{DIGITS} --config steps=5", r"give --config\.train\.steps=5$"),
    (f"{DIGITS} --config=steps=5", r"give --config\.train\.steps=5$"),
    (f"{DIGITS} --config nonsense", r"give --config\.PATH=VALUE$"),
    (f"{DIGITS} --config.steps=5", r"did you mean --config\.train\.steps\?"),
    (f"{DIGITS} --config.train.setps=5", r"did you mean --config\.train\.steps\?"),
    (f"{DIGITS} --config.hidden=5", r"did you mean --config\.task\.network\.hidden\?"),
    (f"{DIGITS} --undefok=zzz --zzz=1", "--undefok: an unknown flag is always an error"),
    # Names of data sets.
    (f"{DIGITS} --config.data=/path/to/images", r"--config\.data=folder:/path/to/images$"),
    (f"{DIGITS} --config.data=./folder", r"--config\.data=folder:\./folder$"),
    (f"{DIGITS} --config.data=../x", r"--config\.data=folder:\.\./x$"),
    (f"{DIGITS} --config.data=~/images", r"--config\.data=folder:~/images$"),
    (f"{DIGITS} --config.data=Folder:x", r"--config\.data=folder:x$"),
    (f"{DIGITS} --config.data=MNIST", r"--config\.data=mnist$"),
    (f"{DIGITS} --config.data=Fashion-MNIST", r"--config\.data=fashion_mnist$"),
    (f"{DIGITS} --config.data=CIFAR-10", r"--config\.data=cifar10$"),
    (f"{DIGITS} --config.data=Digits", r"--config\.data=digits$"),
    # Fields of an alternative that was not chosen, and alternatives that do not exist.
    (f"{DDPM} --config.task.network.patch=2", r"give --config\.task\.network=dit, too"),
    (f"{DDPM} --config.task.network=dit --config.task.network.channels=8", "network=unet, too"),
    (f"{DDPM} --config.task.network=Unet", 'there is no "Unet"; did you mean "unet"'),
    (f"{DDPM} --config.task.schedule=cosine --config.task.schedule.steps=9", "unknown field|too"),
    (f"{DIGITS} --config.task=vae", "has several fields; set one of them"),
    (f"{DIGITS} --config.optimizer=sgd", 'there is no "sgd"; there are: adam, muon'),
    # Options without effect.
    (f"{DDPM} --config.task.conditional=false --config.task.sampling.guidance=2", "no effect"),
    (f"{DDPM} --config.task.sampling.guidance=1 --config.task.sampling.guidance_rescale=0.5",
     "no effect: guidance is disabled"),
    (f"{DDPM} --config.task.conditional=false --config.task.label_dropout=0.2", "no effect"),
    (f"{DDPM} --config.task.network.text_refiner_blocks=1",
     "no effect: the network reads no captions"),
    (f"{DDPM} --config.task.vlb_weight=2", "no effect: the variance is not learned"),
    ("--experiment=autoencoder_shapes --debug --config.task.commitment_weight=1", "no effect"),
    ("--experiment=autoencoder_shapes --debug --config.task.codes=8 --config.task.kl_weight=1",
     "no effect: a codebook has no KL"),
    (f"{DDPM} --config.task.network.attention_sizes=5", "no feature map has the side 5"),
    # Contradictions. The message begins with the field that the user has set.
    (f"{DDPM} --config.task.label_dropout=0", r"--config\.task\.label_dropout=0: the network is n"),
    (f"{DDPM} --config.task.network.head_channels=3", r"head_channels=3: must divide"),
    (f"{DDPM} --config.task.network.space_to_depth=3",
     r"--config\.task\.network\.space_to_depth=3: .*multipliers"),
    ("--experiment=vae_fashion_mnist --debug --config.data=digits --config.task.network.hidden="
     "4,4,4,4", r"--config\.task\.network\.hidden=4,4,4,4: the convolutional VAE halves"),
    (f"{DDPM} --config.task.schedule=cosine --config.task.variance=learned",
     r"--config\.task\.variance=learned: needs a table of betas"),
    (f"{DDPM} --config.task.times=importance --config.task.schedule=edm",
     r"--config\.task\.times=importance: needs a table of betas"),
    ("--experiment=vdm_digits --debug --config.task.logsnr_max=-9",
     r"--config\.task\.logsnr_max=-9.*must be less than"),
    ("--experiment=vdm_digits --debug --config.task.conditional=true "
     "--config.task.sampling.guidance=2", r"--config\.task\.sampling\.guidance.*never trained"),
    ("--experiment=generator_shapes --debug --config.task.caption_dropout=0", "no finished run"),
    # Feature networks and guidance models that do not exist.
    (f"{DDPM} --config.task.evaluation.features=runs/none", "no finished run of a classifier"),
    (f"{DDPM} --config.task.evaluation.features=classifier_digit", "did you mean .classifier_dig"),
    (f"{DDPM} --config.task.sampling.guidance_model=runs/none", "there is no run"),
    # Runs of one command with the same directory.
    ("--experiment=beta_vae_mnist --debug --config.base.data=digits --config.values=1,1.0",
     r"--config\.values=1\.0,1\.0: two runs would share the directory beta_1"),
    ("--experiment=text_encoder_scaling --debug --config.channels=8,8", "two runs would share"),
    ("--experiment=text_encoder_scaling --debug --config.text_sizes=tiny,tiny", "would share"),
    ("--experiment=text_encoder_scaling --debug --config.data=digits", "computed for shapes"),
    ("--experiment=text_to_image_shapes --debug --config.generator.task.text_encoder=runs/x",
     "trains the text encoder itself; leave the field out"),
    # Fields of a part are named as the user gives them.
    ("--experiment=text_to_image_shapes --debug --config.generator.task.generator=autoregressive",
     r"--config\.generator\.task\.generator\.network\.codes=0"),
    ("--experiment=beta_vae_mnist --debug --config.base.data=digits --config.base.train.batch_size="
     "1000000000000", r"--config\.base\.train\.batch_size"),
    ("--experiment=noise_in_sampling --debug --config.model.task.network.channels=6",
     r"--config\.model\.task\.network\.channels=6: must be a multiple of 4"),
    ("--experiment=noise_in_sampling --debug --config.samplers=ddmi", 'there is no "ddmi"'),
    ("--experiment=noise_in_sampling --debug --config.model.task.conditional=false", "every class"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_option_is_an_error_of_one_line(launch_here, arguments, message):
    result = launch_here(*arguments.split(" "))
    expect_one_line(result, message)
    assert not list(pathlib.Path("runs").glob("*/checkpoints/*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the directory of a conditional ddpm_digits, one step without label dropout."""
    import launch

    workdir = tmp_path_factory.mktemp("options") / "run"
    arguments = [
        *DDPM.split(), f"--workdir={workdir}", "--config.train.steps=1",
        "--config.task.label_dropout=0", "--config.task.sampling.guidance=1",
    ]  # fmt: skip
    assert launch.report(arguments) == 0
    return workdir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mode=sample --guidance=2", "--guidance=2: .*never trained without labels"),
        ("--mode=eval --seed=1", "--seed: an evaluation uses the seed of the run"),
        ("--mode=sample --profile", "--profile has no effect without --mode=train"),
        ("--mode=eval --wandb", "--wandb has no effect without --mode=train"),
        ("--mode=sample --strict_data", "--strict_data has no effect without --mode=train"),
        ("--mode=sample --data_dir=.", "sampling reads no data set"),
        ("--mode=sample --prompt_file=", "is empty: give a path"),
        ("--mode=eval --config.train.batch_size=3", "cannot change after the run in"),
        ("--mode=eval --config.task.network.channels=4", "cannot change after the run in"),
        ("--mode=sample --config.task.sampling.guidance_model=SELF", "the directory of this run"),
    ],
)
def test_an_option_without_effect_on_a_trained_run_is_refused(
    launch_here, trained, arguments, message
):
    words = [word.replace("SELF", str(trained)) for word in arguments.split(" ")]
    expect_one_line(launch_here(f"--workdir={trained}", *words), message)


def test_the_error_for_a_run_of_an_older_format_names_the_commit_that_reads_it(
    launch_here, tmp_path
):
    old = {"experiment": "vae_digits", "config": {"steps": 3}, "seed": 0, "data": {}}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    for flags in (["--mode=sample"], ["--mode=eval"], DIGITS.split()):
        result = launch_here(*flags, f"--workdir={tmp_path / 'old'}")
        expect_one_line(result, "has format 1, and commit [0-9a-f]{7} of this project was")
    (tmp_path / "old" / "config.json").write_text(json.dumps({**old, "format": 99}))
    result = launch_here("--mode=sample", f"--workdir={tmp_path / 'old'}")
    expect_one_line(result, "has format 99, and this version reads format 2")


def test_the_error_of_a_contradiction_begins_with_the_field_that_the_user_set():
    with pytest.raises(FieldError) as caught, section("network"):
        raise FieldError("heads=3: must divide the width", "width")
    error = ConfigError(
        f"--config.task.{caught.value}", *(f"task.{o}" for o in caught.value.others)
    )
    for set_by_user, beginning in (
        ({}, "--config.task.network.heads=3: must"),
        ({"task.network.heads": "3"}, "--config.task.network.heads=3: must"),
        ({"task.network.width": "4"}, "--config.task.network.width=4: --config.task.network.heads"),
    ):
        assert str(start_with_user_field(error, set_by_user)).startswith(beginning)


def test_every_field_that_may_have_no_effect_exists_in_an_experiment():
    from ddpm_jax.config import fields_of
    from ddpm_jax.experiment.registry import load_experiment, names

    paths = {field.path for name in names() for field in fields_of(load_experiment(name).config)}
    assert {idle.path for idle in NO_EFFECT} <= paths


@pytest.mark.parametrize(
    "name", ["digits", "digits:28", "folder:/a/b", "mnist", "shapes:64", "emoji"]
)
def test_a_valid_name_of_a_data_set_is_accepted(name):
    loader.check_name(name)


def test_a_name_unlike_every_data_set_is_an_error_of_tfds():
    with pytest.raises(UserError, match="there is no data set"):
        loader.load("zzzzzz")
