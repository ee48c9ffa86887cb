"""ELSA's link with cheaper ways to send a state: low rank and bits, beside the paper's sketch

The idea
    The paper compresses what crosses the link by a count sketch, which was made for vectors with
    few large entries. Hidden states are dense, and a median over colliding dense entries loses most
    of them. Two plain channels fit states better: (1) lowrank, the principal directions of what
    crosses each exchange, learned once on the public probes; (2) quant, stochastic rounding to a
    few bits. They can be had together.

Run
    python beyond/elsa_channels.py                           the small world in 8 bits: a minute
    python beyond/elsa_channels.py --channel lowrank --ratio .25 --bits 8
    python beyond/elsa_channels.py --channel sketch --dataset trec --model DIR_OR_HUB_ID

What it adds to elsa.py (all other flags are those of elsa.py)
    --channel lowrank, quant    Projection, public_directions; quantise
    --bits 2, 4, 8, 32          of every number sent, on any channel but none
    a curve                     the trained model read through every channel (channel_curve), as a
                                table, in result.json and in curve.png: error and accuracy by bytes
    DEVIATION 1                 both channels stand where the paper has its sketch, and the small
                                world sends 8 bits here.

Cost
    lowrank: one forward and backward pass over the probes for each cut, before the first round,
    with labels that the model itself draws, so nothing private is used; the directions are public.
    quant: 1 + 4/D of the bytes for 8 bits a number and a scale a state.

Results
    small world, 5 seeds, trained through the channel: ELSA's edges serve 100.0 through 8 bits (27%
    of the link's bytes; --ssop link), and with --ssop none 100.0 through 4 bits (14%) and through
    low rank .25 with 8 bits (8%), 99.4 ± 1.1 through the sketch of half the numbers by median. Real
    TREC, MiniLM encoder, 3 seeds: no channel 89.1 ± 1.5, low rank .25 with 8 bits (7% of the bytes)
    87.3 ± 1.9, the sketch of half the bytes 42.3 ± 1.5 by median and 69.4 ± 7.7 by lsq. Spreads and
    the rest: benchmarks/RESULTS.md.
"""
import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import elsa

SMALL = {**elsa.SMALL, "channel": "quant"}


class Projection(nn.Module):
    """x -> x U, back by Uᵀ, for U (D, m) with orthonormal columns; ρ = m / D.

    U spans the principal directions of what crosses on public texts; the rest is dropped. Of all
    linear codes of m numbers it has the least squared error on those texts.
    projection(x) -> what the other side recovers, and the bytes that went.
    Fits: any floating dtype and device.
    """

    def __init__(self, basis):
        super().__init__()
        self.register_buffer("basis", basis)

    def forward(self, x):
        y = self.encode(x)
        return self.decode(y), y.element_size() * y.numel()

    def encode(self, x):
        return x @ self.basis.to(x.dtype)  # (..., m)

    def decode(self, y):
        return y @ self.basis.T.to(y.dtype)  # (..., D)


def quantise(x, bits):
    """Stochastic rounding to 2^bits - 1 levels in ±max|x| of each last axis.

    E[quantise(x)] = x, and the error is below one step: max|x| / (2^(bits-1) - 1). bits >= 2,
    ValueError otherwise. Draws from torch's own generator. Use it straight through: the gradient of
    a step function says nothing.
    Fits: any floating dtype (computed in at least float32) and device.
    """
    if bits < 2:
        raise ValueError(f"bits {bits}: expected 2 or more, one of them for the sign")
    # x / step lies between two whole numbers; a uniform draw is added and the sum rounded down, so
    # that the upper one is taken with probability x / step - ⌊x / step⌋. Rounding to the nearest
    # would err the same way in every step, and training would add these errors up.
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)  # (..., 1)
    return ((x / step + torch.rand_like(x)).floor() * step).to(dtype)


