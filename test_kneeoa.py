"""What kneeoa promises, one test a promise. All of it runs on phantoms, with no network and no display;
where there is a GPU, the program takes it, and two more tests are of that."""

import csv
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import kneeoa
from kneeoa import Config, KneeError, KneeFolder, KneeNet, Xray

SMALL = ["--size", "64", "--widths", "8,16", "--epochs", "2", "--batch", "16"]
PROGRAM = Path(kneeoa.__file__)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all") / "phantoms"
    kneeoa.make_phantoms(folder, 90)
    return folder


@pytest.fixture(scope="session")
def trained(phantoms):
    """The folder of a finished small run. Tests may look at it, and must not change it."""
    run = phantoms.parent / "run"
    assert kneeoa.main(["train", "--data", str(phantoms), "--run", str(run), *SMALL]) == 0
    return run


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def xray_file(path, value=None, size=(40, 30)):
    """Writes a small grey picture, of noise that is seeded by its path unless a grey is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(str(path).encode())).integers(0, 256, size[::-1])
    Image.fromarray(np.uint8(noise if value is None else np.full(size[::-1], value))).save(path)
    return path


def folder_of(root, names):
    for name in names:
        xray_file(root / name)
    return root


def patient_names(patients, prefix="", start=0):
    """Two knees each of as many patients for every grade, as paths."""
    return [f"{prefix}{g}/{1000 * (g + 1) + start + i}{side}.png" for g in range(5) for i in range(patients) for side in "LR"]


# ---------------------------------------------------------------------------------------------------------------- reading


def test_every_kind_of_8_bit_picture_reads_as_the_same_greys(tmp_path):
    ramp = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))
    grey = Image.fromarray(ramp)
    kinds = {"L": grey, "RGB": grey.convert("RGB"), "RGBA": grey.convert("RGBA"), "LA": grey.convert("LA"),
             "P": grey.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)}
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
        assert np.abs(kneeoa.read_xray(tmp_path / f"{name}.png", 50).astype(int) - ramp).max() <= 1, name


def test_a_16_bit_picture_keeps_its_greys(tmp_path):
    ramp = np.tile(np.linspace(1000, 9000, 100), (100, 1)).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    read = kneeoa.read_xray(tmp_path / "deep.png", 100)[50].astype(int)
    assert read[0] == 0 and read[-1] == 255 and abs(read[50] - 128) <= 3  # Pillow's convert("L") makes all of it 255
    assert (np.diff(read) >= 0).all() and len(set(read)) > 90


def test_what_shines_through_is_black(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert kneeoa.read_xray(tmp_path / "clear.png", 8).max() == 0


def test_proportions_are_kept_by_padding(tmp_path):
    Image.new("L", (100, 50), 200).save(tmp_path / "wide.png")
    read = kneeoa.read_xray(tmp_path / "wide.png", 80)
    assert read.shape == (80, 80) and read.dtype == np.uint8
    assert (read[20:60] == 200).all() and read[:20].max() == 0 and read[60:].max() == 0


def test_a_photograph_turned_by_its_exif_orientation_is_turned_back(tmp_path):
    image = Image.fromarray(np.uint8([[0] * 60 + [255] * 40] * 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = kneeoa.read_xray(tmp_path / "turned.jpg", 100)
    assert read[10].mean() < 20 and read[90].mean() > 235


def test_the_grade_is_the_leading_digit_and_never_the_alphabetical_rank(tmp_path):
    names = ["1Doubtful/a.png", "2 mild/b.png", "3-moderate/c.png", "0Normal/d.png", "4Severe/e.png"]
    found = kneeoa.find_xrays(folder_of(tmp_path, names))
    assert {x.path: x.grade for x in found} == {name: int(name[0]) for name in names}


def test_what_is_no_picture_or_no_grade_is_passed_over(tmp_path, capsys):
    folder_of(tmp_path, [f"{g}/x.png" for g in range(5)] + ["0/.hidden.png", "0/._x.png", "10/y.png", "Unlabeled/z.png"])
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        (tmp_path / "1" / name).write_text("no picture")
    assert [x.path for x in kneeoa.find_xrays(tmp_path)] == [f"{g}/x.png" for g in range(5)]
    assert "passed over, no grade or subset: 10, Unlabeled\n" in capsys.readouterr().out
    folder_of(tmp_path / "chen", patient_names(1, "train/") + patient_names(1, "valid/") + patient_names(1, "test/"))
    kneeoa.find_xrays(folder_of(tmp_path / "chen", ["test/left/x.png"]))
    assert "passed over, no grade or subset: test/left, valid\n" in capsys.readouterr().out


@pytest.mark.parametrize("archive", ["OSAIL_KL_Dataset/Labeled", "my downloads/OSAIL_KL_Dataset/Labeled"])
def test_an_unzipped_archive_is_entered_and_its_unlabelled_part_left_alone(tmp_path, archive):
    names = [f"{archive}/{g}/labeled_KL{g}_image1.png" for g in range(5)]
    folder_of(tmp_path, [*names, f"{archive.replace('Labeled', 'Unlabeled')}/unlabeled_image1.png"])
    folder_of(tmp_path, [f"__MACOSX/{name.replace('labeled_', '._labeled_')}" for name in names])  # a Mac's archives have it
    assert [x.path for x in kneeoa.find_xrays(tmp_path)] == names


def test_of_several_data_sets_one_is_to_be_named(tmp_path, capsys):
    names = patient_names(4, "kneeKL224/train/") + patient_names(4, "kneeKL224/val/", 100) + patient_names(4, "kneeKL299/")
    words = ["split", "--run", str(tmp_path / "run"), "--data"]
    data = folder_of(tmp_path / "both", names)
    assert kneeoa.main([*words, str(data)]) == 2
    assert f"several data sets in it ({data / 'kneeKL224'}, {data / 'kneeKL299'}), name one" in capsys.readouterr().err
    for name in ("kneeKL224", "kneeKL299"):
        assert kneeoa.main([*words, str(data / name)]) == 0


def test_the_patient_comes_from_the_patients_file_then_the_name_then_is_the_picture_itself(tmp_path):
    names = ["0/a.png", "1/9003175L.png", "2/9003175R.png", "3/b.png", "4/c.png"]
    table = tmp_path / "patients.csv"
    table.write_text("image,patient\na.png,7\nc.png,7\n")
    found = {x.path: x.patient for x in kneeoa.find_xrays(folder_of(tmp_path / "d", names), table)}
    assert found == dict(zip(names, ("7", "9003175", "9003175", "3/b.png", "7")))


@pytest.mark.parametrize("name, patient", [
    ("9003175L", "9003175"), ("9003175_R_v00", "9003175"), ("007 left (2)", "007"), ("12-RIGHT", "12"),
    ("12Lateral", None), ("12", None), ("1996-05-02L", None), ("knee7L", None),
])
def test_a_name_tells_the_patient_if_it_begins_with_digits_and_a_side(name, patient, tmp_path):
    found = kneeoa.find_xrays(folder_of(tmp_path, [f"{g}/{name}.png" for g in range(5)]))
    assert {x.patient for x in found} == ({patient} if patient else {x.path for x in found})


def test_the_shipped_patients_file_knows_the_osail_pictures(tmp_path):
    table = rows(PROGRAM.with_name("osail_patients.csv"))
    assert len(table) == 2352 and len({row["patient"] for row in table}) == 1224
    twice = next(p for p, n in Counter(row["patient"] for row in table).items() if n == 2)
    first, second = (row["image"] for row in table if row["patient"] == twice)
    found = kneeoa.find_xrays(folder_of(tmp_path, [f"0/{first}", f"1/{second}", "2/a.png", "3/b.png", "4/c.png"]))
    assert found[0].patient == found[1].patient == twice


# -------------------------------------------------------------------------------------------------------------- splitting


@pytest.fixture(scope="session")
def many():
    """1,000 imagined patients with one or two pictures, grades as unequal as in OSAIL."""
    random, xrays = np.random.default_rng(0), []
    for patient in range(1000):
        for side in "LR"[: random.integers(1, 3)]:
            grade = int(random.choice(5, p=(0.40, 0.18, 0.26, 0.13, 0.03)))
            xrays.append(Xray(f"{grade}/{patient}{side}.png", grade, str(patient)))
    return sorted(xrays)


def test_no_patient_is_in_two_subsets(many):
    homes = defaultdict(set)
    for xray in kneeoa.split_by_patient(many, 0):
        homes[xray.patient].add(xray.subset)
    assert all(len(subsets) == 1 for subsets in homes.values())
    assert set.union(*homes.values()) == {"train", "val", "test"}


def test_each_grade_is_shared_out_70_15_15(many):
    split = kneeoa.split_by_patient(many, 0)
    for grade in range(5):
        own = Counter(x.subset for x in split if x.grade == grade)
        for subset, share in (("train", 0.70), ("val", 0.15), ("test", 0.15)):
            assert abs(own[subset] - share * own.total()) <= 2, (grade, own)


def test_the_split_depends_on_names_and_seed_alone(many):
    split = kneeoa.split_by_patient(many, 0)
    assert sorted(kneeoa.split_by_patient(many[::-1], 0)) == sorted(split)
    assert sorted(kneeoa.split_by_patient(many, 1)) != sorted(split)
    # Worked out once and written down, so that no change of Python, NumPy or this program moves a test subset unnoticed.
    few = kneeoa.split_by_patient([Xray(f"{p % 5}/{p}L.png", p % 5, str(p)) for p in range(50)], 0)
    assert [x.patient for x in few if x.subset == "test"] == ["0", "4", "17", "19", "20", "23", "31", "32", "33", "41"]
    knees = [(p, side, grade) for p in range(60) for side, grade in (("L", p % 5), ("R", p // 5 % 5 * (p % 3 > 0)))]
    few = kneeoa.split_by_patient([Xray(f"{grade}/{p}{side}.png", grade, str(p)) for p, side, grade in knees], 0)
    assert sorted({int(x.patient) for x in few if x.subset == "test"}) == [2, 8, 18, 22, 29, 34, 36, 38, 45, 51]


def test_the_order_of_the_file_system_does_not_matter(phantoms, monkeypatch):
    before = kneeoa.make_split(phantoms, 0)[0]
    iterdir, rglob = Path.iterdir, Path.rglob
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self), reverse=True)))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(sorted(rglob(self, pattern), reverse=True)))
    assert kneeoa.make_split(phantoms, 0)[0] == before


def test_a_given_split_is_kept(tmp_path):
    names = [n for s, k in (("train", 0), ("val", 100), ("test", 200)) for n in patient_names(3, f"{s}/", k)]
    split, _ = kneeoa.make_split(folder_of(tmp_path, names), 0)
    assert len(split) == len(names) and all(x.path.startswith(x.subset + "/") for x in split)


def test_the_program_says_which_layout_it_found(tmp_path):
    found = {"": "layout: folders by grade, split here by patient",
             "train/ val/ test/": "layout: train, val, test as the folders give them",
             "train/ val/": "no test given: the figures will be of the validation subset"}
    for subsets, told in found.items():
        names = [n for i, prefix in enumerate(subsets.split() or [""]) for n in patient_names(3, prefix, 100 * i)]
        notes = kneeoa.make_split(folder_of(tmp_path / str(len(subsets)), names), 0)[1]
        assert told in notes and not any("no patient" in note for note in notes)


def test_without_val_it_is_taken_from_train_by_patient_and_test_is_kept(tmp_path):
    folder_of(tmp_path, patient_names(20, "train/") + patient_names(2, "test/", 100))
    split, notes = kneeoa.make_split(tmp_path, 0)
    assert "no val given: it is taken from train, by patient" in notes
    assert all((x.subset == "test") == x.path.startswith("test/") for x in split)
    patients = {s: {x.patient for x in split if x.subset == s} for s in ("train", "val")}
    assert not patients["train"] & patients["val"]
    assert Counter(x.grade for x in split if x.subset == "val") == dict.fromkeys(range(5), 6)  # 15 % of 40


def test_a_patient_in_two_given_subsets_is_refused(tmp_path):
    folder_of(tmp_path, patient_names(3, "train/") + patient_names(3, "val/", 2))
    with pytest.raises(KneeError, match="patients are in two subsets"):
        kneeoa.make_split(tmp_path, 0)


def test_equal_pictures_count_once_and_contradicting_ones_not_at_all(tmp_path):
    folder_of(tmp_path, patient_names(4))
    same, other = (xray_file(tmp_path / f"3/{name}.png", value=50) for name in ("9000L", "9001L"))
    Image.open(same).save(tmp_path / "3" / "9002L.bmp")  # equal pixels in another kind of file
    xray_file(tmp_path / "1/9100L.png", value=90), xray_file(tmp_path / "2/9101L.png", value=90)
    split, notes = kneeoa.make_split(tmp_path, 0)
    kept = {x.path for x in split}
    assert "3/9000L.png" in kept and not kept & {"3/9001L.png", "3/9002L.bmp", "1/9100L.png", "2/9101L.png"}
    assert "left out, equals 3/9000L.png: 3/9001L.png" in notes
    assert "left out, one picture under several grades: 1/9100L.png, 2/9101L.png" in notes


def test_too_few_patients_for_a_split_are_refused():
    xrays = [Xray(f"{g}/{p}{s}.png", g, f"{g}{p}") for g in range(5) for p in range(2 if g == 4 else 9) for s in "LR"]
    with pytest.raises(KneeError, match="grade 4: pictures of 2 patients"):
        kneeoa.split_by_patient(xrays, 0)


# --------------------------------------------------------------------------------------------------------------- data set


def test_the_data_set_takes_an_int_a_slice_or_a_tensor(phantoms):
    dataset = KneeFolder(phantoms, size=64)
    image, grade = dataset[3]
    assert image.shape == (1, 64, 64) and image.dtype == torch.uint8 and grade == dataset.xrays[3].grade
    images, grades = dataset[2:6]
    assert images.shape == (4, 1, 64, 64) and grades.tolist() == [x.grade for x in dataset.xrays[2:6]]
    images, grades = dataset[torch.tensor([7, 3])]
    assert torch.equal(images[1], image) and len(grades) == 2
    expected = kneeoa.read_xray(phantoms / dataset.xrays[3].path, 64)
    assert np.array_equal(image[0].numpy(), expected)


def test_the_data_set_works_in_a_data_loader(phantoms):
    dataset = KneeFolder(phantoms, size=64)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=40))
    assert [len(grades) for _, grades in batches] == [40, 40, 10]
    assert torch.equal(torch.cat([images for images, _ in batches]), dataset.images)


# ---------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("size", [64, 97, 128, 224])
@pytest.mark.parametrize("widths", [Config.widths, (8,), (8, 16, 24)])
def test_the_network_makes_five_logits_at_any_size(size, widths):
    net = KneeNet(widths).eval()
    assert net(torch.randn(2, 1, size, size)).shape == (2, 5)


def test_a_narrow_band_of_the_smallest_picture_is_not_pooled_away(monkeypatch):
    monkeypatch.setattr(kneeoa, "BAND", (5 / 14, 11 / 14))
    assert KneeNet().eval()(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_the_first_stage_quarters_the_sides_of_a_half_and_each_other_one_halves_them():
    halves = KneeNet.halves(torch.randn(2, 1, 224, 224))
    assert halves.shape == (4, 1, 128, 128)
    for stages, side in enumerate((32, 16, 8, 4), 1):
        widths = Config.widths[:stages]
        assert KneeNet(widths).features(halves).shape == (4, widths[-1], side, side)


def test_the_default_network_has_at_most_two_million_weights():
    assert kneeoa.count_weights(KneeNet()) <= 2_000_000


def test_a_residual_begins_as_the_identity_and_can_learn():
    residual, x = kneeoa.Residual(8), torch.randn(2, 8, 6, 6)
    y = residual(x)
    assert torch.equal(y, x.relu())
    y.square().sum().backward()
    assert residual.body[-1].weight.grad.abs().min() > 0  # with another weight at zero, nothing would ever move it


def test_a_knee_and_its_mirror_image_get_the_same_answer():
    net, images = KneeNet((8, 16)).eval(), torch.randn(3, 1, 64, 64)
    torch.nn.init.normal_(net.grade.weight)
    assert torch.allclose(net(images), net(images.flip(3)), atol=1e-5)


def test_the_grade_is_decided_by_sum_and_difference_of_what_is_found_in_the_halves():
    net, shown = KneeNet((2,)).eval(), []
    net.grade.register_forward_pre_hook(lambda _, pairs: shown.append(pairs[0]))
    left, right = torch.tensor([[1.0, 7.0], [4.0, 2.0]]), torch.tensor([[3.0, 2.0], [4.0, 5.0]])  # two knees, two channels
    maps = torch.cat((left, right))[:, :, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]])  # with these means
    net.head(maps)
    assert shown[0].tolist() == [[4, 9, 2, 5], [8, 7, 0, 3]]


def test_the_rows_of_the_band_alone_get_the_answer_of_the_whole_picture():
    net, images = KneeNet((8, 16)).eval(), torch.randn(3, 1, 97, 97)
    torch.nn.init.normal_(net.grade.weight)
    assert torch.equal(net(images[:, :, kneeoa.band(97)]), net(images))


def test_heat_on_the_halves_comes_back_to_its_place_in_the_picture():
    picture = torch.zeros(2, 1, 112, 112)
    picture[0, 0, 60, 10] = picture[1, 0, 60, 56] = picture[1, 0, 60, 100] = 1.0  # at the left; in the overlap; at the right
    back = kneeoa.join_halves(KneeNet.halves(picture), 112)
    assert torch.allclose(back, picture, atol=1e-5)


def test_standardize_takes_exposure_out():
    images = torch.rand(3, 1, 64, 64) * 100 + 50
    slope = torch.linspace(0, 60, 64)  # brighter to the right
    even, uneven = kneeoa.standardize(images), kneeoa.standardize(images * 0.8 + slope)
    assert (even - uneven)[..., 4:-4, 4:-4].abs().mean() < 0.1 and abs(even.mean()) < 0.05 and 0.7 < even.std() < 1.3
    assert kneeoa.standardize(torch.full((1, 1, 64, 64), 9, dtype=torch.uint8)).abs().max() == 0


@pytest.mark.parametrize("size, reach", [(224, 2), (64, 1)])
def test_standardize_is_local_contrast_of_each_picture_by_itself(size, reach):
    images = torch.randint(0, 256, (3, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def mean(x):  # of 224 pixels "around" is twice 5 x 5, fewer at the margin
        padded = np.pad(x, reach, constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
        return np.nanmean(windows, (2, 3))

    def around(x):
        return mean(mean(x))

    for image, got in zip(images[:, 0].numpy().astype(float), kneeoa.standardize(images)[:, 0].numpy()):
        detail = image - around(image)
        variance = around(detail**2)
        assert np.allclose(got, detail / (0.35 * variance**0.5 + 0.65 * variance.mean() ** 0.5 + 1), atol=1e-5)


def test_standardize_once_gives_what_standardize_does_but_for_a_rounding():
    images = torch.randint(0, 256, (70, 1, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[0] = 0
    images[0, 0, 30, 30] = 255  # a white dot on black is beyond what a byte holds
    standardized, kept = kneeoa.standardize(images), kneeoa.standardize_once(images)
    assert kept.dtype == torch.int8 and kept.shape == images.shape and standardized.abs().max() > 4
    assert (kept / kneeoa.STEPS - standardized.clamp(-4, 127 / kneeoa.STEPS)).abs().max() <= 0.5 / kneeoa.STEPS + 1e-6


def test_what_the_network_trains_on_is_standardized_as_what_it_is_tested_on(phantoms, tmp_path, monkeypatch):
    dataset, seen = KneeFolder(phantoms, size=64), []
    forward = KneeNet.forward
    monkeypatch.setattr(kneeoa, "augment", lambda images, *rest: images.float())
    monkeypatch.setattr(kneeoa, "MAIN_VIEW", (1.0, 0.0, 0.0))  # a hundredth farther, it would be softer than what is trained on
    monkeypatch.setattr(KneeNet, "forward", lambda net, x: seen.append(x.clone()) or forward(net, x))
    kneeoa.train(dataset, dataset, Config(size=64, widths=(8, 16), epochs=1), tmp_path)
    trained, tested = torch.cat(seen[:11]), torch.cat(seen[11:])  # (88, 1, 64, 64), in another order, and (90, 1, 64, 64)
    nearest = (trained[:, None] - tested).abs().amax((2, 3, 4)).amin(1)  # (88,)
    assert (nearest <= 1 / kneeoa.STEPS).all()  # half a step of rounding, and what resampling one view blurs


def test_the_answer_to_a_picture_is_the_mean_over_its_views():
    net, images = KneeNet((8, 16)).eval(), torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    torch.nn.init.normal_(net.grade.weight)
    views = [kneeoa.answer(net, images, [view]) for view in kneeoa.VIEWS]
    assert torch.allclose(kneeoa.answer(net, images), sum(views) / len(views), atol=1e-6)
    assert all(not torch.allclose(views[0], view, atol=1e-4) for view in views[1:])


def test_views_are_no_farther_off_than_training_pictures_and_to_all_sides_alike():
    for zoom, *shifts in kneeoa.VIEWS:  # `augment` says how far training pictures are
        assert 1 / 1.17 < zoom < 1.17 and all(abs(shift) < 0.08 for shift in shifts)
    assert np.sum(kneeoa.VIEWS, 0)[1:].tolist() == [0, 0] and len(set(kneeoa.VIEWS)) == len(kneeoa.VIEWS)


def test_a_view_enlarges_about_the_middle_and_shifts_right_and_down():
    picture = torch.zeros(1, 1, 64, 64)
    picture[..., 16:48, 16:48] = 255  # 32 pixels wide
    assert torch.allclose(kneeoa.moved(picture, 1, 0, 0), picture, atol=1e-2)
    enlarged = kneeoa.moved(picture, 1.25, 0, 0)[0, 0] / 255
    assert all(line.sum().item() == pytest.approx(40, abs=0.5) for line in (enlarged[32], enlarged[:, 32]))
    assert torch.allclose(enlarged, enlarged.flip(0, 1), atol=1e-2)
    shifted = kneeoa.moved(picture, 1, 4 / 64, 8 / 64)
    assert torch.allclose(shifted, picture.roll((8, 4), (2, 3)), atol=1e-2)
    both = kneeoa.moved(picture, 1.25, 4 / 64, 8 / 64)[0, 0] / 255  # 40 pixels wide, around column 36 and row 40
    middle = [(both.sum(axis) * (torch.arange(64) + 0.5)).sum().item() / both.sum().item() for axis in (0, 1)]
    assert middle == pytest.approx([36, 40], abs=0.1) and both.sum().item() == pytest.approx(40 * 40, rel=0.02)


@pytest.mark.parametrize("size", [64, 160, 224, 448])
def test_a_validated_picture_is_as_soft_as_one_that_is_trained_on(size, monkeypatch):
    grain, seen = torch.randn(16, 1, size, size, generator=torch.Generator().manual_seed(0)), []  # what softens it lowers its deviation
    trained = kneeoa.augment(grain, torch.Generator().manual_seed(1))
    monkeypatch.setattr(kneeoa, "standardize", lambda images: images)
    monkeypatch.setattr(KneeNet, "forward", lambda net, x: seen.append(x) or torch.zeros(len(x), 5))
    dataset = SimpleNamespace(images=grain, grades=torch.zeros(16, dtype=torch.int64))
    kneeoa.evaluate(KneeNet(), dataset, kneeoa.soft_targets(0.5))
    assert seen[0].std().item() == pytest.approx(trained.std().item(), rel=0.15)


# ----------------------------------------------------------------------------------------------------------- augmentation


def test_augmentation_is_drawn_from_its_generator_alone():
    images = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    first, again, other = (kneeoa.augment(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.shape == images.shape and torch.equal(first, again) and not torch.equal(first, other)
    assert 0 <= first.min() and first.max() <= 255


def test_training_makes_only_the_rows_that_the_network_looks_at_whatever_the_size(phantoms, tmp_path, monkeypatch):
    shown, forward = [], KneeNet.forward
    monkeypatch.setattr(KneeNet, "forward", lambda net, x: shown.append((net.training, *x.shape[1:])) or forward(net, x))
    dataset = KneeFolder(phantoms, size=64)  # and not the 224 of the settings
    kneeoa.train(dataset, dataset, Config(widths=(8, 16), epochs=1), tmp_path)
    assert set(shown) == {(True, 1, 37, 64), (False, 1, 64, 64)}  # rows 18 to 54 of 64


def test_rows_that_are_augmented_alone_are_those_of_the_whole_picture():
    images, rows = torch.randint(0, 256, (9, 1, 97, 97), dtype=torch.uint8), kneeoa.band(97)
    whole, part = (kneeoa.augment(images, torch.Generator().manual_seed(0), 1.0, which) for which in (slice(None), rows))
    assert whole.shape == images.shape and torch.allclose(part, whole[:, :, rows], atol=1e-4)


def test_augmentation_of_strength_0_leaves_or_mirrors_the_picture():
    images = torch.randint(0, 256, (20, 1, 64, 64), dtype=torch.uint8)  # more than are changed at a time
    changed = kneeoa.augment(images, torch.Generator().manual_seed(0), strength=0)
    straight = [torch.allclose(c, i.float(), atol=0.1) for c, i in zip(changed, images)]
    mirrored = [torch.allclose(c, i.flip(2).float(), atol=0.1) for c, i in zip(changed, images)]
    assert all(a or b for a, b in zip(straight, mirrored)) and any(straight) and any(mirrored)


def test_pictures_are_resampled_as_torch_does():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 1, 64, 64), dtype=torch.uint8, generator=draw)
    matrices = torch.eye(2, 3) + 0.4 * torch.randn(50, 2, 3, generator=draw)  # far past the margins, too
    for each in (matrices, matrices[:1]):
        grid = torch.nn.functional.affine_grid(each.expand(50, 2, 3), (50, 1, 64, 64), align_corners=False)
        by_torch = torch.nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        assert torch.allclose(kneeoa.resample(images, each), by_torch, atol=0.05)


def test_augmentation_turns_scales_shifts_and_mirrors_within_its_bounds(monkeypatch):
    drawn = []
    monkeypatch.setattr(kneeoa, "resample", lambda images, matrices, rows: drawn.append(matrices) or images)
    kneeoa.augment(torch.zeros(50, 1, 64, 64, dtype=torch.uint8), torch.Generator().manual_seed(0))
    matrices = torch.cat(drawn)  # (50, 2, 3)
    turned = torch.atan2(-matrices[:, 0, 1], matrices[:, 1, 1]).rad2deg()
    scale = matrices[:, :, :2].det().abs().sqrt()
    assert 9 < turned.abs().max() < 13.1 and matrices[:, :, 2].abs().max() <= 0.17 and 0.8 < scale.min() < scale.max() < 1.25
    assert 10 < (matrices[:, 0, 0] < 0).sum() < 40  # about half are mirrored
    across, down = matrices[:, :, :2].unbind(1)
    assert (across * down).sum(1).abs().max() < 1e-6  # a right angle stays one: nothing is sheared
    assert 0.05 < (across.norm(dim=1) / down.norm(dim=1)).log().abs().max() < 0.086  # the proportions


def test_only_training_pictures_are_augmented_and_each_epoch_trains_in_train_mode(phantoms, tmp_path, monkeypatch):
    config = Config(size=64, widths=(8, 16), epochs=3)
    dataset = KneeFolder(phantoms, size=64)
    augmented, modes = [], []
    augment, forward = kneeoa.augment, KneeNet.forward
    monkeypatch.setattr(kneeoa, "augment", lambda images, *rest: augmented.append(len(images)) or augment(images, *rest))
    monkeypatch.setattr(KneeNet, "forward", lambda net, x: modes.append((net.training, len(x))) or forward(net, x))
    before = dataset.images.clone()
    kneeoa.train(dataset, dataset, config, tmp_path)
    assert augmented == [8] * 11 * 3  # 90 pictures are eleven whole batches of 8, the smallest by default
    assert modes == ([(True, 8)] * 11 + [(False, 64), (False, 26)]) * 3
    assert torch.equal(dataset.images, before)


# --------------------------------------------------------------------------------------------------------------- training


def test_small_sets_take_smaller_batches_so_that_an_epoch_has_steps_enough():
    sizes = {n: kneeoa.batch_for(n, Config(batch=64)) for n in (5, 60, 800, 1646, 4908)}
    assert sizes == {5: 5, 60: 8, 800: 10, 1646: 21, 4908: 64}
    assert kneeoa.batch_for(800, Config(batch=4)) == 4  # a setting is never exceeded


def test_loss_and_accuracy_of_training_are_means_over_all_batches_of_the_epoch(phantoms, tmp_path, monkeypatch):
    losses, right, cross_entropy = [], [], kneeoa.F.cross_entropy

    def watched(logits, targets):
        loss = cross_entropy(logits, targets)
        if loss.requires_grad:  # in training alone
            losses.append(loss.item())
            answers = kneeoa.undo_leak(logits.detach().softmax(1), 0.5)
            right.append((kneeoa.decide(answers) == targets.argmax(1)).float().mean().item())
        return loss

    monkeypatch.setattr(kneeoa.F, "cross_entropy", watched)
    dataset = KneeFolder(phantoms, size=64)
    figures = kneeoa.train(dataset, dataset, Config(size=64, widths=(8, 16), epochs=1), tmp_path)["figures"]
    assert len(losses) == 11
    assert figures["train_loss"] == pytest.approx(np.mean(losses))
    assert figures["train_accuracy"] == pytest.approx(np.mean(right))


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of each step that a training makes, as a list that grows."""
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: rates.append(adam.param_groups[0]["lr"]) or step(adam))
    return rates


