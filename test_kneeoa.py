"""What kneeoa promises, one test a promise. All of it runs on phantoms or small drawn pictures."""

import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on pictures as small as here, more threads are slower
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import kneeoa
from kneeoa import Config, KneeError, KneeFolder, KneeNet, Xray

pytestmark = pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # a user should see none
PROGRAM = Path(kneeoa.__file__)
SMALL = ["--size", "64", "--width", "8", "--epochs", "4", "--batch", "16", "--lr", "0.02"]
TINY = dict(size=64, width=8)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all") / "phantoms"
    assert run("phantoms", "--data", folder, "--count", 90) == 0
    return folder


@pytest.fixture(scope="session")
def trained(phantoms):
    """The folder of a small finished run. Copy it to change it."""
    assert run("train", "--data", phantoms, "--run", phantoms.parent / "run", *SMALL) == 0
    return phantoms.parent / "run"


@pytest.fixture(scope="session")
def learned(phantoms):
    """A network that a few seconds of training taught to grade phantoms."""
    dataset, folder = KneeFolder(phantoms, size=128), phantoms.parent / "learned"
    kneeoa.train(dataset, dataset, Config(size=128, width=16, epochs=14, batch=15), folder)
    return kneeoa.load_checkpoint(folder / "best.pt")[1]


def run(*words):
    return kneeoa.main([str(word) for word in words])


def command(*words):
    return [sys.executable, str(PROGRAM), *map(str, words)]


