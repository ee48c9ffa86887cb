"""The claims of fedpurel.py, measured over seeds: all methods and ablations on identical clients.

    python benchmarks/fedpurel_claims.py                  the small world, 20 seeds: 15 minutes
    python benchmarks/fedpurel_claims.py --summary        tables from what has been run already
    python benchmarks/fedpurel_claims.py --out DIR --dataset folder:PATH --model tiny --n-max 200
        --tune 100 --grid .003,.01,.03,.1
                                                          your pictures; rates by a grid

Every (seed, kind) is one JSON file under --out, so the work can be stopped, continued, and split
over processes with --seeds. --tune: seeds on which each method's rates are chosen, by the mean of
the global and the personal model's All (of those a method has); without it all have the defaults.
Every method gets as many cells: the four rates of --grid; FedPuReL the two smaller ones for stage 1
by the two larger ones for stage 2, which has no momentum. The claims:
    C1  FedAvg's global model falls below zero-shot: in All, and in Few.
    C2  FedPuReL's global All beats FedAvg's and is not below zero-shot's (by more than .5 points);
        it beats zero-shot's; its Few stays within 2 points of zero-shot's.
    C3  FedPuReL's personal All beats every baseline's.
    C4  TKL is at least as good as plain KL.
    C5  Without purification, or without the residual, accuracy is lost.
A claim "holds" when the mean paired difference has the claimed sign and a paired t-test over the
seeds gives p < 0.05, "not shown" when p is larger, "fails" when the sign is the other one.
"""
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scipy import stats

import common
import fedpurel

ABLATIONS = {
    "FedPuReL, plain KL": {"align": "kl"},
    "FedPuReL, no purification": {"align": "none"},
    "FedPuReL, no residual": {"no_residual": True},
}


def plan_of(methods, rates, ablations):
    """[(name, method, settings to change)] of what is run. rates: dict method -> settings."""
    plan = [(m, m, rates.get(m, {})) for m in methods]
    if ablations:
        plan += [(name, "fedpurel", {**rates.get("fedpurel", {}), **change})
                 for name, change in ABLATIONS.items()]
    return plan


def tuning_plan(methods, grid):
    """The cells of every method that learns; the name of one is method, lr, private_lr."""
    cells = {m: [(r, r) for r in grid] for m in methods if m != "zeroshot"}
    if "fedpurel" in cells:
        cells["fedpurel"] = [(a, b) for a in grid[:2] for b in grid[2:]]
    return [(f"{m} {a:g} {b:g}", m, {"lr": a, "private_lr": b})
            for m, pairs in cells.items() for a, b in pairs]


def best_rates(runs):
    """dict method -> settings, by the mean of All over the seeds and a method's models."""
    found = {}
    for name in runs[0]:
        if not all(name in run for run in runs):  # it diverged
            continue
        method, lr, private_lr = name.split()
        scores = [v for part in ("gm", "pm") for v in values(runs, name, part, "all") or []]
        cell = (statistics.mean(scores), {"lr": float(lr), "private_lr": float(private_lr)})
        found[method] = max(found.get(method, cell), cell, key=lambda c: c[0])
    print("| tuning | " + " | ".join(found) + " |\n|" + "---|" * (len(found) + 1) + "\n| lr, "
          "private_lr | " + " | ".join(f"{c['lr']:g}, {c['private_lr']:g}"
                                        for _, c in found.values()) + " |")
    return {method: settings for method, (_, settings) in found.items()}


def measure(options, seed, kind, plan, folder, tuning=False):
    """Run a plan for one seed and kind -> dict name -> summary; in tuning without what diverges."""
    command = ["--seed", str(seed), "--peft", kind, "--data-dir", str(folder / "data"), "--out-dir",
               str(folder / f"run-{kind}-{seed}"), "--overwrite", *options]
    args = fedpurel.resolve(fedpurel.build_parser().parse_args(command))
    results = {}
    with common.Run(args, "claims") as run:
        world = fedpurel.build_federation(args, run)
        plain = dict(vars(args))
        for name, method, change in plan:
            vars(args).update({**plain, **change})
            start = time.process_time()
            if method == "zeroshot":
                history = [fedpurel.evaluate(world, run, method, None)]
            else:
                state = fedpurel.fresh_state(world, method)
                try:
                    history = fedpurel.train_method(world, run, method, state, lambda state: None)
                except common.UserError as error:
                    if not tuning:
                        raise
                    print(f"seed {seed} {kind} {name}: {error}", file=sys.stderr)
                    continue
            results[name] = fedpurel.summarise(history)
            results[name]["cpu_seconds"] = round(time.process_time() - start, 1)
            print(f"seed {seed} {kind} {name}: {results[name]['cpu_seconds']} CPU-s",
                  file=sys.stderr)
        vars(args).update(plain)
        shown = {m: results[m] for m in fedpurel.METHODS if m in results}
        if "zeroshot" in shown:
            fedpurel.draw_figure(world, shown, folder / f"figure-{kind}-{seed}.png")
    return results


def values(runs, name, part, key):
    """One number per seed (mean of the last 10 evaluations); None where a method has no such
    model."""
    found = [(run[name][part] or {}).get("mean10", {}).get(key) for run in runs]
    return None if any(v is None for v in found) else found


def spread(numbers):
    if numbers is None:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0
    return f"{statistics.mean(numbers):.1f} ± {deviation:.1f}"


