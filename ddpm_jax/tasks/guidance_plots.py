"""Plots of metrics by guidance scale."""

from collections.abc import Mapping

import numpy as np

from ddpm_jax import plots


def guidance_plots(
    curve: Mapping[float, Mapping[str, float]], features: str
) -> dict[str, np.ndarray]:
    """Return plots of the Frechet distance against the CLIP score and against alignment.

    Each point of a curve is one guidance scale. If there is no Frechet distance, no plot is made.

    Args:
      curve: The metrics by name, for each guidance scale.
      features: The name of the network whose features the distance is computed in.
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
