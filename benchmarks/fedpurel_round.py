"""What one round of FedPuReL costs: fedpurel.py against the plain arrangement, in one process.

The idea
    fedpurel.py leaves out work whose result cannot change (frozen image features, text after the
    last end-of-text, the prefix that all prompts share, fixed global logits). The tests show that
    the numbers stay equal; this script measures what it saves, on a randomly initialised ViT-B/16
    (the time does not depend on the weights) and CIFAR-100's class names.

Run
    python benchmarks/fedpurel_round.py             one thread, about five minutes, 8 GB of memory
    python benchmarks/fedpurel_round.py --quick     seconds: a tiny model, whose ratios mean nothing

Prints
    A table for every comparison: seconds per unit, units per round, seconds per round. All times
    are medians over --repeats of CPU time of this process (with --threads > 1: of wall time), plain
    and fast in turn, so that a busy machine disturbs both. The last line is
    RESULT prompt_ratio=... augmented_ratio=... lora_ratio=... ... with the ratios plain / fast.

Cost model: an average CIFAR-100-LT round at K = 20
    8 clients x 16.5 steps of 32 images (542 on average) = 132 steps in stage 1 and in stage 2, then
    the global model on 10,000 test images and 20 personal models on 500 each (fedpurel.py keeps the
    private logits of the 12 clients that were not chosen). Plain passes are
    counted as benchmarks/fedpurel_plain.py makes them: the models with a learned prompt encode all
    class texts again in every forward, in evaluation in batches of 100 images. A pass over n images
    counts as n times the time per image, measured on --images of them; likewise plain text passes,
    on --texts. Small passes are the cheaper ones per image and text on a CPU, on either side; one
    line compares a whole plain step with the sum of its parts. Two plain LoRA layers are timed:
    lora_ratio is against the low-rank one, lora_product_ratio against the one that multiplies by
    the (D, D) product B A. Not counted: TKL, purification and SGD of the plain arrangement (they
    are in the fast times), reading un-augmented pixels (either side), and what is done once in a
    run: fedpurel.py encodes all images, which prompt_ratio_with_encoding spreads over 100 rounds.
"""
import argparse
import contextlib
import copy
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import peft
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import fedpurel
from benchmarks import fedpurel_plain as plain

STEPS, BATCH, CHOSEN, CLIENTS = 132, 32, 8, 20  # steps of a stage, over all chosen clients
TRAIN, TEST, OWN_TEST, EVAL_BATCH = 542, 10_000, 500, 100  # images of a client, of the test set
POOL, ROUNDS = 20_847, 100  # images that fedpurel.py encodes once, rounds of a run

# ================================================================================================
# Measuring
# ================================================================================================


class Watch:
    """Medians of repeated times: `with watch("name", units): ...`, then watch["name"] per unit."""

    def __init__(self, threads):
        self.clock = 0 if threads == 1 else 1
        self.times = {}

    @contextlib.contextmanager
    def __call__(self, name, units=1):
        before = time.process_time(), time.perf_counter()
        yield
        after = time.process_time(), time.perf_counter()
        spent = [(b - a) / units for a, b in zip(before, after, strict=True)]
        self.times.setdefault(name, []).append(spent)

    def __getitem__(self, name):
        return statistics.median(t[self.clock] for t in self.times[name])

    def busy(self):
        """Wall time over CPU time of everything: above 1, other processes had the core."""
        spent = [sum(t[i] for ts in self.times.values() for t in ts) for i in (0, 1)]
        return spent[1] / spent[0]


def show(title, plain_rows, fast_rows):
    """Print both lists of (what, seconds per unit, units) with their sums -> ratio of the sums."""
    print(f"\n{title}\n{'':47}{'s / unit':>10}{'units':>10}{'s / round':>12}")
    sums = []
    for name, rows in (("plain", plain_rows), ("fast", fast_rows)):
        for what, cost, units in rows:
            print(f"  {name:5}  {what:38}{cost:11.4f}{units:10,.0f}{cost * units:12.1f}")
        sums.append(sum(cost * units for _, cost, units in rows))
        print(f"  {name:5}  {'sum':59}{sums[-1]:12.1f}")
    print(f"  ratio {sums[0] / sums[1]:.2f}", flush=True)
    return sums[0] / sums[1]


