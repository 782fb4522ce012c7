"""kneeoa: grade knee osteoarthritis from X-rays with a convolutional network.

    python kneeoa.py train                  # split, train and evaluate phantoms
    python kneeoa.py plot                   # draw that run: report.png
    python kneeoa.py train --data my_xrays  # X-rays, my_xrays/0 ... my_xrays/4
    python kneeoa.py predict knee.png --run runs/my_xrays

The Kellgren-Lawrence (KL) scale (Kellgren and Lawrence, 1957) grades a knee
from 0 (none) to 4 (severe). Phantoms are drawn knees, to try all of this with.
Read this file from top to bottom. What follows the testing is support code.

Measured at commit bd1c022 on the 1,656 test knees of Chen's public set, seeds
0 and 1: accuracy .700 and .709, quadratic weighted kappa .854 and .854 (see
README.md). This is no medical device. SPDX-License-Identifier: MIT
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

# For hips, hands or chests, change these four first. README.md lists the rest.
GRADES = ("none", "doubtful", "minimal", "moderate", "severe")  # the names of grades 0 to 4
PATIENT = re.compile(r"(\d+)[ _-]?(L|R|left|right)(?![a-z])", re.I)  # 9003175L.png: 9003175
JOINT = (2 / 7, 6 / 7)  # the rows that the network sees: 64 to 192 of 224
SUBSETS = {"train": 0.70, "val": 0.15, "test": 0.15}  # share of the pictures

class KneeError(Exception):
    """A user's mistake, which any function below may raise. `main` prints it as one line."""

# ---------------------------------------- settings
# What changes from run to run. The command line is made from these fields. EXPERIMENTS.md has the
# measurements behind the defaults.

def setting(default, low, high, meaning):
    return field(default=default, metadata={"range": (low, high), "meaning": meaning})

@dataclass(frozen=True)
class Config:
    """Hold the settings of a run, each within its range."""

    size: int = setting(224, 64, 1024, "side of the square pictures, in pixels")
    batch: int = setting(64, 2, 4096, "pictures per step; small sets take fewer")
    epochs: int = setting(30, 1, 10_000, "passes over the training subset")
    lr: float = setting(3e-3, 1e-6, 1.0, "peak learning rate")
    weight_decay: float = setting(0.02, 0.0, 1.0, "weight decay of AdamW")
    dropout: float = setting(0.3, 0.0, 0.95, "share of features dropped before the last layer")
    width: int = setting(32, 4, 256, "channels of the first stage; the last has six times as many")
    softness: float = setting(0.5, 0.0, 2.0, "spread of the soft labels, 0: hard labels")
    augment: float = setting(1.0, 0.0, 3.0, "strength of the augmentation, 0: mirroring alone")
    seed: int = setting(0, 0, 2**31 - 1, "of split, initial weights, order and augmentation")

    def __post_init__(self):
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), f.metadata["range"]
            if not low <= value <= high:  # NaN fails, too
                name = f.name.replace("_", "-")
                raise KneeError(f"--{name} {value}: must be from {low} to {high}")

# ---------------------------------------- reading
# A picture that is read wrongly raises no error; the network just learns less from it. So every
# kind of file becomes the same thing here: a square of grey bytes, upright, with bright bone.

FORMATS = ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
WIDE = 1.9  # a picture wider than this many heights shows both knees

def read_grey(path):
    """Return (picture, whether it was a negative): uint8 (height, width), upright, bone bright."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] not in "IF":
                grey = np.asarray(image.convert("L"))
            else:  # 16 bits or floats: convert("L") would clip all above 255 to white
                grey = np.nan_to_num(np.asarray(image, np.float64))
                # Percentiles keep a few burnt-out pixels from setting the scale.
                grey = np.uint8(np.interp(grey, np.percentile(grey, (0.5, 99.5)), (0, 255)))
    except Exception as error:  # Pillow raises a dozen kinds on damaged or hostile files
        raise KneeError(f"{path}: not readable as a picture ({error}), check it") from error
    # In a negative, the outer columns, mostly air, are brighter than the middle. Where a picture
    # shows both knees, its middle is air, too.
    height, width = grey.shape
    edge, quarter = max(1, width // 14), width // 4
    outer = np.concatenate((grey[:, :edge], grey[:, -edge:]), 1)
    middle = grey[:, quarter : width - quarter]
    negative = width <= WIDE * height and outer.mean() > middle.mean()
    return (255 - grey if negative else grey), negative

def read_xray(path, size):
    """Return the middle square of a picture, resized, as uint8 (size, size). Raise KneeError if it
    is unreadable. Never stretch a picture: grades depend on the width of the joint space."""
    image = Image.fromarray(read_grey(path)[0])
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))

# `find_xrays` lists the pictures of a data folder as these. The path is relative to that folder;
# subset "" means not given; KneeFolder sets the digest.
Xray = namedtuple("Xray", "path grade patient subset digest", defaults=["", ""])

# ---------------------------------------- splitting
# Two pictures of one patient look alike. With one in training and one in the test subset (data
# leakage), a network scores by recognizing the patient. So we split patients, not pictures.
# `make_split` calls this, unless the folders give a split, which it checks.

def split_by_patient(xrays, seed, shares=SUBSETS):
    """Return the pictures with their subsets set: split by patient, stratified by grade.
    Greedy: give each patient to the subset that is furthest below its quota for the patient's
    grades. A hash decides the order, so the split is the same on every machine. Raise KneeError if
    a grade has fewer patients than there are subsets."""
    total, grades_of = Counter(x.grade for x in xrays), defaultdict(list)
    for xray in xrays:
        grades_of[xray.patient].append(xray.grade)
    patients = Counter(grade for grade, _ in {(x.grade, x.patient) for x in xrays})
    for grade, count in sorted(patients.items()):
        if count < len(shares):
            raise KneeError(f"grade {grade}: {count} patients for {len(shares)} subsets, add some")

    def order(patient):  # the rarest grades first, while every subset has room for them
        digest = hashlib.sha256(f"{seed}/{patient}".encode("utf-8", "surrogateescape")).digest()
        return min(total[grade] for grade in grades_of[patient]), digest

    filled, subset_of = {subset: Counter() for subset in shares}, {}
    for patient in sorted(grades_of, key=order):
        grades = grades_of[patient]
        fullness = {subset: sum(filled[subset][g] / (share * total[g]) for g in grades)
                    for subset, share in shares.items()}
        subset_of[patient] = min(fullness, key=fullness.get)
        filled[subset_of[patient]].update(grades)
    return [x._replace(subset=subset_of[x.patient]) for x in xrays]

# ---------------------------------------- input
# Exposure says nothing about the joint, so `standardize` removes it. Angle, distance and side say
# nothing either, so they are varied in training: augmentation.

def standardize(images):
    """Turn greys from 0 to 255, (N, 1, S, S), into float of about mean 0, deviation 1.
    Local contrast normalization (Jarrett et al., 2009): subtract the mean around each pixel, divide
    by the deviation, in part by that around it. A faint spur on black gains most."""
    reach = max(1, round(2 / 224 * images.shape[-1]))  # 2: a square of 5 x 5 pixels

    def around(x):  # the mean of a square, twice, so that near pixels count most
        for _ in range(2):
            x = F.avg_pool2d(x, 2 * reach + 1, 1, reach, count_include_pad=False)
        return x

    detail = images.float() - around(images.float())
    variance = around(detail.square())
    # Part of the divisor is that of the whole picture, or flat background would become noise.
    whole = variance.mean((2, 3), keepdim=True)
    return detail / (0.35 * variance.sqrt() + 0.65 * whole.sqrt() + 1)  # + 1: never 0 / 0

def joint_rows(size):
    """Return the joint's rows in a picture of `size` rows, as a slice."""
    return slice(round(JOINT[0] * size), round(JOINT[1] * size))

