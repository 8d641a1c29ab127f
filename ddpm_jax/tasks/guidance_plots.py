"""Plots of the metrics of samples at several guidance scales."""

from collections.abc import Mapping

import numpy as np

from ddpm_jax import plots


def guidance_plots(
    curve: Mapping[float, Mapping[str, float]], features: str
) -> dict[str, np.ndarray]:
    """Return plots, by name, of the Frechet distance against the CLIP score and the alignment.

    Each point of a curve is one guidance scale. If the metrics contain no Frechet distance, the
    result is empty.

    Args:
      curve: The metrics by name for each guidance scale.
      features: The name of the feature network of the Frechet distance.
    """
    points = [curve[scale] for scale in sorted(curve)]
    distance = f"fd_{features}"
    if distance not in points[0]:
        return {}
    scales = [f"{scale:g}" for scale in sorted(curve)]
    distances = [point[distance] for point in points]
    label, title = f"Frechet distance ({features})", "By guidance scale"

    def plot(names: list[str], x_label: str) -> np.ndarray:
        lines = {name: ([p[name] for p in points], distances, scales) for name in names}
        return plots.paths(lines, (x_label, label), title)

    images = {"fd_against_clip_score": plot(["clip_score"], "CLIP score")}
    names = sorted(
        name
        for name in points[0]
        if name.startswith("aligned") and "_except_" not in name and not name.endswith("_error")
    )
    if names:
        images["fd_against_alignment"] = plot(names, "share aligned")
    return images
