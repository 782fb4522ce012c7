"""Draw phantoms: 1,000 knees of known grade, to try kneeoa without a download.

    python phantoms.py FOLDER

writes FOLDER/0 ... FOLDER/4. A phantom is a drawn front view of a knee with the signs
that radiologists grade by. Phantoms are no medical data, and there is nothing to learn
here about networks. SPDX-License-Identifier: MIT
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import trange

# All numbers here are chosen by hand and eye. Severity runs from -.5 to 4.5. At these
# values the signs begin (a narrow joint space, spurs, sclerosis, and ends of the bones
# that are deformed), and at 4.2 each is complete.
STARTS = np.array((0.5, 0.3, 1.5, 3.0))

# The least and the greatest of what both knees of a patient share: half the width of
# the bones, joint space, notch, spines, waist, contrast.
LEAST = (0.68, 0.06, 0.15, 0.09, 0.14, 0.9)
GREATEST = (0.84, 0.08, 0.24, 0.14, 0.30, 1.5)


def bump(x, width):
    """Return 1 where x is 0, falling to 0 on both sides."""
    return np.exp(-((x / width) ** 2))


def step(x, width):
    """Return 0 where x is far below 0, and 1 where it is far above."""
    return 0.5 + 0.5 * np.tanh(x / width)


def draw_knee(severity, build, random):
    """Return a left knee, uint8 (224, 224), of a severity that rounds to its grade."""
    half, gap, notch, spines, waist, contrast = build
    noise = random.normal(0, 0.2, 4)  # so no sign is sure
    signs = (severity - STARTS + noise) / (4.2 - STARTS)
    narrow, spurs, hard, deformed = signs.clip(0, 1)

    # x runs to the right and y down, from -1 to 1, with the joint near the origin.
    y, x = np.mgrid[-1:1:224j, -1:1:224j]
    tilt, right, down = random.normal(0, 0.05, 3)
    x = x + tilt * y + right
    y = y - tilt * x + down
    side = abs(x)
    worn = step(-x, 0.1)  # 1 on the inner side, which wears more
    gap = gap - worn * (gap * narrow + 0.08 * deformed * bump(side - 0.4, 0.25))
    femur = gap + notch * (2.1 * side / half - 1.1) ** 4  # its surface
    tibia = gap - spines * bump(side - 0.09, 0.07)
    grain = Image.fromarray(random.normal(0, 0.05, (40, 40))).resize((224, 224))

    # Add up what the rays meet: soft tissue, then the two bones.
    ray = 0.1 + 0.3 * step(1 - side, 0.3)
    for away, surface in ((-y, femur), (y, tibia)):
        spur = spurs * (0.05 + 0.12 * worn) * bump(away - 0.13, 0.06)
        edge = half - waist * step(away - 0.5, 0.15) + spur
        depth = np.minimum(away - surface, edge - side)  # in the bone
        bright = 0.2 + 0.1 * bump(depth, 0.04) + 0.3 * hard * worn * bump(depth, 0.1)
        ray += step(depth, 0.012) * (bright + np.asarray(grain))
    return np.uint8(255 * (contrast * ray).clip(0, 1))


def draw(folder, count=1000, seed=0):
    """Draw knees, two of each patient, into a new folder."""
    if Path(folder).exists():
        sys.exit(f"phantoms: error: {folder} is there already, name another folder")
    part = Path(f"{folder}.part")  # it takes the folder's name when it is complete
    for number in trange(count // 2, desc="draw", leave=False):
        random = np.random.default_rng((seed, number))
        build = random.uniform(LEAST, GREATEST)
        severity = random.choice((0, 0, 1, 2, 2, 3, 4)) + random.uniform(-0.5, 0.5)
        for side, columns in (("L", 1), ("R", -1)):
            own = (severity + random.normal(0, 0.3)).clip(-0.49, 4.49)
            knee = draw_knee(own, build, random)[:, ::columns]
            file = part / str(round(own)) / f"{1_000_001 + number}{side}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(knee).save(file)
    part.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    draw(sys.argv[1])
