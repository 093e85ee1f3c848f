"""Environments whose every number is known, under ids such as scripted:Counter-v0.

And such as users bring along: that raise, hang, never end, or return what is no number.
"""

import os
import time
from typing import ClassVar

import gymnasium
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from gymnasium.spaces import Box


class Counter(gymnasium.Env):
    """Counts to `length`, then ends; rewards 1 less the squared distance of the action from 0.5.

    Every episode begins alike, and with its reset step fills `length + 1` steps: where those
    divide a rollout, a resumed run cannot be told from one that never stopped.
    """

    def __init__(self, length=7, end="truncated", space=None):
        self.length = length
        self.end = end
        self.count = 0
        self.observation_space = Box(-np.inf, np.inf, (2,))
        self.action_space = space or Box(-1, 1, (1,))

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
        terminated = ended and self.end != "truncated"
        truncated = ended and self.end in ("truncated", "both")
        info = {"non-terminal done": True} if self.end == "non-terminal" and ended else {}
        return self.obs(), reward, terminated, truncated, info


class Chooser(Counter):
    """With two choices, of which the second is right."""

    def __init__(self, **settings):
        super().__init__(space=spaces.Discrete(2), **settings)


class Labels(Chooser):
    """Observes a number of a choice."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Discrete(9)

    def obs(self):
        return np.int64(self.count)


class Mirrored(Counter):
    """With observation augmentation: the original and its mirror image."""

    def augment_observation(self, obs):
        return np.stack([obs, -obs])


class Table(Counter):
    """A counter that shows a small table of numbers."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(-np.inf, np.inf, (5, 5, 1))

    def obs(self):
        return np.full((5, 5, 1), self.count, np.float32)


class Narrow(Counter):
    """Shows a large whole number where it said a small one, from its third step on."""

    def __init__(self, shown=300):
        super().__init__()
        self.shown = shown
        parts = {"small": Box(-128, 127, (1,), np.int8), "count": spaces.Discrete(9)}
        self.observation_space = spaces.Dict(parts)

    def obs(self):
        small = self.shown if self.count == 3 else 5
        return {"small": np.array([small]), "count": self.count}


class Picture(Counter):
    """Shows a picture, dark above and bright below, of a dtype and with a bound that it says."""

    def __init__(self, said="uint8", shown="uint8", high=255, brightest=255):
        super().__init__(space=spaces.Discrete(2))
        self.observation_space = Box(0, high, (8, 8, 1), said)
        self.picture = np.zeros((8, 8, 1), shown)
        self.picture[4:] = brightest

    def obs(self):
        return self.picture


class Nested(Counter):
    """With a Dict of observations of different shapes and an action of two axes."""

    def __init__(self):
        super().__init__(space=Box(-2, 2, (2, 3)))
        image = Box(0, 1, (2, 3), np.float64)
        self.observation_space = spaces.Dict(flat=Box(-np.inf, np.inf, (2,)), image=image)

    def obs(self):
        return {"flat": super().obs(), "image": np.full((2, 3), self.count / 10)}


class Choices(Counter):
    """With observations that are numbers of choices."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(
            number=spaces.Discrete(4, start=5),
            pair=spaces.MultiDiscrete([3, 2], start=[4, 0]),
            bits=spaces.MultiBinary(3),
        )

    def obs(self):
        number = np.int64(5 + self.count % 4)
        bits = np.array([1, 0, self.count % 2], np.int8)
        return {"number": number, "pair": np.array([4 + self.count % 3, 0]), "bits": bits}


class Tuples(Counter):
    """With a Tuple of observations, of which a choice begins below 0 and later leaves its space."""

    def __init__(self, leaves=10**9):
        super().__init__()
        self.leaves = leaves
        both = [Box(-np.inf, np.inf, (2,), np.float64), spaces.Discrete(3, start=-1)]
        self.observation_space = spaces.Tuple(both)

    def obs(self):
        return super().obs().astype(np.float64), self.count % self.leaves % 3 - 1

    def step(self, action):
        obs, *rest = super().step(action)
        return (obs[0], 2) if self.count == self.leaves else obs, *rest


class WholeKeys(Counter):
    """With a Dict whose keys are whole numbers."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict({3: Box(0, 255, (1,), np.uint8), 1: Box(-9, 9, (2,))})

    def obs(self):
        return {3: np.array([200], np.uint8), 1: super().obs()}


