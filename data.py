"""Everything that produces inputs: image sets, long tails, clients, small offline worlds.

Image sets   `load_images(name, data_dir, seed)` -> ImageSet: CIFAR, Food-101, DTD, Aircraft, Pets,
             Fashion-MNIST through torchvision; Stanford Dogs, ImageNet-LT and Places-LT from their
             own files; `folder:PATH` from any ImageFolder tree; `shapes` rendered here.
Long tail    `long_tail_counts`, `long_tail_indices`, `frequency_groups`, `long_tailed`
Clients      `pachinko_partition` (two label levels), `dirichlet_partition`, `federated_clients`
Text sets    `load_texts`: TREC, AG News, SST-2, csv:PATH, `topics`; `text_clients`,
             `poison_labels`, `draw_network`; `load_encoder`: `tiny_bert`, `tiny_decoder`,
             `text_encoder`
Reading      `ImagePool`: images through a transform, in memory when they are small
Transfer     `load_splits` (VTAB-1k, FGVC, folders), `frozen_vit`, `transfer_task`, `planted`
CLIP         `open_clip_backbone` (any open_clip model), `tiny_backbone` (pre-trained on the spot),
             `encode_once` (image features, cached)
Federation   `load_federation` -> FederatedImages: long tail, clients, CLIP and features of a run
Problems     `get_problem(name)` -> Problem: F1-F6, ZDT, DTLZ, VLMOP, RE (TABLE), the multitask
             suite MTMO; `reference_front`, `das_dennis`

Each section can be read alone.
"""
import csv
import difflib
import hashlib
import inspect
import itertools
import json
import logging
import math
import re
import runpy
import tarfile
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common import (
    UserError,
    atomic_write,
    cache_key,
    cached,
    non_dominated,
    numpy_generator,
    seed_for,
    seed_torch,
    torch_generator,
)

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
    numbers = [int(n) for n in text.split(",") if n.strip().isdigit()]
    if text != "thirds" and (len(text.split(",")) != 2 or len(numbers) != 2
                             or numbers[0] <= numbers[1]):
        raise UserError(f"--groups {text!r}: expected HIGH,LOW with HIGH > LOW, or thirds")
    return text if text == "thirds" else tuple(numbers)


def long_tailed(images, imbalance, n_max, class_order, seed):
    """An ImageSet with its training part cut to a long tail (as it is, if it has one already).

    imbalance: most over least frequent class; n_max: images of the most frequent class, None for
    all it has; class_order: "dataset" (class 0 is the most frequent, or the set's own tail_order)
    or "random", drawn from the seed.
    """
    if images.long_tailed:
        return images
    size = np.bincount(images.train_labels, minlength=images.num_classes)
    n_max = n_max or int(size.mean() if images.tail_order else size.max())
    tail = np.array(long_tail_counts(n_max, images.num_classes, imbalance))
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


def dirichlet_partition(train_labels, test_labels, num_clients, beta, rng, tries=1000):
    """Non-IID clients: each class is cut over the clients by one Dirichlet(beta) draw.

    A client that already holds N / K training samples gets nothing of further classes. The test
    samples of a class are cut by the same proportions. Redrawn until every client has a training
    and a test sample. Source: Hsu et al. 2019, with the cap of Wang et al., ICLR 2020.

    train_labels, test_labels: (N,), (M,) ints in 0..C-1, or None for no test; beta > 0
    -> two lists of K sorted int64 arrays (training, test; [] without one). UserError if no draw
    serves all.
    """
    if test_labels is None:
        train, _ = dirichlet_partition(train_labels, train_labels, num_clients, beta, rng, tries)
        return train, []
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    for _ in range(tries):
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
        f"no Dirichlet({beta}) split gave all {num_clients} clients a training and a test "
        f"sample in {tries} draws; use fewer --clients or a larger --beta")


def federated_clients(images, train_labels, num_clients, beta, rng):
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
        train, test = dirichlet_partition(train_labels, test_labels, num_clients, beta, rng)
    else:
        train, _ = dirichlet_partition(train_labels, None, num_clients, beta, rng)
        if images.client_tests == "balanced":
            # dealt like cards, class by class: shares of a class differ by one sample at most
            deck = rng.permutation(len(test_labels))
            deck = deck[np.argsort(test_labels[deck], kind="stable")]
            test = [np.sort(deck[k::num_clients]) for k in range(num_clients)]
        else:
            test, _ = dirichlet_partition(test_labels, None, num_clients, beta, rng)
    if not all(map(len, [*train, *test])):
        raise UserError("a client got no training or no test sample; use fewer --clients or a "
                        "larger --beta")
    return [(a, b + first_test) for a, b in zip(train, test, strict=True)]


# ------------------------------------------------------------------------------------------------
# Text sets
# ------------------------------------------------------------------------------------------------


