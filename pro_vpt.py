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
    python pro_vpt.py --dataset folder:PATH --model DIR    your own pictures, any plain ViT

Paper map (the numbering is ours, in the order of the paper's method section)
    Eq. E1  nested objective   D* = argmin_D L(P*, D): relocation
                               P* = argmin_P L(P, D*): train_epoch
    Eq. E2  idleness           idleness_scores, in score_pass
    Eq. E3  policy             allocator_state, PPOAllocator (or ThompsonAllocator)
    Eq. E4  reward             reward, in relocation
    Eq. E5  relocation         relocate
    The algorithm box          train: one epoch is relocation (outer), then train_epoch (inner)

Symbols
    P        prompts                     (N, D)      all prompts, rows of one tensor
    D        block, counts               (N,), L     block of every prompt; prompts per block
    I_k      idleness_scores             (N,)        fall of the loss without prompt k
    s        allocator_state             (3L,)
    r        reward                      number
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
    2  A prompt that was just moved has most of the squared gradient at the next two steps (78 ± 12
       and 84 ± 8% in the small world), so that the joint clip slows everything else; at the third
       step it has 35 ± 3%, from the fifth on 4% or less. At the next scoring pass its |I| is 2.9 ±
       1.0 times the median, and it moves again at once in 10 ± 7% of cases (one of 72 prompts by
       chance: 1.4%). benchmarks/pro_vpt_moved.py, 5 seeds.
    3  PPO normalises two returns, and two normalised numbers are ±.7071: of each two rewards it
       sees the sign of the first only, and the second move's return has the other sign, whatever
       it earned. How large a reward is does not matter.
    4  The authors' reward subtracts the next candidate's idleness, not the moved prompt's; their
       scores are clipped by a norm that the head dominates; "freezing" for the scoring pass sets
       flags that nothing reads (dropout stays on); their C = Σ batch mean / batch size is not the
       mean loss. --recipe official does all of it. A moved prompt keeps its momentum (in both
       recipes). (Their I is the gradient of gates of 1 that multiply the prompts; under torch < 2
       weight decay also shrank these gates, which is not reproduced.)
    5  In the small world the size of the score says how much a prompt matters, its sign hardly
       whether it helps. On trained models it is above 0, "better without", for 45 ± 7% of prompts,
       the measured loss for 30 ± 9%; and the idlest by it stands where prompts are needed in 56% of
       cases (a third of the prompts do; by the measured loss 20%). benchmarks/pro_vpt_claims.py.
       On a real ViT the sign is right: Spearman .84 ± .05 with the measured loss before training,
       .51 ± .17 after, and 0 for the size. benchmarks/pro_vpt_vit.py, 3 seeds.
    beyond/pro_vpt_adaptive.py holds what we made of this: other scores, measured usefulness.

Cost
    A scoring pass and a training pass per epoch, forwards and backwards through frozen weights
    each. Left out because the result cannot change: what a block makes of the prompts (a prompt is
    a key and a value), all but the class token in the last block, embedding fixed pictures again,
    scoring during the warm-up, test evaluations that nobody asked for.
    benchmarks/pro_vpt_epoch.py measures it.

Results
    Relocation does not beat uniform prompts here. Small world, 5 seeds x 5 planted distributions:
    45.5 ± 4.6%, uniform 48.3 ± 4.9 (-2.86, p .0001), random relocation 46.6 ± 4.8: finding 5. A
    real ViT-S/14, CIFAR-10 photographs, 3 seeds: 54.2 ± 4.9, uniform 54.5 ± 2.0 (-.27, p .94),
    random relocation 50.4 ± 1.9. Every method had the best of the same rates and heads.
    VTAB-1k (paper: PRO-VPT 78.0, VPT-deep 76.4): not run, no weights on our machine. An epoch at
    ViT-B/16 size is 1.8 times as fast as in the authors' arrangement.

Where we depart (the marks can be searched for)
    DEVIATION 1   the reward uses the mean loss (--recipe official: the authors' C, finding 4).
    DEVIATION 2   the scores' gradients are not clipped (official: they are).
    DEVIATION 3   no dropout while scoring (official: --dropout stays on).
    DEVIATION 4   every LayerNorm gets --eps, whatever the checkpoint's configuration says.
    DEVIATION 5   the small world draws its head as nn.Linear does: with 6 classes the authors'
                  weights have a std of .58, and on the tuning seeds uniform prompts reach 35% from
                  them, 49% from nn.Linear's (--head-init vpt: the authors').
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
import itertools
import math
import re
import shutil
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data

# --method -> its name in tables. Those after the first three differ only in how many prompts a
# block has, and in what moves them between epochs.
LABELS = {"linear": "linear probe", "full": "full tuning", "vpt-shallow": "VPT-shallow",
          "vpt-deep": "VPT-deep (uniform)", "planted": "planted truth",
          "random-relocation": "random relocation", "prune-only": "pruning only",
          "pro-vpt": "PRO-VPT"}

# Defaults: the paper's setting, and that of the small world (lr and head chosen on seeds 100-104).
PAPER = {"model": "google/vit-base-patch16-224-in21k", "method": "pro-vpt", "prompts": 20,
         "head_init": "vpt", "dropout": .1, "epochs": 100, "lr": 2.5}
# DEVIATION 5: the head's first draw
SMALL = {"model": "tiny", "method": "linear,vpt-deep,planted,random-relocation,pro-vpt",
         "prompts": 12, "head_init": "linear", "dropout": 0.0, "epochs": 30, "lr": .3, "threads": 1}
SEARCH_SEEDS = [18, 25, 42]
BETWEEN_METHODS = r",(?![\d\s])"  # not the commas of fixed:n,n,..
PAPER_VTAB = {"Full": (78.6, 86.3, 57.8, 74.2), "LoRA": (82.4, 84.3, 60.1, 75.6),
              "VPT-Deep": (82.5, 84.6, 62.1, 76.4), "Adapter": (83.3, 86.2, 63.3, 77.6),
              "PRO-VPT": (83.3, 86.2, 64.5, 78.0)}

# ================================================================================================
# Model: a frozen ViT with prompts before its blocks
# ================================================================================================


def prompted_block(layer, x, normed=None, class_only=False):
    """One pre-LN block on tokens x (B, T, D) that also attends to prompts -> (B, T, D).

    layer: a transformers ViTLayer. normed: the prompts as its first LayerNorm leaves them, LN(p),
    (n, D) or (B, n, D). class_only: for the last block -> (B, 1, D).
    Fits: pre-LN blocks without layer scale or relative positions, any dtype and device; dropout
    inside the block is left out.
    """
    attention = layer.attention

    def heads(t):  # (B, T, D) -> (B, heads, T, D / heads)
        return t.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    # VPT-deep puts the prompts among the tokens of a block and throws away what the block makes of
    # them; the next block brings its own. So the tokens look at the prompts and nothing else comes
    # of these: a prompt is a key and a value. The same as, in full,
    #     mixed = torch.cat([x, p.expand(len(x), -1, -1)], 1)  # p (n, D) before LN
    #     return layer(mixed)[:, :x.shape[1]]
    # without the prompts' queries, projections and MLP. Where in the row they stand is all the same
    # to attention, as VPT gives prompts no position.
    h = layer.layernorm_before(x)  # (B, T, D)
    seen = h
    if normed is not None:
        seen = torch.cat([h, normed.expand(len(x), -1, -1)], 1)  # (B, T + n, D)
    # After the last block only the class token is read: the same as taking [:, :1] of the result.
    if class_only:
        x, h = x[:, :1], h[:, :1]  # (B, 1, D)
    mixed = F.scaled_dot_product_attention(
        heads(attention.q_proj(h)), heads(attention.k_proj(seen)), heads(attention.v_proj(seen)))
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.layernorm_after(x))


