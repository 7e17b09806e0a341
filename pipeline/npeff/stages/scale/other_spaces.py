"""Scales of a path without the model: of the distance of inputs, and of Gaussian textures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npeff.input_fisher.path import Curve, FisherPath
from npeff.models.loaded import LoadedModel
from npeff.perception.gaussian_texture import SpectrumPath
from npeff.perception.image_spectrum import image_spectrum
from npeff.perception.matching import area_matching_score
from npeff.perception.scales import perceptual_scale
from npeff.tasks import TaskError

Information = Callable[[NDArray[np.float64]], NDArray[np.float64]]

_NODES = 4
"""Quadrature nodes of a step."""
_LEVELS = 100
"""Steps of s at which two scales are compared."""


def measured(information: Information, points: int, distance: float) -> FisherPath:
    """Return the path with this information about s.

    Args:
        information: Function of positions (n,).
        points: Number of equal steps.
        distance: Distance of the ends; NaN if it is not known.
    """
    levels_n = np.linspace(0.0, 1.0, points + 1)
    scale = perceptual_scale(lambda s: information(s.ravel()).reshape(s.shape), levels_n, n_nodes=_NODES)
    return FisherPath(levels_n, information(levels_n), scale.psi_n, scale.length, scale.length, distance, True)


def of_inputs(curve: Curve, points: int) -> FisherPath:
    """Return the path in the Euclidean metric of the inputs."""

    def information(s_n: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = curve.points(s_n)[1].double().flatten(1).square().sum(1).cpu().numpy()
        return found

    ends, _ = curve.points(np.array([0.0, 1.0]))
    return measured(information, points, float((ends[1] - ends[0]).double().norm()))


def of_images(curve: Curve, shape: tuple[int, int, int], points: int) -> FisherPath | None:
    """Return the path between Gaussian textures with the spectra and the means of the images at the ends.

    Args:
        curve: The curve of inputs.
        shape: Height, width and channels of the images.
        points: Number of equal steps.

    Returns:
        The path; None if an image has the same value everywhere, so that it has no spectrum.
    """
    ends = curve.points(np.array([0.0, 1.0]))[0].double().cpu().numpy().reshape(2, *shape).transpose(0, 3, 1, 2)
    try:
        first, second = (image_spectrum(image) for image in ends)
    except ValueError:
        return None
    means = [float(image.mean()) for image in ends]
    return measured(SpectrumPath(first, second, *means).information, points, float("nan"))


def of_stimulus(loaded: LoadedModel, parameter: str, points: int) -> FisherPath:
    """Return the path of the stimulus parameter for an ideal observer, as the task gives it.

    Raises:
        TaskError: The task does not give it.
    """
    where = f"task {loaded.spec.task!r}: examples().stimulus_information"

    def information(s_n: ArrayLike) -> NDArray[np.float64]:
        positions = np.asarray(s_n, np.float64)
        with loaded.spec.user_code(loaded.task, "examples().stimulus_information"):
            found = loaded.examples.stimulus_information(parameter, positions.tolist())
            values_n = None if found is None else np.asarray(found, np.float64)
        if values_n is None:
            raise TaskError(
                f"{where}() gives no information about {parameter!r}: set scale.space to model or input, or add it to "
                "the task"
            )
        if values_n.shape != positions.shape or not (np.isfinite(values_n).all() and (values_n >= 0).all()):
            raise TaskError(f"{where}() must return one finite number of at least 0 for each of {len(positions)} s")
        return values_n

    return measured(information, points, float("nan"))


def compared(model: FisherPath, other: FisherPath) -> tuple[float | None, float | None]:
    """Return the area matching score of a predicted scale with that of the model, and their largest difference.

    Both are None if one of the paths has no scale, the score also if the scale of the model is a straight line.
    """
    s_n = np.linspace(0.0, 1.0, _LEVELS + 1)
    model_n, other_n = (np.interp(s_n, path.s_n, path.psi_n) for path in (model, other))
    if not (np.isfinite(model_n).all() and np.isfinite(other_n).all()):
        return None, None
    return area_matching_score(s_n, model_n, other_n), float(np.abs(model_n - other_n).max())
