"""ELSA's costs before one has them: what a phone would carry, and how long a simulated round takes

The idea
    Which models a phone can help to tune is a question of memory, bytes and operations, and none of
    these needs the weights: a configuration says how many there are. From it alone, each cut is
    priced. Second, ELSA gives clients to edges by behaviour first and latency second; what that
    costs or gains in time is simulated on the network and the devices that --split auto reads: the
    critical path of a round, that is its slowest client, under ELSA's placement, with everybody at
    the nearest edge, and at random.

Run
    python beyond/elsa_plan.py qwen2.5-0.5b          each cut of a model: seconds, no weights
    python beyond/elsa_plan.py DIR_OR_HUB_ID --channel quant --bits 8 --batch 8 --max-length 128
    python beyond/elsa_plan.py                       times in the small world in 8 bits: a minute
    python beyond/elsa_plan.py --split auto          each client as many blocks as it can carry
    python beyond/elsa_plan.py --channel sketch --tau-max 30 --capacity 4

What it adds to elsa.py (all other flags are those of elsa.py; channels: those of elsa_channels.py)
    MODEL_CONFIG         a directory, a config.json, a hub id, or one of the two in CONFIGS
                         -> plan: a table and a figure over the cuts, (p, q) as --split auto shares
                         blocks, or the one cut of --split P,Q
    seconds of a round   round_seconds, placement_table; "seconds" in result.json
    a client's part      memory and FLOPs of parts 1 and 3, in percent of the whole model
    Network and devices are data.draw_network's (UNSPECIFIED 5 of elsa.py), an edge computes ten
    times as fast as the median device: all times are as good as these, the order of the rows is
    what they are for.

What the plan counts
    memory      the weights of parts 1 and 3, and 16 bytes for every number that is trained (itself,
                its gradient, AdamW's two moments); not the states kept for the way back
    a step      what elsa.Link counts for --batch texts of --max-length tokens, up and down; an
                upper bound, since a batch is as long as its longest text
    adapters    those of parts 1 and 3 and the head, down and up once a round
    FLOPs       of a step's blocks, there and back: 2 for each weight and token forwards, 2 back, 2
                more where the weight is trained, and 12 T A for a text's T tokens and attention's
                width A

Results
    plan, 32 texts of 64 tokens a step, bfloat16, --channel none, one block in front and one behind:
    of Qwen2.5-0.5B (494 M) a phone carries 166 M, 333 MB, and 7.3 MB go each way in a step; of
    Llama-3.2-1B (1,236 M) 384 M, 770 MB and 16.8 MB. Most of that is the table of words.
    small world, 5 seeds, the paper's sketch: slowest client of a round 3.95 ± .56 s under ELSA's
    placement, 4.38 ± 1.06 s at random (shorter in 4 of 5 seeds, p .13: not shown), 3.56 ± .83 s at
    the nearest edge, which ignores behaviour.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import common
import data
import elsa
from beyond import elsa_channels

# Two decoders of today as their makers publish them, so that nothing has to be downloaded
CONFIGS = {
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2,
                     "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    "llama-3.2-1b": {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                     "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
}

# ------------------------------------------------------------------------------------------------
# What a phone would carry
# ------------------------------------------------------------------------------------------------


def meta_split(name, args):
    """MODEL_CONFIG -> an elsa.SplitEncoder for two classes with LoRA, on the meta device: shapes
    without numbers."""
    from transformers import AutoConfig

    if name.lower() in CONFIGS:
        config = AutoConfig.for_model(**CONFIGS[name.lower()])
    else:
        with data.hub_if_reachable(name) as why:
            config, _ = data.text_config(name, args.data_dir / "weights", why)
    encoder = data.meta_model(name, config)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    with torch.device("meta"):
        model = elsa.SplitEncoder(encoder, 2)
        elsa.put_lora(model, args.rank, args.lora_alpha)
    return model


def price(model, cut, args):
    """What a cut (p, q) of a model costs: dict of numbers, bytes and FLOPs.

    The parameters of the client's part; its memory with frozen weights in float32 and in bfloat16;
    bytes of a step up and down, and of the adapters a round; FLOPs of a step at client and edge.
    """
    p, q = cut
    blocks, config = model.stack(), model.encoder.config
    client = {n: w for n, w in model.named_parameters()
              if not any(w is v for block in blocks[p:q] for v in block.parameters())}
    trained = {n: w.detach().to("meta") for n, w in client.items() if w.requires_grad}
    frozen = sum(w.numel() for w in client.values()) - sum(w.numel() for w in trained.values())
    extra = 16 * sum(w.numel() for w in trained.values())
    sent, updates = step_bytes(model, cut, args)
    size = 4 * sum(w.numel() for w in trained.values())
    up = size if updates is None else elsa.send_update(trained, trained, updates,
                                                       config.hidden_size)[1]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = args.batch * args.max_length
    flops = [sum((6 if w.requires_grad else 4) * w.numel() for w in block.parameters()) * tokens
             + 12 * tokens * args.max_length * width for block in blocks]
    return {"parameters": sum(w.numel() for w in client.values()),
            "float32": 4 * frozen + extra, "bfloat16": 2 * frozen + extra,
            "step up": sent["activations up"] + sent["gradients up"],
            "step down": sent["activations down"] + sent["gradients down"],
            "adapters": size + up, "client FLOPs": sum(flops[:p] + flops[q:]),
            "edge FLOPs": sum(flops[p:q])}


def step_bytes(model, cut, args):
    """elsa.Link's bytes of one step by exchange, and the codec of adapters: by sending shapes."""
    width = model.encoder.config.hidden_size
    # A pseudo-inverse takes seconds and no bytes; low rank sends as much in whichever directions
    flags = argparse.Namespace(**{**vars(args), "recovery": "median"})
    world = argparse.Namespace(args=flags, width=width, device="meta",
                               channels=elsa_channels.CHANNELS)
    anywhere = {name: torch.empty(width, width, device="meta") for name in elsa.EXCHANGES}
    codecs, updates = elsa.make_codecs(world, {"directions": {str(cut): anywhere}}, cut)
    link = elsa.Link(codecs)
    states = torch.empty(args.batch, args.max_length, width, device="meta",
                         dtype=getattr(torch, args.dtype), requires_grad=True)
    link.to_client(link.to_edge(states)).sum().backward()
    return link.sent, updates