def verdict(better, worse, margin=0.0):
    """Is better - worse + margin > 0, paired over seeds?"""
    gaps = [a - b + margin for a, b in zip(better, worse, strict=True)]
    mean = statistics.mean(gaps)
    p = stats.ttest_1samp(gaps, 0).pvalue if len(gaps) > 1 and len(set(gaps)) > 1 else 1.0
    word = "fails" if mean < 0 else "holds" if p < .05 else "not shown"
    wins = sum(g > 0 for g in gaps)
    return f"{word} (mean {mean - margin:+.2f}, p {p:.3f}, {wins}/{len(gaps)} seeds)"


def not_below(ours, theirs, margin=.5):
    """A mean difference of at least -margin points; without a test."""
    gap = statistics.mean(a - b for a, b in zip(ours, theirs, strict=True))
    return f"{'holds' if gap >= -margin else 'fails'} (mean {gap:+.2f})"


def summarise(kind, runs):
    """Print the markdown table and the verdicts of one kind."""
    names = list(runs[0])
    print(f"\n### {kind}, {len(runs)} seeds\n")
    keys = ("all", "many", "med", "few", "balancedness")
    print(
        "| method | GM All | Many | Med | Few | balancedness | PM All | Many | Med | Few | CPU-s |")
    print("|---|" + "---|" * 10)
    for name in names:
        row = [spread(values(runs, name, "gm", k)) for k in keys]
        row += [spread(values(runs, name, "pm", k)) for k in keys[:4]]
        cpu = statistics.mean(run[name]["cpu_seconds"] for run in runs)
        print(f"| {fedpurel.LABELS.get(name, name)} | " + " | ".join(row) + f" | {cpu:.0f} |")

    def gm(name, key):
        return values(runs, name, "gm", key)

    def pm(name, key):
        return values(runs, name, "pm", key)

    zero, ours = "zeroshot", "fedpurel"
    baselines = [n for n in names if n in fedpurel.METHODS and n != ours]
    best = max(baselines, key=lambda n: statistics.mean(pm(n, "all")))
    print(f"""
- C1 FedAvg's All below zero-shot's: {verdict(gm(zero, "all"), gm("fedavg", "all"))}
- C1 FedAvg's Few below zero-shot's: {verdict(gm(zero, "few"), gm("fedavg", "few"))}
- C2 FedPuReL's All above FedAvg's: {verdict(gm(ours, "all"), gm("fedavg", "all"))}
- C2 FedPuReL's All not below zero-shot's: {not_below(gm(ours, "all"), gm(zero, "all"))}
- C2 FedPuReL's All above zero-shot's: {verdict(gm(ours, "all"), gm(zero, "all"))}
- C2 FedPuReL's Few within 2 points of zero-shot's: {verdict(gm(ours, "few"), gm(zero, "few"), 2.0)}
- C3 FedPuReL's personal All above the best baseline's ({fedpurel.LABELS[best]}): \
{verdict(pm(ours, "all"), pm(best, "all"))}""")
    if "FedPuReL, plain KL" not in names:
        return
    for part, score in (("global", gm), ("personal", pm)):
        print(f"- C4 TKL above plain KL, {part} All: "
              f"{verdict(score(ours, 'all'), score('FedPuReL, plain KL', 'all'))}")
    for part, score in (("global", gm), ("personal", pm)):
        print(f"- C5 purification gains, {part} All: "
              f"{verdict(score(ours, 'all'), score('FedPuReL, no purification', 'all'))}")
    print("- C5 the residual gains, personal All: "
          f"{verdict(pm(ours, 'all'), pm('FedPuReL, no residual', 'all'))}")


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--seeds", default=",".join(map(str, range(30, 50))),
                        help="comma-separated; default %(default)s")
    parser.add_argument("--peft", default="adapter", help="comma-separated; default %(default)s")
    parser.add_argument("--methods", default=",".join(fedpurel.METHODS), help="default: all")
    parser.add_argument("--no-ablations", action="store_true", help="leave out C4 and C5")
    parser.add_argument("--tune", default="", help="tuning seeds; default: no tuning")
    parser.add_argument("--grid", default=".003,.01,.03,.1", help="rates; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/fedpurel-claims"),
                        help="default %(default)s")
    parser.add_argument("--summary", action="store_true",
                        help="run nothing; print what --out holds")
    args, options = parser.parse_known_args()  # the rest goes to fedpurel.py
    options = ["--eval-every", "5", *options]
    methods, grid = args.methods.split(","), [float(r) for r in args.grid.split(",")]

    def saved(name, seed, kind, plan):
        path = args.out / f"{name}-{seed}.json"
        if not path.exists():
            common.write_json(path, measure(options, seed, kind, plan, args.out,
                                            name.startswith("tuning")))
        return json.loads(path.read_text())

    for kind in args.peft.split(",") if not args.summary else []:
        tuned = [saved(f"tuning-{kind}", seed, kind, tuning_plan(methods, grid))
                 for seed in map(int, args.tune.split(",") if args.tune else [])]
        rates = best_rates(tuned) if tuned else {}
        for seed in map(int, args.seeds.split(",")):
            saved(kind, seed, kind, plan_of(methods, rates, not args.no_ablations))
    for kind in args.peft.split(","):
        paths = sorted(args.out.glob(f"{kind}-*.json"))
        if paths:
            summarise(kind, [json.loads(p.read_text()) for p in paths])


if __name__ == "__main__":
    common.run_cli(main, continues=True)