def error_of(capsys, *words):
    """Run a command that has to fail, and return its one line."""
    capsys.readouterr()
    assert run(*words) == 2
    line = capsys.readouterr().err.rpartition("\r")[2]  # after the progress bars
    assert line.startswith("kneeoa: error: ") and line.endswith("\n") and line.count("\n") == 1
    return line


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def put(path, grey=None, seed=None):
    """Save a picture. Without `grey` it is noise that differs from path to path, bright in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if grey is None:
        grey = np.random.default_rng(seed or list(os.fsencode(path))).integers(0, 100, (40, 40))
        grey[:, 10:30] += 100
    Image.fromarray(np.uint8(grey)).save(path)
    return path


def folder_of(root, names):
    for name in names:
        put(root / name)
    return root


def knees(patients, prefix="", start=0):
    """Name two knees of each of so many patients for every grade."""
    numbers = range(start, start + patients)
    return [f"{prefix}{g}/{1000 * (g + 1) + i}{side}.png" for g in range(5) for i in numbers for side in "LR"]


def unfinished(trained, folder):
    """Copy a run as if its last epoch was still to come."""
    last = torch.load(shutil.copytree(trained, folder) / "last.pt")
    last["history"].pop()
    torch.save(last, folder / "last.pt")
    return folder


def answers(model, dataset):
    """Return the grades without test-time augmentation."""
    return kneeoa.decide(kneeoa.predict(model, dataset.images, kneeoa.TTA[:1]).softmax(1))


def same_bits(one, other, files=("metrics.json", "predictions.csv", "split.csv")):
    """Tell whether two finished runs have the same weights and files."""
    equal = [(one / name).read_bytes() == (other / name).read_bytes() for name in files]
    for name in ("best.pt", "last.pt"):
        models = [kneeoa.load_checkpoint(folder / name)[1].state_dict() for folder in (one, other)]
        equal += [torch.equal(weights, models[1][key]) for key, weights in models[0].items()]
    return all(equal)


# ------------------------------------------------------------------------------------------------ reading

TENT = np.tile(np.rint(np.minimum(np.arange(50), np.arange(50)[::-1]) * 255 / 24), (50, 1)).astype(np.uint8)


@pytest.mark.parametrize("name, mode", [
    ("grey.png", "L"), ("colour.png", "RGB"), ("alpha.png", "RGBA"), ("grey-alpha.png", "LA"),
    ("palette.png", "P"), ("frame.gif", "P"), ("photo.jpg", "L"), ("photo.jfif", "L"), ("print.jpg", "CMYK"),
    ("web.webp", "RGB"), ("scan.tif", "L"), ("float.tif", "F"), ("scan.bmp", "L")])
def test_every_kind_of_picture_reads_as_the_same_greys(name, mode, tmp_path):
    Image.fromarray(TENT).convert(mode).save(tmp_path / name, quality=95)
    assert np.abs(kneeoa.read_xray(tmp_path / name, 50).astype(int) - TENT).max() <= 4


@pytest.mark.parametrize("low, high", [(0, 4095), (1000, 60000)])
def test_a_16_bit_picture_is_scaled_by_its_own_range(low, high, tmp_path):
    deep = (low + TENT * ((high - low) / 255)).astype(np.uint16)
    deep[0, 0] = 65535  # a burnt-out pixel does not set the scale
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.abs(kneeoa.read_xray(tmp_path / "deep.png", 50)[1:].astype(int) - TENT[1:]).max() <= 1


@pytest.mark.parametrize("height, width", [(40, 70), (70, 40)])
def test_of_a_picture_that_is_not_square_the_middle_square_is_read(height, width, tmp_path):
    grey = np.random.default_rng(0).integers(0, 100, (height, width))
    grey[:, 15:-15] += 100
    middle = grey[height // 2 - 20 : height // 2 + 20, width // 2 - 20 : width // 2 + 20]
    assert np.array_equal(kneeoa.read_xray(put(tmp_path / "knee.png", grey), 40), middle)


def test_a_negative_is_turned_and_an_ordinary_knee_is_not(phantoms, tmp_path):
    for file in phantoms.rglob("*.png"):
        grey = np.asarray(Image.open(file))
        for picture in (file, put(tmp_path / "negative.png", 255 - grey)):
            assert np.array_equal(kneeoa.read_xray(picture, 224), grey), picture


@pytest.mark.parametrize("words", ["split", "predict data --run run"])
def test_negatives_wide_and_grey_pictures_are_counted(words, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    folder_of(Path("data"), knees(4))
    put(Path("data/0/dark.png"), 255 - np.asarray(Image.open(put(Path("bright.png")))))
    put(Path("data/1/both.png"), np.hstack((TENT[:20, 25:], TENT[:20, :25])))  # dark between two knees
    put(Path("data/2/blank.png"), np.full((40, 40), 77))
    assert run(*words.split()) == 0
    out = capsys.readouterr().out
    for told in (r"1 negative.*dark\.png", r"1 very wide.*both\.png", r"1 of one grey.*blank\.png"):
        assert re.search(f"^{told}", out, re.MULTILINE), told


# ------------------------------------------------------------------------- folders, layouts and patients
@pytest.mark.parametrize("names", [
    *([f"{word}{grade}" for grade in range(5)] for word in ("", "KL", "grade_", "class ", "OSAIL/Labeled/")),
    ["0Normal", "1Doubtful", "2-mild", "3_moderate", "4 severe"],
    ["Normal", "Doubtful", "Mild", "Moderate", "Severe"],
    ["NONE", "doubtful", "minimal", "moderate", "severe"],
], ids=",".join)
def test_the_grade_is_what_the_folder_says_and_never_its_alphabetical_rank(names, tmp_path):
    found = kneeoa.find_xrays(folder_of(tmp_path, [f"{name}/x.png" for name in names]))
    assert {x.path: x.grade for x in found} == {f"{name}/x.png": grade for grade, name in enumerate(names)}


@pytest.mark.parametrize("name", [
    "B0_Inference/y.png", "10/y.png", "5/y.png", "Unlabeled/y.png", "0/._x.png", "0/.thumbnails/y.png",
    "0/@eaDir/x.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/0/y.png", "__MACOSX/0/y.png"])
def test_what_tells_no_grade_hidden_files_and_thumbnails_are_passed_over(name, tmp_path):
    folder_of(tmp_path, [*(f"{g}/x.png" for g in range(5)), name])
    assert [x.path for x in kneeoa.find_xrays(tmp_path)] == [f"{g}/x.png" for g in range(5)]


def test_files_of_other_suffixes_are_counted_in_one_line(tmp_path, capsys):
    pictures = ["0/a.webp", "0/x.png", "1/b.JFIF", "1/x.png", "2/x.png", "3/x.png", "4/x.png"]
    folder_of(tmp_path, pictures)
    for name in ("1/c.dcm", "2/d.dcm", "3/notes.txt"):
        (tmp_path / name).write_text("no picture")
    assert [x.path for x in kneeoa.find_xrays(tmp_path)] == pictures
    line, = capsys.readouterr().out.splitlines()
    assert "2 .dcm" in line and "1 .txt" in line


def test_symbolic_links_to_folders_are_followed(tmp_path):
    folder_of(tmp_path, ["elsewhere/zero/y.png", "elsewhere/more/z.png", "data/1/x.png"])
    (tmp_path / "data" / "0").symlink_to(tmp_path / "elsewhere" / "zero")
    (tmp_path / "data" / "1" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    assert [x.path for x in kneeoa.find_xrays(tmp_path / "data")] == ["0/y.png", "1/linked/z.png", "1/x.png"]


def test_the_patient_is_that_of_the_patients_file_then_of_the_name_then_the_picture_itself(tmp_path):
    patients = {"a": "7", "1L": "7", "9003175L": "9003175", "9003175_R_v00": "9003175", "007 left (2)": "007",
                "b": None, "12Lateral": None, "12": None, "1996-05-02L": None, "knee7L": None}
    table = tmp_path / "p.csv"
    table.write_text("image, patient\na.png, 7\n1L.png,7 \n007 left (2).png,\n", encoding="utf-8-sig")  # as Excel
    found = kneeoa.find_xrays(folder_of(tmp_path / "data", [f"0/{name}.png" for name in patients]), table)
    assert {x.path: x.patient for x in found} == {
        f"0/{name}.png": patient or f"0/{name}.png" for name, patient in patients.items()}


@pytest.mark.parametrize("text", ["", "image,patient\n", "picture,person\na.png,7\n"])
def test_a_patients_file_without_patients_is_refused(text, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(KneeError, match="table.csv: no table of image,patient"):
        kneeoa.find_xrays(folder_of(tmp_path / "data", ["0/a.png"]), tmp_path / "table.csv")


# ---------------------------------------------------------------------------------------------- splitting
@pytest.fixture(scope="session")
def many():
    """1,000 imagined patients, half of them with two pictures, grades as unequal as in OSAIL."""
    grades = np.random.default_rng(0).choice(5, 1500, p=(0.40, 0.18, 0.26, 0.13, 0.03))
    return [Xray(f"{grade}/{i}.png", int(grade), str(i % 1000)) for i, grade in enumerate(grades)]


def test_no_patient_is_in_two_subsets(many):
    homes = {(x.patient, x.subset) for x in kneeoa.split_by_patient(many, 0)}
    assert len(homes) == 1000 and {subset for _, subset in homes} == {"train", "val", "test"}


def test_every_grade_is_split_70_15_15(many):
    counts = Counter((x.grade, x.subset) for x in kneeoa.split_by_patient(many, 0))
    for grade, total in Counter(x.grade for x in many).items():
        for subset, share in (("train", 0.70), ("val", 0.15), ("test", 0.15)):
            assert abs(counts[grade, subset] - share * total) <= 2, (grade, subset)


def test_the_split_depends_on_names_and_seed_and_not_on_the_order_of_files(many):
    split = kneeoa.split_by_patient(many, 0)
    assert sorted(kneeoa.split_by_patient(many[::-1], 0)) == sorted(split)
    assert sorted(kneeoa.split_by_patient(many, 1)) != sorted(split)
    # Written down, so that no change of Python, NumPy or this program moves a test subset unnoticed.
    few = kneeoa.split_by_patient([Xray(f"{p % 5}/{p}L.png", p % 5, str(p)) for p in range(50)], 0)
    assert [int(x.patient) for x in few if x.subset == "test"] == [0, 4, 17, 19, 20, 23, 31, 32, 33, 41]


@pytest.mark.parametrize("subsets, told", [
    ("train val test", "train, val, test as the folders give them"), ("Train Valid TEST", "train, val, test"),
    ("training validation Test", "train, val, test"), ("train val", "train, val as the folders give them")])
def test_a_split_that_the_folders_give_is_kept_and_told(subsets, told, tmp_path, capsys):
    subset_of = dict(zip(subsets.split(), ("train", "val", "test")))
    for i, name in enumerate(subset_of):
        folder_of(tmp_path, knees(2, f"{name}/", 100 * i))
    split, _ = kneeoa.make_split(tmp_path, 0)
    assert told in capsys.readouterr().out and len(split) == 20 * len(subset_of)
    assert all(x.subset == subset_of[x.path.split("/")[0]] for x in split)


def test_folders_of_grades_beside_a_given_split_are_passed_over(tmp_path, capsys):
    folder_of(tmp_path, knees(2, "set/train/") + knees(2, "set/val/", 100) + knees(2, "set/auto_test/", 100))
    split, _ = kneeoa.make_split(tmp_path, 0)
    assert len(split) == 40 and not any("auto_test" in x.path for x in split)
    assert "passed over: 20 in other folders" in capsys.readouterr().out


def test_without_val_it_is_taken_from_train_by_patient_and_test_is_kept(tmp_path, capsys):
    folder_of(tmp_path, knees(20, "train/") + knees(2, "test/", 100))
    split, _ = kneeoa.make_split(tmp_path, 0)
    assert "val, taken from train" in capsys.readouterr().out
    assert all((x.subset == "test") == x.path.startswith("test/") for x in split)
    assert len({(x.patient, x.subset) for x in split}) == 110
    assert Counter(x.grade for x in split if x.subset == "val") == dict.fromkeys(range(5), 6)  # 15 % of 40


@pytest.mark.parametrize("name", ["1000L.png", "picture.png"])
def test_pictures_in_two_given_subsets_are_refused_and_counted(name, tmp_path):
    folder_of(tmp_path, knees(3, "train/") + knees(3, "val/", 100))
    for i, subset in ((1, "train"), (2, "train"), (1, "test"), (2, "test")):
        put(tmp_path / subset / "0" / f"{i}{name}", seed=i)
    with pytest.raises(KneeError, match="2 pictures are in two subsets"):
        kneeoa.make_split(tmp_path, 0)


@pytest.mark.parametrize("names, told", [
    ([], "0 data sets with folders 0 to 4.*nothing"), (["left/x.png", "right/x.png"], "left, right"),
    ([f"{g}/x.png" for g in (0, 1, 2)], r"grades \[3, 4\].*GRADES"),
    (knees(2, "A/train/") + knees(4, "B/"), "2 data sets.*A, B"),
    (knees(4) + knees(2, "old/train/", 100), "2 data sets.*old"),
    (knees(3, "train/") + knees(3, "val/", 2), "5 patients are in two subsets"),
    ([name for name in knees(4) if name < "4/5002"], "grade 4: 2 patients"),
], ids=["empty", "foreign", "fewer grades", "several", "backup", "patient twice", "few patients"])
def test_a_folder_that_cannot_be_split_is_refused_with_what_was_found(names, told, tmp_path):
    with pytest.raises(KneeError, match=told):
        kneeoa.make_split(folder_of(tmp_path, names), 0)


@pytest.mark.parametrize("kept, others, told", [
    ("4/1001L.png", ["4/1001L (1).png"], "1 duplicates"), ("4/92L.png", ["4/9 copy.bmp"], "1 duplicates"),
    ("4/labeled_KL4_image1.png", ["4/labeled_KL4_image1 (1).png", "4/me.png"], "2 duplicates"),
    ("", ["1/9100L.png", "2/9101L.png"], "2 equal, but of several grades")])
def test_of_duplicates_the_one_that_tells_the_patient_is_kept_and_none_of_several_grades(
        kept, others, told, tmp_path):
    folder_of(tmp_path, knees(4))
    for name in (kept or others[0], *others):
        put(tmp_path / name, seed=1)
    split, notes = kneeoa.make_split(tmp_path, 0)
    assert {x.path for x in split} | {""} == {*knees(4), kept, ""}
    assert any(told in note and others[-1] in note for note in notes)


# ----------------------------------------------------------------------------------------------- data set
def test_a_data_set_holds_standardized_pictures_and_is_indexed_by_an_int_a_slice_or_a_tensor(phantoms):
    xrays = kneeoa.find_xrays(phantoms)
    dataset = KneeFolder(phantoms, xrays, 64)
    image, grade = dataset[3]
    grey = torch.tensor(kneeoa.read_xray(phantoms / xrays[3].path, 64))[None, None]
    assert grade == xrays[3].grade and torch.allclose(image[None], kneeoa.standardize(grey), atol=0.01)
    assert torch.equal(dataset[2:6][0][1], image) and torch.equal(dataset[torch.tensor([7, 3])][0][1], image)


# ------------------------------------------------------------------------------------------------ network
def test_a_knee_and_its_mirror_image_get_the_same_logits(learned, phantoms):
    images = KneeFolder(phantoms, size=128).images[:9].float()
    assert torch.allclose(learned(images), learned(images.flip(3)), atol=1e-4)


@pytest.mark.parametrize("size, top, bottom", [(97, 28, 83), (224, 64, 192)])
def test_the_rows_of_the_joint_get_the_logits_of_the_whole_picture(size, top, bottom, learned, phantoms):
    images = KneeFolder(phantoms, size=size).images[:9].float()
    assert torch.equal(learned(images[:, :, top:bottom]), learned(images))


def test_a_traced_network_takes_batches_of_another_size(learned):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of tracing as such
        traced = torch.jit.trace(learned, torch.randn(2, 1, 64, 64))
    images = torch.randn(7, 1, 64, 64)
    assert torch.allclose(traced(images), learned(images), atol=1e-5)


# -------------------------------------------------------------------------------------------------- input
def around(x, reach):
    for _ in range(2):
        padded = np.pad(x, reach, constant_values=np.nan)
        x = np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2), (2, 3))
    return x


@pytest.mark.parametrize("size, reach", [(224, 2), (64, 1)])
def test_standardize_agrees_with_sliding_windows_of_numpy(size, reach):
    images = torch.randint(0, 256, (3, 1, size, size), dtype=torch.uint8)
    for image, standardized in zip(images[:, 0].double().numpy(), kneeoa.standardize(images)[:, 0].numpy()):
        detail = image - around(image, reach)
        variance = around(detail**2, reach)
        wanted = detail / (0.35 * variance**0.5 + 0.65 * variance.mean() ** 0.5 + 1)
        assert np.allclose(standardized, wanted, atol=1e-4)


@pytest.mark.parametrize("matrix, change", [
    ([[1, 0, 0], [0, 1, 0]], lambda x: x), ([[-1, 0, 0], [0, 1, 0]], lambda x: x.flip(3)),
    ([[0, 1, 0], [1, 0, 0]], lambda x: x.transpose(2, 3)),
    # Two pixels are 2 * 2 / 64. At the right edge, the last column goes on.
    ([[1, 0, 4 / 64], [0, 1, 0]], lambda x: torch.cat((x[..., 2:], x[..., -1:], x[..., -1:]), 3)),
    ([[1, 0, 0], [0, 1, -4 / 64]], lambda x: x.roll(2, 2)),
], ids=["as it is", "mirrored", "turned", "to the right", "up"])
def test_crop_shows_the_rows_of_the_joint_as_the_matrix_says(matrix, change):
    images, matrices = torch.rand(3, 1, 64, 64), torch.tensor(matrix).float().expand(3, 2, 3)
    assert torch.allclose(kneeoa.crop(images, matrices), change(images)[:, :, 18:55], atol=1e-4)


def test_augmentation_turns_scales_shifts_and_mirrors_within_its_bounds():
    place, moved = (2 * torch.arange(64) + 1) / 64 - 1, []  # what becomes of the coordinates of each pixel
    for coordinate in (place.expand(64, 64), place[:, None].expand(64, 64)):
        torch.manual_seed(0)
        moved.append(kneeoa.augment(coordinate.expand(400, 1, 64, 64))[:, 0, :, 32:41:8])
    moved = torch.stack(moved, 1)[:, :, 18:27:8]  # (400, 2, 2, 2): rows 36 and 44, columns 32 and 40
    across, down = 4 * (moved[:, :, 0, 1] - moved[:, :, 0, 0]), 4 * (moved[:, :, 1, 0] - moved[:, :, 0, 0])
    shift = moved[:, :, 0, 0] - place[32] * across - place[36] * down
    matrix = torch.stack((across, down), 2)
    angle, scale = torch.atan2(-matrix[:, 0, 1], matrix[:, 1, 1]).rad2deg(), matrix.det().abs().sqrt()
    assert 10 < angle.abs().max() < 13.1 and 0.15 < shift.abs().max() < 0.175
    assert 0.8 < scale.min() < 0.87 and 1.15 < scale.max() < 1.25
    assert 150 < (matrix[:, 0, 0] < 0).sum() < 250  # about half are mirrored
    assert 0.07 < (matrix[:, 0].norm(dim=1) / matrix[:, 1].norm(dim=1)).log().abs().max() < 0.09  # stretched
    assert (matrix[:, 0] * matrix[:, 1]).sum(1).abs().max() < 1e-4  # right angles stay: nothing is sheared


def test_predict_is_the_mean_over_a_small_and_balanced_test_time_augmentation(learned, phantoms):
    images, views = KneeFolder(phantoms, size=128).images[:9], kneeoa.TTA
    single = [kneeoa.predict(learned, images, views[i : i + 1]) for i in range(len(views))]
    assert torch.allclose(kneeoa.predict(learned, images), torch.stack(single).mean(0), atol=1e-4)
    assert all(not torch.allclose(single[0], other, atol=0.01) for other in single[1:])
    assert (views - torch.eye(2, 3)).abs().max() < 0.085  # at most half of what training has seen
    assert views[:, :, 2].sum(0).tolist() == [0, 0]


# ----------------------------------------------------------------------------------- decision and metrics
def test_the_decision_costs_least_where_two_grades_off_cost_half_as_much_again_as_one():
    # For .4, .3, .3: grade 0 costs .3 + .3 * 1.516 = .755, 1 costs .4 + .3 = .700, 2 .4 * 1.516 + .3 = .906.
    assert kneeoa.decide(torch.tensor([[0.4, 0.3, 0.3, 0, 0]])).tolist() == [1]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), 200)
    for own, grade in zip(probabilities, kneeoa.decide(torch.from_numpy(probabilities))):
        costs = [sum(p * abs(answer - true) ** 0.6 for true, p in enumerate(own)) for answer in range(5)]
        assert grade == np.argmin(costs)


def test_metrics_of_a_case_worked_by_hand():
    # Three of grade 0, two right and one called 1; one of grade 4, called 2.
    scores = kneeoa.metrics(kneeoa.confusion_matrix([0, 0, 0, 4], [0, 0, 1, 2]))
    assert scores["accuracy"] == 0.5 and scores["mae"] == 0.75
    assert scores["recall"][0] == pytest.approx(2 / 3) and np.isnan(scores["recall"][1:4]).all()
    assert scores["balanced_accuracy"] == pytest.approx(1 / 3)  # over the two grades that occur
    # Squared errors 0 + 0 + 1 + 4 = 5. By chance each truth meets each answer a quarter of the time:
    # (3 * (0 + 0 + 1 + 4) + (16 + 16 + 9 + 4)) / 4 = 15. So kappa is 1 - 5 / 15.
    assert scores["kappa"] == pytest.approx(1 - 5 / 15)


def test_kappa_agrees_with_the_concordance_of_lin():
    random = np.random.default_rng(0)
    true = random.integers(0, 5, 300)
    predicted = (true + random.integers(-1, 2, 300)).clip(0, 4)
    covariance = np.cov(true, predicted, bias=True)
    spread = covariance[0, 0] + covariance[1, 1] + (true.mean() - predicted.mean()) ** 2
    kappa = kneeoa.metrics(kneeoa.confusion_matrix(true, predicted))["kappa"]
    assert kappa == pytest.approx(2 * covariance[0, 1] / spread)  # Krippendorff, 1970


def test_intervals_are_those_of_patients_and_not_of_pictures():
    random = np.random.default_rng(0)
    true = random.integers(0, 5, 200)
    predicted = np.where(random.random(200) < 0.7, true, (true + 1) % 5)
    low, high = kneeoa.bootstrap(true, predicted, list(range(200)))["accuracy"]
    accuracy = (true == predicted).mean()
    error = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 200)  # the normal approximation
    assert (low, high) == pytest.approx((accuracy - error, accuracy + error), abs=0.015)
    four = kneeoa.bootstrap(true.repeat(4), predicted.repeat(4), np.arange(200).repeat(4))["accuracy"]
    assert four[1] - four[0] == pytest.approx(high - low, rel=0.1)  # four equal knees are no more evidence


# ----------------------------------------------------------------------------------------------- training
@pytest.fixture
def steps():
    """The learning rate of each step, and the first convolution's weights after it."""
    made = []

    def look(optimizer, *_):
        group = optimizer.param_groups[0]
        made.append((group["lr"], group["params"][0].detach().clone()))

    hook = register_optimizer_step_post_hook(look)
    yield made
    hook.remove()


