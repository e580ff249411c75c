"""Painted surfaces of the toy town: colour, relief, glass, ledges and glowing parts of each face of a box.

Everything is drawn in metres on the surface, so that all views of it agree.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gnnet.toy.canvas import Canvas, Color
from gnnet.toy.streets import Triple

Painter = Callable[[Canvas, np.ndarray], None]  # paints a whole canvas, given a linear RGB colour (3,)


def paint_face(
    material: str, color: Triple, *, width: float, height: float, texel: float, axis: int, rng: np.random.Generator
) -> np.ndarray:
    """Paint one face of a box: its layers (CHANNELS, H, W), see `Canvas.layers`.

    Args:
        material: which painter; an unknown one is painted plain.
        color: linear RGB.
        width, height: of the face in metres.
        texel: side of a texel in metres.
        axis: axis of the face's normal. 2 is a top, u along x and v along y; 0 or 1 is a wall, v downwards.
        rng: source of all random draws.
    """
    canvas = Canvas(width, height, texel, rng)
    painter = _TOPS.get(material, _plain_top) if axis == 2 else _WALLS.get(material, _plain)
    painter(canvas, np.asarray(color, np.float32))
    return canvas.layers()


def _blocks(
    c: Canvas, color: np.ndarray, length: float, course: float, joint: float, contrast: float, depth: float
) -> None:
    """Masonry: courses of blocks with individual tones; every second course is shifted by half a block.

    Args:
        length, course, joint: length of a block, height of a course, width of a joint, in metres.
        contrast: std of the logarithm of the blocks' tones.
        depth: of the joints, in metres.
    """
    u, v = c.u(), c.v()
    row = (v / course).astype(np.int64)
    shifted = u[None] + (row[:, None] % 2) * (length / 2)
    column = (shifted / length).astype(np.int64)
    tones = c.rng.normal(0, contrast, (row.max() + 1, column.max() + 1)).astype(np.float32)
    hues = c.rng.normal(0, 0.3 * contrast, (3, row.max() + 1, column.max() + 1)).astype(np.float32)
    face = np.minimum(shifted - column * length, (v - row * course)[:, None]) > joint
    variation = tones[row[:, None], column] + 0.12 * c.noise(2.5, 0.3) + 0.1 * c.noise(0.2, 0.05) + _grains(c, 0.12)
    c.fill(color, variation[None] + hues[:, row[:, None], column])
    c.albedo[:] = np.where(face, c.albedo, 0.55 * c.albedo + 0.12)
    c.relief += depth * face + 0.006 * c.noise(0.25, 0.06)


def _grains(c: Canvas, contrast: float) -> np.ndarray:
    return contrast * c.rng.standard_normal(c.shape, dtype=np.float32)


def _plaster(c: Canvas, color: np.ndarray) -> None:
    c.fill(color, 0.13 * c.noise(3.0, 0.4) + 0.1 * c.noise(0.3, 0.06) + _grains(c, 0.08))
    c.relief += 0.012 * c.noise(0.5, 0.06, 0.8)
    streaks = np.clip(c.noise(1.2, 0.1).mean(0, keepdims=True) * 2 + 0.6 * c.noise(0.8, 0.2), 0, 2)
    c.albedo *= 1 - 0.22 * streaks * np.linspace(1, 0.3, c.shape[0], dtype=np.float32)[:, None]
    for _ in range(int(c.width * c.height / 14)):  # where plaster fell off
        width, height = c.rng.uniform(0.2, 0.8, 2)
        u, v = c.rng.uniform(0, 1, 2) * (c.width, c.height)
        c.shade(u, v, width, height, c.rng.uniform(0.6, 1.3))


def _planks(c: Canvas, color: np.ndarray) -> None:
    pitch = c.rng.uniform(0.14, 0.24)
    column = (c.u() / pitch).astype(np.int64)
    tones = c.rng.normal(0, 0.16, column.max() + 1).astype(np.float32)[column]
    edge = (c.u() - column * pitch) < 0.03
    c.fill(color, tones[None] + 0.1 * c.noise(1.0, 0.1) + 0.18 * c.noise(0.12, 0.04))
    c.albedo *= np.where(edge, 0.45, 1.0).astype(np.float32)
    c.relief -= 0.03 * edge


def _wall(c: Canvas, color: np.ndarray, material: str) -> None:
    if material == "brick":
        _blocks(c, color, length=0.3, course=0.12, joint=0.028, contrast=0.24, depth=0.012)
    elif material == "stone":
        _blocks(c, color, length=c.rng.uniform(0.6, 0.9), course=0.42, joint=0.035, contrast=0.18, depth=0.025)
    elif material == "planks":
        _planks(c, color)
    else:
        _plaster(c, color)


def _window(c: Canvas, u: float, v: float, width: float, height: float, frame: np.ndarray) -> None:
    """A window with frame, bars and sill, and perhaps a blind or curtains behind the pane."""
    rng = c.rng
    c.rect(u - 0.12, v - 0.12, width + 0.24, height + 0.12, frame, relief=0.02)
    pane = rng.uniform(0.03, 0.12) * np.array([0.8, 0.95, 1.15])
    glow = rng.uniform(0.35, 1.0) if rng.random() < 0.3 else 0.0
    c.rect(u, v, width, height, pane, relief=-0.1, glass=rng.uniform(0.5, 1.0), glow=glow)
    kind = rng.random()
    if kind < 0.35:  # blind
        c.rect(u, v, width, height * rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.6, 3), glass=0.3, glow=glow * 0.7)
    elif kind < 0.7:  # curtains
        tone, wide = rng.uniform(0.15, 0.6, 3), width * rng.uniform(0.18, 0.33)
        c.rect(u, v, wide, height, tone, glass=0.3, glow=glow * 0.6)
        c.rect(u + width - wide, v, wide, height, tone, glass=0.3, glow=glow * 0.6)
    for share in [0.5] if rng.random() < 0.7 else [0.33, 0.67]:
        c.rect(u + share * width - 0.03, v, 0.07, height, frame, relief=0.0, glass=0.0, glow=0.0)
    if rng.random() < 0.6:
        c.rect(u, v + 0.38 * height, width, 0.07, frame, relief=0.0, glass=0.0, glow=0.0)
    c.rect(u - 0.2, v + height, width + 0.4, 0.13, (0.55, 0.53, 0.5), relief=0.08, ledge=1.0)
    c.shade(u - 0.15, v + height + 0.13, width + 0.3, rng.uniform(0.15, 0.6), rng.uniform(0.6, 0.85))


def _lettering(c: Canvas, u: float, v: float, width: float, height: float, color: Color, glow: float) -> None:
    """A line of letter-like strokes."""
    rng, at, size = c.rng, u, 0.7 * height
    while at + size < u + width:
        for _ in range(rng.integers(2, 5)):
            thick = max(0.14 * size, c.texel)
            if rng.random() < 0.5:
                c.rect(at + rng.choice([0, 0.3, 0.55]) * size, v + 0.15 * height, thick, size, color, glow=glow)
            else:
                c.rect(at, v + (0.15 + rng.choice([0, 0.28, 0.58])) * height, 0.65 * size, thick, color, glow=glow)
        at += size * rng.choice([0.85, 0.85, 1.5])


def _poster(c: Canvas, u: float, v: float, width: float, height: float) -> None:
    """A picture of coloured rectangles on a plain background."""
    rng = c.rng
    tones = rng.uniform(0.05, 0.75, (4, 3))
    c.rect(u, v, width, height, tones[0], relief=0.01)
    for _ in range(rng.integers(5, 12)):
        size = rng.uniform(0.1, 0.5, 2) * (width, height)
        at = rng.uniform(0, 1, 2) * (np.array([width, height]) - size)
        c.rect(u + at[0], v + at[1], size[0], size[1], tones[rng.integers(1, 4)])


def _shopfront(c: Canvas, left: float, width: float) -> None:
    """Ground floor of a shop: a sign with letters, shop windows with goods, a door."""
    rng, bottom = c.rng, c.height
    frame, sign = rng.uniform(0.03, 0.4, 3), rng.uniform(0.03, 0.5, 3)
    lit = rng.random() < 0.6
    c.rect(left, bottom - 3.25, width, 0.6, sign, relief=0.08, glow=0.12 if lit else 0.0)
    letters = np.clip(1.0 - sign * 1.6, 0.05, 0.85)
    _lettering(c, left + 0.2, bottom - 3.22, width - 0.4, 0.5, letters, 0.8 if lit else 0.0)
    c.rect(left, bottom - 3.28, width, 0.06, (0.5, 0.5, 0.5), ledge=1.0)
    c.rect(left, bottom - 2.65, width, 2.65, frame, relief=0.0)
    door = left + rng.choice([0.08, 0.4, 0.7]) * width
    panes = [(left + 0.12, door - left - 0.24), (door + 1.1, left + width - door - 1.25)]
    for at, wide in panes:
        if wide < 0.4:
            continue
        glow = rng.uniform(0.2, 0.7) if lit else 0.0
        c.rect(at, bottom - 2.5, wide, 1.95, rng.uniform(0.04, 0.12, 3), relief=-0.08, glass=0.7, glow=glow)
        for _ in range(int(wide * 7)):
            w, h = rng.uniform(0.08, 0.45, 2)
            c.rect(at + rng.uniform(0, max(wide - w, 0)), bottom - 0.6 - h - rng.choice([0, 0, 0.6, 1.1]), w, h,
                   rng.uniform(0.03, 0.6, 3), glass=0.4, glow=glow * rng.uniform(0.3, 1.0))  # fmt: skip
    c.rect(door, bottom - 2.35, 0.95, 2.35, rng.uniform(0.03, 0.35, 3), relief=-0.06)
    c.rect(door + 0.15, bottom - 2.2, 0.65, 1.1, (0.06, 0.07, 0.08), glass=0.8, glow=0.4 if lit else 0.0)


def _doorway(c: Canvas, left: float, width: float, frame: np.ndarray) -> None:
    """Ground floor of a house: a door, windows and posters."""
    rng, bottom = c.rng, c.height
    count = max(2, int(width / 1.9))
    door = rng.integers(count)
    for i in range(count):
        at = left + (i + 0.5) * width / count
        if i == door:
            c.rect(at - 0.65, bottom - 2.55, 1.3, 2.55, frame, relief=0.03)
            c.rect(at - 0.48, bottom - 2.3, 0.96, 2.3, rng.uniform(0.03, 0.4, 3), relief=-0.06)
            for row, column in np.ndindex(3, 2):
                c.rect(at - 0.4 + 0.43 * column, bottom - 2.2 + 0.7 * row, 0.34, 0.55, rng.uniform(0.03, 0.4, 3))
        elif rng.random() < 0.8:
            _window(c, at - 0.45, bottom - 2.4, 0.9, 1.35, frame)
        else:
            _poster(c, at - 0.4, bottom - 2.0, 0.8, 1.1)


def _facade(material: str) -> Painter:
    def paint(c: Canvas, color: np.ndarray) -> None:
        rng = c.rng
        _wall(c, color, material)
        if c.width < 1.2 or c.height < 3.6:
            return
        frame = rng.choice([rng.uniform(0.55, 0.75), rng.uniform(0.05, 0.2)]) * rng.uniform(0.9, 1.05, 3)
        if rng.random() < 0.55:
            _shopfront(c, 0.25, c.width - 0.5)
        else:
            _doorway(c, 0.25, c.width - 0.5, frame)
        storey, count = rng.uniform(2.5, 3.0), max(1, int(c.width / rng.uniform(1.6, 2.3)))
        wide, tall = rng.uniform(0.75, 1.1), rng.uniform(1.15, 1.6)
        top = c.height - 3.4 - storey + 0.45
        while top > 0.4:
            for i in range(count):
                if rng.random() < 0.93:
                    _window(c, (i + 0.5) * c.width / count - wide / 2, top, wide, tall, frame)
            if rng.random() < 0.5:
                c.rect(0, top + tall + 0.45, c.width, 0.14, rng.uniform(0.4, 0.6, 3), relief=0.06, ledge=1.0)
            top -= storey
        for _ in range(rng.integers(0, 3)):  # downpipes
            c.rect(rng.uniform(0, c.width), 0, 0.11, c.height, rng.uniform(0.1, 0.35, 3), relief=0.08)
        c.albedo *= 1 - 0.3 * np.exp(-(c.height - c.v()) / 0.35)[:, None]  # darker near the ground

    return paint


def _tower(c: Canvas, color: np.ndarray) -> None:
    _blocks(c, color, length=2.2, course=1.1, joint=0.12, contrast=0.12, depth=0.03)
    for row in range(int(c.height / 2.6)):
        for column in range(int(c.width / 2)):
            glow = 0.8 if c.rng.random() < 0.25 else 0.0
            c.rect(0.5 + 2 * column, 0.7 + 2.6 * row, 1.0, 1.4, c.rng.uniform(0.03, 0.2, 3), glass=0.8, glow=glow)


def _plain(c: Canvas, color: np.ndarray) -> None:
    c.fill(color, 0.1 * c.noise(0.6, 0.06) + 0.06 * c.rng.normal(size=(c.shape[0], 1)).astype(np.float32))
    c.relief += 0.004 * c.noise(0.3, 0.06)


def _plain_top(c: Canvas, color: np.ndarray) -> None:
    c.fill(color, 0.2 * c.noise(0.6, 0.06))


def _sign(c: Canvas, color: np.ndarray) -> None:
    rng = c.rng
    c.fill(color, 0.05 * c.noise(0.3, 0.06))
    if min(c.width, c.height) < 0.25:
        return
    edge = np.clip(0.9 - color * 1.3, 0.05, 0.8)
    lit = 0.5 if rng.random() < 0.3 else 0.0
    c.rect(0.04, 0.04, c.width - 0.08, 0.05, edge)
    c.rect(0.04, c.height - 0.09, c.width - 0.08, 0.05, edge)
    if rng.random() < 0.5:
        _lettering(c, 0.06, 0.15, c.width - 0.08, 0.22, edge, lit)
        _lettering(c, 0.06, 0.42, c.width - 0.08, 0.16, edge, lit)
    else:
        _poster(c, 0.1, 0.14, c.width - 0.2, c.height - 0.28)


def _kiosk(c: Canvas, color: np.ndarray) -> None:
    _planks(c, color)
    if c.width > 1:
        for _ in range(4):
            size = c.rng.uniform(0.3, 0.7, 2)
            at = c.rng.uniform(0.05, 0.95, 2) * (np.array([c.width, c.height]) - size)
            _poster(c, at[0], at[1], size[0], size[1])
        _lettering(c, 0.1, 0.05, c.width - 0.2, 0.35, np.clip(0.9 - color, 0.1, 0.9), 0.6)
    else:
        _poster(c, 0.08, 0.15, c.width - 0.16, c.height * 0.5)


def _awning(c: Canvas, color: np.ndarray) -> None:
    stripe = (c.u() / 0.3).astype(np.int64) % 2
    c.fill(color, 0.08 * c.noise(0.5, 0.06))
    c.albedo[:] = np.where(stripe, 0.7, c.albedo)


def _railing(c: Canvas, color: np.ndarray) -> None:
    c.fill((0.1, 0.1, 0.1), 0.1 * c.noise(0.5, 0.06))
    for at in np.arange(0.05, c.width, 0.2):
        c.rect(at, 0.1, 0.07, c.height - 0.3, color * 1.6, relief=0.03)
    c.rect(0, 0, c.width, 0.1, color * 1.8, ledge=1.0)
    c.rect(0, c.height - 0.2, c.width, 0.2, (0.5, 0.49, 0.46), relief=0.04)
    for _ in range(3):  # flower boxes
        c.rect(c.rng.uniform(0, c.width), 0.15, 0.6, 0.25, c.rng.uniform(0.05, 0.6, 3), relief=0.08)


def _leaves(c: Canvas, color: np.ndarray) -> None:
    clumps = c.noise(0.35, 0.05, 0.9)
    c.fill(color, 0.5 * clumps)
    c.albedo[0] *= np.exp(0.25 * c.noise(0.5, 0.1))
    c.relief += 0.05 * clumps


def _car(c: Canvas, color: np.ndarray) -> None:
    rng = c.rng
    c.fill(color, 0.05 * c.noise(1.0, 0.1))
    c.rect(0, 0.3, c.width, 0.04, color * 0.4)
    c.rect(0, c.height - 0.14, c.width, 0.14, (0.03, 0.03, 0.03))
    if c.width > 3:  # a side: wheels and doors
        v, u = np.meshgrid(c.v(), c.u(), indexing="ij")
        for at in (0.18, 0.8):
            radius = np.hypot(u - at * c.width, v - (c.height - 0.12))
            for size, tone in ((0.4, 0.02), (0.33, 0.035), (0.2, 0.4), (0.1, 0.15)):
                c.albedo[:, radius < size] = tone
        for at in (0.36, 0.6):
            c.rect(at * c.width, 0, 0.03, c.height - 0.2, color * 0.3, relief=-0.02)
            c.rect(at * c.width + 0.08, 0.12, 0.16, 0.05, (0.5, 0.5, 0.5))
        c.glass[: c.shape[0] // 3] = 0.15
    else:  # front or back: lamps, plate, grille
        for at in (0.06, c.width - 0.41):
            c.rect(at, 0.12, 0.35, 0.16, rng.choice([0.7, 0.3]) * np.array([1.0, 0.35, 0.3]), glass=0.4)
        c.rect(c.width / 2 - 0.28, 0.42, 0.56, 0.14, (0.75, 0.72, 0.5))
        _lettering(c, c.width / 2 - 0.26, 0.42, 0.52, 0.13, (0.03, 0.03, 0.03), 0.0)


def _cabin(c: Canvas, color: np.ndarray) -> None:
    c.fill(color)
    for at in np.linspace(0, 1, 3)[:-1] if c.width > 1.6 else [0.0]:
        wide = c.width / (2 if c.width > 1.6 else 1)
        c.rect(at * c.width + 0.09, 0.09, wide - 0.18, c.height - 0.14, (0.04, 0.05, 0.06), glass=0.9)


def _asphalt(c: Canvas, color: np.ndarray) -> None:
    rng = c.rng
    c.fill(color, 0.12 * c.noise(3.0, 0.3) + 0.16 * c.noise(0.2, 0.05, 0.9) + _grains(c, 0.3))
    for _ in range(14):  # repaired patches
        width, height = rng.uniform(0.4, 2.6, 2)
        at_u, at_v = rng.uniform(0, 1, 2) * (c.width, c.height)
        c.shade(at_u, at_v, width, height, rng.uniform(0.65, 1.35))
    cracks = np.abs(c.noise(1.6, 0.1, 0.65)) < 0.035
    c.albedo *= np.where(cracks, 0.45, 1.0).astype(np.float32)
    for _ in range(7):  # manholes and drains
        at_u, at_v = rng.uniform(0.05, 0.95, 2) * (c.width, c.height)
        c.rect(at_u, at_v, 0.62, 0.62, (0.05, 0.05, 0.05))
        for k in range(4):
            c.rect(at_u + 0.06 + 0.14 * k, at_v + 0.06, 0.07, 0.5, (0.2, 0.19, 0.18), relief=0.02)
    worn = np.clip(1.1 + 0.35 * c.noise(0.6, 0.05), 0, 1)
    marks = np.zeros(c.shape, bool)
    v, u = c.v()[:, None], c.u()[None]
    marks |= (np.abs(v - c.height / 2) < 0.06) & ((u % 3.0) < 1.6)
    crossing = rng.uniform(6, 14)
    marks |= (np.abs(u - crossing) < 1.2) & ((v % 1.0) < 0.5)
    marks |= (np.abs(v - 1.9) < 0.05) | (np.abs(v - c.height + 1.9) < 0.05)
    c.albedo[:] = np.where(marks, c.albedo + worn * (0.55 - c.albedo), c.albedo)


def _cobbles(c: Canvas, color: np.ndarray) -> None:
    _blocks(c, color * 1.3, length=0.24, course=0.2, joint=0.035, contrast=0.3, depth=0.03)
    c.albedo *= np.exp(0.15 * c.noise(3.0, 0.4))


def _paving(c: Canvas, color: np.ndarray) -> None:
    _blocks(c, color, length=0.9, course=0.6, joint=0.03, contrast=0.14, depth=0.012)
    for _ in range(40):  # stains and chewing gum
        width, height = c.rng.choice([0.08, 0.12, 0.6]) * c.rng.uniform(0.7, 1.3, 2)
        u, v = c.rng.uniform(0, 1, 2) * (c.width, c.height)
        c.shade(u, v, width, height, c.rng.uniform(0.5, 0.8))


def _field(c: Canvas, color: np.ndarray) -> None:
    c.fill(color, 0.3 * c.noise(12.0, 0.5))


def _lamp(c: Canvas, color: np.ndarray) -> None:
    c.fill(color)
    c.glow[:] = 3.0


def _bark(c: Canvas, color: np.ndarray) -> None:
    c.fill(color, 0.3 * c.noise(0.3, 0.05))


_WALLS = {
    "brick": _facade("brick"), "plaster": _facade("plaster"), "stone": _facade("stone"), "planks": _facade("planks"),
    "tower": _tower, "sign": _sign, "kiosk": _kiosk, "awning": _awning, "railing": _railing, "leaves": _leaves,
    "car": _car, "cabin": _cabin, "lamp": _lamp, "bark": _bark, "paving": _plain,
}  # fmt: skip
_TOPS = {
    "asphalt": _asphalt, "cobbles": _cobbles, "paving": _paving, "field": _field, "awning": _awning,
    "leaves": _leaves, "lamp": _lamp,
}  # fmt: skip
