"""PRO-VPT: prompts that move to where they are needed, and what the score really measures

Shang et al., "PRO-VPT: Distribution-Adaptive Visual Prompt Tuning via Prompt Relocation" (first
title: "Iterative Prompt Relocation for Distribution-Adaptive Visual Prompt Tuning"), ICCV 2025,
arXiv 2503.06901. Authors' code: github.com/ckshang/PRO-VPT, on top of KMnP/vpt.

The idea
    VPT-deep puts the same number of learnable tokens before every block of a frozen ViT. How many a
    block needs depends on the task and changes as the prompts learn, so PRO-VPT optimises their
    distribution too: in every epoch it finds the idlest prompt, takes it out of its block, lets a
    small policy choose the block it goes to, tunes, and rewards the policy by what came of it.

Run
    python pro_vpt.py                                      the small world: 2 minutes, no download
    python pro_vpt.py --dataset vtab-cifar --search        one task by the paper's protocol
    python pro_vpt.py --suite vtab --method vpt-deep,pro-vpt      all 19, with the group means
    python pro_vpt.py --dataset folder:PATH --model DIR --norm imagenet   your own pictures and ViT

Paper map (our numbers, in the order of the paper's method section)
    Eq. E1  nested objective   D* = argmin_D L(P*, D): relocation
                               P* = argmin_P L(P, D*): train_epoch
    Eq. E2  idleness           idleness_scores, in score_pass
    Eq. E3  policy             allocator_state, PPOAllocator (or ThompsonAllocator)
    Eq. E4  reward             relocation
    Eq. E5  relocation         relocate
    The algorithm box          train: one epoch is relocation (outer), then train_epoch (inner)

Symbols
    P        prompts                     (N, D)      all prompts, rows of one tensor
    D        block, counts               (N,), L     block of every prompt; prompts per block
    I_k      idleness_scores             (N,)        fall of the loss without prompt k
    s        allocator_state             (3L,)
    r        the argument of learn       number
    B, T, D, L, C   batch, patches, width, blocks, classes;  N = --prompts 20 x L

What was found by measuring (tests/test_pro_vpt.py and benchmarks/RESULTS.md hold the numbers)
    1  The score is an artefact of LayerNorm's ε. In a pre-LN ViT a prompt acts only through LN(p).
       Scaling p does not change LN(p), so g·p = 0 by Euler's theorem, but for ε: I_k carries the
       factor ε / (var(p) + ε). With ε = 1e-6 (timm's, the authors') it is tiny but reproducible;
       with 1e-12 (the default of transformers' ViTConfig) it is rounding noise, and float32 and
       float64 prune different prompts. Hence --eps 1e-6, and never score in half precision. ε also
       decides whether x 10⁻³ shrinks a prompt: its std after LN is .036 at 1e-6 and 1 at 1e-12.
       (This holds where the class token is read. The authors read MAE by the mean of the patches
       and of the last block's prompts, which reach the loss directly; MAE is refused here.)
    2  A prompt that was just moved has nearly all of the squared gradient at the next step (95 ± 2%
       in the small world), so that the joint clip all but stops everything else; at the third step
       it has 18 ± 7%, from the fifth on 4% or less. At the next scoring pass its |I| is 1.7 ± .3
       times the median, and it moves again at once in 12 ± 5% of cases (of 24 prompts; chance has
       4%). benchmarks/pro_vpt_moved.py, 5 seeds.
    3  PPO normalises two returns, and two normalised numbers are ±.7071: it sees the sign of the
       first reward only. How large a reward is never matters.
    4  The authors' reward subtracts the next candidate's idleness, not the moved prompt's; their
       scores are clipped by a norm that the head dominates; "freezing" for the scoring pass sets
       flags that nothing reads (dropout stays on); their C = Σ batch mean / batch size is not the
       mean loss; a moved prompt keeps its momentum. --recipe official does all of it. (Under torch
       < 2 weight decay also shrank the gates that measure I; that is not reproduced.)

Cost
    A scoring pass and a training pass per epoch, 3 forward passes' worth each. Left out because the
    result cannot change: what a block makes of the prompts (a prompt is a key and a value), all but
    the class token in the last block, embedding fixed pictures again, scoring before the warm-up,
    test evaluations that nobody asked for. --scores running (not the paper's) sums the scores up
    while training and halves the epoch. benchmarks/pro_vpt_epoch.py measures all three.

Results
    Whether relocation beats uniform prompts is being measured anew: earlier numbers, of the small
    world, had nn.Linear's draw of the head, and the authors' draw changes them. VTAB-1k (paper:
    PRO-VPT 78.0, VPT-deep 76.4): not run, no weights on our machine. An epoch at ViT-B/16 size
    takes 1/1.8 of the authors' arrangement's time, with --scores running half of that.

Where we depart (the marks can be searched for)
    DEVIATION 1   the reward uses the mean loss (--recipe official: the authors' C, finding 4).
    DEVIATION 2   the scores' gradients are not clipped (official: they are).
    DEVIATION 3   no dropout while scoring (official: .1).
    DEVIATION 4   every LayerNorm gets --eps, whatever the checkpoint's configuration says.
    DEVIATION 5   --method adaptive is ours, as are greedy, exact, post-ln, norm, running,
                  --relocate-every and --reset-momentum. All are off by default.
    UNSPECIFIED 1 E4's idleness correction: that of the prompt that moved.
    UNSPECIFIED 2 PPO's advantage subtracts the critic's value of when the action was chosen.
    UNSPECIFIED 3 random relocation moves a random prompt; pruning only keeps the last prompt.
    UNSPECIFIED 4 VPT-shallow gets as many prompts as the others have in all blocks together.
    UNSPECIFIED 5 CIFAR-100's 800 + 200 images are drawn by --seed; of a folder's, a fifth is val.
    UNSPECIFIED 6 a constant learning rate everywhere: the authors' run script for CIFAR has it; for
                  the other tasks no script is known, and their code's default is a cosine with
                  warm-up.

References
    VPT: Jia et al., ECCV 2022. PPO: Schulman et al., 2017. VTAB: Zhai et al., 2019. NOAH (whose
    VTAB-1k folders are read): Zhang et al., 2022.
"""
# ================================================================================================
# Setup
# ================================================================================================
import copy
import functools
import itertools
import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data

METHODS = ["linear", "full", "vpt-shallow", "vpt-deep", "planted", "random-relocation",
           "prune-only", "pro-vpt", "adaptive"]
