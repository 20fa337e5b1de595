"""The drawings of ToyWorld: coloured shapes computed from signed distances, anti-aliased, in batches."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

FACTOR_VALUES = {
    "shape": ["circle", "ring", "square", "triangle", "star", "cross"],
    "colour": ["red", "orange", "yellow", "green", "blue", "purple", "pink", "black"],
    "pattern": ["solid", "stripes", "dots", "checks"],
    "size": ["small", "medium", "large"],
    "background": ["cream", "mint", "sky", "blush"],
}

# RGB of each colour and background, in the order of FACTOR_VALUES.
_RGB = {
    "red": (214, 32, 40),
    "orange": (247, 130, 20),
    "yellow": (244, 212, 20),
    "green": (40, 150, 55),
    "blue": (30, 80, 210),
    "purple": (125, 45, 170),
    "pink": (245, 105, 180),
    "black": (30, 30, 34),
    "cream": (250, 236, 196),
    "mint": (200, 240, 212),
    "sky": (200, 224, 250),
    "blush": (250, 206, 212),
}
PALETTE, BACKGROUNDS = (
    np.array([_RGB[value] for value in FACTOR_VALUES[name]], dtype=np.float32) for name in ("colour", "background")
)
RADII = np.array([0.46, 0.66, 0.9], dtype=np.float32)  # radius of each size, in half picture widths
RIM = 0.08  # width of the rim, as a fraction of the radius


def draw_pictures(factors: dict[str, np.ndarray], nuisance: np.ndarray, size: int) -> np.ndarray:
    """Draw one picture for every combination of factor values.

    Args:
        factors: factor name -> (n,) positions in `FACTOR_VALUES[name]`.
        nuisance: (n, 4) in [0, 1): shift in x, shift in y, rotation and brightness.
        size: side of a picture in pixels.

    Returns:
        (n, 3, size, size) uint8 RGB.
    """
    radius = RADII[factors["size"]]
    shift = (2 * nuisance[:, :2] - 1) * (0.97 - radius[:, None]) * 0.8
    angle = (2 * nuisance[:, 2] - 1) * np.float32(math.radians(18))
    light = 0.9 + 0.15 * nuisance[:, 3]

    # coordinates in the frame of the shape: centred, upright, radius 1
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1)[None, :]
    x, y = (axis - shift[:, :1])[:, None, :], (-axis - shift[:, 1:])[:, :, None]
    cos, sin = ((f(angle) / radius)[:, None, None] for f in (np.cos, np.sin))
    u, v = x * cos + y * sin, y * cos - x * sin

    distance = np.empty_like(u)
    for value, name in enumerate(FACTOR_VALUES["shape"]):
        here = factors["shape"] == value
        distance[here] = _distance(name, u[here], v[here])
    pixels_per_radius = (radius * size / 2)[:, None, None]
    inside = np.clip(0.5 - distance * pixels_per_radius, 0, 1)[:, None]

    second = np.zeros_like(u)
    for value, name in enumerate(FACTOR_VALUES["pattern"]):
        here = factors["pattern"] == value
        second[here] = _pattern(name, u[here], v[here], pixels_per_radius[here])

    # a rim in the full colour, or the light tone of a pattern would eat the outline on the pale ground
    second *= np.clip(-(distance + RIM) * pixels_per_radius + 0.5, 0, 1)

    ink = PALETTE[factors["colour"]][:, :, None, None]
    painted = ink + (0.8 * (255 - ink)) * second[:, None]
    ground = BACKGROUNDS[factors["background"]][:, :, None, None]
    picture = (ground + (painted - ground) * inside) * light[:, None, None, None]
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the edge of a shape of radius 1, negative inside."""
    if shape == "circle":
        return np.hypot(u, v) - 0.92
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.72) - 0.27
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.76
    if shape == "triangle":
        return np.maximum(np.abs(u) * (math.sqrt(3) / 2) + v / 2 - 0.5, -v - 0.6)
    if shape == "star":
        # one of ten equal sectors, between a tip at radius 1 and an inner corner: the edge is a straight line
        sector, inner = math.pi / 5, 0.42
        fold = np.abs((np.arctan2(u, v) + sector) % (2 * sector) - sector)
        corner = np.array([inner * math.cos(sector), inner * math.sin(sector)])
        normal = np.array([corner[1], 1 - corner[0]]) / math.hypot(corner[1], 1 - corner[0])
        reach = np.hypot(u, v)
        return reach * (np.cos(fold) * normal[0] + np.sin(fold) * normal[1]) - normal[0]
    long, thin, u, v = 0.92, 0.3, np.abs(u), np.abs(v)  # cross: two bars
    return np.minimum(np.maximum(u - long, v - thin), np.maximum(u - thin, v - long))


def _pattern(pattern: str, u: np.ndarray, v: np.ndarray, pixels_per_radius: np.ndarray) -> np.ndarray:
    """The share of the second tone at each point, in [0, 1]."""
    if pattern == "solid":
        return np.zeros_like(u)
    period = 0.5
    wave_u, wave_v = np.sin(u * (2 * math.pi / period)), np.sin(v * (2 * math.pi / period))
    sharpness = pixels_per_radius * (period / (2 * math.pi))  # one pixel of blur at the edges
    if pattern == "stripes":
        return np.clip(0.5 + wave_v * sharpness, 0, 1)
    if pattern == "dots":
        cell_u, cell_v = ((w / period) % 1 - 0.5 for w in (u, v))
        return np.clip(0.5 + (0.3 - np.hypot(cell_u, cell_v)) * period * pixels_per_radius, 0, 1)
    return np.clip(0.5 + wave_u * wave_v * sharpness, 0, 1)


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """The JPEG file of one (3, S, S) uint8 RGB picture."""
    buffer = io.BytesIO()
    # full chroma resolution: at this size the usual halving smears the colours, and colour is a factor
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()
