"""What teams get and what learners see of them, agent by agent, in ppo_multiagent.py.

Random teams keep their own books; real ones, where they are installed, are compared with
themselves.
"""

import copy
import json
import os
import sys
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

teams = load(ROOT / "ppo_multiagent.py")
Args = teams.Args
InputError = teams.InputError
make_env = teams.make_env
sys.modules["test_teams"] = sys.modules[__name__]  # whatever pytest calls it
MADE = []  # scripted teams, the newest last
SCRIPT = {}  # of the next ones


# --- A scripted team, which keeps its own books ---
class Scripted:
    """A team of PettingZoo's kind whose spaces, ends and habits are the test's.

    Every episode draws an end for each agent: a time from 1 to 5 and one of `kinds`. `stay` keeps
    `agents` full; `bare` leaves dead agents out of all dicts; `masks` is where masks are: "info",
    "obs", "sometimes" (in info of even steps) or "".
    """

    def __init__(self, observations, actions, kinds, stay=False, bare=True, masks=""):
        self.possible_agents = [f"agent_{i}" for i in range(len(actions))]
        observations = copy.deepcopy(observations)  # each team draws its own
        self.observations = dict(zip(self.possible_agents, observations, strict=True))
        self.actions = dict(zip(self.possible_agents, actions, strict=True))
        self.kinds = kinds
        self.stay = stay
        self.bare = bare
        self.masks = masks
        self.log = []  # one entry a reset or a step
        self.random = np.random.default_rng(0)
        MADE.append(self)

    def observation_space(self, name):
        space = self.observations[name]
        if self.masks != "obs":
            return space
        places = spaces.Box(0, 1, (len(self.draw_mask(name)),), np.int8)
        return spaces.Dict({"observation": space, "action_mask": places})

    def action_space(self, name):
        return self.actions[name]

    def draw_mask(self, name):
        nvec, _ = teams.ranges(self.actions[name])
        return self.random.integers(0, 2, sum(nvec)).astype(np.int8)

    def shown(self, names):
        """Returns (obs, infos), and writes both down as the test wants to see them."""
        obs, infos = {}, {name: {} for name in names}
        self.seen, self.mask = {}, {}
        for name in names:
            space = self.observations[name]
            obs[name] = space.sample()
            self.seen[name] = spaces.flatten(space, obs[name]).astype(np.float32)
            if self.masks and not (self.masks == "sometimes" and self.time % 2):
                self.mask[name] = self.draw_mask(name)
            if self.masks == "obs":
                obs[name] = {"observation": obs[name], "action_mask": self.mask[name]}
            elif name in self.mask:
                infos[name] = {"action_mask": self.mask[name]}
        return obs, infos

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
            for i, space in enumerate(self.observations.values()):
                space.seed(seed + i)
        self.agents = list(self.possible_agents)
        self.time = 0
        self.ends = {x: int(self.random.integers(1, 6)) for x in self.agents}
        self.how = {x: str(self.random.choice(self.kinds)) for x in self.agents}
        shown = self.shown(self.agents)
        self.log.append(
            {"seen": self.seen, "mask": self.mask, "time": 0, "reward": {}, "actions": {}}
        )
        self.log[-1].update(ends=self.ends, how=self.how)
        return shown

    def write_down(self, reward, actions):
        entry = {"seen": self.seen, "mask": self.mask, "time": self.time, "reward": reward}
        self.log.append(entry | {"actions": actions, "ends": self.ends, "how": self.how})

    def step(self, actions):
        assert set(actions) == set(self.agents)
        for name, action in actions.items():
            assert self.actions[name].contains(action), (name, action, self.actions[name])
            assert np.asarray(action).dtype == self.actions[name].dtype
        self.time += 1
        living = [x for x in self.possible_agents if self.time <= self.ends[x]]
        speaking = living if self.bare else self.possible_agents
        reward = {x: float(np.round(self.random.normal(), 2)) for x in speaking}
        ended = {x: self.ends[x] <= self.time for x in speaking}
        terminated = {x: ended[x] and self.how[x] in ("end", "both") for x in speaking}
        truncated = {x: ended[x] and self.how[x] in ("cut", "both") for x in speaking}
        if not self.stay:
            self.agents = [x for x in living if not ended[x]]
        obs, infos = self.shown(speaking)
        self.write_down(reward, actions)
        return obs, reward, terminated, truncated, infos


