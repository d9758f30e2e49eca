"""A worker process with faults, for test_workers.py: what a batch does is said by a word in one of its texts."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from pyembed import runner, worker

KILL, KILL_ONCE, FULL, FULL_ON_CPU, BROKEN, STRANGE, HANG, DEAF, THREADS = range(40, 49)  # ids of the words w40 to w48
run_batch = runner.run_batch


class Strange(Exception):
    """Cannot be pickled: its constructor takes two arguments."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")


def faulty(model: Any, reads: Any, rows: Any, stop: Any) -> Any:
    words = {int(id) for ids in rows.ids for id in ids}
    once = Path(os.environ["FAULTS"]) / "killed"
    if KILL in words or (KILL_ONCE in words and not once.exists()):
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if FULL in words and len(rows.ids) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 byte.")
    if FULL_ON_CPU in words and len(rows.ids) > 1:
        torch.empty(1 << 60)
    if BROKEN in words:
        raise FileNotFoundError(2, "No such file or directory", "gone.bin")
    if STRANGE in words:
        raise Strange("odd", "thing")
    if THREADS in words:
        raise LookupError(f"threads={torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
    if HANG in words:
        (Path(os.environ["FAULTS"]) / "hangs").touch()
        while not (Path(os.environ["FAULTS"]) / "release").exists():
            runner.check(stop)
            time.sleep(0.01)
    if DEAF in words:
        (Path(os.environ["FAULTS"]) / "deaf").touch()
        time.sleep(1.0)
    return run_batch(model, reads, rows, stop)


def main(handle: int) -> None:
    runner.run_batch = faulty
    worker.main(handle)
