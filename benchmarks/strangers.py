"""What another account of this host can do to a training job: `paceline run` beside torchrun with Gloo.

    sudo python benchmarks/strangers.py            # root only to become another account
    sudo python benchmarks/strangers.py run nodes ray spark mpi slurm backend

For each launcher: how many TCP ports the job listens on; at how many of them torch's own TCPStore client can
write and read keys; and how many steps a second the job makes (an all_reduce of 1 MB and a request to a peer)
without strangers, while a process floods listeners of its own (what that takes from the cores), and while it
floods those of the job: idle connections, garbage, halves of handshakes, frames that are too long, what the
listener said sent back, and bytes that come one by one. Nothing harmful is written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from strangers.jobs import KINDS, attacked  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["run", "torchrun, Gloo"], help=", ".join(KINDS))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of the three")
    parser.add_argument("--mpirun", default="mpirun", help="the program, for mpi")
    options = parser.parse_args()
    print("| job | ports | for other hosts | open stores | steps/s | flood beside it | flood of it | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            told = attacked(kind, Path(folder), seconds=options.seconds, mpirun=options.mpirun)
        cells = [
            kind,
            told["ranks"] + told["launcher"],
            told["reachable_from_other_hosts"],
            told["keys"],
            *(f"{told[name]:.0f}" for name in ("quiet", "control", "flooded")),
            f"{told['flooded'] / told['control']:.2f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