class PromptedViT(nn.Module):
    """Visual prompt tuning with any number of prompts per block, and a linear head.

    vit: a transformers.ViTModel (5.17 or newer), which is frozen; counts: L numbers >= 0, prompts
    per block. All N prompts are rows of one tensor, `prompts` (N, D), and the buffer `block` (N,)
    says where each stands: to move a prompt is to change one number. -1: the prompt is removed.
    shallow: the prompts join the tokens before block 0 and stay (VPT-shallow). head_init: "vpt", as
    the authors draw it, or "linear", nn.Linear's own draw, many times smaller.

    forward(pixels (B, 3, H, W), or tokens (B, 1 + T, D) from `embed`) -> logits (B, C).
    Fits: pre-LN ViTs read at their class token, with the blocks of transformers' ViTModel (DeiT and
    ViTMSN have them), any dtype and device; dropout inside the blocks is left out. BEiT and I-JEPA
    are refused (ValueError). A state_dict holds the whole ViT: send or save what trainable() names,
    and `block`.
    """

    def __init__(self, vit, num_classes, counts, shallow=False, head_init="vpt"):
        super().__init__()
        # A weight that prompted_block does not know of would be left out without a word.
        if not hasattr(vit, "layers") or not hasattr(vit.embeddings, "cls_token"):
            raise ValueError("PromptedViT: expected a transformers.ViTModel, or what has layers, "
                             f"layernorm and embeddings with a cls_token; got {type(vit)}")
        known = (*(f"attention.{w}_proj." for w in "qkvo"), "layernorm_before.", "layernorm_after.",
                 "mlp.")
        for name, _ in vit.layers[0].named_parameters():
            if not name.startswith(known):
                raise ValueError(f"PromptedViT: {name} of a block is not in a ViTModel's blocks")
        self.vit, self.shallow = vit.requires_grad_(False).eval(), shallow
        width, patch = vit.config.hidden_size, vit.config.patch_size
        area = patch ** 2 if isinstance(patch, int) else math.prod(patch)
        # VPT draws prompts as Xavier would draw the patch embedding: U(±√(6 / (3 · patch² + D)))
        self.bound = math.sqrt(6 / (3 * area + width))
        prompts = torch.empty(sum(counts), width).uniform_(-self.bound, self.bound)
        self.prompts, self.head = nn.Parameter(prompts), nn.Linear(width, num_classes)
        # VPT's head is wide, N(0, 2 / C). Its bias, σ(-4.595) = .01, is from heads with a sigmoid
        # for each class; softmax does not see what all classes share. nn.Linear's draw is 7 to 48
        # times smaller, and changes what the small world shows.
        if head_init == "vpt":
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.constant_(self.head.bias, -4.595)
        # A buffer, so that a state_dict knows where its prompts stand
        block = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.register_buffer("block", block)
        self.to(vit.layernorm.weight)  # its device and dtype
        self.known = None, 0, []  # what `rows` was read from

    def place(self, block):
        """Set the block of every prompt: (N,) ints in -1..L-1. Writing to `block` does as well."""
        self.block = block.to(self.prompts.device, copy=True)

    @property
    def rows(self):
        """Where the prompts of each block stand in `prompts`: L tensors of ints."""
        # A move changes nothing but these lists: parameter, momentum and the optimiser that holds
        # them stay what they are. The same as a list of prompts for each block, of which a move
        # takes one out and appends it to another.
        block, version, rows = self.known
        # Read anew after a change only: finding the rows would make a GPU wait in every block.
        # Every write in place (a move, load_state_dict) raises a tensor's version.
        if block is not self.block or version != self.block._version:
            rows = [torch.nonzero(self.block == b)[:, 0] for b in range(len(self.vit.layers))]
            self.known = self.block, self.block._version, rows
        return rows

    def counts(self):
        """Prompts per block: L ints."""
        return [len(rows) for rows in self.rows]

    def trainable(self):
        """Name -> parameter of everything that learns; the prompts come first."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad and p.numel()}

    def embed(self, pixels):
        """(B, 3, H, W) -> tokens (B, 1 + T, D): class token and patches with their positions."""
        return self.vit.embeddings(pixels.to(self.prompts.dtype))

    def normalised(self, b, prompts):
        """LN(p) of the prompts that stand before block b: (n, D) or (B, n, D); None without any."""
        rows = self.rows[b]
        if self.shallow or not len(rows):
            return None
        # All that the block sees of a prompt. LN(c · p) = LN(p) but for LN's ε: finding 1.
        return self.vit.layers[b].layernorm_before(prompts[..., rows, :])

    def features(self, tokens, noise=None):
        """The class token (B, D) after the final LN. noise (B, N, D): dropout on the prompts."""
        prompts = self.prompts if noise is None else self.prompts * noise  # (N, D) or (B, N, D)
        x, last = tokens, len(self.vit.layers) - 1
        # VPT-shallow: the prompts enter once, and the blocks carry them along like patches
        if self.shallow:
            x = torch.cat([x, prompts.expand(len(x), -1, -1)], 1)  # (B, 1 + T + N, D)
        for b, layer in enumerate(self.vit.layers):
            x = prompted_block(layer, x, self.normalised(b, prompts), class_only=b == last)
        return self.vit.layernorm(x[:, 0])

    def forward(self, x, noise=None):
        tokens = self.embed(x) if x.dim() == 4 else x  # (B, 1 + T, D)
        return self.head(self.features(tokens, noise))  # (B, C)


# ================================================================================================
# Method: pure functions and small classes, to be copied
# ================================================================================================


def idleness_scores(prompts, gradients):
    """How much the loss would fall, to first order, without each prompt; larger = idler.

    prompts (N, D), gradients ∂L/∂prompts (N, D) -> (N,), without clipping, dropout or scaling.
    Behind a LayerNorm the length of a prompt changes nothing but for LayerNorm's ε, so all of the
    score is ε / (var(p) + ε): set ε to 1e-6 in every LayerNorm. At 1e-12, the default of
    transformers' ViTConfig, float32 gives rounding noise, and half precision does at any ε.
    Fits: float32 and float64, any device; prompts that are read through LayerNorm.
    """
    # The paper asks what the loss would be if prompt k were taken out,
    #     I_k = L(with p_k) - L(without p_k),
    # and answers to first order around the prompt that is there: removing p_k is a step of -p_k,
    # along which the loss changes by -g_kᵀ p_k. (At its end stands LN(0), LN's bias, which is still
    # a key and a value: not quite a prompt that is gone.) One backward pass scores all of them. The
    # authors read the same number from a gate of 1 that multiplies a prompt: ∂L/∂gate_k = g_kᵀ p_k
    # Eq. (E2): I_k ≈ g_kᵀ p_k, g_k = ∂L/∂p_k
    return (prompts * gradients).sum(-1)


def relocate(prompts, block, k, target, scale=1e-3):
    """Take prompt k out of its block and put it, scaled down, into block `target`, in place.

    prompts (N, D), block (N,) ints: a PromptedViT's own, and the prompt has moved. Into its own
    block: nothing happens. An optimiser's momentum for row k stays as it was.
    Fits: any floating dtype and device.
    """
    if block[k] == target:
        return
    # What the prompt learned, it learned in another block. It arrives small, so as not to disturb
    # the new one. After LN it is small only as far as ε makes it so (finding 1), and its gradient
    # grows as its length shrinks, until ε bounds it (finding 2).
    with torch.no_grad():
        # Eq. (E5): P_target <- P_target ∪ {10⁻³ p_k}
        prompts[k] *= scale
    block[k] = target


def allocator_state(scores, block, source, num_blocks):
    """What an allocator sees: (3L,) = z-scored block sums of idleness, shares, one-hot source.

    scores (N,), block (N,) in -1..L-1, source: the block whose prompt is in the hand (not counted
    among those that remain).
    Fits: any dtype and device; the state is float32 on the CPU, where the policy is.
    """
    scores, block = scores.cpu(), block.cpu()
    placed = block >= 0
    # how idle each block is as a whole, the prompt in the hand still included
    sums = torch.zeros(num_blocks)
    sums.index_add_(0, block[placed], scores[placed].to(sums.dtype))  # (L,)
    # how crowded each block is, now without that prompt
    counts = torch.bincount(block[placed], minlength=num_blocks).to(sums.dtype)  # (L,)
    counts[source] -= 1
    # Eq. (E3): s = [z(Σ_k I_k), n / (N - 1), 1_source]
    # The scores are tiny numbers (finding 1). z is all that the policy gets to see of them: which
    # blocks are idler than others, not how idle any of them is.
    z = (sums - sums.mean()) / (sums.std(correction=0) + 1e-8)
    others = (placed.sum() - 1).clamp(min=1)  # N - 1
    return torch.cat([z, counts / others, F.one_hot(torch.tensor(source), num_blocks)])


def reward(before, after, moved, candidate=None):
    """What a move is worth to the policy that chose its target. Four numbers -> number.

    before, after: the loss at the scoring passes before the move and one epoch of tuning later;
    moved: idleness of the prompt that moved; candidate: of the one to move next, which the authors'
    code subtracts instead, and which is not used here.
    """
    # Taking an idle prompt out of its old block lowers the loss already, by I_k. The policy chose
    # only where it went, so that this part is not credited to it.
    # UNSPECIFIED 1: I_k is that of the prompt that moved, of when it was chosen
    # Eq. (E4): r = L_before - L_after - I_k
    return before - after - moved


class PPOAllocator:
    """PRO-VPT's policy over target blocks, trained by proximal policy optimisation.

    choose(state (3L,), generator) -> a block; learn(reward) ends what choose began. After every
    `every` rewards: `updates` Adam steps. Sizes and rates are those of the authors' code. With
    every = 2 the normalised returns are ±.7071, so only the sign of the first reward counts.
    Fits: float32 on the CPU, in one process: under DDP, choose on rank 0 and broadcast.
    """

    def __init__(self, num_blocks, width=64, lr_actor=3e-4, lr_critic=1e-3, clip=.2, updates=60,
                 every=2, value_weight=.5, entropy_weight=.01):
        def mlp(out):
            return nn.Sequential(nn.Linear(3 * num_blocks, width), nn.Tanh(),
                                 nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))

        # actor: state -> π(block | state). critic: state -> V, what the actor usually earns there.
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
        # its reward is known an epoch later; log π and V are kept as they were at the choice
        self.memory.append([state, action, log_p[action].item(), self.critic(state).item()])
        return action

    def learn(self, reward):
        # An episode is `every` moves. Until it is full, nothing is learnt.
        self.memory[-1].append(float(reward))
        if len(self.memory) < self.every:
            return
        states, actions, old_log_p, old_values, rewards = zip(*self.memory, strict=True)
        states, actions = torch.stack(states), torch.tensor(actions)  # (every, 3L), (every,)
        old_log_p, old_values = torch.tensor(old_log_p), torch.tensor(old_values)  # (every,)
        # R_t = Σ_{u >= t} r_u, what was earned from move t on (γ = 1), over the moves in memory,
        # then z-scored. Finding 3: of two returns this leaves ±.7071 whatever the rewards were, so
        # that with every = 2 only the sign of the first reward is seen.
        returns = torch.tensor(rewards).flip(0).cumsum(0).flip(0)
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        # UNSPECIFIED 2: A_t = R_t - V_old(s_t), how much better than the critic thought
        advantage = returns - old_values
        for _ in range(self.updates):
            log_p = self.actor(states).log_softmax(-1)  # (every, L)
            # ρ_t = π(a_t | s_t) / π_old(a_t | s_t): how much likelier the move has become by now
            ratio = (log_p.gather(1, actions[:, None])[:, 0] - old_log_p).exp()
            # PPO's gain, min(ρ A, clip(ρ, 1 - .2, 1 + .2) A): likelier where A > 0, less likely
            # where A < 0, but no reward for going further than a fifth from the old policy, since
            # what the move earned was measured under that one
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            # the critic learns R by least squares; entropy keeps the policy from settling too soon
            error = (self.critic(states)[:, 0] - returns).square()
            entropy = -(log_p.exp() * log_p).sum(-1)  # H = -Σ_b π_b log π_b
            # loss = mean over moves of .5 (V - R)² - gain - .01 H
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
    """The authors' other policy: a Beta(wins + 1, losses + 1) belief per block, no state.

    One draw from each belief; the block with the largest is chosen. A move whose reward is not
    negative is a win. choose and learn as PPOAllocator.
    Fits: the CPU, in one process.
    """

    def __init__(self, num_blocks):
        self.wins, self.losses, self.last = [0] * num_blocks, [0] * num_blocks, None

    def choose(self, state, generator=None):
        # torch's Beta takes no generator of one's own, and every draw here has one. With whole
        # numbers a, b the a-th smallest of a + b - 1 uniform draws is Beta(a, b). The same law as
        #     torch.distributions.Beta(w + 1, l + 1).sample()
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


# ================================================================================================
# Train and evaluate
# ================================================================================================


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
    """One job under way: model, optimiser, allocator, and what a checkpoint must hold.

    memory: what a relocation wants to know again in a later epoch, by name (numbers, lists,
    tensors). parts: see PARTS.
    """

    def __init__(self, task, run, args, job, parts=None):
        self.task, self.run, self.args, self.job = task, run, args, job
        self.parts, self.recipe = parts or PARTS, RECIPES[args.recipe]
        counts = distribution(job.method, args, task)
        common.seed_torch(job.seed, "init")  # every method draws the same head and prompts
        self.model = self.parts["model"](task.vit, task.num_classes, counts,
                                         job.method == "vpt-shallow", args.head_init)
        if job.method == "full":  # a copy of its own: the other methods share the frozen one
            self.model.vit = copy.deepcopy(task.vit).requires_grad_(True)
        self.params = self.model.trainable()
        # UNSPECIFIED 6: the rate stays what it is; the authors' run script for CIFAR says so
        self.optimizer = torch.optim.SGD(self.params.values(), job.lr, args.momentum,
                                         weight_decay=job.weight_decay)
        self.allocator = None
        if job.method == "pro-vpt":
            common.seed_torch(job.seed, "init", "allocator")
            self.allocator = self.parts["allocators"][args.allocator](len(counts))
        self.epoch, self.memory = 0, {}
        self.losses, self.counts, self.moves = [], [self.model.counts()], []

    PLAIN = ("epoch", "memory", "losses", "counts", "moves")

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

    def generator(self, *purpose):
        """A fresh generator for one purpose in this epoch: nothing of it has to be stored."""
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
    # UNSPECIFIED 4: as many prompts as the others have, all before the first block
    if method == "vpt-shallow":
        return [args.prompts * blocks] + [0] * (blocks - 1)
    return [0 if method in ("linear", "full") else args.prompts] * blocks


# ---- The algorithm box -------------------------------------------------------------------------


def train(training, save):
    """All epochs of a job, from where it stands; save(training) after each -> dict of results."""
    args, run, job = training.args, training.run, training.job
    relocate_prompts = training.parts["relocations"].get(job.method)
    epochs = range(training.epoch, args.epochs)
    for _ in run.progress(epochs, job.key(), initial=epochs.start, total=args.epochs):
        # The paper's two problems are nested: the best distribution D is the one whose best prompts
        # lose least. Neither is solved to the end. They take turns, one move and one pass of tuning
        # an epoch, and the tuning after a move is also how the move is judged.
        # Eq. (E1): D* = argmin_D L(P*, D)
        if relocate_prompts:
            relocate_prompts(training)
        # Eq. (E1): P* = argmin_P L(P, D*)
        training.losses.append(train_epoch(training))
        training.epoch += 1
        training.counts.append(training.model.counts())
        row = {"job": job.key(), "epoch": training.epoch, "loss": training.losses[-1]}
        # the authors evaluate after every epoch, which costs time and changes nothing
        asked = args.eval_every and training.epoch % args.eval_every == 0
        if training.epoch == args.epochs or asked:
            row["accuracy"] = evaluate(training)
        run.log(**row, prompts="-".join(map(str, training.counts[-1])))
        save(training)
    return {"accuracy": row["accuracy"] if len(epochs) else evaluate(training),
            "losses": training.losses, "counts": training.counts, "moves": training.moves}


def train_epoch(training):
    """The inner problem: one pass of SGD on prompts and head -> mean loss."""
    args, params = training.args, list(training.params.values())
    watch, losses = training.parts["watch"], []
    for loss, grads, size in gradients(training, params, "train", args.dropout):
        if watch:
            watch(training, loss, grads, size)  # before the clip, which works in place
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        # One norm over head and all prompts, as the authors clip. A prompt that has just moved
        # fills it, and for a step or two hardly anything else learns: finding 2.
        if args.clip:
            torch.nn.utils.clip_grad_norm_(params, args.clip)
        # All rows of `prompts` have their momentum in one tensor: what has moved keeps its own, as
        # in the authors' code.
        training.optimizer.step()
        losses.append((loss.item(), size))
    return common.check_finite(mean_loss(losses), f"{training.job.key()}: the loss of epoch "
                                                  f"{training.epoch + 1}")


# ---- The outer problem: what moves prompts between two epochs ----------------------------------


def relocation(training, score=None, move=relocate, least=0.0):
    """PRO-VPT's part of an epoch: score, reward the last move, make the next one.

    score: function(training) -> scores (N,), loss; the recipe's own unless given. move: as
    relocate; least: a prompt must score above it to be moved.
    """
    args, model, memory = training.args, training.model, training.memory
    # Where untrained prompts stand says nothing yet: the first --warmup epochs only tune.
    if training.epoch < args.warmup:
        return
    # Step 1. One pass over the training images in which nothing is updated: the idleness of every
    # prompt and the loss that the last epoch of tuning has led to.
    scores, loss = (score or training.recipe["score"])(training)  # (N,), number
    k = scores.argmax().item()  # the idlest, wherever it stands
    # Step 2. The loss is also the answer to the last move. Its prompt has been tuned for an epoch
    # in its new block, so that now the policy can be told what its choice was worth.
    if "pending" in memory:
        before, moved = memory.pop("pending")
        training.allocator.learn(
            training.recipe["reward"](before, loss, moved, scores[k].item()))
    # Step 3. Prune only where that lowers the loss. If every prompt is of use, none moves.
    if scores[k] <= least:
        return
    # Step 4. The policy sees how idle and how crowded the blocks are and which of them gives a
    # prompt away, and draws the block that gets it. It may be the same one: then nothing moves, but
    # there is a reward all the same.
    block = model.block.clone()
    state = allocator_state(scores, block, block[k].item(), len(model.rows))  # (3L,)
    target = training.allocator.choose(state, training.generator("allocator"))
    memory["pending"] = [loss, scores[k].item()]
    move(model.prompts, block, k, target)
    training.moves.append([training.epoch, k, target])
    model.place(block)


def random_relocation(training, move=relocate):
    """The paper's ablation of score and policy: any prompt goes to any block, one an epoch."""
    model = training.model
    if training.epoch < training.args.warmup:
        return
    # UNSPECIFIED 3: prompt and target are drawn evenly
    block, generator = model.block.clone(), training.generator("allocator")
    k = torch.randint(len(block), (), generator=generator).item()
    target = torch.randint(len(model.rows), (), generator=generator).item()
    move(model.prompts, block, k, target)
    training.moves.append([training.epoch, k, target])
    model.place(block)


