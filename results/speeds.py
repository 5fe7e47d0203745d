"""Images per second of training steps and of scoring, on random images, and the peak memory.

    python results/speeds.py --routing em --batch-size 128

The options are train.py's; the timing takes --epochs times five seconds. Where the machine is
shared, compare only what was run side by side.
"""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's folder
import train  # before torch: it tells its threads how to wait

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from capsnet import CapsNet

args, _ = train.parse()
device, size = torch.device(args.device), args.batch_size
options = dict(args.option) | ({} if args.iterations is None else {"iterations": args.iterations})
spec = train.data.SPECS[args.dataset]
shape = args.cameras, spec.crop, spec.crop
net = CapsNet(shape, len(spec.classes), args.routing, **options).to(device)
images = torch.randn(size, *shape, device=device)
labels = torch.zeros(size, dtype=torch.int64, device=device)
net = train.speed_up(net, images, args)
optimizer = torch.optim.Adam(net.parameter_groups(1e-4))


def training():
    optimizer.zero_grad()
    F.cross_entropy(net(images)[1], labels).backward()
    optimizer.step()


@torch.no_grad()
def scoring():
    net.forward(images)


for call, mode in ((training, True), (scoring, False)):
    net.train(mode)
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    rate = size / timer.blocked_autorange(min_run_time=args.epochs * 5).median
    print(f"{args.routing}, batches of {size}, {call.__name__}: {rate:.1f} images/s")
if device.type == "cuda":
    memory = torch.cuda.max_memory_allocated(device) / 1e6
else:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # of Linux, in KB
print(f"{device}, {torch.get_num_threads()} threads: at most {memory:.0f} MB")
