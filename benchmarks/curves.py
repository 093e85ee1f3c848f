"""Learning curves of run folders: a panel per environment, a line per experiment, over seeds.

    python benchmarks/curves.py runs/ppo_continuous/HalfCheetah-v4/ppo/seed1-3 ...
    python benchmarks/curves.py runs/defaults/check-10/Hopper-v4 ... --name defaults

Lines are the mean over seeds, bands their range, called by the experiment's name or --name. The
data lie beside the picture, as JSON. What is there already stays in the picture, but for a new run
of the same environment and name, which replaces it; without new runs the picture is drawn again.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

RETURN = "charts/episodic_return"  # of the episodes that ended in the logged iterations


def read(folder: Path, tag: str = RETURN) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of a scalar of one seed."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if tag not in reader.Tags()["scalars"]:
        sys.exit(f"{folder}: no episode has ended yet, train longer")
    events = reader.Scalars(tag)
    return np.array([event.step for event in events]), np.array([event.value for event in events])


def smooth(x: np.ndarray, y: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y at `points` places, each y the mean over 4 % of the steps."""
    grid = np.linspace(x[0], x[-1], points)
    means = []
    for point in grid:
        distance = np.abs(x - point)
        near = distance <= max(0.02 * x[-1], distance.min())
        means.append(y[near].mean())
    return grid, np.array(means)


def line_of(folder: Path, tag: str = RETURN, name: str = "") -> dict:
    """Returns a run folder's line, with what a reader needs to know of it."""
    result = json.loads((folder / "result.json").read_text())
    del result["args"]["run_dir"]  # of this machine
    curves = [smooth(*read(seed, tag)) for seed in sorted(folder.glob("seed*")) or [folder]]
    line = {"name": f"{result['env_id']} {name or result['args']['exp_name']}"}
    for key in ("env_id", "args", "seeds", "episodic_return", "versions", "device"):
        line[key] = result[key]
    line["steps"] = curves[0][0].tolist()
    line["returns"] = np.stack([y for _, y in curves]).round(2).tolist()
    return line


def draw(lines: list[dict], out: Path) -> None:
    """Draws lines, those of an environment in one panel."""
    env_ids = list(dict.fromkeys(line["env_id"] for line in lines))
    columns = len(env_ids) if len(env_ids) <= 4 else 3
    rows = -(-len(env_ids) // columns)
    size = (4.5 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.ravel()[len(env_ids) :]:
        axis.set_axis_off()
    panels = dict(zip(env_ids, axes.ravel(), strict=False))
    for line in lines:
        axis = panels[line["env_id"]]
        returns = np.array(line["returns"])
        seeds = "1 seed" if len(returns) == 1 else f"{len(returns)} seeds"
        label = f"{line['name'].removeprefix(line['env_id'] + ' ')}, {seeds}"
        (drawn,) = axis.plot(line["steps"], returns.mean(axis=0), label=label)
        band = (returns.min(axis=0), returns.max(axis=0))
        axis.fill_between(line["steps"], *band, color=drawn.get_color(), alpha=0.2)
    for env_id, axis in panels.items():
        axis.set(title=env_id.split(":")[-1], xlabel="steps per seed", ylabel="episodic return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(fontsize="x-small")
    figure.savefig(out, dpi=110)


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (),
    out: Path = Path("benchmarks/results/curves.png"),
    name: str = "",
) -> None:
    """Adds run folders to a picture, and draws it."""
    path = out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.exists() else []
    new = [line_of(folder, name=name) for folder in folders]
    lines = {line["name"]: line for line in [*before, *new]}
    out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(lines.values())) + "\n")
    draw(list(lines.values()), out)


if __name__ == "__main__":
    tyro.cli(main)
