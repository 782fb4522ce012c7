"""kneeoa: grade knee osteoarthritis from X-rays with a small convolutional network, trained from scratch.

    python kneeoa.py train                     draw phantoms (or take the folder data/), split, train, test
    python kneeoa.py plot                      the sheet of that run: runs/phantoms/report.png
    python kneeoa.py train --data my_xrays     the same for a folder of X-rays: my_xrays/0 ... my_xrays/4
    python kneeoa.py predict knee.png --run runs/my_xrays
    python kneeoa.py tune --lr 1e-3 3e-3       a small search, compared on the validation subset

A knee is graded on the Kellgren-Lawrence (KL) scale (Kellgren and Lawrence, 1957): 0 none, 1 doubtful, 2 minimal,
3 moderate, 4 severe. The file reads from top to bottom in the order in which a picture travels: settings, reading,
splitting, data set, network, augmentation, training, metrics. What that road leans on, and may be skipped, stands
behind it: files, heat maps, phantoms and commands.

Measured: accuracy .68, balanced accuracy .70 and quadratic weighted kappa .83 on 826 knees of Chen's set after 5 to
14 minutes on two fast CPU cores; README.md says how, and what holds these figures back. Left out on purpose: pretrained
weights, ensembles, several GPUs. This is no medical device: it is not for diagnosis.

SPDX-License-Identifier: MIT
"""

import argparse
import copy
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from tqdm import tqdm

# What makes this a program about knees. For hips, hands or chests change these lines first; README.md lists the rest.
GRADES = ("none", "doubtful", "minimal", "moderate", "severe")  # the name of grade g is GRADES[g]
PATIENT = re.compile(r"(\d+)[ _-]?(L|R|left|right)(?![a-z])", re.IGNORECASE)  # 9003175L is of 9003175, 12lateral of none
BAND = (2 / 7, 6 / 7)  # the rows the network looks at, as shares of the height: the joint and the bone next to it
HALF = 4 / 7  # the width of each of its two halves, as a share of the picture's: squares that overlap in the middle

K = len(GRADES)
SUBSETS = {"train": 0.70, "val": 0.15, "test": 0.15}  # share of the pictures
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


class KneeError(Exception):
    """What a user can do wrong: `main` prints it as one line, with no traceback, and ends with status 2."""


# ------------------------------------------------------------------------------------------------------------ settings
# What changes from run to run stands here and nowhere else. The command line is made from these fields and each
# checkpoint stores them, so a result can always be traced to the settings that made it. Why the defaults are what they are,
# and what other values cost, is measured in README.md under "What paid and what did not".


def setting(default, low, high, meaning):
    return field(default=default, metadata={"low": low, "high": high, "meaning": meaning})


@dataclass(frozen=True)
class Config:
    """The settings of a run, checked as they are set. Raises KneeError where a value is out of its range."""

    size: int = setting(224, 64, 1024, "side of the square pictures, in pixels")
    batch: int = setting(64, 2, 4096, "pictures per step of the optimizer at most, small sets take fewer")
    epochs: int = setting(30, 1, 10_000, "passes over the training subset")
    lr: float = setting(3e-3, 1e-6, 1.0, "highest learning rate of the schedule")
    weight_decay: float = setting(0.02, 0.0, 1.0, "share of each weight that a step at rate 1 would take away")
    dropout: float = setting(0.3, 0.0, 0.95, "share of the features hidden from the last layer in training")
    widths: tuple = setting((32, 64, 96, 192), 4, 1024, "channels of each stage, with commas: 32,64,96,192")
    softness: float = setting(0.5, 0.0, 2.0, "how far a target leaks to the neighbouring grades, 0: not at all")
    augment: float = setting(1.0, 0.0, 3.0, "strength of the random changes to training pictures, 0: none")
    seed: int = setting(0, 0, 2**31 - 1, "chooses split, first weights, order and random changes")
    device: str = setting("auto", None, None, "auto (CUDA, else Apple's MPS, else CPU), cpu, cuda, cuda:1, mps")

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if f.name == "device":
                good, wanted = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value)), "auto, cpu, cuda, cuda:N or mps"
            elif f.name == "widths":
                good = 1 <= len(value) <= 4 and all(isinstance(v, int) and low <= v <= high for v in value)
                wanted = f"one to four numbers from {low} to {high}, with commas"
            else:  # written so that NaN, which is neither below nor above anything, is refused too
                good = isinstance(value, (int, type(f.default))) and low <= value <= high
                wanted = f"from {low} to {high}"
            if not good:
                raise KneeError(f"--{f.name.replace('_', '-')} {text_of(value)}: must be {wanted}")


# ------------------------------------------------------------------------------------------------------------- reading
# A wrongly read picture is the quietest of mistakes: training goes on, only worse. So every kind of picture file ends
# here, in one function, as the same thing: a square of grey bytes with its proportions kept.


def read_grey(path):
    """One picture as uint8 (height, width), upright. Raises KneeError with the file's name if it can't be read."""
    try:
        with Image.open(path) as image:
            if max(image.size) > 64 * min(image.size):  # nothing would be left of its shorter side
                raise ValueError(f"{image.width} x {image.height} pixels")
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # more than 8 bits a pixel: 16-bit grey, 32-bit integers or floats
                # Pillow's convert("L") would clip all above 255 to white. Scaling from the 0.5th to the 99.5th
                # percentile keeps the greys and lets a few burnt-out pixels or a burnt-in letter not matter.
                values = np.nan_to_num(np.asarray(image, dtype=np.float64))
                low, high = np.percentile(values, (0.5, 99.5))
                return np.uint8((values.clip(low, high) - low) * (255 / max(high - low, 1e-9)))
            if image.has_transparency_data:  # what shines through is the black of a light box that is switched off
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            return np.asarray(image.convert("L"))
    except Exception as error:  # Pillow raises a dozen kinds on damaged or hostile files, none of them a fault of ours
        raise KneeError(f"{path}: cannot be read as a picture ({error}), replace or remove it") from error


def read_xray(path, size):
    """One picture as uint8 (size, size): padded with black to a square, not stretched, since the width of the joint
    space is what the grade is read from. Raises KneeError with the file's name if it can't be read."""
    grey = read_grey(path)
    if grey.shape != (size, size):
        grey = np.asarray(ImageOps.pad(Image.fromarray(grey), (size, size), Image.Resampling.LANCZOS))
    return grey


class Xray(NamedTuple):
    path: str  # relative to the data folder, with / on every system
    grade: int
    patient: str
    subset: str = ""  # train, val or test; empty where the folder does not say


def find_xrays(folder, patients_file=None):
    """All pictures of a data folder as a list of Xray, in the order of their paths, whatever the file system's order.

    The patient is the row of the patients file with this file name; else the digits of a name such as 9003175L.png;
    else the picture is a patient of its own, whose name is its path. Raises KneeError where there is nothing to find.
    """
    folder = Path(folder)
    layout = find_layout(folder)  # {subset: folder with the grades}, subset "" where there is but one
    shipped = Path(__file__).with_name("osail_patients.csv")
    patients_file = patients_file or (shipped if shipped.exists() else None)
    patients = read_patients(patients_file) if patients_file else {}
    xrays = []
    for subset, top in layout.items():
        for grade, grade_folder in grade_folders(top):
            for file in grade_folder.rglob("*"):
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
                    path, knee = file.relative_to(folder).as_posix(), PATIENT.match(file.stem)
                    patient = patients.get(file.name) or (knee[1] if knee else path)
                    xrays.append(Xray(path, grade, patient, subset))
        missing = set(range(K)) - {x.grade for x in xrays if x.subset == subset}
        if missing and subset in ("", "train"):
            grades = ", ".join(map(str, sorted(missing)))
            raise KneeError(f"{top}: no pictures of grade {grades}, add some, as PNG, JPEG, BMP or TIFF")
    return sorted(xrays)


# ----------------------------------------------------------------------------------------------------------- splitting
# Two pictures of one patient look alike and often have the same grade. With one in training and the other in the test
# subset, a network is rewarded for recognizing the patient. So patients are dealt out, not pictures, and the deal
# depends on names, grades and the seed alone: everybody who has the data has the same test subset.


def split_by_patient(xrays, seed, shares=SUBSETS):
    """The pictures with their subsets set: all pictures of a patient in one, each grade shared out as `shares` says.

    A patient goes where, for the grades of its pictures, the least of the subset's due has been filled. The order is
    by the hash of seed and name, which is as good as random, and the same in every version of every program.
    Raises KneeError where a grade has fewer patients than there are subsets.
    """
    knees = defaultdict(list)
    for xray in xrays:
        knees[xray.patient].append(xray)
    pictures = Counter(x.grade for x in xrays)
    patients = Counter(grade for own in knees.values() for grade in {x.grade for x in own})
    for grade, count in sorted(patients.items()):
        if count < len(shares):
            raise KneeError(f"grade {grade}: pictures of {count} patients, but {len(shares)} subsets; add more patients")

    def turn(patient):  # the patients with the rarest grade first, while there is still room to place them well
        rarest = min(pictures[x.grade] for x in knees[patient])
        return rarest, hashlib.sha256(f"{seed}/{patient}".encode("utf-8", "surrogateescape")).digest()

    filled = {subset: Counter() for subset in shares}
    home = {}
    for patient in sorted(knees, key=turn):
        grades = [x.grade for x in knees[patient]]
        home[patient] = min(shares, key=lambda s: sum(filled[s][g] / (shares[s] * pictures[g]) for g in grades))
        filled[home[patient]].update(grades)
    return [x._replace(subset=home[x.patient]) for x in xrays]


