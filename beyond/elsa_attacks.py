"""ELSA's SS-OP and channel under attack: how many words an observer of part 1's states reads

The idea
    SS-OP turns hidden states by a secret rotation, and a channel compresses them. Neither is
    encryption. What they hide is measured with three attacks by an observer who has the public
    model and all the text in the world, and sees what crosses the link.

Run
    python beyond/elsa_attacks.py                    the small world in 8 bits: a minute
    python beyond/elsa_attacks.py --ssop-rank 32     a larger subspace hides more
    python beyond/elsa_attacks.py --channel sketch --ratio .25

What it adds to elsa.py (all other flags are those of elsa.py; channels: those of elsa_channels.py)
    inversion     fit_inverter, invert   ridge regression from states to word embeddings, fitted on
                                         random text; read as if SS-OP were not there
    complement    privacy_report         the same outside the subspace that carries most of the
                                         traffic, which SS-OP leaves alone
    Procrustes    procrustes             W itself, from 100 words of known text
    The table is printed, and is "privacy" in result.json. Under --ssop link the observer sits on
    the link, and the edge reads in the clear; under edge it is the edge itself.

Cost
    One pass over 2000 random texts, and a ridge regression for every attack and client: seconds in
    the small world, minutes with a real encoder on a CPU.

Results
    small world, 5 seeds, r 16: words recovered 100% in the clear, 44.0% rotated, 60.7% by the
    complement attack, 100% by who knows 100 words. A larger r hides more from the first two (15.5%
    and 15.1% at r 32), nothing from the third. Real TREC and other channels: benchmarks/RESULTS.md.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import common
import elsa
from beyond import elsa_channels


def fit_inverter(states, embeddings, ridge=1e-3):
    """Ridge regression from public states (M, D) to their words' embeddings (M, E) -> (D + 1, E).

    An observer has part 1, which is public, and all the text in the world to fit on.
    Fits: any floating dtype (computed in float64) and device.
    """
    # argmin_A ‖X A - Y‖² + ε ‖A‖² = (XᵀX + ε I)⁻¹ Xᵀ Y, with a column of ones in X for the mean and
    # ε a share of XᵀX's mean eigenvalue
    x = F.pad(states, (0, 1), value=1.0).double()  # (M, D + 1)
    gram = x.T @ x
    gram = gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram)).to(gram)
    return torch.linalg.solve(gram, x.T @ embeddings.double()).to(states.dtype)


def invert(states, inverter, table):
    """The five likeliest words of observed states (M, D) by cosine with table (V, E) -> (M, 5).

    inverter (D + 1, E): as fit_inverter returns it. Fits: float32 and float64, any device.
    """
    # Both sides less the mean word: all embeddings share it, and it would make all cosines alike
    middle = table.mean(0)
    found = F.pad(states, (0, 1), value=1.0) @ inverter - middle  # (M, E)
    return (F.normalize(found, dim=-1) @ F.normalize(table - middle, dim=-1).T).topk(5).indices


def procrustes(known, observed, prior=.01):
    """The orthogonal W that best turns known (M, D) into observed (M, D) -> (D, D).

    Where the M pairs say nothing, W is drawn to the identity, which SS-OP is outside its subspace.
    Fits: float32 and float64, any device with an SVD.
    """
    # argmin_W ‖known W - observed‖ over orthogonal W is U Vᵀ, for knownᵀ observed = U S Vᵀ
    cross = known.T @ observed
    cross = cross + prior * cross.norm() / len(cross) ** .5 * torch.eye(len(cross)).to(cross)
    u, _, vh = torch.linalg.svd(cross)
    return u @ vh


class Observer:
    """What somebody who watches a cut has: the public model, the codec with its hashes, 2000 random
    texts with the states that they give, and some test texts as clients send them.

    words: ids of candidate words (V,); table: their embeddings (V, E); public (M, D), wanted (M,
    E): states of the random texts and their words' embeddings; states (m, D): of the test texts
    under the trained model; truth (m,): their words; known (100, D): the public model's states of
    the first hundred, for the attack that knows them.
    """

    def __init__(self, world, state):
        model, p = world.model, world.cuts[0][0]
        # What begins and ends every text is no word: [CLS] and [SEP], or what a decoder has of both
        ends = world.ids[:, 0], world.ids[torch.arange(len(world.ids)), world.lengths - 1]
        first, last = (e[0] if (e == e[0]).all() else torch.tensor(-1) for e in ends)
        words = torch.cat([world.ids[world.mask > 0], world.probe_ids[world.probe_mask > 0]])
        words = words.unique()
        words = words[(words != first) & (words != last)]
        ids, mask = world.batch(torch.arange(world.first_test, len(world.labels))[:200])
        inside = (mask > 0) & (ids != first) & (ids != last)  # the words of the texts
        self.truth = torch.searchsorted(words, ids[inside])
        common.seed_torch(world.args.seed, "attack")
        # The observer's training data: random words, whose states it can compute itself. Random, so
        # that nothing of the clients' language is taken for known.
        made = words[torch.randint(len(words), (2000, ids.shape[1]), device=words.device)]
        keep = torch.ones(made.shape, dtype=torch.bool, device=made.device)
        for place, end in ((0, first), (-1, last)):
            if end >= 0:
                made[:, place], keep[:, place] = end, False
        dtype = model.head.weight.dtype  # float32, where the frozen weights are bfloat16, too
        embeddings = model.encoder.get_input_embeddings().weight.detach().to(dtype)
        self.table = embeddings[words]
        elsa.load_adapters(model, world.start)  # the observer's: LoRA adds nothing yet
        with torch.no_grad():
            self.public = torch.cat([model.part1(t, torch.ones_like(t), p)[0]
                                     for t in made.split(128)])[keep].to(dtype)
            self.known = model.part1(ids, mask, p)[0][inside][:100].to(dtype)
            elsa.load_adapters(model, state)
            self.states = model.part1(ids, mask, p)[0][inside].to(dtype)  # what is really sent
        self.wanted = embeddings[made[keep]]

    def rate(self, seen, inverter):
        """Words found among the first and the first five guesses, in percent, without the 100."""
        hit = invert(seen, inverter, self.table)[100:] == self.truth[100:, None]
        return [100 * hit[:, :1].any(1).double().mean().item(),
                100 * hit.any(1).double().mean().item()]


def privacy_report(world, setup, state, codec=None):
    """Steps 8 and 9 under attack: how many words an observer of part 1's states gets, in percent.

    The observer knows r and the codec (an elsa_channels.Codec; None: sent as they are), and for
    each of up to four clients sees what 200 test texts become under that client's W and the codec.
        in the clear   the inverter on states without SS-OP
        under SS-OP    the same on rotated states
        complement     fitted and read outside the subspace that carries most of the traffic
        Procrustes     W estimated from 100 tokens the observer knows, and the inverter fitted anew
    -> rows (attack, top-1, top-5), all without the 100 known tokens.
    """
    eye = torch.eye(world.width)
    send, lift = (lambda x: x) if codec is None else codec.send, eye
    observer = Observer(world, state)
    if codec is not None and codec.reduce is not None:  # encoders are linear: x -> x M
        lift = torch.linalg.pinv(codec.reduce.encode(eye.to(world.device)))
    public, wanted = observer.public, observer.wanted
    inverter = fit_inverter(send(public), wanted)
    rows = {"in the clear": [observer.rate(send(observer.states), inverter)]}
    for k in range(min(4, len(world.clients))):
        rotation = elsa.SubspaceRotation(setup["bases"][k].to(world.device),
                                         setup["turns"][k].to(world.device))
        seen = send(rotation.rotate(observer.states))
        # W leaves what is orthogonal to V alone. V holds the strongest directions of the states,
        # turned only among themselves, so the traffic's own strongest directions span it too.
        inner = elsa.principal_directions(seen, rotation.basis.shape[1])
        outer = torch.eye(len(inner)).to(inner) - inner @ inner.T
        # W is the same for every word: a hundred known ones give it away
        guess = procrustes(observer.known, seen[:100] @ lift.to(seen))
        for name, there, fitted in (
                ("under SS-OP", seen, inverter),
                ("complement", seen @ outer, fit_inverter(send(public) @ outer, wanted)),
                ("Procrustes", seen, fit_inverter(send(public @ guess), wanted))):
            rows.setdefault(name, []).append(observer.rate(there, fitted))
    return [[name, *np.mean(found, 0).tolist()] for name, found in rows.items()]


def report_attacks(world, run, state, result):
    """The attacks on ELSA's cloud model, as a table and in `result`."""
    if "elsa" not in state["trained"]:
        return
    setup, model = state["setup"], state["trained"]["elsa"]["cloud"]
    codecs, _ = elsa.make_codecs(world, setup, world.cuts[0])
    result["privacy"] = privacy_report(world, setup, common.to_device(model, world.device),
                                       codecs.get("activations up"))
    run.table([f"\nwords recovered, r = {world.args.ssop_rank}", "top-1 %", "top-5 %"],
              result["privacy"])


def main(argv=None):
    elsa.main(argv, doc=__doc__, title="elsa-attacks", **elsa_channels.SEAM,
              flags=[elsa_channels.add_bits], reports=[report_attacks])


if __name__ == "__main__":
    common.run_cli(main)