UNLIKE = {
    "observations": [spaces.Discrete(4), spaces.Box(-1, 1, (3,))],
    "actions": [spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 4])],
    "kinds": ["end", "cut"],
}


def parallel_env(unlike=False, **_):
    return Scripted(**UNLIKE if unlike else SCRIPT)


class Joint(gymnasium.Env):
    """The same team as an environment of Gymnasium with a Tuple, or a Dict, of spaces."""

    def __init__(self, form="tuple", ends="list"):
        self.inner = Scripted(**SCRIPT | {"stay": True, "bare": False})
        self.form, self.flags = form, ends
        names = self.inner.possible_agents
        self.observation_space = self.join({x: self.inner.observation_space(x) for x in names})
        self.action_space = self.join({x: self.inner.action_space(x) for x in names})

    def join(self, parts):
        found = parts if self.form == "dict" else tuple(parts.values())
        if isinstance(next(iter(parts.values())), spaces.Space):
            return spaces.Dict(found) if self.form == "dict" else spaces.Tuple(found)
        return found

    def info(self, infos):
        """Returns masks, of a Tuple in one list, of a Dict in agents' infos, and a distraction."""
        found = {"score": "won"}
        if self.form == "dict":
            return found | infos
        if any(infos.values()):
            found["action_mask"] = [x.get("action_mask") for x in infos.values()]
        return found

    def reset(self, *, seed=None, options=None):
        obs, infos = self.inner.reset(seed=seed)
        return self.join(obs), self.info(infos)

    def step(self, action):
        names = self.inner.possible_agents
        action = action if self.form == "dict" else dict(zip(names, action, strict=True))
        obs, reward, terminated, truncated, infos = self.inner.step(action)
        ends = [self.join(terminated), self.join(truncated)]
        if self.form == "tuple" and self.flags == "array":
            ends = [np.array(x) for x in ends]
        reward = self.join(reward) if self.form == "dict" else list(reward.values())
        return self.join(obs), reward, *ends, self.info(infos)


gymnasium.register("Joint-v0", Joint)


class OneEnd(Joint):
    """Its rewards and ends are one for all: at the first agent's end."""

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 0.5, terminated[0], truncated[0], info


gymnasium.register("OneEnd-v0", OneEnd)


def team_over(seen):
    return ~seen.alive.any(axis=-1)


def play(env, steps, num_seeds=1, num_envs=2, seed=0, choose=None):
    """Returns joint actions [T, S, N, A, U] and TimeSteps, leaves [T + 1, S, N, A, ...]."""
    space = env.team.action_space
    random = np.random.default_rng(seed)
    shape = (num_seeds, num_envs, *space.shape)
    step = jax.jit(env.step)
    env_state, time_step = env.first
    found, acted = [time_step], []
    for _ in range(steps):
        if choose is not None:
            action = choose(time_step, random)
        elif isinstance(space, spaces.MultiDiscrete):
            action = random.integers(0, space.nvec, shape).astype(np.int32)
        else:  # also far outside
            action = (10 ** random.uniform(-2, 3, shape) * random.normal(size=shape)).astype("f")
        env_state, time_step = step(env_state, action)
        acted.append(np.asarray(action))
        found.append(jax.device_get(time_step))
    return np.stack(acted), jax.tree.map(lambda *x: np.stack(x), *found)


def open_scripted(env_id="pettingzoo/test_teams", kwargs=None, num_envs=2, **script):
    SCRIPT.clear()
    SCRIPT.update(script)
    kwargs = json.dumps(kwargs or {})
    return make_env(Args(env_id=env_id, env_kwargs=kwargs), list(range(num_envs)))


