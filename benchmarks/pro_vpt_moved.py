"""What happens to a prompt that has just moved (finding 2 of pro_vpt.py), in its small world.

    python benchmarks/pro_vpt_moved.py                     seeds 0-4, about 2 CPU-minutes
    python benchmarks/pro_vpt_moved.py --head-init linear  other words go to pro_vpt.py

Every move into another block of the paper's algorithm (--method pro-vpt) is followed:
    share    the moved prompt's part of the squared gradient over head and prompts, at each training
             step of the epoch after the move (before the joint clip)
    score    its |I| at the next scoring pass, over the median |I| of all prompts
    again    how often it is the very next prompt to move
"""
import functools
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import pro_vpt

STEPS = 8


def follow(options, seed, folder, data_dir):
    """One run -> shares (a list of STEPS lists), score ratios, and whether it moved again."""
    command = ["--method", "pro-vpt", "--seed", str(seed), "--data-dir", str(data_dir),
               "--out-dir", str(folder), *options]
    args = pro_vpt.read_arguments(command)
    shares, ratios, again = [[] for _ in range(STEPS)], [], []
    real_moves = []  # [epoch, prompt, steps since] of moves into another block

    def watch(training, loss, grads, size):
        """The moved prompt's share of the squared gradient, of which the prompts come first."""
        for now in [now for now in real_moves if now[0] == training.epoch and now[2] < STEPS]:
            total = sum(g.square().sum() for g in grads)
            shares[now[2]].append((grads[0][now[1]].square().sum() / total).item())
            now[2] += 1

    def score(training):
        scores, cost = training.recipe["score"](training)
        last = [k for epoch, k, _ in real_moves if epoch == training.epoch - 1]
        if last:
            size = scores.abs()
            ratios.append((size[last[0]] / size.median()).item())
            again.append(scores.argmax().item() == last[0])
        return scores, cost

    with common.Run(args, "moved") as run:
        task = pro_vpt.build_task(args, run, "planted", "test")
        job = pro_vpt.Job("planted", "pro-vpt", "test", seed, args.lr, args.weight_decay)

        def move(prompts, block, k, target):
            if block[k] != target:
                real_moves.append([training.epoch, k, 0])
            pro_vpt.relocate(prompts, block, k, target)

        watched = functools.partial(pro_vpt.relocation, score=score, move=move)
        parts = {**pro_vpt.PARTS, "relocations": {"pro-vpt": watched}, "watch": watch}
        training = pro_vpt.Training(task, run, args, job, parts)
        pro_vpt.train(training, lambda now: None)
    return shares, ratios, again


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="caches")
    args, options = parser.parse_known_args()
    found = []
    for seed in map(int, args.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found.append(follow(options, seed, Path(folder) / "run", args.data_dir))

    def spread(numbers):
        return f"{statistics.mean(numbers):.3f} ± {statistics.stdev(numbers):.3f}" \
            if len(numbers) > 1 else f"{numbers[0]:.3f}"

    medians = [[statistics.median(run[0][i]) for run in found if run[0][i]] for i in range(STEPS)]
    common_rows = [[f"step {i + 1}", spread(m)] for i, m in enumerate(medians) if m]
    print(common.format_table(["share of the squared gradient", "median of a run"], common_rows))
    print(common.format_table(["at the next scoring pass", "over runs"], [
        ["|I| over the median |I|", spread([statistics.median(run[1]) for run in found])],
        ["is the next to move", spread([statistics.mean(run[2]) for run in found])],
        ["moves followed", str(sum(len(run[1]) for run in found))]]))


if __name__ == "__main__":
    common.run_cli(main)
