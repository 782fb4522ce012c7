"""Grade knee osteoarthritis from X-rays with a convolutional network.

    python phantoms.py phantoms             # draw 1,000 knees to try this with
    python kneeoa.py train --data phantoms  # split, train and evaluate
    python kneeoa.py plot --data phantoms   # draw it: runs/phantoms/report.png
    python kneeoa.py predict knee.png --run runs/phantoms

The Kellgren-Lawrence (KL) scale (Kellgren and Lawrence, 1957) grades a knee
from 0 (none) to 4 (severe). An image takes six steps to its grade:

    image file         -> a square of greys   (224, 224)       read_xray
    greys              -> standardized image  (1, 224, 224)    standardize
    standardized image -> rows of the joint   (1, 128, 224)    crop
    rows of the joint  -> features, logits    (384,), (5,)     KneeNet
    logits             -> five probabilities  (5,)             predict (softmax)
    probabilities      -> grade               0, 1, 2, 3 or 4  decide

Read this file from top to bottom. The lesson ends with "looking"; data folders,
files and commands follow. This is no medical device.
SPDX-License-Identifier: MIT
"""

import argparse
import csv
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

GRADES = ("none", "doubtful", "minimal", "moderate", "severe")  # grades 0 to 4


class KneeError(Exception):
    """Raised by any function after a user's mistake. `main` prints it as one line."""


# ------------------------------------------------------------------------- settings
# The settings of training stand here; EXPERIMENTS.md has the measurements. Each is an
# option of the command line: `--batch 64`.


@dataclass
class Config:
    """Hold the settings of a run."""

    size: int = 224  # side of the square images, in pixels
    batch: int = 32  # images per step
    epochs: int = 20  # passes over the training subset
    lr: float = 3e-3  # peak learning rate
    warmup: float = 0.25  # share of the steps while the learning rate rises
    weight_decay: float = 0.02  # pulls the weights toward 0 (AdamW)
    dropout: float = 0.3  # share of the features set to 0 before the last layer
    width: int = 32  # channels of the first stage; the last has 6 times as many
    rotate: float = 12.0  # augmentation: by at most so many degrees
    scale: float = 0.17  # augmentation: by a factor of at most e^.17 = 1.19
    stretch: float = 0.085  # augmentation: of the width alone, e^.085 = 1.09
    shift: float = 0.085  # augmentation: by at most this share of the side
    seed: int = 0  # for the split, the initial weights, the order, augmentation
    weights: str = ""  # a checkpoint to start from (fine-tuning)


# -------------------------------------------------------------------------- reading
# An image that is read wrongly raises no error: the network just learns less from
# it. So every kind of file becomes the same thing here: a square of grey bytes,
# upright, with bright bone.

PngImagePlugin.MAX_TEXT_CHUNK = 2**30  # a long comment in a file does no harm
PngImagePlugin.MAX_TEXT_MEMORY = 2**30
NEGATIVE = "negatives (dark bone), inverted"
WIDE = "very wide: of both knees?"


