"""What --overlap is worth: Pong from RAM with and without it, returns over steps and wall clock.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --flags="--env-id Pong-v5 --num-envs 64 --act-on cpu"  # on a GPU

One run after the other, seeds side by side in one process. A return is the mean of the last 100
training episodes, over seeds; times begin at pressing return. Writes
benchmarks/results/overlap.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--env-id Pong-v5 --obs ram --num-envs 16 --num-minibatches 8 --learning-rate 5e-4"
    " --log-interval 4"
)


def train(flags: str, num_seeds: int, steps: int) -> dict:
    """Returns the steps, seconds and mean returns of a run, and its steps per second."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, str(ROOT / "ppo_atari.py"), *flags.split(), "--run-dir", folder]
        line += ["--num-seeds", str(num_seeds), "--total-timesteps", str(steps)]
        began = time.time()
        subprocess.run(line, check=True, stderr=subprocess.DEVNULL)
        curves = []
        for seed in sorted(Path(folder).glob("seed*")) or [Path(folder)]:
            reader = EventAccumulator(str(seed), size_guidance={"scalars": 0}).Reload()
            curves.append(reader.Scalars("charts/episodic_return_100"))
        result = json.loads((Path(folder) / "result.json").read_text())
    shared = min(map(len, curves))  # a seed's curve begins with its first episode's end
    curves = [curve[-shared:] for curve in curves]
    return {
        "steps": [event.step for event in curves[0]],
        "seconds": [event.wall_time - began for event in curves[0]],
        "returns": np.mean([[event.value for event in curve] for curve in curves], axis=0).tolist(),
        "sps": result["sps"],
        "device": result["device"],
    }


def main(flags: str = FLAGS, num_seeds: int = 3, total_timesteps: int = 1_000_000) -> None:
    """Trains both, and prints their returns at the same steps and at the same times."""
    lines = {
        "without": train(flags, num_seeds, total_timesteps),
        "with --overlap": train(f"{flags} --overlap", num_seeds, total_timesteps),
    }
    path = ROOT / "benchmarks/results/overlap.json"
    path.write_text(json.dumps({"flags": flags, "num_seeds": num_seeds} | lines) + "\n")
    for axis in ("steps", "seconds"):
        begin = max(line[axis][0] for line in lines.values())
        end = min(line[axis][-1] for line in lines.values())
        for point in np.linspace(begin, end, 6):
            found = [np.interp(point, line[axis], line["returns"]) for line in lines.values()]
            said = ", ".join(f"{name} {x:.1f}" for name, x in zip(lines, found, strict=True))
            print(f"after {point:.0f} {axis}: {said}")
    ratio = lines["with --overlap"]["sps"] / lines["without"]["sps"]
    print(f"steps per second with over without: {ratio:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