LABELS = {"linear": "linear probe", "full": "full tuning", "vpt-shallow": "VPT-shallow",
          "vpt-deep": "VPT-deep (uniform)", "planted": "planted truth",
          "random-relocation": "random relocation", "prune-only": "pruning only",
          "pro-vpt": "PRO-VPT", "adaptive": "adaptive (ours)"}

# Defaults: the paper's setting, and that of the small world (lr chosen on seed 100).
PAPER = {"model": "google/vit-base-patch16-224-in21k", "method": "pro-vpt", "prompts": 20,
         "dropout": .1, "epochs": 100, "lr": 2.5}
SMALL = {"model": "tiny", "method": "linear,vpt-deep,planted,random-relocation,pro-vpt,adaptive",
         "prompts": 4, "dropout": 0.0, "epochs": 30, "lr": .4, "threads": 1}
SEARCH_SEEDS = [18, 25, 42]
PAPER_VTAB = {"Full": (78.6, 86.3, 57.8, 74.2), "LoRA": (82.4, 84.3, 60.1, 75.6),
              "VPT-Deep": (82.5, 84.6, 62.1, 76.4), "Adapter": (83.3, 86.2, 63.3, 77.6),
              "PRO-VPT": (83.3, 86.2, 64.5, 78.0)}

# ================================================================================================
# Model: a frozen ViT with prompts before its blocks
# ================================================================================================


def prompted_block(layer, x, prompts=None, gates=None, class_only=False):
    """One pre-LN block on tokens x (B, T, D) that also attends to prompts (n, D) or (B, n, D).

    layer: a transformers ViTLayer. What the block makes *of* the prompts is dropped after it, so a
    prompt is no more than a key and a value: its query, projection and MLP are left out, and it
    matters only through LN(p). class_only: the last block, of which only the class token is read.
    gates (n,) multiply LN(p); they are 1 and only there to be differentiated.
    """
    attention = layer.attention
    h = layer.layernorm_before(x)  # (B, T, D)
    seen = h
    if prompts is not None:
        p = layer.layernorm_before(prompts)
        p = p if gates is None else gates[:, None] * p
        seen = torch.cat([h, p.expand(len(x), -1, -1)], 1)  # (B, T + n, D)
    if class_only:
        x, h = x[:, :1], h[:, :1]  # (B, 1, D)

    def heads(t):  # (B, T, D) -> (B, heads, T, D / heads)
        return t.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        heads(attention.q_proj(h)), heads(attention.k_proj(seen)), heads(attention.v_proj(seen)))
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.layernorm_after(x))


