"""Everything that produces inputs: image sets, long tails, clients, small offline worlds.

Image sets   `load_images(name, data_dir, seed)` -> ImageSet: CIFAR, Food-101, DTD, Aircraft, Pets,
             Fashion-MNIST through torchvision; Stanford Dogs, ImageNet-LT and Places-LT from their
             own files; `folder:PATH` from any ImageFolder tree; `shapes` rendered here.
Long tail    `long_tail_counts`, `long_tail_indices`, `frequency_groups`
Clients      `pachinko_partition` (two label levels), `dirichlet_partition`
Text sets    `load_texts`: TREC, AG News, SST-2, csv:PATH, `topics`; `tiny_bert`, `text_encoder`
Reading      `ImagePool`: images through a transform, in memory when they are small
CLIP         `open_clip_backbone` (any open_clip model), `tiny_backbone` (pre-trained on the spot),
             `encode_once` (image features, cached)
"""
import csv
import difflib
import hashlib
import inspect
import logging
import re
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common import (
    UserError,
    atomic_write,
    cache_key,
    cached,
    numpy_generator,
    seed_for,
    seed_torch,
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

    train_labels, test_labels: (N,), (M,) ints in 0..C-1; beta > 0
    -> two lists of K sorted int64 arrays (training, test). UserError if no draw serves all.
    """
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


def load_texts(name, data_dir, seed=0):
    """The TextSet `name`, one of TEXT_SETS or "csv:PATH"; downloads into data_dir if it can.

    seed matters for the generated topics and topics-same only. UserError: unknown name, missing,
    empty or damaged files, no network (the message says which files to put where).
    """
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
    """Size and pre-training of the tiny BERT (about 20 s on one CPU core)."""
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

    config = config or TinyBertConfig()
    tokenizer = WordTokenizer(
        [" ".join(w) for w in (*TOPIC_WORDS, *DOMAIN_WORDS, COMMON_WORDS)], TOPICS_WIDTH)
    seed_torch(seed, "tiny-bert", "init")
    model = BertModel(BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=4 * config.width,
        max_position_embeddings=TOPICS_WIDTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=config.init), add_pooling_layer=False)
    key = cache_key(config, seed, tokenizer.ids, inspect.getsource(_pretrain_bert),
                    inspect.getsource(topic_sentences))

    def encode(texts):
        ids = tokenizer(texts)
        return ids, (ids > 0).long()

    def make():
        rng = numpy_generator(seed, "tiny-bert", "sentences")
        each = config.sentences // 15
        texts = [s for d in range(3) for t in range(5) for s in topic_sentences(d, t, each, rng)]
        _pretrain_bert(model, *encode(texts), config, seed, progress)
        return model.state_dict()

    model.load_state_dict(cached(Path(cache_dir) / f"tiny-bert-{key}.pt", make,
                                 "a cached tiny BERT"))
    return model.eval(), encode


def _pretrain_bert(model, ids, mask, config, seed, progress):
    """Masked words (a quarter of each sentence), and [CLS] names the words of the sentence.

    Without the second task nothing is asked of [CLS], and what it holds is an accident of the seed.
    ids, mask: (N, T). Both answers are products with the word embeddings.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    generator = torch.Generator().manual_seed(seed_for(seed, "tiny-bert", "batches"))
    start, end = int(ids[0, 0]), int(ids.max())
    words = F.one_hot(ids, end + 1).sum(1).clamp(max=1).float()  # (N, vocabulary)
    words[:, [0, start, end]] = 0
    model.train()
    for _ in progress(range(config.steps), "pre-training a tiny BERT"):
        here = torch.randint(len(ids), (config.batch,), generator=generator)
        x, m = ids[here], mask[here]
        hidden = (torch.rand(x.shape, generator=generator) < .25) & (m > 0) & (x < start)
        states = model(x.masked_fill(hidden, 1), m).last_hidden_state  # 1: the unknown word
        table = model.embeddings.word_embeddings.weight
        masked = F.cross_entropy(states[hidden] @ table.T, x[hidden])
        said = (states[:, 0] @ table.T).log_softmax(-1)  # (B, vocabulary)
        named = -((said * words[here]).sum(-1) / words[here].sum(-1)).mean()
        optimizer.zero_grad(set_to_none=True)
        (masked + named).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def text_encoder(model, max_length, dropout, cache_dir):
    """A BERT-type encoder and its tokenizer by directory or hub id -> model, encode.

    encode(list of N texts) -> ids and mask, both (N, T) int64 with T <= max_length.
    UserError: neither a directory nor a reachable hub id, or another kind of architecture.
    """
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"cache_dir": str(cache_dir)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        encoder = AutoModel.from_pretrained(
            model, dtype=torch.float32, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, **options)
    except Exception as error:  # hub, network, file, safetensors and key errors
        raise UserError(
            f"cannot load --model {model} ({type(error).__name__}: {str(error)[:200]}). Without a "
            "network, name a directory with config.json, model.safetensors and tokenizer files"
        ) from None
    blocks = getattr(getattr(encoder, "encoder", None), "layer", None)
    if blocks is None or not hasattr(encoder, "embeddings") or \
            not hasattr(getattr(getattr(blocks[0], "attention", None), "self", None), "query"):
        raise UserError(f"--model {model} is a {type(encoder).__name__}; expected a BERT-type "
                        "encoder (embeddings, encoder.layer with attention.self.query)")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # only [CLS] itself is read
    limit = min(max_length, encoder.config.max_position_embeddings)

    def encode(texts):
        out = tokenizer(list(texts), padding=True, truncation=True, max_length=limit,
                        return_tensors="pt")
        return out["input_ids"], out["attention_mask"]

    return encoder.eval(), encode


# ------------------------------------------------------------------------------------------------
# Image sets
# ------------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """A labelled image set with a balanced (or the official) test part.

    train, test: sequences of PIL images (lazily opened); train_labels, test_labels: (N,) int64
    arrays; template: a caption with {} for the class name; coarse: (C,) coarse label of each class,
    if any; long_tailed: True when the training part is long-tailed already.
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
# name -> (torchvision class, its folder under --data-dir, splits to train and test on, caption)
TRAIN, TEST = [{"train": True}], {"train": False}
TORCHVISION_SETS = {
    "cifar100": ("CIFAR100", "cifar-100-python", TRAIN, TEST, PHOTO),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", TRAIN, TEST, PHOTO),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw", TRAIN, TEST, PHOTO),
    "food101": ("Food101", "food-101", [{"split": "train"}], {"split": "test"},
                "a photo of {}, a type of food."),
    "dtd": ("DTD", "dtd/dtd", [{"split": "train"}, {"split": "val"}], {"split": "test"},
            "{} texture."),
    "aircraft": ("FGVCAircraft", "fgvc-aircraft-2013b", [{"split": "trainval"}],
                 {"split": "test"}, "a photo of a {}, a type of aircraft."),
    "pets": ("OxfordIIITPet", "oxford-iiit-pet", [{"split": "trainval"}], {"split": "test"},
             "a photo of a {}, a type of pet."),
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


def readable(name):
    """A class name as words of a caption: underscores become spaces."""
    return " ".join(str(name).replace("_", " ").split())


def load_images(name, data_dir, seed=0):
    """The ImageSet `name`, one of IMAGE_SETS or "folder:PATH"; downloads into data_dir if it can.

    seed matters for `shapes` only, which is drawn from it. UserError: unknown name, missing or
    empty files, no network (the message says what to put where).
    """
    data_dir = Path(data_dir)
    if name.startswith("folder:"):
        return _folder_set(Path(name.partition(":")[2]))
    if name in TORCHVISION_SETS:
        return _torchvision_set(name, data_dir)
    if name == "shapes":
        return shapes(seed)
    if name == "dogs":
        return _dogs_set(data_dir)
    if name in ("imagenet", "places"):
        return _list_file_set(name, data_dir)
    raise UserError(
        f"unknown image set {name!r}; there are {', '.join(IMAGE_SETS)} and folder:PATH")


def _torchvision_set(name, data_dir):
    kind, folder, train_splits, test_split, template = TORCHVISION_SETS[name]
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

    parts = [read(split) for split in train_splits]
    train, labels, classes = parts[0]
    for images, more, _ in parts[1:]:
        train, labels = Images.concat(train, images), np.concatenate([labels, more])
    test, test_labels, _ = read(test_split)
    coarse = None
    if name == "cifar100":
        parent = {fine: i for i, names in enumerate(CIFAR100_COARSE) for fine in names.split()}
        coarse = np.array([parent[c] for c in classes])
    return ImageSet(name, [readable(c) for c in classes], template, train, labels, test,
                    test_labels, coarse)


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
    files, labels = [], []
    endings = torchvision.datasets.folder.IMG_EXTENSIONS
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
        names = list(open_clip.IMAGENET_CLASSNAMES)
    else:  # a Places path names its class: data_256/a/airfield/00000001.jpg
        first = {int(c): train[i] for i, c in reversed(list(enumerate(labels)))}
        folders = {c: " ".join(path.parts[len(root.parts) + 2:-1]) for c, path in first.items()}
        names = [readable(folders.get(c, f"class {c}")) for c in range(int(labels.max()) + 1)]
    if labels.max() >= len(names) or test_labels.max() >= len(names):
        raise UserError(f"{root}: a label is larger than the {len(names)} classes of {name}")
    return ImageSet(name, names, PHOTO, Images(train), labels, Images(test), test_labels,
                    long_tailed=True)


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


def pixel_transform(size, mean, std, interpolation=transforms.InterpolationMode.BICUBIC, crop=None):
    """Resize to (size, size) and normalise; `crop` (least area): random resized crop and flip."""
    first = [transforms.Resize((size, size), interpolation)] if crop is None else \
        [transforms.RandomResizedCrop(size, (crop, 1.0), interpolation=interpolation),
         transforms.RandomHorizontalFlip()]
    return transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(mean, std)])


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
