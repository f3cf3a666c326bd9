"""What the dashboard costs: time in its hooks and in its stop-watch, by the time of a training step.

    python benchmarks/dashboard.py

Runs `train.py fit` on the default model and text with Lightning's profiler; the shares are of one process.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_memlong.cli.main import MemLongCLI  # noqa: E402
from lightning_memlong.training.profiler import StepProfiler  # noqa: E402

STEPS = 30


def main() -> None:
    """Print the shares."""
    with tempfile.TemporaryDirectory() as folder:
        cli = MemLongCLI([
            "fit", "--config", "conf/memlong.yaml", "--trainer.max_steps", str(STEPS), "--trainer.profiler", "simple",
            "--trainer.limit_val_batches", "0", "--validate_first", "false", "--trainer.logger.save_dir", folder,
        ])  # fmt: skip
    durations = cli.trainer.profiler.recorded_durations
    steps = durations["run_training_batch"]
    hook = durations["[Callback]Dashboard.on_train_batch_end"]
    calls = sum(len(found) for name, found in durations.items() if "train" in name or "backward" in name) / STEPS
    profiler = StepProfiler()
    begun = time.perf_counter()
    for _ in range(10_000):
        profiler.start("[Strategy]SingleDeviceStrategy.training_step")
        profiler.stop("[Strategy]SingleDeviceStrategy.training_step")
    watch = (time.perf_counter() - begun) / 10_000
    step, mean, silent = sum(steps) / STEPS, sum(hook) / STEPS, median(hook)
    print("| | ms | share of a step |\n|---|---|---|")
    print(f"| training step | {1000 * step:,.1f} | |")
    print(f"| dashboard, a step in which it writes nothing (median) | {1000 * silent:.3f} | {silent / step:.4%} |")
    print(f"| dashboard, mean of all steps, writing every 10 | {1000 * mean:.3f} | {mean / step:.4%} |")
    print(f"| stop-watch, {calls:.0f} actions a step | {1000 * watch * calls:.3f} | {watch * calls / step:.4%} |")


if __name__ == "__main__":
    main()
