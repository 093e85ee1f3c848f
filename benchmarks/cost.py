"""How cost grows: whole-run steps per second over numbers of environments and of seeds.

    python benchmarks/cost.py  # resumes: a measured point is kept
    python benchmarks/cost.py --seconds 20 --platform gpu

Pendulum by EnvPool, rollouts on the host, and by gymnax, wholly on the device; T = 32 steps, 10
epochs of minibatches of 256 rows (or of the whole rollout, where that is smaller), a critic of
256 x 256, logging and normalisation on. A point's run is of 10 iterations, or, where those take
less than --seconds, of as many as that time has room for.
Compilation is left out. Writes cost.json and cost.png in benchmarks/results/.
"""

import json
from typing import Literal

import matplotlib
import tyro
from speed import ROOT, ours

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = ROOT / "benchmarks/results/cost.json"
TASKS = {"host": "Pendulum-v1", "device": "gymnax/Pendulum-v1"}
ENVS = (1, 4, 16, 64, 256, 1024, 4096)
SEEDS = (1, 2, 4, 8, 16, 32, 64)
STEPS = 32


def measure(env_id: str, envs: int, seeds: int, iterations: int, platform: str) -> dict:
    """Returns the content of result.json of a run of that many iterations."""
    rollout = envs * STEPS
    flags = f"--env-id {env_id} --num-envs {envs} --num-seeds {seeds} --num-steps {STEPS}"
    flags += f" --num-minibatches {max(rollout // 256, 1)} --critic-sizes 256 256 --log-interval 10"
    flags += f" --total-timesteps {rollout * iterations} --platform {platform}"
    return ours(flags)


def point(env_id: str, envs: int, seeds: int, seconds: float, platform: str) -> dict:
    """Returns the steps per second of a run of about that many seconds, and where it ran."""
    found = measure(env_id, envs, seeds, 10, platform)
    per_iteration = envs * STEPS * seeds / found["sps"]
    iterations = int(seconds / per_iteration) // 10 * 10
    if iterations > 10:
        found = measure(env_id, envs, seeds, iterations, platform)
    return {"sps": found["sps"], "device": found["device"], "versions": found["versions"]}


def draw(points: dict[str, dict]) -> None:
    """Draws steps per second over environments of one seed, and over seeds of 64 environments."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for kind, env_id in TASKS.items():
        by_envs = [points[key(kind, envs, 1)]["sps"] for envs in ENVS]
        by_seeds = [points[key(kind, 64, seeds)]["sps"] for seeds in SEEDS]
        axes[0].loglog(ENVS, by_envs, marker="o", label=f"{env_id}, on the {kind}")
        axes[1].loglog(SEEDS, by_seeds, marker="o", label=f"{env_id}, on the {kind}")
    axes[0].set(xlabel="environments, of one seed")
    axes[1].set(xlabel="seeds, of 64 environments each")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("steps per second, all seeds")
    figure.savefig(OUT.with_suffix(".png"), dpi=110)


def key(kind: str, envs: int, seeds: int) -> str:
    """Returns a point's name in the data."""
    return f"{kind}, {envs} environments, {seeds} seeds"


def main(seconds: float = 5.0, platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto") -> None:
    """Measures what is missing, and draws."""
    points = json.loads(OUT.read_text()) if OUT.exists() else {}
    pairs = [(n, 1) for n in ENVS] + [(64, s) for s in SEEDS[1:]]
    for envs, seeds in pairs:
        for kind, env_id in TASKS.items():
            name = key(kind, envs, seeds)
            if name not in points:
                points[name] = point(env_id, envs, seeds, seconds, platform)
                print(name, round(points[name]["sps"]), flush=True)
                OUT.write_text(json.dumps(points, indent=2) + "\n")
    draw(points)


if __name__ == "__main__":
    tyro.cli(main)
