"""Whole-run speed of ppo_icm_lstm.py against its peers, in turn on one machine.

    python benchmarks/speed_memory.py --peer-python ../peers/bin/python
    python benchmarks/speed_memory.py --peer-python ../peers/bin/python --purejaxrl CHECKOUT
    python benchmarks/speed_memory.py --pairs "no memory, ours / ppo_continuous.py"

where that Python has sb3-contrib, and for PureJaxRL what CHECKOUT,
github.com/luchris429/purejaxrl's folder purejaxrl, needs. Each pair has the same settings:

1. An LSTM on CartPole-v1 against sb3-contrib's RecurrentPPO: 8 environments, 128 steps, 10 epochs
   of 8 minibatches, one LSTM of 64 units below policy and value, two layers of 64 above it.
2. No memory, on HalfCheetah-v4, against ppo_continuous.py: both with this script's defaults.
3. gymnax/CartPole-v1 against PureJaxRL's ppo.py and ppo_rnn.py, at their own settings.

Steps per second leave compilation out. Writes benchmarks/results/speed_memory.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tyro
from speed import ROOT, SETTINGS, compiled_speed, ours, printed_speed

SCRIPT = "ppo_icm_lstm.py"
LSTM = (
    "--env-id CartPole-v1 --num-envs 8 --num-steps 128 --num-minibatches 8 --recurrence lstm"
    " --memory-size 64 --hidden-sizes 64 64 --critic-sizes 64 64"
)
CONTRIB = """
import sys, time, gymnasium
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
env = make_vec_env("CartPole-v1", 8, seed=1)
network = dict(lstm_hidden_size=64, shared_lstm=True, enable_critic_lstm=False)
network["net_arch"] = [64, 64]
settings = dict(n_steps=128, batch_size=128, n_epochs=10, policy_kwargs=network)
model = RecurrentPPO("MlpLstmPolicy", env, seed=1, device="cpu", **settings)
model.learn(1024)
steps = 1024 * int(sys.argv[1])
start = time.perf_counter()
model.learn(steps)
print("sps", steps / (time.perf_counter() - start))
"""
PLAIN = (
    "--env-id HalfCheetah-v4 --num-envs 16 --num-steps 128 --num-minibatches 8 --norm-adv"
    " --no-recompute-advantages --critic-sizes 64 64 --vf-coef 0.5 --log-std-init 0"
    " --learning-rate 1e-3"
)
CONFIG = SETTINGS | {  # of both, as they stand in their files
    "LR": 2.5e-4,
    "NUM_ENVS": 4,
    "ENV_NAME": "CartPole-v1",
}
NATIVE = (
    "--env-id gymnax/CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4"
    " --update-epochs 4 --learning-rate 2.5e-4 --clip-vloss --log-interval 100"
    " --checkpoint-interval 1000 --no-norm-obs --no-norm-reward"
)
GRU = (
    f"{NATIVE} --recurrence gru --memory-size 128 --hidden-sizes 128 --critic-sizes 128"
    " --activation relu"
)


def speed(flags: str, steps: int, script: str = SCRIPT) -> float:
    """Returns the steps per second of a run of ours."""
    return ours(f"{flags} --total-timesteps {steps}", script)["sps"]


PAIRS = {
    "LSTM, ours / sb3-contrib": ("ours, LSTM", "sb3-contrib"),
    "no memory, ours / ppo_continuous.py": ("ours, none", "ppo_continuous.py"),
    "gymnax, ours / PureJaxRL": ("ours, gymnax", "PureJaxRL ppo"),
    "gymnax with GRU, ours / PureJaxRL": ("ours, gymnax, GRU", "PureJaxRL ppo_rnn"),
}


def main(
    pairs: tuple[str, ...] = tuple(PAIRS),
    peer_python: str = sys.executable,
    purejaxrl: Path | None = None,
    repeats: int = 3,
    iterations: int = 20,
) -> None:
    """Measures pairs `repeats` times in turn, and writes the medians of their ratios.

    What is there of other pairs stays.

    Args:
        purejaxrl: without it, pairs with PureJaxRL are left out.
    """
    steps = 1024 * iterations

    def compiled(module: str, steps: int) -> float:
        config = CONFIG | {"TOTAL_TIMESTEPS": steps}
        return compiled_speed(peer_python, purejaxrl, module, config)

    measures = {
        "sb3-contrib": lambda: printed_speed([peer_python, "-c", CONTRIB, str(iterations)]),
        "ours, LSTM": lambda: speed(LSTM, 5 * steps),
        "ppo_continuous.py": lambda: speed(PLAIN, 10 * steps, "ppo_continuous.py"),
        "ours, none": lambda: speed(f"{PLAIN} --ent-coef 0", 10 * steps),
        "PureJaxRL ppo": lambda: compiled("ppo", 50 * steps),
        "ours, gymnax": lambda: speed(NATIVE, 50 * steps),
        "PureJaxRL ppo_rnn": lambda: compiled("ppo_rnn", 5 * steps),
        "ours, gymnax, GRU": lambda: speed(GRU, 5 * steps),
    }
    path = ROOT / "benchmarks/results/speed_memory.json"
    content = json.loads(path.read_text()) if path.exists() else {"steps per second": {}}
    for pair in pairs:
        mine, theirs = PAIRS[pair]
        if "PureJaxRL" in theirs and purejaxrl is None:
            continue
        rows = {theirs: [], mine: []}
        for _ in range(repeats):
            for name, found in rows.items():
                found.append(measures[name]())
        content[pair] = float(np.median(np.divide(rows[mine], rows[theirs])))
        content["steps per second"] |= rows
        path.write_text(json.dumps(content, indent=2) + "\n")
        print(f"{pair}: {content[pair]:.2f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
