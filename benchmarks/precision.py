"""Half precision against float32 on a long window of real text: late positions must be scored as well as early ones.

    python benchmarks/precision.py                     # 8,192 tokens of the standard library's sources
    python benchmarks/precision.py --file book.txt

SmolLM2-135M as it is; the last 512 tokens of the window and 512 early ones are scored. `cast` is what
`.to(torch.bfloat16)` does to a plain model, rotary tables included.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

import torch  # noqa: E402
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision  # noqa: E402
from torch import Tensor  # noqa: E402

from lightning_memlong.backbone import load_backbone, load_tokenizer  # noqa: E402
from lightning_memlong.memlong import MemLong  # noqa: E402

TOKENS, SCORED = 8192, 512


@torch.no_grad()
def late_and_early(model: MemLong, plugin: Precision, ids: Tensor) -> list[Tensor]:
    """Losses of the last tokens of the window, and of as many early ones."""
    with plugin.forward_context():
        hidden = model(ids).hidden
        parts = [(hidden[:, -SCORED - 1 :], ids[:, -SCORED - 1 :]), (hidden[:, : SCORED + 1], ids[:, : SCORED + 1])]
        return [model.head.loss(h, y, reduction="none")[0, 1:] for h, y in parts]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default=argparse.__file__, help="a text of at least 8,192 tokens")
    text = Path(parser.parse_args().file).read_text()
    ids = torch.tensor([load_tokenizer("smollm2-135m")(text, verbose=False).input_ids[:TOKENS]])
    assert ids.shape[1] == TOKENS, "the text is too short"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = ids.to(device)

    def model() -> MemLong:
        return MemLong(load_backbone("smollm2-135m"), memory_layer=11).eval()

    ways = {
        "32-true": Precision(),
        "bf16-mixed": MixedPrecision("bf16-mixed", device),
        "bf16-true": HalfPrecision("bf16-true"),
    }
    exact: list[Tensor] = []
    print(
        "| precision | perplexity, last 512 tokens | mean difference of a loss | perplexity, first 512 | difference |"
    )
    print("|---|---|---|---|---|")
    for name in (*ways, "cast"):
        plugin = ways.get(name, ways["bf16-true"])
        wrapped = plugin.convert_module(model()).to(device)
        if name == "cast":
            table = wrapped.rotary.module.inv_freq
            wrapped.rotary.module.inv_freq = table.bfloat16().float()
        losses = late_and_early(wrapped, plugin, ids)
        exact = exact or losses
        cells = [
            f"{loss.mean().exp():.4f} | {(loss - e).abs().mean():.4f}" for loss, e in zip(losses, exact, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
