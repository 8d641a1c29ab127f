"""Small data sets for tests: image files and data sets in TFDS format."""

import io

import numpy as np
from PIL import Image


def png(seed=0, size=(8, 8)):
    """Return the content of a PNG file of random colours; `size` is (height, width)."""
    return encoded(Image.fromarray(pixels(seed, size)))


def pixels(seed=0, size=(8, 8), channels=3):
    """Return random pixels, uint8 [height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def encoded(image, kind="PNG", **options):
    """Return the content of an image file of a Pillow image in the format `kind`."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(path, content):
    """Write bytes to a file, create its parent directories, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def shapes_example(index, split="train", only=None, side=32):
    """Return (pixels in [-1, 1], scene) of an example of `shapes`."""
    from ddpm_jax.data import shapes

    scene = shapes.scene(split, index, only)
    return shapes.render(scene, side) / np.float32(127.5) - 1, scene


def store(out, features, splits, name="strange", version="1.0.0"):
    """Write a data set in TFDS format and return its directory.

    Args:
      out: The directory of prepared data sets.
      features: A function of `tfds.features` that returns the features beside the image.
      splits: The examples of each split; an image is the content of an image file.
      name: The name of the data set.
      version: The version of the data set.
    """
    from ddpm_jax.data.tfds_builders import library

    tfds = library()
    with tfds.core.registered.skip_registration():

        class Local(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)

            def _info(self):
                all_features = {"image": tfds.features.Image(), **features(tfds.features)}
                features_dict = tfds.features.FeaturesDict(all_features)
                return tfds.core.DatasetInfo(builder=self, features=features_dict)

            def _split_generators(self, dl_manager):
                return {split: enumerate(map(opened, rows)) for split, rows in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError("_split_generators returns the examples of each split")

    def opened(row):
        return {**row, "image": io.BytesIO(row["image"])}

    Local.name = name
    Local(data_dir=out, file_format="array_record").download_and_prepare()
    return out / name / version