def check_against_books(env, time_steps, books, one_for_all=False):
    """Compares TimeSteps [T + 1, 1, N, A, ...] with what each team wrote down itself."""
    space = env.team.action_space
    for n, book in enumerate(books):
        log = book.log[-len(time_steps.obs) :]
        mine = jax.tree.map(lambda x, n=n: x[:, 0, n], time_steps)
        for t, entry in enumerate(log):
            names = book.possible_agents
            score = sum(entry["reward"].values())
            assert np.isclose(mine.score[t], score, atol=1e-5)
            over = entry["time"] > 0 and entry["time"] == max(entry["ends"].values())
            assert team_over(mine)[t] == over
            for a, name in enumerate(names):
                time = entry["time"]
                end = entry["ends"][name]
                how = entry["how"][name]
                assert mine.alive[t, a] == (time < end)
                at_end = time > 0 and time == end
                assert mine.terminated[t, a] == (at_end and how != "cut")
                assert mine.truncated[t, a] == (at_end and how == "cut")
                assert np.isclose(mine.reward[t, a], entry["reward"].get(name, 0))
                seen = entry["seen"].get(name, np.zeros(0))
                np.testing.assert_array_equal(mine.obs[t, a, : len(seen)], seen)
                assert not mine.obs[t, a, len(seen) :].any()
                if isinstance(space, spaces.Box):
                    exists = np.arange(space.shape[1]) < np.prod(book.actions[name].shape)
                    np.testing.assert_array_equal(mine.action_mask[t, a, :, 0], exists)
                    continue
                nvec, _ = teams.ranges(book.actions[name])
                flat = list(entry["mask"].get(name, np.ones(sum(nvec))))
                for u in range(space.shape[1]):
                    size = nvec[u] if u < len(nvec) else 1
                    want = [flat.pop(0) for _ in range(size)] if u < len(nvec) else [1]
                    want = np.array(want if any(want) else [1] * size)
                    got = mine.action_mask[t, a, u]
                    np.testing.assert_array_equal(got[:size], want > 0)
                    assert not got[size:].any()


def check_actions(env, actions, books):
    """Compares what teams got with what was chosen, unit by unit."""
    for n, book in enumerate(books):
        for t, entry in enumerate(book.log[-len(actions) :]):
            for name, got in entry["actions"].items():
                a = book.possible_agents.index(name)
                space = book.actions[name]
                row = actions[t, 0, n, a, : int(np.prod(space.shape))]
                if isinstance(space, spaces.Box):
                    low, high = space.low.ravel(), space.high.ravel()
                    wanted = np.clip(np.float64(row), low, high)
                    whole = np.issubdtype(space.dtype, np.integer)
                    tolerance = {"atol": 0.5 if whole else 1e-9, "rtol": 1e-3}
                    np.testing.assert_allclose(np.float64(np.ravel(got)), wanted, **tolerance)
                else:
                    _, start = teams.ranges(space)
                    np.testing.assert_array_equal(np.ravel(got), row + start)


# --- Random teams ---
small = st.integers(1, 3)
starts = st.integers(-3, 3)
discrete = st.builds(lambda n, start: spaces.Discrete(n + 1, start=start), small, starts)
multi = st.lists(small, min_size=1, max_size=3).map(
    lambda nvec: spaces.MultiDiscrete(np.array(nvec) + 1, start=np.arange(len(nvec)) - 1)
)
binary = small.map(spaces.MultiBinary)
shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
bounds = st.sampled_from([(-1, 1), (0, 10), (0.1, 0.3), (-np.inf, np.inf), (-5, np.inf)])
kinds_of_numbers = st.sampled_from([np.float32, np.float64, np.float16])
floats = st.builds(
    lambda b, shape, dtype: spaces.Box(*b, shape, dtype), bounds, shapes, kinds_of_numbers
)
wholes = st.builds(
    lambda shape, dtype: spaces.Box(0, 200, shape, dtype),
    shapes,
    st.sampled_from([np.uint8, np.int32]),
)
plain = st.one_of(discrete, multi, binary, floats, wholes)
parts = st.one_of(
    plain,
    st.tuples(plain, plain).map(spaces.Tuple),
    st.tuples(plain, discrete).map(lambda x: spaces.Dict({"b": x[0], "a": x[1]})),
)


@st.composite
def scripts(draw):
    agents = draw(st.integers(2, 4))
    numbers = draw(st.booleans())
    own = st.one_of(floats, wholes) if numbers else st.one_of(discrete, multi, binary)
    return {
        "observations": draw(st.lists(parts, min_size=agents, max_size=agents)),
        "actions": draw(st.lists(own, min_size=agents, max_size=agents)),
        "kinds": draw(st.sampled_from([["end"], ["cut"], ["end", "cut", "both"]])),
        "stay": draw(st.booleans()),
        "bare": draw(st.booleans()),
        "masks": "" if numbers else draw(st.sampled_from(["", "info", "obs", "sometimes"])),
    }