def make_split(folder, seed, patients_file=None):
    """The pictures of a data folder with their subsets, and lines of text about what was found. A split that the
    folders give is kept; without `val` it is taken from `train`. Raises KneeError if a patient is in two given subsets.
    """
    folder = Path(folder)
    xrays, notes = drop_equal_pictures(folder, find_xrays(folder, patients_file))
    given = [s for s in SUBSETS if any(x.subset == s for x in xrays)]
    if not given:
        notes.append("layout: folders by grade, split here by patient")
        xrays = split_by_patient(xrays, seed)
    else:
        notes.append(f"layout: {', '.join(given)} as the folders give them")
        refuse_leaks(folder, xrays)
        if "train" not in given:
            raise KneeError(f"{folder}: has no subset train, add the folder train")
        if "val" not in given:
            notes.append("no val given: it is taken from train, by patient")
            test = [x for x in xrays if x.subset == "test"]
            train = [x for x in xrays if x.subset == "train"]
            xrays = sorted(split_by_patient(train, seed, {"train": 0.85, "val": 0.15}) + test)
        if "test" not in given:
            notes.append("no test given: the figures will be of the validation subset")
    alone = sum(x.patient == x.path for x in xrays)
    if alone:
        notes.append(f"{alone} of {len(xrays)} pictures name no patient: each is taken as a patient of its own")
    return xrays, notes


# ------------------------------------------------------------------------------------------------------------ data set
# Decoding a PNG takes longer than one step of training on it. So each picture is decoded once, and the whole subset
# lives in one tensor of bytes, on the GPU if there is one: 5,778 pictures of 224 x 224 are 290 MB. A batch is an index.


class KneeFolder(torch.utils.data.Dataset):
    """Pictures uint8 (N, 1, size, size) and grades int64 (N,) of a folder, both on `device`.

    `dataset[i]` is (pictures, grades) for an int, a slice or a tensor of indices, so a whole batch can be taken at once,
    and a DataLoader works as well. Raises KneeError that names every picture that can't be read.
    """

    def __init__(self, folder, xrays=None, size=Config.size, device="cpu"):
        self.xrays = list(find_xrays(folder) if xrays is None else xrays)
        images = np.empty((len(self.xrays), 1, size, size), np.uint8)

        def decode(i):
            images[i, 0] = read_xray(Path(folder) / self.xrays[i].path, size)

        in_threads(decode, range(len(self.xrays)), "decode")
        self.images = torch.from_numpy(images).to(device)
        self.grades = torch.tensor([x.grade for x in self.xrays], device=device)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.grades[index]


# ------------------------------------------------------------------------------------------------------------- network
# What a radiologist compares is local: the width of the joint space, spurs at the margins, bright bone under the
# plateau. Convolutions find such things wherever they are, pooling lets go of where exactly, and because a knee is
# nearly its own mirror image, the same filters can read both of its halves.


class Residual(nn.Module):
    """Two convolutions whose result is added to their input (He et al., 2016): (N, C, H, W) -> the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),  # no bias: the batch norm behind it has one
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        nn.init.zeros_(self.body[-1].weight)  # begins as the identity, so that depth costs nothing at the start

    def forward(self, x):
        return F.relu(x + self.body(x))


def band(size):
    """The rows of BAND in pictures of `size` rows, as a slice."""
    return slice(round(BAND[0] * size), round(BAND[1] * size))


class KneeNet(nn.Module):
    """Standardized pictures, float (N, 1, S, S) with S of 64 or more, or the rows band(S) of them alone, to logits (N, 5).

    The picture is cut to the band around the joint, then in two halves that overlap by a seventh of the width; the right
    half is mirrored, so that the middle of the knee is on the same side in both, and both go through the same layers (after
    Tiulpin et al., 2018, who did so with the two sides of the joint). Sum and difference of their features do not
    change when the picture is mirrored, so neither do the logits.
    """

    def __init__(self, widths=Config.widths, dropout=Config.dropout):
        super().__init__()
        layers = self.stage(1, widths[0], side=5, stride=2)
        for before, width in itertools.pairwise(widths):
            layers += [*self.stage(before, width), Residual(width)]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.grade = nn.Linear(2 * widths[-1], K)

    @staticmethod
    def stage(before, width, side=3, stride=1):
        """Layers from (N, before, H, W) to (N, width, H/2, W/2), or to H/4 and W/4 with a stride of 2."""
        # Pool before batch norm and ReLU: they then touch a quarter of the pixels. Sides are rounded up, or a narrow BAND of
        # a small picture would be pooled away.
        return [nn.Conv2d(before, width, side, stride, side // 2, bias=False), nn.MaxPool2d(2, ceil_mode=True),
                nn.BatchNorm2d(width), nn.ReLU()]

    @staticmethod
    def halves(x):
        """(N, C, S, S), or the band of it, -> (2N, C, 4/7 S, 4/7 S): the left halves of the joint, then the right ones,
        mirrored."""
        size = x.shape[-1]
        if x.shape[-2] == size:  # a whole picture; in training `augment` makes the band alone
            x = x[:, :, band(size)]
        half = round(HALF * size)
        return torch.cat((x[..., :half], x.flip(3)[..., :half])).contiguous(memory_format=torch.channels_last)

    def head(self, maps):
        """Feature maps (2N, C, H, W) to logits (N, 5)."""
        left, right = maps.float().mean((2, 3)).chunk(2)  # global average pooling: twice (N, C)
        pair = torch.cat((left + right, (left - right).abs()), 1)  # (N, 2C), the same for a picture and its mirror image
        return self.grade(self.dropout(pair))

    def forward(self, x):
        return self.head(self.features(self.halves(x)))


def count_weights(net):
    return sum(p.numel() for p in net.parameters())


# -------------------------------------------------------------------------------------------- standardize and augment
# Exposure says nothing about the joint, so it is taken out of every picture, in training and in testing alike. What can
# change between two X-rays of one knee (side, angle, distance) is changed at random, in training alone.


def standardize(images):
    """Any uint8 or float (N, 1, S, S) of 0 to 255 to float of about mean 0 and deviation 1, by local contrast
    normalization (Jarrett et al., 2009): each pixel less the mean around it, divided by the deviation around it.

    An X-ray is bright where the knee is thick and dark at its sides; a spur at the margin is a faint grey on black. With
    the mean of the nearest pixels taken out, the exposure is gone and all edges are about equally strong. How near is
    what mattered most of all that was tried on Chen's set: see "What paid" in README.md.
    """
    # The batch as one picture of N channels, (1, N, S, S), which lie side by side in memory: pooling then takes the same
    # pixel of many pictures at once, several times as fast.
    images = images.float().transpose(0, 1).contiguous(memory_format=torch.channels_last)
    reach = max(1, round(2 / 224 * images.shape[-1]))
    side = 2 * reach + 1  # 5 of 224 pixels

    def around(x):
        # A mean over a square of pixels, taken twice, is one over a square of twice the size in which the near ones count
        # most; along columns and then along rows it is the same, with less to add up.
        for _ in range(2):
            x = F.avg_pool2d(x, (side, 1), 1, (reach, 0), count_include_pad=False)
            x = F.avg_pool2d(x, (1, side), 1, (0, reach), count_include_pad=False)
        return x

    detail = images - around(images)
    variance = around(detail.square())
    # About two thirds of the deviation are that of the whole picture, so that an even background does not turn into loud noise;
    # and 1 of the 255 greys is added, so that an even picture comes out as 0.
    detail = detail / (0.35 * variance.sqrt() + 0.65 * variance.mean((2, 3), keepdim=True).sqrt() + 1)
    return detail.transpose(0, 1).contiguous()  # (N, 1, S, S)


STEPS = 32  # what a deviation of 1 is in a byte, which so reaches from -4 to 4 of them


def standardize_once(images):
    """uint8 (N, 1, S, S) to int8 (N, 1, S, S): what `standardize` gives, times STEPS. So a whole subset can be standardized
    before the first epoch, and be kept in as much memory as it took already. What is beyond is cut off: seven pixels of
    a million, in 1,066 pictures of Chen's set."""
    standardized = torch.empty_like(images, dtype=torch.int8)
    for part, into in zip(images.split(64), standardized.split(64)):
        into.copy_((standardize(part) * STEPS).round().clamp(-128, 127))  # into its place: no second copy of all of it
    return standardized