def crop(images, matrices):
    """Resample pictures (N, 1, S, S) to the joint's rows, float (N, 1, 4/7 S, S).
    `matrices` (N, 2, 3): the new pixel at (x, y) shows what is at matrix @ (x, y, 1) in the
    picture, counted from -1 to 1, right and down. Outside, the nearest edge pixel is shown."""
    size, rows = images.shape[-1], joint_rows(images.shape[-1])
    height, middle = rows.stop - rows.start, (rows.start + rows.stop) / size - 1
    # A y from -1 to 1 over the joint's rows is middle + height / size * y over the picture.
    matrices = matrices.clone()
    matrices[:, :, 2] += middle * matrices[:, :, 1]
    matrices[:, :, 1] *= height / size
    grid = F.affine_grid(matrices, (len(images), 1, height, size), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)

def augment(images, strength=1.0):
    """Mirror, rotate (by up to 12 degrees), scale (17 %), stretch (9 %) and shift (8.5 %) pictures
    (N, 1, S, S) at random and `crop` them. `strength` multiplies all but the mirroring."""
    drawn = 2 * torch.rand(6, len(images), device=images.device) - 1  # from -1 to 1
    angle, shrink, stretch, right, down = strength * drawn[:5]
    angle, mirror = angle * (12 / 180 * np.pi), torch.where(drawn[5] < 0, -1.0, 1.0)
    scale_y = torch.exp(0.17 * shrink)
    scale_x = torch.exp(0.085 * stretch) * scale_y
    cos, sin = angle.cos(), angle.sin()
    matrices = torch.stack((scale_x * cos * mirror, -scale_x * sin, 0.17 * right,  # 8.5 % of 2
                            scale_y * sin * mirror, scale_y * cos, 0.17 * down), 1)
    return crop(images, matrices.view(-1, 2, 3))

# Test-time augmentation (TTA): the picture nearly as it is, smaller, larger, and moved 2.5 % (0.05
# of 2, from -1 to 1) toward each corner. The first is 1 % smaller: that blurs it a little, as
# augmentation does, and the network grades such pictures better (EXPERIMENTS.md).
TTA = torch.tensor([[[scale, 0, right], [0, scale, down]] for scale, right, down in (
    (1.01, 0, 0), (1.05, 0, 0), (0.95, 0, 0), (1, 0.05, 0.05), (1, -0.05, 0.05), (1, 0.05, -0.05),
    (1, -0.05, -0.05))])  # (7, 2, 3)

# ---------------------------------------- data set
# Beside a GPU, decoding a PNG takes longer than training on it. So each picture is decoded and
# standardized once and stays in memory, on the GPU if there is one: 5,778 pictures take 580 MB.

class KneeFolder(torch.utils.data.Dataset):
    """Hold standardized pictures as float16 (N, 1, S, S) and their grades as int64 (N,).
    `dataset[index]` is (pictures as float32, grades), for an int, a slice, or a tensor of numbers,
    which reads a whole batch. A DataLoader works too."""

    def __init__(self, folder, xrays=None, size=Config.size, device="cpu"):
        xrays = find_xrays(folder) if xrays is None else xrays
        self.images = torch.empty(len(xrays), 1, size, size, dtype=torch.float16, device=device)
        self.grades = torch.tensor([x.grade for x in xrays], device=device)

        def load(i):
            grey = torch.from_numpy(read_xray(Path(folder, xrays[i].path), size))  # uint8 (S, S)
            self.images[i] = standardize(grey[None, None])[0]
            # A checkpoint remembers its pictures by the hash of their pixels.
            return xrays[i]._replace(digest=hashlib.sha256(grey.numpy()).hexdigest())

        self.xrays = on_all_cores(load, range(len(xrays)), "decode")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].float(), self.grades[index]

# ---------------------------------------- network
# A radiologist looks for local signs: a narrow joint space, spurs at the margins (osteophytes),
# bright bone under the joint (sclerosis). Convolutions find such signs wherever they are; pooling
# forgets where exactly. A knee is nearly its own mirror image: the same filters read both halves.