def test_the_best_epoch_is_the_one_of_highest_validation_kappa(phantoms, tmp_path):
    xrays = kneeoa.find_xrays(phantoms)
    train_set, val_set = KneeFolder(phantoms, xrays[::2], 64), KneeFolder(phantoms, xrays[1::2], 64)
    shuffled = torch.randperm(45, generator=torch.Generator().manual_seed(2))
    val_set.grades = val_set.grades[shuffled]  # so that kappa goes up and down
    history = kneeoa.train(train_set, val_set, Config(**TINY, epochs=8, lr=0.03), tmp_path)
    kappas = [epoch.val_kappa for epoch in history]
    best, model = kneeoa.load_checkpoint(tmp_path / "best.pt")
    assert kappas[len(best["history"]) - 1] == max(kappas) > min(kappas)
    scores = kneeoa.metrics(kneeoa.confusion_matrix(val_set.grades, answers(model, val_set)))
    assert scores["kappa"] == pytest.approx(max(kappas), abs=0.05)  # the weights are those of that epoch


def test_the_weights_that_are_kept_are_the_ema_of_all_steps(phantoms, tmp_path, steps):
    dataset = KneeFolder(phantoms, size=64)
    kneeoa.train(dataset, dataset, Config(**TINY, epochs=1), tmp_path)
    kept, n = next(kneeoa.load_checkpoint(tmp_path / "best.pt")[1].parameters()), len(steps)
    # Of ema += (new - ema) * 4 / (i + 3) at step i, this share is left after step n. All add up to 1.
    shares = [4 * i * (i + 1) * (i + 2) / (n * (n + 1) * (n + 2) * (n + 3)) for i in range(1, n + 1)]
    assert n == 11 and sum(shares) == pytest.approx(1)
    assert torch.allclose(kept, sum(share * weights for share, (_, weights) in zip(shares, steps)))


