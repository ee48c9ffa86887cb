"""The claims of pro_vpt.py and its neighbour in beyond/, in the small world, over seeds and truths.

    python benchmarks/pro_vpt_claims.py                  tuning, then 5 seeds x 5 distributions
    python benchmarks/pro_vpt_claims.py --summary        tables from what has been run already
    python benchmarks/pro_vpt_claims.py --heads vpt      the authors' draw of the head only
    python benchmarks/pro_vpt_claims.py --heads linear --grid .4     one cell for all, no tuning

In pro_vpt.py's own small world: 72 prompts (12 a block) and 30 epochs, so that a run moves at most
29 times (.4 moves a prompt, as the authors' 99 of 240). Every method gets the same grid of learning
rates x first draws of the head, and of it the cell with the best mean accuracy over five tuning
pairs, seed 100 + t with distribution t, on their test tiles (of equals the smallest rate; a run
that diverges counts 0); the seeds that are reported are others. Variants of PRO-VPT and of adaptive
(TUNED_AS) get the cell of what they vary. Every pair, of seed and distribution, is one JSON file
under --out, a tuning pair one for each cell, so the work can be stopped, continued, and split over
processes with --seeds and --truths.
Pre-training, task, initial draws and batches depend on the seed; every method sees the same. The
claims:
    C0  Distribution matters: the planted number of prompts per block beats the uniform one.
    C1  The paper's algorithm beats uniform and random relocation.
    C2  Each score ranks prompts by what removing them does to the loss (Spearman correlation with
        the exact change on the training set, of a trained uniform VPT-deep); and the idlest prompt
        stands where none are needed.
    C3  Relocation recovers the planted distribution (Pearson correlation of the prompts per block
        with the truth), for each score and allocator.
    C4  --method adaptive (ours) recovers it, and beats uniform, random relocation and the paper's
        algorithm.
A claim "holds" when the mean paired difference has the claimed sign and a paired t-test over all
pairs of seed and distribution gives p < 0.05, "not shown" when p is larger, "fails" when the sign
is the other one. Pairs of one seed share a backbone, so a test over the seeds' means is given too.
"""
import functools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from scipy import stats

import common
import data
import pro_vpt
from beyond import pro_vpt_adaptive as beyond

# name -> (method, changed settings); all run through beyond/pro_vpt_adaptive.py, whose defaults are
# the paper's loop
PLAN = {
    "linear probe": ("linear", {}),
    "uniform": ("vpt-deep", {}),
    "planted truth": ("planted", {}),
    "random relocation": ("random-relocation", {}),
    "PRO-VPT (paper)": ("pro-vpt", {}),
    "PRO-VPT (official recipe)": ("pro-vpt", {"recipe": "official"}),
    "PRO-VPT, Thompson": ("pro-vpt", {"allocator": "thompson"}),
    "PRO-VPT, running scores": ("pro-vpt", {"scores": "running"}),
    "PRO-VPT, post-LN score": ("pro-vpt", {"idleness": "post-ln"}),
    "PRO-VPT, norm score": ("pro-vpt", {"idleness": "norm"}),
    "PRO-VPT, size of the score": ("pro-vpt", {"idleness": "size"}),
    "PRO-VPT, size, greedy": ("pro-vpt", {"idleness": "size", "allocator": "greedy"}),
    "PRO-VPT, exact score, greedy": ("pro-vpt", {"idleness": "exact", "allocator": "greedy"}),
    "adaptive (ours)": ("adaptive", {}),
    "adaptive, random blocks": ("adaptive", {}),
}
CONTROL = "adaptive, random blocks"  # the same moves, towards blocks that nobody measured
TUNED_AS = {CONTROL: "adaptive (ours)", **{
    name: "PRO-VPT (paper)" for name in PLAN if name.startswith("PRO-VPT, ")}}
