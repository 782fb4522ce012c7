"""What kneeoa promises, one test a promise, on phantoms or drawn images."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # faster, for images as small as here
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

import kneeoa
import phantoms as drawing
from kneeoa import Config, KneeError, KneeFolder, KneeNet, Xray

PROGRAM = Path(kneeoa.__file__)
SMALL = ["--size", 64, "--width", 8, "--epochs", 4, "--batch", 16, "--lr", 0.02]
COLUMNS = [f"p{grade}" for grade in range(5)]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session") / "phantoms"
    drawing.draw(folder, count=120)
    return folder


@pytest.fixture(scope="session")
def trained(phantoms):
    """The folder of a small run that is finished. Copy it to change it."""
    folder = phantoms.parent / "run"
    assert run("train", "--data", phantoms, "--run", folder, *SMALL) == 0
    return folder


@pytest.fixture(scope="session")
def learned(phantoms):
    """A network that learned in seconds to grade phantoms of size 128."""
    dataset = all_as_both(read(phantoms, 128))
    config = Config(size=128, width=16, epochs=14, batch=15)
    kneeoa.train(dataset, config, phantoms.parent / "learned")
    _, model = kneeoa.load_checkpoint(phantoms.parent / "learned" / "best.pt")
    return model.eval()


def run(*words):
    return kneeoa.main([str(word) for word in words])


def error_of(capsys, *words):
    """Run a command that must fail. Return its one line."""
    capsys.readouterr()
    assert run(*words) == 2
    line = capsys.readouterr().err.rpartition("\r")[2]  # after the progress bars
    assert line.startswith("kneeoa: error: ") and line.count("\n") == 1
    return line


def read(folder, size=64):
    return KneeFolder(folder, kneeoa.find_xrays(folder)[0], size)


def all_as_both(dataset):
    """Train and validate on the same images: a copy of each is in both subsets."""
    double = KneeFolder.__new__(KneeFolder)
    double.images = dataset.images.repeat(2, 1, 1, 1)
    double.grades = dataset.grades.repeat(2)
    double.xrays = [x._replace(subset="train") for x in dataset.xrays]
    double.xrays += [x._replace(subset="val") for x in dataset.xrays]
    return double


def rows(path):
    return kneeoa.read_table(path, next(csv.reader(path.open(encoding="utf-8"))))


def put(root, names):
    """Save an image unlike others, bright in the middle, under each name."""
    x = np.linspace(-1, 1, 64)
    for name in names:
        random = np.random.default_rng(list(os.fsencode(name)))
        blotches = Image.fromarray(random.normal(0, 30, (32, 32))).resize((64, 64))
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        grey = (np.array(blotches) + 180 - 120 * x**2).clip(0, 255)
        Image.fromarray(np.uint8(grey)).save(file)
    return root


def knees(patients, prefix="", start=0):
    """Name two knees of each of so many patients for every grade."""
    numbers = [(g, 1000 * (g + 1) + i) for g in range(5) for i in range(patients)]
    return [f"{prefix}{g}/{start + n}{side}.png" for g, n in numbers for side in "LR"]


def same_bits(one, other, files=("metrics.json", "predictions.csv", "split.csv")):
    """Return whether two finished runs have the same files and weights."""
    equal = [(one / name).read_bytes() == (other / name).read_bytes() for name in files]
    for name in ("best.pt", "last.pt"):
        weights = kneeoa.load_checkpoint(one / name)[1].state_dict()
        others = kneeoa.load_checkpoint(other / name)[1].state_dict()
        equal += [torch.equal(weights[key], others[key]) for key in weights]
    return all(equal)


# ------------------------------------------------------------------ shapes, network


def test_every_layer_has_the_shape_that_the_docstring_of_the_network_says():
    model = KneeNet()
    x = model.halves(torch.zeros(3, 1, 128, 224))
    shapes = [tuple(x.shape)]
    for layer in model.features:
        x = layer(x)
        shapes.append(tuple(x.shape))
    pooled = x.mean((2, 3))
    shapes += [pooled.shape, (3, model.classifier.in_features), model.head(x).shape]
    told = []
    for first, rest in re.findall(r"^ +\((2?N), ([\d, ]+)\) ", KneeNet.__doc__, re.M):
        n = 6 if first == "2N" else 3
        told.append((n, *map(int, rest.split(","))))
    assert told[0] == (3, 1, 128, 224)
    assert set(told[1:]) == {tuple(shape) for shape in shapes}


@pytest.mark.parametrize("size", [64, 97, 224])
def test_an_image_of_any_size_is_cropped_and_graded(size):
    images = torch.zeros(2, 1, size, size, dtype=torch.float16)
    assert kneeoa.predict(KneeNet(width=4), images).shape == (2, 5)


def test_a_knee_and_its_mirror_image_get_the_same_logits(learned, phantoms):
    rows = read(phantoms, 128).images[:9, :, 37:110].float()
    assert torch.allclose(learned(rows), learned(rows.flip(3)), atol=1e-4)


# -------------------------------------------------------------------------- reading

TENT = np.minimum(np.arange(50), 49 - np.arange(50)) * 255 // 24
TENT = np.tile(np.uint8(TENT), (50, 1))


def save_metadata(image, path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    broken = b"Exif\0\0M?\0*\0\0\0\x08\0\x01\x01\x12broken"
    image.save(path, pnginfo=text, exif=broken, icc_profile=b"broken" * 300_000)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "F"])
def test_every_kind_of_file_reads_as_the_same_greys(mode, tmp_path):
    image = Image.fromarray(TENT).convert(mode)
    suffixes = {"F": ("tif",), "CMYK": ("jpg", "tif")}
    for suffix in suffixes.get(mode, ("png", "tif", "webp")):
        image.save(tmp_path / f"knee.{suffix}", quality=95)
    if mode == "L":
        save_metadata(image, tmp_path / "metadata.png")
    for file in tmp_path.iterdir():
        difference = np.abs(kneeoa.read_xray(file, 50).astype(int) - TENT)
        assert difference.max() <= 10 and difference.mean() <= 2, file


@pytest.mark.parametrize("low, high", [(0, 4095), (1000, 60000)])
def test_a_16_bit_image_is_scaled_by_its_own_range(low, high, tmp_path):
    deep = (low + TENT / 255 * (high - low)).astype(np.uint16)
    deep[0, 0] = 65535  # a burnt-out pixel does not set the scale
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = kneeoa.read_xray(tmp_path / "deep.png", 50)[1:]
    assert np.abs(grey.astype(int) - TENT[1:]).max() <= 2


@pytest.mark.parametrize("shape", [(50, 70), (70, 50)])
def test_the_middle_square_is_read_and_never_stretched(shape, tmp_path):
    grey = np.full(shape, 50, np.uint8)
    down, right = (shape[0] - 50) // 2, (shape[1] - 50) // 2
    grey[down : down + 50, right : right + 50] = TENT
    Image.fromarray(grey).save(tmp_path / "knee.png")
    assert np.array_equal(kneeoa.read_xray(tmp_path / "knee.png", 50), TENT)


@pytest.mark.parametrize("margin", [None, 0, 255])
def test_a_negative_is_inverted_whatever_its_margins_and_no_other_image_is(
    margin, phantoms, tmp_path
):
    for file in sorted(phantoms.rglob("*.png"))[::10]:
        grey = np.array(Image.open(file))
        if margin is not None:
            grey[:, :32] = grey[:, -32:] = grey[:20] = margin
        for name, image in (("knee.png", grey), ("negative.png", 255 - grey)):
            Image.fromarray(image).save(tmp_path / name)
            assert np.array_equal(kneeoa.read_xray(tmp_path / name, 224), grey), file


def test_negatives_and_images_of_both_knees_are_counted(phantoms, tmp_path):
    file = next(phantoms.rglob("*.png"))
    grey = np.array(Image.open(file))
    Image.fromarray(255 - grey).save(tmp_path / "negative.png")
    Image.fromarray(np.hstack((grey, grey))).save(tmp_path / "both.png")
    Image.fromarray(grey).save(tmp_path / "knee.png")
    names = sorted(os.listdir(tmp_path))
    dataset = KneeFolder(tmp_path, [Xray(name, 0, name) for name in names], 64)
    assert sorted(dataset.notes) == [
        "1 images are negatives (dark bone), inverted",
        "1 images are very wide: of both knees?",
    ]


# --------------------------------------------------------------------------- copies


def save_copies(file, folder):
    """Save copies of a knee, as people make them. Return their files."""
    image = Image.open(file)
    copies = {
        "resized.jpg": image.resize((182, 182)),
        "mirrored.jpg": image.resize((182, 182)).transpose(0),
        "half.jpg": image.resize((112, 112)),
        "dark.png": image.point(lambda value: 0.6 * value),
    }
    for name, copy in copies.items():
        copy.save(folder / name, quality=90)
    return [folder / name for name in copies]


def test_a_copy_is_of_the_same_patient_and_different_knees_are_no_copies(
    phantoms, tmp_path
):
    data = shutil.copytree(phantoms, tmp_path / "data")
    file = next(data.glob("2/*.png"))
    names = {copy.name for copy in save_copies(file, file.parent)} | {file.name}
    dataset = read(data, 224)
    xrays = kneeoa.join_copies(dataset.xrays, kneeoa.copies_in(dataset))
    assert len({x.patient for x in xrays if Path(x.path).name in names}) == 1
    assert len({x.patient for x in xrays}) == 60  # as many as the phantoms have


def test_a_given_split_with_a_copy_on_both_sides_is_refused(phantoms, tmp_path, capsys):
    for file in phantoms.rglob("*.png"):
        subset = ("train", "val", "test")[int(file.stem[:-1]) % 3]
        target = tmp_path / "data" / subset / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    file = next((tmp_path / "data" / "test" / "3").iterdir())
    for copy in save_copies(file, tmp_path):
        target = shutil.copy(copy, tmp_path / "data" / "train" / "3")
        words = ("split", "--data", tmp_path / "data", "--run", tmp_path / "run")
        line = error_of(capsys, *words)
        assert f"train/3/{copy.name}" in line and file.stem[:-1] in line
        os.remove(target)


def test_copies_of_several_grades_are_left_out(phantoms, tmp_path, capsys):
    data = shutil.copytree(phantoms, tmp_path / "data")
    file = next((data / "4").iterdir())
    shutil.copy(file, data / "3" / "same.png")
    assert run("split", "--data", data, "--run", tmp_path, *SMALL) == 0
    assert "2 of several grades are left out: 3/same.png" in capsys.readouterr().out
    paths = {row["path"] for row in rows(tmp_path / "split.csv")}
    assert len(paths) == 119 and not paths & {"3/same.png", f"4/{file.name}"}


# ------------------------------------------------------------- folders and patients


@pytest.mark.parametrize(
    "names, grade, subset",
    [
        ("0, 0Normal, Healthy, KL 0, none", 0, ""),
        ("Grade II, KLG2, MILD, 2/left/front", 2, ""),
        ("3, KL3, grade_3, Stage 3, 3-Moderate, Moderate OA", 3, ""),
        ("Training/left/1/front, kagglehub/versions/0/train/1", 1, "train"),
        ("valid/4, Validation/severe", 4, "val"),
        ("Testing/4, test/KL-4", 4, "test"),
        ("2nd hospital, 1_train, 0a1b, 10, Healty", None, ""),
        ("versions/1/train/Healty", None, "train"),
    ],
)
def test_the_nearest_folder_that_names_a_grade_tells_it(names, grade, subset):
    for name in names.split(", "):
        _, told_subset, told_grade = kneeoa.place_of(Path(name, "knee.png"))
        assert (told_grade, told_subset) == (grade, subset), name


def test_what_is_passed_over_is_counted_by_folder_and_hidden_files_are_not(tmp_path):
    put(tmp_path, [*knees(1, "train/"), *knees(1, "Testing/", 100)])
    put(tmp_path, ["Testing2/0/a.png", "train/Healty/b.png"])
    put(tmp_path, ["train/@eaDir/0/c.png", "0/._d.png"])
    (tmp_path / "train" / "1" / "scan.dcm").write_text("no image")
    xrays, notes = kneeoa.find_xrays(tmp_path)
    assert Counter(x.subset for x in xrays) == {"train": 10, "test": 10}
    notes = "\n".join(notes)
    assert "1 .png in Testing2/0" in notes and "1 .png in train/Healty" in notes
    assert "1 .dcm in train/1" in notes and "@eaDir" not in notes and "._d" not in notes


@pytest.mark.parametrize(
    "names, patient",
    [
        ("9003175L, 9003175_V00_L, 9003175_00_R, 9003175_LT, L_9003175", "9003175"),
        ("9003175_1", "9003175"),
        ("MB00003_L, Knee 00003 right", "00003"),
        ("17, image17, NormalG0 (1), labeled_KL0_image1, 12Lateral", None),
    ],
)
def test_a_number_beside_a_side_or_a_visit_is_the_patient(names, patient):
    for name in names.split(", "):
        path = Path(f"0/{name}.png")
        assert kneeoa.patient_in(path) == (patient or str(path))


@pytest.mark.parametrize(
    "text", ["image,patient\nb.png,7\n", "\ufeffimage;patient\nfolder/b;7\n"]
)
def test_a_table_of_patients_counts_more_than_the_name(text, tmp_path):
    put(tmp_path / "data", ["0/b.png", "0/12L.png", "0/c.png"])
    (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    xrays, notes = kneeoa.find_xrays(tmp_path / "data", tmp_path / "table.csv")
    assert [x.patient for x in xrays] == ["12", "7", "0/c.png"]
    assert "1 of 3 tell no patient: each is one of its own" in notes
    assert "0/12L.png is read as of patient 12" in notes


# ------------------------------------------------------------------------ splitting


@pytest.fixture(scope="session")
def many():
    """1,000 imagined patients, half of them with two knees, grades as in OSAIL."""
    shares = (0.40, 0.18, 0.26, 0.13, 0.03)
    grades = np.random.default_rng(0).choice(5, 1500, p=shares)
    return [Xray(f"{g}/{i}", int(g), str(i % 1000)) for i, g in enumerate(grades)]


def test_no_patient_is_in_two_subsets(many):
    homes = {(x.patient, x.subset) for x in kneeoa.split_by_patient(many, 0)}
    assert len(homes) == 1000
    assert {subset for _, subset in homes} == {"train", "val", "test"}


def test_every_grade_is_split_70_15_15(many):
    split = kneeoa.split_by_patient(many, 0)
    counts = Counter((x.grade, x.subset) for x in split)
    for grade, total in Counter(x.grade for x in many).items():
        for subset, share in (("train", 0.70), ("val", 0.15), ("test", 0.15)):
            assert abs(counts[grade, subset] - share * total) <= 2


def test_the_split_depends_on_names_and_seed_and_not_on_the_order_of_files(many):
    split = kneeoa.split_by_patient(many, 0)
    assert sorted(kneeoa.split_by_patient(many[::-1], 0)) == sorted(split)
    assert sorted(kneeoa.split_by_patient(many, 1)) != sorted(split)
    # Written down, so that no change of Python or of this program moves a test subset.
    few = [Xray(f"{p % 5}/{p}L", p % 5, str(p)) for p in range(50)]
    tested = [x.patient for x in kneeoa.split_by_patient(few, 0) if x.subset == "test"]
    assert tested == ["4", "10", "13", "23", "26", "27", "37", "41", "45", "49"]


def test_a_split_that_the_folders_give_is_kept(tmp_path):
    put(tmp_path / "data", knees(2, "train/") + knees(1, "val/", 100))
    put(tmp_path / "data", knees(1, "test/", 200))
    assert run("split", "--data", tmp_path / "data", "--run", tmp_path, *SMALL) == 0
    split = rows(tmp_path / "split.csv")
    assert len(split) == 40
    assert all(row["path"].startswith(row["subset"]) for row in split)


def test_without_val_it_is_taken_from_train_by_patient_and_test_is_kept(tmp_path):
    put(tmp_path / "data", knees(8, "train/") + knees(2, "test/", 100))
    assert run("split", "--data", tmp_path / "data", "--run", tmp_path, *SMALL) == 0
    split = rows(tmp_path / "split.csv")
    for row in split:
        assert (row["subset"] == "test") == row["path"].startswith("test/")
    assert len({(row["patient"], row["subset"]) for row in split}) == 50
    val = Counter(row["grade"] for row in split if row["subset"] == "val")
    assert val == dict.fromkeys("01234", 4)  # two of eight patients: nearest to 15 %


def test_the_name_of_any_file_survives_split_csv(tmp_path):
    names = knees(3, 'a "name",\u2028of\ntwo lines/')
    put(tmp_path / "data", names)
    assert run("split", "--data", tmp_path / "data", "--run", tmp_path, *SMALL) == 0
    assert sorted(row["path"] for row in rows(tmp_path / "split.csv")) == sorted(names)


def test_the_split_of_another_data_set_is_named(trained, tmp_path, capsys):
    put(tmp_path, knees(1))
    line = error_of(capsys, "evaluate", "--data", tmp_path, "--run", trained)
    assert "split.csv: 120 of its images are not in" in line and len(line) < 400


def test_split_csv_written_by_hand_is_kept_and_unlisted_images_are_counted(
    trained, phantoms, tmp_path, capsys
):
    lines = (trained / "split.csv").read_text().splitlines()
    data = tmp_path / "flat"  # no folders of grades
    data.mkdir()
    for file in phantoms.rglob("*.png"):
        shutil.copy(file, data)
    lines = [re.sub(r"^\d/", "", line) for line in lines]
    (tmp_path / "split.csv").write_text("\n".join(lines[:-3]))
    assert run("train", "--data", data, "--run", tmp_path, *SMALL, "--epochs", 1) == 0
    assert "3 images are not in" in capsys.readouterr().out


# ---------------------------------------------------------------------------- input


def test_standardize_agrees_with_sliding_windows_of_numpy():
    images = torch.randint(0, 256, (3, 1, 224, 224), dtype=torch.uint8)
    for image, result in zip(images, kneeoa.standardize(images), strict=True):
        around = image[0].double().numpy()
        for _ in range(2):
            padded = np.pad(around, 2, constant_values=np.nan)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
            around = np.nanmean(windows, (2, 3))
        detail = image[0].double().numpy() - around
        wanted = detail / (np.sqrt(np.mean(detail**2)) + 1)
        assert np.allclose(result[0], wanted, atol=1e-4)


@pytest.mark.parametrize(
    "matrix, change",
    [
        ([[1, 0, 0], [0, 1, 0]], lambda x: x),
        ([[-1, 0, 0], [0, 1, 0]], lambda x: x.flip(3)),
        ([[0, 1, 0], [1, 0, 0]], lambda x: x.transpose(2, 3)),
        # Two pixels are 2 * 2 / 70. Beyond the right edge, its last column goes on.
        (
            [[1, 0, 4 / 70], [0, 1, 0]],
            lambda x: F.pad(x, (0, 2, 0, 0), "replicate")[..., 2:],
        ),
        ([[1, 0, 0], [0, 1, -4 / 70]], lambda x: x.roll(2, 2)),
    ],
)
def test_crop_shows_the_rows_of_the_joint_as_the_matrix_says(matrix, change):
    images = torch.rand(3, 1, 70, 70)
    cropped = kneeoa.crop(images, torch.tensor(matrix).float().expand(3, 2, 3))
    assert torch.allclose(cropped, change(images)[:, :, 20:60], atol=1e-4)


def test_augmentation_rotates_scales_stretches_and_shifts_within_its_bounds():
    # What becomes of the coordinates of each pixel tells the matrix that was drawn.
    place = (2 * torch.arange(64) + 1) / 64 - 1
    moved = []
    for coordinate in (place.expand(64, 64), place[:, None].expand(64, 64)):
        torch.manual_seed(0)
        images = coordinate.expand(400, 1, 64, 64)
        moved.append(kneeoa.augment(images, Config())[:, 0, 18:27:8, 32:41:8])
    moved = torch.stack(moved, 1)  # (400, 2, 2, 2): rows 36, 44 and columns 32, 40
    right = 4 * (moved[:, :, 0, 1] - moved[:, :, 0, 0])
    down = 4 * (moved[:, :, 1, 0] - moved[:, :, 0, 0])
    shift = (moved[:, :, 0, 0] - place[32] * right - place[36] * down).abs().max()
    angle = torch.atan2(right[:, 1], right[:, 0]).rad2deg().abs().max()
    scale = (right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0]).sqrt()
    assert 10 < angle < 13.5 and 0.15 < shift < 0.175
    assert 0.8 < scale.min() < 0.88 and 1.14 < scale.max() < 1.25
    assert (right[:, 0] > 0).all()  # never mirrored


def test_predict_is_the_mean_over_a_balanced_test_time_augmentation(learned, phantoms):
    images = read(phantoms, 128).images[:9]
    single = [kneeoa.predict(learned, images, [view]) for view in kneeoa.TTA]
    mean = torch.stack(single).mean(0)
    assert torch.allclose(kneeoa.predict(learned, images), mean, atol=1e-4)
    assert torch.allclose(mean.sum(1), torch.ones(9), atol=1e-4)
    assert np.sum(kneeoa.TTA, 0)[1:].tolist() == [0, 0]


# -------------------------------------------------------------------------- metrics


def test_the_answer_is_the_median_which_has_the_least_expected_error():
    assert kneeoa.decide(torch.tensor([[0.4, 0.3, 0.2, 0.1, 0]])).tolist() == [1]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), 200)
    distance = np.abs(np.arange(5)[:, None] - np.arange(5))
    wanted = (probabilities @ distance).argmin(1)
    assert kneeoa.decide(torch.from_numpy(probabilities)).tolist() == wanted.tolist()


def test_metrics_of_cases_worked_by_hand():
    # Three of grade 0, two right and one called 1; one of grade 4, called 2.
    scores = kneeoa.metrics(kneeoa.confusion_matrix([0, 0, 0, 4], [0, 0, 1, 2]))
    assert scores["accuracy"] == 0.5 and scores["mae"] == 0.75
    assert scores["recall"][0] == pytest.approx(2 / 3)
    assert np.isnan(scores["recall"][1:4]).all() and scores["recall"][4] == 0
    assert scores["balanced_accuracy"] == pytest.approx(1 / 3)  # of grades that occur
    # Squared errors 0 + 0 + 1 + 4 = 5. By chance, each truth meets each answer a
    # quarter of the time: (3 * (0 + 0 + 1 + 4) + (16 + 16 + 9 + 4)) / 4 = 15.
    assert scores["kappa"] == pytest.approx(1 - 5 / 15)
    example = kneeoa.metrics(kneeoa.confusion_matrix([0, 2, 4], [0, 2, 3]))
    assert example["kappa"] == pytest.approx(1 - 1 / 13)  # as its docstring says


def test_kappa_agrees_with_the_concordance_of_lin():
    generator = np.random.default_rng(0)
    true = generator.integers(0, 5, 300)
    predicted = (true + generator.integers(-1, 2, 300)).clip(0, 4)
    covariance = np.cov(true, predicted, bias=True)
    spread = covariance.trace() + (true.mean() - predicted.mean()) ** 2
    kappa = kneeoa.metrics(kneeoa.confusion_matrix(true, predicted))["kappa"]
    assert kappa == pytest.approx(2 * covariance[0, 1] / spread)  # Krippendorff, 1970


def test_intervals_are_those_of_patients_and_not_of_images():
    generator = np.random.default_rng(0)
    true = generator.integers(0, 5, 200)
    predicted = np.where(generator.random(200) < 0.7, true, (true + 1) % 5)
    p = F.one_hot(torch.from_numpy(predicted), 5).float()
    low, high = kneeoa.bootstrap(p, torch.from_numpy(true), range(200))["accuracy"]
    accuracy = (true == predicted).mean()
    error = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 200)  # normal approximation
    assert (low, high) == pytest.approx((accuracy - error, accuracy + error), abs=0.02)
    four = torch.from_numpy(true).repeat(4)  # four equal knees are no more evidence
    again = kneeoa.bootstrap(p.repeat(4, 1), four, [*range(200)] * 4)["accuracy"]
    assert again[1] - again[0] == pytest.approx(high - low, rel=0.15)


# ------------------------------------------------------------------------- training


def test_a_tiny_set_is_overfit(phantoms, tmp_path):
    xrays = [x for x in kneeoa.find_xrays(phantoms)[0] if x.path.endswith("L.png")]
    ten = [[x for x in xrays if x.grade == g][i] for g in range(5) for i in range(2)]
    dataset = all_as_both(KneeFolder(phantoms, ten, 64))
    still = dict.fromkeys(("rotate", "scale", "stretch", "shift", "dropout"), 0.0)
    config = Config(size=64, width=16, epochs=60, batch=10, **still)
    kneeoa.train(dataset, config, tmp_path)
    model = kneeoa.load_checkpoint(tmp_path / "best.pt")[1]
    images, grades = dataset[dataset.subset("val")]
    probabilities = kneeoa.predict(model, images, [(1, 0, 0)])  # as they were shown
    assert kneeoa.decide(probabilities).tolist() == grades.tolist()


def test_batch_is_what_it_says_and_only_training_images_are_augmented(
    phantoms, tmp_path
):
    seen = {True: [], False: []}

    def look(module, inputs):
        if isinstance(module, KneeNet):
            seen[module.training].append(inputs[0].clone())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    config = Config(size=64, width=4, epochs=3, batch=50)
    kneeoa.train(all_as_both(read(phantoms)), config, tmp_path)
    hook.remove()
    assert [len(batch) for batch in seen[True]] == [50] * 6  # of 120, 20 are left out
    images = {image.numpy().tobytes() for image in torch.cat(seen[True])}
    assert len(images) == 300  # augmented anew in each epoch
    images = {image.numpy().tobytes() for image in torch.cat(seen[False])}
    assert len(images) == 120  # the same in each epoch


def test_the_best_epoch_is_the_one_of_highest_validation_kappa(phantoms, tmp_path):
    dataset = all_as_both(read(phantoms))
    torch.manual_seed(3)
    dataset.grades[120:] = dataset.grades[120:][torch.randperm(120)]  # kappa is random
    config = Config(size=64, width=4, epochs=6, lr=0.03)
    history = kneeoa.train(dataset, config, tmp_path)
    kappas = [row["val_kappa"] for row in history]
    checkpoint, model = kneeoa.load_checkpoint(tmp_path / "best.pt")
    assert kappas[len(checkpoint["history"]) - 1] == max(kappas) > min(kappas)
    images, grades = dataset[dataset.subset("val")]
    again = kneeoa.evaluate(kneeoa.predict(model, images, kneeoa.TTA[:1]), grades)
    assert again["kappa"] == pytest.approx(max(kappas))  # the weights are of that epoch


def test_the_same_seed_gives_the_same_bits_and_test_images_have_no_part_in_training(
    trained, phantoms, tmp_path
):
    for row in rows(trained / "split.csv"):
        if row["subset"] != "test":
            target = tmp_path / "data" / row["subset"] / row["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(phantoms / row["path"], target)
    words = ["train", "--data", tmp_path / "data", "--run", tmp_path / "run", *SMALL]
    subprocess.run([sys.executable, PROGRAM, *map(str, words)], check=True)
    assert same_bits(tmp_path / "run", trained, files=[])


def test_a_run_that_was_killed_again_and_again_ends_with_the_same_bits(
    trained, phantoms, tmp_path
):
    words = ["train", "--data", phantoms, "--run", tmp_path, *SMALL]
    program = """if True:
        import itertools, os, sys, kneeoa
        name, last = sys.argv.pop(1), int(sys.argv.pop(1))
        calls, replace = itertools.count(1), os.replace
        def kill(part, path):
            now = str(path).endswith(name) and next(calls) == last
            os.kill(os.getpid(), 9) if now else replace(part, path)
        os.replace = kill
        kneeoa.main()"""
    for name, times in (("best.pt", 1), ("last.pt", 2), ("history.csv", 2)):
        process = [sys.executable, "-c", program, name, times, *words]
        ended = subprocess.run(
            map(str, process), cwd=PROGRAM.parent, capture_output=True
        )
        assert ended.returncode == -9
    assert run(*words) == 0
    assert same_bits(tmp_path, trained) and len(rows(tmp_path / "history.csv")) == 4


def test_a_run_is_not_gone_on_with_under_other_settings_or_images(
    trained, phantoms, tmp_path, capsys
):
    words = ["train", "--data", phantoms, "--run", trained, *SMALL]
    assert "begun with lr 0.02" in error_of(capsys, *words, "--lr", 0.01)
    data = shutil.copytree(phantoms, tmp_path / "data")
    path = next(
        r["path"] for r in rows(trained / "split.csv") if r["subset"] == "train"
    )
    put(data, [path])
    line = error_of(capsys, "train", "--data", data, "--run", trained, *SMALL)
    assert "other images" in line


def test_a_run_goes_on_where_images_differ_in_the_last_bits(
    trained, phantoms, tmp_path
):
    folder = shutil.copytree(trained, tmp_path / "run")  # as of more threads, or a GPU
    last = torch.load(folder / "last.pt")
    last["thumbnails"] += 1e-5
    torch.save(last, folder / "last.pt")
    assert run("train", "--data", phantoms, "--run", folder, *SMALL) == 0


def test_a_trained_network_is_a_start_for_other_images_but_not_a_test_of_the_same(
    trained, phantoms, tmp_path, capsys
):
    drawing.draw(tmp_path / "others", count=90, seed=1)
    words = [*SMALL, "--weights", trained / "best.pt", "--run", tmp_path / "run"]
    assert run("train", "--data", tmp_path / "others", *words) == 0
    first = float(rows(tmp_path / "run" / "history.csv")[0]["val_kappa"])
    assert first > float(rows(trained / "history.csv")[0]["val_kappa"])
    words[-1] = tmp_path / "again"
    line = error_of(capsys, "train", "--data", phantoms, *words, "--seed", 1)
    assert "which was in training" in line


# ------------------------------------------------------- what a run leaves, looking


def test_a_run_leaves_the_files_and_columns_that_are_promised(trained):
    split, predictions = rows(trained / "split.csv"), rows(trained / "predictions.csv")
    assert ",".join(split[0]) == "path,grade,patient,subset" and len(split) == 120
    head = (trained / "history.csv").read_text().splitlines()[0]
    assert head == (
        "epoch,train_loss,train_accuracy,val_loss,val_accuracy,val_kappa,lr,seconds"
    )
    assert {*predictions[0]} == {"path", "grade", "predicted", *COLUMNS}
    tested = {row["path"] for row in split if row["subset"] == "test"}
    assert {row["path"] for row in predictions} == tested
    result = json.loads((trained / "metrics.json").read_text())
    promised = "n accuracy balanced_accuracy kappa mae recall confusion subset epoch"
    promised += " majority_accuracy intervals parameters"
    assert set(promised.split()) <= set(result)
    right = [row["grade"] == row["predicted"] for row in predictions]
    assert result["accuracy"] == pytest.approx(np.mean(right))
    assert not list(trained.glob("*.part"))


def test_every_file_of_a_run_can_be_read_again(trained, tmp_path, phantoms):
    folder = shutil.copytree(trained, tmp_path / "run")
    assert run("plot", "--data", phantoms, "--run", folder) == 0
    assert min(Image.open(folder / "report.png").size) > 600
    for name in ("best.pt", "last.pt"):
        checkpoint, _ = kneeoa.load_checkpoint(folder / name)
        assert Config(**checkpoint["config"]) == Config(64, 16, 4, 0.02, width=8)


def test_the_test_subset_waits_until_training_is_finished(
    trained, phantoms, tmp_path, capsys
):
    folder = shutil.copytree(trained, tmp_path / "run")
    last = torch.load(folder / "last.pt")
    last["history"].pop()
    torch.save(last, folder / "last.pt")
    assert run("evaluate", "--data", phantoms, "--run", folder) == 0
    assert "looks too good" in capsys.readouterr().out
    assert json.loads((folder / "metrics.json").read_text())["subset"] == "val"


def test_the_heat_of_a_trained_network_lies_at_the_joint_and_is_mirrored_with_it(
    learned, phantoms
):
    images, grades = read(phantoms, 128)[:]
    _, heat = kneeoa.grad_cam(learned, images, grades)
    assert heat.shape == (120, 73, 128) and heat.min() >= 0
    assert heat.max() == pytest.approx(1)
    assert heat[:, 17:47].sum() > 0.5 * heat.sum()  # the joint is in less than half
    mirrored = kneeoa.grad_cam(learned, images.flip(3), grades)[1]
    assert np.abs(mirrored[..., ::-1] - heat).mean() < 0.01


def test_seconds_of_training_are_enough_to_grade_phantoms_never_seen(learned, tmp_path):
    drawing.draw(tmp_path / "others", count=60, seed=1)
    images, grades = read(tmp_path / "others", 128)[:]
    assert kneeoa.evaluate(kneeoa.predict(learned, images), grades)["kappa"] > 0.85


# ------------------------------------------------------------------------- commands


def test_evaluate_external_writes_the_same_form_and_refuses_what_training_has_seen(
    trained, phantoms, tmp_path, capsys
):
    folder = shutil.copytree(trained, tmp_path / "run")
    known = next(r for r in rows(folder / "split.csv") if r["subset"] == "train")
    data = put(tmp_path / "knees", [*knees(2)[:16], "0/1000001L.png"])
    assert run("evaluate", "--external", data, "--run", folder) == 0
    assert "none of them was in training" in capsys.readouterr().out
    own = json.loads((folder / "metrics.json").read_text())
    result = json.loads((folder / "external_knees.json").read_text())
    assert result.keys() == own.keys() and result["n"] == 17
    assert result["recall"][4] is None  # JSON has no NaN
    assert len(rows(folder / "external_knees.csv")) == 17
    other = shutil.copytree(data, tmp_path / "other" / "knees")
    line = error_of(capsys, "evaluate", "--external", other, "--run", folder)
    assert f"external_knees.json: is of {data}, rename it" in line
    image = Image.open(phantoms / known["path"]).resize((182, 182))
    image.save(data / "0" / "unknown.jpg", quality=90)
    line = error_of(capsys, "evaluate", "--external", data, "--run", folder)
    assert "unknown.jpg" in line and known["path"] in line and "1 of 18" in line


def test_predict_agrees_with_evaluate(trained, phantoms, tmp_path, capsys):
    predictions = rows(trained / "predictions.csv")
    paths = [phantoms / row["path"] for row in predictions]
    files = ["--csv", tmp_path / "table.csv", "--heatmap", tmp_path / "heat.png"]
    assert run("predict", "--run", trained, *paths, *files) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "grade", "name", *COLUMNS]
    again = rows(tmp_path / "table.csv")
    for line, row, other in zip(lines, predictions, again, strict=True):
        path, grade, name, *numbers = line.split()
        assert path == other["path"] and path.endswith(row["path"])
        assert grade == row["predicted"] == str(kneeoa.GRADES.index(name))
        for number, column in zip(numbers, COLUMNS, strict=True):
            assert float(number) == pytest.approx(float(row[column]), abs=2e-3)
    assert min(Image.open(tmp_path / "heat.png").size) > 500
    (tmp_path / "empty").mkdir()
    line = error_of(capsys, "predict", "--run", trained, tmp_path / "empty")
    assert "has no images in it" in line


def test_tune_compares_by_validation_tests_nothing_and_repeats_no_training(
    phantoms, tmp_path
):
    words = ["tune", "--data", phantoms, "--run", tmp_path, *SMALL[:4], "--epochs", 1]
    assert run(*words, "--lr", 0.001, 0.03) == 0
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("last.pt")}
    assert run(*words, "--lr", 0.001, 0.03, 0.01) == 0
    assert len(before) == 2
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    kappas = [float(row["val_kappa"]) for row in rows(tmp_path / "tune.csv")]
    assert len(kappas) == 3 and kappas == sorted(kappas, reverse=True)
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize(
    "command",
    [
        "split",
        "train --size 64 --epochs 1",
        "tune --size 64 --epochs 1 --width 4 5 --lr 1e-3 3e-3",
        "--help",
        "tune --help",
    ],
)
def test_everything_printed_fits_80_columns(
    command, phantoms, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    Path("phantoms").symlink_to(phantoms)
    with contextlib.suppress(SystemExit):  # of --help
        assert run(*command.split()) == 0
    printed = re.split(r"[\r\n]", "\n".join(capsys.readouterr()))
    assert [line for line in printed if len(line) > 80] == []


def test_the_readme_example_runs(phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("phantoms").symlink_to(phantoms)
    readme = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
    exec(readme.split("```python")[1].split("```")[0], {})
    assert Path("runs/notebook/report.png").exists()


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "words, told",
    [
        ("train --epochs 0", "must be from 1 to 10000"),
        ("train --lr nan", "--lr"),
        ("train --size 63", "--size"),
        ("train --width x", "--width"),
        ("train --colour red", "--colour"),
        ("tune --lr 0.001 99", "--lr 99.0: must be from"),
        ("train --data nothing", "nothing: cannot be listed"),
        ("train --data knees.zip", "Not a directory"),
        ("train --device cuda:99", "cuda:99"),
        ("train --device meta", "meta"),
        ("train --device hpu", "hpu"),
        ("predict x.png --run nothing", "nothing"),
        ("plot --run nothing", "nothing"),
        ("split --data empty", "0 data sets"),
        ("split --data two", "such as 0 to 4 (left, right)"),
        ("split --data three", "grade 3 has too few patients to split: 0"),
        ("split --data few", "grade 4 has too few patients"),
        ("split --data dates", "names of files were read wrongly"),
        ("split --data leak", "of patient 1000"),
        ("split --data broken", "cut.png"),
        ("split --data broken", "text.jpg"),
        ("split --data broken", "phone.jpg: is unreadable (it is HEIC"),
        ("split --data only", "grade 0 has too few patients to split: 0"),
        ("split --data four --run knees.zip/run", "knees.zip"),
        ("split --data four --patients no.csv", "no.csv"),
        ("split --data four --patients wrong.csv", "wrong.csv"),
        ("split --data four --patients none.csv", "it has no rows"),
        ("split --data four --patients other.csv", "9E+06"),
        ("split --data four --patients twice.csv", "two patients"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing_behind(
    words, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = words.split()[2]
    names = {
        "two": ["left/0/x.png", "right/0/x.png"],
        "three": [name for name in knees(3) if name < "3"],
        "few": [name for name in knees(4) if name < "4/5002"],
        "dates": [f"{g}/{g}_left_{i}.png" for g in range(5) for i in range(4)],
        "leak": knees(3, "train/") + knees(1, "val/"),
        "only": knees(3, "test/"),
        "broken": knees(1),
        "four": knees(4),
    }
    Path("empty").mkdir()
    Path("knees.zip").write_bytes(b"PK")
    Path("wrong.csv").write_text("picture,person\na,b\n")
    Path("none.csv").write_text("image,patient\n")
    Path("other.csv").write_text("image,patient\n9E+06,7\n")
    Path("twice.csv").write_text("image,patient\n1000L,7\na/1000L.png,8\n")
    put(Path(folder), names.get(folder, []))
    if folder == "broken":
        whole = Path("broken/0/1000L.png").read_bytes()
        Path("broken/1/cut.png").write_bytes(whole[: len(whole) // 2])
        Path("broken/2/text.jpg").write_text("I am an image")
        Path("broken/3/phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert told in error_of(capsys, *words.split())
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, capsys):
    put(tmp_path, knees(1))
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("3"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    line = error_of(capsys, "split", "--data", tmp_path)
    assert f"{tmp_path / '3'}: cannot be listed" in line


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
@pytest.mark.parametrize("kind", ["missing", "cut", "foreign", "hostile"])
def test_a_bad_checkpoint_is_named_and_runs_no_code(
    kind, name, trained, phantoms, tmp_path, capsys
):
    path = shutil.copytree(trained, tmp_path / "run") / name
    content = {
        "cut": path.read_bytes()[:2000],
        "foreign": b"PK\3\4 no checkpoint",
        "hostile": f"cos\nsystem\n(S'touch {tmp_path}/pwned'\ntR.".encode(),
    }
    path.unlink() if kind == "missing" else path.write_bytes(content[kind])
    line = error_of(capsys, "plot", "--data", phantoms, "--run", path.parent)
    assert name in line and not (tmp_path / "pwned").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this limit")
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(
    phantoms, tmp_path, capsys
):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        line = error_of(capsys, "split", "--data", phantoms, "--run", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "split.csv" in line and "space" in line and not list(tmp_path.iterdir())


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(phantoms, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = ["train", "--data", phantoms, "--run", tmp_path, *SMALL, "--epochs", 500]
    command = [sys.executable, PROGRAM, *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert "the same command goes on" in err.splitlines()[-1]


# ------------------------------------------------------------- machine, make, GPU


def test_auto_goes_on_with_the_cpu_where_the_gpu_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ones = torch.ones

    def fail(*size, device=None):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image\nmore")
        return ones(*size, device=device)

    monkeypatch.setattr(torch, "ones", fail)
    assert kneeoa.pick_device("auto").type == "cpu"
    note = capsys.readouterr().out
    assert "no kernel image" in note and "more" not in note
    with pytest.raises(KneeError, match="no kernel image"):
        kneeoa.pick_device("cuda")


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_has_a_target_for_every_command_and_works_in_a_notebook(tmp_path):
    for name in ("Makefile", "kneeoa.py"):
        shutil.copy(PROGRAM.with_name(name), tmp_path)
    (tmp_path / "my data").mkdir()
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}

    def made(*words, python="echo"):
        command = ["make", "--silent", "-C", tmp_path, f"PYTHON={python}", *words]
        return subprocess.check_output(command, text=True, env=os.environ | backend)

    for name in kneeoa.COMMANDS:
        assert made(name, "DATA=my data") == f"kneeoa.py {name} --data my data\n"
    assert made("train").splitlines()[0] == "phantoms.py phantoms"
    assert made("test") == "-m pytest -q test_kneeoa.py\n"
    assert "usage" in made("plot", "ARGS=--help", python=sys.executable)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_trains_as_the_cpu_does_and_is_waited_for_at_no_step(phantoms, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        dataset = KneeFolder(phantoms, kneeoa.find_xrays(phantoms)[0], 64, device)
        dataset = all_as_both(dataset)
        config = Config(size=64, width=8, epochs=2, batch=8, dropout=0.0)
        switch = torch.cuda.set_sync_debug_mode
        switch("warn")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            history = kneeoa.train(dataset, config, tmp_path / device)
        switch("default")
        losses.append(history[-1]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    waits = sum("synchroniz" in str(warning.message) for warning in told)
    assert waits < 30  # at 30 steps