@dataclass
class TextSet:
    """Labelled texts. train, test: lists of str; train_labels, test_labels: (N,) int64 arrays.

    train_groups, test_groups: the domain of every text, all 0 where a set knows none; probes:
    public unlabelled texts, empty where a set brings none.
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


def load_texts(name, data_dir, seed=0, probes=None, num_probes=0):
    """The TextSet `name`, one of TEXT_SETS or "csv:PATH"; downloads into data_dir if it can.

    probes: a file of public texts, one a line; without it a set's own are taken, and a set that has
    none gives up num_probes > 0 of its training texts. seed matters for what is generated and which
    texts are given up. UserError: unknown name, missing, empty or damaged files, no network (the
    message says which files to put where), fewer than 4 probes.
    """
    texts = _load_texts(name, data_dir, seed)
    if probes is not None:
        texts.probes = _read_probes(probes)
    elif num_probes and not texts.probes:
        _set_probes_apart(texts, num_probes, numpy_generator(seed, "probes"))
    return texts


def _load_texts(name, data_dir, seed):
    if name in ("topics", "topics-same"):
        return topics(seed, same=name == "topics-same")
    if name.startswith("csv:"):
        return _csv_set(Path(name.partition(":")[2]))
    if name not in TEXT_FILES:
        raise UserError(
            f"unknown text set {name!r}; there are {', '.join(TEXT_SETS)} and csv:PATH")
    folder, files, url = TEXT_FILES[name]
    root = Path(data_dir) / folder
    if not all((root / f).exists() for f in files):
        _fetch_texts(name, root, files, url)
    read = {"trec": _read_trec, "ag-news": _read_ag_news, "sst2": _read_sst2}[name]
    parts = [read(root / f) for f in files]
    for f, (texts, labels) in zip(files, parts, strict=True):
        if not texts or len(set(labels)) < 2:
            raise UserError(f"{root / f} holds {len(texts)} texts of {len(set(labels))} classes; "
                            f"expected the file of {url}")
    classes = {"trec": TREC_CLASSES, "ag-news": AG_CLASSES, "sst2": ["negative", "positive"]}[name]
    return _text_set(name, classes, *parts)


def _text_set(name, classes, train, test):
    (texts, labels), (test_texts, test_labels) = train, test
    return TextSet(name, classes, texts, np.array(labels, dtype=np.int64), test_texts,
                   np.array(test_labels, dtype=np.int64), np.zeros(len(texts), dtype=np.int64),
                   np.zeros(len(test_texts), dtype=np.int64), [])


def _read_probes(path):
    try:
        lines = [x.strip() for x in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--probes {path} cannot be read ({error})") from None
    lines = [line for line in lines if line]
    if len(lines) < 4:
        raise UserError(f"--probes {path}: lines with text: {len(lines)}; a covariance needs at "
                        "least 4 texts, one a line, better 96")
    return lines


def _set_probes_apart(texts, count, rng):
    """Moves `count` training texts, at most a quarter, to the probes; nobody sees their labels."""
    apart = rng.permutation(len(texts.train))[:min(count, len(texts.train) // 4)]
    if len(apart) < 4:
        raise UserError(f"{texts.name} has {len(texts.train)} training texts, too few to set "
                        "probes apart; add texts or name --probes FILE")
    kept = np.setdiff1d(np.arange(len(texts.train)), apart)
    texts.probes = [texts.train[i] for i in apart]
    texts.train = [texts.train[i] for i in kept]
    texts.train_labels, texts.train_groups = texts.train_labels[kept], texts.train_groups[kept]


def text_clients(texts, num_clients, alpha, seed=0):
    """Clients take turns over a set's domains; each domain is cut by a Dirichlet(alpha) draw.

    -> K pairs (train, test) of int64 tensors, numbers into the pool of all training texts followed
    by all test texts, and the domain of each client. UserError: a domain without a client, or as
    dirichlet_partition.
    """
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
                                    alpha, numpy_generator(seed, "partition", int(g)))
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


def _lines(path, encoding="utf-8"):
    """The non-empty lines of a text file with their numbers."""
    try:
        text = Path(path).read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {encoding} text ({error})") from None
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_trec(path):
    """Lines "COARSE:fine question", latin-1 -> texts, coarse labels."""
    texts, labels = [], []
    for i, line in _lines(path, "latin-1"):
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
    with open(path, newline="", encoding="utf-8") as handle:
        for i, row in enumerate(csv.reader(handle), 1):
            if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
                raise UserError(f"{path}, row {i}: expected class 1-4, title, description; "
                                f"got {str(row)[:60]}")
            texts.append(f"{row[1]} {row[2]}")
            labels.append(int(row[0]) - 1)
    return texts, labels


def _read_sst2(path):
    """Lines "sentence<TAB>0 or 1", with or without a header -> texts, labels."""
    texts, labels = [], []
    for i, line in _lines(path):
        text, _, label = line.rstrip("\r").rpartition("\t")
        if i == 1 and label == "label":
            continue
        if label not in ("0", "1") or not text:
            raise UserError(f"{path}, line {i}: expected 'sentence<TAB>0 or 1', got {line[:60]!r}")
        texts.append(text)
        labels.append(int(label))
    return texts, labels


def _csv_set(path):
    """A file of rows label,text; every fifth row of a class (at least one) is the test."""
    if not path.is_file():
        raise UserError(f"csv:{path}: there is no such file; expected rows label,text")
    with open(path, newline="", encoding="utf-8", errors="replace") as handle:
        rows = [row for row in csv.reader(handle) if row]
    for i, row in enumerate(rows, 1):
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise UserError(f"{path}, row {i}: expected label,text, got {str(row)[:60]}")
    classes = sorted({row[0] for row in rows})
    parts = [[], []], [[], []]  # (texts, labels) to train and to test on
    for c, name in enumerate(classes):
        texts = [text for label, text in rows if label == name]
        if len(texts) < 2:
            raise UserError(f"{path}: class {name!r} has one row; at least 2 are needed, "
                            "one of them for the test")
        for i, text in enumerate(texts):
            part = parts[i % 5 == min(4, len(texts) - 1)]
            part[0].append(text)
            part[1].append(c)
    if len(classes) < 2:
        raise UserError(f"{path} has {len(classes)} classes; expected rows label,text of at least "
                        "2")
    return _text_set(path.stem, classes, *parts)


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
    return TextSet("topics", [f"class {c}" for c in range(5)], train, labels, test, test_labels,
                   groups, test_groups, probes)


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

    config, place, options = text_config(model, cache_dir)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    kind = type(meta_model(model, config)).__name__
    try:
        # Who says so means tokenizer.json as it is. The library's choice goes by the model: a Qwen2
        # gets the rules of Qwen2's own words, whatever the file says
        plain = str(get_tokenizer_config(place, **options).get("tokenizer_class")) in (
            "TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(
            place, **options)
        encoder, found = AutoModel.from_pretrained(
            place, config=config, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, **options)
    except Exception as error:  # network, file, safetensors, tokenizer and key errors
        raise UserError(
            f"cannot load --model {model}, a {kind} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). {EXPECTED_MODEL}") from None
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
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # only the state of one token is read
    left = len(found["unexpected_keys"])  # of a head, as a rule
    encode = _text_reader(model, encoder.eval(), tokenizer, max_length,
                          [f"{left} other weights of the file left out"] if left else [])
    _check_split(model, encoder, encode, texts)
    encode.seen.clear()
    return encoder, encode


def text_config(model, cache_dir):
    """The configuration of a directory, config.json or hub id -> it, its place, further options.

    Place and options are for the library's from_pretrained. The hub is asked once: where it does
    not answer, the place is the copy in cache_dir (the library would ask for every file six times).
    """
    import huggingface_hub as hub
    from transformers import AutoConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place, options = str(model), {"cache_dir": str(cache_dir), "trust_remote_code": False}
    try:
        if not Path(place).exists():
            try:
                hub.get_hf_file_metadata(hub.hf_hub_url(place, "config.json"))
            except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
                pass  # it has answered, or cannot be asked; the library says how
            except Exception as error:  # no network, or HF_HUB_OFFLINE
                try:
                    place = hub.snapshot_download(place, cache_dir=cache_dir, local_files_only=True)
                except hub.errors.LocalEntryNotFoundError:
                    raise UserError(f"{cache_dir} has no copy, and the hub does not answer: "
                                    f"{str(error)[:100]}") from None
        return AutoConfig.from_pretrained(place, **options), place, options
    except Exception as error:  # hub, file, JSON and key errors
        why = " ".join(str(error).split())[:250]
        if not Path(place).exists():
            why = f"there is no such directory ({why})"
        raise UserError(f"cannot load --model {model}: {why}. {EXPECTED_MODEL}") from None


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
    gets the mean number of images a class); client_tests: see federated_clients.
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

    @property
    def num_classes(self):
        return len(self.class_names)


class Images:
    """A sequence of RGB PIL images over an (N, H, W[, 3]) uint8 array or a list of files."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        from PIL import Image

        item = self.source[i]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item).convert("RGB")
        try:
            with Image.open(item) as image:
                return image.convert("RGB")
        except Exception as error:  # PIL: OSError, ValueError, SyntaxError, DecompressionBombError
            raise UserError(f"{item} is not a readable image ({error})") from None

    def subset(self, indices):
        """The images at `indices`, in that order."""
        if isinstance(self.source, np.ndarray):
            return Images(self.source[indices])
        return Images([self.source[i] for i in indices])

    @staticmethod
    def concat(first, second):
        """`first` followed by `second` (both of one kind)."""
        if isinstance(first.source, np.ndarray):
            return Images(np.concatenate([first.source, second.source]))
        return Images([*first.source, *second.source])


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


