"""Whatever a user types or brings trains, or is refused in one line: never ours is the traceback.

Examples are drawn by hypothesis, twenty for each script, of which two train; with -m slow, two
hundred, which all do.
"""

import copy
import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_origin

import gymnasium
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tyro
from conftest import SCRIPTS, SMALL, command, environment
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, given, settings
from processes import execute

NUMBERS = {
    bool: ["yes"],
    int: ["-1", "0", "1", "2", "3", "4", "8", "1.5", "x"],
    float: ["-1", "0", "1e-3", "0.5", "1", "2", "inf", "nan", "x"],
    str: ["", "obs", "0:1", "1:2", "nothing"],
}
APART = {"env_id", "run_dir", "mode", "clobber", "total_timesteps"}  # not drawn


def drawn(name, field):
    """Returns a strategy for the words of a flag, within its range and beyond."""
    flag = name.replace("_", "-")
    kind = field.annotation
    if name == "env_kwargs":
        words = st.sampled_from(["{}", '{"length": 3}', "[]", "{"])
        return words.map(lambda x: ["--env-kwargs", x])
    if kind is bool:
        return st.sampled_from([[f"--{flag}"], [f"--no-{flag}"]])
    if get_origin(kind) is Literal:
        choices = [*map(str, kind.__args__), "nonsense"]
        return st.sampled_from(choices).map(lambda x: [f"--{flag}", x])
    of = next(x for x in (int, float, str) if x.__name__ in str(kind))
    words = st.sampled_from(NUMBERS[of])
    if "tuple" in str(kind):
        return st.lists(words, min_size=1, max_size=3).map(lambda x: [f"--{flag}", *x])
    if "None" in str(kind):
        words = st.one_of(words, st.just("None"))
    return words.map(lambda x: [f"--{flag}", x])


@st.composite
def lines(draw, script):
    """Returns the words of a script's command line, of one to four flags."""
    fields = __import__(script).Args.model_fields
    flags = st.sampled_from(sorted(fields.keys() - APART))
    names = draw(st.lists(flags, min_size=1, max_size=4, unique=True))
    return [word for name in names for word in draw(drawn(name, fields[name]))]


def assert_names_a_flag(script, said):
    """Checks what a script says of a command line that it does not take."""
    assert "Traceback" not in said, said
    said = said.replace("_", "-")
    flags = [name.replace("_", "-") for name in __import__(script).Args.model_fields]
    fields = [row.strip("│ ").partition(".")[0] for row in said.splitlines()]
    named = [flag for flag in flags if f"--{flag}" in said or flag in fields]
    surplus = "Unrecognized options" in said  # tyro's word for a number too many
    assert named or surplus, said


def refusal(script, words):
    """Returns what is said of settings that are none, or nothing if they are some."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            tyro.cli(__import__(script).Args, args=words)
        except SystemExit as ended:
            assert ended.code == 2
    return said.getvalue()


def check_training(script, words):
    """Runs a command; it trains, or says what is wrong with which flag, within a minute."""
    with tempfile.TemporaryDirectory() as folder:
        done = execute(command(script, *words), Path(folder), environment(), timeout=60)
    if done.returncode == 1:  # what a wild setting has made of the network is said, too
        assert done.stderr.strip().splitlines()[-1].endswith("is not finite"), done.stderr
        return
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    if done.returncode == 2:
        assert_names_a_flag(script, done.stderr)


DRAWN = {  # without shrinking, as each example takes seconds
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}


@pytest.mark.parametrize(
    ("examples", "most"), [(20, 1), pytest.param(200, 200, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("script", [x.stem for x in SCRIPTS])
def test_any_command_line(script, examples, most):
    """Of those that are settings, `most` train."""
    trained = []

    @settings(max_examples=examples, **DRAWN)
    @given(lines(script))
    def check(line):
        words = [*SMALL[script], "--env-id", "scripted:Counter-v0", "--run-dir", "a", *line]
        said = refusal(script, words)
        if said:
            assert_names_a_flag(script, said)
        elif len(trained) < most:
            trained.append(line)
            check_training(script, words)

    check()
    assert trained


# --- Spaces ---
def bounds(draw, dtype):
    """Returns a lower and an upper bound of numbers of a dtype."""
    if dtype == "bool":
        return 0, 1
    low = draw(st.sampled_from([0, -3, 1]) if dtype[0] != "u" else st.just(0))
    if dtype[0] == "f":
        low = draw(st.sampled_from([low, -0.1, -np.inf]))
        return low, draw(st.sampled_from([1.5, 7, np.inf]))
    return low, draw(st.sampled_from([2, 100]))


DTYPES = ["float32", "float64", "float16", "uint8", "int8", "int64", "bool"]


@st.composite
def boxes(draw, most_axes=4):
    """Returns a Box of any dtype, shape and bounds, which may be its cells' own."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=most_axes)))
    low, high = bounds(draw, dtype)
    if len(shape) > 1 and dtype != "uint8":
        high = min(high, 1)  # images that go beyond are scaled: tests/test_atari.py
    high = np.full(shape, high, dtype)
    if len(shape) == 1 and dtype[0] == "f" and draw(st.booleans()):
        high.ravel()[0] = 1.25
    return spaces.Box(np.full(shape, low, dtype), high, dtype=dtype)


