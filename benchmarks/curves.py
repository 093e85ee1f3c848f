"""Learning curves of run folders: one panel per environment, one line per experiment, mean and range over seeds.

    python benchmarks/curves.py runs/ppo_continuous/HalfCheetah-v4/ppo/seed1-3 ... --out benchmarks/results/curves.png

Writes the data beside the picture, as JSON.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def curve(folder: Path, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [points] and returns [points] of one seed, the mean over 4 % of its steps around each point."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars("charts/episodic_return")
    x, y = np.array([(e.step, e.value) for e in events]).T
    grid = np.linspace(x[0], x[-1], points)
    near = [np.abs(x - g) <= max(0.02 * x[-1], np.abs(x - g).min()) for g in grid]
    return grid, np.array([y[n].mean() for n in near])


def main(folders: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("benchmarks/results/curves.png")) -> None:
    results = [json.loads((f / "result.json").read_text()) for f in folders]
    ids = list(dict.fromkeys(r["env_id"] for r in results))
    figure, axes = plt.subplots(1, len(ids), figsize=(4.5 * len(ids), 3.4), squeeze=False, layout="constrained")
    data = []
    for folder, result in zip(folders, results, strict=True):
        seeds = sorted(folder.glob("seed*")) or [folder]
        curves = [curve(seed) for seed in seeds]
        steps, returns = curves[0][0], np.stack([y for _, y in curves])
        axis, label = axes[0, ids.index(result["env_id"])], f"{result['args']['exp_name']}, {len(seeds)} seeds"
        (line,) = axis.plot(steps, returns.mean(axis=0), label=label)
        axis.fill_between(steps, returns.min(axis=0), returns.max(axis=0), color=line.get_color(), alpha=0.2)
        data.append({k: result[k] for k in ("env_id", "args", "seeds", "episodic_return", "versions", "device")})
        data[-1] |= {"steps": steps.tolist(), "returns": returns.round(2).tolist()}
    for axis, name in zip(axes[0], ids, strict=True):
        axis.set(title=name, xlabel="steps per seed", ylabel="episodic return")
        axis.legend()
    figure.savefig(out, dpi=110)
    out.with_suffix(".json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
