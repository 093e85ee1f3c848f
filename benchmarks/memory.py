"""What ppo_icm_lstm.py reaches: five seeds each, and 100 evaluation episodes of each seed.

    python benchmarks/memory.py  # all tasks, hours; goes on where it was
    python benchmarks/memory.py --tasks cartpole mountaincar-icm

Writes benchmarks/results/memory.json and memory.png. Scores are of deterministic policies, but
where a task's evaluation says otherwise. What a task needs beyond the defaults is in TASKS.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from curves import draw, line_of, read, smooth
from speed import ROOT


class Task(NamedTuple):
    env_id: str
    steps: int  # per seed
    bar: float  # for the mean return
    flags: str = ""
    evaluation: str = ""


CURIOUS = "--icm --no-norm-reward --extrinsic-weight 0.1"
STEADY = (  # curious for longer, and less towards the end
    "--icm --no-norm-reward --extrinsic-weight 0.03 --anneal-intrinsic --icm-learning-rate 1e-4"
)
LSTM = "--recurrence lstm"
LONG = "--forget-bias 1"
NATIVE = "--log-interval 10"
GRID = "--activation relu --num-envs 32 --sequence-length 32"
WALK = (  # of numbers, not choices: Tianshou's settings, as in defaults.py
    "--num-envs 64 --learning-rate 3e-4 --recompute-advantages --no-norm-adv --vf-coef 0.25"
    " --ent-coef 0"
)
WALK_8192 = f"{WALK} --num-steps 128 --num-minibatches 32"
WALK_2048 = f"{WALK} --num-steps 32 --num-minibatches 16"
TASKS = {
    "cartpole": Task("CartPole-v1", 100_000, 500),
    "acrobot": Task("Acrobot-v1", 500_000, -82),
    "lunarlander": Task("LunarLander-v3", 1_000_000, 240),
    "mountaincar-icm": Task("MountainCar-v0", 500_000, -110, "--icm"),
    "mountaincar-plain": Task("MountainCar-v0", 500_000, -110),
    "mountaincarcontinuous-icm": Task("MountainCarContinuous-v0", 200_000, 92, CURIOUS),
    "mountaincarcontinuous-novel-lstm-icm": Task(
        "benchmarks.envs:MountainCarContinuousNoVel-v0", 200_000, 92, f"{LSTM} {LONG} {STEADY}"
    ),
    "mountaincarcontinuous-novel-icm": Task(
        "benchmarks.envs:MountainCarContinuousNoVel-v0", 200_000, 92, STEADY
    ),
    "cartpole-novel-lstm": Task(
        "benchmarks.envs:CartPoleNoVel-v1", 100_000, 500, f"{LSTM} {LONG} --no-norm-adv"
    ),
    "cartpole-novel-lstm-bias0": Task("benchmarks.envs:CartPoleNoVel-v1", 100_000, 500, LSTM),
    "cartpole-novel-lstm-bias1": Task(
        "benchmarks.envs:CartPoleNoVel-v1", 100_000, 500, f"{LSTM} {LONG}"
    ),
    "cartpole-novel-none": Task("benchmarks.envs:CartPoleNoVel-v1", 100_000, 500),
    "pendulum-novel-lstm": Task("benchmarks.envs:PendulumNoVel-v1", 100_000, -220, LSTM),
    "pendulum-novel-lstm-bias1": Task(
        "benchmarks.envs:PendulumNoVel-v1", 100_000, -220, f"{LSTM} {LONG}"
    ),
    "memory-s9": Task(
        "MiniGrid-MemoryS9-v0", 1_000_000, 0.9, f"{LSTM} {LONG} {GRID}", "--no-deterministic"
    ),
    "memory-s9-bias0": Task(
        "MiniGrid-MemoryS9-v0", 1_000_000, 0.9, f"{LSTM} {GRID}", "--no-deterministic"
    ),
    "doorkey-lstm": Task(
        "MiniGrid-DoorKey-6x6-v0", 300_000, 0.9, f"{LSTM} {GRID}", "--no-deterministic"
    ),
    "doorkey-lstm-icm": Task(
        "MiniGrid-DoorKey-6x6-v0", 300_000, 0.9, f"{LSTM} --icm {GRID}", "--no-deterministic"
    ),
    "doorkey-lstm-icm-bias1": Task(
        "MiniGrid-DoorKey-6x6-v0",
        300_000,
        0.9,
        f"{LSTM} {LONG} --icm {GRID}",
        "--no-deterministic",
    ),
    "gymnax-cartpole": Task("gymnax/CartPole-v1", 100_000, 500, NATIVE),
    "memorychain-lstm": Task("gymnax/MemoryChain-bsuite", 100_000, 1, f"{LSTM} {NATIVE}"),
    "memorychain-none": Task("gymnax/MemoryChain-bsuite", 100_000, 1, NATIVE),
    "continuous-cartpole": Task("benchmarks.envs:ContinuousCartPole-v0", 100_000, 500),
    "bipedalwalker": Task("BipedalWalker-v3", 5_000_000, 300, WALK_8192),
    "bipedalwalker-2048": Task("BipedalWalker-v3", 5_000_000, 300, WALK_2048),
    "bipedalwalker-2048-2m": Task("BipedalWalker-v3", 2_000_000, 300, WALK_2048),
    "hardcore": Task("BipedalWalkerHardcore-v3", 5_000_000, 300, WALK_8192),
}


def run(name: str, task: Task, script: str, num_seeds: int, seed: int = 1) -> Path:
    """Trains and evaluates what is missing of a task; returns its run folder."""
    folder = ROOT / "runs" / Path(script).stem / "benchmark" / name
    command = [sys.executable, str(ROOT / script)]
    line = ["--env-id", task.env_id, "--total-timesteps", str(task.steps), "--exp-name", name]
    line += ["--seed", str(seed), "--num-seeds", str(num_seeds), "--run-dir", str(folder)]
    line += task.flags.split()
    subprocess.run([*command, *line], check=True, cwd=ROOT)
    if json.loads((folder / "result.json").read_text())["eval_return"] is None:
        line = ["--mode", "eval", "--run-dir", str(folder), *task.evaluation.split()]
        subprocess.run([*command, *line], check=True, cwd=ROOT)
    return folder


def steps_to(folder: Path, score: float) -> list[int | None]:
    """Returns each seed's steps until its smoothed training return reaches a score."""
    found = []
    for seed in sorted(folder.glob("seed*")) or [folder]:
        steps, returns = smooth(*read(seed))
        reached = steps[returns >= score]
        found.append(int(reached[0]) if len(reached) else None)
    return found


