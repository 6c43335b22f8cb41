"""The command as a process: what it imports, and that PEFT knows the method wherever it must."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "numpy", "PIL", "yaml", "shapadapter.adapter"}

# What pip writes for the command; at its end it notes what was imported.
SCRIPT = """
import os, sys
from shapadapter.cli import main
if __name__ == "__main__":
    try:
        main()
    finally:
        print(*sys.modules, file=open(os.environ["MODULES"], "w"))
"""

SPAWNING = """
import sys
from shapadapter.cli import main

def known():
    import threading, shapadapter
    assert not {"shapadapter.hub.pipeline", "shapadapter.explanation.api"} & set(sys.modules)  # registering is not importing
    names = ("explain", "load", "ShapleyConfig")
    threads = [threading.Thread(target=getattr, args=(shapadapter, name)) for name in names]
    failed = []
    threading.excepthook = failed.append
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    from peft import PeftType, get_peft_config
    from transformers.pipelines import PIPELINE_REGISTRY
    assert not failed, failed
    assert sys.argv[0].endswith("shapadapter"), sys.argv
    assert type(get_peft_config({"peft_type": "SHAPLEY"})).__name__ == "ShapleyConfig"
    assert "image-attribution" in PIPELINE_REGISTRY.supported_tasks

if __name__ == "__main__":
    assert "torch" not in sys.modules
    import multiprocessing
    process = multiprocessing.get_context("spawn").Process(target=known)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def start(*words, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **variables}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["inspect"], ["nonsense"]])
def test_help_and_wrong_usage_do_not_wait_for_torch(tmp_path, words):
    script = tmp_path / "shapadapter"
    script.write_text(SCRIPT)
    done = start(script, *words, MODULES=str(tmp_path / "modules"))
    assert done.returncode == (0 if {"--help", "--version"} & set(words) else 2), done.stderr
    assert HEAVY & set((tmp_path / "modules").read_text().split()) == set()


@pytest.mark.slow
def test_a_program_of_the_command_s_name_and_what_it_spawns_know_method_and_task(tmp_path):
    """Whatever the program is called, and whichever of its threads is the first to use the package."""
    script = tmp_path / "shapadapter"
    script.write_text(SPAWNING)
    done = start(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_python_m(folder):
    """Nothing but the command itself imports the adapter there; its json stands alone on the standard output."""
    done = start("-m", "shapadapter", "inspect", folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["supported"]