def resample(images, matrices, rows=slice(None)):
    """Pictures (N, 1, S, S) to float pictures of the same shape, or to these `rows` of them: a pixel at (x, y) takes what
    is at matrix @ (x, y, 1) in the old picture, both counted from -1 to 1 over its side; past the margin, the margin is
    repeated. `rows` is a slice; `matrices` is (N, 2, 3), or (1, 2, 3) for one that is the same for all.
    """
    size = images.shape[-1]
    centre = (torch.arange(size, device=images.device) + 0.5) * 2 / size - 1  # of each pixel, along one side
    last = 1 - 1 / size  # the middle of the outermost pixel; padding_mode="border" does the same, where a device has it
    parts = []  # of 16, which stay in a CPU's cache: a whole batch at once took twice as long
    for part, matrix in zip(images.split(16), matrices.expand(len(images), -1, -1).split(16)):
        # Where a new pixel looks is a part that its column decides plus one that its row decides. F.affine_grid makes of it
        # a matrix product, which is slower, and which autocast would round to bfloat16: half a pixel of 224.
        by_column = matrix[:, :, :1] * centre + matrix[:, :, 2:]  # (16, 2, S)
        by_row = matrix[:, :, 1:2] * centre[rows]  # (16, 2, rows)
        look = (by_column[:, :, None] + by_row[..., None]).movedim(1, 3).clamp_(-last, last)  # (16, rows, S, 2)
        parts.append(F.grid_sample(part.float(), look, align_corners=False))
    return torch.cat(parts)


def augment(images, generator, strength=1.0, rows=slice(None)):
    """Pictures (N, 1, S, S) to float (N, 1, S, S): each mirrored or not, turned by up to 12 degrees, its scale changed by up
    to 17 %, its proportions and its place by up to 8 %; all times `strength`. With `rows`, such as band(S), these alone.

    The random numbers come from `generator`, which is on the CPU and so draws the same for every device.
    """
    drawn = torch.rand(6, len(images), generator=generator)
    # CUDA has its copy when the call returns, and need not be waited for; of other devices that is not sure.
    turn, zoom, stretch, right, down, mirror = drawn.to(images.device, non_blocking=images.is_cuda) * 2 - 1
    turn = math.radians(12) * strength * turn
    right, down = 0.17 * strength * right, 0.17 * strength * down  # from -1 to 1 is the whole width, so 0.17 is 8.5 % of it
    high = torch.exp(0.17 * strength * zoom)
    wide = torch.exp(0.085 * strength * stretch) * high
    flip = mirror.sign()
    matrices = torch.stack((flip * wide * turn.cos(), -wide * turn.sin(), right,
                            flip * high * turn.sin(), high * turn.cos(), down), 1)
    return resample(images, matrices.view(-1, 2, 3), rows)


# ------------------------------------------------------------------------------------------------------------ training
# Show a batch, measure how wrong the answer is, move each weight a little to where it is less wrong: that is all of
# training, and it stands in ten lines of `train`. The rest of this part is what keeps it honest and repeatable: choose by
# the validation subset, never by the test subset, and lose nothing when it is stopped.


def rate(progress):
    """The learning rate as a share of its highest, from progress 0 to 1: a quarter of the way up in a straight line,
    then down along a cosine (after Smith and Topin, 2018), to 0, so that the last epochs are the steady ones."""
    return progress / 0.25 if progress < 0.25 else 0.5 + 0.5 * math.cos(math.pi * (progress - 0.25) / 0.75)


def soft_targets(softness, device="cpu"):
    """(5, 5): row g is what the network should answer for grade g, softmax(-(distance)^2 / softness) (Diaz and Marathe,
    2019). Grades are ordered and radiologists often differ by one, so a neighbour is less wrong than a stranger."""
    grade = torch.arange(K, device=device)
    return torch.softmax(-(grade[:, None] - grade).square() / max(softness, 1e-9), 1)  # for 0 so little that nothing leaks


@cache  # asked for at each step, and a GPU would be waited for each time
def inverse_leak(softness, device):
    return torch.linalg.inv(soft_targets(softness)).to(device)  # (5, 5)


def undo_leak(answers, softness):
    """What a network that learned from `soft_targets` answers (N, 5), to the probabilities (N, 5) of the true grade.

    Targets that are never sure teach caution. They are the truth times a matrix, so its inverse takes the caution back:
    that of four fifths of the softness, not of all, since a network knows some training pictures by heart and so is
    surer than it should be. Then a probability means what it says; README.md shows how well.
    """
    inverse = inverse_leak(0.8 * softness, answers.device).to(answers.dtype)
    undone = (answers @ inverse).clamp(min=0.001)  # no grade is out of the question
    return undone / undone.sum(1, keepdim=True)


def decide(probabilities):
    """Probabilities (N, 5) to grades int64 (N,): the answers with the least expected cost, where to be d grades off costs
    d to the power of 0.6.

    What is probable and what to answer are two questions. If all errors cost the same, the best answer is the most
    probable grade; but four knees in ten are of grade 0, so it seldom is grade 1. If an error costs d, it is the median
    of the probabilities, which finds more of grade 1 and is right less often. The power of 0.6 lies between: .4, .3 and
    .3 for the grades 0, 1 and 2 make grade 1. README.md has the figures.
    """
    grade = torch.arange(K, dtype=probabilities.dtype, device=probabilities.device)
    cost = (grade[:, None] - grade).abs() ** 0.6  # (5, 5): row = true grade, column = answer
    return (probabilities @ cost).argmin(1)


# The views of a picture that is graded: (zoom, shift to the right, shift down), the shifts as shares of its side. One nearly
# as it is, for validation and heat maps too, a little farther, a little nearer, and a little to each corner. Nearly: training
# pictures were resampled between pixels, which softens them, and one that was not is sharper than all that was learned from.
MAIN_VIEW = (0.99, 0.0, 0.0)
VIEWS = (MAIN_VIEW, (0.95, 0.0, 0.0), (1.05, 0.0, 0.0),
         (1.0, -0.025, -0.025), (1.0, 0.025, -0.025), (1.0, -0.025, 0.025), (1.0, 0.025, 0.025))


def moved(images, zoom, right, down):
    """Pictures (N, 1, S, S) enlarged about their middle and shifted by shares of their side, to the same size; where the
    view leaves the picture, its margin is repeated."""
    matrix = torch.tensor([[[1 / zoom, 0, -2 * right / zoom], [0, 1 / zoom, -2 * down / zoom]]], device=images.device)
    return resample(images, matrix)


@torch.no_grad()
def answer(net, images, views=VIEWS):
    """Pictures uint8 (N, 1, S, S) to what the network answers, a share for each grade (N, 5), both on its device: the mean
    over views of the picture, since one view's answer hangs on details of no meaning, such as which pixels pooling puts
    together. `undo_leak` makes probabilities of them."""
    net.eval()  # batch norm uses its running averages and dropout is off; forgetting this line is a common error
    answers = []
    for part in map(standardize, images.split(64)):
        with half_precision(images.device):
            logits = torch.stack([net(moved(part, *view)).float() for view in views])
        answers.append(logits.softmax(2).mean(0))  # (views, batch, 5) -> (batch, 5)
    return torch.cat(answers)


BAR = "{desc} {percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} {elapsed}{postfix}"
HISTORY = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_kappa", "lr", "seconds")


def evaluate(net, dataset, targets):
    """(loss, answers (N, 5)) over a whole subset, without augmentation; from one view, since all of them take longer."""
    answers = answer(net, dataset.images, [MAIN_VIEW])
    return F.cross_entropy(answers.clamp(min=1e-9).log(), targets[dataset.grades]).item(), answers


def follow(average, net, share):
    """Moves each weight of the network `average`, and what its batch norms remember, this share of the way to those of
    `net`: done after every step, it makes a running average of about the last 1 / share steps."""
    for mean, now in zip(average.state_dict().values(), net.state_dict().values()):
        if mean.is_floating_point():  # batch norm counts its batches too, and nobody asks for that
            mean.lerp_(now, share)