def pruning(training, score=None, least=0.0):
    """The paper's ablation of the second half: the idlest prompt goes, and comes back nowhere."""
    model = training.model
    if training.epoch < training.args.warmup:
        return
    scores, _ = (score or training.recipe["score"])(training)
    block = model.block.to("cpu", copy=True)
    scores = scores.masked_fill(block < 0, -math.inf)  # those that are gone have no say
    k = scores.argmax().item()
    # UNSPECIFIED 3: the last prompt of all stays
    if scores[k] > least and (block >= 0).sum() > 1:
        block[k] = -1
        training.moves.append([training.epoch, k, -1])
        model.place(block)


# ---- Passes over the training images -----------------------------------------------------------


def score_pass(training, rows=None, score=idleness_scores):
    """Step 1: idleness of every prompt (N,) and the loss, over a pass without updates (E2).

    rows, score: for scores that are not the paper's; score(rows (N, ·), their gradient) -> (N,).
    """
    rows = training.model.prompts if rows is None else rows
    total, losses = 0, []
    # Nothing is updated, and nothing is random but the order of the images (and their crops, where
    # there is augmentation): I_k asks what a prompt does in the network that will be used,
    # which has no dropout.
    for loss, (gradient,), size in gradients(training, [rows], "score"):
        total = total + score(rows.detach(), gradient).cpu()  # (N,)
        losses.append((loss.item(), size))
    # g_kᵀ p_k is linear in g, so this is the score of the whole set, but that the last, smaller
    # batch weighs as much as the others (as in the authors' code)
    return total / len(losses), mean_loss(losses)


