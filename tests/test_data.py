"""data.py: long tails, client partitions, image sets in their real file formats, CLIP loading."""
import argparse
import hashlib
import json
import pickle
import shutil
import socket
import struct
import tarfile
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy.io import savemat
from torchvision import transforms
from transformers import BertTokenizer, ViTConfig, ViTModel

import common
import data
from common import UserError

CPU = torch.device("cpu")
CIFAR100_NAMES = sorted(" ".join(data.CIFAR100_COARSE).split())
# The coarse label of fine labels 0..99 as CIFAR-100's own files pair them.
CIFAR100_PARENT = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
    6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
    16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may reach a network; code that tries sees a machine without one."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise OSError("no network")
        return connect(self, address)

    def unknown_host(*_, **__):
        raise socket.gaierror("no network")
    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def picture(path, shade=0, mode="RGB"):
    """A 10 x 8 picture of one shade of grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (10, 8), (shade,) * len(mode) if len(mode) > 1 else shade).save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def tree(root, **classes):
    """root/<class>/<i>.png, as many as asked for."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(root / name / f"{i}.png", i)


def toy(seed=0, per_class=6, size=8):
    """A small in-memory image set of random pixels: (Images, labels)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (2 * per_class, size, size, 3), dtype=np.uint8)
    return data.Images(pixels), np.repeat([0, 1], per_class)


# -- long tails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance, total, groups", [
    (100, 10847, (35, 34, 31)), (50, 12608, (41, 40, 19)), (10, 19573, (69, 31, 0))])
def test_cifar100_long_tail_has_the_published_sizes(imbalance, total, groups):
    counts = data.long_tail_counts(500, 100, imbalance)
    assert sum(counts) == total
    assert counts[0] == 500 and counts[-1] == 500 // imbalance
    assert counts == sorted(counts, reverse=True)
    split = data.frequency_groups(counts, (100, 20))
    assert tuple(len(split[k]) for k in ("many", "med", "few")) == groups


@pytest.mark.parametrize("imbalance, total", [(100, 12406), (50, 13996), (10, 20431)])
def test_cifar10_long_tail_has_the_published_sizes(imbalance, total):
    assert sum(data.long_tail_counts(5000, 10, imbalance)) == total


def test_long_tail_counts_without_imbalance_or_with_one_class():
    assert data.long_tail_counts(7, 3, 1) == [7, 7, 7]
    assert data.long_tail_counts(7, 1, 100) == [7]


def test_rarest_class_is_exactly_the_imbalance_below_the_most_frequent():
    wrong = [(n, i) for i in range(1, 101) for n in (i, 3 * i, 6 * i)
             if data.long_tail_counts(n, 2, i)[-1] != n // i]
    assert wrong == []


@pytest.mark.parametrize("bad", [
    (0, 10, 10), (-5, 10, 10), (500, 0, 10), (500, 10, .5), (500, 10, 0)])
def test_long_tail_counts_refuses_bad_arguments(bad):
    with pytest.raises(ValueError, match="long_tail_counts needs"):
        data.long_tail_counts(*bad)


def test_long_tail_indices_draws_the_counts_without_repeats():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    counts = [40, 20, 9, 3, 0]
    chosen = data.long_tail_indices(labels, counts, np.random.default_rng(1))
    assert chosen.dtype == np.int64 and len(np.unique(chosen)) == len(chosen)
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen], minlength=5).tolist() == counts


def test_long_tail_indices_takes_all_there_is_when_asked_for_more():
    chosen = data.long_tail_indices([0, 0, 1], [5, 5], np.random.default_rng(0))
    assert chosen.tolist() == [0, 1, 2]


def test_long_tail_indices_depends_on_the_seed_alone():
    labels = np.repeat(np.arange(5), 40)
    a, b, c = (data.long_tail_indices(labels, [20] * 5, np.random.default_rng(s))
               for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("rule", [(100, 20), "thirds"])
@pytest.mark.parametrize("counts", [[500, 101, 100, 21, 20, 0], [5, 5, 5, 5], [1, 300, 50], [7]])
def test_every_class_is_in_exactly_one_group(rule, counts):
    groups = data.frequency_groups(counts, rule)
    assert list(groups) == ["many", "med", "few"]
    assert sorted(np.concatenate(list(groups.values())).tolist()) == list(range(len(counts)))


def test_group_thresholds_and_thirds():
    by_bound = data.frequency_groups([20, 500, 101, 100, 21, 0], (100, 20))
    assert [by_bound[k].tolist() for k in ("many", "med", "few")] == [[1, 2], [3, 4], [0, 5]]
    thirds = data.frequency_groups([3, 900, 50, 1, 700, 40], "thirds")
    assert [thirds[k].tolist() for k in ("many", "med", "few")] == [[1, 4], [2, 5], [0, 3]]


# -- clients -------------------------------------------------------------------------------------


def test_cifar100_coarse_table_is_cifars_own():
    parent = {f: i for i, names in enumerate(data.CIFAR100_COARSE) for f in names.split()}
    assert [parent[name] for name in CIFAR100_NAMES] == CIFAR100_PARENT


def test_pachinko_on_cifar100_lt_has_the_paper_statistics():
    counts = data.long_tail_counts(500, 100, 100)
    fine = np.concatenate([np.repeat(np.arange(100), counts), np.repeat(np.arange(100), 100)])
    coarse = np.array(CIFAR100_PARENT)[fine]
    spreads = []
    for seed in range(3):
        clients = data.pachinko_partition(coarse, fine, 20, 1.0, np.random.default_rng(seed))
        assert [len(c) for c in clients] == [1042] * 20
        together = np.concatenate(clients)
        assert len(np.unique(together)) == len(together)
        assert together.min() >= 0 and together.max() < len(fine)
        train = [c[c < 10847] for c in clients]
        sizes = np.array([len(t) for t in train])
        assert abs(sizes.mean() - 542.2) < 1  # all but 7 of the 20,847 samples are handed out
        classes = [len(np.unique(fine[t])) for t in train]
        assert min(classes) >= 3 and max(classes) <= 95 and 25 <= np.mean(classes) <= 65
        spreads.append(sizes.std())
    assert abs(np.mean(spreads) - 149) < 60


def small_labels():
    fine = np.repeat(np.arange(12), 30)
    return fine // 3, fine


def test_pachinko_depends_on_the_generator_alone():
    a, b, c = (data.pachinko_partition(*small_labels(), 6, 1.0, np.random.default_rng(s))
               for s in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_pachinko_uses_every_sample_when_clients_divide_the_pool():
    clients = data.pachinko_partition(*small_labels(), 6, .05, np.random.default_rng(0))
    assert sorted(np.concatenate(clients).tolist()) == list(range(360))


def test_pachinko_is_more_skewed_with_a_small_beta():
    coarse, fine = small_labels()

    def top_share(beta):
        clients = data.pachinko_partition(coarse, fine, 6, beta, np.random.default_rng(0))
        return np.mean([np.bincount(coarse[c]).max() / len(c) for c in clients[:3]])
    assert top_share(.05) > top_share(100) + .2


def test_dirichlet_partition_hands_out_every_sample_once():
    rng = np.random.default_rng(0)
    train_labels, test_labels = rng.integers(0, 10, 900), rng.integers(0, 10, 300)
    train, test = data.dirichlet_partition(train_labels, test_labels, 8, .5, rng)
    for parts, total in ((train, 900), (test, 300)):
        assert len(parts) == 8 and all(len(p) for p in parts)
        assert all(p.dtype == np.int64 for p in parts)
        assert sorted(np.concatenate(parts).tolist()) == list(range(total))
    largest = np.bincount(train_labels).max()
    assert max(map(len, train)) <= 900 / 8 + largest  # full clients get nothing of further classes
    for c in range(10):  # test classes are cut where the training classes are
        n, m = (train_labels == c).sum(), (test_labels == c).sum()
        for a, b in zip(train, test, strict=True):
            gap = (train_labels[a] == c).sum() / n - (test_labels[b] == c).sum() / m
            assert abs(gap) <= 1 / n + 1 / m


def test_dirichlet_partition_keeps_test_samples_of_a_class_without_training_samples():
    train_labels = np.repeat([0, 1], 20)  # the rarest class of a long tail may have none
    for missing in (2, 0):
        labels = train_labels + (missing == 0)
        test_labels = np.repeat([0, 1, 2], 10)
        _, test = data.dirichlet_partition(labels, test_labels, 3, 1.0, np.random.default_rng(0))
        assert sorted(np.concatenate(test).tolist()) == list(range(30))


def test_dirichlet_partition_depends_on_the_generator_alone():
    labels = np.repeat(np.arange(5), 40)
    a, b, c = (data.dirichlet_partition(labels, labels, 4, 1.0, np.random.default_rng(s))[0]
               for s in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_dirichlet_partition_is_more_skewed_with_a_small_beta():
    labels = np.repeat(np.arange(10), 100)

    def classes_held(beta):
        train, _ = data.dirichlet_partition(labels, labels, 5, beta, np.random.default_rng(0))
        return np.mean([len(np.unique(labels[t])) for t in train])
    assert classes_held(.1) + 2 < classes_held(10)


def test_dirichlet_partition_that_cannot_be_says_so():
    with pytest.raises(UserError, match=r"all 5 clients .* of 3 and 2; use fewer --cl"):
        data.dirichlet_partition([0, 1, 1], [0, 1], 5, 1.0, np.random.default_rng(0), tries=5)
    with pytest.raises(UserError, match=r"all 6 clients .*in 5 draws; .*or a larger --alpha"):
        data.dirichlet_partition([0] * 6, [0] * 6, 6, .01, np.random.default_rng(0), 5, "--alpha")


def test_a_users_path_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert data.user_path("~/a.csv") == Path("/home/me/a.csv")
    assert data.user_path("b~/~.csv") == Path("b~/~.csv")


# -- image sets in their real formats ------------------------------------------------------------
# Each writer makes a tiny copy of a data set as it lies on disk and returns what must be read from
# it: class names, training labels, test labels. Image i of a part has the grey shade 10 · i. Sets
# that are halved by chance have one part: the labels of all images of all official splits in turn.


def with_checksums(monkeypatch, kind, folder, parts):
    """Let torchvision's own integrity check run, with the md5 sums of the files written here."""
    def md5(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(kind, split, [[name, md5(name)] for name in parts[split]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(kind.meta["filename"])})


def write_cifar_batch(path, count, **labels):
    """(N, 3072) uint8, red plane first; green is one more than red, blue two more."""
    pixels = 10 * np.arange(count)[:, None] + np.repeat([0, 1, 2], 1024)[None]
    content = {"data": pixels.astype(np.uint8), **labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_cifar100(root, monkeypatch):
    folder, train, test = root / "cifar-100-python", [0, 99, 7], [1, 2]
    for name, labels in (("train", train), ("test", test)):
        write_cifar_batch(folder / name, len(labels), fine_labels=labels,
                          coarse_labels=[CIFAR100_PARENT[f] for f in labels])
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CIFAR100_NAMES}, protocol=2))
    with_checksums(monkeypatch, torchvision.datasets.CIFAR100, folder,
                   {"train_list": ["train"], "test_list": ["test"]})
    return [n.replace("_", " ") for n in CIFAR100_NAMES], train, test


def write_cifar10(root, monkeypatch):
    folder = root / "cifar-10-batches-py"
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
             "truck"]
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    write_cifar_batch(folder / batches[0], 3, labels=[3, 1, 4])
    for i, batch in enumerate(batches[1:]):
        write_cifar_batch(folder / batch, 1, labels=[i])
    write_cifar_batch(folder / "test_batch", 2, labels=[9, 0])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    with_checksums(monkeypatch, torchvision.datasets.CIFAR10, folder,
                   {"train_list": batches, "test_list": ["test_batch"]})
    return names, [3, 1, 4, 0, 1, 2, 3], [9, 0]


def write_fashion(root, monkeypatch):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split, labels in (("train", [9, 0, 5]), ("t10k", [1, 2])):
        pixels = np.repeat(10 * np.arange(len(labels), dtype=np.uint8), 28 * 28).tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, len(labels), 28, 28) + pixels)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, len(labels)) + bytes(labels))
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
             "Bag", "Ankle boot"]
    return names, [9, 0, 5], [1, 2]


def write_food101(root, monkeypatch):
    parts = {"train": {"apple_pie": ["apple_pie/10", "apple_pie/11"], "waffles": ["waffles/12"]},
             "test": {"apple_pie": ["apple_pie/20"], "waffles": ["waffles/21"]}}
    for split, classes in parts.items():
        text(root / "food-101" / "meta" / f"{split}.json", json.dumps(classes))
        for i, name in enumerate(n for members in classes.values() for n in members):
            picture(root / "food-101" / "images" / f"{name}.jpg", 10 * (i + 3 * (split == "test")))
    return ["apple pie", "waffles"], [0, 0, 1, 0, 1], None


def write_dtd(root, monkeypatch):
    base = root / "dtd" / "dtd"
    parts = {"train": ["banded/banded_0002.jpg", "polka-dotted/polka-dotted_0001.jpg"],
             "val": ["polka-dotted/polka-dotted_0003.jpg", "banded/banded_0004.jpg"],
             "test": ["banded/banded_0005.jpg", "polka-dotted/polka-dotted_0006.jpg"]}
    for split, names in parts.items():
        text(base / "labels" / f"{split}1.txt", *names)
        for i, name in enumerate(names):
            picture(base / "images" / name, 10 * (i + 2 * list(parts).index(split)))
    return ["banded", "polka-dotted"], [0, 1, 1, 0, 0, 1], None


def write_aircraft(root, monkeypatch):
    base = root / "fgvc-aircraft-2013b" / "data"
    text(base / "variants.txt", "Boeing 717", "Falcon 2000", "Tornado")
    parts = {"trainval": ["1025794 Falcon 2000", "0056978 Boeing 717", "0000003 Tornado"],
             "test": ["1514522 Tornado", "0747566 Falcon 2000"]}
    for split, lines in parts.items():
        text(base / f"images_variant_{split}.txt", *lines)
        for i, line in enumerate(lines):
            picture(base / "images" / f"{line[:7]}.jpg", 10 * i)
    return ["Boeing 717", "Falcon 2000", "Tornado"], [1, 0, 2], [2, 1]


def write_pets(root, monkeypatch):
    base = root / "oxford-iiit-pet"
    parts = {"trainval": ["Abyssinian_100 1 1 1", "american_bulldog_10 2 2 1",
                          "Abyssinian_101 1 1 1"],
             "test": ["american_bulldog_11 2 2 1", "Abyssinian_201 1 1 1"]}
    for split, lines in parts.items():
        text(base / "annotations" / f"{split}.txt", *lines)
        for i, line in enumerate(lines):
            picture(base / "images" / f"{line.split()[0]}.jpg", 10 * i)
    return ["Abyssinian", "American Bulldog"], [0, 1, 0], [1, 0]


DOGS = {"train": ["n02085620-Chihuahua/n02085620_5927.jpg", "n02086240-Shih-Tzu/n02086240_1.jpg",
                  "n02085782-Japanese_spaniel/n02085782_2.jpg"],
        "test": ["n02086240-Shih-Tzu/n02086240_9.jpg", "n02085620-Chihuahua/n02085620_8.jpg"]}


def write_dog_lists(root):
    """train_list.mat and test_list.mat: an (N, 1) cell array of names, (N, 1) labels from 1 on."""
    root.mkdir(parents=True, exist_ok=True)
    number = {"Chihuahua": 1, "Japanese_spaniel": 2, "Shih-Tzu": 3}
    for split, names in DOGS.items():
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = names
        labels = [[float(number[n.split("/")[0].partition("-")[2]])] for n in names]
        savemat(root / f"{split}_list.mat", {"file_list": cells, "annotation_list": cells,
                                             "labels": np.array(labels)})


def write_dog_images(root):
    for names in DOGS.values():
        for i, name in enumerate(names):
            picture(root / "Images" / name, 10 * i)


def write_dogs(root, monkeypatch):
    write_dog_lists(root / "stanford-dogs")
    write_dog_images(root / "stanford-dogs")
    return ["Chihuahua", "Japanese spaniel", "Shih-Tzu"], [0, 2, 1], [2, 0]


def write_lists(base, prefix, parts):
    for split, lines in parts.items():
        text(base / f"{prefix}_LT_{split}.txt", *lines)
        for i, line in enumerate(filter(None, lines)):
            picture(base / line.rpartition(" ")[0], 10 * i)


