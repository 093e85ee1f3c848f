"""Whole-run speed of ppo_icm_lstm.py against its peers, in turn on one machine.

    python benchmarks/speed_memory.py --peer-python ../peers/bin/python
    python benchmarks/speed_memory.py --peer-python ../peers/bin/python --purejaxrl CHECKOUT

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


def main(
    peer_python: str = sys.executable,
    purejaxrl: Path | None = None,
    repeats: int = 3,
    iterations: int = 20,
) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    rows: dict[str, list[float]] = {}

    def add(name: str, found: float) -> None:
        rows.setdefault(name, []).append(found)

    steps = 1024 * iterations
    for _ in range(repeats):
        add("sb3-contrib", printed_speed([peer_python, "-c", CONTRIB, str(iterations)]))
        add("ours, LSTM", speed(LSTM, 5 * steps))
        add("ppo_continuous.py", speed(PLAIN, 10 * steps, "ppo_continuous.py"))
        add("ours, none", speed(f"{PLAIN} --ent-coef 0", 10 * steps))
        if purejaxrl is not None:
            config = CONFIG | {"TOTAL_TIMESTEPS": 50 * steps}
            add("PureJaxRL ppo", compiled_speed(peer_python, purejaxrl, "ppo", config))
            add("ours, gymnax", speed(NATIVE, 50 * steps))
            config["TOTAL_TIMESTEPS"] = 5 * steps
            add("PureJaxRL ppo_rnn", compiled_speed(peer_python, purejaxrl, "ppo_rnn", config))
            add("ours, gymnax, GRU", speed(GRU, 5 * steps))
    middle = {name: float(np.median(values)) for name, values in rows.items()}
    pairs = {
        "LSTM, ours / sb3-contrib": ("ours, LSTM", "sb3-contrib"),
        "no memory, ours / ppo_continuous.py": ("ours, none", "ppo_continuous.py"),
        "gymnax, ours / PureJaxRL": ("ours, gymnax", "PureJaxRL ppo"),
        "gymnax with GRU, ours / PureJaxRL": ("ours, gymnax, GRU", "PureJaxRL ppo_rnn"),
    }
    content = {
        name: middle[a] / middle[b] for name, (a, b) in pairs.items() if a in middle and b in middle
    }
    content["steps per second"] = rows
    path = ROOT / "benchmarks/results/speed_memory.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