def upright(image):
    """Rotate an image as its EXIF data say."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data: nothing says which side is up
        return image


def read_grey(path):
    """Return an image file as uint8 (H, W). Raise KneeError if it is unreadable."""
    try:
        with Image.open(path) as image:
            image = upright(image)
            if image.mode[0] not in "IF":  # bytes, not wider integers or floats
                return np.asarray(image.convert("L"))
            deep = np.nan_to_num(np.asarray(image, np.float64))
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise KneeError(f"{path}: is unreadable ({reason(path, error)})") from error

    # convert("L") would clip all above 255 to white. Percentiles keep a few burnt-out
    # pixels from setting the scale.
    low, high = np.percentile(deep, (0.5, 99.5))
    return np.uint8(np.interp(deep, (low, high), (0, 255)))


def reason(path, error):
    """Return why an image file is unreadable."""
    if Path(path).is_file() and b"ftyp" in Path(path).read_bytes()[:12]:
        return "it is HEIC, the format of iPhones: save it as PNG"
    return error


def what_is_odd(grey):
    """Return NEGATIVE, WIDE or "": what is odd about a grey image (H, W).

    Air is dark and lies at the sides of a knee. In a negative, an inverted film, the
    outer columns are brighter than the middle. A column of one grey is no air but a
    margin that some program added, so it does not count. Between two knees there is
    air, too: a very wide image is never taken for a negative.
    """
    if grey.shape[1] > 1.9 * grey.shape[0]:
        return WIDE
    brightness = grey.mean(0)[np.ptp(grey, axis=0) > 0]  # of the columns
    n = len(brightness)
    if n < 14:
        return ""
    outer = np.delete(brightness, slice(n // 14, n - n // 14))  # two times 1/14
    middle = brightness[n // 4 : n - n // 4]  # one half
    return NEGATIVE if outer.mean() > middle.mean() else ""


def to_square(grey, size):
    """Return the middle square of a grey image as uint8 (size, size), bone bright."""
    if what_is_odd(grey) == NEGATIVE:
        grey = 255 - grey
    # Never squeeze an image into a square: the grade depends on the joint space.
    square = ImageOps.fit(Image.fromarray(grey), (size, size), Image.Resampling.LANCZOS)
    return np.array(square)


def read_xray(path, size):
    """Return an X-ray as uint8 (size, size). Raise KneeError if it is unreadable."""
    return to_square(read_grey(path), size)


# ------------------------------------------------------------------ standardization
# Exposure says nothing about the joint, so we take it out.


def standardize(images):
    """Turn greys (N, 1, S, S) from 0 to 255 into floats of about mean 0, deviation 1.

    Subtract the mean around each pixel, as Jarrett et al. (2009) do: broad light and
    shadow go; edges, spurs and the border of bright bone stay. Then divide by the
    standard deviation of the whole image.
    """
    images = images.float()
    reach = max(1, round(2 / 224 * images.shape[-1]))  # 2 of 224: squares of 5 x 5
    around = images
    # A mean of means reaches 4 pixels far, and near pixels count most. Along a row, the
    # weights are 1 2 3 4 5 4 3 2 1.
    for _ in range(2):
        around = F.avg_pool2d(around, 2 * reach + 1, 1, reach, count_include_pad=False)
    detail = images - around
    deviation = detail.square().mean((2, 3), keepdim=True).sqrt()  # (N, 1, 1, 1)
    return detail / (deviation + 1)  # + 1: no division by 0 in an empty image


# ------------------------------------------------------------------------- data set
# Each image is decoded and standardized once, and stays in memory, so that no epoch
# waits for files: 5,778 images take 580 MB as float16. There is no DataLoader: a tensor
# of indices fetches a whole batch.

# What is known of an image: its path below the data folder, its grade, its patient,
# and its subset: "train", "val", "test", "external", "left out", or "" if it has none.
Xray = namedtuple("Xray", "path grade patient subset", defaults=("", ""))


class KneeFolder(torch.utils.data.Dataset):
    """Hold the X-rays of a folder in memory.

    xrays   list of N Xray; `find_xrays` makes it
    images  float16 (N, 1, S, S), standardized
    grades  int64 (N,)
    notes   lines about odd images, to be printed

    `dataset[index]` is (images, grades), for a number, a slice or a tensor of indices.
    Raise one KneeError that names all images that are unreadable.
    """

    def __init__(self, folder, xrays, size=Config.size, device="cpu"):
        n = len(xrays)
        self.xrays = xrays
        self.images = torch.empty(n, 1, size, size, dtype=torch.float16, device=device)
        self.grades = torch.tensor([x.grade for x in xrays], device=device)

        def load(i):
            """Load image i. Return what is odd about it, or an error."""
            try:
                grey = read_grey(Path(folder, xrays[i].path))
            except KneeError as error:
                return error
            square = torch.from_numpy(to_square(grey, size))  # (S, S)
            self.images[i] = standardize(square[None, None])[0]  # (1, S, S)
            return what_is_odd(grey)

        workers = torch.get_num_threads()
        odd = thread_map(load, range(n), max_workers=workers, desc="read", leave=False)
        errors = [str(error) for error in odd if isinstance(error, KneeError)]
        if errors:
            raise KneeError("; ".join(errors) + "; mend or remove what is named here")
        self.notes = []
        for what in (NEGATIVE, WIDE):
            if what in odd:
                self.notes.append(f"{odd.count(what)} images are {what}")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.grades[index]

    def subset(self, name):
        """Return the indices of the images of a subset, int64 (M,)."""
        indices = [i for i, x in enumerate(self.xrays) if x.subset == name]
        return torch.tensor(indices, dtype=torch.int64, device=self.images.device)


# ------------------------------------------------------------------------- splitting
# Two knees of a patient look alike, and so do two copies of an image. With one in
# training and one in the test subset (data leakage), a network scores by recognizing
# the patient. So we split patients, not images. Copies are found first, and count as
# images of one patient: `find_copies`, below the lesson.

SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}


def split_by_patient(xrays, seed, shares=SHARES):
    """Return the X-rays with subsets: split by patient, stratified by grade.

    Each patient goes to the subset that is furthest below its share of the patient's
    grades. Of 100 knees of grade 4, 70, 15 and 15 are due. With 35, 3 and 6 assigned,
    the subsets are filled to .50, .20 and .40: the next goes to val.
    The same names, grades and seed give the same split on every machine. Raise
    KneeError if a grade has fewer patients than there are subsets.
    """
    for grade in range(len(GRADES)):
        n = len({x.patient for x in xrays if x.grade == grade})
        if n < len(shares):
            raise KneeError(
                f"grade {grade} has too few patients to split: {n}; add images, or, if "
                "the names of files were read wrongly, a table: --patients"
            )

    total = Counter(x.grade for x in xrays)
    grades_of = defaultdict(list)  # patient -> grades of the patient's images
    for x in xrays:
        grades_of[x.patient].append(x.grade)
    patients = sorted(grades_of)
    random.Random(seed).shuffle(patients)
    # The rarest grades first, while every subset has room. Equals stay shuffled.
    patients.sort(key=lambda patient: min(total[g] for g in grades_of[patient]))

    filled = defaultdict(Counter)  # subset -> its images of each grade
    subset_of = {}
    for patient in patients:
        fullness = Counter()
        for subset, share in shares.items():
            for grade in grades_of[patient]:
                fullness[subset] += filled[subset][grade] / (share * total[grade])
        subset = min(shares, key=fullness.get)
        subset_of[patient] = subset
        filled[subset].update(grades_of[patient])
    return [x._replace(subset=subset_of[x.patient]) for x in xrays]


# ----------------------------------------------------------------- crop, augmentation
# Angle, distance and position say nothing about the joint either. In training we vary
# them at random (augmentation), and the network learns to ignore them.

JOINT = (2 / 7, 6 / 7)  # the rows that the network sees: 64 to 192 of 224


def crop(images, matrices):
    """Resample images (N, 1, S, S) to the rows of the joint, float32 (N, 1, 4/7 S, S).

    Positions run from -1 to 1, to the right and down, over the whole image. The new
    pixel at (x, y) shows what the image has at matrix @ (x, y, 1), for matrices
    (N, 2, 3). Outside of the image, the nearest pixel of its edge is shown.

    One pixel: with [[1.1, 0, 0], [0, 1.1, 0.2]], the new pixel at (.5, 0) shows the
    pixel at (1.1 * .5, 1.1 * 0 + .2) = (.55, .2). The knee is smaller, and moved up.
    """
    size = images.shape[2]
    top, bottom = JOINT
    # The grid tells for each new pixel where to look: (N, S, S, 2). Of it, the rows of
    # the joint suffice.
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    grid = grid[:, round(top * size) : round(bottom * size)]
    return F.grid_sample(
        images.float(), grid, padding_mode="border", align_corners=False
    )


def augment(images, config):
    """Rotate, scale, stretch and shift images (N, 1, S, S) at random, and `crop` them.

    There is no mirroring: a knee and its mirror image get the same logits.
    """

    def uniform(limit):  # a random number for each image, from -limit to limit
        return limit * (2 * torch.rand(len(images), device=images.device) - 1)

    angle = uniform(math.radians(config.rotate))
    scale_y = uniform(config.scale).exp()
    scale_x = uniform(config.stretch).exp() * scale_y
    shift_x = uniform(2 * config.shift)  # 2: positions run from -1 to 1
    shift_y = uniform(2 * config.shift)
    row_x = (scale_x * angle.cos(), -scale_x * angle.sin(), shift_x)
    row_y = (scale_y * angle.sin(), scale_y * angle.cos(), shift_y)
    matrices = torch.stack(row_x + row_y, 1).view(-1, 2, 3)
    return crop(images, matrices)


# Test-time augmentation (TTA): a prediction is the mean over seven views of an image.
# Each view is (scale, shift_x, shift_y) of what is shown. A scale of 1.05 shows more,
# so the knee is smaller; a shift of .05 is 2.5 % of the side. The first scale is 1.01:
# resampling blurs a little, as it did in training, and the network is used to that.
TTA = (
    (1.01, 0, 0),
    (1.05, 0, 0),
    (0.95, 0, 0),
    (1, 0.05, 0.05),
    (1, -0.05, 0.05),
    (1, 0.05, -0.05),
    (1, -0.05, -0.05),
)


def show(images, view):
    """Return one view of images (N, 1, S, S), cropped: float32 (N, 1, 4/7 S, S)."""
    scale, shift_x, shift_y = view
    matrix = torch.tensor([[scale, 0.0, shift_x], [0.0, scale, shift_y]])
    return crop(images, matrix.expand(len(images), 2, 3).to(images.device))


# --------------------------------------------------------------------------- network
# A radiologist looks for local signs: a narrow joint space, spurs at the margins
# (osteophytes), bright bone under the joint (sclerosis). Convolutions find such signs
# wherever they are; pooling forgets where exactly. A knee is nearly its own mirror
# image: the same filters read both halves.


def stage(inputs, outputs, kernel=3, stride=1):
    """Return layers that halve (N, inputs, H, W) to (N, outputs, H/2, W/2).

    With stride 2, the convolution halves once more: (N, outputs, H/4, W/4).
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        # Usually pooling comes last. It comes early here, since batch norm and ReLU
        # then touch a quarter of the pixels.
        nn.MaxPool2d(2, ceil_mode=True),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Add two convolutions to their input (He et al., 2016); (N, C, H, W) stays."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        # At first the body adds 0 (Goyal et al., 2017), so the block changes nothing:
        # its input comes from a ReLU, and ReLU leaves what is not below 0.
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        return F.relu(x + self.body(x))