def write_imagenet(root, monkeypatch):
    write_lists(root / "imagenet-lt", "ImageNet", {
        "train": ["train/n01440764/n01440764_190.JPEG 0", "train/n15075141/n15075141_7.JPEG 999",
                  ""],
        "test": ["val/ILSVRC2012_val_00000001.JPEG 65"]})
    return list(open_clip.IMAGENET_CLASSNAMES), [0, 999], [65]


def write_places(root, monkeypatch):
    write_lists(root / "places-lt", "Places", {
        "train": ["data_256/a/airfield/00000001.jpg 0", "data_256/a/airfield/00000002.jpg 0",
                  "data_256/a/apartment_building/outdoor/00000003.jpg 2",
                  "data_256/b/bus_station/indoor/00000004.jpg 1"],
        "test": ["val_256/Places365_val_00000001.jpg 2"]})
    return ["airfield", "bus station indoor", "apartment building outdoor"], [0, 0, 2, 1], [2]


WRITERS = {
    "cifar100": write_cifar100, "cifar10": write_cifar10, "fashion-mnist": write_fashion,
    "food101": write_food101, "dtd": write_dtd, "aircraft": write_aircraft, "pets": write_pets,
    "dogs": write_dogs, "imagenet": write_imagenet, "places": write_places}
HALVED = ["food101", "dtd"]
CAPTION = {"food101": "a type of food, a photo of waffle.", "dtd": "a photo of a waffle pattern.",
           "aircraft": "a type of aircraft, a photo of a waffle.",
           "pets": "a type of pet, a photo of a waffle.",
           "dogs": "a photo of a waffle, a type of dog."}


def test_every_image_set_is_covered_here():
    assert sorted([*WRITERS, "shapes"]) == data.IMAGE_SETS


@pytest.mark.parametrize("name", WRITERS)
def test_image_set_is_read_from_its_own_files(name, tmp_path, monkeypatch):
    class_names, train_labels, test_labels = WRITERS[name](tmp_path, monkeypatch)
    images = data.load_images(name, tmp_path)
    assert images.class_names == class_names and images.num_classes == len(class_names)
    assert images.template.format("waffle") == CAPTION.get(name, "a photo of a waffle.")
    assert images.long_tailed == (name in ("imagenet", "places"))
    parts = [(images.train, images.train_labels, train_labels),
             (images.test, images.test_labels, test_labels)]
    if name in HALVED:  # which image is in which half is drawn: look at both together
        shades = [round(np.asarray(im).mean() / 10) for half, _, _ in parts for im in half]
        order = np.argsort(shades)
        labels = np.concatenate([images.train_labels, images.test_labels])[order]
        parts = [(data.Images.concat(images.train, images.test).subset(order), labels,
                  train_labels)]
    for part, labels, wanted in parts:
        assert labels.dtype == np.int64 and labels.tolist() == wanted
        assert len(part) == len(wanted)
        for i in range(len(part) if name in HALVED else min(len(part), 3)):
            image = part[i]
            assert image.mode == "RGB"
            shades = [10 * i + c * name.startswith("cifar") for c in range(3)]
            assert np.abs(np.asarray(image).astype(int) - shades).max() <= 2  # JPEG rounds


def test_cifar100_comes_with_its_coarse_labels(tmp_path, monkeypatch):
    write_cifar100(tmp_path, monkeypatch)
    images = data.load_images("cifar100", tmp_path)
    assert images.coarse.tolist() == CIFAR100_PARENT


# Lists of larger sets, without the pictures: which file lands where. -> {file stem: label}


def list_food101(root):
    """13 apple pies and 8 waffles: 7 + 5 in the official training part, 6 + 3 in the test part."""
    meta, truth = root / "food-101" / "meta", {}
    (root / "food-101" / "images").mkdir(parents=True)
    for split, counts in (("train", (7, 5)), ("test", (6, 3))):
        names = {c: [f"{c}/{c[0]}-{split}-{i}" for i in range(n)]
                 for c, n in zip(("apple_pie", "waffles"), counts, strict=True)}
        text(meta / f"{split}.json", json.dumps(names))
        truth |= {n.split("/")[1]: k for k, ns in enumerate(names.values()) for n in ns}
    return truth


def list_dtd(root):
    """13 banded and 8 dotted textures: 5 + 4 to train, 4 + 2 to validate, 4 + 2 to test."""
    base, truth = root / "dtd" / "dtd", {}
    (base / "images").mkdir(parents=True)
    for split, counts in (("train", (5, 4)), ("val", (4, 2)), ("test", (4, 2))):
        stems = {f"{c}-{split}-{i}": c for c, n in zip(("banded", "dotted"), counts, strict=True)
                 for i in range(n)}
        text(base / "labels" / f"{split}1.txt", *(f"{c}/{s}.jpg" for s, c in stems.items()))
        truth |= {stem: int(c == "dotted") for stem, c in stems.items()}
    return truth


def list_pets(root):
    """10 cats and 5 dogs to train and validate, 3 and 2 to test."""
    base, truth = root / "oxford-iiit-pet", {}
    (base / "images").mkdir(parents=True)
    for split, counts in (("trainval", (10, 5)), ("test", (3, 2))):
        lines = {f"{c}_{split}{i}": k for k, (c, n) in enumerate(zip("Ad", counts, strict=True))
                 for i in range(n)}
        text(base / "annotations" / f"{split}.txt", *(f"{s} {k + 1} 1 1" for s, k in lines.items()))
        truth |= lines
    return truth


def halves(name, root, seed=0):
    """-> {file stem: label} of the training and the test part."""
    images = data._named_set(name, root, seed)  # the pictures of these lists are not there
    parts = ((images.train, images.train_labels), (images.test, images.test_labels))
    found = [dict(zip((Path(f).stem for f in part.source), labels.tolist(), strict=True))
             for part, labels in parts]
    assert [len(f) for f in found] == [len(part) for part, _ in parts]  # nothing twice
    return found


LISTS = {"food101": list_food101, "dtd": list_dtd, "pets": list_pets}


