"""Learning curves of run folders: one panel per environment, one line per experiment, mean and range over seeds.

    python benchmarks/curves.py runs/ppo_continuous/HalfCheetah-v4/ppo/seed1-3 ... --out benchmarks/results/curves.png

The data lie beside the picture, as JSON. What is there already stays in the picture, but for a new run of the same
environment and experiment, which replaces it; without new runs the picture is drawn again.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter


def curve(folder: Path, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [points] and returns [points] of one seed, the mean over 4 % of its steps around each point."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars("charts/episodic_return")
    x, y = np.array([(e.step, e.value) for e in events]).T
    grid = np.linspace(x[0], x[-1], points)
    near = [np.abs(x - g) <= max(0.02 * x[-1], np.abs(x - g).min()) for g in grid]
    return grid, np.array([y[n].mean() for n in near])


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path = Path("benchmarks/results/curves.png")
) -> None:
    path = out.with_suffix(".json")
    lines = {line["name"]: line for line in (json.loads(path.read_text()) if path.exists() else [])}
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        curves = [curve(seed) for seed in sorted(folder.glob("seed*")) or [folder]]
        line = {"name": f"{result['env_id']} {result['args']['exp_name']}"}
        line |= {k: result[k] for k in ("env_id", "args", "seeds", "episodic_return", "versions", "device")}
        returns = np.stack([y for _, y in curves]).round(2)
        lines[line["name"]] = line | {"steps": curves[0][0].tolist(), "returns": returns.tolist()}
    path.write_text(json.dumps(list(lines.values())) + "\n")
    ids = list(dict.fromkeys(line["env_id"] for line in lines.values()))
    columns = len(ids) if len(ids) <= 4 else 3
    rows = -(-len(ids) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.ravel()[len(ids) :]:
        axis.set_axis_off()
    for line in lines.values():
        axis, returns = axes.ravel()[ids.index(line["env_id"])], np.array(line["returns"])
        label = f"{line['args']['exp_name']}, {len(returns)} seeds"
        (drawn,) = axis.plot(line["steps"], returns.mean(axis=0), label=label)
        axis.fill_between(line["steps"], returns.min(axis=0), returns.max(axis=0), color=drawn.get_color(), alpha=0.2)
    for axis, name in zip(axes.flat, ids, strict=False):
        axis.set(title=name, xlabel="steps per seed", ylabel="episodic return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
