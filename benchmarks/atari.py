"""Atari at 10M steps, 3 seeds a game: returns, human-normalised scores, curves. For a GPU.

    python benchmarks/atari.py  # Pong, Breakout, MsPacman, Qbert; goes on where it was
    python benchmarks/atari.py --games Pong
    python benchmarks/atari.py --every-game  # all 57
    python benchmarks/atari.py --games Pong --flags="--obs ram --num-envs 16" --name ram
    python benchmarks/curves.py runs/atari/ppo/Pong --out pong.png  # draws a run

A game's seeds run side by side in one process, with the script's defaults but for --flags. A score
is the mean return of the last 100 training episodes. Writes benchmarks/results/atari.json, a line
for each game and name; what stands there is not run again.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tyro
from curves import line_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from ppo_atari import RANDOM_AND_HUMAN

ROOT = Path(__file__).parents[1]
BARS = {"Pong": 20.6, "Breakout": 466, "MsPacman": 2574, "Qbert": 17318}  # at 10M steps


def trained(game: str, name: str, num_seeds: int, steps: int, flags: str) -> dict:
    """Returns the line of a game's run, which goes on or begins."""
    folder = ROOT / "runs/atari" / name / game
    settings = ["--env-id", f"{game}-v5", "--num-seeds", str(num_seeds), "--exp-name", name]
    settings += ["--total-timesteps", str(steps), "--run-dir", str(folder), *flags.split()]
    line = [sys.executable, str(ROOT / "ppo_atari.py"), *settings]
    subprocess.run(line, check=True)
    return line_of(folder)


def say(game: str, line: dict) -> None:
    """Prints what a game's run has come to."""
    returns = np.array(line["episodic_return"])
    random, human = RANDOM_AND_HUMAN[game]
    normalised = (returns.mean() - random) / (human - random)
    bar = f", bar {BARS[game]}" if game in BARS else ""
    score = f"{returns.mean():.1f} +- {returns.std():.1f}"
    extent = f"{len(returns)} seeds, {line['args']['total_timesteps']} steps"
    said = f"{line['name']}, {extent}: {score}, human-normalised {normalised:.2f}{bar}"
    print(said, flush=True)


def main(
    games: tuple[str, ...] = tuple(BARS),
    every_game: bool = False,
    name: str = "ppo",
    num_seeds: int = 3,
    total_timesteps: int = 10_000_000,
    flags: str = "",
) -> None:
    """Runs what is missing."""
    path = ROOT / "benchmarks/results/atari.json"
    lines = json.loads(path.read_text()) if path.exists() else {}
    for game in RANDOM_AND_HUMAN if every_game else games:
        key = f"{game} {name}"
        if key not in lines:
            lines[key] = trained(game, name, num_seeds, total_timesteps, flags)
            path.write_text(json.dumps(lines) + "\n")
        say(game, lines[key])


if __name__ == "__main__":
    tyro.cli(main)