@pytest.mark.parametrize("name", HALVED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_official_parts_are_pooled_and_every_class_is_halved(name, seed, tmp_path):
    truth = LISTS[name](tmp_path)
    train, test = halves(name, tmp_path, seed)
    assert not train.keys() & test.keys() and train | test == truth
    sizes = np.array([[list(half.values()).count(c) for half in (train, test)] for c in (0, 1)])
    assert sizes.sum(1).tolist() == [13, 8]
    assert sorted(sizes[0].tolist()) == [6, 7] and sizes[1].tolist() == [4, 4]
    for half in (train, test):  # each mixes the official parts
        assert len({stem.split("-")[1] for stem in half}) == {"food101": 2, "dtd": 3}[name]


@pytest.mark.parametrize("name", LISTS)
def test_a_split_is_drawn_from_the_seed(name, tmp_path):
    LISTS[name](tmp_path)
    a, b, *others = (halves(name, tmp_path, seed)[0] for seed in (4, 4, 5, 6))
    assert a == b and all(a != other for other in others)


def test_pets_train_on_80_percent_of_each_class_of_trainval_and_test_on_the_test_part(tmp_path):
    truth = list_pets(tmp_path)
    train, test = halves("pets", tmp_path)
    assert list(test.items()) == [(s, k) for s, k in truth.items() if "test" in s]
    assert train.items() <= truth.items() and all("trainval" in stem for stem in train)
    assert list(train.values()) == [0] * 8 + [1] * 4  # the other 2 + 1 are used nowhere


def test_aircraft_trains_on_all_of_trainval_whatever_the_seed(tmp_path):
    write_aircraft(tmp_path, None)
    for seed in (0, 1):
        train, test = halves("aircraft", tmp_path, seed)
        assert train == {"1025794": 1, "0056978": 0, "0000003": 2}
        assert test == {"1514522": 2, "0747566": 1}


def test_fashion_has_a_class_order_of_its_own_and_the_others_have_none(tmp_path, monkeypatch):
    for name, write in WRITERS.items():
        write(tmp_path, monkeypatch)
        order = [8, 1, 7, 5, 9, 3, 0, 2, 4, 6] if name == "fashion-mnist" else None
        assert data.load_images(name, tmp_path).tail_order == order


def test_places_class_without_training_images_has_a_stand_in_name(tmp_path):
    write_lists(tmp_path / "places-lt", "Places", {
        "train": ["data_256/a/airfield/1.jpg 0", "data_256/b/bar/2.jpg 2"],
        "test": ["val_256/1.jpg 1"]})
    assert data.load_images("places", tmp_path).class_names == ["airfield", "class 1", "bar"]


@pytest.mark.parametrize("raw, words", [
    ("aquarium_fish", "aquarium fish"), ("polka-dotted", "polka-dotted"),
    ("T-shirt/top", "T-shirt/top"), ("__a__b-", "a b-"), ("red panda", "red panda"), (7, "7")])
def test_readable(raw, words):
    assert data.readable(raw) == words


# -- who tests on what ---------------------------------------------------------------------------


def labelled(name, root, monkeypatch, seed=0):
    """The image set `name` with the labels of a larger one: 10 classes, 600 and 203 images."""
    WRITERS[name](root, monkeypatch)
    rng = np.random.default_rng(seed)
    return replace(data.load_images(name, root), train_labels=rng.integers(0, 10, 600),
                   test_labels=rng.integers(0, 10, 203))


def held_counts(images, clients):
    """Samples of each class at each client: two (K, 10) arrays; everything is dealt once."""
    both = np.concatenate([images.train_labels, images.test_labels])
    train, test = zip(*clients, strict=True)
    assert sorted(np.concatenate(train).tolist()) == list(range(600))
    assert sorted(np.concatenate(test).tolist()) == list(range(600, 803))
    assert all(p.dtype == np.int64 and len(p) and (np.diff(p) > 0).all() for p in (*train, *test))
    return [np.array([np.bincount(both[p], minlength=10) for p in part]) for part in (train, test)]


def clients_of(images, clients=7, beta=.3, seed=0):
    return data.federated_clients(images, images.train_labels, clients, beta,
                                  np.random.default_rng(seed))


@pytest.mark.parametrize("clients", [2, 7, 20])
def test_imagenet_clients_test_on_equal_shares_of_every_class(clients, tmp_path, monkeypatch):
    images = labelled("imagenet", tmp_path, monkeypatch)
    train, test = held_counts(images, clients_of(images, clients))
    assert (test.max(0) - test.min(0)).max() <= 1
    assert np.ptp(train, 0).max() > 10  # training is as skewed as elsewhere


def test_more_clients_than_balanced_test_samples_are_refused():
    images = data.ImageSet("i", ["a", "b"], "{}", None, np.repeat([0, 1], 30), None,
                           np.array([0, 1, 0]), long_tailed=True, client_tests="balanced")
    with pytest.raises(UserError, match="fewer --clients"):
        data.federated_clients(images, images.train_labels, 5, 1.0, np.random.default_rng(0))


def test_imagenet_test_shares_are_drawn(tmp_path, monkeypatch):
    images = labelled("imagenet", tmp_path, monkeypatch)
    a, b, c = ([test.tolist() for _, test in clients_of(images, seed=s)] for s in (1, 1, 2))
    assert a == b and all(x != y for x, y in zip(a, c, strict=True))


def same_leader(name, root, monkeypatch):
    """Share of classes of whose training and test samples the same of 7 clients holds the most."""
    same = []
    for seed in range(6):
        images = labelled(name, root / str(seed), monkeypatch, seed)
        train, test = held_counts(images, clients_of(images, beta=.1, seed=seed))
        same += (train.argmax(0) == test.argmax(0)).tolist()
    return np.mean(same)


def test_places_test_part_has_a_dirichlet_draw_of_its_own(tmp_path, monkeypatch):
    """Independent draws agree on 1 class in 7, of 60: more than 2 in 5 is out of the question."""
    assert same_leader("places", tmp_path, monkeypatch) < .4
    images = labelled("places", tmp_path / "more", monkeypatch)
    _, skewed = held_counts(images, clients_of(images, beta=.1))
    _, even = held_counts(images, clients_of(images, beta=100.0))
    assert (skewed.max(0) / skewed.sum(0)).mean() > .6 > .3 > (even.max(0) / even.sum(0)).mean()


@pytest.mark.parametrize("name", [n for n in WRITERS if n not in ("cifar100", "imagenet",
                                                                  "places")])
def test_other_test_parts_are_cut_by_the_training_proportions(name, tmp_path, monkeypatch):
    images = labelled(name, tmp_path, monkeypatch)
    train, test = held_counts(images, clients_of(images, beta=.1))
    n, m = train.sum(0), test.sum(0)
    assert (np.abs(train / n - test / m) <= 1 / n + 1 / m).all()
    assert np.ptp(train / n, 0).min() > .3  # which equal shares would not give


def test_cifar100_clients_come_from_one_draw_over_both_parts(tmp_path, monkeypatch):
    images = labelled("cifar100", tmp_path, monkeypatch)
    clients = clients_of(images, beta=1.0)
    assert [len(a) + len(b) for a, b in clients] == [803 // 7] * 7
    assert all(a.max() < 600 <= b.min() for a, b in clients)
    sizes = [len(a) for a, _ in clients]
    assert len(set(sizes)) > 1  # whether training or test is a matter of chance


# -- folders -------------------------------------------------------------------------------------


def test_folder_with_train_and_test(tmp_path):
    tree(tmp_path / "zoo" / "train", **{"red_panda": 3, "sea-lion": 2})
    tree(tmp_path / "zoo" / "test", **{"red_panda": 1, "sea-lion": 1})
    picture(tmp_path / "zoo" / "train" / "red_panda" / "deeper" / "x.JPG")
    text(tmp_path / "zoo" / "train" / "red_panda" / "notes.txt", "not an image")
    (tmp_path / "zoo" / "train" / ".hidden").mkdir()
    images = data.load_images(f"folder:{tmp_path / 'zoo'}", tmp_path)
    assert images.name == "zoo" and images.class_names == ["red panda", "sea lion"]
    assert images.template.format("cat") == "a photo of a cat."
    assert images.train_labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert images.test_labels.tolist() == [0, 1]
    assert {images.train[i].mode for i in range(6)} == {"RGB"} and not images.long_tailed


@pytest.mark.parametrize("inside", ["", "train"])
def test_folder_without_test_holds_out_the_last_fifth_of_each_class(tmp_path, inside):
    tree(tmp_path / "zoo" / inside, cat=10, dog=5)
    images = data.load_images(f"folder:{tmp_path / 'zoo'}", tmp_path)
    assert np.bincount(images.train_labels).tolist() == [8, 4]
    assert np.bincount(images.test_labels).tolist() == [2, 1]
    files = [*images.train.source, *images.test.source]
    assert len(set(files)) == 15
    assert [f.name for f in images.test.source] == ["8.png", "9.png", "4.png"]


def test_folder_without_test_needs_no_more_images_than_its_message_asks_for(tmp_path):
    tree(tmp_path / "zoo", cat=1, dog=9)
    with pytest.raises(UserError, match="at least 2 images per class"):
        data.load_images(f"folder:{tmp_path / 'zoo'}", tmp_path)
    tree(tmp_path / "zoo", cat=2)
    images = data.load_images(f"folder:{tmp_path / 'zoo'}", tmp_path)
    for labels in (images.train_labels, images.test_labels):
        assert np.bincount(labels, minlength=2).min() >= 1


def test_images_of_other_modes_open_as_rgb(tmp_path):
    for mode in ("L", "RGBA", "1"):
        picture(tmp_path / f"{mode}.png", 0, mode)
    Image.new("P", (4, 4)).save(tmp_path / "P.png")
    images = data.Images(sorted(tmp_path.iterdir()))
    assert [images[i].mode for i in range(4)] == ["RGB"] * 4


def test_images_subset_and_concat_keep_order(tmp_path):
    tree(tmp_path, a=4)
    for images in (toy()[0], data.Images(sorted((tmp_path / "a").iterdir()))):
        shuffled = images.subset([3, 0, 2])
        both = data.Images.concat(shuffled, images.subset(np.array([1])))
        assert len(shuffled) == 3 and len(both) == 4
        for i, j in enumerate([3, 0, 2, 1]):
            assert np.array_equal(np.asarray(both[i]), np.asarray(images[j]))


# -- pictures of any kind ------------------------------------------------------------------------

RAMP = np.array([[0.0, .5, 1.0]])


def saved(path, image, **options):
    """`image`, an array or a PIL image, in a file -> what Images reads there, (H, W, 3) ints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    read = data.Images([path])[0]
    assert read.mode == "RGB"
    return np.asarray(read).astype(int)


@pytest.mark.parametrize("name, values, wanted", [
    ("16.png", (RAMP * 65535).astype(np.uint16), [0, 127, 255]),
    ("little.tif", (RAMP * 65535).astype("<u2"), [0, 127, 255]),
    ("big.tif", (RAMP * 65535).astype(">u2"), [0, 127, 255]),
    ("12.tif", (RAMP * 4095).astype(np.uint16), [0, 127, 255]),
    ("10.png", (RAMP * 1023).astype(np.uint16), [0, 127, 255]),
    ("8.png", (RAMP * 255).astype(np.uint16), [0, 127, 255]),
    ("dark.png", (RAMP * 40).astype(np.uint16), [0, 20, 40]),
    ("32.tif", (RAMP * (2 ** 20 - 1)).astype(np.int32), [0, 127, 255]),
    ("signed.tif", np.array([[-1000, 0, 1000]], dtype=np.int32), [0, 128, 255]),
    ("unit.tif", RAMP.astype(np.float32), [0, 128, 255]),
    ("half.tif", (RAMP / 2).astype(np.float32), [0, 64, 128]),
    ("bytes.tif", (RAMP * 250).astype(np.float32), [0, 125, 250]),
    ("any.tif", (RAMP * 4 - 2).astype(np.float32), [0, 128, 255]),
    ("hole.tif", np.array([[np.nan, .5, 1]], dtype=np.float32), [0, 128, 255]),
    ("flat.tif", np.array([[7, 7, 7]], dtype=np.uint16), [7, 7, 7])], ids=lambda v: str(v)[:10])
def test_black_stays_black_and_white_white_at_any_depth(name, values, wanted, tmp_path):
    for channel in saved(tmp_path / name, values)[0].T:
        assert np.abs(channel - wanted).max() <= 1


def test_a_tiff_in_which_white_is_zero(tmp_path):
    values = (RAMP * 65535).astype(np.uint16)
    seen = saved(tmp_path / "a.tif", values, tiffinfo={262: 0})
    assert np.abs(seen[0, :, 0] - [255, 127, 0]).max() <= 1


def palette(**info):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.info.update(info)
    return image


RED = [[255, 0, 0]]


@pytest.mark.parametrize("name, image, wanted", [
    ("a.png", Image.new("RGBA", (1, 1), (255, 0, 0, 0)), [[255, 255, 255]]),
    ("b.png", Image.new("RGBA", (1, 1), (255, 0, 0, 128)), [[255, 127, 127]]),
    ("c.webp", Image.new("RGBA", (1, 1), (0, 0, 0, 0)), [[255, 255, 255]]),
    ("d.png", Image.new("LA", (1, 1), (0, 0)), [[255, 255, 255]]),
    ("e.png", palette(transparency=1), [[255, 0, 0], [255, 255, 255], [0, 0, 255]]),
    ("f.png", palette(transparency=bytes([0, 255, 51])),
     [[255, 255, 255], [0, 255, 0], [204, 204, 255]]),
    ("g.gif", palette(transparency=2), [[255, 0, 0], [0, 255, 0], [255, 255, 255]]),
    ("h.png", palette(), [[255, 0, 0], [0, 255, 0], [0, 0, 255]]),
    ("i.tif", Image.new("CMYK", (1, 1), (0, 255, 255, 0)), RED),
    ("j.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED * 8),
    ("k.tif", Image.new("RGB", (8, 8), (255, 0, 0)).convert("YCbCr"), [[254, 0, 0]] * 8),
    ("l.png", Image.new("1", (1, 1), 1), [[255, 255, 255]]),
    ("m.png", Image.new("L", (3, 1), 9), [[9, 9, 9]] * 3),
    ("n.tif", Image.new("RGB", (1, 1), "red").convert("LAB"), [[251, 5, 4]])],
    ids=lambda v: v if isinstance(v, str) else "")
def test_transparent_is_white_and_every_colour_model_is_rgb(name, image, wanted, tmp_path):
    assert np.abs(saved(tmp_path / name, image)[0] - wanted).max() <= 1


def test_a_png_whose_one_grey_or_colour_is_transparent(tmp_path):
    grey, colour = Image.new("L", (2, 1), 9), Image.new("RGB", (2, 1), "red")
    grey.putpixel((0, 0), 7)
    colour.putpixel((0, 0), (1, 2, 3))
    assert saved(tmp_path / "l.png", grey, transparency=7)[0, :, 0].tolist() == [255, 9]
    assert saved(tmp_path / "rgb.png", colour, transparency=(1, 2, 3))[0].tolist() == [
        [255, 255, 255], [255, 0, 0]]


# where the corner that is stored first (row 0, column 0) belongs: (row, column) of a viewer's
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1),
           8: (-1, 0)}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_pictures_are_upright_as_a_viewer_shows_them(suffix, orientation, tmp_path):
    pixels = np.full((16, 32, 3), 255, dtype=np.uint8)
    pixels[:8, :8] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = saved(tmp_path / f"a.{suffix}", pixels, exif=exif)
    assert seen.shape == ((32, 16, 3) if orientation > 4 else (16, 32, 3))
    dark = [corner for corner in [(0, 0), (0, -1), (-1, 0), (-1, -1)] if seen[corner].max() < 50]
    assert dark == [CORNERS[orientation]]


def test_the_first_frame_counts_and_damaged_exif_does_not(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert saved(tmp_path / "a.gif", frames[0], save_all=True,
                 append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]
    assert saved(tmp_path / "a.jpg", frames[0], exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09").shape[0] == 4


def test_one_range_for_the_whole_set(tmp_path):
    """A dark test part stays dark: what is 100 in training is as grey in a file up to 100."""
    for part, top in (("train", 4000), ("test", 100)):
        for c in "ab":
            for i in range(2):
                path = tmp_path / "x" / part / c / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.array([[i, 100, top]], dtype=np.uint16)).save(path)
    picture(tmp_path / "x" / "train" / "a" / "plain.png", 100)
    images = data.load_images(f"folder:{tmp_path / 'x'}", tmp_path)
    for part in (images.train.subset([0, 1]), images.test, data.Images.concat(images.test,
                                                                              images.train)):
        assert np.asarray(part[0])[0, 1].tolist() == [6, 6, 6]  # 100 / 4095 * 255
    assert np.asarray(images.train[2])[0, 0].tolist() == [100] * 3
    assert "; 8 with 12 bits a pixel scaled to 8 bits" in images.said
    splits = data.load_splits(f"folder:{tmp_path / 'x'}", tmp_path)
    assert np.asarray(splits.test[0][0])[0, 1, 0] == 6


def test_colours_of_16_bits_that_are_nearly_all_black_are_refused(tmp_path):
    def colours(path, top):  # Pillow writes none
        rows = b"".join(b"\0" + struct.pack(">3H", *[top] * 3) * 2 for _ in range(2))
        size = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
            for k, b in ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))))

    tree(tmp_path / "x", a=5, b=5)
    colours(tmp_path / "x" / "a" / "z.png", 4095)
    with pytest.raises(UserError, match="1 files have 16 bits a colour and use 14"):
        data.load_images(f"folder:{tmp_path / 'x'}", tmp_path)
    colours(tmp_path / "x" / "a" / "z.png", 65535)
    images = data.load_images(f"folder:{tmp_path / 'x'}", tmp_path)
    assert "1 with 16 bits a colour scaled to 8 bits" in images.said
    assert np.asarray(data.Images([tmp_path / "x" / "a" / "z.png"])[0]).min() == 255


# -- folders of any kind -------------------------------------------------------------------------


def loaded(root):
    return data.load_images(f"folder:{root}", root.parent)


def names(images):
    return [Path(f).name for f in images.source]


@pytest.mark.parametrize("name, kind", [
    ("x.jfif", "JPEG"), ("x.gif", "GIF"), ("x.avif", "AVIF"), ("x.webp", "WEBP"), ("x", "JPEG"),
    ("X.JPG", "JPEG"), ("x.txt", "PNG"), ("x.jpg", "PNG"), ("x.tga", "TGA"), ("x.jp2", "JPEG2000")])
def test_a_picture_is_one_by_what_is_in_it(name, kind, tmp_path):
    tree(tmp_path / "zoo", cat=5, dog=5)
    Image.new("RGB", (8, 8)).save(tmp_path / "zoo" / "cat" / name, kind)
    assert name in names(loaded(tmp_path / "zoo").train) + names(loaded(tmp_path / "zoo").test)


def test_files_that_are_no_pictures_or_hidden_are_left_out_and_counted(tmp_path):
    root = tmp_path / "zoo"
    for part in ("train", "test"):
        tree(root / part, cat=4, dog=4)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for path, content in {
            "train/cat/a.xml": b"<a/>", "train/cat/b.csv": b"1,2", "train/cat/c.csv": b"",
            "train/cat/IMG.HEIC": heic, "train/dog/really.jpg": heic, "train/dog/x.svg": b"<svg/>",
            "train/dog/e": b"", "train/dog/._0.png": b"\0\5\26\7", "train/dog/Thumbs.db": b"x",
            "train/.DS_Store": b"", "train/@eaDir/0.png": b"x", "test/__MACOSX/._x": b"x",
            "train/cat/.ipynb_checkpoints/0.png": b"x", "test/dog/model.bin": bytes(999),
            "train/notes.txt": b"x"}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    picture(root / "train" / "loose.png")
    images = loaded(root)
    assert images.class_names == ["cat", "dog"]
    assert names(images.train) == names(images.test) == [f"{i}.png" for i in range(4)] * 2
    assert images.said.split("; ") == [
        "2 classes (cat, dog), 8 training files in train/ (13 left out: 5 hidden, 2 .heic that "
        "Pillow cannot read, 2 .csv, 1 outside the class folders, 1 .xml, 1 without suffix, "
        "1 .svg that Pillow cannot read)",
        "test: test/, 8 files (2 left out: 1 hidden, 1 .bin)",
        "files of test that are in train, too: 8"]


def test_all_broken_pictures_are_named_at_once_before_anything_is_read(tmp_path):
    tree(tmp_path / "zoo", cat=5, dog=5)
    whole = (tmp_path / "zoo" / "cat" / "4.png").read_bytes()
    for i in range(12):
        (tmp_path / "zoo" / "cat" / f"cut{i:02d}.png").write_bytes(whole[:50])
    for name, content in (("empty.jpg", b""), ("page.jpeg", b"<html>404</html>"),
                          ("cut", b"\xff\xd8\xff\xe0\0\x10JFIF")):
        (tmp_path / "zoo" / "dog" / name).write_bytes(content)
    (tmp_path / "zoo" / "dog" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError) as caught:
        loaded(tmp_path / "zoo")
    message = str(caught.value)
    assert message.startswith("16 of 26 files: not a readable image: ")
    assert all(f"cut{i:02d}.png (" in message for i in range(10)) and "cut10" not in message
    for i in range(12):
        (tmp_path / "zoo" / "cat" / f"cut{i:02d}.png").unlink()
    with pytest.raises(UserError) as caught:
        loaded(tmp_path / "zoo")
    for piece in ("4 of 14", "/cut (", "empty.jpg (empty)", "page.jpeg (no picture inside)",
                  "gone.png (does not exist)"):
        assert piece in str(caught.value)


def test_a_file_that_may_not_be_opened_is_broken(tmp_path, monkeypatch):
    tree(tmp_path, a=1)
    known, path = open, tmp_path / "a" / "0.png"

    def closed(name, *words):
        if name == path:
            raise PermissionError(13, "Permission denied")
        return known(name, *words)
    monkeypatch.setattr("builtins.open", closed)
    assert data._inspect(path).broken == "Permission denied"


def test_what_pillow_warns_of_is_not_said(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # 80 pixels warn, 160 would be refused
    tree(tmp_path / "zoo", cat=5, dog=5)
    warnings.filterwarnings("ignore", module="PIL")  # as data.py does; pytest sets its own
    assert len(loaded(tmp_path / "zoo").train) == 8 and not recwarn.list
    with pytest.raises(UserError, match=r"10 of 10 files.*exceeds limit of 60 pixels"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
        shutil.rmtree(tmp_path / "cache")
        loaded(tmp_path / "zoo")


def test_links_are_followed_but_not_in_circles(tmp_path):
    tree(tmp_path / "store", wolf=5)
    tree(tmp_path / "zoo", cat=5)
    (tmp_path / "zoo" / "dog").symlink_to(tmp_path / "store" / "wolf")
    (tmp_path / "zoo" / "cat" / "back").symlink_to(tmp_path / "zoo" / "cat")
    (tmp_path / "zoo" / "cat" / "9.png").symlink_to(tmp_path / "zoo" / "cat" / "0.png")
    images = loaded(tmp_path / "zoo")
    assert images.class_names == ["cat", "dog"]
    assert np.bincount([*images.train_labels, *images.test_labels]).tolist() == [6, 5]
    assert "(1 left out: 1 link in a circle)" in images.said
    (tmp_path / "zoo" / "cow").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="zoo/cow: a link to what does not exist"):
        loaded(tmp_path / "zoo")


def test_a_folder_that_is_called_like_a_picture_is_a_folder(tmp_path):
    tree(tmp_path / "zoo", **{"cat.png": 5, "dog.png/0.jpg": 5})
    images = loaded(tmp_path / "zoo")
    assert images.class_names == ["cat.png", "dog.png"] and len(images.train) == 8


def test_what_was_opened_is_not_opened_again(tmp_path, monkeypatch):
    tree(tmp_path / "zoo", cat=5, dog=5)
    looked, inspect = [], data._inspect
    monkeypatch.setattr(data, "_inspect", lambda p: looked.append(Path(p).name) or inspect(p))
    monkeypatch.setattr(data.inspect, "getsource", lambda f: "")
    first = loaded(tmp_path / "zoo")
    assert sorted(looked) == sorted([f"{i}.png" for i in range(5)] * 2)
    looked.clear()
    assert loaded(tmp_path / "zoo").said == first.said and not looked
    picture(tmp_path / "zoo" / "dog" / "new.png")
    (tmp_path / "zoo" / "cat" / "0.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"1 of 11 files.*cat/0.png"):
        loaded(tmp_path / "zoo")
    assert sorted(looked) == ["0.png", "new.png"]
    next((tmp_path / "cache").glob("pictures-*.json")).write_text("{")  # as after a full disk
    picture(tmp_path / "zoo" / "cat" / "0.png")
    assert len(loaded(tmp_path / "zoo").train) == 8


@pytest.mark.parametrize("train, test", [
    ("Train", "Test"), ("Training", "Testing"), ("seg_train", "seg_test"), ("TRAIN", "VAL"),
    ("training_set", "test_set"), ("train", "val"), ("train2017", "dev2017"), ("train", "valid"),
    ("training", "Evaluation"), ("TrainImages", "TestImages"), ("asl_train", "asl_test")])
@pytest.mark.parametrize("around", ["", "archive", "archive/data"])
@pytest.mark.parametrize("inside", [False, True])
def test_parts_go_by_any_usual_name(train, test, around, inside, tmp_path):
    for part, n in ((train, 3), (test, 2)):
        tree(tmp_path / "zoo" / around / part / (part * inside), cat=n, dog=n)
    images = loaded(tmp_path / "zoo")
    assert images.class_names == ["cat", "dog"]
    for labels, n, files, part in ((images.train_labels, 3, images.train, train),
                                   (images.test_labels, 2, images.test, test)):
        assert labels.tolist() == [0] * n + [1] * n
        assert all(part in Path(f).parts for f in files.source)
    assert f"test: {Path(around, test, test * inside)}/, 4 files" in images.said


def test_the_users_validation_part_is_used_and_never_cut_anew(tmp_path):
    for part, n in (("train", 5), ("Validation", 3), ("test", 2)):
        tree(tmp_path / "zoo" / part, cat=n, dog=n)
    tree(tmp_path / "zoo" / "seg_pred", x=1)
    images = loaded(tmp_path / "zoo")
    assert (len(images.train), len(images.test), images.val) == (10, 4, None)
    assert images.said.split("; ")[-2] == "left out: seg_pred/, Validation/"
    splits = data.load_splits(f"folder:{tmp_path / 'zoo'}", tmp_path)
    for (files, labels), part, n in ((splits.train, "train", 5), (splits.val, "Validation", 3),
                                     (splits.test, "test", 2)):
        assert labels.tolist() == [0] * n + [1] * n
        assert {Path(f).parent.parent.name for f in files.source} == {part}
    said, _ = splits.source()
    assert "; validation: Validation/, 6 files; " in said and "left out: seg_pred/" in said
    assert said.endswith("used 10 to train, 6 to validate, 4 to test")


def test_a_class_may_be_called_like_a_part(tmp_path):
    tree(tmp_path / "zoo", bus=5, car=5, train=5)
    assert loaded(tmp_path / "zoo").class_names == ["bus", "car", "train"]
    tree(tmp_path / "stops", **{"train station": 5, "test tube": 5, "car": 5})
    assert loaded(tmp_path / "stops").class_names == ["car", "test tube", "train station"]


@pytest.mark.parametrize("made, wanted", [
    (["train/a", "train/b", "Training/a", "Training/b", "test/a", "test/b"],
     ["Training/ and train/", "the train part"]),
    (["train/a", "train/b", "val/a", "val/b", "valid/a"], ["val/ and valid/", "the val part"]),
    (["train/a", "train/b", "extra"], ["train/ holds class folders", "extra/"]),
    (["val/a", "val/b"], ["val/ but no train/"]),
    (["train", "test"], ["train has 0 class folders and 3 images", "folder of an image is its"]),
    (["train", "test", "extra"], ["train has 0 class folders and 3 images"]),
    (["."], ["0 class folders and 3 images"]),
    (["train/a", "train/b", "test/a", "test/b/b"], ["test/b holds no images", "1 .txt"]),
    (["train/Cat", "train/cat", "test/CAT", "test/dog"], ["same classes", "CAT, Cat, cat, dog"])])
def test_trees_that_could_mean_two_things_are_refused_in_words(made, wanted, tmp_path):
    root = tmp_path / "zoo"
    for folder in made:
        for i in range(3):
            picture(root / folder / f"{i}.png")
    if "test/b/b" in made:
        for file in (root / "test" / "b" / "b").iterdir():
            file.unlink()
        text(root / "test" / "b" / "list.txt", "x")
    with pytest.raises(UserError) as caught:
        loaded(root)
    for piece in wanted:
        assert piece in str(caught.value)


def test_one_class_may_be_written_in_two_ways(tmp_path):
    tree(tmp_path / "zoo" / "train", **{"caf\u00e9": 3, "Dog": 3, "cow": 3})
    tree(tmp_path / "zoo" / "test", **{"cafe\u0301": 2, "dog": 1, "COW": 1})
    images = loaded(tmp_path / "zoo")
    assert images.class_names == ["Dog", "caf\u00e9", "cow"]
    assert [Path(f).parent.name for f in images.test.source] == ["dog", "cafe\u0301", "cafe\u0301",
                                                                 "COW"]
    assert images.test_labels.tolist() == [0, 1, 1, 2]
    tree(tmp_path / "zoo" / "train", **{"cafe\u0301": 1})
    with pytest.raises(UserError, match="each under one name"):
        loaded(tmp_path / "zoo")


@pytest.mark.parametrize("folders, captions", [
    (["-1", "0", "1"], ["-1", "0", "1"]), (["A", "A-"], ["A", "A-"]),
    (["Sea_Lion", "Sea-Lion", "red-fox"], ["Sea_Lion", "Sea-Lion", "red fox"]),
    (["_", "red_fox"], ["_", "red fox"]), (["$5", "caf\udce9"], ["$5", "caf\u00e9"])])
def test_captions_stay_as_many_as_the_classes(folders, captions):
    assert data.class_captions(folders) == captions


def test_names_that_are_not_utf8_and_a_home_directory(tmp_path, monkeypatch):
    root = tmp_path / "f\udcfcr"
    for part in ("train", "test"):
        tree(root / part, **{"caf\udce9": 3, "dog": 3})
    monkeypatch.setenv("HOME", str(tmp_path))
    images = data.load_images("folder:~/f\udcfcr", tmp_path)
    assert images.class_names == ["caf\u00e9", "dog"] and images.name == "f\u00fcr"
    assert images.said.encode() and common.fingerprint(images.train.listing())
    with pytest.raises(UserError) as caught:
        data.load_images("folder:~/\udcfc", tmp_path)
    assert str(caught.value).encode()
    assert data.user_path("~/x") == tmp_path / "x" and data.user_path("~no-one/x").name == "x"


@pytest.mark.parametrize("data_dir", ["data", "."])
def test_what_runs_leave_in_a_folder_of_classes_is_no_class(data_dir, tmp_path, monkeypatch):
    tree(tmp_path, cat=5, dog=5)
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "runs" / "fedpurel--1" / "figure.png")
    for name in ("config.json", "log.jsonl"):
        (tmp_path / "runs" / "fedpurel--1" / name).write_text("{}")
    for _ in range(2):  # the second finds the cache of the first
        assert data.load_images("folder:.", data_dir).class_names == ["cat", "dog"]


def test_a_checkpoint_knows_names_and_sizes_of_files_but_not_where_they_lie(tmp_path):
    def known(root):
        images = loaded(root)
        return common.fingerprint([images.train.listing(), images.test.listing()])

    tree(tmp_path / "one" / "zoo", cat=5, dog=5)
    before = known(tmp_path / "one" / "zoo")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert known(tmp_path / "two" / "zoo") == before  # other times, another place
    (tmp_path / "two" / "zoo" / "cat" / "0.png").rename(tmp_path / "two" / "zoo" / "cat" / "00.png")
    assert known(tmp_path / "two" / "zoo") != before
    tree(tmp_path / "one" / "zoo", aaa=5)
    assert known(tmp_path / "one" / "zoo") != before


# -- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, files", [
    (b"\xef\xbb\xbfa/0.png 0\r\n\r\nb/1.png 1\r\n", ["a/0.png", "b/1.png"]),
    (b"a\\0.png\t0\nb/1.png   1", ["a/0.png", "b/1.png"]),
    ("a/0.png 0\nb/1.png 1\n".encode("utf-16"), ["a/0.png", "b/1.png"]),
    (b"a/my cat.png 0\nb/caf\xe9.png 1\n", ["a/my cat.png", "b/caf\udce9.png"])])
def test_list_files_as_other_systems_write_them(content, files, tmp_path):
    (tmp_path / "list.txt").write_bytes(content)
    found, labels = data.read_list_file(tmp_path / "list.txt", tmp_path, 2)
    assert found == [tmp_path / f for f in files] and labels.tolist() == [0, 1]


def test_a_backslash_in_a_name_stays_one_where_there_is_such_a_file(tmp_path):
    picture(tmp_path / "a\\0.png")
    text(tmp_path / "list.txt", "a\\0.png 0")
    assert data.read_list_file(tmp_path / "list.txt", tmp_path, 1)[0] == [tmp_path / "a\\0.png"]


@pytest.mark.parametrize("line, words", [
    ("a.png -1", "line 2: label -1"), ("a.png 2", "line 2: label 2; the 2 classes are 0 to 1"),
    ("a.png", "line 2: expected 'path label'"), ("a.png 1.0", "line 2: expected")])
def test_a_wrong_label_is_named_by_its_line(line, words, tmp_path):
    text(tmp_path / "list.txt", "a.png 0", line)
    with pytest.raises(UserError, match=words):
        data.read_list_file(tmp_path / "list.txt", tmp_path, 2)


def test_files_that_are_listed_twice_or_in_two_parts_are_said(tmp_path):
    write_lists(tmp_path / "places-lt", "Places", {
        "train": ["data_256/a/airfield/1.jpg 0", "data_256/b/bar/2.jpg 1",
                  "data_256/b/bar/2.jpg 1"], "test": ["val_256/1.jpg 1", "val_256/2.jpg 1"]})
    path = tmp_path / "places-lt" / "Places_LT_test.txt"
    path.write_text("val_256/2.jpg 0\ndata_256/a/airfield/1.jpg 0\n")
    images = data.load_images("places", tmp_path)
    assert images.said == ("places, 2 classes, 3 training and 2 test images; files listed twice in "
                           "train: 1; files of test that are in train, too: 1")


# -- long tails and clients of folders -----------------------------------------------------------


def of_sizes(sizes, tests=6, **more):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    test = np.repeat(np.arange(len(sizes)), tests)
    return data.ImageSet("own", [f"k{c}" for c in range(len(sizes))], data.PHOTO,
                         data.Images(np.zeros((len(labels), 1, 1, 3), dtype=np.uint8)), labels,
                         data.Images(np.zeros((len(test), 1, 1, 3), dtype=np.uint8)), test, **more)


@pytest.mark.parametrize("sizes, imbalance, n_max, kept", [
    ([100, 45, 20, 9, 4], None, None, [100, 45, 20, 9, 4]),  # long-tailed already: 25
    ([100, 45, 20, 9, 4], 4, None, [100, 45, 20, 9, 4]),  # asked for, and milder than it is
    ([100, 45, 20, 9, 4], 50, None, [100, 37, 14, 5, 2]),
    ([100, 45, 20, 9, 4], None, 50, [50, 15, 5, 1, 1]),  # 50 / 100 is none: one stays
    ([50] * 5, None, None, [50, 15, 5, 1, 1]), ([50] * 5, 1, None, [50] * 5),
    ([90, 10], None, None, [90, 1]), ([100, 10], None, None, [100, 10])])
def test_a_long_tail_is_made_only_where_there_is_none(sizes, imbalance, n_max, kept):
    cut = data.long_tailed(of_sizes(sizes), imbalance, n_max, "dataset", 0)
    assert np.bincount(cut.train_labels).tolist() == kept


def test_what_a_cut_leaves_is_said():
    whole = of_sizes([50] * 5, said="found")
    cut = data.long_tailed(whole, None, None, "dataset", 0)
    assert data.federation_said(whole, whole, cut, [0] * 20, None) == (
        "found; 72 of 250 kept by the long tail, 50 to 1 a class of 50, 2 classes with 1; "
        "20 clients")
    own = of_sizes([100, 4], said="found")
    assert data.federation_said(own, own, own, [0] * 8, None) == (
        "found; all kept, 100 to 4 a class, a long tail already; 8 clients (20 do not fit)")


@pytest.mark.parametrize("sizes, tests, wanted", [
    ([100] * 10, 20, 20), ([12, 12, 12], 12, 20), ([12] * 3, 2, 6), ([2, 2], 1, 2)])
def test_as_many_clients_as_a_set_can_serve(sizes, tests, wanted):
    images = of_sizes(sizes, tests)
    clients = data.clients_that_fit(images, 1.0, 0)
    assert len(clients) <= wanted and (wanted > 6) == (len(clients) > 6)
    assert all(len(a) and len(b) for a, b in clients)
    same = data.federated_clients(images, images.train_labels, len(clients), 1.0,
                                  common.numpy_generator(0, "partition"))
    for pair, other in zip(clients, same, strict=True):  # as if the flag had been given
        assert all(np.array_equal(a, b) for a, b in zip(pair, other, strict=True))
    with pytest.raises(UserError, match="fewer --clients or a larger --beta"):
        data.clients_that_fit(of_sizes([9, 9], [1, 0]), 1.0, 0)


# -- bad input -----------------------------------------------------------------------------------
# Each case prepares a folder and returns the name to load and what the message must contain.


def unknown_set(root):
    return "mnist-9000", ["mnist-9000", "cifar100", "folder:PATH"]


def folder_missing(root):
    return f"folder:{root / 'nowhere'}", [root / "nowhere", "train/<class>/*.jpg"]


def folder_is_a_file(root):
    text(root / "file", "x")
    return f"folder:{root / 'file'}", [root / "file", "train/<class>/*.jpg"]


def class_folder_empty(root):
    tree(root / "train", cat=2, dog=0)
    return f"folder:{root}", [root / "train" / "dog", "holds no images", ".jpg"]


def one_class_only(root):
    tree(root / "train", cat=2)
    return f"folder:{root}", [root / "train", "at least 2"]


def folder_empty(root):
    return f"folder:{root}", [root, "at least 2"]


def classes_differ(root):
    tree(root / "train", cat=2, dog=2)
    tree(root / "test", cat=2, wolf=2)
    return f"folder:{root}", [root, "same classes", "dog", "wolf"]


def only_a_test_folder(root):
    tree(root / "test", cat=2, dog=2)
    return f"folder:{root}", [root, "train/<class>/*"]


def broken_image(root):
    tree(root / "train", cat=5, dog=5)
    (root / "train" / "dog" / "1.png").write_bytes(b"not a picture")
    return f"folder:{root}", [root / "train" / "dog" / "1.png", "not a readable image"]


def truncated_image(root):
    tree(root / "train", cat=5, dog=5)
    path = root / "train" / "cat" / "4.png"
    path.write_bytes(path.read_bytes()[:50])
    return f"folder:{root}", [path, "not a readable image"]


def broken_netpbm_header(root):
    tree(root / "train", cat=5, dog=5)
    path = root / "train" / "cat" / "z.ppm"
    path.write_bytes(b"P6\n20")
    return f"folder:{root}", [path, "not a readable image"]


def image_that_claims_a_billion_pixels(root):
    tree(root / "train", cat=5, dog=5)
    path = root / "train" / "cat" / "z.png"

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body \
            + struct.pack(">I", zlib.crc32(kind + body))
    size = struct.pack(">IIBBBBB", 40000, 25000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b""))
    return f"folder:{root}", [path, "not a readable image"]


def list_file_missing(root):
    return "imagenet", [root / "imagenet-lt" / "ImageNet_LT_train.txt", "is missing", "ILSVRC-2012"]


def second_list_file_missing(root):
    write_places(root, None)
    (root / "places-lt" / "Places_LT_test.txt").unlink()
    return "places", [root / "places-lt" / "Places_LT_test.txt", "is missing", "Places-365"]


def list_line_without_label(root):
    write_imagenet(root, None)
    path = root / "imagenet-lt" / "ImageNet_LT_train.txt"
    text(path, "train/n01440764/n01440764_190.JPEG 0", "train/n01440764/n01440764_191.JPEG")
    return "imagenet", [path, "line 2", "'path label'"]


def list_line_with_negative_label(root):
    write_imagenet(root, None)
    path = root / "imagenet-lt" / "ImageNet_LT_test.txt"
    text(path, "val/ILSVRC2012_val_00000001.JPEG -1")
    return "imagenet", [path, "line 1", "label -1", "0 to 999"]


def list_file_empty(root):
    write_places(root, None)
    path = root / "places-lt" / "Places_LT_train.txt"
    text(path, "", "   ")
    return "places", [path, "is empty", "'path label'"]


def list_file_not_text(root):
    write_places(root, None)
    path = root / "places-lt" / "Places_LT_train.txt"
    path.write_bytes(b"\x1f\x8b\x08\x00\xff\xfe\xfa")
    return "places", [path, "'path label'"]


def list_names_missing_image(root):
    write_places(root, None)
    path, gone = root / "places-lt" / "Places_LT_train.txt", "data_256/z/zoo/00000001.jpg"
    text(path, f"{gone} 0", *(f"data_256/z/{i}.jpg 2" for i in range(12)))
    return "places", [root / "places-lt" / gone, "(does not exist)", "13 of 14 files",
                      root / "places-lt" / "data_256/z/8.jpg", ", ...;"]


def list_names_missing_image_later(root):
    write_places(root, None)
    gone = root / "places-lt" / "data_256/b/bus_station/indoor/00000004.jpg"
    gone.unlink()
    return "places", [gone, "not a readable image"]


def label_too_large(root):
    write_lists(root / "places-lt", "Places", {"train": ["data_256/a/airfield/1.jpg 0"],
                                               "test": ["val_256/1.jpg 1"]})
    return "places", [root / "places-lt" / "Places_LT_test.txt", "line 1: label 1", "0 to 0"]


def dog_list_damaged(root):
    write_dogs(root, None)
    path = root / "stanford-dogs" / "train_list.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(100))
    return "dogs", [path, "lists.tar"]


def dog_list_missing(root):
    write_dogs(root, None)
    path = root / "stanford-dogs" / "test_list.mat"
    path.unlink()
    return "dogs", [path, "lists.tar"]


def dog_images_missing(root):
    write_dogs(root, None)
    gone = root / "stanford-dogs" / "Images" / DOGS["train"][0]
    gone.unlink()
    return "dogs", [gone, "images.tar", root / "stanford-dogs"]


def torchvision_file_missing(root):
    write_food101(root, None)
    (root / "food-101" / "meta" / "test.json").unlink()
    return "food101", [root, "torchvision.datasets.Food101"]


def torchvision_file_damaged(root):
    write_fashion(root, None)
    (root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03\x00")
    return "fashion-mnist", [root, "torchvision.datasets.FashionMNIST"]


def cifar_with_a_wrong_checksum(root):
    folder = root / "cifar-10-batches-py"
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        write_cifar_batch(folder / name, 1, labels=[0])
    return "cifar10", [root, "torchvision.datasets.CIFAR10"]  # not accepted, and no network


BAD_INPUT = [
    unknown_set, folder_missing, folder_is_a_file, class_folder_empty, one_class_only, folder_empty,
    classes_differ, only_a_test_folder, broken_image, truncated_image, broken_netpbm_header,
    image_that_claims_a_billion_pixels, list_file_missing, second_list_file_missing,
    list_line_without_label, list_line_with_negative_label, list_file_empty, list_file_not_text,
    list_names_missing_image, list_names_missing_image_later, label_too_large, dog_list_damaged,
    dog_list_missing, dog_images_missing, torchvision_file_missing, torchvision_file_damaged,
    cifar_with_a_wrong_checksum]


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case.__name__)
def test_bad_input_is_one_line_that_names_the_place_and_what_is_expected(case, tmp_path):
    name, wanted = case(tmp_path)
    with pytest.raises(UserError) as caught:
        images = data.load_images(name, tmp_path)
        for part in (images.train, images.test):
            for i in range(len(part)):
                part[i]
    message = str(caught.value)
    assert "\n" not in message and caught.value.code == 2
    for piece in wanted:
        assert str(piece) in message


@pytest.mark.parametrize("name", [*data.TORCHVISION_SETS, "dogs"])
def test_without_network_the_message_says_what_to_put_where(name, tmp_path):
    with pytest.raises(UserError) as caught:
        data.load_images(name, tmp_path / "data")
    message = str(caught.value)
    assert str(tmp_path / "data") in message
    if name == "dogs":
        assert "lists.tar" in message
    else:
        assert f"torchvision.datasets.{data.TORCHVISION_SETS[name][0]}" in message
        assert data.TORCHVISION_SETS[name][1] in message


# -- Stanford Dogs' archives ---------------------------------------------------------------------


@pytest.fixture
def dogs_site(tmp_path, monkeypatch):
    """A copy of the site: lists.tar and images.tar behind a file:// address."""
    site, content = tmp_path / "site", tmp_path / "content"
    write_dog_lists(content)
    write_dog_images(content)
    site.mkdir()
    for archive, names in (("lists.tar", ["train_list.mat", "test_list.mat"]),
                           ("images.tar", ["Images"])):
        with tarfile.open(site / archive, "w") as tar:
            for name in names:
                tar.add(content / name, name)
    monkeypatch.setattr(data, "DOGS_URL", site.as_uri() + "/")
    return site


def check_dogs(data_dir):
    images = data.load_images("dogs", data_dir)
    assert images.class_names == ["Chihuahua", "Japanese spaniel", "Shih-Tzu"]
    for part in (images.train, images.test):
        assert all(part[i].mode == "RGB" for i in range(len(part)))


def test_dogs_are_fetched_and_unpacked_once(dogs_site, tmp_path):
    check_dogs(tmp_path / "data")
    for archive in dogs_site.iterdir():
        archive.unlink()
    check_dogs(tmp_path / "data")


def tar_with(path, member):
    """A tar with one small file under the name `member`."""
    text(path.parent / "payload", "payload")
    with tarfile.open(path, "w") as tar, open(path.parent / "payload", "rb") as handle:
        info = tar.gettarinfo(fileobj=handle)
        info.name = member
        tar.addfile(info, handle)


@pytest.mark.parametrize("member", ["../evil", "a/../../evil"])
def test_archive_that_leaves_the_folder_is_refused(member, tmp_path):
    root = tmp_path / "inner" / "data"
    tar_with(tmp_path / "bad.tar", member)
    with pytest.raises(UserError, match=r"evil") as caught:
        data.fetch_tar((tmp_path / "bad.tar").as_uri(), root)
    assert str(root / "bad.tar") in str(caught.value)
    assert not list(tmp_path.rglob("evil"))


def test_absolute_path_in_an_archive_lands_inside_the_folder(tmp_path):
    target, root = tmp_path / "elsewhere" / "evil", tmp_path / "data"
    tar_with(tmp_path / "odd.tar", str(target))
    data.fetch_tar((tmp_path / "odd.tar").as_uri(), root)
    assert not target.exists()
    assert (root / str(target).lstrip("/")).read_text() == "payload\n"


def test_archive_with_a_link_out_of_the_folder_is_refused(tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo("door")
        info.type, info.linkname = tarfile.SYMTYPE, "../.."
        tar.addfile(info)
    with pytest.raises(UserError, match=r"bad\.tar"):
        data.fetch_tar((tmp_path / "bad.tar").as_uri(), tmp_path / "data")
    assert not (tmp_path / "data" / "door").is_symlink()


def test_damaged_archive_is_refused_and_says_which(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"this is not a tar file" * 100)
    with pytest.raises(UserError, match="damaged") as caught:
        data.fetch_tar((tmp_path / "bad.tar").as_uri(), tmp_path / "data")
    assert str(tmp_path / "data" / "bad.tar") in str(caught.value)


def test_archive_that_is_not_there_says_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match="cannot download") as caught:
        data.fetch_tar((tmp_path / "none.tar").as_uri(), tmp_path / "data")
    assert "none.tar" in str(caught.value) and str(tmp_path / "data") in str(caught.value)
    assert not [p for p in (tmp_path / "data").iterdir() if "none" in p.name]


def test_archive_damaged_half_way_can_be_replaced_as_the_message_says(dogs_site, tmp_path):
    good = (dogs_site / "images.tar").read_bytes()
    with tarfile.open(dogs_site / "images.tar") as tar:
        last = [m for m in tar.getmembers() if m.isfile()][-1]
    (dogs_site / "images.tar").write_bytes(good[:last.offset_data + 10])
    with pytest.raises(UserError, match="delete it and try again"):
        data.load_images("dogs", tmp_path / "data")
    (tmp_path / "data" / "stanford-dogs" / "images.tar").unlink()
    (dogs_site / "images.tar").write_bytes(good)
    check_dogs(tmp_path / "data")


# -- reading images ------------------------------------------------------------------------------

PLAIN = data.pixel_transform(8, (.5, .4, .3), (.2, .2, .2))


def random_pixels(image):
    """Noise from torch's global generator: any leak between samples would show."""
    return transforms.functional.to_tensor(image) + torch.randn(3, 1, 1)


def test_batches_equal_the_transform_by_hand():
    images, _ = toy()
    pool = data.ImagePool(images, PLAIN)
    batches = list(pool.batches([[5, 0, 5], range(2), torch.tensor([11])]))
    for batch, wanted in zip(batches, ([5, 0, 5], [0, 1], [11]), strict=True):
        assert torch.equal(batch, torch.stack([PLAIN(images[i]) for i in wanted]))


def test_pixel_transform_scales_and_normalises():
    image = Image.new("RGB", (9, 7), (255, 0, 51))
    out = data.pixel_transform(4, (.5, .25, 0), (.5, .5, .25))(image)
    assert out.shape == (3, 4, 4)
    assert torch.allclose(out[:, 0, 0], torch.tensor([1., -.5, .8]), atol=1e-6)


OFFICIAL = {"cifar100": ((.5071, .4865, .4409), (.2673, .2564, .2762)),
            "cifar10": ((.4914, .4822, .4465), (.2023, .1994, .2010))}


def official_pixels(name, image, size, antialias=False):
    """The authors' preprocessing by hand: normalise, then resize."""
    mean, std = (torch.tensor(v)[:, None, None] for v in OFFICIAL[name])
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
    return F.interpolate(pixels[None], (size, size), mode="bilinear", align_corners=False,
                         antialias=antialias)[0]


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("size", [7, 11, 32, 45, 224])
def test_official_cifar_pixels(name, size):
    image = toy(size=32)[0][3]
    ours = data.official_cifar_transform(name, size)(image)
    by_hand = official_pixels(name, image, size)
    assert ours.shape == (3, size, size) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=2e-5)
    if size < 32:
        assert (ours - official_pixels(name, image, size, antialias=True)).abs().max() > .1


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_cifar_pixels_are_normalised_before_they_are_resized(name):
    """Resizing the picture itself would round to whole shades."""
    image = toy(size=32)[0][3]
    rounded = data.pixel_transform(50, *OFFICIAL[name], transforms.InterpolationMode.BILINEAR)
    ours = data.official_cifar_transform(name, 50)(image)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in OFFICIAL[name])
    shades = ours * std + mean
    assert (shades - shades.round()).abs().max() > .4
    assert .001 < (ours - rounded(image)).abs().max() < .1