def played(script, env_id="pettingzoo/test_teams", kwargs=None, steps=24):
    env = open_scripted(env_id, kwargs, **script)
    books = MADE[-2:]
    actions, time_steps = play(env, steps)
    assert len(books[0].log) >= steps + 1
    check_against_books(env, time_steps, books)
    check_actions(env, actions, books)


@settings(max_examples=15, deadline=None)
@given(scripts())
def test_random_teams_of_pettingzoo(script):
    if script["stay"]:
        script["bare"] = False  # whom it lists, it speaks of
    played(script)


@settings(max_examples=12, deadline=None)
@given(scripts(), st.sampled_from([("tuple", "list"), ("tuple", "array"), ("dict", "list")]))
def test_random_teams_of_gymnasium(script, form):
    played(script, "Joint-v0", {"form": form[0], "ends": form[1]})


def test_agents_that_are_dropped_without_a_word():
    """Neither is flagged, and both leave `agents`: they are terminated."""
    box = [spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))]
    played({"observations": box, "actions": [spaces.Discrete(2)] * 2, "kinds": ["dropped"]})


def test_async_equals_sync():
    found = []
    unlike = '{"unlike": true}'
    for kind in ("sync", "async"):
        team = {"env_id": "pettingzoo/test_teams", "env_kwargs": unlike}
        args = Args(**team, vectorization=kind, num_seeds=2)
        env = make_env(args, [3, 4, 5, 6])
        found.append(play(env, 12, num_seeds=2))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert found[0][1].obs.shape == (13, 2, 2, 2, 4)


def test_one_reward_and_one_end_for_all():
    script = {"observations": [spaces.Box(-1, 1, (2,))] * 2, "kinds": ["end", "cut"]}
    env = open_scripted("OneEnd-v0", actions=[spaces.Discrete(2)] * 2, **script)
    _, seen = play(env, 20)
    over = team_over(seen)
    steps = ~np.concatenate([np.ones_like(over[:1]), over[:-1]])
    np.testing.assert_array_equal(seen.reward, 0.5 * steps[..., None] * np.ones(2))
    np.testing.assert_array_equal(seen.score, 0.5 * steps)
    ends = seen.terminated | seen.truncated
    np.testing.assert_array_equal(ends, np.broadcast_to(over[..., None], ends.shape))
    assert seen.terminated.any() and seen.truncated.any()


# --- Refusals, each in one line and before the first step ---
BOX = spaces.Box(-1, 1, (2,))
TWO = spaces.Discrete(2)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"actions": [TWO, BOX]}, "not all choices and not all numbers"),
        ({"observations": [BOX, spaces.Text(3)]}, "no kind that networks can take"),
        ({"actions": [TWO, spaces.Sequence(TWO)]}, "no kind that networks can take"),
        ({"actions": [spaces.Box(-1, 1, (0,))] * 2}, "actions are empty"),
        ({"observations": [spaces.Box(-1, 1, (0,))] * 2}, "observations are empty"),
    ],
)
def test_refused_spaces(script, words):
    plain = {"observations": [BOX, BOX], "actions": [TWO, TWO], "kinds": ["end"]}
    with pytest.raises(InputError, match=words) as error:
        open_scripted(**plain | script)
    assert "\n" not in str(error.value)


class Odd(Scripted):
    """Two agents; `fault` is in what they show, at a reset or in a step."""

    def __init__(self, fault):
        super().__init__([spaces.Discrete(3), BOX], [TWO, TWO], ["cut"])
        self.fault = fault

    def shown(self, names):
        obs, infos = super().shown(names)
        if self.fault == "range":
            obs["agent_0"] = 3
        if self.fault == "shape":
            obs["agent_1"] = np.zeros((1, 2))
        if self.fault == "mask":
            infos["agent_1"] = {"action_mask": [1, 1, 1]}
        return obs, infos

    def reset(self, **options):
        found = super().reset(**options)
        self.agents = [] if self.fault == "nobody" else self.agents
        return found

    def step(self, actions):
        found = super().step(actions)
        place = ["obs", "reward", "termination", "truncation"]
        if self.fault in place:
            del found[place.index(self.fault)]["agent_0"]
        return found


