"""ELSA: split, hierarchical, private federated fine-tuning of language models, with the books open

Yang et al., "ELSA: Efficient LLM-Centric Split Aggregation for Privacy-Aware Hierarchical Federated
Learning over Resource-Constrained Edge Networks", 2026, arXiv 2601.13824 (v1; v2 adds dynamic
splitting). No code of the authors is known, and only the abstract and the first steps of the method
could be read: names and structure are the paper's, every formula marked UNSPECIFIED is ours.

The idea
    N clients under E edge servers under one cloud tune a language model with LoRA. (1) Clients are
    grouped by how their model behaves on public texts, filtered by trust, and given to edges with
    latency in mind. (2) The model is cut in three: the client runs the first and last blocks, so
    that neither words nor labels leave it, the edge runs the middle; edges average their clients'
    adapters, the cloud averages the edges. (3) What crosses the link is turned inside a subspace
    (SS-OP) and compressed by a sketch.

Run
    python elsa.py                                       the small world: a minute, no download
    python elsa.py --method all                          all methods on the same clients and draws
    python elsa.py --dataset trec --model DIR_OR_HUB_ID  a real encoder, 12 clients on TREC
    python elsa.py --channel sketch --recovery median    the paper's channel; see --channel, --ssop

Paper map (P: the paper's as far as it could be read; O: ours)
    Step 1   P  probes, [CLS] states        warm_up
    Step 2   P  fingerprint N(μ, Σ)         gaussian_fingerprint          projection, ridge: O
    Step 3   P  symmetric KL                symmetric_kl
    Step 4   P  trust by consistency        trust_scores                  formula: O
    Step 5   O  clusters                    cluster_clients
    Step 6   P  latency-aware edges         assign_edges                  rule: O
    Step 7   P  split in three              SplitEncoder, choose_cut (v2) budgets, rule: O
    Step 8   P  SS-OP                       SubspaceRotation, Link        formula, modes: O
    Step 9   P  sketch, median recovery     CountSketch, Codec            hashes, lsq: O
    Step 10  P  edge and cloud averages     fedavg, train_method          weights, mix: O

Symbols
    N, E, Q       clients, edges, probes   numbers        --clients 12 --edges 3 --num-probes 96
    μ_n, Σ_n      mu, sigma                (k,), (k, k)   --fingerprint-rank 12
    R             distance                 (N, N)         symmetric KL in nats
    p, q          cut                      numbers        --split P,Q (default 1,L-1)
    H             x, states                (B, T, D)      texts, tokens, width
    V, Q_n, W     basis, turn, rotation    (D, r), (r, r) --ssop-rank
    ρ, k, w       ratio, rows, buckets     numbers        --ratio .5 --sketch-rows 3; ρ = kw / D
    λ             edge_lambda              number         --edge-lambda .5
    φ             adapters                 dict           LoRA on query and value, and the head
    served        a client's own test texts under the model of its edge; cloud: under the average

Cost
    One step on the link: 4 · B · T · D · 4 bytes · ρ (states and gradients, up and down), T the
    longest text of the batch; a round adds two copies of φ a client. MiniLM (D = 384), 16 texts of
    32 tokens: 3.15 MB a step, all adapters 295 kB. Simulating the split costs nothing: the parts
    run in one autograd graph, nothing is copied (benchmarks/elsa_step.py measures it). SS-OP costs
    4rD instead of 2D² operations a state, a sketch two products with (D, ρD).

Results
    small world, under a CPU-minute, 5 seeds: served by FedAvg 46.6 ± 7.4, by random clusters 66.9 ±
    11.2, by ELSA's edges 100.0 (local training reaches that too), its cloud model 46.4. SS-OP r 16:
    words recovered 100% in the clear, 43% rotated, 59% by the complement attack, 100% by who knows
    100 words. Real TREC, MiniLM encoder: centralised 96.2 ± .4 (5 seeds), after 5 rounds FedAvg and
    ELSA 87.8; trained through a sketch of half the bytes 49.0 by median and 75.4 by lsq, through 8
    bits (a quarter) 87.2, through low rank and 8 bits (7%) 87.0; hidden from the edge 52.2 (one
    seed). Spreads, what does not hold and what was not run: benchmarks/RESULTS.md.

Where we depart (the marks can be searched for)
    DEVIATION 1   the small world sends states in 8 bits instead of a sketch, because the sketch
                  loses most of what dense states hold; --channel sketch is the paper's, and the
                  default for real data. lowrank and quant are ours.
    UNSPECIFIED 1 the fingerprint's subspace (--fingerprint-rank) and ridge.
    UNSPECIFIED 2 the trust formula (--neighbours), its floor (--trust-factor), filtering before
                  clustering (an outlier would get a cluster of its own), and what happens when
                  nobody reaches the floor: all take part, and the report says so.
    UNSPECIFIED 3 average linkage, as many clusters as edges (--clusters).
    UNSPECIFIED 4 the assignment rule (--tau-max, --capacity, --edge-lambda). An edge to which
                  nobody came takes no part.
    UNSPECIFIED 5 the network and the devices.
    UNSPECIFIED 6 the budgets' rule of --split auto.
    UNSPECIFIED 7 SS-OP's formula, where V comes from, one W for both cuts, who knows W (--ssop).
                  A rotation gives no differential privacy; --attack shows what it hides.
    UNSPECIFIED 8 the sketch's hashes; k, ρ and the recovery (--sketch-rows, --ratio, --recovery).
    UNSPECIFIED 9 how often the cloud averages (--cloud-every), what edges take from it
                  (--cloud-mix), and every learning setting.

References
    LoRA: Hu et al., ICLR 2022. Split learning: Gupta and Raskar, 2018. Hierarchical FedAvg: Liu et
    al., ICC 2020. Count sketch: Charikar et al., 2002. TREC: Li and Roth, COLING 2002. MiniLM: Wang
    et al., NeurIPS 2020.
"""
# ================================================================================================
# Setup
# ================================================================================================
import math
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from transformers.masking_utils import create_bidirectional_mask

import common
import data

METHODS = ["central", "local", "fedavg", "split-flat", "hier-random", "elsa"]
LABELS = {"central": "centralised LoRA", "local": "local", "fedavg": "FedAvg, unsplit",
          "split-flat": "split, one server", "hier-random": "random clusters", "elsa": "ELSA"}

# Defaults that depend on the data. The paper's numbers could not be read: these are ours, chosen on
# seeds 100 and 101, which benchmarks/RESULTS.md does not report.
REAL = {"model": "bert-base-uncased", "method": "elsa", "rounds": 10, "lr": 1e-3, "batch": 32,
        "alpha": .5, "dropout": .1, "channel": "sketch", "attack": False, "curve": False,
        "cloud_mix": 1.0, "poison": "", "ssop_rank": 32, "warmup_steps": 30}
SMALL = {"model": "tiny", "method": "fedavg,elsa", "rounds": 4, "lr": 3e-3, "batch": 16,
         "alpha": 3.0, "dropout": 0.0, "channel": "quant", "attack": True, "curve": True,
         "cloud_mix": 0.0, "poison": "label-flip:2,random:1", "threads": 1,
         "ssop_rank": 16, "warmup_steps": 26}

# ================================================================================================
# Model: a BERT-type classifier in three parts, and what crosses the link between them
# ================================================================================================


class SplitEncoder(nn.Module):
    """A BERT-type encoder and a linear head on [CLS], cut before blocks p and q.

    encoder: a transformers model with .embeddings and .encoder.layer (L blocks), e.g. BertModel
    with add_pooling_layer=False, in which peft has put LoRA. Part 1 (embeddings, blocks < p) and
    part 3 (blocks >= q, head) run on the client, part 2 on the edge; 0 <= p <= q <= L.

    The parts call the encoder's own blocks in the encoder's own order on tensors that are not
    copied, so loss, logits and all gradients are those of the unsplit model bit for bit, and
    dropout draws the same masks from torch's generator in the same order.
    """

    def __init__(self, encoder, num_classes, dropout=0.0):
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)
        self.layers = len(encoder.encoder.layer)

    def part1(self, ids, mask, p):
        """ids, mask (B, T) -> states (B, T, D) before block p, and the attention bias or None."""
        x = self.encoder.embeddings(input_ids=ids)  # (B, T, D)
        bias = create_bidirectional_mask(config=self.encoder.config, inputs_embeds=x,
                                         attention_mask=mask)
        return self.blocks(x, bias, 0, p), bias

    def blocks(self, x, bias, start, stop):
        """Blocks start..stop - 1 on states (B, T, D); part 2 is blocks(x, bias, p, q)."""
        for block in self.encoder.encoder.layer[start:stop]:
            x = block(x, bias)
        return x

    def part3(self, x, bias, q):
        """States (B, T, D) before block q -> logits (B, C), read from [CLS], the first token."""
        return self.head(self.dropout(self.blocks(x, bias, q, self.layers)[:, 0]))

    def forward(self, ids, mask, cut, link=None):
        """Logits (B, C); cut = (p, q); link: a Link, or None when nothing crosses a network."""
        # Step 7: part 1 on the client, blocks p..q - 1 on the edge, part 3 on the client
        p, q = cut
        x, bias = self.part1(ids, mask, p)
        x = x if link is None else link.to_edge(x)
        x = self.blocks(x, bias, p, q)
        x = x if link is None else link.to_client(x)
        return self.part3(x, bias, q)