def test_preloading_changes_no_pixel():
    images, _ = toy(per_class=200)  # more than one chunk of 256
    plain, loaded = data.ImagePool(images, PLAIN), data.ImagePool(images, PLAIN)
    assert loaded.preload() and loaded.pixels is not None
    wanted = [[399, 0, 256], range(250, 260)]
    for a, b in zip(plain.batches(wanted), loaded.batches(wanted), strict=True):
        assert torch.equal(a, b)


def test_preloading_leaves_large_pools_on_disk(monkeypatch):
    monkeypatch.setattr(data.ImagePool, "IN_MEMORY", 3 * 8 * 8 * 12 - 1)
    pool = data.ImagePool(toy()[0], PLAIN)
    assert not pool.preload() and pool.pixels is None
    monkeypatch.setattr(data.ImagePool, "IN_MEMORY", 3 * 8 * 8 * 12)
    assert pool.preload()


def test_preloaded_pool_still_augments_when_seeds_are_given():
    pool = data.ImagePool(toy()[0], PLAIN, random_pixels)
    before = next(pool.batches([[0, 1]], [[7, 8]]))
    pool.preload()
    assert torch.equal(next(pool.batches([[0, 1]], [[7, 8]])), before)


@pytest.mark.parametrize("random_transform", [
    random_pixels, data.pixel_transform(8, (.5,) * 3, (.2,) * 3, crop=.2)], ids=["noise", "crop"])