class Residual(nn.Module):
    """Add two convolutions to their input (He et al., 2016): (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(norm.weight)  # so the block starts as the identity (Goyal et al., 2017)
        self.body = nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(), second, norm)

    def forward(self, x):
        return F.relu(x + self.body(x))

class KneeNet(nn.Module):
    """Grade standardized pictures (N, 1, S, S), S of 64 or more, or the joint's rows of them.

        (N, 1, 224, 224)     a picture
        (N, 1, 128, 224)     the joint's rows; `crop` makes these alone
        (2N, 1, 128, 128)    left halves, then right halves, mirrored: squares that overlap
        (2N, 32, 32, 32)     convolution 5 x 5 of stride 2, pooling
        (2N, 64, 16, 16)     convolution 3 x 3, pooling, residual block
        (2N, 96, 8, 8)       the same
        (2N, 192, 4, 4)      the same
        (2N, 192)            mean over the pixels
        (N, 384)             sum and absolute difference of the two halves
        (N, 5)               logits, one for each grade

    Shared filters for the two sides of a joint are from Tiulpin et al. (2018). Sum and absolute
    difference do not change when a picture is mirrored, so neither do the logits."""

    def __init__(self, width=Config.width, dropout=Config.dropout):
        super().__init__()
        layers = self.stage(1, width, kernel=5, stride=2)
        for inputs, outputs in (width, 2 * width), (2 * width, 3 * width), (3 * width, 6 * width):
            layers += [*self.stage(inputs, outputs), Residual(outputs)]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(12 * width, len(GRADES))
        self.to(memory_format=torch.channels_last)  # fastest for convolutions

    @staticmethod
    def stage(inputs, outputs, kernel=3, stride=1):
        # Pool before batch norm and ReLU: they then touch a quarter of the pixels.
        return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(outputs), nn.ReLU()]

    @staticmethod
    def halves(x):
        if x.shape[2] == x.shape[3]:
            x = x[:, :, joint_rows(int(x.shape[3]))]  # (N, 1, 4/7 S, S); int() is for tracing
        half = max(x.shape[2], (x.shape[3] + 1) // 2)  # as wide as high, for the default JOINT
        x = torch.cat((x[..., :half], x.flip(3)[..., :half]))  # -> (2N, 1, 4/7 S, 4/7 S)
        return x.contiguous(memory_format=torch.channels_last)

    def head(self, maps):
        # Undo the cat of `halves`. chunk(2) would do, but fix N when the network is traced.
        left, right = maps.float().mean((2, 3)).unflatten(0, (2, -1)).unbind()  # twice (N, C)
        pair = torch.cat((left + right, (left - right).abs()), 1)  # (N, 2C)
        return self.classifier(self.dropout(pair))  # (N, 5)

    def forward(self, x):
        return self.head(self.features(self.halves(x)))

# ---------------------------------------- decision
# Two questions: which grade to answer, and how good are the answers? Accuracy alone flatters:
# always answering grade 0 is right for four of Chen's knees in ten.

COST_POWER = 0.6  # being d grades off costs d ** COST_POWER
METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy",
           "kappa": "quadratic weighted kappa", "mae": "mean absolute error"}
PROBABILITIES = [f"p{grade}" for grade in range(len(GRADES))]

def decide(probabilities):
    """Return the grades int64 (N,) of least expected cost (Bayes decision), from (N, 5).
    With a COST_POWER near 0, all errors cost the same: the answer is the most probable grade,
    seldom grade 1. With 1, it is the median: less often right, less far off. 0.6 is between."""
    grade = torch.arange(len(GRADES), dtype=probabilities.dtype, device=probabilities.device)
    cost = (grade[:, None] - grade).abs() ** COST_POWER  # (5, 5): row = true grade, column = answer
    return (probabilities @ cost).argmin(1)

def confusion_matrix(true, predicted):
    """Count pairs of grades: int64 (5, 5), row = true grade, column = predicted grade."""
    pairs = np.asarray(true) * len(GRADES) + np.asarray(predicted)
    return np.bincount(pairs, minlength=len(GRADES) ** 2).reshape(len(GRADES), len(GRADES))

def metrics(confusion):
    """Return the metrics of confusion matrices (..., 5, 5) by name, NaN where one is undefined.
    Accuracy; recall of each grade (..., 5); balanced accuracy, the mean recall; quadratic weighted
    kappa (Cohen, 1968), 1 - squared errors / those expected by chance; mean absolute error."""
    counts, grade = np.asarray(confusion, dtype=float), np.arange(len(GRADES))
    distance = np.abs(grade[:, None] - grade)
    true, predicted, n = counts.sum(-1), counts.sum(-2), counts.sum((-1, -2))
    correct = np.diagonal(counts, axis1=-2, axis2=-1)  # (..., 5)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = correct / true
        chance = true[..., :, None] * predicted[..., None, :] / n[..., None, None]
        kappa = 1 - (counts * distance**2).sum((-1, -2)) / (chance * distance**2).sum((-1, -2))
    return {"accuracy": correct.sum(-1) / n, "balanced_accuracy": np.nanmean(recall, -1),
            "kappa": kappa, "mae": (counts * distance).sum((-1, -2)) / n, "recall": recall}

# ---------------------------------------- checkpoints
# A stop or a full disk costs one epoch at most: files are replaced as a whole, and a run continues
# from its last checkpoint. Skip this at first reading.

Epoch = namedtuple("Epoch", "epoch train_loss train_accuracy val_loss val_accuracy val_kappa lr "
                            "seconds")

def save(path, content):
    """Write a checkpoint (.pt), figure (.png), rows (.csv) or JSON, as a whole or not at all."""
    file = io.BytesIO()
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="", write_through=True)
    if path.suffix == ".pt":
        torch.save(content, file)
    elif path.suffix == ".png":
        content.savefig(file, format="png")
    elif path.suffix == ".csv":
        csv.writer(text).writerows(content)
    else:
        text.write(json.dumps(content, indent=1).replace(" NaN", " null"))  # JSON has no NaN
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(file.getvalue())
        os.replace(part, path)  # all at once
    except OSError as error:
        raise KneeError(f"{path}: {error.strerror}, check permissions and the space on the disk, "
                        "or close the file in other programs") from error
    finally:
        part.unlink(missing_ok=True)

def load_checkpoint(path, device="cpu"):
    """Return (checkpoint, its network). Raise KneeError if the file is missing or damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code in it
        model = KneeNet(Config(**checkpoint["config"]).width)
        model.load_state_dict(checkpoint["model" if path.name == "last.pt" else "calibrated"])
        if not {"xrays", "history"} <= checkpoint.keys():
            raise KeyError("a part is missing")
    except Exception as error:  # torch.load raises all kinds on foreign files
        raise KneeError(f"{path}: missing, damaged or of another version, name another --run, or "
                        "train first") from error
    return checkpoint, model.to(device).eval()

def resume(run, origin, state):
    """Load `state` from last.pt and return the history of the run, empty if there is no last.pt.
    Raise KneeError if the run was begun with other settings or pictures."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "last.pt").exists():
        return []
    last, _ = load_checkpoint(run / "last.pt")
    for name, value in last["config"].items():
        if value != origin["config"][name]:
            raise KneeError(f"{run}: was begun with {name} {value}, name another --run")
    if last["xrays"] != origin["xrays"]:
        raise KneeError(f"{run}: was begun with other pictures or split, name another --run")
    for name, part in state.items():
        part.load_state_dict(last[name])
    print(f"{run}: {len(last['history'])} epochs are done already; another --run begins anew")
    return [Epoch(*row) for row in last["history"]]

# ---------------------------------------- training
# Show a batch, measure the error, move each weight a little to where the error is smaller: that is
# the loop of `train`. The validation subset, not the test subset, chooses the epoch: later ones may
# overfit. Training accuracy is of augmented pictures, with dropout: it may be below validation's.

def soft_labels(softness, device="cpu"):
    """Return (5, 5): row g is the label of grade g, softmax(-distance^2 / softness). Radiologists
    often differ by one grade, so being off by one is punished less (Diaz and Marathe, 2019)."""
    grade = torch.arange(len(GRADES), device=device)
    return torch.softmax(-(grade[:, None] - grade).square() / max(softness, 1e-9), 1)

def mixed_precision(device):
    """Return a context in which convolutions run in bfloat16, where that is faster than float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # with AMX; or AVX-512 BF16 of AMD's, which come without AVX-512 FP16
        has = getattr(torch.cpu, "get_capabilities", dict)().get
        fast = has("amx_bf16") or has("avx512_bf16") and not has("avx512_fp16")
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(fast))

@torch.no_grad()
def predict(model, images, views=TTA):
    """Return logits (N, 5) of standardized pictures (N, 1, S, S), each the mean over its views."""
    model.eval()  # batch norm uses its running averages, dropout is off
    logits = []
    for batch in images.split(64):
        crops = [crop(batch, view.to(batch.device).expand(len(batch), 2, 3)) for view in views]
        with mixed_precision(batch.device):
            logits.append(sum(model(x).float() for x in crops) / len(crops))  # (B, 5)
    return torch.cat(logits)

