"""Whole-run speed of ppo_atari.py against Stable-Baselines3 and PureJaxRL, in turn on one machine.

    python benchmarks/speed_atari.py --peer-python ../peers/bin/python
    python benchmarks/speed_atari.py --peer-python ../peers/bin/python --purejaxrl CHECKOUT
    python benchmarks/speed_atari.py --only-calculate

where that Python has stable-baselines3[extra] with its Atari games, and for PureJaxRL what
CHECKOUT, github.com/luchris429/purejaxrl's folder purejaxrl, needs. Pong from pixels: the same
network and settings, 8 environments, 128 steps, 4 epochs of 4 minibatches. MinAtar's Breakout: the
settings of PureJaxRL's notebook, and of those 16 seeds of ours side by side against one. Steps per
second leave compilation out. Writes benchmarks/results/speed_atari.json.

What a GPU would make of it is calculated, not measured: for 8 to 256 environments the floating-
point operations of rollout and update, and the bytes that cross to the device. It is printed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tyro
from speed import ROOT, SETTINGS, compiled_speed, ours, printed_speed

PONG = "--env-id Pong-v5"
MINATAR = (
    "--env-id gymnax/Breakout-MinAtar --num-envs 64 --num-steps 128 --num-minibatches 8"
    " --learning-rate 5e-3 --clip-coef 0.2 --network mlp --hidden-sizes 64 64 --critic-sizes 64 64"
    " --log-interval 10"
)
PEER = """
import sys, time, ale_py, gymnasium
gymnasium.register_envs(ale_py)
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", 8, seed=1), 4)
settings = dict(n_steps=128, batch_size=256, n_epochs=4, learning_rate=2.5e-4, clip_range=0.1)
model = PPO("CnnPolicy", env, ent_coef=0.01, vf_coef=0.5, seed=1, device="cpu", **settings)
model.learn(1024)
steps = 1024 * int(sys.argv[1])
start = time.perf_counter()
model.learn(steps)
print("sps", steps / (time.perf_counter() - start))
"""
CONFIG = SETTINGS | {
    "LR": 5e-3,
    "NUM_ENVS": 64,
    "NUM_MINIBATCHES": 8,
    "ACTIVATION": "relu",
    "ENV_NAME": "Breakout-MinAtar",
}
ROLLOUT = 64 * 128  # steps of an iteration of MinAtar
FRAMES = 4 * 84 * 84  # bytes of an observation of Atari
MULTIPLICATIONS = (  # of the Nature network, for one observation
    20 * 20 * 8 * 8 * 4 * 32 + 9 * 9 * 4 * 4 * 32 * 64 + 7 * 7 * 3 * 3 * 64 * 64 + 3136 * 512
)


def speed(flags: str, steps: int) -> dict:
    """Returns the content of result.json of a run of ours."""
    return ours(f"{flags} --total-timesteps {steps}", "ppo_atari.py")


def pixels(python: str, repeats: int, iterations: int) -> dict:
    """Returns steps per second on Pong, theirs and ours."""
    rows = {"Stable-Baselines3": [], "ours": []}
    for _ in range(repeats):
        rows["Stable-Baselines3"].append(printed_speed([python, "-c", PEER, str(iterations)]))
        found = speed(PONG, 1024 * iterations)
        rows["ours"].append(found["sps"])
    return rows | {"versions": found["versions"], "device": found["device"]}


def minatar(python: str, checkout: Path, repeats: int, iterations: int) -> dict:
    """Returns steps per second on MinAtar: theirs, ours, and ours with 16 seeds."""
    rows = {"PureJaxRL": [], "ours": [], "ours, 16 seeds": []}
    steps = ROLLOUT * iterations
    config = CONFIG | {"TOTAL_TIMESTEPS": steps}
    for _ in range(repeats):
        rows["PureJaxRL"].append(compiled_speed(python, checkout, "ppo", config))
        rows["ours"].append(speed(MINATAR, steps)["sps"])
        seeds = f"{MINATAR} --num-seeds 16"
        rows["ours, 16 seeds"].append(speed(seeds, steps // 4)["sps"])
    return rows


def calculate(epochs: int = 4, steps: int = 128) -> None:
    """Prints what an iteration of Atari costs, by number of environments."""
    forward = 2 * MULTIPLICATIONS
    update = forward * 3 * epochs  # a gradient costs two forward passes more
    print("environments | MB to the device an iteration | GFlop rollout | GFlop update")
    for envs in (8, 16, 32, 64, 128, 256):
        rows = envs * steps
        megabytes = rows * FRAMES / 1e6
        print(f"{envs} | {megabytes:.0f} | {rows * forward / 1e9:.0f} | {rows * update / 1e9:.0f}")
    print(f"a step: {FRAMES} bytes, {forward / 1e6:.1f} + {update / 1e6:.0f} MFlop")


def main(
    peer_python: str = sys.executable,
    purejaxrl: Path | None = None,
    repeats: int = 3,
    iterations: int = 20,
    only_calculate: bool = False,
) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    calculate()
    if only_calculate:
        return
    path = ROOT / "benchmarks/results/speed_atari.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    rows = pixels(peer_python, repeats, iterations)
    content["Pong, steps per second"] = rows
    ratio = np.median(rows["ours"]) / np.median(rows["Stable-Baselines3"])
    content["Pong, ours / Stable-Baselines3"] = ratio
    if purejaxrl is not None:
        rows = minatar(peer_python, purejaxrl, repeats, 4 * iterations)
        middle = {name: np.median(values) for name, values in rows.items()}
        content["MinAtar, steps per second"] = rows
        content["MinAtar, ours / PureJaxRL"] = middle["ours"] / middle["PureJaxRL"]
        content["MinAtar, 16 seeds / one"] = middle["ours, 16 seeds"] / middle["ours"]
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
