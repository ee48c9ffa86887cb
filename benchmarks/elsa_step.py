"""What a training step of elsa.py costs: split against unsplit, and with SS-OP and a channel.

Run
    python benchmarks/elsa_step.py             one thread, about five minutes
    python benchmarks/elsa_step.py --quick     seconds: a tiny model, whose ratios mean nothing

Prints
    A table of CPU seconds a step (forward, backward, AdamW), each the median over --repeats, the
    arrangements in turn so that a busy machine disturbs all; then RESULT with the ratios over the
    unsplit model, which is called as transformers calls it. The model is a randomly initialised
    BERT of MiniLM's size (D = 384, 6 blocks; the time does not depend on the weights) with rank-8
    LoRA on query and value, 16 texts of 32 tokens. Then split and unsplit of a Llama of that size.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import elsa
from beyond.elsa_channels import Codec, Projection


def build(quick, decoder=False):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 64, "vocab_size": 100} if quick else \
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
         "intermediate_size": 1536}
    encoder = LlamaModel(LlamaConfig(**size, use_cache=False)) if decoder else BertModel(
        BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        add_pooling_layer=False)
    model = elsa.SplitEncoder(encoder, 6)
    elsa.put_lora(model, 8, 16)
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
    models = {"": build(args.quick), "decoder, ": build(args.quick, decoder=True)}
    optimizers = {kind: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
                  for kind, model in models.items()}
    config = models[""].encoder.config
    ids = torch.randint(5, config.vocab_size, (16, 32))
    mask, labels = torch.ones_like(ids), torch.randint(6, (16,))
    mask[::2, 20:] = 0  # texts differ in length
    last = mask.sum(1) - 1
    cut = (1, models[""].layers - 1)
    arrangements = links(config.hidden_size, min(args.rank, config.hidden_size // 2))
    arrangements["decoder, split"] = elsa.Link()

    def step(name):
        kind = "decoder, " if name.startswith("decoder") else ""
        model = models[kind]
        if name.endswith("unsplit"):
            states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            read = states[torch.arange(16), last] if kind else states[:, 0]
            logits = model.head(model.dropout(read))
        else:
            logits = model(ids, mask, cut, arrangements[name])
        optimizers[kind].zero_grad(set_to_none=True)
        F.cross_entropy(logits, labels).backward()
        optimizers[kind].step()

    names = ["unsplit", *arrangements]
    names.insert(-1, "decoder, unsplit")
    times = {name: [] for name in names}
    for repeat in range(-2, 3 if args.quick else args.repeats):  # the first two warm up
        for name in names:
            start = time.process_time()
            step(name)
            if repeat >= 0:
                times[name].append(time.process_time() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    print(f"{'arrangement':32s} CPU-ms   ratio")
    ratio = {name: median[name] / median[f"{'decoder, ' * name.startswith('decoder')}unsplit"]
             for name in names}
    for name in names:
        print(f"{name:32s} {1e3 * median[name]:6.1f}  {ratio[name]:6.3f}")
    print(f"RESULT split_ratio={ratio['split']:.3f} "
          f"decoder_ratio={ratio['decoder, split']:.3f} "
          f"sketch_ratio={ratio['ssop link, sketch median']:.3f} "
          f"lsq_ratio={ratio['ssop link, sketch lsq']:.3f} "
          f"quant_ratio={ratio['ssop link, quant 8']:.3f}")


if __name__ == "__main__":
    main()