class Strict(Counter):
    """Asserts, as Gymnasium's own do, that actions are of its space, in dtype, shape and bounds."""

    def step(self, action):
        space = self.action_space
        assert action.dtype == space.dtype and space.contains(action), action.tolist()
        return super().step(action[:1])


class Odd(Counter):
    """Shows what is nearly right: lists, `kind` of a reward, ends that are numbers, odd infos."""

    def __init__(self, shape=(1,), kind="float32"):
        super().__init__()
        self.shape = tuple(shape)
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        self.length = int(self.np_random.integers(4, 8))
        return obs.tolist(), {"name": "begin", "final": None}

    def step(self, action):
        obs, _, terminated, truncated, _ = super().step(action)
        info = {"name": self.count, self.count: [{}] * self.count, "_name": 3}
        reward = np.full(self.shape, 3, self.kind)
        return tuple(obs), reward, np.bool_(terminated), int(truncated), info


class Integers(Counter):
    """With an action of whole numbers."""

    seen: ClassVar[list] = []

    def __init__(self):
        super().__init__(space=Box(-3, 3, (1,), np.int64))

    def step(self, action):
        Integers.seen.append(action[0])
        return super().step(action)


class Broken(Counter):
    """After 100 steps, `what` goes wrong: a reward or an observation, an exception, an output."""

    def __init__(self, what="reward"):
        super().__init__()
        self.what = what
        self.steps = 0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.steps += 1
        if self.steps == 100:
            if self.what == "reward":
                reward = np.nan
            if self.what == "obs":
                obs = np.array([np.inf, 1], np.float32)
            if self.what == "raise":
                raise RuntimeError("the gripper\nis stuck")
            if self.what == "shape":
                obs = np.zeros(3, np.float32)
            if self.what == "text":
                reward = "a lot"
            if self.what == "exit":
                os._exit(7)
        return obs, reward, *rest


class Endless(Counter):
    """Never ends."""

    def __init__(self):
        super().__init__(length=10**9)


class Slow(Counter):
    """Takes `seconds` for a step, from step `begin` on."""

    def __init__(self, seconds=0.01, begin=0):
        super().__init__()
        self.seconds = seconds
        self.begin = begin
        self.steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps > self.begin:
            time.sleep(self.seconds)
        return super().step(action)


class Computed(Counter):
    """Counts with JAX, from the moment it is made, in the precision that JAX has by itself."""

    def __init__(self):
        super().__init__()
        self.scale = 1 / jnp.asarray(float(self.length))

    def obs(self):
        assert jnp.zeros(1).dtype == self.scale.dtype == np.float32
        return np.asarray(jnp.array([self.count, self.length]) * self.scale)


class Needy(Counter):
    """Cannot be made without being told its length."""

    def __init__(self, size):
        super().__init__(length=size)


class Failing(Counter):
    """Cannot be made at all."""

    def __init__(self):
        raise OSError("no licence\nfound")


class Talking(Counter):
    """Observes text."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Text(5)


class Empty(Counter):
    """Observes nothing."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(-1, 1, (0,))