class KneeNet(nn.Module):
    """Grade knees: rows of the joint, float (N, 1, H, W), to logits (N, 5).

        (N, 1, 128, 224)     rows of the joint, from `crop`
        (2N, 1, 128, 128)    halves: N left, then N right, mirrored; 32 columns are
                             in both
        (2N, 32, 32, 32)     stage: convolution 5 x 5 of stride 2, pooling
        (2N, 64, 16, 16)     stage: convolution 3 x 3, pooling; residual block
        (2N, 96, 8, 8)       the same
        (2N, 192, 4, 4)      the same
        (2N, 192)            mean over the pixels
        (N, 384)             sum and absolute difference of the two halves
        (N, 5)               logits, one for each grade

    Shared filters for both sides of the joint are from Tiulpin et al. (2018). Sum and
    absolute difference do not tell which side is which: for a feature that is 3 on the
    left and 5 on the right, they are 8 and 2; in the mirror, for 5 and 3, the same.
    """

    def __init__(self, width=Config.width, dropout=Config.dropout):
        super().__init__()
        self.features = nn.Sequential(
            stage(1, width, kernel=5, stride=2),
            stage(width, 2 * width),
            Residual(2 * width),
            stage(2 * width, 3 * width),
            Residual(3 * width),
            stage(3 * width, 6 * width),
            Residual(6 * width),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(12 * width, len(GRADES))
        self.to(memory_format=torch.channels_last)  # an order in memory, the fastest

    def halves(self, x):
        both = torch.cat((x, x.flip(3)))  # (2N, 1, H, W)
        return both[..., : x.shape[2]]  # (2N, 1, H, H)

    def head(self, maps):
        left, right = maps.float().mean((2, 3)).chunk(2)  # (2N, C) -> each (N, C)
        pair = torch.cat((left + right, (left - right).abs()), 1)  # (N, 2C)
        return self.classifier(self.dropout(pair))

    def forward(self, x):
        return self.head(self.features(self.halves(x)))


# --------------------------------------------------------------------------- metrics
# Two questions: which grade to answer, and how good are the answers? Accuracy alone
# looks too good: always answering grade 0 is right for four knees in ten of the best
# known public set (Chen, 2018).

METRICS = ("accuracy", "balanced_accuracy", "kappa", "mae")


def decide(probabilities):
    """Return the median grade, int64 (N,), of probabilities (N, 5).

    The median is the smallest grade at which the probabilities add up to a half. For
    (.40, .30, .20, .10, 0) they add up to .40, .70, ...: grade 1. No answer has a
    smaller expected absolute error: here .40 + .20 + 2 * .10 = .80, and 1.00 for the
    most probable grade, 0. That would be right more often, but further off.
    """
    sums = probabilities.cumsum(1)[:, :-1]  # without the last, which is 1
    return (sums < 0.5).sum(1)


def confusion_matrix(grades, predicted):
    """Count pairs of grades: int64 (5, 5), row = true grade, column = predicted."""
    counts = np.zeros((len(GRADES), len(GRADES)), int)
    np.add.at(counts, (grades, predicted), 1)
    return counts


def metrics(confusion):
    """Return the metrics of a confusion matrix (5, 5) by name, NaN where undefined.

    recall             share of the knees of each grade that are graded right (5,)
    accuracy           share of all knees that are graded right
    balanced_accuracy  mean recall: every grade counts the same
    mae                mean absolute error, in grades
    kappa              quadratic weighted kappa (Cohen, 1968)

    Kappa is 1 - squared errors / squared errors to be expected by chance. Three knees
    of grades 0, 2, 4 are graded 0, 2, 3: the squared errors are 0 + 0 + 1 = 1. By
    chance, each true grade meets each answer a third of the time:
    (0 + 4 + 9 + 4 + 0 + 1 + 16 + 4 + 1) / 3 = 13. Kappa is 1 - 1 / 13 = .92.
    """
    n = confusion.sum()
    true = confusion.sum(1)
    chance = np.outer(true, confusion.sum(0)) / n  # (5, 5)
    grade = np.arange(len(GRADES))
    distance = np.abs(grade[:, None] - grade)  # (5, 5)
    squared = distance**2
    with np.errstate(all="ignore"):  # a grade without knees: 0 / 0 is NaN
        recall = confusion.diagonal() / true
        kappa = 1 - (confusion * squared).sum() / (chance * squared).sum()
    return {
        "accuracy": confusion.trace() / n,
        "balanced_accuracy": np.nanmean(recall),
        "kappa": kappa,
        "mae": (confusion * distance).sum() / n,
        "recall": recall,
    }


def evaluate(probabilities, grades):
    """Return what probabilities (N, 5) are worth against the true grades (N,): a dict.

    It has n, the metrics, the confusion matrix, and the loss: the cross-entropy, which
    is the mean of -log(probability of the true grade).
    """
    confusion = confusion_matrix(grades.cpu(), decide(probabilities).cpu())
    loss = F.nll_loss(probabilities.clamp(min=1e-9).log(), grades)
    result = {"n": len(grades), "loss": loss.item(), "confusion": confusion.tolist()}
    for name, value in metrics(confusion).items():
        result[name] = value.tolist()
    return result


def bootstrap(probabilities, grades, patients, draws=1000):
    """Return 95 % intervals {metric: [low, high]} by the bootstrap (Efron, 1979).

    How much would the metrics change with other patients? Draw as many patients as
    there are, some twice, some never. Do so 1,000 times, and keep the middle 95 %.
    Draw patients, not images: two knees of a patient are no independent evidence.
    """
    names, numbers = np.unique(patients, return_inverse=True)
    n = len(names)
    confusions = np.zeros((n, len(GRADES), len(GRADES)), int)  # one for each patient
    np.add.at(confusions, (numbers, grades.cpu(), decide(probabilities).cpu()), 1)
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(draws):
        drawn = generator.integers(n, size=n)
        values = metrics(confusions[drawn].sum(0))
        scores.append([values[name] for name in METRICS])
    intervals = np.percentile(scores, (2.5, 97.5), axis=0)  # (2, 4)
    return dict(zip(METRICS, intervals.T.tolist(), strict=True))


# -------------------------------------------------------------------------- training
# Show a batch, measure the error, move each weight a little to where the error is
# smaller: that is `train_epoch`. After each epoch, the validation subset tells how good
# the network is on patients that it has not learned from; the best epoch is kept. The
# test subset takes no part in this: it is touched once, after training. The helpers
# that load, save and choose the arithmetic stand below the lesson, under "files and
# machine".


@torch.no_grad()
def predict(model, images, views=TTA):
    """Return probabilities (N, 5), means over the views, of images (N, 1, S, S)."""
    model.eval()  # batch norm uses its running averages; dropout is off
    probabilities = []
    for batch in images.split(64):
        total = 0
        for view in views:
            joint = show(batch, view)  # (B, 1, 4/7 S, S)
            with mixed_precision(batch.device):
                logits = model(joint)  # (B, 5)
            # softmax makes probabilities of logits: above 0, with the sum 1.
            total += logits.float().softmax(1)
        probabilities.append(total / len(views))
    return torch.cat(probabilities)


def train_epoch(model, dataset, optimizer, scheduler, config):
    """Train for one epoch on the subset "train". Return its mean loss and accuracy."""
    model.train()  # batch norm uses the batch; dropout is on
    indices = dataset.subset("train")
    n = len(indices)
    device = indices.device
    steps = max(1, n // config.batch)
    order = indices[torch.randperm(n, device=device)]
    batches = order[: steps * config.batch].split(config.batch)  # a rest is left out
    sums = torch.zeros(2, device=device)
    for batch in tqdm(batches, leave=False, ncols=79):
        images, grades = dataset[batch]  # (B, 1, S, S), (B,)
        images = augment(images, config)  # (B, 1, 4/7 S, S)
        with mixed_precision(device):
            logits = model(images).float()  # (B, 5)
        loss = F.cross_entropy(logits, grades)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        # Add up on the device: reading a number at each step would make a GPU wait.
        correct = decide(logits.softmax(1)) == grades
        sums += torch.stack((loss, correct.float().mean())).detach()
    return (sums / steps).tolist()


EPOCH_LINE = (
    "epoch {epoch}/{}: loss {train_loss:.3f} accuracy {train_accuracy:.3f} | "
    "val {val_loss:.3f} {val_accuracy:.3f} kappa {val_kappa:.3f}"
)


def best_epoch(history):
    """Return the epoch of highest validation kappa; of equals, that of lowest loss."""
    return max(history, key=lambda row: (row["val_kappa"], -row["val_loss"]))


def train(dataset, config, run):
    """Train on the subsets "train" and "val" of a KneeFolder. Return the history.

    The history is a list of dicts, one an epoch. After each epoch, write history.csv
    and last.pt into the folder `run`, and best.pt if no epoch was better. If last.pt is
    there, go on from it. Raise KneeError if the loss is NaN.
    """
    run = Path(run)
    device = dataset.images.device
    n = len(dataset.subset("train"))
    val_images, val_grades = dataset[dataset.subset("val")]

    torch.manual_seed(config.seed)  # for the initial weights
    model = KneeNet(config.width, config.dropout)
    if config.weights:
        load_checkpoint(config.weights, model=model)
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=config.weight_decay, fused=True
    )
    # The learning rate starts low, while the weights are still random, rises to its
    # peak and falls to 0 (Smith and Topin, 2018). Momentum stays as it is.
    steps = config.epochs * max(1, n // config.batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.lr,
        total_steps=max(20, steps),  # it would divide by 0 where it rises for one step
        pct_start=config.warmup,
        cycle_momentum=False,
    )
    # To go on with a run, its settings and images must be the same: its origin. If
    # there is a last.pt, `resume` loads it into the parts and returns its history.
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    origin = origin_of(dataset, config)
    history = resume(run, origin, parts)

    for epoch in range(len(history) + 1, config.epochs + 1):
        # A seed for each epoch: an interrupted run goes on with the same random
        # numbers. 100,003 keeps the seeds of two runs apart.
        torch.manual_seed(config.seed * 100_003 + epoch)
        start = time.perf_counter()
        loss, accuracy = train_epoch(model, dataset, optimizer, scheduler, config)
        seconds = time.perf_counter() - start

        # Validation may be better than training: its images are not augmented, and
        # dropout is off. One view is faster than seven.
        scores = evaluate(predict(model, val_images, TTA[:1]), val_grades)
        if not math.isfinite(scores["loss"]):
            raise KneeError("the loss is NaN, try a lower --lr and another --run")
        row = {
            "epoch": epoch,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "val_loss": scores["loss"],
            "val_accuracy": scores["accuracy"],
            "val_kappa": scores["kappa"],
            "lr": scheduler.get_last_lr()[0],
            "seconds": seconds,
        }
        history.append(row)
        print(EPOCH_LINE.format(config.epochs, **row), flush=True)

        if best_epoch(history) is row:
            save_checkpoint(run / "best.pt", origin, history, {"model": model})
        save_table(run / "history.csv", history)
        # Last: a run that is stopped before this line repeats the epoch.
        save_checkpoint(run / "last.pt", origin, history, parts)
    return history


# --------------------------------------------------------------------------- looking
# A heat map shows which part of an image raised the logit of its grade. That should be
# the joint. Where it is a letter or a screw, the network has learned something else.


def grad_cam(model, images, grades):
    """Return (rows of the joint, heat), arrays (N, H, W), of images (N, 1, S, S).

    Heat is from 0 to 1, high where the image speaks for its grade in `grades` (N,).
    Grad-CAM (Selvaraju et al., 2017): weight each of the last feature maps by how much
    the logit of the grade rises with it, add them up, and keep what is above 0.
    """
    model.eval()
    joint = show(images, (1, 0, 0))  # (N, 1, H, W): as it is
    halves = model.halves(joint)  # (2N, 1, H, H)
    maps = model.features(halves)  # (2N, C, h, h)
    logits = model.head(maps).gather(1, grades[:, None])  # (N, 1)
    slopes = torch.autograd.grad(logits.sum(), maps)[0]
    weights = slopes.mean((2, 3), keepdim=True)  # (2N, C, 1, 1)
    heat = F.relu((weights * maps).sum(1, keepdim=True)).detach()  # (2N, 1, h, h)

    # Put the halves back to their sides. Where they overlap, the greater heat counts.
    heat = F.interpolate(heat, halves.shape[2:], mode="bilinear")
    heat = F.pad(heat, (0, joint.shape[3] - halves.shape[3]))  # (2N, 1, H, W)
    left, right = heat[:, 0].chunk(2)
    heat = torch.maximum(left, right.flip(2))
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-9)
    return joint[:, 0].cpu().numpy(), heat.cpu().numpy()


