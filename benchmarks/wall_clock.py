"""From pressing return to a HalfCheetah-v4 return of 1443, against Stable-Baselines3.

    python benchmarks/wall_clock.py --peer-python ../peers/bin/python

Both with their own defaults, one after the other, imports and compilation included. 1443 is what
CleanRL's script has after 1M steps; a return is the mean of the last 100 training episodes (ours:
charts/episodic_return_100; theirs: rollout/ep_rew_mean). Stable-Baselines3 trains --peer-steps of
its 1M steps; if it has not got there, it is given the time that the whole 1M take at that speed.
Writes benchmarks/results/wall_clock.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
GOAL = 1443
STEPS = 1_000_000
PEER = """
import sys, time
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

class Watch(BaseCallback):
    reached = None
    def _on_step(self):
        if not self.num_timesteps % 2048 and self.reached is None and self.model.ep_info_buffer:
            mean = np.mean([x["r"] for x in self.model.ep_info_buffer])
            if mean >= float(sys.argv[2]):
                self.reached = time.time()
        return True

watch = Watch()
model = PPO("MlpPolicy", "HalfCheetah-v4", seed=1, device="cpu")
began = time.time()
model.learn(int(sys.argv[1]), callback=watch)
sps = model.num_timesteps / (time.time() - began)
print("measured", began, watch.reached or 0, sps)
"""


def ours() -> dict[str, float]:
    """Returns the seconds to the goal, and steps per second of the whole run, of our default."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        run = [sys.executable, str(ROOT / "ppo_continuous.py"), "--env-id", "HalfCheetah-v4"]
        subprocess.run([*run, "--run-dir", folder], check=True, capture_output=True)
        seconds = time.time() - began
        events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
        returns = events.Scalars("charts/episodic_return_100")
        reached = [x.wall_time - began for x in returns if x.value >= GOAL]
        result = json.loads((Path(folder) / "result.json").read_text())
    goal = reached[0] if reached else float("inf")
    return {"seconds to the goal": goal, "steps per second": result["timesteps"] / seconds}


def peer(python: str, steps: int) -> dict[str, float]:
    """Returns the same of Stable-Baselines3."""
    pressed = time.time()
    run = [python, "-c", PEER, str(steps), str(GOAL)]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    began, reached, sps = map(float, out.split("measured")[-1].split())
    seconds = reached - pressed if reached else began - pressed + STEPS / sps
    return {
        "seconds to the goal": seconds,
        "steps per second": STEPS / (began - pressed + STEPS / sps),
    }


def main(peer_python: str, repeats: int = 1, peer_steps: int = STEPS) -> None:
    """Measures both in turn, and writes what they took and the ratios of the means."""
    rows = {"ours": [], "Stable-Baselines3": []}
    for _ in range(repeats):
        rows["ours"].append(ours())
        rows["Stable-Baselines3"].append(peer(peer_python, peer_steps))
    mean = {
        name: {key: sum(row[key] for row in found) / repeats for key in found[0]}
        for name, found in rows.items()
    }
    goal, speed = "seconds to the goal", "steps per second"
    content = {
        "rows": rows,
        "sooner at the goal": mean["Stable-Baselines3"][goal] / mean["ours"][goal],
        "steps per second, ours / theirs": mean["ours"][speed] / mean["Stable-Baselines3"][speed],
        "peer_steps": peer_steps,
    }
    path = ROOT / "benchmarks/results/wall_clock.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
