"""Is in the picture what the prompt asked for? Plain geometry for the demo model's pictures: no network, numpy only.

The background is read from the border. What stands out from it is the shape: its colour is a median, its outline is
compared with every shape, at every turn and with corners rounded more and less, after moving it to the middle and
scaling it to unit area, and its area gives the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from .render import BACKGROUND_SHADE, COLOURS, SHAPES, SIZES, TURN, Array, Request, distance, grid

BORDER = 2  # pixels
COLOUR_TOLERANCE = 0.25  # Euclidean, RGB in 0..1
SIZE_TOLERANCE = 0.25  # relative; the family itself varies by 0.08
LEAST_CONTRAST = 0.15  # under this nothing stands out
LEAST_FIT = 0.65  # overlap (intersection over union) with the ideal outline; the family itself has 0.85 and more
TURNS = 11
ROUNDINGS = (0.0, 0.15, 0.25)  # deviation of the blur that rounds an outline's corners, in radii
FRAME, FINE, SPAN = 48, 4, 1.15  # the normalised frame: pixels, their division, half its width in sqrt(area)
FEWEST_PIXELS = 20


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where it shows nothing clear. `radius` as in render.py, `fit` 0..1."""

    background: str | None
    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    radius: float = 0.0
    fit: float = 0.0


@dataclass(frozen=True)
class Adherence:
    """Which of the four things asked for are there."""

    shape: bool
    colour: bool
    size: bool
    background: bool

    @property
    def score(self) -> float:
        """The share of the four, 0..1."""
        return (self.shape + self.colour + self.size + self.background) / 4


def judge(picture: Array, request: Request) -> Adherence:
    """Compare a picture, [H, W, 3] in 0..1 (H = W), with a request."""
    seen = read(picture)
    return Adherence(
        shape=seen.shape == request.shape,
        colour=seen.colour == request.colour,
        size=seen.size == request.size,
        background=seen.background == request.background,
    )


def mean_score(pictures: list[Array], requests: list[Request]) -> float:
    """Mean score over pictures and their requests, 0..1."""
    return float(np.mean([judge(picture, request).score for picture, request in zip(pictures, requests, strict=True)]))


def read(picture: Array) -> Reading:
    """Say what a picture, [H, W, 3] in 0..1 (H = W), shows. ValueError for another shape, NaN or infinite values."""
    picture = np.asarray(picture, dtype=np.float64)
    if picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3:
        raise ValueError(f"A square picture [H, H, 3] is needed, not {list(picture.shape)}.")
    if not np.isfinite(picture).all():
        raise ValueError("The picture holds NaN or infinite values.")
    behind = _background(picture)
    background = _nearest_colour(behind.mean((0, 1)))
    contrast = np.linalg.norm(picture - behind, axis=-1)
    strongest = np.quantile(contrast, 0.98)
    if strongest < LEAST_CONTRAST:
        return Reading(background)
    front = np.median(picture[contrast > 0.7 * strongest], axis=0)
    cover = _cover(picture, behind, front)
    if cover.sum() < FEWEST_PIXELS:
        return Reading(background, _nearest_colour(front))
    shape, fit, radius = _best_shape(cover)
    if fit < LEAST_FIT:
        return Reading(background, _nearest_colour(front), None, None, radius, fit)
    return Reading(background, _nearest_colour(front), shape, _nearest_size(radius), radius, fit)


def _background(picture: Array) -> Array:
    """The background as if nothing stood in front of it: the border's median colour with the family's shading."""
    shade = 1 - BACKGROUND_SHADE * grid(len(picture))[1][..., None]
    edge = np.ones(picture.shape[:2], dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median((picture / shade)[edge], axis=0) * shade


def _cover(picture: Array, behind: Array, front: Array) -> Array:
    """0..1 per pixel: how far the pixel lies on the way from the background's colour to the shape's."""
    way = front - behind
    share = ((picture - behind) * way).sum(-1) / np.maximum((way * way).sum(-1), 1e-6)
    # Steeper around one half: shading and the decoder's noise vanish, the outline stays.
    return np.clip((share - 0.25) * 2, 0, 1)


def _best_shape(cover: Array) -> tuple[str, float, float]:
    """The shape of the best overlap, that overlap, and the radius that its area means."""
    pixel = (2 / len(cover)) ** 2
    unit = math.sqrt(cover.sum() * pixel)
    x, y = grid(len(cover))
    centre_x, centre_y = ((cover * axis).sum() / cover.sum() for axis in (x, y))
    frame_x, frame_y = grid(FRAME)
    seen = _sample(cover, centre_x + frame_x * SPAN * unit, centre_y + frame_y * SPAN * unit).ravel().astype(np.float32)
    names, radii, outlines = _outlines()
    both = np.minimum(outlines, seen).sum(1)
    overlap = both / (outlines.sum(1) + seen.sum() - both)
    best = int(overlap.argmax())
    return names[best], float(overlap[best]), unit * radii[best]


def _sample(values: Array, x: Array, y: Array) -> Array:
    """Bilinear samples of a picture at points; zero outside."""
    size = len(values)
    column, row = (
        (x + 1) * size / 2 + 0.5,
        (y + 1) * size / 2 + 0.5,
    )  # +1 for the frame of zeros, -1/2 for pixel centres
    padded = np.pad(values, 1)
    column, row = np.clip(column, 0, size + 0.999), np.clip(row, 0, size + 0.999)
    left, top = column.astype(int), row.astype(int)
    right_share, lower_share = column - left, row - top
    upper = padded[top, left] * (1 - right_share) + padded[top, left + 1] * right_share
    lower = padded[top + 1, left] * (1 - right_share) + padded[top + 1, left + 1] * right_share
    return upper * (1 - lower_share) + lower * lower_share


@cache
def _outlines() -> tuple[list[str], list[float], Array]:
    """Outlines of unit area in the normalised frame: shapes, radii, and coverages [n, FRAME * FRAME]."""
    names, radii, outlines = [], [], []
    for shape in SHAPES:
        for rounding in ROUNDINGS:
            radius = 1 / math.sqrt(_inside(shape, 1.0, rounding, 0.0, 1.5).mean() * 3.0**2)
            for turn in np.linspace(-1.15 * TURN, 1.15 * TURN, TURNS) if shape not in ("circle", "ring") else [0.0]:
                inside = _inside(shape, radius, rounding, float(turn), SPAN)
                names.append(shape)
                radii.append(radius)
                outlines.append(inside.reshape(FRAME, FINE, FRAME, FINE).mean((1, 3)).ravel())
    return names, radii, np.stack(outlines).astype(np.float32)


def _inside(shape: str, radius: float, rounding: float, turn: float, span: float) -> Array:
    """The inside of a shape with rounded corners on a fine grid from -span to span: blurred, then cut at one half."""
    x, y = (axis * span for axis in grid(FRAME * FINE))
    turned_x, turned_y = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    inside = (distance(shape, turned_x, turned_y, radius) < 0).astype(np.float64)
    if rounding:
        line = x[0]
        blur = np.exp(-(((line[:, None] - line[None, :]) / (rounding * radius)) ** 2) / 2)
        blur /= blur.sum(1, keepdims=True)
        inside = blur @ inside @ blur.T
    return inside > 0.5


def _nearest_colour(rgb: Array) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(colour))) for name, colour in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= COLOUR_TOLERANCE else None


def _nearest_size(radius: float) -> str | None:
    for name, nominal in SIZES.items():
        if abs(radius / nominal - 1) <= SIZE_TOLERANCE:
            return name
    return None
