"""How one patient's slide was cut, stained and scanned, and how it turns stain into pixels."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from biopsy.core.seeds import make_rng
from biopsy.data.phantom.noise import Floats

INKS = {  # optical density of the inks that mark a specimen's margin, per channel
    "teal": (1.3, 0.45, 0.5),
    "black": (1.9, 1.8, 1.8),
    "brown": (0.7, 1.6, 2.2),
    "blue": (1.5, 1.0, 0.35),
}


@dataclass(frozen=True)
class Look:
    """What all pixels of one patient share.

    ``stains`` is (3, 3): optical density per channel of one unit of haematoxylin, eosin and red blood.
    """

    stains: Floats
    white: Floats
    gamma: float
    blur_px: float
    sharpen: float
    noise: float
    ink: str | None


def draw_look(seed: int, patient: str) -> Look:
    """Draw a patient's stain and scanner; the same seed and patient give the same look."""
    rng = make_rng(seed, "phantom", patient, "look")
    # Ratios read off stroma and the darkest nuclei of real IDC patches, none of the benchmark's test slides.
    haematoxylin = np.array([0.84, 0.98, 0.53]) * rng.normal(1.0, [0.07, 0.06, 0.08])
    eosin = np.array([0.11, 0.56, 0.33]) * rng.normal(1.0, [0.2, 0.06, 0.09])
    blood = np.array([0.16, 1.15, 0.72]) * rng.normal(1.0, [0.25, 0.08, 0.12])
    amounts = np.exp(rng.normal(0.0, [0.2, 0.2, 0.1]))
    stains = np.stack([haematoxylin, eosin, blood]) * amounts[:, None]
    return Look(
        stains=np.clip(stains, 0.005, None).astype(np.float32),
        white=np.clip(rng.normal(243, 3, 1) + rng.normal(0, 1.2, 3), 232, 254).astype(np.float32),
        gamma=float(np.exp(rng.normal(0.0, 0.07))),
        blur_px=float(rng.uniform(0.15, 0.42)),
        sharpen=float(rng.uniform(0.0, 0.45)),
        noise=float(rng.uniform(0.6, 2.2)),
        ink=str(rng.choice(list(INKS))) if rng.random() < 0.4 else None,
    )


def transmit(density: Floats) -> Floats:
    """Give the share of light that passes, ``exp(-density)``, in [0, 1]."""
    return np.exp(-density)


def scan(light: Floats, look: Look, seed: int) -> NDArray[np.uint8]:
    """Turn transmitted light ``(H, W, 3)`` in [0, 1] at the final pixel size into a scanner's RGB."""
    if look.blur_px > 0.2:
        light = _blur(light, look.blur_px)
    if look.sharpen > 0:
        light = light + look.sharpen * (light - _blur(light, 1.0))
    values = look.white * np.power(np.clip(light, 0.0, 1.03), np.float32(look.gamma))
    drawn = np.random.default_rng(seed).integers(0, 256, (*light.shape[:2], 4), dtype=np.uint8)
    grain = (drawn.astype(np.float32) - 127.5) * np.float32(look.noise / 73.9)  # spread of a byte: 73.9
    values += 0.6 * grain[..., :1] + 0.5 * grain[..., 1:]
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _blur(light: Floats, sigma_px: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(light, (0, 0), sigma_px), np.float32)