class PromptedViT(nn.Module):
    """Visual prompt tuning with any number of prompts per block, and a linear head.

    vit: a transformers.ViTModel (5.17 or newer), which is frozen; counts: L numbers >= 0, prompts
    per block. All N prompts are rows of one tensor, `prompts` (N, D), and `block` (N,) says where
    each stands: to move a prompt is to change one number. -1: the prompt is removed.
    shallow: the prompts join the tokens before block 0 and stay (VPT-shallow). head_init: "vpt", as
    the authors draw it, or "linear", nn.Linear's own draw, many times smaller.

    forward(tokens (B, 1 + T, D) from `embed`) -> logits (B, C).
    """

    def __init__(self, vit, num_classes, counts, shallow=False, head_init="vpt"):
        super().__init__()
        self.vit, self.shallow = vit.requires_grad_(False).eval(), shallow
        width, patch = vit.config.hidden_size, vit.config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        self.bound = math.sqrt(6 / (3 * patch ** 2 + width))  # of VPT's uniform draw
        prompts = torch.empty(sum(counts), width).uniform_(-self.bound, self.bound)
        self.prompts, self.head = nn.Parameter(prompts), nn.Linear(width, num_classes)
        if head_init == "vpt":  # wide, N(0, 2 / C), and every class unlikely: σ(-4.595) = .01
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.constant_(self.head.bias, -4.595)
        self.to(vit.layernorm.weight)  # its device and dtype
        self.place(torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))

    def place(self, block):
        """Set the block of every prompt: (N,) ints in -1..L-1."""
        self.block = block.clone()
        self.rows = [torch.nonzero(self.block == b)[:, 0].to(self.prompts.device)
                     for b in range(len(self.vit.layers))]

    def counts(self):
        """Prompts per block: L ints."""
        return [len(rows) for rows in self.rows]

    def trainable(self):
        """Name -> parameter of everything that learns; the prompts come first."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad and p.numel()}

    def embed(self, pixels):
        """(B, 3, H, W) -> tokens (B, 1 + T, D): class token and patches with their positions."""
        return self.vit.embeddings(pixels)

    def features(self, tokens, noise=None, gates=None):
        """The class token (B, D) after the final LN. noise (B, N, D): dropout on the prompts."""
        prompts = self.prompts if noise is None else self.prompts * noise  # (N, D) or (B, N, D)
        x, last = tokens, len(self.vit.layers) - 1
        if self.shallow:
            x = torch.cat([x, prompts.expand(len(x), -1, -1)], 1)
        for b, layer in enumerate(self.vit.layers):
            rows = self.rows[b]
            here = None if self.shallow or not len(rows) else prompts[..., rows, :]
            gate = None if gates is None else gates[rows]
            x = prompted_block(layer, x, here, gate, class_only=b == last)
        return self.vit.layernorm(x[:, 0])

    def forward(self, tokens, noise=None, gates=None):
        return self.head(self.features(tokens, noise, gates))


# ================================================================================================
# Method: pure functions and small classes, to be copied
# ================================================================================================


def idleness_scores(prompts, gradients, kind="taylor"):
    """How much the loss would fall, to first order, without each prompt: (N,), larger = idler.

    taylor    prompts (N, D) and ∂L/∂prompts (N, D): the paper's score (findings 1 and 2!)
    post-ln   the same, of gates on LN(p): prompts are the gates (N, 1), all 1, and their gradient
    norm      minus the length of a prompt; needs no gradients
    """
    if kind == "norm":
        return -prompts.norm(dim=-1)
    # Eq. (E2): I_k = L(with p_k) - L(without) ≈ g_kᵀ p_k
    return (prompts * gradients).sum(-1)


@torch.no_grad()
def exact_idleness(model, tokens, labels):
    """The true change of the loss: (N,) = L(all prompts) - L(without prompt k), on one batch.

    N + 1 forward passes. Removed prompts get 0.
    """
    placed = model.block.clone()
    whole, scores = F.cross_entropy(model(tokens), labels), torch.zeros(len(placed))
    for k in torch.nonzero(placed >= 0)[:, 0].tolist():
        without = placed.clone()
        without[k] = -1
        model.place(without)
        scores[k] = whole - F.cross_entropy(model(tokens), labels)
    model.place(placed)
    return scores


def relocate(prompts, block, k, target, scale=1e-3, momentum=None):
    """Take prompt k out of its block and put it, scaled down, into block `target` (E5), in place.

    prompts (N, D), block (N,) ints. Into its own block: nothing happens. momentum: the optimiser's
    (N, D) buffer; if given, its row is cleared (the paper keeps it).
    """
    if block[k] == target:
        return
    with torch.no_grad():
        # Eq. (E5): P_target <- P_target ∪ {10⁻³ p_k}
        prompts[k] *= scale
        if momentum is not None:
            momentum[k] = 0
    block[k] = target


def allocator_state(scores, block, source, num_blocks):
    """What an allocator sees (E3): (3L,) = z-scored block sums of idleness, shares, one-hot source.

    scores (N,), block (N,) in -1..L-1, source: the block whose prompt is in the hand (not counted
    among those that remain).
    """
    placed = block >= 0
    sums = torch.zeros(num_blocks)
    sums.index_add_(0, block[placed], scores[placed].to(sums.dtype))
    counts = torch.bincount(block[placed], minlength=num_blocks).to(sums.dtype)
    counts[source] -= 1
    # Eq. (E3): s = [z(Σ_k I_k), n / (N - 1), 1_source]
    z = (sums - sums.mean()) / (sums.std(correction=0) + 1e-8)
    others = (placed.sum() - 1).clamp(min=1)  # N - 1: without the prompt in the hand
    return torch.cat([z, counts / others, F.one_hot(torch.tensor(source), num_blocks)])


class PPOAllocator:
    """The paper's policy over target blocks, trained by proximal policy optimisation (E3).

    choose(state (3L,), generator) -> a block; learn(reward) ends what choose began. After every
    `every` rewards: `updates` Adam steps. Finding 3: two returns, normalised, are ±.7071 whatever
    the rewards were, so that with every=2 only the sign of the first one is seen.
    UNSPECIFIED 2: old_values, of when the action was chosen, are the baseline.
    """

    def __init__(self, num_blocks, width=64, lr_actor=3e-4, lr_critic=1e-3, clip=.2, updates=60,
                 every=2, value_weight=.5, entropy_weight=.01):
        def mlp(out):
            return nn.Sequential(nn.Linear(3 * num_blocks, width), nn.Tanh(),
                                 nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))

        self.actor, self.critic = mlp(num_blocks), mlp(1)
        self.optimizer = torch.optim.Adam([{"params": self.actor.parameters(), "lr": lr_actor},
                                           {"params": self.critic.parameters(), "lr": lr_critic}])
        self.clip, self.updates, self.every = clip, updates, every
        self.value_weight, self.entropy_weight = value_weight, entropy_weight
        self.memory = []  # [state, action, log-probability, value] and, once known, reward

    @torch.no_grad()
    def choose(self, state, generator=None):
        log_p = self.actor(state).log_softmax(-1)  # (L,)
        action = torch.multinomial(log_p.exp(), 1, generator=generator).item()
        self.memory.append([state, action, log_p[action].item(), self.critic(state).item()])
        return action

    def learn(self, reward):
        self.memory[-1].append(float(reward))
        if len(self.memory) < self.every:
            return
        states, actions, old_log_p, old_values, rewards = zip(*self.memory, strict=True)
        states, actions, old_log_p, old_values = (
            torch.stack(states), torch.tensor(actions), torch.tensor(old_log_p),
            torch.tensor(old_values))
        returns = torch.tensor(rewards).flip(0).cumsum(0).flip(0)  # γ = 1
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        advantage = returns - old_values
        for _ in range(self.updates):
            log_p = self.actor(states).log_softmax(-1)  # (every, L)
            ratio = (log_p.gather(1, actions[:, None])[:, 0] - old_log_p).exp()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            error = (self.critic(states)[:, 0] - returns).square()
            entropy = -(log_p.exp() * log_p).sum(-1)
            loss = (self.value_weight * error - gain - self.entropy_weight * entropy).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.memory = []

    def state_dict(self):
        return {"actor": self.actor.state_dict(), "critic": self.critic.state_dict(),
                "optimizer": self.optimizer.state_dict(), "memory": self.memory}

    def load_state_dict(self, state):
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory = [list(row) for row in state["memory"]]


class ThompsonAllocator:
    """A Beta(wins + 1, losses + 1) belief per block; the block with the largest draw is chosen.

    A move counts as a win if its reward is not negative.
    """

    def __init__(self, num_blocks):
        self.wins, self.losses, self.last = [0] * num_blocks, [0] * num_blocks, None

    def choose(self, state, generator=None):
        # With whole numbers a, b, the a-th smallest of a + b - 1 uniform draws is Beta(a, b).
        draws = [torch.rand(w + l + 1, generator=generator).sort()[0][w].item()
                 for w, l in zip(self.wins, self.losses, strict=True)]
        self.last = max(range(len(draws)), key=draws.__getitem__)
        return self.last

    def learn(self, reward):
        (self.wins if reward >= 0 else self.losses)[self.last] += 1

    def state_dict(self):
        return {"wins": self.wins, "losses": self.losses, "last": self.last}

    def load_state_dict(self, state):
        self.wins, self.losses = list(state["wins"]), list(state["losses"])
        self.last = state["last"]


class FixedRule:
    """Allocators that learn nothing: "random", or "greedy" (the least idle block; ours)."""

    def __init__(self, rule, num_blocks):
        self.rule, self.num_blocks = rule, num_blocks

    def choose(self, state, generator=None):
        if self.rule == "random":
            return torch.randint(self.num_blocks, (), generator=generator).item()
        return state[:self.num_blocks].argmin().item()

    def learn(self, reward):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


# DEVIATION 5: what follows is ours, not the paper's (--method adaptive). The same idea, prompts
# move to where they are needed, with the need measured instead of estimated.


@torch.no_grad()
def block_usefulness(model, tokens, labels):
    """(L,) = L(without the prompts of block b) - L(all prompts), on one batch; 0 where none stand.

    L + 1 forward passes. A whole block's prompts stand in for each other, so that removing one of
    them says little; removing all of them says what the block is worth.
    """
    placed = model.block.clone()
    whole = F.cross_entropy(model(tokens), labels)
    useful = torch.zeros(len(model.rows))
    for b, rows in enumerate(list(model.rows)):
        if len(rows):
            model.place(torch.where(placed == b, -1, placed))
            useful[b] = F.cross_entropy(model(tokens), labels) - whole
    model.place(placed)
    return useful


def planned_moves(counts, share, limit):
    """Up to `limit` moves [(source, target)] that bring counts (L ints) towards N · share (L,).

    Each goes from the most crowded block to the one that lacks most; a block that is off by less
    than half a prompt is left alone.
    """
    counts, moves = torch.tensor(counts, dtype=torch.float), []
    lack = counts.sum() * share.to(counts.dtype) - counts
    for _ in range(limit):
        source, target = lack.argmin().item(), lack.argmax().item()
        if lack[target] < .5 or lack[source] > -.5:
            break
        lack[source], lack[target] = lack[source] + 1, lack[target] - 1
        moves.append((source, target))
    return moves


# ================================================================================================
# Train and evaluate
# ================================================================================================


class Part:
    """Images of one split with labels (N,): embedded once, as long as nothing about them changes.

    batches(index_lists) yields tokens (B, 1 + T, D) if they are in memory, else pixels.
    """

    def __init__(self, images, labels, transform, random_transform, args, device):
        self.pool = data.ImagePool(images, transform, random_transform, args.workers, device)
        self.labels, self.tokens = torch.as_tensor(labels, device=device), None

    @torch.no_grad()
    def embed_once(self, vit):
        """Keep the tokens if they fit where ImagePool would keep pixels."""
        shape = vit.embeddings.position_embeddings.shape  # (1, 1 + T, D)
        if len(self.labels) * shape[1] * shape[2] <= self.pool.IN_MEMORY:
            chunks = torch.arange(len(self.labels)).split(256)
            self.tokens = torch.cat([vit.embeddings(x) for x in self.pool.batches(chunks)])

    def batches(self, index_lists, seeds=None, pixels=False):
        """seeds: one list of ints per index list turns augmentation on; pixels: never tokens."""
        if self.tokens is None or pixels or seeds is not None:
            yield from self.pool.batches(index_lists, seeds)
        else:
            yield from (self.tokens[indices] for indices in index_lists)


@dataclass
class Task:
    """What all methods on a data set share."""
    vit: nn.Module
    num_classes: int
    train: Part
    test: Part
    augment: bool
    truth: list = None  # the planted number of prompts per block


@dataclass(frozen=True)
class Job:
    """One training: `stage` is "val" (a cell of the search) or "test"."""
    dataset: str
    method: str
    stage: str
    seed: int
    lr: float
    weight_decay: float

    def key(self):
        cell = f"lr {self.lr:g} wd {self.weight_decay:g}" if self.stage == "val" else self.seed
        return f"{self.dataset}/{self.method}/{self.stage}/{cell}"


class Training:
    """One job under way: model, optimiser, allocator, and what a checkpoint must hold."""

    def __init__(self, task, run, args, job):
        self.task, self.run, self.args, self.job = task, run, args, job
        counts = distribution(job.method, args, task)
        common.seed_torch(job.seed, "init")
        self.model = PromptedViT(task.vit, task.num_classes, counts,
                                 job.method == "vpt-shallow", args.head_init)
        if job.method == "full":
            self.model.vit = copy.deepcopy(task.vit).requires_grad_(True)
        self.params = self.model.trainable()
        self.optimizer = torch.optim.SGD(self.params.values(), job.lr, args.momentum,
                                         weight_decay=job.weight_decay)
        self.allocator, blocks = None, len(counts)
        if job.method == "pro-vpt":
            common.seed_torch(job.seed, "init", "allocator")
            self.allocator = {"ppo": PPOAllocator, "thompson": ThompsonAllocator}.get(
                args.allocator, functools.partial(FixedRule, args.allocator))(blocks)
        # pending: loss and idleness when the last prompt moved; running: scores while training
        self.epoch, self.pending, self.running, self.share = 0, None, None, None
        self.losses, self.counts, self.moves = [], [self.model.counts()], []

    PLAIN = ("epoch", "pending", "running", "share", "losses", "counts", "moves")

    def state_dict(self):
        return {"params": self.params, "block": self.model.block,
                "optimizer": self.optimizer.state_dict(),
                "allocator": self.allocator and self.allocator.state_dict(),
                **{name: getattr(self, name) for name in self.PLAIN}}

    def load_state_dict(self, state):
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(state["params"][name])
        self.model.place(state["block"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.allocator:
            self.allocator.load_state_dict(state["allocator"])
        for name in self.PLAIN:
            setattr(self, name, state[name])

    def momentum(self):
        """The prompts' momentum buffer, to clear the row of a moved prompt in; None: keep it."""
        wanted = self.args.reset_momentum or self.job.method == "adaptive"
        return self.optimizer.state[self.model.prompts].get("momentum_buffer") if wanted else None

    def generator(self, *purpose):
        return common.torch_generator(self.job.seed, *purpose, self.epoch)