def test_a_step_takes_the_same_share_of_each_weight_whatever_its_gradient(phantoms, tmp_path, rates):
    dataset = KneeFolder(phantoms, size=64)
    dataset.images.zero_()  # nothing to be seen: no gradient for the first convolution, and its weights decay alone
    config = Config(size=64, widths=(8, 16), epochs=1, lr=1e-2, weight_decay=0.5)
    torch.manual_seed(config.seed)
    before = KneeNet(config.widths).state_dict()["features.0.weight"]
    kneeoa.train(dataset, dataset, config, tmp_path)
    after = kneeoa.load_checkpoint(tmp_path / "last.pt")["net"]["features.0.weight"]
    assert torch.allclose(after, before * math.prod(1 - 0.5 * rate for rate in rates), atol=1e-6) and len(rates) == 11


def test_the_learning_rate_rises_for_a_quarter_of_the_steps_and_then_falls_to_nothing(phantoms, tmp_path, rates):
    dataset = KneeFolder(phantoms, size=64)
    kneeoa.train(dataset, dataset, Config(size=64, widths=(8, 16), epochs=4, lr=1e-2), tmp_path)
    assert len(rates) == 44 and max(rates) == pytest.approx(1e-2, rel=0.03)
    assert rates[:11] == pytest.approx([1e-2 * i / (45 / 4) for i in range(1, 12)])  # a straight line
    assert rates[11:] == sorted(rates[11:], reverse=True) and 0 < rates[-1] < 1e-4
    assert rates[27] == pytest.approx(5e-3, rel=0.02)  # half of it, halfway down: at 5 of 8 of the training


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource, torch, kneeoa
kneeoa.keep_freed_memory()
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=PROGRAM.parent, capture_output=True, text=True, check=True)
    cleared = [int(pages) for pages in told.stdout.split()]  # by the system, before the program may write into them
    assert cleared[0] > 100 and sum(cleared[20:]) < cleared[0]