def test_augmentation_depends_on_the_sample_seed_only(random_transform):
    pool = data.ImagePool(toy()[0], PLAIN, random_transform)
    together = next(pool.batches([[0, 1, 2, 0]], [[10, 11, 12, 13]]))
    alone = next(pool.batches([[2]], [[12]]))
    other_order = next(pool.batches([[1, 0]], [[11, 10]]))
    assert torch.equal(alone[0], together[2])
    assert torch.equal(other_order, together[[1, 0]])
    assert not torch.equal(together[0], together[3])  # the same image, another seed


def test_workers_change_no_pixel():
    images, _ = toy()
    lists, seeds = [[0, 1, 2], [3, 4, 5], [0, 3]], [[10, 11, 12], [13, 14, 15], [16, 17]]
    serial = data.ImagePool(images, PLAIN, random_pixels, workers=0)
    parallel = data.ImagePool(images, PLAIN, random_pixels, workers=2)
    for options in ((lists,), (lists, seeds)):
        for a, b in zip(serial.batches(*options), parallel.batches(*options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generator_alone(workers):
    pool = data.ImagePool(toy()[0], PLAIN, random_pixels, workers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(pool.batches([[0, 1], [2]], [[1, 2], [3]]))
    list(pool.batches([[0, 1], [2]]))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_does_not_reseed_the_gpus(monkeypatch):
    """Otherwise dropout on a GPU would depend on which process reads the images."""
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    torch.manual_seed(1)
    assert reseeded == [1]  # torch.manual_seed does reach them
    pool = data.ImagePool(toy()[0], PLAIN, random_pixels)
    next(pool.batches([[0, 1]], [[7, 8]]))
    assert reseeded == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_in_a_batch_is_one_short_line(workers, tmp_path):
    tree(tmp_path, a=3)
    (tmp_path / "a" / "1.png").write_bytes(b"nothing")
    pool = data.ImagePool(data.Images(sorted((tmp_path / "a").iterdir())), PLAIN, workers=workers)
    with pytest.raises(UserError) as caught:
        list(pool.batches([[0, 1, 2]]))
    assert str(tmp_path / "a" / "1.png") in str(caught.value)
    assert "Traceback" not in str(caught.value)


# -- words ---------------------------------------------------------------------------------------


def test_end_of_text_has_the_largest_id_and_argmax_finds_it():
    tokenizer = data.WordTokenizer(["a photo of a red panda.", "a photo of a cat."], 12)
    ids = tokenizer(["a photo of a cat.", "panda"])
    assert ids.shape == (2, 12) and ids.dtype == torch.int64
    assert ids.argmax(-1).tolist() == [7, 2]  # start + 6 words and stops, start + 1 word
    assert ids.max() == tokenizer.end == tokenizer.vocab_size - 1
    assert ids[:, 0].tolist() == [tokenizer.start] * 2 and tokenizer.start == tokenizer.end - 1
    assert (ids[1, 3:] == 0).all()


def test_words_have_ids_of_their_own_and_unknown_ones_do_not():
    tokenizer = data.WordTokenizer(["red panda.", "sea-lion 7"], 9)
    ids = tokenizer.ids
    assert sorted(ids) == [".", "7", "lion", "panda", "red", "sea"]
    assert sorted(ids.values()) == list(range(tokenizer.start - 6, tokenizer.start))
    row = tokenizer("X red Zebra RED_panda.")[0].tolist()
    assert row[0] == tokenizer.start and row[7:] == [tokenizer.end, 0]
    assert row[2] == row[4] == ids["red"] and row[5:7] == [ids["panda"], ids["."]]
    assert 1 <= row[1] < min(ids.values()) and 1 <= row[3] < min(ids.values())
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))


def test_text_that_is_too_long_is_refused():
    tokenizer = data.WordTokenizer(["one two three"], 5)
    assert tokenizer("one two three")[0, -1] == tokenizer.end
    with pytest.raises(UserError, match=r"'one two three four' is longer than .* 5 tokens"):
        tokenizer(["one", "one two three four"])


# -- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [{}, data.NOISY])
def test_tiles_are_uint8_and_depend_on_the_generator_alone(look):
    for texture in data.TEXTURES:
        a, b, c = (data.render_tile("red", texture, np.random.default_rng(s), **look)
                   for s in (3, 3, 4))
        assert a.shape == (32, 32, 3) and a.dtype == np.uint8
        assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_tiles_show_their_colour():
    def mean_of(colour):
        return data.render_tile(colour, "plain", np.random.default_rng(0)).mean((0, 1))
    assert mean_of("red").argmax() == 0 and mean_of("green").argmax() == 1
    assert mean_of("blue").argmax() == 2
    assert np.ptp(mean_of("grey")) < np.ptp(mean_of("red"))


def test_render_tiles_labels_follow_the_counts():
    counts = np.arange(100) % 3
    pixels, labels = data.render_tiles(counts, np.random.default_rng(0))
    assert pixels.shape == (counts.sum(), 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels, minlength=100).tolist() == counts.tolist()


def test_a_class_keeps_its_own_tint_and_shade():
    tints, shades = np.zeros((100, 3)), np.full(100, .25)
    tints[3], shades[3] = (0, 0, .5), .9
    plain, _ = data.render_tiles([1] * 100, np.random.default_rng(0))
    own, _ = data.render_tiles([1] * 100, np.random.default_rng(0), tints=tints, shades=shades)
    differs = (plain != own).reshape(100, -1).any(1)
    assert np.flatnonzero(differs).tolist() == [3]
    assert own[3].mean((0, 1))[2] > plain[3].mean((0, 1))[2] + 50


def test_shapes_has_its_stated_sizes():
    world = data.load_images("shapes", "unused", seed=0)
    assert len(world.train) == len(world.train_labels) == 2131 and world.long_tailed
    assert len(world.test) == len(world.test_labels) == 2000
    assert world.num_classes == 100 and len(set(world.class_names)) == 100
    counts = np.bincount(world.train_labels, minlength=100)
    assert sorted(counts.tolist(), reverse=True) == data.long_tail_counts(100, 100, 100)
    assert np.bincount(world.test_labels).tolist() == [20] * 100
    assert world.train.source.dtype == np.uint8 and world.train[0].size == (32, 32)
    assert world.template.count("{}") == 1


def test_shapes_depends_on_its_seed_alone():
    a, b, c = (data.shapes(seed, n_max=4, imbalance=4, n_test=1) for seed in (0, 0, 1))
    for part in ("train", "test"):
        assert np.array_equal(getattr(a, part).source, getattr(b, part).source)
    assert np.array_equal(a.train_labels, b.train_labels)
    assert not np.array_equal(a.train_labels, c.train_labels)  # another class is the most frequent
    assert not np.array_equal(a.test.source, c.test.source)


def test_shapes_pretraining_is_balanced_and_apart_from_the_world():
    images, labels = data.shapes_pretraining(0, per_class=2)
    assert len(images) == 200 and np.bincount(labels).tolist() == [2] * 100
    again, _ = data.shapes_pretraining(0, per_class=2)
    other, _ = data.shapes_pretraining(1, per_class=2)
    assert np.array_equal(images.source, again.source)
    assert not np.array_equal(images.source, other.source)


def long_tailed_set():
    counts = [20, 10, 6]
    pixels = np.arange(36, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 3), np.uint8)
    labels = np.repeat([0, 1, 2], counts)
    return data.ImageSet("toy", ["a", "b", "c"], "{}", data.Images(pixels), labels,
                         data.Images(pixels[:3]), labels[:3])