def distribution(method, args, task):
    """Prompts per block (L ints) that a method begins with."""
    blocks = len(task.vit.layers)
    if method.startswith("fixed:"):
        counts = [int(n) for n in method[6:].split(",")]
        if len(counts) != blocks:
            raise common.UserError(f"--method {method}: expected {blocks} numbers, one for each "
                                   f"block of --model {args.model}")
        return counts
    if method == "planted":
        return task.truth
    if method == "vpt-shallow":  # UNSPECIFIED 4: as many prompts as the others have
        return [args.prompts * blocks] + [0] * (blocks - 1)
    return [0 if method in ("linear", "full") else args.prompts] * blocks


def gradients(training, wanted, purpose, dropout=0.0, gates=None):
    """Yield (loss, [gradient of each of `wanted`], batch size) over one shuffled pass.

    Every process takes its share of each batch; loss and gradients are summed over processes.
    """
    task, run, model = training.task, training.run, training.model
    n, device = len(task.train.labels), run.device
    generator = training.generator("batches", purpose)
    lists = torch.randperm(n, generator=generator).split(training.args.batch)
    mine = [indices[run.rank::run.world] for indices in lists]
    idle = [len(here) == 0 for here in mine]  # a last batch smaller than the number of processes
    mine = [indices[:1] if none else here
            for indices, here, none in zip(lists, mine, idle, strict=True)]
    seeds = None
    if task.augment:
        seeds = torch.randint(2 ** 31, (n,), generator=generator)
        seeds = [seeds[here].tolist() for here in mine]
    noise, drops = None, common.torch_generator(training.job.seed, "dropout", purpose,
                                                training.epoch, device=device)
    inputs = task.train.batches(mine, seeds, pixels=training.job.method == "full")
    for x, indices, here, none in zip(inputs, lists, mine, idle, strict=True):
        if dropout and len(model.prompts):  # drawn for the whole batch: the same in any split
            keep = torch.rand(len(indices), *model.prompts.shape, generator=drops, device=device)
            keep = keep[:1] if none else keep[run.rank::run.world]
            noise = (keep >= dropout) / (1 - dropout)
        tokens = x if x.dim() == 3 else model.embed(x)
        logits = model(tokens, noise, gates)
        loss = F.cross_entropy(logits, task.train.labels[here], reduction="sum") / len(indices)
        loss = loss * (not none)
        grads = torch.autograd.grad(loss, wanted)
        loss = loss.detach()
        if run.world > 1:
            flat = torch.cat([loss[None], *(g.flatten() for g in grads)])
            torch.distributed.all_reduce(flat)
            loss, *parts = flat.split([1, *(p.numel() for p in wanted)])
            loss, grads = loss[0], [g.view_as(p) for g, p in zip(parts, wanted, strict=True)]
        yield loss, grads, len(indices)


