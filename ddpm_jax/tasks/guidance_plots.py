"""Plots of metrics by the scale of guidance."""

from collections.abc import Mapping

import numpy as np

from ddpm_jax import plots


def guidance_plots(
    curve: Mapping[float, Mapping[str, float]], features: str
) -> dict[str, np.ndarray]:
    """Return plots of the Frechet distance against the CLIP score and alignment, by the scale.

    Args:
      curve: metrics by the scale of guidance.
      features: name of the network in whose features the distance is computed.
    """
    points = [curve[scale] for scale in sorted(curve)]
    distance = f"fd_{features}"
    if distance not in points[0]:
        return {}
    words = [f"{scale:g}" for scale in sorted(curve)]
    distances = [point[distance] for point in points]
    labels, title = f"Frechet distance ({features})", "By guidance scale"

    def path(names: list[str], x: str) -> np.ndarray:
        lines = {name: ([p[name] for p in points], distances, words) for name in names}
        return plots.paths(lines, (x, labels), title)

    images = {"fd_against_clip_score": path(["clip_score"], "CLIP score")}
    names = sorted(
        name
        for name in points[0]
        if name.startswith("aligned") and "_except_" not in name and not name.endswith("_error")
    )
    if names:
        images["fd_against_alignment"] = path(names, "share aligned")
    return images