SCORES = ["taylor, eps 1e-6, float32", "taylor, eps 1e-6, float64", "taylor, eps 1e-12, float32",
          "taylor, eps 1e-12, float64", "norm", "post-ln", "taylor, minus its size",
          "post-ln, minus its size"]


def gradient_scores(model, tokens, labels, eps, dtype, gated=False):
    """The score of E2 on one batch, with another ε in the LayerNorms or another precision."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    before = norms[0].eps
    model.to(dtype)
    for norm in norms:
        norm.eps = eps
    model.gates = torch.ones(len(model.prompts), 1, dtype=dtype, device=tokens.device,
                             requires_grad=True)
    loss = torch.nn.functional.cross_entropy(model(tokens.to(dtype)), labels)
    gradient, gate_gradient = torch.autograd.grad(loss, [model.prompts, model.gates])
    found = gate_gradient[:, 0] if gated else \
        pro_vpt.idleness_scores(model.prompts.detach(), gradient)
    model.gates = None
    model.to(torch.float32)
    for norm in norms:
        norm.eps = before
    return found.double().cpu()


def compare_scores(model, tokens, labels, truth=None):
    """Spearman correlation of each score with the exact change of the loss on one batch (C2).

    truth: the planted prompts per block, if known; then also where the idlest prompt stands.
    """
    exact = beyond.exact_idleness(model, tokens, labels)
    eps = [(e, d) for e in (1e-6, 1e-12) for d in (torch.float32, torch.float64)]
    scores = [gradient_scores(model, tokens, labels, *pair) for pair in eps]
    scores.append(-model.prompts.detach().norm(dim=-1).cpu())
    scores.append(gradient_scores(model, tokens, labels, 1e-6, torch.float64, gated=True))
    scores += [-scores[1].abs(), -scores[5].abs()]
    found = {name: float(stats.spearmanr(score.numpy(), exact.numpy()).statistic)
             for name, score in zip(SCORES, scores, strict=True)}
    found["float32 against float64, eps 1e-6"] = pearson(scores[0], scores[1])
    found["float32 against float64, eps 1e-12"] = pearson(scores[2], scores[3])
    found["largest taylor score / largest exact change"] = float(
        scores[1].abs().max() / exact.abs().max())
    for name, score in [("taylor", scores[1]), ("exact", exact.double())] if truth else []:
        planted = torch.tensor([truth[b] > 0 for b in model.block.tolist()])
        size, idlest = score.abs(), score.argmax()
        found |= {f"{name}: the idlest prompt is in a planted block": float(planted[idlest]),
                  f"{name}: size in planted blocks / elsewhere, medians":
                  float(size[planted].median() / size[~planted].median()),
                  f"{name}: share of prompts above 0": float((score > 0).double().mean())}
    return found


def pearson(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def parts_of(name, seed, truth):
    """The parts that a row of PLAN trains with; the control's blocks are rated by a draw."""
    if name != CONTROL:
        return beyond.PARTS
    generator = common.torch_generator(seed, "control", ",".join(map(str, truth)))
    drawn = torch.rand(len(truth), generator=generator) ** 4
    control = functools.partial(beyond.adaptation, usefulness=lambda *_: drawn)
    return {**beyond.PARTS, "relocations": {**beyond.PARTS["relocations"], "adaptive": control}}