class Codec:
    """A codec for elsa.Link: first reduced (CountSketch, Projection or None), then quantised.

    codec(x) -> what the other side holds, and the bytes that went: bits / 8 per number sent, and
    with bits < 32 four more for the scale of each vector. send(x) is what an observer sees.
    """

    def __init__(self, reduce=None, bits=32):
        self.reduce, self.bits = reduce, bits

    def send(self, x):
        sent = x if self.reduce is None else self.reduce.encode(x)
        return sent if self.bits == 32 else quantise(sent, self.bits)

    def __call__(self, x):
        sent = self.send(x)
        if self.bits == 32:  # as they are
            size = sent.numel() * sent.element_size()
        else:
            size = sent.numel() * self.bits / 8 + 4 * sent[..., 0].numel()
        return (sent if self.reduce is None else self.reduce.decode(sent)), size


def public_directions(world, state, cut):
    """What crosses a cut on the probes, exchange by exchange: principal directions (D, up to D).

    state: the mean of the clients' warm-up adapters. Gradients need labels: the model's own guesses
    are drawn, so nothing private is used.
    """
    model, (p, q) = world.model, cut
    elsa.load_adapters(model, state)
    common.seed_torch(world.args.seed, "probe labels")
    # One step on the probes with both cuts kept: states where they cross, gradients as they come
    # back. In the order of EXCHANGES: up and down are states, the others their gradients.
    up, bias = model.part1(world.probe_ids, world.probe_mask, p)  # (Q, T, D)
    up.retain_grad()
    down = model.blocks(up, bias, p, q)
    down.retain_grad()
    logits = model.part3(down, bias, q)
    guesses = torch.distributions.Categorical(logits=logits.detach()).sample()  # (Q,)
    F.cross_entropy(logits, guesses).backward()
    model.zero_grad()
    tokens = world.probe_mask.bool()
    crossing = (up, down, down.grad, up.grad)
    return {name: elsa.principal_directions(t.detach()[tokens].cpu(), world.width)
            for name, t in zip(elsa.EXCHANGES, crossing, strict=True)}


# -- The channels that elsa.py is given ----------------------------------------------------------


def sketch_codecs(world, setup, cut):
    """The paper's sketch, its sums in --bits."""
    sketches = elsa.sketch_codecs(world, setup, cut)
    return {name: Codec(sketch, world.args.bits) for name, sketch in sketches.items()}


def low_rank_codecs(world, setup, cut):
    """DEVIATION 1: the first ρD directions of each exchange at this cut."""
    # Other tensors cross at other cuts, and gradients lie elsewhere than states: a basis for each.
    # All D directions are kept in the set-up, for other ratios (the curve) need no new pass.
    known = setup.setdefault("directions", {})
    if str(cut) not in known:
        known[str(cut)] = public_directions(
            world, common.to_device(setup["warm"], world.device), cut)
    rank = max(int(world.args.ratio * world.width), 1)
    return {name: Codec(Projection(basis[:, :rank].to(world.device)), world.args.bits)
            for name, basis in known[str(cut)].items()}


def quant_codecs(world, setup, cut):
    """DEVIATION 1: states as they are, in --bits."""
    return dict.fromkeys([*elsa.EXCHANGES, "adapters"], Codec(None, world.args.bits))


CHANNELS = {"none": elsa.no_codecs, "sketch": sketch_codecs, "lowrank": low_rank_codecs,
            "quant": quant_codecs}


def add_bits(parser):
    parser.group("channels")("--bits", int, None, "of every number sent, 2, 4, 8 or 32 (default "
                             "32; 8 with --channel quant)", choices=[2, 4, 8, 32])


def settle(args):
    """--bits follows from --channel; adapters have no directions."""
    if args.channel == "none" and (args.bits or 32) < 32:
        raise common.UserError(f"--bits {args.bits}: --channel none sends everything as it is; use "
                               "--channel quant")
    args.bits = args.bits or (8 if args.channel == "quant" else 32)
    if args.channel == "lowrank" and args.sketch in ("adapters", "both"):
        raise common.UserError("--channel lowrank knows the directions of states, not of adapters; "
                               "use --sketch activations, or --channel sketch or quant")


# What elsa.main is told by every script that wants these channels
SEAM = {"small": SMALL, "channels": CHANNELS, "settle": settle}


# -- The curve -----------------------------------------------------------------------------------