class LossMean:
    """The mean loss of a pass; official: Σ batch mean / batch size (DEVIATION 1)."""

    def __init__(self, official):
        self.official, self.total, self.samples = official, 0.0, 0

    def add(self, loss, size):
        self.total += loss.item() / size if self.official else loss.item() * size
        self.samples += size

    def value(self):
        return self.total if self.official else self.total / self.samples


def score_pass(training):
    """Idleness of every prompt (N,) and the loss, averaged over a pass without updates (E2)."""
    args, model, run = training.args, training.model, training.run
    official, kind = args.recipe == "official", args.idleness
    cost, scores, batches = LossMean(official), torch.zeros(len(model.prompts)), 0
    if kind == "exact":
        return exact_pass(training)
    gates = torch.ones(len(model.prompts), device=run.device, requires_grad=True)
    wanted = [gates if kind == "post-ln" else model.prompts]
    if official:
        wanted += [model.head.weight, model.head.bias]
    # DEVIATION 3: no dropout while scoring; the authors' pass has it
    dropout = args.dropout if official else 0.0
    passes = gradients(training, wanted, "score", dropout, gates if kind == "post-ln" else None)
    for loss, (gradient, *head), size in passes:
        if kind == "post-ln":
            batch = idleness_scores(gates.detach()[:, None], gradient[:, None])
        else:
            batch = idleness_scores(model.prompts.detach(), gradient, kind)
        if official and args.clip:  # DEVIATION 2: clipped by a norm that the head dominates
            norm = torch.cat([batch, *(g.flatten() for g in head)]).norm()
            batch = batch * (args.clip / (norm + 1e-6)).clamp(max=1)
        scores, batches = scores + batch.cpu(), batches + 1
        cost.add(loss, size)
    return scores / batches, cost.value()


def sample(training, purpose, n):
    """n random training images -> tokens, labels."""
    part, generator = training.task.train, training.generator(purpose)
    indices = torch.randperm(len(part.labels), generator=generator)[:n]
    x = next(iter(part.batches([indices])))
    return x if x.dim() == 3 else training.model.embed(x), part.labels[indices]


@torch.no_grad()
def exact_pass(training):
    """Idleness by removal, and the loss, on --score-images training images."""
    tokens, labels = sample(training, "exact", training.args.score_images)
    return (exact_idleness(training.model, tokens, labels),
            F.cross_entropy(training.model(tokens), labels).item())


def relocation(training):
    """Steps 1-4 of the paper's epoch: score, reward the last move, make the next one."""
    args, model, method = training.args, training.model, training.job.method
    due = training.epoch - args.warmup
    if due < 0 or due % args.relocate_every:
        return
    block, generator = model.block.clone(), training.generator("allocator")
    blocks = len(model.rows)
    if method == "random-relocation":  # UNSPECIFIED 3
        k, target = (torch.randint(n, (), generator=generator).item() for n in (len(block), blocks))
    else:
        official = args.recipe == "official"
        scores, cost = training.running if args.scores == "running" else score_pass(training)
        scores = torch.as_tensor(scores)
        masked = scores.masked_fill(block < 0, -math.inf)
        k = masked.argmax().item()
        if training.allocator and training.pending:
            before, moved = training.pending
            # Eq. (E4): r = L_before - L_after - idleness. UNSPECIFIED 1: of the prompt that moved,
            # so that pruning's gain is not credited to the target; official: of the next candidate
            training.allocator.learn(before - cost - (masked[k].item() if official else moved))
            training.pending = None
        if masked[k] <= 0 and args.idleness != "norm":
            return
        if method == "prune-only":
            if (block >= 0).sum() > 1:
                block[k] = -1
                training.moves.append([training.epoch, k, -1])
            model.place(block)
            return
        state = allocator_state(scores, block, block[k].item(), blocks)
        target = training.allocator.choose(state, generator)
        training.pending = [cost, masked[k].item()]
    relocate(model.prompts, block, k, target, args.move_scale, training.momentum())
    training.moves.append([training.epoch, k, target])
    model.place(block)


def adaptation(training):
    """Ours: bring the counts towards the blocks' measured usefulness, early and in several moves.

    From a tenth of the epochs on, since untrained prompts are not useful anywhere, to the half, so
    that moved prompts have time to learn. The share is averaged over the epochs so far. A moved
    prompt is drawn anew and its momentum cleared: one at 10⁻³ of its size has so large a gradient
    that the joint clip stops all others (finding 2). A block that has lost all its prompts shows no
    usefulness, so that it stays empty.
    """
    args, model, epoch = training.args, training.model, training.epoch
    if not args.epochs // 10 <= epoch < args.epochs // 2:
        return
    tokens, labels = sample(training, "usefulness", args.score_images)
    useful = block_usefulness(model, tokens, labels).clamp(min=0)
    share = useful / useful.sum().clamp(min=1e-12)
    training.share = share if training.share is None else (share + training.share) / 2
    generator, block = training.generator("allocator"), model.block.clone()
    limit = math.ceil(len(block) / 8)  # an eighth of all prompts an epoch
    for source, target in planned_moves(model.counts(), training.share, limit):
        rows = torch.nonzero(block == source)[:, 0]
        k = rows[torch.randint(len(rows), (), generator=generator)].item()
        relocate(model.prompts, block, k, target, 0.0, training.momentum())
        bound = model.bound
        fresh = torch.empty(model.prompts.shape[1]).uniform_(-bound, bound, generator=generator)
        model.prompts.data[k] = fresh.to(model.prompts)
        training.moves.append([epoch, k, target])
    model.place(block)


