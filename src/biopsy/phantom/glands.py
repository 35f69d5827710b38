"""Lobules, ducts and vessels as outlines and nuclei in micrometres."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from biopsy.phantom.noise import Floats
from biopsy.phantom.patients import Habit

Kind = Literal["bed", "gland", "vessel"]


@dataclass(frozen=True)
class Gland:
    """Closed outlines with their hollows and nuclei: a duct, a vessel, a lobule's acini or its bed.

    ``outlines`` is (k, n, 2) and ``hollows`` (m, n, 2), x and y in micrometres; ``nuclei`` is (N, 6): x, y,
    long and short radius, angle, amount of stain. A ``bed`` is the loose stroma that a lobule lies in.
    """

    kind: Kind
    outlines: Floats
    hollows: Floats
    nuclei: Floats
    content: float  # bed: how loose, in [0, 1]; vessel: 1 if it holds blood


def grow_glands(
    rng: np.random.Generator, habit: Habit, tissue: Floats, tumour: Floats, fat: Floats, cell_um: float
) -> list[Gland]:
    """Scatter ducts and lobules over stroma; few survive inside the tumour."""
    n_wanted = rng.poisson(habit.glands_per_mm2 * (tissue > 0).sum() * cell_um**2 / 1e6)
    sites = _sites(rng, (tissue > 150) & (fat < 0.7), n_wanted * 2, cell_um)
    glands: list[Gland] = []
    centres: list[tuple[float, float, float]] = []
    for x, y in sites:
        row, column = int(y / cell_um), int(x / cell_um)
        if tumour[row, column] > -150 and rng.random() < 0.93:
            continue
        is_duct = rng.random() < 0.35
        reach = rng.uniform(40, 150) if is_duct else rng.uniform(90, 280)
        if any((x - a) ** 2 + (y - b) ** 2 < (reach + c) ** 2 for a, b, c in centres):
            continue
        centres.append((x, y, reach))
        filled = rng.random() < habit.proliferation
        glands += [_duct(rng, x, y, reach, filled)] if is_duct else _lobule(rng, x, y, reach, filled)
        if len(centres) >= n_wanted:
            break
    return glands


def grow_vessels(rng: np.random.Generator, tissue: Floats, fat: Floats, cell_um: float) -> list[Gland]:
    """Scatter small vessels over stroma."""
    n_wanted = rng.poisson(2.5 * (tissue > 0).sum() * cell_um**2 / 1e6)
    vessels = []
    for x, y in _sites(rng, (tissue > 60) & (fat < 0.9), n_wanted, cell_um):
        radius = float(np.exp(rng.normal(2.8, 0.55)))
        outlines = _blobs(rng, np.array([[x, y]]), np.array([radius]), rng.uniform(0.35, 1.0, 1), 0.12)
        wall = rng.uniform(3, 4 + 0.25 * radius)
        nuclei = _ring(rng, outlines, 0.5 * wall, gap_um=14, radius_um=(3.6, 1.4), flat=True)
        hollows = _shrink(outlines, np.array([wall]))
        vessels.append(Gland("vessel", outlines, hollows, nuclei, float(rng.random() < 0.45)))
    return vessels


def _sites(
    rng: np.random.Generator, allowed: NDArray[np.bool_], n: int, cell_um: float
) -> list[tuple[float, float]]:
    rows, columns = np.nonzero(allowed)
    if len(rows) == 0:
        return []
    chosen = rng.integers(len(rows), size=n)
    return [
        (float((columns[i] + rng.random()) * cell_um), float((rows[i] + rng.random()) * cell_um))
        for i in chosen
    ]


def _duct(rng: np.random.Generator, x: float, y: float, radius: float, filled: bool) -> Gland:
    outlines = _blobs(rng, np.array([[x, y]]), np.array([radius]), rng.uniform(0.25, 0.9, 1), 0.25)
    return _gland(rng, outlines, rng.uniform(13, 24, 1), filled)


def _lobule(rng: np.random.Generator, x: float, y: float, reach: float, filled: bool) -> list[Gland]:
    centre = np.array([[x, y]])
    bed = _blobs(rng, centre, np.array([reach * 1.08]), rng.uniform(0.6, 1.0, 1), 0.12)
    none = np.zeros((0, 6), np.float32)
    lobule = [Gland("bed", bed, bed[:0], none, rng.uniform(0.2, 1.0))]
    acinus_um = rng.uniform(11, 19) * (1.25 if filled else 1.0)
    gap_um = acinus_um * rng.uniform(2.1, 3.0)
    angle, squeeze = rng.uniform(0, np.pi), rng.uniform(0.6, 1.0)
    rows, columns = np.arange(-reach, reach, 0.87 * gap_um), np.arange(-reach, reach, gap_um)
    position = np.stack(np.meshgrid(columns, rows), axis=-1)
    position[..., 0] += rng.uniform(0, gap_um, (len(rows), 1))
    position = position.reshape(-1, 2) + rng.normal(0, 0.16 * gap_um, (position.size // 2, 2))
    position = position[np.hypot(*position.T) < reach - 0.6 * acinus_um] * (1, squeeze)
    if len(position) == 0:
        return lobule
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    radius = acinus_um * np.exp(rng.normal(0, 0.22, len(position)))
    outlines = _blobs(rng, centre + position @ turn, radius, rng.uniform(0.55, 1.0, len(position)), 0.1)
    return [*lobule, _gland(rng, outlines, rng.uniform(0.55, 0.9, len(position)) * radius, filled)]


def _gland(rng: np.random.Generator, outlines: Floats, thick_um: NDArray[np.float64], filled: bool) -> Gland:
    radius_um = (2.8, 2.2)
    if filled:
        nuclei = np.concatenate(
            [_packed(rng, outline, gap_um=6.2, radius_um=radius_um) for outline in outlines]
        )
        return Gland("gland", outlines, outlines[:0], nuclei, 0.0)
    outer = _ring(rng, outlines, 3.0, gap_um=5.4, radius_um=radius_um, flat=False)
    inner = _ring(rng, outlines[thick_um > 10], 8.6, gap_um=6.0, radius_um=radius_um, flat=False)
    return Gland("gland", outlines, _shrink(outlines, thick_um), np.concatenate([outer, inner]), 0.0)


def _blobs(
    rng: np.random.Generator,
    centres: NDArray[np.float64],
    radius: NDArray[np.float64],
    squeeze: NDArray[np.float64],
    rough: float,
) -> Floats:
    """Return one wavy ellipse for each of k centres, (k, n, 2): points are 5 um apart on the largest."""
    n_blobs, n_points = len(centres), int(np.clip(2 * np.pi * radius.max() / 5, 16, 160))
    turn = np.linspace(0, 2 * np.pi, n_points, endpoint=False)
    wave = np.arange(2, 7)[:, None]
    height = rough * rng.normal(size=(n_blobs, 5, 1)) / (wave - 0.5)
    ripple = (height * np.cos(wave * turn + rng.uniform(0, 2 * np.pi, (n_blobs, 5, 1)))).sum(1)
    reach = radius[:, None] * np.clip(1 + ripple, 0.4, 1.8)
    along, across = reach * np.cos(turn), squeeze[:, None] * reach * np.sin(turn)
    angle = rng.uniform(0, np.pi, (n_blobs, 1))
    x = along * np.cos(angle) - across * np.sin(angle)
    y = along * np.sin(angle) + across * np.cos(angle)
    return (centres[:, None] + np.stack([x, y], axis=-1)).astype(np.float32)


def _shrink(outlines: Floats, by_um: NDArray[np.float64]) -> Floats:
    """Move outlines inwards; too small ones are left out, points that cross over stop at the centre."""
    centre = outlines.mean(1, keepdims=True)
    away = outlines - centre
    large = np.median(np.sqrt((away**2).sum(-1)), axis=1) >= by_um + 2
    outlines, centre, away = outlines[large], centre[large], away[large]
    step = np.roll(outlines, -1, axis=1) - np.roll(outlines, 1, axis=1)
    normal = np.stack([-step[..., 1], step[..., 0]], axis=-1)
    normal /= np.sqrt((normal**2).sum(-1, keepdims=True)) + 1e-6
    moved = outlines + by_um[large, None, None].astype(np.float32) * normal
    crossed = (away * (moved - centre)).sum(-1, keepdims=True) < 0
    return np.where(crossed, centre, moved).astype(np.float32)


def _ring(
    rng: np.random.Generator,
    outlines: Floats,
    depth_um: float,
    *,
    gap_um: float,
    radius_um: tuple[float, float],
    flat: bool,
) -> Floats:
    """Line outlines with nuclei: across the wall in a gland, along it (``flat``) in a vessel."""
    lines = _shrink(outlines, np.full(len(outlines), depth_um))
    step = np.roll(lines, -1, axis=1) - lines
    length = np.sqrt((step**2).sum(-1))
    around = length.sum(1)
    count = np.maximum((around / gap_um).astype(int), 1)
    line = np.repeat(np.arange(len(lines)), count)
    index = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    where = (index + rng.uniform(-0.25, 0.25, len(line))) / count[line] % 1.0
    # Each line's share of its own length plus its number rises over all lines: one search serves them all.
    ends = (np.cumsum(length, axis=1) / around[:, None] + np.arange(len(lines))[:, None]).ravel()
    segment = np.minimum(np.searchsorted(ends, where + line), step.size // 2 - 1)
    position = lines.reshape(-1, 2)[segment] + rng.random((len(line), 1)) * step.reshape(-1, 2)[segment]
    angle = np.arctan2(*step.reshape(-1, 2)[segment].T[::-1]) + (0 if flat else np.pi / 2)
    return _nuclei(rng, position, radius_um, angle)


def _packed(
    rng: np.random.Generator, outline: Floats, *, gap_um: float, radius_um: tuple[float, float]
) -> Floats:
    """Fill an outline with evenly spaced regular nuclei."""
    low, high = outline.min(0), outline.max(0)
    grid = np.stack(np.meshgrid(np.arange(low[0], high[0], gap_um), np.arange(low[1], high[1], gap_um)), -1)
    position = grid.reshape(-1, 2) + rng.normal(0, 0.2 * gap_um, (grid.size // 2, 2))
    return _nuclei(rng, position[_inside(position, outline)], radius_um, rng.uniform(0, np.pi, len(position)))


def _nuclei(
    rng: np.random.Generator, position: NDArray[np.floating], radius_um: tuple[float, float], angle: Floats
) -> Floats:
    n = len(position)
    size = np.exp(rng.normal(0, 0.08, n))
    stain = 1.1 * np.exp(rng.normal(0, 0.1, n))
    columns = [position[:, 0], position[:, 1], radius_um[0] * size, radius_um[1] * size, angle[:n], stain]
    return np.stack(columns, axis=1).astype(np.float32)


def _inside(points: NDArray[np.floating], outline: Floats) -> NDArray[np.bool_]:
    """Return which points are inside a polygon, by counting crossings, bool ``(n,)``."""
    x, y = points[:, :1], points[:, 1:]
    x0, y0 = outline[:, 0], outline[:, 1]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    crosses = (y0 > y) != (y1 > y)
    at = x0 + (y - y0) * (x1 - x0) / np.where(y1 == y0, 1e-9, y1 - y0)
    return (crosses & (x < at)).sum(1) % 2 == 1
