"""The claims of coaction.py over 10 seeds, every peer under the same tuned recipe and budget.

    python benchmarks/coaction_claims.py --out DIR             run what is not there (half an hour)
    python benchmarks/coaction_claims.py --out DIR --summary   the tables only
    python benchmarks/coaction_claims.py --out DIR --only f re3

Each suite is one folder under DIR, so the work can be stopped and continued. The claims:
    C1  CoAction's hypervolume is above PSL's and CoPSL's on most tasks.
    C2  without attention, or without task embeddings, hypervolume is lost.
    C3  parameters and CPU seconds against K separate networks, K = 2 ... 16.
    C4  copies of one task attend to each other more than to other tasks.
A task is won or lost when the two-sided rank-sum test over the seeds gives p < 0.05, else tied.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from scipy import stats

import coaction
import common
import data

SUITES = ["f", "re3", "re-mixed", "mtmo", "re2", "zdt", "mtmo-shift"]
PEERS = ["psl", "copsl", "no-attention", "no-embedding"]
GROWTH = ["f1", "f2", "f3", "f4", "f5", "f6", "zdt1", "zdt2", "zdt3", "re21", "re22", "re23",
          "re24", "re25", "vlmop1", "vlmop2"]


def run_suite(name, args):
    """One suite, all methods, unless its result is there."""
    folder = args.out / name
    if (folder / "result.json").exists():
        return
    words = ["--suite", name.removesuffix("-shift"), "--method", "all", "--seeds", str(args.seeds),
             "--out-dir", str(folder), "--data-dir", str(args.data_dir), "--eval-every", "500"]
    words += ["--shift", "0.5"] if name.endswith("-shift") else []
    words += ["--resume"] if (folder / "config.json").exists() else []
    print("coaction.py " + " ".join(words), flush=True)
    coaction.main(words)


def growth(args):
    """C3: parameters and CPU seconds per seed of 100 steps as K grows, both methods in turn."""
    path = args.out / "growth.json"
    if not path.exists():
        rows = []
        for k in (2, 4, 8, 16):
            settings = vars(coaction.resolve(coaction.build_parser().parse_args([])))
            world = coaction.World([data.get_problem(n) for n in GROWTH[:k]], list(range(5)),
                                   SimpleNamespace(**{**settings, "steps": 100}), "cpu")
            row = {"K": k}
            for method in ("psl", "coaction"):
                net, optimizer = world.network(method)
                draws, ranges = world.preferences(), [(None, None)] * k
                start = time.process_time()
                for step in range(100):
                    p = [draws[m][step] for m in world.n_objs]
                    coaction.train_step(world, net, optimizer, p, ranges)
                row[method] = [net.num_parameters(), (time.process_time() - start) / 5]
            rows.append(row)
        common.write_json(path, rows)
    print("\nC3, 100 steps, per seed of 5\n| K | PSL parameters | CoAction parameters | "
          "PSL CPU-s | CoAction CPU-s | ratio |\n|---|---|---|---|---|---|")
    for r in json.loads(path.read_text()):
        (p, s), (q, t) = r["psl"], r["coaction"]
        print(f"| {r['K']} | {p:,} | {q:,} | {s:.2f} | {t:.2f} | {t / s:.2f} |")


def copies(args):
    """C4: f3 twice, f3 shifted in its variables, and three unrelated tasks."""
    path = args.out / "copies.json"
    if not path.exists():
        base = data.get_problem("f3")
        twin = data.Problem("f3 again", base.function, base.lower, base.upper, [0, 0], [1, 1], "")

        def shifted_function(x):
            moved = torch.cat([x[..., :1], (x[..., 1:] - .1)], -1)
            return base.function(moved)
        shifted = data.Problem("f3 shifted", shifted_function, base.lower, base.upper + .1, [0, 0],
                               [1, 1], "")
        tasks = [base, twin, shifted, *map(data.get_problem, ("zdt1", "re21", "vlmop2"))]
        settings = vars(coaction.resolve(coaction.build_parser().parse_args([])))
        world = coaction.World(tasks, list(range(args.seeds)), SimpleNamespace(**settings), "cpu")
        run = SimpleNamespace(progress=lambda items, *_, **__: items, gather=lambda d: d,
                              log=lambda **_: None)
        settings |= {"eval_every": 500, "save_every": 1000}
        world.args = SimpleNamespace(**settings)
        net, _, _ = coaction.train(world, run, "coaction", None, lambda state: None)
        maps = coaction.attention_map(world, net)
        common.write_json(path, {"tasks": [t.name for t in tasks],
                                 "maps": [m.tolist() for m in maps.values()]})
    found = json.loads(path.read_text())
    maps = torch.tensor(found["maps"])  # (seeds, K, K)
    twins = [(0, 1), (1, 0)]
    shifted = [(0, 2), (1, 2), (2, 0), (2, 1)]
    others = [(i, j) for i in range(3) for j in range(3, 6)]
    print("\nC4, mean attention of f3, its copy and its shifted copy; uniform would be "
          f"{1 / len(found['tasks']):.3f}")
    means = {}
    for name, pairs in (("copy", twins), ("shifted copy", shifted), ("other tasks", others)):
        means[name] = torch.stack([maps[:, i, j] for i, j in pairs]).mean(0).tolist()
        print(f"| {name} | {spread(means[name])} |")
    for name in ("copy", "shifted copy"):
        test = stats.wilcoxon(means[name], means["other tasks"])
        print(f"{name} against other tasks: p = {test.pvalue:.4f}")


def spread(numbers):
    return f"{statistics.mean(numbers):.4f} ± {statistics.stdev(numbers):.4f}"


def compare(ours, theirs):
    """+ if ours is larger, - if smaller, = if the rank-sum test does not tell."""
    if ours == theirs or stats.mannwhitneyu(ours, theirs).pvalue >= .05:
        return "="
    return "+" if statistics.mean(ours) > statistics.mean(theirs) else "-"


def summary(name, folder):
    """The tables of one suite."""
    results = json.loads((folder / "result.json").read_text())["results"]
    methods = [m for m in ["coaction", *PEERS] if m in results]
    print(f"\n{name}: hypervolume, + = - as seen from CoAction\n| task | "
          + " | ".join(methods) + " | before training |\n" + "|---" * (len(methods) + 2) + "|")
    ours, counts = results["coaction"]["hv"], {m: {"+": 0, "=": 0, "-": 0} for m in methods}
    for task in ours:
        cells = [spread(ours[task])]
        for m in methods[1:]:
            sign = compare(ours[task], results[m]["hv"][task])
            counts[m][sign] += 1
            cells.append(f"{spread(results[m]['hv'][task])} {sign}")
        first = statistics.mean(results["coaction"]["initial_hv"][task])
        print(f"| {task} | " + " | ".join(cells) + f" | {first:.4f} |")
    for key in ("hv", "range", "sparsity"):
        def seeds(m, key=key):
            tables = [v for v in results[m][key].values() if None not in v]
            return [statistics.mean(column) for column in zip(*tables, strict=True)]
        cells = []
        for m in methods:
            p = "" if m == "coaction" else \
                f" (p {stats.wilcoxon(seeds('coaction'), seeds(m)).pvalue:.3f})"
            cells.append(spread(seeds(m)) + p)
        print(f"| mean {key} | " + " | ".join(cells) + " | |")
    print("| win / tie / loss | | " + " | ".join(
        "{+} / {=} / {-}".format(**counts[m]) for m in methods[1:]) + " | |")
    print("| parameters | " + " | ".join(f"{results[m]['parameters']:,}" for m in methods) + " | |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/coaction-claims"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds mtmo/*.txt")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=SUITES, choices=SUITES)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        if not args.summary:
            run_suite(name, args)
        if (args.out / name / "result.json").exists():
            summary(name, args.out / name)
    if not args.summary or (args.out / "growth.json").exists():
        growth(args)
    if not args.summary or (args.out / "copies.json").exists():
        copies(args)


if __name__ == "__main__":
    common.run_cli(main)
