"""Environments whose every number is known: for the tests, under ids such as scripted:Counter-v0."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict


class Counter(gymnasium.Env):
    """Counts to `length`, then ends; the reward is 1 less the squared distance of the action from 0.5.

    Every episode begins alike, and with its reset step fills `length + 1` steps: where those divide a rollout, a
    resumed run cannot be told from one that never stopped.
    """

    def __init__(self, length=7, end="truncated", space=None):
        self.length, self.end, self.count = length, end, 0
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (2,)), space or Box(-1, 1, (1,))

    def obs(self):
        return np.array([self.count / self.length, 1.0], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.obs(), {}

    def step(self, action):
        self.count += 1
        ended = self.count == self.length
        reward = 1 - float(np.square(np.asarray(action, float) - 0.5).sum())
        info = {"non-terminal done": True} if self.end == "non-terminal" and ended else {}
        return self.obs(), reward, ended and self.end != "truncated", ended and self.end == "truncated", info


class Mirrored(Counter):
    """With observation augmentation: the original and its mirror image."""

    def augment_observation(self, obs):
        return np.stack([obs, -obs])


class Nested(Counter):
    """With a Dict of observations of different shapes and an action of two axes."""

    def __init__(self):
        super().__init__(space=Box(-2, 2, (2, 3)))
        self.observation_space = Dict(flat=Box(-np.inf, np.inf, (2,)), image=Box(0, 1, (2, 3), np.float64))

    def obs(self):
        return {"flat": super().obs(), "image": np.full((2, 3), self.count / 10)}


class Broken(Counter):
    """Returns a reward that is no number, after 100 steps."""

    steps = 0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        Broken.steps += 1
        return obs, np.nan if Broken.steps > 100 else reward, *rest


class Corridor(Counter):
    """Rewards only the last step, by the action; ends by truncation, so that the value beyond it counts, too."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward if self.count == self.length else 0.0, *rest


for name, entry, settings in (
    ("Counter-v0", Counter, {}),
    ("Terminal-v0", Counter, {"end": "terminated"}),
    ("NonTerminal-v0", Counter, {"end": "non-terminal"}),
    ("Mirrored-v0", Mirrored, {}),
    ("Nested-v0", Nested, {}),
    ("Broken-v0", Broken, {}),
    ("Corridor-v0", Corridor, {}),
    ("Discrete-v0", Counter, {"space": gymnasium.spaces.Discrete(3)}),
):
    gymnasium.register(name, entry_point=entry, kwargs=settings, disable_env_checker=True)