def load_images(name, data_dir, seed=0):
    """The ImageSet `name`, one of IMAGE_SETS or "folder:PATH"; downloads into data_dir if it can.

    seed: what `shapes` is drawn from, and how Food-101, DTD and Pets are split. UserError: unknown
    name, missing or empty files, no network (the message says what to put where).
    """
    data_dir = Path(data_dir)
    if name.startswith("folder:"):
        return _folder_set(Path(name.partition(":")[2]))
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
    coarse = None
    if name == "cifar100":
        parent = {fine: i for i, names in enumerate(CIFAR100_COARSE) for fine in names.split()}
        coarse = np.array([parent[c] for c in classes])
    order = FASHION_ORDER if name == "fashion-mnist" else None
    return ImageSet(name, [readable(c) for c in classes], template, train, labels, test,
                    test_labels, coarse, tail_order=order)


def _folder_set(path):
    """train/<class>/* and test/<class>/*; without test/ a fifth of each class is the test."""
    if not path.is_dir():
        raise UserError(
            f"folder:{path}: there is no such folder; expected {path}/train/<class>/*.jpg "
            f"and {path}/test/<class>/*.jpg")
    if not (path / "train").is_dir() and (path / "test").is_dir():
        raise UserError(
            f"folder:{path} has test/ but no train/; expected train/<class>/* and test/<class>/*")
    has_split = (path / "train").is_dir()
    classes, train, labels = _image_tree(path / "train" if has_split else path)
    if (path / "test").is_dir():
        test_classes, test, test_labels = _image_tree(path / "test")
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise UserError(f"folder:{path}: train/ and test/ must have the same classes; "
                            f"only one of them has {', '.join(odd[:5])}")
    else:
        late = np.concatenate([np.flatnonzero(labels == c)[max(1, int(.8 * (labels == c).sum())):]
                               for c in range(len(classes))])
        if len(np.unique(labels[late])) < len(classes):
            raise UserError(
                f"folder:{path} has no test/ and too few images in some class to hold out a "
                "fifth of each; add test/<class>/* or at least 2 images per class")
        early = np.setdiff1d(np.arange(len(labels)), late)
        test, test_labels = [train[i] for i in late], labels[late]
        train, labels = [train[i] for i in early], labels[early]
    names = [readable(c.replace("-", " ")) for c in classes]
    return ImageSet(path.name, names, PHOTO, Images(train), labels, Images(test), test_labels)


