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
    python elsa.py --dataset trec --model DIR_OR_HUB_ID  a real model, 12 clients on TREC: BERT and
                                                         its kin, DistilBERT, Llama, Qwen, GPT-2
    python elsa.py --dataset csv:FILE --model ...        your own labels and texts, any table
    python elsa.py --recovery lsq --ssop edge            the channel: see --channel, --ssop
    Beside the paper, with the same flags: beyond/elsa_channels.py (cheaper ways to send a state),
    beyond/elsa_attacks.py (what an observer reads), beyond/elsa_plan.py (what a phone carries, how
    long a round takes).

Paper map (P: the paper's as far as it could be read; O: ours)
    Step 1   P  probes, [CLS] states        warm_up
    Step 2   P  fingerprint N(μ, Σ)         gaussian_fingerprint          projection, ridge: O
    Step 3   P  symmetric KL                symmetric_kl
    Step 4   P  trust by consistency        trust_scores                  formula: O
    Step 5   P  clusters                    cluster_clients               linkage, number: O
    Step 6   P  latency-aware edges         assign_edges                  rule: O
    Step 7   P  split in three              SplitEncoder, choose_cut (v2) budgets, rule: O
    Step 8   P  SS-OP                       SubspaceRotation, Link        formula, modes: O
    Step 9   P  sketch, median recovery     CountSketch, Crossing         hashes, lsq: O
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
    One step on the link: 4 · B · T · D · 4 bytes · ρ (states and gradients, up and down; 2 bytes a
    number under --dtype bfloat16), T the longest text of the batch; a round adds two copies of φ a
    client, without part 2's, which stays at the edge. MiniLM (D = 384), 16 texts of 32 tokens: 3.15
    MB a step at ρ = 1, all LoRA adapters 295 kB. Simulating the split costs nothing: the parts run
    in one autograd graph, nothing is copied (benchmarks/elsa_step.py measures it). SS-OP costs 4rD
    instead of 2D² operations a state, a sketch two products with (D, ρD).

Results
    small world, under a CPU-minute, 5 seeds: served by FedAvg 46.6 ± 7.4, by ELSA's edges 91.4 ±
    5.6 (cloud 37.4 ± 6.1). Each half of the channel alone is harmless: --channel none 100.0 (cloud
    46.4 ± 4.5; local training reaches 100 too), --ssop none 99.4 ± 1.1; --recovery lsq mends most
    of it, 98.6 ± 1.2. A decoder (--model tiny-decoder): FedAvg 41.4 ± 3.6, ELSA's edges 87.4 ± 4.4.
    Real TREC, MiniLM encoder, 3 seeds, 5 rounds: FedAvg and ELSA with --channel none 89.1 ± 1.5;
    through the sketch of half the bytes 42.3 ± 1.5 by median, 69.4 ± 7.7 by --recovery lsq; --ssop
    edge without a sketch 52.2 (seed 0); centralised 96.2 ± .4 (5 seeds). Spreads, what does not
    hold and what was not run: benchmarks/RESULTS.md.

Where we depart (the marks can be searched for)
    UNSPECIFIED 1 the fingerprint's subspace (--fingerprint-rank) and ridge.
    UNSPECIFIED 2 the trust formula (--neighbours), its floor (--trust-factor), filtering before
                  clustering (an outlier would get a cluster of its own), and what happens when
                  nobody reaches the floor: all take part, and the report says so.
    UNSPECIFIED 3 average linkage, as many clusters as edges.
    UNSPECIFIED 4 the assignment rule (--tau-max, --capacity, --edge-lambda). An edge to which
                  nobody came takes no part.
    UNSPECIFIED 5 the network and the devices (data.py, draw_network).
    UNSPECIFIED 6 the budgets' rule of --split auto.
    UNSPECIFIED 7 SS-OP's formula, where V comes from, one W for both cuts, who knows W (--ssop).
                  A rotation gives no differential privacy; beyond/elsa_attacks.py shows what it
                  hides.
    UNSPECIFIED 8 the sketch's hashes; k, ρ and the recovery (--sketch-rows, --ratio, --recovery).
                  Dense states lose most of themselves in a median: beyond/elsa_channels.py
                  prints how much.
    UNSPECIFIED 9 how often the cloud averages (--cloud-every), what edges take from it
                  (--cloud-mix), and every learning setting.
    UNSPECIFIED 10 everything on decoders. Encoders that classify by [CLS] are the paper's as far as
                  it could be read. Of Llama, Qwen2, Qwen3, Mistral and GPT-2 the last token of a
                  text is read instead, in fingerprints too, by a head without bias: so does
                  transformers' own classifier, to which a split one is equal.

References
    LoRA: Hu et al., ICLR 2022. Split learning: Gupta and Raskar, 2018. Hierarchical FedAvg: Liu et
    al., ICC 2020. Count sketch: Charikar et al., 2002. TREC: Li and Roth, COLING 2002. MiniLM: Wang
    et al., NeurIPS 2020.
"""
# ================================================================================================
# Setup
# ================================================================================================
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data

METHODS = ["central", "local", "fedavg", "split-flat", "hier-random", "elsa"]
ALONE = ["central", "local"]  # nothing crosses a link
SPLIT = ["split-flat", "hier-random", "elsa"]  # the edge computes part 2; the others have no cut
LABELS = {"central": "centralised LoRA", "local": "local", "fedavg": "FedAvg, unsplit",
          "split-flat": "split, one server", "hier-random": "random clusters", "elsa": "ELSA"}

# Defaults that depend on the data. The paper's numbers could not be read: these are ours, chosen on
# seeds 100 and 101, which benchmarks/RESULTS.md does not report.
REAL = {"model": "bert-base-uncased", "method": "elsa", "rounds": 10, "lr": 1e-3, "batch": 32,
        "alpha": .5, "dropout": .1, "channel": "sketch", "cloud_mix": 1.0, "poison": "",
        "ssop_rank": 32, "warmup_steps": 30}
SMALL = {"model": "tiny", "method": "fedavg,elsa", "rounds": 4, "lr": 3e-3, "batch": 16,
         "alpha": 3.0, "dropout": 0.0, "channel": "sketch", "cloud_mix": 0.0,
         "poison": "label-flip:2,random:1", "threads": 1, "ssop_rank": 16, "warmup_steps": 26}

# ================================================================================================
# Model: a language model as a classifier in three parts, and what crosses the link between them
# ================================================================================================


class SplitEncoder(nn.Module):
    """A language model and a linear head on the state of one token, cut before blocks p and q.

    encoder: a transformers model (5.17 or newer) that is built like one of LAYOUTS, e.g. BertModel
    with add_pooling_layer=False or LlamaModel, in which peft has put LoRA; ValueError for others.
    Part 1 (embeddings, blocks < p) and part 3 (blocks >= q, last norm, head) run on the client,
    part 2 on the edge; 0 <= p <= q <= L. Texts are padded on the right.

    The parts call the encoder's own blocks in the encoder's own order on tensors that are not
    copied, so loss, logits and all gradients are those of the unsplit model bit for bit, and
    dropout draws the same masks from torch's generator in the same order.
    Fits: any floating dtype and device. Models that do more on the way only look alike (RoBERTa
    with LayerNorm first): compare last_states(*part1(ids, mask, 0), 0) with the model's own once.
    """

    # UNSPECIFIED 10: the method as far as it could be read has a BERT; that models of other builds
    # are cut in the same three places is ours. Where transformers keeps their parts:
    #   words   ids -> states (BERT's embeddings add the positions themselves)
    #   places  a table of positions, added to the words; then: what is done with the sum, if it is
    #   rotary  what turns queries and keys by their positions, in every block
    #   lora    the projections that LoRA goes to; causal: a token sees those before it alone
    COLUMNS = ("words", "places", "then", "blocks", "rotary", "norm", "lora", "causal")
    LAYOUTS = (
        # BERT, RoBERTa, XLM-R, ELECTRA, MiniLM ...
        ("embeddings", None, "embeddings_project", "encoder.layer", None, None,
         ("query", "value"), False),
        # DistilBERT
        ("embeddings", None, None, "transformer.layer", None, None, ("q_lin", "v_lin"), False),
        # Llama, Qwen2, Qwen3, Mistral
        ("embed_tokens", None, None, "layers", "rotary_emb", "norm", ("q_proj", "v_proj"), True),
        # GPT-2: query, key and value are one matrix
        ("wte", "wpe", "drop", "h", None, "ln_f", ("c_attn",), True),
    )

    def __init__(self, encoder, num_classes, dropout=0.0):
        super().__init__()
        if hasattr(encoder, "get_base_model"):  # peft's wrapper; its LoRA stays inside
            encoder = encoder.get_base_model()
        self.encoder, self.dropout = encoder, nn.Dropout(dropout)
        self.layout = self.find_layout(encoder)
        self.layers = len(self.stack())
        # UNSPECIFIED 10: decoders get the head that transformers gives them, without a bias
        self.head = nn.Linear(encoder.config.hidden_size, num_classes,
                              bias=not self.layout["causal"])

    @classmethod
    def find_layout(cls, encoder):
        """The row of LAYOUTS by which a model is built -> dict column -> attribute; ValueError."""
        known = [name for name, _ in encoder.named_modules()]
        for row in cls.LAYOUTS:
            row = dict(zip(cls.COLUMNS, row, strict=True))
            parts = [row[c] for c in ("words", "places", "blocks", "rotary", "norm") if row[c]]
            inside = [name for name in known if name.startswith(f"{row['blocks']}.0.")]
            if set(parts) <= set(known) and \
                    all(any(n.endswith(f".{target}") for n in inside) for target in row["lora"]):
                return row
        raise ValueError(f"is a {type(encoder).__name__}; models that can be cut are BERT-type "
                         "encoders (embeddings, encoder.layer with attention.self.query), "
                         "DistilBERT, decoders like Llama (Qwen2, Qwen3, Mistral) and GPT-2")

    def stack(self):
        """The encoder's blocks, a ModuleList."""
        return self.encoder.get_submodule(self.layout["blocks"])

    # An architecture shows in three places only: how words become states and which tokens may see
    # which (embed), how a block is called (blocks), and which state is read (last_states, read).

    def embed(self, ids, mask):
        """ids, mask (B, T) -> states (B, T, D) before block 0, and what blocks need beside them.

        That is a tuple: an attention bias or None for each block; a dict of what all blocks take,
        the angles of rotary positions; and (B,), which token is the last of each text.
        """
        from transformers.masking_utils import create_bidirectional_mask, create_masks_for_generate

        config, part, row = self.encoder.config, self.encoder.get_submodule, self.layout
        x = part(row["words"])(ids)  # (B, T, D)
        places = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        if row["places"]:
            x = x + part(row["places"])(places)
        if row["then"] and hasattr(self.encoder, row["then"]):  # ELECTRA's words may be narrower
            x = part(row["then"])(x)
        # The library's own masks, so that attention takes the same kernel as in the unsplit model.
        # The edge needs them too: they say how long the texts are, not what they say. A bit a
        # token, which the byte counts leave out. Angles follow from T alone.
        if row["causal"]:  # some blocks of a Qwen2, all of a Mistral, look back a few tokens only
            bias = create_masks_for_generate(config, x, mask, None, position_ids=places)
        else:
            bias = create_bidirectional_mask(config=config, inputs_embeds=x, attention_mask=mask)
        each = [bias[kind] for kind in config.layer_types] if isinstance(bias, dict) else \
            [bias] * self.layers
        angles = {"position_embeddings": part(row["rotary"])(x, places)} if row["rotary"] else {}
        return x, (each, angles, mask.sum(1) - 1)

    def blocks(self, x, beside, start, stop):
        """Blocks start..stop - 1 on states (B, T, D); part 2 is blocks(x, beside, p, q)."""
        each, angles, _ = beside
        for block, bias in zip(self.stack()[start:stop], each[start:stop], strict=True):
            x = block(x, attention_mask=bias, **angles)
        return x

    def last_states(self, x, beside, q):
        """States (B, T, D) before block q -> the last block's, after its norm where it has one."""
        x = self.blocks(x, beside, q, self.layers)
        return self.encoder.get_submodule(self.layout["norm"])(x) if self.layout["norm"] else x

    def read(self, x, beside):
        """Last states (B, T, D) -> the one of each text that stands for it (B, D)."""
        # [CLS], the first token. UNSPECIFIED 10: in a decoder the first token has seen nothing but
        # itself. The last one has seen the whole text, so that is read, as transformers does.
        *_, last = beside
        rows = torch.arange(len(x), device=x.device)
        return x[rows, last] if self.layout["causal"] else x[:, 0]

    def part1(self, ids, mask, p):
        """ids, mask (B, T) -> states (B, T, D) before block p, and what blocks need beside them."""
        x, beside = self.embed(ids, mask)
        return self.blocks(x, beside, 0, p), beside

    def part3(self, x, beside, q):
        """States (B, T, D) before block q -> logits (B, C)."""
        x = self.read(self.last_states(x, beside, q), beside)  # (B, D)
        return self.head(self.dropout(x.to(self.head.weight.dtype)))

    def forward(self, ids, mask, cut, link=None):
        """Logits (B, C); cut = (p, q); link: a Link, or None when nothing crosses a network."""
        # Step 7. The words are needed in part 1 only and the labels after part 3 only, so both
        # parts stay on the client. The edge gets what is expensive and says little by itself: the
        # blocks between. Hence two crossings of states forwards, and two of gradients backwards.
        p, q = cut
        x, beside = self.part1(ids, mask, p)  # client: (B, T, D)
        x = x if link is None else link.to_edge(x)
        x = self.blocks(x, beside, p, q)  # edge
        x = x if link is None else link.to_client(x)
        return self.part3(x, beside, q)  # client again: (B, C)


class CountSketch(nn.Module):
    """k rows of w signed sums: y_(r,b) = Σ_(i: h_r(i) = b) s_r(i) x_i; kw numbers for D.

    width D; ratio ρ in (0, 1], w = ⌊ρD / k⌋ >= 1; recovery "median" or "mean" of the k estimates
    s_r(i) y_(r, h_r(i)) of x_i, or "lsq", the x̂ of least norm with that sketch.
    encode (..., D) -> (..., kw) is linear; decode goes back and is unbiased over the signs for mean
    and median (all other signs turned round turn the error round). With one row E‖x̂ - x‖² =
    (D / w - 1) ‖x‖² for w dividing D. The count sketch was made for vectors with few large
    entries: dense states break its median.
    sketch(x) -> what the other side recovers, and the bytes that went.
    Both sides need the same hashes: the same generator's seed, or the one's state_dict.
    Fits: any floating dtype and device (the pseudo-inverse of "lsq" is computed on the CPU, once);
    vectors of a fixed width in the last axis.
    """

    # UNSPECIFIED 8: hashes are drawn once per run, and each row deals a random permutation over its
    # buckets. Independent hashes would leave buckets empty, so that even ρ = 1 would lose
    # something; dealt ones are exact at ρ = 1, k = 1.

    def __init__(self, width, ratio, rows=3, recovery="median", generator=None):
        super().__init__()
        w = int(ratio * width / rows)
        if w < 1:
            raise ValueError(f"ratio {ratio} of {width} leaves no bucket for each of {rows} rows")
        if recovery not in ("median", "mean", "lsq"):
            raise ValueError(f"recovery {recovery!r}: expected median, mean or lsq")
        # h_r(i): the position of i in row r's permutation, modulo w, so that every bucket gets
        # ⌊D / w⌋ or one more. Row r's buckets stand at rw..(r + 1)w - 1 of the kw sums.
        order = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)])
        bucket = order % w + w * torch.arange(rows)[:, None]  # (k, D)
        # s_r(i) = ±1: what else fell into a bucket is as likely to add as to take away, which is
        # why an estimate is right on average
        sign = torch.randint(0, 2, (rows, width), generator=generator) * 2.0 - 1  # (k, D)
        matrix = torch.zeros(width, rows * w)  # (D, kw): x @ matrix is the sketch
        for b, s in zip(bucket, sign, strict=True):
            matrix[torch.arange(width), b] = s
        self.recovery, self.rows = recovery, rows
        # The way back, where it is linear. mean: 1/k Σ_r s_r(i) y_(r, h_r(i)) is a product with the
        # transpose. lsq: the pseudo-inverse, so that x̂ is x projected on what the sketch can see;
        # its cut-off keeps what the sketch hardly sees from being blown up.
        back = matrix.T / rows  # (kw, D)
        if recovery == "lsq":
            back = torch.linalg.pinv(matrix.double(), rtol=1e-6).float()
        for name, table in zip(("bucket", "sign", "matrix", "back"), (bucket, sign, matrix, back),
                               strict=True):
            self.register_buffer(name, table)

    def encode(self, x):
        # Step 9: y_(r,b) = Σ_(i: h_r(i) = b) s_r(i) x_i. One product, the same as
        #     for r in range(k):
        #         for i in range(D):
        #             y[..., bucket[r, i]] += sign[r, i] * x[..., i]
        return x @ self.matrix.to(x.dtype)  # (..., kw)

    def decode(self, y):
        if self.recovery != "median" or self.rows == 1:
            return y @ self.back.to(y.dtype)  # (..., D)
        # Step 9, back: each row has its own estimate of x_i, its bucket with the sign taken off.
        # A collision spoils one row's, seldom those of most rows: the paper takes the median.
        estimates = [y[..., b] * s for b, s in zip(self.bucket, self.sign.to(y.dtype), strict=True)]
        if self.rows == 3:
            # The middle of three without a sort, max(min(a, b), min(max(a, b), c)), many times
            # cheaper, and the same number as the two lines below
            a, b, c = estimates
            return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
        ordered = torch.stack(estimates, -1).sort(-1).values  # (..., D, k)
        return (ordered[..., (self.rows - 1) // 2] + ordered[..., self.rows // 2]) / 2

    def forward(self, x):
        y = self.encode(x)
        return self.decode(y), y.numel() * y.element_size()


class SubspaceRotation(nn.Module):
    """SS-OP: an orthogonal W that turns states inside a subspace and leaves the rest alone.

    basis V (D, r) with orthonormal columns, turn Q (r, r) orthogonal.
    rotate: H W, unrotate: H Wᵀ, both (..., D) -> (..., D), at 4rD instead of 2D² operations each.
    Fits: any floating dtype (unrotate(rotate(h)) is h up to its rounding) and device. V and Q are
    the secret, and stand in the state_dict: do not send it to those who are not to know W.
    """

    def __init__(self, basis, turn):
        super().__init__()
        self.register_buffer("basis", basis)
        self.register_buffer("turn", turn)

    @staticmethod
    def random_turn(rank, generator):
        """Q uniform over the orthogonal group: QR of a Gaussian with the signs of diag R."""
        # QR alone fixes signs by its algorithm, which would favour some turns over others
        q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float()

    def rotate(self, h, back=False):
        # Step 8. What says most about the words lies in a few directions of the states, V. Only
        # these are turned, by a secret Q: the other D - r carry little and are left as they are.
        # UNSPECIFIED 7: W = I - VVᵀ + VQVᵀ = I + V (Q - I) Vᵀ, and W⁻¹ = Wᵀ has Qᵀ for Q.
        # W itself is never built; this is the same as
        #     W = torch.eye(D) + V @ (Q - torch.eye(r)) @ V.T;  return h @ W
        turn = self.turn.T if back else self.turn
        basis = self.basis.to(h.dtype)
        change = turn.to(h.dtype) - torch.eye(len(turn), dtype=h.dtype, device=h.device)
        return h + h @ basis @ change @ basis.T  # (..., D) -> (..., r) -> (..., r) -> (..., D)

    def unrotate(self, h):
        return self.rotate(h, back=True)


# The four messages of one step, named by where they go: up is to the edge, down is to the client.
#
#     client, part 1          edge, part 2            client, part 3 and loss
#         H  ── activations up ──►  H'  ── activations down ──►  H''
#     ∂/∂H  ◄── gradients down ──  ∂/∂H'  ◄── gradients up ───  ∂/∂H''
EXCHANGES = ["activations up", "activations down", "gradients up", "gradients down"]


class Link:
    """The link between one client and its edge: what crosses it, in which form, how many bytes.

    codecs: dict exchange -> codec, a function x -> (what the other side recovers, bytes sent), for
    instance a CountSketch; what has none is sent as it is. rotation: SubspaceRotation or None.
    mode: who knows W.
        "link"  client and edge. Whoever sends rotates, whoever receives turns back at once, in both
                directions: part 2 computes on the true states, nothing is lost but what a codec
                loses, and only those who listen on the link are kept out. (V and Q must have
                reached the edge by a safer way.)
        "edge"  the client alone. It rotates what leaves part 1 and turns back what enters part 3.
                Between them the edge computes on H W as if it were H, which is not the same:
                LayerNorm, attention and GELU do not commute with W. It costs accuracy, and the edge
                sees H only outside V.
    Gradients take the same way backwards: the chain rule of a product with W is a product with Wᵀ.
    So what crosses is rotated in both directions, and whoever turned states turns gradients back.
    sent: bytes by exchange since it was last cleared.
    Fits: any model cut in three, any device; both sides live in one autograd graph.
    """

    def __init__(self, codecs=None, rotation=None, mode="link"):
        self.codecs, self.rotation, self.mode = codecs or {}, rotation, mode
        self.sent = dict.fromkeys(EXCHANGES, 0.0)

    def carry(self, x, exchange):
        """One message: x (..., D) as the sender holds it -> as the receiver recovers it."""
        codec = self.codecs.get(exchange)
        # float32: 4 bytes a number, bfloat16: 2
        received, size = (x, x.numel() * x.element_size()) if codec is None else codec(x)
        self.sent[exchange] += size
        return received

    def to_edge(self, x):
        """Part 1's states (B, T, D) -> what part 2 computes on."""
        # Steps 8 and 9 at the first cut: first hidden, then compressed.
        #     client: H -> H W -> sketch of H W     edge: recovered H W -> in mode "link" times Wᵀ
        if self.rotation is not None:
            x = self.rotation.rotate(x)
        x = Crossing.apply(x, self, "activations up", "gradients down")
        both_know = self.rotation is not None and self.mode == "link"
        return self.rotation.unrotate(x) if both_know else x

    def to_client(self, x):
        """Part 2's states (B, T, D) -> what part 3 computes on."""
        # The second cut. In mode "link" the edge holds true states and must rotate them before they
        # cross. In mode "edge" it could not if it wanted to, and need not: what it computed on was
        # rotated, so what it sends is taken for rotated. The client turns back in both modes.
        if self.rotation is not None and self.mode == "link":
            x = self.rotation.rotate(x)
        x = Crossing.apply(x, self, "activations down", "gradients up")
        return x if self.rotation is None else self.rotation.unrotate(x)


class Crossing(torch.autograd.Function):
    """A tensor crosses forwards, its gradient crosses back, each through the codec of its exchange.

    The gradient that arrives is taken for the gradient of what was sent (straight through). For a
    channel that is a symmetric linear map, such as the sketch with lsq, that is the true gradient.
    """

    # Three programs that exchange tensors would do this, with c.. the codec of each message:
    #     h = part1(ids);             up = c1(h.detach()).requires_grad_()
    #     g = part2(up);              down = c2(g.detach()).requires_grad_()
    #     loss(part3(down)).backward()
    #     g.backward(c3(down.grad));  h.backward(c4(up.grad))
    # One autograd graph with a Crossing in the place of c1, c4 and one in that of c2, c3 computes
    # the same, and nothing is copied.

    @staticmethod
    def forward(ctx, x, link, forward, backward):
        ctx.link, ctx.backward_name = link, backward
        received = link.carry(x, forward)
        # Without a codec this is x itself; as a view, autograd takes it for this function's output
        return received.view_as(received)

    @staticmethod
    def backward(ctx, gradient):
        # Step 9, backwards: the gradient is a message like any other, coded and counted
        return ctx.link.carry(gradient, ctx.backward_name), None, None, None


# ================================================================================================
# Method: pure functions, to be copied
# ================================================================================================


def principal_directions(x, rank):
    """The top right singular vectors of x (N, D) -> (D, rank), rank at most min(N, D).

    Not centred. Fits: any floating dtype (computed in float64, returned in float32 at least: in
    bfloat16 they would not be orthogonal) and device with an SVD.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.svd(x.double(), full_matrices=False).Vh[:rank].T.to(dtype)


def gaussian_fingerprint(states, basis, ridge=.05):
    """N(μ, Σ) of [CLS] states (Q, D) in the subspace of basis (D, k) -> (k,), (k, k), float64.

    basis: one for all clients, e.g. the top k directions of all their states pooled and centred.
    ridge: share of Σ's mean variance that is added to it.
    Fits: any floating dtype (computed in float64) and device.
    """
    # UNSPECIFIED 1: Σ of Q <= D states is singular and the KL divergence of singular Gaussians is
    # not defined, so states are read in the pooled probes' top k directions and Σ gets a ridge.
    z = states.double() @ basis.double()  # (Q, k)
    # Step 2. How a client's model answers the public probes, as a cloud of points: where it lies
    # (μ) and how it spreads (Σ, divided by Q, not Q - 1). No label and no private text is in it.
    mu = z.mean(0)  # (k,)
    # Σ = 1/Q Σ_j (T_j - μ)(T_j - μ)ᵀ + ridge · tr(Σ)/k · I. The ridge is a share of Σ's own mean
    # variance, so that it means the same for every model.
    sigma = (z - mu).T @ (z - mu) / len(z)  # (k, k)
    k = len(mu)
    scale = (ridge * sigma.trace() / k).clamp(min=1e-12)  # identical states: still invertible
    return mu, sigma + scale * torch.eye(k, dtype=z.dtype, device=z.device)


def symmetric_kl(p, q):
    """½ [KL(p‖q) + KL(q‖p)] of two Gaussians (μ, Σ), in nats; the determinants cancel.

    p, q: pairs (k,), (k, k), Σ positive definite -> scalar. Fits: float32 and float64, any device.
    """
    (mu_p, sigma_p), (mu_q, sigma_q) = p, q
    precision_p, precision_q = torch.linalg.inv(sigma_p), torch.linalg.inv(sigma_q)  # (k, k)
    gap = mu_p - mu_q  # (k,)
    # Step 3: R(p, q) = ¼ [tr(Σq⁻¹Σp) + tr(Σp⁻¹Σq) - 2k + (μp - μq)ᵀ(Σp⁻¹ + Σq⁻¹)(μp - μq)].
    # One KL is ½ [tr(Σq⁻¹Σp) - k + gapᵀ Σq⁻¹ gap + ln det Σq/det Σp]; in the other the logarithm
    # has the opposite sign. tr(AB) is the sum over A ⊙ Bᵀ, without the product.
    traces = (precision_q * sigma_p.T).sum() + (precision_p * sigma_q.T).sum()
    return (traces - 2 * len(gap) + gap @ (precision_p + precision_q) @ gap) / 4


def trust_scores(distance, probabilities, neighbours=3):
    """How far each client's probe predictions agree with its behavioural neighbours' -> (N,).

    distance (N, N); probabilities (N, Q, C), not logits: every client's predictions on the probes
    -> float64 in [0, 1]. It ranks clients of one federation; drop those far below the median.
    Fits: any floating dtype (computed in at least float32) and device; all on one.
    """
    # UNSPECIFIED 2: honest clients hold different classes and so predict them unequally often. Each
    # is therefore read relative to its own prior, and judged by what it can know: a probe counts as
    # much as the client's prior of the class that the neighbours agree on. Plain agreement takes
    # label skew for dishonesty (benchmarks/RESULTS.md has both).
    n = len(distance)
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    # Step 4. Probes have no labels, so the only witnesses of a client are other clients: those
    # whose states look most like its own, who should have learned the same. However far an
    # unreliable client is from all, it has nearest neighbours too, and contradicts them.
    #
    # First every client's answers are made comparable. One that has seen class c often says c often
    # (its prior); dividing by the prior and making it sum to one again undoes that. By Bayes' rule
    #     lift_k(c|x) ∝ p_k(c|x) / prior_k(c) ∝ p_k(x|c),
    # what it would say had it seen all classes equally often.
    prior = probabilities.mean(1)  # (N, C)
    lift = probabilities / prior[:, None].clamp(min=1e-12)
    lift = lift / lift.sum(-1, keepdim=True)  # (N, Q, C)
    far = distance + torch.diag(distance.new_full((n,), torch.inf))  # not oneself
    scores = []
    for k in range(n):
        # What the m nearest say together, each as loudly as it is sure (the largest of its lifts):
        #     consensus_k(x) = argmax_c Σ_(j near k) max_c' lift_j(c'|x) · lift_j(c|x)
        near = far[k].argsort(stable=True)[:min(neighbours, n - 1)]
        confidence = lift[near].amax(-1, keepdim=True)  # (m, Q, 1)
        consensus = (confidence * lift[near]).sum(0).argmax(-1)  # (Q,)
        # How often client k says the same. A probe on a class that k has hardly ever seen says
        # nothing about its honesty, so each counts by k's own prior of the consensus:
        #     trust_k = Σ_x w_k(x) [argmax lift_k(x) = consensus_k(x)] / Σ_x w_k(x),
        #     w_k(x) = prior_k(consensus_k(x))
        weight = prior[k][consensus].double()  # (Q,)
        agree = lift[k].argmax(-1) == consensus
        scores.append((weight * agree).sum() / weight.sum().clamp(min=1e-12))
    return torch.stack(scores)


def cluster_clients(distance, clusters):
    """Average-linkage agglomeration of (N, N) distances into at most `clusters` -> N labels 0..

    distance: symmetric, 0 on the diagonal.
    Fits: any floating dtype and device; scipy does it on the CPU.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    # Step 5. UNSPECIFIED 3: the linkage and the number of clusters. Everybody starts alone; the two
    # groups with the least mean distance between their members become one until few enough are
    # left. The mean is not led astray by one odd pair, as the nearest or the farthest pair would be
    if len(distance) == 1:
        return [0]
    upper = distance[tuple(torch.triu_indices(*distance.shape, 1))]  # (N (N - 1) / 2,)
    tree = linkage(upper.double().cpu().numpy(), "average")
    return [int(c) - 1 for c in fcluster(tree, clusters, "maxclust")]


def assign_edges(labels, distance, latency, capacity=None, tau_max=math.inf, lam=.5):
    """Each cluster to an edge, each client to its cluster's edge unless too far or too full.

    labels: N cluster numbers; distance R (N, N); latency (N, E) in ms; capacity: clients an edge
    takes (default: no limit); tau_max in ms; lam = λ in [0, 1], what behaviour weighs against
    latency -> N edges.
    Fits: float32 and float64, any device; scipy does it on the CPU.
    """
    # UNSPECIFIED 4, all of it
    from scipy.optimize import linear_sum_assignment

    n, edges = latency.shape
    clusters = sorted(set(labels))
    # Step 6, whole clusters first: those who behave alike should be averaged together, so each
    # cluster gets an edge of its own while there are enough. Of all such pairings the one with the
    # least sum of mean latencies is taken (the assignment problem); a cluster may thus have to
    # leave its nearest edge to one that gains more by it.
    cost = torch.stack([latency[[k for k in range(n) if labels[k] == c]].mean(0)
                        for c in clusters])  # (clusters, E)
    rounds = -(-len(clusters) // edges)  # more clusters than edges: every edge is offered again
    rows, columns = linear_sum_assignment(cost.repeat(1, rounds).double().cpu().numpy())
    home = {clusters[r]: int(c) % edges for r, c in zip(rows, columns, strict=True)}
    edge = [home[c] for c in labels]
    # Then the clients whom that does not suit, the slowest first, since they hold up the round and
    # are the first that a full edge gives away. Whoever is within τ_max of an edge that is not
    # overfull stays. The others go to the cheapest edge within τ_max that has room; where there is
    # none, they stay too. Loads change as clients move, so each sees what the earlier ones did.
    room = capacity or n
    for k in sorted(range(n), key=lambda k: -float(latency[k, edge[k]])):
        load = [edge.count(e) for e in range(edges)]
        if latency[k, edge[k]] <= tau_max and load[edge[k]] <= room:
            continue
        others = [e for e in range(edges)
                  if e != edge[k] and load[e] < room and latency[k, e] <= tau_max]
        if others:
            edge[k] = min(others, key=lambda e, k=k: edge_price(k, e, edge, distance, latency, lam))
    return edge


def edge_price(k, e, edge, distance, latency, lam):
    """What moving client k to edge e costs: λ R + (1 - λ) latency, both over their maximum.

    edge: N edges at present; distance (N, N); latency (N, E) -> float in [0, 1].
    """
    kin = [j for j in range(len(edge)) if edge[j] == e]
    # R is the mean distance to who is there already. An empty edge counts as the farthest: there is
    # nobody to share a model with.
    behaviour = distance[k, kin].mean() / distance.max().clamp(min=1e-12) if kin else 1.0
    return float(lam * behaviour + (1 - lam) * latency[k, e] / latency.max())


def choose_cut(layers, fixed_bytes, block_bytes, memory, block_seconds, deadline):
    """The cut (p, q) that keeps as many blocks on the client as it can carry.

    memory in bytes, of which part 1 and 3 hold fixed_bytes (embeddings, head) and block_bytes each
    block; block_seconds per step and block of this client, deadline in seconds per step.
    """
    # UNSPECIFIED 6: blocks are shared evenly between part 1 and part 3, part 1 first (it is what
    # hides the words); at least one block stays on the client and one on the edge.
    # Step 7 (v2). More blocks at home hide more and use less of the edge, until the device is full
    # or would hold up the round
    fits = (memory - fixed_bytes) // block_bytes
    mine = int(max(1, min(fits, deadline // block_seconds, layers - 1)))
    return -(-mine // 2), layers - mine // 2  # p = ⌈mine / 2⌉ in front, ⌊mine / 2⌋ at the end


def fedavg(states, weights):
    """The weighted mean of parameter dicts: Σ_k n_k φ_k / Σ_k n_k.

    states: dicts name -> tensor with the same names and shapes; weights: one number >= 0 each, not
    all 0. Fits: any dtype (computed in at least float32; counters are cut to whole numbers).
    """
    # Step 10: φ = Σ_k (n_k / Σ_j n_j) φ_k, of an edge's clients and then of the edges. With n the
    # number of texts below each, the mean of means is the mean over all clients.
    total = sum(weights)
    wide = {n: torch.promote_types(t.dtype, torch.float32) for n, t in states[0].items()}
    return {name: sum(w / total * state[name].to(wide[name])
                      for state, w in zip(states, weights, strict=True)).to(start.dtype)
            for name, start in states[0].items()}


def send_update(start, end, codec, width):
    """What the edge holds of a client's update end - start after `codec` -> dict, bytes.

    All tensors of the update are laid end to end and cut into vectors of `width`, the last one
    filled with zeros. Sketches are linear, so an edge could as well add them up and decode the sum.
    """
    # --sketch adapters: the change of φ is sent, not φ. It is small, so what a lossy codec spoils
    # of it is small too, and where nothing was learned nothing is spoilt.
    flat = torch.cat([(end[n] - start[n]).flatten() for n in start])
    rows = F.pad(flat, (0, -len(flat) % width)).unflatten(0, (-1, width))  # (vectors, width)
    received, size = codec(rows)
    pieces = received.flatten()[:len(flat)].split([t.numel() for t in start.values()])
    return {n: t + d.view_as(t) for (n, t), d in zip(start.items(), pieces, strict=True)}, size


# ================================================================================================
# Train and evaluate
# ================================================================================================


class Federation:
    """The fixed part of a run: the model, the texts, who holds what, and what the network is like.

    Texts are numbered over one pool: training texts first, then test texts.
    channels: dict name -> function that makes the codecs of --channel, as CHANNELS below; held:
    who holds what, of data.text_clients.
    """

    def __init__(self, args, run, texts, model, encode, channels, held):
        self.args, self.device, self.model, self.texts = args, run.device, model, texts
        self.channels = channels
        ids, mask = encode([*texts.train, *texts.test])
        self.ids, self.mask = ids.to(run.device), mask.to(run.device)  # (N, T)
        self.lengths = mask.sum(1)  # (N,), on the CPU: batches are cut to their longest text
        self.labels = torch.tensor(np.concatenate([texts.train_labels, texts.test_labels]))
        self.first_test, self.width = len(texts.train), model.encoder.config.hidden_size
        self.clients, self.domain = held
        self.told, self.poisoned = data.poison_labels(
            self.labels, len(texts.class_names), self.clients, self.domain, args.poison, args.seed)
        self.honest = [k for k in range(args.clients) if k not in self.poisoned]
        self.probe_ids, self.probe_mask = (t.to(run.device) for t in encode(texts.probes))
        # UNSPECIFIED 5: latency, speed, bandwidth and memory are drawn
        self.network = data.draw_network(args.clients, args.edges, args.seed)
        self.cuts = [pick_cut(self, k) for k in range(args.clients)]
        common.seed_torch(args.seed, "init", "head")
        model.head.reset_parameters()
        self.start = adapters(model)  # LoRA was drawn when the model was built

    def batch(self, indices):
        """ids and mask (B, T) of some texts, T the longest of them: padding would cost bytes."""
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
        # A generator for each client and round: the order does not depend on who trained before,
        # nor on which process does, and a resumed run draws the same
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
    # One model serves all clients in turn: only φ differs between them, and φ is small
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(state[name])


def at_the_edge(model, cut):
    """The names in φ that belong to part 2."""
    inside = {id(p) for b in model.stack()[slice(*cut)] for p in b.parameters()}
    return {n for n, p in model.named_parameters() if p.requires_grad and id(p) in inside}


def block_cost(world):
    """Bytes of one block, of embeddings and head, and FLOPs of a block per step of a full batch."""
    model = world.model

    def size(part):
        return sum(p.numel() * p.element_size() for p in part.parameters())
    weights, block = sum(p.numel() for p in model.stack()[0].parameters()), size(model.stack()[0])
    tokens = world.args.batch * float(world.lengths[:world.first_test].double().mean())
    # A multiplication and an addition for each weight and token forwards, as many backwards through
    # the states. The weights are frozen: the third product, for their gradients, is not made.
    return block, size(model) - model.layers * block, 4 * weights * tokens


def pick_cut(world, client):
    """(p, q) of a client: --split P,Q as given, or auto from its memory and speed."""
    args, layers = world.args, world.model.layers
    if args.split == "auto":
        block, fixed, flops = block_cost(world)
        memory = float(world.network["memory"][client]) * (fixed + layers * block)
        speed = float(world.network["flops"][client])
        deadline = layers / 2 * flops / 50e9  # what the median device needs for half the blocks
        return choose_cut(layers, fixed, block, memory, flops / speed, deadline)
    if args.split is None:  # one block in front and one behind, where there are so many
        return min(1, layers - 1), max(layers - 1, 1)
    return read_cut(args.split, layers)


def read_cut(text, layers):
    """--split P,Q -> (p, q)."""
    p, q = map(int, text.split(","))
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
    optimizer = torch.optim.AdamW(params, args.lr)
    # `central` is the ceiling: it knows the true labels of the clients that --poison spoilt
    labels = world.labels if client == len(world.clients) else world.told
    batches = world.batches(client, *purpose)
    while steps and len(batches) < steps:
        batches = batches * 2  # a small client sees its texts again
    batches = batches[:steps]
    for i, here in enumerate(batches):
        if progress is not None:
            # UNSPECIFIED 9: one schedule over the whole run, read at this step's share of it, so
            # that clients with few and with many steps are equally far along in every round
            done = (progress[0] + (i + 1) / len(batches)) / progress[1]
            optimizer.param_groups[0]["lr"] = args.lr * min(done / .06, (1.0001 - done) / .94)
        # Steps 7 to 9: through all three parts and both crossings, and back the same way. φ of
        # parts 1 and 3 is updated by the client, φ of part 2 by the edge, one copy for each client.
        logits = model(*world.batch(here), cut, link)  # (B, C)
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
    # The model lives on both sides of the link when it is used, too, so it is judged by what comes
    # through. 128 texts at a time, which bounds memory.
    load_adapters(world.model, state)
    parts = [world.model(*world.batch(part), cut, link).argmax(-1) for part in indices.split(128)]
    return torch.cat(parts).cpu()


# -- Steps 1 to 6: who behaves alike, whom to trust, who goes where ------------------------------


def warm_up(world, client):
    """Step 1, on one client: a few local steps, then the probes and a look at its own states."""
    # Before any averaging, so that what is compared is what the client's own texts taught. The
    # steps are the same for all: a client with many texts must not look different for that alone.
    args, model, cut = world.args, world.model, world.cuts[client]
    state, _ = train_client(world, world.start, client, None, cut, ("warm-up",),
                            steps=args.warmup_steps)
    with torch.no_grad():
        # All blocks at home: probes are public, and nothing has to cross a link for them
        x, beside = model.part1(world.probe_ids, world.probe_mask, model.layers)  # (Q, T, D)
        cls = model.read(model.last_states(x, beside, model.layers), beside)  # (Q, D)
        logits = model.part3(x, beside, model.layers)  # (Q, C)
        # UNSPECIFIED 7: V from the client's own texts at its cut, after the warm-up: the directions
        # in which the states it will send are largest. The same V serves the second cut.
        ids, mask = world.batch(world.clients[client][0][:128])
        own = model.part1(ids, mask, cut[0])[0][mask.bool()]  # (tokens, D)
    return {"cls": cls, "probabilities": logits.softmax(-1), "adapters": state,
            "basis": principal_directions(own, min(args.ssop_rank, len(own)))}


def set_up(world, run):
    """Steps 1 to 4 and what step 8 needs: distances, trust, rotations; bytes sent for it, once.

    warm: the mean of the adapters after the warm-up, which the paper does not use; what crosses a
    cut before training can be seen with it (beyond/elsa_channels.py).
    """
    args, n = world.args, len(world.clients)
    found = run.gather({k: warm_up(world, k) for k in run.share(range(n))})
    found = [common.to_device(found[k], "cpu") for k in range(n)]
    # Steps 2 and 3. All clients answered the same Q probes, so their fingerprints differ by what
    # they have learned, not by what they were asked. One subspace for all, or their Gaussians would
    # live in different ones; centred, because a mean that all share tells nobody apart.
    sent = torch.stack([f["cls"] for f in found])  # (N, Q, D)
    cls = sent.to(found[0]["probabilities"].dtype)  # where states are bfloat16, too
    pooled = cls.flatten(0, 1)  # (N Q, D)
    basis = principal_directions(pooled - pooled.mean(0), args.fingerprint_rank)  # (D, k)
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
    warm = fedavg([common.to_device(f["adapters"], world.device) for f in found],
                  [len(train) for train, _ in world.clients])
    # In mode link the edge must learn W: V and Q are sent, once. In mode edge nobody may.
    # Probes are answered for ELSA alone: the other methods group nobody by them.
    q, rotations = len(world.probe_ids), sum(f["basis"].numel() for f in found)
    rotations += sum(turn.numel() for turn in turns)
    asked, split = runs(args, "elsa"), runs(args, *SPLIT)
    once = {"probe states up": sent.numel() * sent.element_size() * asked,
            "probe predictions up": 4 * n * q * len(world.texts.class_names) * asked,
            "rotations up": 4 * rotations * (split and args.ssop == "link")}
    return {"distance": distance, "trust": trust, "bases": [f["basis"] for f in found],
            "turns": turns, "warm": common.to_device(warm, "cpu"), "once": once}


def place_clients(world, method, setup):
    """Which clients each edge serves: dict edge -> clients. Who is left out gets the cloud model.

    Also the cluster of each client (None if left out) and whether the trust filter had to yield.
    """
    args, n = world.args, len(world.clients)
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
        # What clusters are compared with: as many clients at every edge, dealt at random
        order = common.numpy_generator(args.seed, "random edges").permutation(keep).tolist()
        groups = [sorted(order[e::args.edges]) for e in range(args.edges)]
        labels = {k: e for e, g in enumerate(groups) for k in g}
    else:  # Steps 5 and 6, among the trusted
        distance = setup["distance"][keep][:, keep]
        labels = dict(zip(keep, cluster_clients(distance, args.edges), strict=True))
        edge = assign_edges(list(labels.values()), distance, world.network["latency"][keep],
                            args.capacity, args.tau_max, args.edge_lambda)
        groups = [[k for k, e in zip(keep, edge, strict=True) if e == which]
                  for which in range(args.edges)]
    # An edge to which nobody came takes no part.
    groups = {e: g for e, g in enumerate(groups) if g}
    return groups, [labels.get(k) for k in range(n)], yielded


# -- Steps 7 to 10: training through the links ---------------------------------------------------


def no_codecs(world, setup, cut):
    """--channel none: whatever crosses is sent as it is."""
    return {}


def sketch_codecs(world, setup, cut):
    """--channel sketch -> dict exchange (and "adapters") -> codec: one sketch for all of them."""
    # UNSPECIFIED 8: both sides of a link, and all links, draw the hashes from the run's seed. So
    # they need not be sent, and an edge may add up sketches of different clients.
    args = world.args
    sketch = CountSketch(world.width, args.ratio, args.sketch_rows, args.recovery,
                         common.torch_generator(args.seed, "sketch"))
    return dict.fromkeys([*EXCHANGES, "adapters"], sketch.to(world.device))


CHANNELS = {"none": no_codecs, "sketch": sketch_codecs}


def make_codecs(world, setup, cut):
    """--channel and --sketch -> dict exchange -> codec for states and gradients, and the codec of
    adapter updates or None."""
    # Step 9: the sketch may stand on the link, where the bytes are, or on the update that an edge
    # receives once a round, where being linear lets it add up sketches
    codecs = world.channels[world.args.channel](world, setup, cut)
    updates = codecs.pop("adapters", None)
    return (codecs if world.args.sketch in ("activations", "both") else {},
            updates if world.args.sketch in ("adapters", "both") else None)


def make_link(world, setup, client, codecs):
    """The link of one client under --ssop."""
    if world.args.ssop == "none":
        return Link(codecs)
    # Step 8: W_n from the client's own V and Q_n. Nobody else's W undoes it.
    rotation = SubspaceRotation(setup["bases"][client].to(world.device),
                                setup["turns"][client].to(world.device))
    return Link(codecs, rotation, world.args.ssop)


def open_links(world, method, groups, setup):
    """Link and cut of every client that trains, and the codec of adapter updates.

    Methods without a split have no links: their clients hold the whole model and send adapters.
    """
    # A link is opened once for the whole run: the same W, the same hashes in every round. Codecs
    # depend on the cut alone, so clients of one cut share them.
    members = [k for g in groups for k in g]
    cuts = {k: world.cuts[k % len(world.clients)] for k in members}  # N is the pool: any cut
    if method not in SPLIT:
        return dict.fromkeys(members), cuts, None
    codecs = {cut: make_codecs(world, setup, cut) for cut in set(cuts.values())}
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
    # φ goes down at the start of the round and up at its end: all of it where the client holds the
    # whole model, and that of parts 1 and 3 where the edge holds part 2. The way up may be
    # compressed by --sketch. The way down is not: what is lost there would be lost to all clients
    # of the edge.
    inside = at_the_edge(world.model, cut) if link is not None else ()
    mine = {n: t for n, t in start.items() if n not in inside}
    down = up = 4 * sum(t.numel() for t in mine.values())  # bytes
    if update_codec is not None:
        received, up = send_update(mine, end, update_codec, world.width)
        end = {**end, **received}
    return {"adapters": end, "loss": loss,
            "sent": {**(link.sent if link else {}), "adapters up": up, "adapters down": down}}


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
    # At first all edges hold the same φ. The warm-up's is thrown away: it was trained for a look at
    # the clients, without the link through which the model is to work.
    state["edges"] = state["edges"] or [world.start for _ in groups]
    rounds = range(state["round"], args.rounds)
    for round_ in run.progress(rounds, method, initial=rounds.start, total=args.rounds):
        # Steps 7 to 9: every client trains from its edge's adapters, through its link. Its labels
        # are used in its own part 3, and of its texts only states cross. Processes share the
        # clients; gathered in client order, sums do not depend on how many processes there are.
        trained = {k: client_round(world, state["edges"][home[k]], k, links[k], cuts[k],
                                   update_codec, round_) for k in run.share(list(home))}
        trained = {k: {**t, "adapters": common.to_device(t["adapters"], world.device)}
                   for k, t in sorted(run.gather(trained).items())}
        # Step 10, at the edges: each averages its own clients, by their numbers of texts. Clients
        # of one edge behave alike, so their mean contradicts none of them. FedAvg's would: it is
        # the same line with everybody in one group.
        state["edges"] = [fedavg([trained[k]["adapters"] for k in g], n)
                          for g, n in zip(groups, samples, strict=True)]
        # Step 10, in the cloud: the mean of the edges, by the texts below each. It is computed
        # every round, to be evaluated, and sent to the edges in a cloud round only.
        state["cloud"] = fedavg(state["edges"], [sum(n) for n in samples])
        found = evaluate(world, run, groups, state, links, cuts)
        if method == "local":  # as many models as clients, and nobody averages them
            found |= {"cloud": None, "edges": []}
        cloud_round = (round_ + 1) % args.cloud_every == 0 and method not in ALONE
        if cloud_round:
            # UNSPECIFIED 9: an edge goes on from a mix of its own model and the cloud's,
            #     φ_e <- (1 - mix) φ_e + mix φ_cloud;
            # 1 is hierarchical FedAvg, 0 lets the cloud average but not interfere.
            mix = args.cloud_mix
            state["edges"] = [fedavg([edge, state["cloud"]], [1 - mix, mix])
                              for edge in state["edges"]]
        sent = count_bytes(method, trained, len(groups), cloud_round)
        state["bytes"] = {n: state["bytes"].get(n, 0.0) + size for n, size in sent.items()}
        state["round"] = round_ + 1
        row = {"round": state["round"], **found, "megabytes": sum(sent.values()) / 1e6}
        state["history"].append(row)
        run.log(method=method, round=row["round"], served=row["served"], cloud=row["cloud"],
                loss=sum(t["loss"] for t in trained.values()) / len(trained), MB=row["megabytes"])
        save(state)
    return state["history"]


def count_bytes(method, trained, edges, cloud_round):
    """Bytes of one round by kind, over all clients; trained: client -> what client_round gave."""
    sent = dict.fromkeys([*EXCHANGES, "adapters up", "adapters down", "edge-cloud"], 0.0)
    if method in ALONE:
        return sent  # all texts lie in one place already, or every client keeps to itself
    for t in trained.values():
        for name, size in t["sent"].items():
            sent[name] += size
    if cloud_round and edges > 1:  # φ, part 2's too, once up and once down for every edge
        phi = next(iter(trained.values()))["adapters"]
        sent["edge-cloud"] = 4.0 * sum(t.numel() for t in phi.values()) * 2 * edges
    return sent


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
        # Who takes no part has no link, and is asked as if its model were at home
        link, cut = links.get(k), cuts.get(k, world.cuts[k])
        # A distrusted but honest client (e is None) still gets the cloud's model
        cloud = served = predict(world, state["cloud"], test, cut, link) == truth
        if n_edges > 1 and e is not None:  # with one edge, its model is the cloud's
            served = predict(world, state["edges"][e], test, cut, link) == truth
        hits[k] = {"edge": e, "served": served.sum().item(), "cloud": cloud.sum().item(),
                   "count": len(test)}
    hits = [h for _, h in sorted(run.gather(hits).items())]

    def percent(key, rows):  # None: an edge without honest clients
        return 100 * sum(h[key] for h in rows) / sum(h["count"] for h in rows) if rows else None

    return {"served": percent("served", hits), "cloud": percent("cloud", hits),
            "edges": [percent("served", [h for h in hits if h["edge"] == e])
                      for e in range(n_edges)]}


# ================================================================================================
# Command line
# ================================================================================================


def build_parser(doc=__doc__, channels=CHANNELS, flags=()):
    """All flags, in the groups run, data, model, method; flags: functions that add more."""
    parser = common.Parser(doc)
    common.add_run_arguments(parser)
    add = parser.group("data")
    add("--dataset", str, "topics", f"{', '.join(data.TEXT_SETS)} or csv:PATH, a table of labels "
        "and texts: .csv, .tsv, .jsonl (default topics, the small world; topics-same: the same "
        "without contradiction)")
    add("--label-column", str, None, "of a csv, a header's name or a number from 1 (default: a "
        "usual name such as label or class; of two columns without header the first)")
    add("--text-column", str, None, "of a csv, likewise (default: a usual name such as text or "
        "review; the second)")
    add("--test-file", common.user_path, None, "a table like that of csv:PATH (default: a drawn "
        "fifth of each class)")
    add("--encoding", str, None, "of csv:PATH, --test-file and --probes, e.g. latin-1, cp1252 "
        "(default: their byte order mark's, else utf-8)")
    add("--clients", int, None, "N (default 12, or fewer that fit a small csv)", low=1)
    add("--alpha", float, None, "Dirichlet concentration of labels over clients, smaller = more "
        "skewed (default .5; small world 3)", above=0)
    add("--poison", str, None, "unreliable clients, e.g. label-flip:2,random:1 (default none; "
        "small world that)")
    add("--probes", common.user_path, None, "public probe texts, one a line (default: the set's "
        "own, or --num-probes training texts set apart)")
    add("--num-probes", int, 96, "Q, of texts set apart", low=4)
    add = parser.group("model")
    add("--model", str, None, "a BERT-type encoder, a DistilBERT, a decoder like Llama (Qwen2, "
        "Qwen3, Mistral) or a GPT-2, directory or hub id (default bert-base-uncased; for topics "
        "tiny, or tiny-decoder)")
    add("--dtype", ["float32", "bfloat16"], "float32", "of the frozen weights, and so of the "
        "states that cross; LoRA and head stay in float32")
    add("--max-length", int, 64, "tokens of a text at most", low=4)
    add("--rank", int, 8, "LoRA rank on query and value (GPT-2: and key, they are one matrix)",
        low=1)
    add("--lora-alpha", float, 16.0, "LoRA scale α/r", above=0)
    add("--dropout", float, None, "in the encoder and before the head (default .1; small world 0); "
        "with --model tiny before the head alone",
        low=0, high=.9)
    add("--split", str, None, "P,Q: part 2 is blocks P..Q-1 (default 1,L-1), or auto: per client, "
        "from memory and speed (UNSPECIFIED 6)")
    add_method_flags(parser.group("method"), channels)
    for more in flags:
        more(parser)
    return parser


def add_method_flags(add, channels):
    """The flags of the method: training, grouping (steps 1 to 6), link (steps 8 and 9)."""
    add("--method", str, None, f"comma-separated list of {', '.join(METHODS)}, or all (default "
        "elsa; small world fedavg,elsa)")
    add("--rounds", int, None, "edge rounds (default 10; small world 4)", low=1)
    add("--local-epochs", int, 1, "a round's epochs", low=1)
    add("--batch", int, None, "texts a step (default 32; small world 16)", low=1)
    add("--lr", float, None, "AdamW (default 1e-3; small world 3e-3)", above=0)
    add("--edges", int, 3, "E", low=1)
    add("--cloud-every", int, 2, "edge rounds between cloud rounds", low=1)
    add("--cloud-mix", float, None, "what an edge takes from the cloud model, UNSPECIFIED 9 "
        "(default 1; small world 0)", low=0, high=1)
    add("--warmup-steps", int, None, "local steps before the fingerprint (default 30; small world "
        "26); after 10 a client of few classes still predicts one class on every probe", low=1)
    add("--fingerprint-rank", int, 12, "directions the fingerprint keeps, UNSPECIFIED 1", low=1)
    add("--neighbours", int, 3, "of the trust consensus, UNSPECIFIED 2", low=1)
    add("--trust-factor", float, .6, "trusted: at least this times the median trust", low=0)
    add("--no-trust", bool, False, "ablation: keep every client")
    add("--no-cluster", bool, False, "ablation: random edges")
    add("--capacity", int, None, "clients an edge takes (default: no limit)", low=1)
    add("--tau-max", float, 1e9, "ms of latency at most (default: no limit)", above=0)
    add("--edge-lambda", float, .5, "behaviour against latency for a client that must move, "
        "UNSPECIFIED 4", low=0, high=1)
    add("--ssop", ["none", "link", "edge"], "link", "who knows W: link = client and edge, "
        "lossless; edge = the client alone, lossy (default %(default)s; UNSPECIFIED 7)")
    add("--ssop-rank", int, None, "r (default 32; small world 16)", low=1)
    add("--channel", list(channels), None, "how states cross; sketch is the paper's (default "
        "sketch; in the small world of beyond/elsa_*.py quant)")
    add("--sketch", ["activations", "adapters", "both", "none"], "activations", "what goes through "
        "the channel; activations means states and their gradients")
    add("--ratio", float, .5, "ρ: numbers sent over numbers", above=0, high=1)
    add("--sketch-rows", int, 3, "rows k of the sketch", low=1)
    add("--recovery", ["median", "mean", "lsq"], "median", "of the sketch (default: the paper's, "
        "median)")


def resolve(args, small=SMALL, settle=None):
    """Fill in the defaults that depend on the data set; refuse what does not go together."""
    topics = args.dataset in ("topics", "topics-same")
    if args.model in ("tiny", "tiny-decoder") and not topics:
        raise common.UserError(f"--model {args.model} is pre-trained on the topics world and needs "
                               "--dataset topics; name a directory or a hub id with --model")
    common.fill_in(args, small if topics else REAL)
    args.method = ",".join(common.choose(args.method, METHODS))
    parts = (args.split or "0,0").split(",")
    if args.split != "auto" and not (len(parts) == 2 and all(p.isdigit() for p in parts)):
        raise common.UserError(f"--split {args.split!r}: expected P,Q or auto")
    data.text_set_name(args.dataset)
    for flag in ("label_column", "text_column", "test_file", "encoding"):
        if getattr(args, flag) is not None and not args.dataset.startswith("csv:") and not (
                flag == "encoding" and args.probes):
            raise common.UserError(f"--{flag.replace('_', '-')} is of csv:PATH; --dataset "
                                   f"{args.dataset} has its own")
    if settle:
        settle(args)
    data.parse_poison(args.poison, args.clients or math.inf)
    return args


def runs(args, *methods):
    """Whether --method names one of these."""
    return any(m in methods for m in args.method.split(","))


def idle_flags(args):
    """Which flags change nothing in this run, for common.tell_idle."""
    sketch = {"ratio", "sketch_rows", "recovery"}
    grouping = {"no_trust", "no_cluster", "trust_factor", "capacity", "tau_max", "edge_lambda",
                "neighbours", "fingerprint_rank"}
    return [
        (not runs(args, *SPLIT), {"split", "ssop", "ssop_rank", "channel", "sketch"} | sketch,
         f"--method {args.method} sends no states"),
        (args.channel == "none", {"sketch"} | sketch, "--channel none sends all as it is"),
        (args.sketch == "none", {"channel"} | sketch, "--sketch none sends all as it is"),
        (args.channel not in ("none", "sketch"), {"sketch_rows", "recovery"},
         f"--channel {args.channel} is no sketch"),
        (args.channel == "quant", {"ratio"}, "--channel quant sends every number"),
        (args.ssop == "none", {"ssop_rank"}, "--ssop none rotates nothing"),
        (not runs(args, "elsa"), grouping, f"--method {args.method} groups nobody by behaviour"),
        (args.no_trust, {"neighbours", "trust_factor"}, "--no-trust keeps every client"),
        (args.no_cluster, {"capacity", "tau_max", "edge_lambda"}, "--no-cluster deals clients out"),
        (args.capacity is None and args.tau_max >= 1e9, {"edge_lambda"},
         "nobody has to move without --capacity or --tau-max"),
        (not runs(args, "elsa", "hier-random"), {"edges", "cloud_every", "cloud_mix"},
         f"--method {args.method} has one server at most"),
        (args.cloud_every > args.rounds, {"cloud_every", "cloud_mix"},
         f"the cloud's first turn would be round {args.cloud_every}, there are {args.rounds}"),
        (not runs(args, "fedavg", *SPLIT), {"poison"},
         f"--method {args.method} has no averages to spoil, and only honest clients are rated"),
        (args.model == "tiny", {"max_length"}, "--model tiny reads sentences whole"),
        (args.probes is not None, {"num_probes"}, "--probes names the probes"),
        (args.dataset.startswith("topics"), {"num_probes"}, "topics has probes of its own")]


def build_federation(args, run, channels=CHANNELS):
    """Texts, clients, encoder with LoRA and head -> Federation."""
    with run.rank_zero_first():
        texts = data.load_texts(args.dataset, args.data_dir, args.seed, args.probes,
                                args.num_probes, args.encoding, label_column=args.label_column,
                                text_column=args.text_column, test_file=args.test_file)
    held = data.text_clients(texts, args.clients, args.alpha, args.seed)
    run.source("texts", f"{texts.said}; {describe_clients(texts, held[0], args.clients)}",
               [texts.class_names, texts.train, texts.train_labels, texts.test, texts.test_labels,
                texts.probes, held])
    args.clients = len(held[0])
    with run.rank_zero_first():
        encoder, encode = data.load_encoder(args.model, args.max_length, args.dropout,
                                            args.data_dir, args.seed, run.progress,
                                            getattr(torch, args.dtype), texts.train)
    check_channel(args, encoder.config.hidden_size, run.warn)
    model = SplitEncoder(encoder, len(texts.class_names), args.dropout)
    common.seed_torch(args.seed, "init", "lora")
    put_lora(model, args.rank, args.lora_alpha)
    world = Federation(args, run, texts, model.to(run.device).eval(), encode, channels, held)
    run.source("encoder", encode.said(), [encoder, world.ids, world.probe_ids])
    return world


def check_channel(args, width, warn):
    """What SS-OP and the sketch want of states of this width; UserError if they have it not."""
    split = runs(args, *SPLIT)
    if split and args.ssop != "none" and args.ssop_rank > width:
        if args.ssop_rank != REAL["ssop_rank"]:
            raise common.UserError(f"--ssop-rank {args.ssop_rank}: the states have {width} "
                                   "dimensions")
        warn(f"--ssop-rank is {width} here: the states have no more dimensions")
        args.ssop_rank = width
    if split and args.channel == "sketch" and args.sketch != "none" and \
            int(args.ratio * width / args.sketch_rows) < 1:
        raise common.UserError(f"--ratio {args.ratio} with --sketch-rows {args.sketch_rows} leaves "
                               f"no bucket for {width} dimensions; raise it or take fewer rows")


def put_lora(model, rank, alpha):
    """LoRA on query and value of every block of a SplitEncoder; all else but the head is frozen."""
    import peft

    targets = model.layout["lora"]
    peft.inject_adapter_in_model(peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets),
        fan_in_fan_out="c_attn" in targets), model.encoder)  # GPT-2's weights lie transposed
    # LoRA and a new head: all that is trained, so all that is averaged. In float32 at least: a step
    # of AdamW is smaller than bfloat16's spacing
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith("head."))
        if p.requires_grad:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))


def describe_clients(texts, clients, wanted):
    """Who got how much, as text; wanted: --clients, None if the number was left to us."""
    sizes = [len(train) for train, _ in clients]
    one = sum(len(set(texts.train_labels[train.numpy()])) == 1 for train, _ in clients)
    return (f"{len(clients)} clients of {min(sizes)} to {max(sizes)} training texts"
            + " (12 were too many for so few texts)" * (wanted is None and len(clients) < 12)
            + f", {one} of them with one class only" * bool(one))


def check_placement(world, run, setup):
    """What the grouping could not do as the flags wish; UserError where the edges are too few."""
    args, n = world.args, len(world.clients)
    short = [k for k in range(n) if setup["bases"][k].shape[1] < args.ssop_rank]
    if short and args.ssop != "none" and runs(args, *SPLIT):
        run.warn(f"--ssop-rank {args.ssop_rank}: the texts of {len(short)} clients have fewer "
                 f"tokens, client {short[0]}'s turn {setup['bases'][short[0]].shape[1]} directions")
    if not runs(args, "elsa"):
        return
    most = min(world.width, n * len(world.probe_ids))
    if args.fingerprint_rank > most:
        run.warn(f"--fingerprint-rank {args.fingerprint_rank}: the states span {most} directions, "
                 "all of which are kept")
    if args.neighbours > max(n - 1, 3):
        run.warn(f"--neighbours {args.neighbours}: a client has {n - 1} others, who are all asked")
    groups, labels, _ = place_clients(world, "elsa", setup)
    placed = n - labels.count(None)
    if len(groups) < args.edges:
        run.warn(f"{args.edges - len(groups)} of {args.edges} edges take no part in ELSA: its "
                 f"{placed} trusted clients form {len(set(labels) - {None})} clusters")
    if args.no_cluster:
        return
    if args.capacity is not None and args.capacity * args.edges < placed:
        raise common.UserError(f"--capacity {args.capacity}: {args.edges} edges take "
                               f"{args.capacity * args.edges} clients, but {placed} are to be "
                               "placed; raise it, or --edges")
    latency = world.network["latency"]
    far = [k for e, g in groups.items() for k in g if latency[k, e] > args.tau_max]
    if far:
        nearest = latency[far].min(1).values
        run.warn(f"--tau-max {args.tau_max:g}: {len(far)} of {placed} clients stay at an edge "
                 f"farther than that; their nearest edges are {nearest.min():.1f} to "
                 f"{nearest.max():.1f} ms away")
    full = {e: len(g) for e, g in groups.items() if args.capacity and len(g) > args.capacity}
    if full:
        run.warn(f"--capacity {args.capacity}: {len(full)} edges hold up to {max(full.values())} "
                 "clients, whom --tau-max lets go nowhere else")


def fresh_state(method):
    """Where a method starts."""
    return {"method": method, "round": 0, "edges": None, "cloud": None, "history": [], "bytes": {}}


def main(argv=None, doc=__doc__, title="elsa", small=SMALL, channels=CHANNELS, flags=(),
         settle=None, reports=()):
    """The command: every method of --method in turn, each resumable, then the report.

    The scripts in beyond/ call it with more. doc, title: their help and default folder; small:
    defaults in the small world; channels: name -> function(world, setup, cut) as sketch_codecs;
    flags: functions(parser) that add flags; settle: function(args) that fills in or refuses;
    reports: functions(world, run, state, result) that print and put more into `result`; what they
    return, if anything, is a function(world, result, path of figure.png) that draws one more.
    """
    parser = build_parser(doc, channels, flags)
    args = parser.parse_args(argv)
    given, args = common.given(parser, args), resolve(args, small, settle)
    with common.Run(args, f"{title}-{data.short_name(args.dataset)}") as run:
        state = run.load() or {"done": {}, "trained": {}, "current": None, "setup": None}
        run.begin()
        common.tell_idle(run, given, *idle_flags(args))
        keep_sources(run, [main, *channels.values(), *reports])
        world = build_federation(args, run, channels)
        if state["setup"] is None:
            state["setup"] = set_up(world, run)
            run.save(state, "the grouping")
        check_placement(world, run, state["setup"])
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
        report(world, run, state, title, reports)


def keep_sources(run, functions):
    """A copy of every script that had a part in the run, beside its results."""
    for path in sorted({Path(f.__code__.co_filename) for f in functions}):
        if run.rank == 0:
            common.atomic_write(run.out_dir / path.name, lambda p, s=path: shutil.copyfile(s, p))


def report(world, run, state, title, reports):
    """Tables, figure, result.json and the RESULT line."""
    args, setup, results = world.args, state["setup"], state["done"]
    last = {m: r["history"][-1] for m, r in results.items()}
    run.table(["method", "served %", "cloud %", "MB a round"],
              [[LABELS[m], h["served"], h["cloud"], h["megabytes"]] for m, h in last.items()])
    shown = "elsa" if "elsa" in results else list(results)[-1]
    groups, labels, yielded = place_clients(world, shown, setup)
    for header, sent, times in (
            ([f"\nlinks of {LABELS[shown]}", "MB a round"], results[shown]["bytes"], args.rounds),
            (["once, before the first round", "MB"], setup["once"], 1)):
        if any(sent.values()):
            run.table(header, [[name, size / times / 1e6] for name, size in sent.items() if size])
    if last[shown]["edges"]:
        run.table(["\nserved %, by edge", *(f"edge {e}" for e in groups)],
                  [[f"of {LABELS[shown]}", *last[shown]["edges"]]])
    result = {"dataset": args.dataset, "seed": args.seed, "results": results, "groups": groups,
              "trust": setup["trust"].tolist(), "distance": setup["distance"].tolist(),
              "poisoned": {str(k): v for k, v in world.poisoned.items()}, "cuts": world.cuts,
              "clusters": labels, "domains": world.domain, "once": setup["once"]}
    if yielded and run.rank == 0:
        print("no client reached the trust floor: the filter was left out and all take part")
    figures = [draw_figure, *filter(None, [more(world, run, state, result) for more in reports])]
    if run.rank == 0:
        print()
    run.finish(result, lambda path: [draw(world, result, path) for draw in figures],
               script=title, dataset=args.dataset, method=shown, seed=args.seed,
               served=last[shown]["served"], cloud=last[shown]["cloud"],
               mb_round=last[shown]["megabytes"], distrusted=labels.count(None), out=run.out_dir)


def draw_figure(world, result, path):
    """What clients are served by round; whom ELSA trusts and groups; what crosses the network."""
    args, results, n = world.args, result["results"], len(result["trust"])
    sent = {m: r for m, r in results.items() if any(r["bytes"].values())}
    grouped = "elsa" in results and n > 1
    widths = [1.3, *[.5, 1] * grouped, *[.8] * bool(sent)]
    title = (f"ELSA on {data.short_name(result['dataset'])}: {n} client{'s' * (n > 1)}, "
             + f"channel {args.channel}, " * runs(args, *SPLIT) + f"seed {args.seed}")
    size = 4.4 * sum(widths), min(max(4.4, 1.4 + .11 * n), 30)
    with common.figure(path, title, size, ncols=len(widths), width_ratios=widths,
                       squeeze=False) as (_, (axes,)):
        draw_accuracy(axes[0], results)
        axes[0].set_title("Accuracy on" + " honest" * bool(world.poisoned) + " clients' own tests")
        if grouped:
            draw_grouping(*axes[1:3], world, result)
        if sent:
            draw_bytes(axes[-1], sent)


def draw_accuracy(axis, results):
    """Accuracy by round: a line a method, and ELSA's cloud and single edges."""
    colours = [common.GREY, common.AMBER, common.ORANGE, common.PINK, common.GREEN, common.BLUE]
    for m, colour, marker in zip(METHODS, colours, "XvsD^o", strict=True):
        if m not in results:
            continue
        history = results[m]["history"]
        rounds = [h["round"] for h in history]
        look = {"color": colour, "marker": marker, "ms": 5}
        axis.plot(rounds, [h["served"] for h in history], lw=2, **look,
                  label=LABELS[m] + (": edges" if m == "elsa" else ""))
        if m == "elsa":
            axis.plot(rounds, [h["cloud"] for h in history], ls="--", mfc="white", **look,
                      label="ELSA: cloud")
            axis.plot(rounds, np.array([h["edges"] for h in history], dtype=float), color=colour,
                      lw=.6, alpha=.5)
    common.whole_ticks(axis.xaxis)
    axis.set(xlabel="edge round", ylim=(0, 101),
             ylabel="accuracy (%)" + "; thin: each edge" * ("elsa" in results))
    common.label_ends(axis)


def draw_grouping(left, right, world, result):
    """Every client's trust, and the distances between clients, in the order of their edges."""
    trust, args, n = result["trust"], world.args, len(result["trust"])
    blocks = {f"edge {e}": g for e, g in result["groups"].items()}
    blocks["distrusted"] = sorted(set(range(n)) - {k for g in blocks.values() for k in g})
    blocks = {name: g for name, g in blocks.items() if g}
    order = [k for g in blocks.values() for k in g]
    left.barh(range(n), [trust[k] for k in order], color=[
        common.AMBER if k in blocks.get("distrusted", ()) else common.BLUE for k in order])
    names = [f"{k}, {world.poisoned[k]}" if k in world.poisoned else k for k in order]
    left.set_yticks(range(n), names, fontsize=7)
    left.set(ylim=(n - .5, -.5), title="Whom ELSA trusts", xlabel="trust",
             ylabel="client" + ", how poisoned" * bool(world.poisoned))
    if not args.no_trust:
        floor = args.trust_factor * torch.tensor(trust).median()
        left.axvline(floor.item(), color="black", ls="--", lw=1)
        left.set_xlabel("trust (dashed: the floor)")
    distance = np.maximum(result["distance"], 1e-2)[order][:, order]
    np.fill_diagonal(distance, np.nan)
    image = common.heat_map(right, distance, "How differently they behave", aspect="auto",
                            norm="log")
    ends = np.cumsum([len(g) for g in blocks.values()])
    right.set(xticks=[], xlabel="the same clients")
    right.yaxis.tick_right()
    right.set_yticks([e - (len(g) + 1) / 2 for e, g in zip(ends, blocks.values(), strict=True)],
                     list(blocks))
    right.tick_params(length=0)
    for end in ends[:-1]:
        left.axhline(end - .5, color="black", lw=.6)
        right.axhline(end - .5, color="white", lw=1.5)
        right.axvline(end - .5, color="white", lw=1.5)
    right.figure.colorbar(image, ax=right, label="symmetric KL (nats)")


def draw_bytes(axis, results):
    """Megabytes of a round by kind, a bar a method."""
    names, left = [LABELS[m] for m in results], np.zeros(len(results))
    for kind, start, colour, hatch in (
            ("states", "activations", common.BLUE, ""), ("gradients", "grad", common.SKY, "///"),
            ("adapters", "adapters", common.AMBER, "..."), ("edge-cloud", "edge", "black", "")):
        size = np.array([sum(b for name, b in r["bytes"].items() if name.startswith(start))
                         / 1e6 / len(r["history"]) for r in results.values()])
        if size.any():
            bars = axis.barh(names, size, .5, left, color=colour, hatch=hatch, label=kind)
            left = left + size
    axis.bar_label(bars, [f"{x:.3g}" for x in left], padding=3)
    common.lie_down(axis, len(names), "MB a round, all clients", 1.25 * left.max())
    axis.set_title("What crosses the network")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(.5, -.15), ncols=2,
                fontsize=8)


if __name__ == "__main__":
    common.run_cli(main)
