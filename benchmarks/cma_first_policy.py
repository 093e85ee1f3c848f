"""How often PPO-CMA's first policy, before it has learnt anything, reaches the goal of MountainCarContinuous-v0.

python benchmarks/cma_first_policy.py  # decisions held for 2 (published) to 8 (default) steps; data: results/
"""

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
    found = {f"--action-repeat {repeat}": reached(action_repeat=repeat) for repeat in (2, 4, 6, 8)}
    content = {"share of episodes that reach the goal": found, "episodes": EPISODES, "env_id": cma.Args().env_id}
    cma.write_json(Path(__file__).with_name("results") / "cma_first_policy.json", content)
    print(found)