def test_the_learning_rate_rises_for_a_quarter_of_the_steps_and_then_falls_to_0(phantoms, tmp_path, steps):
    dataset = KneeFolder(phantoms, size=64)
    kneeoa.train(dataset, dataset, Config(**TINY, epochs=4, lr=0.01), tmp_path)
    rates = [rate for rate, _ in steps]
    assert len(rates) == 44 and max(rates) == pytest.approx(0.01, rel=0.03)  # 4 epochs of 11 batches of 8
    assert rates[:11] == sorted(rates[:11]) and rates[0] < 0.002
    assert rates[11:] == sorted(rates[11:], reverse=True) and 0 <= rates[-1] < 1e-4
    assert rates[27] == pytest.approx(0.005, rel=0.05)  # half of it, halfway down


def test_a_soft_label_gives_less_to_a_grade_the_farther_away_it_is():
    # By hand, for grade 2: e^(-4/0.5), e^(-1/0.5), 1, e^(-1/0.5), e^(-4/0.5), divided by their sum.
    weights = [math.exp(-8), math.exp(-2), 1, math.exp(-2), math.exp(-8)]
    assert kneeoa.soft_labels(0.5)[2].tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert torch.equal(kneeoa.soft_labels(0.0), torch.eye(5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_the_temperature_makes_the_probabilities_honest(temperature):
    greys, slopes, bias = 3 * torch.randn(4000, 1), torch.linspace(-2, 2, 5), torch.linspace(1, -1, 5)
    grades = torch.multinomial((greys * slopes + bias).softmax(1), 1)[:, 0]
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.add_module("classifier", torch.nn.Linear(1, 5))
    model.classifier.weight.data, model.classifier.bias.data = temperature * slopes[:, None], temperature * bias
    dataset = SimpleNamespace(images=greys[:, :, None, None].expand(4000, 1, 8, 8), grades=grades)
    calibrated = kneeoa.validate(model, dataset, kneeoa.soft_labels(0.5))[1]
    assert torch.allclose(calibrated["classifier.weight"][:, 0], slopes, rtol=0.1)
    assert torch.allclose(calibrated["classifier.bias"], bias, rtol=0.1)
    assert torch.equal(model.classifier.bias, temperature * bias)  # the network itself is not changed


def test_a_tiny_set_is_overfit(phantoms, tmp_path):
    xrays = kneeoa.find_xrays(phantoms)
    dataset = KneeFolder(phantoms, [next(x for x in xrays if x.grade == g) for g in range(5)] * 2, 64)
    config = Config(size=64, width=16, epochs=60, batch=10, dropout=0.0, augment=0.0, lr=5e-3)
    kneeoa.train(dataset, dataset, config, str(tmp_path))  # the name of a folder will do
    model = kneeoa.load_checkpoint(tmp_path / "best.pt")[1]
    assert answers(model, dataset).tolist() == dataset.grades.tolist()


def test_training_pictures_alone_are_augmented_and_every_epoch_trains_in_train_mode(phantoms, tmp_path):
    dataset, seen = KneeFolder(phantoms, size=64), {True: [], False: []}

    def look(module, inputs):
        if isinstance(module, KneeNet):
            seen[module.training].extend(x.numpy().tobytes() for x in inputs[0])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    kneeoa.train(dataset, dataset, Config(**TINY, epochs=3), tmp_path)
    hook.remove()
    assert len(set(seen[True])) == len(seen[True]) == 3 * 88  # eleven batches of 8, never the same again
    assert len(seen[False]) == 3 * 90 and len(set(seen[False])) == 90


def test_the_same_seed_gives_the_same_bits_in_another_process(trained, phantoms, tmp_path):
    words = command("train", "--data", phantoms, "--run", tmp_path, *SMALL)
    subprocess.run(words, check=True, capture_output=True)
    assert same_bits(tmp_path, trained)


@pytest.fixture(scope="session")
def killed(phantoms):
    """A run that was killed three times, each time as it was about to replace another file."""
    words = ["train", "--data", phantoms, "--run", phantoms.parent / "killed", *SMALL]
    program = """if True:
        import itertools, os, sys, kneeoa
        name, last, calls, replace = sys.argv.pop(1), int(sys.argv.pop(1)), itertools.count(1), os.replace
        def kill(part, path):
            now = str(path).endswith(name) and next(calls) == last
            os.kill(os.getpid(), 9) if now else replace(part, path)
        os.replace = kill
        kneeoa.main()"""
    for name, times in (("best.pt", 1), ("last.pt", 2), ("history.csv", 3)):
        process = [sys.executable, "-c", program, name, *map(str, (times, *words))]
        assert subprocess.run(process, cwd=PROGRAM.parent, capture_output=True).returncode == -9
    assert run(*words) == 0
    return phantoms.parent / "killed"


def test_a_run_that_was_killed_again_and_again_ends_with_the_same_bits(killed, trained):
    assert same_bits(killed, trained) and len(rows(killed / "history.csv")) == 4


def test_a_run_is_not_continued_with_other_settings_or_pictures(trained, phantoms, tmp_path, capsys):
    words = ["train", "--data", phantoms, "--run", trained, *SMALL]
    assert "with lr 0.02" in error_of(capsys, *words, "--lr", "0.01")
    path = next(row["path"] for row in rows(trained / "split.csv") if row["subset"] == "train")
    put(shutil.copytree(phantoms, tmp_path / "other") / path)
    assert "pictures" in error_of(capsys, "train", "--data", tmp_path / "other", "--run", trained, *SMALL)
    assert str(trained) in error_of(capsys, "split", "--data", phantoms, "--run", trained)


def test_two_processes_that_train_into_one_run_at_once_both_end_well(phantoms, tmp_path):
    words = command("train", "--data", phantoms, "--run", tmp_path, *SMALL, "--epochs", "20")
    quiet = subprocess.DEVNULL
    processes = [subprocess.Popen(words, stdout=quiet, stderr=quiet) for _ in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(rows(tmp_path / "history.csv")) == 20 and not list(tmp_path.glob("*.part*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_trains_and_predicts_as_the_cpu_does(phantoms, tmp_path):
    losses, logits = [], []
    for device in ("cpu", "cuda"):
        dataset = KneeFolder(phantoms, size=64, device=device)
        history = kneeoa.train(dataset, dataset, Config(**TINY, epochs=2, dropout=0.0), tmp_path / device)
        losses.append([history[-1].train_loss, history[-1].val_loss])
        model = kneeoa.load_checkpoint(tmp_path / "cpu" / "best.pt", device)[1]
        logits.append(kneeoa.predict(model, dataset.images).cpu())
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and torch.allclose(*logits, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_waited_for_at_no_step(phantoms, tmp_path, monkeypatch):
    dataset, switch = KneeFolder(phantoms, size=64, device="cuda"), torch.cuda.set_sync_debug_mode
    augment, validate = kneeoa.augment, kneeoa.validate
    # Between epochs a GPU may be waited for, and nothing else tells where an epoch's steps end.
    monkeypatch.setattr(kneeoa, "augment", lambda *words: switch("warn") or augment(*words))
    monkeypatch.setattr(kneeoa, "validate", lambda *words: switch("default") or validate(*words))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kneeoa.train(dataset, dataset, Config(**TINY, epochs=4, batch=4), tmp_path)
    waits = sum("synchroniz" in str(warning.message) for warning in told)
    assert 4 <= waits <= 8  # once or twice in an epoch of 22 steps, to read its sums


# --------------------------------------------------------------------------------------------- evaluation
def test_the_test_subset_has_no_part_in_training(trained, phantoms, tmp_path):
    for row in rows(trained / "split.csv"):
        if row["subset"] != "test":
            target = tmp_path / "data" / row["subset"] / row["path"]
            put(target, np.asarray(Image.open(phantoms / row["path"])))
    assert run("train", "--data", tmp_path / "data", "--run", tmp_path / "run", *SMALL) == 0
    assert same_bits(tmp_path / "run", trained, files=[])


def test_the_test_subset_waits_until_training_is_finished(trained, phantoms, tmp_path, capsys):
    folder = unfinished(trained, tmp_path / "run")
    assert run("evaluate", "--data", phantoms, "--run", folder) == 0
    assert "flatters" in capsys.readouterr().out
    assert json.loads((folder / "metrics.json").read_text())["subset"] == "val"


def test_a_run_leaves_the_files_and_columns_that_are_promised(trained):
    split, predictions = rows(trained / "split.csv"), rows(trained / "predictions.csv")
    assert ",".join(split[0]) == "path,grade,patient,subset" and len(split) == 90
    assert (trained / "history.csv").read_text().startswith(
        "epoch,train_loss,train_accuracy,val_loss,val_accuracy,val_kappa,lr,seconds\n")
    assert ",".join(predictions[0]) == "path,grade,predicted,p0,p1,p2,p3,p4"
    assert {row["path"] for row in predictions} == {row["path"] for row in split if row["subset"] == "test"}
    result = json.loads((trained / "metrics.json").read_text())
    assert set(result) == {"n", "accuracy", "balanced_accuracy", "kappa", "mae", "recall", "confusion",
                           "majority_accuracy", "intervals", "subset", "epoch", "parameters"}
    assert result["accuracy"] == np.mean([row["grade"] == row["predicted"] for row in predictions])
    best = max(rows(trained / "history.csv"), key=lambda row: (float(row["val_kappa"]), -float(row["val_loss"])))
    assert result["epoch"] == int(best["epoch"])
    assert not list(trained.glob("*.part*"))


def test_evaluate_external_writes_the_same_form_and_says_that_none_was_trained_on(trained, tmp_path, capsys):
    folder, names = shutil.copytree(trained, tmp_path / "run"), [*knees(3)[:24], "3/1L.png"]  # no grade 4
    data = folder_of(tmp_path / "elsewhere", names)
    assert run("evaluate", "--external", data, "--run", folder) == 0
    out, text = capsys.readouterr().out, (folder / "external_elsewhere.json").read_text()
    assert "none of them was trained on" in out
    assert "always grade" in out and "always grade 3" not in out  # the usual grade is that of training
    result, own = json.loads(text), json.loads((folder / "metrics.json").read_text())
    assert result.keys() == own.keys() and result["subset"] == "external" and result["n"] == 25
    assert result["recall"][4] is None and "NaN" not in text  # JSON has no NaN
    graded = rows(folder / "external_elsewhere.csv")
    assert {row["path"] for row in graded} == set(names) and set(graded[0]) >= {"grade", "predicted", "p4"}
    assert (folder / "metrics.json").read_bytes() == (trained / "metrics.json").read_bytes()


@pytest.mark.parametrize("subset", ["train", "val"])
@pytest.mark.parametrize("known", ["patient", "picture"])
def test_evaluate_external_refuses_what_training_has_seen(known, subset, trained, phantoms, tmp_path, capsys):
    path = next(row["path"] for row in rows(trained / "split.csv") if row["subset"] == subset)
    data = folder_of(tmp_path / "data", [*knees(2), *([path] if known == "patient" else [])])
    if known == "picture":
        shutil.copy(phantoms / path, data / path[0] / "unknown.png")
    line = error_of(capsys, "evaluate", "--external", data, "--run", trained)
    assert "training" in line and not list(trained.glob("external*"))


# ------------------------------------------------------------------------------------------------ looking
def test_the_report_draws_the_history_of_the_run(trained, phantoms, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda own, *a, **b: figures.append(own) or save(own, *a, **b))
    assert run("plot", "--data", phantoms, "--run", trained) == 0
    drawn = [line.get_ydata() for ax in figures[0].axes for line in ax.lines]
    for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
        wanted = [float(row[name]) for row in rows(trained / "history.csv")]
        assert any(len(curve) == 4 and np.allclose(curve, wanted) for curve in drawn), name
    assert min(Image.open(trained / "report.png").size) > 600


def test_the_heat_of_a_trained_network_lies_at_the_joint_and_is_mirrored_with_the_picture(learned, phantoms):
    images, grades = KneeFolder(phantoms, size=128)[:]
    heat = kneeoa.grad_cam(learned, images, grades)
    assert heat.shape == (90, 128, 128) and heat.min() >= 0 and heat.max() == pytest.approx(1)
    assert heat[:, 54:84].sum() > 0.5 * heat.sum()  # around the joint of phantoms, a quarter of the picture
    assert (kneeoa.grad_cam(learned, images.flip(3), grades).flip(2) - heat).abs().mean() < 0.01


# ----------------------------------------------------------------------------------------------- phantoms
def test_seconds_of_training_are_enough_to_grade_phantoms_never_seen(learned, tmp_path):
    assert run("phantoms", "--data", tmp_path / "others", "--count", 100, "--seed", 1) == 0
    others = KneeFolder(tmp_path / "others", size=128)
    assert kneeoa.metrics(kneeoa.confusion_matrix(others.grades, answers(learned, others)))["kappa"] > 0.85


# ------------------------------------------------------------------------------------ commands and errors
@pytest.mark.parametrize("words", [
    "--help", "split", "train --size 64 --epochs 1", "evaluate --run run", "evaluate --run unfinished",
    "evaluate --run run --external knees", "plot --run run", "predict knees --run run"])
def test_everything_printed_fits_80_columns(words, trained, phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    Path("phantoms").symlink_to(phantoms)
    shutil.copytree(trained, "run")
    unfinished(trained, Path("unfinished"))
    folder_of(Path("knees"), [f"{g}/of no patient.png" for g in range(5)])
    with contextlib.suppress(SystemExit):  # of --help
        assert run(*words.split()) == 0
    assert [line for line in re.split(r"[\r\n]", "\n".join(capsys.readouterr())) if len(line) > 80] == []


def test_predict_agrees_with_evaluate(trained, phantoms, capsys):
    predictions = rows(trained / "predictions.csv")
    assert run("predict", "--run", trained, *(phantoms / row["path"] for row in predictions)) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "grade", "name", "p0", "p1", "p2", "p3", "p4"]
    for line, row in zip(lines, predictions, strict=True):
        path, grade, name, *told = line.split()
        assert path.endswith(row["path"]) and grade == row["predicted"] == str(kneeoa.GRADES.index(name))
        assert [float(p) for p in told] == pytest.approx([float(row[f"p{g}"]) for g in range(5)], abs=2e-3)


@pytest.mark.parametrize("words", ["knees", "knees/a.png knees/b.png knees/more"])
def test_predict_takes_files_and_folders(words, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(Path("knees"), ["a.png", "b.png", "more/c.png", ".hidden.png"])
    assert run("predict", "--run", trained, *words.split()) == 0
    graded = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert graded == ["file", "knees/a.png", "knees/b.png", "knees/more/c.png"]


def test_tune_ranks_by_validation_tests_nothing_and_repeats_no_training(phantoms, tmp_path, capsys):
    words = ["tune", "--data", phantoms, "--run", tmp_path, *SMALL[:4], "--epochs", 1, "--lr"]
    assert run(*words, 0.001, 0.03) == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("last.pt")}
    assert run(*words, 0.001, 0.03, 0.01) == 0
    assert len(before) == 2 and all(file.stat().st_mtime_ns == then for file, then in before.items())
    kappas = {row["lr"]: float(row["val_kappa"]) for row in rows(tmp_path / "tune.csv")}
    table, _, told = capsys.readouterr().out.rpartition("kneeoa.py train ")
    ranked = [line.split()[0] for line in table.splitlines() if line.startswith("0.0")][-3:]
    assert [kappas[lr] for lr in ranked] == sorted(kappas.values(), reverse=True)
    assert f"--lr {ranked[0]}" in told and "--size 64" in told and "--epochs" not in told
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize("words, told", [
    ("train --epochs 0", "--epochs 0: must be from 1 to 10000"), ("train --lr nan", "--lr nan: must be"),
    ("train --size 63", "--size 63: must be"), ("train --batch 1", "--batch 1: must be"),
    ("train --width 3", "--width 3: must be"), ("train --width x", "--width"), ("dance", "dance"),
    ("train --epochs many", "--epochs"), ("train --colour red", "--colour"), ("train --data non", "non"),
    ("train --device cuda:99", "cuda:99"), ("predict x.png --run non", "non"), ("phantoms --count 59", "59")])
def test_a_mistake_ends_in_one_line_and_status_2(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in error_of(capsys, *words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nothing.png", "empty"])
def test_predict_names_what_is_not_there_and_advises_to_remove_nothing(name, trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = error_of(capsys, "predict", tmp_path / name, "--run", trained)
    assert name in line and "remove" not in line


def test_all_broken_pictures_are_named_in_one_line(tmp_path, capsys):
    broken = folder_of(tmp_path / "data", knees(4)) / "2"
    for name, data in (("cut.png", put(broken / "cut.png").read_bytes()[:300]), ("empty.png", b""),
                       ("text.jpg", b"I am a picture"), ("random.png", np.random.default_rng(0).bytes(5000))):
        (broken / name).write_bytes(data)
    Image.new("1", (20000, 20000)).save(broken / "bomb.png")  # 400 million pixels in 50 kB
    line = error_of(capsys, "train", "--data", tmp_path / "data", "--run", tmp_path / "run")
    assert all(name in line for name in ("cut.png", "empty.png", "text.jpg", "random.png", "bomb.png"))
    assert "3000L" not in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:2000]),
    lambda path: torch.save({"state_dict": {}}, path), lambda path: torch.save([1, 2, 3], path),
    lambda path: shutil.copy(path.with_name("best.pt" if path.name == "last.pt" else "last.pt"), path),
    lambda path: path.write_bytes(f"cos\nsystem\n(S'touch {path}.pwned'\ntR.".encode()),  # runs a command
], ids=["missing", "truncated", "foreign", "list", "swapped", "hostile"])
@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_bad_checkpoint_is_named_and_runs_no_code(spoil, name, trained, phantoms, tmp_path, capsys):
    spoil(shutil.copytree(trained, tmp_path / "run") / name)
    assert name in error_of(capsys, "plot", "--data", phantoms, "--run", tmp_path / "run")
    assert not list(tmp_path.rglob("*.pwned"))


@pytest.mark.filterwarnings("default:Glyph")  # fonts without Chinese signs
def test_file_names_of_every_kind_work_all_through(phantoms, tmp_path, monkeypatch, capsys):
    strange = ["a b", 'quo"te', "com,ma", "new\nline", "knäe-膝", "-dash", "$_$", "\udcff"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(phantoms, "my data")
    for i, file in enumerate(sorted(Path("my data").rglob("*.png"))):
        file.rename(file.with_name(f"{strange[i % 8]}{i}.png"))
    assert run("train", "--data", "my data", *SMALL) == 0
    told = shlex.split(capsys.readouterr().out.split("next: ")[1])
    assert told[1] == "kneeoa.py" and run(*told[2:]) == 0 and Path("runs/my data/report.png").exists()
    images = [Path("my data") / row["path"] for row in rows("runs/my data/predictions.csv")]
    assert run("predict", "--run", "runs/my data", "--heatmap", "heat.png", "--", *images) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")
@pytest.mark.parametrize("kind, more, told", [
    ("FSIZE", 1000, "split.csv: .*space"), ("AS", 10**8, "memory is full")], ids=["disk", "memory"])
def test_a_full_disk_or_memory_ends_in_one_line(kind, more, told, phantoms, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    limit = getattr(resource, f"RLIMIT_{kind}")
    before = resource.getrlimit(limit)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(limit, (more + in_use * (kind == "AS"), before[1]))  # the kernel refuses more
    try:
        line = error_of(capsys, "train", "--data", phantoms, "--run", tmp_path, "--size", 1024)
    finally:
        resource.setrlimit(limit, before)
    assert re.search(told, line) and not list(tmp_path.glob("*.part*"))


def test_a_table_that_another_program_holds_open_is_named(phantoms, tmp_path, monkeypatch, capsys):
    replace = os.replace

    def refuse(part, path):
        if Path(path).name == "history.csv":  # as Windows does while Excel shows it
            raise PermissionError(13, "Permission denied", str(part), None, str(path))
        replace(part, path)

    monkeypatch.setattr(os, "replace", refuse)
    line = error_of(capsys, "train", "--data", phantoms, "--run", tmp_path, *SMALL)
    assert str(tmp_path / "history.csv") in line and "close" in line and ".part" not in line


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(phantoms, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    words = command("train", "--data", phantoms, "--run", tmp_path, "--size", "64", "--epochs", "500")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert "the same command goes on" in err.splitlines()[-1]


def test_a_pipe_that_closes_ends_in_silence_and_the_run_goes_on_later(trained, phantoms, tmp_path):
    words = ["train", "--data", phantoms, "--run", tmp_path, *SMALL]
    pipe, environment = subprocess.PIPE, os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command(*words), stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert not re.search("error|exception|traceback|disk|space", err, re.IGNORECASE), err
    assert run(*words) == 0 and same_bits(tmp_path, trained)


def test_letters_that_the_terminal_lacks_do_no_harm(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert run("predict", put(tmp_path / "膝.png"), "--run", trained) == 0


def test_a_split_that_was_made_without_the_patients_file_is_refused(trained, phantoms, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text(f"image,patient\n{Path(rows(trained / 'split.csv')[0]['path']).name},7\n")
    words = ["train", "--data", phantoms, "--run", trained, *SMALL]
    assert "made without" in error_of(capsys, *words, "--patients", table)


def test_a_split_without_validation_is_refused(trained, phantoms, tmp_path, capsys):
    split = (trained / "split.csv").read_text()
    (tmp_path / "split.csv").write_text(re.sub(r"[^\n]*,val\r?\n", "", split))
    assert "no val" in error_of(capsys, "train", "--data", phantoms, "--run", tmp_path, *SMALL)


def test_the_snippet_of_the_readme_runs(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(phantoms, "phantoms")
    readme = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
    exec(readme.split("```python")[1].split("```")[0], {})
    assert re.search(r"tensor\(\[[0-4]\]\) tensor\(\[\[", capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------- make
@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_has_a_target_for_every_command_and_takes_another_python(tmp_path):
    shutil.copy(PROGRAM.with_name("Makefile"), tmp_path)

    def made(*words):
        words = ["make", "--silent", "PYTHON=echo", *words]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    for name in ("phantoms", "split", "train", "evaluate", "plot", "predict", "tune"):
        assert made(name) == f"kneeoa.py {name}"
    assert made("plot", "DATA=my data", "RUN=a run") == "kneeoa.py plot --data my data --run a run"
    assert made("test") == "-m pytest -q test_kneeoa.py"
