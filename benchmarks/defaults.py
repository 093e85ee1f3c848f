"""Which settings of ppo_continuous.py are best over continuous control as a whole, at 1M steps.

    python benchmarks/defaults.py  # every configuration on every tuning task; goes on where it was
    python benchmarks/defaults.py --configs m16 m8 --tasks Hopper-v4 --num-seeds 2
    python benchmarks/defaults.py --check --num-seeds 10  # the default on all tasks, new ones too

A configuration is flags, and replacements in the script's text for what is no flag (and does not
become one, as it did not win). Its seeds run side by side in one process, in the run folder
runs/defaults/<configuration>/<task>, where they resume. A score is the mean return of the last 100
training episodes, normalised per task: 0 is an untrained policy's, 1 is the bar, the best published
PPO's at 1M steps. Configurations are ranked by the interquartile mean over all tasks and seeds,
with a 95 % bootstrap interval, seeds drawn anew within tasks (Agarwal et al. 2021, 2108.13264).
Writes benchmarks/results/defaults.json; --check also plays the final policies, deterministically,
100 episodes a seed, and writes benchmarks/results/defaults_check.json.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from scipy.stats import trim_mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


class Task(NamedTuple):
    untrained: float  # mean return of the first policy: the configuration "untrained" measures it
    bar: float  # Tianshou's 10 seeds at 1M, best point of the curve; Box2D, Pendulum: other sources


TUNING = {
    "LunarLanderContinuous-v3": Task(-254, 250),
    "InvertedDoublePendulum-v4": Task(53, 9231),
    "Pendulum-v1": Task(-1228, -160),
    "Hopper-v4": Task(15, 2609),
    "HalfCheetah-v4": Task(-354, 5784),
    "BipedalWalker-v3": Task(-112, 290),
}
UNSEEN = (
    "Pusher-v4",
    "Reacher-v4",
    "CheetahRun-v1",
    "Walker2d-v4",
    "Ant-v4",
    "Swimmer-v4",
    "InvertedPendulum-v4",
    "Humanoid-v4",
)


TIANSHOU_10 = {  # Tianshou's 10 seeds at 1M, played deterministically, best point of the curve
    "HalfCheetah-v4": 5784,
    "Hopper-v4": 2609,
    "Walker2d-v4": 3589,
    "Ant-v4": 3258,
    "InvertedDoublePendulum-v4": 9231,
    "InvertedPendulum-v4": 1000,
    "Reacher-v4": -4.1,
    "Humanoid-v4": 787,
    "Swimmer-v4": 67,
}


class Config(NamedTuple):
    flags: str
    edits: tuple[tuple[str, str], ...] = ()  # (old, new) in the script's text


CLEANRL = (
    "--num-envs 1 --num-steps 2048 --num-minibatches 32 --no-recompute-advantages --norm-adv"
    " --clip-vloss --vf-coef 0.5 --critic-sizes 64 64 --log-std-init 0"
)
TIANSHOU = (
    "--num-envs 64 --num-steps 32 --num-minibatches 32 --recompute-advantages --no-norm-adv"
    " --no-clip-vloss --vf-coef 0.25 --critic-sizes 64 64 --log-std-init -0.5"
)
M16 = f"{TIANSHOU} --num-minibatches 16"
DEFAULT = f"{TIANSHOU} --num-envs 32 --num-steps 64 --num-minibatches 16 --critic-sizes 128 128"
WIDE = f"{DEFAULT} --critic-sizes 256 256"
DENSE = 'Dense(size, dtype=dtype, kernel_init=init, name=f"{name}_{i}")(x)'
NORM = f'nn.LayerNorm(name=f"{{name}}_norm_{{i}}")({DENSE})'
ADAM = "optax.scale_by_adam(eps=1e-5)"
CONFIGS = {
    "untrained": Config(f"{TIANSHOU} --learning-rate 1e-12 --no-anneal-lr --update-epochs 1"),
    "cleanrl": Config(CLEANRL),
    "tianshou": Config(TIANSHOU),
    "m16": Config(M16),
    "m8": Config(f"{TIANSHOU} --num-minibatches 8"),
    "m8, KL-adaptive": Config(f"{TIANSHOU} --num-minibatches 8 --adaptive-lr --no-anneal-lr"),
    "tianshou, lambda 0.9": Config(f"{TIANSHOU} --gae-lambda 0.9"),
    "m16, gamma 0.995": Config(f"{M16} --gamma 0.995"),
    "m16, 16 x 128": Config(f"{M16} --num-envs 16 --num-steps 128"),
    "default": Config(DEFAULT),
    "default, critic 64": Config(f"{DEFAULT} --critic-sizes 64 64"),
    "default, critic 256": Config(WIDE),
    "critic 256, m32": Config(f"{WIDE} --num-minibatches 32"),
    "critic 256, gamma 0.995": Config(f"{WIDE} --gamma 0.995"),
    "critic 256, gamma 0.9999": Config(f"{WIDE} --gamma 0.9999"),
    "critic 256, SiLU": Config(f"{WIDE} --activation silu"),
    "default, lr 5e-4": Config(f"{DEFAULT} --learning-rate 5e-4"),
    "default, norm-adv": Config(f"{DEFAULT} --norm-adv"),
    "default, std 1": Config(f"{DEFAULT} --log-std-init 0"),
    "default, std 0.47": Config(f"{DEFAULT} --log-std-init -0.75"),
    "default, std 0.37": Config(f"{DEFAULT} --log-std-init -1"),
    "default, advantages once": Config(f"{DEFAULT} --no-recompute-advantages"),
    "default, clip-vloss": Config(f"{DEFAULT} --clip-vloss"),
    "default, vf 0.5": Config(f"{DEFAULT} --vf-coef 0.5"),
    "default, 1 x 2048": Config(f"{DEFAULT} --num-envs 1 --num-steps 2048"),
    "default, layer norm": Config(DEFAULT, ((DENSE, NORM),)),
    "default, b2 0.99": Config(DEFAULT, ((ADAM, "optax.scale_by_adam(b2=0.99, eps=1e-5)"),)),
}


def script_of(name: str) -> Path:
    """Returns the path of the script that a configuration runs: ours, or a changed copy.

    Raises: ValueError where the text to be replaced is not there once.
    """
    original = ROOT / "ppo_continuous.py"
    edits = CONFIGS[name].edits
    if not edits:
        return original
    text = original.read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{name}: {old!r} is in ppo_continuous.py {text.count(old)} times")
        text = text.replace(old, new)
    path = ROOT / "runs/defaults" / name / original.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run(name: str, script: Path, flags: str, task: str, num_seeds: int, play: bool) -> dict:
    """Returns the content of result.json of a task's run, which goes on where it was."""
    folder = ROOT / "runs/defaults" / name / task
    command = [sys.executable, str(script), "--run-dir", str(folder)]
    settings = ["--env-id", task, "--num-seeds", str(num_seeds)]
    subprocess.run([*command, *settings, *flags.split()], check=True, stderr=subprocess.DEVNULL)
    if play:
        subprocess.run([*command, "--mode", "eval"], check=True, stderr=subprocess.DEVNULL)
    return json.loads((folder / "result.json").read_text())


