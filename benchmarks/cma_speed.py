"""Whole-run speed of ppo_cma.py against its authors' TensorFlow code, alternating on one machine.

    git clone https://github.com/ppocma/ppocma ../ppocma
    python benchmarks/cma_speed.py --authors ../ppocma --peer-python ../peers/bin/python

where that Python has tensorflow, gymnasium, matplotlib and numpy<2.4. Both train
MountainCarContinuous-v0 at N = 4000. Steps per second leave out what comes before the first step
(ours: compilation; both: fitting the first policy). Writes benchmarks/results/cma_speed.json.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import tyro
from speed import ROOT, ours

CASES = {
    "default": "--total-timesteps 200000",
    "4 seeds": "--num-seeds 4 --total-timesteps 120000",
    "5 seeds": "--num-seeds 5 --total-timesteps 120000",
    "--action-repeat 2, as theirs": "--action-repeat 2 --total-timesteps 120000",
}
# Their Run.py as it is, on TensorFlow 2's first-version interface, with Gymnasium for Gym
PEER = """
import runpy, sys, time, types
import gymnasium
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
sys.modules["tensorflow"] = tf
clock = []

class Env(gymnasium.Wrapper):
    steps = 0

    def reset(self):
        clock.append(time.perf_counter())
        return self.env.reset()[0]

    def step(self, action):
        Env.steps += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, info

sys.modules["gym"] = types.SimpleNamespace(make=lambda name: Env(gymnasium.make(name)))
sys.path.insert(0, "")
sys.argv = ["Run.py", "--env_name", "MountainCarContinuous-v0", "--max_steps", "STEPS"]
runpy.run_path("Run.py", run_name="__main__")
print("sps", Env.steps / (time.perf_counter() - clock[0]))
"""


def theirs(authors: Path, python: str, steps: int) -> float:
    """Returns the steps per second of the authors' code."""
    run = [python, "-c", PEER.replace("STEPS", str(steps))]
    out = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, cwd=authors).stdout
    return float(out.split("sps")[-1])


def main(authors: Path, peer_python: str, repeats: int = 3, peer_steps: int = 40000) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    base = "authors' code"
    python = str(Path(peer_python).absolute())
    rows = {name: [] for name in (base, *CASES)}
    for _ in range(repeats):
        rows[base].append(theirs(authors, python, peer_steps))
        for name, flags in CASES.items():
            result = ours(flags, "ppo_cma.py")
            rows[name].append(result["sps"])
    middle = {name: float(np.median(values)) for name, values in rows.items()}
    ratios = {f"{name} / {base}": middle[name] / middle[base] for name in CASES}
    content = {
        "steps_per_second": rows,
        "ratios of medians": ratios,
        "versions": result["versions"],
        "device": result["device"],
        "commands": {name: f"python ppo_cma.py {flags}" for name, flags in CASES.items()},
    }
    (ROOT / "benchmarks/results/cma_speed.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