def measure(tasks: dict[str, Task], script: str, num_seeds: int, path: Path, seed: int = 1) -> None:
    """Runs tasks one after another, says what each reached, and draws their curves.

    Args:
        seed: the first; of others than 1 the names of tasks end in it.
    """
    for task_name, task in tasks.items():
        name = task_name if seed == 1 else f"{task_name}-seed{seed}"
        folder = run(name, task, script, num_seeds, seed)
        result = json.loads((folder / "result.json").read_text())
        scores = [row["mean"] for row in result["eval_return"]]
        line = line_of(folder) | {"eval_return": scores, "flags": task.flags, "bar": task.bar}
        line["name"] = f"{task.env_id} {name}"
        lines = json.loads(path.read_text()) if path.exists() else {}  # another may have added some
        lines[name] = line | {"steps_to_bar": steps_to(folder, task.bar), "sps": result["sps"]}
        path.write_text(json.dumps(lines) + "\n")
        said = f"{np.round(scores, 2)}, mean {np.mean(scores):.2f}, bar {task.bar}"
        print(f"{name}: {said}, reached after {lines[name]['steps_to_bar']}", flush=True)
    draw(list(json.loads(path.read_text()).values()), path.with_suffix(".png"))


def main(tasks: tuple[str, ...] = tuple(TASKS), num_seeds: int = 5, seed: int = 1) -> None:
    """Runs what is missing of tasks, with seeds from `seed` on."""
    asked = {name: TASKS[name] for name in tasks}
    path = ROOT / "benchmarks/results/memory.json"
    measure(asked, "ppo_icm_lstm.py", num_seeds, path, seed)


if __name__ == "__main__":
    tyro.cli(main)