def test_split_for_pretraining_is_balanced_and_disjoint():
    images = long_tailed_set()
    seen, seen_labels, rest = data.split_for_pretraining(images, .5, np.random.default_rng(0))
    assert np.bincount(seen_labels).tolist() == [3, 3, 3]
    assert np.bincount(rest.train_labels).tolist() == [17, 7, 3]
    number = {i: label for i, label in enumerate(images.train_labels)}
    first, second = seen.source[:, 0, 0, 0].tolist(), rest.train.source[:, 0, 0, 0].tolist()
    assert sorted(first + second) == list(range(36))
    assert [number[i] for i in first] == seen_labels.tolist()
    assert [number[i] for i in second] == rest.train_labels.tolist()
    assert len(images.train) == 36 and rest.test is images.test  # the original is untouched


@pytest.mark.parametrize("share, labels", [(.1, None), (1.0, None), (.5, [0] * 36)])
def test_split_for_pretraining_that_leaves_nothing_is_refused(share, labels):
    images = long_tailed_set()
    if labels:  # a class without any image
        images = replace(images, train_labels=np.array(labels))
    with pytest.raises(UserError, match=f"--pretrain-share {share} "):
        data.split_for_pretraining(images, share, np.random.default_rng(0))


# -- CLIP ----------------------------------------------------------------------------------------

TINY = data.TinyConfig(width=32, vision_layers=1, text_layers=1, patch=4, image_size=8, epochs=1,
                       batch=4)


def tiny(cache, config=TINY, seed=0, per_class=6):
    return data.tiny_backbone(*toy(per_class=per_class), ["red panda", "cat"], "a photo of a {}.",
                              config, seed, CPU, cache)


def weights(backbone):
    return backbone.clip.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_tiny_clip_encodes_images_and_texts(tmp_path):
    backbone = tiny(tmp_path)
    images, _ = toy()
    pixels = torch.stack([backbone.transform(images[i]) for i in range(3)])
    crops = torch.stack([backbone.random_transform(images[i]) for i in range(3)])
    tokens = backbone.tokenizer(["a photo of a cat.", "X X X X red panda."])
    assert not backbone.clip.training and backbone.size == 8
    assert pixels.shape == crops.shape == (3, 3, 8, 8)
    with torch.no_grad():
        for features, rows in ((backbone.clip.encode_image(pixels), 3),
                               (backbone.clip.encode_text(tokens), 2)):
            assert features.shape == (rows, 32) and features.isfinite().all()
            assert not torch.allclose(features[0], features[1])


def test_tiny_clip_is_trained_and_the_second_call_reads_the_cache(tmp_path):
    first = tiny(tmp_path)
    untrained = tiny(tmp_path / "other", replace(TINY, lr=1e-12))
    assert not same(weights(first), weights(untrained))
    (made,) = tmp_path.glob("tiny-clip-*.pt")
    written = made.stat().st_mtime_ns
    assert same(weights(first), weights(tiny(tmp_path)))
    assert list(tmp_path.glob("tiny-clip-*.pt")) == [made] and made.stat().st_mtime_ns == written


def test_tiny_clip_is_the_same_when_trained_again_and_not_with_another_seed(tmp_path):
    a, b, c = tiny(tmp_path / "a"), tiny(tmp_path / "b"), tiny(tmp_path / "a", seed=1)
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))


def test_tiny_clip_learns_with_augmentation(tmp_path):
    plain, moved = tiny(tmp_path), tiny(tmp_path, replace(TINY, augment=True))
    assert not same(weights(plain), weights(moved))
    assert all(v.isfinite().all() for v in weights(moved).values() if v.is_floating_point()
               and v.dim() < 2)  # the causal mask is 2-D and holds -inf


def test_truncated_tiny_clip_is_refused(tmp_path):
    tiny(tmp_path)
    (path,) = tmp_path.glob("tiny-clip-*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="delete it to make it again") as caught:
        tiny(tmp_path)
    assert str(path) in str(caught.value)


def test_tiny_clip_trains_on_fewer_images_than_a_batch(tmp_path):
    """A small folder of one's own pictures: the default batch is larger than half of it."""
    trained = tiny(tmp_path, replace(TINY, batch=100), per_class=3)
    untrained = tiny(tmp_path, replace(TINY, lr=1e-12), per_class=3)
    assert not same(weights(trained), weights(untrained))


def test_encode_once_equals_encoding_by_hand_and_is_cached(tmp_path, monkeypatch):
    backbone = tiny(tmp_path)
    images, _ = toy(per_class=100)  # more than one batch of 128
    pool = data.ImagePool(images, backbone.transform)
    once = data.encode_once(backbone.clip, pool, CPU, tmp_path)
    with torch.no_grad():
        pixels = torch.stack([backbone.transform(images[i]) for i in range(200)])
        by_hand = torch.cat([backbone.clip.encode_image(p) for p in pixels.split(128)])
    assert torch.equal(once, by_hand)

    def refuse(_):
        raise AssertionError("encoded a second time")
    monkeypatch.setattr(backbone.clip, "encode_image", refuse)
    assert torch.equal(data.encode_once(backbone.clip, pool, CPU, tmp_path), once)


def test_encode_once_notices_other_images_weights_and_transforms(tmp_path):
    backbone, images = tiny(tmp_path), toy()[0]
    tree(tmp_path / "files", a=3)
    files = data.Images(sorted((tmp_path / "files" / "a").iterdir()))

    def encode(images, transform=backbone.transform, clip=backbone.clip):
        data.encode_once(clip, data.ImagePool(images, transform), CPU, tmp_path)
        return len(list(tmp_path.glob("features-*.pt")))
    assert [encode(images), encode(images), encode(toy(seed=1)[0])] == [1, 1, 2]
    assert encode(images, data.pixel_transform(8, (0, 0, 0), (1, 1, 1))) == 3
    assert encode(images, clip=tiny(tmp_path, seed=1).clip) == 4
    assert [encode(files), encode(files)] == [5, 5]
    picture(files.source[0], 200)
    Image.new("RGB", (30, 30)).save(files.source[0])  # other content under the same name
    assert encode(files) == 6


def test_unknown_model_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match="'NoSuchModel' is not an open_clip model") as caught:
        data.open_clip_backbone("NoSuchModel", None, 0, CPU, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="ViT-B-32"):
        data.open_clip_backbone("ViT-b-32:openai", None, 0, CPU, tmp_path)


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-32:", "ViT-B-32:nonsense"])
def test_model_without_a_known_tag_lists_the_tags(model, tmp_path):
    with pytest.raises(UserError, match="ViT-B-32 needs :PRETRAINED") as caught:
        data.open_clip_backbone(model, None, 0, CPU, tmp_path)
    for word in ("openai", "laion2b_s34b_b79k", "random", "--weights FILE"):
        assert word in str(caught.value)


SMALL_CLIP = {
    "embed_dim": 16, "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
                                    "image_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


def small_clip(folder, seed=0, pixels=None, weights=True, **changes):
    """A directory as open_clip's push_to_hf_hub writes it -> its path, its state dict."""
    parts = {part: {**SMALL_CLIP[part], **changes.pop(part, {})} for part in ("vision_cfg",
                                                                           "text_cfg")}
    config = {**SMALL_CLIP, **parts, **changes}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": config, "preprocess_cfg": pixels or {}}))
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    state = kind(**config).state_dict()
    if weights:
        safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    return folder, state


def load(model, weights=None, cache=Path("nowhere")):
    return data.open_clip_backbone(str(model), weights, 0, CPU, cache)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_clip_in_a_directory_with_its_own_preprocessing(prefix, tmp_path):
    pixels = {"mean": [.1, .2, .3], "std": [.5, .25, .5], "interpolation": "bilinear",
              "resize_mode": "squash"}
    folder, state = small_clip(tmp_path / "a clip", pixels=pixels)
    made = load(f"{prefix}{folder}")
    assert same(weights(made), state) and made.size == 16
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    wanted = np.asarray(photo.resize((16, 16), Image.BILINEAR), np.float32) / 255
    wanted = (wanted - np.float32([.1, .2, .3])) / np.float32([.5, .25, .5])
    torch.testing.assert_close(made.transform(photo), torch.from_numpy(wanted).permute(2, 0, 1))
    crop, _, _, norm = made.random_transform.transforms
    assert crop.interpolation == transforms.InterpolationMode.BILINEAR
    assert (tuple(norm.mean), tuple(norm.std)) == ((.1, .2, .3), (.5, .25, .5))
    assert made.pixels == ("16 pixels, mean .1 .2 .3, std .5 .25 .5, bilinear resize to a square")
    assert made.said == f"local-dir:{folder}, its weights"


def test_a_clip_of_the_hub_in_a_warm_cache(tmp_path):
    repository = tmp_path / "models--org--clip"
    _, state = small_clip(repository / "snapshots" / "abc", pixels={"mean": [.5] * 3})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    made = load("hf-hub:org/clip", cache=tmp_path)
    assert same(weights(made), state) and "mean .5" in made.pixels
    assert made.tokenizer(["a"]).shape == (1, 20)
    with pytest.raises(UserError, match=r"hf-hub:org/other .HF_HUB_OFFLINE is set"):
        load("hf-hub:org/other", cache=tmp_path)


def test_a_clip_of_oblong_pictures(tmp_path):
    folder, _ = small_clip(tmp_path / "clip", vision_cfg={"image_size": [16, 24]})
    made, photo = load(folder), Image.new("RGB", (60, 50))
    assert made.transform(photo).shape == made.random_transform(photo).shape == (3, 16, 24)
    assert made.size == (16, 24) and made.pixels.startswith("16 x 24 pixels")
    assert data.official_cifar_transform("cifar10", made.size)(photo).shape == (3, 16, 24)


def test_a_directory_without_a_clip_is_refused_in_words(tmp_path):
    folder, _ = small_clip(tmp_path / "clip", weights=False)
    with pytest.raises(UserError, match="could not be loaded"):  # never random weights
        load(folder)
    for name in (tmp_path, f"local-dir:{tmp_path}", "local-dir:/none"):
        with pytest.raises(UserError, match=r"holds no open_clip_config\.json"):
            load(name)
    for content in ("{}", "{oops", '{"model_cfg": {"embed_dim": 8}}'):
        (folder / "open_clip_config.json").write_text(content)
        with pytest.raises(UserError, match="cannot load"):
            load(folder)


class Holder(torch.nn.Module):
    """A module whose state dict is any: OpenAI's files are such modules in TorchScript."""

    def __init__(self, state):
        super().__init__()
        for name in {key.partition(".")[0] for key in state}:
            if name in state:
                self.register_buffer(name, state[name])
            else:
                setattr(self, name, Holder({key.partition(".")[2]: v for key, v in state.items()
                                            if key.startswith(f"{name}.")}))

    def forward(self, x: torch.Tensor):
        return x


def write_checkpoint(path, state, kind):
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(state, path)
    elif kind == "TorchScript":
        numbers = {n: torch.tensor(7) for n in ("input_resolution", "context_length", "vocab_size")}
        torch.jit.script(Holder({**state, **numbers})).save(path)
    else:
        torch.save({
            "plain": state, "half": {k: v.half() for k, v in state.items()},
            "training": {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()},
                         "optimizer": {"state": {}}},
            "compiled": {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
        }[kind], path)
    return path


@pytest.mark.parametrize("kind", ["plain", "half", "safetensors", "training", "compiled",
                                  "TorchScript"])
def test_checkpoints_of_every_kind_are_read_whole(kind, tmp_path):
    folder, state = small_clip(tmp_path / "clip")
    other = small_clip(tmp_path / "other", seed=1)[1]
    path = write_checkpoint(tmp_path / "w.pt", other, kind)
    made = load(folder, path)
    found = weights(made)
    wanted = {k: v.half().float() for k, v in other.items()} if kind == "half" else other
    assert same(found, wanted) and not same(found, state)
    quick = kind == "TorchScript"  # OpenAI's: trained with QuickGELU, whatever the name says
    assert ("QuickGELU()" in repr(made.clip)) == ("QuickGELU" in made.said) == quick
    assert made.said.startswith(f"local-dir:{folder}, weights of {path.name}")


@pytest.mark.parametrize("changes, words", [
    ({"vision_cfg": {"image_size": 24}}, "visual.positional_embedding has 10 x 32 numbers, .* "
     "has 5 x 32: another image size"),
    ({"text_cfg": {"context_length": 30}}, "positional_embedding has 30 x 16"),
    ({"text_cfg": {"width": 32}}, "positional_embedding has 20 x 32"),
    ({"vision_cfg": {"layers": 1}}, r'Missing key.*visual.transformer.resblocks.1.ln_1.weight'),
    ({"vision_cfg": {"layers": 3}}, r'Unexpected key.*visual.transformer.resblocks.2.ln_1.weight'),
    ({"embed_dim": 8}, "size mismatch for text_projection"),
])
def test_checkpoints_of_another_clip_are_refused_by_name(changes, words, tmp_path):
    folder, _ = small_clip(tmp_path / "clip")
    path = write_checkpoint(tmp_path / "w.pt", small_clip(tmp_path / "other", **changes)[1],
                            "plain")
    with pytest.raises(UserError, match=words) as caught:
        load(folder, path)
    assert f"cannot read {path} as local-dir:{folder}" in str(caught.value)


@pytest.mark.parametrize("content, words", [
    ({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, "holds no weights but a, b"),
    ([1, 2], "it holds a list"), ({"step": 3}, "no weights but step")])
def test_files_without_one_state_dict_are_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=words):
        load("ViT-S-32-alt", tmp_path / "w.pt")


@pytest.mark.parametrize("wrap, said", [
    (lambda s, ema: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": {
        "state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": .1}]},
        "loss": torch.tensor(.3)}, ""),
    (lambda s, ema: {"model": s, "args": {"lr": .1, "name": "clip"}}, ""),
    (lambda s, ema: {"model": s, "args": argparse.Namespace(lr=.1)}, ""),
    (lambda s, ema: {"model": s, "model_ema": ema}, " (its model; left out: model_ema)"),
    (lambda s, ema: {"state_dict_ema": ema, "state_dict": s},
     " (its state_dict; left out: state_dict_ema)"),
    (lambda s, ema: {**s, "epoch": 3}, " (left out: epoch)"),
    (lambda s, ema: {f"net.{k}": v for k, v in s.items()}, ""),
    (lambda s, ema: {"net": {f"model.module.{k}": v for k, v in s.items()}}, "")])
def test_the_weights_are_found_among_what_training_loops_save(wrap, said, tmp_path):
    folder, _ = small_clip(tmp_path / "clip")
    state, ema = (small_clip(tmp_path / str(i), seed=i)[1] for i in (1, 2))
    torch.save(wrap(state, ema), tmp_path / "w.pt")
    made = load(folder, tmp_path / "w.pt")
    assert same(weights(made), state)
    assert made.said == f"local-dir:{folder}, weights of w.pt{said}"


@pytest.mark.parametrize("name, kind", [("w.bin", "safetensors"), ("w.safetensors", "torch")])
def test_a_checkpoint_is_read_by_its_content(name, kind, tmp_path):
    folder, _ = small_clip(tmp_path / "clip")
    state = small_clip(tmp_path / "other", seed=1)[1]
    (safetensors.torch.save_file if kind == "safetensors" else torch.save)(state, tmp_path / name)
    assert same(weights(load(folder, tmp_path / name)), state)