def batch_for(n, config):
    """Pictures per step where n are trained on: where the largest batch would leave an epoch with less than 75 steps, it
    shrinks, down to 8. Many small steps learn more from few pictures than few large ones, and than more epochs, which
    learn them by heart: see "What paid" in README.md."""
    return min(config.batch, max(8, n // 75), n)


def train(train_set, val_set, config, run, bars=True):
    """Trains a network, writing last.pt, best.pt and history.csv into the folder `run` after each epoch, and goes on
    where last.pt stands if it is there. Returns the checkpoint of the best epoch: the one with the highest quadratic
    weighted kappa on the validation subset. Raises KneeError if the loss is no number any more, or if last.pt was begun
    with other settings or pictures.

    Every epoch makes its random generators anew, from the seed and its number. So there is no state of theirs to save,
    and a run that was stopped goes on with the same numbers as one that was not.
    """
    run, device = Path(run), train_set.images.device
    torch.manual_seed(config.seed)  # the first weights
    net = KneeNet(config.widths, config.dropout).to(device, memory_format=torch.channels_last)
    # Weight decay beside the step and not in its gradient: Adam would scale it away (Loshchilov and Hutter, 2019).
    adam = torch.optim.Adam(net.parameters(), config.lr, weight_decay=config.weight_decay, decoupled_weight_decay=True,
                            fused=True)
    batch = batch_for(len(train_set), config)
    steps = len(train_set) // batch  # an epoch leaves out the last, incomplete batch, other pictures each time
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate((step + 1) / (steps * config.epochs + 1)))
    # What is validated, kept and tested is a running average of the weights, two thirds of it from the last quarter of the
    # steps done so far (Shamir and Zhang, 2013): single steps throw the network about, their mean stays in the middle.
    average = copy.deepcopy(net)
    targets = soft_targets(config.softness, device)  # (5, 5), a row for each grade

    state = {"net": net, "average": average, "adam": adam, "schedule": schedule}  # what a resumed run must find again
    begun = {"config": asdict(config), "pictures": fingerprint(train_set, val_set)}
    history, best = resume(run, begun, config, state)
    standardized = standardize_once(train_set.images)
    for epoch in range(len(history) + 1, config.epochs + 1):
        start = time.perf_counter()
        # Three generators, so that drawing one more augmentation never changes the order of the pictures or dropout.
        seeds = np.random.SeedSequence((config.seed, epoch)).generate_state(3).tolist()
        order, chance = (torch.Generator().manual_seed(s) for s in seeds[:2])
        torch.manual_seed(seeds[2])  # dropout
        shuffled = torch.randperm(len(train_set), generator=order).to(device)
        net.train()  # here validation has a copy of its own; whoever validates `net` itself needs this line in every epoch
        sums, shown = torch.zeros(2, device=device), start  # of loss and accuracy; they stay on the device
        title = f"epoch {epoch:{len(str(config.epochs))}}/{config.epochs}"
        with tqdm(total=steps, desc=title, bar_format=BAR, mininterval=0.3, disable=not bars) as bar:
            for step, index in enumerate(shuffled[: steps * batch].split(batch), 1):
                grades = train_set.grades[index]  # int64 (B,)
                images = standardized.index_select(0, index)  # int8 (B, 1, S, S); by [index] it takes nine times as long
                seen = band(images.shape[-1])  # the rest would be made for nothing
                images = augment(images, chance, config.augment, seen).div_(STEPS)  # float (B, 1, 4/7 S, S)
                with half_precision(device):
                    logits = net(images).float()  # (B, 5)
                loss = F.cross_entropy(logits, targets[grades])
                adam.zero_grad()
                loss.backward()
                adam.step()
                schedule.step()
                done = (epoch - 1) * steps + step
                follow(average, net, 4 / (done + 3))  # all the way at the first step: untrained weights don't count
                right = decide(undo_leak(logits.detach().softmax(1), config.softness)) == grades
                sums += torch.stack((loss.detach(), right.float().mean()))
                bar.update()
                if step == steps or time.perf_counter() - shown > 0.3:  # not at each step: .tolist() waits for the GPU
                    shown = time.perf_counter()
                    train_loss, train_accuracy = (sums / step).tolist()
                    bar.set_postfix_str(f"loss {train_loss:.3f} accuracy {train_accuracy:.3f}", refresh=False)
            seconds = time.perf_counter() - start

            val_loss, answers = evaluate(average, val_set, targets)
            if not math.isfinite(train_loss + val_loss):
                raise KneeError(f"epoch {epoch}: the loss is no number any more, "
                                f"try --lr {config.lr / 4:.1g} and another --run")
            scores = metrics(confusion_matrix(val_set.grades, decide(undo_leak(answers, config.softness))))
            accuracy, kappa = float(scores["accuracy"]), float(np.nan_to_num(scores["kappa"]))  # 0 where it is undefined
            left = (config.epochs - epoch) * (time.perf_counter() - start)
            bar.set_postfix_str(f"{bar.postfix} | validation loss {val_loss:.3f} accuracy {accuracy:.3f} "
                                f"kappa {kappa:.3f} | {tqdm.format_interval(left)} left")

        row = [epoch, train_loss, train_accuracy, val_loss, accuracy, kappa, config.lr * rate(epoch / config.epochs), seconds]
        history.append(row)
        # The line that chooses: the highest kappa on the validation subset, of equals the one with the lower loss.
        if best is None or (kappa, -val_loss) > (best["figures"]["val_kappa"], -best["figures"]["val_loss"]):
            weights = {name: tensor.clone() for name, tensor in average.state_dict().items()}
            best = {"epoch": epoch, "figures": dict(zip(HISTORY, row)), "net": weights}
        keep(run, begun, history, best, state)
    return load_checkpoint(run / "best.pt")


# ------------------------------------------------------------------------------------------------------------- metrics
# Accuracy alone flatters: always answering grade 0 is right for 40 % of these data sets. So four figures are given, all
# from one table of counts, each with the interval in which it would lie if other patients had been drawn.


FIGURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "kappa": "quadratic weighted kappa",
           "mae": "mean absolute error"}


def confusion_matrix(true, predicted):
    """Counts as int64 (5, 5): row = true grade, column = predicted grade."""
    both = np.asarray(torch.as_tensor(true).cpu()) * K + np.asarray(torch.as_tensor(predicted).cpu())
    return np.bincount(both, minlength=K * K).reshape(K, K)


def metrics(confusion):
    """From counts (..., 5, 5) to figures of the same leading shape: accuracy; recall per grade (..., 5); balanced
    accuracy, the mean of the recalls; quadratic weighted kappa (Cohen, 1968), 1 - (squared errors) / (squared errors if
    answers and truth were independent); mae, the mean distance in grades. NaN where a figure is undefined.
    """
    counts = np.asarray(confusion, dtype=float)
    distance = np.abs(np.arange(K)[:, None] - np.arange(K))
    true, predicted, n = counts.sum(-1), counts.sum(-2), counts.sum((-1, -2))
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = right / true
        chance = true[..., :, None] * predicted[..., None, :] / n[..., None, None]
        kappa = 1 - (counts * distance**2).sum((-1, -2)) / (chance * distance**2).sum((-1, -2))
        there = true > 0  # a grade without pictures has no recall, and does not count in the mean
        return {"accuracy": right.sum(-1) / n, "balanced_accuracy": np.where(there, recall, 0).sum(-1) / there.sum(-1),
                "kappa": kappa, "mae": (counts * distance).sum((-1, -2)) / n, "recall": recall}


def intervals(true, predicted, patients, draws=2000):
    """95 % intervals {figure: (low, high)} by the bootstrap (Efron, 1979): the figures of `draws` samples of as many
    patients, drawn with replacement. Patients and not pictures, since the two knees of one are no independent evidence.
    """
    _, number = np.unique(patients, return_inverse=True)
    counts = np.zeros((number.max() + 1, K * K))
    np.add.at(counts, (number, np.asarray(true) * K + np.asarray(predicted)), 1)  # (patients, 25)
    drawn = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), draws)
    figures = metrics((drawn @ counts).reshape(draws, K, K))
    return {name: np.nanpercentile(figures[name], (2.5, 97.5)).tolist() for name in FIGURES}


# --------------------------------------------------------------------------------------------------------------- files
# Here ends the road, and what follows is what it leaned on. First files: how folders and tables are read, and how
# results are written so that nothing is lost whenever the power goes.


def folders_in(folder):
    """Without hidden ones, and without the double of each folder that an archive made on a Mac has in it."""
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__MACOSX")))


def grade_folders(folder):
    """(grade, folder) for `0`, `1`, ... or `0Normal`, `1Doubtful`, ...: the digit counts, never the alphabetical rank."""
    return [(int(f.name[0]), f) for f in folders_in(folder) if re.match(rf"[0-{K - 1}](?!\d)", f.name)]


def layouts(folder, depth=3):
    """Each data set in a folder, or in its inner folders, as {subset: folder with the grades}, subset "" where there is one."""
    if grade_folders(folder):
        return [{"": folder}]
    given = {name: folder / name for name in SUBSETS if (folder / name).is_dir() and grade_folders(folder / name)}
    return [given] if given else [found for f in folders_in(folder) if depth for found in layouts(f, depth - 1)]


def find_layout(folder):
    """The one data set of a folder, which may be an unzipped archive, as {subset: folder with the grades}. Raises KneeError
    where there is none, or more than one."""
    if not folder.is_dir():
        raise KneeError(f"{folder}: no such folder, name the folder of the X-rays with --data")
    found = layouts(folder)
    if not found:
        raise KneeError(f"{folder}: no folders 0 to {K - 1} in it, nor in a folder train; put each picture under its grade")
    firsts = [next(iter(layout.items())) for layout in found]
    bases = [top.parent if subset else top for subset, top in firsts]  # the folder of each data set
    if len(found) > 1:
        raise KneeError(f"{folder}: has several data sets in it ({', '.join(map(str, bases))}), name one with --data; "
                        f"or, if they are the subsets of one, call them train, val and test")
    layout, tops = found[0], set(found[0].values())
    seen = {f for top in tops | {bases[0]} for f in folders_in(top)}
    passed_over = seen - tops - {f for top in tops for _, f in grade_folders(top)}
    if passed_over:
        print(f"passed over, no grade or subset: {', '.join(sorted(f.relative_to(folder).as_posix() for f in passed_over))}")
    return layout


