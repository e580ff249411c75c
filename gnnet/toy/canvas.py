"""The canvas, measured in metres, on which the faces of the toy town are painted, and value noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Color = Sequence[float] | np.ndarray  # linear RGB

# Channels of a painted face: see `Canvas.layers`.
ALBEDO, SLOPE, GLASS, LEDGE, GLOW = slice(0, 3), slice(3, 5), 5, 6, 7
CHANNELS = 8


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], *, coarsest: float, finest: float, persistence: float = 0.7
) -> np.ndarray:
    """Sum of octaves of value noise, (H, W) float32, with a std of about 1.

    Args:
        rng: source of all random draws.
        shape: (H, W).
        coarsest, finest: largest and smallest cell in texels; each octave has half the cell of the one before.
        persistence: amplitude of each octave relative to the one before.
    """
    total, energy, amplitude, cell = np.zeros(shape, np.float32), 0.0, 1.0, coarsest
    while cell >= finest:
        grid = torch.from_numpy(rng.random((int(shape[0] / cell) + 3, int(shape[1] / cell) + 3), dtype=np.float32))
        size = [round(g * cell) for g in grid.shape]
        fine = torch.nn.functional.interpolate(grid[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        shift = max(round(cell / 2), 0)
        total += amplitude * (fine[shift : shift + shape[0], shift : shift + shape[1]].numpy() - 0.5)
        energy += amplitude**2 / 20  # variance of bilinear value noise, roughly
        amplitude, cell = amplitude * persistence, cell / 2
    return total / np.float32(np.sqrt(energy))


class Canvas:
    """A face to paint on. Positions (u, v) are in metres from its top left corner, v downwards.

    Args:
        width, height: in metres.
        texel: side of a texel in metres.
        rng: source of all random draws, for painters too.
    """

    def __init__(self, width: float, height: float, texel: float, rng: np.random.Generator):
        self.width, self.height, self.texel, self.rng = width, height, texel, rng
        self.shape = (max(1, round(height / texel)), max(1, round(width / texel)))
        self.albedo = np.zeros((3, *self.shape), np.float32)
        self.relief = np.zeros(self.shape, np.float32)
        self.glass = np.zeros(self.shape, np.float32)
        self.ledge = np.zeros(self.shape, np.float32)
        self.glow = np.zeros(self.shape, np.float32)

    def u(self) -> np.ndarray:
        """Centres of the columns, (W,), in metres."""
        return (np.arange(self.shape[1], dtype=np.float32) + 0.5) * self.texel

    def v(self) -> np.ndarray:
        """Centres of the rows, (H,), in metres."""
        return (np.arange(self.shape[0], dtype=np.float32) + 0.5) * self.texel

    def noise(self, coarsest: float, finest: float, persistence: float = 0.7) -> np.ndarray:
        """`fractal_noise` (H, W), with the largest and smallest cell in metres."""
        finest = max(finest, 2 * self.texel)
        return fractal_noise(
            self.rng, self.shape, coarsest=max(coarsest, finest) / self.texel, finest=finest / self.texel,
            persistence=persistence,
        )  # fmt: skip

    def fill(self, color: Color, variation: np.ndarray | float = 0.0) -> None:
        """Paint everything; `variation` (H, W) or (3, H, W) is added to the logarithm of the colour."""
        self.albedo[:] = np.asarray(color, np.float32)[:, None, None] * np.exp(variation)

    def rect(
        self, u: float, v: float, width: float, height: float, color: Color | None = None, *,
        relief: float | None = None, glass: float | None = None, ledge: float | None = None, glow: float | None = None,
    ) -> None:  # fmt: skip
        """Paint a rectangle with its top left corner at (u, v); layers given as None stay as they are."""
        cells = self._cells(u, v, width, height)
        if color is not None:
            self.albedo[:, *cells] = np.asarray(color, np.float32)[:, None, None]
        for layer, value in ((self.relief, relief), (self.glass, glass), (self.ledge, ledge), (self.glow, glow)):
            if value is not None:
                layer[cells] = value

    def shade(self, u: float, v: float, width: float, height: float, factor: float) -> None:
        """Multiply the colour of a rectangle."""
        self.albedo[:, *self._cells(u, v, width, height)] *= factor

    def _cells(self, u: float, v: float, width: float, height: float) -> tuple[slice, slice]:
        rows = slice(max(0, round(v / self.texel)), max(0, round((v + height) / self.texel)))
        return rows, slice(max(0, round(u / self.texel)), max(0, round((u + width) / self.texel)))

    def layers(self) -> np.ndarray:
        """The painted face, (CHANNELS, H, W) float32.

        Channels: albedo (linear RGB), slopes of the relief along u and v (within ±1), glass (share of
        reflection), ledge (where snow stays), glow (light emitted when lamps are lit).
        """
        slope_u = np.gradient(self.relief, axis=1) if self.shape[1] > 1 else np.zeros_like(self.relief)
        slope_v = np.gradient(self.relief, axis=0) if self.shape[0] > 1 else np.zeros_like(self.relief)
        slopes = np.clip(np.stack([slope_u, slope_v]) / self.texel, -1, 1)
        albedo = np.clip(self.albedo, 0.01, 0.9)
        return np.concatenate([albedo, slopes, self.glass[None], self.ledge[None], self.glow[None]]).astype(np.float32)