@st.composite
def choices(draw):
    """Returns a space of one choice or several."""
    start = draw(st.integers(-3, 3))
    number = st.integers(1, 4)
    kind = draw(st.sampled_from(["one", "several", "table", "bits"]))
    if kind == "one":
        return spaces.Discrete(draw(number), start=start)
    if kind == "bits":
        return spaces.MultiBinary(draw(st.sampled_from([1, 3, [2, 2]])))
    each = draw(st.lists(number, min_size=2, max_size=2))
    nvec = np.array([each, each] if kind == "table" else each)
    return spaces.MultiDiscrete(nvec, start=np.full_like(nvec, start))


LEAVES = st.one_of(boxes(), choices())
KEYS = st.sampled_from(["a", "b", "c", 1])
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS.filter(lambda x: x != 1), inner, min_size=1, max_size=3).map(
            spaces.Dict
        ),
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=4,
)


class Anything(gymnasium.Env):
    """Shows samples of a space, keeps what it showed, and asserts that actions are of their own."""

    shown: ClassVar[list] = []

    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space
        self.count = 0

    def obs(self):
        found = self.observation_space.sample()
        Anything.shown.append(copy.deepcopy(found))
        return found

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return self.obs(), {}

    def step(self, action):
        space = self.action_space
        assert space.contains(action), (space, action)
        assert np.asarray(action).dtype == space.dtype
        self.count += 1
        return self.obs(), 1.0, False, self.count == 3, {}


def numbers(obs, space):
    """Returns the leaves of an observation as vectors, choices one-hot, in the space's order."""
    if isinstance(space, spaces.Dict):
        return [x for name in space for x in numbers(obs[name], space[name])]
    if isinstance(space, spaces.Tuple):
        return [x for i, part in enumerate(space) for x in numbers(obs[i], part)]
    if isinstance(space, spaces.Discrete):
        return [np.eye(space.n)[obs - space.start]]
    if isinstance(space, spaces.MultiDiscrete):
        each = zip(obs.ravel(), space.start.ravel(), space.nvec.ravel(), strict=True)
        return [np.concatenate([np.eye(n)[x - start] for x, start, n in each])]
    return [np.ravel(obs).astype(np.float32)]


ACTIONS = {
    "ppo_continuous": boxes(most_axes=2),
    "ppo_atari": choices().filter(lambda x: isinstance(x, spaces.Discrete)),
    "ppo_icm_lstm": st.one_of(boxes(most_axes=2), choices()),
}


@pytest.mark.parametrize("examples", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", list(ACTIONS))
def test_any_spaces(script, examples):
    """Two iterations of actions inside of their space, and every number is there to be seen."""
    module = __import__(script)

    @settings(max_examples=examples, **DRAWN)
    @given(NESTED, ACTIONS[script])
    def check(observation_space, action_space):
        check_spaces(module, observation_space, action_space)

    check()


def check_spaces(module, observation_space, action_space):
    both = {"observation_space": observation_space, "action_space": action_space}
    entry = partial(Anything, **both)
    gymnasium.registry.pop("Anything-v0", None)
    gymnasium.register("Anything-v0", entry_point=entry, disable_env_checker=True)
    sizes = {"num_envs": 1, "num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    args = module.Args(env_id="Anything-v0", hidden_sizes=(4,), critic_sizes=(4,), **sizes)
    Anything.shown.clear()
    try:
        run = module.make_run(args)
    except module.InputError as refused:
        assert "\n" not in str(refused)
        return
    learn = jax.jit(partial(module.update_seeds, network=run.network, args=args))
    runner, learner = module.first_runner(run), run.init()
    for _ in range(2):
        runner, transition = run.act(runner, learner)
        learner, metrics = learn(learner, transition)
        assert not [x for x in metrics if x.startswith("bad/") and metrics[x].any()]
        shown = Anything.shown[-9:]
        leaves = [np.float32(x)[0].reshape(9, -1) for x in jax.tree.leaves(transition.obs)]
        found = np.concatenate(leaves, axis=1)
        wanted = [np.concatenate(numbers(obs, observation_space)) for obs in shown]
        np.testing.assert_allclose(np.sort(found), np.sort(wanted), rtol=1e-6)
