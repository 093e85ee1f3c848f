"""Processes that run a script as `python script.py ...` does, but begin with its packages imported.

A server that has imported them, and has no JAX device yet, forks each of them. That saves a second
or two of every run; the tests have hundreds.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

PACKAGES = (
    "envpool",
    "flax.linen",
    "gymnasium",
    "imageio.v3",
    "jax.experimental.multihost_utils",
    "optax",
    "pydantic",
    "tensorboard.plugins.histogram.summary_v2",
    "tensorboard.plugins.hparams.summary_v2",
    "tensorboard.summary.writer.event_file_writer",
    "tqdm",
    "tyro",
)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(PACKAGES))


def begin(line: list[str], cwd: Path, env: dict, outputs: tuple[str, str]) -> None:
    """Becomes the process that runs a script, its output and errors going to two files."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.path[0] = str(Path(line[0]).parent)
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")


def execute(line: list[str], cwd: Path, env: dict, timeout: float = 300) -> CompletedProcess:
    """Returns the finished process of a command line: Python, script, flags.

    Raises: TimeoutError.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = (f"{folder}/stdout", f"{folder}/stderr")
        for path in outputs:
            Path(path).touch()
        process = SERVER.Process(target=begin, args=(line[1:], cwd, env, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{line} takes longer than {timeout} s")
        stdout, stderr = (Path(path).read_text() for path in outputs)
    return CompletedProcess(line, process.exitcode, stdout, stderr)