def measure(options, seed, truth, folder, cells, scoring=True):
    """Run every method at its cell, {name: (head, rate)}, for one seed and distribution -> dict."""
    words = ",".join(map(str, truth))
    command = ["--seed", str(seed), "--truth", words, "--data-dir", str(folder / "data"),
               "--out-dir", str(folder / "run"), "--overwrite", *options]
    args = beyond.read_arguments(command)
    results, scores = {}, None
    with common.Run(args, "claims") as run:
        task, plain = pro_vpt.build_task(args, run, "planted", "test"), dict(vars(args))
        for name, (head, rate) in cells.items():
            method, change = PLAN[name]
            vars(args).update({**plain, **change, "head_init": head})
            # "val": a rate that diverges is a result of 0%, as in a search
            job = pro_vpt.Job("planted", method, "val", seed, rate, args.weight_decay)
            start = time.process_time()
            training = pro_vpt.Training(task, run, args, job, parts_of(name, seed, truth))
            found = pro_vpt.outcome(training, lambda training: None)
            results[name] = {"accuracy": found["accuracy"], "head": head, "lr": rate,
                             "counts": found["counts"][-1],
                             "loss": found["losses"][-1] if found["losses"] else None,
                             "moves": len(found["moves"]),
                             "correlation": pro_vpt.correlation(found["counts"][-1], truth),
                             "cpu_seconds": round(time.process_time() - start, 1)}
            print(f"seed {seed} truth {words} head {head} lr {rate:g} {name}: "
                  f"{results[name]['accuracy']:.1f}% {results[name]['counts']} "
                  f"{results[name]['cpu_seconds']} CPU-s", file=sys.stderr, flush=True)
            if name == "uniform" and scoring:
                scores = compare_scores(training.model, task.train.tokens, task.train.labels, truth)
        vars(args).update(plain)
    return {"seed": seed, "truth": truth, "results": results, "scores": scores}


def kept(path, make):
    """What make() gives, from the file if it is there."""
    if not path.exists():
        common.write_json(path, make())
    return json.loads(path.read_text())


def tune(options, grid, names, truths, folder):
    """The best cell, (head, rate), of every method on the tuning pairs: {name: cell}."""
    if len(grid) == 1:
        return dict.fromkeys(names, grid[0])
    tuned = list(dict.fromkeys(TUNED_AS.get(name, name) for name in names))
    means = {}
    for head, rate in grid:
        runs = [kept(folder / f"tuning{100 + t}-truth{t}-{head}-lr{rate:g}.json",
                     functools.partial(measure, options, 100 + t, truth, folder,
                                       dict.fromkeys(tuned, (head, rate)), scoring=False))
                for t, truth in enumerate(truths)]
        unknown = [n for n in tuned if any(n not in run["results"] for run in runs)]
        if unknown:
            raise common.UserError(f"{folder} was tuned without {unknown[0]} (--only); name "
                                   "another --out")
        means[head, rate] = {name: statistics.mean(run["results"][name]["accuracy"]
                                                   for run in runs) for name in tuned}
    best = {name: max(grid, key=lambda cell: (means[cell][name], -cell[1])) for name in tuned}
    common.write_json(folder / "tuning.json", {
        "means": {f"{head}, {rate:g}": found for (head, rate), found in means.items()},
        "cells": best})
    return {name: best[TUNED_AS.get(name, name)] for name in names}


def spread(numbers, digits=1):
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0
    return f"{statistics.mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


def verdict(runs, better, worse):
    """Is better's accuracy larger, paired over all runs, and over the seeds' means?"""
    gaps = [run["results"][better]["accuracy"] - run["results"][worse]["accuracy"] for run in runs]
    seeds = sorted({run["seed"] for run in runs})
    by_seed = [statistics.mean(g for g, run in zip(gaps, runs, strict=True) if run["seed"] == s)
               for s in seeds]
    p, p_seeds = (stats.ttest_1samp(g, 0).pvalue if len(set(g)) > 1 else 1.0
                  for g in (gaps, by_seed))
    mean = statistics.mean(gaps)
    word = "fails" if mean < 0 else "holds" if p < .05 else "not shown"
    return (f"{word} (mean {mean:+.2f}, p {p:.2g}, over seeds p {p_seeds:.2g}, "
            f"{sum(g > 0 for g in gaps)}/{len(gaps)} pairs)")