def test_a_tiny_set_is_learned_by_heart(phantoms, tmp_path):
    xrays = kneeoa.find_xrays(phantoms)
    few = [next(x for x in xrays if x.grade == g) for g in range(5)] * 2
    dataset = KneeFolder(phantoms, few, 64)
    config = Config(size=64, widths=(16, 32), epochs=40, batch=10, dropout=0.0, augment=0.0, lr=5e-3)
    kneeoa.train(dataset, dataset, config, str(tmp_path))  # a folder's name will do
    net = kneeoa.load_net(kneeoa.load_checkpoint(f"{tmp_path}/best.pt"), "cpu")
    answers = kneeoa.answer(net, dataset.images, [kneeoa.MAIN_VIEW])  # without augmentation, it has seen no other view
    assert kneeoa.decide(answers).tolist() == dataset.grades.tolist()


def test_a_soft_target_is_most_for_the_true_grade_and_less_the_farther_away():
    targets = kneeoa.soft_targets(0.5)
    assert torch.allclose(targets.sum(1), torch.ones(5)) and torch.equal(targets.argmax(1), torch.arange(5))
    # By hand, for grade 2: e^(-4/0.5), e^(-1/0.5), 1, e^(-1/0.5), e^(-4/0.5), divided by their sum.
    weights = [math.exp(-8), math.exp(-2), 1, math.exp(-2), math.exp(-8)]
    assert targets[2].tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert torch.equal(kneeoa.soft_targets(0), torch.eye(5))