def odd(fault):
    return teams.open_host("pettingzoo/odd", {"fault": fault}, os.getpid())


@pytest.mark.parametrize("fault", ["range", "shape", "mask", "nobody"])
def test_refused_at_a_reset(fault, monkeypatch):
    monkeypatch.setitem(sys.modules, "odd", type(sys)("odd"))
    sys.modules["odd"].parallel_env = Odd
    with pytest.raises(InputError) as error:
        odd(fault)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ["obs", "reward", "termination", "truncation"])
def test_refused_where_a_living_agent_is_not_shown(fault, monkeypatch):
    monkeypatch.setitem(sys.modules, "odd", type(sys)("odd"))
    sys.modules["odd"].parallel_env = Odd
    team = odd(fault)
    team.env.inner.ends = {"agent_0": 3, "agent_1": 3}
    with pytest.raises(InputError, match="agent_0 is shown no"):
        team.step(np.zeros((2, 1), int))


def test_one_agent_is_refused():
    with pytest.raises(InputError, match=r"ppo_continuous\.py"):
        make_env(Args(env_id="CartPole-v1"), [0])


# --- A loaded policy ---
def test_a_loaded_policy_takes_agents_without_an_observation_as_gone(tmp_path):
    """The others' actions stay what they are; an observation of nobody is refused."""
    script = {"observations": [BOX, BOX], "actions": [spaces.Discrete(9)] * 2, "kinds": ["end"]}
    SCRIPT.clear()
    SCRIPT.update(script)
    args = Args(env_id="pettingzoo/test_teams", num_envs=2, num_steps=4, run_dir=str(tmp_path))
    (tmp_path / "args.json").write_text(args.model_dump_json())
    state = teams.Checkpoint(teams.make_run(args).init(), None, np.zeros(3), 0.0)
    teams.write_checkpoint(tmp_path / "checkpoints/0000000001.npz", state)
    policy = teams.load(tmp_path)
    obs = {"agent_0": np.float32([0.3, -0.2]), "agent_1": np.float32([-0.9, 0.4])}
    both = policy(obs)
    assert policy({"agent_1": obs["agent_1"]})["agent_1"] == both["agent_1"]
    one_gone, none_gone = policy([{"agent_0": obs["agent_0"]}, obs])
    assert one_gone["agent_0"] == both["agent_0"] and none_gone == both
    with pytest.raises(InputError, match="for none of"):
        policy({"agent": obs["agent_0"]})


# --- In JAX ---
class Duty(NamedTuple):
    time: jax.Array
    ends: jax.Array  # [A]
    cut: jax.Array  # bool [A]
    total: jax.Array  # whole numbers at a reset, fractions later


class OwnTeam:
    """Three agents see their number, the time, and how they will end; action 0 to 2 is a reward."""

    observation_space = spaces.Dict(
        obs=spaces.Box(-np.inf, np.inf, (3, 4)), action_mask=spaces.Box(0, 1, (3, 3))
    )
    action_space = spaces.MultiDiscrete([3, 2, 3], start=[-1, 5, 0])

    def observe(self, state):
        time = jnp.full(3, state.time)
        rows = jnp.stack([jnp.arange(3), time, state.ends, state.cut], axis=-1)
        mask = jnp.ones((3, 3)).at[0, 2].set(0)
        return {"obs": rows, "action_mask": [mask[0], mask[1, :2], mask[2]], "state": state.total}

    def reset(self, key):
        ends = jax.random.randint(key, (3,), 1, 6)
        cut = jax.random.bernoulli(key, shape=(3,))
        state = Duty(jnp.int32(0), ends, cut, jnp.int32(0))
        return self.observe(state), state

    def step(self, key, state, action):
        reward = action * 1.5
        time = state.time + 1
        state = Duty(time, state.ends, state.cut, state.total + jnp.sum(reward))
        ended = time >= state.ends
        return self.observe(state), state, reward, ended & ~state.cut, ended & state.cut, {}


def own_team():
    return OwnTeam()


class ByName(OwnTeam):
    """The same with dicts; its observations are choices."""

    observation_space = spaces.Dict({x: spaces.Discrete(6) for x in "abc"})
    action_space = spaces.Dict({x: spaces.Box(-2, 3, (), np.int32) for x in "abc"})

    def observe(self, state):
        return dict.fromkeys("abc", state.time)

    def step(self, key, state, action):
        assert all(action[x].dtype == jnp.int32 and action[x].shape == () for x in "abc")
        action = jnp.stack([action[x] for x in "abc"])
        obs, state, *_ = super().step(key, state, action)
        return obs, state, dict(zip("abc", action, strict=True)), state.time >= 3, False, {}


