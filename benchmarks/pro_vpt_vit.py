"""PRO-VPT's claim on a real ViT and real pictures: does moving prompts beat leaving them alone?

    python benchmarks/pro_vpt_vit.py --model DIR --data DIR [--data DIR2] --norm imagenet
    python benchmarks/pro_vpt_vit.py --report        the tables of what has been run so far

--model: any ViT of transformers (hub id or directory). --data: a folder of train/<class>/* and
test/<class>/* (without test/, a fifth of every class is held out). Other words go to
beyond/pro_vpt_adaptive.py: --norm, --eps, --dropout, --device, ... OMP_NUM_THREADS=1 and --jobs N
for N trainings side by side. Every finished training is one line of --out-dir/rows.jsonl, and what
stands there is not run again: killed, the same command goes on and loses at most the trainings
that were under way.

Protocol, fixed before any held-out seed was run
    Sets       --per-class training and --test-per-class test pictures of every class, drawn by the
               seed; --data twice: two numbers each. Default 20 and 50 (for 10 classes), then 2 and
               10 (for 100), so that both sets have 200 training pictures.
    Model      10 prompts in each block: N = 120 with 12 blocks. Dropout .1, momentum .9, weight
               decay 1e-4, joint clip .25, as in pro_vpt.py. Batch 16, so that there are 13 steps
               between two moves (the paper 1,000 / 64: 16).
    Epochs     32, at most one move each, from the second on: 31 moves of 120 prompts, .26 a prompt
               (the paper 99 of 240, .41). 16 in tuning.
    Tuning     every method gets the same grid: 4 learning rates x 2 first draws of the head. Seed
               100, trained on its draw, rated on --test-per-class other pictures of every training
               class; test/ is not touched. The best cell is kept, of equals the smallest rate. A
               training that diverges counts 0%.
    Held out   seeds 0, 1, 2 at that cell: other pictures, heads, prompts, batches. The same for
               every method of a seed, so that differences are paired.
    Left out   what takes too long, by method (--only) or set (--data), never by seed.
    C2         the uniform model of every held-out seed, before and after its training: Spearman
               correlation over prompts of each score with what removing the prompt does to the
               loss, on --removal-images training pictures.
Adaptive measures on 100 pictures (--score-images). The linear probe's features are computed once.
A training picture costs about 2.7 forward passes; PRO-VPT takes twice that for its scoring pass.
"""
import copy
import functools
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy import stats

import common
import data
import pro_vpt
from benchmarks import pro_vpt_claims as claims
from beyond import pro_vpt_adaptive as beyond

METHODS = ["linear probe", "uniform", "random relocation", "PRO-VPT (paper)",
           "PRO-VPT (official recipe)", "adaptive (ours)"]  # rows of pro_vpt_claims.PLAN
HEADS = ["vpt", "linear"]  # --head-init: the authors' draw, nn.Linear's
PROTOCOL = ["--prompts", "10", "--batch", "16", "--score-images", "100"]


class Cell(NamedTuple):
    """One training; all fields together are its key in rows.jsonl."""
    set: str
    method: str
    head: str
    rate: float
    stage: str  # "tune" or "test"
    seed: int


class Probe(pro_vpt.PromptedViT):
    """A head on features that are known already, tokens (B, 1, D)."""

    def features(self, tokens, noise=None):
        return tokens[:, 0]


# ---- One training ------------------------------------------------------------------------------


def draw(labels, names, n, generator, skip=0):
    """Indices of n random images of each class, after `skip` that another part has."""
    found = []
    for c, name in enumerate(names):
        mine = generator.permutation(np.flatnonzero(labels == c))
        if len(mine) < skip + n:
            raise common.UserError(f"the class {name} has {len(mine)} images where {skip + n} are "
                                   "needed; lower --per-class or --test-per-class")
        found.append(mine[skip:skip + n])
    return np.concatenate(found)


def subset(images, seed, stage, per_class, test_per_class):
    """Splits of the seed's draw from an ImageSet; `val` is what the stage is rated on."""
    def part(pictures, labels, n, purpose, skip=0):
        generator = common.numpy_generator(seed, purpose, images.name)
        indices = draw(labels, images.class_names, n, generator, skip)
        return pictures.subset(indices), labels[indices]

    seen = images.train, images.train_labels
    train = part(*seen, per_class, "training pictures")
    # in tuning: what comes after those in the same random order
    rated = part(*seen, test_per_class, "training pictures", skip=per_class) if stage == "tune" \
        else part(images.test, images.test_labels, test_per_class, "test pictures")
    return data.Splits(images.name, "folder", images.num_classes, train, rated, rated)


