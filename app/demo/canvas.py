"""Painting one slice of a phantom: tubes, ellipsoids, bars and textures, with smooth edges.

Lengths are millimetres in the patient's coordinates (x to the left, y to the back, z to the
head, PS3.3 C.7.6.2.1.1), grey values are Hounsfield units.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.floating[Any]]
Points = Sequence[tuple[float, float, float]]

HEIGHT_MM = 400.0
"""From the first slice's upper face to the last one's lower face."""
FIELD_MM = 384.0
"""Width and depth of a slice."""

AIR, FAT, MUSCLE, WATER, BLOOD = -1000.0, -100.0, 58.0, 8.0, 190.0


@dataclass(frozen=True)
class Tubes:
    """Round pieces of tube from `a` to `b` (N x 3), with a radius at each end (N)."""

    a: Image
    b: Image
    ra: Image
    rb: Image

    @classmethod
    def along(cls, points: Points, *radii: float) -> "Tubes":
        """One tube through `points`; the radius changes evenly between those given."""
        line = np.array(points, np.float32)
        steps = np.linspace(0, len(radii) - 1, len(line))
        r = np.interp(steps, np.arange(len(radii)), radii).astype(np.float32)
        return cls(line[:-1], line[1:], r[:-1], r[1:])

    @classmethod
    def joined(cls, parts: "Sequence[Tubes]") -> "Tubes":
        return cls(
            *(np.concatenate([getattr(p, f) for p in parts]) for f in ("a", "b", "ra", "rb"))
        )

    def mirrored(self) -> "Tubes":
        flip = np.array([-1, 1, 1], np.float32)
        return Tubes(self.a * flip, self.b * flip, self.ra, self.rb)

    def wider(self, by: float) -> "Tubes":
        return Tubes(self.a, self.b, self.ra + np.float32(by), self.rb + np.float32(by))


class Canvas:
    """One slice being painted: later shapes cover earlier ones, edges are smooth."""

    def __init__(self, size: int, z: float) -> None:
        self.z = z
        self.px = FIELD_MM / size
        axis = ((np.arange(size, dtype=np.float32) + 0.5) * self.px - FIELD_MM / 2).astype("f4")
        self.x, self.y = axis[None, :], axis[:, None]
        self.hu: Image = np.full((size, size), AIR, np.float32)
        self._first_row = 0

    def rows(self, depth: float) -> "tuple[Canvas, slice]":
        """The rows up to `depth` (mm) from the middle, on the same pixels; and which they are."""
        keep = np.flatnonzero(np.abs(self.y[:, 0]) <= depth)
        rows = slice(int(keep[0]), int(keep[-1]) + 1)
        part = copy(self)
        part.y, part.hu, part._first_row = self.y[rows], self.hu[rows], rows.start
        return part, rows

    def cover(self, distance: Image) -> Image:
        """How much of a pixel lies inside, 0 to 1, from its distance (mm) to the surface."""
        amount: Image = np.clip(distance / np.float32(self.px) + np.float32(0.5), 0, 1)
        return amount

    def paint(
        self, amount: Image, hu: float | Image, box: tuple[slice, slice] = np.s_[:, :]
    ) -> None:
        view = self.hu[box]
        view += amount * (np.asarray(hu, np.float32) - view)

    def box(self, x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice] | None:
        """The pixels of a rectangle with a margin; None where it lies outside the image."""

        def pixels(low: float, high: float, start: int, count: int) -> slice:
            first = int((low + FIELD_MM / 2) / self.px) - 2 - start
            last = int((high + FIELD_MM / 2) / self.px) + 3 - start
            return slice(max(0, first), min(count, last))

        rows = pixels(y0, y1, self._first_row, self.hu.shape[0])
        columns = pixels(x0, x1, 0, self.hu.shape[1])
        return (rows, columns) if rows.stop > rows.start and columns.stop > columns.start else None

    def ellipsoid(
        self,
        centre: tuple[float, float, float],
        radii: tuple[float, float, float],
        hu: float | Image,
        *,
        turn: float = 0.0,
        within: Image | None = None,
    ) -> None:
        """Paint an ellipsoid, turned by `turn` degrees about z, only `within` (0 to 1)."""
        height = 1 - ((self.z - centre[2]) / radii[2]) ** 2
        if height <= 0:
            return
        rx, ry = radii[0] * height**0.5, radii[1] * height**0.5
        reach = max(rx, ry)
        box = self.box(centre[0] - reach, centre[0] + reach, centre[1] - reach, centre[1] + reach)
        if box is None:
            return
        dx, dy = self.x[:, box[1]] - np.float32(centre[0]), self.y[box[0]] - np.float32(centre[1])
        c, s = np.float32(np.cos(np.radians(turn))), np.float32(np.sin(np.radians(turn)))
        u, v = (dx * c + dy * s) / np.float32(rx), (dy * c - dx * s) / np.float32(ry)
        amount = self.cover((1 - np.sqrt(u * u + v * v)) * np.float32(min(rx, ry)))
        if within is not None:
            amount = amount * within[box]
        self.paint(amount, hu[box] if isinstance(hu, np.ndarray) else hu, box)

    def tubes(self, tubes: Tubes, hu: float, *, within: Image | None = None) -> None:
        """Paint where the slice cuts the tubes."""
        reach = np.maximum(tubes.ra, tubes.rb)
        low = np.minimum(tubes.a[:, 2], tubes.b[:, 2]) - reach
        high = np.maximum(tubes.a[:, 2], tubes.b[:, 2]) + reach
        for i in np.flatnonzero((low < self.z) & (self.z < high)):
            self._tube(tubes.a[i], tubes.b[i], float(tubes.ra[i]), float(tubes.rb[i]), hu, within)

    def bar(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        r: float,
        hu: float,
        within: Image | None = None,
    ) -> None:
        """Paint a bar that lies in the slice, with round ends."""
        a, b = (np.array((*p, self.z), np.float32) for p in (start, end))
        self._tube(a, b, r, r, hu, within)

    def _tube(
        self, a: Image, b: Image, ra: float, rb: float, hu: float, within: Image | None
    ) -> None:
        reach = max(ra, rb)
        along = b - a
        # Only the part of the piece that can reach this slice.
        t0, t1 = 0.0, 1.0
        if abs(along[2]) > 1e-3:
            ends = sorted((self.z + d - float(a[2])) / float(along[2]) for d in (-reach, reach))
            t0, t1 = max(0.0, ends[0]), min(1.0, ends[1])
        p, q = a + along * np.float32(t0), a + along * np.float32(t1)
        box = self.box(
            float(min(p[0], q[0])) - reach,
            float(max(p[0], q[0])) + reach,
            float(min(p[1], q[1])) - reach,
            float(max(p[1], q[1])) + reach,
        )
        if box is None:
            return
        dx, dy, dz = self.x[:, box[1]] - a[0], self.y[box[0]] - a[1], np.float32(self.z) - a[2]
        square = float(along @ along) or 1.0
        t = np.clip((dx * along[0] + dy * along[1] + dz * along[2]) / np.float32(square), 0, 1)
        away = np.sqrt(
            (dx - t * along[0]) ** 2 + (dy - t * along[1]) ** 2 + (dz - t * along[2]) ** 2
        )
        amount = self.cover(np.float32(ra) + t * np.float32(rb - ra) - away)
        if within is not None:
            amount = amount * within[box]
        self.paint(amount, hu, box)


class Texture:
    """A smooth random field: `knots` values to each side, about -1 to 1, bent with z."""

    def __init__(self, rng: np.random.Generator, size: int, knots: int) -> None:
        self._values = rng.standard_normal((knots + 1, knots, knots)).astype(np.float32)
        position = np.linspace(0, knots - 1.001, size)
        self._left = position.astype(int)
        part = (position - self._left).astype(np.float32)
        self._part = part * part * (3 - 2 * part)

    def at(self, z: float, rows: slice) -> Image:
        position = min(max(z / HEIGHT_MM, 0), 0.999) * (len(self._values) - 1)
        low = int(position)
        share = np.float32(position - low)
        plane: Image = self._values[low] + share * (self._values[low + 1] - self._values[low])
        for pixels in (rows, slice(None)):  # along y, then along x
            left, part = self._left[pixels], self._part[pixels, None]
            plane = (plane[left] * (1 - part) + plane[left + 1] * part).T
        return plane


def profile(z: float, *nodes: tuple[float, float]) -> float:
    """The value at z on the line through (z, value) nodes."""
    return float(np.interp(z, [n[0] for n in nodes], [n[1] for n in nodes]))


def blurred(image: Image, part: np.float32) -> Image:
    """Each pixel gives `part` of itself to each neighbour, along both axes."""
    for axis in (0, 1):
        near = np.roll(image, 1, axis)
        near += np.roll(image, -1, axis)
        image = image * (1 - 2 * part) + near * part
    return image
