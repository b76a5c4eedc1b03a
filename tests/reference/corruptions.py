"""The published corruptions on one image, in numpy, scipy and Pillow; draws are handed in.

Images are (height, width, channels) arrays in [0, 1].
"""

import colorsys
import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage


def gaussian(image, sigma, mode="nearest", truncate=4.0):
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode=mode, truncate=truncate)


def defocus(image, radius, alias_blur):
    reach, taps = (8, 3) if radius <= 8 else (radius, 5)
    x, y = np.meshgrid(*2 * [np.arange(-reach, reach + 1)])
    disk = (x**2 + y**2 <= radius**2) / np.sum(x**2 + y**2 <= radius**2)
    soft = np.exp(-0.5 * ((np.arange(taps) - taps // 2) / alias_blur) ** 2)
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, soft / soft.sum(), axis, mode="mirror")
    return ndimage.correlate(image, disk[..., None], mode="mirror")


def glass_round(image, moves, delta):
    """One round; moves[:, i, j] is (dy, dx) of row delta + 1 + i, column delta + 1 + j."""
    image = image.copy()
    height, width = image.shape[:2]
    for h in range(height - delta, delta, -1):
        for w in range(width - delta, delta, -1):
            dy, dx = moves[:, h - delta - 1, w - delta - 1]
            image[h, w] = image[h + dy, w + dx]
    return image


def streak(image, angle, radius, sigma):
    height, width = image.shape[:2]
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    out = np.zeros_like(image)
    for i, weight in zip(steps, weights / weights.sum(), strict=True):
        dx = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        dy = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        rows = np.clip(np.arange(height) + dy, 0, height - 1)
        columns = np.clip(np.arange(width) + dx, 0, width - 1)
        out += weight * image[rows][:, columns]
    return out


def clipped_zoom(image, factor):
    height, width = image.shape[:2]
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - h) // 2, (width - w) // 2
    image = image[top : top + h, left : left + w]
    image = ndimage.zoom(image, (factor, factor, 1), order=1, mode="nearest")
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def zoom_blur(image, factors):
    return (image + sum(clipped_zoom(image, f) for f in factors)) / (len(factors) + 1)


def snow(image, noise, angle, flake, cut, radius, sigma, kept):
    layer = clipped_zoom(noise[..., None], flake)
    layer = np.clip(np.where(layer < cut, 0, layer), 0, 1)
    layer = streak(layer, angle, radius, sigma)
    grey = image @ [[0.299], [0.587], [0.114]]
    image = kept * image + (1 - kept) * np.maximum(image, grey * 1.5 + 0.5)
    return np.clip(image + layer + np.rot90(layer, k=2), 0, 1)


def plasma(size, decay, draw):
    """Diamond-square, point by point; draw(n) gives an (n, n) array of U[-1, 1]."""
    grid, step, wobble = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half, n = step // 2, size // step
        shapes = (  # first point, and where its four corners lie
            ((half, half), ((-half, -half), (-half, half), (half, -half), (half, half))),
            ((0, half), ((-half, 0), (half, 0), (0, -half), (0, half))),
            ((half, 0), ((-half, 0), (half, 0), (0, -half), (0, half))),
        )
        for (top, left), corners in shapes:
            noise = wobble**2 * draw(n)
            for i, j in np.ndindex(n, n):
                y, x = top + i * step, left + j * step
                around = [grid[(y + a) % size, (x + b) % size] for a, b in corners]
                grid[y, x] = sum(around) / 4 + noise[i, j]
        step, wobble = half, wobble / decay
    return (grid - grid.min()) / (grid - grid.min()).max()


def brightness(image, c):
    def lift(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb(h, s, min(v + c, 1))

    return np.apply_along_axis(lift, 2, image)


def saturate(image, factor, shift):
    def colour(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb(h, min(max(s * factor + shift, 0), 1), v)

    return np.apply_along_axis(colour, 2, image)


def contrast(image, c):
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * c + mean


def to_pillow(image):
    return Image.fromarray((image * 255).round().astype(np.uint8).squeeze())


def jpeg(image, quality):
    buffer = io.BytesIO()
    to_pillow(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)).reshape(image.shape) / 255


def pixelate(image, c):
    height, width = image.shape[:2]
    small = to_pillow(image).resize((int(width * c), int(height * c)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def read_at(image, matrix, shift):
    """Linear interpolation at c + matrix (p - c) + shift about the middle c; (y, x) order."""
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - matrix @ centre + shift
    planes = [
        ndimage.affine_transform(plane, matrix, offset, order=1, mode="grid-constant")
        for plane in np.moveaxis(image, 2, 0)
    ]
    return np.stack(planes, axis=2)


def elastic(image, jolt, dx, dy):
    """jolt (3, 2): by how much each corner (x, y) moves; dx, dy: the displacement field."""
    height, width = image.shape[:2]
    centre, half = np.array([width // 2, height // 2]), min(height, width) // 3
    before = np.array([centre + half, centre + np.array([half, -half]), centre - half], dtype=float)
    moved = np.column_stack([before + jolt, np.ones(3)])
    back = np.linalg.solve(moved, before)  # rows of (x, y, 1) of the output -> (x, y) of the input
    y, x = np.mgrid[:height, :width].astype(float)
    read = np.stack([x, y, np.ones_like(x)], axis=-1) @ back
    out = []
    for plane in np.moveaxis(image, 2, 0):
        bent = ndimage.map_coordinates(
            plane, read[..., ::-1].transpose(2, 0, 1), order=1, mode="mirror"
        )
        out.append(ndimage.map_coordinates(bent, [y + dy, x + dx], order=1, mode="reflect"))
    return np.stack(out, axis=2)


def equalise(levels):
    """cv2.equalizeHist of an array of integers 0 ... 255."""
    counts = np.bincount(levels.ravel(), minlength=256)
    upto, lowest = np.cumsum(counts), counts[levels.min()]
    if lowest == levels.size:
        return levels
    return np.round((upto - lowest) * 255 / (levels.size - lowest))[levels]