def mean_loss(losses):
    """The mean loss per image of a pass: pairs (mean loss of a batch, its size) -> number."""
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def gradients(training, wanted, purpose, dropout=0.0):
    """One shuffled pass: yield (loss, [its gradient for each of `wanted`], size) of each batch."""
    for tokens, labels, noise, size in my_batches(training, purpose, dropout):
        logits = training.model(tokens, noise)  # (B, C)
        # L = 1/B Σ CE over the whole batch, of which other processes may hold a part
        loss = F.cross_entropy(logits, labels, reduction="sum") / size
        grads = torch.autograd.grad(loss, wanted)
        yield (*over_processes(training.run, loss.detach(), grads), size)


def my_batches(training, purpose, dropout):
    """This process's share of a shuffled pass: yield (tokens, labels, noise, size of the batch).

    All that is random is drawn for whole batches and then cut, so that the numbers do not depend on
    how many processes there are. noise (B, N, D) or None: a factor on the prompts.
    """
    part, model, run = training.task.train, training.model, training.run
    n, generator = len(part.labels), training.generator("batches", purpose)
    lists = torch.randperm(n, generator=generator).split(training.args.batch)
    # A last batch smaller than the number of processes leaves some of them without an image. They
    # take one whose label is then set to one that cross-entropy passes over.
    idle = [run.rank >= len(whole) for whole in lists]
    mine = [slice(1) if none else slice(run.rank, None, run.world) for none in idle]
    indices = [whole[cut] for whole, cut in zip(lists, mine, strict=True)]
    # one seed an image, for its random crop and flip in this epoch
    seeds = None
    if training.task.augment:
        seeds = torch.randint(2 ** 31, (n,), generator=generator)
        seeds = [seeds[here].tolist() for here in indices]
    drops = common.torch_generator(training.job.seed, "dropout", purpose, training.epoch,
                                   device=run.device)
    # Images that nobody augments were embedded before the first epoch. The same as reading pixels
    # here and embedding them again, unless the embedding learns too.
    inputs = part.batches(indices, seeds, pixels=training.job.method == "full")
    for x, whole, here, cut, none in zip(inputs, lists, indices, mine, idle, strict=True):
        tokens = x if x.dim() == 3 else model.embed(x)  # (B, 1 + T, D)
        labels, noise = part.labels[here], None  # (B,)
        if none:
            labels = torch.full_like(labels, -100)
        # dropout on the prompts: of every number of every prompt, anew for every image
        if dropout and len(model.prompts):
            keep = torch.rand(len(whole), *model.prompts.shape, generator=drops, device=run.device)
            noise = (keep[cut] >= dropout) / (1 - dropout)  # (B, N, D)
        yield tokens, labels, noise, len(whole)