def by_name():
    return ByName()


def test_own_team():
    env = make_env(Args(env_id="jax:test_teams:own_team", num_seeds=2), [1, 2, 3, 4])
    actions, seen = play(env, 40, num_seeds=2)
    number, time, end, cut = np.moveaxis(seen.obs, -1, 0)
    np.testing.assert_array_equal(number, np.broadcast_to(np.arange(3), number.shape))
    np.testing.assert_array_equal(seen.alive, time < end)
    at_end = (time == end) & (time > 0)
    np.testing.assert_array_equal(seen.terminated, at_end & (cut == 0))
    np.testing.assert_array_equal(seen.truncated, at_end & (cut == 1))
    np.testing.assert_array_equal(team_over(seen), time[..., 0] == end.max(axis=-1))
    got = (actions[..., 0] + [-1, 5, 0]) * 1.5 * (time[1:] > 0)
    np.testing.assert_array_equal(seen.reward[1:], got)
    np.testing.assert_array_equal(seen.score, seen.reward.sum(axis=-1))
    sums = np.zeros((2, 2))
    for t in range(41):
        sums = (sums + seen.score[t]) * (time[t, ..., 0] > 0)
        np.testing.assert_allclose(seen.state[t, ..., 0], sums)
    later, _ = jax.eval_shape(env.step, env.first[0], actions[0])
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, later, env.first[0]))
    mask = np.broadcast_to([[1, 1, 0], [1, 1, 0], [1, 1, 1]], (41, 2, 2, 3, 3))
    np.testing.assert_array_equal(seen.action_mask[..., 0, :], mask)


def test_own_team_by_name():
    env = make_env(Args(env_id="jax:test_teams:by_name"), [1, 2])
    actions, seen = play(env, 12)
    time = np.arange(13) % 4
    np.testing.assert_array_equal(seen.obs.argmax(axis=-1)[:, 0, 0, 0], time)
    np.testing.assert_array_equal(seen.obs.sum(axis=-1), 1)
    got = np.clip(np.rint(actions[..., 0]), -2, 3)
    np.testing.assert_array_equal(seen.reward[1:], got * (time[1:] > 0)[:, None, None, None])


# --- Real ones, against the bare environment ---
@pytest.mark.parametrize("module", ["mpe2.simple_spread_v3", "mpe2.simple_tag_v3"])
@pytest.mark.parametrize("continuous", [False, True])
def test_pettingzoo_itself(module, continuous):
    pytest.importorskip("mpe2")
    kwargs = {"continuous_actions": continuous, "max_cycles": 7}
    args = Args(env_id=f"pettingzoo/{module}", env_kwargs=json.dumps(kwargs))
    steps = 200 if not continuous else 40
    env = make_env(args, [5, 6])
    actions, seen = play(env, steps)
    bare = __import__(module, fromlist=["x"]).parallel_env(**kwargs)
    obs, _ = bare.reset(seed=6)
    over = False
    for t in range(steps):
        if over:
            obs, _ = bare.reset()
            reward = {}
            cut = dict.fromkeys(bare.possible_agents, False)
        else:
            rows = zip(bare.possible_agents, actions[t, 0, 1], strict=True)
            own = {x: row[0] for x, row in rows}
            if continuous:
                own = {x: np.clip(actions[t, 0, 1, i], 0, 1) for i, x in enumerate(own)}
            obs, reward, _, cut, _ = bare.step(own)
        over = not bare.agents
        wanted = np.float32([reward.get(x, 0) for x in bare.possible_agents])
        np.testing.assert_array_equal(seen.reward[t + 1, 0, 1], wanted)
        np.testing.assert_array_equal(seen.truncated[t + 1, 0, 1], list(cut.values()))
        assert team_over(seen)[t + 1, 0, 1] == over
        for i, x in enumerate(bare.possible_agents):
            mine = seen.obs[t + 1, 0, 1, i, : len(obs[x])]
            np.testing.assert_allclose(mine, obs[x], atol=1e-30)  # XLA flushes denormal numbers
        np.testing.assert_allclose(seen.state[t + 1, 0, 1], bare.state(), atol=1e-30)
    assert seen.truncated.any() and not seen.terminated.any()


