"""Whole-run speed of ppo_continuous.py on Brax's hopper against PureJaxRL's, in turn.

    python benchmarks/speed_native.py --purejaxrl CHECKOUT --peer-python ../peers/bin/python

where CHECKOUT is github.com/luchris429/purejaxrl's folder purejaxrl, and that Python has what it
needs (this one: Brax). Both with its ppo_continuous_action.py's settings: 2048 environments, 10
steps, 4 epochs of 32 minibatches, networks of 256 x 256, normalisation of observations and rewards.
Steps per second leave compilation out. Ours logs and saves as always; its printing is off. Also 16
seeds of ours side by side against one, at --seed-envs environments each. Writes
benchmarks/results/speed_native.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tyro
from speed import ROOT, SETTINGS, compiled_speed, ours

OWN = (
    "--env-id brax/hopper --num-steps 10 --update-epochs 4 --no-anneal-lr --hidden-sizes 256 256"
    " --critic-sizes 256 256 --no-recompute-advantages --norm-adv --clip-vloss --vf-coef 0.5"
    ' --log-std-init 0 --env-kwargs {"backend":"positional"} --log-interval 10'
)


def hopper(envs: int, seeds: int, iterations: int, minibatches: int) -> dict:
    """Returns the content of result.json of a run of ours."""
    flags = f"{OWN} --num-envs {envs} --num-seeds {seeds} --num-minibatches {minibatches}"
    flags += f" --total-timesteps {envs * 10 * iterations}"
    return ours(flags)


def peer(python: str, checkout: Path, envs: int, iterations: int, minibatches: int) -> float:
    """Returns PureJaxRL's steps per second."""
    config = SETTINGS | {
        "LR": 3e-4,
        "NUM_ENVS": envs,
        "NUM_STEPS": 10,
        "TOTAL_TIMESTEPS": envs * 10 * iterations,
        "NUM_MINIBATCHES": minibatches,
        "ENT_COEF": 0.0,
        "ENV_NAME": "hopper",
        "ANNEAL_LR": False,
        "NORMALIZE_ENV": True,
    }
    return compiled_speed(python, checkout, "ppo_continuous_action", config)


def main(
    purejaxrl: Path,
    peer_python: str = sys.executable,
    repeats: int = 3,
    iterations: int = 20,
    seed_envs: int = 64,
) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    names = ("PureJaxRL", "ours", "ours, one seed", "ours, 16 seeds")
    rows = {name: [] for name in names}
    for _ in range(repeats):
        rows["PureJaxRL"].append(peer(peer_python, purejaxrl, 2048, iterations, 32))
        found = hopper(2048, 1, iterations, 32)
        rows["ours"].append(found["sps"])
        rows["ours, one seed"].append(hopper(seed_envs, 1, 10 * iterations, 4)["sps"])
        rows["ours, 16 seeds"].append(hopper(seed_envs, 16, iterations, 4)["sps"])
    middle = {name: float(np.median(values)) for name, values in rows.items()}
    content = {
        "steps_per_second": rows,
        "ours / PureJaxRL": middle["ours"] / middle["PureJaxRL"],
        "16 seeds / one seed": middle["ours, 16 seeds"] / middle["ours, one seed"],
        "versions": found["versions"],
        "device": found["device"],
        "settings": {"iterations": iterations, "seed_envs": seed_envs},
    }
    path = ROOT / "benchmarks/results/speed_native.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