def draw_heat(figure, model, images, grades, titles):
    """Draw images (N, 1, S, S), five a line, above the heat that speaks for a grade."""
    joints, heat = grad_cam(model, images, grades)
    lines = math.ceil(len(titles) / 5)
    axes = figure.subplots(2 * lines, 5, squeeze=False)
    for ax in axes.ravel():
        ax.axis("off")
    for i, title in enumerate(titles):
        line, column = divmod(i, 5)
        plain = axes[2 * line, column]
        heated = axes[2 * line + 1, column]
        plain.set_title(title, fontsize=8, loc="left", parse_math=False)
        plain.imshow(joints[i], cmap="gray")
        heated.imshow(joints[i], cmap="gray")
        heated.imshow(heat[i], cmap="inferno", alpha=0.6 * heat[i])


def draw_report(history, confusion):
    """Return a figure: curves by epoch and confusion matrix, above an empty part."""
    figure = Figure(figsize=(13, 8), layout="constrained", dpi=110)
    upper, _ = figure.subfigures(2, 1, height_ratios=(5, 4))
    *curves, matrix = upper.subplots(1, 3)
    epochs = range(1, len(history) + 1)
    for name, ax in zip(("loss", "accuracy"), curves, strict=True):
        for subset, style in (("train", "o-"), ("val", "s--")):
            values = [row[f"{subset}_{name}"] for row in history]
            ax.plot(epochs, values, style, markersize=3, label=subset)
        ax.axvline(best_epoch(history)["epoch"], color="0.5", label="best epoch")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.set(xlabel="epoch", title=name)
        ax.legend()

    confusion = np.array(confusion)
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)  # of each true grade
    matrix.imshow(shares, cmap="Blues", vmax=1.6)  # 1.6: the text stays legible
    for (true, predicted), count in np.ndenumerate(confusion):
        text = f"{count}\n{shares[true, predicted]:.0%}"
        matrix.text(predicted, true, text, ha="center", va="center")
    matrix.set(xlabel="predicted grade", ylabel="true grade", title="confusion matrix")
    return figure


