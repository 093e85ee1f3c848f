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
from speed import ROOT, SETTINGS, compiled_speed, ours, printed_speed

SCRIPT = "ppo_multiagent.py"
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
JAXMARL = """
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
CONFIG = SETTINGS | {  # of baselines/IPPO/config/ippo_ff_mpe.yaml
    "LR": 2.5e-4,
    "NUM_ENVS": ENVS,  # 16 there
    "ENV_NAME": "MPE_simple_spread_v3",
    "ENV_KWARGS": {},
}
SAME = (
    f"{OURS} --env-id jaxmarl/MPE_simple_spread_v3 --algorithm ippo --num-steps 128"
    " --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --hidden-sizes 64 64"
    " --critic-sizes 64 64 --activation tanh --clip-vloss"
)
BEFORE = """
import wandb  # which the script tells of every update
wandb.init(mode="disabled")
"""


def bare(env_id: str, scenario: str, steps: int) -> float:
    """Returns the steps per second of an environment alone."""
    library, _, name = env_id.partition("/")
    code = BARE.format(environment=JUMANJI if library == "jumanji" else JAXMARL)
    arguments = [str(ROOT), name, scenario, str(ENVS), str(steps)]
    return printed_speed([sys.executable, "-c", code, *arguments])


def main(
    jaxmarl: Path | None = None,
    peer_python: str = sys.executable,
    repeats: int = 3,
    iterations: int = 100,
) -> None:
    """Measures everything `repeats` times in turn, and writes medians' ratios."""
    rows: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, (env_id, scenario) in TASKS.items():
            alone = bare(env_id, scenario, 32 * iterations)
            rows.setdefault(f"{name}, bare", []).append(alone)
            flags = f"{OURS} --env-id {env_id} --total-timesteps {ENVS * 32 * iterations}"
            if scenario:
                flags += f" --scenario {scenario}"
            rows.setdefault(name, []).append(ours(flags, SCRIPT)["sps"])
        if jaxmarl is not None:
            steps = ENVS * 128 * iterations
            config = CONFIG | {"TOTAL_TIMESTEPS": steps}
            theirs = compiled_speed(peer_python, jaxmarl, "ippo_ff_mpe", config, BEFORE)
            rows.setdefault("simple_spread, JaxMARL", []).append(theirs)
            found = ours(f"{SAME} --total-timesteps {steps}", SCRIPT)
            rows.setdefault("simple_spread, its settings", []).append(found["sps"])
    middle = {name: float(np.median(values)) for name, values in rows.items()}
    content = {f"{x}, over bare": middle[x] / middle[f"{x}, bare"] for x in TASKS}
    if jaxmarl is not None:
        ratio = middle["simple_spread, its settings"] / middle["simple_spread, JaxMARL"]
        content["simple_spread, over JaxMARL"] = ratio
    content["steps per second"] = rows
    path = ROOT / "benchmarks/results/speed_teams.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