def plan(args):
    """The table and the figure of MODEL_CONFIG."""
    common.fill_in(args, elsa.REAL)
    elsa_channels.settle(args)
    model = meta_split(args.config, args)
    elsa.check_channel(args, model.encoder.config.hidden_size,
                       lambda text: print(f"note: {text}", file=sys.stderr))
    layers, name = model.layers, Path(args.config).name
    # As --split auto shares blocks, from one of them at home to all but one
    cuts = [elsa.choose_cut(layers, 0, 1, n, 1, layers) for n in range(1, max(layers, 2))]
    if args.split not in (None, "auto"):
        cuts = [elsa.read_cut(args.split, layers)]
    with common.Run(args, f"elsa-plan-{name}") as run:
        run.load()
        run.begin()
        elsa.keep_sources(run, [elsa.main, elsa_channels.main, plan])
        whole = sum(w.numel() for w in model.encoder.parameters() if not w.requires_grad)
        kind = type(model.encoder).__name__
        run.source("encoder", f"{kind} of {args.config}, {layers} blocks, width "
                   f"{model.encoder.config.hidden_size}, {whole / 1e6:,.1f} M parameters; no "
                   "weights needed", str(model.encoder.config))
        rows = [price(model, cut, args) for cut in cuts]
        run.table(["cut", "M parameters", "MB float32", "MB bfloat16", "step up MB",
                   "step down MB", "adapters MB", "GFLOP client", "GFLOP edge"],
                  [[f"{p},{q}", *(r[k] / 1e6 for k in list(r)[:6]), r["client FLOPs"] / 1e9,
                    r["edge FLOPs"] / 1e9] for (p, q), r in zip(cuts, rows, strict=True)])
        result = {"config": args.config, "parameters": whole, "cuts": cuts, "rows": rows}
        run.finish(result, lambda path: draw_plan(result, args, path), script="elsa-plan",
                   config=args.config, parameters=whole, out=run.out_dir)


