"""Runs a script as `python script` would, and leaves without taking the interpreter down.

For scripts over Gloo: one of its threads may hold the tensors of the last operation a moment longer than the
operation lasts, and PyTorch aborts the process when it lets go of them while the interpreter ends, whether or
not the groups were destroyed (8 of 116 runs of examples/fsdp2.py on a busy machine).
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
