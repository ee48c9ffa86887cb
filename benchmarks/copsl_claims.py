"""CoPSL's numbers over 10 seeds: the authors' table, and our recipe on the same 11 problems.

    python benchmarks/copsl_claims.py --out DIR             run what is not there yet (10 minutes)
    python benchmarks/copsl_claims.py --out DIR --summary   the tables only

Prints HV of f / nadir, as the authors' code computes it, beside what their own programs gave over
ten seeds (10-19, on a CPU, after step 500), with Welch's t-test of ours against theirs, and
for `tuned` the paired difference to the paper's recipe.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scipy import stats

import common
import copsl

PROBLEMS = [*copsl.GROUPS["f"], *copsl.GROUPS["re"]]
RUNS = {  # name: (flags, method)
    "CoPSL mtch": ([], "copsl"), "CoPSL tch": (["--loss", "tch"], "copsl"),
    "CoPSL ls": (["--loss", "ls"], "copsl"), "PSL mtch": ([], "psl"),
    "GradNorm mtch": ([], "copsl-gradnorm"), "CoPSL tuned": (["--recipe", "tuned"], "copsl"),
}
AUTHORS = {  # mean and std of HV over the authors' ten seeds, in the order of PROBLEMS
    "CoPSL mtch": [(.8347, .0200), (.8672, .0018), (.7896, .0036), (.7836, .0044), (.7996, .0046),
                   (.8461, .0023), (1.3277, .0049), (1.2312, .0572), (.6589, .0929), (.0409, 0),
                   (1.0274, .0242)],
    "CoPSL tch": [(.8603, .0007), (.8654, .0004), (.8037, .0029), (.8276, .0033), (.8335, .0022),
                  (.8468, .0010), (1.3256, .0004), (1.2012, .0471), (.6891, .0051), (.0409, 0),
                  (1.0178, .0080)],
    "CoPSL ls": [(.8396, .0252), (.8596, .0009), (.7541, .0037), (.7926, .0053), (.8057, .0044),
                 (.8329, .0055), (1.3251, .0016), (1.2370, .0286), (.5811, .0072), (.0409, 0),
                 (.9148, .0532)],
    "PSL mtch": [(.8221, .0255), (.8680, .0020), (.7888, .0039), (.7844, .0053), (.7953, .0042),
                 (.8418, .0135), (1.3261, .0082), (1.2283, .0504), (.6553, .1147), (.0409, 0),
                 (1.0212, .0171)],
    "GradNorm mtch": [(.8332, .0204), (.8675, .0013), (.7887, .0029), (.7850, .0035),
                      (.7999, .0048), (.8460, .0022), (1.3291, .0029), (1.1930, .1019),
                      (.7013, .0086), (.0409, 0), (1.0254, .0323)],
}


def spread(numbers):
    return f"{statistics.mean(numbers):.4f} ± {statistics.stdev(numbers):.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/copsl-claims"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    found = {}
    for name, (flags, method) in RUNS.items():
        for group in copsl.GROUPS:
            folder = args.out / f"{name.replace(' ', '-')}-{group}"
            if not (folder / "result.json").exists() and not args.summary:
                copsl.main(["--problems", group, "--method", method, "--seeds", str(args.seeds),
                            "--eval-every", "500", "--out-dir", str(folder), "--overwrite", *flags])
            if (folder / "result.json").exists():
                result = json.loads((folder / "result.json").read_text())["results"][method]
                found.setdefault(name, {}).update(result["hv_official"])
    for name, hv in found.items():
        if name in AUTHORS:
            print(f"| {name} | ours | the authors' | difference | p |\n|---|---|---|---|---|")
            for p, (mean, std) in zip(PROBLEMS, AUTHORS[name], strict=True):
                ours = statistics.mean(hv[p]), statistics.stdev(hv[p])
                test = stats.ttest_ind_from_stats(*ours, len(hv[p]), mean, std, 10, equal_var=False)
                print(f"| {p} | {spread(hv[p])} | {mean:.4f} ± {std:.4f} | {ours[0] - mean:+.4f} | "
                      f"{test.pvalue:.2f} |")
            for group in copsl.GROUPS.values():
                theirs = [m for p, (m, _) in zip(PROBLEMS, AUTHORS[name], strict=True)
                          if p in group]
                print(f"| mean of {group[0]}-{group[-1]} | "
                      f"{statistics.mean(v for p in group for v in hv[p]):.4f} | "
                      f"{statistics.mean(theirs):.4f} | | |")
            print()
    print("| | " + " | ".join(PROBLEMS) + " |\n" + "|---" * (len(PROBLEMS) + 1) + "|")
    for name, hv in found.items():
        print(f"| {name} | " + " | ".join(spread(hv[p]) for p in PROBLEMS) + " |")
    if "CoPSL tuned" in found and "CoPSL mtch" in found:
        tuned, paper = found["CoPSL tuned"], found["CoPSL mtch"]
        cells = []
        for p in PROBLEMS:
            differences = [a - b for a, b in zip(tuned[p], paper[p], strict=True)]
            test = stats.ttest_rel(tuned[p], paper[p])
            cells.append(f"{statistics.mean(differences):+.4f} (p {test.pvalue:.0e})")
        print("| tuned - mtch, paired | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    common.run_cli(main)