def _image_tree(root):
    """Class names, files and labels of root/<class>/*; every class folder must hold an image."""
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(
            f"{root} has {len(classes)} class folders; expected at least 2 (<class>/*.jpg)")
    from torchvision.datasets.folder import IMG_EXTENSIONS as endings

    files, labels = [], []
    for c, name in enumerate(classes):
        mine = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in endings)
        if not mine:
            raise UserError(f"the class folder {root / name} holds no images ({' '.join(endings)})")
        files += mine
        labels += [c] * len(mine)
    return classes, files, np.array(labels, dtype=np.int64)


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
    parts = []
    for split in ("train", "test"):
        path = root / f"{prefix}_LT_{split}.txt"
        if not path.exists():
            raise UserError(f"{path} is missing; put into {root}: {wanted}")
        parts.append(read_list_file(path, root))
    (train, labels), (test, test_labels) = parts
    if name == "imagenet":
        import open_clip
        names = list(open_clip.IMAGENET_CLASSNAMES)
    else:  # a Places path names its class: data_256/a/airfield/00000001.jpg
        first = {int(c): train[i] for i, c in reversed(list(enumerate(labels)))}
        folders = {c: " ".join(path.parts[len(root.parts) + 2:-1]) for c, path in first.items()}
        names = [readable(folders.get(c, f"class {c}")) for c in range(int(labels.max()) + 1)]
    if labels.max() >= len(names) or test_labels.max() >= len(names):
        raise UserError(f"{root}: a label is larger than the {len(names)} classes of {name}")
    tests = {"imagenet": "balanced", "places": "own draw"}[name]  # as FedPuReL's authors
    return ImageSet(name, names, PHOTO, Images(train), labels, Images(test), test_labels,
                    long_tailed=True, client_tests=tests)


def read_list_file(path, root):
    """Lines "path label" -> (files under root, (N,) int64 labels); UserError if damaged."""
    files, labels = [], []
    for i, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdigit():
            raise UserError(f"{path}, line {i}: expected 'path label', got {line[:60]!r}")
        files.append(root / name)
        labels.append(int(label))
    if not files:
        raise UserError(f"{path} is empty; expected lines 'path label'")
    if not files[0].exists():
        raise UserError(f"{path} names {files[0]}, which does not exist; put the images there")
    return files, np.array(labels, dtype=np.int64)


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
        if not files[0].exists():
            raise UserError(
                f"{path} names {files[0]}, which does not exist; unpack {DOGS_URL}images.tar "
                f"into {root}")
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


def pixel_transform(size, mean, std, interpolation="bicubic", crop=None):
    """Resize to (size, size) and normalise; `crop` (least area): random resized crop and flip."""
    from torchvision import transforms

    interpolation = transforms.InterpolationMode(interpolation)
    first = [transforms.Resize((size, size), interpolation)] if crop is None else \
        [transforms.RandomResizedCrop(size, (crop, 1.0), interpolation=interpolation),
         transforms.RandomHorizontalFlip()]
    return transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(mean, std)])


def official_cifar_transform(name, size):
    """What FedPuReL's authors do to "cifar100" or "cifar10": normalise, then resize, bilinear.

    In this order and without antialiasing, unlike pixel_transform.
    """
    from torchvision import transforms

    return transforms.Compose([
        transforms.ToTensor(), transforms.Normalize(*CIFAR_STATISTICS[name]),
        transforms.Resize((size, size), transforms.InterpolationMode.BILINEAR, antialias=False)])


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


MILD = {"noise": .08, "contrast": .9}
SHIFTED = {"noise": .1, "contrast": .9}
TINT = .13  # standard deviation of a class's own colour offset downstream (of 1)


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


def shapes(seed, n_max=200, imbalance=100, n_test=20):
    """The small world: a long-tailed training part and a balanced test part of *shifted* tiles.

    Which class is frequent is drawn from the seed. The tiny CLIP that goes with it (tiny_backbone)
    has seen clean and mildly noisy tiles only, in equal numbers: it is balanced, and beatable. The
    shift is mostly each class's own (a tint, the brightness of the dark parts): a shift that all
    classes share (noise, clutter) is learned on the frequent classes for the rare ones too, and
    then tuning erodes nothing.
    """
    rng = numpy_generator(seed, "shapes", "downstream")
    classes = len(COLOURS) * len(TEXTURES)
    counts = np.array(long_tail_counts(n_max, classes, imbalance))[rng.permutation(classes)]
    own = {"tints": rng.normal(0, TINT, (classes, 3)), "shades": rng.uniform(.05, .55, classes)}
    train, labels = render_tiles(counts, rng, **own, **SHIFTED)
    test, test_labels = render_tiles([n_test] * classes, rng, **own, **SHIFTED)
    names = [f"{c} {t}" for c in COLOURS for t in TEXTURES]
    return ImageSet("shapes", names, SHAPE_TEMPLATE, Images(train), labels, Images(test),
                    test_labels, long_tailed=True)