def over_processes(run, loss, grads):
    """The sum over all processes of a loss and of each of its gradients."""
    if run.world == 1:
        return loss, grads
    # one message instead of one a tensor
    flat = torch.cat([loss[None], *(g.flatten() for g in grads)])
    torch.distributed.all_reduce(flat)
    loss, *parts = flat.split([1, *(g.numel() for g in grads)])
    return loss[0], [part.view_as(g) for part, g in zip(parts, grads, strict=True)]


@torch.no_grad()
def evaluate(training):
    """Percent right on the test part (on the validation part in a search)."""
    part, run, model = training.task.test, training.run, training.model
    chunks = torch.arange(len(part.labels)).split(128)
    mine = run.share(range(len(chunks)))
    inputs = part.batches([chunks[i] for i in mine], pixels=training.job.method == "full")
    hits = {}
    for i, x in zip(mine, inputs, strict=True):
        guess = model(x if x.dim() == 3 else model.embed(x)).argmax(-1)  # (B,)
        hits[i] = (guess == part.labels[chunks[i]]).sum().item()
    return 100 * sum(run.gather(hits).values()) / len(part.labels)


# ---- What the authors' code does instead (--recipe official; finding 4) ------------------------


def official_score_pass(training, rows=None, score=idleness_scores):
    """score_pass as the authors' trainer runs it: with dropout, clipped scores and their C."""
    args, model = training.args, training.model
    rows = model.prompts if rows is None else rows
    wanted, total, losses = [rows, model.head.weight, model.head.bias], 0, []
    # DEVIATION 3: their "freezing" sets flags that nothing reads, so that dropout stays on
    for loss, (gradient, *head), size in gradients(training, wanted, "score", args.dropout):
        batch = score(rows.detach(), gradient)  # (N,)
        # DEVIATION 2: their scores, as gradients of gates, share a clip with the head, which makes
        # up nearly all of the norm. All scores of a batch shrink by one factor: their order within
        # it stays, but batches with a large head gradient count for less.
        if args.clip:
            norm = torch.cat([batch, *(g.flatten() for g in head)]).norm()
            batch = batch * (args.clip / (norm + 1e-6)).clamp(max=1)
        total = total + batch.cpu()
        losses.append((loss.item(), size))
    return total / len(losses), official_cost(losses)


