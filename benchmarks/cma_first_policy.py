"""How often PPO-CMA's first policy reaches MountainCarContinuous-v0's goal, having learnt nothing.

    python benchmarks/cma_first_policy.py  # decisions held for 2 (published) to 8 (default) steps

The data are in benchmarks/results/cma_first_policy.json.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import ppo_cma as cma

EPISODES = 1000
OUT = Path(__file__).with_name("results") / "cma_first_policy.json"


def share_that_reached(action_repeat: int) -> float:
    """Returns the share of first episodes that end at the goal, not at the time limit."""
    small = {"num_envs": EPISODES, "num_steps": 999, "history_size": 1, "init_updates": 0}
    args = cma.Args(action_repeat=action_repeat, **small)
    run = cma.make_run(args)
    _, transition = run.act(cma.first_runner(run), run.init())
    return float(np.mean(np.asarray(transition.terminated[0]).any(axis=0)))


if __name__ == "__main__":
    found = {f"--action-repeat {repeat}": share_that_reached(repeat) for repeat in (2, 4, 6, 8)}
    content = {
        "share of episodes that reach the goal": found,
        "episodes": EPISODES,
        "env_id": cma.Args().env_id,
    }
    OUT.write_text(json.dumps(content, indent=2) + "\n")
    print(found)
