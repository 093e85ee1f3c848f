"""Learning curves of PPO-CMA-m against PPO, each with the settings of arXiv 1810.02541: two plots.

A third is the rest of a small search over the settings for MuJoCo (N, batch, how long a decision is
held): it holds what the first one's ppo-cma-m lines do not have.

    python benchmarks/cma_convergence.py  # environments, N = 8000, 1M steps: cma_convergence.png
    python benchmarks/cma_convergence.py --plot humanoid --env-ids Humanoid-v4 \\
        --total-timesteps 10000000 --num-seeds 3  # cma_humanoid.png
    python benchmarks/cma_convergence.py --plot search --num-seeds 3  # cma_search.png
    python benchmarks/cma_convergence.py --env-ids Hopper-v4 --total-timesteps 100000 --num-seeds 2

Runs are in runs/ppo_cma/; the same command again goes on where it stopped. The data lie beside the
picture; the table has the mean return of each seed's last 100 episodes, and a 95 % bootstrap
interval of the mean over seeds.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from curves import main as plot_curves
from scipy.stats import bootstrap

ROOT = Path(__file__).parents[1]
PLOTS = {  # N = num_envs x 1000; --action-repeat 2 where no other is said
    "convergence": {
        "ppo-cma-m": "--num-envs 8 --batch-size 512",
        "ppo-cma-m-4000": "--num-envs 4 --batch-size 512",
        "ppo": "--algorithm ppo --num-envs 2 --batch-size 128 --clip-coef 0.005",
    },
    "humanoid": {
        "ppo-cma-m": "--num-envs 32 --batch-size 512",
        "ppo": "--algorithm ppo --num-envs 32 --batch-size 128 --clip-coef 0.0025",
    },
    "search": {
        "N 2000": "--num-envs 2 --batch-size 512",
        "N 4000, batch 128": "--num-envs 4 --batch-size 128",
        "N 4000, repeat 1": "--num-envs 4 --batch-size 512 --action-repeat 1",
    },
}
ENVIRONMENTS = (
    "InvertedDoublePendulum-v4",
    "Hopper-v4",
    "Walker2d-v4",
    "HalfCheetah-v4",
    "Ant-v4",
)


def interval(returns: list[float]) -> str:
    """Returns the mean over seeds, its 95 % bootstrap interval if there are several, the seeds."""
    found = f"{np.mean(returns):.0f}"
    if len(returns) > 1:
        sampled = bootstrap((returns,), np.mean, method="percentile", rng=0)
        bounds = sampled.confidence_interval
        found += f" [{bounds.low:.0f}, {bounds.high:.0f}]"
    return f"{found} ({', '.join(f'{x:.0f}' for x in returns)})"


def main(
    env_ids: tuple[str, ...] = ENVIRONMENTS,
    plot: Literal["convergence", "humanoid", "search"] = "convergence",
    total_timesteps: int = 1_000_000,
    num_seeds: int = 5,
    out: Path = ROOT / "benchmarks/results",
) -> None:
    """Trains what is missing, draws the plot, and prints the table."""
    folders = []
    for env_id in env_ids:
        for name, flags in PLOTS[plot].items():
            folder = Path("runs/ppo_cma") / env_id / f"{name}-{plot}" / f"seeds{num_seeds}"
            run = [sys.executable, str(ROOT / "ppo_cma.py"), "--env-id", env_id]
            run += ["--action-repeat", "2", *flags.split()]
            run += ["--exp-name", name, "--run-dir", str(folder)]
            run += ["--total-timesteps", str(total_timesteps), "--num-seeds", str(num_seeds)]
            subprocess.run(run, check=True)
            folders.append(folder)
    plot_curves(tuple(folders), out / f"cma_{plot}.png")
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        name = result["args"]["exp_name"]
        print(result["env_id"], name, interval(result["episodic_return"]))


if __name__ == "__main__":
    tyro.cli(main)