# The lesson ends here. The rest is support: data folders, files, commands.
# ---------------------------------------------------------------------- data folders
# The nearest folder that names a grade tells the grade of an image. Folders above it
# may tell its subset. A table or the file's name tells its patient.

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
HIDDEN = (".", "@", "__MACOSX")  # such files and folders hold thumbnails and the like
GRADE_WORDS = (
    "0 none normal healthy",
    "1 i doubtful",
    "2 ii minimal mild",
    "3 iii moderate",
    "4 iv severe",
)
FILLERS = {"kl", "klg", "grade", "stage", "class", "oa", "osteoarthritis"}
SUBSET_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# A number is a patient if the name has a side or a visit, too: 9003175L, P001_left,
# L_9003175, 9003175_V00, 9003175_1. Else it may be anything, as in image17.
SIDE_OR_VISIT = re.compile(
    r"(?<![a-z])(l|r|lt|rt|left|right)(?![a-z])|\d[_-]v?\d\d?(?!\d)", re.IGNORECASE
)
OSAIL = Path(__file__).with_name("osail_patients.csv")
COPY = 0.8  # measured: different knees reach .70; resized JPEG copies at least .84


def grade_of(folder):
    """Return the grade that the name of a folder tells, or None: 3, KL3, 3Moderate."""
    words = set(re.findall(r"[^\W\d_]+|\d+", folder.lower())) - FILLERS
    for grade, known in enumerate(GRADE_WORDS):
        if words and words <= set(known.split()):
            return grade
    return None


def place_of(path):
    """Return (data set, subset, grade) as the folders above a file tell them.

    a/train/3/left/x.png is grade 3 in train of the data set a. The grade is None if no
    folder below train, val or test names one.
    """
    grade = None
    data_set = path.parent
    for folder in path.parents:  # the nearest first
        subset = SUBSET_WORDS.get(folder.name.lower())
        if subset:
            return folder.parent, subset, grade
        if grade is None:
            grade = grade_of(folder.name)
            data_set = folder.parent
    return data_set, "", grade


def list_files(folder):
    """Return the paths of files below a folder, sorted, without hidden ones.

    Raise KneeError if the folder or one below it cannot be listed.
    """

    def fail(error):
        raise KneeError(
            f"{error.filename}: cannot be listed ({error.strerror}); name your folder "
            "of X-rays with --data, or draw some: python phantoms.py phantoms"
        )

    files = []
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        for name in names:
            if not name.startswith(HIDDEN):
                files.append(Path(parent, name).relative_to(folder))
    return sorted(files)


def list_images(folder):
    """Return the paths of image files below a folder, sorted."""
    return [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES]


def read_patients(path):
    """Return {name of an image, without suffix: patient} from a table."""
    patients = {}
    for row in read_table(path, ("image", "patient")):
        name = Path(row["image"]).stem
        if patients.setdefault(name, row["patient"]) != row["patient"]:
            raise KneeError(f"{path}: {name} has two patients, keep one")
    return patients


def patient_in(path):
    """Return the patient that a file's name tells, else the path itself."""
    number = re.search(r"\d+", path.stem)
    if number and SIDE_OR_VISIT.search(path.stem):
        return number[0]
    return path.as_posix()


def find_xrays(folder, patients_file=None):
    """Return (xrays, notes): the graded images of a folder, and lines to be printed.

    The patient is that of the table (osail_patients.csv if none is named), else the
    number in the file's name, else each image counts as a patient of its own.
    Raise KneeError if there is not exactly one data set, or the table is of others.
    """
    paths = list_files(folder)
    places = [place_of(path) for path in paths]
    has_split = any(subset for _, subset, grade in places if grade is not None)
    table = patients_file or OSAIL
    patients = read_patients(table) if patients_file or table.exists() else {}

    xrays = []
    data_sets = set()
    in_table = 0
    passed_over = Counter()
    for path, (data_set, subset, grade) in zip(paths, places, strict=True):
        outside = has_split and not subset  # beside train, val and test
        if grade is None or outside or path.suffix.lower() not in SUFFIXES:
            passed_over[f"{path.suffix} in {path.parent}"] += 1
        else:
            data_sets.add(data_set.as_posix())
            in_table += path.stem in patients
            patient = patients.get(path.stem) or patient_in(path)
            xrays.append(Xray(path.as_posix(), grade, patient, subset))
    if len(data_sets) != 1:
        names = ", ".join(sorted(data_sets) or passed_over)
        raise KneeError(
            f"{folder}: has {len(data_sets)} data sets, name a folder of one, with "
            f"folders of grades in it, such as 0 to 4 ({names})"
        )

    n = len(xrays)
    named = [x for x in xrays if x.patient != x.path]
    if patients_file and not in_table:
        raise KneeError(
            f"{patients_file}: has no row for any image, neither for {xrays[0].path}; "
            f"its own are like {min(patients)}"
        )
    notes = []
    for what, count in passed_over.items():
        notes.append(f"passed over: {count} {what}")
    if in_table:
        notes.append(f"{in_table} of {n} images are in the table of patients")
    if named:
        notes.append(f"{named[0].path} is read as of patient {named[0].patient}")
    if len(named) < n:
        notes.append(f"{n - len(named)} of {n} tell no patient: each is one of its own")
    return xrays, notes


def shrink(images):
    """Return thumbnails (N, 1024), of mean 0 and length 1, of images (N, 1, S, S)."""
    small = F.adaptive_avg_pool2d(images, 32).flatten(1).float().cpu()  # 32 x 32 pixels
    return F.normalize(small - small.mean(1, keepdim=True))


