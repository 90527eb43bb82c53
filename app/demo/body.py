"""The body of the synthetic CT: an anatomically suggestive torso, drawn from formulas.

What one seed varies is made once; each slice is then drawn on its own.
"""

import numpy as np

from app.demo.canvas import (
    AIR,
    BLOOD,
    FAT,
    MUSCLE,
    WATER,
    Canvas,
    Image,
    Texture,
    Tubes,
    blurred,
    profile,
)


class Body:
    """The phantom: what one seed varies is made once, then each slice is drawn on its own."""

    def __init__(self, seed: int, size: int) -> None:
        self._seed, self._size = seed, size
        rng = np.random.default_rng([seed, 1])
        self._width = float(rng.uniform(0.93, 1.02))
        self._depth = float(rng.uniform(0.93, 1.04))
        self._fat = float(rng.uniform(9, 20))
        self._heart = float(rng.uniform(0.93, 1.08))
        self._level = float(rng.uniform(-8, 8))  # where the vertebrae begin
        self._fine = Texture(rng, size, 90)
        self._coarse = Texture(rng, size, 26)
        self._vessels = Tubes.joined(
            [_vessel_tree(rng, side, self._width) for side in (-1, 1) for _ in range(4)]
        )
        self._liver_veins = _liver_veins(rng)
        self._bowel = _bowel(rng)
        x, y, z = rng.uniform((-105, -30, 255), (-85, 30, 290)).tolist()
        self._nodule = (x, y, z)
        x, y, z = rng.uniform((-95, -15, 120), (-70, 25, 155)).tolist()
        self._cyst = (x, y, z)

    def slice_hu(self, z: float, index: int) -> Image:
        """The slice at height z (0 to 400), as Hounsfield units; `index` picks its noise."""
        whole = Canvas(self._size, z)
        self._table(whole)
        canvas, rows = whole.rows(128 * self._depth)  # the trunk's, at its deepest
        fine, coarse = self._fine.at(z, rows), self._coarse.at(z, rows)
        wall = self._outside(canvas, fine, coarse)
        cavity = self._cavity(canvas)
        lungs = self._inside(canvas, cavity, fine, coarse)
        self._shoulders(canvas, canvas.cover(wall - 8), fine)
        self._organs(canvas, cavity, lungs, fine, coarse)
        self._ribs(canvas, cavity, wall)
        self._spine(canvas, canvas.cover(wall - 7), fine, coarse)
        self._mediastinum(canvas)
        return self._scanned(whole.hu, index)

    # The trunk

    def _table(self, canvas: Canvas) -> None:
        if canvas.px > 4:
            return
        sag = 119 * self._depth + 3 - 0.0009 * canvas.x**2
        depth = canvas.y - sag
        canvas.paint(canvas.cover(np.minimum(depth, 22 - depth)), -940)
        for edge in (0, 22):
            canvas.paint(canvas.cover(1.2 - np.abs(depth - edge)), -420)

    def _outside(self, canvas: Canvas, fine: Image, coarse: Image) -> Image:
        """Skin, fat and muscle; gives the distance (mm) below the skin."""
        z = canvas.z
        rx = self._width * profile(
            z, (0, 158), (60, 160), (140, 168), (230, 176), (310, 182), (345, 180), (365, 160),
            (382, 112), (400, 82),
        )  # fmt: skip
        ry = self._depth * profile(
            z, (0, 110), (120, 118), (230, 120), (310, 112), (350, 100), (380, 82), (400, 74)
        )
        x = canvas.x
        front = ry * (1 - 0.02 * np.exp(-((x / 22) ** 2)))
        back = ry * (1 - 0.075 * np.exp(-((x / 20) ** 2)))
        half = np.where(canvas.y < 0, front, back)
        ratio = (np.abs(x / rx) ** 2.5 + np.abs(canvas.y / half) ** 2.5) ** 0.4
        below: Image = ((1 - ratio) * min(rx, ry)).astype(np.float32)
        below += 0.5 * coarse
        canvas.paint(canvas.cover(below), 25)
        canvas.paint(canvas.cover(below - 2), FAT + 9 * fine + 6 * coarse)
        # Thicker in front of the belly and on the flanks, thin over the back.
        front_more = 1 + 0.45 * np.clip(-canvas.y / ry, -0.9, 1) * (1 if z < 150 else 0.4)
        muscle = below - 2 - self._fat * front_more.astype(np.float32) - 1.5 * coarse
        strands = np.clip(np.abs(coarse + 0.4 * fine) * 6 + 0.25, 0, 1)
        canvas.paint(canvas.cover(muscle), FAT + (MUSCLE - FAT) * strands + 5 * fine)
        return below

    def _cavity(self, canvas: Canvas) -> Image:
        """Distance (mm) inside the rib cage and the belly's wall; negative outside."""
        z = canvas.z
        rx = self._width * profile(
            z, (0, 122), (90, 132), (150, 140), (220, 141), (270, 128), (310, 104), (335, 78),
            (352, 44), (362, 20), (366, 8), (400, 8),
        )  # fmt: skip
        ry = self._depth * profile(
            z, (0, 78), (90, 88), (200, 92), (270, 84), (320, 66), (345, 48), (362, 20), (400, 8)
        )
        middle = profile(z, (0, -10), (200, -8), (300, 4), (360, 22))
        ratio = np.sqrt((canvas.x / rx) ** 2 + ((canvas.y - middle) / ry) ** 2)
        return ((1 - ratio) * min(rx, ry)).astype(np.float32)

    @staticmethod
    def _dome(canvas: Canvas) -> Image:
        """Height (mm) of the diaphragm above each pixel."""
        right = 222 - 0.0085 * ((canvas.x + 70) ** 2 + 1.15 * (canvas.y + 18) ** 2)
        left = 205 - 0.0085 * ((canvas.x - 72) ** 2 + 1.15 * (canvas.y + 18) ** 2)
        return np.maximum(right, left).astype(np.float32)

    def _inside(self, canvas: Canvas, cavity: Image, fine: Image, coarse: Image) -> Image:
        """Fat in the cavity, then the lungs in it; gives how much of each pixel is lung."""
        z, x, y = canvas.z, canvas.x, canvas.y
        for depth, thick in ((-21, 1.3), (-33, 1.8)):  # fat between the layers of muscle
            plane = thick * min(1.0, (318 - z) / 25) - np.abs(cavity - depth + 2.5 * coarse)
            canvas.paint(canvas.cover(plane) * (canvas.hu > 0), FAT + 20)
        for side in (-1, 1):  # armpits
            canvas.ellipsoid((side * 128, 12, 322), (20, 34, 44), FAT + 8 * fine, turn=-20 * side)
        canvas.paint(canvas.cover(cavity), FAT + 8 * fine + 4 * coarse)
        if z < 60 or z > 362:
            return np.zeros_like(canvas.hu)
        middle = np.interp(
            y[:, 0], [-110, -80, -55, -20, 15, 45, 70, 100], [5, 9, 26, 40, 36, 31, 29, 31]
        ).astype(np.float32)[:, None] * np.float32(profile(z, (250, 1.0), (330, 0.8), (365, 0.7)))
        sides = np.abs(x + 2) - middle + 1.2 * coarse
        above = (z - self._dome(canvas)) * np.float32(0.6)
        inside = np.minimum(np.minimum(cavity - 2, sides), above)
        lungs = canvas.cover(inside)
        # The part that lies lower holds more blood.
        canvas.paint(lungs, -868 + 0.35 * y + 14 * coarse + 16 * fine)
        fissure = np.abs(y - (z - 232) * 0.75 - 4 * np.sin(x / 17)) - 0.35
        canvas.paint(canvas.cover(-fissure) * lungs * 0.45, -450)
        canvas.tubes(self._vessels, 45, within=lungs)
        canvas.ellipsoid(self._nodule, (6.5, 6.0, 6.5), 40 + 10 * fine, within=lungs)
        # The diaphragm itself, between lung and belly.
        shell = np.minimum(cavity - 1, np.minimum(above + 2.5, 1.0 - above))
        canvas.paint(canvas.cover(shell) * (1 - lungs), MUSCLE)
        return lungs

    def _ribs(self, canvas: Canvas, cavity: Image, below: Image) -> None:
        z = canvas.z
        if not 40 < z < 365:
            return
        # Ribs run on the cavity's wall, forward and down: a slice cuts each of them once a side.
        near = np.nonzero((cavity < 4) & (cavity > -16) & (below > 4))
        wall = cavity[near] + 6
        x, y = canvas.x[0][near[1]], canvas.y[:, 0][near[0]]
        turn = np.degrees(np.arctan2(np.abs(x) / 1.35, y - 8))  # 0 at the back, 180 in front
        slope = 78 * (np.clip(turn - 14, 0, 180) / 130) ** 1.15 + np.sign(x) * 1.5
        height = z + slope - (72 + self._level)
        number = np.floor(height / 25)  # 0 is the twelfth rib
        offset = height - (number + 0.5) * 25
        last = np.where(number == 0, 70, np.where(number == 1, 95, 138))
        present = (number >= 0) & (number <= 11) & (turn > 17)
        shape = 1 - np.sqrt((wall / 4.6) ** 2 + (offset / 7.5) ** 2)
        depth = np.where(present, shape * 4.6, -9)
        bone = canvas.cover(np.where(turn < last, depth, -9).astype(np.float32))
        marrow = canvas.cover((depth - 2).astype(np.float32)) * (turn < last)
        cartilage = np.where((number > 1) & (turn >= last) & (turn < 168), depth, -9)
        view = canvas.hu[near]
        view += canvas.cover(cartilage.astype(np.float32)) * (115 - view)
        view += bone * (760 - view)
        view += marrow * (270 - view)
        canvas.hu[near] = view
        if 165 < z < 335:  # sternum
            front = -self._depth * profile(z, (165, 96), (250, 92), (335, 66))
            wide = profile(z, (165, 8), (190, 17), (300, 15), (318, 26), (335, 24))
            canvas.ellipsoid((0, front, z), (wide, 7, 9), 620)
            canvas.ellipsoid((0, front, z), (wide - 2.5, 4.8, 9), 210)

    def _spine(self, canvas: Canvas, deep: Image, fine: Image, coarse: Image) -> None:
        z = canvas.z
        y = self._depth * profile(z, (0, 42), (100, 47), (220, 54), (320, 46), (400, 26))
        size = profile(z, (0, 1.12), (120, 1.0), (300, 0.84), (400, 0.66))
        period = 26.0
        step = (z - self._level) % period  # 0: the lower face of a vertebra
        # Muscles of the back and, lower, the psoas.
        for side in (-1, 1):
            belly = profile(z, (0, 1.25), (150, 1), (300, 0.8), (400, 0.75))
            texture = MUSCLE + 8 * fine + 8 * coarse
            canvas.ellipsoid(
                (side * 30, y + 36, z), (26 * belly, 19 * belly, 9), texture, within=deep
            )
            if z < 100:
                thick = profile(z, (0, 22), (100, 3))
                canvas.ellipsoid((side * 41, y - 6, z), (thick * 0.9, thick, 9), texture)
        canvas.ellipsoid((0, y + 29, z), (12 * size, 11 * size, 9), FAT + 60)
        spongy = 215 + 40 * fine + 22 * coarse
        if step < 20.5:  # the body of a vertebra
            waist = 1 - 0.09 * np.sin(np.pi * step / 20.5)
            rx, ry = 22 * size * waist, 17.5 * size * waist
            plate = step < 1.8 or step > 18.7
            canvas.ellipsoid((0, y, z), (rx, ry, 9), 560)
            canvas.ellipsoid((0, y, z), (rx - 1.7, ry - 1.7, 9), 480 if plate else spongy)
        else:  # a disc
            canvas.ellipsoid((0, y, z), (22.5 * size, 17.5 * size, 9), 95 + 6 * fine)
            canvas.ellipsoid((0, y + 1, z), (13 * size, 9 * size, 9), 72)
        for side in (-1, 1):
            if 7 < step < 18:  # pedicle, and the process that carries the rib
                canvas.bar((side * 12 * size, y + 12), (side * 15 * size, y + 27 * size), 4.2, 520)
                canvas.bar((side * 12.5 * size, y + 13), (side * 15 * size, y + 26), 2.2, 300)
                if 9 < step < 16:
                    reach = (side * 36 * size, y + (35 if z > 110 else 24) * size)
                    canvas.bar((side * 15 * size, y + 27 * size), reach, 4.0, 480)
                    canvas.bar((side * 17 * size, y + 28 * size), reach, 2.0, 260)
            if step < 9 or step > 19:  # facet joint
                canvas.ellipsoid((side * 15 * size, y + 27 * size, z), (6.5, 5.5, 9), 560)
                canvas.bar((side * 12 * size, y + 31 * size), (side * 18 * size, y + 24), 0.8, 90)
            if step < 15:  # lamina
                canvas.bar((side * 14 * size, y + 29 * size), (0, y + 39 * size), 3.0, 560)
        if step < 12:  # spinous process
            tip = y + (46 + 1.3 * (12 - step)) * size
            canvas.bar((0, y + 38 * size), (0, tip), 3.2, 500, deep)
            canvas.bar((0, y + 39 * size), (0, tip - 2), 1.5, 280, deep)
        canvas.ellipsoid((0, y + 26 * size, z), (10 * size, 8.5 * size, 9), -20)
        canvas.ellipsoid((0, y + 26 * size, z), (8.6 * size, 7.2 * size, 9), 18)
        canvas.ellipsoid((0, y + 26 * size, z), (5.6 * size, 4.2 * size, 9), 44)

    def _shoulders(self, canvas: Canvas, deep: Image, fine: Image) -> None:
        z = canvas.z
        for side in (-1, 1):
            if 235 < z < 352:  # shoulder blade, in its muscles
                grow = profile(z, (235, 0.15), (262, 0.8), (352, 1.0))
                inner = (side * profile(z, (235, 112), (352, 82)), 79.0)
                outer = (side * (112 + 40 * grow), 79 - 44 * grow)
                canvas.bar(inner, outer, 13 * grow + 2, MUSCLE, deep)
                canvas.bar(inner, outer, 2.6, 610, deep)
                canvas.ellipsoid((outer[0], outer[1], z), (6, 7, 9), 560, within=deep)
                canvas.ellipsoid((outer[0], outer[1], z), (3.6, 4.6, 9), 300, within=deep)
                if z > 315:  # its spine
                    half = ((inner[0] + outer[0]) / 2, (inner[1] + outer[1]) / 2)
                    canvas.bar(half, (half[0] + side * 14, half[1] + 15), 2.4, 580, deep)
            if z > 335:  # muscles of the neck
                texture = MUSCLE + 8 * fine
                canvas.ellipsoid((side * 38, -18, 400), (13, 20, 50), texture, turn=side * 35)
                canvas.ellipsoid((side * 34, 40, 395), (20, 26, 60), texture)
        canvas.tubes(_CLAVICLES, 640)
        canvas.tubes(_CLAVICLES.wider(-2.6), 250)

    # The organs

    def _organs(
        self, canvas: Canvas, cavity: Image, lungs: Image, fine: Image, coarse: Image
    ) -> None:
        z, x, y = canvas.z, canvas.x, canvas.y
        if z > 232:
            return
        under = (self._dome(canvas) - z) * np.float32(0.6) - 1
        belly = canvas.cover(np.minimum(cavity - 3, under)) * (1 - lungs)
        if z < 110:
            for centre, radii, filling in self._bowel:
                canvas.ellipsoid(centre, radii, 62, within=belly)
                inner = (radii[0] - 2.5, radii[1] - 2.5, radii[2] - 2.5)
                canvas.ellipsoid(centre, inner, filling + 45 * coarse + 25 * fine, within=belly)
                if filling < -300:
                    continue
                if filling > 60:  # a bubble on top of it
                    bubble = (centre[0], centre[1] - radii[1] * 0.45, centre[2])
                    canvas.ellipsoid(
                        bubble, (inner[0] * 0.7, inner[1] * 0.4, inner[2]), AIR, within=belly
                    )
        for side, top in ((-1, 62.0), (1, 74.0)):  # kidneys
            centre = (side * 66.0, 46.0, top)
            canvas.ellipsoid(centre, (35, 33, 66), FAT + 6 * fine, within=belly)
            canvas.ellipsoid(centre, (29, 24, 56), 195 + 6 * fine, turn=side * 60, within=belly)
            canvas.ellipsoid(centre, (21, 16, 48), 150 + 22 * coarse, turn=side * 60, within=belly)
            canvas.ellipsoid(
                (side * 57.0, 41.0, top), (14, 8, 24), -70, turn=side * 40, within=belly
            )
        canvas.ellipsoid((104, 36, 138), (27, 50, 56), 128 + 6 * fine, turn=28, within=belly)
        stomach = (58.0, -36.0, 140.0)
        canvas.ellipsoid(stomach, (50, 40, 52), 85, turn=-20, within=belly)
        canvas.ellipsoid(stomach, (46.5, 36.5, 49), 22 + 16 * coarse, turn=-20, within=belly)
        gas = belly * canvas.cover(-(y + 47) + 0 * x)
        canvas.ellipsoid(stomach, (46.5, 36.5, 49), AIR, turn=-20, within=gas)
        # The liver fills the right dome, and its left lobe crosses the middle in front.
        slant = (66 - 0.0046 * np.clip(x + 105, 0, 400) ** 2 - y) * np.float32(0.8)
        lower = (z - 42 - 0.55 * np.clip(x + 115, 0, 400) - 0.12 * np.clip(y, 0, 90)) * 0.8
        lobes = np.minimum(np.minimum(slant, lower), 62 - 0.15 * np.abs(y) - x) + 2.5 * coarse
        liver = belly * canvas.cover(lobes.astype(np.float32))
        canvas.paint(liver, 112 + 5 * fine + 3 * coarse)
        canvas.tubes(self._liver_veins, 168, within=liver)
        canvas.ellipsoid(self._cyst, (11, 10, 12), WATER, within=liver)
        canvas.ellipsoid((-58, -44, 84), (15, 19, 30), 75, turn=25, within=belly)  # gall bladder
        canvas.ellipsoid((-58, -44, 84), (13.4, 17.4, 28), 12, turn=25, within=belly)
        canvas.tubes(_PANCREAS, 98, within=belly)

    def _mediastinum(self, canvas: Canvas) -> None:
        k = self._heart
        if 140 < canvas.z < 300:
            fat = 55 * k + 4
            canvas.ellipsoid((22, -27, 214), (fat + 4, fat - 6, 62 * k), FAT, turn=32)
            canvas.ellipsoid((22, -27, 214), (fat - 1, fat - 11, 58 * k), 104, turn=32)
            canvas.ellipsoid((46, -18, 200), (25 * k, 18 * k, 38 * k), BLOOD, turn=42)
            canvas.ellipsoid((8, -49, 204), (28 * k, 15 * k, 40 * k), BLOOD - 20, turn=28)
            canvas.ellipsoid((-24, -25, 226), (20 * k, 26 * k, 34 * k), BLOOD - 25, turn=10)
            canvas.ellipsoid((13, 10, 242), (31 * k, 16 * k, 25 * k), BLOOD)
        canvas.tubes(_LUNG_ROOTS, BLOOD - 15)
        canvas.tubes(_VEINS, BLOOD - 30)
        canvas.tubes(_GULLET, 52)
        canvas.tubes(_GULLET.wider(-4.6), -600)
        canvas.tubes(_ARTERIES, BLOOD + 25)
        canvas.tubes(_AORTA.wider(1.4), 70)
        canvas.tubes(_AORTA, BLOOD + 25)
        canvas.tubes(_AIRWAY.wider(1.8), 50)
        canvas.tubes(_AIRWAY, -1000)
        for side in (-1, 1):  # thyroid
            canvas.ellipsoid((side * 17, -3, 386), (9, 13, 24), 135)

    # The scanner

    def _scanned(self, hu: Image, index: int) -> Image:
        """Soften as a scanner does, and add its noise, which has a grain of about a pixel."""
        rng = np.random.default_rng([self._seed, 2, index])
        noise = rng.standard_normal(hu.shape, np.float32) * np.float32(24)
        soft = np.float32(0.18 * min(1.0, self._size / 512))
        return blurred(hu, soft) + blurred(noise, np.float32(0.25))