@pytest.mark.parametrize("env_id", ["rware:rware-tiny-2ag-v2", "lbforaging:Foraging-8x8-2p-2f-v3"])
def test_gymnasium_itself(env_id):
    pytest.importorskip(env_id.partition(":")[0])
    env = make_env(Args(env_id=env_id), [5, 6])
    actions, seen = play(env, 200)
    bare = gymnasium.make(env_id, disable_env_checker=True)
    bare.reset(seed=6)
    over = False
    for t in range(200):
        if over:
            obs, _ = bare.reset()
            reward, over = [0, 0], False
        else:
            obs, reward, over, _, _ = bare.step(tuple(actions[t, 0, 1, :, 0]))
        np.testing.assert_allclose(seen.reward[t + 1, 0, 1], reward)
        np.testing.assert_array_equal(seen.obs[t + 1, 0, 1], np.stack(obs))
        np.testing.assert_array_equal(seen.terminated[t + 1, 0, 1], over)


def legal(time_step, random):
    """Returns random actions among those that are allowed."""
    mask = np.asarray(time_step.action_mask)
    return (random.random(mask.shape) * mask).argmax(axis=-1).astype(np.int32)


def test_foraging_itself():
    jumanji = pytest.importorskip("jumanji")
    kwargs = {"time_limit": 12}
    name = "LevelBasedForaging-v0"
    env = make_env(Args(env_id=f"jumanji/{name}", env_kwargs=json.dumps(kwargs)), [5, 6])
    actions, seen = play(env, 60, choose=legal)
    bare = jumanji.make(name, **kwargs)
    reset, step = jax.jit(bare.reset), jax.jit(bare.step)
    key, reset_key = jax.random.split(jax.random.PRNGKey(6))
    state, shown = reset(reset_key)
    over = False
    for t in range(60):
        key, _, reset_key = jax.random.split(key, 3)
        if over:
            state, shown = reset(reset_key)
        else:
            state, shown = step(state, actions[t, 0, 1, :, 0])
        mine = jax.tree.map(lambda x, t=t: x[t + 1, 0, 1], seen)
        np.testing.assert_array_equal(mine.reward, np.broadcast_to(shown.reward, mine.reward.shape))
        np.testing.assert_allclose(mine.score, np.sum(shown.reward))
        np.testing.assert_array_equal(mine.obs, shown.observation.agents_view)
        np.testing.assert_array_equal(mine.action_mask[:, 0], shown.observation.action_mask)
        over = bool(shown.last())
        assert team_over(mine) == over
        if over and shown.observation.step_count < 12:
            assert mine.terminated.all()
    assert seen.truncated.any()


def test_a_collision_at_the_time_limit_is_one():
    """A warehouse so small that two robots meet, and its limit where they do."""
    jumanji = pytest.importorskip("jumanji")
    generators = pytest.importorskip("jumanji.environments.routing.robot_warehouse.generator")
    crowd = {"shelf_rows": 1, "shelf_columns": 3, "column_height": 2, "num_agents": 4}
    crowd |= {"sensor_range": 1, "request_queue_size": 1}
    bare = jumanji.make("RobotWarehouse-v0", generator=generators.RandomGenerator(**crowd))
    step = jax.jit(bare.step)
    _, reset_key = jax.random.split(jax.random.PRNGKey(3))
    state, shown = jax.jit(bare.reset)(reset_key)
    random = np.random.default_rng(0)
    actions, steps = [], []
    while not shown.last():
        mask = np.asarray(shown.observation.action_mask)
        actions.append((random.random(mask.shape) * mask).argmax(axis=-1))
        state, shown = step(state, actions[-1])
        steps.append(jax.device_get(shown))
    assert 1 < len(steps) < 100
    kwargs = json.dumps({"time_limit": len(steps), "generator": crowd})
    env = make_env(Args(env_id="jumanji/RobotWarehouse-v0", env_kwargs=kwargs), [3])
    given = iter(actions)
    _, seen = play(env, len(steps), num_envs=1, choose=lambda *_: next(given)[None, None, :, None])
    for t, shown in enumerate(steps, 1):
        mine = jax.tree.map(lambda x, t=t: x[t, 0, 0], seen)
        np.testing.assert_array_equal(mine.reward, np.full(4, shown.reward))
        np.testing.assert_array_equal(mine.score, shown.reward)
        np.testing.assert_array_equal(mine.obs, shown.observation.agents_view)
        np.testing.assert_array_equal(mine.action_mask[:, 0], shown.observation.action_mask)
        assert team_over(mine) == shown.last()
    assert mine.terminated.all() and not mine.truncated.any()


