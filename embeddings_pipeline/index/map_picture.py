"""A map as a small picture: a PNG of one byte a pixel, whatever the number of points.

PNG (https://www.w3.org/TR/png-3/): a signature, then chunks of a length, a type, data and a CRC: the header IHDR, the
colours PLTE with their opacity tRNS, the rows IDAT, each after a byte that names its filter (0: none), and IEND.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embeddings_pipeline.index.map_read import NONE, OTHER, Legend, is_number

WIDTH, HEIGHT, MARGIN = 560, 400, 8
LARGE_DOTS = 20_000  # points up to which each is 2 × 2 pixels
# Each has a contrast of 3 or more on white and on nearly black.
CATEGORIES = (
    "#3f7fd1", "#d0661b", "#2f8f5b", "#cf4257", "#8a63d2", "#9a6a4a", "#c4599c", "#1f8ea1", "#8a7d22", "#6b7f94",
)  # fmt: skip
OTHERS, NOTHING = "#8c9098", "#8c9098"
GRADIENT = ("#6a5acd", "#3c74cf", "#1d8aa6", "#2f9360", "#74862a", "#b0781f", "#d0582f")  # from low to high


def picture(at: NDArray[np.float32], colours: NDArray | None, legend: Legend | None) -> bytes:
    """A PNG of the points (n, 2); `colours` (n,) as the map has them, None for one colour."""
    numbers, palette = _numbered(len(at), colours, legend)
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    seen = np.isfinite(at).all(axis=1)
    at, numbers = at[seen], numbers[seen]
    if len(at):
        low, high = at.min(axis=0), at.max(axis=0)
        size = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
        scale = (size / np.maximum(high - low, 1e-9)).min()  # the same along both axes
        placed = (at - (low + high) / 2) * scale * (1, -1) + np.array([WIDTH, HEIGHT]) / 2
        x, y = np.clip(placed.astype(int).T, 1, np.array([[WIDTH], [HEIGHT]]) - 2)
        for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)) if len(at) <= LARGE_DOTS else ((0, 0),):
            pixels[y + down, x + right] = numbers + 1
    return _png(pixels, [(255, 255, 255), *map(_rgb, palette)])


def colours_of(legend: Legend) -> list[str]:
    """Of each of its categories; of numbers, from low to high."""
    return list(GRADIENT if is_number(legend.type) else CATEGORIES[: len(legend.categories)])


def swatch(colours: Sequence[str]) -> bytes:
    """A PNG of these colours side by side, for a legend."""
    row = np.repeat(np.arange(1, len(colours) + 1, dtype=np.uint8), 12)
    return _png(np.tile(row, (12, 1)), [(255, 255, 255), *map(_rgb, colours)])


def _numbered(points: int, colours: NDArray | None, legend: Legend | None) -> tuple[NDArray[np.uint8], Sequence[str]]:
    """Of each point the place of its colour, and the colours."""
    if colours is None or legend is None:
        return np.zeros(points, np.uint8), CATEGORIES[:1]
    if not is_number(legend.type):
        numbers = np.where(colours == OTHER, len(CATEGORIES), np.where(colours == NONE, len(CATEGORIES) + 1, colours))
        return numbers.astype(np.uint8), (*CATEGORIES, OTHERS, NOTHING)
    low, high = legend.low or 0.0, legend.high or 0.0
    share = (colours - low) / max(high - low, 1e-9)
    steps = np.clip(np.nan_to_num(share) * len(GRADIENT), 0, len(GRADIENT) - 1)
    return np.where(np.isfinite(colours), steps, len(GRADIENT)).astype(np.uint8), (*GRADIENT, NOTHING)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _png(pixels: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """The pixels (rows, columns) with the places of their colours; the first one is transparent."""
    height, width = pixels.shape
    rows = np.hstack([np.zeros((height, 1), np.uint8), pixels]).tobytes()
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": bytes(value for colour in palette for value in colour),
        b"tRNS": b"\0",
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