def _vessel_tree(rng: np.random.Generator, side: int, width: float) -> Tubes:
    """Vessels of one lung (side -1 right, 1 left), from its root to the wall, ever thinner."""
    a, b, ra, rb = [], [], [], []
    root = np.array([side * 40.0, rng.uniform(0, 14), rng.uniform(248, 272)])
    heads = np.array([side * 0.55, 0, 0])
    buds = [
        (root, heads + direction, 4.4, 0)
        for direction in rng.standard_normal((7, 3)) * (0.5, 0.9, 1.25)
    ]
    while buds:
        start, direction, radius, depth = buds.pop()
        direction = direction / np.linalg.norm(direction)
        length = rng.uniform(16, 30) * (0.88**depth)
        end = start + direction * length
        inside = (end[0] / (138 * width)) ** 2 + ((end[1] + 4) / 92) ** 2
        if inside > 0.97 or not 110 < end[2] < 352 or side * end[0] < 24:
            continue
        a.append(start)
        b.append(end)
        ra.append(radius)
        rb.append(max(radius * 0.78, 0.45))
        if depth < 7:
            for _ in range(2):
                bend = rng.standard_normal(3) * 0.48
                buds.append((end, direction + bend, radius * rng.uniform(0.66, 0.82), depth + 1))
    return Tubes(*(np.array(v, np.float32) for v in (a, b, ra, rb)))


