"""What faces of the toy town are painted on: a canvas in metres, and value noise."""

from __future__ import annotations

import numpy as np
import torch

# Channels of a painted face.
ALBEDO, SLOPE, GLASS, LEDGE, GLOW = slice(0, 3), slice(3, 5), 5, 6, 7
CHANNELS = 8


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], *, coarsest: float, finest: float, persistence: float = 0.7
) -> np.ndarray:
    """Value noise of octaves (H, W), standard deviation about 1; cell sizes in texels, each half of the last."""
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
    """A face of width × height metres; `rect` paints in metres from its top left corner."""

    def __init__(self, width: float, height: float, texel: float, rng: np.random.Generator):
        self.width, self.height, self.texel, self.rng = width, height, texel, rng
        self.shape = (max(1, round(height / texel)), max(1, round(width / texel)))
        self.albedo = np.zeros((3, *self.shape), np.float32)
        self.relief = np.zeros(self.shape, np.float32)
        self.glass = np.zeros(self.shape, np.float32)
        self.ledge = np.zeros(self.shape, np.float32)
        self.glow = np.zeros(self.shape, np.float32)

    def u(self) -> np.ndarray:
        return (np.arange(self.shape[1], dtype=np.float32) + 0.5) * self.texel

    def v(self) -> np.ndarray:
        return (np.arange(self.shape[0], dtype=np.float32) + 0.5) * self.texel

    def noise(self, coarsest: float, finest: float, persistence: float = 0.7) -> np.ndarray:
        """Fractal noise with cell sizes in metres."""
        finest = max(finest, 2 * self.texel)
        return fractal_noise(
            self.rng, self.shape, coarsest=max(coarsest, finest) / self.texel, finest=finest / self.texel,
            persistence=persistence,
        )  # fmt: skip

    def fill(self, color, variation: np.ndarray | float = 0.0) -> None:
        self.albedo[:] = np.asarray(color, np.float32)[:, None, None] * np.exp(variation)

    def rect(self, u, v, width, height, color=None, *, relief=None, glass=None, ledge=None, glow=None) -> None:
        """Paint a rectangle; what is None stays as it is."""
        rows = slice(max(0, round(v / self.texel)), max(0, round((v + height) / self.texel)))
        cols = slice(max(0, round(u / self.texel)), max(0, round((u + width) / self.texel)))
        if color is not None:
            self.albedo[:, rows, cols] = np.asarray(color, np.float32)[:, None, None]
        for layer, value in ((self.relief, relief), (self.glass, glass), (self.ledge, ledge), (self.glow, glow)):
            if value is not None:
                layer[rows, cols] = value

    def shade(self, u, v, width, height, factor: float) -> None:
        """Multiply the colour of a rectangle."""
        rows = slice(max(0, round(v / self.texel)), max(0, round((v + height) / self.texel)))
        cols = slice(max(0, round(u / self.texel)), max(0, round((u + width) / self.texel)))
        self.albedo[:, rows, cols] *= factor

    def layers(self) -> np.ndarray:
        """(CHANNELS, H, W): the relief (metres) becomes its slopes along u and v, bounded."""
        slope_u = np.gradient(self.relief, axis=1) if self.shape[1] > 1 else np.zeros_like(self.relief)
        slope_v = np.gradient(self.relief, axis=0) if self.shape[0] > 1 else np.zeros_like(self.relief)
        slopes = np.clip(np.stack([slope_u, slope_v]) / self.texel, -1, 1)
        albedo = np.clip(self.albedo, 0.01, 0.9)
        return np.concatenate([albedo, slopes, self.glass[None], self.ledge[None], self.glow[None]]).astype(np.float32)