class CountSketch:
    """k rows of w signed sums: y_(r,b) = Σ_(i: h_r(i) = b) s_r(i) x_i; kw numbers for D.

    width D; ratio ρ in (0, 1], w = ⌊ρD / k⌋ >= 1; recovery "median" or "mean" of the k estimates
    s_r(i) y_(r, h_r(i)) of x_i, or "lsq", the x̂ of least norm with that sketch.
    encode (..., D) -> (..., kw) is linear; decode goes back and is unbiased over the signs for mean
    (and for median with k <= 2). With one row E‖x̂ - x‖² = (D / w - 1) ‖x‖² for w dividing D. The
    count sketch was made for vectors with few large entries: dense states break its median.

    UNSPECIFIED 8: hashes are drawn once per run, and each row deals a random permutation over its
    buckets. Independent hashes would leave buckets empty, so that even ρ = 1 would lose something;
    dealt ones are exact at ρ = 1, k = 1.
    """

    def __init__(self, width, ratio, rows=3, recovery="median", generator=None):
        w = int(ratio * width / rows)
        if w < 1:
            raise ValueError(f"ratio {ratio} of {width} leaves no bucket for each of {rows} rows")
        order = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)])
        self.bucket = order % w + w * torch.arange(rows)[:, None]  # (k, D), into the kw sums
        self.sign = torch.randint(0, 2, (rows, width), generator=generator) * 2.0 - 1  # (k, D)
        self.matrix = torch.zeros(width, rows * w)  # x @ matrix is the sketch
        for bucket, sign in zip(self.bucket, self.sign, strict=True):
            self.matrix[torch.arange(width), bucket] = sign
        self.recovery, self.rows = recovery, rows
        self.back = self.matrix.T / rows  # mean of the k estimates
        if recovery == "lsq":
            self.back = torch.linalg.pinv(self.matrix.double(), rtol=1e-6).float()  # (kw, D)

    def to(self, device):
        for name in ("bucket", "sign", "matrix", "back"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def encode(self, x):
        # Step 9: y_(r,b) = Σ_(i: h_r(i) = b) s_r(i) x_i
        return x @ self.matrix.to(x.dtype)

    def decode(self, y):
        if self.recovery != "median" or self.rows == 1:
            return y @ self.back.to(y.dtype)
        estimates = [y[..., b] * s for b, s in zip(self.bucket, self.sign.to(y.dtype), strict=True)]
        if self.rows == 3:  # the same number as below, many times cheaper
            a, b, c = estimates
            return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
        ordered = torch.stack(estimates, -1).sort(-1).values
        return (ordered[..., (self.rows - 1) // 2] + ordered[..., self.rows // 2]) / 2


class Projection:
    """Beside the paper: x -> x U, back by Uᵀ, for U (D, m) with orthonormal columns; ρ = m / D.

    U spans the principal directions of what crosses on public texts; the rest is dropped.
    """

    def __init__(self, basis):
        self.basis = basis

    def encode(self, x):
        return x @ self.basis.to(x.dtype)

    def decode(self, y):
        return y @ self.basis.T.to(y.dtype)


def quantise(x, bits):
    """Beside the paper: stochastic rounding to 2^bits - 1 levels in ±max|x| of each last axis.

    E[quantise(x)] = x, and the error is below one step: max|x| / (2^(bits-1) - 1). bits >= 2.
    """
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return (x / step + torch.rand_like(x)).floor() * step


class Codec:
    """What one tensor becomes on its way: reduced (CountSketch, Projection or None), quantised.

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
        size = sent.numel() * self.bits / 8
        if self.bits < 32:
            size += 4 * sent[..., 0].numel()
        return (sent if self.reduce is None else self.reduce.decode(sent)), size


class SubspaceRotation:
    """SS-OP: an orthogonal W that turns states inside a subspace and leaves the rest alone.

    basis V (D, r) with orthonormal columns, turn Q (r, r) orthogonal.
    rotate: H W, unrotate: H Wᵀ, both (..., D) -> (..., D), at 4rD instead of 2D² operations each.
    """

    def __init__(self, basis, turn):
        self.basis, self.turn = basis, turn

    @staticmethod
    def random_turn(rank, generator):
        """Q uniform over the orthogonal group: QR of a Gaussian with the signs of diag R."""
        q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float()

    def rotate(self, h, back=False):
        # Step 8. UNSPECIFIED 7: W = I - VVᵀ + VQVᵀ = I + V (Q - I) Vᵀ
        turn = self.turn.T if back else self.turn
        basis = self.basis.to(h.dtype)
        change = turn.to(h.dtype) - torch.eye(len(turn), dtype=h.dtype, device=h.device)
        return h + h @ basis @ change @ basis.T

    def unrotate(self, h):
        return self.rotate(h, back=True)


EXCHANGES = ["activations up", "activations down", "gradients up", "gradients down"]


class Link:
    """The link between one client and its edge: what crosses it, in which form, how many bytes.

    codecs: dict exchange -> Codec (missing: sent as it is); rotation: SubspaceRotation or None.
    mode "link": the edge knows W too and turns back what arrives, so only the link is protected and
    nothing is lost. mode "edge": only the client knows W; the edge computes on rotated states and
    the client turns back what returns, which LayerNorm, attention and GELU make inexact. Gradients
    take the same way backwards: the chain rule of a product with W is a product with Wᵀ.
    sent: bytes by exchange since it was last cleared.
    """

    def __init__(self, codecs=None, rotation=None, mode="link"):
        self.codecs, self.rotation, self.mode = codecs or {}, rotation, mode
        self.sent = dict.fromkeys(EXCHANGES, 0.0)

    def carry(self, x, exchange):
        """A tensor to the other side."""
        codec = self.codecs.get(exchange)
        received, size = (x, 4 * x.numel()) if codec is None else codec(x)
        self.sent[exchange] += size
        return received

    def to_edge(self, x):
        """Part 1's states (B, T, D) -> what part 2 computes on."""
        # Steps 8 and 9: H -> H W -> sketch -> recovered -> (link) times Wᵀ
        if self.rotation is not None:
            x = self.rotation.rotate(x)
        x = Crossing.apply(x, self, "activations up", "gradients down")
        both_know = self.rotation is not None and self.mode == "link"
        return self.rotation.unrotate(x) if both_know else x

    def to_client(self, x):
        """Part 2's states (B, T, D) -> what part 3 computes on."""
        # In mode edge part 2 never left the rotated space, so nothing is turned before it crosses.
        if self.rotation is not None and self.mode == "link":
            x = self.rotation.rotate(x)
        x = Crossing.apply(x, self, "activations down", "gradients up")
        return x if self.rotation is None else self.rotation.unrotate(x)


class Crossing(torch.autograd.Function):
    """A tensor crosses forwards, its gradient crosses back, each through the codec of its exchange.

    The gradient that arrives is taken for the gradient of what was sent (straight through). For lsq
    and Projection, symmetric projections both, that is the true gradient of the channel.
    """

    @staticmethod
    def forward(ctx, x, link, forward, backward):
        ctx.link, ctx.backward_name = link, backward
        received = link.carry(x, forward)
        return received.view_as(received)

    @staticmethod
    def backward(ctx, gradient):
        # Step 9, backwards: the gradient is a message like any other, coded and counted
        return ctx.link.carry(gradient, ctx.backward_name), None, None, None


# ================================================================================================
# Method: pure functions, to be copied
# ================================================================================================


def principal_directions(x, rank):
    """The top right singular vectors of x (N, D) -> (D, rank), rank at most min(N, D)."""
    return torch.linalg.svd(x.double(), full_matrices=False).Vh[:rank].T.to(x.dtype)


def gaussian_fingerprint(states, basis, ridge=.05):
    """N(μ, Σ) of [CLS] states (Q, D) in the subspace of basis (D, k) -> (k,), (k, k), float64.

    UNSPECIFIED 1: Σ of Q <= D states is singular and the KL divergence of singular Gaussians is not
    defined, so states are read in the pooled probes' top k directions and Σ gets a ridge.
    """
    z = states.double() @ basis.double()  # (Q, k)
    mu = z.mean(0)
    # Step 2: Σ = 1/Q Σ_j (T_j - μ)(T_j - μ)ᵀ + ridge · tr(Σ)/k · I
    sigma = (z - mu).T @ (z - mu) / len(z)
    k = len(mu)
    scale = (ridge * sigma.trace() / k).clamp(min=1e-12)  # identical states: still invertible
    return mu, sigma + scale * torch.eye(k, dtype=z.dtype, device=z.device)


def symmetric_kl(p, q):
    """½ [KL(p‖q) + KL(q‖p)] of two Gaussians (μ, Σ), in nats; the determinants cancel."""
    (mu_p, sigma_p), (mu_q, sigma_q) = p, q
    precision_p, precision_q = torch.linalg.inv(sigma_p), torch.linalg.inv(sigma_q)
    gap = mu_p - mu_q
    # Step 3: ¼ [tr(Σq⁻¹Σp) + tr(Σp⁻¹Σq) - 2k + (μp - μq)ᵀ(Σp⁻¹ + Σq⁻¹)(μp - μq)]
    traces = (precision_q * sigma_p.T).sum() + (precision_p * sigma_q.T).sum()
    return (traces - 2 * len(gap) + gap @ (precision_p + precision_q) @ gap) / 4


def trust_scores(distance, probabilities, neighbours=3):
    """How far each client's probe predictions agree with its behavioural neighbours' -> (N,).

    distance (N, N); probabilities (N, Q, C): every client's predictions on the probes.
    UNSPECIFIED 2: honest clients hold different classes and so predict them unequally often. Each
    is therefore read relative to its own prior, and judged by what it can know: a probe counts as
    much as the client's prior of the class that the neighbours agree on. Plain agreement takes
    label skew for dishonesty (benchmarks/RESULTS.md has both).
    """
    n = len(distance)
    prior = probabilities.mean(1)  # (N, C)
    lift = probabilities / prior[:, None].clamp(min=1e-12)
    lift = lift / lift.sum(-1, keepdim=True)  # (N, Q, C), what p(c|x) would be with even classes
    far = distance + torch.diag(torch.full((n,), torch.inf, dtype=distance.dtype))
    scores = []
    for k in range(n):
        near = far[k].argsort(stable=True)[:min(neighbours, n - 1)]
        confidence = lift[near].amax(-1, keepdim=True)  # (m, Q, 1)
        consensus = (confidence * lift[near]).sum(0).argmax(-1)  # (Q,)
        # Step 4: trust_k = Σ_x w_k(x) [argmax lift_k(x) = consensus(x)] / Σ_x w_k(x), where
        # w_k(x) = prior_k(consensus(x))
        weight = prior[k][consensus].double()
        agree = lift[k].argmax(-1) == consensus
        scores.append((weight * agree).sum() / weight.sum().clamp(min=1e-12))
    return torch.stack(scores)


def cluster_clients(distance, clusters):
    """Average-linkage agglomeration of (N, N) distances into at most `clusters` -> N labels 0.."""
    # Step 5. UNSPECIFIED 3: the linkage and the number of clusters (as many as there are edges)
    if len(distance) == 1:
        return [0]
    upper = distance[tuple(torch.triu_indices(*distance.shape, 1))]
    return [int(c) - 1 for c in fcluster(linkage(upper.numpy(), "average"), clusters, "maxclust")]


def assign_edges(labels, distance, latency, capacity=None, tau_max=math.inf, lam=.5):
    """Each cluster to an edge, each client to its cluster's edge unless too far or too full.

    labels: N cluster numbers; distance R (N, N); latency (N, E) in ms; capacity: clients an edge
    takes (default: no limit); tau_max in ms; lam = λ in [0, 1], what behaviour weighs against
    latency -> N edges. UNSPECIFIED 4, all of it: clusters go to different edges while there are
    enough, with the least sum of mean latencies; a client beyond tau_max, or the slowest of a full
    edge, moves to the edge with the least λ R + (1 - λ) latency (both over their maximum) among
    those within tau_max that have room. Where none is, it stays.
    """
    n, edges = latency.shape
    clusters = sorted(set(labels))
    members = {c: [k for k in range(n) if labels[k] == c] for c in clusters}
    cost = torch.stack([latency[members[c]].mean(0) for c in clusters])  # (clusters, E)
    # Step 6: clusters to edges with the least sum of mean latencies, then whom that does not suit
    rounds = -(-len(clusters) // edges)  # more clusters than edges: an edge takes several
    rows, columns = linear_sum_assignment(cost.repeat(1, rounds).numpy())
    home = {clusters[r]: int(c) % edges for r, c in zip(rows, columns, strict=True)}
    edge = [home[c] for c in labels]
    room = capacity or n

    def load(e):
        return sum(x == e for x in edge)

    for k in sorted(range(n), key=lambda k: -float(latency[k, edge[k]])):
        here = edge[k]
        if latency[k, here] <= tau_max and load(here) <= room:
            continue
        others = [e for e in range(edges) if e != here and load(e) < room
                  and latency[k, e] <= tau_max]

        def price(e, k=k):
            kin = [j for j in range(n) if edge[j] == e]
            behaviour = distance[k, kin].mean() / distance.max().clamp(min=1e-12) if kin else 1.0
            return float(lam * behaviour + (1 - lam) * latency[k, e] / latency.max())
        if others:
            edge[k] = min(others, key=price)
    return edge


def choose_cut(layers, fixed_bytes, block_bytes, memory, block_seconds, deadline):
    """--split auto: the cut (p, q) that keeps as many blocks on the client as it can carry.

    memory in bytes, of which part 1 and 3 hold fixed_bytes (embeddings, head) and block_bytes each
    block; block_seconds per step and block of this client, deadline in seconds per step.
    UNSPECIFIED 6: blocks are shared evenly between part 1 and part 3, part 1 first (it is what
    hides the words); at least one block stays on the client and one on the edge.
    """
    fits = (memory - fixed_bytes) // block_bytes
    # Step 7 (v2): more blocks at home hide more and use less of the edge, until the device is full
    # or would hold up the round
    mine = int(max(1, min(fits, deadline // block_seconds, layers - 1)))
    return -(-mine // 2), layers - mine // 2


def fedavg(states, weights):
    """The weighted mean of parameter dicts: Σ_k n_k φ_k / Σ_k n_k.

    states: dicts name -> tensor with the same names and shapes; weights: one number >= 0 each.
    """
    # Step 10: φ = Σ_k (n_k / Σ_j n_j) φ_k, of an edge's clients and then of the edges
    total = sum(weights)
    return {name: sum(w / total * state[name] for state, w in zip(states, weights, strict=True))
            for name in states[0]}


def send_update(start, end, codec, width):
    """What the edge holds of a client's update end - start after `codec` -> dict, bytes.

    All tensors of the update are laid end to end and cut into vectors of `width`, the last one
    filled with zeros. Sketches are linear, so an edge could as well add them up and decode the sum.
    """
    flat = torch.cat([(end[n] - start[n]).flatten() for n in start])
    rows = F.pad(flat, (0, -len(flat) % width)).unflatten(0, (-1, width))
    received, size = codec(rows)
    pieces = received.flatten()[:len(flat)].split([t.numel() for t in start.values()])
    return {n: t + d.view_as(t) for (n, t), d in zip(start.items(), pieces, strict=True)}, size


def fit_inverter(states, embeddings, ridge=1e-3):
    """Ridge regression from public states (M, D) to their words' embeddings (M, E) -> (D + 1, E).

    An observer has part 1, which is public, and all the text in the world to fit on.
    """
    x = F.pad(states, (0, 1), value=1.0).double()
    gram = x.T @ x
    gram = gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram)).to(gram)
    return torch.linalg.solve(gram, x.T @ embeddings.double()).to(states.dtype)


def invert(states, inverter, table):
    """The five likeliest words of observed states (M, D) by cosine with table (V, E) -> (M, 5)."""
    middle = table.mean(0)
    found = F.pad(states, (0, 1), value=1.0) @ inverter - middle
    return (F.normalize(found, dim=-1) @ F.normalize(table - middle, dim=-1).T).topk(5).indices


def procrustes(known, observed, prior=.01):
    """The orthogonal W that best turns known (M, D) into observed (M, D) -> (D, D).

    Where the M pairs say nothing, W is drawn to the identity, which SS-OP is outside its subspace.
    """
    cross = known.T @ observed
    cross = cross + prior * cross.norm() / len(cross) ** .5 * torch.eye(len(cross)).to(cross)
    u, _, vh = torch.linalg.svd(cross)
    return u @ vh


# ================================================================================================
# Train and evaluate
# ================================================================================================


class Federation:
    """The fixed part of a run: the model, the texts, who holds what, and what the network is like.

    Texts are numbered over one pool: training texts first, then test texts.
    """

    def __init__(self, args, run, texts, model, encode):
        self.args, self.device, self.model, self.texts = args, run.device, model, texts
        ids, mask = encode([*texts.train, *texts.test])
        self.ids, self.mask = ids.to(run.device), mask.to(run.device)  # (N, T)
        self.lengths = mask.sum(1)  # (N,), on the CPU: batches are cut to their longest text
        self.labels = torch.tensor(np.concatenate([texts.train_labels, texts.test_labels]))
        self.first_test, self.width = len(texts.train), model.encoder.config.hidden_size
        self.clients, self.domain = data.text_clients(texts, args.clients, args.alpha, args.seed)
        self.told, self.poisoned = poison_labels(self)
        self.honest = [k for k in range(len(self.clients)) if k not in self.poisoned]
        self.probe_ids, self.probe_mask = (t.to(run.device) for t in encode(texts.probes))
        self.network = draw_network(args, len(self.clients))
        self.cuts = [pick_cut(self, k) for k in range(len(self.clients))]
        common.seed_torch(args.seed, "init", "head")
        model.head.reset_parameters()
        self.start = adapters(model)  # LoRA was drawn when the model was built

    def batch(self, indices):
        """ids and mask (B, T) of some texts, T the longest of them."""
        longest, indices = int(self.lengths[indices].max()), indices.to(self.device)
        return self.ids[indices, :longest], self.mask[indices, :longest]

    def train_texts(self, client):
        """A client's training texts; client number N is the pool of all clients (`central`)."""
        if client == len(self.clients):
            return torch.cat([train for train, _ in self.clients])
        return self.clients[client][0]

    def batches(self, client, *purpose):
        """One client's local epochs: a list of index tensors. Partial batches are dropped unless
        the client has no full one."""
        train = self.train_texts(client)
        generator = common.torch_generator(self.args.seed, "batches", *purpose, client)
        common.seed_torch(self.args.seed, "noise", *purpose, client)  # dropout, rounding
        size, found = self.args.batch, []
        for _ in range(self.args.local_epochs):
            order = train[torch.randperm(len(train), generator=generator)]
            found += [order[i:i + size] for i in range(0, max(len(order) - size, 0) + 1, size)]
        return found


def adapters(model):
    """The trainable tensors (LoRA and head): dict name -> copy."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def load_adapters(model, state):
    """Put what `adapters` returned (or its like) back into the model."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(state[name])


def poison_labels(world):
    """The labels clients train on (N,), and client -> kind of those --poison made unreliable.

    label-flip: class c is called C - 1 - c; random: labels are drawn evenly. The victims are drawn
    from the seed, in turn over the domains, so that no domain loses its honest majority first.
    """
    told, poisoned, args = world.labels.clone(), {}, world.args
    rng, classes = common.numpy_generator(args.seed, "poison"), len(world.texts.class_names)
    order, turn = rng.permutation(args.clients), {}
    for k in order:
        turn[int(k)] = sum(world.domain[j] == world.domain[k] for j in turn)
    queue = sorted(turn, key=turn.get)
    for kind, count in parse_poison(args.poison, args.clients):
        for _ in range(count):
            k = queue.pop(0)
            mine, poisoned[k] = world.clients[k][0], kind
            drawn = torch.as_tensor(rng.integers(0, classes, len(mine)))
            told[mine] = drawn if kind == "random" else classes - 1 - world.labels[mine]
    return told, poisoned


def parse_poison(text, clients):
    """"label-flip:2,random:1" -> [(kind, count), ...]."""
    found = []
    for part in filter(None, text.split(",")):
        kind, _, count = part.partition(":")
        if kind not in ("label-flip", "random") or not count.isdigit():
            raise common.UserError(
                f"--poison {text!r}: expected label-flip:N, random:N or both with a comma")
        found.append((kind, int(count)))
    if sum(n for _, n in found) >= clients:
        raise common.UserError(f"--poison {text} leaves no honest one of {clients} clients")
    return found


def draw_network(args, clients):
    """Places in a unit square and devices -> dict of (N, E) and (N,) float64 tensors.

    UNSPECIFIED 5: latency is 5 ms and 60 ms per unit of distance; devices do 50 GFLOP/s and have 20
    Mbit/s and half a model's memory in the median, spread log-normally by a factor of two.
    """
    rng = common.numpy_generator(args.seed, "network")
    people, edges = rng.random((clients, 1, 2)), rng.random((1, args.edges, 2))
    draw = {name: torch.tensor(median * 2 ** rng.normal(size=clients)) for name, median in
            (("flops", 50e9), ("bandwidth", 20e6 / 8), ("memory", .5))}
    return {"latency": torch.tensor(5 + 60 * np.linalg.norm(people - edges, axis=-1)), **draw}


def block_cost(world):
    """Bytes of one block, of embeddings and head, and FLOPs of a block per step of a full batch."""
    encoder = world.model.encoder
    block = sum(p.numel() for p in encoder.encoder.layer[0].parameters())
    fixed = sum(p.numel() for part in (encoder.embeddings, world.model.head)
                for p in part.parameters())
    tokens = world.args.batch * float(world.lengths[:world.first_test].double().mean())
    return 4 * block, 4 * fixed, 4 * block * tokens  # forward 2, backward through states 2


def pick_cut(world, client):
    """(p, q) of a client: --split P,Q as given, or auto from its memory and speed."""
    args, layers = world.args, world.model.layers
    if args.split == "auto":
        block, fixed, flops = block_cost(world)
        memory = float(world.network["memory"][client]) * (fixed + layers * block)
        speed = float(world.network["flops"][client])
        deadline = layers / 2 * flops / 50e9  # what the median device needs for half the blocks
        return choose_cut(layers, fixed, block, memory, flops / speed, deadline)
    p, q = (1, layers - 1) if args.split is None else map(int, args.split.split(","))
    if not 0 <= p <= q <= layers:
        raise common.UserError(f"--split {p},{q}: expected 0 <= P <= Q <= {layers}, the blocks of "
                               "--model")
    return p, q


def train_client(world, start, client, link, cut, purpose, progress=None, steps=None):
    """Local epochs (or `steps` steps) of one client from `start` -> adapters, last loss.

    progress: (round, rounds) for the learning rate, which rises over 6% of the run and falls
    linearly; None keeps it constant. link None: the unsplit model.
    """
    args, model = world.args, world.model
    load_adapters(model, start)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    # UNSPECIFIED 9: AdamW starts afresh every round. Its moments would have to travel or be kept
    # by clients, and belong to adapters that the averages have replaced.
    optimizer = torch.optim.AdamW(params, args.lr, weight_decay=args.weight_decay)
    # `central` is the ceiling: it knows the true labels of the clients that --poison spoilt
    labels = world.labels if client == len(world.clients) else world.told
    batches = world.batches(client, *purpose)
    while steps and len(batches) < steps:
        batches = batches * 2  # a small client sees its texts again
    batches = batches[:steps]
    for i, here in enumerate(batches):
        if progress is not None:
            done = (progress[0] + (i + 1) / len(batches)) / progress[1]
            optimizer.param_groups[0]["lr"] = args.lr * min(done / .06, (1.0001 - done) / .94)
        logits = model(*world.batch(here), cut, link)
        loss = F.cross_entropy(logits, labels[here].to(world.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    where = " ".join(map(str, purpose))
    common.check_finite(loss.detach(), f"the loss of client {client} ({where})")
    model.eval()
    return adapters(model), loss.item()


@torch.no_grad()
def predict(world, state, indices, cut, link=None):
    """Predicted classes (n,) on the CPU; what crosses the link is coded as in training."""
    load_adapters(world.model, state)
    parts = [world.model(*world.batch(part), cut, link).argmax(-1) for part in indices.split(128)]
    return torch.cat(parts).cpu()


# -- Steps 1 to 6: who behaves alike, whom to trust, who goes where ------------------------------


def warm_up(world, client):
    """Step 1, on one client: a few local steps, then the probes and a look at its own states."""
    args, model, cut = world.args, world.model, world.cuts[client]
    state, _ = train_client(world, world.start, client, None, cut, ("warm-up",),
                               steps=args.warmup_steps)
    with torch.no_grad():
        x, bias = model.part1(world.probe_ids, world.probe_mask, model.layers)
        logits = model.part3(x, bias, model.layers)
        ids, mask = world.batch(world.clients[client][0][:128])
        own = model.part1(ids, mask, cut[0])[0][mask.bool()]  # (tokens, D)
    return {"cls": x[:, 0], "probabilities": logits.softmax(-1), "adapters": state,
            # UNSPECIFIED 7: V from the client's own texts at its cut, after the warm-up
            "basis": principal_directions(own, min(args.ssop_rank, len(own)))}


def set_up(world, run):
    """Steps 1 to 4 and what steps 8 and 9 need: distances, trust, rotations, directions."""
    args, n = world.args, len(world.clients)
    found = run.gather({k: warm_up(world, k) for k in run.share(range(n))})
    found = [common.to_device(found[k], "cpu") for k in range(n)]
    # Steps 2 and 3. All clients answered the same Q probes, so their fingerprints differ by what
    # they have learned, not by what they were asked.
    cls = torch.stack([f["cls"] for f in found])  # (N, Q, D)
    pooled = cls.flatten(0, 1)
    basis = principal_directions(pooled - pooled.mean(0), args.fingerprint_rank)
    prints = [gaussian_fingerprint(states, basis) for states in cls]
    distance = torch.stack([torch.stack([symmetric_kl(a, b) for b in prints]) for a in prints])
    distance = (distance + distance.T) / 2  # symmetric up to rounding; make it exact
    distance.fill_diagonal_(0)
    common.check_finite(distance, "a behavioural distance")
    # Step 4
    trust = trust_scores(distance, torch.stack([f["probabilities"] for f in found]),
                         args.neighbours)
    # Step 8: each client draws its Q_n from a generator of its own
    turns = [SubspaceRotation.random_turn(f["basis"].shape[1], common.torch_generator(
        args.seed, "rotation", k)) for k, f in enumerate(found)]
    directions = {}
    if args.channel == "lowrank" or args.curve:  # what `lowrank` keeps, learned on public texts
        weights = [len(c[0]) for c in world.clients]
        mean = fedavg([common.to_device(f["adapters"], world.device) for f in found], weights)
        directions = {str(cut): public_directions(world, mean, cut) for cut in set(world.cuts)}
    q, rotations = len(world.probe_ids), sum(f["basis"].numel() for f in found)
    rotations += sum(turn.numel() for turn in turns)
    once = {"probe states up": 4 * n * q * world.width,
            "probe predictions up": 4 * n * q * len(world.texts.class_names),
            "rotations up": 4 * rotations if args.ssop == "link" else 0}
    return {"distance": distance, "trust": trust, "bases": [f["basis"] for f in found],
            "turns": turns, "directions": directions, "once": once}


def public_directions(world, state, cut):
    """What crosses a cut on the probes, exchange by exchange: principal directions (D, up to D).

    state: the mean of the clients' warm-up adapters. Gradients need labels: the model's own guesses
    are drawn, so nothing private is used.
    """
    model, (p, q) = world.model, cut
    load_adapters(model, state)
    common.seed_torch(world.args.seed, "probe labels")
    up, bias = model.part1(world.probe_ids, world.probe_mask, p)
    up.retain_grad()
    down = model.blocks(up, bias, p, q)
    down.retain_grad()
    logits = model.part3(down, bias, q)
    guesses = torch.distributions.Categorical(logits=logits.detach()).sample()
    F.cross_entropy(logits, guesses).backward()
    model.zero_grad()
    tokens = world.probe_mask.bool()
    crossing = (up, down, down.grad, up.grad)  # in the order of EXCHANGES
    return {name: principal_directions(t.detach()[tokens].cpu(), world.width)
            for name, t in zip(EXCHANGES, crossing, strict=True)}


def place_clients(world, method, setup):
    """Which clients each edge serves: dict edge -> clients. Who is left out gets the cloud model.

    Also the cluster of each client (None if left out) and whether the trust filter had to yield.
    """
    args, n = world.args, len(world.clients)
    rng = common.numpy_generator(args.seed, "random edges")
    if method in ("central", "fedavg", "split-flat"):
        return {0: [n] if method == "central" else list(range(n))}, [0] * n, False
    if method == "local":
        return {k: [k] for k in range(n)}, list(range(n)), False
    keep, yielded = list(range(n)), False
    # Step 4: the floor follows the median, so that no absolute trust has to be known beforehand
    if method == "elsa" and not args.no_trust:
        floor = args.trust_factor * setup["trust"].median()
        keep = [k for k in range(n) if setup["trust"][k] >= floor]
        if not keep:  # UNSPECIFIED 2: nobody to learn from; go on with all and say so
            keep, yielded = list(range(n)), True
    if method == "hier-random" or args.no_cluster:
        order = rng.permutation(keep).tolist()
        groups = [sorted(order[e::args.edges]) for e in range(args.edges)]
        labels = {k: e for e, g in enumerate(groups) for k in g}
    else:  # Steps 5 and 6, among the trusted
        distance = setup["distance"][keep][:, keep]
        labels = dict(zip(keep, cluster_clients(distance, args.clusters), strict=True))
        edge = assign_edges(list(labels.values()), distance, world.network["latency"][keep],
                            args.capacity, args.tau_max, args.edge_lambda)
        groups = [[k for k, e in zip(keep, edge, strict=True) if e == which]
                  for which in range(args.edges)]
    # An edge to which nobody came takes no part.
    groups = {e: g for e, g in enumerate(groups) if g}
    return groups, [labels.get(k) for k in range(n)], yielded


# -- Steps 7 to 10 -------------------------------------------------------------------------------


def make_codecs(args, setup, width, device, cut):
    """The channel of the flags: exchange -> Codec for states and gradients, one for adapters."""
    if args.channel == "none":
        return {}, None
    reduce = dict.fromkeys([*EXCHANGES, "adapters"])
    if args.channel == "sketch":
        generator = common.torch_generator(args.seed, "sketch")
        sketch = CountSketch(width, args.ratio, args.sketch_rows, args.recovery, generator)
        reduce = dict.fromkeys(reduce, sketch.to(device))
    if args.channel == "lowrank":
        rank = max(int(args.ratio * width), 1)
        reduce |= {name: Projection(basis[:, :rank].to(device))
                   for name, basis in setup["directions"][str(cut)].items()}
    # DEVIATION 1: lowrank and quant stand beside the paper's sketch, on the same exchanges
    codecs = {name: Codec(r, args.bits) for name, r in reduce.items()}
    updates = codecs.pop("adapters")
    return (codecs if args.sketch in ("activations", "both") else {},
            updates if args.sketch in ("adapters", "both") else None)


def make_link(world, setup, client, codecs):
    """The link of one client under --ssop."""
    if world.args.ssop == "none":
        return Link(codecs)
    rotation = SubspaceRotation(setup["bases"][client].to(world.device),
                                setup["turns"][client].to(world.device))
    return Link(codecs, rotation, world.args.ssop)


def open_links(world, method, groups, setup):
    """Link and cut of every client that trains, and the codec of adapter updates.

    Methods without a split have no links: their clients hold the whole model and send adapters.
    """
    members = [k for g in groups for k in g]
    cuts = {k: world.cuts[k % len(world.clients)] for k in members}  # N is the pool: any cut
    if method not in ("split-flat", "hier-random", "elsa"):
        return dict.fromkeys(members), cuts, None
    codecs = {cut: make_codecs(world.args, setup, world.width, world.device, cut)
              for cut in set(cuts.values())}
    return ({k: make_link(world, setup, k, codecs[cut][0]) for k, cut in cuts.items()}, cuts,
            codecs[cuts[members[0]]][1])


def client_round(world, start, client, link, cut, update_codec, round_):
    """One client's part of an edge round, from the edge's adapters `start` to what it sends back.

    -> {"adapters": as the edge receives them, "loss": of the last step, "sent": bytes by kind}
    """
    if link is not None:
        link.sent = dict.fromkeys(EXCHANGES, 0.0)
    end, loss = train_client(world, start, client, link, cut, ("round", round_),
                             (round_, world.args.rounds))
    whole = size = 4 * sum(t.numel() for t in start.values())  # bytes of all adapters and the head
    if update_codec is not None:
        end, size = send_update(start, end, update_codec, world.width)
    return {"adapters": end, "loss": loss,
            "sent": {**(link.sent if link else {}), "adapters up": size, "adapters down": whole}}


def train_method(world, run, method, setup, state, save):
    """All rounds of one method, from `state` on; calls save(state) after each -> its history.

    state: {"round", "edges" (a list of adapters), "cloud", "history", "bytes"}. Every method is the
    same loop over other groups: FedAvg has one edge with all clients, `central` one edge with one
    client that holds all texts, `local` an edge for each client.
    """
    args = world.args
    groups = list(place_clients(world, method, setup)[0].values())
    home = {k: e for e, g in enumerate(groups) for k in g}
    samples = [[len(world.train_texts(k)) for k in g] for g in groups]
    links, cuts, update_codec = open_links(world, method, groups, setup)
    state["edges"] = state["edges"] or [world.start for _ in groups]
    rounds = range(state["round"], args.rounds)
    for round_ in run.progress(rounds, method, initial=rounds.start, total=args.rounds):
        # Steps 7 to 9: every client trains from its edge's adapters, through its link. Ranks share
        # the clients; gathered in client order, sums do not depend on how many ranks there are.
        trained = {k: client_round(world, state["edges"][home[k]], k, links[k], cuts[k],
                                   update_codec, round_) for k in run.share(list(home))}
        trained = {k: {**t, "adapters": common.to_device(t["adapters"], world.device)}
                   for k, t in sorted(run.gather(trained).items())}
        # Step 10: edges average their clients, the cloud averages edges, both by training texts
        state["edges"] = [fedavg([trained[k]["adapters"] for k in g], n)
                          for g, n in zip(groups, samples, strict=True)]
        state["cloud"] = fedavg(state["edges"], [sum(n) for n in samples])
        found = evaluate(world, run, groups, state, links, cuts)
        sent = dict.fromkeys([*EXCHANGES, "adapters up", "adapters down", "edge-cloud"], 0.0)
        for t in trained.values():
            for name, size in t["sent"].items():
                sent[name] += size
        if method not in ("local", "central") and (round_ + 1) % args.cloud_every == 0:
            # UNSPECIFIED 9: after a cloud round an edge goes on from a mix of its own model and the
            # cloud's; 1 is hierarchical FedAvg, 0 lets the cloud average but not interfere.
            mix = args.cloud_mix
            state["edges"] = [fedavg([edge, state["cloud"]], [1 - mix, mix])
                              for edge in state["edges"]]
            if len(groups) > 1:
                sent["edge-cloud"] = sent["adapters down"] / len(home) * 2 * len(groups)
        if method == "central":
            sent = dict.fromkeys(sent, 0.0)  # all texts lie in one place already
        state["bytes"] = {n: state["bytes"].get(n, 0.0) + size for n, size in sent.items()}
        state["round"] = round_ + 1
        row = {"round": state["round"], **found, "megabytes": sum(sent.values()) / 1e6}
        state["history"].append(row)
        run.log(method=method, round=row["round"], served=row["served"], cloud=row["cloud"],
                loss=sum(t["loss"] for t in trained.values()) / len(trained), MB=row["megabytes"])
        save(state)
    return state["history"]


def evaluate(world, run, groups, state, links, cuts):
    """Percent right on honest clients' own test texts, each read through its client's link.

    served: by the model of the client's edge (the cloud's if it has none); cloud: by the cloud
    model; edges: served, of each edge's honest clients by themselves.
    """
    # Clients that --poison made unreliable are left out: what they are served is nobody's loss.
    edge_of = {k: e for e, g in enumerate(groups) for k in g}
    pooled = len(world.clients) in edge_of
    n_edges, hits = len(groups), {}
    for k in run.share(range(len(world.clients))):
        if k in world.poisoned:
            continue
        test, e = world.clients[k][1], 0 if pooled else edge_of.get(k)
        truth = world.labels[test]
        common.seed_torch(world.args.seed, "evaluation", k)  # stochastic rounding
        link, cut = links.get(k), cuts.get(k, world.cuts[k])
        # A distrusted but honest client (e is None) still gets the cloud's model
        cloud = served = predict(world, state["cloud"], test, cut, link) == truth
        if n_edges > 1 and e is not None:
            served = predict(world, state["edges"][e], test, cut, link) == truth
        hits[k] = {"edge": e, "served": served.sum().item(), "cloud": cloud.sum().item(),
                   "count": len(test)}
    hits = [h for _, h in sorted(run.gather(hits).items())]

    def percent(key, rows):
        return 100 * sum(h[key] for h in rows) / max(sum(h["count"] for h in rows), 1)

    return {"served": percent("served", hits),
            "cloud": None if n_edges > world.args.edges else percent("cloud", hits),
            "edges": [percent("served", [h for h in hits if h["edge"] == e])
                      for e in range(n_edges)] if n_edges <= world.args.edges else []}


# -- Reports -------------------------------------------------------------------------------------


def round_seconds(world, groups, history):
    """Simulated seconds of a round under a placement: the slowest client, per placement.

    Compute of the client's blocks and of the edge's (ten times a median device, shared by its
    clients), four crossings a step, and the mean client's bytes over its bandwidth.
    """
    flops = block_cost(world)[2]
    net, slowest = world.network, 0.0
    clients = sum(len(g) for g in groups.values())
    share = 1e6 * history[-1]["megabytes"] / max(clients, 1)
    for e, members in groups.items():
        for k in members:
            p, q = world.cuts[k]
            # compute of the client, its share of the edge, and four waits a step; then its bytes
            steps = max(len(world.clients[k][0]) // world.args.batch, 1) * world.args.local_epochs
            mine = (p + world.model.layers - q) * flops / float(net["flops"][k])
            edge = (q - p) * flops * len(members) / 500e9
            wait = 4 * float(net["latency"][k, e]) / 1e3
            slowest = max(slowest, steps * (mine + edge + wait)
                          + share / float(net["bandwidth"][k]))
    return slowest


def privacy_report(world, setup, state, codec=None):
    """Steps 8 and 9 under attack: how many words an observer of part 1's states gets, in percent.

    The observer has the public model and an inverter fitted on 2000 random texts, knows r and the
    codec with its hashes, and for each of up to four clients sees what 200 test texts become under
    that client's W and the codec (None: sent as they are).
        in the clear   the inverter on states without SS-OP
        under SS-OP    the same on rotated states
        complement     fitted and read outside the subspace that carries most of the traffic
        Procrustes     W estimated from 100 tokens the observer knows, and the inverter fitted anew
    Under --ssop link that observer sits on the link, and the edge reads in the clear; under edge it
    is the edge itself. -> rows (attack, top-1, top-5), all without the 100 known tokens.
    """
    model, p = world.model, world.cuts[0][0]
    first, last = world.ids[0, 0], world.ids[0, world.lengths[0] - 1]  # [CLS], [SEP]
    pad = model.encoder.config.pad_token_id
    words = torch.cat([world.ids.unique(), world.probe_ids.unique()]).unique()
    words = words[(words != first) & (words != last) & (words != pad)]  # candidates
    ids, mask = world.batch(torch.arange(world.first_test, len(world.labels))[:200])
    inside = (mask > 0) & (ids != first) & (ids != last)  # the words of the texts
    truth = torch.searchsorted(words, ids[inside])
    common.seed_torch(world.args.seed, "attack")
    # The observer's training data: random words, whose states it can compute itself. Random, so
    # that nothing of the clients' language is taken for known.
    made = words[torch.randint(len(words), (2000, ids.shape[1]), device=words.device)]
    made[:, 0], made[:, -1] = first, last
    table = model.encoder.get_input_embeddings().weight.detach()[words]  # (V, E)
    load_adapters(model, world.start)  # the observer's: LoRA adds nothing yet
    with torch.no_grad():
        public = torch.cat([model.part1(t, torch.ones_like(t), p)[0][:, 1:-1]
                            for t in made.split(128)]).flatten(0, 1)
        view = model.part1(ids, mask, p)[0][inside][:100]  # of the text the observer knows
        load_adapters(model, state)
        states = model.part1(ids, mask, p)[0][inside]  # (M, D), what the client really sends
    wanted = model.encoder.get_input_embeddings().weight.detach()[made[:, 1:-1].flatten()]
    send, lift = (lambda x: x) if codec is None else codec.send, torch.eye(world.width)
    if codec is not None and codec.reduce is not None:  # encoders are linear: x -> x M
        lift = torch.linalg.pinv(codec.reduce.encode(lift.to(world.device)))
    inverter = fit_inverter(send(public), wanted)

    def rate(guesses):
        hit = guesses[100:] == truth[100:, None]
        return [100 * hit[:, :1].any(1).double().mean().item(),
                100 * hit.any(1).double().mean().item()]

    rows = {"in the clear": [rate(invert(send(states), inverter, table))]}
    for k in range(min(4, len(world.clients))):
        rotation = SubspaceRotation(setup["bases"][k].to(world.device),
                                    setup["turns"][k].to(world.device))
        seen = send(rotation.rotate(states))
        # W leaves what is orthogonal to V alone. V holds the strongest directions of the states,
        # turned only among themselves, so the traffic's own strongest directions span it too.
        inner = principal_directions(seen, rotation.basis.shape[1])
        outer = torch.eye(len(inner)).to(inner) - inner @ inner.T
        # W is the same for every word: a hundred known ones give it away
        guess = procrustes(view, seen[:100] @ lift.to(seen))
        for name, there, fitted in (
                ("under SS-OP", seen, inverter),
                ("complement", seen @ outer, fit_inverter(send(public) @ outer, wanted)),
                ("Procrustes", seen, fit_inverter(send(public @ guess), wanted))):
            rows.setdefault(name, []).append(rate(invert(there, fitted, table)))
    return [[name, *np.mean(found, 0).tolist()] for name, found in rows.items()]


CURVE = [("none", 1.0, "lsq", 32), *(("sketch", r, "median", 32) for r in (1.0, .5, .25)),
         *(("sketch", r, "lsq", 32) for r in (.5, .25)),
         *(("lowrank", r, "lsq", 32) for r in (.5, .25, .125)), ("lowrank", .25, "lsq", 8),
         ("quant", 1.0, "lsq", 8), ("quant", 1.0, "lsq", 4), ("quant", 1.0, "lsq", 2)]


def channel_curve(world, run, setup, state):
    """The trained ELSA models read through every channel (no training through it).

    -> rows: channel, bytes sent over bytes of the states, relative error ‖x̂ - x‖ / ‖x‖ of part 1's
    states, accuracy served. What a channel does to training is in benchmarks/RESULTS.md.
    """
    args, rows, before = world.args, [], dict(vars(world.args))
    groups = list(place_clients(world, "elsa", setup)[0].values())
    cuts = {k: world.cuts[k] for g in groups for k in g}
    ids, mask = world.batch(world.clients[0][1][:64])
    load_adapters(world.model, state["cloud"])
    with torch.no_grad():
        x = world.model.part1(ids, mask, world.cuts[0][0])[0]
    for channel, ratio, recovery, bits in CURVE:
        vars(args).update(channel=channel, ratio=ratio, recovery=recovery, bits=bits,
                          sketch="activations", ssop="none")
        codecs = {cut: make_codecs(args, setup, world.width, world.device, cut)[0]
                  for cut in set(world.cuts)}
        links = {k: Link(codecs[cut]) for k, cut in enumerate(world.cuts)}
        common.seed_torch(args.seed, "curve")
        link = Link(codecs[world.cuts[0]])
        error = (link.carry(x, EXCHANGES[0]) - x)[mask > 0].norm() / x[mask > 0].norm()
        found = evaluate(world, run, groups, state, links, cuts)
        name = {"none": "none", "sketch": f"sketch, {recovery}", "lowrank": "lowrank",
                "quant": "quant"}[channel] + (f", {bits} bits" if bits < 32 else "")
        rows.append([name, link.sent[EXCHANGES[0]] / (4 * x.numel()), error.item(),
                     found["served"]])
        vars(args).update(before)
    return rows


# ================================================================================================
# Command line
# ================================================================================================


def build_parser():
    """All flags, in the groups run, data, model, method."""
    parser = common.Parser(__doc__)
    common.add_run_arguments(parser)
    number, switch = common.number, common.argparse.BooleanOptionalAction
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default="topics",
                   help=f"{', '.join(data.TEXT_SETS)} or csv:PATH with rows label,text (default "
                   "%(default)s, the small world; topics-same: the same without contradiction)")
    g.add_argument("--clients", type=number(int, low=1), default=12, help="N (default %(default)s)")
    g.add_argument("--alpha", type=number(float, above=0), default=None,
                   help="Dirichlet concentration of labels over clients, smaller = more skewed "
                   "(default .5; small world 3)")
    g.add_argument("--poison", default=None,
                   help="unreliable clients, e.g. label-flip:2,random:1 (default none; small world "
                   "that)")
    g.add_argument("--probes", type=Path, default=None,
                   help="public probe texts, one a line (default: the set's own, or --num-probes "
                   "training texts set apart)")
    g.add_argument("--num-probes", type=number(int, low=4), default=96,
                   help="Q, of texts set apart (default %(default)s)")
    g = parser.add_argument_group("model")
    g.add_argument("--model", default=None,
                   help="a BERT-type encoder, directory or hub id (default bert-base-uncased; tiny "
                   "for topics)")
    g.add_argument("--max-length", type=number(int, low=4), default=64,
                   help="tokens of a text at most (default %(default)s)")
    g.add_argument("--rank", type=number(int, low=1), default=8,
                   help="LoRA rank on query and value (default %(default)s)")
    g.add_argument("--lora-alpha", type=number(float, above=0), default=16.0,
                   help="LoRA scale α/r (default %(default)s)")
    g.add_argument("--dropout", type=number(float, low=0, high=.9), default=None,
                   help="in the encoder and before the head (default .1; small world 0)")
    g.add_argument("--split", default=None,
                   help="P,Q: part 2 is blocks P..Q-1 (default 1,L-1), or auto: per client, from "
                   "memory and speed (UNSPECIFIED 6)")
    g = parser.add_argument_group("method")
    g.add_argument("--method", default=None,
                   help=f"comma-separated list of {', '.join(METHODS)}, or all (default elsa; "
                   "small world fedavg,elsa)")
    g.add_argument("--rounds", type=number(int, low=1), default=None,
                   help="edge rounds (default 10; small world 4)")
    g.add_argument("--local-epochs", type=number(int, low=1), default=1, help="a round's epochs")
    g.add_argument("--batch", type=number(int, low=1), default=None,
                   help="default 32; small world 16")
    g.add_argument("--lr", type=number(float, above=0), default=None,
                   help="AdamW (default 1e-3; small world 3e-3)")
    g.add_argument("--weight-decay", type=number(float, low=0), default=.01, help="AdamW")
    g.add_argument("--edges", type=number(int, low=1), default=3, help="E (default %(default)s)")
    g.add_argument("--cloud-every", type=number(int, low=1), default=2,
                   help="edge rounds between cloud rounds (default %(default)s)")
    g.add_argument("--cloud-mix", type=number(float, low=0, high=1), default=None,
                   help="what an edge takes from the cloud model, UNSPECIFIED 9 (default 1; small "
                   "world 0)")
    g.add_argument("--warmup-steps", type=number(int, low=1), default=None,
                   help="local steps before the fingerprint (default 30; small world 26); after 10 "
                   "a client of few classes still predicts one class on every probe")
    g.add_argument("--fingerprint-rank", type=number(int, low=1), default=12,
                   help="directions the fingerprint keeps, UNSPECIFIED 1 (default %(default)s)")
    g.add_argument("--neighbours", type=number(int, low=1), default=3,
                   help="of the trust consensus, UNSPECIFIED 2 (default %(default)s)")
    g.add_argument("--trust-factor", type=number(float, low=0), default=.6,
                   help="trusted: at least this times the median trust (default %(default)s)")
    g.add_argument("--no-trust", action="store_true", help="ablation: keep every client")
    g.add_argument("--no-cluster", action="store_true", help="ablation: random edges")
    g.add_argument("--clusters", type=number(int, low=1), default=None,
                   help="default: --edges (UNSPECIFIED 3)")
    g.add_argument("--capacity", type=number(int, low=1), default=None,
                   help="clients an edge takes (default: no limit)")
    g.add_argument("--tau-max", type=number(float, above=0), default=1e9,
                   help="ms of latency at most (default: no limit)")
    g.add_argument("--edge-lambda", type=number(float, low=0, high=1), default=.5,
                   help="behaviour against latency for a client that must move, UNSPECIFIED 4")
    g.add_argument("--ssop", choices=["none", "link", "edge"], default="link",
                   help="who knows W: link = client and edge, lossless; edge = the client alone, "
                   "lossy (default %(default)s; UNSPECIFIED 7)")
    g.add_argument("--ssop-rank", type=number(int, low=1), default=None,
                   help="r (default 32; small world 16)")
    g.add_argument("--channel", choices=["none", "sketch", "lowrank", "quant"], default=None,
                   help="sketch = the paper's count sketch (default); lowrank, quant (default "
                   "in the small world): DEVIATION 1")
    g.add_argument("--sketch", choices=["activations", "adapters", "both", "none"],
                   default="activations", help="what goes through the channel; activations means "
                   "states and their gradients (default %(default)s)")
    g.add_argument("--ratio", type=number(float, above=0, high=1), default=.5,
                   help="ρ: numbers sent over numbers, of sketch and lowrank (default %(default)s)")
    g.add_argument("--sketch-rows", type=number(int, low=1), default=3,
                   help="rows k of the sketch (default %(default)s)")
    g.add_argument("--recovery", choices=["median", "mean", "lsq"], default="median",
                   help="of the sketch (paper: median)")
    g.add_argument("--bits", type=int, choices=[2, 4, 8, 32], default=None,
                   help="of every number sent (default 32; 8 with --channel quant)")
    g.add_argument("--attack", action=switch, default=None,
                   help="privacy report with three attacks (default: small world only)")
    g.add_argument("--curve", action=switch, default=None,
                   help="the trained model read through every channel (default: small world only)")
    return parser


def resolve(args):
    """Fill in the defaults that depend on the data set; refuse what does not go together."""
    small = args.dataset in ("topics", "topics-same")
    if args.model == "tiny" and not small:
        raise common.UserError("--model tiny is pre-trained on the topics world and needs "
                               "--dataset topics; name a BERT-type encoder with --model")
    preset = dict(SMALL if small else REAL)
    for key, value in preset.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    names = METHODS if args.method == "all" else args.method.split(",")
    for name in names:
        if name not in METHODS:
            raise common.UserError(
                f"--method {name!r} is unknown; there are {', '.join(METHODS)} and all")
    args.method = ",".join(dict.fromkeys(names))
    args.clusters = args.clusters or args.edges
    args.bits = args.bits or (8 if args.channel == "quant" else 32)
    parts = (args.split or "0,0").split(",")
    if args.split != "auto" and not (len(parts) == 2 and all(p.isdigit() for p in parts)):
        raise common.UserError(f"--split {args.split!r}: expected P,Q or auto")
    if not small and args.dataset not in data.TEXT_SETS and not args.dataset.startswith("csv:"):
        raise common.UserError(f"--dataset {args.dataset!r} is unknown; there are "
                               f"{', '.join(data.TEXT_SETS)} and csv:PATH")
    if args.channel == "lowrank" and args.sketch in ("adapters", "both"):
        raise common.UserError("--channel lowrank knows the directions of states, not of adapters; "
                               "use --sketch activations, or --channel sketch or quant")
    parse_poison(args.poison, args.clients)
    return args


def build_federation(args, run):
    """Texts, clients, encoder with LoRA and head -> Federation."""
    with run.rank_zero_first():
        texts = data.load_texts(args.dataset, args.data_dir, args.seed, args.probes,
                                args.num_probes)
        if args.model == "tiny":
            encoder, encode = data.tiny_bert(args.seed, args.data_dir / "cache",
                                             progress=run.progress)
        else:
            encoder, encode = data.text_encoder(args.model, args.max_length, args.dropout,
                                                args.data_dir / "weights")
    width = encoder.config.hidden_size
    if args.ssop_rank > width:
        raise common.UserError(f"--ssop-rank {args.ssop_rank}: the states have {width} dimensions")
    if args.channel == "sketch" and int(args.ratio * width / args.sketch_rows) < 1:
        raise common.UserError(f"--ratio {args.ratio} with --sketch-rows {args.sketch_rows} leaves "
                               f"no bucket for {width} dimensions; raise it or take fewer rows")
    common.seed_torch(args.seed, "init", "lora")
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.lora_alpha,
                             target_modules=["query", "value"])
    encoder = peft.inject_adapter_in_model(config, encoder)
    model = SplitEncoder(encoder, len(texts.class_names), args.dropout)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith("head."))
    return Federation(args, run, texts, model.to(run.device).eval(), encode)


def fresh_state(method):
    """Where a method starts."""
    return {"method": method, "round": 0, "edges": None, "cloud": None, "history": [], "bytes": {}}


def draw_figure(world, result, path):
    """Left: distances, clusters, trust. Middle: accuracy by round. Right: accuracy by bytes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    n, clusters = len(world.clients), result["clusters"]
    order = sorted(range(n), key=lambda k: (clusters[k] is None, clusters[k] or 0, k))
    distance = np.array(result["distance"])[order][:, order]
    shown = left.imshow(np.log10(np.maximum(distance, 1e-2)), cmap="viridis")
    figure.colorbar(shown, ax=left, label="log10 symmetric KL (nats)", shrink=.8)
    names = [f"{k}{'*' * (k in world.poisoned)}" for k in order]
    left.set_xticks(range(n), names, fontsize=7)
    left.set_yticks(range(n), [f"{m}  {result['trust'][k]:.2f}" for m, k in
                               zip(names, order, strict=True)], fontsize=7)
    for i in range(1, n):
        if clusters[order[i]] != clusters[order[i - 1]]:
            left.axhline(i - .5, color="white", lw=1.5)
            left.axvline(i - .5, color="white", lw=1.5)
    left.set(xlabel="client (* poisoned); last block: distrusted", ylabel="client  trust",
             title="Behavioural distance")
    okabe_ito = ["#777777", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#0072B2"]
    for m, colour in zip(METHODS, okabe_ito, strict=True):  # colour-blind safe
        if m not in result["results"]:
            continue
        history = result["results"][m]["history"]
        rounds = [h["round"] for h in history]
        middle.plot(rounds, [h["served"] for h in history], color=colour, lw=2, marker="o", ms=3,
                    label=LABELS[m] + (", edges" if m == "elsa" else ""))
        if m == "elsa":
            middle.plot(rounds, [h["cloud"] for h in history], color=colour, ls="--",
                        label="ELSA, cloud")
            for e in range(len(history[-1]["edges"])):
                middle.plot(rounds, [h["edges"][e] for h in history], color=colour, lw=.6, alpha=.5)
    middle.legend(frameon=False)
    middle.xaxis.get_major_locator().set_params(integer=True)
    middle.set(xlabel="edge round", ylabel="accuracy on honest clients' tests (%)", ylim=(0, 101),
               title="Accuracy")
    if result.get("curve"):
        for kind, colour, mark in (("none", "#000000", "s"), ("sketch, median", "#D55E00", "o"),
                                   ("sketch, lsq", "#E69F00", "o"), ("lowrank", "#009E73", "^"),
                                   ("quant", "#0072B2", "D"), ("lowrank, 8 bits", "#CC79A7", "*")):
            name = {"quant": ("quant, 8 bits", "quant, 4 bits", "quant, 2 bits")}.get(kind, (kind,))
            rows = sorted(r[1:] for r in result["curve"] if r[0] in name)
            right.plot([r[0] for r in rows], [r[2] for r in rows], color=colour, marker=mark,
                       ms=13 if mark == "*" else 6, label=kind)
        right.set(xscale="log")
        right.legend(frameon=False)
    right.set(xlabel="bytes on the link, as a share", ylabel="accuracy served (%)", ylim=(0, 101),
              title="Read through a channel")
    figure.suptitle(f"ELSA on {result['dataset']}, seed {world.args.seed}")
    common.atomic_write(path, lambda p: figure.savefig(p, dpi=130))
    plt.close(figure)


def main(argv=None):
    """The command: every method of --method in turn, each resumable, then the report."""
    args = resolve(build_parser().parse_args(argv))
    title = "elsa-" + Path(args.dataset.removeprefix("csv:")).stem
    with common.Run(args, title) as run:
        state = run.load() or {"done": {}, "trained": {}, "current": None, "setup": None}
        run.begin()
        world = build_federation(args, run)
        if state["setup"] is None:
            state["setup"] = set_up(world, run)
            run.save(state, "the grouping")
        for method in args.method.split(","):
            if method in state["done"]:
                continue
            current = common.to_device(state["current"], world.device) or fresh_state(method)
            train_method(world, run, method, state["setup"], current, lambda now: run.save(
                {**state, "current": now}, f"{now['method']}, round {now['round']}"))
            state["trained"][method] = {k: current[k] for k in ("edges", "cloud")}
            state["done"][method] = {k: current[k] for k in ("history", "bytes")}
            state["current"] = None
            run.save(state, method)
        report(world, run, state)


def report(world, run, state):
    """Tables, figure, result.json and the RESULT line."""
    args, setup, results = world.args, state["setup"], state["done"]
    last = {m: r["history"][-1] for m, r in results.items()}
    run.table(["method", "served %", "cloud %", "MB a round"],
              [[LABELS[m], h["served"], h["cloud"], h["megabytes"]] for m, h in last.items()])
    shown = "elsa" if "elsa" in results else list(results)[-1]
    groups, labels, yielded = place_clients(world, shown, setup)
    n = len(world.clients)
    run.table([f"\nlinks of {LABELS[shown]}", "MB a round"],
              [[name, size / args.rounds / 1e6] for name, size in results[shown]["bytes"].items()])
    run.table(["once, before the first round", "MB"],
              [[name, size / 1e6] for name, size in setup["once"].items()])
    run.table(["\nserved %, by edge", *(f"edge {e}" for e in groups)],
              [[f"of {LABELS[shown]}", *last[shown]["edges"]]])
    result = {"dataset": args.dataset, "seed": args.seed, "results": results, "groups": groups,
              "trust": setup["trust"].tolist(), "distance": setup["distance"].tolist(),
              "poisoned": {str(k): v for k, v in world.poisoned.items()}, "cuts": world.cuts,
              "clusters": labels, "domains": world.domain, "once": setup["once"]}
    if yielded and run.rank == 0:
        print("no client reached the trust floor: the filter was left out and all take part")
    if shown == "elsa":
        result["seconds"] = placement_table(world, run, groups, results[shown]["history"])
    if shown == "elsa" and args.attack:
        codecs, _ = make_codecs(args, setup, world.width, world.device, world.cuts[0])
        result["privacy"] = privacy_report(
            world, setup, common.to_device(state["trained"]["elsa"]["cloud"], world.device),
            codecs.get("activations up"))
        run.table([f"\nwords recovered, r = {args.ssop_rank}", "top-1 %", "top-5 %"],
                  result["privacy"])
    if shown == "elsa" and args.curve:
        models = common.to_device(state["trained"]["elsa"], world.device)
        result["curve"] = channel_curve(world, run, setup, models)
        run.table(["\nread through a channel", "bytes", "error", "served %"], result["curve"])
    if run.rank == 0:
        print()
        draw_figure(world, result, run.out_dir / "figure.png")
    caught = [k for k in range(n) if labels[k] is None]
    run.finish(result, script="elsa", dataset=args.dataset, method=shown, seed=args.seed,
               served=last[shown]["served"], cloud=last[shown]["cloud"],
               mb_round=last[shown]["megabytes"], distrusted=len(caught), out=run.out_dir)


def placement_table(world, run, groups, history):
    """Critical path of ELSA's placement beside nearest edge and random, and what a client holds."""
    members = [k for g in groups.values() for k in g]
    latency = world.network["latency"]
    nearest = {e: [k for k in members if int(latency[k].argmin()) == e]
               for e in range(world.args.edges)}
    seconds = {"ELSA": round_seconds(world, groups, history),
               "nearest edge": round_seconds(world, nearest, history)}
    rng = common.numpy_generator(world.args.seed, "random placement")
    draws = []
    for _ in range(20):
        order = rng.permutation(members).tolist()
        draws.append(round_seconds(
            world, {e: order[e::world.args.edges] for e in range(world.args.edges)}, history))
    seconds["random (mean of 20)"] = float(np.mean(draws))
    run.table(["\nseconds of a round, simulated", "slowest client"],
              [[k, v] for k, v in seconds.items()])
    block, fixed, _ = block_cost(world)
    layers = world.model.layers
    mine = [p + layers - q for p, q in world.cuts]
    run.table(["\nclient's part of the model", "smallest", "largest"],
              [["memory %", *(100 * (fixed + f(mine) * block) / (fixed + layers * block)
                              for f in (min, max))],
               ["FLOPs %", *(100 * f(mine) / layers for f in (min, max))]])
    return seconds


if __name__ == "__main__":
    common.run_cli(main)
