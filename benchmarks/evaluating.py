"""A window evaluated with memory against the same without: chunks read, layers that read, tokens that choose.

    python benchmarks/evaluating.py                       # SmolLM2-135M, windows of 2,048, on the GPU if there is one
    python benchmarks/evaluating.py --window 1024 --backbone FOLDER

Memory is given: what retrieving costs is in the tables of a step and of the bank. Losses of the last 512 tokens.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import torch  # noqa: E402

from benchmarks.paired import paired  # noqa: E402
from lightning_memlong.backbone import load_backbone  # noqa: E402
from lightning_memlong.bank import Retrieved  # noqa: E402
from lightning_memlong.memlong import MemLong  # noqa: E402
from lightning_memlong.model import as_reading, reading  # noqa: E402

CHUNK, SCORED = 128, 512


def memory_of(model: MemLong, window: int, chunks: int, top_k: int | None = None) -> Retrieved:
    """So many chunks of random text, read in windows."""
    ids = torch.randint(0, model.config.vocab_size, (1, chunks * CHUNK), generator=torch.Generator().manual_seed(1))
    read = [model(part.to(model.device)) for part in ids.split(window, dim=1)]
    keys, values = (torch.cat([getattr(output, name) for output in read], dim=-2) for name in ("keys", "values"))
    places = torch.arange(chunks)[None]
    mask = torch.ones(1, chunks * CHUNK, dtype=torch.bool, device=model.device)
    return Retrieved(keys, values, mask, torch.ones(1, chunks), places, places * CHUNK, full=True, top_k=top_k)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--window", type=int, default=2048, help="tokens of the window")
    parser.add_argument("--layers", type=int, default=6, help="retrieval layers of the row with fewer")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = MemLong(load_backbone(args.backbone, dtype), memory_weights="auto").to(device).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, args.window), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    layers = model.retrieval_layers[:: max(1, len(model.retrieval_layers) // args.layers)][: args.layers]
    few = as_reading(model, {"retrieval_layers": layers}, "--layers")

    def score(memory: Retrieved | None) -> Callable[[], None]:
        def run() -> None:
            model(ids, labels=ids, memory=memory, logits_to_keep=SCORED)

        return run

    def in_few_layers(memory: Retrieved) -> Callable[[], None]:
        def run() -> None:
            with reading(model, few):
                model(ids, labels=ids, memory=memory, logits_to_keep=SCORED)

        return run

    memories = {k: memory_of(model, args.window, k) for k in (3, 8, 32, 64)}
    ways = {f"{k} chunks": score(memory) for k, memory in memories.items()}
    ways["64 chunks, each token and head 8 of them"] = score(memory_of(model, args.window, 64, 8))
    ways |= {f"{k} chunks, read in {args.layers} layers": in_few_layers(memories[k]) for k in (32, 64)}
    seconds, ratios = paired(ways | {"off": score(None)}, args.rounds)
    print(f"{device}, window {args.window}, {len(model.retrieval_layers)} retrieval layers\n")
    print("| memory | on / off | [s] |\n|---|---|---|")
    for name in seconds:
        print(f"| {name} | **{ratios[name]:.3f}** | {seconds[name]:.2f} |")


if __name__ == "__main__":
    main()
