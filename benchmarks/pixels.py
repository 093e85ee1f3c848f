"""A game from pixels for an hour, side by side with Stable-Baselines3: returns at the same step.

    python benchmarks/pixels.py --peer-python ../peers/bin/python

where that Python has stable-baselines3[extra] with its Atari games. Both have the Nature network,
8 environments, 128 steps, 4 epochs of 4 minibatches, and a step size that goes to zero over 10M
steps, of which they get as far as --minutes go; each has half of the cores to itself. Prints what
both had at the same steps, and writes benchmarks/results/pixels.json and pixels.png.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import tyro
from curves import RETURN, draw, read, smooth

ROOT = Path(__file__).parents[1]
PEER = """
import sys, time, ale_py, gymnasium
gymnasium.register_envs(ale_py)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

class Watch(BaseCallback):
    end = time.monotonic() + 60 * float(sys.argv[2])

    def _on_step(self):
        for info in self.locals["infos"]:
            if "episode" in info:
                print(self.num_timesteps, info["episode"]["r"], flush=True)
        return time.monotonic() < self.end

env = VecFrameStack(make_atari_env(sys.argv[1] + "NoFrameskip-v4", 8, seed=1), 4)
settings = dict(n_steps=128, batch_size=256, n_epochs=4, clip_range=0.1, ent_coef=0.01, vf_coef=0.5)
settings["learning_rate"] = lambda left: 2.5e-4 * left
PPO("CnnPolicy", env, seed=1, device="cpu", **settings).learn(10_000_000, callback=Watch())
"""


def start(line: list[str], cores: list[int], **more) -> subprocess.Popen:
    """Starts a program on some of the cores."""
    return subprocess.Popen(line, preexec_fn=lambda: os.sched_setaffinity(0, cores), **more)


def train(game: str, peer_python: str, minutes: float, folder: Path) -> None:
    """Trains both, ours in folder/ours, and has the peer's episodes written to folder/peer.txt."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if half == 0:
        sys.exit("two cores are needed, one for each")
    folder.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, str(ROOT / "ppo_atari.py"), "--env-id", f"{game}-v5"]
    with open(folder / "peer.txt", "w") as episodes:
        line = [peer_python, "-c", PEER, game, str(minutes)]
        peer = start(line, cores[half:], stdout=episodes)
        ours = start([*script, "--clobber", "--run-dir", str(folder / "ours")], cores[:half])
        try:
            ours.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            ours.send_signal(signal.SIGINT)
        codes = ours.wait(), peer.wait()
    if codes != (130, 0):
        sys.exit(f"they ended with {codes}")


def main(game: str = "Pong", peer_python: str = "", minutes: float = 60) -> None:
    """Trains both, or, without --peer-python, shows again what they had."""
    folder = ROOT / "runs/pixels" / game
    if peer_python:
        train(game, peer_python, minutes, folder)
    found = {
        "ppo_atari.py": read(folder / "ours", RETURN),
        "Stable-Baselines3": np.loadtxt(folder / "peer.txt", ndmin=2).T,
    }
    lines = []
    for name, (steps, returns) in found.items():
        grid, means = smooth(steps, returns)
        line = {"name": f"{game}-v5 {name}", "env_id": f"{game}-v5"}
        lines.append(line | {"steps": grid.tolist(), "returns": [means.round(2).tolist()]})
    path = ROOT / "benchmarks/results/pixels.json"
    content = json.loads(path.read_text()) if path.exists() else []
    before = {line["name"]: line for line in content}
    lines = list((before | {line["name"]: line for line in lines}).values())
    path.write_text(json.dumps(lines) + "\n")
    draw(lines, path.with_suffix(".png"))
    last = min(steps[-1] for steps, _ in found.values())
    for step in np.arange(100_000, last + 1, 100_000):
        here = [y[np.abs(x - step) <= 50_000].mean() for x, y in found.values()]
        said = ", ".join(f"{name} {mean:.1f}" for name, mean in zip(found, here, strict=True))
        print(f"around step {step:.0f}: {said}")


if __name__ == "__main__":
    tyro.cli(main)