class Corridor(Counter):
    """Rewards only the last step, by the action; its end is a truncation."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward if self.count == self.length else 0.0, *rest


class Masked(Counter):
    """Of three choices, the one whose turn it is, is masked, and raises when it is taken.

    kind: "info" and "key" say where the mask is; "box", "short", and where it is not always in the
    info, "late" and "once", are wrong.
    """

    def __init__(self, kind):
        super().__init__(space=Box(-1, 1, (1,)) if kind == "box" else spaces.Discrete(3))
        self.kind = kind
        if kind in ("key", "box", "short"):
            mask = spaces.MultiBinary(2 if kind == "short" else 3)
            self.observation_space = spaces.Dict(flat=Box(-np.inf, np.inf, (2,)), action_mask=mask)

    def mask(self):
        found = np.ones(2 if self.kind == "short" else 3, np.int8)
        found[self.count % 3 % len(found)] = 0
        return found

    def obs(self):
        if self.kind in ("info", "late", "once"):
            return super().obs()
        return {"flat": super().obs(), "action_mask": self.mask()}

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        more = {"action_mask": self.mask()} if self.kind in ("info", "once") else {}
        return obs, info | more

    def step(self, action):
        if action == self.count % 3 and self.kind in ("info", "key"):
            raise ValueError("this choice is masked")
        obs, reward, terminated, truncated, info = super().step(action)
        more = {"action_mask": self.mask()} if self.kind in ("info", "late") else {}
        return obs, reward, terminated, truncated, info | more


class Pair(gymnasium.Env):
    """Two agents as rware has them: spaces in tuples, rewards in a list; they differ in size.

    The first has two choices and sees its count and its own number; the second has three. Each
    earns 1 for its highest choice.
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"]}

    def __init__(self, length=7, render_mode=None):
        self.length = length
        self.render_mode = render_mode
        self.count = 0
        self.observation_space = spaces.Tuple([Box(-9, 9, (2,)), Box(-9, 9, (3,))])
        self.action_space = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)])

    def obs(self):
        own = np.array([self.count, 1], np.float32)
        return own, np.array([self.count, 2, 5], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.obs(), {}

    def step(self, action):
        assert action[0] in range(2) and action[1] in range(3)
        self.count += 1
        rewards = [float(action[0] == 1), float(action[1] == 2)]
        return self.obs(), rewards, False, self.count == self.length, {}

    def render(self):
        return np.full((64, 64, 3), self.count, np.uint8)


class MirroredPair(Pair):
    """With observation augmentation."""

    def augment_observation(self, obs):
        return obs


class Leaving(Pair):
    """Ends its process after 100 steps."""

    def __init__(self, what):
        super().__init__()
        self.steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 100:
            os._exit(7)
        return super().step(action)


class Limited(Pair):
    """With a limit of its own that is called as Gymnasium's."""

    def __init__(self, max_episode_steps):
        super().__init__(length=max_episode_steps)


for name, entry, settings in (
    ("Counter-v0", Counter, {}),
    ("Chooser-v0", Chooser, {}),
    ("Labels-v0", Labels, {}),
    ("Terminal-v0", Counter, {"end": "terminated"}),
    ("NonTerminal-v0", Counter, {"end": "non-terminal"}),
    ("BothEnds-v0", Counter, {"end": "both"}),
    ("Mirrored-v0", Mirrored, {}),
    ("MirroredChooser-v0", Mirrored, {"space": spaces.Discrete(2)}),
    ("Picture-v0", Picture, {}),
    ("Nested-v0", Nested, {}),
    ("Table-v0", Table, {}),
    ("Choices-v0", Choices, {}),
    ("Tuples-v0", Tuples, {}),
    ("WholeKeys-v0", WholeKeys, {}),
    ("Strict-v0", Strict, {"space": Box(-0.1, 0.1, (2,), np.float64)}),
    (
        "StrictSides-v0",
        Strict,
        {"space": Box(np.array([0.1, -np.inf]), np.array([0.3, 0.7]), dtype=np.float64)},
    ),
    ("StrictHalf-v0", Strict, {"space": Box(-0.1, 0.3, (2, 1), np.float16)}),
    ("StrictWhole-v0", Strict, {"space": Box(-3, 4, (2,), np.int8)}),
    ("Narrow-v0", Narrow, {}),
    ("Odd-v0", Odd, {}),
    ("Integers-v0", Integers, {}),
    ("Broken-v0", Broken, {}),
    ("Endless-v0", Endless, {}),
    ("Slow-v0", Slow, {}),
    ("Computed-v0", Computed, {}),
    ("Needy-v0", Needy, {}),
    ("Failing-v0", Failing, {}),
    ("Talking-v0", Talking, {}),
    ("Empty-v0", Empty, {}),
    ("Corridor-v0", Corridor, {}),
    ("Discrete-v0", Counter, {"space": spaces.Discrete(3)}),
    ("Masked-info-v0", Masked, {"kind": "info"}),
    ("Masked-key-v0", Masked, {"kind": "key"}),
    ("Masked-late-v0", Masked, {"kind": "late"}),
    ("Masked-once-v0", Masked, {"kind": "once"}),
    ("Masked-box-v0", Masked, {"kind": "box"}),
    ("Masked-short-v0", Masked, {"kind": "short"}),
    ("Pair-v0", Pair, {}),
    ("MirroredPair-v0", MirroredPair, {}),
    ("Leaving-v0", Leaving, {}),
    ("Limited-v0", Limited, {"max_episode_steps": 5}),
    ("NoActions-v0", Counter, {"space": Box(-1, 1, (0,))}),
    ("Unbounded-v0", Counter, {"space": Box(-np.inf, np.inf, (1,))}),
):
    gymnasium.register(name, entry_point=entry, kwargs=settings, disable_env_checker=True)