def train_epoch(training):
    """The inner problem: one pass of SGD on prompts and head -> mean loss."""
    args, model, params = training.args, training.model, list(training.params.values())
    official = args.recipe == "official"
    mean, cost, scores, batches = LossMean(False), LossMean(official), 0, 0
    for loss, grads, size in gradients(training, params, "train", args.dropout):
        if args.scores == "running" and training.job.method in ("pro-vpt", "prune-only"):
            # before the clip; each batch meets other prompts, and other dropout, than a pass would
            batch = idleness_scores(model.prompts.detach(), grads[0])
            scores, batches = scores + batch.cpu(), batches + 1
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if args.clip:
            torch.nn.utils.clip_grad_norm_(params, args.clip)  # one norm over head and prompts
        training.optimizer.step()
        mean.add(loss, size)
        cost.add(loss, size)
    if batches:
        training.running = [(scores / batches).tolist(), cost.value()]
    return common.check_finite(mean.value(), f"{training.job.key()}: the loss of epoch "
                                             f"{training.epoch + 1}")


def train(training, save):
    """All epochs of a job, from where it stands; save(training) after each."""
    args, run, job = training.args, training.run, training.job
    epochs = range(training.epoch, args.epochs)
    for _ in run.progress(epochs, job.key(), initial=epochs.start, total=args.epochs):
        # Eq. (E1): D* = argmin_D L(P*, D), one move an epoch
        if job.method in ("pro-vpt", "random-relocation", "prune-only"):
            relocation(training)
        elif job.method == "adaptive":
            adaptation(training)
        # Eq. (E1): P* = argmin_P L(P, D*)
        training.losses.append(train_epoch(training))
        training.epoch += 1
        training.counts.append(training.model.counts())
        row = {"job": job.key(), "epoch": training.epoch, "loss": training.losses[-1]}
        asked = args.eval_every and training.epoch % args.eval_every == 0
        if training.epoch == args.epochs or asked:
            row["accuracy"] = evaluate(training)
        run.log(**row, prompts="-".join(map(str, training.counts[-1])))
        save(training)
    return {"accuracy": row["accuracy"] if len(epochs) else evaluate(training),
            "losses": training.losses, "counts": training.counts, "moves": training.moves}


@torch.no_grad()
def evaluate(training):
    """Percent right on the test part (on the validation part in a search)."""
    part, run, model = training.task.test, training.run, training.model
    chunks = torch.arange(len(part.labels)).split(128)
    mine = run.share(range(len(chunks)))
    inputs = part.batches([chunks[i] for i in mine], pixels=training.job.method == "full")
    hits = {}
    for i, x in zip(mine, inputs, strict=True):
        guess = model(x if x.dim() == 3 else model.embed(x)).argmax(-1)
        hits[i] = (guess == part.labels[chunks[i]]).sum().item()
    return 100 * sum(run.gather(hits).values()) / len(part.labels)


# ================================================================================================
# Command line
# ================================================================================================


def build_parser():
    """All flags, in the groups run, data, model, method."""
    parser = common.Parser(__doc__)
    common.add_run_arguments(parser)
    number = common.number
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default="planted",
                   help="planted (the small world, default), vtab-TASK for the 19 tasks, "
                   f"{', '.join('fgvc-' + n for n in data.FGVC_SETS)}, cifar100, or folder:PATH "
                   "with train/<class>/* and test/<class>/*")
    g.add_argument("--suite", choices=["vtab"], default=None,
                   help="all 19 tasks of VTAB-1k in turn, and the means of its three groups")
    g.add_argument("--truth", default=None,
                   help="planted: the teacher's prompts per block, 6 numbers (default "
                   f"{','.join(map(str, data.PLANTED_TRUTHS[0]))})")
    g.add_argument("--norm", choices=["half", "imagenet"], default=None,
                   help="pixel mean and std: .5 (in21k ViT; default) or ImageNet's (default of "
                   "fgvc, as VPT; SSF)")
    g.add_argument("--workers", type=number(int, low=0), default=0,
                   help="processes that read images")
    g = parser.add_argument_group("model")
    g.add_argument("--model", default=None,
                   help="a transformers ViT: hub id or directory (default "
                   "google/vit-base-patch16-224-in21k), or tiny, pre-trained on the spot (planted)")
    g.add_argument("--eps", type=number(float, above=0), default=1e-6,
                   help="ε of the ViT's LayerNorms (default %(default)g; finding 1)")
    g.add_argument("--prompts", type=number(int, low=1), default=None,
                   help="prompts per block at the start (paper 20, small world 4)")
    g.add_argument("--head-init", choices=["vpt", "linear"], default="vpt",
                   help="first draw of the head: vpt, the authors' (std √(2 / C), bias -4.595), or "
                   "nn.Linear's (default %(default)s)")
    g.add_argument("--dropout", type=number(float, low=0, high=.9), default=None,
                   help="on prompts (official code .1; small world 0)")
    g = parser.add_argument_group("method")
    g.add_argument("--method", default=None,
                   help=f"comma-separated list of {', '.join(METHODS)}, fixed:n,n,.. (prompts per "
                   "block), or all (default pro-vpt; a comparison in the small world)")
    g.add_argument("--recipe", choices=["paper", "official"], default="paper",
                   help="official follows the authors' code where it leaves the paper "
                   "(DEVIATION 1-3, finding 4)")
    g.add_argument("--allocator", choices=["ppo", "thompson", "greedy", "random"], default="ppo",
                   help="pro-vpt: who chooses the target block (paper %(default)s)")
    g.add_argument("--idleness", choices=["taylor", "norm", "post-ln", "exact"], default="taylor",
                   help="pro-vpt, prune-only: the score of E2 (paper %(default)s)")
    g.add_argument("--scores", choices=["pass", "running"], default="pass",
                   help="a pass of its own (paper), or summed up while training: half the time")
    g.add_argument("--score-images", type=number(int, low=1), default=256,
                   help="training images for --idleness exact and adaptive (ours)")
    g.add_argument("--warmup", type=number(int, low=1), default=1,
                   help="epochs before the first move (official code %(default)s)")
    g.add_argument("--relocate-every", type=number(int, low=1), default=1,
                   help="epochs between moves (paper %(default)s)")
    g.add_argument("--move-scale", type=number(float, low=0), default=1e-3,
                   help="factor on a moved prompt (paper %(default)g)")
    g.add_argument("--reset-momentum", action="store_true", help="of a moved prompt (ours)")
    g.add_argument("--epochs", type=number(int, low=1), default=None,
                   help="paper 100, small world 30")
    g.add_argument("--batch", type=number(int, low=1), default=64, help="paper %(default)s")
    g.add_argument("--lr", type=number(float, above=0), default=None,
                   help="of SGD, constant, as it is (official run script 2.5 on CIFAR; small world "
                   ".4; UNSPECIFIED 6)")
    g.add_argument("--momentum", type=number(float, low=0, high=.999), default=.9,
                   help="paper %(default)s")
    g.add_argument("--weight-decay", type=number(float, low=0), default=1e-4,
                   help="official run script %(default)s")
    g.add_argument("--clip", type=number(float, low=0), default=.25,
                   help="largest joint gradient norm, 0 = none (official code %(default)s)")
    g.add_argument("--search", action="store_true",
                   help="choose lr and weight decay on the validation part (32 runs), then train "
                   "on train + val with seeds 18, 25, 42 (fgvc: on train, with --seed)")
    g.add_argument("--grid-lr", default="50,25,10,5,2.5,1,.5,.25",
                   help="--search: base rates, times batch / 256 (paper %(default)s)")
    g.add_argument("--grid-wd", default=".01,.001,.0001,0",
                   help="--search: weight decays (paper %(default)s)")
    g.add_argument("--eval-every", type=number(int, low=0), default=0,
                   help="epochs between evaluations (default 0: at the end only)")
    return parser


