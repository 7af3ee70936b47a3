"""A Horovod script. It names horovod only; Paceline answers to that name.

paceline run --as-horovod -n 4 horovod_style.py DATA
"""

import horovod.torch as hvd
import model as models
import recipe


def main() -> None:
    args = recipe.parser(__doc__).parse_args()
    hvd.init()
    args.local_rank = hvd.local_rank()
    device = recipe.device_of(args)
    way = recipe.Way("horovod_style", hvd.rank(), hvd.size(), device, lambda x: hvd.allreduce(x, op=hvd.Sum))
    model = models.build(args.arch, recipe.classes(args), args.seed).to(device)
    optimizer = recipe.optimizer_for(model, args, way.size)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    recipe.train(args, way, model, optimizer)
    hvd.shutdown()


if __name__ == "__main__":
    main()
