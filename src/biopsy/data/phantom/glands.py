"""Lobules, ducts and vessels as outlines and nuclei in micrometres."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from biopsy.data.phantom.habits import Habit
from biopsy.data.phantom.noise import Floats

Kind = Literal["bed", "gland", "vessel"]


@dataclass(frozen=True)
class Gland:
    """One closed outline with its hollow and its nuclei.

    ``outline`` and ``hollow`` are (n, 2) x, y in micrometres (``hollow`` may be empty); ``nuclei`` is (n, 6):
    x, y, long and short radius, angle, amount of stain. A ``bed`` is the loose stroma a lobule lies in.
    """

    kind: Kind
    outline: Floats
    hollow: Floats
    nuclei: Floats
    content: float  # what the hollow holds: 0 nothing, up to 1 secretion (gland) or blood (vessel)


def grow_glands(
    rng: np.random.Generator, habit: Habit, tissue: Floats, tumour: Floats, fat: Floats, cell_um: float
) -> list[Gland]:
    """Scatter ducts and lobules over stroma; few survive inside the tumour."""
    n_wanted = rng.poisson(habit.glands_per_mm2 * (tissue > 0).sum() * cell_um**2 / 1e6)
    places = _sites(rng, (tissue > 150) & (fat < 0.7), n_wanted * 2, cell_um)
    glands: list[Gland] = []
    centres: list[tuple[float, float, float]] = []
    for x, y in places:
        row, column = int(y / cell_um), int(x / cell_um)
        if tumour[row, column] > -150 and rng.random() < 0.85:
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
        outline = _blob(rng, x, y, radius, rng.uniform(0.35, 1.0), 0.12)
        wall = rng.uniform(3, 4 + 0.25 * radius)
        hollow = _shrink(outline, wall)
        nuclei = _ring(rng, outline, 0.5 * wall, gap_um=14, radius_um=(3.6, 1.4), flat=True)
        vessels.append(Gland("vessel", outline, hollow, nuclei, float(rng.random() < 0.45)))
    return vessels


def _sites(
    rng: np.random.Generator, allowed: NDArray[np.bool_], n: int, cell_um: float
) -> list[tuple[float, float]]:
    rows, columns = np.nonzero(allowed)
    if len(rows) == 0:
        return []
    chosen = rng.integers(len(rows), size=n)
    return [
        (float((columns[i] + rng.random()) * cell_um), float((rows[i] + rng.random()) * cell_um)) for i in chosen
    ]


def _duct(rng: np.random.Generator, x: float, y: float, radius: float, filled: bool) -> Gland:
    outline = _blob(rng, x, y, radius, rng.uniform(0.25, 0.9), 0.25)
    thick = rng.uniform(13, 24)
    return _gland(rng, outline, thick, filled, float(rng.random() < 0.2))


def _lobule(rng: np.random.Generator, x: float, y: float, reach: float, filled: bool) -> list[Gland]:
    nothing = np.zeros((0, 2), np.float32)
    bed = _blob(rng, x, y, reach * 1.08, rng.uniform(0.6, 1.0), 0.12)
    lobule = [Gland("bed", bed, nothing, np.zeros((0, 6), np.float32), rng.uniform(0.2, 1.0))]
    acinus_um = rng.uniform(13, 22) * (1.25 if filled else 1.0)
    gap = acinus_um * rng.uniform(2.1, 3.0)
    angle, squeeze = rng.uniform(0, np.pi), rng.uniform(0.6, 1.0)
    for row in np.arange(-reach, reach, 0.87 * gap):
        for column in np.arange(-reach, reach, gap) + rng.uniform(0, gap):
            dx, dy = column + rng.normal(0, 0.16 * gap), row + rng.normal(0, 0.16 * gap)
            if np.hypot(dx, dy) > reach - 0.6 * acinus_um:
                continue
            dy *= squeeze
            centre_x = x + dx * np.cos(angle) - dy * np.sin(angle)
            centre_y = y + dx * np.sin(angle) + dy * np.cos(angle)
            radius = acinus_um * np.exp(rng.normal(0, 0.22))
            outline = _blob(rng, centre_x, centre_y, radius, rng.uniform(0.55, 1.0), 0.1)
            thick = rng.uniform(0.55, 0.9) * radius
            lobule.append(_gland(rng, outline, thick, filled, float(rng.random() < 0.25)))
    return lobule


def _gland(rng: np.random.Generator, outline: Floats, thick: float, filled: bool, content: float) -> Gland:
    radius_um = (3.1, 2.5)
    if filled:
        nuclei = _packed(rng, outline, gap_um=6.8, radius_um=radius_um)
        return Gland("gland", outline, np.zeros((0, 2), np.float32), nuclei, content)
    nuclei = _ring(rng, outline, 3.2, gap_um=6.0, radius_um=radius_um, flat=False)
    if thick > 11:
        inner = _ring(rng, _shrink(outline, 6.5), 3.0, gap_um=6.5, radius_um=radius_um, flat=False)
        nuclei = np.concatenate([nuclei, inner])
    return Gland("gland", outline, _shrink(outline, thick), nuclei, content)


def _blob(
    rng: np.random.Generator, x: float, y: float, radius: float, squeeze: float, rough: float
) -> Floats:
    """Give a wavy ellipse as an outline of points about 5 um apart."""
    n = int(np.clip(2 * np.pi * radius / 5, 12, 160))
    turn = np.linspace(0, 2 * np.pi, n, endpoint=False)
    reach = np.ones(n)
    for wave in range(2, 7):
        reach += rough * rng.normal() / (wave - 0.5) * np.cos(wave * turn + rng.uniform(0, 2 * np.pi))
    reach = radius * np.clip(reach, 0.4, 1.8)
    along, across = reach * np.cos(turn), squeeze * reach * np.sin(turn)
    angle = rng.uniform(0, np.pi)
    points = (x + along * np.cos(angle) - across * np.sin(angle), y + along * np.sin(angle) + across * np.cos(angle))
    return np.stack(points, axis=1).astype(np.float32)


def _shrink(outline: Floats, by_um: float) -> Floats:
    """Move an outline inwards; where it would turn inside out there is no hollow."""
    step = np.roll(outline, -1, 0) - np.roll(outline, 1, 0)
    normal = np.stack([-step[:, 1], step[:, 0]], axis=1) / (np.linalg.norm(step, axis=1, keepdims=True) + 1e-6)
    moved = outline + by_um * normal
    centre = outline.mean(0)
    if np.median(np.linalg.norm(outline - centre, axis=1)) < by_um + 2:
        return np.zeros((0, 2), np.float32)
    turned = ((outline - centre) * (moved - centre)).sum(1) < 0
    return np.where(turned[:, None], centre, moved).astype(np.float32)


def _ring(
    rng: np.random.Generator,
    outline: Floats,
    depth_um: float,
    *,
    gap_um: float,
    radius_um: tuple[float, float],
    flat: bool,
) -> Floats:
    """Line an outline with nuclei: across the wall in a gland, along it (``flat``) in a vessel."""
    line = _shrink(outline, depth_um)
    if len(line) == 0:
        return np.zeros((0, 6), np.float32)
    step = np.roll(line, -1, 0) - line
    length = np.linalg.norm(step, axis=1)
    along = np.concatenate([[0], np.cumsum(length)])
    n = max(int(along[-1] / gap_um), 1)
    where = (np.arange(n) + rng.uniform(-0.25, 0.25, n)) / n * along[-1] % along[-1]
    segment = np.clip(np.searchsorted(along, where, side="right") - 1, 0, len(line) - 1)
    share = (where - along[segment]) / (length[segment] + 1e-6)
    place = line[segment] + share[:, None] * step[segment]
    angle = np.arctan2(step[segment, 1], step[segment, 0]) + (0 if flat else np.pi / 2)
    return _nuclei(rng, place, radius_um, angle)


def _packed(rng: np.random.Generator, outline: Floats, *, gap_um: float, radius_um: tuple[float, float]) -> Floats:
    """Fill an outline with evenly spaced regular nuclei."""
    low, high = outline.min(0), outline.max(0)
    grid = np.stack(np.meshgrid(np.arange(low[0], high[0], gap_um), np.arange(low[1], high[1], gap_um)), -1)
    place = grid.reshape(-1, 2) + rng.normal(0, 0.2 * gap_um, (grid.size // 2, 2))
    return _nuclei(rng, place[_inside(place, outline)], radius_um, rng.uniform(0, np.pi, len(place)))


def _nuclei(
    rng: np.random.Generator, place: NDArray[np.floating], radius_um: tuple[float, float], angle: Floats
) -> Floats:
    n = len(place)
    size = np.exp(rng.normal(0, 0.08, n))
    stain = 1.0 * np.exp(rng.normal(0, 0.1, n))
    columns = [place[:, 0], place[:, 1], radius_um[0] * size, radius_um[1] * size, angle[:n], stain]
    return np.stack(columns, axis=1).astype(np.float32)


def _inside(points: NDArray[np.floating], outline: Floats) -> NDArray[np.bool_]:
    """Tell which points lie inside a polygon, by counting crossings."""
    x, y = points[:, :1], points[:, 1:]
    x0, y0 = outline[:, 0], outline[:, 1]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    crosses = (y0 > y) != (y1 > y)
    at = x0 + (y - y0) * (x1 - x0) / np.where(y1 == y0, 1e-9, y1 - y0)
    return (crosses & (x < at)).sum(1) % 2 == 1
