"""JSON observations to what a policy takes. Imports no torch."""

from typing import Any

import numpy as np
from gymnasium import spaces


class ObservationError(ValueError):
    """The observation does not fit the space; the text says where and what was expected."""


def stack(space: spaces.Space, observations: list[Any]) -> Any:
    """
    :param space: of one observation
    :param observations: as JSON gives them
    :return: array ``[batch, *shape]`` of the space's dtype, or a dictionary of them
    :raises ObservationError: one does not fit
    """
    if isinstance(space, spaces.Dict):
        for observation in observations:
            if not isinstance(observation, dict) or observation.keys() != space.spaces.keys():
                raise ObservationError(f"The observation must be an object with the keys {', '.join(space.spaces)}.")
        return {
            key: stack_array(part, [observation[key] for observation in observations], f" {key!r}")
            for key, part in space.spaces.items()
        }
    return stack_array(space, observations, "")


def stack_array(space: spaces.Space, observations: list[Any], name: str) -> np.ndarray:
    """
    :param space: of one observation, no ``Dict``
    :param observations: as JSON gives them
    :param name: for messages
    :return: array ``[batch, *shape]`` of the space's dtype
    :raises ObservationError: one does not fit
    """
    assert space.shape is not None
    expected = f"The observation{name} must be numbers of the shape {list(space.shape)}"
    try:
        values = np.array(observations)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ObservationError(f"{expected}; it has rows of different lengths.") from error
    if values.dtype.kind not in "iufb":
        raise ObservationError(f"{expected}; it has something else in it.")
    if values.shape[1:] != space.shape:
        raise ObservationError(f"{expected}, not {list(values.shape[1:])}.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ObservationError(f"{expected}, without NaN and infinity.")
    low, high = limits(space)
    if low is not None and ((values < low) | (values > high)).any():
        raise ObservationError(f"{expected} between {np.min(low)} and {np.max(high)}.")
    assert space.dtype is not None
    if np.issubdtype(space.dtype, np.integer) and values.dtype.kind == "f" and (values != np.floor(values)).any():
        raise ObservationError(f"{expected} without decimal places.")
    return values.astype(space.dtype)


def limits(space: spaces.Space) -> tuple[Any, Any]:
    """
    :param space: no ``Dict``
    :return: what values must lie between; of a box of floats only what its dtype can hold, because environments leave their
        own bounds at times
    """
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    dtype = np.dtype(space.dtype)
    if dtype.kind in "iu":
        return np.iinfo(dtype).min, np.iinfo(dtype).max
    return (None, None) if dtype.kind == "b" else (-float(np.finfo(dtype).max), float(np.finfo(dtype).max))