def official_cost(losses):
    """Their C: a sum of batch means, each over its size; pairs as for mean_loss -> number."""
    # DEVIATION 1: for 1,000 images in batches of 64 it is .26 times the mean loss, so that in the
    # reward the idleness, which is not scaled, weighs four times as much; and an image of a small
    # last batch counts for more than others.
    return sum(loss / size for loss, size in losses)


def official_reward(before, after, moved, candidate):
    """Their E4 subtracts the idleness of the next candidate, as found in this pass."""
    return before - after - candidate


RECIPES = {
    "paper": {"score": score_pass, "cost": mean_loss, "reward": reward},
    "official": {"score": official_score_pass, "cost": official_cost, "reward": official_reward},
}

# What a script of beyond/ may replace; these are the paper's.
PARTS = {
    "labels": LABELS,
    "model": PromptedViT,
    # --method -> function(training), called before every epoch
    "relocations": {"random-relocation": random_relocation, "prune-only": pruning,
                    "pro-vpt": relocation},
    "allocators": {"ppo": PPOAllocator, "thompson": ThompsonAllocator},
    # function(training, loss, gradients, size), called at every step of training, or None
    "watch": None,
    # methods whose prompts per block the figure shows, and the colour of their bar
    "shown": {"pro-vpt": common.BLUE},
}

# ================================================================================================
# Command line
# ================================================================================================


def build_parser(doc=__doc__, parts=PARTS):
    """All flags, in the groups run, data, model and method."""
    parser = common.Parser(doc)
    common.add_run_arguments(parser)
    add = parser.group("data")
    add("--dataset", str, "planted", "planted (the small world, default), vtab-TASK, "
        f"{', '.join('fgvc-' + n for n in data.FGVC_SETS)}, cifar100 or folder:PATH")
    add("--suite", ["vtab"], None, "all 19 tasks of VTAB-1k in turn, and their group means")
    add("--truth", str, None, "planted: the teacher's prompts per block, 6 numbers (default "
        f"{','.join(map(str, data.PLANTED_TRUTHS[0]))})")
    add("--norm", list(data.NORMS), None, "pixel mean and std: .5 (in21k ViT) or ImageNet's (SSF; "
        "VPT for fgvc); default: the checkpoint's, where it has none half, for fgvc imagenet")
    add("--workers", int, 0, "processes that read images", low=0)
    add = parser.group("model")
    add("--model", str, None, "a transformers ViT: hub id or directory (default "
        f"{PAPER['model']}), or tiny, pre-trained on the spot (planted)")
    add("--eps", float, 1e-6, "ε of the ViT's LayerNorms (finding 1)", above=0)
    add("--prompts", int, None, "prompts per block at the start (paper 20, small world 12)", low=1)
    add("--head-init", ["vpt", "linear"], None, "first draw of the head: the authors' (default) or "
        "nn.Linear's (small world)")
    add("--dropout", float, None, "on prompts (official code .1; small world 0)", low=0, high=.9)
    add = parser.group("method")
    add("--method", str, None, f"list of {', '.join(parts['labels'])}, fixed:n,n,.. (prompts per "
        "block), or all (default pro-vpt; a comparison in the small world)")
    add("--recipe", list(RECIPES), "paper", "official: as the authors' code (DEVIATION 1-3)")
    add("--allocator", list(parts["allocators"]), "ppo", "pro-vpt: who chooses the target block")
    add("--warmup", int, 1, "epochs before the first move (official code 1)", low=1)
    add("--epochs", int, None, "paper 100, small world 30", low=1)
    add("--batch", int, 64, "images of a step (paper 64)", low=1)
    add("--lr", float, None, "of SGD, constant (official run script 2.5 on CIFAR; small world .3)",
        above=0)
    add("--momentum", float, .9, "of SGD (paper .9)", low=0, high=.999)
    add("--weight-decay", float, 1e-4, "of SGD (official run script 1e-4)", low=0)
    add("--clip", float, .25, "largest joint gradient norm, 0: none (official code .25)", low=0)
    add("--search", bool, False, "choose lr and weight decay on the validation part (32 runs), "
        "then train on train + val with seeds 18, 25, 42 (fgvc: on train, with --seed)")
    add("--grid-lr", str, "50,25,10,5,2.5,1,.5,.25", "--search: base rates, times batch / 256")
    add("--grid-wd", str, ".01,.001,.0001,0", "--search: weight decays")
    add("--eval-every", int, 0, "epochs between evaluations (default 0: at the end only)", low=0)
    return parser