# channel, ratio, recovery, bits
CURVE = [("none", 1.0, "lsq", 32), *(("sketch", r, "median", 32) for r in (1.0, .5, .25)),
         *(("sketch", r, "lsq", 32) for r in (.5, .25)),
         *(("lowrank", r, "lsq", 32) for r in (.5, .25, .125)), ("lowrank", .25, "lsq", 8),
         ("quant", 1.0, "lsq", 8), ("quant", 1.0, "lsq", 4), ("quant", 1.0, "lsq", 2)]


def channel_curve(world, run, setup, state):
    """The trained ELSA models read through every channel (no training through it).

    -> rows: channel, bytes sent over bytes of the states, relative error ‖x̂ - x‖ / ‖x‖ of part 1's
    states, accuracy served. What a channel does to training is in benchmarks/RESULTS.md.
    """
    rows, there = [], copy.copy(world)
    groups = list(elsa.place_clients(world, "elsa", setup)[0].values())
    cuts = {k: world.cuts[k] for g in groups for k in g}
    ids, mask = world.batch(world.clients[0][1][:64])
    elsa.load_adapters(world.model, state["cloud"])
    with torch.no_grad():
        x = world.model.part1(ids, mask, world.cuts[0][0])[0]  # (64, T, D)
    for channel, ratio, recovery, bits in CURVE:
        there.args = argparse.Namespace(**{
            **vars(world.args), "channel": channel, "ratio": ratio, "recovery": recovery,
            "bits": bits, "sketch": "activations", "ssop": "none"})
        codecs = {cut: elsa.make_codecs(there, setup, cut)[0] for cut in set(world.cuts)}
        links = {k: elsa.Link(codecs[cut]) for k, cut in enumerate(world.cuts)}
        common.seed_torch(world.args.seed, "curve")
        link = elsa.Link(codecs[world.cuts[0]])
        error = (link.carry(x, elsa.EXCHANGES[0]) - x)[mask > 0].norm() / x[mask > 0].norm()
        found = elsa.evaluate(there, run, groups, state, links, cuts)
        name = {"sketch": f"sketch, {recovery}"}.get(channel, channel)
        rows.append([name + (f", {bits} bits" if bits < 32 else ""),
                     link.sent[elsa.EXCHANGES[0]] / (x.numel() * x.element_size()), error.item(),
                     found["served"]])
    return rows


def report_curve(world, run, state, result):
    """The curve as a table and in `result` -> what draws it."""
    if "elsa" not in state["trained"] or not world.args.curve:
        return None
    models = common.to_device(state["trained"]["elsa"], world.device)
    result["curve"] = channel_curve(world, run, state["setup"], models)
    run.table(["\nread through a channel", "bytes", "error", "served %"], result["curve"])
    return draw_curve


def draw_curve(world, result, path):
    """Accuracy by bytes, a line for each kind of channel, as curve.png beside `path`."""
    title = f"ELSA on {elsa.data.short_name(result['dataset'])}, seed {world.args.seed}"
    with common.figure(path.with_name("curve.png"), title, (7, 4.4), ncols=1) as (_, axis):
        for kind, colour, mark in (
                ("none", "#000000", "s"), ("sketch, median", common.ORANGE, "o"),
                ("sketch, lsq", common.AMBER, "v"), ("lowrank", common.GREEN, "^"),
                ("quant", common.BLUE, "D"), ("lowrank, 8 bits", common.PINK, "*")):
            name = {"quant": ("quant, 8 bits", "quant, 4 bits", "quant, 2 bits")}.get(kind, (kind,))
            rows = sorted(r[1:] for r in result["curve"] if r[0] in name)
            axis.plot([r[0] for r in rows], [r[2] for r in rows], color=colour, marker=mark,
                      ms=13 if mark == "*" else 6, label=kind)
        axis.set(xscale="log", xlabel="bytes on the link, as a share of those without a channel",
                 ylabel="accuracy served (%)", ylim=(0, 101),
                 title="The trained models read through every channel")
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


# -- The command ---------------------------------------------------------------------------------


def add_curve(parser):
    parser.group("report")("--curve", bool, True, "the trained ELSA model read through every "
                           "channel, 13 evaluations (default: yes)")


def main(argv=None):
    elsa.main(argv, doc=__doc__, title="elsa-channels", **SEAM, flags=[add_bits, add_curve],
              reports=[report_curve])


if __name__ == "__main__":
    common.run_cli(main)
