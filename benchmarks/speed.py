"""Whole-run speed of ppo_continuous.py against Stable-Baselines3, alternating on one machine.

    python benchmarks/speed.py --peer-python ../peers/bin/python

where that Python has stable-baselines3 and gymnasium[mujoco]. Both train HalfCheetah-v4 with
observation and reward normalisation and logging. Steps per second leave compilation out (ours:
result.json's sps; theirs has none). Writes benchmarks/results/speed.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
CLEANRL = (  # Stable-Baselines3's defaults are much the same
    "--num-envs 1 --num-steps 2048 --num-minibatches 32 --no-recompute-advantages --norm-adv"
    " --clip-vloss --vf-coef 0.5 --log-std-init 0 --critic-sizes 64 64"
)
EIGHT = f"{CLEANRL} --num-envs 8 --num-steps 256"
CASES = {
    "1 x 2048": f"{CLEANRL} --total-timesteps 40960",
    "8 x 256": f"{EIGHT} --total-timesteps 81920",
    "1 x 2048, 8 seeds": f"{CLEANRL} --num-seeds 8 --total-timesteps 20480",
    "8 x 256, 8 seeds": f"{EIGHT} --num-seeds 8 --total-timesteps 20480",
}
PEER = """
import time
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
env = VecNormalize(make_vec_env("HalfCheetah-v4", 1, seed=1))
model = PPO("MlpPolicy", env, n_steps=2048, batch_size=64, n_epochs=10, seed=1, device="cpu")
model.learn(2048)
start = time.perf_counter()
model.learn(4096)
print("sps", 4096 / (time.perf_counter() - start))
"""


SETTINGS = {  # that PureJaxRL's and JaxMARL's scripts share
    "NUM_STEPS": 128,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 0.5,
    "ACTIVATION": "tanh",
    "ANNEAL_LR": True,
    "DEBUG": False,
}
COMPILED = """
import importlib, json, sys, time, jax
sys.path.insert(0, sys.argv[1])
make_train = importlib.import_module(sys.argv[2]).make_train
config = json.loads(sys.argv[3])
train = jax.jit(make_train(config)).lower(jax.random.PRNGKey(30)).compile()
start = time.perf_counter()
jax.block_until_ready(train(jax.random.PRNGKey(30)))
steps = config["NUM_UPDATES"] * config["NUM_STEPS"] * config["NUM_ENVS"]
print("sps", steps / (time.perf_counter() - start))
"""


def printed_speed(line: list[str]) -> float:
    """Returns the steps per second that a command prints last."""
    out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return float(out.split("sps")[-1])


def compiled_speed(
    python: str, checkout: Path, module: str, config: dict, before: str = ""
) -> float:
    """Returns the steps per second of PureJaxRL's or JaxMARL's make_train, without compilation.

    Args:
        before: code that the module needs to have run.
    """
    code = before + COMPILED
    return printed_speed([python, "-c", code, str(checkout), module, json.dumps(config)])


def ours(flags: str, script: str = "ppo_continuous.py") -> dict:
    """Returns the content of result.json of a run of one of our scripts."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, str(ROOT / script), *flags.split(), "--run-dir", folder]
        subprocess.run(run, check=True, capture_output=True)
        return json.loads((Path(folder) / "result.json").read_text())


def peer(python: str) -> float:
    """Returns Stable-Baselines3's steps per second."""
    out = subprocess.run([python, "-c", PEER], check=True, capture_output=True, text=True).stdout
    return float(out.split("sps")[-1])


def main(peer_python: str, repeats: int = 3) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    base = "Stable-Baselines3, 1 x 2048"
    rows = {name: [] for name in (base, *CASES)}
    for _ in range(repeats):
        rows[base].append(peer(peer_python))
        for name, flags in CASES.items():
            result = ours(flags)
            rows[name].append(result["sps"])
    middle = {name: float(np.median(values)) for name, values in rows.items()}
    ratios = {f"{name} / Stable-Baselines3": middle[name] / middle[base] for name in CASES}
    content = {
        "steps_per_second": rows,
        "ratios of medians": ratios,
        "versions": result["versions"],
        "device": result["device"],
        "command": "python benchmarks/speed.py --peer-python PYTHON",
    }
    (ROOT / "benchmarks/results/speed.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