def test_files_that_are_no_checkpoints_are_refused_in_plain_words(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"a": torch.ones(99)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:300])
    (tmp_path / "text.pt").write_text("a text")
    (tmp_path / "empty.pt").write_bytes(b"")
    with open(tmp_path / "pickle.pt", "wb") as file:
        pickle.dump(Path("x"), file, protocol=4)
    for name in ("module", "cut", "text", "empty", "pickle"):
        with pytest.raises(UserError, match=rf"cannot read .*{name}\.pt as ViT-S-32-alt") as caught:
            load("ViT-S-32-alt", tmp_path / f"{name}.pt")
        said = str(caught.value)
        assert "weights_only" not in said and "\x1b" not in said and "\n" not in said
        assert ("holds a torch.nn.modules.linear.Linear" if name == "module" else
                "not a whole checkpoint that torch.save or safetensors wrote") in said
    with pytest.raises(UserError, match="is a folder; expected a checkpoint"):
        load("ViT-S-32-alt", tmp_path)
    torch.save({"clip": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="clip and model could be it"):
        load("ViT-S-32-alt", tmp_path / "two.pt")


@pytest.mark.parametrize("change, words", [
    (lambda w: w.float().index_fill(0, torch.tensor([0]), torch.nan), "of {} numbers .* NaN or"),
    (lambda w: w.float().index_fill(0, torch.tensor([0]), torch.inf), "of {} numbers .* NaN or"),
    (lambda w: torch.ones_like(w, dtype=torch.int8), "expected floats"),
    (lambda w: torch.ones_like(w, dtype=torch.uint8), "expected floats")])
def test_weights_that_are_no_numbers_are_refused_by_name(change, words, tmp_path):
    folder, state = small_clip(tmp_path / "clip")
    key = "visual.transformer.resblocks.1.ln_1.weight"
    state[key] = change(state[key])
    torch.save(state, tmp_path / "w.pt")
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    name = key.replace(".", r"\.") + ".*" + words.format(32)
    for file in (tmp_path / "w.pt", None):
        with pytest.raises(UserError, match=name):
            load(folder, file)
    key = "encoder.layer.1.output.dense.bias"
    change_weights(language_model(tmp_path / "bert"), lambda w: {**w, key: change(w[key])})
    with pytest.raises(UserError, match=key + ".*" + words.format(16)):
        data.text_encoder(str(tmp_path / "bert"), 8, 0.0, tmp_path)
    vit = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, image_size=16, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    change_weights(tmp_path / "vit", lambda w: {k: change(v) if k == "layernorm.bias" else v
                                                for k, v in w.items()})
    with pytest.raises(UserError, match=r"layernorm\.bias.*" + words.format(16)):
        data.vit_backbone(str(tmp_path / "vit"), 1e-6, 0, "cpu", tmp_path)


def test_a_model_that_is_empty_or_a_file(tmp_path):
    for read in (lambda m: load(m), lambda m: data.text_encoder(m, 8, 0.0, tmp_path),
                 lambda m: data.vit_backbone(m, 1e-6, 0, "cpu", tmp_path)):
        with pytest.raises(UserError, match="--model is empty"):
            read("")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is a file; expected the directory"):
        data.vit_backbone(str(tmp_path / "config.json"), 1e-6, 0, "cpu", tmp_path)


@pytest.mark.parametrize("asks, words", [
    ({"do_flip_channel_order": True}, "do_flip_channel_order: true"),
    ({"do_grayscale": True}, "do_grayscale: true"),
    ({"do_pad": True, "pad_size": {"height": 20, "width": 20}}, "do_pad: true"),
    ({"image_mean": [123.675, 116.28, 103.53]}, "image_mean .123.675.* pixels that are 0 to 1 "),
    ({"image_std": 0}, "image_std 0 "), ({"image_std": [.2, float("nan"), .2]}, "image_std"),
    ({"size": {"longest_edge": 16}}, 'size is {"longest_edge": 16}; expected'),
    ({"image_processor_type": "VivitImageProcessor"}, "VivitImageProcessor, which is not done|"
     "asks for offset")])
def test_pictures_that_a_checkpoint_wants_and_would_not_get(asks, words, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "ViTImageProcessor", "size": 16, **asks}))
    with pytest.raises(UserError, match=words) as caught:
        data._vit_pixels(str(tmp_path), (16, 16), tmp_path)
    assert "preprocessor_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_of_a_preprocessor_is_not_followed_is_said(tmp_path):
    vit = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=32, image_size=16, patch_size=8))
    vit.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "size": 16, "crop_pct": .9,
        "do_resize": False, "do_rescale": False, "image_mean": [123.675, 116.28, 103.53]}))
    vit = data.vit_backbone(str(tmp_path), 1e-6, 0, "cpu", tmp_path)
    assert vit.said.endswith(
        "; not followed in preprocessor_config.json: crop_pct 0.9, do_resize false")
    assert vit.pixels.mean == pytest.approx((.485, .456, .406))  # of 255


INCEPTION, OPENAI = (.5, .5, .5), open_clip.OPENAI_DATASET_MEAN


@pytest.mark.parametrize("name, tag, mean, resize, note", [
    ("PE-Core-T-16-384", "meta", INCEPTION, "squash", "as PE-Core-T-16-384:meta"),
    ("PE-Core-T-16-384", "", INCEPTION, "squash", "as all published weights of PE-Core-T-16-384"),
    ("ViT-B-16", "", OPENAI, "shortest", "as all published weights of ViT-B-16"),
    ("ViT-L-14", "openai", OPENAI, "shortest", "as ViT-L-14:openai"),
    ("ViT-L-14", "", None, None, "open_clip's default"),  # two of its published weights disagree
])
def test_a_file_is_read_with_the_preprocessing_of_its_name(name, tag, mean, resize, note):
    found, said = data._published_pixels(name, tag, "w.pt")
    assert (found.get("image_mean"), found.get("image_resize_mode")) == (mean, resize)
    assert note in said


@pytest.mark.parametrize("model, name, tag, quick", [
    ("ViT-B-16:openai", "ViT-B-16", "openai", True),  # that open_clip builds with GELU
    ("ViT-B/16:laion2b-s34b-b88K", "ViT-B-16", "laion2b_s34b_b88k", False),
    ("ViT-B-16-quickgelu:dfn2b", "ViT-B-16-quickgelu", "dfn2b", True),
    ("hf-hub:org/name", "hf-hub:org/name", "", False)])
def test_names_tags_and_the_activation_of_the_weights(model, name, tag, quick, monkeypatch):
    asked = []

    def create(*words, **options):
        asked.append((words, options))
        raise RuntimeError("seen enough")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(UserError, match="seen enough"):
        load(model)
    ((called, options),) = asked
    assert called == (name, tag) and options["force_quick_gelu"] is quick
    assert options["require_pretrained"] and options["load_weights"]


def test_names_that_contradict_or_are_only_near(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    for model, words in (("ViT-S-32-alt:random", "exclude each other"),
                         ("ViT-B-32:nonsense", "needs :PRETRAINED"),
                         ("vit-b-16", "ViT-B-16"), ("openai/clip-vit-base-patch16", "hf-hub:")):
        with pytest.raises(UserError, match=words):
            load(model, tmp_path / "w.pt")


def test_a_tokenizer_that_only_the_hub_has_is_named(tmp_path):
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE .* text model timm/ViT-B-16-Sig"):
        load("ViT-B-16-SigLIP:random", cache=tmp_path)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            if len(asked) > 1:
                raise OSError("no route")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    with data.hub_if_reachable() as why:
        assert why == "" and not constants.HF_HUB_OFFLINE
    with data.hub_if_reachable() as why:
        assert why == "https://mirror.example does not answer (OSError: no route)"
        assert constants.is_offline_mode()  # the cache, and nothing else, is looked at
    assert not constants.is_offline_mode() and asked == ["https://mirror.example"] * 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with data.hub_if_reachable() as why:
        assert "HF_HUB_OFFLINE" in why and len(asked) == 2
    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("changes, peft, lacks", [
    ({"custom_text": True}, "prompt", "CustomTextCLIP has not a text transformer of its own"),
    ({"text_cfg": {"no_causal_mask": True}}, "prompt", "a causal mask"),
    ({"text_cfg": {"pool_type": "last"}}, "prompt", "texts read at their end"),
    ({"text_cfg": {"qk_norm": True}}, "prompt", "plain attention in the text tower"),
    ({"text_cfg": {"proj_type": "none", "width": 16}}, "prompt", "a text projection"),
    ({"vision_cfg": {"qk_norm": True}}, "lora", "plain attention, but this is a VisionTransformer"),
    ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}, "lora",
     "ModifiedResNet"),
    ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}}, "lora",
     "TimmModel"),
])
def test_towers_that_a_part_is_not_made_for_are_refused_by_name(changes, peft, lacks, tmp_path):
    clip = load(small_clip(tmp_path / "clip", **changes)[0]).clip
    with pytest.raises(UserError, match=lacks) as caught:
        data.check_towers(clip, peft)
    assert f"--peft {peft}" in str(caught.value) and "--peft adapter" in str(caught.value)
    data.check_towers(clip, "adapter")


def bert_tokenizer(folder):
    """open_clip's HFTokenizer around a BERT tokenizer of a few words, 8 tokens."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "cafe", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)
    tokenizer.save_pretrained(folder)
    return open_clip.tokenizer.HFTokenizer(str(folder), context_length=8)


@pytest.mark.parametrize("kind, twins", [
    ("CLIP's", ("Cafe", "cafe")), ("BERT's", ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe")),
    ("BERT's", ("cafe\N{COMBINING ACUTE ACCENT}", "cafe")), ("BERT's", ("dog", "bird")),
    ("words", ("Cafe", "cafe!"))])
def test_texts_that_are_cut_off_emptied_or_alike(kind, twins, tmp_path):
    tokenizer = {"CLIP's": lambda: open_clip.SimpleTokenizer(context_length=8),
                 "BERT's": lambda: bert_tokenizer(tmp_path / "bert"),
                 "words": lambda: data.WordTokenizer(["a cat", "cafe"], 8)}[kind]()
    names = [twins[0], "cat", twins[1]]
    tokens = data.class_tokens(tokenizer, "a {}", names)
    assert torch.equal(tokens, tokenizer([f"a {n}" for n in names]))
    assert data.equal_rows(tokens) == [(0, 2)]
    long = "a cat " * 4
    with pytest.raises(UserError, match="longer than the 8 tokens") as caught:
        data.class_tokens(tokenizer, "a {}", ["cat", long])
    assert f"the class '{long}' has" in str(caught.value) and "--n-ctx" not in str(caught.value)
    with pytest.raises(UserError, match="leaves nothing of the class name ' '"):
        data.class_tokens(tokenizer, "a {}", ["cat", " "])


@pytest.mark.parametrize("length", [5, 6, 7])
def test_a_text_may_fill_the_context_and_no_more(length):
    """start, 5 words, end: 7 tokens."""
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    if length == 7:
        assert data.class_tokens(tokenizer, "{} of a cat !", ["photo"])[0, -1] == 49407
    else:
        with pytest.raises(UserError, match=f"longer than the {length} tokens"):
            data.class_tokens(tokenizer, "{} of a cat !", ["photo"])
    with pytest.raises(UserError, match="or --n-ctx"):
        data.class_tokens(tokenizer, "X X X X X X {}.", ["photo"])


def test_a_tokenizer_that_ends_every_row_with_a_token(tmp_path):
    """open_clip's mode "clips": the class token stands behind the padding."""
    bert_tokenizer(tmp_path / "bert")
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path / "bert"), context_length=8,
                                      tokenizer_mode="clips", bos_token="[CLS]", eos_token="[SEP]")
    assert data.class_tokens(tokenizer, "a {}", ["cat cat cat cat"]).tolist() == [
        [2, 4, 7, 7, 7, 7, 3, 2]]
    with pytest.raises(UserError, match="longer than the 8 tokens"):
        data.class_tokens(tokenizer, "a {}", ["cat cat cat cat cat"])


def test_encode_once_knows_activation_order_and_type_of_the_weights(tmp_path):
    """Weights in another order have the same sum; GELU and QuickGELU have the same weights."""
    images = data.Images(toy()[0].source)
    folder, state = small_clip(tmp_path / "clip")
    permuted = {k: v.flip(0) if k.endswith("mlp.c_fc.weight") else v for k, v in state.items()}
    torch.save(permuted, tmp_path / "w.pt")
    quick, _ = small_clip(tmp_path / "quick", quick_gelu=True)
    heads, _ = small_clip(tmp_path / "heads", vision_cfg={"head_width": 8})
    made = [load(folder), load(folder, tmp_path / "w.pt"), load(quick), load(heads)]
    made[3].clip.load_state_dict(state)
    found = []
    for i, backbone in enumerate(made):
        pool = data.ImagePool(images, backbone.transform)
        found.append(data.encode_once(backbone.clip, pool, CPU, tmp_path))
        assert len(list(tmp_path.glob("features-*.pt"))) == i + 1
        with torch.no_grad():
            pixels = torch.stack([backbone.transform(image) for image in images])
            torch.testing.assert_close(found[i], backbone.clip.visual(pixels))
    assert not any(torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])
    assert torch.equal(data.encode_once(load(folder).clip, data.ImagePool(
        images, made[0].transform), CPU, tmp_path), found[0])
    assert len(list(tmp_path.glob("features-*.pt"))) == 4