def numbers_in(text, flag, kind=float):
    """The numbers of a comma-separated flag, all >= 0; UserError otherwise."""
    try:
        values = [kind(word) for word in text.split(",")]
        if all(0 <= v < math.inf for v in values):
            return values
    except ValueError:
        pass
    raise common.UserError(f"{flag} {text!r}: expected numbers >= 0, separated by commas")


def resolve(args):
    """Fill in defaults that depend on data set and model; refuse what does not go together."""
    small = args.dataset == "planted" and not args.suite
    for key, value in (SMALL if small else PAPER).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.norm = args.norm or ("imagenet" if args.dataset.startswith("fgvc-") else "half")
    if (args.model == "tiny") != small:
        raise common.UserError("--model tiny and --dataset planted go together, without --suite")
    known = ["planted", *data.TRANSFER_SETS]
    if args.dataset not in known and not args.dataset.startswith("folder:"):
        raise common.UserError(
            f"--dataset {args.dataset!r} is unknown; there are {', '.join(known)} and folder:PATH")
    names = re.split(r",(?![\d\s])", args.method)
    if args.method == "all":
        names = [m for m in METHODS if m != "planted" or small]
    for name in names:
        if name.startswith("fixed:"):
            numbers_in(name[6:], "--method fixed:", int)
        elif name not in METHODS:
            raise common.UserError(
                f"--method {name!r} is unknown; there are {', '.join(METHODS)}, fixed:n,n,.., all")
    if "planted" in names and not small:
        raise common.UserError("--method planted needs --dataset planted, whose truth is known")
    args.method = ",".join(dict.fromkeys(names))
    truth = args.truth or ",".join(map(str, data.PLANTED_TRUTHS[0]))
    if len(numbers_in(truth, "--truth", int)) != 6 or not sum(numbers_in(truth, "--truth", int)):
        raise common.UserError(f"--truth {truth!r}: expected 6 whole numbers, not all 0")
    args.truth = truth if small else None
    for flag, text in (("--grid-lr", args.grid_lr), ("--grid-wd", args.grid_wd)):
        if flag == "--grid-lr" and 0 in numbers_in(text, flag):
            raise common.UserError("--grid-lr: a rate of 0 learns nothing")
        numbers_in(text, flag)
    if args.scores == "running" and args.idleness != "taylor":
        raise common.UserError("--scores running sums up g·p: it goes with --idleness taylor only")
    return args


def jobs(args, done):
    """Every training of this command in turn; those of a search depend on what is done before."""
    datasets = [f"vtab-{t}" for t in data.VTAB_TASKS] if args.suite else [args.dataset]
    grid = [(lr * args.batch / 256, wd) for lr in numbers_in(args.grid_lr, "--grid-lr")
            for wd in numbers_in(args.grid_wd, "--grid-wd")]
    for dataset, method in itertools.product(datasets, re.split(r",(?![\d\s])", args.method)):
        lr, wd, seeds = args.lr, args.weight_decay, [args.seed]
        if args.search:
            cells = [Job(dataset, method, "val", args.seed, *cell) for cell in grid]
            yield from cells
            # of equals the smallest rate, "for stability" as the authors say, then the first decay
            best = max(cells, key=lambda job: (done[job.key()]["accuracy"], -job.lr))
            lr, wd = best.lr, best.weight_decay
            seeds = [args.seed] if dataset.startswith("fgvc-") else SEARCH_SEEDS
        yield from (Job(dataset, method, "test", seed, lr, wd) for seed in seeds)


def build_task(args, run, dataset, stage):
    """Data and backbone; stage "val" trains on the training and tests on the validation part."""
    cache = args.data_dir / "cache"
    with run.rank_zero_first():  # DEVIATION 4: --eps (finding 1)
        if args.model == "tiny":
            vit = data.tiny_vit(args.seed, run.device, cache, run.progress, args.eps)
        else:
            vit = data.vit_backbone(args.model, args.eps, args.seed, run.device,
                                    args.data_dir / "weights")
        truth = None
        if dataset == "planted":
            truth = numbers_in(args.truth, "--truth", int)
            splits = data.planted(args.seed, vit, truth)
        else:
            splits = data.load_splits(dataset, args.data_dir, args.seed)  # UNSPECIFIED 5
    size = vit.config.image_size
    size = size if isinstance(size, int) else size[0]
    mean, std = ((.5,) * 3, (.25 if dataset == "planted" else .5,) * 3)
    if args.norm == "imagenet":
        mean, std = (.485, .456, .406), (.229, .224, .225)
    transform, random_transform = data.transfer_transforms(splits.family, size, mean, std)
    train, test = splits.train, splits.val if stage == "val" else splits.test
    if stage != "val" and splits.family != "fgvc":  # FGVC's final run leaves val out, as VPT's does
        train = splits.train_and_val()
    train = Part(*train, transform, random_transform, args, run.device)
    test = Part(*test, transform, random_transform, args, run.device)
    if random_transform is None:
        train.embed_once(vit)
    if args.model == "tiny":
        test.embed_once(vit)
    return Task(vit, splits.num_classes, train, test, random_transform is not None, truth)


