"""Quadrilaterals around lines of text: found in a map, grown, put in order, cut out.

A quadrilateral is (4, 2) of x and y in pixels, clockwise. That of a rectangle found in a map begins
with the upper of its two corners furthest left, which is the top left of a text that is wider than
high and turned by less than 45 degrees. OpenCV and pyclipper do the work, as in PP-OCR, whose DB
post-processing this is; they are the extra `text`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import cv2
import numpy as np
import pyclipper

if TYPE_CHECKING:
    from evmp.model.package import ModelText

Array: TypeAlias = "np.ndarray[Any, Any]"
Quads: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

MIN_GROWN: Final = 2  # pixels of the map by which the shorter side must have grown
CLIPPER_STEPS: Final = 1 << 10  # to a pixel: pyclipper calculates in integers
ARC_TOLERANCE: Final = 0.25  # pixels between a round corner and its polygon
SAME_LINE: Final = 10  # pixels between the tops of what is read from the left to the right
UPRIGHT: Final = 1.5  # times its width, from which height on a crop holds a line that runs down

# The other cores are other processes'.
cv2.setNumThreads(1)


def find_quads(found: Array, spec: ModelText) -> tuple[Quads, Array]:
    """Find the lines of text in the map of a DB model.

    Each outline of what is above the threshold becomes the smallest rectangle around it, which has
    the mean of the map inside it as its score, and grows.

    Args:
        found: (H, W) float32 probabilities.

    Returns: (N, 4, 2) in pixels of the map, and (N,) float32 scores.
    """
    mask: Array = (found > np.float32(spec.threshold)).astype(np.uint8)
    if spec.dilate:
        mask = cv2.dilate(mask, np.ones((2, 2), np.uint8))
    outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    quads, scores = [], []
    for outline in outlines[: spec.max_candidates]:
        quad, shorter = rectangle(outline)
        if shorter < spec.min_size:
            continue
        score = _mean_inside(found, quad)
        if score < np.float32(spec.box_threshold):
            continue
        quad, shorter = rectangle(grow(quad, spec.unclip_ratio))
        if shorter >= spec.min_size + MIN_GROWN:
            quads.append(quad)
            scores.append(score)
    return np.array(quads, np.float64).reshape(-1, 4, 2), np.array(scores, np.float32)


def rectangle(points: Array) -> tuple[Quads, float]:
    """Return the smallest rectangle around points, however turned, and its shorter side.

    Args:
        points: (..., 2).
    """
    found = cv2.minAreaRect(points.reshape(-1, 2).astype(np.float32))
    return _in_order(cv2.boxPoints(found).astype(np.float64)), min(found[1])


def grow(quad: Quads, ratio: float) -> Quads:
    """Move the edges of a polygon outwards by its area times `ratio` over its circumference.

    Args:
        quad: (4, 2), of which nothing crosses itself.

    Returns: (N, 2), the corners round.
    """
    length = np.linalg.norm(quad - np.roll(quad, 1, axis=0), axis=1).sum()
    distance = cv2.contourArea(quad.astype(np.float32)) * ratio / max(length, 1.0)
    if distance * CLIPPER_STEPS < 1:
        return quad
    offset = pyclipper.PyclipperOffset(arc_tolerance=ARC_TOLERANCE * CLIPPER_STEPS)
    path = np.rint(quad * CLIPPER_STEPS).astype(np.int64).tolist()
    offset.AddPath(path, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    (grown,) = offset.Execute(distance * CLIPPER_STEPS)
    return np.array(grown, np.float64) / CLIPPER_STEPS


def reading_order(quads: Quads) -> list[int]:
    """Return the places of (N, 4, 2) from the top down, and in a line from the left to the right.

    Of what begins within SAME_LINE pixels of the height of its predecessor the left comes first.
    """
    order = [int(n) for n in np.lexsort((quads[:, 0, 0], quads[:, 0, 1]))]
    for place in range(1, len(order)):
        for n in range(place, 0, -1):
            above, below = quads[order[n - 1], 0], quads[order[n], 0]
            if below[1] - above[1] >= SAME_LINE or below[0] >= above[0]:
                break
            order[n - 1], order[n] = order[n], order[n - 1]
    return order


def cut_out(pixels: Array, quad: Quads) -> Array:
    """Straighten what lies in a quadrilateral of an image.

    Args:
        pixels: (H, W, 3) uint8.

    Returns: (rows, columns, 3) uint8, C-contiguous; a crop that is much higher than wide, as of a
        line that runs down, is turned by a quarter to the left.
    """
    top, right, bottom, left = np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)
    columns, rows = max(1, round(max(top, bottom))), max(1, round(max(left, right)))
    corners = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], np.float32)
    crop = cv2.warpPerspective(
        pixels,
        cv2.getPerspectiveTransform(quad.astype(np.float32), corners),
        (columns, rows),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.ascontiguousarray(np.rot90(crop)) if rows >= UPRIGHT * columns else crop


def starting_near(quad: Quads, point: Array) -> Quads:
    """Turn the order of a quadrilateral's corners so that the one nearest to a point is first."""
    return np.roll(quad, -int(np.linalg.norm(quad - point, axis=1).argmin()), axis=0)


def _in_order(quad: Quads) -> Quads:
    """Put the corners of a rectangle in order: of the two to the left the upper one is first."""
    left, right = np.split(quad[np.argsort(quad[:, 0], kind="stable")], 2)
    top_left, bottom_left = left[np.argsort(left[:, 1], kind="stable")]
    top_right, bottom_right = right[np.argsort(right[:, 1], kind="stable")]
    return np.stack([top_left, top_right, bottom_right, bottom_left])


def _mean_inside(found: Array, quad: Quads) -> np.float32:
    """Return the mean of a map in a quadrilateral, its edges included."""
    corner = np.floor(quad.min(axis=0)).clip(0).astype(int)
    part = found[corner[1] :, corner[0] :]
    end = np.ceil(quad.max(axis=0)).astype(int) - corner + 1
    part = part[: end[1], : end[0]]
    mask = np.zeros(part.shape, np.uint8)
    cv2.fillPoly(mask, [(quad - corner).astype(np.int32)], (1,))
    mean: np.float32 = np.float32(cv2.mean(part, mask)[0])
    return mean
