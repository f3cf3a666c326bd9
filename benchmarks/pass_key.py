"""A pass key in a document of 64k tokens, found and said again: through reading and generating, from end to end.

    python benchmarks/pass_key.py --filler ../shared/data/pg19/train/145.txt     # 10 minutes on two cores
    python benchmarks/pass_key.py --length 4096 --window 1024                    # anywhere

Five documents, with the key at 0, 25, 50, 75 and 100 %, are read side by side into the rows of a bank; each is asked
for its key in a prompt of a dozen tokens. Without memory the window holds the end of the document and the question.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from a checkout that is not installed

from lightning_memlong import MemLong  # noqa: E402
from lightning_memlong.generation import Conversation  # noqa: E402
from lightning_memlong.text.planting import Probe, filler_tokens, plant  # noqa: E402

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def ask(model: MemLong, probe: Probe, conversation: Conversation, beginning: list[int]) -> tuple[str, bool, bool]:
    """What is answered, whether it is right, and whether what was planted was retrieved."""
    tokenizer = model.retrieval.tokenizer
    asked, told = probe.tokens[probe.question : probe.answer].tolist(), probe.tokens[probe.answer :].tolist()
    prompt = [*beginning, *asked]
    found = conversation.generate_from_tokens(
        prompt, tokenizer.decode(asked), max_new_tokens=len(told), min_new_tokens=len(told)
    )
    written = found[0, -len(told) :].tolist()
    hit = any(p.start < probe.planted[1] and p.end > probe.planted[0] for p in conversation.passages)
    conversation.close()
    return tokenizer.decode(written), written == told, hit


def main() -> None:
    """Read, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--top_k", type=int, default=3)
    parser.add_argument("--memory_layer", type=int, default=8, help="11: the default of conf/memlong.yaml")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--filler", help="text file; without it, the sentences of the pass-key task")
    options = parser.parse_args()
    memory = {"top_k": options.top_k, "dtype": "int8"}
    model = MemLong.from_pretrained("smollm2-135m", memory, memory_layer=options.memory_layer)
    filler = filler_tokens(options.filler, options.length, model.retrieval.tokenizer, "filler")
    right = {True: 0, False: 0}
    hits = 0
    for sample in range(options.samples):
        tokenizer = model.retrieval.tokenizer
        probes = [plant("pass_key", options.length, d, sample, filler, tokenizer, "--length") for d in DEPTHS]
        bank = model.read_tokens([p.tokens[: p.question] for p in probes], window=options.window)
        for row, (depth, probe) in enumerate(zip(DEPTHS, probes, strict=True)):
            text, ok, hit = ask(model, probe, Conversation(model.long_context, bank, row, options.window), [])
            room = options.window - 64
            end = probe.tokens[max(0, probe.question - room) : probe.question].tolist()
            without, well, _ = ask(model, probe, Conversation(model.long_context, None, 0, options.window), end)
            key = tokenizer.decode(probe.tokens[probe.answer :])
            told = f"retrieved: {hit}, answer {text!r}, without memory {without!r}"
            print(f"{depth:>5.0%} key {key!r}: {told}", flush=True)
            right[True] += ok
            right[False] += well
            hits += hit
    count = len(DEPTHS) * options.samples
    print(f"retrieved {hits} of {count}; right with memory {right[True]}, without {right[False]}")


if __name__ == "__main__":
    main()