def find_copies(thumbnails, others):
    """Return bool (N, M): which thumbnails (N, 1024) are copies of which others.

    The product of two thumbnails is their correlation: 1 for equal images, at most .7
    for different knees. Above .8, plain or mirrored, they are copies: resized, darkened
    or saved as JPEG. A copy that was moved by 3 pixels or rotated may be missed.
    """
    mirrored = others.view(-1, 32, 32).flip(2).flatten(1)
    return (thumbnails @ others.T > COPY) | (thumbnails @ mirrored.T > COPY)


def copies_in(dataset):
    """Return pairs (i, j), i < j, of images of a KneeFolder that are copies."""
    thumbnails = shrink(dataset.images)
    copies = find_copies(thumbnails, thumbnails)  # (N, N)
    return copies.triu(1).nonzero().tolist()


def join_copies(xrays, copies):
    """Return the X-rays with one patient for all copies of an image.

    `copies` are pairs of indices. Where two have several grades, one grade is wrong and
    nothing says which: they get the subset "left out". Raise KneeError if two copies,
    or two images of a patient, are in two subsets.
    """
    joined = list(xrays)
    for i, j in copies:
        keep, drop = joined[i].patient, joined[j].patient
        for k, x in enumerate(joined):
            if x.patient == drop:
                joined[k] = x._replace(patient=keep)

    first = {}  # patient -> the patient's first image
    for x in joined:
        one = first.setdefault(x.patient, x)
        if one.subset != x.subset:
            raise KneeError(
                f"{one.path} in {one.subset} and {x.path} in {x.subset} are of patient "
                f"{one.patient}, or copies: move one of them"
            )
    for i, j in copies:
        if xrays[i].grade != xrays[j].grade:
            for k in (i, j):
                joined[k] = joined[k]._replace(subset="left out")
    return joined


def make_split(xrays, seed):
    """Return the X-rays with subsets. Raise KneeError if a grade has too few patients.

    Subsets that the folders give are kept; val is taken from train if it is missing.
    """
    given = {x.subset for x in xrays}
    shares = SHARES
    if "train" in given:
        shares = {"train": 1} if "val" in given else {"train": 0.85, "val": 0.15}
    to_split = [x for x in xrays if x.subset in ("", "train")]
    split = {x.path: x for x in split_by_patient(to_split, seed, shares)}
    return [split.get(x.path, x) for x in xrays]


# ----------------------------------------------------------------- files and machine
# A run may be stopped at any moment. So each file is written as a whole or not at all,
# and a checkpoint remembers everything that is needed to go on.


def save(path, content):
    """Write bytes into a file, as a whole or not at all."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise KneeError(
            f"{path}: {error.strerror}; check permissions and the space on the disk, "
            "or close it in other programs"
        ) from error
    finally:
        if part.exists():
            part.unlink()


def save_table(path, rows):
    """Write rows, dicts of the same keys, as a CSV file."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    save(path, file.getvalue().encode("utf-8", "surrogateescape"))


