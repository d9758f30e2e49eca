"""Tests of the Triton kernels. Those in matrix/ are collected where they can run: on a CUDA device or interpreted."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]  # ahead, repairs, op_check

can_run = find_spec("triton") is not None and (os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available())
collect_ignore = [] if can_run else ["matrix"]
