"""Everything that produces inputs: image sets, long tails, clients, small offline worlds.

Image sets   `load_images(name, data_dir, seed)` -> ImageSet: CIFAR, Food-101, DTD, Aircraft, Pets,
             Fashion-MNIST through torchvision; Stanford Dogs, ImageNet-LT and Places-LT from their
             own files; `folder:PATH` from any ImageFolder tree; `shapes` rendered here.
Long tail    `long_tail_counts`, `long_tail_indices`, `frequency_groups`, `long_tailed`
Clients      `pachinko_partition` (two label levels), `dirichlet_partition`, `federated_clients`
Text sets    `load_texts`: TREC, AG News, SST-2, csv:PATH (any table of labels and texts), `topics`;
             `text_clients`, `poison_labels`, `draw_network`; `load_encoder`: `tiny_bert`,
             `tiny_decoder`, `text_encoder`
Reading      `read_image`: any picture file as a viewer shows it; `open_all`: what the files of a
             set are; `ImagePool`: images through a transform, in memory when they are small
Transfer     `load_splits` (VTAB-1k, FGVC, folders), `frozen_vit`, `transfer_task`, `planted`
CLIP         `open_clip_backbone` (any open_clip model), `tiny_backbone` (pre-trained on the spot),
             `encode_once` (image features, cached), `class_tokens`
Weights      `hub_if_reachable`: one attempt at the Hugging Face hub, then its cache
Federation   `load_federation` -> FederatedImages: long tail, clients, CLIP and features of a run
Problems     `get_problem(name)` -> Problem: F1-F6, ZDT, DTLZ, VLMOP, RE (TABLE), the multitask
             suite MTMO, a user's (`OwnProblem`); `reference_front`, `das_dennis`, `settle`

Each section can be read alone.
"""
import argparse
import codecs
import contextlib
import csv
import difflib
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import runpy
import sys
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common import (
    EXACT,
    UserError,
    atomic_write,
    cache_key,
    cached,
    fingerprint,
    non_dominated,
    numpy_generator,
    printable,
    seed_for,
    seed_torch,
    torch_generator,
    user_path,
)


def short_name(dataset):
    """What a run on a --dataset is called: its name, or the last part of its path."""
    kind, _, path = dataset.partition(":")
    if kind not in ("csv", "folder"):
        return dataset
    path = user_path(path).resolve()
    return path.stem if kind == "csv" else path.name


# ------------------------------------------------------------------------------------------------
# Long tails
# ------------------------------------------------------------------------------------------------