def matmul_rate(watch, size, repeats):
    """GFLOP/s of a float32 matrix product of this size."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    for _ in range(2 + repeats):
        with watch("matrix product"):
            a @ b
    return 2 * size ** 3 / 1e9 / watch["matrix product"]


# ================================================================================================
# What is measured
# ================================================================================================


def build_clip(quick):
    """A random frozen CLIP: ViT-B/16, or a tiny one of the same kind."""
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    if quick:
        config["embed_dim"] = 32
        config["vision_cfg"].update(layers=2, width=64, head_width=32, image_size=32)
        config["text_cfg"].update(layers=2, width=32, heads=2)
    return open_clip.CLIP(**config).requires_grad_(False).eval()


def build_world(clip, kind, batch, augment=False):
    """A Federation of one client -> the Federation, prompt tokens (C, 77).

    Prompt mode: random image features, TRAIN and TEST samples. Where pixels are read (lora, or
    augmentation): random pictures of CIFAR's size, one batch to train on and one to test on.
    """
    words = ["--dataset", "cifar100-lt", "--peft", kind, "--batch", str(batch)]
    args = fedpurel.resolve(fedpurel.build_parser().parse_args(words + ["--augment"] * augment))
    names = sorted(data.readable(c) for row in data.CIFAR100_COARSE for c in row.split())
    tokenizer = open_clip.get_tokenizer("ViT-B-16-quickgelu")
    text = data.text_features(clip, tokenizer([data.PHOTO.format(c) for c in names]))
    tokens = tokenizer([f"{' '.join(['X'] * args.n_ctx)} {c}." for c in names])
    student = fedpurel.TunedCLIP(
        clip, kind, text, prompt_tokens=tokens if kind == "prompt" else None, n_ctx=args.n_ctx,
        rank=args.rank, dropout=args.lora_dropout)

    pictures = kind == "lora" or augment
    n_train, n_test = (batch, batch) if pictures else (TRAIN, TEST)
    n, size = n_train + n_test, clip.visual.image_size[0]
    noise = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    look = size, (.48, .46, .41), (.27, .26, .28)
    pool = data.ImagePool(data.Images(noise), data.pixel_transform(*look),
                          data.pixel_transform(*look, crop=.08))
    if kind == "lora":
        pool.preload()
    test = torch.arange(n_train, n)
    inputs = data.FederatedImages(
        clip=clip, tokenizer=tokenizer, pool=pool, features=torch.randn(n, text.shape[1]),
        labels=torch.randint(len(names), (n,)), clients=[(torch.arange(n_train), test[:OWN_TEST])],
        test=test, groups={}, class_names=names, template=data.PHOTO)
    return fedpurel.Federation(inputs, student, text, args), tokens


def shorten(world, steps):
    """The same federation, but its client holds `steps` full batches."""
    train, test = world.clients[0]
    short = copy.copy(world)
    short.clients, short.known_private = [(train[:steps * world.args.batch], test)], {}
    return short


def initial(world):
    """A FedPuReL state whose client has private parameters."""
    state = fedpurel.fresh_state(world, "fedpurel")
    return {**state, "private": {0: state["base"]}}


def watch_training(watch, name, forward, params, units, backwards):
    """Times of `name forward`, which keeps its graph, and of `name backward`, once or more."""
    with watch(f"{name} forward", units):
        output = forward()
        loss = (output * torch.randn_like(output)).sum()
    for i in reversed(range(backwards)):
        with watch(f"{name} backward", units):
            torch.autograd.grad(loss, params, retain_graph=i > 0)


def watch_fast(watch, name, world, state, steps):
    """Times of fedpurel.py's own two stages on the federation's client, per step."""
    with watch(f"{name} stage 1", steps):
        fedpurel.tune_shared(world, state["global"], 0, "fedpurel", 0)
    with watch(f"{name} stage 2", steps):
        fedpurel.tune_private(world, state["base"], state["global"], 0, 0)


# ================================================================================================
# Comparisons
# ================================================================================================


def compare_prompt(watch, clip, options):
    """Prompt mode with features encoded once, and with augmentation -> the two ratios."""
    n = options.images
    world, tokens = build_world(clip, "prompt", BATCH)
    augmented, _ = build_world(clip, "prompt", n, augment=True)
    short, state = shorten(world, options.steps), initial(world)
    train = augmented.clients[0][0]
    pixels = torch.randn(n, 3, *clip.visual.image_size)
    prompt = plain.PlainPrompt(clip, tokens[:options.texts], world.args.n_ctx)
    share = options.texts / len(tokens)
    for _ in range(options.repeats):
        with watch("image pass", n), torch.no_grad():
            clip.encode_image(pixels)
        with watch("text pass", share), torch.no_grad():
            prompt()
        watch_training(watch, "text", prompt, [prompt.ctx], share, backwards=2)
        watch_fast(watch, "prompt", short, state, options.steps)
        with watch("frozen logits"):
            short.logits(state["global"], short.clients[0][0])
        with watch("global test"):
            logits = world.logits(state["global"], world.test)
        world.known_private.clear()  # the chosen clients' private parameters are new
        with watch("personal test"):
            fedpurel.predict_personal(world, "fedpurel", state, 0, logits)
        watch_fast(watch, "augmented", augmented, state, 1)
        with watch("augmented read", n):
            next(augmented.epoch(0, "shared", 0))
        with watch("read", n):
            next(augmented.pool.batches([train], [list(range(n))]))

    t, images = watch, STEPS * BATCH
    train_1 = t["text forward"] + 2 * t["text backward"]
    train_2 = t["text pass"] + t["text forward"] + t["text backward"]
    plain_rows = [
        ("stage 1: images, student and teacher", 2 * t["image pass"], images),
        ("stage 1: texts forward, 2 backward", train_1, STEPS),
        ("stage 2: images, global and private", 2 * t["image pass"], images),
        ("stage 2: texts 2 forward, backward", train_2, STEPS),
        ("test: images, global model", t["image pass"], TEST),
        ("test: images, personal models", 2 * t["image pass"], CLIENTS * OWN_TEST),
        ("test: texts, batches of 100 images", t["text pass"],
         (TEST + 2 * CLIENTS * OWN_TEST) / EVAL_BATCH)]
    test_rows = [("test: global model", t["global test"], 1),
                 ("test: personal models that changed", t["personal test"], CHOSEN)]
    private = t["prompt stage 2"] - t["frozen logits"] / options.steps
    fast_rows = [("stage 1: step", t["prompt stage 1"], STEPS),
                 ("stage 2: frozen global logits", t["frozen logits"], CHOSEN),
                 ("stage 2: step", private, STEPS), *test_rows]
    ratio = show("Prompt: every image encoded once", plain_rows, fast_rows)
    once = POOL * t["image pass"]
    fast = sum(cost * units for _, cost, units in fast_rows)
    spread = ratio * fast / (fast + once / ROUNDS)
    print(f"  ratio {spread:.2f} with {once:.0f} s, for encoding {POOL:,} images once, spread over "
          f"{ROUNDS} rounds")

    rest = [t[f"augmented stage {i}"] - n * t["augmented read"] for i in (1, 2)]
    augmented_rows = [("images, read and encoded", t["augmented read"], 2 * images),
                      ("stage 1: the rest of a step", rest[0], STEPS),
                      ("stage 2: the rest of a step", rest[1], STEPS), *test_rows]
    augmented_ratio = show("Prompt: augmentation makes an image pass a step necessary",
                           [("reading images", t["read"], 2 * images), *plain_rows], augmented_rows)
    return {"prompt_ratio": ratio, "prompt_ratio_with_encoding": spread,
            "augmented_ratio": augmented_ratio}, short, state


def compare_lora(watch, clip, options):
    """LoRA mode, with the plain LoRA layer through rank r and with its (D, D) product -> ratios."""
    n = options.images
    world, _ = build_world(clip, "lora", n)
    state, train = initial(world), world.clients[0][0]
    pixels = torch.randn(n, 3, *clip.visual.image_size)
    towers = {name: plain.PlainLoRAModel(clip, world.text, materialise=name == "product").visual
              for name in ("rank r", "product")}
    for _ in range(options.repeats):
        with watch("teacher", n), torch.no_grad():
            clip.encode_image(pixels)
        for name, tower in towers.items():
            with watch(f"{name} pass", n), torch.no_grad():
                tower.eval()(pixels)
            watch_training(watch, name, lambda tower=tower: tower.train()(pixels),
                           plain.trainable(tower), n, backwards=2)
        watch_fast(watch, "lora", world, state, 1)
        with watch("lora frozen logits", n):
            world.logits(state["global"], train)

    t, images, ratios = watch, STEPS * BATCH, {}
    private = t["lora stage 2"] / n - t["lora frozen logits"]
    fast_rows = [("stage 1: forward, 2 backward", t["lora stage 1"] / n, images),
                 ("stage 2: frozen global logits", t["lora frozen logits"], CHOSEN * TRAIN),
                 ("stage 2: forward, backward", private, images),
                 ("test: global, changed personal models", t["lora frozen logits"],
                  TEST + CHOSEN * OWN_TEST)]
    for name in towers:
        once, forward, backward = (t[f"{name} {what}"] for what in ("pass", "forward", "backward"))
        plain_rows = [("stage 1: teacher", t["teacher"], images),
                      ("stage 1: forward, 2 backward", forward + 2 * backward, images),
                      ("stage 2: global", once, images),
                      ("stage 2: forward, backward", forward + backward, images),
                      ("test: global model", once, TEST),
                      ("test: personal models", 2 * once, CLIENTS * OWN_TEST)]
        key = "lora_ratio" if name == "rank r" else "lora_product_ratio"
        ratios[key] = show(f"LoRA, the plain layer multiplies by "
                           f"{'A, then B' if name == 'rank r' else 'the product B A'}",
                           plain_rows, fast_rows)
    return ratios


def compare_layers(watch, clip, options):
    """fedpurel.AttentionLoRA against peft's layer for nn.MultiheadAttention: one training step."""
    n, text = options.images, torch.zeros(2, clip.visual.output_dim)
    pixels = torch.randn(n, 3, *clip.visual.image_size)
    towers = {f"AttentionLoRA, dropout {p}": fedpurel.TunedCLIP(clip, "lora", text, dropout=p)
              for p in (.25, 0)}
    for student in towers.values():
        student.dropout(True)
    towers = {name: student.visual for name, student in towers.items()}
    config = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=["attn"],
                             lora_dropout=0)
    towers["peft, dropout 0"] = peft.get_peft_model(copy.deepcopy(clip.visual), config)
    towers["no LoRA, forward only"] = clip.visual
    for _ in range(options.repeats):
        for name, tower in towers.items():
            params = plain.trainable(tower)
            with watch(name), torch.set_grad_enabled(bool(params)):
                output = tower(pixels)
                if params:
                    torch.autograd.grad(output.square().sum(), params)
    print(f"\nLoRA in the vision tower: a step on {n} images")
    print(f"{'':33}{'s / step':>10}{'trainable':>12}")
    for name, tower in towers.items():
        count = sum(p.numel() for p in plain.trainable(tower))
        print(f"  {name:31}{watch[name]:10.3f}{count:12,}")
    ours, theirs = (watch[name] for name in ("AttentionLoRA, dropout 0", "peft, dropout 0"))
    print(f"  peft / ours {theirs / ours:.2f}", flush=True)
    return {"peft_ratio": theirs / ours}