def _liver_veins(rng: np.random.Generator) -> Tubes:
    """Hepatic veins that meet at the vena cava, and the portal vein with its branches."""
    parts = []
    for x, y, z in ((-105, 20, 160), (-75, -45, 150), (-25, -62, 165), (-118, -10, 140)):
        wander = rng.uniform(-10, 10, 3)
        halfway = (x * 0.55 - 10 + wander[0], y * 0.5 + wander[1], 182 + wander[2] / 2)
        parts.append(Tubes.along([(-24, 8, 196), halfway, (x, y, z)], 5.0, 3.6, 1.2))
    for x, y, z in ((-112, 30, 84), (-118, -15, 138), (-80, -55, 98), (-5, -60, 150)):
        wander = rng.uniform(-8, 8, 3)
        halfway = (x * 0.6 - 12 + wander[0], y * 0.6 - 4 + wander[1], (z + 118) / 2 + wander[2])
        parts.append(Tubes.along([(-36, -4, 116), halfway, (x, y, z)], 5.6, 3.4, 1.2))
    return Tubes.joined(parts)


def _bowel(
    rng: np.random.Generator,
) -> list[tuple[tuple[float, float, float], tuple[float, float, float], float]]:
    """Loops of bowel: centre, radii, and what fills them (HU; negative is gas)."""
    loops = []
    for _ in range(110):
        r = rng.uniform(11, 16)
        x, y, z = rng.uniform(-78, 85), rng.uniform(-78, 5), rng.uniform(-10, 86)
        if x < -30 and z > 60:
            continue
        filling = float(rng.choice([35.0, 20.0, 45.0, 10.0, 110.0]))
        loops.append(((float(x), float(y), float(z)), (r * 1.15, r, r * 1.2), filling))
    for side, z in ((-1, 20.0), (1, 45.0)):  # the colon, on both flanks
        loops.append(((side * 100.0, 0.0, z), (19.0, 21.0, 42.0), 5.0))
        loops.append(((side * 100.0, -9.0, z), (13.0, 10.0, 36.0), -920.0))
    return loops