def test_undoing_the_leak_turns_targets_back_into_the_truth():
    truth = torch.tensor([[0.7, 0.2, 0.1, 0, 0], [0, 0, 0, 0, 1]])
    for softness in (0, 0.3, 0.5, 2):  # of which four fifths are undone
        undone = kneeoa.undo_leak(truth @ kneeoa.soft_targets(0.8 * softness), softness)
        assert torch.allclose(undone, truth, atol=0.005) and torch.allclose(undone.sum(1), torch.ones(2))
        assert undone.min() > 0.0009  # nothing is out of the question


def test_the_answer_costs_least_where_errors_of_two_grades_cost_half_as_much_again_as_those_of_one():
    # By hand, for .4, .3, .3: grade 0 costs .3 + .3 * 1.516 = .755, grade 1 .4 + .3 = .700, grade 2 .4 * 1.516 + .3 = .906.
    assert kneeoa.decide(torch.tensor([[0.4, 0.3, 0.3, 0, 0]])).tolist() == [1]
    assert kneeoa.decide(torch.eye(5)).tolist() == [0, 1, 2, 3, 4]  # who is sure needs no cost
    answers = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)).square().mul(3).softmax(1)
    cheapest = [min(range(5), key=lambda g: sum(p * abs(g - true) ** 0.6 for true, p in enumerate(answer)))
                for answer in answers.tolist()]
    assert kneeoa.decide(answers).tolist() == cheapest != answers.argmax(1).tolist()


def test_answers_that_come_from_numpy_are_decided_as_well():
    answers = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(5), 200))  # NumPy's numbers have 64 bits
    assert kneeoa.decide(answers).tolist() == kneeoa.decide(answers.float()).tolist()
    assert torch.allclose(kneeoa.undo_leak(answers, 0.5), kneeoa.undo_leak(answers.float(), 0.5).double(), atol=1e-5)


def always_four(answers, *rest):
    return torch.full((len(answers),), 4, device=answers.device)


def surely_four(answers, *rest):
    return torch.eye(5, device=answers.device)[always_four(answers)]


@pytest.mark.parametrize("name, instead", [("decide", always_four), ("undo_leak", surely_four)])
def test_all_grades_that_are_counted_written_or_printed_are_decided_by_probabilities(
        phantoms, tmp_path, monkeypatch, capsys, name, instead):
    monkeypatch.setattr(kneeoa, name, instead)
    run, words = tmp_path / "run", ["--size", "64", "--widths", "8", "--epochs", "1"]
    assert kneeoa.main(["train", "--data", str(phantoms), "--run", str(run), *words]) == 0
    history = rows(run / "history.csv")[0]
    for subset, leeway in (("train", 0.05), ("val", 1e-6)):  # the last batch is left out in training
        grades = [r["grade"] for r in rows(run / "split.csv") if r["subset"] == subset]
        assert float(history[f"{subset}_accuracy"]) == pytest.approx(grades.count("4") / len(grades), abs=leeway)
    tested = rows(run / "predictions.csv")
    assert {r["predicted"] for r in tested} == {"4"}
    capsys.readouterr()
    assert kneeoa.main(["predict", str(next(phantoms.glob("0/*"))), "--run", str(run)]) == 0
    told = capsys.readouterr().out
    assert "severe" in told
    if name == "undo_leak":
        assert {r["p4"] for r in tested} == {"1.0000"} and "1.000" in told


def test_the_best_epoch_is_the_one_with_the_highest_validation_kappa(trained, phantoms):
    history = rows(trained / "history.csv")
    best = kneeoa.load_checkpoint(trained / "best.pt")
    assert str(best["epoch"]) == max(history, key=lambda row: (float(row["val_kappa"]), -float(row["val_loss"])))["epoch"]
    # and its weights are those of that epoch: they give its figure again
    validated = [Xray(r["path"], int(r["grade"]), r["patient"]) for r in rows(trained / "split.csv") if r["subset"] == "val"]
    dataset = KneeFolder(phantoms, validated, 64)
    targets = kneeoa.soft_targets(best["config"].softness)
    loss, answers = kneeoa.evaluate(kneeoa.load_net(best, torch.device("cpu")), dataset, targets)
    grades = kneeoa.decide(kneeoa.undo_leak(answers, best["config"].softness))
    assert loss == pytest.approx(float(history[best["epoch"] - 1]["val_loss"]))
    kappa = kneeoa.metrics(kneeoa.confusion_matrix(dataset.grades, grades))["kappa"]
    assert kappa == pytest.approx(float(history[best["epoch"] - 1]["val_kappa"]))


def test_of_epochs_with_equal_kappa_the_one_with_the_lower_loss_is_the_best(phantoms, tmp_path, monkeypatch):
    dataset = KneeFolder(phantoms, size=64)
    right, wrong = torch.eye(5)[dataset.grades], torch.eye(5)[(dataset.grades + 1) % 5]
    told = iter([(0.1, wrong), (0.9, right), (0.5, right), (0.7, right), (0.2, wrong)])
    monkeypatch.setattr(kneeoa, "evaluate", lambda *_: next(told))
    best = kneeoa.train(dataset, dataset, Config(size=64, widths=(8,), epochs=5), tmp_path)
    assert (best["epoch"], best["figures"]["val_kappa"], best["figures"]["val_loss"]) == (3, 1, 0.5)


def test_where_kappa_is_undefined_the_epoch_with_the_lowest_loss_is_the_best(phantoms, tmp_path, monkeypatch):
    dataset = KneeFolder(phantoms, [x for x in kneeoa.find_xrays(phantoms) if x.grade == 2], 64)  # a single grade
    told = iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(kneeoa, "evaluate", lambda *_: (next(told), torch.eye(5)[dataset.grades]))
    assert kneeoa.train(dataset, dataset, Config(size=64, widths=(8,), epochs=3), tmp_path)["epoch"] == 2


