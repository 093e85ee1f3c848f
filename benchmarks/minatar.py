"""MinAtar at 10M steps: ppo_atari.py against PureJaxRL's ppo.py, on the same games and seeds.

    python benchmarks/minatar.py  # ours; goes on where it was
    python benchmarks/minatar.py --games Breakout --variants "PureJaxRL's entropy bonus"
    python benchmarks/minatar.py --purejaxrl CHECKOUT --peer-python ../peers/bin/python  # theirs

where CHECKOUT is github.com/luchris429/purejaxrl's folder purejaxrl, run with the settings of its
notebook on MinAtar, and that Python has what it needs. Seeds run side by side in one process. A
score is the mean return of the episodes that ended in the last 1 % of the steps (theirs), of the
last 100 training episodes (ours). Writes benchmarks/results/minatar.json and minatar.png.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tyro
from curves import draw, line_of
from speed_atari import CONFIG, ROOT

GAMES = ("Breakout", "Asterix", "Freeway", "SpaceInvaders")
FLAGS = (
    "--num-envs 64 --num-steps 128 --num-minibatches 8 --learning-rate 2.5e-3 --clip-coef 0.2"
    " --log-interval 10 --checkpoint-interval 50"
)
VARIANTS = {  # of ours
    "ours": "--ent-coef 0.03",
    "PureJaxRL's entropy bonus": "--ent-coef 0.01",
}
PUREJAXRL = """
import json, sys, jax, numpy as np
sys.path.insert(0, sys.argv[1])
from ppo import make_train
config = json.loads(sys.argv[2])
keys = jax.random.split(jax.random.PRNGKey(30), int(sys.argv[3]))
info = jax.jit(jax.vmap(make_train(config)))(keys)["metrics"]
ended = np.asarray(info["returned_episode"])
returns = np.asarray(info["returned_episode_returns"])
last = max(ended.shape[1] // 100, 1)
total = (ended * returns)[:, -last:].reshape(len(ended), -1).sum(axis=1)
print(json.dumps((total / ended[:, -last:].reshape(len(ended), -1).sum(axis=1)).tolist()))
"""


def ours(game: str, variant: str, num_seeds: int, steps: int) -> dict:
    """Returns the line of a run of ours, as curves.py has it."""
    folder = ROOT / "runs/minatar" / f"{game}, {variant}"
    settings = ["--env-id", f"gymnax/{game}-MinAtar", "--num-seeds", str(num_seeds)]
    settings += ["--total-timesteps", str(steps), "--exp-name", variant]
    settings += ["--run-dir", str(folder), *FLAGS.split(), *VARIANTS[variant].split()]
    line = [sys.executable, str(ROOT / "ppo_atari.py"), *settings]
    subprocess.run(line, check=True, stderr=subprocess.DEVNULL)
    return line_of(folder, "charts/episodic_return_100")  # Freeway's episodes all end at once


def theirs(python: str, checkout: Path, game: str, num_seeds: int, steps: int) -> list[float]:
    """Returns PureJaxRL's scores of seeds."""
    config = CONFIG | {"ENV_NAME": f"{game}-MinAtar", "TOTAL_TIMESTEPS": steps}
    line = [python, "-c", PUREJAXRL, str(checkout), json.dumps(config), str(num_seeds)]
    core = min(os.sched_getaffinity(0))  # on two, jaxlib 0.10 locks up in several seeds' weights
    given = {"check": True, "stdout": subprocess.PIPE, "text": True}
    out = subprocess.run(line, preexec_fn=lambda: os.sched_setaffinity(0, {core}), **given).stdout
    return json.loads(out.splitlines()[-1])


def main(
    games: tuple[str, ...] = GAMES,
    variants: tuple[str, ...] = ("ours",),
    num_seeds: int = 5,
    total_timesteps: int = 10_000_000,
    purejaxrl: Path | None = None,
    peer_python: str = sys.executable,
) -> None:
    """Runs what is missing, and prints both scores and their ratio."""
    path = ROOT / "benchmarks/results/minatar.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for game in games:
        entry = found.setdefault(game, {})
        for variant in variants:
            if variant not in entry:
                entry[variant] = ours(game, variant, num_seeds, total_timesteps)
        if purejaxrl is not None and "PureJaxRL" not in entry:
            arguments = (peer_python, purejaxrl, game, num_seeds, total_timesteps)
            entry["PureJaxRL"] = theirs(*arguments)
        path.write_text(json.dumps(found) + "\n")
        scores = {x: entry[x]["episodic_return"] for x in VARIANTS if x in entry}
        if "PureJaxRL" in entry:
            scores["PureJaxRL"] = entry["PureJaxRL"]
        for name, values in scores.items():
            print(f"{game}, {name}: {np.mean(values):.1f} +- {np.std(values):.1f}", flush=True)
    lines = [entry[x] for entry in found.values() for x in VARIANTS if x in entry]
    draw(lines, path.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