def save_figure(path, figure):
    """Write a matplotlib figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    save(path, file.getvalue())


def read_table(path, columns):
    """Return the rows of a CSV file as dicts. Raise KneeError without such columns."""
    try:  # utf-8-sig: Excel begins a file with a byte order mark, and may write ; for ,
        text = Path(path).read_text("utf-8-sig", "surrogateescape")
        delimiter = ";" if ";" in text.partition("\n")[0] else ","
        rows = []
        for row in csv.DictReader(io.StringIO(text), delimiter=delimiter):
            rows.append({name: row[name].strip() for name in columns})
        if not rows:
            raise ValueError("it has no rows")
    except Exception as error:  # no file, no such column, no text
        raise KneeError(f"{path}: no table of {','.join(columns)} ({error})") from error
    return rows


def origin_of(dataset, config):
    """Return what a checkpoint remembers: the settings, and the images of training."""
    used = torch.cat((dataset.subset("train"), dataset.subset("val"))).tolist()
    return {
        "config": vars(config),
        "xrays": [tuple(dataset.xrays[i]) for i in used],
        "thumbnails": shrink(dataset.images)[used],
    }


def save_checkpoint(path, origin, history, parts):
    """Write a checkpoint: origin, history, and the state of model, optimizer, ..."""
    states = {name: part.state_dict() for name, part in parts.items()}
    file = io.BytesIO()
    torch.save({**origin, "history": history, **states}, file)
    save(path, file.getvalue())


def load_checkpoint(path, device="cpu", model=None):
    """Return (checkpoint, model), a new one if none is given.

    Raise KneeError if the file is missing or damaged, or its weights do not fit.
    """
    try:
        # weights_only: a checkpoint from the internet cannot run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        model = model or KneeNet(config.width)
        model.load_state_dict(checkpoint["model"])
        checkpoint["xrays"] = [Xray(*x) for x in checkpoint["xrays"]]
    except Exception as error:  # torch.load raises all kinds on foreign files
        raise KneeError(
            f"{path}: missing, damaged or of another version or --width; train first, "
            "or name another --run"
        ) from error
    return checkpoint, model.to(device)


def resume(run, origin, parts):
    """Load the parts of last.pt. Return the history of the run, empty if it is new.

    Raise KneeError if the run was begun with other settings, images or split.
    """
    if not (run / "last.pt").exists():
        return []
    last, _ = load_checkpoint(run / "last.pt")
    changed = dict(last["config"].items() - origin["config"].items())
    if changed:
        name, value = changed.popitem()
        raise KneeError(f"{run}: was begun with {name} {value}, name another --run")
    same = last["xrays"] == origin["xrays"]
    # Thumbnails of the same images may differ in the last bits: threads, a GPU.
    if not same or not last["thumbnails"].allclose(origin["thumbnails"], atol=0.01):
        raise KneeError(f"{run}: was begun with other images, name another --run")
    for name, part in parts.items():
        part.load_state_dict(last[name])
    return last["history"]


def mixed_precision(device):
    """Return a context in which convolutions use bfloat16, where that is faster."""
    # AMX, or the AVX-512 BF16 of AMD. Intel's, which comes with FP16, is slower.
    has = torch.cpu.get_capabilities().get
    fast = has("amx_bf16") or (has("avx512_bf16") and not has("avx512_fp16"))
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(fast))


# -------------------------------------------------------------------------- commands
# Each takes the parsed command line: data, run, patients, device and the settings.


def tell(note):
    """Print a note within a line of 80 columns."""
    print(note[:79])


def pick_device(name):
    """Return the torch.device of a name, or of "auto".

    Raise KneeError with the words of torch if the named device cannot be used.
    """
    wanted = name
    if name == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        (torch.ones(1, device=wanted) + 1).item()  # an old GPU is seen, but fails here
    except Exception as error:  # torch raises all kinds
        words = str(error).partition("\n")[0]
        if name != "auto":
            raise KneeError(f"--device {name}: {words}; try --device auto") from error
        tell(f"using the CPU, since the GPU fails: {words}")
        wanted = "cpu"
    return torch.device(wanted)


def unite_copies(dataset):
    """Give the copies of an image in a KneeFolder one patient. Tell what was found."""
    copies = copies_in(dataset)
    if copies:
        i, j = copies[0]
        pair = f"{dataset.xrays[i].path}, {dataset.xrays[j].path}"
        tell(f"{len(copies)} pairs of images are copies: {pair}")
    dataset.xrays = join_copies(dataset.xrays, copies)
    left_out = dataset.subset("left out")
    if len(left_out):
        example = dataset.xrays[left_out[0]].path
        tell(f"{len(left_out)} of several grades are left out: {example}")


def load_folder(args, size):
    """Return the KneeFolder of --external, or of --data. Tell what is odd in it."""
    folder = args.external or args.data
    xrays, notes = find_xrays(folder, args.patients)
    if args.external:
        xrays = [x._replace(subset="external") for x in xrays]
    dataset = KneeFolder(folder, xrays, size, args.device)
    for note in notes + dataset.notes:
        tell(note)
    unite_copies(dataset)
    return dataset


def read_split(path):
    """Return the X-rays of a split.csv. Raise KneeError if it is wrong."""
    xrays = []
    for row in read_table(path, Xray._fields):
        grade = grade_of(row["grade"])
        if grade is None or row["subset"] not in SHARES:
            raise KneeError(
                f"{path}: {row['path']} needs a grade from 0 to 4, and train, val or "
                "test as subset"
            )
        patient = row["patient"] or row["path"]
        xrays.append(Xray(row["path"], grade, patient, row["subset"]))
    if not {"train", "val"} <= {x.subset for x in xrays}:
        raise KneeError(f"{path}: needs rows of train and of val")
    return xrays


def open_split(args, config):
    """Return the KneeFolder of a run by its split.csv, which is made if missing."""
    path = args.run / "split.csv"
    if not path.exists():
        dataset = load_folder(args, config.size)
        dataset.xrays = make_split(dataset.xrays, config.seed)
        save_table(path, [x._asdict() for x in dataset.xrays if x.subset in SHARES])
        return dataset

    xrays = read_split(path)
    unlisted = len(list_images(args.data)) - len(xrays)
    lost = [x.path for x in xrays if not Path(args.data, x.path).exists()]
    if lost:
        raise KneeError(
            f"{path}: {len(lost)} of its images are not in {args.data}, such as "
            f"{lost[0]}; name the --data of this run, or another --run"
        )
    if unlisted > 0:
        tell(f"{unlisted} images are not in {path}")
    if args.patients:
        tell(f"{path} tells the patients already; remove it to split anew")
    dataset = KneeFolder(args.data, xrays, config.size, args.device)
    unite_copies(dataset)
    return dataset


def command_split(args):
    """Split the patients into train, val and test: RUN/split.csv."""
    xrays = open_split(args, config_of(vars(args))).xrays
    print("grade", *[f"{grade:5}" for grade in range(len(GRADES))], " patients")
    for subset in SHARES:
        counts = Counter()
        patients = set()
        for x in xrays:
            if x.subset == subset:
                counts[x.grade] += 1
                patients.add(x.patient)
        columns = [f"{counts[grade]:5}" for grade in range(len(GRADES))]
        print(f"{subset:5}", *columns, f"{len(patients):9}")


def command_train(args):
    """Train a network, keep its best epoch, test it: history.csv, last.pt, best.pt."""
    config = config_of(vars(args))
    dataset = open_split(args, config)
    if config.weights:
        check_unknown(dataset, "test", load_checkpoint(config.weights)[0])
    n = len(dataset.subset("train"))
    threads = torch.get_num_threads()
    print(f"training on {n} images, on {args.device} with {threads} threads")
    if n < 1000:
        print("so few images may do better with --epochs 60 --batch 16")
    train(dataset, config, args.run)
    evaluate_best(args, dataset, "test")
    print("\nnext: plot, which draws curves, confusion matrix and heat maps")


def command_evaluate(args):
    """Test the best epoch: metrics.json, predictions.csv; or on --external."""
    checkpoint, _ = load_checkpoint(args.run / "best.pt")
    config = Config(**checkpoint["config"])
    if args.external:
        evaluate_best(args, load_folder(args, config.size), "external")
        return
    last, _ = load_checkpoint(args.run / "last.pt")
    finished = len(last["history"]) == config.epochs
    evaluate_best(args, open_split(args, config), "test" if finished else "val")


def check_unknown(dataset, subset, checkpoint):
    """Raise KneeError if an image of a subset is a copy of one that was trained on."""
    indices = dataset.subset(subset).tolist()
    thumbnails = shrink(dataset.images)[indices]
    copies = find_copies(thumbnails, checkpoint["thumbnails"])
    if copies.any():
        i, j = copies.nonzero()[0]
        one = dataset.xrays[indices[i]]
        other = checkpoint["xrays"][j]
        raise KneeError(
            f"{one.path} is a copy of {other.path}, which was in training "
            f"({copies.any(1).sum()} of {len(indices)} images are such): test on others"
        )


REMARKS = {
    "test": "validation chose the epoch",
    "val": "they chose the epoch, so the result looks too good",
    "external": "none of them was in training",
}


def evaluate_best(args, dataset, subset):
    """Test best.pt on a subset of a KneeFolder, on val if there is no test.

    Print the result, and write it into metrics.json and predictions.csv, or into
    external_NAME.json and external_NAME.csv.
    """
    checkpoint, model = load_checkpoint(args.run / "best.pt", args.device)
    result_file = args.run / "metrics.json"
    table_file = args.run / "predictions.csv"
    folder = (args.external or args.data).resolve()
    if subset == "external":
        result_file = args.run / f"external_{folder.name}.json"
        table_file = result_file.with_suffix(".csv")
        known = result_file.exists() and json.loads(result_file.read_text())["data"]
        if known and known != str(folder):
            raise KneeError(f"{result_file}: is of {known}, rename it")
    if not len(dataset.subset(subset)):
        subset = "val"
    if subset != "val":
        check_unknown(dataset, subset, checkpoint)

    xrays = [x for x in dataset.xrays if x.subset == subset]
    patients = [x.patient for x in xrays]
    images, grades = dataset[dataset.subset(subset)]
    probabilities = predict(model, images)
    majority = mode(x.grade for x in checkpoint["xrays"] if x.subset == "train")
    result = {
        "subset": subset,
        "data": str(folder),
        "epoch": len(checkpoint["history"]),
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "majority_accuracy": (grades == majority).float().mean().item(),
        "intervals": bootstrap(probabilities, grades, patients),
        **evaluate(probabilities, grades),
    }
    print_result(result)
    trained_on = {x.patient for x in checkpoint["xrays"] if x.patient != x.path}
    shared = trained_on & set(patients)
    if shared and subset == "external":  # no proof: others count from 1, too
        print(f"{len(shared)} patients' numbers occur in training, too: the same?")

    save_table(table_file, prediction_rows(xrays, probabilities))
    # JSON has no NaN: null stands in for it.
    result = json.loads(json.dumps(result), parse_constant=lambda nan: None)
    save(result_file, json.dumps(result, indent=1).encode())


def print_result(result):
    """Print what a test has shown."""
    head = "\n{n} images ({subset}), epoch {epoch}:".format(**result)
    print(head, REMARKS[result["subset"]])
    for name, (low, high) in result["intervals"].items():
        value = result[name]
        print(f"{name:18}{value:6.3f}   95 %: {low:.3f} to {high:.3f}")
    print(f"always the commonest grade: accuracy {result['majority_accuracy']:.3f}")
    print("recall of each grade:", *[f"{recall:.3f}" for recall in result["recall"]])


def prediction_rows(xrays, probabilities):
    """Return rows of a table: path, grade, predicted grade, five probabilities."""
    rows = []
    predicted = decide(probabilities).tolist()
    for x, answer, p in zip(xrays, predicted, probabilities.tolist(), strict=True):
        row = {"path": x.path, "grade": x.grade, "predicted": answer}
        for grade in range(len(GRADES)):
            row[f"p{grade}"] = f"{p[grade]:.4f}"
        rows.append(row)
    return rows


def command_plot(args):
    """Draw a run into RUN/report.png: loss, accuracy, confusion matrix, heat maps."""
    _, model = load_checkpoint(args.run / "best.pt", args.device)
    last, _ = load_checkpoint(args.run / "last.pt")
    table = read_table(args.run / "predictions.csv", ("path", "grade", "predicted"))
    result = json.loads((args.run / "metrics.json").read_text())
    figure = draw_report(last["history"], result["confusion"])
    title = "{n} images ({subset}), epoch {epoch}".format(**result)
    figure.suptitle(f"{args.run.name}: {title}", parse_math=False)

    first = {row["grade"]: row for row in reversed(table)}  # of each true grade
    titles = []
    xrays = []
    for grade, row in sorted(first.items()):
        titles.append(f"true grade {grade}, predicted {row['predicted']}")
        xrays.append(Xray(row["path"], int(row["predicted"])))
    dataset = KneeFolder(args.data, xrays, last["config"]["size"], args.device)
    draw_heat(figure.subfigs[1], model, *dataset[:], titles)
    save_figure(args.run / "report.png", figure)
    print(f"drawn: {args.run / 'report.png'}")


def command_predict(args):
    """Print the grade of images and the probability of each; --csv, --heatmap."""
    checkpoint, model = load_checkpoint(args.run / "best.pt", args.device)
    xrays = []
    for path in args.images:
        for name in list_images(path) if path.is_dir() else [""]:
            xrays.append(Xray(str(path / name), grade=0))
    if not xrays:
        raise KneeError(f"{args.images[0]}: has no images in it, name another folder")
    dataset = KneeFolder("", xrays, checkpoint["config"]["size"], args.device)
    for note in dataset.notes:
        tell(note)
    probabilities = predict(model, dataset.images)
    rows = prediction_rows(xrays, probabilities)
    columns = list(rows[0])[3:]  # p0 to p4
    print("file", "grade", "name", *columns, sep="  ")
    for row in rows:
        del row["grade"]  # nobody has told it
        grade = row["predicted"]
        print(row["path"], grade, GRADES[grade], *map(row.get, columns), sep="  ")
    if args.csv:
        save_table(args.csv, rows)
    if args.heatmap:
        titles = ["{path}: {predicted}".format(**row)[-32:] for row in rows]
        inches = 3.4 * math.ceil(len(rows) / 5)  # for each line of five images
        figure = Figure((13, inches), layout="constrained")
        draw_heat(figure, model, dataset.images, decide(probabilities), titles)
        save_figure(args.heatmap, figure)


def command_tune(args):
    """Train with all combinations of settings, best first by validation: tune.csv."""
    grid = {name: getattr(args, name) for name in vars(Config())}
    configs = []
    for values in itertools.product(*grid.values()):
        configs.append(config_of(dict(zip(grid, values, strict=True))))
    varied = [name for name in grid if len(grid[name]) > 1]
    rows = []
    for config in configs:
        settings = vars(config)
        print("training with", *[f"{name} {settings[name]}" for name in varied])
        name = "_".join(map(str, settings.values()))
        history = train(open_split(args, config), config, args.run / "tune" / name)
        rows.append({**best_epoch(history), **settings})
        rows.sort(key=lambda row: -row["val_kappa"])
        save_table(args.run / "tune.csv", rows)
    print(f"\nbest first ({args.run / 'tune.csv'}):\nkappa", *varied)
    for row in rows:
        print(f"{row['val_kappa']:.3f}", *map(row.get, varied))


COMMANDS = {
    "split": command_split,
    "train": command_train,
    "evaluate": command_evaluate,
    "plot": command_plot,
    "predict": command_predict,
    "tune": command_tune,
}
RANGES = {
    "size": (64, 1024),
    "batch": (2, 4096),
    "epochs": (1, 10_000),
    "lr": (1e-6, 1),
    "warmup": (0.1, 0.9),
    "weight_decay": (0, 1),
    "dropout": (0, 0.95),
    "width": (4, 256),
}


def config_of(values):
    """Return the Config of values by name. Raise KneeError if one is out of range."""
    for name, (low, high) in RANGES.items():
        if not low <= values[name] <= high:  # NaN fails, too
            option = name.replace("_", "-")
            raise KneeError(f"--{option} {values[name]}: must be from {low} to {high}")
    return Config(**{name: values[name] for name in vars(Config())})


class Parser(argparse.ArgumentParser):
    """Parse a command line. Raise KneeError where argparse would print its usage."""

    def error(self, message):
        raise KneeError(f"{message}; see --help")


def parse(argv):
    """Return the parsed command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=plain)
    parser.set_defaults(external=None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        about = function.__doc__
        command = commands.add_parser(
            name, help=about, description=about, formatter_class=plain
        )
        add = command.add_argument
        add("--data", type=Path, help="folder of X-rays (data, else phantoms)")
        add("--run", type=Path, help="folder of results (runs/ and the data's name)")
        add("--patients", type=Path, help="table image,patient (osail_patients.csv)")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
        if name == "evaluate":
            add("--external", type=Path, help="another data set, as a whole")
        if name == "predict":
            add("images", type=Path, nargs="+", help="files or folders")
            add("--csv", type=Path, help="a file to write the table into")
            add("--heatmap", type=Path, help="a PNG file to draw heat maps into")
        if name in ("split", "train", "tune"):
            command.epilog = inspect.getsource(Config)  # its comments explain them
            for setting, default in vars(Config()).items():
                words = {"type": type(default), "default": default}
                if name == "tune":  # several values of each
                    words.update(nargs="+", default=[default])
                add("--" + setting.replace("_", "-"), **words)
    args = parser.parse_args(argv)
    args.data = args.data or Path("data" if Path("data").is_dir() else "phantoms")
    args.run = args.run or Path("runs", args.data.resolve().name)
    return args


def main(argv=None):
    """Run a command line. Return the exit status: 2 after a user's mistake."""
    try:
        args = parse(argv)
        args.device = pick_device(args.device)
        COMMANDS[args.command](args)
    except KneeError as error:
        print("kneeoa: error: " + str(error).replace("\n", "\\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kneeoa: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