class FrozenLinear(torch.autograd.Function):
    """A linear layer without gradients of its own, through oneDNN: on an AMD core 2.3 times as fast
    as torch's default (MKL), in the same float32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        back = ctx.saved_tensors[0].t().contiguous()
        return torch.ops.mkldnn._linear_pointwise(gradient, back, None, "none", [], ""), None, None


def through_onednn(vit):
    """Let the linear layers of a frozen ViT on the CPU use FrozenLinear while they are float32."""
    if not torch.backends.mkldnn.is_available():
        return

    def forward(layer, x):
        plain = x.device.type != "cpu" or x.dtype != torch.float32
        return torch.nn.functional.linear(x, layer.weight, layer.bias) if plain \
            else FrozenLinear.apply(x, layer.weight, layer.bias)

    for layer in vit.modules():
        if type(layer) is torch.nn.Linear and not layer.weight.requires_grad:
            layer.forward = forward.__get__(layer)


@functools.lru_cache(maxsize=1)
def build_task(words, device, seed, stage, per_class, test_per_class):
    """The task of a seed, all its images embedded: what its trainings share."""
    args = beyond.read_arguments(list(words))
    vit = data.frozen_vit(args.model, args.eps, 0, device, args.data_dir)
    through_onednn(vit)
    images = data.load_images(args.dataset, args.data_dir)
    splits = subset(images, seed, stage, per_class, test_per_class)
    task = data.transfer_task(splits, vit, args.norm, True, args.workers, device)
    task.test.embed_once(vit)
    return task


@functools.lru_cache(maxsize=1)
def probe_task(*key):
    """build_task's, with features of the bare ViT in place of tokens."""
    task = copy.copy(build_task(*key))
    model = pro_vpt.PromptedViT(task.vit, task.num_classes, [0] * len(task.vit.layers))
    for name in ("train", "test"):
        part = copy.copy(getattr(task, name))
        chunks = torch.arange(len(part.labels)).split(64)
        with torch.no_grad():
            part.tokens = torch.cat([
                model.features(x if x.dim() == 3 else model.embed(x))[:, None]
                for x in part.batches(chunks)])  # (N, 1, D)
        setattr(task, name, part)
    return task


def measure(cell, words, per_class, test_per_class, removal_images):
    """Train one cell -> its row."""
    method, change = claims.PLAN[cell.method]
    with tempfile.TemporaryDirectory() as folder:
        args = beyond.read_arguments([
            *words, "--method", method, "--head-init", cell.head, "--seed", str(cell.seed),
            "--out-dir", folder])
        vars(args).update(change)
        with common.Run(args, "vit") as run:
            key = (words, str(run.device), cell.seed, cell.stage, per_class, test_per_class)
            probe = method == "linear"
            task = (probe_task if probe else build_task)(*key)
            # "val": a training that diverges is a result of 0%, as in a search
            job = pro_vpt.Job(cell.set, method, "val", cell.seed, cell.rate, args.weight_decay)
            parts = {**beyond.PARTS, "model": Probe} if probe else beyond.PARTS
            training = pro_vpt.Training(task, run, args, job, parts)
            scoring = cell.method == "uniform" and cell.stage == "test"
            batch = beyond.sample(training, "removal", removal_images) if scoring else None
            before = claims.compare_scores(training.model, *batch) if scoring else None
            start = time.process_time()
            found = pro_vpt.outcome(training, lambda now: None)
            row = {**cell._asdict(), "accuracy": found["accuracy"],
                   "cpu_seconds": round(time.process_time() - start, 1),
                   "counts": found["counts"][-1], "moves": len(found["moves"]),
                   "loss": found["losses"][-1] if found["losses"] else None}
            if scoring:
                row["scores"] = {"before": before,
                                 "after": claims.compare_scores(training.model, *batch)}
    return row


# ---- All of them -------------------------------------------------------------------------------


def read_rows(path):
    """The rows so far; a line that a killed process left unfinished does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def key_of(row):
    return Cell(**{name: row[name] for name in Cell._fields})


def finish(cells, path, work, jobs):
    """Run those of `cells` that have no row yet, with work(cell) -> row, and append their rows."""
    done = {key_of(row) for row in read_rows(path)}
    left = [cell for cell in cells if cell not in done]
    if jobs == 1:
        append(path, map(work, left))
    elif left:
        with multiprocessing.get_context("spawn").Pool(jobs, leave_quietly) as pool:
            append(path, pool.imap_unordered(work, left))


def leave_quietly():
    """A process of the pool leaves the Ctrl-C to its parent, and goes when that says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