def compare_floor(watch, short, state, options):
    """The fast prompt steps against their floating-point operations at a large matrix's rate."""
    size = 256 if options.quick else 2048
    rate = matmul_rate(watch, size, options.repeats)
    print(f"\nFloor: float32 products of {size} x {size} matrices run at {rate:.1f} GFLOP/s")
    start, base, slower = state["global"], state["base"], {}
    for stage, run in ((1, lambda: fedpurel.tune_shared(short, start, 0, "fedpurel", 0)),
                       (2, lambda: fedpurel.tune_private(short, base, start, 0, 0))):
        with FlopCounterMode(display=False) as counter:
            run()
        work = counter.get_total_flops() / 1e9 / options.steps
        spent = watch[f"prompt stage {stage}"]
        slower[f"floor_stage{stage}"] = spent * rate / work
        print(f"  stage {stage} step: {work:.1f} GFLOP, {work / rate:.3f} s at that rate, "
              f"{spent:.3f} s measured, {spent * rate / work:.2f} times the floor")
    return slower


def check_plain_step(watch, clip, tokens, text, options):
    """One whole plain step of stage 1 beside the sum of the parts that the tables are made of."""
    model = plain.PlainPromptModel(clip, tokens)
    n = options.images
    pixels, labels = torch.randn(n, 3, *clip.visual.image_size), torch.randint(len(text), (n,))
    optimizer = torch.optim.SGD(plain.trainable(model), 1e-3, .9, weight_decay=5e-4)
    with watch("plain step"):
        plain.shared_step(model, plain.PlainTeacher(clip, text), pixels, labels, optimizer)
    parts = 2 * n * watch["image pass"] + watch["text forward"] + 2 * watch["text backward"]
    print(f"\nA whole plain step of stage 1 on {n} images: {watch['plain step']:.2f} s, "
          f"the sum of its measured parts: {parts:.2f} s")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=None, help="default 3; 1 with --quick")
    parser.add_argument("--images", type=int, default=4, help="in a pass (default %(default)s)")
    parser.add_argument("--texts", type=int, default=25,
                        help="class texts in a plain pass (default %(default)s of 100)")
    parser.add_argument("--steps", type=int, default=2,
                        help="fast prompt steps measured together (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    options = parser.parse_args(argv)
    options.repeats = options.repeats or (1 if options.quick else 3)
    torch.set_num_threads(options.threads)
    watch, clip = Watch(options.threads), build_clip(options.quick)
    began = time.perf_counter()
    ratios, short, state = compare_prompt(watch, clip, options)
    check_plain_step(watch, clip, build_world(clip, "prompt", BATCH)[1], short.text, options)
    ratios |= compare_lora(watch, clip, options)
    ratios |= compare_layers(watch, clip, options)
    ratios |= compare_floor(watch, short, state, options)
    kind = "CPU" if options.threads == 1 else "wall"
    print(f"\n{kind} times, medians of {options.repeats}, {options.threads} thread(s), torch "
          f"{torch.__version__}; wall / CPU time {watch.busy():.2f}; "
          f"whole run {time.perf_counter() - began:.0f} s")
    print("RESULT " + " ".join(f"{k}={v:.2f}" for k, v in ratios.items()))


if __name__ == "__main__":
    main()