def resolve(args, small_world=SMALL, parts=PARTS):
    """Fill in defaults that depend on data set and model; refuse what does not go together."""
    small = args.dataset == "planted" and not args.suite
    if args.suite and args.dataset != "planted":
        raise common.UserError(f"--suite {args.suite} and --dataset {args.dataset}: give one")
    if args.truth and not small:
        raise common.UserError("--truth goes with --dataset planted: no other truth is known")
    common.fill_in(args, small_world if small else PAPER)
    common.fill_in(args, {"truth": ",".join(map(str, data.PLANTED_TRUTHS[0]))})
    if (args.model == "tiny") != small:
        raise common.UserError("--model tiny and --dataset planted go together, without --suite")
    if small and args.norm:
        raise common.UserError(f"--norm {args.norm} is for checkpoints; the tiny ViT reads "
                               "pictures as it was pre-trained")
    known = ["planted", *data.TRANSFER_SETS]
    if args.dataset not in known and not args.dataset.startswith("folder:"):
        raise common.UserError(
            f"--dataset {args.dataset!r} is unknown; there are {', '.join(known)} and folder:PATH")
    args.method = ",".join(methods_in(args.method, small, parts["labels"]))
    truth = numbers_in(args.truth, "--truth", int)
    if len(truth) != 6 or not sum(truth):
        raise common.UserError(f"--truth {args.truth!r}: expected 6 whole numbers, not all 0")
    args.truth = args.truth if small else None  # in no other run's settings
    numbers_in(args.grid_wd, "--grid-wd")
    if 0 in numbers_in(args.grid_lr, "--grid-lr"):
        raise common.UserError("--grid-lr: a rate of 0 learns nothing")
    return args


def methods_in(text, small, labels):
    """The names in --method, each once; UserError for one that is unknown or has no truth."""
    names = re.split(BETWEEN_METHODS, text)
    if text == "all":
        names = [name for name in labels if name != "planted" or small]
    for name in names:
        if name.startswith("fixed:"):
            numbers_in(name[6:], "--method fixed:", int)
        elif name not in labels:
            raise common.UserError(
                f"--method {name!r} is unknown; there are {', '.join(labels)}, fixed:n,n,.., all")
    if "planted" in names and not small:
        raise common.UserError("--method planted needs --dataset planted, whose truth is known")
    return list(dict.fromkeys(names))


def numbers_in(text, flag, kind=float):
    """The numbers of a comma-separated flag, all >= 0; UserError otherwise."""
    try:
        values = [kind(word) for word in text.split(",")]
        if all(0 <= v < math.inf for v in values):
            return values
    except ValueError:
        pass
    raise common.UserError(f"{flag} {text!r}: expected numbers >= 0, separated by commas")


def read_arguments(argv=None):
    """The command line with all defaults filled in."""
    return resolve(build_parser().parse_args(argv))


def jobs(args, done):
    """Every training of this command in turn; those of a search depend on what is done before."""
    datasets = [f"vtab-{t}" for t in data.VTAB_TASKS] if args.suite else [args.dataset]
    grid = [(lr * args.batch / 256, wd) for lr in numbers_in(args.grid_lr, "--grid-lr")
            for wd in numbers_in(args.grid_wd, "--grid-wd")]
    for dataset, method in itertools.product(datasets, re.split(BETWEEN_METHODS, args.method)):
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
    truth = numbers_in(args.truth, "--truth", int) if dataset == "planted" else None
    with run.rank_zero_first():  # it downloads or pre-trains, and the others find what it left
        # UNSPECIFIED 5: the seed also draws the splits that no list fixes
        splits = None if truth else data.load_splits(
            dataset, args.data_dir, args.seed, run.progress)
        # DEVIATION 4: --eps instead of what the checkpoint says (finding 1)
        vit = data.frozen_vit(args.model, args.eps, args.seed, run.device, args.data_dir,
                              run.progress)
        splits = splits or data.planted(args.seed, vit, truth)
    name = f"pictures of {dataset}" if args.suite else "pictures"
    if name not in run.sources:  # a search builds a task several times
        run.source(name, *splits.source())
    task = data.transfer_task(splits, vit, args.norm, stage == "val", args.workers, run.device,
                              truth)
    if "model" not in run.sources:  # one for all tasks of a suite
        run.source("model", task.said, task.fingerprint())
    return task


def idle_flags(args):
    """Which flags change nothing in this run, for common.tell_idle."""
    methods = set(re.split(BETWEEN_METHODS, args.method))
    fixed = {m for m in methods if m.startswith("fixed:")} | {"planted"}
    return [
        (args.search, {"lr", "weight_decay"}, "--search chooses them"),
        (not args.search, {"grid_lr", "grid_wd"}, "they are for --search"),
        (methods <= {"linear", "full"} | fixed, {"prompts"},
         f"--method {args.method} has its own number of prompts"),
        (methods <= {"linear", "full"}, {"dropout"}, f"--method {args.method} has no prompts"),
        ("pro-vpt" not in methods, {"allocator"}, f"--method {args.method} has no policy"),
        (not methods & {"pro-vpt", "prune-only"}, {"recipe"},
         f"--method {args.method} has no scores"),
        (not methods & {"pro-vpt", "prune-only", "random-relocation"}, {"warmup"},
         f"--method {args.method} moves nothing"),
        (args.truth is not None, {"workers"}, "the small world's pictures are made, not read")]


def main(argv=None, parser=None, settle=resolve, idle=idle_flags, title="pro_vpt", parts=PARTS):
    """The command: every job in turn, each resumable at any epoch, then the report."""
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    given, args = common.given(parser, args), settle(args)
    name = args.suite or data.short_name(args.dataset)
    with common.Run(args, f"{title}-{name}") as run:
        state = run.load() or {"done": {}, "current": None, "key": None}
        run.begin()
        common.tell_idle(run, given, *idle(args))
        if run.rank == 0:  # run.begin keeps a copy of the script that was called: beyond/'s, there
            common.atomic_write(run.out_dir / "pro_vpt.py", lambda p: shutil.copyfile(__file__, p))
        task, made_for = None, None
        for job in jobs(args, state["done"]):
            if job.key() in state["done"]:
                continue
            if made_for != (job.dataset, job.stage):
                task, made_for = None, (job.dataset, job.stage)  # free the last one first
                task = build_task(args, run, *made_for)
            training = Training(task, run, args, job, parts)
            if state["key"] == job.key():
                training.load_state_dict(state["current"])
            began = time.process_time()
            found = outcome(training, lambda now: run.save(
                {**state, "key": now.job.key(), "current": now.state_dict()},
                f"{now.job.key()}, epoch {now.epoch}"))
            state["done"][job.key()] = {**found, "truth": task.truth}
            state["current"] = state["key"] = None
            run.save(state, job.key())
            run.say(f"{job.key()}: {found['accuracy']:.2f}%, "
                    f"{time.process_time() - began:.0f} CPU-s")
        run.sources = {**run.saved_sources, **run.sources}  # of jobs that were done before, too
        report(args, run, state["done"], title, parts)