@pytest.mark.parametrize(
    ("name", "scenario"),
    [
        ("MPE_simple_tag_v3", ""),
        pytest.param("HeuristicEnemySMAX", "3m", marks=pytest.mark.slow),
    ],
)
def test_jaxmarl_itself(name, scenario):
    jaxmarl = pytest.importorskip("jaxmarl")
    env = make_env(Args(env_id=f"jaxmarl/{name}", scenario=scenario), [5, 6])
    actions, seen = play(env, 120, choose=legal)
    kwargs = {}
    if scenario:
        maps = pytest.importorskip("jaxmarl.environments.smax")
        kwargs = {"scenario": maps.map_name_to_scenario(scenario)}
    bare = jaxmarl.make(name, **kwargs)
    reset, step = jax.jit(bare.reset), jax.jit(bare.step_env)
    key, reset_key = jax.random.split(jax.random.PRNGKey(6))
    _, state = reset(reset_key)
    over, dead = False, np.zeros(len(bare.agents), bool)
    for t in range(120):
        key, step_key, reset_key = jax.random.split(key, 3)
        mine = jax.tree.map(lambda x, t=t: x[t + 1, 0, 1], seen)
        if over:
            obs, state = reset(reset_key)
            reward = dict.fromkeys(bare.agents, 0.0)
            over, dead = False, np.zeros(len(bare.agents), bool)
        else:
            own = {x: actions[t, 0, 1, i, 0] for i, x in enumerate(bare.agents)}
            obs, state, reward, done, _ = step(step_key, state, own)
            died = np.array([done[x] for x in bare.agents])
            over = bool(done["__all__"])
            ends = mine.terminated | mine.truncated
            np.testing.assert_array_equal(ends, (died | over) & ~dead)
            dead |= died
        np.testing.assert_allclose(mine.reward, [reward[x] for x in bare.agents], atol=1e-6)
        np.testing.assert_array_equal(mine.alive, ~dead & (not over))
        assert team_over(mine) == over
        for i, x in enumerate(bare.agents):
            np.testing.assert_allclose(mine.obs[i, : len(obs[x])], obs[x], atol=1e-5)
    assert team_over(seen).any()
    if "MPE" in name:
        assert seen.truncated.any() and not seen.terminated.any()


def attack(time_step, random):
    """Returns SMAX's last allowed choice, an attack where one is, or goes east."""
    mask = np.asarray(time_step.action_mask)[..., 0, :]
    last = mask.shape[-1] - 1 - mask[..., ::-1].argmax(axis=-1)
    return np.where(last >= 5, last, np.where(mask[..., 1], 1, last)).astype(np.int32)[..., None]


def test_a_battle_won_at_the_time_limit_is_won():
    pytest.importorskip("jaxmarl")

    def first_end(limit):
        kwargs = json.dumps({"enemy_shoots": False, "max_steps": limit})
        smax = {"env_id": "jaxmarl/HeuristicEnemySMAX", "scenario": "3m"}
        env = make_env(Args(**smax, env_kwargs=kwargs), [0])
        _, seen = play(env, limit + 1, num_envs=1, choose=attack)
        end = int(team_over(seen)[:, 0, 0].argmax())
        return end, jax.tree.map(lambda x: x[end, 0, 0], seen)

    won, seen = first_end(99)
    assert seen.terminated.all() and seen.measure == 1 and 2 < won < 100
    again, seen = first_end(won - 1)  # its last step is the one after max_steps
    assert again == won and seen.terminated.all() and not seen.truncated.any()


def test_a_clock_that_is_not_known_is_said(capfd):
    pytest.importorskip("jaxmarl")
    make_env(Args(env_id="jaxmarl/coin_game"), [0])
    assert "CoinGame has no max_steps" in capfd.readouterr().err