def validate(model, dataset, labels):
    """Return ((loss, accuracy, kappa), calibrated weights). Raise KneeError if the loss is NaN.
    Soft labels make the network underconfident. So its logits are divided by the temperature that
    fits the grades best (temperature scaling, Guo et al., 2017). The weights returned have it built
    in: their last layer is divided by it. `model` stays as it is."""
    logits, grades = predict(model, dataset.images, TTA[:1]), dataset.grades  # one view: faster
    loss = F.cross_entropy(logits, labels[grades]).item()
    if not np.isfinite(loss):
        raise KneeError("the loss is NaN, try a lower --lr and another --run")
    temperature = min(np.arange(0.3, 2, 0.02).tolist(),
                      key=lambda t: F.cross_entropy(logits / t, grades).item())
    weights = model.state_dict()
    for name in "classifier.weight", "classifier.bias":
        weights[name] = weights[name] / temperature
    answers = decide((logits / temperature).softmax(1))
    scores = metrics(confusion_matrix(grades.cpu(), answers.cpu()))
    kappa = np.nan_to_num(scores["kappa"]).item()  # undefined if all have one grade
    return (loss, scores["accuracy"].item(), kappa), weights

@torch.no_grad()
def update_ema(ema, model, step):
    """Move the moving average of the weights (EMA), which is validated and kept, toward the model.
    The last quarter of the steps makes up two thirds of it (Shamir and Zhang, 2013)."""
    for mean, new in zip(ema.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():  # batch norm also counts its batches
            mean.lerp_(new, 4 / (step + 3))  # mean += w * (new - mean), w = 1 at the first step

def train(train_set, val_set, config, run):
    """Train a network and return its history, a list of Epoch. After each epoch, write best.pt,
    history.csv and last.pt into the folder `run`, and continue from there (see `resume`)."""
    n, device, run = len(train_set), train_set.images.device, Path(run)
    torch.manual_seed(config.seed)  # initial weights
    model, ema = (KneeNet(config.width, config.dropout).to(device) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
    batch = min(config.batch, max(8, n // 75), n)  # for small sets: 75 steps, or of 8 pictures
    steps = n // batch  # the last, incomplete batch is dropped
    # The learning rate: warm-up, then cosine (Smith and Topin, 2018). It needs 5 steps.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, max(5, steps * config.epochs), pct_start=0.25, cycle_momentum=False)
    labels = soft_labels(config.softness, device)
    origin = {"config": asdict(config), "xrays": list(map(tuple, train_set.xrays + val_set.xrays))}
    state = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    history = resume(run, origin, state)
    for epoch in range(len(history) + 1, config.epochs + 1):
        start, title = time.perf_counter(), f"epoch {epoch}/{config.epochs}"
        torch.manual_seed(config.seed * 100_003 + epoch)  # so that a resumed run draws the same
        model.train()  # dropout on; batch norm by the batch
        batches = torch.randperm(n, device=device)[: steps * batch].split(batch)
        sums = torch.zeros(2, device=device)  # of loss and accuracy; reading each step is slow
        for index in tqdm(batches, title, leave=False, ncols=79):
            images, grades = train_set[index]  # (B, 1, S, S), (B,)
            images = augment(images, config.augment)  # (B, 1, 4/7 S, S)
            with mixed_precision(device):
                logits = model(images).float()  # (B, 5)
            loss = F.cross_entropy(logits, labels[grades])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            update_ema(ema, model, schedule.last_epoch)  # PyTorch's name for the number of steps
            correct = decide(logits.detach().softmax(1)) == grades
            sums += torch.stack((loss.detach(), correct.float().mean()))
        means, seconds = (sums / steps).tolist(), time.perf_counter() - start
        scores, weights = validate(ema, val_set, labels)
        history.append(Epoch(epoch, *means, *scores, schedule.get_last_lr()[0], seconds))
        left = tqdm.format_interval((config.epochs - epoch) * (time.perf_counter() - start))
        print("{}: loss {:.3f} acc {:.3f} | val acc {:.3f} kappa {:.3f} | {} left".format(
            title, *means, *scores[1:], left), flush=True)
        origin["history"] = [tuple(row) for row in history]
        # The best epoch has the highest kappa on the validation subset; of equals, the lowest loss.
        best = max(history, key=lambda row: (row.val_kappa, -row.val_loss))
        if best.epoch == epoch:
            save(run / "best.pt", origin | {"calibrated": weights})
        save(run / "history.csv", [Epoch._fields, *history])
        # Written last: a run that stops before this line repeats the epoch.
        save(run / "last.pt", origin | {name: part.state_dict() for name, part in state.items()})
    return history

# ---------------------------------------- testing
# The network of the best epoch meets the test subset, once training is finished.

def bootstrap(true, predicted, patients, draws=2000):
    """Return 95 % intervals {metric: [low, high]} by the bootstrap (Efron, 1979). Patients are
    drawn, not pictures: the two knees of a patient are no independent evidence."""
    _, number = np.unique(patients, return_inverse=True)  # the patient of each picture: 0, 1, ...
    n = number.max() + 1
    counts = np.zeros((n, len(GRADES), len(GRADES)))  # a confusion matrix for each patient
    np.add.at(counts, (number, true, predicted), 1)
    # How often each patient is drawn: (draws, n). A drawn patient adds its confusion matrix.
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)
    scores = metrics(np.tensordot(drawn, counts, 1))  # of (draws, 5, 5)
    return {name: np.percentile(scores[name], (2.5, 97.5)).tolist() for name in METRICS}

def command_evaluate(args):
    """Evaluate the best epoch: RUN/metrics.json, predictions.csv; or other data (--external).
    Evaluate val if there is no test subset, or while training is unfinished. Return (metrics, rows
    of predictions.csv, network)."""
    checkpoint, model = load_checkpoint(args.run / "best.pt", args.device)
    if args.external:
        data, subset = args.external, "external"
        names = [f"external_{data.resolve().name}{suffix}" for suffix in (".json", ".csv")]
        xrays, _ = inspect_xrays(data, find_xrays(data, args.patients))
    else:
        data, names, xrays = args.data, ("metrics.json", "predictions.csv"), read_split(args)
        last, _ = load_checkpoint(args.run / "last.pt")
        finished = len(last["history"]) == last["config"]["epochs"]
        subset = "test" if finished and any(x.subset == "test" for x in xrays) else "val"
        xrays = [x for x in xrays if x.subset == subset]
    dataset = KneeFolder(data, xrays, checkpoint["config"]["size"], args.device)
    used = [Xray(*x) for x in checkpoint["xrays"]]  # for training and validation
    # A patient named by the path is unknown: the same path elsewhere proves nothing.
    known = {x.digest for x in used} | {x.patient for x in used if x.patient != x.path}
    seen = [x.path for x in dataset.xrays if x.digest in known or x.patient in known]
    if seen and args.external:
        raise KneeError(f"{data}: {len(seen)} of its pictures or patients were in training "
                        f"({seen[0]}), name other data, or other patients with --patients")
    true = dataset.grades.cpu().numpy()
    probabilities = predict(model, dataset.images).softmax(1).cpu()
    predicted = decide(probabilities).numpy()
    confusion = confusion_matrix(true, predicted)
    usual = Counter(x.grade for x in used if x.subset == "train").most_common(1)[0][0]  # a grade
    scores = {name: score.tolist() for name, score in metrics(confusion).items()}
    intervals = bootstrap(true, predicted, [x.patient for x in xrays])
    result = {"subset": subset, "n": len(true), "epoch": len(checkpoint["history"]), **scores,
              "parameters": sum(p.numel() for p in model.parameters()), "intervals": intervals,
              "majority_accuracy": (true == usual).mean().item(), "confusion": confusion.tolist()}
    rows = [(x.path, x.grade, answer, *(f"{p:.4f}" for p in own))
            for x, answer, own in zip(xrays, predicted.tolist(), probabilities.tolist())]
    save(args.run / names[0], result)
    save(args.run / names[1], [("path", "grade", "predicted", *PROBABILITIES), *rows])
    print(f"\n{subset} subset: {len(xrays)} pictures, by the network of epoch {result['epoch']}")
    print({"test": "validation chose the epoch", "external": "none of them was trained on",
           "val": "these pictures chose the epoch, which flatters the results"}[subset])
    print_table(("", "result", "95 % interval"), *(
        (title, f"{scores[name]:.3f}", "{:.3f} to {:.3f}".format(*intervals[name]))
        for name, title in METRICS.items()),
        (f"accuracy of always grade {usual}", f"{result['majority_accuracy']:.3f}", ""))
    print_table(("", *(f"{g} {name}" for g, name in enumerate(GRADES))),
                ("recall", *(f"{recall:.3f}" for recall in scores["recall"])),
                ("pictures", *confusion.sum(1)))
    return result, rows, model

# The lesson ends here; the rest is support code.
# ---------------------------------------- looking
# A heat map shows which part of a picture spoke for its grade. That should be the joint: where it
# is a letter or a screw, the network has learned something else.

def grad_cam(model, images, grades):
    """Return heat (N, S, S) from 0 to 1: what in pictures (N, 1, S, S) spoke for grades (N,).
    Grad-CAM (Selvaraju et al., 2017) weights the last feature maps by the slopes of the logit."""
    size, rows = images.shape[-1], joint_rows(images.shape[-1])
    halves = model.halves(images.float())  # (2N, 1, 4/7 S, 4/7 S)
    maps = model.features(halves)  # (2N, C, H, W)
    logits = model.head(maps).gather(1, grades[:, None])  # (N, 1)
    slopes = torch.autograd.grad(logits.sum(), maps)[0].mean((2, 3), keepdim=True)  # (2N, C, 1, 1)
    heat = F.relu((slopes * maps).sum(1, keepdim=True)).detach()  # (2N, 1, H, W)
    heat = F.interpolate(heat, halves.shape[2:], mode="bilinear")[:, 0]  # back to the halves' size
    margins = (0, size - heat.shape[2], rows.start, size - rows.stop)
    left, right = F.pad(heat, margins).chunk(2)  # twice (N, S, S)
    heat = torch.maximum(left, right.flip(2))
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-9)

def draw_pairs(figure, model, size, pictures, columns):
    """Draw pictures (path, title, grade), each beside itself under the heat of that grade."""
    axes = figure.subplots(-(-len(pictures) // columns), 2 * columns, squeeze=False).flat
    for ax in axes:
        ax.axis("off")
    for i, (path, title, grade) in enumerate(pictures):
        grey, device = read_xray(path, size), model.classifier.weight.device
        image = standardize(torch.from_numpy(grey)[None, None]).to(device)
        heat = grad_cam(model, image, torch.tensor([grade], device=device))[0].cpu().numpy()
        title = title.encode("utf-8", "replace").decode()  # matplotlib refuses broken letters
        for ax, text in (axes[2 * i], title), (axes[2 * i + 1], f"predicted {grade}"):
            ax.imshow(grey, cmap="gray", vmin=0, vmax=255)
            ax.set_title(text[-40:], fontsize=9, parse_math=False)
        ax.imshow(heat, cmap="inferno", alpha=0.6 * heat, vmin=0, vmax=1)

def command_plot(args):
    """Draw a run into RUN/report.png: loss, accuracy, confusion matrix, heat maps."""
    last, _ = load_checkpoint(args.run / "last.pt")
    result, answers, model = command_evaluate(args)
    columns, best = dict(zip(Epoch._fields, zip(*last["history"]))), result["epoch"]
    figure = Figure(figsize=(13, 7.6), layout="constrained", dpi=110)
    figure.suptitle(f"{args.run.name}, {result['n']} {result['subset']} pictures: " + ", ".join(
        f"{title} {result[name]:.3f}" for name, title in METRICS.items()), parse_math=False)
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.4, 1))
    *curves, matrix = upper.subplots(1, 3)
    for ax, name, title in zip(curves, ("loss", "accuracy"), ("loss", "share graded right")):
        ax.plot(columns["epoch"], columns[f"train_{name}"], "o-", ms=3, label="training, augmented")
        ax.plot(columns["epoch"], columns[f"val_{name}"], "s--", ms=3, label="validation")
        ax.axvline(best, color="0.4", ls=":", label=f"best epoch: {best}")
        ax.set(xlabel="epoch", title=title)
        ax.legend(fontsize=8)
    counts = np.array(result["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    matrix.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (true, predicted), share in np.ndenumerate(shares):
        matrix.text(predicted, true, f"{counts[true, predicted]}\n{share:.0%}", ha="center",
                    va="center", color="white" if share > 0.6 else "black")
    matrix.set(xlabel="predicted grade", ylabel="true grade", xticks=range(len(GRADES)),
               yticks=range(len(GRADES)), title="confusion matrix: pictures, share of row")
    first = {row[1]: row for row in reversed(answers)}  # of each grade
    pictures = [(args.data / first[grade][0], f"true grade {grade}", first[grade][2])
                for grade in sorted(first)]
    draw_pairs(lower, model, last["config"]["size"], pictures, len(pictures))
    lower.suptitle("A picture of each grade; beside it, bright, what spoke for the predicted grade")
    save(args.run / "report.png", figure)
    print(f"\ndrawn: {args.run / 'report.png'}")

# ---------------------------------------- data folders
# DATA/0 ... DATA/4 are split by patient. DATA/train/0 ..., DATA/val, DATA/test are kept, unless a
# patient or a picture is in two of them.

HIDDEN = (".", "@", "__MACOSX")  # so begin the names of thumbnails and the like
GRADE_WORDS = {"normal": 0, "mild": 2} | {name: grade for grade, name in enumerate(GRADES)}
SUBSET_WORDS = {"training": "train", "valid": "val", "validation": "val"} | {s: s for s in SUBSETS}

def place_of(folders):
    """Return (data set, subset, grade) that the folders of a file tell: ("kneeKL224", "train", 3)
    for kneeKL224/train/3. KL3, 3Mild, grade_3 and moderate are grade 3, others may be None."""
    for i, name in enumerate(folders):
        number = re.match(r"(?:(?:kl|grade|class)[ _-]*)*(\d+)", name, re.I)
        grade = int(number[1]) if number else GRADE_WORDS.get(name.lower())
        if grade in range(len(GRADES)):
            subset = SUBSET_WORDS.get(folders[i - 1].lower(), "") if i else ""
            return "/".join(folders[: i - bool(subset)]), subset, grade
    return "/".join(folders), "", None

def files_below(folder):
    """Return the files below a folder but hidden ones, sorted; symbolic links are followed."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        files += [Path(parent, name) for name in names if not name.startswith(HIDDEN)]
    return sorted(files)

def find_xrays(folder, patients_file=None):
    """Return the graded pictures of a data folder, a list of Xray sorted by path.
    Folder names tell the grade and the subset. The patient is looked up by file name in the
    patients file (by default osail_patients.csv, if beside this program); else it is the number in
    a name such as 9003175L.png; else the picture counts as a patient of its own, named by its path.
    Raise KneeError if there is not exactly one data set."""
    folder, table = Path(folder), Path(__file__).with_name("osail_patients.csv")
    if not folder.is_dir():
        raise KneeError(f"{folder}: no such folder, name that of the X-rays with --data")
    table = patients_file or (table if table.exists() else None)
    patients = dict(read_csv(table, "image", "patient")) if table else {}
    places = {file: place_of(file.relative_to(folder).parts[:-1]) for file in files_below(folder)}
    given = {data_set for data_set, subset, _ in places.values() if subset}
    data_sets, passed_over = defaultdict(list), Counter()
    for file, (data_set, subset, grade) in places.items():
        # A folder of grades beside train, val and test is no part of the data set.
        beside = not subset and not given.isdisjoint((data_set, data_set.rpartition("/")[0]))
        if grade is None or beside:
            passed_over["in other folders"] += 1
        elif file.suffix.lower() not in SUFFIXES:
            passed_over[file.suffix or "without suffix"] += 1
        else:
            path, match = file.relative_to(folder).as_posix(), PATIENT.match(file.name)
            patient = patients.get(file.name) or (match[1] if match else path)
            data_sets[data_set].append(Xray(path, grade, patient, subset))
    if len(data_sets) != 1:
        found = sorted(data_sets or {data_set for data_set, *_ in places.values()})
        raise KneeError(f"{folder}: has {len(data_sets)} data sets with folders 0 to "
                        f"{len(GRADES) - 1} (found: {', '.join(found[:9]) or 'nothing'}), name "
                        "the folder of one")
    if passed_over:
        told = ", ".join(f"{n} {what}" for what, n in sorted(passed_over.items()))
        print(f"passed over: {told}"[:79])
    return sorted(data_sets.popitem()[1])

def check_leakage(where, what, pairs):
    """Raise KneeError if a name occurs with two subsets in pairs (name, subset)."""
    leaked = sorted(name for name, n in Counter(name for name, _ in set(pairs)).items() if n > 1)
    if leaked:
        raise KneeError(f"{where}: {len(leaked)} {what} are in two subsets, move each into one: "
                        f"{', '.join(leaked[:4])}")

def inspect_xrays(folder, xrays):
    """Return (xrays without duplicates, notes), and print the notes: duplicates and odd pictures.
    Of duplicates, keep the one whose name tells the patient; none if their grades differ, since one
    grade is wrong and nothing says which. Raise KneeError if one is in two subsets."""
    def look(xray):
        grey, negative = read_grey(Path(folder, xray.path))
        odd = {"negative, bone dark: turned": negative, "of one grey all over": np.ptp(grey) == 0,
               "very wide: of both knees?": grey.shape[1] > WIDE * grey.shape[0]}
        digest = hashlib.sha256(repr(grey.shape).encode() + grey.tobytes()).digest()
        return digest, [kind for kind, found in odd.items() if found]

    equals, named, kept = defaultdict(list), defaultdict(list), []
    for xray, (digest, odd) in zip(xrays, on_all_cores(look, xrays, "inspect")):
        equals[digest].append(xray)
        for kind in odd:
            named[kind].append(xray)
    pairs = [(equal[0].path, x.subset) for equal in equals.values() for x in equal]
    check_leakage(folder, "pictures", pairs)
    check_leakage(folder, "patients", [(x.patient, x.subset) for x in xrays])
    for equal in equals.values():
        first, *others = sorted(equal, key=lambda x: (x.patient == x.path, len(x.path), x.path))
        if all(x.grade == first.grade for x in others):
            kept.append(first)
            named["duplicates of others"] += others
        else:
            named["equal, but of several grades"] += equal
    named["of unknown patient, each taken for one"] = [x for x in kept if x.patient == x.path]
    notes = [f"{len(some)} {kind}: {', '.join(x.path for x in some)}"
             for kind, some in named.items() if some]
    for note in notes:
        print(note[:79])  # notes.json has all the names
    return sorted(kept), notes

def make_split(folder, seed, patients_file=None):
    """Return (xrays with their subsets, notes of `inspect_xrays`). Keep a split that the folders
    give, else make one."""
    xrays, notes = inspect_xrays(folder, find_xrays(folder, patients_file))
    given = [subset for subset in SUBSETS if any(x.subset == subset for x in xrays)]
    train = [x for x in xrays if x.subset in ("", "train")]
    missing = sorted(set(range(len(GRADES))) - {x.grade for x in train})
    if missing:
        raise KneeError(f"{folder}: no pictures of grades {missing} to train on, add some or "
                        "change GRADES in kneeoa.py")
    print("layout:", f"{', '.join(given)} as the folders give them" if given else "by grade")
    if "val" not in given:
        print("split by patient:", "val, taken from train" if given else ", ".join(SUBSETS))
        shares = {"train": 0.85, "val": 0.15} if given else SUBSETS
        test = [x for x in xrays if x.subset == "test"]
        xrays = sorted(split_by_patient(train, seed, shares) + test)
    return xrays, notes

# ---------------------------------------- files and machine

def on_all_cores(function, items, title):
    """Return [function(item) for item in items], by threads. Raise one KneeError for all errors."""
    def attempt(item):
        try:
            return function(item)
        except KneeError as error:
            return error

    results = thread_map(attempt, items, max_workers=torch.get_num_threads(), desc=title,
                         leave=False, ncols=79)
    errors = [str(result) for result in results if isinstance(result, KneeError)]
    if errors:
        raise KneeError("; ".join(errors[:20]) + "; ..." * (len(errors) > 20))
    return results

def read_csv(path, *columns):
    """Return the rows of a CSV file, tuples of these columns. Raise KneeError if one is missing."""
    try:  # utf-8-sig: Excel begins a file with a byte order mark
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = [tuple((row[name] or "").rstrip() for name in columns) for row in reader]
        if not rows:
            raise KeyError("no rows")
        return rows
    except (KeyError, csv.Error) as error:
        raise KneeError(f"{path}: no table of {','.join(columns)}, mend it") from error

def pick_device(name):
    """Return the torch.device of --device, or raise KneeError. Use a container's share of cores."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.is_file() else ("max", 1)
    if quota != "max":  # more threads only wait for each other
        torch.set_num_threads(min(torch.get_num_threads(), max(1, int(quota) // int(period))))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise KneeError(f"--device {name}: not on this machine, use --device auto") from error

# ---------------------------------------- phantoms
# Drawn knees of known grade, so that all of this runs without a download. They are no medical data.
# There is nothing to learn here about networks.

def draw_phantom(severity, patient, knee, size=224):
    """Draw a right knee from the front as uint8 (size, size). `severity` rounds to the grade.
    The generator `patient` varies what both knees of a patient share, `knee` the rest."""
    def sign(start, full):  # each sign begins at its own severity, and none is sure
        return min(max((severity + knee.normal(0, 0.2) - start) / (full - start), 0), 1)

    def bump(x, centre, width):
        return np.exp(-(((x - centre) / width) ** 2))

    def step(x, softness):
        return 0.5 + 0.5 * np.tanh(x / (2 * softness))  # 0 below 0, 1 above

    # x runs to the right and y down, from -1 to 1, with the joint at the origin.
    x = np.linspace(-1, 1, size, dtype=np.float32)
    y = x[:, None] - knee.normal(0, 0.04) * x - knee.normal(0.08, 0.03)
    x = x + knee.normal(0, 0.04) * y - knee.normal(0, 0.02)
    worn = patient.choice((1, 1, 1, -1))  # the side that wears, mostly the inner one
    on_worn, half = step(x * worn, 0.06), patient.uniform(0.74, 0.84)
    # The joint space narrows, most on the worn side, where at the end the bone gives way.
    gap = patient.uniform(0.062, 0.08) * (1 - sign(0.7, 3.4) * (0.1 + 0.88 * on_worn))
    sunk = sign(3.1, 4.2) * on_worn * 0.07 * bump(x * worn, 0.42, 0.25)
    notch = patient.uniform(0.17, 0.23) * abs(2.08 * abs(x) / half - 1.1) ** 4
    spines = patient.uniform(0.1, 0.14) * (bump(x, -0.08, 0.07) + bump(x, 0.09, 0.07))
    sclerosis = sign(1.5, 4) * step(x * worn - 0.12, 0.05) * bump(y, 0, 0.25)
    # Add up what the rays meet: soft tissue, then femur and tibia, each a map of the depth in bone.
    ray = 0.14 + 0.3 * np.sqrt((1 - (x / patient.uniform(1.15, 1.4)) ** 2).clip(0))
    for down, surface, hard in (-1, gap + notch - sunk, 0.18), (1, gap - spines + sunk, 0.31):
        waist = patient.uniform(0.14, 0.32) * step(down * y - 0.5, 0.1)
        bone = np.minimum(down * y - surface, 0.8 * (half - abs(x) - waist))
        for out, start in (worn, 0.75), (-worn, 1.1):  # osteophytes, first on the worn side
            big = sign(start, start + 3.3) * knee.uniform(0.95, 1.45)
            along = (x * out - half + 0.03) / (0.05 + 0.13 * big)
            above = down * y - float(gap.mean()) - 0.09 + 0.04 * down + 0.055 * big * along
            beak = 0.05 * (min(1, 8 * big) - np.hypot(along, above / (0.035 + 0.035 * big)))
            bone = np.maximum(bone, beak) + 0.02 * big**0.5 * bump(bone, beak, 0.04)
        inside = 0.15 + 0.12 * bump(bone, 0, 0.025) + 0.1 * step(bone - 0.12, 0.06)
        ray += step(bone, 0.006) * (inside + hard * sclerosis * bump(bone, 0, 0.08))
    ray += patient.uniform(0.004, 0.018) * knee.standard_normal(x.shape, np.float32)
    dark, gamma, contrast = patient.uniform((0.02, 0.65, 0.5), (0.2, 1.35, 1))
    grey = dark + contrast * (1.8 * ray - 0.45).clip(0, 1.2) ** gamma
    image = Image.fromarray(np.uint8(255 * grey.clip(0, 1)))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(patient.uniform(0.3, 0.9))))

def command_phantoms(args):
    """Draw X-rays of known grade, which are no medical data, into a folder."""
    folder, count = args.data, args.count
    if count < 60:
        raise KneeError(f"--count {count}: too few to be split by patient, draw 60 or more")
    if folder.exists():
        raise KneeError(f"{folder}: is there already, name another folder with --data")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # renamed when all are drawn
    usual = (0, 1, 2, 3, 0, 2, 4, 1, 0, 3, 2, 4, 0, 1, 3, 2, 0, 4)  # of one patient after another

    def draw(i):  # a left and a right knee of each patient
        number, left = divmod(i, 2)
        patient, knee = (np.random.default_rng((args.config.seed, number, own))
                         for own in (0, 1 + left))
        severity = usual[number % len(usual)] + patient.uniform(-0.5, 0.5) + knee.normal(0, 0.35)
        severity = min(max(severity, -0.49), 4.49)
        grey = draw_phantom(severity, patient, knee)
        file = part / str(round(severity)) / f"{1_000_001 + number}{'RL'[left]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey[:, ::-1] if left else grey).save(file)

    on_all_cores(draw, range(count), "draw")
    part.replace(folder)

# ---------------------------------------- commands
# Each takes the parsed command line: data, run, patients, device, and config (the settings).

def print_table(*rows):
    """Print rows as a table: the first column to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for first, *others in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(others, widths[1:])]
        print(str(first).ljust(widths[0]), *cells, sep="  ")

def command_split(args):
    """Split the patients into train, val and test: RUN/split.csv."""
    if (args.run / "last.pt").exists():
        raise KneeError(f"{args.run}: was trained with its split already, name another --run")
    if args.data == Path("phantoms") and not args.data.exists():
        print("no folder data, no --data: drawing 1000 phantoms, which are no medical data")
        command_phantoms(parse(["phantoms"]))
    xrays, notes = make_split(args.data, args.config.seed, args.patients)
    args.run.mkdir(parents=True, exist_ok=True)
    save(args.run / "split.csv", [Xray._fields[:4], *(x[:4] for x in xrays)])
    save(args.run / "notes.json", notes)
    pictures = Counter((x.grade, x.subset) for x in xrays)
    patients = Counter(subset for subset, _ in {(x.subset, x.patient) for x in xrays})
    print_table(("pictures", *SUBSETS), *((f"grade {g}", *(pictures[g, s] for s in SUBSETS))
                                          for g in range(len(GRADES))),
                ("patients", *(patients[s] for s in SUBSETS)))

def read_split(args):
    """Return the xrays of RUN/split.csv. Raise KneeError if it is damaged or of other data."""
    path, grades = args.run / "split.csv", {str(grade): grade for grade in range(len(GRADES))}
    patients = dict(read_csv(args.patients, "image", "patient")) if args.patients else {}
    xrays = [Xray(file, grades.get(grade), patient, subset) for file, grade, patient, subset
             in read_csv(path, *Xray._fields[:4])]
    for x in xrays:
        if x.subset not in SUBSETS or x.grade is None or not (args.data / x.path).is_file():
            raise KneeError(f"{path}: {x.path} is not in {args.data}, or its grade or subset is "
                            "wrong, name its folder with --data or another --run")
        if x.patient != (patients.get(Path(x.path).name) or x.patient):
            raise KneeError(f"{path}: was made without {args.patients}, name another --run")
    if not {"train", "val"} <= {x.subset for x in xrays}:
        raise KneeError(f"{path}: has no train or no val, remove it and run split again")
    check_leakage(path, "patients", [(x.patient, x.subset) for x in xrays])
    return xrays

def fit(args, folder):
    """Train into a folder on the split of a run, which is made if it is missing."""
    if not (args.run / "split.csv").exists():
        command_split(args)
    xrays, size = read_split(args), args.config.size
    train_set, val_set = (KneeFolder(args.data, [x for x in xrays if x.subset == subset], size,
                                     args.device) for subset in ("train", "val"))
    print(f"training on {len(train_set)} pictures, validating on {len(val_set)}, on {args.device} "
          f"with {torch.get_num_threads()} threads\n"
          "each line tells the time left; Ctrl-C stops, the same command goes on")
    train(train_set, val_set, args.config, folder)

def command_train(args):
    """Train a network, keep its best epoch, evaluate it: RUN/history.csv, best.pt, last.pt."""
    fit(args, args.run)
    command_evaluate(args)
    print(f'\nnext: python kneeoa.py plot --data "{args.data}" --run "{args.run}"')

def command_predict(args):
    """Print the grade of pictures and the probability of each grade; --heatmap draws them."""
    paths = []
    for path in args.images:
        below = files_below(path) if path.is_dir() else [path]
        paths += [file for file in below if file == path or file.suffix.lower() in SUFFIXES]
    if not paths:
        raise KneeError(f"{args.images[0]}: has no pictures in it, name another folder")
    if args.heatmap and (args.heatmap.suffix != ".png" or len(paths) > 300):
        raise KneeError(f"--heatmap {args.heatmap}: must end in .png and show at most 300 pictures")
    checkpoint, model = load_checkpoint(args.run / "best.pt", args.device)
    xrays, size = [Xray(str(path), 0, "") for path in paths], checkpoint["config"]["size"]
    inspect_xrays("", xrays)
    dataset = KneeFolder("", xrays, size, args.device)
    probabilities = predict(model, dataset.images).softmax(1).cpu()
    grades = decide(probabilities).tolist()
    print_table(("file", "grade", "name", *PROBABILITIES), *(
        (path, answer, GRADES[answer], *(f"{p:.3f}" for p in own))
        for path, answer, own in zip(paths, grades, probabilities.tolist())))
    print(f"graded by {args.run / 'best.pt'}; --run names another", file=sys.stderr)
    if args.heatmap:
        columns = min(3, len(paths))
        figsize = 6.4 * columns, 3.6 * -(-len(paths) // columns)
        figure = Figure(figsize=figsize, layout="constrained", dpi=110)
        pictures = [(path, path.name, answer) for path, answer in zip(paths, grades)]
        draw_pairs(figure, model, size, pictures, columns)
        save(args.heatmap, figure)

def command_tune(args):
    """Train with all combinations of the given settings and compare them: RUN/tune.csv."""
    grid, rows = args.grid, []
    if all(len(values) == 1 for values in grid.values()):
        grid["lr"] = [factor * grid["lr"][0] for factor in (0.5, 1, 2)]
    head = (*grid, "epoch", "val_loss", "val_accuracy", "val_kappa")
    for args.config in [Config(*values) for values in itertools.product(*grid.values())]:
        values = astuple(args.config)
        folder = args.run / "tune" / "_".join(map(str, values))
        fit(args, folder)
        epoch, _, _, *scores = load_checkpoint(folder / "best.pt")[0]["history"][-1][:6]
        rows.append((*values, epoch, *(f"{score:.4g}" for score in scores)))
        save(args.run / "tune.csv", [head, *rows])
    rows.sort(key=lambda row: float(row[-1]), reverse=True)
    tried = [i for i, values in enumerate(grid.values()) if len(values) > 1]
    print_table(*([row[i] for i in tried] + list(row[-4:]) for row in (head, *rows)))
    words = [f"--{name.replace('_', '-')} {value}" for name, value in zip(grid, rows[0])
             if name != "epochs" and value != getattr(Config, name)]
    words += [f'--patients "{args.patients}"'] if args.patients else []
    print(f'\nthe best in full:\npython kneeoa.py train --data "{args.data}" '
          f'--run "{args.run}-best"', *words)

COMMANDS = {"split": command_split, "train": command_train, "evaluate": command_evaluate,
            "plot": command_plot, "predict": command_predict, "tune": command_tune,
            "phantoms": command_phantoms}

def parse(argv):
    """Return the parsed command line."""
    def fail(message):  # argparse would print its usage, too, in which the one line drowns
        raise KneeError(f"{message}; see python kneeoa.py --help")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(external=None)
    parser.error = fail
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0],
                                      description=function.__doc__)
        command.error = fail
        command.add_argument("--data", type=Path, help="X-rays (the folder data, else phantoms)")
        command.add_argument("--run", type=Path, help="results (runs/ and the name of the data)")
        command.add_argument("--patients", type=Path, help="table image,patient (OSAIL's own)")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
        if name == "predict":
            command.add_argument("images", type=Path, nargs="+", help="files or folders")
            command.add_argument("--heatmap", type=Path, help="draw heat maps into this PNG file")
        if name == "evaluate":
            command.add_argument("--external", type=Path, help="another data set, as a whole")
        if name == "phantoms":
            command.add_argument("--count", type=int, default=1000, help="how many (1000)")
        if name in ("evaluate", "plot", "predict"):
            continue  # their settings are those of the checkpoint
        for f in fields(Config):
            command.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=[f.default],
                                 nargs="+" if name == "tune" else 1,
                                 help=f"{f.metadata['meaning']} ({f.default})")
    args = parser.parse_args(argv)
    args.grid = {f.name: getattr(args, f.name, [f.default]) for f in fields(Config)}
    args.config = Config(*(values[0] for values in args.grid.values()))
    own = Path("data").is_dir() and args.command != "phantoms"
    args.data = (args.data or Path("data" if own else "phantoms")).expanduser()
    args.run = (args.run or Path("runs", args.data.resolve().name)).expanduser()
    return args

def main(argv=None):
    """Run a command line. Return the exit status: 2 after a user's mistake, 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parse(argv)
        args.device = pick_device(args.device)
        COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KneeError, OSError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.filename}: {error.strerror}, check path and permissions"
        elif not isinstance(error, KneeError):
            if isinstance(error, RuntimeError) and not re.search("(allocate|of|enough) mem", text):
                raise  # a fault of ours
            text = "the memory is full, try a smaller --size or --batch, or another --device"
        print("kneeoa: error: " + text.replace("\n", "\\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kneeoa: stopped; whole epochs are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
