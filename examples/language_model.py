"""A tiny LLaMA that learns Python's own manual, character by character: train, expand, train on, save, load, generate.

    python examples/language_model.py

It shows that everything works, not that it pays: the transformers that were measured gained little or nothing
(docs/studies.md). It needs transformers (``pip install 'fixed-parameter-expansion[ecosystem]'``).
"""

import argparse
import math
from copy import deepcopy
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fpe

LENGTH = 64


def manual() -> tuple[Tensor, list[str]]:
    """Python's manual as one row of integers, a character's place in the alphabet each, and the alphabet."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    places = {character: place for place, character in enumerate(alphabet)}
    return torch.tensor([places[character] for character in text]), alphabet


def batch(text: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Pieces of the text, ``[rows, LENGTH]``."""
    starts = torch.randint(len(text) - LENGTH, (rows,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def train(model: nn.Module, text: Tensor, steps: int, seed: int) -> None:
    """Trains with a new optimizer."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        tokens = batch(text, 16, generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def bits(model: nn.Module, text: Tensor) -> float:
    """Bits per character of the last part of the text."""
    tokens = batch(text, 64, torch.Generator().manual_seed(0))
    return model(input_ids=tokens, labels=tokens).loss.item() / math.log(2)


def main() -> None:
    """Prints a line for each model, and what the loaded one writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=int, default=2, help="children of a neuron")
    parser.add_argument("--steps", type=int, default=600, help="steps before the expansion, and again after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="ten steps")
    options = parser.parse_args()
    steps = 10 if options.quick else options.steps

    text, alphabet = manual()
    learned, kept = text[: -len(text) // 10], text[-len(text) // 10 :]
    torch.manual_seed(options.seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(alphabet), max_position_embeddings=2 * LENGTH, pad_token_id=0, **sizes)
    dense = LlamaForCausalLM(config)
    train(dense, learned, steps, options.seed)
    half_way = deepcopy(dense)
    wide = fpe.expand(dense, alpha=options.alpha, generator=torch.Generator().manual_seed(options.seed))
    for model in (dense, wide):
        train(model, learned, steps, options.seed + 1)

    with TemporaryDirectory() as folder:
        wide.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(kept[None, :LENGTH]).logits, wide(kept[None, :LENGTH]).logits)
    print(fpe.find_pairs(half_way))
    for name, model in (("half-way", half_way), ("dense", dense), ("expanded", loaded)):
        print(f"{name:10} {bits(model, kept):.3f} bits a character, {fpe.nonzeros(model)} non-zeros")
    written = loaded.generate(kept[None, :16], max_new_tokens=48, do_sample=False)[0]
    print("".join(alphabet[place] for place in written.tolist()))


if __name__ == "__main__":
    main()
