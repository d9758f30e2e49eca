"""Time to the first embedding in a new process, on a CPU, beside sentence-transformers: interleaved processes, medians.

    python bench/first_embedding.py MODEL_DIR [--rounds 7] [-o bench/results/NAME.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CASES = {
    "import torch": "import torch",
    "import pyembed": "import torch, pyembed; pyembed.Encoder",
    "pyembed": "from pyembed import Encoder; Encoder({model!r}, device='cpu').encode('hello')",
    "sentence-transformers": "from sentence_transformers import SentenceTransformer as S; S({model!r}, device='cpu').encode('hello')",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for each in range(options.rounds + 1):  # the first round reads files into the cache
        for name, code in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code.format(model=options.model)], check=True, capture_output=True)
            if each:
                times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        print(f"{statistics.median(seconds):7.2f} s  {name}")
    if options.output:
        record: dict[str, Any] = {"command": "python bench/first_embedding.py MODEL", "date": datetime.date.today().isoformat()}
        record |= {"versions": {name: version(name) for name in ("torch", "sentence-transformers", "transformers")}}
        record |= {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "seconds": times}
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