def shapes_pretraining(seed, per_class=60):
    """Balanced tiles for the tiny CLIP: half clean, half mildly noisy."""
    rng = numpy_generator(seed, "shapes", "pretraining")
    clean, labels = render_tiles([per_class // 2] * 100, rng)
    mild, _ = render_tiles([per_class // 2] * 100, rng, **MILD)
    return Images(np.concatenate([clean, mild])), np.concatenate([labels, labels])


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

    family: "vtab", "fgvc", "folder", "cifar100" or "planted"; it decides the transforms.
    """
    name: str
    family: str
    num_classes: int
    train: tuple
    val: tuple
    test: tuple

    def train_and_val(self):
        """Both, for the final run of a protocol that has chosen its settings."""
        (a, y), (b, z) = self.train, self.val
        return Images.concat(a, b), np.concatenate([y, z])


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


def load_splits(name, data_dir, seed=0):
    """The Splits of one of TRANSFER_SETS or "folder:PATH".

    seed: which 1,000 of CIFAR-100's training images are drawn (800 and 200, the rest is not used),
    and which fifth of a folder's training images is the validation part. UserError if files are
    missing (the message says what to put where).
    """
    data_dir, family = Path(data_dir), name.partition("-")[0]
    if name in TRANSFER_SETS and family == "vtab":
        return _vtab_task(name.partition("-")[2], data_dir / "vtab-1k")
    if name in TRANSFER_SETS and family == "fgvc":
        return _fgvc_set(name.partition("-")[2], data_dir / "fgvc")
    if name != "cifar100" and not name.startswith("folder:"):
        raise UserError(f"unknown data set {name!r}; there are {', '.join(TRANSFER_SETS)} and "
                        "folder:PATH")
    images = load_images(name, data_dir)
    order = numpy_generator(seed, "splits", name).permutation(len(images.train_labels))
    cut = 800 if name == "cifar100" else int(.8 * len(order))
    if not 0 < cut < len(order):
        raise UserError(f"{name} has {len(order)} training images; expected at least 2")
    parts = [(images.train.subset(part), images.train_labels[part])
             for part in (order[:cut], order[cut:1000] if name == "cifar100" else order[cut:])]
    return Splits(name, name.partition(":")[0], images.num_classes, *parts,
                  (images.test, images.test_labels))


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
        files, labels = read_list_file(path, root / task)
        parts.append((Images(files), labels))
    return _checked_splits(f"vtab-{task}", VTAB_TASKS[task], parts, root / task)


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
        try:
            lists.append({str(file): int(c) for file, c in json.loads(path.read_text()).items()})
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path}: expected one JSON object {{image: class}}") from None
        first = root / folder / images / next(iter(lists[-1]), "")
        if not first.is_file():
            raise UserError(f"{path} names {first}, which does not exist; put the images there")
    number = {c: i for i, c in enumerate(sorted(set(lists[0].values())))}  # some count from 1
    unknown = {c for part in lists for c in part.values()} - set(number)
    if unknown:
        raise UserError(f"{root / folder}: class {min(unknown)} has no training image")
    parts = [(Images([root / folder / images / file for file in part]),
              np.array([number[c] for c in part.values()], dtype=np.int64)) for part in lists]
    return _checked_splits(f"fgvc-{name}", classes, parts, root / folder)


def _checked_splits(name, classes, parts, root):
    """Splits whose labels fit the number of classes; UserError otherwise."""
    largest = max(labels.max() for _, labels in parts)
    if largest >= classes:
        raise UserError(f"{root}: label {largest} is too large for the {classes} classes of {name}")
    return Splits(name, name.partition("-")[0], classes, *parts)


def transfer_transforms(family, size, mean, std):
    """(transform for testing, random transform for training or None) of a family of sets.

    VTAB: straight to size x size, bilinear, no augmentation. FGVC: short side 256 (for 224), crop,
    flip. Folders and CIFAR-100 are read like VTAB.
    """
    if family != "fgvc":
        return pixel_transform(size, mean, std, "bilinear"), None
    from torchvision import transforms

    short = transforms.Resize(round(size * 256 / 224), transforms.InterpolationMode.BILINEAR)
    last = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return (transforms.Compose([short, transforms.CenterCrop(size), *last]),
            transforms.Compose([short, transforms.RandomCrop(size),
                                transforms.RandomHorizontalFlip(), *last]))


def frozen_vit(model, eps, seed, device, data_dir, progress=lambda items, *_, **__: items):
    """`tiny_vit` (model "tiny") or `vit_backbone`, from and into the folders under data_dir."""
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
    """What all methods on a transfer set share: a frozen ViT, its training and its test part."""
    vit: torch.nn.Module
    num_classes: int
    train: TransferPart
    test: TransferPart
    augment: bool  # whether training images are read through a random transform
    truth: list = None  # the planted number of prompts per block


def transfer_task(splits, vit, norm="half", validate=False, workers=0, device="cpu", truth=None):
    """Splits as a ViT reads them -> TransferTask. norm: pixel statistics, "half" or "imagenet".

    validate: train on the training and test on the validation part. Else training takes both, but
    for FGVC, whose final run leaves the validation part out, as VPT's does.
    """
    size = vit.config.image_size
    size = size if isinstance(size, int) else size[0]
    mean, std = ((.5,) * 3, (.25 if splits.family == "planted" else .5,) * 3)
    if norm == "imagenet":
        mean, std = (.485, .456, .406), (.229, .224, .225)
    read = transfer_transforms(splits.family, size, mean, std)
    both = not validate and splits.family != "fgvc"
    seen = splits.train_and_val() if both else splits.train
    train = TransferPart(*seen, *read, workers, device)
    test = TransferPart(*(splits.val if validate else splits.test), *read, workers, device)
    if read[1] is None:  # the same pixels in every epoch
        train.embed_once(vit)
    if splits.family == "planted":
        test.embed_once(vit)
    return TransferTask(vit, splits.num_classes, train, test, read[1] is not None, truth)


def vit_backbone(model, eps, seed, device, cache_dir):
    """A frozen transformers.ViTModel from a hub id or a directory, with LayerNorm ε = `eps`.

    transformers 5.17 or newer: its blocks, ViTModel.layers, return a tensor (before: encoder.layer,
    tuples). UserError if it cannot be loaded, is no ViT, or is a masked autoencoder: PRO-VPT's
    authors read MAE by the mean of patches and prompts, the class token of such a model says less.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    seed_torch(seed, "unused weights of a checkpoint")
    try:
        kind = transformers.AutoConfig.from_pretrained(model, cache_dir=str(cache_dir)).model_type
        vit, found = transformers.ViTModel.from_pretrained(
            model, add_pooling_layer=False, layer_norm_eps=eps, cache_dir=str(cache_dir),
            dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # hub, network, JSON, safetensors and key errors of four libraries
        raise UserError(
            f"--model {model}: cannot load it as a ViT ({type(error).__name__}: "
            f"{str(error)[:200]}). Expected a hub id, or a directory with config.json and "
            "model.safetensors") from None
    if kind == "vit_mae":
        raise UserError(f"--model {model} is a masked autoencoder (vit_mae), which is read by the "
                        "mean of its patches and prompts; here the class token is read: name a ViT "
                        "that was trained with one, such as google/vit-base-patch16-224-in21k")
    if found["missing_keys"] or found["mismatched_keys"]:
        raise UserError(f"--model {model} is not a ViT: it lacks {len(found['missing_keys'])} of "
                        "its weights")
    return vit.eval().requires_grad_(False).to(device)


PLANTED_TRUTHS = ([0, 20, 4, 0, 0, 0], [0, 0, 0, 4, 20, 0], [12, 0, 0, 12, 0, 0],
                  [0, 0, 16, 8, 0, 0], [4, 0, 0, 0, 0, 20])
PLANTED_SIZE, PLANTED_CLASSES = 24, 6
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

    key = cache_key(seed, config.to_json_string(), inspect.getsource(_pretrain_vit),
                    inspect.getsource(render_tile))
    vit.load_state_dict(cached(Path(cache_dir) / f"tiny-vit-{key}.pt", make, "a cached tiny ViT"))
    return vit.eval().requires_grad_(False).to(device)


def _pretrain_vit(vit, seed, progress, per_class=40, epochs=8, batch=64, lr=2e-3):
    """Cross-entropy on 4,000 tiles of 100 classes, with a linear head that is thrown away."""
    rng = numpy_generator(seed, "tiny-vit", "tiles")
    tiles, labels = render_tiles([per_class] * 100, rng, **MILD, size=PLANTED_SIZE)
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
    image -> (3, size, size), as the model was trained, and with random crop and flip.
    """
    clip: torch.nn.Module
    tokenizer: object
    transform: object
    random_transform: object
    size: int


def open_clip_backbone(model, weights, seed, device, cache_dir):
    """`model` "NAME:PRETRAINED" or "NAME:random", or "NAME" with a checkpoint file `weights`.

    UserError: unknown names (the message lists the tags), a missing or foreign file, no network.
    """
    import open_clip  # slow to import, and only needed here
    name, _, tag = model.partition(":")
    if name not in open_clip.list_models():
        close = ", ".join(difflib.get_close_matches(name, open_clip.list_models())) or "its list"
        raise UserError(f"--model {name!r} is not an open_clip model; see {close}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None and tag not in ["random", *tags]:
        raise UserError(f"--model {name} needs :PRETRAINED, one of {', '.join([*tags, 'random'])}, "
                        "or --weights FILE")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"--weights {weights} does not exist; expected a checkpoint of {name}")
    source = str(weights) if weights else None if tag == "random" else tag
    seed_torch(seed, "random CLIP")
    logging.disable(logging.CRITICAL)  # open_clip logs what the line below says
    try:
        clip, _, transform = open_clip.create_model_and_transforms(
            name, source, device=device, cache_dir=str(cache_dir))
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # hub, network, pickle and key errors of three libraries
        what = f"read {weights} as {name}" if weights else f"download {model}"
        raise UserError(
            f"cannot {what} ({type(error).__name__}: {str(error)[:200]}). Without a network, "
            f"get the checkpoint elsewhere and say --model {name} --weights FILE") from None
    finally:
        logging.disable(logging.NOTSET)
    size = clip.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    crop = pixel_transform(size, clip.visual.image_mean, clip.visual.image_std, crop=.08)
    return Backbone(clip.eval(), tokenizer, transform, crop, size)


def encode_once(clip, pool, device, cache_dir, progress=lambda items, *_, **__: items):
    """Image features (N, E) of an ImagePool before normalisation, cached under what made them."""
    source = pool.images.source
    if isinstance(source, np.ndarray):
        made_of = source.tobytes()
    else:
        stats = [Path(p).stat() for p in source]
        made_of = repr([(str(p), s.st_size, s.st_mtime_ns)
                        for p, s in zip(source, stats, strict=True)]).encode()
    weights = [p.double().sum().item() for p in clip.visual.state_dict().values()]
    key = cache_key(
        hashlib.blake2b(made_of).hexdigest(), weights, repr(pool.transform), device.type)

    @torch.no_grad()
    def encode():
        chunks = [range(i, min(i + 64, len(pool))) for i in range(0, len(pool), 64)]
        batches = progress(pool.batches(chunks), "encoding images once", total=len(chunks))
        return torch.cat([clip.encode_image(batch.to(device)).cpu() for batch in batches])

    return cached(Path(cache_dir) / f"features-{key}.pt", encode,
                  "cached image features").to(device)


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

    def __call__(self, texts):
        """A string or list of N strings -> (N, context_length) int64."""
        texts = [texts] if isinstance(texts, str) else texts
        out = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *(self.ids.get(w, 1) for w in self.words(text)), self.end]
            if len(ids) > self.context_length:
                raise UserError(f"the text {text!r} is longer than the tiny model's "
                                f"{self.context_length} tokens")
            row[:len(ids)] = torch.tensor(ids)
        return out


@dataclass
class TinyConfig:
    """Size and pre-training of the tiny CLIP (defaults: shapes; about 35 s on one CPU core)."""
    width: int = 64
    vision_layers: int = 3
    text_layers: int = 2
    patch: int = 8
    image_size: int = 32
    epochs: int = 6
    batch: int = 64
    lr: float = 3e-3
    augment: bool = False
    mean: tuple = (.5, .5, .5)
    std: tuple = (.25, .25, .25)


PHOTO_TINY = TinyConfig(epochs=16, batch=100, lr=2e-3, augment=True)


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
    transform = pixel_transform(config.image_size, config.mean, config.std)
    pixels = torch.stack([transform(images[i])
                          for i in progress(range(len(images)), "reading images")])
    key = cache_key(config, seed, captions, list(labels),
                    hashlib.blake2b(pixels.numpy()).hexdigest(), inspect.getsource(_pretrain),
                    inspect.getsource(WordTokenizer))

    def make():
        _pretrain(clip, pixels, torch.as_tensor(labels), tokenizer(captions), config, seed,
                  progress)
        return clip.state_dict()

    path = Path(cache_dir) / f"tiny-clip-{key}.pt"
    clip.load_state_dict(cached(path, make, "a cached tiny CLIP"))
    crop = pixel_transform(config.image_size, config.mean, config.std, crop=.5)
    return Backbone(clip.eval().to(device), tokenizer, transform, crop, config.image_size)


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

    def text(self, template):
        """Normalised text features (C, E) of the classes' names in a caption with {}."""
        tokens = self.tokenizer([template.format(name) for name in self.class_names])
        return text_features(self.clip, tokens.to(self.labels.device))


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


def load_federation(args, run, official_cifar=False):
    """Everything of a federated run that is not its method -> FederatedImages.

    args: the flags of the groups "data" and "model" of fedpurel.py, and seed and data_dir; run: a
    common.Run; official_cifar: see official_cifar_transform. Every draw follows the seed, each with
    a generator of its own. UserError: what the parts refuse.
    """
    name, tiny, pretraining = image_set_name(args.dataset), args.model == "tiny", None
    with run.rank_zero_first():  # it may download
        images = load_images(name, args.data_dir, args.seed)
    if tiny and name == "shapes":
        pretraining = shapes_pretraining(args.seed)
    elif tiny:
        rng = numpy_generator(args.seed, "pretrain-share")
        *pretraining, images = split_for_pretraining(images, args.pretrain_share, rng)
    images = long_tailed(images, args.imbalance, args.n_max, args.class_order, args.seed)
    clients = federated_clients(images, images.train_labels, args.clients, args.beta,
                                numpy_generator(args.seed, "partition"))
    rule = args.groups or ("thirds" if images.num_classes < 30 else "100,20")
    counts = np.bincount(images.train_labels, minlength=images.num_classes)
    groups = frequency_groups(counts, group_rule(rule))

    with run.rank_zero_first():  # it may download, or pre-train
        backbone = _federation_backbone(args, name, images, pretraining, run)
    if official_cifar and name in CIFAR_STATISTICS:
        backbone.transform = official_cifar_transform(name, backbone.size)
    clip = backbone.clip.requires_grad_(False)
    check_towers(clip, args.peft)
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
        causal = getattr(clip, "attn_mask", None) is not None
        causal = causal and getattr(clip, "text_pool_type", "") == "argmax"
        if not causal or not plain(getattr(getattr(clip, "transformer", None), "resblocks", [])):
            raise UserError("--peft prompt needs CLIP's causal text transformer; try "
                            "--peft adapter")
    if peft == "lora":
        tower = getattr(clip.visual, "transformer", None)
        if not plain(getattr(tower, "resblocks", [])):
            raise UserError("--peft lora needs a ViT vision tower of open_clip; try "
                            "--peft adapter")


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

    def __init__(self, name, function, lower, upper, ideal, nadir, source, hv_nadir=None,
                 front=None):
        self.name, self.function, self.source, self.front = name, function, source, front
        self.lower, self.upper, self.ideal, self.nadir = (
            torch.as_tensor(v, dtype=torch.float64) for v in (lower, upper, ideal, nadir))
        self.hv_nadir = self.nadir if hv_nadir is None else \
            torch.as_tensor(hv_nadir, dtype=torch.float64)
        self.n_var, self.n_obj = len(self.lower), len(self.nadir)
        self.stand_in = False  # True: MTMO with a random rotation in place of the competition's

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

    Without the file a seeded Gaussian matrix / √size stands in. -> (matrix, whether it was found).
    UserError when the file holds something else.
    """
    path = Path(data_dir) / "mtmo" / f"{name}.txt"
    if not path.exists():
        drawn = numpy_generator(seed, "mtmo", name).normal(size=(size, size)) / math.sqrt(size)
        return torch.from_numpy(drawn), False
    try:
        matrix = np.loadtxt(path)
    except ValueError:
        matrix = np.empty(0)
    if matrix.shape != (size, size) or not np.isfinite(matrix).all():
        raise UserError(f"{path} must hold {size} x {size} plain numbers, blanks between them")
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


def get_problem(name, data_dir="data", seed=0, shift=0.0, noise=False):
    """The Problem `name`, one of PROBLEMS (any case) or "file.py:Name" for the user's own.

    data_dir: where mtmo/*.txt may lie; shift: see _mtmo (MTMO only, a fraction of half the width);
    noise: RE91's four random variables are drawn at every call from `seed`, else at their means.
    UserError: unknown name (the message lists what exists), a file that does not fit.
    """
    if ".py:" in name:
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
    """The Problems of several names; UserError unless what they call themselves differs."""
    problems = [get_problem(name, data_dir, seed, shift) for name in names]
    if len({p.name for p in problems}) < len(problems):
        raise UserError("--problems: results are kept by name, so names must differ; got "
                        + ", ".join(p.name for p in problems))
    return problems


def _own_problem(spec):
    """A callable (N, n) -> (N, m) with lower, upper, n_obj and, if it has them, ideal and nadir.

    Without these they come from 20,000 random points: minimum, and maximum of the non-dominated.
    UserError in one line for whatever is wrong with the file.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--problems {spec}: there is no file {path}")
    try:
        found = runpy.run_path(path)[name]
        found = found() if isinstance(found, type) else found
        lower, upper, n_obj = found.lower, found.upper, int(found.n_obj)
        own = Problem(name, found, lower, upper, [0] * n_obj, [1] * n_obj, path)
        x = own.scale(torch.from_numpy(numpy_generator(0, "own").random((20000, own.n_var))))
        f = own(x).detach()
        fits = f.shape == (len(x), n_obj) and n_obj > 1 and own.lower.shape == own.upper.shape \
            and bool(torch.isfinite(f).all() and (own.lower < own.upper).all())
        if fits:
            best = f[non_dominated(f)]
            own.ideal, own.nadir = (
                torch.as_tensor(getattr(found, key, value), dtype=torch.float64).expand(n_obj)
                for key, value in (("ideal", best.amin(0)), ("nadir", best.amax(0))))
    except (Exception, SystemExit) as error:  # anything can go wrong in a user's file
        raise UserError(
            f"--problems {spec}: expected a callable (N, n) -> (N, m) with lower, upper and n_obj; "
            f"got {type(error).__name__}: {error}") from None
    if not fits:
        raise UserError(f"--problems {spec}: expected lower < upper and finite values of shape "
                        f"({len(x)}, {n_obj}) with n_obj >= 2; got shape {tuple(f.shape)}")
    if not (own.ideal < own.nadir).all():
        raise UserError(f"--problems {spec}: expected ideal < nadir, got {own.ideal.tolist()} and "
                        f"{own.nadir.tolist()}; do the objectives conflict?")
    own.function = lambda x: found(x.reshape(-1, own.n_var)).reshape(*x.shape[:-1], n_obj)
    own.hv_nadir, own.front = own.nadir, getattr(found, "front", None)
    return own


def reference_front(problem, count=1000, steps=1000):
    """Points (N, m) of the Pareto front: the formula where there is one, else a long search.

    The search optimises `count` solutions directly, without any network: each minimises the smooth
    Tchebycheff value (μ = 0.02) of its own Das-Dennis preference by Adam, from a spread start; what
    is not dominated is kept. Deterministic.
    """
    if problem.front is not None:
        return problem.front(count).detach()
    preferences = das_dennis(problem.n_obj, count).clamp_min(1e-4)
    start = numpy_generator(0, "reference", problem.name).normal(
        size=(len(preferences), problem.n_var))
    u = torch.from_numpy(start).requires_grad_()
    optimizer = torch.optim.Adam([u], lr=.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        f = (problem(problem.scale(u.sigmoid())) - problem.ideal) / (problem.nadir - problem.ideal)
        loss = torch.logsumexp(preferences * f / .02, -1).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        f = problem(problem.scale(u.sigmoid()))
    return f[non_dominated(f)]
