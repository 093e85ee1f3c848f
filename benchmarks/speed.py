"""Whole-run speed of ppo_continuous.py against Stable-Baselines3, alternating on one machine.

    python benchmarks/speed.py --peer-python ../peers/bin/python

where that Python has stable-baselines3 and gymnasium[mujoco]. Both train HalfCheetah-v4 with
observation and reward normalisation and logging. Steps per second leave compilation out (ours:
result.json's sps; theirs has none). Also the cost of an update against a bare fused loop with the
same networks, minibatches and epochs, but without statistics, metrics or masks.
Writes benchmarks/results/speed.json.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def bare_mlp(layers: list, x: jax.Array) -> jax.Array:
    """Returns what a tanh network, a list of (kernel, bias), makes of x."""
    for kernel, bias in layers[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = layers[-1]
    return x @ kernel + bias


def bare_loss(params, obs, action, log_prob, advantage, target):
    """Returns PPO's loss of a minibatch, and nothing else."""
    actor, critic, log_std = params
    scaled = (action - bare_mlp(actor, obs)) * jnp.exp(-log_std)
    ratio = jnp.exp(jnp.sum(-0.5 * scaled**2 - log_std - 0.919, axis=-1) - log_prob)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    policy_loss = jnp.maximum(-advantage * ratio, -advantage * clipped).mean()
    return policy_loss + 0.25 * jnp.mean((bare_mlp(critic, obs)[:, 0] - target) ** 2)


BARE_OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-4, eps=1e-5))


def bare_minibatch(carry, batch):
    params, opt_state = carry
    updates, opt_state = BARE_OPTIMIZER.update(jax.grad(bare_loss)(params, *batch), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None


@jax.jit
def bare_update(carry, key, data):
    """Returns (parameters, Adam's state) after 10 epochs of 32 minibatches of 64."""

    def epoch(carry, key):
        order = jax.random.permutation(key, 2048).reshape(32, 64)
        return jax.lax.scan(bare_minibatch, carry, jax.tree.map(lambda x: x[order], data))

    return jax.lax.scan(epoch, carry, jax.random.split(key, 10))[0]


def bare_update_sps() -> float:
    """Returns transitions per second of the bare loop, with 64 x 64 tanh networks."""
    random = np.random.default_rng(0)

    def layers(*sizes):
        pairs = itertools.pairwise(sizes)
        return [(jnp.float32(random.normal(0, a**-0.5, (a, b))), jnp.zeros(b)) for a, b in pairs]

    params = (layers(17, 64, 64, 6), layers(17, 64, 64, 1), jnp.zeros(6))
    shapes = ((2048, 17), (2048, 6), (2048,), (2048,), (2048,))
    data = tuple(jnp.float32(random.normal(0, 1, shape)) for shape in shapes)
    carry = bare_update((params, BARE_OPTIMIZER.init(params)), jax.random.key(0), data)
    start = time.perf_counter()
    for i in range(10):
        carry = jax.block_until_ready(bare_update(carry, jax.random.key(i), data))
    return 10 * 2048 / (time.perf_counter() - start)


def main(peer_python: str, repeats: int = 3) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    base = "Stable-Baselines3, 1 x 2048"
    rows = {name: [] for name in (base, "bare update", "our update, 1 x 2048", *CASES)}
    for _ in range(repeats):
        rows[base].append(peer(peer_python))
        for name, flags in CASES.items():
            result = ours(flags)
            rows[name].append(result["sps"])
            if name == "1 x 2048":
                rows["our update, 1 x 2048"].append(result["sps_update"])
        rows["bare update"].append(bare_update_sps())
    middle = {name: float(np.median(values)) for name, values in rows.items()}
    ratios = {f"{name} / Stable-Baselines3": middle[name] / middle[base] for name in CASES}
    cost = middle["bare update"] / middle["our update, 1 x 2048"]
    ratios["update cost / bare update cost"] = cost
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
