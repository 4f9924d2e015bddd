"""The picture family that the demo model was trained on, drawn from plain geometry (numpy only).

A picture shows one shape in one colour on a background of another colour, at one of two sizes, slightly moved, turned
and shaded. Coordinates run from -1 to 1 over the picture, y downwards.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

COLOURS = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.10, 0.70, 0.22),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.98, 0.86, 0.12),
    "purple": (0.55, 0.15, 0.75),
    "orange": (0.98, 0.52, 0.08),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
}
SIZES = {"small": 0.42, "large": 0.72}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZE_JITTER = 0.08  # relative
TURN = 0.30  # radians either way
SHAPE_SHADE, BACKGROUND_SHADE = 0.12, 0.08  # loss of brightness from the middle to the lower edge


@dataclass(frozen=True)
class Request:
    """What a prompt asks for."""

    size: str
    colour: str
    shape: str
    background: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


def parse(prompt: str) -> Request:
    """The request of a prompt in exactly the wording of `Request.__str__`; ValueError for any other text."""
    words = prompt.split()
    if len(words) == 8:
        request = Request(words[1], words[2], words[3], words[6])
        if request in REQUESTS and str(request) == prompt.strip():
            return request
    raise ValueError(f"{prompt!r} is no prompt of the demo model; one is {str(next(iter(REQUESTS)))!r}.")


REQUESTS = dict.fromkeys(
    Request(size, colour, shape, background)
    for size, colour, shape, background in itertools.product(SIZES, COLOURS, SHAPES, COLOURS)
    if colour != background
)


def grid(pixels: int) -> tuple[Array, Array]:
    """x and y of the pixel centres, each [pixels, pixels]."""
    line = (np.arange(pixels) + 0.5) / pixels * 2 - 1
    y, x = np.meshgrid(line, line, indexing="ij")
    return x, y


def distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Roughly the signed distance to the outline of a shape around the origin: negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78 * radius) - 0.24 * radius
    if shape == "square":
        return _box(x, y, 0.84 * radius, 0.84 * radius)
    if shape == "cross":
        arm = 0.34 * radius
        return np.minimum(_box(x, y, radius, arm), _box(x, y, arm, radius))
    if shape == "triangle":  # equilateral, pointing up, corners on the circle
        sides = (math.sqrt(3) * np.abs(x) - y) / 2
        return np.maximum(sides, y) - radius / 2
    if shape == "star":
        return _star(x, y, radius)
    raise ValueError(f"Unknown shape {shape!r}; there are {', '.join(SHAPES)}.")


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _star(x: Array, y: Array, radius: float) -> Array:
    """Five points, one up: fold the plane into half a point, then measure from the line between tip and notch."""
    fifth = 2 * math.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + fifth / 2, fifth) - fifth / 2)
    across, along = np.hypot(x, y) * np.sin(angle), np.hypot(x, y) * np.cos(angle)
    notch = (0.42 * radius * math.sin(fifth / 2), 0.42 * radius * math.cos(fifth / 2))
    normal = np.array([radius - notch[1], notch[0]])
    normal /= np.linalg.norm(normal)
    return across * normal[0] + (along - radius) * normal[1]


def coverage(shape: str, pixels: int, centre: tuple[float, float], radius: float, turn: float) -> Array:
    """How much of each pixel the shape covers, 0..1, [pixels, pixels]."""
    x, y = grid(pixels)
    x, y = x - centre[0], y - centre[1]
    turned_x = math.cos(turn) * x + math.sin(turn) * y
    turned_y = math.cos(turn) * y - math.sin(turn) * x
    depth = np.clip(distance(shape, turned_x, turned_y, radius) * pixels / 2, -30, 30)
    return 1 / (1 + np.exp(depth))


def render(request: Request, rng: np.random.Generator, pixels: int = 64) -> Array:
    """One picture of a request, [pixels, pixels, 3] in 0..1, with place, size and turn drawn from `rng`."""
    radius = SIZES[request.size] * (1 + SIZE_JITTER * rng.uniform(-1, 1))
    room = max(0.0, 0.92 - radius) * 0.8
    centre = (room * rng.uniform(-1, 1), room * rng.uniform(-1, 1))
    fine = 2 * pixels
    cover = coverage(request.shape, fine, centre, radius, TURN * rng.uniform(-1, 1))[..., None]
    y = grid(fine)[1][..., None]
    front = np.array(COLOURS[request.colour]) * np.clip(1 - SHAPE_SHADE * (y - centre[1]) / radius, 0.6, 1.3)
    back = np.array(COLOURS[request.background]) * (1 - BACKGROUND_SHADE * y)
    picture = np.clip(front * cover + back * (1 - cover), 0, 1)
    return picture.reshape(pixels, 2, pixels, 2, 3).mean((1, 3))
