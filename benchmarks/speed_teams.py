"""Whole-run speed of ppo_multiagent.py against bare environments and JaxMARL, in turn.

    python benchmarks/speed_teams.py
    python benchmarks/speed_teams.py --jaxmarl CHECKOUT --peer-python ../peers/bin/python

where CHECKOUT is github.com/FLAIROx/JaxMARL's folder baselines/IPPO, and that Python has what it
needs. Bare: the environment's own steps, resets included, with random actions that are allowed,
compiled as one loop and nothing else. JaxMARL: its ippo_ff_mpe.py on simple_spread, both with its
settings but 64 environments. Steps per second leave compilation out; a step is that of all agents.
Writes benchmarks/results/speed_teams.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tyro
from speed import ROOT, ours, printed_speed

ENVS = 64
OURS = f"--num-envs {ENVS} --log-interval 10 --checkpoint-interval 1000"
TASKS = {  # environment, scenario
    "LBF 2s-8x8-2p-2f-coop": ("jumanji/LevelBasedForaging-v0", "2s-8x8-2p-2f-coop"),
    "RobotWarehouse tiny-2ag": ("jumanji/RobotWarehouse-v0", "tiny-2ag"),
    "RobotWarehouse tiny-4ag": ("jumanji/RobotWarehouse-v0", "tiny-4ag"),
    "simple_spread": ("jaxmarl/MPE_simple_spread_v3", ""),
}
JUMANJI = """
import jumanji
from jumanji import wrappers
if "Foraging" in name:
    from jumanji.environments.routing.lbf.generator import RandomGenerator
    from ppo_multiagent import foraging as read
else:
    from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator
    from ppo_multiagent import robot_warehouse as read
env = jumanji.make(name, generator=RandomGenerator(**read(scenario)))
env = wrappers.VmapAutoResetWrapper(env)
def reset(keys):
    state, time_step = env.reset(keys)
    return state, time_step.observation.action_mask
def step(carry, key):
    state, mask = carry
    logits = jnp.where(mask, 0.0, -jnp.inf)
    action = jax.random.categorical(key, logits).astype(jnp.int32)
    state, time_step = env.step(state, action)
    return (state, time_step.observation.action_mask), time_step.reward.sum()
"""
JAXMARL_BARE = """
import jaxmarl
env = jaxmarl.make(name)
def reset(keys):
    return jax.vmap(env.reset)(keys)[1]
def step(state, key):
    drawn = jax.random.randint(key, (len(env.agents), envs), 0, 5)
    action = dict(zip(env.agents, drawn))
    keys = jax.random.split(key, envs)
    _, state, reward, _, _ = jax.vmap(env.step)(keys, state, action)
    return state, sum(x.sum() for x in reward.values())
"""
BARE = """
import sys, time, jax, jax.numpy as jnp
root, name, scenario = sys.argv[1:4]
envs, steps = int(sys.argv[4]), int(sys.argv[5])
sys.path.insert(0, root)
{environment}
def walk(key):
    first, rest = jax.random.split(key)
    started = reset(jax.random.split(first, envs))
    return jax.lax.scan(step, started, jax.random.split(rest, steps))[1].sum()
walk = jax.jit(walk).lower(jax.random.PRNGKey(0)).compile()
start = time.perf_counter()
jax.block_until_ready(walk(jax.random.PRNGKey(0)))
print("sps", envs * steps / (time.perf_counter() - start))
"""
CONFIG = {  # of baselines/IPPO/config/ippo_ff_mpe.yaml
    "LR": 2.5e-4,
    "NUM_ENVS": ENVS,  # 16 there
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
    "ENV_NAME": "MPE_simple_spread_v3",
    "ENV_KWARGS": {},
    "ANNEAL_LR": True,
}
SAME = (
    f"{OURS} --env-id jaxmarl/MPE_simple_spread_v3 --algorithm ippo --num-steps 128"
    " --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --hidden-sizes 64 64"
    " --critic-sizes 64 64 --activation tanh --clip-vloss"
)
JAXMARL = """
import json, sys, time, jax
sys.path.insert(0, sys.argv[1])
import wandb
from ippo_ff_mpe import make_train
wandb.init(mode="disabled")
config = json.loads(sys.argv[2])
train = jax.jit(make_train(config)).lower(jax.random.PRNGKey(30)).compile()
start = time.perf_counter()
jax.block_until_ready(train(jax.random.PRNGKey(30)))
steps = config["NUM_UPDATES"] * config["NUM_STEPS"] * config["NUM_ENVS"]
print("sps", steps / (time.perf_counter() - start))
"""


def main(
    jaxmarl: Path | None = None,
    peer_python: str = sys.executable,
    repeats: int = 3,
    iterations: int = 100,
) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    rows: dict[str, list[float]] = {}
    pairs: dict[str, tuple[str, str]] = {}

    def measure(name: str, flags: str, peer: str, line: list[str]) -> None:
        rows.setdefault(peer, []).append(printed_speed(line))
        rows.setdefault(f"ours, {name}", []).append(ours(flags, "ppo_multiagent.py")["sps"])
        pairs[f"{name}: ours / {peer}"] = (f"ours, {name}", peer)

    for _ in range(repeats):
        for name, (env_id, scenario) in TASKS.items():
            steps = 32 * iterations
            flags = f"{OURS} --env-id {env_id} --total-timesteps {ENVS * steps}"
            if scenario:
                flags += f" --scenario {scenario}"
            library, _, task = env_id.partition("/")
            code = BARE.format(environment=JUMANJI if library == "jumanji" else JAXMARL_BARE)
            line = [sys.executable, "-c", code, str(ROOT), task, scenario, str(ENVS), str(steps)]
            measure(name, flags, f"{name}, bare", line)
        if jaxmarl is not None:
            steps = ENVS * 128 * iterations
            line = [peer_python, "-c", JAXMARL, str(jaxmarl)]
            line.append(json.dumps(CONFIG | {"TOTAL_TIMESTEPS": steps}))
            measure("IPPO", f"{SAME} --total-timesteps {steps}", "JaxMARL's ippo_ff_mpe.py", line)
    content = {
        name: float(np.median(rows[mine]) / np.median(rows[peer]))
        for name, (mine, peer) in pairs.items()
    }
    content["steps per second"] = rows
    path = ROOT / "benchmarks/results/speed_teams.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
