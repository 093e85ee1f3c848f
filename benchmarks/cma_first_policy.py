"""How often PPO-CMA's first policy, before it has learnt anything, reaches the goal of MountainCarContinuous-v0.

python benchmarks/cma_first_policy.py  # as published, and with --action-repeat 4 --init-std 2: cma_first_policy.json
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import ppo_cma as cma

EPISODES = 1000


def reached(**settings: float) -> float:
    """Returns the share of first episodes that end at the goal: terminated, not cut off by the time limit."""
    small = {"num_envs": EPISODES, "num_steps": 999, "history_size": 1, "init_updates": 0}
    act, runner, _, learner, _env = cma.make_run(cma.Args(**small | settings))  # the pool must outlive the rollout
    _, transition = act(runner, learner._replace(opt_state=None))
    return float(np.mean(np.asarray(transition.terminated[0]).any(axis=0)))


if __name__ == "__main__":
    found = {"published": reached(), "--action-repeat 4 --init-std 2": reached(action_repeat=4, init_std=2.0)}
    content = {"share of episodes that reach the goal": found, "episodes": EPISODES, "env_id": cma.Args().env_id}
    Path(__file__).with_name("results").joinpath("cma_first_policy.json").write_text(
        json.dumps(content, indent=2) + "\n"
    )
    print(found)