def append(path, rows):
    torn = path.exists() and not path.read_text().endswith("\n")
    for row in rows:
        with open(path, "a") as handle:
            handle.write("\n" * torn + common.strict_json(row) + "\n")
        torn = False
        print(f"{row['set']} {row['stage']} seed {row['seed']} {row['method']}, head {row['head']},"
              f" lr {row['rate']:g}: {row['accuracy']:.1f}% {row['cpu_seconds']} CPU-s",
              file=sys.stderr, flush=True)


def chosen(rows, name, method):
    """(head, rate) that tuning says, of equals the smallest rate; None without tuning."""
    tuned = [r for r in rows if (r["set"], r["method"], r["stage"]) == (name, method, "tune")]
    best = max(tuned, key=lambda r: (r["accuracy"], -r["rate"]), default=None)
    return best and (best["head"], best["rate"])


# ---- Tables ------------------------------------------------------------------------------------


def held_out(rows, name, method):
    """{seed: row} of the chosen cell's held-out runs."""
    return {r["seed"]: r for r in rows
            if (r["set"], r["method"], r["stage"]) == (name, method, "test")
            and (r["head"], r["rate"]) == chosen(rows, name, method)}


def difference(ours, theirs):
    """Paired over the seeds that both have: "+1.20 (p .03, 3/3)"; a t-test from two seeds on."""
    gaps = [ours[s]["accuracy"] - theirs[s]["accuracy"] for s in ours if s in theirs]
    if not gaps or ours is theirs:
        return "-"
    p = f"p {stats.ttest_1samp(gaps, 0).pvalue:.2g}, " if len(set(gaps)) > 1 else ""
    return f"{statistics.mean(gaps):+.2f} ({p}{sum(g > 0 for g in gaps)}/{len(gaps)})"


def report(rows):
    """Print markdown: for each set accuracies, the grid of tuning, and C2."""
    for name in dict.fromkeys(r["set"] for r in rows):
        mine = {m: held_out(rows, name, m) for m in METHODS}
        print(f"\n### {name}\n\nDifferences are paired: mean (p of a t-test over seeds, seeds in "
              "which it is positive).\n")
        print("| method | head, lr | seeds | accuracy % | minus uniform | minus random relocation "
              "| moves | prompts per block, mean | CPU-min |\n|" + "---|" * 9)
        for method, runs in mine.items():
            if not runs:
                continue
            last = list(runs.values())
            head, rate = chosen(rows, name, method)
            counts = np.mean([r["counts"] for r in last], 0).round().astype(int)
            print(f"| {method} | {head}, {rate:g} | {', '.join(map(str, sorted(runs)))} "
                  f"| {claims.spread([r['accuracy'] for r in last])} "
                  f"| {difference(runs, mine['uniform'])} "
                  f"| {difference(runs, mine['random relocation'])} "
                  f"| {statistics.mean(r['moves'] for r in last):.0f} "
                  f"| {'-'.join(map(str, counts))} "
                  f"| {statistics.mean(r['cpu_seconds'] for r in last) / 60:.1f} |")
        report_tuning([r for r in rows if (r["set"], r["stage"]) == (name, "tune")])
        report_scores([r["scores"] for r in mine["uniform"].values()])


def report_tuning(rows):
    """Accuracy of every cell of the grid."""
    found = {(r["method"], r["head"], r["rate"]): r["accuracy"] for r in rows}
    cells = sorted({(h, r) for _, h, r in found}, key=lambda c: (-HEADS.index(c[0]), c[1]))
    print("\n| tuning, accuracy % | " + " | ".join(f"{h}, {r:g}" for h, r in cells)
          + " |\n|" + "---|" * (len(cells) + 1))
    for method in dict.fromkeys(m for m, _, _ in found):
        values = [found.get((method, *cell)) for cell in cells]
        print(f"| {method} | " + " | ".join("" if v is None else f"{v:.1f}" for v in values) + " |")


def report_scores(found):
    """C2, before and after training, mean ± std over seeds."""
    if not found:
        return
    print("\n| C2: score | Spearman correlation with the exact change, before training | after |\n"
          "|---|---|---|")
    for key in found[0]["after"]:
        values = {when: [f[when][key] for f in found if f[when][key] is not None]
                  for when in ("before", "after")}
        tiny = key.startswith("largest")
        shown = ["-" if not v else f"median {statistics.median(v):.0e}" if tiny
                 else claims.spread(v, 2) for v in values.values()]
        print(f"| {key} | " + " | ".join(shown) + " |")


