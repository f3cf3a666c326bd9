"""The wrapped backbone, memory off: against plain transformers, and training half of it against all of it.

    python benchmarks/backbone.py                       # SmolLM2-135M, on the GPU if there is one
    python benchmarks/backbone.py --backbone FOLDER

A training step is forward pass, loss, backward pass, clipping and AdamW, on one window of 1,024 tokens.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.paired import paired  # noqa: E402
from lightning_memlong.backbone import load_backbone  # noqa: E402
from lightning_memlong.memlong import MemLong  # noqa: E402

TOKENS = 1024


def trainer(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    plain = load_backbone(args.backbone, dtype).to(device)
    vocabulary = plain.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    half = MemLong(load_backbone(args.backbone, dtype), memory_layer=0.49).to(device).train()
    whole = MemLong(load_backbone(args.backbone, dtype), memory_layer=0.49).to(device).train()
    whole.backbone.requires_grad_(True)
    plain.requires_grad_(False)
    for layer in plain.model.layers[half.memory_layer + 1 :]:
        layer.requires_grad_(True)
    plain.model.norm.requires_grad_(True)
    plain.train()

    @torch.no_grad()
    def evaluate(loss: Callable[[], Tensor]) -> None:
        loss()

    def of_plain() -> Tensor:
        return plain(input_ids=ids, labels=ids, use_cache=False).loss

    def of(model: MemLong) -> Callable[[], Tensor]:
        return lambda: model(ids, ids).loss

    tuned = [p for p in plain.parameters() if p.requires_grad]
    step_half = trainer(list(half.trainable().values()), of(half))
    rows = [
        ("evaluating a window: wrapped / plain transformers", 1.03,
         {"a": lambda: evaluate(of(half)), "b": lambda: evaluate(of_plain)}),
        ("training the same half: wrapped / plain transformers", 1.03, {"a": step_half, "b": trainer(tuned, of_plain)}),
        (f"training layers {half.memory_layer + 1} and above / training all of the model", 0.62,
         {"a": step_half, "b": trainer(list(whole.trainable().values()), of(whole))}),
    ]  # fmt: skip
    print("| what | goal | ratio | [s] | against [s] |\n|---|---|---|---|---|")
    for name, goal, ways in rows:
        seconds, ratios = paired(ways, args.rounds)
        print(f"| {name} | {goal} | **{ratios['a']:.3f}** | {seconds['a']:.3f} | {seconds['b']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