def main(argv=None):
    """The command: every job in turn, each resumable at any epoch, then the report."""
    args = resolve(build_parser().parse_args(argv))
    name = args.suite or Path(args.dataset.removeprefix("folder:")).name
    with common.Run(args, f"pro_vpt-{name}") as run:
        state = run.load() or {"done": {}, "current": None, "key": None}
        run.begin()
        task, made_for = None, None
        for job in jobs(args, state["done"]):
            if job.key() in state["done"]:
                continue
            if made_for != (job.dataset, job.stage):
                task, made_for = None, (job.dataset, job.stage)  # free the last one first
                task = build_task(args, run, *made_for)
            training = Training(task, run, args, job)
            if state["key"] == job.key():
                training.load_state_dict(state["current"])
            began = time.process_time()
            try:
                found = train(training, lambda now: run.save(
                    {**state, "key": now.job.key(), "current": now.state_dict()},
                    f"{now.job.key()}, epoch {now.epoch}"))
            except common.UserError as error:  # a rate that diverges is a result of the search
                if job.stage != "val" or error.code != 3:
                    raise
                found = {"accuracy": 0.0, "losses": training.losses, "counts": training.counts,
                         "moves": training.moves}
            state["done"][job.key()] = {**found, "truth": task.truth}
            state["current"] = state["key"] = None
            run.save(state, job.key())
            run.say(f"{job.key()}: {found['accuracy']:.2f}%, "
                    f"{time.process_time() - began:.0f} CPU-s")
        report(args, run, state["done"])


def correlation(counts, truth):
    """Pearson correlation of the prompts per block with the truth; None where it is not defined."""
    if truth is None or len(set(counts)) < 2 or len(set(truth)) < 2:
        return None
    return float(np.corrcoef(counts, truth)[0, 1])


def report(args, run, done):
    """Tables, figure, result.json and the RESULT line."""
    finals, rows = {}, []
    for key, found in done.items():
        dataset, method, stage, _ = key.rsplit("/", 3)
        if stage == "test":
            finals.setdefault((dataset, method), []).append(found)
    means = {pair: statistics.mean(f["accuracy"] for f in runs) for pair, runs in finals.items()}
    for (dataset, method), runs in finals.items():
        last = runs[-1]
        spread = statistics.stdev(f["accuracy"] for f in runs) if len(runs) > 1 else None
        rows.append([LABELS.get(method, method), *([dataset] if args.suite else []),
                     means[dataset, method], spread, "-".join(map(str, last["counts"][-1])),
                     correlation(last["counts"][-1], last["truth"])])
    run.table(["method", *(["data"] if args.suite else []), "accuracy %", "std",
               "prompts per block", "correlation"], rows)
    if args.suite:
        suite_table(run, means)
    shown = [pair for pair in finals if pair[1] == "pro-vpt"] or list(finals)
    dataset, method = shown[0]
    if run.rank == 0:
        if args.model == "tiny":
            print("correlation: of the prompts per block at the end with the planted truth "
                  f"{args.truth.replace(',', '-')}. adaptive is ours, not the paper's.\n")
        draw_figure(args, {m: runs for (d, m), runs in finals.items() if d == dataset}, dataset,
                    run.out_dir / "figure.png")
    run.finish({"dataset": args.suite or args.dataset, "seed": args.seed, "results": done},
               script="pro_vpt", dataset=args.suite or args.dataset, method=method, seed=args.seed,
               accuracy=means[dataset, method],
               prompts="-".join(map(str, finals[dataset, method][-1]["counts"][-1])),
               out=run.out_dir)


def suite_table(run, means):
    """Means of VTAB-1k's groups, and of the three (not of the 19 tasks), beside the paper's."""
    rows = []
    for method in dict.fromkeys(m for _, m in means):
        groups = [statistics.mean(means[f"vtab-{t}", method] for t in tasks)
                  for tasks in data.VTAB_GROUPS.values()]
        rows.append([LABELS.get(method, method), *groups, statistics.mean(groups)])
    rows += [[f"paper: {name}", *map(float, row)] for name, row in PAPER_VTAB.items()]
    run.table(["\nVTAB-1k", "Natural", "Specialized", "Structured", "mean"], rows)
    if run.rank == 0:
        print("The common VTAB-1k folders hold lossy JPEG files; scores differ from TFDS's (CIFAR: "
              "about 70\nagainst 80). The paper's rows: ViT-B/16 in21k, in one training of its "
              "own; never compare\nthem with the older common table (Full 75.9 83.4 47.6).\n")


def draw_figure(args, found, dataset, path):
    """Left: prompts per block over epochs of one method, the truth beside it. Right: accuracies."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    moving = [m for m in ("pro-vpt", "adaptive") if m in found] or list(found)[-1:]
    truth = found[moving[0]][-1]["truth"]
    widths = [3] * len(moving) + ([.35] if truth else []) + [2.6]
    figure, axes = plt.subplots(1, len(widths), figsize=(3.6 * len(moving) + 5, 3.8),
                                width_ratios=widths, layout="constrained")
    counts = {m: np.array(found[m][-1]["counts"]).T for m in moving}  # (L, epochs + 1)
    top = max(max(c.max() for c in counts.values()), max(truth or [1]), 1)
    for axis, (method, c) in zip(axes, counts.items(), strict=False):
        image = axis.imshow(c, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axis.set(title=LABELS.get(method, method), xlabel="epoch", yticks=range(len(c)))
    axes[0].set_ylabel("block")
    if truth:
        axes[-2].imshow(np.array(truth)[:, None], aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes[-2].set(title="truth", xticks=[], yticks=range(len(truth)))
    figure.colorbar(image, ax=list(axes[:-1]), label="prompts", shrink=.9)
    names = [LABELS.get(m, m) for m in found]
    height = [statistics.mean(f["accuracy"] for f in runs) for runs in found.values()]
    # Okabe and Ito's colours, safe for the colour-blind: ours orange, the paper's blue
    colours = {"pro-vpt": "#0072B2", "adaptive": "#D55E00"}
    bars = axes[-1].barh(names, height, color=[colours.get(m, "#999999") for m in found])
    axes[-1].bar_label(bars, fmt="%.1f", padding=3)
    axes[-1].invert_yaxis()
    axes[-1].spines[["top", "right"]].set_visible(False)
    axes[-1].set(xlabel="accuracy (%)", xlim=(0, min(max(*height, 1) * 1.25, 118)))
    figure.suptitle(f"PRO-VPT on {dataset.rpartition(':')[2].rpartition('/')[2]}, seed {args.seed}")
    common.atomic_write(path, lambda p: figure.savefig(p, dpi=130))
    plt.close(figure)


if __name__ == "__main__":
    common.run_cli(main)
