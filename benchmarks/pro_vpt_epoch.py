"""What an epoch of PRO-VPT costs: pro_vpt.py against the plain arrangement, in one process.

The idea
    pro_vpt.py leaves out work whose result cannot change: what blocks make of the prompts (which is
    dropped), everything but the class token in the last block, embedding fixed pictures again, and
    evaluating when nobody asked. The tests show that the numbers stay equal; this script measures
    what it saves, on a randomly initialised ViT-B/16 with 20 prompts a block (the time does not
    depend on the weights).

Run
    python benchmarks/pro_vpt_epoch.py             one thread, about five minutes, 5 GB of memory
    python benchmarks/pro_vpt_epoch.py --quick     seconds: a tiny model, whose ratios mean nothing

Prints
    Seconds per unit, units per epoch, seconds per epoch, plain and fast. Times are medians over
    --repeats of CPU time of this process (--threads > 1: of wall time), plain and fast in turn, so
    that a busy machine disturbs both. The last line is RESULT exact_ratio=... with plain / fast.

Cost model: an epoch on VTAB-1k data
    1,000 training images: a scoring pass and a training pass, as batches of 64 (15.6 each). The
    authors' code evaluates after every epoch: 200 validation images (which in the final run are
    among the training images) and the test set, of which the 19 tasks have 13,000 on average; we
    count --test-images, 2,000 unless told otherwise, to be careful. exact_ratio is the whole epoch
    with those, pro_vpt.py's being without evaluation; passes_ratio leaves evaluation out on both
    sides; running_ratio is pro_vpt.py's epoch over that of beyond/pro_vpt_adaptive.py with
    --scores running.
"""
import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import transformers

import pro_vpt
from benchmarks import pro_vpt_plain as plain

TRAIN, VAL = 1000, 200


class Watch:
    """Medians of repeated times: `with watch("name"): ...`, then watch["name"] in seconds."""

    def __init__(self, threads):
        self.clock, self.times = 0 if threads == 1 else 1, {}

    @contextlib.contextmanager
    def __call__(self, name):
        before = time.process_time(), time.perf_counter()
        yield
        after = time.process_time(), time.perf_counter()
        self.times.setdefault(name, []).append([b - a for a, b in zip(before, after, strict=True)])

    def __getitem__(self, name):
        return statistics.median(t[self.clock] for t in self.times[name])


def build(quick):
    """A random ViT -> (PromptedViT, the plain model with the same numbers), 100 classes."""
    torch.manual_seed(0)
    size = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
            "intermediate_size": 96, "image_size": 32} if quick else {}
    config = transformers.ViTConfig(**size, layer_norm_eps=1e-6)
    vit = transformers.ViTModel(config, add_pooling_layer=False)
    counts = [20] * config.num_hidden_layers
    model = pro_vpt.PromptedViT(vit, 100, counts)
    prompts = [[model.prompts.detach()[k] for k in rows.tolist()] for rows in model.rows]
    peer = plain.PlainPromptedViT(vit, prompts, model.head.weight.detach(),
                                  model.head.bias.detach(), dropout=.1)
    return model, peer


def dropout_noise(model, batch):
    """As the training loop draws it: (B, N, D)."""
    return (torch.rand(batch, *model.prompts.shape) >= .1) / .9


def fast_gradients(model, wanted, tokens, labels):
    loss = F.cross_entropy(model(tokens, dropout_noise(model, len(tokens))), labels)
    return loss, torch.autograd.grad(loss, wanted)


def fast_step(model, optimizer, tokens, labels, running=None):
    """One step of pro_vpt.train_epoch; running: sums the scores up as well."""
    params = list(model.trainable().values())
    _, grads = fast_gradients(model, params, tokens, labels)
    if running is not None:
        running += pro_vpt.idleness_scores(model.prompts.detach(), grads[0])
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    torch.nn.utils.clip_grad_norm_(params, .25)
    optimizer.step()


def fast_score(model, tokens, labels):
    """One batch of the scoring pass (dropout off, as in pro_vpt.py's default)."""
    loss = F.cross_entropy(model(tokens), labels)
    (gradient,) = torch.autograd.grad(loss, [model.prompts])
    return pro_vpt.idleness_scores(model.prompts.detach(), gradient)


def measure(watch, model, peer, pixels, labels, repeats):
    """Time every unit `repeats` times, plain and fast in turn."""
    with torch.no_grad():
        tokens = model.embed(pixels)
    fast = torch.optim.SGD(model.trainable().values(), .01, .9, weight_decay=1e-4)
    slow = torch.optim.SGD([*peer.prompts(), peer.weight, peer.bias], .01, .9, weight_decay=1e-4)
    running = torch.zeros(len(model.prompts))
    for repeat in range(repeats + 1):
        timer = watch if repeat else Watch(1)  # the first round warms up
        with timer("plain score"):
            plain.score_pass(peer, [(pixels, labels)])
        with timer("fast score"):
            fast_score(model, tokens, labels)
        with timer("plain step"):
            plain.train_step(peer, slow, pixels, labels)
        with timer("fast step"):
            fast_step(model, fast, tokens, labels)
        with timer("fast running step"):
            fast_step(model, fast, tokens, labels, running)
        with timer("plain evaluation"):
            plain.evaluate(peer, [(pixels, labels)])


def show(rows):
    """Print (what, seconds, units) -> seconds of an epoch."""
    for what, cost, units in rows:
        print(f"  {what:44}{cost:10.4f}{units:10.1f}{cost * units:12.1f}")
    total = sum(cost * units for _, cost, units in rows)
    print(f"  {'sum':64}{total:12.1f}")
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for the tests")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8,
                        help="images per measured unit (epochs are counted in images)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test-images", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    model, peer = build(options.quick)
    size = model.vit.config.image_size
    pixels = torch.randn(options.batch, 3, size, size)
    labels = torch.randint(100, (options.batch,))
    watch = Watch(options.threads)
    measure(watch, model, peer, pixels, labels, options.repeats)
    n, tested = TRAIN / options.batch, (VAL + options.test_images) / options.batch
    print(f"{'':46}{'s / unit':>10}{'units':>10}{'s / epoch':>12}")
    print("plain, as the authors arrange it")
    passes = show([("scoring pass, per batch", watch["plain score"], n),
                   ("training pass, per batch", watch["plain step"], n)])
    tests = [("evaluation on val and test, per batch", watch["plain evaluation"], tested)]
    whole = passes + show(tests)
    print("pro_vpt.py")
    fast = show([("scoring pass, per batch", watch["fast score"], n),
                 ("training pass, per batch", watch["fast step"], n)])
    print("beyond/pro_vpt_adaptive.py --scores running")
    running = show([("training pass, per batch", watch["fast running step"], n)])
    kind = "CPU" if options.threads == 1 else "wall"
    print(f"{kind} times, medians of {options.repeats}, {options.threads} thread(s), batches of "
          f"{options.batch}, torch {torch.__version__}")
    ratios = {"exact_ratio": whole / fast, "passes_ratio": passes / fast,
              "running_ratio": fast / running,
              "train_step_ratio": watch["plain step"] / watch["fast step"],
              "score_ratio": watch["plain score"] / watch["fast score"]}
    print("RESULT " + " ".join(f"{k}={v:.2f}" for k, v in ratios.items()))


if __name__ == "__main__":
    main()
