"""FedPuReL in the plain arrangement: nothing cached, nothing cut, every pass where it is needed.

This is how code grown from CoOp and CLIP-LoRA arranges the work, written without cleverness. It is
the oracle of tests/test_fedpurel.py (fedpurel.py must give the same numbers) and the peer of
benchmarks/fedpurel_round.py (fedpurel.py must be faster). It shares no code with fedpurel.py.

    prompt   every forward encodes its images, and all C class texts on all 77 tokens
    adapter  every forward encodes its images
    lora     every forward encodes its images; q, k and v are three linear layers with a LoRA each
    stage 1  teacher pass and student pass over the same images, one gradient for each loss
    stage 2  the frozen global model's pass, then the private model's
    test     the personal prediction of each client is a global and a private pass over its images

The models take pixels (B, 3, H, W) and give logits (B, C). Only the small part requires a gradient:
the caller freezes CLIP (clip.requires_grad_(False).eval()).
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ================================================================================================
# Models
# ================================================================================================


class PlainPrompt(nn.Module):
    """CoOp: learned context in the token embeddings, then the whole text tower. -> (C, E) features.

    clip: an open_clip.CLIP; tokens (C, L) of "X X X X name." with n_ctx words X.
    """

    def __init__(self, clip, tokens, n_ctx=4):
        super().__init__()
        self.clip, self.tokens = clip, tokens
        with torch.no_grad():
            words = clip.token_embedding(tokens)  # (C, L, D)
        self.prefix, self.suffix = words[:, :1], words[:, 1 + n_ctx:]
        self.ctx = nn.Parameter(.02 * torch.randn(n_ctx, words.shape[-1], dtype=words.dtype))

    def forward(self):
        ctx = self.ctx.expand(len(self.tokens), -1, -1)  # (C, n_ctx, D)
        x = torch.cat([self.prefix, ctx, self.suffix], 1) + self.clip.positional_embedding
        x = self.clip.ln_final(self.clip.transformer(x, attn_mask=self.clip.attn_mask))  # (C, L, D)
        x = x[torch.arange(len(x)), self.tokens.argmax(-1)]  # (C, D) at end of text
        projection = self.clip.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # (C, E)


class PlainLoRALinear(nn.Module):
    """y = W x + b + (α / √r) B A dropout(x), with W and b frozen.

    materialise: form the (D, D) product B A in each call and multiply by it, instead of going
    through rank r. Same result, about twice the work of W x alone.
    """

    def __init__(self, weight, bias, rank, alpha, dropout, materialise=False):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale, self.dropout = alpha / math.sqrt(rank), nn.Dropout(dropout)
        self.materialise = materialise

    def forward(self, x):
        x, branch = F.linear(x, self.weight, self.bias), self.dropout(x)
        if self.materialise:
            return x + self.scale * (branch @ (self.up @ self.down).T)
        return x + self.scale * (branch @ self.down.T @ self.up.T)


class PlainAttentionLoRA(nn.Module):
    """Self-attention with q, k, v as three PlainLoRALinear, for an nn.MultiheadAttention."""

    def __init__(self, attention, rank=8, alpha=16, dropout=.25, materialise=False):
        super().__init__()
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (PlainLoRALinear(w, b, rank, alpha, dropout, materialise)
                                  for w, b in zip(weights, biases, strict=True))
        self.num_heads, self.out_proj = attention.num_heads, copy.deepcopy(attention.out_proj)

    def forward(self, x, *_, **__):
        B, N, D = x.shape  # images, tokens, width
        q, k, v = (part(x).view(B, N, self.num_heads, -1).transpose(1, 2)
                   for part in (self.q, self.k, self.v))  # (B, heads, N, D / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, N, D)), None


class PlainModel(nn.Module):
    """Logits (B, C) = exp(scale) · cos(image, text) from pixels, all encoded on every call."""

    def __init__(self, clip, text=None):
        super().__init__()
        self.clip, self.text = clip, text

    def encode_image(self, pixels):
        return self.clip.encode_image(pixels)

    def encode_text(self):
        return self.text

    def forward(self, pixels):
        image = F.normalize(self.encode_image(pixels), dim=-1)  # (B, E)
        text = F.normalize(self.encode_text(), dim=-1)  # (C, E)
        return self.clip.logit_scale.exp() * image @ text.T


class PlainTeacher(PlainModel):
    """Zero-shot CLIP with the (C, E) text features of its template."""


class PlainPromptModel(PlainModel):
    """Learned context; tokens as in PlainPrompt."""

    def __init__(self, clip, tokens, n_ctx=4):
        super().__init__(clip)
        self.prompt = PlainPrompt(clip, tokens, n_ctx)

    def encode_text(self):
        return self.prompt()


class PlainAdapterModel(PlainModel):
    """x · softmax(W2 tanh(W1 x)) on the image feature, fixed text features (C, E)."""

    def __init__(self, clip, text):
        super().__init__(clip, text)
        width = text.shape[1]
        self.first = nn.Linear(width, width, dtype=text.dtype)
        self.second = nn.Linear(width, width, dtype=text.dtype)

    def encode_image(self, pixels):
        x = self.clip.encode_image(pixels)
        return x * self.second(self.first(x).tanh()).softmax(-1)


class PlainLoRAModel(PlainModel):
    """LoRA in every block of a copy of the vision tower, fixed text features (C, E)."""

    def __init__(self, clip, text, rank=8, alpha=16, dropout=.25, materialise=False):
        super().__init__(clip, text)
        self.visual = copy.deepcopy(clip.visual)
        for block in self.visual.transformer.resblocks:
            block.attn = PlainAttentionLoRA(block.attn, rank, alpha, dropout, materialise)

    def encode_image(self, pixels):
        return self.visual(pixels)


def trainable(model):
    """The tensors that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