@pytest.mark.parametrize("content", [torch.ones(3, 4), {"a": torch.ones(1)}])
def test_caches_of_something_else_are_named(content, tmp_path):
    backbone = tiny(tmp_path)
    pool = data.ImagePool(toy()[0], backbone.transform)
    data.encode_once(backbone.clip, pool, CPU, tmp_path)
    for kind in ("features", "tiny-clip"):
        (path,) = tmp_path.glob(f"{kind}-*.pt")
        torch.save(content if kind == "features" else {"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="delete it to make it again") as caught:
        data.encode_once(backbone.clip, pool, CPU, tmp_path)
    assert "features-" in str(caught.value)
    with pytest.raises(UserError, match=r"tiny-clip-.* does not fit"):
        tiny(tmp_path)


def test_missing_or_foreign_weights_file_is_refused(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match="expected a checkpoint of ViT-S-32-alt") as caught:
            data.open_clip_backbone("ViT-S-32-alt", path, 0, CPU, tmp_path)
        assert str(path) in str(caught.value)
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"cannot read .*foreign\.pt as ViT-S-32-alt"):
        data.open_clip_backbone("ViT-S-32-alt", tmp_path / "foreign.pt", 0, CPU, tmp_path)


def test_local_checkpoint_round_trip(tmp_path):
    made = data.open_clip_backbone("ViT-S-32-alt:random", None, 0, CPU, tmp_path)
    torch.save(weights(made), tmp_path / "clip.pt")
    read = data.open_clip_backbone("ViT-S-32-alt", tmp_path / "clip.pt", 1, CPU, tmp_path)
    assert same(weights(made), weights(read))
    assert read.size == 224 and not read.clip.training
    photo = Image.new("RGB", (300, 240), (90, 20, 200))
    assert read.transform(photo).shape == read.random_transform(photo).shape == (3, 224, 224)
    assert read.tokenizer(["a photo of a cat."]).shape == (1, 77)


def test_random_weights_depend_on_the_seed(monkeypatch, tmp_path):
    """The draw follows the seed: seen through a stand-in, since a real model takes seconds."""
    drawn = []

    def create(*_, **__):
        drawn.append(torch.rand(()).item())
        raise RuntimeError("seen enough")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for seed in (0, 0, 1):
        with pytest.raises(UserError):
            data.open_clip_backbone("ViT-S-32-alt:random", None, seed, CPU, tmp_path)
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_network_points_to_local_weights(tmp_path):
    with pytest.raises(UserError, match="--model ViT-B-32 --weights FILE") as caught:
        data.open_clip_backbone("ViT-B-32:laion2b_s34b_b79k", None, 0, CPU, tmp_path)
    assert "cannot download ViT-B-32:laion2b_s34b_b79k" in str(caught.value)


@pytest.mark.parametrize("part", ["create_model_and_transforms", "get_tokenizer"])
def test_failing_download_of_any_part_is_one_line(part, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect\nto the hub")
    small = tiny(tmp_path).clip
    small.visual.image_mean, small.visual.image_std = (.5, .5, .5), (.2, .2, .2)
    monkeypatch.setattr(open_clip, "create_model_and_transforms",
                        lambda *_, **__: (small, None, None))
    monkeypatch.setattr(open_clip, part, refuse)  # some tokenizers come from the hub, too
    with pytest.raises(UserError, match="--weights") as caught:
        data.open_clip_backbone("ViT-B-32:openai", None, 0, CPU, tmp_path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Language models: whatever is loaded is the model itself, or refused
# ------------------------------------------------------------------------------------------------

WORDS = ["red", "blue", "green", "car", "dog", "cat", "tree", "house", "run", "jump", "sing",
         "slow", "fast", "big", "small", "sun", "moon"]
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTA = ("<pad>", "<unk>", "<s>", "</s>")  # here 0 pads: places go on from 1


def word_tokenizer(names=BERT, words=WORDS, frame=True, **more):
    """A tokenizer of whole words; names: of the tokens that pad, are unknown, begin and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    ids = {w: i for i, w in enumerate([*names, *words])}
    pad, unknown, first, last = names
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", special_tokens=[(first, 2), (last, 3)])
    kinds = {"pad_token": pad, "unk_token": unknown, "cls_token": first, "sep_token": last}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**kinds, **more})


def language_model(root, kind="Bert", tokenizer=None, **settings):
    """A random model of three blocks in a folder."""
    import transformers
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 12}
    if kind == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 12}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": 24, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **sizes,
        **settings})
    model = transformers.AutoModel.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1) * .5, .3)
    model.save_pretrained(root)
    (tokenizer or word_tokenizer()).save_pretrained(root)
    return root


def change_weights(root, change):
    from safetensors.torch import load_file, save_file
    path = root / "model.safetensors"
    weights = load_file(path)
    save_file({k: v.contiguous() for k, v in change(weights).items()}, path, {"format": "pt"})


def drop_one(weights):
    del weights["encoder.layer.1.output.dense.bias"]
    return weights


def widen_one(weights):
    weights["encoder.layer.1.output.dense.bias"] = torch.zeros(7)
    return weights


def rename_all(weights):
    return {f"net.{name}": w for name, w in weights.items()}


@pytest.mark.parametrize("change, words", [
    (drop_one, "encoder.layer.1.output.dense.bias is missing, and so 1 of the"),
    (widen_one, "encoder.layer.1.output.dense.bias has another shape"),
    (rename_all, "begins with net.embeddings.LayerNorm")])
def test_missing_weights_are_named(tmp_path, change, words):
    change_weights(language_model(tmp_path), change)
    with pytest.raises(UserError, match=words):
        data.text_encoder(str(tmp_path), 8, 0.0, tmp_path)


def test_a_missing_pooler_does_not_matter(tmp_path):
    change_weights(language_model(tmp_path), lambda weights: {
        n: w for n, w in weights.items() if not n.startswith("pooler.")})
    encoder, encode = data.text_encoder(str(tmp_path), 8, 0.0, tmp_path)
    assert encoder.pooler is None and ", 0 weights missing; split = unsplit" in encode.said()


def test_weights_of_a_head_are_left_out_and_counted(tmp_path):
    change_weights(language_model(tmp_path), lambda weights: {
        **{f"bert.{n}": w for n, w in weights.items()}, "classifier.bias": torch.zeros(2),
        "classifier.weight": torch.zeros(2, 16)})
    _, encode = data.text_encoder(str(tmp_path), 8, 0.0, tmp_path)
    assert "0 weights missing, 2 other weights of the file left out;" in encode.said()


@pytest.mark.parametrize("kind, settings, words", [
    ("Bert", {"is_decoder": True}, "is a BertModel, which does more"),
    ("RobertaPreLayerNorm", {}, "is a RobertaPreLayerNormModel, which does more"),
    ("RoFormer", {"embedding_size": 16}, "is a RoFormerModel, and no batch passes"),
    ("IBert", {}, "is a IBertModel, and no batch passes"),
    ("MPNet", {}, "is a MPNetModel; models that can be cut are BERT-type"),
    ("Granite", {"embedding_multiplier": 3.0, "num_key_value_heads": 1}, "is a GraniteModel, wh"),
    ("Albert", {"embedding_size": 8}, "is a AlbertModel; models that can be cut are")])
def test_a_model_that_would_be_computed_otherwise_is_refused(tmp_path, kind, settings, words):
    language_model(tmp_path, kind, **settings)
    with pytest.raises(UserError, match=words):
        data.text_encoder(str(tmp_path), 8, 0.0, tmp_path)


@pytest.mark.parametrize("kind, settings", [
    ("Electra", {"embedding_size": 8}), ("ConvBert", {"embedding_size": 8}),
    ("DistilBert", {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32}),
    ("Llama", {"num_key_value_heads": 1}), ("GPT2", {}),
    ("Mistral", {"num_key_value_heads": 1, "sliding_window": 2})])
def test_a_model_that_can_be_cut_is_the_librarys(tmp_path, kind, settings):
    """The states of the split are those of AutoModel, and --dropout reaches every layer."""
    from transformers import AutoModel

    from elsa import SplitEncoder
    language_model(tmp_path, kind, **settings)
    encoder, encode = data.text_encoder(str(tmp_path), 8, .3, tmp_path)
    rates = [m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)]
    rates += [m.attention_dropout for m in encoder.modules()
              if isinstance(getattr(m, "attention_dropout", None), float)]
    assert rates and set(rates) == {.3}
    ids, mask = encode(["red blue green car dog", "dog"])
    own = AutoModel.from_pretrained(tmp_path).eval()(input_ids=ids, attention_mask=mask)
    split = SplitEncoder(encoder, 2).eval()
    found = split.last_states(*split.part1(ids, mask, 2), 2)
    torch.testing.assert_close(found[mask > 0], own.last_hidden_state[mask > 0])
    if kind in ("Llama", "Mistral", "GPT2"):
        read = own.last_hidden_state[[0, 1], [6, 2]]  # [CLS] five words [SEP]; [CLS] a word [SEP]
    else:
        read = own.last_hidden_state[:, 0]
    torch.testing.assert_close(split.read(found, split.embed(ids, mask)[1]), read)


def test_unknown_words_and_texts_that_are_cut_are_counted(tmp_path):
    language_model(tmp_path, tokenizer=word_tokenizer(padding_side="left"))
    _, encode = data.text_encoder(str(tmp_path), 6, 0.0, tmp_path)
    ids, mask = encode(["red blue", "dog cat tree house", "dog cat tree house run sing",
                        "red frog"])
    assert ids.tolist() == [[2, 4, 5, 3, 0, 0], [2, 8, 9, 10, 11, 3], [2, 8, 9, 10, 11, 3],
                            [2, 4, 1, 3, 0, 0]]
    assert mask.sum(1).tolist() == [4, 6, 6, 4]
    assert encode.said() == (
        f"BertModel of {tmp_path}, 3 blocks, width 16, 0 weights missing, padding moved to the "
        "right, 8.3% unknown tokens, 1 of 4 texts cut at 6 tokens; split = unsplit on one batch")
    encode(["frog toad newt salamander"] * 5)
    with pytest.raises(UserError, match=r"does not know 6\d% of the words \(\[UNK\]\)"):
        encode.said()


@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, kind):
    language_model(tmp_path, kind)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"tokenizer"):
        _, encode = data.text_encoder(str(tmp_path), 8, 0.0, tmp_path)
        encode(["red blue"])
        encode.said()


def test_places_that_begin_after_the_padding_are_not_overrun(tmp_path):
    language_model(tmp_path, "Roberta", word_tokenizer(ROBERTA))  # 12 places, of which 0 pads
    _, encode = data.text_encoder(str(tmp_path), 512, 0.0, tmp_path)
    ids, _ = encode(["dog " * 80, "cat"])
    assert ids.shape == (2, 11) and "1 of 2 texts cut at 11 tokens" in encode.said()


def test_a_missing_padding_token_is_stood_in_for(tmp_path):
    """Padding is masked, so the states of a short text are those it has alone."""
    for kind in ("Bert", "Llama"):
        root = tmp_path / kind
        language_model(root, kind, word_tokenizer(pad_token=None), num_key_value_heads=1,
                       pad_token_id=None if kind == "Llama" else 0)
        encoder, encode = data.text_encoder(str(root), 8, 0.0, root)
        assert "[SEP] pads" in encode.said()
        ids, mask = encode(["red", "red blue green"])
        assert mask.sum(1).tolist() == [3, 5] and (encoder.config.pad_token_id is not None)
        both = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0, :3]
        torch.testing.assert_close(both, encoder(input_ids=ids[:1, :3]).last_hidden_state[0])


def test_an_encoder_whose_tokenizer_adds_no_cls_is_refused_and_a_decoder_is_not(tmp_path):
    language_model(tmp_path / "bert", tokenizer=word_tokenizer(frame=False))
    with pytest.raises(UserError, match=r"no \[CLS\] before a text"):
        data.text_encoder(str(tmp_path / "bert"), 8, 0.0, tmp_path)
    language_model(tmp_path / "gpt", "GPT2", word_tokenizer(frame=False))
    _, encode = data.text_encoder(str(tmp_path / "gpt"), 8, 0.0, tmp_path)
    ids, mask = encode(["red blue", "", "dog"])
    assert ids.tolist() == [[4, 5], [0, 0], [8, 0]]
    assert mask.sum(1).tolist() == [2, 1, 1] and "25% unknown" in encode.said()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    language_model(tmp_path, tokenizer=word_tokenizer(words=[*WORDS, *"abcdefgh"]))
    _, encode = data.text_encoder(str(tmp_path), 8, 0.0, tmp_path)
    with pytest.raises(UserError, match="has a token 28, its embeddings end at 23"):
        encode(["red h"])


def test_a_tokenizer_is_taken_as_its_file_says(tmp_path):
    """The library would read a Qwen2's with the rules of Qwen2, by which no word here is known."""
    language_model(tmp_path, "Qwen2", num_key_value_heads=1)
    _, encode = data.text_encoder(str(tmp_path), 8, 0.0, tmp_path)
    assert encode(["red blue"])[0].tolist() == [[2, 4, 5, 3]] and "unknown" not in encode.said()


def test_without_a_network_the_hub_is_asked_once_and_the_copy_taken(tmp_path, monkeypatch):
    asked = []

    class Silent:
        def head(self, url, **_):
            asked.append(url)
            raise ConnectionError("nobody there")
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Silent)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"does not answer .ConnectionError: nobody") as stop:
        data.text_encoder("me/tiny", 8, 0.0, tmp_path)
    assert len(asked) == 1 and "\n" not in str(stop.value)
    copy = tmp_path / "models--me--tiny"  # as the hub's own client keeps it
    language_model(copy / "snapshots" / ("a" * 40))
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("a" * 40)
    encoder, encode = data.text_encoder("me/tiny", 8, 0.0, tmp_path)
    assert type(encoder).__name__ == "BertModel" and len(asked) == 2
    assert encode.said().startswith("BertModel of me/tiny, 3 blocks")


def test_half_precision_is_loaded_and_said(tmp_path):
    language_model(tmp_path, "Llama", num_key_value_heads=1)
    encoder, encode = data.text_encoder(str(tmp_path), 8, 0.0, tmp_path, torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert encoder.rotary_emb.inv_freq.dtype == torch.float32 and "bfloat16" in encode.said()


def test_tiny_decoder_learns_words_and_is_cached(tmp_path):
    """After training, the state at the end of a text says more of its words than before."""
    def named(steps):
        config = data.TinyBertConfig(width=16, layers=1, heads=2, sentences=300, steps=steps)
        model, encode = data.tiny_decoder(0, tmp_path, config)
        said = [w for words in data.TOPIC_WORDS for w in words[:2]]
        ids, mask = encode([f"the {a} and {b}" for a, b in zip(said[::2], said[1::2], strict=True)])
        assert mask.sum(1).tolist() == [6] * 5 and (ids[:, 5] == ids.max()).all()
        states = model(ids, mask).last_hidden_state[:, 5]
        ranks = (states @ model.get_input_embeddings().weight.T).log_softmax(-1)
        return ranks.gather(1, ids[:, [2, 4]]).mean().item(), model
    (before, _), (after, model) = named(5), named(150)
    assert after > before + .3
    assert len(list(tmp_path.glob("tiny-decoder-*.pt"))) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), named(150)[1].parameters(),
                                                 strict=True))
    assert len(list(tmp_path.glob("tiny-decoder-*.pt"))) == 2


# ================================================================================================
# What users were surprised by
# ================================================================================================


def colour_tree(root, *folders, size=(8, 8)):
    """Four pictures of one colour each in every folder below root."""
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for j in range(4):
            Image.new("RGB", size, (40 * i, 40 * j, 200)).save(root / folder / f"{j}.bmp")
    return f"folder:{root}"


@pytest.mark.parametrize("folders, words", [
    (["cat/train", "cat/test", "dog/train", "dog/test"], "each class folder holds test, train/"),
    (["cat/train", "dog/test"], "are these classes, parts, or other pictures"),
    (["COVID/images", "COVID/masks", "Normal/images", "Normal/masks"], "holds images, masks/"),
    (["fold1/a", "fold1/b", "fold2/a", "fold2/b"], "are these classes, parts"),
    (["seg_train/cat", "seg_train/dog", "seg_pred"], "a class, or not"),
    (["Training Data/cat", "Training Data/dog", "unlabeled"], "a class, or not")])
def test_folders_below_classes_that_may_mean_something_else_are_refused(folders, words, tmp_path):
    with pytest.raises(UserError, match=words):
        data.load_images(colour_tree(tmp_path / "d", *folders), tmp_path)


def test_folders_below_classes_are_said(tmp_path):
    dataset = colour_tree(tmp_path / "d", "train/cat/a", "train/cat/b", "train/dog", "test/cat",
                          "test/dog")
    images = data.load_images(dataset, tmp_path)
    assert len(images.train) == 12
    assert "training files in train/, 2 folders below them read with their class;" in images.said


def test_results_and_caches_among_the_classes_are_left_out(tmp_path):
    root = tmp_path / "d"
    dataset = colour_tree(root, "jumps", "runs", "data", "results/a")
    for name in ("config.json", "log.jsonl"):
        (root / "results" / "a" / name).write_text("{}")
    images = data.load_images(dataset, root / "data")
    assert images.class_names == ["data", "jumps", "runs"]
    assert "left out: results/" in images.said


def test_other_bytes_of_the_same_size_are_other_pictures(tmp_path):
    dataset = colour_tree(tmp_path / "d", "train/a", "train/b", "test/a", "test/b")
    before = data.load_images(dataset, tmp_path).test.listing()
    a, b = (tmp_path / "d" / "test" / c / "0.bmp" for c in "ab")
    first, second = a.read_bytes(), b.read_bytes()
    assert len(first) == len(second)
    a.write_bytes(second)
    b.write_bytes(first)
    after = data.load_images(dataset, tmp_path).test.listing()
    assert common.fingerprint(before) != common.fingerprint(after)


def test_copies_in_a_drawn_test_part_are_said(tmp_path):
    dataset = colour_tree(tmp_path / "d", "a", "b")
    assert "too: " not in data.load_images(dataset, tmp_path).said
    (tmp_path / "d" / "a" / "9.bmp").write_bytes((tmp_path / "d" / "a" / "0.bmp").read_bytes())
    assert "files of the test that are in training, too: 1" in data.load_images(
        dataset, tmp_path).said


def test_further_frames_are_said(tmp_path):
    dataset = colour_tree(tmp_path / "d", "a", "b")
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (9, 99)]
    frames[0].save(tmp_path / "d" / "a" / "two.tif", save_all=True, append_images=frames[1:])
    assert "1 of several frames or pages, of which the first is read" in data.load_images(
        dataset, tmp_path).said


def test_a_tail_is_cut_from_what_a_class_has():
    labels = np.repeat([0, 1], 15)
    images = data.ImageSet("x", ["a", "b"], "{}", data.Images(np.zeros((30, 2, 2, 3), np.uint8)),
                           labels, data.Images(np.zeros((2, 2, 2, 3), np.uint8)), np.arange(2))
    cut = data.long_tailed(images, 4, 60, "dataset", 0)
    assert np.bincount(cut.train_labels).tolist() == [15, 3]


def test_a_group_rule_of_odd_digits_is_refused():
    with pytest.raises(UserError, match="HIGH,LOW"):
        data.group_rule("²,1")


def test_a_header_of_numbers_is_no_text(tmp_path):
    (tmp_path / "t.csv").write_text("0,1\n" + "".join(f"{i % 2},some text {i}\n" for i in range(9)))
    with pytest.raises(UserError, match="row 1, '0,1', looks like the header of a table without"):
        data.load_texts(f"csv:{tmp_path / 't.csv'}", tmp_path)


@pytest.mark.parametrize("row", ['{"text": NaN, "label": "a"}', '{"text": "x", "label": NaN}'])
def test_nan_in_json_is_no_value(row, tmp_path):
    rows = [f'{{"text": "t {i}", "label": "{"ab"[i % 2]}"}}' for i in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows, row]))
    with pytest.raises(UserError, match=r"rows without a text or a label .1.: 21"):
        data.load_texts(f"csv:{tmp_path / 't.jsonl'}", tmp_path)
