"""What a training step of elsa.py costs: split against unsplit, and with SS-OP and a channel.

Run
    python benchmarks/elsa_step.py             one thread, about four minutes
    python benchmarks/elsa_step.py --quick     seconds: a tiny model, whose ratios mean nothing

Prints
    A table of CPU seconds a step (forward, backward, AdamW), each the median over --repeats, the
    arrangements in turn so that a busy machine disturbs all; then RESULT with the ratios over the
    unsplit model, which is called as transformers calls it. The model is a randomly initialised
    BERT of MiniLM's size (D = 384, 6 blocks; the time does not depend on the weights) with rank-8
    LoRA on query and value, 16 texts of 32 tokens.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

import elsa
from beyond.elsa_channels import Codec, Projection


def build(quick):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 64, "vocab_size": 100} if quick else \
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
         "intermediate_size": 1536}
    encoder = BertModel(BertConfig(**size, hidden_dropout_prob=0.0,
                                   attention_probs_dropout_prob=0.0), add_pooling_layer=False)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    model = elsa.SplitEncoder(peft.inject_adapter_in_model(config, encoder), 6)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith("head."))
    return model.train()


def links(width, rank):
    """Name -> Link of every arrangement but the unsplit one."""
    basis = torch.linalg.qr(torch.randn(width, rank))[0]
    rotation = elsa.SubspaceRotation(basis, elsa.SubspaceRotation.random_turn(
        rank, torch.Generator().manual_seed(0)))

    def codecs(codec):
        return dict.fromkeys(elsa.EXCHANGES, codec)

    found = {"split": elsa.Link(), "ssop link": elsa.Link({}, rotation, "link"),
             "ssop edge": elsa.Link({}, rotation, "edge")}
    for recovery in ("median", "lsq"):
        sketch = elsa.CountSketch(width, .5, 3, recovery, torch.Generator().manual_seed(0))
        found[f"ssop link, sketch {recovery}"] = elsa.Link(codecs(sketch), rotation)
    found["ssop link, lowrank"] = elsa.Link(codecs(Codec(Projection(basis))), rotation)
    found["ssop link, quant 8"] = elsa.Link(codecs(Codec(bits=8)), rotation)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="default %(default)s")
    parser.add_argument("--rank", type=int, default=32, help="r of SS-OP (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, three repeats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model = build(args.quick)
    encoder, width = model.encoder, model.encoder.config.hidden_size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    ids = torch.randint(5, encoder.config.vocab_size, (16, 32))
    mask, labels = torch.ones_like(ids), torch.randint(6, (16,))
    mask[::2, 20:] = 0  # texts differ in length
    cut, arrangements = (1, model.layers - 1), links(width, min(args.rank, width // 2))

    def step(name):
        if name == "unsplit":
            states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = model.head(model.dropout(states[:, 0]))
        else:
            logits = model(ids, mask, cut, arrangements[name])
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    names = ["unsplit", *arrangements]
    times = {name: [] for name in names}
    for repeat in range(-2, 3 if args.quick else args.repeats):  # the first two warm up
        for name in names:
            start = time.process_time()
            step(name)
            if repeat >= 0:
                times[name].append(time.process_time() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    print(f"{'arrangement':32s} CPU-ms   ratio")
    for name in names:
        print(f"{name:32s} {1e3 * median[name]:6.1f}  {median[name] / median['unsplit']:6.3f}")
    ratio = {name: median[name] / median["unsplit"] for name in names}
    print(f"RESULT split_ratio={ratio['split']:.3f} "
          f"sketch_ratio={ratio['ssop link, sketch median']:.3f} "
          f"lsq_ratio={ratio['ssop link, sketch lsq']:.3f} "
          f"quant_ratio={ratio['ssop link, quant 8']:.3f}")


if __name__ == "__main__":
    main()