# ================================================================================================
# Losses
# ================================================================================================


def plain_entropy(p):
    return -(p * torch.log(p.clamp(min=1e-12))).sum(dim=1)


def plain_temperature(logits, target):
    """Per-sample bisection on [0.05, 20], 20 halvings. (B, C), (B,) -> (B,)."""
    low, high = torch.full_like(target, .05), torch.full_like(target, 20.)
    for _ in range(20):
        middle = (low + high) / 2
        flat = plain_entropy(torch.softmax(logits / middle.unsqueeze(1), 1)) > target
        high[flat] = middle[flat]
        low[~flat] = middle[~flat]
    return (low + high) / 2


def plain_kl(z, f):
    """KL(softmax(z) ‖ softmax(f)), batch mean, probabilities clamped at 1e-12, z constant."""
    p, q = torch.softmax(z, 1).detach(), torch.softmax(f, 1)
    return (p * (torch.log(p.clamp(min=1e-12)) - torch.log(q.clamp(min=1e-12)))).sum() / len(f)


def plain_tkl(z, f):
    """KL after a temperature each brought both predictions to the mean of their entropies."""
    with torch.no_grad():
        target = (plain_entropy(torch.softmax(z, 1)) + plain_entropy(torch.softmax(f, 1))) / 2
        tau_z, tau_f = plain_temperature(z, target), plain_temperature(f, target)
    return plain_kl(z / tau_z.unsqueeze(1), f / tau_f.unsqueeze(1))


def purify_each(task_grads, align_grads, strength=1.0):
    """Every task gradient without the component that opposes its alignment gradient."""
    purified = []
    for task, align in zip(task_grads, align_grads, strict=True):
        inner = torch.dot(task.flatten(), align.flatten())
        if inner < 0:
            task = task - strength * inner / torch.dot(align.flatten(), align.flatten()) * align
        purified.append(task)
    return purified


# ================================================================================================
# Steps and evaluation
# ================================================================================================


def shared_step(model, teacher, pixels, labels, optimizer, strength=1.0, purify=purify_each):
    """One step of stage 1. model, teacher: PlainModel; optimizer over trainable(model)."""
    params = trainable(model)
    with torch.no_grad():
        z = teacher(pixels)
    f = model(pixels)
    task = torch.autograd.grad(F.cross_entropy(f, labels), params, retain_graph=True)
    align = torch.autograd.grad(plain_tkl(z, f), params)
    for p, g in zip(params, purify(task, align, strength), strict=True):
        p.grad = g
    optimizer.step()


def private_step(model, global_model, pixels, labels, optimizer, lam):
    """One step of stage 2: model is private, global_model the frozen aggregate."""
    with torch.no_grad():
        l_G = global_model(pixels)
    l_P = model(pixels)
    loss = (1 - lam) * F.cross_entropy(l_G + l_P, labels) + lam * F.cross_entropy(l_P, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def predict_global(model, pixels, batch=100):
    """Predicted classes (N,) of the global model."""
    return torch.cat([model(part).argmax(1) for part in pixels.split(batch)])


@torch.no_grad()
def predict_personal(model, global_model, pixels, batch=100):
    """Predicted classes (N,) of one client: global and private branch, both encoded here."""
    return torch.cat([(global_model(part) + model(part)).argmax(1) for part in pixels.split(batch)])