def read_patients(path):
    """{file name: patient} from a CSV file with the columns image,patient."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"image", "patient"} <= set(reader.fieldnames or ()):
                raise ValueError("no columns image,patient")
            return {row["image"]: (row["patient"] or "").strip() for row in reader}
    except (ValueError, csv.Error) as error:  # ValueError: a file that is no text, too
        raise KneeError(f"{path}: is no patients file, its first line must be image,patient") from error


def refuse_leaks(where, xrays):
    """Raises KneeError if a patient has pictures in two subsets."""
    homes = defaultdict(set)
    for xray in xrays:
        homes[xray.patient].add(xray.subset)
    leaks = sorted(patient for patient, subsets in homes.items() if len(subsets) > 1)
    if leaks:
        raise KneeError(f"{where}: {len(leaks)} patients are in two subsets ({', '.join(leaks[:5])}"
                        f"{' ...' if leaks[5:] else ''}), move all pictures of each to one")


def drop_equal_pictures(folder, xrays):
    """Without the pictures whose decoded pixels stand there twice, and a line of text about each that was left out.

    Of equals within a grade the first is kept. Equals under different grades are all left out: one label must be wrong,
    and nothing says which.
    """
    def digest(xray):
        grey = read_grey(folder / xray.path)
        return hashlib.blake2b(repr(grey.shape).encode() + grey.tobytes(), digest_size=16).digest()

    equals = defaultdict(list)
    for xray, pixels in zip(xrays, in_threads(digest, xrays, "compare")):
        equals[pixels].append(xray)
    kept, notes = [], []
    for first, *others in equals.values():
        if any(x.grade != first.grade for x in others):
            notes.append("left out, one picture under several grades: " + ", ".join(x.path for x in (first, *others)))
        else:
            kept.append(first)
            notes += [f"left out, equals {first.path}: {x.path}" for x in others]
    return sorted(kept), notes


def in_threads(function, items, title):
    """[function(item) for item in items], on all cores: Pillow decodes without holding Python's lock, so threads are
    enough. Every item that raises KneeError is tried and told, not the first alone."""
    results, broken = [], []

    def attempt(item):
        try:
            return function(item)
        except KneeError as error:
            broken.append(str(error))

    parts = [items[i : i + 32] for i in range(0, len(items), 32)]  # one by one, handing over would cost a fifth more
    with ThreadPoolExecutor(cpu_cores()) as pool, tqdm(desc=title, total=len(items), unit=" pictures", leave=False) as bar:
        for part in pool.map(lambda part: list(map(attempt, part)), parts):
            results += part
            bar.update(len(part))
    if broken:
        raise KneeError("; ".join(sorted(broken)))
    return results


def save(path, content):
    """Replaces the file by `content` (bytes or text), or leaves it as it was: it is written beside its place, flushed to
    the disk and then renamed, which happens as a whole or not at all."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:  # a full disk, most often
        beside.unlink(missing_ok=True)
        raise


