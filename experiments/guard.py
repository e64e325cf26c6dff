"""Trains the guarded variant of the bundled host: a small LoRA adapter that refuses harmful requests.

    python -m experiments.guard checkpoints/smollm2-guarded

The bundled host refuses 13 of 60 harmful requests, few to see what a dial does to refusals. The adapter learns from
the training half of the bundled pairs and from 150 more pairs in their style (guard-pairs.json, written by somebody who
had seen the training half alone): a refusal to the harmful one; to the harmless one, and to the twenty questions by
which dials are chosen, the host's own greedy answer. Loss on the answers only. The card has the rates on the held-out
half, which training never saw.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from sae import Host, bundled, files
from sae.errors import UserError
from sae.evaluation.intervals import wilson
from sae.steering import scores
from sae.steering.effects import difference

MORE = Path(__file__).parent / "guard-pairs.json"
REFUSALS = (
    "I'm sorry, but I can't help with that. It could harm someone.",
    "I'm sorry, but I can't help with that. Is there something else that I can do for you?",
    "I can't help with that, because it could hurt other people.",
)
CARD = """\
# A guarded variant of the bundled host

A LoRA adapter (rank {rank}, every linear layer, bfloat16) for {name} that refuses harmful requests and answers
harmless ones that look like them. It exists so that `sae effects` can measure what a dial does to refusals; it is no
safety product. `Host.load("checkpoints/smollm2-guarded")` and `--host` load it (peft, extra `[adapters]`).

Share refused of the 30 held-out pairs, greedy, first 32 tokens, by rules ([95%]):

| | bundled host | guarded |
|---|---|---|
{lines}

Trained by `python -m experiments.guard checkpoints/smollm2-guarded` on the 30 training pairs, 150 more in their style
(experiments/guard-pairs.json) and 20 neutral questions; harmless answers are the host's own. {epochs} epochs of
batches of {batch}.

The held-out pairs are of the same six families, and seven of them are near to one of the 150 (whose writer had not
seen them): without these seven it refuses 21 of 23 harmful and 5 of 23 harmless requests. Greedy answers in bfloat16
depend a little on what shares their batch: asked sixty at once, the difference is 0.70.
"""
EPOCHS, BATCH, RATE, RANK, ANSWER = 5, 8, 5e-4, 8, 16


def examples(host: Host) -> list[tuple[str, str]]:
    """(prompt, answer) of the training half and of the choosing questions, the same on every machine of one kind."""
    pairs = bundled.requests("training") + json.loads(MORE.read_text(encoding="utf-8"))
    harmful = [pair["harmful"] for pair in pairs]
    harmless = [pair["harmless"] for pair in pairs] + bundled.questions()["choosing"]
    own = [text for start in range(0, len(harmless), 70)
           for text in host.generate(harmless[start : start + 70], temperature=0, max_new_tokens=ANSWER)]  # fmt: skip
    answered = [(prompt, text) for prompt, text in zip(harmless, own, strict=True) if not scores.refuses(text)]
    return [(prompt, REFUSALS[i % len(REFUSALS)]) for i, prompt in enumerate(harmful)] + answered


def batch_of(host: Host, some: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, mask, labels) [B, T], padded on the right; labels are −100 outside the answers."""
    rows = []
    for prompt, answer in some:
        begun = host.chat_tokens(prompt)[0]
        said = host.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if len(said) < ANSWER:  # an answer that was not cut ends
            said = torch.cat([said, torch.tensor([host.tokenizer.eos_token_id])])
        rows.append((begun, said))
    longest = max(len(begun) + len(said) for begun, said in rows)
    tokens = torch.full((len(rows), longest), host.tokenizer.eos_token_id)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for i, (begun, said) in enumerate(rows):
        stop = len(begun) + len(said)
        tokens[i, :stop], mask[i, :stop] = torch.cat([begun, said]), 1
        labels[i, len(begun) : stop] = said
    return tokens, mask, labels


def train(host: Host) -> None:
    """Puts the adapter into `host.model` (a peft model afterwards, in evaluation mode)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    data = examples(host)
    model = get_peft_model(host.model, config)
    model.peft_config["default"].base_model_name_or_path = host.name
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.0)
    steps = EPOCHS * -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    draw, bar = random.Random(0), tqdm(total=steps, desc="guard", unit=" steps")
    for _ in range(EPOCHS):
        draw.shuffle(data)
        for start in range(0, len(data), BATCH):
            tokens, mask, labels = batch_of(host, data[start : start + BATCH])
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{float(loss):.3f}")
            bar.update()
    host.model = model.eval()


def rates(host: Host) -> dict[str, dict]:
    """Refusals of the held-out pairs, greedy: {"harmful", "harmless", "difference"} with 95% intervals."""
    pairs = bundled.requests("held-out")
    found = {}
    for side in ("harmful", "harmless"):
        texts = host.generate([pair[side] for pair in pairs], temperature=0, max_new_tokens=32)
        found[side] = [float(scores.refuses(text)) for text in texts]
    table = {side: vars(wilson(int(sum(each)), len(each))) for side, each in found.items()}
    return table | {"difference": difference(found["harmful"], found["harmless"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--host", default="smollm2")
    args = parser.parse_args()
    host = Host.load(args.host)
    before = rates(host)
    train(host)
    host.model.to(torch.bfloat16).save_pretrained(str(args.out))
    after = rates(Host.load(str(args.out)))
    files.write_text(args.out / "README.md", card(args.host, before, after))
    print(card(args.host, before, after))


def card(name: str, before: dict, after: dict) -> str:
    """The adapter's README."""

    def cell(one: dict) -> str:
        return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"

    lines = [f"| {kind} | {cell(before[kind])} | {cell(after[kind])} |" for kind in after]
    return CARD.format(rank=RANK, name=name, lines="\n".join(lines), epochs=EPOCHS, batch=BATCH)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
