"""all_reduce between hosts joined by links of known rate and delay, beside gloo.

python benchmarks/lab.py [--scenarios gigabit,far,uneven] [--hosts 4] [--blocks 5]      (needs root)

The hosts are network namespaces (tests/tools/netlab). Libraries take turns in blocks of back-to-back calls; a
figure is the median over blocks of the slowest rank's mean. `bound` is what a ring cannot beat for its bytes
at the rate that plain sockets reach round the ring in the same run: 2(P-1)/P S / rate.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS: dict[str, dict[str, Any]] = {
    "gigabit": {"rate": "1gbit", "delay_s": 0.0, "sizes": [4, 1 << 10, 8 << 10, 32 << 10, 1 << 20, 64 << 20]},
    "far": {"rate": "1gbit", "delay_s": 0.005, "sizes": [4, 1 << 10, 32 << 10, 256 << 10, 1 << 20, 16 << 20]},
    "uneven": {"rate": "1gbit", "delay_s": 0.0, "slow": "250mbit", "sizes": [4 << 20, 16 << 20, 64 << 20]},
}


def ring_rate(rank: int, addresses: list[str], num_bytes: int = 32 << 20) -> float:
    """Payload bytes/s of plain sockets while every host streams to the next one."""
    with socket.create_server((addresses[rank], 7100)) as server:
        took: list[float] = []

        def stream() -> None:
            for _ in range(200):
                try:
                    link = socket.create_connection(
                        (addresses[(rank + 1) % len(addresses)], 7100), timeout=60
                    )
                    break
                except OSError:
                    time.sleep(0.05)
            with link:
                start, block = time.perf_counter(), bytes(1 << 18)
                for _ in range(num_bytes // len(block)):
                    link.sendall(block)
                link.shutdown(socket.SHUT_WR)
                link.recv(1)
                took.append(time.perf_counter() - start)

        sender = threading.Thread(target=stream)
        sender.start()
        peer, _ = server.accept()
        with peer:
            buffer = bytearray(1 << 20)
            while peer.recv_into(buffer):
                pass
            peer.sendall(b"!")
        sender.join()
    return num_bytes / took[0]


def worker(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from paceline.comm.native import tuning
    from paceline.comm.native.shared_memory import connect
    from paceline.comm.rendezvous.meeting import meet

    torch.set_num_threads(1)
    comm = connect(meet(), timeout_s=60)
    rank, addresses = comm.rank, options.addresses.split(",")
    rates = torch.zeros(comm.size, dtype=torch.float64)
    rates[rank] = ring_rate(rank, addresses)
    comm.all_reduce(rates).wait()
    store = dist.TCPStore(addresses[0], 7200, comm.size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=comm.size)
    if rank == 0:
        print(json.dumps({"rates": rates.tolist()}), flush=True)
    if options.programs:  # what would be selected, beside named programs
        comm.selection = tuning.tune(comm, ("all_reduce",), [int(s) for s in options.sizes.split(",")])
    for num_bytes in (int(s) for s in options.sizes.split(",")):
        tensor = torch.zeros(num_bytes // 4)
        calls: dict[str, Callable[[], object]] = {
            "gloo": lambda t=tensor: dist.all_reduce(t),
            "native": lambda t=tensor: comm.all_reduce(t).wait(),
        }
        if options.programs:
            for name in options.programs.split(","):

                def run(name: str = name, t: torch.Tensor = tensor) -> None:
                    comm.all_reduce(t, algorithm=name).wait()

                calls[name] = run
        times = measure(calls, comm, options.blocks)
        if rank == 0:
            chosen = comm.explain("all_reduce", num_bytes).algorithm
            print(json.dumps({"num_bytes": num_bytes, "median_s": times, "selected": chosen}), flush=True)
    dist.destroy_process_group()
    comm.close()


def measure(calls: dict[str, Callable[[], object]], comm: Any, blocks: int) -> dict[str, float]:
    import torch

    from paceline.types import ReduceOp

    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for block in range(-1, blocks):  # the first one tells how many calls make 0.2 s
        for name, call in calls.items():
            comm.barrier().wait()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            took = torch.tensor([(time.perf_counter() - start) / repeats[name]], dtype=torch.float64)
            comm.all_reduce(took, op=ReduceOp.MAX).wait()
            if block < 0:
                repeats[name] = max(1, min(50, int(0.2 / float(took))))
            else:
                times[name].append(float(took))
    return {name: statistics.median(each) for name, each in times.items()}


def run_scenario(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one laboratory."""
    sys.path.insert(0, str(ROOT / "tests" / "tools"))
    from netlab import Lab

    scenario = SCENARIOS[name]
    with Lab(hosts=options.hosts, rate=scenario["rate"], delay_s=scenario["delay_s"]) as lab:
        if "slow" in scenario:
            lab.set_rate(options.hosts - 1, scenario["slow"])
        addresses = [lab.address(i) for i in range(options.hosts)]
        command = [sys.executable, __file__, "--worker", "--blocks", str(options.blocks)]
        command += ["--addresses", ",".join(addresses), "--sizes", ",".join(map(str, scenario["sizes"]))]
        command += ["--programs", "ring" if "slow" in scenario else ""]
        place = {"WORLD_SIZE": str(options.hosts), "MASTER_ADDR": addresses[0], "MASTER_PORT": "7000"}
        place |= {"GLOO_SOCKET_IFNAME": "eth0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        workers = [
            lab.popen(i, command, env=place | {"RANK": str(i)}, stdout=subprocess.PIPE, text=True)
            for i in range(options.hosts)
        ]
        out, _ = workers[0].communicate(timeout=options.limit)
        for other in workers[1:]:
            other.communicate(timeout=20)
    first, *rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    rate, p = min(first["rates"]), options.hosts
    for row in rows:
        row |= {"scenario": name, "bound_s": 2 * (p - 1) / p * row["num_bytes"] / rate, "rate": rate}
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['scenario']}: payload rate round the ring {rows[0]['rate'] * 8e-6:.0f} Mbit/s")
    for row in rows:
        median = row["median_s"]
        figures = "  ".join(f"{name} {1e3 * s:9.3f} ms" for name, s in median.items())
        share = row["bound_s"] / median["native"]
        print(
            f"{row['num_bytes']:>10} B  {figures}  {median['gloo'] / median['native']:6.2f} x gloo"
            f"  {share:6.1%} of the bound  {row['selected']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--limit", type=float, default=170.0, help="seconds for one scenario")
    parser.add_argument("--json", default="", help="a file for the rows")
    for hidden in ("--addresses", "--sizes", "--programs"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    rows: list[dict[str, Any]] = []
    for name in options.scenarios.split(","):
        rows += run_scenario(name, options)
        show([row for row in rows if row["scenario"] == name])
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    return None


if __name__ == "__main__":
    main()
