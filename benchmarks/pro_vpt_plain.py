"""PRO-VPT as one would write it down first, and as the authors' code arranges it.

Every prompt is a parameter of its own with a gate (1) that multiplies it; a block holds a list of
them, which is concatenated into its input [class token, prompts, patches] on every step; the block
computes everything for the prompts too and drops it. A move takes an entry out of one list and
appends it to another. Scores are read one by one. The tests hold pro_vpt.py against this, and
benchmarks/pro_vpt_epoch.py times both. Imports nothing from pro_vpt.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class PlainPromptedViT(nn.Module):
    """vit: transformers.ViTModel; prompts: L lists of (D,) tensors; head: (C, D) and (C,)."""

    def __init__(self, vit, prompts, weight, bias, dropout=0.0):
        super().__init__()
        self.vit, self.dropout = vit.requires_grad_(False).eval(), dropout
        self.blocks = [[nn.Parameter(p.clone()) for p in block] for block in prompts]
        one = weight.new_ones(())
        self.gates = {id(p): one.clone().requires_grad_() for block in self.blocks for p in block}
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def prompts(self):
        """All prompts, block by block."""
        return [p for block in self.blocks for p in block]

    def forward(self, pixels):
        x = self.vit.embeddings(pixels)  # (B, 1 + T, D)
        for layer, block in zip(self.vit.layers, self.blocks, strict=True):
            if block:
                own = torch.stack([self.gates[id(p)] * p for p in block])
                own = F.dropout(own.expand(len(x), -1, -1), self.dropout)
                x = layer(torch.cat([x[:, :1], own, x[:, 1:]], 1))
                x = torch.cat([x[:, :1], x[:, 1 + len(block):]], 1)
            else:
                x = layer(x)
        return self.vit.layernorm(x)[:, 0] @ self.weight.T + self.bias


def score_pass(model, batches, clip=None):
    """The pass without updates -> {id of prompt: mean score}, [(batch loss, size)].

    clip: the official recipe's bound on the norm of the gates' and the head's gradients.
    """
    totals, losses = {id(p): 0.0 for p in model.prompts()}, []
    for pixels, labels in batches:
        gates = [model.gates[id(p)] for p in model.prompts()]
        loss = F.cross_entropy(model(pixels), labels)
        wanted = [*gates, model.weight, model.bias]
        for p in wanted:
            p.grad = None
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(wanted, clip)
        for p, gate in zip(model.prompts(), gates, strict=True):
            totals[id(p)] += gate.grad.item()
        losses.append((loss.item(), len(labels)))
    return {k: total / len(losses) for k, total in totals.items()}, losses


def move(model, source, place, target, scale=1e-3):
    """Entry `place` of block `source` goes, scaled, to the end of block `target`."""
    if source != target:
        prompt = model.blocks[source].pop(place)
        with torch.no_grad():
            prompt *= scale
        model.blocks[target].append(prompt)


def train_step(model, optimizer, pixels, labels, clip=.25):
    """One step of SGD -> loss, gradients of prompts (in the order of `prompts`) and head."""
    loss = F.cross_entropy(model(pixels), labels)
    optimizer.zero_grad()
    loss.backward()
    params = [*model.prompts(), model.weight, model.bias]
    grads = [p.grad.clone() for p in params]
    nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()
    return loss.item(), grads


@torch.no_grad()
def evaluate(model, batches):
    """Share of right predictions."""
    hits, total = 0, 0
    for pixels, labels in batches:
        hits += (model(pixels).argmax(-1) == labels).sum().item()
        total += len(labels)
    return hits / total
