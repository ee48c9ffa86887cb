"""The claims of fedpurel.py, measured over seeds: all methods and ablations on identical clients.

    python benchmarks/fedpurel_claims.py                  the small world, 5 seeds, 3 kinds of PEFT
    python benchmarks/fedpurel_claims.py --summary        tables from what has been run already
    python benchmarks/fedpurel_claims.py --out DIR --dataset folder:PATH --model tiny --n-max 1500

Every (seed, kind) is one JSON file under --out, so the work can be stopped, continued, and split
over processes with --seeds. The claims:
    C1  FedAvg's global Few accuracy falls below zero-shot's.
    C2  FedPuReL's global Few stays within 2 points of zero-shot's, and its All beats FedAvg's and
        zero-shot's.
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


def measure(options, seed, kind, methods, folder):
    """Run every method and ablation for one seed and kind -> dict name -> summary."""
    command = ["--seed", str(seed), "--peft", kind, "--data-dir", str(folder / "data"), "--out-dir",
               str(folder / f"run-{kind}-{seed}"), "--overwrite", *options]
    args = fedpurel.resolve(fedpurel.build_parser().parse_args(command))
    results = {}
    with common.Run(args, "claims") as run:
        world = fedpurel.build_federation(args, run)
        plain = dict(vars(args))
        plan = [(m, m, {}) for m in methods]
        plan += [(name, "fedpurel", change) for name, change in ABLATIONS.items()]
        for name, method, change in plan:
            vars(args).update({**plain, **change})
            start = time.process_time()
            if method == "zeroshot":
                history = [fedpurel.evaluate(world, run, method, None)]
            else:
                state = fedpurel.fresh_state(world, method)
                history = fedpurel.train_method(world, run, method, state, lambda state: None)
            results[name] = fedpurel.summarise(history)
            results[name]["cpu_seconds"] = round(time.process_time() - start, 1)
            print(f"seed {seed} {kind} {name}: {results[name]['cpu_seconds']} CPU-s",
                  file=sys.stderr)
        vars(args).update(plain)
        if kind == "prompt":
            shown = {m: results[m] for m in ("zeroshot", "fedavg", "fedpurel")}
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
- C1 FedAvg's Few below zero-shot's: {verdict(gm(zero, "few"), gm("fedavg", "few"))}
- C2 FedPuReL's Few within 2 points of zero-shot's: {verdict(gm(ours, "few"), gm(zero, "few"), 2.0)}
- C2 FedPuReL's All above FedAvg's: {verdict(gm(ours, "all"), gm("fedavg", "all"))}
- C2 FedPuReL's All above zero-shot's: {verdict(gm(ours, "all"), gm(zero, "all"))}
- C3 FedPuReL's personal All above the best baseline's ({fedpurel.LABELS[best]}): \
{verdict(pm(ours, "all"), pm(best, "all"))}""")
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
    parser.add_argument("--seeds", default="11,12,13,14,15",
                        help="comma-separated; default %(default)s")
    parser.add_argument("--peft", default="prompt,lora,adapter", help="default %(default)s")
    parser.add_argument("--methods", default=",".join(fedpurel.METHODS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/fedpurel-claims"),
                        help="default %(default)s")
    parser.add_argument("--summary", action="store_true",
                        help="run nothing; print what --out holds")
    args, options = parser.parse_known_args()  # the rest goes to fedpurel.py
    options = ["--eval-every", "5", *options]
    for kind in args.peft.split(","):
        for seed in map(int, args.seeds.split(",")):
            path = args.out / f"{kind}-{seed}.json"
            if not path.exists() and not args.summary:
                common.write_json(path,
                                  measure(options, seed, kind, args.methods.split(","), args.out))
    for kind in args.peft.split(","):
        paths = sorted(args.out.glob(f"{kind}-*.json"))
        if paths:
            summarise(kind, [json.loads(p.read_text()) for p in paths])


if __name__ == "__main__":
    common.run_cli(main)
