"""Train on a Spark DataFrame, by any strategy, with the workers in one barrier stage: `fit`."""

from paceline.compat.spark.fit import Fitted, fit

__all__ = ["Fitted", "fit"]