def long_tail_counts(n_max, num_classes, imbalance):
    """Images per class, most frequent first: n_c = floor(n_max · imbalance^(-c / (C - 1))).

    n_max: images of the most frequent class; imbalance >= 1: most over least frequent, e.g. 100.
    Returns a list of num_classes ints. Source: Cui et al., CVPR 2019; used by all long-tailed
    CIFARs.
    """
    if n_max < 1 or num_classes < 1 or imbalance < 1:
        raise ValueError("long_tail_counts needs n_max >= 1, num_classes >= 1 and imbalance >= 1")
    return [int(n_max / imbalance ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]


def long_tail_indices(labels, counts, rng):
    """Draw counts[c] of the samples of each class c (or all it has), without replacement.

    labels: (N,) ints; counts: (C,) ints; rng: np.random.Generator -> sorted (M,) int64 indices.
    """
    labels = np.asarray(labels)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(counts)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def frequency_groups(counts, rule):
    """Split the classes into {"many", "med", "few"} -> int64 arrays of class indices.

    counts: (C,) training images per class. rule: (high, low) for many > high >= med > low >= few
    (the field uses (100, 20)), or "thirds" for thirds of the classes by count.
    """
    counts = np.asarray(counts)
    if rule == "thirds":
        order = np.argsort(-counts, kind="stable")
        many, med, few = np.array_split(order, 3)
    else:
        high, low = rule
        many, med, few = (np.flatnonzero(counts > high),
                          np.flatnonzero((counts <= high) & (counts > low)),
                          np.flatnonzero(counts <= low))
    return {"many": np.sort(many), "med": np.sort(med), "few": np.sort(few)}


def group_rule(text):
    """The rule of frequency_groups that a flag names: "100,20" -> (100, 20); "thirds".

    UserError: anything else.
    """
    numbers = [int(n) for n in text.split(",") if n.strip().isdecimal()]
    if text != "thirds" and (len(text.split(",")) != 2 or len(numbers) != 2
                             or numbers[0] <= numbers[1]):
        raise UserError(f"--groups {text!r}: expected HIGH,LOW with HIGH > LOW, or thirds")
    return text if text == "thirds" else tuple(numbers)


def long_tailed(images, imbalance, n_max, class_order, seed):
    """An ImageSet with its training part cut to a long tail (as it is, if it has one already).

    imbalance: most over least frequent class, None for 100, or for all images where that ratio is
    10 (the paper's smallest) or more as it is; n_max: images of the most frequent class, None for
    all it has; class_order: "dataset" (class 0 is the most frequent, or the set's own tail_order)
    or "random", drawn from the seed. Every class keeps an image at least.
    """
    size = np.bincount(images.train_labels, minlength=images.num_classes)
    if images.long_tailed or (
            imbalance is n_max is None and size.max() >= 10 * size.min()):
        return images
    n_max = min(n_max or int(size.mean() if images.tail_order else size.max()), int(size.max()))
    tail = np.maximum(long_tail_counts(n_max, images.num_classes, imbalance or 100), 1)
    rank = np.argsort(images.tail_order or range(images.num_classes))  # 0: the most frequent class
    if class_order == "random":
        rank = numpy_generator(seed, "class-order").permutation(images.num_classes)
    chosen = long_tail_indices(images.train_labels, tail[rank], numpy_generator(seed, "long-tail"))
    return replace(images, train=images.train.subset(chosen),
                   train_labels=images.train_labels[chosen])


# ------------------------------------------------------------------------------------------------
# Clients
# ------------------------------------------------------------------------------------------------


def pachinko_partition(coarse, fine, num_clients, beta, rng, fine_beta=10.0):
    """Equal-sized non-IID clients by the pachinko allocation over two label levels.

    Every client draws floor(N / K) samples: a mixture Dirichlet(beta) over the coarse labels and
    Dirichlet(fine_beta) over the fine labels inside each; a sample's coarse, then fine label is
    drawn from them, then one of that label's remaining samples. Exhausted labels leave and the
    weights of the others are renormalised. Source: Reddi et al., "Adaptive Federated Optimization",
    ICLR 2021.

    coarse, fine: (N,) int labels; beta > 0, smaller = more skewed -> list of K sorted int64 arrays.
    """
    coarse, fine = np.asarray(coarse), np.asarray(fine)
    children = {c: np.unique(fine[coarse == c]) for c in np.unique(coarse)}
    parents = np.array(list(children))
    left = {f: list(rng.permutation(np.flatnonzero(fine == f))) for f in np.unique(fine)}
    clients = []
    for _ in range(num_clients):
        weight = rng.dirichlet(np.full(len(parents), beta))
        inner = {c: rng.dirichlet(np.full(len(f), fine_beta)) for c, f in children.items()}
        mine = []
        for _ in range(len(fine) // num_clients):
            c = _draw(weight, np.array([any(left[f] for f in children[p]) for p in parents]), rng)
            f = _draw(inner[parents[c]], np.array([bool(left[f]) for f in children[parents[c]]]),
                      rng)
            mine.append(left[children[parents[c]][f]].pop())
        clients.append(np.sort(np.array(mine, dtype=np.int64)))
    return clients


def _draw(weights, available, rng):
    """Index drawn by weight among those available (uniformly if all of these weigh nothing)."""
    weights = np.where(available, weights, 0.0)
    if weights.sum() <= 0:
        weights = available.astype(float)
    return int(np.searchsorted(np.cumsum(weights / weights.sum())[:-1], rng.random(), side="right"))


def dirichlet_partition(train_labels, test_labels, num_clients, beta, rng, tries=1000,
                        flag="--beta"):
    """Non-IID clients: each class is cut over the clients by one Dirichlet(beta) draw.

    A client that already holds N / K training samples gets nothing of further classes. The test
    samples of a class are cut by the same proportions. Redrawn until every client has a training
    and a test sample. Source: Hsu et al. 2019, with the cap of Wang et al., ICLR 2020.

    train_labels, test_labels: (N,), (M,) ints in 0..C-1, or None for no test; beta > 0; flag: what
    the command calls it -> two lists of K sorted int64 arrays (training, test; [] without one).
    UserError if no draw serves all.
    """
    if test_labels is None:
        train, _ = dirichlet_partition(train_labels, train_labels, num_clients, beta, rng, tries,
                                       flag)
        return train, []
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    enough = num_clients <= min(len(train_labels), len(test_labels))
    for _ in range(tries if enough else 0):
        train, test = [[] for _ in range(num_clients)], [[] for _ in range(num_clients)]
        held = np.zeros(num_clients)
        for c in range(int(max(train_labels.max(), test_labels.max())) + 1):
            room = held < len(train_labels) / num_clients
            share = rng.dirichlet(np.full(num_clients, beta)) * room
            if share.sum() <= 0:
                share = np.ones(num_clients)
            cuts = np.cumsum(share / share.sum())[:-1]
            for labels, parts in ((train_labels, train), (test_labels, test)):
                members = rng.permutation(np.flatnonzero(labels == c))
                pieces = np.split(members, (cuts * len(members)).astype(int))
                for part, piece in zip(parts, pieces, strict=True):
                    part.append(piece)
            held = np.array([sum(map(len, part)) for part in train])
        train, test = ([np.sort(np.concatenate(part)).astype(np.int64) for part in parts]
                       for parts in (train, test))
        if all(map(len, train)) and all(map(len, test)):
            return train, test
    raise UserError(
        f"no Dirichlet({beta}) split gave all {num_clients} clients a training and a test sample "
        + (f"in {tries} draws" if enough else f"of {len(train_labels)} and {len(test_labels)}")
        + f"; use fewer --clients or a larger {flag}")


def federated_clients(images, train_labels, num_clients, beta, rng, tries=1000):
    """Who holds what of an ImageSet whose long-tailed training part has `train_labels` (N,).

    -> K pairs (train, test) of sorted int64 arrays: numbers into the training samples followed by
    all test samples. CIFAR-100: one pachinko draw over both, then split by origin. Else Dirichlet,
    and images.client_tests says how the test part is cut: "like training", by the proportions of
    the training part; "balanced", every client an equal, IID share of each class; "own draw", by
    another Dirichlet draw. UserError: a client without training or without test samples.
    """
    first_test, test_labels = len(train_labels), images.test_labels
    if images.coarse is not None:
        labels = np.concatenate([train_labels, test_labels])
        parts = pachinko_partition(images.coarse[labels], labels, num_clients, beta, rng)
        train = [p[p < first_test] for p in parts]
        test = [p[p >= first_test] - first_test for p in parts]
    elif images.client_tests == "like training":
        train, test = dirichlet_partition(train_labels, test_labels, num_clients, beta, rng, tries)
    else:
        train, _ = dirichlet_partition(train_labels, None, num_clients, beta, rng, tries)
        if images.client_tests == "balanced":
            # dealt like cards, class by class: shares of a class differ by one sample at most
            deck = rng.permutation(len(test_labels))
            deck = deck[np.argsort(test_labels[deck], kind="stable")]
            test = [np.sort(deck[k::num_clients]) for k in range(num_clients)]
        else:
            test, _ = dirichlet_partition(test_labels, None, num_clients, beta, rng, tries)
    if not all(map(len, [*train, *test])):
        raise UserError("a client got no training or no test sample; use fewer --clients or a "
                        "larger --beta")
    return [(a, b + first_test) for a, b in zip(train, test, strict=True)]


def clients_that_fit(images, beta, seed):
    """federated_clients of 20, the paper's number, or of as many as a small set can serve."""
    for k in (20, 15, 10, 8, 6, 5, 4, 3):
        if k <= min(len(images.train_labels), len(images.test_labels)):
            with contextlib.suppress(UserError):
                return federated_clients(images, images.train_labels, k, beta,
                                         numpy_generator(seed, "partition"), tries=100)
    return federated_clients(images, images.train_labels, 2, beta,
                             numpy_generator(seed, "partition"))


# ------------------------------------------------------------------------------------------------
# Text sets
# ------------------------------------------------------------------------------------------------


@dataclass
class TextSet:
    """Labelled texts. train, test: lists of str; train_labels, test_labels: (N,) int64 arrays.

    train_groups, test_groups: the domain of every text, all 0 where a set knows none; probes:
    public unlabelled texts, empty where a set brings none; said: what was read and left out.
    """
    name: str
    class_names: list
    train: list
    train_labels: np.ndarray
    test: list
    test_labels: np.ndarray
    train_groups: np.ndarray
    test_groups: np.ndarray
    probes: list
    said: str


TREC_CLASSES = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
AG_CLASSES = ["World", "Sports", "Business", "Sci/Tech"]
# name -> (its folder under --data-dir, the files wanted there, where they are published)
TEXT_FILES = {
    "trec": ("trec", ["train_5500.label", "TREC_10.label"],
             "https://cogcomp.seas.upenn.edu/Data/QA/QC/"),
    "ag-news": ("ag-news", ["ag_news_csv/train.csv", "ag_news_csv/test.csv"],
                "https://s3.amazonaws.com/fast-ai-nlp/ag_news_csv.tgz"),
    "sst2": ("sst2", ["train.tsv", "dev.tsv"],
             "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"),
}
TEXT_SETS = [*TEXT_FILES, "topics", "topics-same"]


def text_set_name(dataset):
    """A --dataset of texts, checked before anything is read -> itself; UserError: no such set."""
    if dataset in TEXT_SETS or dataset.startswith("csv:"):
        return dataset
    word = dataset.lower().replace("_", "-")
    near = difflib.get_close_matches(word, [*TEXT_SETS, "csv:"], 1, .75)
    if word.startswith("csv:"):
        near = ["csv:" + dataset[4:]]
    elif user_path(dataset).is_dir():
        near = [f"csv:{dataset}/FILE"]
    elif user_path(dataset).is_file() or Path(word).suffix in (".csv", ".tsv", ".jsonl", ".txt"):
        near = [f"csv:{dataset}"]
    raise UserError(f"--dataset {dataset!r} is unknown; there are {', '.join(TEXT_SETS)} and "
                    f"csv:PATH{f'. Did you mean {near[0]}?' if near else ''}")


def load_texts(name, data_dir, seed=0, probes=None, num_probes=0, encoding=None, **table):
    """The TextSet `name`, one of TEXT_SETS or "csv:PATH"; downloads into data_dir if it can.

    probes: a file of public texts, one a line; without it a set's own are taken, and a set that has
    none gives up num_probes > 0 of its training texts. seed matters for what is generated and which
    texts are given up, or are the test. encoding: of a csv and of probes without a byte order mark,
    if they are not UTF-8; table: label_column, text_column and test_file of a csv, see _csv_set.
    UserError: unknown name, missing, empty or damaged files, no network (the message says which
    files to put where), fewer than 4 probes.
    """
    texts = _load_texts(text_set_name(name), data_dir, seed, encoding, table)
    seen = set(texts.train)
    found = sum(t in seen for t in texts.test)
    notes = [f"test texts that stand in the training part too: {found}"] * bool(found)
    labels = {pair for part in ((texts.train, texts.train_labels), (texts.test, texts.test_labels))
              for pair in zip(*part, strict=True)}
    twice = [t for t, n in Counter(t for t, _ in labels).items() if n > 1 and not any(
        texts.train_groups)]
    if twice:
        notes.append(f"texts with more than one label: {len(twice)}, such as {twice[0][:40]!r}")
    if probes is not None:
        texts.probes, said = _read_probes(probes, encoding)
        notes.append(said)
    elif texts.probes:
        notes.append(f"{len(texts.probes)} probes of its own")
    elif num_probes:
        _set_probes_apart(texts, num_probes, numpy_generator(seed, "probes"))
        less = len(texts.probes) < num_probes
        notes.append(f"{len(texts.probes)} training texts set apart as probes"
                     + less * f" (of {num_probes} wanted: a quarter at most)")
    texts.said = "; ".join([texts.said, *notes])
    return texts


def _load_texts(name, data_dir, seed, encoding, table):
    if name in ("topics", "topics-same"):
        return topics(seed, same=name == "topics-same")
    if name.startswith("csv:"):
        return _csv_set(name.partition(":")[2], seed, encoding, **table)
    folder, files, url = TEXT_FILES[name]
    root = Path(data_dir) / folder
    if not all((root / f).exists() for f in files):
        _fetch_texts(name, root, files, url)
    read = {"trec": _read_trec, "ag-news": _read_ag_news, "sst2": _read_sst2}[name]
    classes = {"trec": TREC_CLASSES, "ag-news": AG_CLASSES, "sst2": ["negative", "positive"]}[name]
    parts, missing = [read(root / f) for f in files], ""
    for f, (texts, labels) in zip(files, parts, strict=True):
        if not texts or len(set(labels)) < 2:
            raise UserError(f"{root / f} holds {len(texts)} texts of {len(set(labels))} classes; "
                            f"expected the file of {url}")
        none = [c for i, c in enumerate(classes) if i not in labels]
        missing += bool(none) * f"; {f} holds no text of {', '.join(none)}"
    said = (f"{name}, {_class_counts(classes, parts[0][1])}, test: {len(parts[1][0])} of "
            f"{files[1]}{missing}")
    return _text_set(name, classes, *parts, said)


def _text_set(name, classes, train, test, said):
    (texts, labels), (test_texts, test_labels) = train, test
    return TextSet(name, classes, texts, np.array(labels, dtype=np.int64), test_texts,
                   np.array(test_labels, dtype=np.int64), np.zeros(len(texts), dtype=np.int64),
                   np.zeros(len(test_texts), dtype=np.int64), [], said)


def _class_counts(names, labels):
    """"3 classes (ham 40, spam 9, egg 2)"; of more than ten, the first five and the rarest."""
    counts = np.bincount(labels, minlength=len(names))
    shown = [f"{name[:30]} {n}" for name, n in zip(names, counts, strict=True)]
    if len(shown) > 10:
        shown = [*shown[:5], "..., rarest: " + shown[counts.argmin()]]
    return f"{len(names)} classes ({', '.join(shown)})"


def _read_probes(path, encoding=None):
    """The lines of a file that hold text, each once -> texts, what was read."""
    lines, how = _lines(user_path(path), encoding)
    lines = [line.strip() for _, line in lines]
    once = list(dict.fromkeys(lines))
    if len(once) < 4:
        raise UserError(f"--probes {path}: lines with text: {len(once)}; a covariance needs at "
                        "least 4 different texts, one a line, better 96")
    again = f", repeated lines left out: {len(lines) - len(once)}" * (len(once) < len(lines))
    return once, f"{len(once)} probes of {printable(Path(path).name)} ({how}{again})"


def _set_probes_apart(texts, count, rng):
    """Moves `count` training texts, at most a quarter, to the probes; nobody sees their labels.

    The last text of a class stays: what cannot be trained could not be tested either.
    """
    quota, left, apart = min(count, len(texts.train) // 4), np.bincount(texts.train_labels), []
    for i in rng.permutation(len(texts.train)):
        if len(apart) < quota and left[texts.train_labels[i]] > 1:
            apart.append(i)
            left[texts.train_labels[i]] -= 1
    if len(apart) < 4:
        raise UserError(f"{texts.name} has {len(texts.train)} training texts, too few to set "
                        "probes apart; add texts or name --probes FILE")
    kept = np.setdiff1d(np.arange(len(texts.train)), apart)
    texts.probes = [texts.train[i] for i in apart]
    texts.train = [texts.train[i] for i in kept]
    texts.train_labels, texts.train_groups = texts.train_labels[kept], texts.train_groups[kept]


def text_clients(texts, num_clients, alpha, seed=0):
    """Clients take turns over a set's domains; each domain is cut by a Dirichlet(alpha) draw.

    num_clients None: 12, or as many as have 8 training and 2 test texts each in the mean and can be
    drawn. -> K pairs (train, test) of int64 tensors, numbers into the pool of all training texts
    followed by all test texts, and the domain of each client. UserError: a domain without a client,
    or as dirichlet_partition.
    """
    if num_clients is None:
        for count in range(max(min(12, len(texts.train) // 8, len(texts.test) // 2), 1), 1, -1):
            try:
                return text_clients(texts, count, alpha, seed)
            except UserError:
                continue
        num_clients = 1
    groups = np.unique(texts.train_groups)
    domain = [int(groups[k % len(groups)]) for k in range(num_clients)]
    clients = [None] * num_clients
    for g in groups:
        mine = [k for k in range(num_clients) if domain[k] == g]
        if not mine:
            raise UserError(f"--clients {num_clients}: each of the {len(groups)} domains needs at "
                            "least one client")
        train, test = (np.flatnonzero(x == g) for x in (texts.train_groups, texts.test_groups))
        parts = dirichlet_partition(texts.train_labels[train], texts.test_labels[test], len(mine),
                                    alpha, numpy_generator(seed, "partition", int(g)),
                                    flag="--alpha")
        for k, a, b in zip(mine, *parts, strict=True):
            clients[k] = torch.as_tensor(train[a]), torch.as_tensor(test[b] + len(texts.train))
    return clients, domain


def poison_labels(labels, classes, clients, domain, poison, seed=0):
    """Make some clients unreliable -> the labels that all train on (N,), and client -> kind.

    labels: the true ones, of the pool; clients, domain: of text_clients; poison: as parse_poison
    reads it. label-flip: class c is called classes - 1 - c; random: labels are drawn evenly. The
    victims are drawn, in turn over the domains, so that no domain loses its honest majority first.
    """
    told, poisoned = labels.clone(), {}
    rng = numpy_generator(seed, "poison")
    order, turn = rng.permutation(len(clients)), {}
    for k in order:
        turn[int(k)] = sum(domain[j] == domain[k] for j in turn)
    queue = sorted(turn, key=turn.get)
    for kind, count in parse_poison(poison, len(clients)):
        for _ in range(count):
            k = queue.pop(0)
            mine, poisoned[k] = clients[k][0], kind
            drawn = torch.as_tensor(rng.integers(0, classes, len(mine)))
            told[mine] = drawn if kind == "random" else classes - 1 - labels[mine]
    return told, poisoned


def parse_poison(text, clients):
    """"label-flip:2,random:1" -> [(kind, count), ...]. UserError: another form, or all clients."""
    found = []
    for part in filter(None, text.split(",")):
        kind, _, count = part.partition(":")
        if kind not in ("label-flip", "random") or not count.isdigit():
            raise UserError(
                f"--poison {text!r}: expected label-flip:N, random:N or both with a comma")
        found.append((kind, int(count)))
    if sum(n for _, n in found) >= clients:
        raise UserError(f"--poison {text} leaves no honest one of {clients} clients")
    return found


def draw_network(clients, edges, seed=0):
    """A simulated network -> dict: latency (N, E) in ms; flops, bandwidth, memory (N,); float64.

    Clients and edges lie in a unit square; latency is 5 ms and 60 ms per unit of distance. Devices
    do 50 GFLOP/s and have 20 Mbit/s (in bytes) and half a model's memory (a share of it) in the
    median, spread log-normally by a factor of two.
    """
    rng = numpy_generator(seed, "network")
    people, places = rng.random((clients, 1, 2)), rng.random((1, edges, 2))
    draw = {name: torch.tensor(median * 2 ** rng.normal(size=clients)) for name, median in
            (("flops", 50e9), ("bandwidth", 20e6 / 8), ("memory", .5))}
    return {"latency": torch.tensor(5 + 60 * np.linalg.norm(people - places, axis=-1)), **draw}


def _fetch_texts(name, root, files, url):
    """Download what is missing; each file appears under its name only when it is whole."""
    if url.endswith(".tgz"):
        return fetch_tar(url, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if url.endswith(".zip"):
            archive = root / url.rpartition("/")[2]
            if not archive.exists():
                torch.hub.download_url_to_file(url, str(archive))
            with zipfile.ZipFile(archive) as content:  # only the members we name: none can escape
                for f in files:
                    wanted = content.read(f"{archive.stem}/{f}")
                    atomic_write(root / f, lambda p, wanted=wanted: p.write_bytes(wanted))
        else:
            for f in files:
                if not (root / f).exists():
                    torch.hub.download_url_to_file(url + f, str(root / f))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and try again") from None
    except OSError as error:  # includes URLError
        raise UserError(f"{name}: cannot download {url} ({error}); without a network, put "
                        f"{' and '.join(files)} into {root}") from None


# The bytes that a text file may start with, and what they say about the rest
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
         codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}


def _read_text(path, encoding=None, usual="utf-8"):
    """A text file, nothing replaced -> its text without a byte order mark, and how it was read.

    By its byte order mark; without one by `encoding`, or else as UTF-8, then as `usual`. UserError:
    no such file; the row of the first byte that is none of these.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); expected a text file"
                        ) from None
    marked = next((name for mark, name in MARKS.items() if raw.startswith(mark)), None)
    found = marked or encoding or "utf-8"

    def refuse(before, what):
        row = 1 + len(re.findall("\r\n|\r|\n", before))
        raise UserError(f"{path}, row {row} holds {what}") from None
    try:
        text = raw.decode(found)
    except LookupError:
        raise UserError(f"--encoding {encoding} is unknown; name one of Python's, such as utf-8, "
                        "utf-16, latin-1, cp1252, gb18030, shift_jis") from None
    except UnicodeDecodeError as error:
        if usual != found == "utf-8" and encoding is None:
            return _read_text(path, usual)
        if b"\0" not in raw:
            refuse(error.object[:error.start].decode(found, "replace"),
                   f"the byte 0x{error.object[error.start]:02x}, which is not {found}; name the "
                   "file's own --encoding, such as cp1252 (Windows), latin-1, gb18030")
        text = "\0"
    if "\0" in text:
        refuse(text.partition("\0")[0], "a NUL byte: it is no text file (a spreadsheet? save it as "
               "CSV), or UTF-16 without a byte order mark (name --encoding utf-16-le)")
    doubtful = ""
    if not marked and encoding and not codecs.lookup(encoding).name.startswith("utf"):
        with contextlib.suppress(UnicodeDecodeError):
            doubtful = ", though it is valid utf-8" * (not raw.decode().isascii())
    return text.removeprefix("\ufeff"), (marked or found).removesuffix("-sig") + doubtful


def _lines(path, encoding=None, usual="utf-8"):
    """The non-empty lines of a text file with their numbers, and how it was read."""
    text, how = _read_text(path, encoding, usual)
    lines = enumerate(re.split("\r\n|\r|\n", text), 1)
    return [(i, line) for i, line in lines if line.strip()], how


def _read_trec(path):
    """Lines "COARSE:fine question", latin-1 -> texts, coarse labels."""
    texts, labels = [], []
    for i, line in _lines(path, usual="latin-1")[0]:
        kind, _, question = line.strip().partition(" ")
        coarse = kind.partition(":")[0]
        if coarse not in TREC_CLASSES or not question:
            raise UserError(f"{path}, line {i}: expected 'COARSE:fine question', got {line[:60]!r}")
        texts.append(question)
        labels.append(TREC_CLASSES.index(coarse))
    return texts, labels


def _read_ag_news(path):
    """Rows "class 1-4","title","description" -> title and description as one text, labels 0-3."""
    texts, labels = [], []
    for i, row in enumerate(csv.reader(io.StringIO(_read_text(path)[0], newline="")), 1):
        if row and (len(row) != 3 or row[0] not in ("1", "2", "3", "4")):
            raise UserError(f"{path}, row {i}: expected class 1-4, title, description; "
                            f"got {str(row)[:60]}")
        if row:
            texts.append(f"{row[1]} {row[2]}")
            labels.append(int(row[0]) - 1)
    return texts, labels


def _read_sst2(path):
    """Lines "sentence<TAB>0 or 1", with or without a header -> texts, labels."""
    texts, labels = [], []
    for i, line in _lines(path)[0]:
        text, _, label = line.rpartition("\t")
        if i == 1 and label == "label":
            continue
        if label not in ("0", "1") or not text:
            raise UserError(f"{path}, line {i}: expected 'sentence<TAB>0 or 1', got {line[:60]!r}")
        texts.append(text)
        labels.append(int(label))
    return texts, labels


DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t"}
# What columns are usually called
LABEL_NAMES = ["label", "labels", "class", "category", "target", "sentiment", "topic", "intent",
               "tag", "y"]
TEXT_NAMES = ["text", "texts", "sentence", "question", "review", "content", "message", "tweet",
              "comment", "document", "body", "utterance", "query", "headline", "x"]


def _csv_set(name, seed, encoding=None, label_column=None, text_column=None, test_file=None):
    """The TextSet of a table of labels and texts: .csv, .tsv, or .jsonl with an object a line.

    label_column, text_column: a header's name or a number from 1; without them a header's usual
    names (LABEL_NAMES, TEXT_NAMES) or, in a table of two columns without header, label,text.
    test_file: a table like it; without one a fifth of each class, at least one text, is drawn.
    Rows are counted by the lines at which they start. UserError: what could be read in two ways, a
    quote gone astray, rows of another width, without text or without label, a header that cannot be
    told from a class, a class of one row.
    """
    path = _table_path(name, "csv:")
    flags = {"--label-column": label_column, "--text-column": text_column}
    rows, columns, how = _labelled_rows(path, encoding, flags)
    _check_first_row(path, rows, columns)
    classes = sorted({label for _, label, _ in rows})
    if len(classes) < 2:
        raise UserError(f"{path} has {len(classes)} classes; expected rows label,text of at least "
                        f"2 ({how})")
    number = {c: i for i, c in enumerate(classes)}
    labels, texts = np.array([number[label] for _, label, _ in rows]), [text for *_, text in rows]
    said = f"{len(rows)} rows of {printable(path.name)} ({how}), {_class_counts(classes, labels)}"
    notes, lost = _label_notes(classes), sum("\ufffd" in text for text in texts)
    notes += [f"texts with U+FFFD, a character that was lost before: {lost}"] * bool(lost)
    if test_file is None:
        once = [f"{label[:30]!r} (row {i})" for (i, label, _), n in zip(
            rows, np.bincount(labels)[labels], strict=True) if n == 1]
        if once:
            raise UserError(f"{path}: classes of one row ({len(once)}): {_first(once)}; at least 2 "
                            "rows are needed, one of them for the test, or a --test-file")
        rng = numpy_generator(seed, "csv test")
        test = np.sort(np.concatenate([
            rng.permutation(np.flatnonzero(labels == c))[:max(1, (labels == c).sum() // 5)]
            for c in range(len(classes))]))
        train = np.setdiff1d(np.arange(len(rows)), test)
        parts = [([texts[i] for i in part], labels[part]) for part in (train, test)]
        said += f", test: a drawn fifth, {len(test)}"
    else:
        path = _table_path(test_file, "--test-file ")
        rows, _, how = _labelled_rows(path, encoding, flags, columns)
        odd = [f"{label[:30]!r} (row {i})" for i, label, _ in rows if label not in number]
        if odd:
            raise UserError(f"{path}: labels that the training file lacks: {_first(odd)}")
        test = [number[label] for _, label, _ in rows]
        parts = (texts, labels), ([text for *_, text in rows], test)
        said += f", test: {len(rows)} rows of {printable(path.name)} ({how})"
        none = [name[:30] for name, c in number.items() if c not in set(test)]
        notes += [f"no test text of {_first(none)}"] * bool(none)
    return _text_set(path.stem, classes, *parts, "; ".join([said, *notes]))


def _table_path(name, flag):
    """The file that a user named; UserError with what lies beside it."""
    path = user_path(name)
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    beside = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    if path.is_dir():
        near = [n for n in sorted(beside) if Path(n).suffix in (".csv", ".tsv", ".jsonl")]
    else:
        near = [n for n in beside if n.lower() == path.name.lower()] or \
            difflib.get_close_matches(path.name, beside)
    raise UserError(f"{flag}{name}: " + ("this is a folder; name a file" if path.is_dir() else
                                         "there is no such file")
                    + (f"; did you mean {folder / near[0]}?" if near else
                       "; expected a table of labels and texts"))


def _labelled_rows(path, encoding, flags, like=None):
    """A table -> [(row, label, text)], its (label, text) columns and first row, how it was read.

    flags: --label-column and --text-column, as given or None; like: the columns of a table that
    this one is to follow where it has no names of its own.
    """
    rows, said = _read_table(path, encoding)
    head = [f.strip() for f in rows[0][1]]
    (label, text), header = _find_columns(path, rows, flags, like)
    inside = [(i, row) for i, row in rows[header:]
              if not (header and [f.strip() for f in row] == head)]
    copies = len(rows) - header - len(inside)
    said += f", header {_shown(head)}" if header else ", no header"
    if len(head) > 2 or label > text:
        names = head if header else [f"column {j + 1}" for j in range(len(head))]
        said += f", label = {names[label]}, text = {names[text]}"
    said += f", copies of the header left out: {copies}" * bool(copies)
    found = [(i, row[label].strip(), row[text]) for i, row in inside]
    if not found:
        raise UserError(f"{path} holds a header and no rows")
    bare = [i for i, b, c in found if not b or not c.strip()]
    if bare:
        raise UserError(f"{path}: rows without a text or a label ({len(bare)}): {_first(bare)}; "
                        "fill them in or take them out")
    wide = [i for i, b, _ in found if re.search("[\r\n]", b)]
    if wide:
        raise UserError(f"{path}, row {wide[0]}: its label has several lines; has a quote gone "
                        "astray?")
    spaced = len({row[label] for _, row in inside}) - len({b for _, b, _ in found})
    said += ", labels with and without spaces around them taken together" * (spaced > 0)
    return found, ((label, text), head, header), said


def _check_first_row(path, rows, columns):
    """UserError if the columns seem to be the wrong way round, or row 1 seems to be a header."""
    (label, text), head, header = columns
    labels = Counter(b for _, b, _ in rows)
    others = len({c.strip() for *_, c in rows})
    if not header and len(labels) > len(rows) / 2 > others:
        raise UserError(f"{path}: column {label + 1}, read as labels, has {len(labels)} values in "
                        f"{len(rows)} rows, column {text + 1} has {others}; if those are labels, "
                        f"add --label-column {text + 1} --text-column {label + 1}")
    if not header and head == [f"{j}" for j in range(len(head))] and not any(
            c.strip().isdecimal() for *_, c in rows[1:]):
        raise UserError(f"{path}: row 1, {','.join(head)!r}, looks like the header of a table "
                        "without names of columns; take that line out")
    if not header and labels[rows[0][1]] == 1 < len(rows):
        raise UserError(f"{path}: row 1, {','.join(head)[:60]!r}, looks like a header: its label "
                        "occurs nowhere else. If it is one, name the columns by it: --label-column "
                        f"{head[label][:30]!r} --text-column {head[text][:30]!r}; if not, give its "
                        "class a second row")


def _first(numbers):
    """The first ten of some row numbers, as text."""
    return ", ".join(map(str, list(numbers)[:10])) + ", ..." * (len(numbers) > 10)


def _label_notes(classes):
    """Which classes may be meant as one: they are kept apart, and it is said."""
    def loose(label):
        try:
            return float(label)
        except ValueError:
            return " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    alike = {}
    for c in classes:
        alike.setdefault(loose(c), []).append(repr(c[:30]))
    alike = [" and ".join(group) for group in alike.values() if len(group) > 1]
    return [f"labels that differ in form only are kept apart: {'; '.join(alike[:3])}"
            + f" and {len(alike) - 3} more" * (len(alike) > 3)] * bool(alike)


def _find_columns(path, rows, flags, like):
    """-> (label, text), numbers of columns from 0, and whether row 1 is a header."""
    head, width = [f.strip() for f in rows[0][1]], len(rows[0][1])
    used = [j for j in range(width) if any(row[j].strip() for _, row in rows)]
    numbered = {f"{j + 1}": j for j in range(width)}
    # Row 1 is a header if a flag names a column by it, or if it holds a usual name and nothing that
    # stands in its column again, as classes do
    header = rows[0][0] == 0 or (like is not None and like[2] and head == like[1]) or \
        any(name is not None and name not in numbered for name in flags.values())
    new = header or not any(head[j] and head[j] == row[j].strip() for _, row in rows[1:]
                            if row != rows[0][1] for j in used)
    found = []
    for (flag, name), usual in zip(flags.items(), (LABEL_NAMES, TEXT_NAMES), strict=True):
        signs = [j for j in used if head[j].lower() in usual] if new else []
        header = header or bool(signs)
        if name is None:
            found.append(signs)
        elif name in numbered:
            found.append([numbered[name]])
        else:
            same = [j for j in used if head[j] == name]
            found.append(same or [j for j in used if head[j].lower() == name.lower()])
            if not found[-1]:
                raise UserError(f"{flag} {name}: row 1 of {path} is {_shown(head)}; name one of "
                                f"these, or a number from 1 to {width}")
    label, text = found
    if not label and not text and like is not None:
        return like[0], header
    if not label and not text and len(used) == 2 and not header:
        return used, False
    for mine, others in ((label, text), (text, label)):
        if not mine and len(others) == 1 and len(used) == 2:
            mine += [j for j in used if j not in others]
    if len(label) != 1 or len(text) != 1 or label == text:
        raise UserError(f"{path} has {len(used)} columns, row 1 is {_shown(head)}: name the two to "
                        "read by --label-column and --text-column (a header's name, or a number "
                        "from 1)")
    return [*label, *text], header


def _shown(fields):
    return ",".join(f[:20] for f in fields[:12]) + ",..." * (len(fields) > 12)


def _read_table(path, encoding):
    """The rows of a table that are not empty -> [(line at which it starts, fields)], how it was
    read. Keys of JSON objects become a header at line 0."""
    text, how = _read_text(path, encoding)
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        return _json_rows(path, text), f"JSON lines, {how}"
    names, told = list(DELIMITERS), re.match("sep=([,;\t])(?=[\r\n])", text)
    if told:  # a spreadsheet's own first line
        names, text = [n for n in names if DELIMITERS[n] == told[1]], text[told.end():]
    elif ending in (".tsv", ".tab"):
        names = ["tab"]
    found, trouble = {}, {}
    for name in names:
        # As spreadsheets write it. Where spaces stand before quotes, these are tried as quotes
        # first; between tabs, which need none, quotes may be signs like others
        sign, ways = DELIMITERS[name], [({}, "")]
        if sign + ' "' in text:
            ways.insert(0, ({"skipinitialspace": True}, ""))
        if name == "tab":
            ways.append(({"quoting": csv.QUOTE_NONE}, ", quotes are part of texts"))
        for more, words in ways:
            rows, odd = _split_rows(text, sign, more)
            if not odd:
                found[name] = rows, f"{name}{words}, {how}"
                break
            trouble.setdefault(name, odd)
    # More than one sign that splits all rows alike: texts hardly hold a tab in each row; else the
    # one that leaves labels, which occur again
    labelled = [name for name, (rows, _) in found.items() if name == "tab" or any(
        len(set(column)) < len(rows) for column in zip(*(row for _, row in rows), strict=True))]
    if len(found) > 1 and labelled:
        found = {n: found[n] for n in (labelled[-1:] if "tab" in labelled else labelled)}
    if len(found) > 1:
        raise UserError(f"{path} can be split at every {' and at every '.join(found)}; quote the "
                        "texts, or use tabs and call it .tsv")
    if not found:
        lines = text.splitlines()
        likely = max(trouble, key=lambda name: sum(DELIMITERS[name] in line for line in lines))
        raise UserError(f"{path}: {trouble[likely]}")
    return next(iter(found.values()))


def _split_rows(text, sign, quotes):
    """-> rows as _read_table, and why that cannot be meant, or None."""
    csv.field_size_limit(2 ** 31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True, **quotes)
    rows, line = [], 1
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        return rows, (f"row {line}: a quote that opens here has gone astray ({error}, line "
                      f"{reader.line_num}); quotes inside a quoted text are doubled")
    if not rows:
        return rows, "it is empty; expected rows label,text"
    width = Counter(len(fields) for _, fields in rows).most_common(1)[0][0]
    odd = [f"row {i} has {len(fields)}" for i, fields in rows if len(fields) != width]
    if width < 2:
        return rows, (f"expected rows label,text (comma, semicolon or tab), found "
                      f"{rows[0][1][0][:40]!r}")
    if odd:
        return rows, (f"{len(odd)} of {len(rows)} rows do not have {width} fields: {_first(odd)}; "
                      f"a text that holds {sign!r} must stand in quotes")
    # A quote that is no quote swallows lines up to the next. What it then holds looks like rows: it
    # splits into as many fields, one of which other rows have too
    common = [{f for f, n in Counter(fields[j] for _, fields in rows).items() if f and n > 1}
              for j in range(width)]
    for i, fields in rows:
        for field in fields:
            inside = [x for x in re.split("\r\n|\r|\n", field)[1:] if x.strip()]
            alike = [x for x in inside for part in csv.reader([x], delimiter=sign)
                     if len(part) == width and any(map(set.__contains__, common, part))]
            if inside and 2 * len(alike) >= len(inside):
                return rows, (f"row {i}: a quote has gone astray, the text goes on with "
                              f"{len(inside)} lines that look like rows, such as {alike[0][:40]!r}")
    return rows, None


def _json_rows(path, text):
    """One JSON object a line -> rows as _read_table; what is no text or number counts as none."""
    found = []
    for i, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
            json.dumps(row, ensure_ascii=False).encode()  # fails on half of a surrogate pair
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {i}: expected a JSON object with a label and a text")
        found += [(i, row)] * bool(row)
    keys = list(dict.fromkeys(k for _, row in found for k in row))
    if not found or len(keys) < 2:
        raise UserError(f"{path}: expected JSON objects with a label and a text, one a line")

    def plain(value):
        known = isinstance(value, (str, int, float)) and value == value  # NaN is no value
        return str(value) if known else ""
    return [(0, keys), *((i, [plain(row.get(k)) for k in keys]) for i, row in found)]


# Small world "topics": sentences of three words on a topic, three of a domain and some of neither.
TOPIC_WORDS = [line.split() for line in (
    "storm rain thunder cloud wind snow", "guitar drum violin flute song choir",
    "doctor nurse fever pill cough clinic", "lion tiger wolf bear fox deer",
    "circle square triangle cube sphere cone")]
DOMAIN_WORDS = [line.split() for line in (
    "kitchen oven spoon bread salt butter plate recipe chef kettle flour stew",
    "harbour ship anchor sailor rope tide deck mast captain cargo pier buoy",
    "market stall coin seller price basket crowd bargain queue customer street goods")]
COMMON_WORDS = ["the", "a", "one", "near", "with", "and", "then", "again", "there", "slowly", "old",
                "new", "small", "large", "very", "under", "over", "before", "after", "every"]
TOPICS_WIDTH = 14  # [CLS], at most 12 words, end of text


def topic_sentences(domain, topic, count, rng):
    """`count` sentences about one of 5 topics in the words of one of 3 domains; 8 to 12 words."""
    sentences = []
    for _ in range(count):
        words = [*rng.choice(TOPIC_WORDS[topic], 3, replace=False),
                 *rng.choice(DOMAIN_WORDS[domain], 3, replace=False),
                 *rng.choice(COMMON_WORDS, rng.integers(2, 7))]
        sentences.append(" ".join(rng.permutation(words)))
    return sentences


def topics(seed, same=False, per_class=160, n_test=40, n_probes=96):
    """3 domains x 5 classes whose meaning depends on the domain: class = (topic + domain) mod 5.

    So the same topic word speaks for different classes in different domains, and clients of
    different domains teach a shared model contradictory things. same: class = topic everywhere.
    per_class, n_test: sentences of each (domain, class) -> TextSet with domains as groups.
    """
    rng, parts = numpy_generator(seed, "topics"), []
    for count in (per_class, n_test):
        cells = [(d, t) for d in range(3) for t in range(5)]
        texts = [s for d, t in cells for s in topic_sentences(d, t, count, rng)]
        labels = np.repeat([t if same else (t + d) % 5 for d, t in cells], count)
        parts.append((texts, labels.astype(np.int64), np.repeat([d for d, _ in cells], count)))
    probes = [topic_sentences(i % 3, i // 3 % 5, 1, rng)[0] for i in range(n_probes)]
    (train, labels, groups), (test, test_labels, test_groups) = parts
    names = [f"class {c}" for c in range(5)]
    said = (f"topics{'-same' * same}, drawn: {_class_counts(names, labels)} in 3 domains, test: "
            f"{len(test)}")
    return TextSet("topics", names, train, labels, test, test_labels, groups, test_groups, probes,
                   said)


@dataclass
class TinyBertConfig:
    """Size and pre-training of the tiny BERT and the tiny decoder (20 s on one CPU core)."""
    width: int = 64
    layers: int = 4
    heads: int = 4
    sentences: int = 6000
    steps: int = 400
    batch: int = 64
    lr: float = 2e-3
    init: float = .1  # BERT's .02 is for widths near 1000: at 64, some seeds hardly learn


def tiny_bert(seed, cache_dir, config=None, progress=lambda items, *_, **__: items):
    """A small transformers.BertModel that has read sentences of the topics world -> model, encode.

    No label and no sentence of the federation is used. Cached by what made it. encode: as
    `text_encoder` returns it.
    """
    from transformers import BertConfig, BertModel  # slow to import; image runs do without

    def build(size, config):
        return BertModel(BertConfig(
            **size, max_position_embeddings=TOPICS_WIDTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=config.init),
            add_pooling_layer=False)
    return _tiny_text_model("tiny-bert", build, seed, cache_dir, config, progress)


def tiny_decoder(seed, cache_dir, config=None, progress=lambda items, *_, **__: items):
    """The same for a small transformers.LlamaModel, which has learned to predict the next word."""
    from transformers import LlamaConfig, LlamaModel

    def build(size, config):
        return LlamaModel(LlamaConfig(**size, max_position_embeddings=TOPICS_WIDTH, pad_token_id=0,
                                      use_cache=False, initializer_range=config.init))
    return _tiny_text_model("tiny-decoder", build, seed, cache_dir, config, progress)


def _tiny_text_model(name, build, seed, cache_dir, config, progress):
    config = config or TinyBertConfig()
    tokenizer = WordTokenizer(
        [" ".join(w) for w in (*TOPIC_WORDS, *DOMAIN_WORDS, COMMON_WORDS)], TOPICS_WIDTH)
    seed_torch(seed, name, "init")
    model = build({"vocab_size": tokenizer.vocab_size, "hidden_size": config.width,
                   "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
                   "intermediate_size": 4 * config.width}, config)
    key = cache_key(config, seed, tokenizer.ids, inspect.getsource(_pretrain_text_model),
                    inspect.getsource(topic_sentences))

    def encode(texts):
        ids = tokenizer(texts)
        return ids, (ids > 0).long()

    def make():
        rng = numpy_generator(seed, name, "sentences")
        each = config.sentences // 15
        texts = [s for d in range(3) for t in range(5) for s in topic_sentences(d, t, each, rng)]
        _pretrain_text_model(name, model, *encode(texts), config, seed, progress)
        return model.state_dict()

    model.load_state_dict(cached(Path(cache_dir) / f"{name}-{key}.pt", make,
                                 f"a cached {name} model"))
    encode.said = lambda: _encoder_said(model, "made here")
    return model.eval(), encode


def _pretrain_text_model(name, model, ids, mask, config, seed, progress):
    """A tiny BERT: masked words (a quarter of each sentence), and [CLS] names the words of the
    sentence. A tiny decoder: the next word, and after the end of text another sentence on the same,
    that is any of its words.

    Without the second task nothing is asked of the state that is read, and what it holds is an
    accident of the seed. ids, mask: (N, T). All answers are products with the word embeddings.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    generator = torch.Generator().manual_seed(seed_for(seed, name, "batches"))
    start, end = int(ids[0, 0]), int(ids.max())
    words = F.one_hot(ids, end + 1).sum(1).clamp(max=1).float()  # (N, vocabulary)
    words[:, [0, start, end]] = 0
    model.train()
    for _ in progress(range(config.steps), f"pre-training a {name} model"):
        here = torch.randint(len(ids), (config.batch,), generator=generator)
        x, m = ids[here], mask[here]
        if name == "tiny-bert":
            hidden = (torch.rand(x.shape, generator=generator) < .25) & (m > 0) & (x < start)
            states = model(x.masked_fill(hidden, 1), m).last_hidden_state  # 1: the unknown word
            asked, wanted, read = states[hidden], x[hidden], states[:, 0]
        else:
            states = model(x, m).last_hidden_state
            asked, wanted = states[:, :-1][m[:, 1:] > 0], x[:, 1:][m[:, 1:] > 0]
            read = states[torch.arange(len(x)), m.sum(1) - 1]
        table = model.get_input_embeddings().weight
        guessed = F.cross_entropy(asked @ table.T, wanted)
        said = (read @ table.T).log_softmax(-1)  # (B, vocabulary)
        named = -((said * words[here]).sum(-1) / words[here].sum(-1)).mean()
        optimizer.zero_grad(set_to_none=True)
        (guessed + named).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def load_encoder(model, max_length, dropout, data_dir, seed=0,
                 progress=lambda items, *_, **__: items, dtype=torch.float32, texts=()):
    """The language model named by --model and its tokenizer, as text_encoder; "tiny" and
    "tiny-decoder" are made here."""
    made_here = {"tiny": tiny_bert, "tiny-decoder": tiny_decoder}.get(model)
    if not made_here:
        return text_encoder(model, max_length, dropout, Path(data_dir) / "weights", dtype, texts)
    encoder, encode = made_here(seed, Path(data_dir) / "cache", progress=progress)
    for p in encoder.parameters():
        p.data = p.data.to(dtype)
    _check_split(model, encoder, encode, texts)
    return encoder, encode


# Dropout goes by other names in other configurations: BERT's kin, DistilBERT and Llama, GPT-2
DROPOUTS = ["hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
            "embd_pdrop", "attn_pdrop", "resid_pdrop"]
EXPECTED_MODEL = ("Expected: a hub id, or a directory with config.json, model.safetensors and "
                  "tokenizer files")


def text_encoder(model, max_length, dropout, cache_dir, dtype=torch.float32, texts=()):
    """A language model and its tokenizer by directory or hub id -> model, encode.

    encode(list of N texts) -> ids and mask, both (N, T) int64, padded on the right, T <= max_length
    and what the model's positions hold. encode.said(): a line on the model and on all texts read
    so far; UserError where more than half of their words are unknown.
    texts: some of what it is for; the first batch that its cut is tried on.
    UserError: neither a directory nor a reachable hub id; an architecture that elsa.SplitEncoder
    does not know, or that it would compute otherwise; weights that are missing or of another shape;
    a tokenizer that does not fit.
    """
    from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with hub_if_reachable(model) as why:
        config, options = text_config(model, cache_dir, why)
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, dropout)
        kind = type(meta_model(model, config)).__name__
        try:
            # Who says so means tokenizer.json as it is. The library's choice goes by the model: a
            # Qwen2 gets the rules of Qwen2's own words, whatever the file says
            plain = str(get_tokenizer_config(model, **options).get("tokenizer_class")) in (
                "TokenizersBackend", "PreTrainedTokenizerFast")
            tokenizer = (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(
                model, **options)
            encoder, found = AutoModel.from_pretrained(
                model, config=config, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True, **options)
        except Exception as error:  # network, file, safetensors, tokenizer and key errors
            raise UserError(f"cannot load --model {model}, a {kind} ({_load_error(why, error)}). "
                            f"{EXPECTED_MODEL}") from None
    missing = sorted(n for n in found["missing_keys"] if not n.startswith("pooler."))
    if missing or found["mismatched_keys"]:
        other = sorted(n for n, *_ in found["mismatched_keys"])
        there = sorted(found["unexpected_keys"])
        raise UserError(
            f"--model {model}: " + (f"{missing[0]} is missing" if missing else
                                    f"{other[0]} has another shape than config.json says")
            + f", and so {len(missing) + len(other)} of the {len(encoder.state_dict())} weights of "
            f"a {kind} would be random"
            + (f"; what the file has instead begins with {there[0]}" if there else ""))
    check_weights(encoder, f"--model {model}", model if Path(model).is_dir() else None)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # only the state of one token is read
    left = len(found["unexpected_keys"])  # of a head, as a rule
    encode = _text_reader(model, encoder.eval(), tokenizer, max_length,
                          [f"{left} other weights of the file left out"] if left else [])
    _check_split(model, encoder, encode, texts)
    encode.seen.clear()
    return encoder, encode


def text_config(model, cache_dir, why=""):
    """The configuration of a directory, config.json or hub id -> it, options of from_pretrained.

    why: what hub_if_reachable yields.
    """
    from transformers import AutoConfig, logging

    check_model_named(model)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"cache_dir": str(cache_dir), "trust_remote_code": False}
    try:
        return AutoConfig.from_pretrained(str(model), **options), options
    except Exception as error:  # hub, file, JSON and key errors
        there = "" if Path(model).exists() else "there is no such directory; "
        raise UserError(f"cannot load --model {model}: {there}{_load_error(why, error)}. "
                        f"{EXPECTED_MODEL}") from None


def meta_model(model, config):
    """The architecture of a configuration without weights; UserError if ELSA cannot cut it."""
    from transformers import AutoModel

    from elsa import SplitEncoder  # the method's own table decides, not a copy of it here

    try:
        with torch.device("meta"):
            encoder = AutoModel.from_config(config)
        SplitEncoder.find_layout(encoder)
    except Exception as error:  # no such row; or a configuration that no model can have
        raise UserError(f"--model {model} {' '.join(str(error).split())[:400]}") from None
    return encoder


def _text_reader(model, encoder, tokenizer, max_length, changes):
    """encode, encode.said and encode.seen (what was counted) of text_encoder.

    changes: what was done to the model, for encode.said.
    """
    from elsa import SplitEncoder

    causal = SplitEncoder.find_layout(encoder)["causal"]
    limit, rows = _most_tokens(encoder, max_length), len(encoder.get_input_embeddings().weight)
    if tokenizer.padding_side != "right":
        tokenizer.padding_side = "right"  # or [CLS] would not come first
        changes = [*changes, "padding moved to the right"]
    if tokenizer.pad_token is None:  # any will do: padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or \
            tokenizer.convert_ids_to_tokens(0)
        changes = [*changes, f"{tokenizer.pad_token} pads"]
    if causal and encoder.config.pad_token_id is None:
        encoder.config.pad_token_id = tokenizer.pad_token_id
    first = {tokenizer.cls_token_id, tokenizer.bos_token_id} - {None}
    special = tokenizer.num_special_tokens_to_add()
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in {*first, tokenizer.eos_token_id, tokenizer.sep_token_id}:
        unknown = -1  # GPT-2 has one token for all these, and knows all words
    seen = Counter()

    def encode(texts):
        out = tokenizer(list(texts), padding=True, truncation=True, max_length=limit,
                        return_attention_mask=True, return_tensors="pt")
        ids, mask = out["input_ids"], out["attention_mask"]
        if not ids.numel():
            raise UserError(f"--model {model}: its tokenizer makes no tokens of any text; are its "
                            "files there?")
        if ids.max() >= rows:
            raise UserError(f"--model {model}: its tokenizer has a token {ids.max()}, its "
                            f"embeddings end at {rows - 1}: they do not belong together")
        if not causal and not set(ids[:, 0].tolist()) <= first:
            raise UserError(f"--model {model}: its tokenizer puts no [CLS] before a text, and that "
                            "is the token whose state is read; its tokenizer.json needs a "
                            "post_processor that adds it")
        length = mask.sum(1)
        full = [texts[i] for i in (length == limit).nonzero()[:, 0]]  # and perhaps cut
        longer = tokenizer(full, truncation=True, max_length=limit + 1)["input_ids"] if full else []
        empty = int((length <= special).sum())
        mask[:, 0] = 1  # a text without any token is read from its padding
        seen.update(texts=len(ids), cut=sum(len(t) > limit for t in longer),
                    words=int(length.sum()) - special * len(ids) + empty,
                    unknown=int(((ids == unknown) & (mask > 0)).sum()) + empty)
        return ids, mask

    def said():
        share = 100 * seen["unknown"] / max(seen["words"], 1)
        if share > 50:
            raise UserError(f"--model {model}: its tokenizer does not know {share:.0f}% of the "
                            f"words ({tokenizer.unk_token}); are its files there, and is it of "
                            "the language of the texts?")
        return _encoder_said(
            encoder, f"of {model}", "0 weights missing", *changes,
            f"{share:.2g}% unknown tokens" if seen["unknown"] else "",
            f"{seen['cut']} of {seen['texts']} texts cut at {limit} tokens" if seen["cut"] else "")

    encode.said, encode.seen = said, seen
    return encode


def _most_tokens(encoder, max_length):
    """How many tokens of a text are taken: max_length, or as many as there are positions."""
    limit = min(max_length, getattr(encoder.config, "max_position_embeddings", max_length))
    for name, part in encoder.named_modules():  # RoBERTa's kin count from the padding's id on
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            limit = min(limit, len(part.weight) - part.padding_idx - 1)
    return limit


def _encoder_said(encoder, *more):
    """What is said of a language model that has passed _check_split."""
    config = encoder.config
    half = "" if encoder.dtype == torch.float32 else f"{encoder.dtype}"[6:]
    return ", ".join(filter(None, [
        f"{type(encoder).__name__} {more[0]}", f"{config.num_hidden_layers} blocks",
        f"width {config.hidden_size}", half, *more[1:]])) + "; split = unsplit on one batch"


def _check_split(model, encoder, encode, texts):
    """UserError unless elsa.py's parts, one after another, compute what the model itself does."""
    from elsa import SplitEncoder

    kind = type(encoder).__name__
    texts = sorted(texts, key=len) or ["one", "two words", "some more words than that in one text"]
    ids, mask = encode([*texts[:4], *texts[-4:]])  # the longest pads the shortest
    split = SplitEncoder(encoder, 2).eval()
    try:
        with torch.no_grad():
            own = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask > 0]
            found = split.last_states(*split.part1(ids, mask, 0), 0)[mask > 0]
    except Exception as error:  # of whatever its blocks want beside states and a mask
        raise UserError(f"--model {model} is a {kind}, and no batch passes through it in three "
                        f"parts ({type(error).__name__}: {str(error)[:120]})") from None
    gap = ((found - own).abs().max() / own.abs().max()).item()
    if not gap <= max(1e-4, 4 * torch.finfo(own.dtype).eps):  # NaN is no match either
        raise UserError(f"--model {model} is a {kind}, which does more than embeddings, blocks and "
                        f"a last norm: cut in three it computes other states (by {gap:.1g} of the "
                        "largest)")


# ------------------------------------------------------------------------------------------------
# Image sets
# ------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """A labelled image set with a balanced (or the official) test part.

    train, test: sequences of PIL images (lazily opened); train_labels, test_labels: (N,) int64
    arrays; template: a caption with {} for the class name; coarse: (C,) coarse label of each class,
    if any; long_tailed: True when the training part is long-tailed already; tail_order: the classes
    from the most to the least frequent, where a set has an order of its own (its largest class then
    gets the mean number of images a class); client_tests: see federated_clients; val: a validation
    part (Images, labels) that comes with the set; said: what was found and left out, for people.
    """
    name: str
    class_names: list
    template: str
    train: "Images"
    train_labels: np.ndarray
    test: "Images"
    test_labels: np.ndarray
    coarse: np.ndarray = None
    long_tailed: bool = False
    tail_order: list = None
    client_tests: str = "like training"
    val: tuple = None
    said: str = ""

    @property
    def num_classes(self):
        return len(self.class_names)


class Images:
    """A sequence of RGB PIL images over an (N, H, W[, 3]) uint8 array or a list of files.

    ranges: what is black and white in files of more than 8 bits, see read_image; digests: file ->
    a hash of its bytes, where open_all has read them.
    """

    def __init__(self, source, ranges=None, digests=None):
        self.source, self.ranges, self.digests = source, ranges or {}, digests or {}

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        from PIL import Image

        item = self.source[i]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item).convert("RGB")
        return read_image(item, self.ranges)

    def subset(self, indices):
        """The images at `indices`, in that order."""
        if isinstance(self.source, np.ndarray):
            return Images(self.source[indices])
        return Images([self.source[i] for i in indices], self.ranges, self.digests)

    @staticmethod
    def concat(first, second):
        """`first` followed by `second` (both of one kind)."""
        if isinstance(first.source, np.ndarray):
            return Images(np.concatenate([first.source, second.source]))
        return Images([*first.source, *second.source], first.ranges,
                      {**first.digests, **second.digests})

    def listing(self):
        """What tells these images from others: the pixels, or the files' names and bytes."""
        if isinstance(self.source, np.ndarray):
            return self.source
        root = os.path.commonpath([Path(f).parent for f in self.source])
        return [self.ranges, [(os.path.relpath(f, root), self.digests.get(f) or os.path.getsize(f))
                              for f in self.source]]

    def copies_of(self, other):
        """How many of these files are in `other` too, byte by byte."""
        there = {other.digests.get(f) for f in other.source} - {None, ""} if other.digests else ()
        return sum(self.digests.get(f) in there for f in self.source) if there else 0


PHOTO = "a photo of a {}."
# name -> (torchvision class, its folder under --data-dir, splits to train on, splits to test on,
# caption, share): splits and captions of FedPuReL's authors. share: of each class's images in the
# first list, drawn from the seed, what is trained on; the rest is the test where no other is named,
# and left out (the authors' validation) where one is.
TRAIN, TEST = [{"train": True}], [{"train": False}]
TORCHVISION_SETS = {
    "cifar100": ("CIFAR100", "cifar-100-python", TRAIN, TEST, PHOTO, 1),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", TRAIN, TEST, PHOTO, 1),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw", TRAIN, TEST, PHOTO, 1),
    "food101": ("Food101", "food-101", [{"split": "train"}, {"split": "test"}], [],
                "a type of food, a photo of {}.", .5),
    "dtd": ("DTD", "dtd/dtd", [{"split": "train"}, {"split": "val"}, {"split": "test"}], [],
            "a photo of a {} pattern.", .5),
    "aircraft": ("FGVCAircraft", "fgvc-aircraft-2013b", [{"split": "trainval"}],
                 [{"split": "test"}], "a type of aircraft, a photo of a {}.", 1),
    "pets": ("OxfordIIITPet", "oxford-iiit-pet", [{"split": "trainval"}], [{"split": "test"}],
             "a type of pet, a photo of a {}.", .8),
}
FASHION_ORDER = [8, 1, 7, 5, 9, 3, 0, 2, 4, 6]  # of the authors' long tail, most frequent first
AUGMENTED_SETS = ["food101", "dtd", "aircraft", "pets", "dogs", "imagenet", "places"]
CIFAR_STATISTICS = {  # mean and standard deviation of the authors' preprocessing
    "cifar100": ((.5071, .4865, .4409), (.2673, .2564, .2762)),
    "cifar10": ((.4914, .4822, .4465), (.2023, .1994, .2010)),
}
OWN_SETS = ["dogs", "imagenet", "places", "shapes"]
LONG_TAILED_SETS = ["imagenet", "places", "shapes"]
IMAGE_SETS = sorted([*TORCHVISION_SETS, *OWN_SETS])

# CIFAR-100's 20 coarse classes in the order of its `coarse_label_names`, as fine labels per coarse
# one (torchvision reads only the fine labels).
CIFAR100_COARSE = [
    "beaver dolphin otter seal whale", "aquarium_fish flatfish ray shark trout",
    "orchid poppy rose sunflower tulip", "bottle bowl can cup plate",
    "apple mushroom orange pear sweet_pepper", "clock keyboard lamp telephone television",
    "bed chair couch table wardrobe", "bee beetle butterfly caterpillar cockroach",
    "bear leopard lion tiger wolf", "bridge castle house road skyscraper",
    "cloud forest mountain plain sea", "camel cattle chimpanzee elephant kangaroo",
    "fox porcupine possum raccoon skunk", "crab lobster snail spider worm",
    "baby boy girl man woman", "crocodile dinosaur lizard snake turtle",
    "hamster mouse rabbit shrew squirrel", "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "bicycle bus motorcycle pickup_truck train", "lawn_mower rocket streetcar tank tractor",
]


def image_set_name(dataset):
    """What load_images calls a --dataset: "cifar100-lt" -> "cifar100"; "folder:PATH" as it is.

    UserError: a name that no set has.
    """
    if dataset.startswith("folder:"):
        return dataset
    name = dataset.removesuffix("-lt")
    if name == dataset or name not in IMAGE_SETS:
        known = ", ".join(f"{n}-lt" for n in IMAGE_SETS)
        raise UserError(f"--dataset {dataset!r} is unknown; there are {known} and folder:PATH")
    return name


def readable(name):
    """A class name as words of a caption: underscores become spaces."""
    return " ".join(str(name).replace("_", " ").split())


def load_images(name, data_dir, seed=0, progress=lambda items, *_, **__: items):
    """The ImageSet `name`, one of IMAGE_SETS or "folder:PATH"; downloads into data_dir if it can.

    seed: what `shapes` is drawn from, and how Food-101, DTD and Pets are split. All files are
    opened once (open_all). UserError: unknown name, missing, empty or damaged files, no network
    (the message says what to put where).
    """
    data_dir = Path(data_dir)
    if name.startswith("folder:"):
        return _folder_set(user_path(name.partition(":")[2]), data_dir, progress)
    images = _named_set(name, data_dir, seed)
    where = f"{DOGS_URL}images.tar" if name == "dogs" else "what its lists name"
    (images.train, images.test), notes = open_listed(
        {"train": images.train, "test": images.test}, data_dir, progress,
        f"put {where} there anew")
    images.said = (f"{name}, {images.num_classes} classes, {len(images.train)} training and "
                   f"{len(images.test)} test images{images.said}{notes}")
    return images


def _named_set(name, data_dir, seed):
    if name in TORCHVISION_SETS:
        return _torchvision_set(name, data_dir, seed)
    if name == "shapes":
        return shapes(seed)
    if name == "dogs":
        return _dogs_set(data_dir)
    if name in ("imagenet", "places"):
        return _list_file_set(name, data_dir)
    raise UserError(
        f"unknown image set {name!r}; there are {', '.join(IMAGE_SETS)} and folder:PATH")


def _torchvision_set(name, data_dir, seed):
    import torchvision

    kind, folder, train_splits, test_splits, template, share = TORCHVISION_SETS[name]
    load = getattr(torchvision.datasets, kind)

    def read(split):
        try:
            part = load(root=str(data_dir), download=True, **split)
        except Exception as error:  # network, checksum, archive and file errors
            raise UserError(
                f"{name}: cannot download or read it ({type(error).__name__}: {error}). Without a "
                f"network, put what torchvision.datasets.{kind} would download and unpack into "
                f"{data_dir / folder}") from None
        if hasattr(part, "data"):
            source, labels = np.asarray(part.data), part.targets
        else:  # torchvision keeps the file lists of these sets in attributes only
            source, labels = getattr(part, "_image_files", None) or part._images, part._labels
        return Images(source), np.asarray(labels, dtype=np.int64), part.classes

    def read_all(splits):
        (images, labels, classes), *others = [read(split) for split in splits]
        for more, more_labels, _ in others:
            images, labels = Images.concat(images, more), np.concatenate([labels, more_labels])
        return images, labels, classes

    train, labels, classes = read_all(train_splits)
    first, rest = np.arange(len(labels)), []
    if share < 1:
        sizes = np.bincount(labels, minlength=len(classes))
        first = long_tail_indices(labels, np.round(share * sizes).astype(int),
                                  numpy_generator(seed, "split", name))
        rest = np.setdiff1d(np.arange(len(labels)), first)
    if test_splits:
        test, test_labels, _ = read_all(test_splits)
    else:
        test, test_labels = train.subset(rest), labels[rest]
    train, labels = train.subset(first), labels[first]
    coarse, unused = None, f"; {len(rest)} left out, the authors' validation part"
    if name == "cifar100":
        parent = {fine: i for i, names in enumerate(CIFAR100_COARSE) for fine in names.split()}
        coarse = np.array([parent[c] for c in classes])
    order = FASHION_ORDER if name == "fashion-mnist" else None
    return ImageSet(name, [readable(c) for c in classes], template, train, labels, test,
                    test_labels, coarse, tail_order=order,
                    said=unused if test_splits and len(rest) else "")


SPLIT_WORDS = {word: part for part, words in {
    "train": "train training trn trainset trainval", "val": "val valid validation dev valset",
    "test": "test testing tst testset eval evaluation"}.items() for word in words.split()}
SYSTEM = {"@eadir", "#recycle", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini",
          "$recycle.bin", "system volume information", "lost+found", "__pycache__"}


def _visible(folder, left):
    """What a folder holds, sorted, but for hidden and system things, which are counted in left."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{printable(str(folder))} cannot be read ({error.strerror})") from None
    kept = [p for p in entries if p.name[0] != "." and p.name.lower() not in SYSTEM]
    left["hidden"] += len(entries) - len(kept)
    return kept


def _of_runs(folder, data_dir):
    """Whether a folder is what runs write: an --out-dir, or holds some; --data-dir's caches."""
    caches = [os.path.realpath(data_dir / name) for name in ("cache", "weights")]
    place = os.path.realpath(folder)
    if place in caches or (place == os.path.realpath(data_dir) and (folder / "cache").is_dir()):
        return True
    return any((p / "config.json").exists() and (p / "log.jsonl").exists()
               for p in (folder, *(q for q in folder.iterdir() if q.is_dir())))


def _folders(folder, ours=()):
    """The visible folders in a folder, without `ours`, which are written by runs."""
    entries = _visible(folder, Counter())
    lost = [printable(str(p)) for p in entries if p.is_symlink() and not p.exists()]
    if lost:
        raise UserError(f"{', '.join(lost[:10])}: a link to what does not exist")
    return [p for p in entries if p.is_dir() and os.path.realpath(p) not in ours]


def _files_below(folder, left, above=()):
    """All files below a folder; links are followed, but not back to where they lie."""
    above, files = {*above, os.path.realpath(folder)}, []
    for entry in _visible(folder, left):
        if not entry.is_dir():
            files.append(entry)
        elif os.path.realpath(entry) in above:
            left["link in a circle"] += 1
        else:
            files += _files_below(entry, left, above)
    return files


def _split_part(name):
    """"train", "val" or "test" if that is what a folder's name says: seg_train, Testing, ..."""
    words = {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    parts = {SPLIT_WORDS[w] for w in words if w in SPLIT_WORDS}
    return parts.pop() if len(parts) == 1 else None


def _find_parts(root, ours):
    """The parts of a tree -> {"train", "val", "test": folder} and folders that are none of them.

    {"all": folder} where there are class folders only.
    """
    folders, claims = _folders(root, ours), {}
    for folder in folders:
        claims.setdefault(_split_part(folder.name), []).append(folder)
    others = claims.pop(None, [])
    if len(folders) == len(others) == 1 and _folders(others[0]):
        return _find_parts(others[0], ours)
    # bus/, car/, train/ are classes, but not if train/ holds class folders, or beside test/
    plain = {p for p in folders if p.name.lower() in SPLIT_WORDS}
    deep = {p for p in folders if p not in others and _folders(p)}
    sure = "train" in claims and len(claims) > 1 and (deep or len(plain) > 1)
    if others and not sure:
        if deep:
            raise UserError(
                f"{printable(str(root))}: {min(deep).name}/ holds class folders, and "
                f"beside it is {printable(others[0].name)}/: a class, or not? Expected "
                "train/<class>/* and test/<class>/*, or <class>/* alone; move one of them away")
        return {"all": root}, []
    for part, same in claims.items():
        if len(same) > 1:
            raise UserError(
                f"{printable(str(root))}: {' and '.join(f'{printable(p.name)}/' for p in same)} "
                f"could both be the {part} part; move one of them away")
    if claims and "train" not in claims:
        raise UserError(
            f"{printable(str(root))} has {', '.join(f'{part}/' for part in claims)} but no train/; "
            "expected train/<class>/* and test/<class>/*")
    return {part: same[0] for part, same in claims.items()} or {"all": root}, others


def _inside(folder):
    """A part's folder, or the only one in it if that holds folders: seg_train/seg_train."""
    inner = _folders(folder)
    return _inside(inner[0]) if len(inner) == 1 and _folders(inner[0]) else folder


def _class_folders(part, left, ours):
    """The class folders of one part of a tree: name -> files."""
    loose = sum(p.suffix.lower() in _suffixes() and not p.is_dir() for p in _visible(part, left))
    folders = _folders(part, ours)
    classes = {p.name: _files_below(p, left) for p in folders}
    below = [{q.name for q in _visible(p, Counter()) if q.is_dir()} for p in folders]
    if len(folders) > 1 and all(below) and (
            (len(below[0]) > 1 and all(names == below[0] for names in below))
            or all(map(_split_part, set.union(*below)))):
        raise UserError(
            f"{printable(str(part))}: each class folder holds {', '.join(sorted(below[0])[:4])}/: "
            "are these classes, parts, or other pictures of the same things? Expected "
            "train/<class>/* and test/<class>/*")
    inside = sum(map(len, below))
    if inside and len(classes) > 1:
        left.inside = f", {inside} folders below them read with their class"
    if len(classes) < 2:
        beside = f" and {loose} images outside of them" if loose else ""
        raise UserError(
            f"{printable(str(part))} has {len(classes)} class folders{beside}; expected at least 2 "
            "(<class>/*.jpg): the folder of an image is its label")
    left["outside the class folders"] += loose
    return classes


def _same_classes(names, others):
    """{name: the same class's name in `others`}, alike but for Unicode's form or, if clear, case.

    None where they are not the same classes.
    """
    for form in (lambda n: unicodedata.normalize("NFC", n),
                 lambda n: unicodedata.normalize("NFC", n).casefold()):
        here, there = {form(n): n for n in names}, {form(n): n for n in others}
        if len(here) == len(names) and len(there) == len(others) and here.keys() == there.keys():
            return {here[key]: there[key] for key in here}
    return None


def class_captions(folders):
    """Class names for captions: words, without - and _, unless two classes would become one."""
    words = [readable(printable(f).replace("-", " ")) for f in folders]
    times = Counter(words)
    return [w if w and times[w] == 1 else printable(f)
            for w, f in zip(words, folders, strict=True)]


def _folder_set(path, data_dir, progress, validation=False):
    """<part>/<class>/* in parts train, test and perhaps val, or <class>/* alone.

    Of train and val alone, as in ImageNet, val is the test part. Without either the last fifth of
    each class is. validation: whether a third part is wanted.
    """
    shown = printable(str(path))
    if not path.is_dir():
        raise UserError(
            f"folder:{shown}: there is no such folder; expected {shown}/train/<class>/*.jpg "
            f"and {shown}/test/<class>/*.jpg")
    own = [p for p in _folders(path) if _of_runs(p, data_dir)]
    ours = {os.path.realpath(p) for p in own}
    parts, others = _find_parts(path, ours)
    others = [*others, *own]
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    elif "val" in parts and not validation:
        others = [*others, parts.pop("val")]
    parts = {p: _inside(parts[p]) for p in ("all", "train", "val", "test") if p in parts}
    main, *rest = parts
    left = {part: Counter() for part in parts}
    trees = {part: _class_folders(folder, left[part], ours) for part, folder in parts.items()}
    classes, images, labels = sorted(trees[main]), {}, {}
    for part in parts:
        same = _same_classes(classes, trees[part])
        if same is None:
            odd = sorted(set(classes) ^ set(trees[part])) or classes
            raise UserError(
                f"folder:{shown}: {parts[main].name}/ and {parts[part].name}/ must have the same "
                f"classes, each under one name; see {', '.join(map(printable, odd[:5]))}")
        trees[part] = [(parts[part] / same[c], trees[part][same[c]]) for c in classes]
    files = {part: [f for _, mine in tree for f in mine] for part, tree in trees.items()}
    found, ranges, notes = open_all(files, data_dir, progress, "mend them or take them away")
    for part, tree in trees.items():
        left[part].update(found[f].other for f in files[part] if found[f].other)
        held = [[f for f in mine if not found[f].other] for _, mine in tree]
        images[part] = Images([f for mine in held for f in mine], ranges,
                              {f: x.digest for f, x in found.items()})
        labels[part] = np.repeat(np.arange(len(classes), dtype=np.int64), [len(x) for x in held])
        empty = [printable(str(folder)) for (folder, _), x in zip(tree, held, strict=True) if not x]
        if empty:
            raise UserError(f"the class folder {', '.join(empty[:5])} holds no images (.jpg, .png "
                            f"and what else Pillow reads){_left_out(left[part])}")

    def where(part, before):
        inside = os.path.relpath(parts[part], path)
        return "" if inside == "." else f"{before}{printable(inside)}/"

    names = class_captions(classes)
    said = [f"{len(classes)} classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}), "
            f"{len(images[main])} training files{where(main, ' in ')}{_left_out(left[main])}"]
    said += [f"{'validation' if part == 'val' else part}:{where(part, ' ')}, {len(images[part])} "
             f"files{_left_out(left[part])}" for part in rest]
    if "test" not in parts:
        late = _last_fifths(labels[main], len(classes), shown)
        early = np.setdiff1d(np.arange(len(labels[main])), late)
        images["test"], images[main] = images[main].subset(late), images[main].subset(early)
        labels["test"], labels[main] = labels[main][late], labels[main][early]
        said.append(f"test: of these the last fifth of each class, {len(late)} files")
        if copies := images["test"].copies_of(images[main]):
            said.append(f"files of the test that are in training, too: {copies}")
    if others:
        said.append("left out: " + ", ".join(f"{printable(p.name)}/" for p in others))
    return ImageSet(
        printable(path.name), names, PHOTO, images[main], labels[main],
        images["test"], labels["test"], said="; ".join(said) + notes,
        val=(images["val"], labels["val"]) if "val" in parts else None)


def _last_fifths(labels, classes, shown):
    """The numbers of the last fifth of each class, at least one; UserError where one is all."""
    late = np.concatenate([np.flatnonzero(labels == c)[max(1, int(.8 * (labels == c).sum())):]
                           for c in range(classes)])
    if len(np.unique(labels[late])) < classes:
        raise UserError(f"folder:{shown} has no test/ and too few images in some class to hold out "
                        "a fifth of each; add test/<class>/* or at least 2 images per class")
    return late


def _left_out(counter):
    """" (28 left out: 20 .heic that Pillow cannot read, 8 hidden)"; nothing where there are none"""
    more = getattr(counter, "inside", "")
    found = [f"{n} {what}" for what, n in counter.most_common() if n]
    return more + (f" ({counter.total()} left out: {', '.join(found)})" if found else "")


LIST_FILE_HELP = {
    "imagenet": ("imagenet-lt",
                 "ImageNet_LT_train.txt and ImageNet_LT_test.txt (Liu et al., CVPR 2019) and "
                 "the ILSVRC-2012 folders train/<wnid>/ and val/ that their lines name"),
    "places": ("places-lt",
               "Places_LT_train.txt and Places_LT_test.txt (Liu et al., CVPR 2019) and the "
               "Places-365 (256 pixels) folders that their lines name"),
}


def _list_file_set(name, data_dir):
    """ImageNet-LT and Places-LT: lines "path label", paths relative to data_dir/<name>-lt."""
    folder, wanted = LIST_FILE_HELP[name]
    root = data_dir / folder
    prefix = {"imagenet": "ImageNet", "places": "Places"}[name]
    paths = [root / f"{prefix}_LT_{split}.txt" for split in ("train", "test")]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing; put into {root}: {wanted}")
    train, labels = read_list_file(paths[0], root, {"imagenet": 1000, "places": 365}[name])
    if name == "imagenet":
        import open_clip
        names = list(open_clip.IMAGENET_CLASSNAMES)
    else:  # a Places path names its class: data_256/a/airfield/00000001.jpg
        first = {int(c): train[i] for i, c in reversed(list(enumerate(labels)))}
        folders = {c: " ".join(path.parts[len(root.parts) + 2:-1]) for c, path in first.items()}
        names = [readable(folders.get(c, f"class {c}")) for c in range(int(labels.max()) + 1)]
    test, test_labels = read_list_file(paths[1], root, len(names))
    tests = {"imagenet": "balanced", "places": "own draw"}[name]  # as FedPuReL's authors
    return ImageSet(name, names, PHOTO, Images(train), labels, Images(test), test_labels,
                    long_tailed=True, client_tests=tests)


def read_list_file(path, root, classes):
    """Lines "path label" -> (files under root, (N,) int64 labels in 0..classes-1).

    Between the two are blanks or tabs; the path may hold some itself. UserError names the line.
    """
    raw, files, labels = Path(path).read_bytes(), [], []
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")  # as Windows' shell writes text
    text = raw.decode("utf-16", "replace") if wide else raw.decode("utf-8-sig", "surrogateescape")
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, label = [*line.strip().rsplit(None, 1), ""][:2]
        if not re.fullmatch(r"-?[0-9]+", label):
            raise UserError(
                f"{path}, line {i}: expected 'path label', got {printable(line)[:60]!r}")
        if not 0 <= int(label) < classes:
            raise UserError(
                f"{path}, line {i}: label {label}; the {classes} classes are 0 to {classes - 1}")
        files.append(_listed_file(root, name))
        labels.append(int(label))
    if not files:
        raise UserError(f"{path} is empty; expected lines 'path label'")
    return files, np.array(labels, dtype=np.int64)


def _listed_file(root, name):
    """A path from a list, which Windows may have written."""
    return root / (name if "\\" not in name or (root / name).exists() else name.replace("\\", "/"))


DOGS_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"


def _dogs_set(data_dir):
    """Stanford Dogs from its own site: images.tar, lists.tar (120 classes, 12,000 + 8,580)."""
    from scipy.io import loadmat  # the lists are MATLAB files; only this set needs the reader

    root = data_dir / "stanford-dogs"
    for archive, content in (("lists.tar", "train_list.mat"), ("images.tar", "Images")):
        if not (root / content).exists():
            fetch_tar(DOGS_URL + archive, root)
    parts = []
    for split in ("train", "test"):
        path = root / f"{split}_list.mat"
        try:
            lists = loadmat(path)
            files = [root / "Images" / str(row[0][0]) for row in lists["file_list"]]
            parts.append((files, lists["labels"].ravel().astype(np.int64) - 1))
        except Exception as error:  # scipy raises many types for a damaged file
            raise UserError(f"{path} is missing or not the list of {DOGS_URL}lists.tar "
                            f"({type(error).__name__}: {error})") from None
    (train, labels), (test, test_labels) = parts
    first = {int(c): f for f, c in zip(train, labels, strict=True)}
    names = [readable(first[c].parent.name.partition("-")[2]) for c in sorted(first)]
    return ImageSet("dogs", names, "a photo of a {}, a type of dog.", Images(train), labels,
                    Images(test), test_labels)


def fetch_tar(url, root):
    """Download a tar under a temporary name and unpack it below `root` (no path may leave it)."""
    archive = root / url.rpartition("/")[2]
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            torch.hub.download_url_to_file(url, str(archive))
        with tempfile.TemporaryDirectory(dir=root) as fresh:  # half an archive must not look whole
            with tarfile.open(archive) as tar:
                tar.extractall(fresh, filter="data")
            for entry in Path(fresh).iterdir():
                entry.replace(root / entry.name)
    except tarfile.TarError as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and try again") from None
    except OSError as error:  # includes URLError
        raise UserError(f"cannot download {url} ({error}); without a network, put {archive.name} "
                        f"into {root}") from None


# ------------------------------------------------------------------------------------------------
# Reading images
# ------------------------------------------------------------------------------------------------

# What Pillow warns of (odd metadata, very many pixels) changes nothing in what is read
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").addHandler(logging.NullHandler())

PICTURES = {  # the formats of Pillow that hold pictures, and can be read without other programs
    "AVIF", "BMP", "DDS", "DIB", "FITS", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX",
    "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"}
UNREADABLE = {  # pictures that Pillow cannot read, or of which it sees a thumbnail only
    ".ai", ".arw", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".heic", ".heif", ".jxl", ".nef",
    ".nii", ".orf", ".pdf", ".psb", ".raf", ".rw2", ".svg", ".xcf"}
CANNOT = " that Pillow cannot read"


def read_image(path, ranges=None):
    """A picture file as a viewer shows it -> RGB PIL image: upright, on white, the first frame.

    ranges: {"whole": (black, white), "float": (black, white)} of pixels with more than 8 bits, as
    open_all finds them for a whole set; else the file's own, see grey_range. UserError: unreadable.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # "white is zero"
            with contextlib.suppress(Exception):  # the orientation, where the EXIF is damaged
                image = ImageOps.exif_transpose(image)
            kind = _kind(image.mode)
            if kind != "8 bits":
                values = np.asarray(image).astype(np.float64)
                black, white = (ranges or {}).get(kind) or grey_range(kind, *_extremes(values))
                values = np.nan_to_num(values, nan=black)
                values = np.rint((values.clip(black, white) - black) * (255 / (white - black)))
                return Image.fromarray((255 - values if inverted else values).astype(np.uint8)
                                       ).convert("RGB")
            if image.has_transparency_data:
                if image.mode == "La":  # which has no way to RGBA but this
                    image = image.convert("LA")
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # PIL: OSError, ValueError, SyntaxError, DecompressionBombError
        raise UserError(
            f"{printable(str(path))} is not a readable image ({_picture_error(error)})") from None


def _kind(mode):
    return "float" if mode == "F" else "whole" if mode.startswith("I") else "8 bits"


def _extremes(values):
    """The least and the largest finite number of an array, (0, 0) without any."""
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def grey_range(kind, low, high):
    """What is black and white where pixels go from `low` to `high`.

    Whole numbers: 0 and the largest of 8, 10, 12, ... bits; floats: 0 and 1, or 0 and 255; low and
    high where that does not hold all of them.
    """
    tops = (1, 255) if kind == "float" else (2 ** max(8, -(-int(high).bit_length() // 2) * 2) - 1,)
    fitting = [(0, top) for top in tops if low >= 0 and high <= top]
    return fitting[0] if fitting else (low, high if high > low else low + 1)


def _picture_error(error):
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # whose text is a handle's address
        return "no picture inside"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _suffixes():
    """The suffixes that promise a picture which Pillow can read."""
    from PIL import Image
    return {s for s, kind in Image.registered_extensions().items() if kind in PICTURES}


class Inspected(NamedTuple):
    """What a file is. broken: the reason, if it should be a picture; other: the kind of a file that
    is none; kind: of its pixels, "colour" for 16 bits of which Pillow keeps the upper 8, else as
    _kind; low, high: their extremes where the kind is not "8 bits"; digest: of all bytes; frames:
    whether there are more than the one that is read.
    """
    broken: str = ""
    other: str = ""
    kind: str = "8 bits"
    low: float = 0
    high: float = 0
    digest: str = ""
    frames: bool = False


def _inspect(path):
    """Open a file, whatever its name -> Inspected."""
    from PIL import Image

    suffix = Path(path).suffix.lower()
    other = Inspected(other=f"{suffix or 'without suffix'}{CANNOT if suffix in UNREADABLE else ''}")
    if not os.path.isfile(path):  # pipes and the like would keep us waiting
        return other if os.path.exists(path) else Inspected(broken="does not exist")
    start = None
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            image = Image.open(file)
            if image.format not in PICTURES or (
                    image.format == "TGA" and suffix != ".tga") or (  # any bytes may look like TGA
                    image.format == "TIFF" and suffix in UNREADABLE):  # a thumbnail
                return other
            colour = any(";16" in str(tile[3]) for tile in image.tile)
            image.draft(None, (64, 64))  # JPEG: all of the file is read, at a fraction of the time
            image.load()
            kind, extremes = _kind(image.mode), (0, 0)
            if kind != "8 bits" or colour:
                kind = "colour" if kind == "8 bits" else kind
                values = np.asarray(image.convert("RGB") if kind == "colour" else image)  # no alpha
                extremes = _extremes(values.astype(np.float64))
            file.seek(0)
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            frames = getattr(image, "is_animated", False) and image.format != "MPO"
            return Inspected("", "", kind, *extremes, digest.hexdigest(), frames)
    except Exception as error:  # as in read_image
        if start is not None and re.match(rb".{4}ftyp.*(hei[cmsx]|hev[cx])", start, re.DOTALL):
            return Inspected(other=".heic" + CANNOT)
        known = (Image.OPEN[name][1] for name in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF"))
        if start is None or suffix in _suffixes() or any(a(start[:16]) is True for a in known):
            return Inspected(broken="empty" if start == b"" else _picture_error(error))
        return other


def _inspect_all(files, data_dir, progress):
    """{file: Inspected}; what has the same size and time as before is not opened again."""
    from PIL import Image

    def stamp(path):
        with contextlib.suppress(OSError):
            found = os.stat(path)
            return [found.st_size, found.st_mtime_ns]

    paths = {f: os.path.abspath(f) for f in files}
    folder = os.path.commonpath([os.path.dirname(p) for p in paths.values()]) if paths else ""
    key = cache_key(folder, inspect.getsource(_inspect))
    store, known = Path(data_dir) / "cache" / f"pictures-{key}.json", {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(store.read_text())
    stamps = {p: stamp(p) for p in paths.values()}
    new = [p for p, now in stamps.items() if now is None or known.get(p, [None])[0] != now]
    if new:
        Image.init()  # once, before the threads
        with ThreadPool() as pool:
            results = zip(new, pool.imap(_inspect, new, chunksize=8), strict=True)
            for p, found in progress(results, "opening all pictures once", total=len(new)):
                known[p] = [stamps[p], *found]
        atomic_write(store, lambda p: p.write_text(json.dumps(known)))
    return {f: Inspected(*known[p][1:]) for f, p in paths.items()}


def open_all(parts, data_dir, progress, advice, listed=False):
    """Open every file of a set once, before anything is computed from its pictures.

    parts: {name of a part: list of files}; listed: whether a list says that they are pictures ->
    {file: Inspected}, the ranges of read_image for the whole set, and notes, a text. UserError:
    names the files that should be pictures and cannot be read, all at once.
    """
    found = _inspect_all([f for part in parts.values() for f in part], data_dir, progress)
    bad = [f"{printable(str(f))} ({x.broken or 'no picture'})" for f, x in found.items()
           if x.broken or (listed and x.other)]
    if bad:
        raise UserError(f"{len(bad)} of {len(found)} files: not a readable image: "
                        f"{', '.join(bad[:10])}{', ...' if len(bad) > 10 else ''}; {advice}")
    ranges, notes = {}, []
    for kind in ("whole", "float", "colour"):
        deep = [x for x in found.values() if x.kind == kind]
        if not deep:
            continue
        low, high = min(x.low for x in deep), max(x.high for x in deep)
        dark = sum(x.high < 64 for x in deep)
        if kind == "colour" and 2 * dark > len(deep):
            raise UserError(
                f"{dark} files have 16 bits a colour and use 14 of them at most; Pillow keeps "
                "the upper 8, and they would be nearly black: save them with 8 bits")
        ranges[kind] = black, white = grey_range(kind, low, high)
        what = f"{int(white).bit_length()} bits a pixel" if kind == "whole" and low >= 0 else \
            "16 bits a colour" if kind == "colour" else f"values of {black:g} to {white:g}"
        notes.append(f"{len(deep)} with {what} scaled to 8 bits")
    if frames := sum(x.frames for x in found.values()):
        notes.append(f"{frames} of several frames or pages, of which the first is read")
    seen = {}
    for name, part in parts.items():
        if listed and len(set(part)) < len(part):
            notes.append(f"files listed twice in {name}: {len(part) - len(set(part))}")
        digests = [found[f].digest for f in part if found[f].digest]
        for other, there in seen.items():
            if copies := sum(d in there for d in digests):
                notes.append(f"files of {name} that are in {other}, too: {copies}")
        seen[name] = set(digests)
    return found, ranges, "".join(f"; {note}" for note in notes)


def open_listed(parts, data_dir, progress, advice="put what the lists name there anew"):
    """open_all of {part: Images} -> the Images, which know their ranges now, and notes."""
    lists = {k: p.source for k, p in parts.items() if not isinstance(p.source, np.ndarray)}
    if not lists:
        return list(parts.values()), ""
    found, ranges, notes = open_all(lists, data_dir, progress, advice, listed=True)
    digests = {f: x.digest for f, x in found.items()}
    return [Images(part.source, ranges, digests) for part in parts.values()], notes


class ImagePool(Dataset):
    """Images through a transform: `pool.batches(index_lists)` yields (B, 3, H, W) float tensors.

    `preload` keeps a small pool's un-augmented images in memory. The random transform of a sample
    is drawn from a seed that comes with its index, so it does not depend on `workers`.
    """
    IN_MEMORY = 2 ** 28  # floats: 1 GiB

    def __init__(self, images, transform, random_transform=None, workers=0, device="cpu"):
        self.images, self.transform, self.random_transform = images, transform, random_transform
        self.workers, self.device, self.pixels = workers, device, None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        if isinstance(item, tuple):
            i, seed = item
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # the CPU's only
                return self.random_transform(self.images[i])
        return self.transform(self.images[item])

    def preload(self):
        """Keep all transformed images on the device if they are small; returns whether."""
        if self.pixels is None and len(self) and self[0].numel() * len(self) <= self.IN_MEMORY:
            self.pixels = torch.cat(list(self.batches([range(i, min(i + 256, len(self)))
                                                       for i in range(0, len(self), 256)])))
        return self.pixels is not None

    def batches(self, index_lists, seeds=None):
        """Yield a (B, 3, H, W) tensor on the device for every list of indices.

        seeds: one list of ints per index list turns the random transform on.
        """
        if self.pixels is not None and seeds is None:
            for indices in index_lists:
                yield self.pixels[torch.as_tensor(indices)]
            return
        items = [list(map(int, b)) for b in index_lists]
        if seeds is not None:
            items = [list(zip(b, s, strict=True)) for b, s in zip(items, seeds, strict=True)]
        generator = torch.Generator().manual_seed(0)  # keep the loader off torch's global generator
        loader = DataLoader(self, batch_sampler=items, num_workers=self.workers,
                            generator=generator)
        try:
            for batch in loader:
                yield batch.to(self.device)
        except UserError as error:  # a worker's comes with its traceback as text
            raise UserError(str(error).rpartition("UserError: ")[2], error.code) from None


def height_and_width(size):
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def pixel_transform(size, mean, std, interpolation="bicubic", crop=None, resize=None):
    """Resize to size, a number or (height, width), and normalise.

    crop (least area): random resized crop and flip instead; resize: what is resized to, (height,
    width) or the short side, before the centre of that size is cut out.
    """
    from torchvision import transforms

    interpolation = transforms.InterpolationMode(interpolation)
    size = height_and_width(size)
    if crop is not None:
        first = [transforms.RandomResizedCrop(size, (crop, 1.0), interpolation=interpolation),
                 transforms.RandomHorizontalFlip()]
    else:
        first = [transforms.Resize(resize or size, interpolation)]
        first += [transforms.CenterCrop(size)] if resize else []
    return transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(mean, std)])


def said_pixels(size, mean, std, how):
    """What is done to pictures, in words: "224 pixels, mean .5, std .5, bicubic resize"."""
    def short(numbers):
        words = [f"{n:.3g}".removeprefix("0") or "0" for n in numbers]
        return words[0] if len(set(words)) == 1 else " ".join(words)

    height, width = height_and_width(size)
    side = height if height == width else f"{height} x {width}"
    return f"{side} pixels, mean {short(mean)}, std {short(std)}, {how}"


def official_cifar_transform(name, size):
    """What FedPuReL's authors do to "cifar100" or "cifar10": normalise, then resize, bilinear.

    In this order and without antialiasing, unlike pixel_transform.
    """
    from torchvision import transforms

    return transforms.Compose([
        transforms.ToTensor(), transforms.Normalize(*CIFAR_STATISTICS[name]),
        transforms.Resize(height_and_width(size), transforms.InterpolationMode.BILINEAR,
                          antialias=False)])


# ------------------------------------------------------------------------------------------------
# Small world "shapes": coloured textures
# ------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (220, 40, 40), "green": (50, 170, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50),
    "purple": (140, 60, 180), "orange": (240, 140, 40), "cyan": (60, 200, 210),
    "pink": (245, 150, 190), "brown": (130, 85, 45), "grey": (140, 140, 140)
}
TEXTURES = ["plain", "horizontal", "vertical", "diagonal", "checked", "dotted", "gridded", "ringed",
            "shaded", "speckled"]
SHAPE_TEMPLATE = "a photo of a {} tile."


def render_tile(colour, texture, rng, noise=0.0, contrast=1.0, tint=(0, 0, 0), shade=.25,
                size=32):
    """A coloured texture with random phase, period and lightness: (size, size, 3) uint8.

    noise: standard deviation of pixel noise (of 1); contrast: factor about mid-grey; tint: added to
    the colour; shade: brightness of the dark parts. These make the shift between the two worlds.
    """
    y, x = np.mgrid[0:size, 0:size] + rng.uniform(0, 8, (2, 1, 1))
    period = rng.uniform(5, 8)
    wave = {
        "horizontal": np.sin(2 * np.pi * y / period), "vertical": np.sin(2 * np.pi * x / period),
        "diagonal": np.sin(2 * np.pi * (x + y) / (1.4 * period)),
        "checked": np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period) * 3,
        "dotted": 4 * (np.cos(2 * np.pi * x / period) + np.cos(2 * np.pi * y / period) - 1),
        "gridded": 6 * np.cos(2 * np.pi * np.stack([x, y]) / period).max(0) - 4,
        "ringed": np.sin(2 * np.pi * np.hypot(x - x.mean(), y - y.mean()) / period),
    }
    if texture == "plain":
        ink = np.ones((size, size))
    elif texture == "shaded":
        ink = (x - x.min()) / (size - 1)
    elif texture == "speckled":
        ink = np.kron(rng.random((size // 2, size // 2)) < .5, np.ones((2, 2)))
    else:
        ink = (np.clip(2 * wave[texture], -1, 1) + 1) / 2
    light = np.array(COLOURS[colour]) / 255 + rng.normal(0, .03, 3) + tint
    image = ink[..., None] * light + (1 - ink[..., None]) * light * shade
    image = .5 + contrast * (image - .5) + rng.normal(0, noise, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


NOISY = {"noise": .5, "contrast": .7}  # so that many tiles could be one of several classes
TINT = .03  # standard deviation of a class's own colour offset downstream (of 1)
SHADES = (.2, .3)  # range of the brightness of a class's dark parts downstream (of 1)


def render_tiles(per_class, rng, tints=None, shades=None, **look):
    """per_class[c] images of each of 100 classes -> (N, 32, 32, 3) uint8, (N,) int64 labels.

    tints (100, 3) and shades (100,): what is peculiar to a class, see render_tile.
    """
    pairs = [(c, t) for c in COLOURS for t in TEXTURES]
    labels = np.repeat(np.arange(len(pairs)), per_class)
    own = {} if tints is None else {"tint": tints, "shade": shades}
    tiles = []
    for c in labels:
        peculiar = {name: values[c] for name, values in own.items()}
        tiles.append(render_tile(*pairs[c], rng, **look, **peculiar))
    return np.stack(tiles), labels.astype(np.int64)


def shapes(seed, n_max=100, imbalance=100, n_test=20):
    """The small world: a long-tailed training part and a balanced test part of noisy tiles.

    Which class is frequent is drawn from the seed. The tiny CLIP that goes with it (tiny_backbone)
    has seen clean and equally noisy tiles, as many of every class: it is balanced, and there is
    little that more of the same could teach it. But many tiles could be one of several classes, and
    about those, cross-entropy on a long tail learns to guess the frequent one: that is what erodes
    rare classes. (Where a shift is left to be learned, tuning helps them all. The world was chosen
    for the erosion; benchmarks/RESULTS.md has the others that were tried.)
    """
    rng = numpy_generator(seed, "shapes", "downstream")
    classes = len(COLOURS) * len(TEXTURES)
    counts = np.array(long_tail_counts(n_max, classes, imbalance))[rng.permutation(classes)]
    own = {"tints": rng.normal(0, TINT, (classes, 3)), "shades": rng.uniform(*SHADES, classes)}
    train, labels = render_tiles(counts, rng, **own, **NOISY)
    test, test_labels = render_tiles([n_test] * classes, rng, **own, **NOISY)
    names = [f"{c} {t}" for c in COLOURS for t in TEXTURES]
    return ImageSet("shapes", names, SHAPE_TEMPLATE, Images(train), labels, Images(test),
                    test_labels, long_tailed=True)


def shapes_pretraining(seed, per_class=60):
    """Balanced tiles for the tiny CLIP: half clean, half noisy."""
    rng = numpy_generator(seed, "shapes", "pretraining")
    clean, labels = render_tiles([per_class // 2] * 100, rng)
    noisy, _ = render_tiles([per_class // 2] * 100, rng, **NOISY)
    return Images(np.concatenate([clean, noisy])), np.concatenate([labels, labels])


def split_for_pretraining(images, share, rng):
    """Cut a balanced share of every class out of an ImageSet's training part.

    share in (0, 1), of the rarest class's size -> (Images, labels) for pre-training, and the
    ImageSet without them.
    """
    counts = np.bincount(images.train_labels, minlength=images.num_classes)
    each = int(share * counts.min())
    if each < 1 or (counts - each).min() < 1:
        raise UserError(
            f"--pretrain-share {share} of the rarest class ({counts.min()} images) leaves no "
            "image to pre-train on or none to federate; add images or change the share")
    seen = long_tail_indices(images.train_labels, [each] * images.num_classes, rng)
    kept = np.setdiff1d(np.arange(len(images.train_labels)), seen)
    rest = replace(images, train=images.train.subset(kept), train_labels=images.train_labels[kept])
    return images.train.subset(seen), images.train_labels[seen], rest


# ------------------------------------------------------------------------------------------------
# Transfer sets: VTAB-1k, FGVC, and the small world "planted"
# ------------------------------------------------------------------------------------------------


@dataclass
class Splits:
    """A classification task in three parts, each a pair of Images and (N,) int64 labels.

    family: "vtab", "fgvc", "folder", "cifar100" or "planted"; it decides the transforms. said: what
    was found and left out, for people.
    """
    name: str
    family: str
    num_classes: int
    train: tuple
    val: tuple
    test: tuple
    said: str = ""

    def train_and_val(self):
        """Both, for the final run of a protocol that has chosen its settings."""
        (a, y), (b, z) = self.train, self.val
        return Images.concat(a, b), np.concatenate([y, z])

    def source(self):
        """What Run.source wants to know of them: a line for people, and all that was read."""
        sizes = [len(labels) for _, labels in (self.train, self.val, self.test)]
        found = self.said or f"{self.name}, {self.num_classes} classes"
        return (found + "; used {} to train, {} to validate, {} to test".format(*sizes),
                [(x.listing(), labels) for x, labels in (self.train, self.val, self.test)])


VTAB_GROUPS = {
    "natural": {"cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102,
                "oxford_iiit_pet": 37, "svhn": 10, "sun397": 397},
    "specialized": {"patch_camelyon": 2, "eurosat": 10, "resisc45": 45,
                    "diabetic_retinopathy": 5},
    "structured": {"clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16,
                   "dsprites_ori": 16, "smallnorb_azi": 18, "smallnorb_ele": 9},
}
VTAB_TASKS = {task: n for tasks in VTAB_GROUPS.values() for task, n in tasks.items()}
# name -> (folder under data_dir/fgvc, where in it the paths of the lists begin, classes)
FGVC_SETS = {
    "cub": ("CUB_200_2011", "images", 200), "nabirds": ("nabirds", "images", 555),
    "flowers": ("OxfordFlowers", ".", 102), "dogs": ("StanfordDogs", "Images", 120),
    "cars": ("StanfordCars", ".", 196),
}
TRANSFER_SETS = [*(f"vtab-{t}" for t in VTAB_TASKS), *(f"fgvc-{n}" for n in FGVC_SETS), "cifar100"]


def load_splits(name, data_dir, seed=0, progress=lambda items, *_, **__: items):
    """The Splits of one of TRANSFER_SETS or "folder:PATH".

    seed: which 1,000 of CIFAR-100's training images are drawn (800 and 200, the rest is not used),
    and which fifth of a folder's training images is the validation part, if it brings none. All
    files are opened once (open_all). UserError if files are missing (the message says what to put
    where) or damaged.
    """
    data_dir, family = Path(data_dir), name.partition("-")[0]
    if name in TRANSFER_SETS and family in ("vtab", "fgvc"):
        read, folder = (_vtab_task, "vtab-1k") if family == "vtab" else (_fgvc_set, "fgvc")
        splits = read(name.partition("-")[2], data_dir / folder)
        parts = {part: getattr(splits, part)[0] for part in ("train", "val", "test")}
        opened, notes = open_listed(parts, data_dir, progress)
        parts = {part: (images, getattr(splits, part)[1])
                 for part, images in zip(parts, opened, strict=True)}
        there = len(np.unique(splits.train[1]))
        some = f", {there} of them in its lists" if there < splits.num_classes else ""
        return replace(splits, **parts, said=f"{name}, {splits.num_classes} classes{some}{notes}")
    if name != "cifar100" and not name.startswith("folder:"):
        raise UserError(f"unknown data set {name!r}; there are {', '.join(TRANSFER_SETS)} and "
                        "folder:PATH")
    if name == "cifar100":
        images = load_images(name, data_dir)
    else:
        images = _folder_set(user_path(name.partition(":")[2]), data_dir, progress, validation=True)
    if images.val:
        return Splits(name, "folder", images.num_classes, (images.train, images.train_labels),
                      images.val, (images.test, images.test_labels), images.said)
    order = numpy_generator(seed, "splits", name).permutation(len(images.train_labels))
    cut = 800 if name == "cifar100" else int(.8 * len(order))
    if not 0 < cut < len(order):
        raise UserError(f"{name} has {len(order)} training images; expected at least 2")
    parts = [(images.train.subset(part), images.train_labels[part])
             for part in (order[:cut], order[cut:1000] if name == "cifar100" else order[cut:])]
    return Splits(name, name.partition(":")[0], images.num_classes, *parts,
                  (images.test, images.test_labels), images.said)


def _vtab_task(task, root):
    """<task>/{train800,val200,test}.txt of lines "images/<split>/000000.jpg 3"."""
    parts = []
    for split in ("train800", "val200", "test"):
        path = root / task / f"{split}.txt"
        if not path.exists():
            raise UserError(
                f"{path} is missing; get the VTAB-1k folders that NOAH, SSF and RepAdapter share "
                f"(vtab-1k.zip) and unpack them so that {root / task} holds train800.txt, "
                "val200.txt, test.txt and images/")
        files, labels = read_list_file(path, root / task, VTAB_TASKS[task])
        parts.append((Images(files), labels))
    return Splits(f"vtab-{task}", "vtab", VTAB_TASKS[task], *parts)


def _fgvc_set(name, root):
    """train.json, val.json, test.json: {image path: class}, as the authors of VPT published."""
    folder, images, classes = FGVC_SETS[name]
    lists = []
    for split in ("train", "val", "test"):
        path = root / folder / f"{split}.json"
        if not path.exists():
            raise UserError(
                f"{path} is missing; put the images of {folder} into {root / folder / images} and "
                "the train.json, val.json and test.json that VPT (KMnP/vpt) publishes beside them")
        lists.append(_read_fgvc(path))
    number = {c: i for i, c in enumerate(sorted({c for _, c in lists[0]}))}  # some count from 1
    if len(number) > classes:
        raise UserError(f"{root / folder}/train.json has {len(number)} classes, but {name} has "
                        f"{classes}")
    unknown = {c: file for part in lists for file, c in part if c not in number}
    if unknown:
        c = min(unknown)
        raise UserError(f"{root / folder}: class {c} ({printable(unknown[c])}) has no training "
                        "image")
    parts = [(Images([_listed_file(root / folder / images, file) for file, _ in part]),
              np.array([number[c] for _, c in part], dtype=np.int64)) for part in lists]
    return Splits(f"fgvc-{name}", "fgvc", classes, *parts)


def _read_fgvc(path):
    """A JSON object {image: class >= 0} as pairs: an image that is there twice is kept twice."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
        pairs = [(str(file), int(c)) for file, c in pairs]
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: expected one JSON object {{image: class}}") from None
    negative = [f"{printable(file)}: {c}" for file, c in pairs if c < 0]
    if negative or not pairs:
        raise UserError(f"{path}: {'class below 0: ' + negative[0] if negative else 'is empty'}")
    return pairs


@dataclass
class Pixels:
    """What a ViT wants of its pictures; the fields are the arguments of pixel_transform.

    mean, std: of values in [0, 1].
    """
    size: tuple
    mean: tuple
    std: tuple
    interpolation: str = "bilinear"
    resize: object = None

    def __str__(self):
        how = f"{self.interpolation} resize"
        if self.resize:
            to = self.resize if isinstance(self.resize, int) else "{} x {}".format(*self.resize)
            how += f" to {to} and centre crop"
        return said_pixels(self.size, self.mean, self.std, how)


NORMS = {"half": ((.5,) * 3, (.5,) * 3),
         "imagenet": ((.485, .456, .406), (.229, .224, .225))}


def transfer_pixels(vit, family, norm=None):
    """(Pixels, notes in words) of a ViT's pictures in a family of sets.

    vit.pixels is what the checkpoint says, None where it says nothing; norm: a name of NORMS that
    is set against it. VTAB and FGVC have a resize of their own.
    """
    pixels, notes = vit.pixels, []
    if pixels is None:
        usual = "imagenet" if family == "fgvc" else "half"
        pixels = Pixels(height_and_width(vit.config.image_size), *NORMS[norm or usual])
        notes.append(f"--norm {norm or usual}: the checkpoint has no preprocessor_config.json")
    elif norm and (pixels.mean, pixels.std) != NORMS[norm]:
        notes.append(f"--norm {norm}, though the checkpoint says {pixels}")
        pixels = replace(pixels, mean=NORMS[norm][0], std=NORMS[norm][1])
    elif family == "fgvc" and not norm and (pixels.mean, pixels.std) != NORMS["imagenet"]:
        notes.append("as the checkpoint says; VPT reads FGVC with --norm imagenet")
    if family in ("vtab", "fgvc") and pixels.resize:
        notes.append(f"resized as {family.upper()} is; the checkpoint says {pixels}")
        pixels = replace(pixels, resize=None)
    return pixels, notes


def transfer_transforms(family, size, mean, std, interpolation="bilinear", resize=None):
    """(transform for testing, random transform for training or None) of a family of sets.

    VTAB: straight to its size, no augmentation. FGVC: short side 256 (for 224), crop, flip. Folders
    and CIFAR-100 are read like VTAB, but for a `resize` (see pixel_transform).
    """
    if family != "fgvc":
        return pixel_transform(size, mean, std, interpolation, resize=resize), None
    from torchvision import transforms

    height, width = height_and_width(size)
    if height != width:
        raise UserError(f"the fgvc sets are cropped to squares, but --model takes pictures of "
                        f"{height} x {width}")
    short = transforms.Resize(round(height * 256 / 224),
                              transforms.InterpolationMode(interpolation))
    last = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return (transforms.Compose([short, transforms.CenterCrop(height), *last]),
            transforms.Compose([short, transforms.RandomCrop(height),
                                transforms.RandomHorizontalFlip(), *last]))


def frozen_vit(model, eps, seed, device, data_dir, progress=lambda items, *_, **__: items):
    """`tiny_vit` (model "tiny") or `vit_backbone`, from and into the folders under data_dir.

    Beside its weights it has `pixels`, a Pixels or None, and `said`, what it is in words.
    """
    if model == "tiny":
        return tiny_vit(seed, device, Path(data_dir) / "cache", progress, eps)
    return vit_backbone(model, eps, seed, device, Path(data_dir) / "weights")


class TransferPart:
    """Images of one split and their labels (N,), read as a ViT wants them.

    batches(index_lists) yields tokens (B, 1 + T, D) where they are in memory, else pixels.
    """

    def __init__(self, images, labels, transform, random_transform=None, workers=0, device="cpu"):
        self.pool = ImagePool(images, transform, random_transform, workers, device)
        self.labels, self.tokens = torch.as_tensor(labels, device=device), None

    @torch.no_grad()
    def embed_once(self, vit):
        """Keep the tokens if they fit where ImagePool would keep pixels."""
        shape = vit.embeddings.position_embeddings.shape  # (1, 1 + T, D)
        if len(self.labels) * shape[1] * shape[2] <= self.pool.IN_MEMORY:
            chunks = torch.arange(len(self.labels)).split(256)
            self.tokens = torch.cat([vit.embeddings(x) for x in self.pool.batches(chunks)])

    def batches(self, index_lists, seeds=None, pixels=False):
        """seeds: one list of ints per index list turns augmentation on; pixels: never tokens."""
        if self.tokens is None or pixels or seeds is not None:
            yield from self.pool.batches(index_lists, seeds)
        else:
            yield from (self.tokens[indices] for indices in index_lists)


@dataclass
class TransferTask:
    """What all methods on a transfer set share: a frozen ViT, its training and its test part.

    said: the ViT and how it reads pictures, in words.
    """
    vit: torch.nn.Module
    num_classes: int
    train: TransferPart
    test: TransferPart
    augment: bool  # whether training images are read through a random transform
    truth: list = None  # the planted number of prompts per block
    said: str = ""

    def fingerprint(self):
        """What makes the frozen ViT's answers, see common.fingerprint."""
        config = self.vit.config
        return [self.vit, config.hidden_act, config.num_attention_heads,
                repr(self.test.pool.transform)]


def transfer_task(splits, vit, norm=None, validate=False, workers=0, device="cpu", truth=None):
    """Splits as a ViT reads them -> TransferTask. norm: see transfer_pixels.

    validate: train on the training and test on the validation part. Else training takes both, but
    for FGVC, whose final run leaves the validation part out, as VPT's does.
    """
    pixels, notes = transfer_pixels(vit, splits.family, norm)
    read = transfer_transforms(splits.family, pixels.size, pixels.mean, pixels.std,
                               pixels.interpolation, pixels.resize)
    both = not validate and splits.family != "fgvc"
    seen = splits.train_and_val() if both else splits.train
    train = TransferPart(*seen, *read, workers, device)
    test = TransferPart(*(splits.val if validate else splits.test), *read, workers, device)
    if read[1] is None:  # the same pixels in every epoch
        train.embed_once(vit)
    if splits.family == "planted":
        test.embed_once(vit)
    said = f"{vit.said}, {pixels}" + "".join(f" ({note})" for note in notes)
    return TransferTask(vit, splits.num_classes, train, test, read[1] is not None, truth, said)


@contextlib.contextmanager
def hub_if_reachable(model=""):
    """Inside it, Hugging Face's libraries ask their hub only if it answers; else their cache alone.

    One request decides, where they would try each of several files five times, for a minute. Yields
    the reason in words, "" where it answers or `model` is a path that exists. Mirrors, proxies and
    HF_HUB_OFFLINE are respected.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before, why = constants.HF_HUB_OFFLINE, ""
    if model and Path(model).exists():
        pass
    elif before:
        why = "HF_HUB_OFFLINE is set, and it is not in the cache"
    else:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception as error:  # name, connection, proxy, certificate and time-out errors
            why = f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {error})"
            constants.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_error(unreachable, error):
    """Why something was not loaded: the hub (see hub_if_reachable), or a library's error."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if "weights_only" in str(error):  # torch's advice is to run whatever the file holds
        said = "its weights are not in a file that torch.save or safetensors wrote"
    no_network = re.search("connect|offline|download|cache", str(error), re.IGNORECASE)
    return unreachable if unreachable and no_network else said


def check_model_named(model):
    """UserError for an empty --model, which as a path is the current directory."""
    if not str(model).strip():
        raise UserError("--model is empty; expected a name or a directory")


def check_weights(model, what, folder=None):
    """UserError that names the first weight of a model with a number that is NaN or infinite, or
    that the safetensors files in its folder hold as bytes: these are quantised, and have a scale.
    """
    from safetensors import safe_open

    own = model.state_dict()
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                if file.get_slice(name).get_dtype() in ("I8", "U8") and any(
                        name.endswith(n) and own[n].is_floating_point() for n in own):
                    raise UserError(f"{what}: {name} in {path.name} is of whole numbers of 8 bits; "
                                    "expected floats: name the model before it was quantised")
    for name, weight in own.items():
        if name.startswith("text_decoder."):
            continue  # CoCa's captions are not asked for, and parts of it may never have been drawn
        bad = weight.numel() - int(weight.isfinite().sum())
        if bad:
            raise UserError(f"{what}: {name} has {bad} of {weight.numel()} numbers that are NaN or "
                            "infinite; the file is damaged, or its training diverged")


def vit_backbone(model, eps, seed, device, cache_dir):
    """A frozen transformers.ViTModel from a hub id or a directory, with LayerNorm ε = `eps`.

    transformers 5.17 or newer: its blocks, ViTModel.layers, return a tensor (before: encoder.layer,
    tuples). UserError if it cannot be loaded whole, is of another architecture or reads no RGB, or
    is a masked autoencoder: PRO-VPT's authors read MAE by the mean of patches and prompts, the
    class token of such a model says less.
    """
    check_model_named(model)
    local = Path(model).is_dir()
    if Path(model).is_file():
        raise UserError(f"--model {model} is a file; expected the directory that holds config.json "
                        "and model.safetensors, or a hub id")
    if not local and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise UserError(f"--model {model}: there is no such directory; expected one with "
                        "config.json and model.safetensors, or a hub id")
    seed_torch(seed, "unused weights of a checkpoint")
    with contextlib.nullcontext("") if local else hub_if_reachable() as why:
        try:
            vit, found, own_eps = _load_vit(model, eps, str(cache_dir))
            size = height_and_width(vit.config.image_size)
            pixels, left = _vit_pixels(model, size, str(cache_dir))
        except UserError:
            raise
        except Exception as error:  # hub, network, JSON, safetensors and key errors of 4 libraries
            raise UserError(
                f"--model {model}: cannot load it as a ViT ({_load_error(why, error)}). Expected a "
                "hub id, or a directory with config.json and model.safetensors") from None
    found = {kind: sorted(map(str, keys)) for kind, keys in found.items()}
    for kind, text in (("missing_keys", "its weights lack {}"),
                       ("mismatched_keys", "weights of other shapes than config.json says: {}")):
        if found[kind]:
            raise UserError(f"--model {model} is not a whole ViT: "
                            + text.format(", ".join(found[kind][:3])))
    # heads of what it was trained for are not needed; the rest of it is
    more = [key for key in found["unexpected_keys"] if "mask_token" not in key
            and re.search(r"(^|\.)(embeddings|encoder|layers?|layernorm)\.", key)]
    if more:
        raise UserError(f"--model {model}: the weights hold more than the ViT of {len(vit.layers)} "
                        f"blocks that config.json says: {', '.join(more[:3])}")
    check_weights(vit, f"--model {model}", model if local else None)
    vit.pixels = pixels
    vit.said = f"ViTModel of {Path(model).name if local else model}, {len(vit.layers)} blocks, " \
               f"0 weights missing, LayerNorm eps {eps:g}"
    if own_eps != eps:
        vit.said += f" (the checkpoint says {own_eps:g})"
    if left:
        vit.said += f"; not followed in preprocessor_config.json: {left}"
    return vit.eval().requires_grad_(False).to(device)


def _load_vit(model, eps, cache_dir):
    """-> ViTModel, what transformers reports of its weights, the checkpoint's own ε."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(model, cache_dir=cache_dir)
    kind = config.model_type
    if kind == "vit_mae":
        raise UserError(f"--model {model} is a masked autoencoder (vit_mae), which is read by the "
                        "mean of its patches and prompts; here the class token is read: name a ViT "
                        "that was trained with one, such as google/vit-base-patch16-224-in21k")
    if kind not in ("vit", "vit_msn"):  # the same modules, trained in another way
        raise UserError(f"--model {model} is a {kind}; expected a plain ViT (model_type vit), such "
                        "as google/vit-base-patch16-224-in21k")
    if config.num_channels != 3:
        raise UserError(f"--model {model} reads pictures of {config.num_channels} channels; "
                        "expected 3 (RGB)")
    vit, found = transformers.ViTModel.from_pretrained(
        model, add_pooling_layer=False, layer_norm_eps=eps, cache_dir=cache_dir,
        dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    return vit, found, config.layer_norm_eps


# an image processor that does one of them in a way of its own makes other pictures than Pixels
PICTURE_STEPS = {"_preprocess", "preprocess", "resize", "rescale", "normalize"}


def _vit_pixels(model, size, cache_dir):
    """The Pixels that preprocessor_config.json beside a ViT asks for, and what of it is left out in
    words; None and "" without such a file.

    size: (height, width) that the ViT takes.
    """
    from huggingface_hub import errors, hf_hub_download
    from PIL import Image
    from transformers import AutoImageProcessor

    path = Path(model) / "preprocessor_config.json"
    if not Path(model).is_dir():
        try:
            path = Path(hf_hub_download(model, path.name, cache_dir=cache_dir))
        except errors.EntryNotFoundError:  # the repository, or the cache without a network
            return None, ""
    if not path.is_file():
        return None, ""
    try:
        said = json.loads(path.read_text())
        wants = AutoImageProcessor.from_pretrained(path.parent)
        interpolation = Image.Resampling(wants.resample).name.lower()
        # values in [0, 1] are what ToTensor gives; a checkpoint may want 255 times as much, or less
        scale = round(255 * wants.rescale_factor, 9) if wants.do_rescale else 255
        mean, std = ([m / scale for m in (one if isinstance(one, (list, tuple)) else [one] * 3)]
                     for one in ((wants.image_mean, wants.image_std) if wants.do_normalize
                                 else (0, 1)))
        crop = bool(getattr(wants, "do_center_crop", False))
        asked = wants.crop_size if crop else wants.size
        own_steps = PICTURE_STEPS & set(vars(type(wants)))
    except Exception as error:  # JSON and key errors, an unknown kind of processor
        raise UserError(f"{path} is not readable ({type(error).__name__}: {str(error)[:200]}); "
                        "mend it, or remove it and say --norm") from None
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"{path}: image_mean and image_std have {len(mean)} and {len(std)} "
                        "numbers; expected 3")
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s < math.inf for s in std):
        raise UserError(f"{path}: image_mean {wants.image_mean} and image_std {wants.image_std} do "
                        f"not fit pixels that are 0 to {scale:g} (see do_rescale, rescale_factor); "
                        "a mean lies among them, and a deviation is above 0")
    changes = [key for key in ("do_flip_channel_order", "do_grayscale", "offset")
               if getattr(wants, key, None)]
    changes += ["do_pad"] if getattr(wants, "do_pad", None) and wants.pad_size else []
    if changes or own_steps:
        what = f"{changes[0]}: true" if changes else f"a {type(wants).__name__}"
        raise UserError(f"{path} asks for {what}, which is not done here; expected what a "
                        "ViTImageProcessor or CLIPImageProcessor does: resize, centre crop, "
                        "rescale, normalise")
    left = [f"{key} {json.dumps(said[key])}" for key, asks in (
        ("crop_pct", said.get("crop_pct")), ("do_resize", said.get("do_resize") is False)) if asks]
    resize = None
    if "size" in said:
        if wants.size.longest_edge or not (wants.size.shortest_edge or wants.size.height):
            raise UserError(f"{path}: size is {json.dumps(said['size'])}; expected "
                            '{"height": N, "width": N} or {"shortest_edge": N}')
        resize = wants.size.shortest_edge or (wants.size.height, wants.size.width)
        final = (asked.height or asked.shortest_edge, asked.width or asked.shortest_edge)
        if final != size:
            raise UserError(f"{path} makes pictures of {final[0]} x {final[1]}, but config.json "
                            f"says that the model takes {size[0]} x {size[1]}; mend one of them")
    return (Pixels(size, tuple(mean), tuple(std), interpolation,
                   None if resize == size else resize), ", ".join(left))


PLANTED_TRUTHS = ([0, 60, 12, 0, 0, 0], [0, 0, 0, 12, 60, 0], [36, 0, 0, 36, 0, 0],
                  [0, 0, 48, 24, 0, 0], [12, 0, 0, 0, 0, 60])
PLANTED_SIZE, PLANTED_CLASSES = 24, 6
PLANTED_SEEN = {"noise": .08, "contrast": .9}  # what the tiny ViT is pre-trained on
PLANTED_LOOK = {"noise": .1, "size": PLANTED_SIZE}


def tiny_vit(seed, device, cache_dir, progress=lambda items, *_, **__: items, eps=1e-6):
    """A ViT of 6 blocks that tells the 100 coloured textures apart; about 20 s on one CPU core."""
    import transformers

    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=6, num_attention_heads=4,
                                    intermediate_size=192, image_size=PLANTED_SIZE, patch_size=8,
                                    layer_norm_eps=eps)
    seed_torch(seed, "tiny-vit", "init")
    vit = transformers.ViTModel(config, add_pooling_layer=False)

    def make():
        _pretrain_vit(vit, seed, progress)
        return vit.state_dict()

    key = cache_key(seed, config.to_json_string(), anatomy(vit), PLANTED_SEEN, COLOURS, TEXTURES,
                    *map(inspect.getsource, (_pretrain_vit, render_tile, render_tiles,
                                             planted_pixels)))
    _load_cached(vit, Path(cache_dir) / f"tiny-vit-{key}.pt", make, "a cached tiny ViT")
    vit.pixels = Pixels((PLANTED_SIZE,) * 2, (.5,) * 3, (.25,) * 3)
    vit.said = f"tiny ViT, pre-trained on 4000 tiles of 100 textures, {len(vit.layers)} blocks"
    return vit.eval().requires_grad_(False).to(device)


def _pretrain_vit(vit, seed, progress, per_class=40, epochs=8, batch=64, lr=2e-3):
    """Cross-entropy on 4,000 tiles of 100 classes, with a linear head that is thrown away."""
    rng = numpy_generator(seed, "tiny-vit", "tiles")
    tiles, labels = render_tiles([per_class] * 100, rng, **PLANTED_SEEN, size=PLANTED_SIZE)
    pixels, labels = planted_pixels(tiles), torch.from_numpy(labels)
    head = torch.nn.Linear(vit.config.hidden_size, 100)
    params = [*vit.parameters(), *head.parameters()]
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(params, lr, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    vit.train()
    for step in progress(range(steps), "pre-training a tiny ViT"):
        place = step % (len(labels) // batch)
        if place == 0:
            order = torch.from_numpy(rng.permutation(len(labels)))
        here = order[place * batch:][:batch]
        logits = head(vit(pixel_values=pixels[here]).last_hidden_state[:, 0])
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, labels[here]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
    vit.eval()


def planted_pixels(tiles):
    """(N, H, W, 3) uint8 -> (N, 3, H, W) as `pixel_transform(.., .5, .25)` makes them."""
    return (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - .5) / .25


@torch.no_grad()
def planted(seed, vit, counts, n_train=600, n_test=1000):
    """The small world: a task whose right number of prompts per block is known -> Splits.

    A teacher, the same frozen ViT with `counts` hidden prompts (sum N, one number per block),
    labels the tiles. Its prompts are in-distribution: before block b they are tokens of other
    tiles at that depth. The label is the largest of PLANTED_CLASSES standardised directions of the
    teacher's output, those that a linear map of the bare ViT's output explains worst, so that a
    linear probe is beatable and prompts in the right blocks are what it takes.
    """
    import scipy.linalg

    rng = numpy_generator(seed, "planted", *counts)
    tiles, _ = render_tiles([17] * 100, rng, **PLANTED_LOOK)  # 100 for the prompts, 1,600 to label
    tiles = tiles[rng.permutation(len(tiles))]
    device = vit.layernorm.weight.device
    pixels = planted_pixels(tiles[:100 + n_train + n_test]).to(device)
    donors, x = vit.embeddings(pixels[:100]), vit.embeddings(pixels[100:])  # (·, 1 + T, D)
    bare = vit(pixel_values=pixels[100:]).last_hidden_state[:, 0].double().cpu().numpy()
    tokens = x.shape[1]
    for layer, n in zip(vit.layers, counts, strict=True):
        prompts = donors[rng.integers(0, 100, n), rng.integers(1, tokens, n)]  # (n, D)
        x = layer(torch.cat([x, prompts.expand(len(x), -1, -1)], 1))[:, :tokens]
        donors = layer(donors)
    taught = vit.layernorm(x[:, 0]).double().cpu().numpy()
    taught, bare = taught - taught.mean(0), bare - bare.mean(0)
    rest = taught - bare @ np.linalg.lstsq(bare, taught, rcond=None)[0]
    total = taught.T @ taught
    ridge = .01 * np.trace(total) / len(total) * np.eye(len(total))  # no directions of mere noise
    # directions w with the largest share of unexplained variance: max wᵀ rest w / wᵀ total w
    directions = scipy.linalg.eigh(rest.T @ rest, total + ridge)[1][:, -PLANTED_CLASSES:]
    z = taught @ directions
    labels = (z / z.std(0)).argmax(1).astype(np.int64)
    tiles, cut = tiles[100:], int(.8 * n_train)
    parts = [(Images(tiles[a:b]), labels[a:b])
             for a, b in ((0, cut), (cut, n_train), (n_train, n_train + n_test))]
    return Splits("planted", "planted", PLANTED_CLASSES, *parts)


# ------------------------------------------------------------------------------------------------
# CLIP: real weights, or a tiny one pre-trained on the spot
# ------------------------------------------------------------------------------------------------


@dataclass
class Backbone:
    """A CLIP in eval mode with what goes around it.

    clip: the model; tokenizer(list of N texts) -> (N, L) ids; transform and random_transform: PIL
    image -> (3, height, width), as the model was trained, and with random crop and flip; size: one
    number, or (height, width); said: which model and weights; pixels: what transform does.
    """
    clip: torch.nn.Module
    tokenizer: object
    transform: object
    random_transform: object
    size: object
    said: str = ""
    pixels: str = ""


def open_clip_backbone(model, weights, seed, device, cache_dir):
    """An open_clip model with the preprocessing that its weights were trained with -> Backbone.

    model: "NAME:PRETRAINED" or "NAME:random"; "hf-hub:ORG/NAME"; a directory that holds
    open_clip_config.json, with or without "local-dir:" before it. weights: a checkpoint file that
    is read instead of published weights, with the preprocessing of NAME:PRETRAINED (of NAME: of all
    its published weights, if they agree). UserError: unknown names (the message lists the tags), a
    missing or foreign file, no network.
    """
    import open_clip  # slow to import, and only needed here
    check_model_named(model)
    name, tag = _open_clip_name(model, weights)
    state, part = (None, "") if weights is None else _read_checkpoint(weights, name)
    # TorchScript files are OpenAI's own; these and some others were trained with QuickGELU, which
    # open_clip builds under its own name only
    published = open_clip.get_pretrained_cfg(name, tag)
    of_openai = state is not None and state.pop("input_resolution", None) is not None
    quick = published.get("quick_gelu", of_openai and not tag)
    pixels, note = _published_pixels(name, tag, weights)
    local, config, why = name.startswith("local-dir:"), {}, ""
    seed_torch(seed, "random CLIP")
    logging.disable(logging.CRITICAL)  # open_clip logs what the lines below say
    try:
        if not name.startswith("hf-hub:"):
            config = open_clip.get_model_config(name)
        # text towers and tokenizers of other libraries come from the hub, too
        remote = not (config and (local or weights or tag == "random")) or \
            ("hf_model" if local else "hf_") in str(config["text_cfg"])
        with hub_if_reachable() if remote else contextlib.nullcontext("") as why:
            clip, _, transform = open_clip.create_model_and_transforms(
                name, None if weights or tag == "random" else tag, device=device,
                cache_dir=str(cache_dir), load_weights=weights is None, pretrained_text=False,
                require_pretrained=weights is None and tag != "random",
                force_quick_gelu=quick, **pixels)
            if weights:
                _load_clip(clip, state, weights, name)
            check_weights(clip, f"--weights {weights}" if weights else f"--model {model}",
                          name.removeprefix("local-dir:") if local and not weights else None)
            tokenizer = open_clip.get_tokenizer(name, cache_dir=str(cache_dir))
    except UserError:
        raise
    except Exception as error:  # hub, network, pickle and key errors of three libraries
        what, hint = "download", "Without a network, get the checkpoint elsewhere and say " \
            f"--model {name if tag else 'DIR'} --weights FILE"
        if local or weights or tag == "random":
            needs = [v for k, v in config.get("text_cfg", {}).items() if k.startswith("hf_")
                     and k.endswith("_name") and not (local and "tokenizer" in k)]
            what, hint = "load", f"From the hub it needs the text model {needs[0]}" if needs else ""
        raise UserError(f"cannot {what} {model} ({_load_error(why, error)}). {hint}") from None
    finally:
        logging.disable(logging.NOTSET)
    cfg = clip.visual.preprocess_cfg
    height, width = height_and_width(clip.visual.image_size)
    size = height if height == width else (height, width)
    kind = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
    crop = pixel_transform(size, cfg["mean"], cfg["std"], kind, crop=.08)
    how = {"shortest": "resize and centre crop", "longest": "resize and padding",
           "squash": "resize to a square"}[cfg["resize_mode"]]
    which = f"weights of {Path(weights).name}{part}" if weights else f"{tag} weights" if tag else \
        "its weights"
    mended = quick and not config.get("quick_gelu")
    said = f"{name}, {which}" + ", QuickGELU as they were trained" * bool(mended)
    return Backbone(clip.eval(), tokenizer, transform, crop, size, said,
                    said_pixels(size, cfg["mean"], cfg["std"], f"{kind} {how}") + note)


def _open_clip_name(model, weights):
    """--model as open_clip knows it -> (name, tag, "" without one); UserError: none of its kind."""
    import open_clip
    known = open_clip.list_models()
    name, _, tag = model.partition(":")
    name = name.replace("/", "-")  # ViT-B/16, as in papers
    if model.startswith("hf-hub:"):
        return model, ""
    if model.startswith("local-dir:") or (name not in known and Path(model).is_dir()):
        folder = model.removeprefix("local-dir:")
        if not (Path(folder) / "open_clip_config.json").is_file():
            raise UserError(f"--model {model}: {folder} holds no open_clip_config.json; expected a "
                            "directory that open_clip's push_to_hf_hub wrote")
        return f"local-dir:{folder}", ""
    if name not in known:
        lower = {n.lower(): n for n in known}
        close = [lower[n] for n in difflib.get_close_matches(name.lower(), lower)]
        raise UserError(
            f"--model {model.partition(':')[0]!r} is not an open_clip model; see "
            f"{', '.join(close) or 'open_clip.list_models()'}, hf-hub:ORG/NAME or a directory with "
            "open_clip_config.json")
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = tag.lower().replace("-", "_") if open_clip.is_pretrained_cfg(name, tag) else tag
    if tag not in ["random", *tags] and (tag or weights is None):
        raise UserError(f"--model {name} needs :PRETRAINED, one of {', '.join([*tags, 'random'])}, "
                        "or --weights FILE")
    if weights is not None and tag == "random":
        raise UserError(f"--model {model} and --weights {weights} exclude each other: say --model "
                        f"{name}")
    return name, tag


def _published_pixels(name, tag, weights):
    """Preprocessing of a checkpoint file -> (arguments of open_clip's factory, a note in words)."""
    import open_clip
    if not weights or name.startswith(("hf-hub:", "local-dir:")):
        return {}, ""  # open_clip finds them itself
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(name)
    found = [{f"image_{key}": cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
             for cfg in (open_clip.get_pretrained_cfg(name, t) for t in tags)]
    if tag:
        return found[0], f" (as {name}:{tag})"
    if found and all(one == found[0] for one in found):
        return found[0], f" (as all published weights of {name})"
    return {}, f" (open_clip's default, as nothing else is known: say --model {name}:PRETRAINED " \
               "for that of published weights)"


# under which training loops save the weights of their model
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module", "clip", "net", "network")


def _holds_tensors(value):
    """Whether a dict, or a dict in it, has a tensor with a name."""
    return isinstance(value, dict) and any(
        isinstance(k, str) and (torch.is_tensor(v) or _holds_tensors(v)) for k, v in value.items())


def _read_checkpoint(path, name):
    """The tensors of a CLIP checkpoint file, and in words which of several parts they are.

    safetensors, torch.save or OpenAI's TorchScript, whatever its suffix; unpacked from what
    training loops put around them (a dict, "module." before every name).
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--weights {path} {what}; expected a checkpoint of {name}, one file")
    if path.suffix in (".npz", ".npy"):
        return {}, ""  # big_vision's, which open_clip reads by name
    cannot = f"cannot read {path} as {name}: it"
    try:
        with (open(path, "rb") as file, warnings.catch_warnings(),
              torch.serialization.safe_globals([argparse.Namespace])):  # "args", often
            warnings.simplefilter("ignore")  # torch would like TorchScript to go
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{":  # the header's length, the header
                from safetensors.torch import load_file
                state = load_file(path)
            elif zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n
                                                  in zipfile.ZipFile(path).namelist()):
                state = torch.jit.load(path, map_location="cpu").state_dict()
            else:  # torch goes by the suffix of a path
                state = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise UserError(f"{cannot} may not be opened (permission denied)") from None
    except Exception as error:  # a zip, pickle, runtime or safetensors error
        foreign = re.search(r"GLOBAL ([\w.]+) was not an allowed", str(error))
        raise UserError(cannot + (
            f" holds a {foreign[1]}, and only tensors, numbers and words are read; save the "
            "model's state_dict() alone" if foreign else
            " is not a whole checkpoint that torch.save or safetensors wrote")) from None
    where, left = "", []
    while isinstance(state, dict):
        parts = {k: v for k, v in state.items() if _holds_tensors(v)
                 and not re.search("optim|sched|scaler", str(k), re.IGNORECASE)}
        flat = any(torch.is_tensor(v) and v.ndim for v in state.values())  # a loss has no axis
        found = [k for k in parts if k in STATE_DICTS]
        if not found and (flat or not parts):
            break
        found = found or [k for k in parts if not re.search("(^|_)ema(_|$)", k)] or list(parts)
        if len(found) > 1:
            raise UserError(f"{cannot} holds no weights but {', '.join(map(str, state))[:200]}; "
                            f"expected one state dict, and {' and '.join(found)} could be it")
        where, left = found[0], left + [k for k in parts if k not in found]
        state = state[where]
    if not isinstance(state, dict):
        raise UserError(f"{cannot} holds a {type(state).__name__}; expected a state dict")
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v) and isinstance(k, str)}
    if not tensors:
        raise UserError(f"{cannot} holds no weights but {', '.join(map(str, state))[:200]}; "
                        "expected a state dict")
    left += [str(k) for k in state if k not in tensors]
    again = True
    while again:
        again = False
        for prefix in ("module.", "_orig_mod.", "model.", "clip.", "net."):
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): v for key, v in tensors.items()}
                again = True
    words = f" ({f'its {where}; ' * bool(where)}left out: {', '.join(left)})" if left else ""
    return {k: v for k, v in tensors.items() if k not in ("context_length", "vocab_size")}, words


def _load_clip(clip, state, path, name):
    """Read a checkpoint into a model, all of it; UserError where open_clip would stretch a part."""
    import open_clip
    own = clip.state_dict()
    for key, value in state.items():
        if not value.is_floating_point() and (
                value.element_size() == 1 or own.get(key, value).is_floating_point()):
            raise UserError(f"cannot read {path} as {name}: {key} is of type "
                            f"{str(value.dtype).removeprefix('torch.')}, expected floats; a "
                            "quantised checkpoint is not read")
    for key in ("visual.positional_embedding", "positional_embedding", "text.positional_embedding"):
        there, here = ((part.get(key), part.get(f"text.{key}"))[key not in part]
                       for part in (state, own))
        if there is not None and here is not None and there.shape != here.shape:
            raise UserError(
                f"cannot read {path} as {name}: {key} has {' x '.join(map(str, there.shape))} "
                f"numbers, {name} has {' x '.join(map(str, here.shape))}: another image size, "
                "patch size, width or text length; name the model that it was trained as")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.pt" if state else path
        if state:  # open_clip, which knows other projects' names of weights, wants a file
            torch.save(state, file)
        try:
            open_clip.load_checkpoint(clip, str(file))
        except Exception as error:  # missing and unknown keys, shapes, and what converters raise
            said = " ".join(str(error).split())[:300]
            raise UserError(f"cannot read {path} as {name} ({type(error).__name__}: {said})"
                            ) from None


def anatomy(module):
    """What a network computes beside its weights: class and plain attributes of every part."""
    plain = (int, float, str, tuple, type(None))  # heads, ε, kind of pooling
    return [(name, type(part).__name__, part.extra_repr(),
             sorted((k, v) for k, v in vars(part).items() if isinstance(v, plain)))
            for name, part in module.named_modules()]


def _load_cached(module, path, make, what):
    """The state dict in `path` (see common.cached) into a module; UserError if it is foreign."""
    try:
        module.load_state_dict(cached(path, make, what))
    except RuntimeError:
        raise UserError(f"{path} does not fit; expected {what}; delete it to make it again"
                        ) from None


def encode_once(clip, pool, device, cache_dir, progress=lambda items, *_, **__: items):
    """Image features (N, E) of an ImagePool before normalisation, cached under what made them."""
    source = pool.images.source
    if not isinstance(source, np.ndarray):
        stats = [Path(p).stat() for p in source]
        source = [pool.images.ranges, *((str(p), s.st_size, s.st_mtime_ns)
                                        for p, s in zip(source, stats, strict=True))]
    key = cache_key(fingerprint(source), inspect.getsource(read_image), repr(pool.transform),
                    fingerprint(clip.visual), anatomy(clip.visual), device.type)
    path = Path(cache_dir) / f"features-{key}.pt"

    @torch.no_grad()
    def encode():
        chunks = [range(i, min(i + 64, len(pool))) for i in range(0, len(pool), 64)]
        batches = progress(pool.batches(chunks), "encoding images once", total=len(chunks))
        return torch.cat([clip.encode_image(batch.to(device), normalize=False).cpu()
                          for batch in batches])

    features = cached(path, encode, "cached image features")
    if not torch.is_tensor(features) or len(features) != len(pool):
        raise UserError(f"{path} does not fit; expected cached features of {len(pool)} images; "
                        "delete it to make it again")
    return features.to(device)


class WordTokenizer:
    """One token per word; the vocabulary is every word of `texts`. Called like open_clip's.

    0 pads, 1 is an unknown word, then come the words, then start and end of text: the end has the
    largest id, where open_clip's text tower reads its output.
    """

    def __init__(self, texts, context_length):
        self.context_length = context_length
        words = sorted({w for text in texts for w in self.words(text)})
        self.ids = {w: i for i, w in enumerate(words, 2)}
        self.start, self.end = len(words) + 2, len(words) + 3
        self.vocab_size = self.end + 1

    @staticmethod
    def words(text):
        return re.findall(r"[^\W_]+|\.", text.lower())

    def __call__(self, texts, context_length=None):
        """A string or list of N strings -> (N, context_length) int64."""
        texts = [texts] if isinstance(texts, str) else texts
        longest = context_length or self.context_length
        out = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *(self.ids.get(w, 1) for w in self.words(text)), self.end]
            if len(ids) > longest:
                raise UserError(f"the text {text!r} is longer than the tiny model's "
                                f"{longest} tokens")
            row[:len(ids)] = torch.tensor(ids)
        return out


@dataclass
class TinyConfig:
    """Size and pre-training of the tiny CLIP (defaults: shapes; about 35 s on one CPU core).

    stem: channels of the convolutions of stride 2 in the place of the patches' one, as many as make
    `patch` (3 for 8); () none.
    """
    width: int = 64
    vision_layers: int = 3
    text_layers: int = 2
    patch: int = 8
    stem: tuple = ()
    image_size: int = 32
    epochs: int = 6
    batch: int = 64
    lr: float = 3e-3
    augment: bool = False
    mean: tuple = (.5, .5, .5)
    std: tuple = (.25, .25, .25)


# four minutes for 20,000 photographs
PHOTO_TINY = TinyConfig(width=96, stem=(32, 64, 128), epochs=12, batch=100, lr=2e-3, augment=True)


def tiny_backbone(images, labels, class_names, template, config, seed, device, cache_dir,
                  progress=lambda items, *_, **__: items):
    """A small open_clip.CLIP trained contrastively on captioned images; cached by what made it.

    images, labels: an Images sequence and its (N,) labels; template: caption with {};
    progress(iterable, what): a progress bar.
    """
    import open_clip  # slow to import, and only needed here
    captions = [template.format(name) for name in class_names]
    longest = max(len(WordTokenizer.words(c)) for c in captions)
    tokenizer = WordTokenizer(captions, longest + 8)  # 8 more leave room for a learned context
    seed_torch(seed, "tiny-clip", "init")
    clip = open_clip.CLIP(
        embed_dim=config.width,
        vision_cfg={"layers": config.vision_layers, "width": config.width, "head_width": 32,
                    "patch_size": config.patch, "image_size": config.image_size},
        text_cfg={"context_length": tokenizer.context_length, "vocab_size": tokenizer.vocab_size,
                  "width": config.width, "heads": 2, "layers": config.text_layers})
    if config.stem:
        clip.visual.conv1 = conv_stem(config.stem, config.width)
    transform = pixel_transform(config.image_size, config.mean, config.std)
    pixels = torch.stack([transform(images[i])
                          for i in progress(range(len(images)), "reading images")])
    labels, tokens = torch.as_tensor(labels), tokenizer(captions)
    key = cache_key(config, seed, fingerprint([pixels, labels, tokens]), anatomy(clip),
                    inspect.getsource(_pretrain))

    def make():
        _pretrain(clip, pixels, labels, tokens, config, seed, progress)
        return clip.state_dict()

    _load_cached(clip, Path(cache_dir) / f"tiny-clip-{key}.pt", make, "a cached tiny CLIP")
    crop = pixel_transform(config.image_size, config.mean, config.std, crop=.5)
    return Backbone(
        clip.eval().to(device), tokenizer, transform, crop, config.image_size,
        f"tiny CLIP, pre-trained on {len(images)} images of {len(class_names)} classes",
        said_pixels(config.image_size, config.mean, config.std, "bicubic resize"))


def conv_stem(channels, width):
    """What reads small photographs better than one large patch where there are few of them:
    convolutions of stride 2, (B, 3, H, W) -> (B, width, H / 2^n, W / 2^n) for n channels, each a
    multiple of 8. Source: Xiao et al., "Early Convolutions Help Transformers See Better", 2021."""
    nn, parts = torch.nn, []
    for before, after in zip((3, *channels[:-1]), channels, strict=True):
        parts += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.GroupNorm(8, after), nn.GELU()]
    return nn.Sequential(*parts, nn.Conv2d(channels[-1], width, 1, bias=False))


def _pretrain(model, pixels, labels, tokens, config, seed, progress):
    """Symmetric CLIP loss (Radford et al. 2021) over (image, caption of its class) pairs.

    Images of one class share their caption, so a row may have several right answers: the targets
    are spread over them evenly. pixels (N, 3, H, W), labels (N,), tokens (C, L).
    """
    config = replace(config, batch=min(config.batch, len(pixels)))
    steps = config.epochs * (len(pixels) // config.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    rng = numpy_generator(seed, "tiny-clip", "batches")
    model.train()
    for step in progress(range(steps), "pre-training a tiny CLIP"):
        if step % (len(pixels) // config.batch) == 0:
            order = torch.from_numpy(rng.permutation(len(pixels)))
        here = order[(step % (len(pixels) // config.batch)) * config.batch:][:config.batch]
        batch = pixels[here]
        if config.augment:  # flips and 3-pixel shifts
            batch = torch.where(torch.from_numpy(rng.random(len(here)) < .5)[:, None, None, None],
                                batch.flip(-1), batch)
            dy, dx = rng.integers(0, 7, 2)
            size = batch.shape[-1]
            batch = F.pad(batch, (3, 3, 3, 3))[:, :, dy:dy + size, dx:dx + size]
        y = labels[here]
        classes, column = y.unique(return_inverse=True)  # every caption once
        image = F.normalize(model.encode_image(batch), dim=-1)
        text = F.normalize(model.encode_text(tokens[classes]), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, distinct classes)
        same = F.one_hot(column, len(classes)).T.float()  # (distinct classes, B)
        loss = (F.cross_entropy(logits, column)
                + F.cross_entropy(logits.T, same / same.sum(1, keepdim=True))) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# ------------------------------------------------------------------------------------------------
# A federation of images: long tail, clients, CLIP, and what CLIP sees in every image
# ------------------------------------------------------------------------------------------------


@dataclass
class FederatedImages:
    """A long-tailed image set in the hands of K clients, beside a frozen CLIP.

    The N images of the pool are numbered: the long-tailed training images first, then all test
    images. clip, tokenizer: as in Backbone, nothing of it requires a gradient; features: (N, E)
    image features, not normalised; labels: (N,); clients: K pairs (train, test) of index tensors;
    test: the numbers of all test images; groups: see frequency_groups; template: the caption that
    the set's authors use, with {} for the class name.
    """
    clip: torch.nn.Module
    tokenizer: object
    pool: "ImagePool"
    features: torch.Tensor
    labels: torch.Tensor
    clients: list
    test: torch.Tensor
    groups: dict
    class_names: list
    template: str

    def tokens(self, caption):
        """See class_tokens; on the device."""
        return class_tokens(self.tokenizer, caption, self.class_names).to(self.labels.device)

    def text(self, template):
        """Normalised text features (C, E) of the classes' names in a caption with {}."""
        return text_features(self.clip, self.tokens(template))


def check_federation(args):
    """UserError for flags that load_federation could make nothing of, before anything is loaded."""
    name = image_set_name(args.dataset)
    if args.groups:
        group_rule(args.groups)
    if args.model == "tiny" and name != "shapes" and not name.startswith("folder:"):
        raise UserError(
            "--model tiny is pre-trained on the spot and needs --dataset shapes-lt or folder:PATH")
    if args.model == "tiny" and args.weights:
        raise UserError("--weights goes with an open_clip --model NAME, not with tiny")
    if name in LONG_TAILED_SETS and (args.imbalance or args.n_max):
        raise UserError(f"--dataset {args.dataset} comes with its own long tail: --imbalance and "
                        "--n-max do not apply")


def load_federation(args, run, official_cifar=False, captions=()):
    """Everything of a federated run that is not its method -> FederatedImages.

    args: the flags of the groups "data" and "model" of fedpurel.py, and seed and data_dir; run: a
    common.Run; official_cifar: see official_cifar_transform; captions: those with {} that will be
    asked for beside the set's own. Every draw follows the seed, each with a generator of its own.
    UserError: what the parts refuse.
    """
    name, tiny, pretraining = image_set_name(args.dataset), args.model == "tiny", None
    with run.rank_zero_first():  # it may download
        images = found = load_images(name, args.data_dir, args.seed, run.progress)
    if tiny and name == "shapes":
        pretraining = shapes_pretraining(args.seed)
    elif tiny:
        rng = numpy_generator(args.seed, "pretrain-share")
        *pretraining, images = split_for_pretraining(images, args.pretrain_share, rng)
    whole = images
    images = long_tailed(images, args.imbalance, args.n_max, args.class_order, args.seed)
    if args.clients:
        clients = federated_clients(images, images.train_labels, args.clients, args.beta,
                                    numpy_generator(args.seed, "partition"))
    else:
        clients = clients_that_fit(images, args.beta, args.seed)
    rule = args.groups or ("thirds" if images.num_classes < 30 else "100,20")
    counts = np.bincount(images.train_labels, minlength=images.num_classes)
    run.source("pictures", federation_said(found, whole, images, clients, args.clients),
               [found.train.listing(), found.test.listing(), found.train_labels, found.test_labels,
                found.class_names, clients])
    groups = frequency_groups(counts, group_rule(rule))

    with run.rank_zero_first():  # it may download, or pre-train
        backbone = _federation_backbone(args, name, images, pretraining, run)
    if official_cifar and name in CIFAR_STATISTICS:
        backbone.transform = official_cifar_transform(name, backbone.size)
        backbone.pixels = said_pixels(backbone.size, *CIFAR_STATISTICS[name],
                                      "bilinear resize of what is normalised (--recipe official)")
    clip = backbone.clip.requires_grad_(False)
    check_towers(clip, args.peft)
    alike = check_captions(backbone.tokenizer, (images.template, *captions), images.class_names,
                           name.startswith("folder:"), args.n_ctx if args.peft == "prompt" else 0)
    if alike:  # ImageNet's "missile", say: what others report counts them, too
        run.warn(f"one text to the tokenizer of --model: the classes {'; '.join(alike[:3])}")
    run.source("model", f"{backbone.said}, {backbone.pixels}",
               [clip, repr(clip), repr(backbone.transform)])
    pool = ImagePool(Images.concat(images.train, images.test), backbone.transform,
                     backbone.random_transform, args.workers, run.device)
    if tiny or args.peft == "lora":
        pool.preload()
    with run.rank_zero_first():
        features = encode_once(clip, pool, run.device, args.data_dir / "cache", run.progress)
    labels = np.concatenate([images.train_labels, images.test_labels])
    return FederatedImages(
        clip, backbone.tokenizer, pool, features, torch.as_tensor(labels, device=run.device),
        [tuple(torch.as_tensor(part, device=run.device) for part in pair) for pair in clients],
        torch.arange(len(images.train_labels), len(labels), device=run.device), groups,
        images.class_names, images.template)


def check_captions(tokenizer, captions, names, own, n_ctx=0):
    """The pairs of classes, in words, whose captions are one text to the tokenizer.

    captions: texts with {}; own: whether the names are a user's. n_ctx: how many words X the last
    caption begins with, for PromptLearner. UserError: such pairs among a user's names; a tokenizer
    that is not like CLIP's where n_ctx is asked for.
    """
    for caption in captions:
        tokens = class_tokens(tokenizer, caption, names)
        alike = [f"{names[a]!r} ({a}) and {names[b]!r} ({b})" for a, b in equal_rows(tokens)]
        if alike and own:
            raise UserError(f"folder: the classes {'; '.join(alike[:3])} are one text to the "
                            "tokenizer of --model, so that nothing can tell them apart; rename one")
    words = tokens[:, 1:1 + n_ctx]
    if n_ctx and ((tokens[:, 0] != tokens[0, 0]).any() or (words != words[0, 0]).any()):
        raise UserError("--peft prompt needs a tokenizer like CLIP's, with a start of text and one "
                        f"token for X, but --model has a {type(tokenizer).__name__}; try --peft "
                        "adapter")
    return alike


def federation_said(found, whole, images, clients, asked):
    """The line about pictures: what was found, set apart, kept by the long tail, and dealt out."""
    def span(counts):
        most, least = counts.max(), counts.min()
        return f"{most}" if most == least else f"{most} to {least}"

    before, after = (np.bincount(x.train_labels, minlength=x.num_classes) for x in (whole, images))
    said = [found.said]
    if len(found.train) > len(whole.train):
        said.append(f"{len(found.train) - len(whole.train)} set apart to pre-train --model tiny")
    if after.sum() < before.sum():
        once = int(((after == 1) & (before > 1)).sum())
        said.append(f"{after.sum()} of {before.sum()} kept by the long tail, {span(after)} a class "
                    f"of {span(before)}" + (f", {once} classes with 1" if once else ""))
    else:
        said.append(f"all kept, {span(after)} a class"
                    + (", a long tail already" if after.max() >= 10 * after.min() else ""))
    few = " (20 do not fit)" if not asked and len(clients) < 20 else ""
    return "; ".join([*said, f"{len(clients)} clients{few}"])


def _federation_backbone(args, name, images, pretraining, run):
    """The CLIP of --model: open_clip's, a checkpoint's, or a tiny one pre-trained here."""
    if args.model != "tiny":
        return open_clip_backbone(args.model, args.weights, args.seed, run.device,
                                  args.data_dir / "weights")
    config = TinyConfig() if name == "shapes" else PHOTO_TINY
    return tiny_backbone(*pretraining, images.class_names, images.template, config, args.seed,
                         run.device, args.data_dir / "cache", run.progress)


def check_towers(clip, peft):
    """UserError where a CLIP's towers are not what the tuned part --peft is made for."""
    def plain(blocks):
        return len(blocks) and all(type(b.attn) is torch.nn.MultiheadAttention for b in blocks)

    if peft == "prompt":
        blocks = getattr(getattr(clip, "transformer", None), "resblocks", [])
        lacks = [what for what, there in (
            ("a text transformer of its own", len(blocks)),
            ("plain attention in the text tower", plain(blocks)),
            ("a causal mask", getattr(clip, "attn_mask", None) is not None),
            ("texts read at their end", getattr(clip, "text_pool_type", "") == "argmax"),
            ("a text projection", getattr(clip, "text_projection", None) is not None),
        ) if not there]
        if lacks:
            raise UserError("--peft prompt needs CLIP's causal text transformer, but this "
                            f"{type(clip).__name__} has not {lacks[0]}; try --peft adapter")
    if peft == "lora":
        tower = getattr(clip.visual, "transformer", None)
        if not plain(getattr(tower, "resblocks", [])):
            raise UserError("--peft lora needs a ViT vision tower of open_clip with plain "
                            f"attention, but this is a {type(clip.visual).__name__}; try --peft "
                            "adapter")


def class_tokens(tokenizer, caption, class_names):
    """(C, L) token ids of the classes' names in a caption with {}.

    UserError: a text that the tokenizer would cut off, or a name of which it leaves nothing.
    """
    texts, length = [caption.format(name) for name in class_names], tokenizer.context_length
    whole = tokenizer([*texts, caption.format("")], context_length=4 * length)
    pad, tail = whole[-1, -2:]  # a few tokenizers end every row with a token that is read
    last = length - int(pad != tail)
    cut = (whole[:-1, last:-1] != pad).any(1)
    if not cut.any():
        ids = tokenizer(texts)
        cut = (ids[:, :last] != whole[:-1, :last]).any(1)
    if cut.any():
        text = texts[int(cut.int().argmax())]
        raise UserError(
            f"the class {class_names[int(cut.int().argmax())]!r} has a text longer than the "
            f"{length} tokens of --model: {text!r}; shorten its name"
            + ", or --n-ctx" * caption.startswith("X"))
    empty = (whole[:-1] == whole[-1]).all(1)
    if empty.any():
        raise UserError(f"the tokenizer of --model leaves nothing of the class name "
                        f"{class_names[int(empty.int().argmax())]!r}; rename the class")
    return ids


def equal_rows(rows):
    """Pairs (a, b), a < b, of rows of an (N, L) tensor that are the same; b with the first such."""
    first = {}
    numbered = ((i, tuple(row)) for i, row in enumerate(rows.tolist()))
    return [(first[row], i) for i, row in numbered if first.setdefault(row, i) != i]


@torch.no_grad()
def text_features(clip, tokens):
    """Normalised text features (C, E) of (C, L) token ids; 256 texts at a time."""
    return torch.cat([F.normalize(clip.encode_text(part), dim=-1) for part in tokens.split(256)])


# ------------------------------------------------------------------------------------------------
# Multi-objective problems
# ------------------------------------------------------------------------------------------------


class Problem:
    """A box-constrained problem, all objectives minimised: problem(x (..., n)) -> f (..., m).

    x lies in the problem's own bounds [lower, upper] (float64 tensors (n,)), in any floating dtype
    and on any device; every objective is differentiable almost everywhere and has finite gradients
    inside the bounds. ideal, nadir: (m,) best and worst values over the Pareto front. hv_nadir:
    what the authors of CoPSL divide by (they subtract no ideal). front(count): about `count` points
    (N, m) of the Pareto front where it has a formula, else None. source: where it is defined.
    """
    own, estimated, named = False, (), 1  # own: a user's, see OwnProblem; named: how often
    stand_in = False  # True: MTMO with a random rotation in place of the competition's

    def __init__(self, name, function, lower, upper, ideal, nadir, source, hv_nadir=None,
                 front=None):
        self.name, self.function, self.source, self.front = name, function, source, front
        self.lower, self.upper, self.ideal, self.nadir = (
            torch.as_tensor(v, dtype=torch.float64) for v in (lower, upper, ideal, nadir))
        self.hv_nadir = self.nadir if hv_nadir is None else \
            torch.as_tensor(hv_nadir, dtype=torch.float64)
        self.n_var, self.n_obj = len(self.lower), len(self.nadir)

    def __call__(self, x):
        return self.function(x)

    def scale(self, unit):
        """Points of the unit cube (..., n) -> the problem's bounds."""
        lower, width = (v.to(unit) for v in (self.lower, self.upper - self.lower))
        return lower + unit * width


def _sqrt(x):
    """√x with gradient 0 instead of infinity at 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _violation(*constraints):
    """Σ max(0, -g): what the RE suite makes of constraints g >= 0, its last objective."""
    return sum((-g).clamp_min(0) for g in constraints)


def _rounded(x):
    """The nearest integer; its gradient is that of x (straight-through)."""
    return x + (x.round() - x).detach()


def _nearest(x, values):
    """The nearest of `values`; its gradient is that of x (straight-through)."""
    values = torch.tensor(values, dtype=torch.float64).to(x)
    return x + (values[(x.detach().unsqueeze(-1) - values).abs().argmin(-1)] - x).detach()


# -- F1-F6: Lin et al., "Pareto Set Learning for Expensive MOO", NeurIPS 2022, and its code --------

def _f_suite(target_even, target_odd=None, centred=True, fourth_power=False):
    """f1 = x1 (1 + mean y_odd), f2 = g (1 - √(x1 / g)), g = 1 + mean y_even, y = (x_j - target)².

    target(x1 (..., 1), j (n - 1,), n): where variable j = 2 ... n of the Pareto set lies; centred:
    variables are stretched to [-1, 1] first. The optimum is f2 = 1 - √f1 in all six (F3: _f3).
    """
    def evaluate(x):
        n = x.shape[-1]
        first, rest = x[..., :1], x[..., 1:]
        even, odd = (torch.arange(j, n + 1, 2, device=x.device, dtype=x.dtype) for j in (2, 3))
        rest = 2 * rest - 1 if centred else rest
        y_even = (rest[..., 0::2] - target_even(first, even, n)) ** 2
        y_odd = (rest[..., 1::2] - (target_odd or target_even)(first, odd, n)) ** 2
        if fourth_power:  # F6 squares its even terms twice in the authors' code: kept
            y_even = y_even ** 2
        x1, g = x[..., 0], 1 + y_even.mean(-1)
        return torch.stack([x1 * (1 + y_odd.mean(-1)), g * (1 - _sqrt(x1 / g))], -1)
    return evaluate


def _f2_target(x1, j, n):
    return x1.clamp_min(torch.finfo(x1.dtype).tiny) ** (.5 + 1.5 * (j - 2) / (n - 2))


def _wave(x1, j, n):
    return 4 * math.pi * x1 + j * math.pi / n


def _f6_radius(x1, j, n):
    return .3 * x1 ** 2 * torch.cos(12 * math.pi * x1 + 4 * j * math.pi / n) + .6 * x1


def _f6_angle(x1, j, n):
    return 6 * math.pi * x1 + j * math.pi / n


def _f3(x):
    """F3 is none of that family: f2 = (1 + s2)(1 - √x1), not divided by 1 + s2 under the root.

    y_j = x_j - ½ (sin(4π x1 + jπ / n) + 1); s1, s2: the means of y² over odd and even j = 2 ... n.
    """
    x1, n = x[..., 0], x.shape[-1]
    j = torch.arange(2, n + 1, device=x.device, dtype=x.dtype)
    square = (x[..., 1:] - (torch.sin(_wave(x[..., :1], j, n)) + 1) / 2) ** 2
    s1, s2 = square[..., 1::2].mean(-1), square[..., 0::2].mean(-1)
    return torch.stack([(1 + s1) * x1, (1 + s2) * (1 - _sqrt(x1))], -1)


F_SUITE = {
    "f1": _f_suite(lambda x1, j, n: (2 * x1 - 1) ** 2, centred=False),
    "f2": _f_suite(_f2_target, centred=False),
    "f3": _f3,
    "f4": _f_suite(lambda x1, j, n: .8 * x1 * torch.sin(_wave(x1, j, n)),
                   lambda x1, j, n: .8 * x1 * torch.cos(_wave(x1, j, n))),
    "f5": _f_suite(lambda x1, j, n: .8 * x1 * torch.sin(_wave(x1, j, n)),
                   lambda x1, j, n: .8 * x1 * torch.cos(_wave(x1, j, n) / 3)),  # /3 as their code
    "f6": _f_suite(lambda x1, j, n: _f6_radius(x1, j, n) * torch.sin(_f6_angle(x1, j, n)),
                   lambda x1, j, n: _f6_radius(x1, j, n) * torch.cos(_f6_angle(x1, j, n)),
                   fourth_power=True),
}


# -- ZDT (Zitzler et al. 2000), DTLZ (Deb et al. 2002), VLMOP (Van Veldhuizen 1999) ----------------

def zdt(number):
    """ZDT1, 2, 3, 4 or 6 as f (..., 2); the first variable is in [0, 1]."""
    def evaluate(x):
        x1, rest = x[..., 0], x[..., 1:]
        f1 = x1
        if number == 4:
            g = 1 + 10 * rest.shape[-1] + (rest ** 2 - 10 * torch.cos(4 * math.pi * rest)).sum(-1)
        elif number == 6:
            f1 = 1 - torch.exp(-4 * x1) * torch.sin(6 * math.pi * x1) ** 6
            g = 1 + 9 * rest.mean(-1).clamp_min(torch.finfo(x.dtype).tiny) ** .25
        else:
            g = 1 + 9 * rest.mean(-1)
        ratio = f1 / g
        h = 1 - ratio ** 2 if number in (2, 6) else 1 - _sqrt(ratio)
        if number == 3:
            h = h - ratio * torch.sin(10 * math.pi * f1)
        return torch.stack([f1, g * h], -1)
    return evaluate


def dtlz(number, n_obj):
    """DTLZ1 (linear front Σ f = 0.5, multimodal g) or DTLZ2 (spherical front) with n_obj >= 2."""
    def evaluate(x):
        place, rest = x[..., :n_obj - 1], x[..., n_obj - 1:] - .5
        if number == 1:
            g = 100 * (rest.shape[-1] + (rest ** 2 - torch.cos(20 * math.pi * rest)).sum(-1))
            keep, drop, scale = place, 1 - place, .5 * (1 + g)
        else:
            angle = place * math.pi / 2
            keep, drop, scale = angle.cos(), angle.sin(), 1 + (rest ** 2).sum(-1)
        ones = torch.ones_like(scale)[..., None]
        product = torch.cat([ones, keep.cumprod(-1)], -1).flip(-1)  # (..., m)
        last = torch.cat([ones, drop.flip(-1)], -1)
        return scale[..., None] * product * last
    return evaluate


def _vlmop1(x):
    return torch.cat([x ** 2, (x - 2) ** 2], -1)


def _vlmop2(x):
    centre = 1 / math.sqrt(x.shape[-1])
    return torch.stack([1 - torch.exp(-((x - centre) ** 2).sum(-1)),
                        1 - torch.exp(-((x + centre) ** 2).sum(-1))], -1)


def _vlmop3(x):
    a, b = x.unbind(-1)
    square = a ** 2 + b ** 2
    return torch.stack([.5 * square + torch.sin(square),
                        (3 * a - 2 * b + 4) ** 2 / 8 + (a - b + 1) ** 2 / 27 + 15,
                        1 / (square + 1) - 1.1 * torch.exp(-square)], -1)


# -- RE: Tanabe and Ishibuchi, "An easy-to-use real-world multi-objective suite", 2020 -------------

# Areas of steel bars (RE22), square inches. The published suite writes "3, 10" where 3.10 is meant,
# that is, the areas 3 and 10; kept, in the suite's order, since everybody's numbers come from it.
REINFORCEMENT = [
    .2, .31, .4, .44, .6, .62, .79, .8, .88, .93, 1, 1.2, 1.24, 1.32, 1.4, 1.55, 1.58, 1.6, 1.76,
    1.8, 1.86, 2, 2.17, 2.2, 2.37, 2.4, 2.48, 2.6, 2.64, 2.79, 2.8, 3, 3.08, 3, 10, 3.16, 3.41,
    3.52, 3.6, 3.72, 3.95, 3.96, 4, 4.03, 4.2, 4.34, 4.4, 4.65, 4.74, 4.8, 4.84, 5, 5.28, 5.4, 5.53,
    5.72, 6, 6.16, 6.32, 6.6, 7.11, 7.2, 7.8, 7.9, 8, 8.4, 8.69, 9, 9.48, 10.27, 11, 11.06, 11.85,
    12, 13, 14, 15]
WIRE = [  # diameters of spring wire (RE25), inches
    .009, .0095, .0104, .0118, .0128, .0132, .014, .015, .0162, .0173, .018, .02, .023, .025, .028,
    .032, .035, .041, .047, .054, .063, .072, .08, .092, .105, .12, .135, .148, .162, .177, .192,
    .207, .225, .244, .263, .283, .307, .331, .362, .394, .4375, .5]


def _re21(x):  # four-bar truss
    a, b, c, d = x.unbind(-1)
    root, load = math.sqrt(2), 10 * 200 / 2e5
    return torch.stack([200 * (2 * a + root * b + c.sqrt() + d),
                        load * (2 / a + 2 * root / b - 2 * root / c + 2 / d)], -1)


def _re22(x):  # reinforced concrete beam; x1 from a list
    a, b, c = x.unbind(-1)
    a, b = _nearest(a, REINFORCEMENT), b.clamp_min(1e-9)
    return torch.stack([29.4 * a + .6 * b * c,
                        _violation(a * c - 7.735 * a ** 2 / b - 180, 4 - c / b)], -1)


def _re23(x):  # pressure vessel; x1, x2 in whole sixteenths of an inch
    a, b, c, d = x.unbind(-1)
    a, b = .0625 * _rounded(a), .0625 * _rounded(b)
    volume = math.pi * c ** 2 * d + 4 / 3 * math.pi * c ** 3
    cost = .6224 * a * c * d + 1.7781 * b * c ** 2 + 3.1661 * a ** 2 * d + 19.84 * a ** 2 * c
    return torch.stack(
        [cost, _violation(a - .0193 * c, b - .00954 * c, volume - 1296000)], -1)


def _re24(x):  # hatch cover
    a, b = x.unbind(-1)
    bending, shear, stiffness = 4500 / (a * b), 1800 / b, 7e5
    deflection, buckling = 56.2e4 / (stiffness * a * b ** 2), stiffness * a ** 2 / 100
    return torch.stack(
        [a + 120 * b, _violation(1 - bending / 700, 1 - shear / 450, 1 - deflection / 1.5,
                                 1 - bending / buckling)], -1)


def _re25(x):  # coil spring; x1 whole, x3 from a list
    a, b, c = x.unbind(-1)
    a, c = _rounded(a), _nearest(c, WIRE)
    index, load, preload = b / c, 1000., 300.
    stress = (4 * index - 1) / (4 * index - 4) + .615 * c / b
    rate = 11.5e6 * c ** 4 / (8 * a * b ** 3)
    coil = 1.05 * (a + 2) * c
    length, travel, preset = load / rate + coil, (load - preload) / rate, preload / rate
    return torch.stack(
        [math.pi ** 2 * b * c ** 2 * (a + 2) / 4,
         _violation(189000 - 8 * stress * load * b / (math.pi * c ** 3), 14 - length, index - 3,
                    6 - preset, length - preset - travel - coil, 1.25 - travel)], -1)


def _re31(x):  # two-bar truss
    a, b, c = x.unbind(-1)
    long, short = (16 + c ** 2).sqrt(), (1 + c ** 2).sqrt()
    f1, f2 = a * long + b * short, 20 * long / (a * c)
    return torch.stack([f1, f2, _violation(.1 - f1, 1e5 - f2, 1e5 - 80 * short / (c * b))], -1)


def _re32(x):  # welded beam
    a, b, c, d = x.unbind(-1)
    load, length, young, shear = 6000., 14., 30e6, 12e6
    half = ((a + c) / 2) ** 2
    radius = (b ** 2 / 4 + half).sqrt()
    moment = load * (length + b / 2)
    inertia = 2 * math.sqrt(2) * a * b * (b ** 2 / 12 + half)
    direct, torsion = load / (math.sqrt(2) * a * b), moment * radius / inertia
    tau = (direct ** 2 + direct * torsion * b / radius + torsion ** 2).sqrt()
    sigma = 6 * load * length / (d * c ** 2)
    buckling = 4.013 * young * c * d ** 3 / (6 * length ** 2)
    buckling = buckling * (1 - c / (2 * length) * math.sqrt(young / (4 * shear)))
    return torch.stack(
        [1.10471 * a ** 2 * b + .04811 * c * d * (14 + b),
         4 * load * length ** 3 / (young * d * c ** 3),
         _violation(13600 - tau, 30000 - sigma, d - a, buckling - load)], -1)


def _re33(x):  # disc brake
    a, b, c, d = x.unbind(-1)
    gap = torch.where((b - a).abs() < 1e-6, 1e-6, b - a)  # finite also where b = a
    square, cube = gap * (a + b), gap * (a ** 2 + a * b + b ** 2)
    return torch.stack(
        [4.9e-5 * square * (d - 1), 9.82e6 * square / (c * d * cube),
         _violation(b - a - 20, .4 - c / (3.14 * square), 1 - 2.22e-3 * c * cube / square ** 2,
                    2.66e-2 * c * d * cube / square - 900)], -1)


def _re34(x):  # vehicle crashworthiness
    a, b, c, d, e = x.unbind(-1)
    mass = 1640.2823 + 2.3573285 * a + 2.3220035 * b + 4.5688768 * c + 7.7213633 * d + 4.4559504 * e
    acceleration = 6.5856 + 1.15 * a - 1.0427 * b + .9738 * c + .8364 * d - .3695 * a * d \
        + .0861 * a * e + .3628 * b * d - .1106 * a ** 2 - .3437 * c ** 2 + .1764 * d ** 2
    intrusion = -.0551 + .0181 * a + .1024 * b + .0421 * c - .0073 * a * b + .024 * b * c \
        - .0118 * b * d - .0204 * c * d - .008 * c * e - .0241 * b ** 2 + .0109 * d ** 2
    return torch.stack([mass, acceleration, intrusion], -1)


def _re35(x):  # speed reducer; x3 whole
    a, b, c, d, e, f, g = x.unbind(-1)
    c = _rounded(c)
    weight = .7854 * a * b ** 2 * (10 * c ** 2 / 3 + 14.933 * c - 43.0934) \
        - 1.508 * a * (f ** 2 + g ** 2) + 7.477 * (f ** 3 + g ** 3) + .7854 * (d * f ** 2
                                                                              + e * g ** 2)
    stress = ((745 * d / (b * c)) ** 2 + 1.69e7).sqrt() / (.1 * f ** 3)
    second = ((745 * e / (b * c)) ** 2 + 1.575e8).sqrt() / (.1 * g ** 3)
    return torch.stack(
        [weight, stress,
         _violation(1 / 27 - 1 / (a * b ** 2 * c), 1 / 397.5 - 1 / (a * b ** 2 * c ** 2),
                    1 / 1.93 - d ** 3 / (b * c * f ** 4), 1 / 1.93 - e ** 3 / (b * c * g ** 4),
                    40 - b * c, 12 - a / b, a / b - 5, d - 1.5 * f - 1.9, e - 1.1 * g - 1.9,
                    1300 - stress, 1100 - second)], -1)


def _re36(x):  # gear train; all whole
    teeth = _rounded(x)
    a, b, c, d = teeth.unbind(-1)
    error = (6.931 - c / a * d / b).abs()
    return torch.stack([error, teeth.amax(-1), _violation(.5 - error / 6.931)], -1)


def _re37(x):  # rocket injector
    a, h, o, p = x.unbind(-1)
    f1 = .692 + .477 * a - .687 * h - .08 * o - .065 * p - .167 * a ** 2 - .0129 * h * a \
        + .0796 * h ** 2 - .0634 * o * a - .0257 * o * h + .0877 * o ** 2 - .0521 * p * a \
        + .00156 * p * h + .00198 * p * o + .0184 * p ** 2
    f2 = .153 - .322 * a + .396 * h + .424 * o + .0226 * p + .175 * a ** 2 + .0185 * h * a \
        - .0701 * h ** 2 - .251 * o * a + .179 * o * h + .015 * o ** 2 + .0134 * p * a \
        + .0296 * p * h + .0752 * p * o + .0192 * p ** 2
    f3 = .37 - .205 * a + .0307 * h + .108 * o + 1.019 * p - .135 * a ** 2 + .0141 * h * a \
        + .0998 * h ** 2 + .208 * o * a - .0301 * o * h - .226 * o ** 2 + .353 * p * a \
        - .0497 * p * o - .423 * p ** 2 + .202 * h * a ** 2 - .281 * o * a ** 2 \
        - .342 * h ** 2 * a - .245 * h ** 2 * o + .281 * o ** 2 * h - .184 * p ** 2 * a \
        - .281 * h * a * o
    return torch.stack([f1, f2, f3], -1)


def _re41(x):  # car side impact
    a, b, c, d, e, f, g = x.unbind(-1)
    weight = 1.98 + 4.9 * a + 6.67 * b + 6.98 * c + 4.01 * d + 1.78 * e + 1e-5 * f + 2.73 * g
    force = 4.72 - .5 * d - .19 * b * c
    pillar = 10.58 - .674 * a * b - .67275 * b
    door = 16.45 - .489 * c * g - .843 * e * f
    violation = _violation(
        1 - (1.16 - .3717 * b * d - .0092928 * c),
        .32 - (.261 - .0159 * a * b - .06486 * a - .019 * b * g + .0144 * c * e + .0154464 * f),
        .32 - (.214 + .00817 * e - .045195 * a - .0135168 * a + .03099 * b * f - .018 * b * g
               + .007176 * c + .023232 * c - .00364 * e * f - .018 * b ** 2),
        .32 - (.74 - .61 * b - .031296 * c - .031872 * g + .227 * b ** 2),
        32 - (28.98 + 3.818 * c - 4.2 * a * b + 1.27296 * f - 2.68065 * g),
        32 - (33.86 + 2.95 * c - 5.057 * a * b - 3.795 * b - 3.4431 * g + 1.45728),
        32 - (46.36 - 9.9 * b - 4.4505 * a), 4 - force, 9.9 - pillar, 15.7 - door)
    return torch.stack([weight, force, .5 * (pillar + door), violation], -1)


def _re42(x):  # bulk carrier: length, breadth, depth, draft, knots, block coefficient
    length, breadth, depth, draft, knots, block = x.unbind(-1)
    displacement = 1.025 * length * breadth * draft * block
    froude = .5144 * knots / (9.8065 * length).sqrt()
    a = 4977.06 * block ** 2 - 8105.61 * block + 4456.51
    b = -10847.2 * block ** 2 + 12817 * block - 6960.32
    power = displacement ** (2 / 3) * knots ** 3 / (a + b * froude)
    outfit = length ** .8 * breadth ** .6 * depth ** .3 * block ** .1
    steel = .034 * length ** 1.7 * breadth ** .7 * depth ** .4 * block ** .5
    light = steel + outfit + .17 * power ** .9
    capital = .2 * 1.3 * (2000 * steel ** .85 + 3500 * outfit + 2400 * power ** .8)
    dead = displacement - light
    sea_days = 5000 / 24 * knots  # the suite multiplies where it should divide: kept
    daily = .19 * power * 24 / 1000 + .2
    cargo = dead - daily * (sea_days + 5) - 2 * dead ** .5
    trips = 350 / (sea_days + 2 * (cargo / 8000 + .5))
    voyage = (1.05 * daily * sea_days * 100 + 6.3 * dead ** .8) * trips
    annual = cargo * trips
    stability = .53 * draft + (.085 * block - .002) * breadth ** 2 / (draft * block) \
        - (1 + .52 * depth)
    return torch.stack(
        [(capital + 40000 * dead ** .3 + voyage) / annual, light, -annual,
         _violation(length / breadth - 6, 15 - length / depth, 19 - length / draft,
                    .45 * dead ** .31 - draft, .7 * depth + .7 - draft, 500000 - dead, dead - 3000,
                    .32 - froude, stability - .07 * breadth)], -1)


def _re61(x):  # water resource planning
    a, b, c = x.unbind(-1)
    flow = a * b
    return torch.stack(
        [106780.37 * (b + c) + 61704.67, 3000 * a, 305700 * 2289 * b / (.06 * 2289) ** .65,
         250 * 2289 * torch.exp(-39.75 * b + 9.9 * c + 2.74), 25 * (1.39 / flow + 4940 * c - 80),
         _violation(1 - (.00139 / flow + 4.94 * c - .08), 1 - (.000306 / flow + 1.082 * c - .0986),
                    50000 - (12.307 / flow + 49408.24 * c + 4051.02),
                    16000 - (2.098 / flow + 8046.33 * c - 696.71),
                    10000 - (2.138 / flow + 7883.39 * c - 705.04),
                    2000 - (.417 * flow + 1721.26 * c - 136.54),
                    550 - (.164 / flow + 631.13 * c - 54.48))], -1)


def _re91(noise):
    """Car cab design (Deb et al. 2009). x8-x11 are random: at their means, or seeded draws."""
    def evaluate(x):
        a, b, c, d, e, f, g = x.unbind(-1)
        h, i, j, k = .345, .192, 0., 0.
        if noise is not None:
            means, deviations = torch.tensor([[h, i, j, k], [.006, .006, 10, 10]],
                                             dtype=torch.float64)
            drawn = torch.randn(*x.shape[:-1], 4, generator=noise, dtype=torch.float64)
            h, i, j, k = (means + deviations * drawn).to(x).unbind(-1)
        weight = 1.98 + 4.9 * a + 6.67 * b + 6.98 * c + 4.01 * d + 1.75 * e + 1e-5 * f + 2.73 * g
        abdomen = 1.16 - .3717 * b * d - .00931 * b * j - .484 * c * i + .01343 * f * j
        upper = .261 - .0159 * a * b - .188 * a * h - .019 * b * g + .0144 * c * e \
            + .0008757 * e * j + .08045 * f * i + .00139 * h * k + .00001575 * j * k
        middle = .214 + .00817 * e - .131 * a * h - .0704 * a * i + .03099 * b * f - .018 * b * g \
            + .0208 * c * h + .121 * c * i - .00364 * e * f + .0007715 * e * j - .0005354 * f * j \
            + .00121 * h * k + .00184 * i * j - .018 * b ** 2
        lower = .74 - .61 * b - .163 * c * h + .001232 * c * j - .166 * g * i + .227 * b ** 2
        ribs = (28.98 + 3.818 * c - 4.2 * a * b + .0207 * e * j + 6.63 * f * i - 7.77 * g * h
                + .32 * i * j) \
            + (33.86 + 2.95 * c + .1792 * j - 5.057 * a * b - 11 * b * h - .0215 * e * j
               - 9.98 * g * h + 22 * h * i) + (46.36 - 9.9 * b - 12.9 * a * h + .1107 * c * j)
        force = 4.72 - .5 * d - .19 * b * c - .0122 * d * j + .009325 * f * j + .000191 * k ** 2
        pillar = 10.58 - .674 * a * b - 1.95 * b * h + .02054 * c * j - .0198 * d * j \
            + .028 * f * j
        door = 16.45 - .489 * c * g - .843 * e * f + .0432 * i * j - .0556 * i * k \
            - .000786 * k ** 2
        ratios = [abdomen, upper / .32, middle / .32, lower / .32, ribs / 96, force / 4,
                  pillar / 9.9, door / 15.7]
        return torch.stack([weight, *(r.clamp_min(0) for r in ratios)], -1)
    return evaluate


# -- MTMO: Yuan et al., "Evolutionary multitasking for multiobjective optimization" (CEC 2017) -----

def _sphere(z):
    return (z ** 2).sum(-1)


def _mean(z):
    return 9 * z.abs().mean(-1)


def _rosenbrock(z):
    return (100 * (z[..., :-1] ** 2 - z[..., 1:]) ** 2 + (1 - z[..., :-1]) ** 2).sum(-1)


def _rastrigin(z):
    return (z ** 2 - 10 * torch.cos(2 * math.pi * z) + 10).sum(-1)


def _ackley(z):
    root = _sqrt((z ** 2).mean(-1))
    return 20 + math.e - 20 * torch.exp(-.2 * root) - torch.exp(torch.cos(2 * math.pi * z).mean(-1))


def _griewank(z):
    divisor = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype).sqrt()
    return 1 + (z ** 2).sum(-1) / 4000 - torch.cos(z / divisor).prod(-1)


# name: (variables in z, their bound, g, front, s, matrix); s: [(how many, where the optimum lies)]
MTMO = {
    "cihs1": (49, 100, _sphere, "circle", 0, None),
    "cihs2": (49, 100, _mean, "concave", 0, None),
    "cims1": (9, 5, _rosenbrock, "concave", 0, None),
    "cims2": (9, 5, _mean, "circle", 1, "cims2"),
    "cils1": (49, 2, _rastrigin, "circle", 0, None),
    "cils2": (49, 1, _ackley, "convex", 0, None),
    "pihs1": (49, 100, _sphere, "convex", 0, None),
    "pihs2": (49, 100, _rastrigin, "convex", [(39, 0), (10, .1)], None),
    "pims1": (49, (0, 1), _sphere, "circle", [(24, 0), (25, .2)], "pims1"),
    "pims2": (49, (0, 1), _rastrigin, "concave", 0, "pims2"),
    "pils1": (49, 50, _griewank, "circle", 0, None),
    "pils2": (49, 100, _ackley, "circle", [(24, 0), (25, 20)], None),
    "nihs1": (49, 80, _rosenbrock, "circle", 0, None),
    "nihs2": (49, 80, _sphere, "convex", 0, None),
    "nims1": (18, 20, _rosenbrock, "sphere", 0, None),
    "nims2": (18, 20, _sphere, "concave2", 0, "nims2"),
    "nils1": (23, 50, _griewank, "sphere", 20, None),
    "nils2": (48, 100, _ackley, "concave2", 0, None),
}


def _mtmo_front(kind, x, q):
    """Objectives of the position variables x (..., 1 or 2) and the distance q >= 1 (...)."""
    if kind == "circle":
        angle = x[..., 0] * math.pi / 2
        return q[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    if kind == "sphere":
        a, b = (x * math.pi / 2).unbind(-1)
        return q[..., None] * torch.stack([a.cos() * b.cos(), a.cos() * b.sin(), a.sin()], -1)
    f1 = x.mean(-1)  # concave2 (NIMS and NILS, second tasks) has two position variables
    return torch.stack([f1, q * (1 - (_sqrt(f1 / q) if kind == "convex" else (f1 / q) ** 2))], -1)


def mtmo_matrix(name, size, data_dir, seed=0):
    """The competition's rotation `name` (size, size) from data_dir/mtmo/name.txt, float64.

    Numbers in size rows, with blanks, commas or semicolons between them; the name in any case.
    Without the file a seeded Gaussian matrix / √size stands in. -> (matrix, whether it was found).
    UserError when the file holds something else.
    """
    folder = Path(data_dir) / "mtmo"
    paths = sorted(p for p in folder.glob("*") if p.name.lower() in (f"{name}.txt", f"{name}.csv"))
    if not paths:
        drawn = numpy_generator(seed, "mtmo", name).normal(size=(size, size)) / math.sqrt(size)
        return torch.from_numpy(drawn), False
    if len(paths) > 1:
        raise UserError(f"{paths[0]} and {paths[1]} are both there for {name}; keep one of them")
    raw = paths[0].read_bytes()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        with warnings.catch_warnings(action="ignore"):  # of an empty file, which is refused below
            matrix = np.loadtxt(io.StringIO(re.sub("[,;]", " ", text)))
    except ValueError:
        matrix = np.empty(0)
    if matrix.shape != (size, size) or not np.isfinite(matrix).all():
        raise UserError(f"{paths[0]} must hold {size} x {size} plain numbers, one row a line; it "
                        f"holds " + (f"an array of shape {matrix.shape}" if matrix.size
                                     else "something else"))
    return torch.from_numpy(matrix), True


def _mtmo(name, data_dir, seed, shift):
    """A task of MTMO; `shift` moves the optimum of z by a seeded draw in ± shift · (half width)."""
    count, bound, g, front, offset, matrix = MTMO[name]
    lower, upper = bound if isinstance(bound, tuple) else (-bound, bound)
    if isinstance(offset, list):
        offset = [where for many, where in offset for _ in range(many)]
    offset = torch.as_tensor(offset, dtype=torch.float64).expand(count)
    drawn = numpy_generator(seed, "mtmo-shift", name).uniform(-1, 1, count)
    offset = offset + shift * (upper - lower) / 2 * torch.from_numpy(drawn)
    one = 1 if g is _rosenbrock else 0  # where g has its own minimum
    optimum = lower + (offset + one - lower).abs()  # beyond a bound: reflected, so still inside
    offset = upper - (upper - optimum).abs() - one
    rotation, found = mtmo_matrix(matrix, count, data_dir, seed) if matrix else (None, True)
    places = 2 if front in ("sphere", "concave2") else 1

    def evaluate(x):
        z = x[..., places:] - offset.to(x)
        if rotation is not None:
            z = z @ rotation.T.to(x)
        return _mtmo_front(front, x[..., :places], 1 + g(z))

    n_obj = 3 if front == "sphere" else 2

    def pareto(count):
        side = count if places == 1 else round(math.sqrt(count))
        if front == "sphere":
            return _mtmo_front(front, _grid(side, 2), torch.ones(side ** 2, dtype=torch.float64))
        line = _grid(count, 1)
        return _mtmo_front(front, line, torch.ones(count, dtype=torch.float64))

    task = Problem(name, evaluate, [0] * places + [lower] * count, [1] * places + [upper] * count,
                   [0] * n_obj, [1] * n_obj, "CEC 2017 multitask suite (Yuan et al.)", front=pareto)
    task.stand_in = not found
    return task


def _grid(side, dimensions):
    """An even grid of the unit cube: (side^dimensions, dimensions) float64."""
    lines = [torch.linspace(0, 1, side, dtype=torch.float64)] * dimensions
    return torch.cartesian_prod(*lines).reshape(-1, dimensions)


# -- Looking problems up ---------------------------------------------------------------------------

def _curve(shape, low=0.0, high=1.0):
    """A front f2 = shape(f1) over f1 in [low, high], as a function of the number of points."""
    def front(count):
        f1 = torch.linspace(low, high, count, dtype=torch.float64)
        return torch.stack([f1, shape(f1)], -1)
    return front


def _zdt3_front(count):
    """The five pieces of ZDT3's front; each starts where the one before is no longer better."""
    pieces = [(0, .0830015348), (.1822287281, .2577623634), (.4093136749, .4538821039),
              (.6183967945, .6525117080), (.8233317984, .8518328683)]
    length = sum(b - a for a, b in pieces)
    return torch.cat([_curve(lambda a: 1 - a ** .5 - a * torch.sin(10 * math.pi * a), a, b)(
        max(2, round(count * (b - a) / length))) for a, b in pieces])


def _dtlz_front(number, n_obj):
    def front(count):
        points = das_dennis(n_obj, count)
        return points / 2 if number == 1 else F.normalize(points, dim=-1)
    return front


def das_dennis(n_obj, count):
    """About `count` evenly spread points of the simplex (N, n_obj), float64, with edges.

    N is the largest number of the form C(p + m - 1, m - 1) that is <= count (and at least m).
    Source: Das and Dennis, 1998.
    """
    parts = 1
    while math.comb(parts + n_obj, n_obj - 1) <= count:
        parts += 1
    bars = itertools.combinations(range(parts + n_obj - 1), n_obj - 1)
    cuts = torch.tensor([(-1, *b, parts + n_obj - 1) for b in bars], dtype=torch.float64)
    return (cuts.diff(dim=-1) - 1) / parts


SIDE_IMPACT = [.5, .45, .5, .5, .875, .4, .4], [1.5, 1.35, 1.5, 1.5, 2.625, 1.2, 1.2]
TOP = 1 - math.exp(-4)

# Problems that are one formula in one box. First line: function, lower and upper bounds of the
# variables. Second line: ideal and nadir of the front, as the publication has them.
TABLE = {
    "vlmop1": (_vlmop1, [-2], [4],
               [0, 0], [4, 4]),
    "vlmop2": (_vlmop2, [-2] * 6, [2] * 6,
               [0, 0], [TOP, TOP]),
    "vlmop3": (_vlmop3, [-3, -3], [3, 3],
               [0, 15, -.1], [8.25, 17.07, .2]),
    "re21": (_re21, [1, 2 ** .5, 2 ** .5, 1], [3, 3, 3, 3],
             [1237.8414230005742, .002761423749158419], [2886.3695604236013, .04]),
    "re22": (_re22, [.2, 0, 0], [15, 20, 40],
             [5.88, 0], [361.262944647, 180.01547]),
    "re23": (_re23, [1, 1, 10, 10], [100, 100, 200, 240],
             [15.9018007813, 0], [5852.05896876, 1288669.78054]),
    "re24": (_re24, [.5, .5], [4, 50],
             [60.5, 0], [481.608088535, 44.2819047619]),
    "re25": (_re25, [1, .6, .09], [70, 3, .5],
             [.037591349242869145, 0], [.40397042546, 2224669.22419]),
    "re31": (_re31, [1e-5, 1e-5, 1], [100, 100, 3],
             [5.53731918799e-05, .333333333333, 0], [500.002668442, 8246211.25124, 19359919.7502]),
    "re32": (_re32, [.125, .1, .1, .125], [5, 10, 10, 5],
             [.0102055, .00043904, 0], [37.7831517014, 17561.6, 425062976.628]),
    "re33": (_re33, [55, 75, 1000, 11], [80, 110, 3000, 20],
             [-.721525, 1.13907203907, 0], [5.3067, 3.12833430979, 25]),
    "re34": (_re34, [1, 1, 1, 1, 1], [3, 3, 3, 3, 3],
             [1661.7078225, 6.14280000608, .0394], [1695.2002035, 10.7454, .264]),
    "re35": (_re35, [2.6, .7, 17, 7.3, 7.3, 2.9, 5], [3.6, .8, 28, 8.3, 8.3, 3.9, 5.5],
             [2352.34611145, 694.233587469, 0], [6704.53, 1695.96387746, 397.358927317]),
    "re36": (_re36, [12, 12, 12, 12], [60, 60, 60, 60],
             [0, 12, 0], [5.931, 56, .355720675227]),
    "re37": (_re37, [0, 0, 0, 0], [1, 1, 1, 1],
             [.00889341391106, .00488, -.431499999825],
             [.98949120096, .956587924661, .987530948586]),
    "re41": (_re41, *SIDE_IMPACT,
             [15.576004, 3.58525, 10.61064375, 0],
             [39.2905121788, 4.42725, 13.09138125, 9.49401929991]),
    "re42": (_re42, [150, 20, 13, 10, 14, .63], [274.32, 32.31, 25, 11.71, 18, .75],
             [-2756.25904006, 3962.55784323, 1947.88085693, 0],
             [-1010.52295952, 13827.1384563, 2611.96681074, 12.437669929732]),
    "re61": (_re61, [.01, .01, .01], [.45, .1, .1],
             [63840.2774, 30, 285346.896494, 183749.967061, 7.22222222222, 0],
             [83060.744, 1350, 2853468.96494, 7076861.67064, 87748.6339553, 2.50994535821]),
}
# What the authors of CoPSL divide by, where it is not the nadir of the table
HV_NADIR = {"vlmop2": [1, 1], "vlmop3": [10, 60, 1], "re31": [500, 9e6, 2e7],
            "re32": [35.3096156, 17561.6, 425062977],
            "re34": [1695.72022, 11.81993945, .2903999384]}
TABLE_FRONTS = {
    "vlmop1": lambda count: _vlmop1(2 * _grid(count, 1)),
    "vlmop2": lambda count: _vlmop2((2 * _grid(count, 1) - 1).expand(-1, 6) / 6 ** .5)}


def _simple_problems():
    """name -> the arguments of Problem after its name, for all problems without options."""
    lin, zdt_source, dtlz_source, vlmop_source, suite = (
        "Lin et al. 2022 (PSL-MOBO)", "Zitzler et al. 2000", "Deb et al. 2002",
        "Van Veldhuizen 1999, bounds of Lin et al. 2022", "RE suite, Tanabe and Ishibuchi 2020")
    found = {name: (f, [0] * 6, [1] * 6, [0, 0], [1, 1], lin, None, _curve(lambda a: 1 - a ** .5))
             for name, f in F_SUITE.items()}
    shapes = {1: lambda a: 1 - a ** .5, 2: lambda a: 1 - a ** 2, 4: lambda a: 1 - a ** .5,
              6: lambda a: 1 - a ** 2}
    for k, n in ((1, 30), (2, 30), (3, 30), (4, 10), (6, 10)):
        low, high = (-5, 5) if k == 4 else (0, 1)
        ideal = {3: [0, -.7733690], 6: [.2807753, 0]}.get(k, [0, 0])
        nadir = {3: [.8518329, 1], 6: [1, .9211653]}.get(k, [1, 1])
        front = _zdt3_front if k == 3 else _curve(shapes[k], ideal[0])
        found[f"zdt{k}"] = (zdt(k), [0] + [low] * (n - 1), [1] + [high] * (n - 1), ideal, nadir,
                            zdt_source, None, front)
    for k, m in itertools.product((1, 2), (2, 3, 4, 5)):
        n = m + (4 if k == 1 else 9)  # the authors' 5 and 10 variables beside the place
        found[f"dtlz{k}-{m}"] = (dtlz(k, m), [0] * n, [1] * n, [0] * m, [.5 if k == 1 else 1] * m,
                                 dtlz_source, None, _dtlz_front(k, m))
    for name, row in TABLE.items():
        source = vlmop_source if name.startswith("vlmop") else suite
        found[name] = (*row, source, HV_NADIR.get(name), TABLE_FRONTS.get(name))
    return found


RE91_RANGE = ([15.5498, .2679, .3538, .3181, .6488, .6593, .8963, .8391, .8226],
              [42.6893, 1.0299, .9275, .7815, 1.4706, 1.1398, 1.1068, 1.0228, 1.0227])
_SIMPLE = _simple_problems()
PROBLEMS = sorted([*_SIMPLE, "re91", *MTMO])


def problem_names(words, groups):
    """The problems that --problems names, in order: names in lower case, FILE.py:NAME as it stands.

    words: of the command line, each with any number of names between commas or blanks; groups: dict
    name -> names. A comma or blank may belong to a FILE.py that is there. UserError where it could
    be both.
    """
    def plain(word):
        return groups.get(word.lower(), [word if OWN.fullmatch(word) else word.lower()])

    names = []
    for word in words:
        parts = re.split(r"([,\s]+)", word)  # names at even places, what parts them at odd ones
        while parts:
            ends = [k for k in range(len(parts), 0, -2) if k == 1 or _own_file("".join(parts[:k]))]
            whole, apart = "".join(parts[:ends[0]]), [w for w in parts[:ends[0]:2] if w]
            if ends[0] > 1 and all(n in PROBLEMS or _own_file(n) for w in apart for n in plain(w)):
                raise UserError(f"--problems {whole}: that is a file, and {' '.join(apart)} are "
                                "problems too; rename the file or part them by blanks")
            names += plain(whole) if whole else []
            parts = parts[ends[0] + 1:]
    if not names:
        raise UserError("--problems names nothing; give names such as f1 or FILE.py:NAME")
    return names


def get_problem(name, data_dir="data", seed=0, shift=0.0, noise=False):
    """The Problem `name`, one of PROBLEMS (any case) or "file.py:Name" for the user's own.

    data_dir: where mtmo/*.txt may lie; shift: see _mtmo (MTMO only, a fraction of half the width);
    noise: RE91's four random variables are drawn at every call from `seed`, else at their means.
    UserError: unknown name (the message lists what exists), a file that does not fit.
    """
    if OWN.fullmatch(name):
        return _own_problem(name)
    name = name.lower()
    if name in _SIMPLE:
        return Problem(name, *_SIMPLE[name])
    if name in MTMO:
        return _mtmo(name, data_dir, seed, shift)
    if name == "re91":
        generator = torch_generator(seed, "re91-noise") if noise else None
        return Problem(name, _re91(generator), *SIDE_IMPACT, *RE91_RANGE,
                       "Deb et al. 2009; ideal and nadir: extremes of the objectives at zero noise")
    raise UserError(f"the problem {name!r} is unknown; there are {', '.join(PROBLEMS)} and "
                    "FILE.py:NAME for your own")


def get_problems(names, data_dir="data", seed=0, shift=0.0):
    """The Problems of several names, each once. Own ones of one NAME are called FILE.py:NAME."""
    once = {}  # what a name stands for -> all names of it
    for name in names:
        file = _own_file(name)
        key = (os.path.realpath(file[0]), file[1]) if file else name.lower()
        once.setdefault(key, []).append(name)
    problems = [get_problem(same[0], data_dir, seed, shift) for same in once.values()]
    for p, same in zip(problems, once.values(), strict=True):
        p.named = len(same)
    called = [p.name.lower() for p in problems]
    for p in problems:
        if p.own and called.count(p.name.lower()) > 1:
            p.name = p.spec
    return problems


def file_names(problems):
    """Their names as parts of file names and keys, each another one on any file system."""
    taken = {}
    for p in problems:
        base = re.sub(r"[^\w-]", "-", p.name)
        tries = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        name = next(n for n in tries if n.lower() not in taken)
        taken[name.lower()] = name
    return list(taken.values())


OWN = re.compile(r"(.*\.py)(?::([^:/\\,\s]*))?", re.DOTALL | re.IGNORECASE)


def _own_file(spec):
    """The (Path, NAME) that FILE.py:NAME stands for; None where there is no such file."""
    found = OWN.fullmatch(spec)
    if not found:
        return None
    path = found[1]
    for known in (path, os.path.expanduser(path), path.replace("\\", "/")):
        if Path(known).is_file():
            return Path(known), found[2] or ""
    return None


@contextlib.contextmanager
def _beside(folder):
    """Python finds what lies in `folder` first, as if a file there were run itself; what it prints
    goes to stderr, where the lines about inputs are."""
    def other(name, module):  # a module of ours, or of another own file, with a name used here too
        top, place = name.partition(".")[0], getattr(module, "__file__", None)
        return place and Path(place).parent in _FOLDERS and Path(place).parent != folder \
            and ((folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file())

    folder = folder.resolve()
    hidden = {n: m for n, m in list(sys.modules.items()) if other(n, m)}
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # for an import inside a function
        sys.modules.update(hidden)
        _FOLDERS.add(folder)


_FOLDERS = {Path(__file__).resolve().parent}
PROBES = 32  # points at which an own problem is looked at before training


class OwnProblem(Problem):
    """A problem from a user's file: a callable (N, n) -> (N, m) with lower, upper and n_obj.

    It may have ideal, nadir and front(count) as Problem has them. It is called on the CPU with
    float64 points, whatever comes in, and answers in float64; with a point (n,) at a time, or in
    float32, where it takes nothing else. UserError, code 3, where it is not finite at a finite x.
    estimated: which of "ideal" and "nadir" it lacks; they are NaN until `settle` has seen results.
    said: what was found, for run.source; unit: a power of 2 near the range of each objective (m,).
    """
    own = True

    def __init__(self, spec, path, name):
        found = runpy.run_path(str(path))
        names = [n for n, v in found.items() if callable(v) and hasattr(v, "n_obj")]
        name = names[0] if not name and len(names) == 1 else name
        if name not in found:
            raise UserError(f"--problems {spec}: expected FILE.py:NAME with one of what is in the "
                            f"file: {', '.join(names) or 'no callable with n_obj'}")
        found, self.spec = found[name], spec
        if isinstance(found, type):
            needed = [p.name for p in inspect.signature(found).parameters.values()
                      if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD,
                                                             p.KEYWORD_ONLY)]
            if needed:
                raise UserError(f"--problems {spec}: the class {name} needs {', '.join(needed)}; "
                                f"make an instance in the file, problem = {name}(...), and name it")
            found = found()
        if isinstance(found, torch.nn.Module):  # part of the problem, not of what is trained
            found = found.double().eval().requires_grad_(False)
        lower, upper, n_obj = found.lower, found.upper, int(found.n_obj)
        given = {k: v for k in ("ideal", "nadir") if (v := getattr(found, k, None)) is not None}
        nothing = torch.full((n_obj,), torch.nan, dtype=torch.float64)
        super().__init__(name, found, lower, upper, *(
            torch.as_tensor(given.get(k, nothing), dtype=torch.float64).expand(n_obj).clone()
            for k in ("ideal", "nadir")), str(path), front=getattr(found, "front", None))
        self.estimated = [k for k in ("ideal", "nadir") if k not in given]
        self.remarks = []  # how it is called, where that is not the plain way
        self._check_box()
        self._look(path)

    def _refuse(self, text):
        raise UserError(f"--problems {self.spec}: {text}")

    def _check_box(self):
        low, high = self.lower, self.upper
        if low.dim() != 1 or low.shape != high.shape or not (low < high).all() \
                or not torch.isfinite(high - low).all():
            self._refuse(f"expected lower < upper, two lists of finite numbers of one length; got "
                         f"{low.tolist()} and {high.tolist()}")
        if self.n_obj < 2:
            self._refuse(f"expected n_obj >= 2; got {self.n_obj}")
        if not self.estimated and not (self.ideal < self.nadir).all():
            self._refuse(f"expected ideal < nadir, got {self.ideal.tolist()} and "
                         f"{self.nadir.tolist()}")
        for key in ("ideal", "nadir"):
            if key not in self.estimated and not torch.isfinite(getattr(self, key)).all():
                self._refuse(f"expected finite numbers as {key}, got {getattr(self, key).tolist()}")
        if self.front is not None:
            points = torch.as_tensor(self.front(10))
            if points.dim() != 2 or points.shape[1] != self.n_obj or not len(points) \
                    or not torch.isfinite(points).all():
                self._refuse(f"expected front(10) to be about 10 finite points of {self.n_obj} "
                             f"objectives; got shape {tuple(points.shape)}")

    # -- how it is called -----------------------------------------------------------------------

    # What of it holds is found out by _look. alone: a point at a time; across: it answers (m, N)
    dtype, alone, across, noisy = torch.float64, False, False, False

    def evaluate(self, x):
        """f (N, m) float64 at x (N, n) float64, whatever it is: NaN too."""
        with contextlib.redirect_stdout(sys.stderr):
            # a copy: a function that changes its x changes nobody else's
            x = x.to(self.dtype)
            f = [self._call(row.clone()) for row in x] if self.alone else self._call(x.clone())
        f = torch.stack(f) if self.alone else f.mT if self.across else f
        return f.to(torch.float64) if f.dtype.is_floating_point else f

    def _call(self, x):
        f = self.function(x)
        if isinstance(f, (tuple, list)):  # m columns
            f = torch.stack([torch.as_tensor(v) for v in f], -1)
        if not isinstance(f, torch.Tensor):
            raise TypeError(f"it returns a {type(f).__module__}.{type(f).__name__}, not a tensor")
        return f

    def __call__(self, x):
        points = x.to("cpu", torch.float64).reshape(-1, self.n_var)
        try:
            f = self.evaluate(points)
        except Exception as error:  # anything can go wrong in a user's function
            raise UserError(f"problem {self.name}: {type(error).__name__}: {error}") from None
        bad = ~torch.isfinite(f.detach()).all(-1) & torch.isfinite(points.detach()).all(-1)
        if bad.any():
            raise UserError(f"problem {self.name} is not finite (NaN or infinity) at x = "
                            f"{_point(points[bad][0])}; narrow lower and upper, or clamp what goes "
                            "into a root, a log or a division. The last checkpoint is intact", 3)
        return f.reshape(*x.shape[:-1], self.n_obj)

    # -- what is seen of it before training -----------------------------------------------------

    def _look(self, path):
        """Find out how it wants to be called and what its gradients are; refuse what cannot be."""
        count = next(k for k in itertools.count(PROBES) if k not in (self.n_var, self.n_obj))
        draws = torch.from_numpy(numpy_generator(0, "own").random((count, self.n_var)))
        x = self.scale(draws).requires_grad_()
        f = self._try_calls(x, path)

        def finite(values, what, remedy):
            bad = ~torch.isfinite(values.detach()).flatten(1).all(-1)
            if bad.any():
                self._refuse(f"{what} (NaN or infinity) at {int(bad.sum())} of {count} random "
                             f"points of its box, e.g. x = {_point(x[bad][0])}; {remedy}")
        finite(f, "expected finite values; it is not finite", "narrow lower and upper, or clamp "
               "what goes into a root, a log or a division")
        if not f.requires_grad:
            used = [w for w in ("numpy", "detach", "item()", "no_grad", "tolist", "math.", "float(",
                                ".data", "argmax", "argmin", ".long()", ".int()")
                    if w in path.read_text(errors="replace")]
            self._refuse(f"no gradient comes out of {self.name}: torch cannot follow its values "
                         f"({f.dtype}) back to x; use torch functions of x all the way"
                         + (f" (the file has {', '.join(used)})" if used else ""))
        self.probe = f.detach()
        slopes = torch.stack([torch.autograd.grad(f[:, j].sum(), x, retain_graph=True,
                                                  allow_unused=True, materialize_grads=True)[0]
                              for j in range(self.n_obj)], 1)  # (N, m, n)
        finite(slopes, "its values are finite, but its gradient is not", "a torch.where whose "
               "other branch has a root or a log of a negative number? Clamp before the root")
        self._check_rows(x.detach())
        self._tell(x.detach(), slopes.abs().amax(0))

    def _try_calls(self, x, path):
        """Values (N, m) at x in the first way of calling that gives them, which is kept."""
        wanted, seen, errors = (len(x), self.n_obj), None, []
        for self.dtype, self.alone in itertools.product((torch.float64, torch.float32),
                                                        (False, True)):
            self.across = False
            try:
                with warnings.catch_warnings(action="ignore"):
                    f = self.evaluate(x)
            except Exception as error:
                errors.append(error)
                if "numpy" in str(error).lower():
                    self._refuse(f"no gradient comes out of {self.name}: it is NumPy code "
                                 f"({error}); expected torch functions of x, e.g. torch.sin for "
                                 "np.sin")
                continue
            self.across = not self.alone and f.shape == wanted[::-1]
            f = f.mT if self.across else f
            if f.shape == wanted and not f.is_complex():
                if self.dtype is torch.float32:
                    self.remarks.append(f"called in float32 (in float64: {_line(errors[0])})")
                if self.alone:
                    self.remarks.append("called with one point at a time, which is slow")
                if self.across:
                    self.remarks.append("objectives in rows, turned round")
                return f
            seen = f if seen is None else seen
        if seen is None:
            raise errors[0]
        seen = tuple(seen.shape)
        self._refuse(f"expected values of shape {wanted} at {wanted[0]} points; got shape {seen}"
                     + (f": n_obj says {self.n_obj}, but there are {seen[1]}"
                        if len(seen) == 2 and seen[0] == wanted[0] else ""))

    def _check_rows(self, x):
        """Whether a point's value is its own: that of no other point, the same each time."""
        low, high = self.probe.aminmax(dim=0)
        most = 1e-4 * (high - low) + 1e-6 * high.abs()  # rounding, which float32 has more of

        def same(f):
            return ((f - self.probe[:len(f)]).abs() <= most).all()
        with torch.no_grad():
            if same(self.evaluate(x[:len(x) // 2])):
                return
            again = same(self.evaluate(x))
        if again:
            self._refuse("expected the value of a point to be its own; it changes with the other "
                         "points of the batch: a mean() or sum() without dim=-1?")
        self.remarks.append("values change from call to call")
        self.noisy = True

    def _tell(self, x, slopes):
        """self.said and self.unit; UserError when no variable can be trained. slopes: (m, n)."""
        dead = (slopes == 0).all(0).nonzero().flatten().tolist()
        stepped = []  # of these, those on which the values depend all the same
        if dead:
            y = x[:4].repeat(len(dead), 1, 1)
            for i, j in enumerate(dead):
                y[i, :, j] = x[4:8, j]
            with torch.no_grad():
                moved = (self.evaluate(y.flatten(0, 1)).unflatten(0, (len(dead), 4))
                         != self.probe[:4]).flatten(1).any(1)
            stepped = [j for j, m in zip(dead, moved.tolist(), strict=True) if m]
        remedy = ("its values change without one (rounding, integers, argmax, detach?), so "
                  "training cannot follow; round straight through: x + (x.round() - x).detach()")
        if len(dead) == self.n_var:
            self._refuse(f"the gradient of {self.name} is 0 in all its variables: "
                         + (remedy if stepped else "its values do not change with x"))
        told = "gradients in all variables" if not dead else "gradients in " + _variables(
            [j for j in range(self.n_var) if j not in dead])
        if stepped:
            told += f"; none in {_variables(stepped)}: {remedy}"
        if unused := [j for j in dead if j not in stepped]:
            told += f"; none in {_variables(unused)}, on which its values did not depend"
        if flat := (slopes == 0).all(1).nonzero().flatten().tolist():
            told += f"; none of objective {', '.join(str(j + 1) for j in flat)}"
        low, high = self.probe.aminmax(dim=0)
        wide = torch.where(high > low, high - low, 1)
        self.unit = 2.0 ** wide.log2().round()
        missing = " and ".join(self.estimated)
        self.said = "; ".join([
            f"{self.n_var} variables, {self.n_obj} objectives, range {_spans(low, high)} at "
            f"{len(x)} random points, {told}", *self.remarks,
            *([f"{missing} to be estimated after training"] if missing else [])])

    def estimate(self, front, lowest):
        """Set what it lacks: ideal from the lowest values seen (m,), nadir from a non-dominated
        front (N, m). -> lines about objectives that have no range."""
        ideal = lowest.clone() if "ideal" in self.estimated else self.ideal
        nadir = front[_proper(front)].amax(0) if "nadir" in self.estimated else self.nadir
        flat = nadir - ideal <= 1e-12 * self.unit
        if self.estimated and flat.any():  # the smallest change that spares a division by 0
            if "nadir" in self.estimated:
                nadir = torch.where(flat, ideal + self.unit, nadir)
            else:
                ideal = torch.where(flat, nadir - self.unit, ideal)
        self.ideal, self.nadir, self.hv_nadir = ideal, nadir, nadir
        if not self.estimated or not flat.any():
            return []
        which = ", ".join(str(j + 1) for j in flat.nonzero().flatten().tolist())
        if "nadir" not in self.estimated:
            return [f"objective {which}: nothing found lies below the nadir that the file gives"]
        return ["one of the points found is best in all objectives: they do not conflict, or "
                "training is far from a front"
                if flat.all() else f"objective {which} is the same all over the front found: it "
                "has no range"]

    def beaten(self, front, lowest):
        """Lines about a given ideal and nadir that do not hold what was found."""
        wide = self.nadir - self.ideal
        told = []
        for key, found, beyond, effect in (
                ("ideal", lowest, lowest < self.ideal - 1e-6 * wide,
                 f"hypervolumes may exceed 1.1^{self.n_obj}"),
                ("nadir", front.amax(0), front.amax(0) > self.nadir + .01 * wide,
                 "points beyond 1.1 of the range count nothing")):
            for j in beyond.nonzero().flatten().tolist() if key not in self.estimated else []:
                told.append(f"objective {j + 1} reaches {found[j]:.6g} on the fronts found, beyond "
                            f"its {key} {getattr(self, key)[j]:.6g}; {effect}")
        return told

    def uneven(self):
        """Why objectives that are taken as they are will not count alike, or ""."""
        low, high = self.probe.aminmax(dim=0)
        wide = high - low
        if wide.amax() > 10 * wide.amin() or (low < -.1 * wide).any() or (low > 10 * wide).any():
            return _spans(low, high)
        return ""


def _point(x):
    return "[" + ", ".join(f"{v:.4g}" for v in x[:12].tolist()) + (", ...]" if len(x) > 12 else "]")


def _spans(low, high):
    """The ranges of m objectives, with as many digits as it takes to tell their ends apart."""
    told = []
    for a, b in zip(low.tolist(), high.tolist(), strict=True):
        more = math.log10(max(abs(a), abs(b)) / (b - a)) if b > a else 0
        told.append(f"{a:.{min(15, 3 + math.ceil(more))}g}..{b:.{min(15, 3 + math.ceil(more))}g}")
    return " and ".join(told)


def _line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _proper(front, most=1000):
    """Which points of a front (N, m) do not pay for a little gain with a great loss -> (N,) bool.

    A point is left out if another is better than it in some objective by more than `most` times
    what it is worse in any: the unfinished ends of a search, which would make any nadir. In shares
    of the range of the lowest nine tenths. Source: Geoffrion 1968, proper efficiency.
    """
    low, high = front.aminmax(dim=0)
    wide = front.quantile(.9, 0) - low
    wide = torch.where(wide > 0, wide, torch.where(high > low, high - low, 1))
    share, keep = (front - low) / wide, []
    for part in share.split(256):
        away = part[:, None] - share  # (256, N, m): what the other is better in
        keep.append((away.amax(-1) <= most * (-away).amax(-1)).all(1))
    return torch.cat(keep)


def _variables(places):
    """x1 x2 x5, or the first ten of more."""
    more = f" ... ({len(places)} variables)" if len(places) > 10 else ""
    return " ".join(f"x{j + 1}" for j in places[:10]) + more


def _own_problem(spec):
    """The OwnProblem FILE.py:NAME; UserError in one line for whatever is wrong with the file."""
    file = _own_file(spec)
    if file is None:
        raise UserError(f"--problems {spec}: there is no file {OWN.fullmatch(spec)[1]}")
    path, name = file[0].resolve(), file[1]
    try:
        with _beside(path.parent), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a file that draws numbers draws the same in every run
            try:
                return OwnProblem(spec, path, name)
            except FileNotFoundError:  # of a table that it reads: once more from where the file is
                with contextlib.chdir(path.parent):
                    return OwnProblem(spec, path, name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # anything can go wrong in a user's file
        raise UserError(
            f"--problems {spec}: expected a callable (N, n) -> (N, m) with lower, upper and n_obj; "
            f"got {type(error).__name__}: {error}") from None


def _fixed_values(problem):
    """What a problem computes at fixed points, for run.source: not down to the last bits."""
    if problem.own:
        f = torch.zeros(1, problem.n_obj) if problem.noisy else problem.probe
    else:
        f = problem(problem.scale(torch.from_numpy(
            numpy_generator(0, "fixed").random((16, problem.n_var)))))
    low, high = f.aminmax(dim=0)
    # Shares of each objective's range: an offset of 1e7 hides no change, and rounding is none
    steady = high - low <= 1e-9 * torch.maximum(high.abs(), low.abs())
    wide = torch.where(steady, torch.inf, high - low)
    numbers = torch.cat([low, high, problem.lower, problem.upper, problem.ideal, problem.nadir])
    return [problem.name, ((f - low) / wide * 1e5).round().long(),
            [f"{v:.4e}" for v in (numbers + 0.0).tolist()]]


def search_size(n_obj, evaluations, directions=None):
    """(directions, steps) of a reference search: as many directions as asked, 1,000 steps each; or
    what fits into that many evaluations, up to 1,000 of both."""
    if directions is not None:
        return (len(das_dennis(n_obj, directions)), 1000) if directions else (0, 0)
    count = len(das_dennis(n_obj, min(1000, round(math.sqrt(evaluations / 3)))))
    steps = min(1000, evaluations // count - 1)
    return (count, steps) if steps >= 10 else (0, 0)


def tell_problems(run, problems, evaluations, directions=None, normalised=True):
    """run.source of every problem. evaluations: of each in training and its tests; directions: of
    --reference; normalised: whether training sets objectives in proportion."""
    built_in = [p for p in problems if not p.own]
    if built_in:
        said = [" ".join(p.name for p in built_in) + " (built in)"]
        missing = sorted(p.name for p in built_in if p.stand_in)
        if missing:
            said.append(f"no {', '.join(missing)} in {run.args.data_dir / 'mtmo'}: random matrices "
                        "stand in for the competition's, so numbers of these tasks compare with "
                        "nobody else's")
        run.source("problems", "; ".join(said), [_fixed_values(p) for p in built_in])
    for p in problems:
        if p.own:
            count, steps = search_size(p.n_obj, evaluations - 2 * PROBES, directions)
            search = (f"then {count} x {steps} evaluations in search of a reference front, beside "
                      f"{evaluations} of training" if count else "no search for a reference front")
            search = "its own reference front" if p.front else search
            run.source(f"problem {p.name}", f"{p.said}; {search}", _fixed_values(p))
            if not normalised and p.uneven():
                run.warn(f"problem {p.name}: objectives of {p.uneven()} are compared as they are, "
                         "above an ideal of 0; --recipe tuned normalises them")
    twice = [p.name for p in problems if p.named > 1]
    if twice:
        run.warn(f"--problems names {', '.join(twice)} more than once; it is used once")
    many = [p.name for p in problems if p.n_obj > EXACT]
    if many:
        run.warn(f"{', '.join(many)}: more than {EXACT} objectives, so hypervolumes are integrated "
                 "over 65,536 directions (within about 0.3%): an exact one takes seconds a front")


def ranges(problems):
    """Ideal and nadir of each problem for result.json, and which of them this run estimated."""
    return {p.name: {"ideal": p.ideal.tolist(), "nadir": p.nadir.tolist(),
                     "estimated": list(p.estimated)} for p in problems}


def tell_ranges(problems):
    """Print what the * of estimated problems stands for."""
    for p in problems:
        if p.estimated:
            print(f"* {p.name}: {' and '.join(p.estimated)} estimated from what this run found, "
                  f"{_spans(p.ideal, p.nadir)}; its numbers compare with no other run's")


def settle(run, problems, state, evaluations, directions=None):
    """Own problems after training: -> {k: the best front known of problem k (N, m)}.

    Sets the ideal and nadir that a problem came without, from all that the run found and from a
    reference search, whose points are saved in state["reference"]. The run's fronts are those of
    state["done"][method]["history"][step][seed]["fronts"][k] (N, m): of the last step for the
    nadir, of all steps for the ideal.
    """
    known, fronts = state.setdefault("reference", {}), {}
    for k, p in enumerate(problems):
        if not p.own:
            continue
        histories = [done["history"] for done in state["done"].values()]
        every = [row["fronts"][k] for h in histories for rows in h.values()
                 for row in rows.values()]
        last = torch.cat([row["fronts"][k] for h in histories for row in h[max(h)].values()])
        lowest = torch.stack([f.amin(0) for f in every]).amin(0)
        p.estimate(last[non_dominated(last)], lowest)
        if p.name not in known:
            try:
                count, steps = search_size(p.n_obj, evaluations - 2 * PROBES, directions)
                known[p.name] = reference_front(p, 1000 if p.front else count, steps, run.progress,
                                                run.warn)
                run.save(state, "all of training, and reference fronts")
            except Exception as error:
                run.warn(f"problem {p.name}: the search for a reference front ended early "
                         f"({_line(error)}); what training found takes its place")
        best = known.get(p.name, last)
        best = best if p.front and p.name in known else torch.cat([best, last])
        best = best[non_dominated(best)]
        lowest = torch.minimum(lowest, best.amin(0))
        for text in [*p.estimate(best, lowest), *p.beaten(best, lowest)]:
            run.warn(f"problem {p.name}: {text}")
        fronts[k] = best
    return fronts


def reference_front(problem, count=1000, steps=1000, progress=lambda items, *_, **__: items,
                    warn=lambda text: None):
    """Points (N, m) of the Pareto front: the formula where there is one, else a long search.

    The search optimises `count` solutions directly, without any network: each minimises the smooth
    Tchebycheff value (μ = 0.02) of its own Das-Dennis preference by Adam, from a spread start; what
    is not dominated is kept. Deterministic. Points where a user's function is not finite are left
    out.
    """
    if problem.front is not None:
        return torch.as_tensor(problem.front(count), dtype=torch.float64).detach()
    if not count:
        return torch.empty(0, problem.n_obj, dtype=torch.float64)
    values = problem.evaluate if problem.own else problem
    preferences = das_dennis(problem.n_obj, count).clamp_min(1e-4)
    named = "own" if problem.own else problem.name  # a user's search does not hang on a name
    start = numpy_generator(0, "reference", named).normal(
        size=(len(preferences), problem.n_var))
    u = torch.from_numpy(start).requires_grad_()
    optimizer = torch.optim.Adam([u], lr=.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if problem.ideal.isnan().any() or problem.nadir.isnan().any():  # nothing else is known yet
        with torch.no_grad():
            f = values(problem.scale(u.sigmoid()))
        f = f[torch.isfinite(f).all(-1)]
        problem.estimate(f[non_dominated(f)], f.amin(0))
    for _ in progress(range(steps), f"{problem.name}: reference front"):
        f = (values(problem.scale(u.sigmoid())) - problem.ideal) / (problem.nadir - problem.ideal)
        losses = torch.logsumexp(preferences * f / .02, -1)
        optimizer.zero_grad(set_to_none=True)
        torch.where(losses.isfinite(), losses, 0).sum().backward()
        u.grad.nan_to_num_(0, 0, 0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        f = values(problem.scale(u.sigmoid()))
    finite = torch.isfinite(f).all(-1)
    if not finite.all():
        warn(f"problem {problem.name}: {int((~finite).sum())} of {len(f)} points of the reference "
             "search are not finite (NaN or infinity) and left out")
    f = f[finite]
    return f[non_dominated(f)] if len(f) else f
