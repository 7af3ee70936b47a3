"""Every parser of what a user writes, with examples of its input: the one registry that fuzzing goes by.

`tests/meta/test_parsers.py` finds parsers that are not listed; `tests/test_user_input.py` fuzzes them all.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzzing import Parser

_FOLDER = Path(tempfile.mkdtemp(prefix="paceline-fuzz-"))


def of(path: str) -> Callable[..., Any]:
    """The function `module:name`, imported when it is first called."""

    def call(*args: Any, **keywords: Any) -> Any:
        module, _, name = path.partition(":")
        function: Any = importlib.import_module(f"paceline.{module}")
        for part in name.split("."):
            function = getattr(function, part)
        return function(*args, **keywords)

    return call


def written(data: str | bytes, suffix: str) -> Path:
    """A file with `data`."""
    path = _FOLDER / f"input{suffix}"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    path.chmod(0o600)
    return path


def _text(path: str, *examples: str, covers: tuple[str, ...] = (), rejects_examples: bool = False) -> Parser:
    return Parser(path, of(path), examples, (path, *covers), rejects_examples)


def _file(path: str, suffix: str, *examples: str | bytes, covers: tuple[str, ...] = ()) -> Parser:
    return Parser(path, lambda data: of(path)(written(data, suffix)), examples, (path, *covers))


def _environment(path: str, *examples: str, covers: tuple[str, ...] = ()) -> Parser:
    """Variables as `NAME=VALUE`, separated by blanks."""

    def call(text: str) -> object:
        return of(path)(dict(part.partition("=")[::2] for part in text.split(" ")))

    return Parser(path, call, examples, (path, *covers))


def _collective(text: str) -> None:
    """As `paceline schedule … TEXT`: read, asked whether it can, built, and its first steps made."""
    arguments = importlib.import_module("paceline.cli.arguments.schedule")
    name, options = arguments.algorithm(text)
    operation = of("collectives:find")(name).OPERATIONS[0]
    for _ in itertools.islice(arguments.build(name, operation, 8, **options).steps(), 100):
        pass


def _topology(text: str, **size: int) -> None:
    import numpy as np

    net = of("schedule.topologies:parse")(text, **size)
    ranks = np.arange(min(net.num_ranks, 64))
    net.path(ranks, np.roll(ranks, 1))
    net.ends()


def _checkpoint(data: bytes | str) -> None:
    """A folder with this shard and a manifest that fits it, or with this manifest and a good shard."""
    folder = _FOLDER / "checkpoint"
    folder.mkdir(exist_ok=True)
    shard = data if isinstance(data, bytes) else shard_bytes()
    (folder / "1.rank0.pt").write_bytes(shard)
    entry = {"name": "1.rank0.pt", **_sum(shard)}
    manifest = {"format": 1, "generation": 1, "size": 1, "files": [entry]}
    text = json.dumps(manifest) if isinstance(data, bytes) else data
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    of("train.saving.checkpoint:read")(folder, one_rank())


def one_rank() -> Any:
    """A communicator of one rank."""
    global _comm  # noqa: PLW0603  made when the first checkpoint is read
    if _comm is None:
        from paceline.comm.fabric import connect
        from paceline.comm.rendezvous.meeting import meet

        _comm = connect(meet({}), "native", timeout_s=10)
    return _comm


_comm: Any = None


def shard_bytes() -> bytes:
    """What `torch.save` writes for a small shard."""
    buffer = io.BytesIO()
    torch.save({"models": [{"model": {"w": torch.ones(3)}}], "extra": {"a": 1}}, buffer)
    return buffer.getvalue()


def _sum(data: bytes) -> dict[str, int]:
    from paceline._core import crc32c

    return {"bytes": len(data), "crc32c": crc32c(data)}


def _npz() -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    images, labels = np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8)
    np.savez(buffer, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return buffer.getvalue()


def _topology_files() -> tuple[str, ...]:
    topologies = importlib.import_module("paceline.schedule.topologies")
    named = ("ethernet(ranks=3)", "cluster(hosts=2, local=2, rails=2)", "dumbbell(ranks=4)", "dgx1")
    named += ("torus(rows=2, columns=3)", "random(ranks=3)")
    return tuple(json.dumps(topologies.parse(n).to_json()) for n in named)


def _compute_times(text: str) -> None:
    import numpy as np

    of("comm.simulated.compute_time:parse")(text)(np.random.default_rng(1))


def _conditions(text: str) -> None:
    parts = [[word for word in part.split(",") if word] for part in [*text.split(";"), "", "", ""][:3]]
    of("cli.arguments.schedule:conditions")(*parts)


def _job(**options: str) -> Any:
    return of("launchers.job:JobSpec")(("python",), 1, engine_options=options)


def _logs(data: str) -> None:
    """Resume logs whose files a user may have changed."""
    for suffix in (".csv", ".jsonl"):
        path = written(data, suffix)
        with contextlib.suppress(OSError):  # which costs rows: see tests/train/logs/test_full_disk.py
            log = of(f"train.logs.formats.{suffix[1:]}:open_log")(path.parent, path.stem, 3)
            log.write({"epoch": 1, "new": 2})
            log.close()


SPECS = (
    "local_sgd(period=16)",
    "parameter_server(shards=4, staleness=softsync(c=4)+inverse)",
    "x(a=1/2/0.5, b='text', c=true, d=none)",
)
TOPOLOGIES = (
    "ethernet(ranks=8, gbit=1)",
    "cluster(hosts=4, local=2, gbit=10, rails=2)",
    "dumbbell(ranks=8, gbit=1, trunk_gbit=1)",
    "torus(rows=2, columns=4)",
    "hypercube(ranks=8)",
    "random(ranks=8, seed=7, spread=2)",
    "fully_connected(ranks=8)",
    "shared_memory(ranks=8, gbyte=1)",
)
RECORDING = '{"format": 1, "threads": 2, "shards": {"0": [[0, 1], [1, 1]], "1": [[0, 1]]}}'
CHOICES = (
    '{"version": 3, "choices": [{"operation": "all_reduce", "num_bytes": 8, "algorithm": "ring",'
    ' "reason": "measured", "runner_up": null, "times_s": {"ring": 0.1}}]}'
)

STRATEGIES = (
    "all_reduce(bucket_mib=25, codec=threshold(tau=0.01, entropy=true))",
    "bmuf(period=16, momentum=0.9, rate=1.0, nesterov=true, reset_optimizer=true)",
    "decentralized_threshold(tau=0.1, rate=0.1, dense_steps=1, warm_steps=2, warm_workers=1)",
    "diloco(period=100, rate=0.7, momentum=0.9, codec=int8(block=256))",
    "gossip(period=1, mode=asynchronous, seed=0)",
    "local_sgd(period=16, average_optimizer=true)",
    "parameter_server(shards=4, staleness=softsync(c=4)+inverse, push=2, pull=3, sends=updates, lr=0.1)",
    "slowmo(period=12, rate=1.0, momentum=0.5)",
    "streaming_diloco(period=100, fragments=4, delay=1, mix=0.5, payload=full)",
)
POLICIES = (
    "softsync(c=4)+inverse",
    "bounded(s=3)+polynomial(a=0.5)",
    "backup(k=1)",
    "fasgd",
    "reject(max=3)+constant",
)
CODECS = (
    "bf16",
    "error_feedback(codec=onebit(block=512))",
    "fp16(block=1024)",
    "int4(block=128, stochastic=true, seed=3)",
    "threshold(density=0.01, band=2.0)",
    "topk(density=0.01)",
    "topk(k=3, entropy=true)",
)
COLLECTIVES = (
    "ring_chunked(segments=4)",
    "all_pairs(shots=2, channels=2)",
    "bcube(base=2, instances=2)",
    "chain(segments=8)",
    "multi_channel_ring(channels=2)",
    "hierarchical",
)
MANIFEST = json.dumps(
    {"format": 1, "generation": 1, "size": 1, "files": [{"name": "1.rank0.pt", **_sum(shard_bytes())}]}
)
_LOGS = ("train.logs.formats.csv:Table.__init__", "train.logs.formats.csv:Table._widen")
_OPTIONS = ("cli.arguments.schedule:algorithm", "collectives:parse")
PARSERS: tuple[Parser, ...] = (
    # Specs
    _text("spec:parse", *SPECS),
    _text("spec:parse_sum", *SPECS, "a(x=1)+b"),
    _text("spec:split_list", "single,local_sgd(period=8, average=true),'a,b'"),
    _text("strategies.base.strategy:make", *STRATEGIES),
    _text("strategies.base.staleness_policy:make", *POLICIES),
    _text("codecs:make", *CODECS, covers=("codecs:_parsed",)),
    _text("codecs:make_reducer", *CODECS, "powersgd(rank=2, warmup_steps=1, seed=3)"),
    _text("bench.linear_compute:parse", "linear(step_s=0.001, sample_s=2e-5)", "constant"),
    Parser("an algorithm", _collective, COLLECTIVES, _OPTIONS),
    Parser(
        "shares of direct",
        lambda text: of("comm.native.uneven:parse")(text, 4),
        ("direct(shares=33/33/34/0)", "ring(a=1)", "direct"),
        ("comm.native.uneven:parse",),
    ),
    # Networks, faults, compute times of simulations
    Parser("a topology", _topology, TOPOLOGIES, ("schedule.topologies:parse",)),
    Parser("a topology for 8 ranks", lambda text: _topology(text, num_ranks=8), TOPOLOGIES, ()),
    Parser(
        "a topology file",
        lambda data: _topology(str(written(data, ".json"))),
        _topology_files(),
        ("schedule.topology_file:from_json", "schedule.topology_file:read"),
    ),
    Parser(
        "faults",
        lambda text: of("comm.simulated.faults:parse")(text, num_workers=4, seed=1),
        (
            "kill(rank=3, at_s=1.5)+pause(rank=1, at_s=2, for_s=3)",
            "slow(rank=0, at_s=0, for_s=10, factor=4)+drop_link(src=0, dst=1, at_s=1, for_s=2)",
            "partition(ranks='0 1 2', at_s=1)+join(rank=2, at_s=3)+random(kills=1, pauses=2, until_s=10)",
        ),
        ("comm.simulated.faults:parse",),
    ),
    Parser(
        "compute times",
        _compute_times,
        (
            "constant(mean_s=0.01)",
            "normal(mean_s=0.01, std_s=0.002)",
            "shifted_exponential(shift_s=0.005, mean_s=0.01)",
            "pareto(shape=3, minimum_s=0.01)",
            "empirical(samples='0.01 0.012 0.3')",
        ),
        ("comm.simulated.compute_time:parse", "comm.simulated.compute_time:_empirical"),
    ),
    Parser(
        "a file of compute times",
        lambda data: _compute_times(f"empirical(file='{written(data, '.txt')}')"),
        ("0.01 0.012, 0.3\n1\n",),
        (),
    ),
    # Who is where
    _text(
        "comm.rendezvous.hostlist:expand",
        "node[07-09,12],gpu[1-2]-ib",
        "a,b[1-3]c[0-9]",
        covers=("comm.rendezvous.hostlist:_numbers",),
    ),
    _text("comm.rendezvous.hostlist:expand_counts", "2(x3),1", "4"),
    _environment(
        "comm.rendezvous.environment:who_am_i",
        "RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=29400",
        "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=3 SLURM_LOCALID=0 SLURM_STEP_NODELIST=n[1-2],x"
        " SLURM_STEP_TASKS_PER_NODE=2(x1),1 SLURM_NODEID=1 SLURM_JOB_ID=7 SLURM_STEP_ID=0",
        "PMI_RANK=0 PMI_SIZE=2 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2",
        covers=("comm.rendezvous.environment:_number", "comm.rendezvous.environment:_slurm_master"),
    ),
    _environment("options:JobOptions.from_environment", 'PACELINE_JOB={"strategy":"single","min_workers":0}'),
    _text("launchers.endpoint:parse_endpoint", "a:29400", "[::1]:80", "10.0.0.1", "[::1]"),
    _file(
        "comm.simulated.work_costs:read",
        ".json",
        '{"costs": {"encode int8(block=256)": {"4096": 1.2e-05, "64": 0}}}',
        covers=("comm.simulated.work_costs:_checked",),
    ),
    _file("comm.security.keys:read_secret", ".secret", "0123456789abcdef0123456789abcdef\n"),
    Parser(
        "a host file for mpirun",
        lambda data: of("launchers.engines.mpi:_hosts")(_job(hostfile=str(written(data, ".hosts")))),
        ("a:4 slots=2\nb # c\n\n",),
        ("launchers.engines.mpi:_hosts",),
    ),
    Parser(
        "the option wait",
        lambda text: of("launchers.remote.driver:parse_wait")(_job(wait=text), "ray", default=1.0),
        ("60", "0.5"),
        ("launchers.remote.driver:parse_wait",),
    ),
    # The command line
    Parser(
        "a plug-in's file",
        of("plugins:load"),
        ("./zigzag.py", "folder/", "/a/b c.py"),
        ("plugins:load",),
        rejects_examples=True,
    ),
    _text("plugins:named", "ring", "ring_chunked(segments=4)", "./zigzag.py(a=1)", rejects_examples=True),
    _text("cli.arguments.schedule:ranks", "1..17", "2,4,8", "1..4,24"),
    _text("cli.arguments.schedule:size", "100MB", "64MiB", "1e8", "100000000"),
    Parser(
        "conditions",
        _conditions,
        ("3:0.01;3:2.5;0-1:10",),
        ("cli.arguments.schedule:conditions", "cli.arguments.schedule:read"),
    ),
    _text("cli.arguments.values:parse_resources", "cpus=2,gpus=1,memory=4g", "memory=512m"),
    Parser(
        "pairs",
        lambda text: of("cli.arguments.values:parse_pairs")("-o", text.split(",")),
        ("a=1,b=2",),
        ("cli.arguments.values:parse_pairs",),
    ),
    Parser(
        "environment variables",
        lambda text: of("cli.arguments.values:parse_environment")(text.split(",")),
        ("A=1,PATH,B=x y",),
        ("cli.arguments.values:parse_environment",),
    ),
    Parser(
        "a script's options",
        lambda data: of("cli.arguments.values:local_rank_option")(written(data, ".py"), []),
        ("import argparse\np = argparse.ArgumentParser()\np.add_argument('--local_rank', type=int)\n",),
        ("cli.arguments.values:local_rank_option",),
    ),
    Parser(
        "a script's name",
        lambda text: of("cli.arguments.values:check_script")(text, module="/" not in text, folder=_FOLDER),
        ("json", "a.b", "a/b.py"),
        (),
        rejects_examples=True,
    ),
    Parser(
        "numbers of ranks",
        lambda text: of("cli.benchmarks.collectives:_whole")("--ranks", text),
        ("12",),
        ("cli.benchmarks.collectives:_whole",),
    ),
    Parser(
        "horovodrun's hosts",
        lambda text: of("cli.verbs.run:_check_hosts")(text, 4, "local"),
        ("localhost:4", "127.0.0.1"),
        ("cli.verbs.run:_check_hosts",),
    ),
    _text("bench.collectives:parse_peers", "gloo", "none", "gloo,mpi=python3", rejects_examples=True),
    Parser(
        "a strategy with its recording",
        lambda text: of("bench.arguments:scripted")(text, record="a", replay=""),
        STRATEGIES,
        ("bench.arguments:scripted",),
    ),
    _text("train.logs.logbook:check_formats", "jsonl,csv", "tensorboard"),
    # Files of earlier runs
    _file(
        "strategies.server.recording:load", "", RECORDING, covers=("strategies.server.recording:_content",)
    ),
    _file("strategies.server.recording:recorded_threads", "", RECORDING),
    Parser(
        "a table of choices",
        lambda data: of("comm.native.tuning:_read")(written(data, ".json")),
        (CHOICES,),
        ("comm.native.choice:ChoiceTable.from_json", "comm.native.tuning:_read"),
    ),
    Parser("a manifest", _checkpoint, (MANIFEST,), ("train.saving.checkpoint:_read_manifest",)),
    Parser("a shard", _checkpoint, (shard_bytes(),), ("train.saving.checkpoint:_read_shard",)),
    Parser("old logs", _logs, ("epoch,step,a\n1,2,3\n", '{"epoch": 1}\n{"ep'), _LOGS),
    # Data of the tasks
    _file("tasks.builtin.mnist:_read", ".npz", _npz()),
    _file("tasks.builtin.shakespeare:build", ".txt", "to be or not to be, " * 200),
    Parser(
        "a task file",
        lambda data: of("plugins:execute")("task.py", written(data, ".py"), "fuzzed_task", what="task file"),
        ("def build():\n    pass\n",),
        ("plugins:execute",),
    ),
)
