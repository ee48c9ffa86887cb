"""ELSA's placement in seconds: how long a simulated round takes, and what a device would carry

The idea
    ELSA gives clients to edges by behaviour first and latency second. What that costs or gains in
    time is simulated on the same network and devices that --split auto reads: the critical path of
    a round, that is its slowest client, under ELSA's placement, with everybody at the nearest edge,
    and at random.

Run
    python beyond/elsa_plan.py                       the small world in 8 bits: a minute
    python beyond/elsa_plan.py --split auto          each client as many blocks as it can carry
    python beyond/elsa_plan.py --channel sketch --tau-max 30 --capacity 4

What it adds to elsa.py (all other flags are those of elsa.py; channels: those of elsa_channels.py)
    seconds of a round   round_seconds, placement_table; "seconds" in result.json
    a client's part      memory and FLOPs of parts 1 and 3, in percent of the whole model
    Network and devices are data.draw_network's (UNSPECIFIED 5 of elsa.py), an edge computes ten
    times as fast as the median device: all numbers are as good as these, the order of the rows is
    what they are for.

Results
    small world, 5 seeds: slowest client of a round 3.37 ± .33 s under ELSA's placement, 3.67 ± .59
    s at random (shorter in 4 of 5 seeds, p .11: not shown), 2.83 ± .48 s at the nearest edge, which
    ignores behaviour.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import common
import elsa
from beyond import elsa_channels


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


def main(argv=None):
    elsa.main(argv, doc=__doc__, title="elsa-plan", **elsa_channels.SEAM,
              flags=[elsa_channels.add_bits], reports=[placement_table])


if __name__ == "__main__":
    common.run_cli(main)