def normalised(returns: dict[str, list[float]]) -> np.ndarray:
    """Returns scores [tasks, seeds] of the tuning tasks."""
    rows = [(np.array(returns[task]) - low) / (bar - low) for task, (low, bar) in TUNING.items()]
    return np.stack(rows)


def iqm(scores: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Returns the interquartile mean of scores [tasks, seeds] and its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    seeds = scores.shape[1]
    again = random.integers(seeds, size=(draws, *scores.shape))
    drawn = np.take_along_axis(scores[None], again, axis=2)
    means = trim_mean(drawn.reshape(draws, -1), 0.25, axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(trim_mean(scores.ravel(), 0.25)), float(low), float(high)


def report(found: dict) -> None:
    """Prints a table of configurations that have all tuning tasks, the best first."""
    whole = {name: x for name, x in found.items() if TUNING.keys() <= x["returns"].keys()}
    ranked = sorted(whole, key=lambda name: -iqm(normalised(whole[name]["returns"]))[0])
    for name in ranked:
        scores = normalised(whole[name]["returns"])
        middle, low, high = iqm(scores)
        whole[name]["iqm"] = [middle, low, high]
        tasks = " ".join(f"{x:.2f}" for x in scores.mean(axis=1))
        print(f"{name:26s} IQM {middle:.3f} [{low:.3f}, {high:.3f}]  tasks: {tasks}")


def sweep(num_seeds: int, configs: tuple[str, ...], tasks: tuple[str, ...]) -> None:
    """Runs what is missing, and ranks the configurations."""
    path = RESULTS / "defaults.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in configs or CONFIGS:
        script = script_of(name)
        config = CONFIGS[name]
        entry = found.setdefault(name, {"flags": config.flags, "edits": config.edits})
        returns = entry.setdefault("returns", {})
        for task in tasks or TUNING:
            if task not in returns:
                result = run(name, script, config.flags, task, num_seeds, play=False)
                returns[task] = result["episodic_return"]
                print(f"{name}, {task}: {np.round(returns[task], 1)}", flush=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
    report(found)
    path.write_text(json.dumps(found, indent=1) + "\n")


def check_defaults(num_seeds: int, tasks: tuple[str, ...]) -> None:
    """Runs the script's defaults on the tuning tasks and on tasks that the sweep never saw."""
    path = RESULTS / "defaults_check.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in tasks or (*TUNING, *UNSEEN):
        if task not in found:
            script = ROOT / "ppo_continuous.py"
            result = run(f"check-{num_seeds}", script, "", task, num_seeds, play=True)
            played = [row["mean"] for row in result["eval_return"]]
            names = ("seeds", "timesteps", "episodic_return", "sps", "args", "versions", "device")
            del result["args"]["run_dir"]  # of this machine
            found[task] = {"eval_return": played} | {name: result[name] for name in names}
            path.write_text(json.dumps(found, indent=1) + "\n")
        trained = found[task]["episodic_return"]
        played = found[task]["eval_return"]
        means = [f"{np.mean(x):.1f} +- {np.std(x):.1f}" for x in (trained, played)]
        print(f"{task}: training {means[0]}, played {means[1]}", flush=True)
    if TUNING.keys() <= found.keys():
        middle, low, high = iqm(normalised({x: found[x]["episodic_return"] for x in TUNING}))
        print(f"training, tasks of the sweep: IQM {middle:.3f} [{low:.3f}, {high:.3f}]")
    if TIANSHOU_10.keys() <= found.keys():
        ratios = np.array([over_tianshou(task, found) for task in TIANSHOU_10])
        means = f"mean {np.mean(ratios):.2f}, geometric {np.exp(np.mean(np.log(ratios))):.2f}"
        print(f"played, ours over Tianshou's: {means}")


def over_tianshou(task: str, found: dict) -> float:
    """Returns how many times Tianshou's return ours is; where both are costs, theirs over ours."""
    ours = np.mean(found[task]["eval_return"])
    theirs = TIANSHOU_10[task]
    return ours / theirs if theirs > 0 else theirs / ours


def main(
    num_seeds: int = 4,
    configs: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    check: bool = False,
) -> None:
    """Sweeps, or checks the defaults."""
    if check:
        check_defaults(num_seeds, tasks)
    else:
        sweep(num_seeds, configs, tasks)


if __name__ == "__main__":
    tyro.cli(main)
