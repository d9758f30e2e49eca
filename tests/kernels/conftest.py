"""Tests of the Triton kernels. Those in interpreted/ need a process in which TRITON_INTERPRET was 1 when triton was imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]  # ahead, op_check

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
