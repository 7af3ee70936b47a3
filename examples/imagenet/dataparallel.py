"""One process, nn.DataParallel: every step scatters the batch over the GPUs and gathers the outputs.

python dataparallel.py DATA
"""

import model as models
import recipe
from torch import nn


def main() -> None:
    args = recipe.parser(__doc__).parse_args()
    way = recipe.Way("dataparallel", device=recipe.device_of(args))
    if way.device.type == "cpu":
        way.note = "without GPUs nn.DataParallel passes through to the bare model"
    model = models.build(args.arch, recipe.classes(args), args.seed).to(way.device)
    optimizer = recipe.optimizer_for(model, args, way.size)
    recipe.train(args, way, nn.DataParallel(model), optimizer)


if __name__ == "__main__":
    main()
