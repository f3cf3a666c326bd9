"""Everything that is said about a GPU, checked and timed on this one; no network, no weights.

    python benchmarks/gpu.py                                  # one CUDA card, 8 minutes
    python benchmarks/gpu.py --only right step --minutes 3    # some parts
    python benchmarks/gpu.py --wheels FOLDER                  # on a bare machine: packages from a folder of wheels
    python benchmarks/gpu.py --shape tiny --device cpu        # anywhere, to see that it runs

Parts, the most important first, each with a share of the minutes; what one leaves goes to those after it:
``right`` (the checks of tests/gpu), ``headline`` (OpenLLaMA-3B's shape, 80k tokens and a million), ``step`` (memory on
against off), ``attention`` (against flash attention), ``writing`` (with a million tokens), ``tuning`` (needs weights).
A part that fails is told with its error, and the next goes on. Results are printed as they come, and written after each
into ``gpu-CARD.md`` and ``.json``. Ends with 1 if anything failed, with 0 if all was measured or skipped by name.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

SHARES = {"right": 2.0, "headline": 3.0, "step": 1.0, "attention": 0.5, "writing": 1.0, "tuning": 0.5}
"""Part -> minutes of the default 8."""
GRACE = 1.25
"""A part looks at its clock between measurements; past so many times its share it is interrupted."""


def unpack(folder: str) -> None:
    """Put a folder of wheels in front of the path; unzipped, since extensions are not imported from archives."""
    target = tempfile.mkdtemp(prefix="memlong-wheels-")
    wheels = sorted(Path(folder).glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels {folder}: there is no wheel in it")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.insert(0, target)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=sum(SHARES.values()), help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="parts, by name")
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", help="folder of wheels that go before what is installed")
    parser.add_argument("--weights", help="GGUF file or folder of a backbone, for the part tuning")
    parser.add_argument("--text", nargs="+", default=[], help="text files for it; default: the standard library")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"), help="folder of the results")
    parser.add_argument("--keep", action="store_true", help="keep the parts that are in the results already")
    options = parser.parse_args()
    options.only = [name for name in SHARES if name in options.only]
    if options.shape == "full" and options.device == "cpu":
        parser.error("--shape full needs a card; --shape tiny --device cpu runs anywhere")
    return options


@contextmanager
def interrupted_after(seconds: float, error: type[Exception]) -> Iterator[None]:
    """Raise an error in a block that takes longer: it has not looked at its clock."""

    def over(*_: Any) -> None:
        raise error(f"interrupted after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(name: str, context: Any, report: Any) -> bool:
    """Run a part; gives whether the card can still be used in this process."""
    from benchmarks.gpu_parts.context import Row, Stopped, free, told

    begin = time.monotonic()
    report.begin(name)
    print(f"\n## {name}: up to {context.clock.seconds:.0f} s", flush=True)
    try:
        with interrupted_after(GRACE * context.clock.seconds + 5, Stopped):
            for row in importlib.import_module(f"benchmarks.gpu_parts.{name}").run(context):
                report.add(name, row)
    except Stopped as error:
        report.add(name, Row("the rest", status="stopped", note=f"time was over; {error}".rstrip("; ")))
    except Exception as error:
        report.add(name, Row(name, status="failed", note=told(error)))
    report.add(name, Row("time of this part", time.monotonic() - begin, "s"))
    try:
        free(context)
        if context.cuda:
            import torch

            torch.cuda.synchronize()
    except RuntimeError as error:
        report.add(name, Row("the card", status="failed", note=f"of no use to this process any more: {told(error)}"))
        return False
    return True


def go_on(rest: list[str], minutes: float) -> int:
    """The parts that are left, in a new process, as a kernel has brought this one's use of the card down.

    Of an option that is given twice the last one counts.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--minutes", str(minutes), "--only", *rest, "--keep"]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Measure, and write the report."""
    options = arguments()
    if options.wheels:
        unpack(options.wheels)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from benchmarks.gpu_parts.context import Clock, Context
    from benchmarks.gpu_parts.report import Report, facts

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA card; --shape tiny --device cpu runs anywhere")
    torch.manual_seed(options.seed)
    tiny, device = options.shape == "tiny", torch.device(options.device)
    context = Context(device, tiny, options.seed, ROOT, options.weights, options.text)
    report = Report(Path(options.out), facts(context, options.minutes), options.keep)
    whole = Clock(60 * options.minutes)
    for number, name in enumerate(options.only):
        rest = options.only[number:]
        context.clock = Clock(max(0.0, whole.left) * SHARES[name] / sum(SHARES[other] for other in rest))
        if not measure(name, context, report) and rest[1:]:
            return go_on(rest[1:], max(0.1, whole.left / 60)) or 1
    report.write()
    print(f"\nWritten: {report.file.with_suffix('.md')}, {report.file.name}")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