def test_after_one_epoch_what_is_validated_is_nearer_to_the_trained_weights_than_to_the_first(phantoms, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    config, dataset = Config(size=64, widths=(8,), epochs=100), KneeFolder(phantoms, size=64)
    monkeypatch.setattr(kneeoa, "save_csv", stop)
    with pytest.raises(KeyboardInterrupt):
        kneeoa.train(dataset, dataset, config, tmp_path)
    torch.manual_seed(config.seed)
    first, last = KneeNet(config.widths).state_dict(), torch.load(tmp_path / "last.pt", weights_only=True)
    for name in ("features.0.weight", "grade.weight", "features.2.running_var"):
        trained, validated = last["net"][name], last["average"][name]
        assert (validated - trained).norm() < (validated - first[name]).norm(), name


def test_the_last_quarter_of_the_steps_makes_two_thirds_of_the_average(phantoms, tmp_path, monkeypatch):
    weights, follow = [], kneeoa.follow  # what each step has of the average

    def watched(average, net, share):
        weights[:] = [weight * (1 - share) for weight in weights] + [share]
        follow(average, net, share)

    monkeypatch.setattr(kneeoa, "follow", watched)
    dataset = KneeFolder(phantoms, size=64)
    kneeoa.train(dataset, dataset, Config(size=64, widths=(8,), epochs=12), tmp_path)
    assert len(weights) == 132 and sum(weights) == pytest.approx(1)  # nothing is left of the first weights, which knew nothing
    assert sum(weights[99:]) == pytest.approx(2 / 3, abs=0.02) and sum(weights[:66]) < 0.07


def test_what_follows_a_network_moves_its_weights_and_its_batch_norms():
    average, net = (KneeNet((8,)) for _ in range(2))
    net(torch.randn(4, 1, 64, 64))  # batch norm learns what is usual
    expected = {name: 0.75 * average.state_dict()[name] + 0.25 * now for name, now in net.state_dict().items()}
    kneeoa.follow(average, net, 0.25)
    moved = [name for name, tensor in average.state_dict().items() if tensor.is_floating_point()]
    assert "features.2.running_var" in moved and "grade.bias" in moved
    assert all(torch.allclose(average.state_dict()[name], expected[name]) for name in moved)


def test_same_seed_same_weights_in_two_processes(phantoms, tmp_path):
    for name in "ab":
        command = [sys.executable, str(PROGRAM), "train", "--data", str(phantoms), "--run", str(tmp_path / name), *SMALL]
        subprocess.run(command, check=True, capture_output=True)
    for file in ("split.csv", "metrics.json", "predictions.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    first, second = (kneeoa.load_checkpoint(tmp_path / name / "best.pt")["net"] for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_device_is_the_best_that_is_there_or_the_one_that_is_named(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [kneeoa.pick_device(name).type for name in ("auto", "cpu", "mps")] == ["mps", "cpu", "mps"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(kneeoa.pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(KneeError, match="cuda:2: is not on this machine"):
        kneeoa.pick_device("cuda:2")


@pytest.mark.parametrize("files, cores", [
    ({}, 64),
    ({"cpu.max": "max 100000\n"}, 64),
    ({"cpu.max": "250000 100000\n"}, 2),
    ({"cpu.max": "50000 100000\n"}, 1),
    ({"cpu.max": "9900000 100000\n"}, 64),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
])
def test_a_container_that_has_a_share_of_the_cores_gets_no_more_threads_than_that(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(kneeoa.os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert kneeoa.cpu_cores(tmp_path) == cores


def test_each_command_takes_as_many_threads_as_there_are_cores_for_it_and_no_more_than_it_is_told(tmp_path, monkeypatch):
    threads, told = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for cores in (1, 1000):
        monkeypatch.setattr(kneeoa, "cpu_cores", lambda: cores)
        kneeoa.main(["split", "--data", str(tmp_path)])
    assert told == [1, threads]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_waited_for_at_no_step(phantoms, tmp_path, monkeypatch):
    dataset, augment, evaluate, steps = KneeFolder(phantoms, size=64, device="cuda"), kneeoa.augment, kneeoa.evaluate, []

    def begin(*rest):  # of a step
        torch.cuda.set_sync_debug_mode("warn")
        steps.append(time.perf_counter())
        return augment(*rest)

    def end(*rest):  # of an epoch's steps
        torch.cuda.set_sync_debug_mode("default")
        return evaluate(*rest)

    monkeypatch.setattr(kneeoa, "augment", begin)
    monkeypatch.setattr(kneeoa, "evaluate", end)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kneeoa.train(dataset, dataset, Config(size=64, widths=(8, 16), epochs=4, batch=4), tmp_path)
    waits = sum("synchroniz" in str(warning.message) for warning in told)
    assert len(steps) == 88 and 4 <= waits < 7 + (steps[-1] - steps[0]) / 0.3  # for the figures that the bar shows, at most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_trains_and_answers_as_the_cpu_does(phantoms, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        dataset = KneeFolder(phantoms, size=64, device=device)
        best = kneeoa.train(dataset, dataset, Config(size=64, widths=(8, 16), epochs=2, dropout=0.0), tmp_path / device)
        losses.append([best["figures"]["train_loss"], best["figures"]["val_loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    nets = [kneeoa.load_net(best, torch.device(device)) for device in ("cpu", "cuda")]
    on_cpu, on_gpu = (kneeoa.answer(net, dataset.images.to(net.grade.weight.device)) for net in nets)
    assert torch.allclose(on_cpu, on_gpu.cpu(), atol=0.02)


# ---------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_a_case_worked_by_hand():
    # Three of grade 0 (two right, one called 1), one of grade 4 called 2: half right, recalls 2/3 and 0, distances 1 and 2.
    figures = kneeoa.metrics(kneeoa.confusion_matrix([0, 0, 0, 4], [0, 0, 1, 2]))
    assert figures["accuracy"] == 0.5 and figures["mae"] == 0.75
    assert figures["balanced_accuracy"] == pytest.approx(1 / 3) and figures["recall"][0] == pytest.approx(2 / 3)
    # Squared errors 0 + 0 + 1 + 4 = 5; by chance each truth meets each answer a quarter of the time:
    # (3 * (0 + 0 + 1 + 4) + (16 + 16 + 9 + 4)) / 4 = 15, so kappa is 1 - 5 / 15.
    assert figures["kappa"] == pytest.approx(1 - 5 / 15)


def test_kappa_agrees_with_a_second_way_to_compute_it():
    random = np.random.default_rng(0)
    true = random.integers(0, 5, 300)
    answers = (true + random.integers(-1, 2, 300)).clip(0, 4)
    # For squared weights kappa is 2 cov / (var + var + (difference of means)^2), Lin's concordance (Krippendorff, 1970).
    covariance = np.cov(true, answers, bias=True)
    expected = 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + (true.mean() - answers.mean()) ** 2)
    assert kneeoa.metrics(kneeoa.confusion_matrix(true, answers))["kappa"] == pytest.approx(expected)


def test_always_the_same_answer_has_kappa_0_and_balanced_accuracy_one_fifth():
    figures = kneeoa.metrics(kneeoa.confusion_matrix([0, 0, 0, 1, 2, 3, 4], [0] * 7))
    assert figures["kappa"] == 0 and figures["balanced_accuracy"] == pytest.approx(0.2)


def test_intervals_hold_the_figure_and_widen_when_patients_repeat_themselves():
    random = np.random.default_rng(0)
    true = random.integers(0, 5, 200)
    answers = np.where(random.random(200) < 0.7, true, (true + 1) % 5)
    alone = kneeoa.intervals(true, answers, list(range(200)))["accuracy"]
    right = (true == answers).mean()
    error = 1.96 * math.sqrt(right * (1 - right) / 200)  # the normal approximation
    assert alone == pytest.approx([right - error, right + error], abs=0.015)
    twice = kneeoa.intervals(true.repeat(4), answers.repeat(4), np.arange(200).repeat(4))["accuracy"]
    assert twice[1] - twice[0] == pytest.approx(alone[1] - alone[0], rel=0.1)  # four equal knees are no more evidence


# --------------------------------------------------------------------------------------------------------------- phantoms


def test_phantoms_are_the_same_again_and_two_knees_of_a_patient_are_not(phantoms, tmp_path):
    kneeoa.make_phantoms(tmp_path / "again", 90)
    files = sorted(f.relative_to(phantoms) for f in phantoms.rglob("*.png"))
    assert len(files) == 90 and all((phantoms / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    left, right = (next(phantoms.rglob(f"1000003{side}.png")) for side in "LR")
    assert left.read_bytes() != right.read_bytes()


def test_phantoms_are_never_drawn_into_the_data_folder_and_the_fewest_allowed_can_be_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    xray_file(tmp_path / "data" / "0" / "mine.png")
    assert kneeoa.main(["phantoms", "--count", "60"]) == 0
    assert len(list((tmp_path / "data").rglob("*.png"))) == 1 and len(list((tmp_path / "phantoms").rglob("*.png"))) == 60
    assert kneeoa.main(["split", "--data", "phantoms"]) == 0
    assert kneeoa.main(["phantoms", "--data", "fewer", "--count", "59"]) == 2
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert kneeoa.main(["phantoms", "--data", "."]) == 2  # it would take the ground from under the shell's feet


def test_phantoms_are_drawn_in_float32_since_float64_would_take_three_times_as_long(monkeypatch):
    drawn_in = set()
    for name in ("bump", "soft_step"):  # most of the drawing goes through these two
        original = getattr(kneeoa, name)
        monkeypatch.setattr(kneeoa, name, lambda x, *rest, f=original: drawn_in.add(x.dtype) or f(x, *rest))
    kneeoa.draw_phantom(3.0, np.random.default_rng(0), np.random.default_rng(1))
    assert drawn_in == {np.dtype(np.float32)}


# ----------------------------------------------------------------------------------------------------------- command line


def test_training_leaves_what_it_promises(trained, phantoms):
    history = rows(trained / "history.csv")
    assert ",".join(history[0]) == "epoch,train_loss,train_accuracy,val_loss,val_accuracy,val_kappa,lr,seconds"
    assert [row["epoch"] for row in history] == ["1", "2"]
    split = rows(trained / "split.csv")
    assert list(split[0]) == ["path", "grade", "patient", "subset"] and len(split) == 90
    assert all((phantoms / row["path"]).is_file() for row in split)
    result = json.loads((trained / "metrics.json").read_text())
    tested = [row for row in split if row["subset"] == "test"]
    answers = rows(trained / "predictions.csv")
    assert result["subset"] == "test" and result["n"] == len(tested) == len(answers) == sum(map(sum, result["confusion"]))
    assert {row["path"] for row in answers} == {row["path"] for row in tested}
    right = sum(row["grade"] == row["predicted"] for row in answers)
    assert result["accuracy"] == pytest.approx(right / len(answers))
    assert set(result) == {"n", "accuracy", "balanced_accuracy", "kappa", "mae", "recall", "confusion", "majority_accuracy",
                           "intervals", "subset", "epoch", "parameters"}
    assert all(sum(float(row[f"p{g}"]) for g in range(5)) == pytest.approx(1, abs=1e-3) for row in answers)
    assert not list(trained.glob("*.part"))


def test_split_prints_the_pictures_and_patients_of_each_grade_in_each_subset(phantoms, tmp_path, capsys):
    assert kneeoa.main(["split", "--data", str(phantoms), "--run", str(tmp_path)]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for subset in ("train", "val", "test"):
        own = [row for row in rows(tmp_path / "split.csv") if row["subset"] == subset]
        wanted = []
        for part in (*([row for row in own if row["grade"] == grade] for grade in "01234"), own):
            wanted += [str(len(part)), f"({len({row['patient'] for row in part})})"]
        assert lines[subset] == wanted


def test_a_bar_shows_each_epoch_and_its_figures(phantoms, tmp_path, capsys):
    assert kneeoa.main(["train", "--data", str(phantoms), "--run", str(tmp_path), *SMALL]) == 0
    shown = capsys.readouterr().err
    for row in rows(tmp_path / "history.csv"):
        loss, accuracy, val_loss, val_accuracy, kappa = (f"{float(row[name]):.3f}" for name in list(row)[1:6])
        assert f"epoch {row['epoch']}/2 100%" in shown
        assert f"loss {loss} accuracy {accuracy} | validation loss {val_loss} accuracy {val_accuracy} kappa {kappa} | " in shown
    assert re.search(r"epoch 1/2 100%.* 00:[0-5]\d left", shown)  # the second takes no minute


def test_the_test_prints_its_figures_with_their_intervals_and_the_recall_of_each_grade(trained, phantoms, capsys):
    assert kneeoa.main(["test", "--data", str(phantoms), "--run", str(trained)]) == 0
    printed, result = capsys.readouterr().out, json.loads((trained / "metrics.json").read_text())
    lines = [line.split() for line in printed.splitlines()]
    for name, title in kneeoa.FIGURES.items():
        line = next(line for line in lines if line[: len(title.split())] == title.split())
        low, high = result["intervals"][name]
        assert line[len(title.split()) :][:4] == [f"{result[name]:.3f}", f"{low:.3f}", "to", f"{high:.3f}"]
    assert ["recall", *(f"{recall:.3f}" for recall in result["recall"])] in lines
    assert ["pictures", *(str(sum(row)) for row in result["confusion"])] in lines
    assert "flatters" not in printed


def test_who_always_answers_the_usual_grade_has_it_from_the_training_subset(trained, phantoms, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    split = [row for row in rows(trained / "split.csv") if (row["subset"], row["grade"]) not in (("train", "0"), ("train", "2"))]
    kneeoa.save_csv(tmp_path / "run" / "split.csv", split[0], [row.values() for row in split])
    usual = {s: Counter(row["grade"] for row in split if row["subset"] == s) for s in ("train", "test")}
    (grade, _), = usual["train"].most_common(1)
    assert grade != usual["test"].most_common(1)[0][0]
    assert kneeoa.main(["test", "--data", str(phantoms), "--run", str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["majority_accuracy"]
    assert told == usual["test"][grade] / usual["test"].total() and f"always grade {grade}" in capsys.readouterr().out


def test_a_grade_that_is_not_in_the_test_subset_has_no_recall_and_no_part_in_the_balanced_accuracy(trained, phantoms, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    split = [row for row in rows(trained / "split.csv") if (row["subset"], row["grade"]) != ("test", "3")]
    kneeoa.save_csv(tmp_path / "run" / "split.csv", split[0], [row.values() for row in split])
    assert kneeoa.main(["test", "--data", str(phantoms), "--run", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "metrics.json").read_text()
    result = json.loads(text)
    recall = result["recall"]
    assert "NaN" not in text and recall[3] is None  # JSON knows no NaN, and other languages refuse it
    assert result["balanced_accuracy"] == pytest.approx(sum(recall[g] for g in (0, 1, 2, 4)) / 4)


@pytest.mark.filterwarnings("error:All-NaN")
def test_a_single_picture_answered_right_has_no_kappa(trained, phantoms, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    right = next(row["path"] for row in rows(trained / "predictions.csv") if row["grade"] == row["predicted"])
    split = [row for row in rows(trained / "split.csv") if row["subset"] != "test" or row["path"] == right]
    kneeoa.save_csv(tmp_path / "run" / "split.csv", split[0], [row.values() for row in split])
    assert kneeoa.main(["plot", "--data", str(phantoms), "--run", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "metrics.json").read_text()
    result = json.loads(text)
    assert "NaN" not in text and result["kappa"] is None and result["intervals"]["kappa"] == [None, None]
    assert result["accuracy"] == 1 and "kappa     nan" in capsys.readouterr().out


def test_without_a_test_subset_the_figures_are_called_those_of_validation(trained, phantoms, tmp_path, capsys):
    for row in rows(trained / "split.csv"):
        if row["subset"] != "test":
            target = tmp_path / "data" / row["subset"] / row["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((phantoms / row["path"]).read_bytes())
    assert kneeoa.main(["train", "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "val subset: " in printed and "the epoch was chosen on these pictures, which flatters it" in printed
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["subset"] == "val"


def test_the_test_subset_has_no_part_in_training(phantoms, trained, tmp_path):
    for row in rows(trained / "split.csv"):
        if row["subset"] != "test":
            (tmp_path / "data" / row["path"]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / row["path"]).write_bytes((phantoms / row["path"]).read_bytes())
    xrays = [Xray(r["path"], int(r["grade"]), r["patient"], r["subset"]) for r in rows(trained / "split.csv")]
    parts, device = [[x for x in xrays if x.subset == s] for s in ("train", "val")], kneeoa.pick_device("auto")
    train_set, val_set = (KneeFolder(tmp_path / "data", part, 64, device) for part in parts)
    best = kneeoa.train(train_set, val_set, kneeoa.load_checkpoint(trained / "best.pt")["config"], tmp_path)
    before = kneeoa.load_checkpoint(trained / "best.pt")
    assert all(torch.equal(best["net"][key], before["net"][key]) for key in before["net"])


def test_plot_draws_a_sheet_that_is_a_picture(trained, phantoms):
    assert kneeoa.main(["plot", "--data", str(phantoms), "--run", str(trained)]) == 0
    sheet = np.asarray(Image.open(trained / "report.png").convert("L"))
    assert sheet.shape[0] > 600 and sheet.shape[1] > 1000
    assert 0.2 < (sheet == 255).mean() < 0.95 and len(np.unique(sheet)) > 100
    assert "matplotlib.pyplot" not in sys.modules  # it takes a display, and a notebook's own figures are drawn by it


def test_the_sheet_draws_the_history_and_the_confusion_matrix_of_the_run(trained, phantoms, monkeypatch):
    sheets = []
    monkeypatch.setattr(kneeoa, "save_figure", lambda path, figure: sheets.append(figure))
    assert kneeoa.main(["plot", "--data", str(phantoms), "--run", str(trained)]) == 0
    history, result = rows(trained / "history.csv"), json.loads((trained / "metrics.json").read_text())
    axes = {axes.get_ylabel().split(" ")[0]: axes for axes in sheets[0].axes}
    for quantity in ("loss", "accuracy"):
        curves = {line.get_label().split(" ")[0]: line.get_xydata().tolist() for line in axes[quantity].lines}
        for label, subset in (("training", "train"), ("validation", "val")):
            assert curves[label] == [[float(row["epoch"]), float(row[f"{subset}_{quantity}"])] for row in history]
        assert curves["chosen:"] == [[result["epoch"], 0], [result["epoch"], 1]]  # from the lower edge to the upper
    texts = {text.get_position(): text.get_text() for text in axes["true"].texts}
    for true, counts in enumerate(result["confusion"]):
        for predicted, count in enumerate(counts):
            assert texts[predicted, true] == f"{count}\n{count / sum(counts):.0%}"


def test_the_sheet_shows_of_each_grade_a_picture_answered_right_and_below_it_one_answered_wrong(trained, phantoms, monkeypatch):
    shown, show = [], kneeoa.show_xray
    monkeypatch.setattr(kneeoa, "show_xray", lambda *what: shown.append(what) or show(*what))
    assert kneeoa.main(["plot", "--data", str(phantoms), "--run", str(trained)]) == 0
    answers, wanted = rows(trained / "predictions.csv"), []
    for row, right in enumerate((True, False)):
        for grade in "01234":
            for answer in answers:
                if answer["grade"] == grade and (answer["predicted"] == grade) == right:
                    wanted.append((row, 2 * int(grade), answer["path"], f"true {grade}"))
                    wanted.append((row, 2 * int(grade) + 1, answer["path"], f"predicted {answer['predicted']}"))
                    break
    assert len(shown) == len(wanted) > 0
    for (axes, image, heat, title), (row, column, path, wanted_title) in zip(shown, wanted):
        place = axes.get_subplotspec()
        assert (place.rowspan.start, place.colspan.start, title) == (row, column, wanted_title)
        assert np.array_equal(image, kneeoa.read_xray(phantoms / path, 64)) and (heat is None) == title.startswith("true")


def test_another_number_of_grades_takes_another_line_at_the_top_of_the_file(phantoms, tmp_path):
    names = ("none", "some", "much")
    program = re.sub(r"^GRADES = .*", f"GRADES = {names}", PROGRAM.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / "kneeoa.py").write_text(program, encoding="utf-8")
    for i, file in enumerate(sorted(phantoms.rglob("*.png"))):
        target = tmp_path / "data" / str(i % len(names)) / f"{i}L.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for words in (["train", *SMALL], ["plot"], ["predict", "--heatmap", "heat.png", "--", str(target)]):
        done = subprocess.run([sys.executable, "kneeoa.py", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "data" / "metrics.json").read_text())
    assert len(result["recall"]) == len(result["confusion"]) == len(names)
    assert re.search(r"name +p0 +p1 +p2\n", done.stdout)


def test_predict_prints_the_grade_its_name_and_five_probabilities(trained, phantoms, capsys, tmp_path):
    images = [str(f) for f in sorted(phantoms.rglob("*.png"))[:2]]
    assert kneeoa.main(["predict", *images, "--run", str(trained), "--heatmap", str(tmp_path / "heat.png")]) == 0
    out, err = capsys.readouterr()
    assert f"graded by {trained / 'best.pt'}" in err
    for line, image in zip(out.splitlines()[1:], images):
        grade, name, *p = line.removeprefix(image).split()
        assert line.startswith(image) and kneeoa.GRADES[int(grade)] == name
        assert len(p) == 5 and sum(map(float, p)) == pytest.approx(1, abs=0.01)
    sheet = np.asarray(Image.open(tmp_path / "heat.png").convert("L"))
    assert sheet.shape[1] > 300 and (sheet[0] == 255).all()  # no title runs over the upper edge


@pytest.mark.parametrize("sheet, count, told", [("heat.jpg", 1, "heat.jpg: is drawn as PNG"), ("heat.png", 301, "301 pictures")])
def test_heat_maps_that_cannot_be_drawn_are_refused_before_anything_is_graded(trained, tmp_path, capsys, sheet, count, told):
    image = str(xray_file(tmp_path / "knee.png"))
    assert kneeoa.main(["predict", *[image] * count, "--run", str(trained), "--heatmap", str(tmp_path / sheet)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.count("\n") == 1 and not (tmp_path / sheet).exists()


def test_predict_agrees_with_the_test(trained, phantoms, capsys):
    answers = rows(trained / "predictions.csv")
    kneeoa.main(["predict", *(str(phantoms / row["path"]) for row in answers), "--run", str(trained)])
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, row in zip(lines, answers, strict=True):
        path, grade, _, *told = line.rsplit(maxsplit=7)
        assert (path, grade) == (str(phantoms / row["path"]), row["predicted"])
        assert [float(p) for p in told] == pytest.approx([float(row[f"p{g}"]) for g in range(5)], abs=2e-3)


def test_tune_ranks_by_validation_and_goes_on_where_it_was_stopped(phantoms, trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "split.csv").write_bytes((trained / "split.csv").read_bytes())
    table = tmp_path / "table.csv"
    table.write_text("image,patient\n")
    words = ["tune", "--data", str(phantoms), "--run", str(tmp_path), "--size", "64", "--epochs", "1", "--widths", "8",
             "--device", "cpu", "--patients", str(table)]
    assert kneeoa.main([*words, "--lr", "1e-3", "1e-2"]) == 0
    before = rows(tmp_path / "tune.csv")
    assert [row["lr"] for row in before] == ["0.001", "0.01"]
    trainings = []
    train = kneeoa.train
    monkeypatch.setattr(kneeoa, "train", lambda *rest, **more: trainings.append(rest[2].lr) or train(*rest, **more))
    capsys.readouterr()
    assert kneeoa.main([*words, "--lr", "1e-3", "1e-2", "3e-3"]) == 0
    after = rows(tmp_path / "tune.csv")
    assert trainings == [3e-3] and after[:2] == before and len(after) == 3
    for row, (loss, accuracy, kappa) in zip(after, ((0.1, 0.3, 0.1), (0.2, 0.2, 0.3), (0.3, 0.1, 0.2))):
        row |= {"val_loss": loss, "val_accuracy": accuracy, "val_kappa": kappa}  # three figures, three orders
    kneeoa.save_csv(tmp_path / "tune.csv", after[0], [row.values() for row in after])
    capsys.readouterr()
    assert kneeoa.main([*words, "--lr", "1e-3", "1e-2", "3e-3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert [float(line.split()[-1]) for line in lines[1:4]] == [0.3, 0.2, 0.1]  # by kappa
    told = shlex.split(lines[-1].partition("in full: ")[2])
    assert told[1:3] == ["kneeoa.py", "train"] and trainings == [3e-3]
    assert dict(zip(told[3::2], told[4::2])) == {"--data": str(phantoms), "--run": f"{tmp_path}-best", "--size": "64",
                                                 "--widths": "8", "--lr": "0.01", "--patients": str(table)}
    assert not list(tmp_path.rglob("metrics.json"))  # nothing was tested


@pytest.fixture(scope="session")
def learned(phantoms):
    """A network that a few seconds of training have taught to grade phantoms."""
    dataset, config = KneeFolder(phantoms, size=128), Config(size=128, widths=(16, 32, 64), epochs=14, batch=15)
    return kneeoa.load_net(kneeoa.train(dataset, dataset, config, phantoms.parent / "learned"), torch.device("cpu"))


def test_seconds_of_training_are_enough_to_grade_phantoms_of_patients_never_seen(learned, tmp_path):
    kneeoa.make_phantoms(tmp_path / "others", 100, seed=1)
    others = KneeFolder(tmp_path / "others", size=128)
    grades = kneeoa.decide(kneeoa.undo_leak(kneeoa.answer(learned, others.images), 0.5))
    figures = kneeoa.metrics(kneeoa.confusion_matrix(others.grades, grades))
    assert figures["kappa"] > 0.9 and figures["accuracy"] > 0.65  # seeds 0 to 3: .946 to .949 and .76 to .78


def test_the_heat_of_a_trained_network_lies_at_the_joint(learned, phantoms, monkeypatch):
    net, dataset = learned, KneeFolder(phantoms, size=128)
    maps, head = [], KneeNet.head
    monkeypatch.setattr(KneeNet, "head", lambda net, x: maps.append(x.detach()) or head(net, x))
    heats = kneeoa.heat_maps(net, dataset.images, dataset.grades)
    assert heats.shape == (90, 128, 128) and heats.min() >= 0 and heats.amax((1, 2)).max() == pytest.approx(1)
    validated = kneeoa.answer(net, dataset.images, [kneeoa.MAIN_VIEW])
    explained = head(net, maps[0]).softmax(1)
    assert torch.allclose(explained, validated, atol=0.05)  # what was validated is what is explained, but for bfloat16
    band = slice(54, 84)  # phantoms have their joint near row 0.54 of the height; the band is a quarter of the picture
    share = (heats[:, band].sum() / heats.sum()).item()
    assert share > 0.5, share


def test_a_heat_map_is_of_the_grade_that_is_asked_for():
    torch.manual_seed(0)
    net, images = KneeNet((8, 16)), torch.randint(256, (2, 1, 64, 64), dtype=torch.uint8)
    ones, threes, both = (kneeoa.heat_maps(net, images, torch.tensor(grades)) for grades in ((1, 1), (3, 3), (1, 3)))
    assert not torch.allclose(ones, threes, atol=0.1)
    assert torch.allclose(both, torch.stack((ones[0], threes[1])), atol=1e-4)


def test_the_heat_that_is_drawn_is_of_the_predicted_grade(trained, phantoms, tmp_path, monkeypatch):
    explained, heat_maps = [], kneeoa.heat_maps
    monkeypatch.setattr(kneeoa, "heat_maps", lambda net, images, grades: explained.append(grades) or heat_maps(net, images, grades))
    shutil.copytree(trained, tmp_path / "run")
    run, tested = ["--run", str(tmp_path / "run")], rows(trained / "predictions.csv")
    assert kneeoa.main(["plot", "--data", str(phantoms), *run]) == 0
    shown = [[r for r in tested if (r["predicted"] == r["grade"]) == right and r["grade"] == str(grade)][:1]
             for right in (True, False) for grade in range(5)]
    assert explained.pop().tolist() == [int(row["predicted"]) for cell in shown for row in cell]
    images = [str(phantoms / row["path"]) for row in tested]
    assert kneeoa.main(["predict", *images, *run, "--heatmap", str(tmp_path / "heat.png")]) == 0
    assert explained.pop().tolist() == [int(row["predicted"]) for row in tested]


# ------------------------------------------------------------------------------------------- nothing lost, nothing wrong


def command(*words):
    return [sys.executable, str(PROGRAM), *map(str, words)]


def the_same(run, other):
    """Whether two runs ended with the same bits, but for the seconds."""
    for file in ("metrics.json", "predictions.csv", "split.csv"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file
    for row, twin in zip(rows(run / "history.csv"), rows(other / "history.csv"), strict=True):
        assert row | {"seconds": ""} == twin | {"seconds": ""}
    for file in ("best.pt", "last.pt"):
        mine, theirs = (kneeoa.load_checkpoint(folder / file) for folder in (run, other))
        assert all(torch.equal(mine["net"][key], theirs["net"][key]) for key in mine["net"]), file


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(phantoms, tmp_path):
    settings = ["--size", "64", "--widths", "8,16", "--epochs", "8", "--batch", "8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("train", "--data", phantoms, "--run", whole, *settings), check=True, capture_output=True)
    pauses = np.random.default_rng().uniform(0.0, 0.35, 3)  # after the first checkpoint; other moments each time
    deaths = 0
    for pause in pauses:
        epochs = len(rows(killed / "history.csv")) if (killed / "history.csv").exists() else 0
        process = subprocess.Popen(command("train", "--data", phantoms, "--run", killed, *settings), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and (not (killed / "history.csv").exists() or len(rows(killed / "history.csv")) <= epochs):
            time.sleep(0.005)
        time.sleep(pause)
        process.kill()
        deaths += process.wait() != 0
    assert deaths >= 1
    subprocess.run(command("train", "--data", phantoms, "--run", killed, *settings), check=True, capture_output=True)
    the_same(killed, whole)
    assert not list(killed.glob("*.part"))


@pytest.mark.parametrize("file", ["last.pt", "best.pt", "history.csv"])
def test_death_while_a_file_is_written_loses_nothing(phantoms, trained, tmp_path, monkeypatch, file):
    (tmp_path / "split.csv").write_bytes((trained / "split.csv").read_bytes())
    words = ["train", "--data", str(phantoms), "--run", str(tmp_path), *SMALL]
    replace, times = kneeoa.os.replace, []

    def die(beside, path):
        if Path(path).name == file:
            times.append(path)
            if len(times) == 2:  # in the second epoch
                raise KeyboardInterrupt
        replace(beside, path)

    monkeypatch.setattr(kneeoa.os, "replace", die)
    assert kneeoa.main(words) == 130
    monkeypatch.undo()
    assert kneeoa.main(words) == 0
    the_same(tmp_path, trained)


def test_the_test_subset_waits_until_training_is_finished(phantoms, tmp_path, monkeypatch):
    words = ["--data", str(phantoms), "--run", str(tmp_path)]
    save_csv, saved = kneeoa.save_csv, []

    def stop_after_an_epoch(path, *rest):
        save_csv(path, *rest)
        if path.name == "history.csv":
            raise KeyboardInterrupt

    monkeypatch.setattr(kneeoa, "save_csv", stop_after_an_epoch)
    assert kneeoa.main(["train", *words, *SMALL]) == 130
    monkeypatch.undo()
    for command_line in (["plot", *words], ["train", *words, *SMALL]):
        assert kneeoa.main(command_line) == 0
        saved.append(json.loads((tmp_path / "metrics.json").read_text())["subset"])
    assert saved == ["val", "test"]


def test_a_run_that_was_stopped_between_two_of_its_files_writes_the_others_when_it_goes_on(phantoms, tmp_path, monkeypatch):
    dataset, config, save_checkpoint = KneeFolder(phantoms, size=64), Config(size=64, widths=(8,), epochs=1), kneeoa.save_checkpoint

    def stop(path, checkpoint):
        if path.name == "best.pt":
            raise KeyboardInterrupt
        save_checkpoint(path, checkpoint)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(kneeoa, "save_checkpoint", stop)
        kneeoa.train(dataset, dataset, config, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert kneeoa.train(dataset, dataset, config, tmp_path)["done"] == 1
    assert len(rows(tmp_path / "history.csv")) == 1


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(phantoms, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background were told to ignore Ctrl-C
    process = subprocess.Popen(command("train", "--data", phantoms, "--run", tmp_path, "--size", "64", "--epochs", "500"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "history.csv").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert "the same command goes on" in err.splitlines()[-1]


def test_a_finished_run_says_so_and_prints_its_result_again(phantoms, tmp_path, trained, capsys):
    before = kneeoa.load_checkpoint(trained / "last.pt")
    assert kneeoa.main(["train", "--data", str(phantoms), "--run", str(trained), *SMALL]) == 0
    after = kneeoa.load_checkpoint(trained / "last.pt")
    assert after["history"] == before["history"] and all(torch.equal(w, after["net"][name]) for name, w in before["net"].items())
    out = capsys.readouterr().out
    assert "2 of 2 epochs are done already" in out and "quadratic weighted kappa" in out


def test_what_it_says_to_type_next_works_in_the_folder_where_the_last_was_typed(trained, phantoms, tmp_path):
    words = command("train", "--data", phantoms, "--run", trained, *SMALL)
    done = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
    subprocess.run(shlex.split(done.stdout.split("next: ")[1]), cwd=tmp_path, check=True, capture_output=True)


def test_a_run_is_not_gone_on_with_under_other_settings_or_with_other_pictures(phantoms, trained, tmp_path, capsys):
    words = ["train", "--data", str(phantoms), "--run", str(trained), *SMALL]
    assert kneeoa.main([*words, "--lr", "0.01"]) == 2
    assert "lr was 0.003, now 0.01" in capsys.readouterr().err
    other = tmp_path / "phantoms"
    kneeoa.make_phantoms(other, 90)
    changed = next(x for x in rows(trained / "split.csv") if x["subset"] == "train")["path"]
    xray_file(other / changed)
    assert kneeoa.main(["train", "--data", str(other), "--run", str(trained), *SMALL]) == 2
    assert "the pictures or their split were others" in capsys.readouterr().err
    shutil.copytree(trained, tmp_path / "regraded")
    split = (trained / "split.csv").read_text()
    regraded = split.replace(f"{changed},{changed[0]},", f"{changed},{(int(changed[0]) + 1) % 5},")
    (tmp_path / "regraded" / "split.csv").write_text(regraded)
    assert kneeoa.main(["train", "--data", str(phantoms), "--run", str(tmp_path / "regraded"), *SMALL]) == 2
    assert "the pictures or their split were others" in capsys.readouterr().err
    assert kneeoa.main(["split", "--data", str(phantoms), "--run", str(trained)]) == 2


def bomb(path):
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""
    data = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)))


BROKEN = {
    "truncated.png": lambda path: path.write_bytes(xray_file(path).read_bytes()[:300]),
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("I am a picture, believe me"),
    "random.png": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "bomb.png": bomb,
    "line.png": lambda path: xray_file(path, size=(200, 3)),
}


def test_all_broken_pictures_are_named_in_one_line(tmp_path, capsys):
    folder_of(tmp_path / "data", patient_names(4))
    for name, spoil in BROKEN.items():
        spoil(tmp_path / "data" / "2" / name)
    assert kneeoa.main(["train", "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err.split("kneeoa: error: ")[1]
    assert err.count("\n") == 1 and all(name in err for name in BROKEN) and "1000" not in err
    assert not (tmp_path / "run").exists()


class Evil:
    def __reduce__(self):
        return open, ("pwned", "w")


def hostile(path):
    torch.save({"config": Evil(), "net": {}}, path)


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:2000]),
    lambda path: path.write_text("no checkpoint"),
    lambda path: torch.save({"state_dict": {}}, path),
    lambda path: torch.save([1, 2, 3], path),
    hostile,
], ids=["missing", "empty", "truncated", "text", "foreign", "list", "hostile"])
@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_bad_checkpoint_is_named_and_no_pickle_runs(spoil, name, trained, phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    spoil(run / name)
    assert kneeoa.main(["plot", "--data", str(phantoms), "--run", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kneeoa: error: ") and name in err and err.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


def test_a_split_made_without_the_patients_file_is_not_trained_on_with_it(tmp_path, capsys):
    names = [f"{g}/picture{i}of{g}.png" for g in range(5) for i in range(8)]
    data, table = folder_of(tmp_path / "data", names), tmp_path / "patients.csv"
    table.write_text("image,patient\n" + "".join(f"{Path(name).name},{i // 2}\n" for i, name in enumerate(names)))
    words, patients = ["--data", str(data), "--run", str(tmp_path / "run")], ["--patients", str(table)]
    assert kneeoa.main(["split", *words]) == 0  # each picture a patient of its own
    assert kneeoa.main(["train", *words, *SMALL, *patients]) == 2
    assert "run split again" in capsys.readouterr().err and not (tmp_path / "run" / "last.pt").exists()
    assert kneeoa.main(["split", *words, *patients]) == 0
    assert kneeoa.main(["train", *words, *SMALL, *patients]) == 0
    assert kneeoa.main(["train", *words, *SMALL]) == 0  # goes on with the split that is there


@pytest.mark.parametrize("text", ["name,who\na.png,1\n", ""])
def test_a_patients_file_without_its_columns_is_refused(text, phantoms, tmp_path, capsys):
    table = tmp_path / "patients.csv"
    table.write_text(text)
    assert kneeoa.main(["split", "--data", str(phantoms), "--run", str(tmp_path / "run"), "--patients", str(table)]) == 2
    assert "is no patients file" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_tables_that_a_spreadsheet_has_saved_are_read(phantoms, trained, tmp_path):
    patients, split = tmp_path / "patients.csv", tmp_path / "split.csv"
    patients.write_text("image,patient\na.png,7\n", encoding="utf-8-sig")  # Excel begins a table with a byte order mark
    split.write_text((trained / "split.csv").read_text(), encoding="utf-8-sig")
    assert kneeoa.read_patients(patients) == {"a.png": "7"}
    assert kneeoa.read_split(phantoms, tmp_path) == kneeoa.read_split(phantoms, trained)


@pytest.mark.parametrize("spoil, told", [
    (lambda text: text.replace(",train", ",exam", 1), "is damaged"),
    (lambda text: text.replace("path,", "file,", 1), "is damaged"),
    (lambda text: text.replace("R.png", "R_gone.png"), "pictures are not in"),
    (lambda text: text.replace(",train", ",val", 1), "patients are in two subsets"),
    (lambda text: "", "is damaged"),
], ids=["subset", "columns", "gone", "leak", "empty"])
def test_a_bad_split_file_is_refused(spoil, told, phantoms, trained, tmp_path, capsys):
    (tmp_path / "split.csv").write_text(spoil((trained / "split.csv").read_text()))
    assert kneeoa.main(["train", "--data", str(phantoms), "--run", str(tmp_path), *SMALL]) == 2
    err = capsys.readouterr().err
    assert told in err and "split.csv" in err
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("old, new", [("lr,", "rate,"), (",0.", ",much.")], ids=["columns", "words"])
def test_a_bad_table_of_what_was_tried_is_refused_and_made_again_when_it_is_gone(old, new, phantoms, trained, tmp_path, capsys):
    (tmp_path / "split.csv").write_bytes((trained / "split.csv").read_bytes())
    words = ["tune", "--data", str(phantoms), "--run", str(tmp_path), "--size", "64", "--epochs", "1", "--widths", "4"]
    assert kneeoa.main(words) == 0
    table = (tmp_path / "tune.csv").read_text()
    (tmp_path / "tune.csv").write_text(table.replace(old, new))
    capsys.readouterr()
    assert kneeoa.main(words) == 2
    err = capsys.readouterr().err
    assert "tune.csv: is damaged" in err and err.count("\n") == 1
    (tmp_path / "tune.csv").unlink()
    assert kneeoa.main(words) == 0 and (tmp_path / "tune.csv").read_text() == table
    assert "1 of 1 epochs are done already" in capsys.readouterr().out


def test_a_grade_without_pictures_and_an_empty_folder_are_refused(tmp_path, capsys):
    assert kneeoa.main(["split", "--data", str(tmp_path)]) == 2
    assert "no folders 0 to 4 in it" in capsys.readouterr().err
    folder_of(tmp_path, [name for name in patient_names(4) if name[0] != "3"])
    assert kneeoa.main(["split", "--data", str(tmp_path)]) == 2
    assert "no pictures of grade 3" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Glyph")  # fonts without Chinese signs
def test_file_names_of_every_kind_work_all_through(tmp_path, phantoms, capsys):
    data, strange = tmp_path / "my data", ["a b", 'quo"te', "com,ma", "new\nline", "knäe-膝", "-dash", "$_$"]
    strange += ["\udcff"] if sys.platform == "linux" else []  # a byte that is no letter, which other systems refuse
    for i, file in enumerate(sorted(phantoms.rglob("*.png"))):
        target = data / file.parent.name / f"{strange[i % len(strange)]}{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    run = tmp_path / "the run"
    assert kneeoa.main(["train", "--data", str(data), "--run", str(run), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "90 of 90 pictures name no patient" in out
    answers = kneeoa.read_csv(run / "predictions.csv")
    assert all((data / row["path"]).is_file() for row in answers)
    python, program, *words = shlex.split(out.split("next: ")[1])  # as a shell takes what is copied from here
    assert shutil.which(python) and program == "kneeoa.py"
    assert kneeoa.main(words) == 0 and (run / "report.png").exists()
    images = [str(data / row["path"]) for row in answers]
    assert kneeoa.main(["predict", "--run", str(run), "--heatmap", str(tmp_path / "heat.png"), "--", *images]) == 0
    assert len(answers) < len(capsys.readouterr().out.splitlines()) and (tmp_path / "heat.png").exists()


def test_a_folder_at_home_is_found_where_the_shell_has_left_its_tilde(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    folder_of(tmp_path / "xrays", patient_names(4))
    assert kneeoa.main(["split", "--data", "~/xrays", "--run", "~/run"]) == 0
    assert (tmp_path / "run" / "split.csv").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(phantoms, tmp_path, monkeypatch, capsys):
    words = ["train", "--data", str(phantoms), "--run", str(tmp_path), *SMALL]
    evaluate, calls = kneeoa.evaluate, []

    def spoiled(*rest):
        calls.append(1)
        loss, answers = evaluate(*rest)
        return (loss if len(calls) < 2 else math.nan), answers

    monkeypatch.setattr(kneeoa, "evaluate", spoiled)
    assert kneeoa.main(words) == 2
    assert "epoch 2: the loss is no number" in capsys.readouterr().err
    assert len(kneeoa.load_checkpoint(tmp_path / "last.pt", "history")["history"]) == 1


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    code = ("import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import kneeoa; from pathlib import Path\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # what the kernel refuses is real, only earlier
            "kneeoa.run_command = lambda argv: kneeoa.save(Path(sys.argv[2]), b'x' * 5000)\n"
            "sys.exit(kneeoa.main())")
    done = subprocess.run([sys.executable, "-c", code, str(PROGRAM.parent), str(path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("kneeoa: error: ") and done.stderr.count("\n") == 1
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])  # the first is NumPy's, the other a GPU's
def test_a_full_memory_ends_in_one_line(kind, phantoms, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise kind("Unable to allocate 99.9 GiB")

    monkeypatch.setattr(kneeoa, "KneeFolder", full)
    assert kneeoa.main(["train", "--data", str(phantoms), "--run", str(tmp_path)]) == 2
    assert "kneeoa: error: the memory is full, try a smaller --size or --batch" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_folder_that_cannot_be_written_is_named(phantoms, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert kneeoa.main(["split", "--data", str(phantoms), "--run", str(tmp_path / "file" / "run")]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "file") in err and err.count("\n") == 1


@pytest.mark.parametrize("words, told", [
    (["train", "--epochs", "0"], "--epochs 0: must be from 1 to 10000"),
    (["train", "--lr", "nan"], "--lr nan: must be"),
    (["train", "--lr", "inf"], "--lr inf: must be"),
    (["train", "--size", "63"], "--size 63: must be"),
    (["train", "--batch", "1"], "--batch 1: must be"),
    (["train", "--seed", "-1"], "--seed -1: must be from 0 to 2147483647"),
    (["train", "--dropout", "-0.1"], "--dropout -0.1: must be"),
    (["train", "--widths", "8,0"], "--widths 8,0: must be one to four numbers"),
    (["train", "--epochs", "many"], "--epochs"),
    (["train", "--widths", "8,x"], "--widths 8,x: must be one to four numbers"),
    (["train", "--colour", "red"], "--colour"),
    (["train", "--data", "nowhere"], "nowhere: no such folder"),
    (["train", "--device", "cuda:99"], "cuda:99"),
    (["predict", "x.png", "--run", "nowhere"], "nowhere/best.pt: no such checkpoint"),
    (["dance"], "dance"),
])
def test_a_mistake_ends_in_one_line_and_status_2(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kneeoa.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("kneeoa: error: ") and told in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_copied_file_alone_draws_phantoms_and_splits_them(tmp_path):
    (tmp_path / "kneeoa.py").write_bytes(PROGRAM.read_bytes())
    for words in (["phantoms", "--count", "60"], ["split"]):
        subprocess.run([sys.executable, "kneeoa.py", *words], cwd=tmp_path, check=True, capture_output=True)
    assert len(rows(tmp_path / "runs" / "phantoms" / "split.csv")) == 60


def test_with_no_folder_named_and_none_there_phantoms_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = kneeoa.make_phantoms
    monkeypatch.setattr(kneeoa, "make_phantoms", lambda folder, count=1000: draw(folder, count * 60 // 1000))  # 60 are enough
    assert kneeoa.main(["split"]) == 0
    assert "drawing 1000 phantoms" in capsys.readouterr().out
    assert len(rows(tmp_path / "runs" / "phantoms" / "split.csv")) == 60


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_installs_once_and_again_after_a_failure_and_touches_no_python_of_the_system(tmp_path):
    system, log, broken = tmp_path / "bin" / "python3", tmp_path / "log", tmp_path / "broken"
    system.parent.mkdir()
    system.write_text(f"""#!/bin/sh
test "$1" = -c && exit # what asks for the version
echo "$*" >> "{log}"
case "$*" in
"-m venv .venv") mkdir -p .venv/bin; ln -sf "{system}" .venv/bin/python ;;
*pip*) test ! -e "{broken}" ;;
esac
""")
    system.chmod(0o755)
    os.utime(system, (0, 0))
    for file in ("Makefile", "requirements.txt"):
        shutil.copy(PROGRAM.with_name(file), tmp_path)

    def made(*words):
        """What `make` has Python do, and its status."""
        log.write_text("")
        environment = {"PATH": f"{system.parent}:{os.environ['PATH']}"}  # without what a `make test` may have set
        done = subprocess.run(["make", *words], cwd=tmp_path, env=environment, capture_output=True)
        return log.read_text().splitlines(), done.returncode

    installing = ["-m venv .venv", "-m pip install --requirement requirements.txt"]
    broken.touch()
    assert made("train") == (installing, 2)
    broken.unlink()
    assert made("train", "DATA=my data", "ARGS=--epochs 5") == ([*installing, "kneeoa.py train --data my data --epochs 5"], 0)
    assert made("plot", "RUN=a run") == (["kneeoa.py plot --run a run"], 0)
    assert made("split", "PYTHON=python3") == (["kneeoa.py split"], 0)
    assert system.stat().st_mtime == 0
    (tmp_path / ".venv" / "ready").unlink()
    system.write_text(f'#!/bin/sh\necho "$1" >> "{log}"\ntest "$1" != -c\n')  # a Python that is too old
    assert made("train") == (["-c"], 2)
