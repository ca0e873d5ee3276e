"""Effects of a phone's camera and its software.

Every function takes a picture, uint8 RGB (S, S, 3), and a generator, and returns a new picture of the same type. The caller
decides how often each is applied (conf/augmentation).
"""

from __future__ import annotations

import cv2
import numpy as np

LEVELS = np.linspace(0, 1, 256, dtype=np.float32)
LINEAR = LEVELS**2.2  # linear light of an 8-bit value: sRGB's curve is close to this power
SMALLEST = 60  # pixels: a product in a phone photo is rarely smaller


def white_balance(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A wrong white balance: warm to cold along one axis, green to magenta along the other."""
    warm, green = rng.normal(0, 0.11), rng.normal(0, 0.04)
    gains = np.exp([warm - green / 2, green, -warm - green / 2])
    curves = np.clip(LINEAR[:, None] * gains / gains.max(), 0, 1) ** (1 / 2.2)
    return cv2.LUT(picture, _table(curves))


def tone_curve(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure in linear light, highlight roll-off, contrast, lifted or crushed shadows, as one monotonic curve."""
    light = LINEAR * 2 ** rng.uniform(-1.7, 0.9)
    shoulder = rng.uniform(0, 1)  # 0: clipped, 1: rolled off like film
    light = (1 - shoulder) * np.minimum(light, 1) + shoulder * light * (1 + light / 4) / (1 + light)
    curve = np.clip(light, 0, 1) ** (1 / 2.2)
    bent = curve * curve * (3 - 2 * curve)
    curve += rng.uniform(-0.3, 0.7) * (bent - curve)
    black = rng.uniform(-0.06, 0.1)
    curve = black + (1 - black) * curve
    return cv2.LUT(picture, _table(np.repeat(curve[:, None], 3, axis=1)))


def glare(picture: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reflections of lamps on a shiny product: one to three soft stripes or spots inside `mask`, uint8 (S, S)."""
    size = picture.shape[0]
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return picture.copy()
    shine: np.ndarray = np.zeros(mask.shape, np.uint8)
    angle = rng.uniform(0, 180)  # all lamps have one direction
    for _ in range(int(rng.integers(1, 4))):
        centre = (int(left + width * rng.random()), int(top + height * rng.random()))
        long = max(2, int(max(width, height) * rng.uniform(0.05, 0.6)))
        axes = (long, max(1, int(min(long, max(width, height) * rng.uniform(0.01, 0.12)))))
        cv2.ellipse(shine, centre, axes, angle + rng.normal(0, 5), 0, 360, int(rng.uniform(90, 255)), -1, cv2.LINE_AA)
    shine = cv2.GaussianBlur(shine, (0, 0), max(0.6, size * rng.uniform(0.003, 0.02)))
    shine = cv2.multiply(shine, mask, scale=1 / 255)
    dark = cv2.multiply(255 - picture, cv2.merge([255 - shine] * 3), scale=1 / 255)
    return 255 - np.asarray(dark, np.uint8)  # screen blending


def low_resolution(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Low resolution: shrink to between SMALLEST pixels a side and the picture's own size, then enlarge."""
    size = picture.shape[0]
    side = round(np.exp(rng.uniform(np.log(min(SMALLEST, size)), np.log(size))))
    small = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    interpolation = cv2.INTER_CUBIC if rng.random() < 0.5 else cv2.INTER_LINEAR
    return cv2.resize(small, (size, size), interpolation=interpolation)


def sharpen(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unsharp masking, with the bright halos along edges that phones produce."""
    amount = rng.uniform(0.3, 1.8)
    soft = cv2.GaussianBlur(picture, (0, 0), picture.shape[0] * rng.uniform(0.003, 0.008))
    return cv2.addWeighted(picture, 1 + amount, soft, -amount, 0)


def motion_blur(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Camera shake along a slightly curved path, of up to a sixteenth of the picture."""
    reach = max(1.0, picture.shape[0] / 32 * rng.random() ** 1.5)
    angle, bend = rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5)
    along = np.linspace(-reach, reach, 17)
    across = bend * (along**2 / reach - reach / 2)
    path = np.stack([along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)], axis=1)
    half = int(np.ceil(1.2 * reach)) + 1
    trace: np.ndarray = np.zeros((2 * half + 1, 2 * half + 1), np.uint8)
    cv2.polylines(trace, [np.round((path + half) * 16).astype(np.int32)], False, 255, 1, cv2.LINE_AA, 4)
    kernel = trace.astype(np.float32) / float(trace.sum())
    return cv2.filter2D(picture, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def sensor_noise(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise as after demosaicing: correlated over pixels, with a variance that grows with the light; chroma is coarser."""
    size = picture.shape[0]
    strength, colour = rng.uniform(2, 12), rng.uniform(0, 8)
    grain = _grain(rng, (size, size), rng.uniform(1.2, 2.2))
    tint = _grain(rng, (size, size, 3), rng.uniform(2.5, 6))
    deviation = np.sqrt(0.25 + 0.75 * LEVELS)  # read and shot noise
    scale = cv2.LUT(picture, deviation.astype(np.float32))
    noise = (strength * grain[..., None] + colour * tint) * scale
    return cv2.add(picture.astype(np.float32), noise).clip(0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG compression with a quality of 15 to 90, sometimes twice."""
    for _ in range(1 + (rng.random() < 0.3)):
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15, 91))])
        picture = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))
    return picture


def _table(curves: np.ndarray) -> np.ndarray:
    return (curves * 255 + 0.5).clip(0, 255).astype(np.uint8)[None]


def _grain(rng: np.random.Generator, shape: tuple[int, ...], pixels: float) -> np.ndarray:
    """Normal noise with a correlation length of about `pixels`, standard deviation 1; float32."""
    small = [max(2, round(extent / pixels)) for extent in shape[:2]]
    grain = cv2.resize(rng.standard_normal((*small, *shape[2:]), np.float32), shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return grain / max(float(grain.std()), 1e-6)