_AORTA = Tubes.along(
    [
        (4, -24, 232), (-8, -33, 262), (-12, -32, 286), (-6, -24, 303), (6, -8, 311), (17, 8, 308),
        (25, 20, 295), (27, 25, 270), (26, 27, 200), (17, 24, 140), (9, 18, 70), (6, 14, -5),
    ],
    15, 14.5, 12.5, 11.5, 9,
)  # fmt: skip
_ARTERIES = Tubes.joined(
    [
        Tubes.along([(-7, -24, 306), (-16, -18, 335), (-24, -8, 362), (-27, -4, 405)], 6, 4.2),
        Tubes.along([(6, -6, 312), (18, -6, 345), (27, -4, 405)], 4.5, 4.0),
        Tubes.along([(16, 12, 310), (30, 14, 345), (60, 0, 360), (120, -8, 366)], 5.5, 4.0),
        Tubes.along([(-18, -16, 338), (-60, -2, 360), (-120, -8, 366)], 5.0, 4.0),
        Tubes.along([(9, 12, 112), (2, -2, 108), (-30, -12, 112)], 4.0, 3.0),
        Tubes.along([(8, 12, 96), (6, -6, 84), (4, -14, 20)], 4.0, 3.0),
        Tubes.along([(9, 20, 74), (58, 42, 70)], 3.2, 2.6),
        Tubes.along([(6, 20, 68), (-58, 42, 60)], 3.2, 2.6),
    ]
)
_LUNG_ROOTS = Tubes.joined(
    [
        Tubes.along([(24, -50, 236), (26, -36, 256), (24, -18, 268)], 14, 13),
        Tubes.along([(24, -18, 268), (0, -4, 264), (-44, 4, 260)], 12, 8),
        Tubes.along([(24, -18, 268), (38, 4, 273), (50, 16, 266)], 11, 8),
        *(
            Tubes.along([(side * 18 + 6, 10, z), (side * 52, 16, z + 4)], 6.5, 4.0)
            for side in (-1, 1)
            for z in (234.0, 248.0)
        ),
    ]
)
_VEINS = Tubes.joined(
    [
        Tubes.along([(-26, -26, 330), (-27, -20, 290), (-25, -22, 235)], 9, 10),
        Tubes.along([(-26, -26, 330), (-4, -40, 326), (24, -32, 340), (42, -16, 400)], 7, 6),
        Tubes.along([(-26, -26, 330), (-36, -20, 350), (-42, -14, 400)], 7, 8),
        Tubes.along([(-20, 16, -5), (-23, 16, 100), (-25, 10, 170), (-24, -12, 205)], 10.5, 12),
        Tubes.along([(66, 30, 112), (20, 2, 104), (-8, -6, 104), (-36, -4, 116)], 4.5, 7),
        Tubes.along([(-14, -16, 20), (-12, -12, 80), (-8, -6, 104)], 5.0, 6.0),
        Tubes.along([(-20, 24, 70), (-58, 40, 62)], 5.0, 4.0),
        Tubes.along([(-16, 22, 76), (10, 12, 78), (58, 40, 72)], 5.0, 4.0),
        Tubes.along([(-12, 22, 60), (-12, 28, 290), (-24, 20, 296)], 3.0, 4.0),
    ]
)
_GULLET = Tubes.along(
    [(4, 20, 405), (8, 26, 330), (2, 26, 260), (4, 26, 215), (14, 20, 186), (38, 0, 166)], 7, 8
)
_AIRWAY = Tubes.joined(
    [
        Tubes.along([(0, -2, 405), (-1, 12, 330), (-3, 14, 284)], 8.5, 9.5),
        Tubes.along([(-3, 14, 284), (-26, 16, 266), (-46, 18, 254)], 8.0, 5.0),
        Tubes.along([(-3, 14, 284), (24, 20, 258), (46, 22, 246)], 7.5, 5.0),
        Tubes.along([(-26, 16, 266), (-50, 8, 280), (-64, 4, 292)], 4.5, 2.2),
        Tubes.along([(-46, 18, 254), (-58, 30, 226), (-66, 38, 200)], 4.5, 2.0),
        Tubes.along([(46, 22, 246), (58, 6, 268), (66, -8, 288)], 4.0, 2.0),
        Tubes.along([(46, 22, 246), (60, 36, 220), (70, 44, 196)], 4.2, 2.0),
    ]
)
_CLAVICLE = Tubes.along([(20, -66, 338), (52, -70, 346), (95, -46, 358), (138, -14, 366)], 7, 5)
_CLAVICLES = Tubes.joined([_CLAVICLE, _CLAVICLE.mirrored()])
_PANCREAS = Tubes.along(
    [(-38, -22, 74), (-30, -24, 92), (-4, -18, 104), (34, -4, 110), (76, 22, 120)], 13, 9, 7
)