# ---- Command line ------------------------------------------------------------------------------


def read_arguments():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--model", help="a transformers ViT: hub id or directory")
    add("--data", type=Path, action="append", default=[], help="a folder of pictures; once or more")
    add("--per-class", default="20,2", help="training images, for each --data; %(default)s")
    add("--test-per-class", default="50,10", help="test images, for each --data; %(default)s")
    add("--epochs", type=int, default=32, help="of a held-out training; default %(default)s")
    add("--tune-epochs", type=int, default=16, help="of a tuning training; default %(default)s")
    add("--grid", default=".03,.1,.3,1", help="learning rates; default %(default)s")
    add("--heads", default=",".join(HEADS), help="first draws of the head; default %(default)s")
    add("--tune-seed", type=int, default=100, help="default %(default)s")
    add("--seeds", default="0,1,2", help="held-out, comma-separated; default %(default)s")
    add("--only", default=",".join(map(str, range(len(METHODS)))),
        help=f"methods by number, of {', '.join(METHODS)}; default all")
    add("--removal-images", type=int, default=64, help="C2; default %(default)s")
    add("--jobs", type=int, default=1, help="trainings side by side; default %(default)s")
    add("--out-dir", type=Path, default=Path("runs/pro_vpt-vit"), help="default %(default)s")
    add("--report", action="store_true", help="run nothing; print what --out-dir holds")
    args, options = parser.parse_known_args()
    if not args.report and not (args.model and args.data):
        raise common.UserError("name a ViT with --model and a folder of pictures with --data")
    if len({folder.name for folder in args.data}) < len(args.data):
        raise common.UserError("two --data of one name: the rows name a set by its last part")
    return args, options


def same_protocol(path, settings):
    """Refuse to mix rows of two protocols in one folder."""
    if not path.exists():
        common.write_json(path, settings)
    kept = json.loads(path.read_text())
    odd = [name for name in settings if name in kept and kept[name] != settings[name]]
    if odd:
        raise common.UserError(f"{path.parent} holds rows with {odd[0]} {kept[odd[0]]}, now "
                               f"{settings[odd[0]]}; name another --out-dir")
    common.write_json(path, {**kept, **settings})


def main():
    args, options = read_arguments()
    path = args.out_dir / "rows.jsonl"
    if not args.report:
        rates = pro_vpt.numbers_in(args.grid, "--grid")
        seeds = pro_vpt.numbers_in(args.seeds, "--seeds", int)
        sizes = [pro_vpt.numbers_in(getattr(args, flag), f"--{flag.replace('_', '-')}", int)
                 for flag in ("per_class", "test_per_class")]
        if min(map(len, sizes)) < len(args.data):
            raise common.UserError("--per-class and --test-per-class: one number for each --data")
        methods = [METHODS[int(i)] for i in args.only.split(",")]
        for folder, per_class, test_per_class in zip(args.data, *sizes, strict=False):
            words = ["--dataset", f"folder:{folder}", "--model", args.model, *PROTOCOL, *options]
            same_protocol(args.out_dir / "protocol.json", {
                "model": Path(args.model).name, "words": [*PROTOCOL, *options],
                "epochs": args.epochs, "tune epochs": args.tune_epochs,
                "tune seed": args.tune_seed, f"images a class of {folder.name}":
                [per_class, test_per_class]})

            def run(cells, epochs, words=words, sizes=(per_class, test_per_class)):
                work = functools.partial(
                    measure, words=(*words, "--epochs", str(epochs)), per_class=sizes[0],
                    test_per_class=sizes[1], removal_images=args.removal_images)
                finish(cells, path, work, args.jobs)

            run([Cell(folder.name, method, head, rate, "tune", args.tune_seed)
                 for method in methods for head in args.heads.split(",") for rate in rates],
                args.tune_epochs)
            rows = read_rows(path)
            best = {method: chosen(rows, folder.name, method) for method in methods}
            run([Cell(folder.name, method, *best[method], "test", seed)
                 for seed in seeds for method in methods], args.epochs)
    rows = read_rows(path)
    if not rows:
        raise common.UserError(f"{args.out_dir} holds no rows yet")
    report(rows)


if __name__ == "__main__":
    common.run_cli(main, continues=True)
