"""Small data sets of every kind, for tests: image files and sets in TFDS format."""

import io

import numpy as np
from PIL import Image


def png(seed=0, size=(8, 8)):
    """The content of a PNG file of random colours, [height, width]."""
    return encoded(Image.fromarray(pixels(seed, size)))


def pixels(seed=0, size=(8, 8), channels=3):
    """Random values, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def encoded(image, kind="PNG", **options):
    """The content of a file of a Pillow image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(path, content):
    """Write bytes to a file, with the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def picture(index, split="train", only=None, side=32):
    """(pixels in [-1, 1], scene) of an example of the set of shapes."""
    from ddpm_jax.data import shapes

    scene = shapes.scene(split, index, only)
    return shapes.render(scene, side) / np.float32(127.5) - 1, scene


def store(out, features, splits, name="strange", version="1.0.0"):
    """Write {split: examples} as a data set in TFDS format; images are bytes of files."""
    from ddpm_jax.data.tfds_builders import library

    tfds = library()
    with tfds.core.registered.skip_registration():

        class Local(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)

            def _info(self):
                everything = {"image": tfds.features.Image(), **features(tfds.features)}
                features_dict = tfds.features.FeaturesDict(everything)
                return tfds.core.DatasetInfo(builder=self, features=features_dict)

            def _split_generators(self, dl_manager):
                return {split: enumerate(map(opened, rows)) for split, rows in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError("each split above is its own generator")

    def opened(row):
        return {**row, "image": io.BytesIO(row["image"])}

    Local.name = name
    Local(data_dir=out, file_format="array_record").download_and_prepare()
    return out / name / version