def draw_plan(result, args, path):
    """Memory of the client's part against the bytes of a round, one point a cut."""
    title = (f"{Path(args.config).name}: {args.batch} texts of {args.max_length} tokens a step, "
             f"channel {args.channel}")
    rows, cuts, top = result["rows"], result["cuts"], 0
    with common.figure(path, title, (7, 4.4), nrows=1, ncols=1) as (_, axis):
        for dtype, colour, mark, side in (("float32", common.ORANGE, "o", 6),
                                          ("bfloat16", common.BLUE, "s", -14)):
            x = [r[dtype] / 1e6 for r in rows]
            # states have the type of the weights, and so half the bytes where those are halved; a
            # channel of bits or of float32 numbers sends the same whatever they are
            size = getattr(torch, dtype).itemsize / getattr(torch, args.dtype).itemsize
            size = size if args.channel in ("none", "sketch") else 1
            y = [(args.steps * size * (r["step up"] + r["step down"]) + r["adapters"]) / 1e6
                 for r in rows]
            top = max(top, *y)
            axis.plot(x, y, color=colour, marker=mark, ms=4, label=dtype)
            for i in {0, len(cuts) // 2, len(cuts) - 1}:
                axis.annotate("{},{}".format(*cuts[i]), (x[i], y[i]), xytext=(0, side),
                              textcoords="offset points", ha="center", fontsize=8)
        axis.set(xlabel="memory of the client's part (MB); labels: cut p,q",
                 ylabel=f"MB on the link in a round of {args.steps} steps", ylim=(0, 1.2 * top))
        axis.legend(frameon=False, loc="lower right", title="weights and states")


# ------------------------------------------------------------------------------------------------
# How long a round takes
# ------------------------------------------------------------------------------------------------


def round_seconds(world, groups, history):
    """Simulated seconds of a round under a placement: the slowest client.

    groups: dict edge -> clients. Compute of the client's blocks and of the edge's (ten times a
    median device, shared by its clients), four crossings a step, and the mean client's bytes over
    its bandwidth.
    """
    flops = elsa.block_cost(world)[2]
    net, slowest = world.network, 0.0
    clients = sum(len(g) for g in groups.values())
    share = 1e6 * history[-1]["megabytes"] / max(clients, 1)
    for e, members in groups.items():
        for k in members:
            p, q = world.cuts[k]
            # steps · (compute of the client, its share of the edge, four waits) + its bytes
            steps = max(len(world.clients[k][0]) // world.args.batch, 1) * world.args.local_epochs
            mine = (p + world.model.layers - q) * flops / float(net["flops"][k])
            edge = (q - p) * flops * len(members) / 500e9
            wait = 4 * float(net["latency"][k, e]) / 1e3
            slowest = max(slowest, steps * (mine + edge + wait)
                          + share / float(net["bandwidth"][k]))
    return slowest


def placements(world, groups, history):
    """Seconds of a round of ELSA's clients: dict placement -> seconds."""
    members = [k for g in groups.values() for k in g]
    latency, edges = world.network["latency"], world.args.edges
    nearest = {e: [k for k in members if int(latency[k].argmin()) == e] for e in range(edges)}
    rng = common.numpy_generator(world.args.seed, "random placement")
    draws = []
    for _ in range(20):
        order = rng.permutation(members).tolist()
        draws.append(round_seconds(world, {e: order[e::edges] for e in range(edges)}, history))
    return {"ELSA": round_seconds(world, groups, history),
            "nearest edge": round_seconds(world, nearest, history),
            "random (mean of 20)": float(np.mean(draws))}


def placement_table(world, run, state, result):
    """Critical path of ELSA's placement beside nearest edge and random, and what a client holds."""
    if "elsa" not in state["done"]:
        return
    seconds = placements(world, result["groups"], state["done"]["elsa"]["history"])
    run.table(["\nseconds of a round, simulated", "slowest client"],
              [[k, v] for k, v in seconds.items()])
    block, fixed, _ = elsa.block_cost(world)
    layers = world.model.layers
    mine = [p + layers - q for p, q in world.cuts]
    run.table(["\nclient's part of the model", "smallest", "largest"],
              [["memory %", *(100 * (fixed + f(mine) * block) / (fixed + layers * block)
                              for f in (min, max))],
               ["FLOPs %", *(100 * f(mine) / layers for f in (min, max))]])
    result["seconds"] = seconds


def add_plan(parser):
    parser.add_argument("config", nargs="?", metavar="MODEL_CONFIG", help="price the cuts of this "
                        f"model: a directory, config.json, hub id or {' or '.join(CONFIGS)}")
    parser.group("plan")("--steps", int, 20, "of a client in a round, for the figure of a plan",
                         low=1)


def main(argv=None):
    flags = [elsa_channels.add_bits, add_plan]
    args = elsa.build_parser(__doc__, elsa_channels.CHANNELS, flags).parse_args(argv)
    if args.config is not None:
        return plan(args)
    elsa.main(argv, doc=__doc__, title="elsa-plan", **elsa_channels.SEAM, flags=flags,
              reports=[placement_table])


if __name__ == "__main__":
    common.run_cli(main)
