"""Parameter averaging on Spark: collectives between workers, or the driver with tree aggregation.

python benchmarks/spark_averaging.py --data ../shared/data/mnist.npz

Two executors of one core each, on this host. "total" is the call of `fit`, with the start of workers and the
copy of the data; "training" is the clock of the history.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def frame_of(spark: Any, path: Path) -> Any:
    import pyarrow as pa

    with np.load(path) as file:
        images, labels = file["x_train"], file["y_train"].astype(np.int64)
    table = pa.table({"image": pa.array([image.tobytes() for image in images]), "label": pa.array(labels)})
    return spark.createDataFrame(table).repartition(2).cache()


def session(master: str) -> Any:
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).appName("averaging")
    for name, value in {
        "spark.cores.max": "2",
        "spark.executor.cores": "1",
        "spark.executor.memory": "1g",
        "spark.log.level": "OFF",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--master", default="local-cluster[2,1,1024]")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--periods", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    from paceline.compat.spark import fit

    spark = session(arguments.master)
    frame = frame_of(spark, arguments.data)
    frame.count()
    print("| period | averaging | training s | total s | accuracy | largest difference |")
    print("|---|---|---|---|---|---|")
    for period in arguments.periods:
        strategy = f"local_sgd(period={period}, average_optimizer=true)"
        first = None
        for name, keywords in (
            ("collective", {}),
            ("driver, depth 1", {"averaging": "driver", "depth": 1}),
            ("driver, depth 2", {"averaging": "driver", "depth": 2}),
        ):
            began = time.perf_counter()
            model, history = fit(
                frame, "mnist", data=arguments.data, strategy=strategy, epochs=arguments.epochs, **keywords
            )
            total_s = time.perf_counter() - began
            flat = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
            first = flat if first is None else first
            last = history[-1]
            print(
                f"| {period} | {name} | {last['seconds']:.1f} | {total_s:.1f} | {last['accuracy']:.4f}"
                f" | {abs(flat - first).max():.1e} |",
                flush=True,
            )
    spark.stop()


if __name__ == "__main__":
    main()