def summarise(runs):
    """Print the markdown tables and the verdicts."""
    names = [n for n in PLAN if all(n in run["results"] for run in runs)]
    truths = list(dict.fromkeys(tuple(run["truth"]) for run in runs))
    print(f"{len(runs)} runs: seeds {sorted({run['seed'] for run in runs})}\n")
    print("| method | head, lr | accuracy | correlation with the truth | "
          + " | ".join("-".join(map(str, t)) for t in truths) + " | CPU-s |")
    print("|---|---|---|---|" + "---|" * (len(truths) + 1))
    for name in names:
        rows = [run["results"][name] for run in runs]
        known = [r["correlation"] for r in rows if r["correlation"] is not None]
        each = [statistics.mean(run["results"][name]["accuracy"] for run in runs
                                if tuple(run["truth"]) == t) for t in truths]
        cells = "; ".join(sorted({f"{r['head']}, {r['lr']:g}" for r in rows}))
        print(f"| {name} | {cells} | {spread([r['accuracy'] for r in rows])} | "
              f"{spread(known, 2) if known else '-'} | "
              + " | ".join(f"{a:.1f}" for a in each)
              + f" | {statistics.mean(r['cpu_seconds'] for r in rows):.1f} |")
    verdicts(runs, names)
    print("\n| C2: score | Spearman correlation with the exact change |\n|---|---|")
    runs = [run for run in runs if run["scores"]]
    for key in runs[0]["scores"] if runs else []:
        values = [run["scores"][key] for run in runs]
        tiny, ratio = key.startswith("largest"), "/" in key
        shown = f"median {statistics.median(values):.0e}" if tiny else \
            f"median {statistics.median(values):.2f}" if ratio else spread(values, 3)
        print(f"| {key} | {shown} |")


def verdicts(runs, names):
    """Print what the runs say about C0, C1 and C4."""
    paper, ours = "PRO-VPT (paper)", "adaptive (ours)"
    claims = [("C0", "planted truth", "uniform"), ("C1", paper, "uniform"),
              ("C1", paper, "random relocation"),
              ("C1", "PRO-VPT (official recipe)", "uniform"),
              ("C1", "PRO-VPT, running scores", paper), ("C4", ours, "uniform"),
              ("C4", ours, "random relocation"), ("C4", ours, paper),
              ("C4", ours, CONTROL), ("C4", "planted truth", ours)]
    print()
    for claim, better, worse in claims:
        if better in names and worse in names:
            print(f"- {claim} {better} above {worse}: {verdict(runs, better, worse)}")


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2,3,4",
                        help="comma-separated; default %(default)s")
    parser.add_argument("--truths", default="0,1,2,3,4",
                        help="which of data.PLANTED_TRUTHS; default %(default)s")
    parser.add_argument("--only", default=",".join(map(str, range(len(PLAN)))),
                        help="which rows of PLAN, by number; default all")
    parser.add_argument("--grid", default=".1,.3,1",
                        help="learning rates to choose from, for each method; default %(default)s")
    parser.add_argument("--heads", default="vpt,linear",
                        help="first draws of the head to choose from; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/pro_vpt-claims"),
                        help="default %(default)s")
    parser.add_argument("--summary", action="store_true",
                        help="run nothing; print what --out holds")
    args, options = parser.parse_known_args()  # the rest goes to the script
    names = [list(PLAN)[int(i)] for i in args.only.split(",")]
    seeds, truths = ([int(i) for i in text.split(",")] for text in (args.seeds, args.truths))
    wanted = {(s, t): args.out / f"seed{s}-truth{t}.json" for s in seeds for t in truths}
    if not args.summary:
        grid = [(head, rate) for head in args.heads.split(",")
                for rate in pro_vpt.numbers_in(args.grid, "--grid")]
        cells = tune(options, grid, names, data.PLANTED_TRUTHS, args.out)
        for (seed, t), path in wanted.items():
            kept(path, functools.partial(measure, options, seed, data.PLANTED_TRUTHS[t], args.out,
                                         cells))
    found = [json.loads(path.read_text()) for path in wanted.values() if path.exists()]
    if not found:
        raise common.UserError(f"{args.out} holds no results of these seeds and distributions")
    summarise(found)


if __name__ == "__main__":
    common.run_cli(main, continues=True)