def outcome(training, save):
    """What train finds; in a search a rate that diverges is a result too, of 0%."""
    try:
        return train(training, save)
    except common.UserError as error:
        if training.job.stage != "val" or error.code != 3:
            raise
        return {"accuracy": 0.0, "losses": training.losses, "counts": training.counts,
                "moves": training.moves}


def correlation(counts, truth):
    """Pearson correlation of the prompts per block with the truth; None where it is not defined."""
    if truth is None or len(set(counts)) < 2 or len(set(truth)) < 2:
        return None
    return float(np.corrcoef(counts, truth)[0, 1])


def report(args, run, done, title, parts):
    """Tables, figure, result.json and the RESULT line."""
    finals, rows, labels = {}, [], parts["labels"]
    for key, found in done.items():
        dataset, method, stage, _ = key.rsplit("/", 3)
        if stage == "test":
            finals.setdefault((dataset, method), []).append(found)
    means = {pair: statistics.mean(f["accuracy"] for f in runs) for pair, runs in finals.items()}
    for (dataset, method), runs in finals.items():
        last = runs[-1]
        spread = statistics.stdev(f["accuracy"] for f in runs) if len(runs) > 1 else None
        rows.append([labels.get(method, method), *([dataset] if args.suite else []),
                     means[dataset, method], spread, "-".join(map(str, last["counts"][-1])),
                     correlation(last["counts"][-1], last["truth"])])
    run.table(["method", *(["data"] if args.suite else []), "accuracy %", "std",
               "prompts per block", "correlation"], rows)
    if args.suite:
        suite_table(run, means, labels)
    dataset, method = next(iter(finals))
    method = ([m for m in parts["shown"] if (dataset, m) in finals] or [method])[-1]
    if run.rank == 0 and args.model == "tiny":
        print("correlation: of the prompts per block at the end with the planted truth "
              f"{args.truth.replace(',', '-')}\n")
    drawn = {m: runs for (d, m), runs in finals.items() if d == dataset}
    run.finish({"dataset": args.suite or args.dataset, "seed": args.seed, "results": done},
               lambda path: draw_figure(args, drawn, dataset, path, parts),
               script=title, dataset=args.suite or args.dataset, method=method, seed=args.seed,
               accuracy=means[dataset, method],
               prompts="-".join(map(str, finals[dataset, method][-1]["counts"][-1])),
               out=run.out_dir)


def suite_table(run, means, labels):
    """Means of VTAB-1k's groups, and of the three (not of the 19 tasks), beside the paper's."""
    rows = []
    for method in dict.fromkeys(m for _, m in means):
        groups = [statistics.mean(means[f"vtab-{t}", method] for t in tasks)
                  for tasks in data.VTAB_GROUPS.values()]
        rows.append([labels.get(method, method), *groups, statistics.mean(groups)])
    rows += [[f"paper: {row}", *map(float, numbers)] for row, numbers in PAPER_VTAB.items()]
    run.table(["\nVTAB-1k", "Natural", "Specialized", "Structured", "mean"], rows)
    if run.rank == 0:
        print("The common VTAB-1k folders hold lossy JPEG files; scores differ from TFDS's (CIFAR: "
              "about 70\nagainst 80). The paper's rows: ViT-B/16 in21k, in one training of its "
              "own; never compare\nthem with the older common table (Full 75.9 83.4 47.6).\n")


def draw_figure(args, found, dataset, path, parts):
    """Left: accuracies, with a line at that of uniform prompts. Right: where the prompts went."""
    labels, shown, seeds = parts["labels"], parts["shown"], len(next(iter(found.values())))
    accuracy = {m: [f["accuracy"] for f in runs] for m, runs in found.items()}
    # (L, epochs + 1) each; where no prompt moved there is nothing to see
    maps = {m: np.array(found[m][-1]["counts"]).T for m in found
            if m in (shown if shown.keys() & found else parts["relocations"])}
    maps = {m: c for m, c in maps.items() if (c != c[:, :1]).any()}
    truth, wide = next(iter(found.values()))[-1]["truth"], 5 + 3.6 * len(maps)
    if truth and maps:
        maps["planted"] = np.array(truth)[:, None]
    widths = [2.4, *(.35 if m == "planted" else 3 for m in maps)]
    title = f"PRO-VPT on {data.short_name(dataset)}, " + "first of its tasks, " * bool(args.suite)
    with common.figure(path, title + f"seed {args.seed}", (wide, 3.8), ncols=len(widths),
                       width_ratios=widths, squeeze=False) as (figure, (axes,)):
        common.ranked_bars(
            axes[0], {labels.get(m, m): statistics.mean(a) for m, a in accuracy.items()},
            {labels[m]: colour for m, colour in shown.items()},
            "accuracy (%)" + f", mean and std of {seeds} seeds" * (seeds > 1),
            [statistics.stdev(a) for a in accuracy.values()] if seeds > 1 else None)
        axes[0].set_title("Accuracy")
        if "vpt-deep" in found and len(found) > 1:
            axes[0].axvline(statistics.mean(accuracy["vpt-deep"]), color="black", ls="--", lw=1)
            axes[0].set_title("Accuracy\n(dashed: of uniform prompts)")
        for axis, (m, c) in zip(axes[1:], maps.items(), strict=True):
            image = common.heat_map(axis, c, "truth", aspect="auto", cmap="Blues", vmin=0,
                                    vmax=max(1, *(c.max() for c in maps.values())))
            for b, n in enumerate(c[:, -1]):
                axis.annotate(n, (1, b), (4, 0), ("axes fraction", "data"), "offset points",
                              va="center")
            if m == "planted":
                axis.set(xticks=[], yticks=[])
                continue
            fit = correlation(c[:, -1].tolist(), truth)
            axis.set(xlabel="epoch (beside: at the end)", ylabel="block", yticks=range(len(c)),
                     title=labels[m] + ", last seed" * (seeds > 1)
                     + (f"\ncorrelation with the truth {fit:.2f}" if fit is not None else ""))
            common.whole_ticks(axis.xaxis)
        if maps:
            bar = figure.colorbar(image, ax=list(axes[1:]), label="prompts in a block")
            common.whole_ticks(bar.ax.yaxis)


if __name__ == "__main__":
    common.run_cli(main)
