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


def bump(x, width):
    """Return 1 where x is 0, falling to 0 on both sides."""
    return np.exp(-((x / width) ** 2))


def step(x, width):
    """Return 0 where x is far below 0, and 1 where it is far above."""
    return 0.5 + 0.5 * np.tanh(x / width)


def draw_knee(severity, patient, knee):
    """Return a right knee, uint8 (224, 224), of a severity that rounds to its grade.

    The random generator `patient` varies what both knees of a patient share, the
    generator `knee` varies the rest.
    """
    # Each sign begins at a severity of its own, and none is sure.
    starts = np.array((0.5, 0.3, 1.5, 3.2)) + knee.normal(0, 0.2, 4)
    narrow, spurs, hard, sunk = ((severity - starts) / (4.2 - starts)).clip(0, 1)

    # x runs to the right and y down, from -1 to 1, with the joint near the origin.
    y, x = np.mgrid[-1:1:224j, -1:1:224j]
    x = x + knee.normal(0, 0.05) * y + knee.normal(0, 0.05)
    y = y + knee.normal(0, 0.05) * x + knee.normal(0, 0.05)
    half = patient.uniform(0.68, 0.84)  # of the width of the bones
    worn = step(patient.choice((1, 1, 1, -1)) * x, 0.1)  # 1 on the side that wears
    gap = patient.uniform(0.06, 0.08) * (1 - narrow * (0.1 + 0.9 * worn))
    sunk = 0.09 * sunk * worn * bump(abs(x) - 0.4, 0.25)
    notch = patient.uniform(0.15, 0.24) * abs(2.1 * abs(x) / half - 1.1) ** 4
    spine = patient.uniform(0.09, 0.14) * bump(abs(x) - 0.09, 0.07)
    grain = Image.fromarray(knee.normal(0, 0.03, (40, 40))).resize(x.shape)

    # Add up what the rays meet: soft tissue, then femur and tibia.
    ray = 0.14 + 0.3 * step(1 - abs(x), 0.3)
    for away, surface in ((-y, gap + notch - sunk), (y, gap - spine + sunk)):
        waist = patient.uniform(0.14, 0.3) * step(away - 0.5, 0.15)
        spur = spurs * (0.05 + 0.12 * worn) * bump(away - 0.13, 0.06)
        depth = np.minimum(away - surface, half - waist + spur - abs(x))  # in the bone
        bright = 0.2 + 0.1 * bump(depth, 0.04) + 0.3 * hard * worn * bump(depth, 0.1)
        ray += step(depth, 0.012) * (bright + np.asarray(grain))
    ray += patient.uniform(0.004, 0.018) * knee.normal(0, 1, x.shape)
    dark, gamma, contrast = patient.uniform((0, 0.7, 0.6), (0.2, 1.3, 0.9))
    grey = dark + contrast * (1.8 * ray - 0.4).clip(0, 1.2) ** gamma
    return np.uint8(255 * grey.clip(0, 1))


def draw(folder, count=1000, seed=0):
    """Draw knees, two of each patient, into a new folder."""
    folder = Path(folder)
    if folder.exists():
        sys.exit(f"phantoms: error: {folder} is there already, name another folder")
    part = Path(f"{folder}.part")  # it takes the folder's name when it is complete
    for i in trange(count, desc="draw", leave=False):
        number, left = divmod(i, 2)
        patient = np.random.default_rng((seed, number))
        knee = np.random.default_rng((seed, number, 1 + left))
        severity = patient.choice((0, 0, 1, 2, 2, 3, 4)) + patient.uniform(-0.5, 0.5)
        severity = (severity + knee.normal(0, 0.3)).clip(-0.49, 4.49)
        grey = draw_knee(severity, patient, knee)
        file = part / str(round(severity)) / f"{1_000_001 + number}{'RL'[left]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey[:, ::-1] if left else grey).save(file)
    part.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    draw(sys.argv[1])