def save_csv(path, columns, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    save(path, text.getvalue())


def read_csv(path):
    """The rows of a CSV file as dictionaries; file names that are no UTF-8 come back as they were saved."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def save_checkpoint(path, checkpoint):
    memory = io.BytesIO()
    torch.save(checkpoint, memory)
    save(path, memory.getvalue())


def load_checkpoint(path, *needed):
    """The checkpoint at `path` as a dictionary, its "config" made into a Config. Raises KneeError if it is none of this
    program's, or lacks one of the keys that are needed."""
    if not Path(path).is_file():
        raise KneeError(f"{path}: no such checkpoint, run train first or name the run's folder with --run")
    try:
        # weights_only: a checkpoint is a pickle, and a pickle from a stranger can run any program.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"] = Config(**checkpoint["config"])
        load_net(checkpoint, torch.device("cpu"))
        if not set(needed) <= checkpoint.keys():
            raise KeyError("a part is missing")
    except Exception as error:  # what torch.load raises on foreign bytes is documented nowhere, and can be anything
        raise KneeError(f"{path}: is damaged or of another program ({type(error).__name__}), remove its folder or name "
                        f"another with --run") from error
    return checkpoint


def load_net(checkpoint, device):
    """The network of a checkpoint, on the device and ready to answer."""
    net = KneeNet(checkpoint["config"].widths).to(device, memory_format=torch.channels_last)
    net.load_state_dict(checkpoint["net"])
    return net.eval()


def fingerprint(*datasets):
    """A text that is the same for the same pictures, names and subsets alone."""
    digest = hashlib.blake2b(digest_size=16)
    for dataset in datasets:
        digest.update(repr(dataset.xrays).encode("utf-8", "surrogateescape"))
        digest.update(dataset.images.cpu().numpy())
    return digest.hexdigest()


def refuse_other(run, before, now):
    """Raises KneeError if a run is to go on with other settings or pictures than it began with."""
    changed = [f"{name} was {value}, now {getattr(now['config'], name)}" for name, value in asdict(before["config"]).items()
               if name != "device" and value != getattr(now["config"], name)]
    if not changed and before["pictures"] != now["pictures"]:
        changed = ["the pictures or their split were others"]
    if changed:
        raise KneeError(f"{run}: was begun differently ({', '.join(changed)}), set it as it was or name another --run")


def keep(run, begun, history, best, state):
    """Writes last.pt, all that a resumed run needs, and then best.pt and history.csv, which hold nothing that it does not: so
    there is no moment at which the three disagree for good."""
    parts = {name: part.state_dict() for name, part in state.items()}
    save_checkpoint(run / "last.pt", begun | parts | {"history": history, "best": best})
    save_checkpoint(run / "best.pt", begun | best | {"done": len(history)})
    save_csv(run / "history.csv", HISTORY, history)


def resume(run, begun, config, state):
    """(history, best) of a run, empty where it begins; else the parts of `state` are set to what last.pt holds. Raises
    KneeError if it was begun with other settings or pictures."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "last.pt").exists():
        return [], None
    last = load_checkpoint(run / "last.pt", "history", "best", "pictures", *state)
    refuse_other(run, last, begun | {"config": config})
    for name, part in state.items():
        part.load_state_dict(last[name])
    print(f"{run}: {len(last['history'])} of {config.epochs} epochs are done already; another --run would begin anew")
    keep(run, begun, last["history"], last["best"], state)  # it may have been stopped before all was written
    return last["history"], last["best"]


def pick_device(name):
    """The torch.device of a setting such as "auto" or "cuda:1". Raises KneeError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    kind, _, number = name.partition(":")
    if not there[kind] or kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise KneeError(f"--device {name}: is not on this machine, use --device auto")
    return torch.device(name)


def keep_freed_memory():
    """Keeps what is freed for the next step, where the C library is glibc, as on most Linux. It would be given back to the
    system, which clears it anew, page by page: without this, training on Chen's set took a fifth longer on two CPU cores."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD in malloc.h: how much may be free before it is given back
        mallopt(-4, 0)  # M_MMAP_MAX: how many large tensors may be in memory of their own, given back with each of them


def cpu_cores(limits=Path("/sys/fs/cgroup")):
    """How many CPU cores this program may use: those that it sees, or the share of them that its container has (Linux's
    cgroups, 2 and 1). Threads beyond that only wait for one another: an epoch of phantoms on two cores took 1.8 s with two,
    and 296 s with 16."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        if all((limits / name).is_file() for name in names):
            quota, period = " ".join((limits / name).read_text() for name in names).split()
            if quota.isdecimal():  # where there is no limit, it is "max" or -1
                return min(seen, max(1, int(quota) // int(period)))
    return seen


def half_precision(device):
    """The context in which the network's convolutions run in bfloat16, where the device computes that natively and so is
    faster with it: CPUs with AMX or AVX-512 BF16, and most GPUs. Others would be slower, and stay in float32."""
    if device.type == "cpu":
        can = getattr(torch.cpu, "get_capabilities", dict)()  # older builds of torch cannot tell
        native = can.get("amx_bf16", False) or can.get("avx512_bf16", False)
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


# ------------------------------------------------------------------------------------------------------------- looking
# A figure does not tell why. A heat map shows which part of the picture spoke for the predicted grade: it should be the
# joint, and where it is a screw or a letter at the margin, the network has learned something else.


def join_halves(halves, size):
    """`KneeNet.halves` undone: (2N, 1, h, w) over the halves, of any resolution, to (N, 1, size, size) over the pictures."""
    rows, half = band(size), round(HALF * size)
    overlap = 2 * half - size
    fade = torch.ones(half, device=halves.device)
    fade[half - overlap :] = torch.linspace(1, 0, overlap, device=halves.device)  # from one half into the other
    left, right = (F.interpolate(halves, (rows.stop - rows.start, half), mode="bilinear") * fade).chunk(2)
    canvas = left.new_zeros(len(left), 1, size, size)
    canvas[:, :, rows, :half] += left
    canvas[:, :, rows, -half:] += right.flip(3)
    return canvas


def heat_maps(net, images, grades):
    """Grad-CAM (Selvaraju et al., 2017): pictures uint8 (N, 1, S, S) and grades int64 (N,) to heat (N, S, S) from 0 to 1: what
    spoke for this grade. Each channel of the last feature maps counts as much as the grade's logit would rise with it."""
    net.eval()
    maps = net.features(KneeNet.halves(moved(standardize(images), *MAIN_VIEW)))  # (2N, C, H, W)
    chosen = net.head(maps).gather(1, grades[:, None])  # the logits (N, 1) of these grades
    slopes = torch.autograd.grad(chosen.sum(), maps)[0].mean((2, 3), keepdim=True)  # (2N, C, 1, 1)
    heat = F.relu((slopes * maps).sum(1, keepdim=True)).detach()  # (2N, 1, H, W)
    whole = join_halves(heat, images.shape[-1])[:, 0]  # (N, S, S)
    return whole / whole.amax((1, 2), keepdim=True).clamp(min=1e-9)


def shortened(name):
    """A file name as matplotlib can write it: it refuses what is no letter, and sets what is between two $ as a formula."""
    name = name.encode("utf-8", "replace").decode()
    return (name if len(name) <= 40 else name[:19] + "..." + name[-18:]).replace("$", r"\$")


def show_xray(axes, image, heat, title):
    """An X-ray (S, S) and, if given, over it in colour its heat (S, S)."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    if heat is not None:
        axes.imshow(heat, cmap="inferno", alpha=0.6 * heat, vmin=0, vmax=1)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def save_figure(path, figure):
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    save(Path(path), memory.getvalue())


def draw_report(path, name, history, chosen, result, cells):
    """The sheet of a run: curves by epoch, confusion matrix, X-rays beside their heat maps. `cells` are a right answer for
    each grade and then a wrong one for each: (image (S, S), heat (S, S), true grade, predicted grade) or None."""
    history = dict(zip(HISTORY, zip(*history)))
    figure = Figure(figsize=(13, 8.4), layout="constrained", dpi=110)  # by pyplot it would need a display
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    curves, table = top.subfigures(1, 2, width_ratios=(2, 1.1))
    kappa = "undefined" if result["kappa"] is None else f"{result['kappa']:.3f}"
    figure.suptitle(f"{shortened(name)}: {result['subset']} subset, {result['n']} pictures, accuracy {result['accuracy']:.3f}, "
                    f"balanced {result['balanced_accuracy']:.3f}, kappa {kappa}, MAE {result['mae']:.3f}")
    epochs, dot = history["epoch"], 3 if len(history["epoch"]) <= 50 else 0  # more dots would run into one another
    for axes, quantity, unit in zip(curves.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy, nats", "share right")):
        axes.plot(epochs, history[f"train_{quantity}"], "o-", color="#0072b2", ms=dot, label="training (augmented)")
        axes.plot(epochs, history[f"val_{quantity}"], "s--", color="#d55e00", ms=dot, label="validation")
        axes.axvline(chosen, color="0.4", ls=":", label=f"chosen: epoch {chosen}")
        axes.set(xlabel="epoch", ylabel=f"{quantity} ({unit})")
        axes.set_xlim(0.5, len(epochs) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    counts = np.array(result["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes = table.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true, predicted in itertools.product(range(K), repeat=2):
        axes.text(predicted, true, f"{counts[true, predicted]}\n{shares[true, predicted]:.0%}", ha="center", va="center",
                  fontsize=9, color="white" if shares[true, predicted] > 0.6 else "black")
    axes.set(xlabel="predicted grade", ylabel="true grade", title=f"{result['subset']}: pictures, share of the row",
             xticks=range(K), yticks=range(K))
    grid = bottom.subplots(2, 2 * K)
    for i, axes in enumerate(grid.flat):  # the upper row answered right, the lower one wrong
        cell = cells[i // 2]
        axes.axis("off")
        if cell is None:
            axes.set_title("" if i % 2 else f"true {i // 2 % K}: none", fontsize=9)
            continue
        image, heat, true, predicted = cell
        show_xray(axes, image, heat if i % 2 else None, f"predicted {predicted}" if i % 2 else f"true {true}")
    bottom.suptitle("for each grade a picture answered right, below it one answered wrong; "
                    "beside each, in colour, what spoke for the predicted grade", fontsize=10)
    save_figure(path, figure)


def draw_heat_maps(path, images, heats, grades, names):
    """Each picture (N, 1, S, S) beside its heat map (N, S, S), under its name and predicted grade, up to three in a row."""
    across = min(3, len(images))
    down = math.ceil(len(images) / across)
    figure = Figure(figsize=(6.4 * across, 3.6 * down), layout="constrained", dpi=110)
    axes = figure.subplots(down, 2 * across, squeeze=False).flat
    for image, heat, grade, name in zip(images, heats, grades, names):
        show_xray(next(axes), image[0].cpu().numpy(), None, shortened(Path(name).name))
        show_xray(next(axes), image[0].cpu().numpy(), heat.cpu().numpy(), f"predicted {grade} ({GRADES[grade]})")
    for empty in axes:
        empty.axis("off")
    save_figure(path, figure)


# ------------------------------------------------------------------------------------------------------------ phantoms
# Drawn knees with a known grade, so that everything above can be tried and tested with no download. They show the signs
# that radiologists grade by, but they are no medical data, and no result on them is a medical result. Skip this part
# freely: nothing is to be learned from it about networks.


def bump(x, centre, width):
    return np.exp(-(((x - centre) / width) ** 2))


def soft_step(x, softness):
    return 0.5 + 0.5 * np.tanh(x / (2 * softness))  # 0 below 0, 1 above


def draw_phantom(severity, patient, knee, size=224):
    """A right knee from the front, as uint8 (size, size). `severity` runs from -0.5 to 4.5, its rounding is the grade;
    the two NumPy generators vary what the knees of a patient share and what they do not."""
    def vary(low, high):
        return patient.uniform(low, high) + knee.normal(0, (high - low) * 0.05)

    def sign(start, full):  # each sign of the disease sets in at a severity of its own, and none is sure
        return float(np.clip((severity + knee.normal(0, 0.2) - start) / (full - start), 0, 1.2))

    def noise(*shape):
        grain = Image.fromarray(knee.standard_normal(shape, dtype=np.float32))
        return np.asarray(grain.resize((size, size), Image.Resampling.BICUBIC))

    # x to the right and y down, from -1 to 1, the joint at the origin.
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    # Python's own numbers leave an array in float32; those of np.cos and its like would make it float64, in which
    # drawing takes up to three times as long.
    turn = math.radians(knee.normal(0, 2.5))
    x, y = x - knee.normal(0, 0.02), y - knee.normal(0.08, 0.03)
    x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    worn = 1 if patient.random() < 0.75 else -1  # the side that wears: the inner one (+1) in most patients
    on_worn = soft_step(x * worn, 0.06)
    half = vary(0.74, 0.84)  # of the width of the joint

    # The joint space narrows, most on the worn side. At the end bone grinds on bone, and its surface gives way.
    space = vary(0.125, 0.16) * (1 - 0.98 * min(sign(0.7, 3.4), 1) * on_worn - 0.2 * sign(2.4, 4.2) * (1 - on_worn))
    deformed = sign(3.1, 4.0)
    sunk = 0.06 * deformed * on_worn * bump(np.abs(x), half * 0.55, 0.25)
    for k in (2, 3, 4):
        sunk += deformed * knee.normal(0, 0.006) * np.sin(k * 5 * x + knee.uniform(0, 6.3))

    # Every bone is a map of depth below its surface, positive inside. First the femur: two condyles, a notch, the shaft.
    across = np.clip(np.abs(np.abs(x) - 0.52 * half) / (0.53 * half), 0, 0.999)
    surface = sunk - space / 2 - vary(0.15, 0.2) * (1 - (1 - across**2.6) ** 0.5)
    surface -= vary(0.10, 0.15) * bump(x, 0, vary(0.15, 0.19))
    neck = vary(0.56, 0.66)
    width = neck + (half - neck) * soft_step(y + vary(0.5, 0.62), 0.1) + 0.05 * bump(y, -0.3, 0.16)
    femur = np.minimum(surface - y, 0.8 * (width - np.abs(x)))
    # Then the tibia: a plateau with two spines, narrowing to its shaft.
    surface = sunk + space / 2 + 0.02 * bump(np.abs(x), 0.5 * half, 0.25) - 0.05 * bump(x, 0, 0.2)
    surface -= vary(0.09, 0.13) * (bump(x, -0.08, 0.06) + 0.85 * bump(x, 0.09, 0.065))
    width = vary(0.5, 0.58) - 0.02 + (half - 0.5) * (1 - soft_step(y - vary(0.42, 0.52), 0.09))
    tibia = np.minimum(y - surface, 0.8 * (width - np.abs(x)))
    fibula = np.minimum(y - 0.36, 0.11 + 0.04 * bump(y, 0.42, 0.1) - np.abs(x + half - 0.05 - 0.1 * soft_step(y - 0.62, 0.06)))

    # Osteophytes: beaks at the four margins of the joint, first and largest on the worn side of the tibia.
    edge = float(space.mean()) / 2
    for margin, on_femur, start in ((worn, False, 0.7), (worn, True, 1.0), (-worn, False, 0.9), (-worn, True, 1.3)):
        big = sign(start, start + 2.8) * knee.uniform(0.8, 1.2)
        if big > 0.03:
            out = (x * margin - half + 0.02) / (0.05 + 0.13 * big)
            up = y - (-edge - 0.10 if on_femur else edge + 0.045) + (-0.06 if on_femur else 0.05) * out * big
            beak = 0.05 * min(1, 4 * big) * (1 - np.hypot(out, up / (0.025 + 0.045 * big)))
            bone = femur if on_femur else tibia
            grown = np.maximum(bone, beak) + 0.015 * np.exp(-np.abs(bone - beak) / 0.03)  # a union with a smooth seam
            femur, tibia = (grown, tibia) if on_femur else (femur, grown)

    # What the rays meet, added up: soft tissue, the cortex of each bone and its spongy inside, kneecap, growth line,
    # sclerosis (hard, bright bone on both sides of the worn joint), a slope, grain.
    ray = 0.14 + 0.30 * np.sqrt(np.clip(1 - (x / vary(1.15, 1.4)) ** 2, 0, 1)) + 0.10 * bump(y, -0.55, 0.5) * bump(x, 0, 0.7)
    sponge = 0.6 * noise(size // 5, size // 2) + 0.8 * noise(size // 12, size // 12)
    for bone, weight in ((femur, 1.0), (tibia, 1.0), (fibula, 0.3)):
        depth = np.clip(bone, 0, 0.3)
        inside = 0.15 + 0.12 * np.exp(-depth / 0.02) + 0.10 * soft_step(depth - 0.12, 0.06) + 0.016 * sponge
        ray += weight * soft_step(bone, 0.006) * inside
    ray += 0.05 * soft_step(1 - np.hypot(x / 0.38, (y + 0.5) / 0.32), 0.05)
    ray += 0.035 * bump(y, -0.36 + 0.05 * np.cos(3.5 * x), 0.012) * soft_step(femur, 0.01)
    hard = sign(1.5, 3.6) * soft_step(x * worn - 0.12, 0.05)
    for bone, most in ((tibia, 0.26), (femur, 0.15)):
        ray += most * hard * soft_step(bone, 0.006) * np.exp(-np.clip(bone, 0, 1) / 0.07)
    ray += knee.normal(0, 0.04) * x + 0.010 * vary(0.4, 1.8) * noise(size, size)

    low, high = np.percentile(ray[::4, ::4], (1, 99)).tolist()
    grey = np.clip((ray - low) / (high - low), 0, 1.2) ** vary(0.65, 1.35) * vary(0.5, 1.0) + vary(0.02, 0.2)
    image = Image.fromarray(np.uint8(255 * np.clip(grey, 0, 1)))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(vary(0.3, 0.9))))


def make_phantoms(folder, count=1000, seed=0):
    """Draws `count` phantoms into folder/0 ... folder/4, a left and a right knee of each patient (`1000001L.png`).
    Raises KneeError if the folder is there and not empty, or the current one, or if `count` is too small to be split."""
    folder = Path(folder)
    if count < 60:
        raise KneeError(f"--count {count}: too few to be split by patient, draw 60 or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.resolve() == Path.cwd()):
        raise KneeError(f"{folder}: is there already, remove it or name another folder with --data")
    beside = folder.with_name(folder.name + ".part")  # renamed at the end: a half-drawn set is never taken for a whole one
    shutil.rmtree(beside, ignore_errors=True)  # what a drawing that was stopped has left
    for grade in range(5):
        (beside / str(grade)).mkdir(parents=True, exist_ok=True)

    def draw(i):
        number, left = i // 2, i % 2
        patient = np.random.default_rng((seed, number))
        knee = np.random.default_rng((seed, number, 1 + left))
        usual = (0, 1, 2, 3, 0, 2, 4, 1, 0, 3, 2, 4, 0, 1, 3, 2, 0, 4)[number % 18] + patient.uniform(-0.5, 0.5)
        severity = float(np.clip(usual + knee.normal(0, 0.35), -0.5, 4.49))
        picture = draw_phantom(severity, patient, knee)
        file = beside / str(max(0, round(severity))) / f"{1_000_001 + number}{'RL'[left]}.png"
        Image.fromarray(picture[:, ::-1] if left else picture).save(file)

    in_threads(draw, range(count), "draw")
    if folder.exists():
        folder.rmdir()
    beside.rename(folder)


# ------------------------------------------------------------------------------------------------------------ commands
# Each command is a function of plain paths and settings; only `main` reads the command line and prints errors.


def table(head, rows):
    """Lines of text, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
                     for row in cells)


def what_to_type(command, options):
    """What to type for a command: the same Python, which has the packages, and quotes where the shell needs them."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    program = sys.argv[0] if __name__ == "__main__" else "kneeoa.py"
    return join([sys.orig_argv[0], program, command, *map(str, itertools.chain(*options.items()))])


def command_split(data, run, config, patients_file=None):
    """Makes RUN/split.csv and prints how many pictures and patients of each grade are in each subset."""
    if (run / "last.pt").exists():
        raise KneeError(f"{run}: a training has begun with its split, name another folder with --run")
    xrays, notes = make_split(data, config.seed, patients_file)
    print(*notes, sep="\n")
    run.mkdir(parents=True, exist_ok=True)
    save_csv(run / "split.csv", Xray._fields, xrays)

    def count(own):
        return f"{len(own)} ({len({x.patient for x in own})})"

    subsets = {subset: [x for x in xrays if x.subset == subset] for subset in SUBSETS}
    print(table(("pictures (patients)", *(f"grade {g}" for g in range(K)), "all"), [
        (subset, *(count([x for x in own if x.grade == g]) for g in range(K)), count(own)) for subset, own in subsets.items()]))
    return xrays


def read_split(data, run):
    """The pictures of RUN/split.csv. Raises KneeError if it is damaged, or if pictures that it names are not in `data`."""
    path = run / "split.csv"
    if not path.exists():
        raise KneeError(f"{path}: no such file, run split or train first, or name the run's folder with --run")
    try:
        xrays = [Xray(row["path"], int(row["grade"]), row["patient"], row["subset"]) for row in read_csv(path)]
        if not {"train", "val"} <= {x.subset for x in xrays} <= SUBSETS.keys() or {x.grade for x in xrays} != set(range(K)):
            raise ValueError("subsets or grades are missing")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise KneeError(f"{path}: is damaged ({error}), remove it and run split again") from error
    refuse_leaks(path, xrays)
    gone = [x.path for x in xrays if not (data / x.path).is_file()]
    if gone:
        raise KneeError(f"{path}: {len(gone)} of its pictures are not in {data}, {gone[0]} for one; name their folder "
                        f"with --data, or another run with --run")
    return xrays


def training_sets(data, run, config, device, patients_file):
    """The data sets of subsets train and val, by the split of the run, which is made if it is missing. Raises KneeError if its
    patients are not those of the patients file."""
    made = (run / "split.csv").exists()
    xrays = read_split(data, run) if made else command_split(data, run, config, patients_file)
    named = read_patients(patients_file) if patients_file else {}
    if any(x.patient != (named.get(Path(x.path).name) or x.patient) for x in xrays):
        raise KneeError(f"{run / 'split.csv'}: its patients are not those of {patients_file}, run split again with it")
    return [KneeFolder(data, [x for x in xrays if x.subset == s], config.size, device) for s in ("train", "val")]


def command_train(data, run, config, device, patients_file=None):
    """Trains on the split of the run, which is made if it is missing, then tests."""
    sets = training_sets(data, run, config, device, patients_file)
    n, threads = len(sets[0]), f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"training on {n} pictures in batches of {batch_for(n, config)} for {config.epochs} epochs, "
          f"validating on {len(sets[1])}, {count_weights(KneeNet(config.widths)):,} weights, on {device}{threads}")
    train(*sets, config, run)
    command_test(data, run, device)
    print(f"\nall of it is in {run}; next: {what_to_type('plot', {'--data': data, '--run': run})}")


def command_test(data, run, device):
    """Tests the best epoch: prints the figures, writes RUN/metrics.json and RUN/predictions.csv. What is tested is the
    test subset; but the validation subset where there is no other, or while the training is not finished. Returns the
    checkpoint, the figures, and the tested pictures with the answers to them."""
    checkpoint, xrays = load_checkpoint(run / "best.pt", "epoch", "done"), read_split(data, run)
    config, net = checkpoint["config"], load_net(checkpoint, device)
    finished = checkpoint["done"] == config.epochs
    subset = "test" if finished and any(x.subset == "test" for x in xrays) else "val"
    tested = [x for x in xrays if x.subset == subset]
    dataset = KneeFolder(data, tested, config.size, device)
    probabilities = undo_leak(answer(net, dataset.images), config.softness).cpu()
    true, predicted = dataset.grades.cpu().numpy(), decide(probabilities).numpy()
    confusion = confusion_matrix(true, predicted)
    figures, within = metrics(confusion), intervals(true, predicted, [x.patient for x in tested])
    usual = Counter(x.grade for x in xrays if x.subset == "train").most_common(1)[0][0]
    majority = metrics(confusion_matrix(true, np.full_like(true, usual)))

    print(f"\n{subset} subset: {len(tested)} pictures, by the weights of epoch {checkpoint['epoch']}, which validation chose")
    if subset == "val":
        print("no test subset, or the training is not finished: the epoch was chosen on these pictures, which flatters it")
    print(table(("", "figure", "95 % interval", f"always grade {usual}"), [
        (title, f"{figures[name]:.3f}", "{:.3f} to {:.3f}".format(*within[name]), f"{majority[name]:.3f}")
        for name, title in FIGURES.items()]))
    print(table(("", *(f"{g} {name}" for g, name in enumerate(GRADES))),
                [("recall", *(f"{recall:.3f}" for recall in figures["recall"])), ("pictures", *confusion.sum(1))]))

    def plain(figure):  # JSON has no NaN
        return None if np.isnan(figure) else float(figure)

    result = {"subset": subset, "n": len(tested), "epoch": checkpoint["epoch"], "parameters": count_weights(net),
              **{name: plain(figures[name]) for name in FIGURES}, "recall": [plain(r) for r in figures["recall"]],
              "confusion": confusion.tolist(), "majority_accuracy": float(majority["accuracy"]),
              "intervals": {name: [plain(low), plain(high)] for name, (low, high) in within.items()}}
    save(run / "metrics.json", json.dumps(result, indent=1) + "\n")
    save_csv(run / "predictions.csv", ("path", "grade", "predicted", *(f"p{g}" for g in range(K))),
             [(x.path, x.grade, g, *(f"{p:.4f}" for p in own)) for x, g, own in zip(tested, predicted, probabilities.tolist())])
    return checkpoint, result, list(zip(tested, predicted.tolist()))


def command_plot(data, run, device):
    """Draws RUN/report.png from what a run has left, also from one that is not finished."""
    history = load_checkpoint(run / "last.pt", "history")["history"]
    checkpoint, result, answered = command_test(data, run, device)
    shown = []  # for each grade the first picture answered right and the first answered wrong, as far as there are any
    for right, grade in itertools.product((True, False), range(K)):
        shown.append(next(((x, p) for x, p in answered if x.grade == grade and (p == grade) == right), None))
    dataset = KneeFolder(data, [pair[0] for pair in shown if pair], checkpoint["config"].size, device)
    predicted = torch.tensor([pair[1] for pair in shown if pair], device=device)
    heats = heat_maps(load_net(checkpoint, device), dataset.images, predicted)
    pictures = iter(zip(dataset.images[:, 0].cpu().numpy(), heats.cpu().numpy(), dataset.grades.tolist()))
    cells = [pair and (*next(pictures), pair[1]) for pair in shown]
    draw_report(run / "report.png", run.name, history, checkpoint["epoch"], result, cells)
    print(f"\ndrawn: {run / 'report.png'}")


def command_predict(run, device, images, heatmap=None):
    """Prints grade (by `decide`), its name and the probability of each grade for picture files; draws their heat maps into
    `heatmap`. Raises KneeError, before anything is graded, where that is no PNG or would be too large."""
    if heatmap and heatmap.suffix.lower() != ".png":
        raise KneeError(f"--heatmap {heatmap}: is drawn as PNG, name a file that ends in .png")
    if heatmap and len(images) > 300:
        raise KneeError(f"--heatmap: {len(images)} pictures are too many for one sheet, name at most 300")
    checkpoint = load_checkpoint(run / "best.pt")
    net, config = load_net(checkpoint, device), checkpoint["config"]
    pictures = in_threads(lambda path: read_xray(path, config.size), images, "decode")
    pictures = torch.from_numpy(np.stack(pictures))[:, None].to(device)
    probabilities = undo_leak(answer(net, pictures), config.softness)
    grades = decide(probabilities)
    print(table(("file", "grade", "name", *(f"p{g}" for g in range(K))), [
        (path, grade, GRADES[grade], *(f"{p:.3f}" for p in own))
        for path, grade, own in zip(images, grades.tolist(), probabilities.tolist())]))
    print(f"graded by {run / 'best.pt'}; --run names another", file=sys.stderr)  # a network of phantoms knows no real knee
    if heatmap:
        draw_heat_maps(heatmap, pictures, heat_maps(net, pictures, grades), grades.tolist(), images)
        print(f"drawn: {heatmap}")


def command_tune(data, run, grid, device, patients_file=None):
    """Trains every combination of a grid {setting: its values} and compares them on the validation subset alone. Each
    finished one is a row of RUN/tune.csv, which is not trained again when an interrupted search goes on."""
    names = [f.name for f in fields(Config) if f.name != "device"]
    figures = ("epoch", "val_loss", "val_accuracy", "val_kappa")
    configs = [Config(**dict(zip(grid, values))) for values in itertools.product(*grid.values())]
    settings = {tuple(text_of(getattr(config, name)) for name in names): config for config in configs}
    path = run / "tune.csv"
    try:
        there = read_csv(path) if path.exists() else []
        done = {tuple(row[n] for n in names): [f"{float(row[f]):.4g}" for f in figures] for row in there}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise KneeError(f"{path}: is damaged ({error}), remove it; the trainings themselves are kept") from error
    for row, config in tqdm(settings.items(), "tune", unit="setting"):
        if row not in done:
            sets = training_sets(data, run, config, device, patients_file)
            best = train(*sets, config, run / "tune" / "_".join(row), bars=False)
            done[row] = [f"{best['figures'][f]:.4g}" for f in figures]
            save_csv(path, (*names, *figures), [key + tuple(value) for key, value in done.items()])
    ranked = sorted(settings, key=lambda row: -float(done[row][-1]))
    tried = [names.index(name) for name in grid]
    print(table(("", *grid, *figures), [(i, *(row[t] for t in tried), *done[row]) for i, row in enumerate(ranked, 1)]))
    options = {"--data": data, "--run": f"{run}-best"}
    options |= {f"--{n.replace('_', '-')}": text for n, text in zip(names, ranked[0])
                if n != "epochs" and text != text_of(getattr(Config, n))}
    if patients_file:  # without it, the full run would have another split
        options["--patients"] = patients_file
    print(f"\nthe best of them in full: {what_to_type('train', options)}")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage first, and the one line that matters would drown in it
        raise KneeError(f"{message}; see python kneeoa.py --help")


def parse_widths(text):
    return tuple(int(width) if width.isdecimal() else width for width in text.split(","))  # Config refuses the others


def typed_path(text):
    return Path(os.path.expanduser(text))  # make passes on the ~ of DATA=~/my_xrays as it is


def text_of(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


COMMANDS = {"split": "share out the patients", "train": "train the network, then test it", "test": "test it again",
            "plot": "draw the sheet of a run", "predict": "grade pictures", "phantoms": "draw phantoms",
            "tune": "try settings, each of which may be given several values"}
TUNED = {"lr": [1.5e-3, 3e-3, 6e-3], "widths": [(16, 32, 64, 128), Config.widths], "dropout": [0.1, 0.3], "epochs": [8]}


def make_parser():
    """The command line, its settings made from the fields of Config. Only what is typed is set."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        for option, text in (("--data", "folder of the X-rays (data if it is there, else phantoms)"),
                             ("--run", "folder of what a run leaves (runs/ and the name of the data folder)"),
                             ("--patients", "CSV file image,patient (osail_patients.csv beside this program)")):
            command.add_argument(option, type=typed_path, help=text)
        for f in fields(Config):
            command.add_argument(f"--{f.name.replace('_', '-')}", type=parse_widths if f.name == "widths" else type(f.default),
                                 nargs="+" if name == "tune" else None, help=f"{f.metadata['meaning']} ({text_of(f.default)})")
        if name == "predict":
            command.add_argument("images", nargs="+", metavar="IMAGE")
            command.add_argument("--heatmap", type=Path, metavar="OUT.png", help="draw the heat maps into this file")
        if name == "phantoms":
            command.add_argument("--count", type=int, help="how many pictures in all (1000)")
    return parser


def run_command(argv):
    given = vars(make_parser().parse_args(argv))
    settings = {f.name: given.pop(f.name) for f in fields(Config) if f.name in given}
    command = given["command"]
    data = given.get("data", Path("data" if Path("data").is_dir() and command != "phantoms" else "phantoms"))
    run = given.get("run", Path("runs") / data.resolve().name)
    patients_file = given.get("patients")
    if command == "tune":
        grid = ({"epochs": [8]} if settings.keys() & {"lr", "widths", "dropout"} else TUNED) | settings
        grid.pop("device", None)  # where to compute is no setting to compare
        settings = {name: values[0] for name, values in settings.items()}
    config = Config(**settings)
    device = pick_device(config.device)
    if command == "phantoms":
        return make_phantoms(data, given.get("count", 1000), config.seed)
    if command in ("split", "train", "tune") and data == Path("phantoms") and not data.exists():
        print("no folder data here, and no --data: drawing 1000 phantoms into phantoms (no medical data)")
        make_phantoms(data)
    if command == "split":
        return command_split(data, run, config, patients_file)
    if command == "train":
        return command_train(data, run, config, device, patients_file)
    if command == "tune":
        return command_tune(data, run, grid, device, patients_file)
    # The other commands take the settings of the run; one that is typed must not say otherwise.
    begun = load_checkpoint(run / "best.pt", "pictures")
    refuse_other(run, begun, begun | {"config": replace(begun["config"], **settings)})
    if command == "test":
        return command_test(data, run, device)
    if command == "plot":
        return command_plot(data, run, device)
    return command_predict(run, device, given["images"], given.get("heatmap"))


def main(argv=None):
    """Runs a command line. Returns the exit status: 0, 2 after a user's error, 130 after Ctrl-C."""
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", "All-NaN")  # a figure that is undefined in every draw is printed as nan
    if sys.stdout.errors == "strict":  # a letter that the terminal lacks is printed as its number, and ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    torch.set_num_threads(min(cpu_cores(), torch.get_num_threads()))
    try:
        run_command(argv)
    except (KneeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.filename or 'file'}: {error.strerror or error}; check path, permissions and space on the disk"
        elif not isinstance(error, KneeError):
            text = "the memory is full, try a smaller --size or --batch, or another --device"
        print("kneeoa: error: " + text.replace("\n", "\\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kneeoa: stopped; whole epochs are kept in the run's folder, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
