"""train.py with connectionist routing in C++ (fused.cpp), which no user of the network needs.

On two threads of an AMD EPYC with AVX2 it trained on 20 images/s, capsnet.py compiled on 6.1 (7.5
with GLIBC_TUNABLES); scoring 65 and 18 (21); in turn, medians of seven steps. The run in this
folder goes on with

    python fused.py --resume checkpoint.pt --data-dir ../../../datasets

The same parameters, losses and gradients, within the rounding of float32: at every start each layer
is compared with capsnet.py's in float64.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import train  # before torch, see there

import torch
import torch.nn.functional as F

from capsnet import CapsNet, ConvCaps


@cache
def library(inputs):
    """fused.cpp, compiled for so many inputs of a receptive field."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["g++", "-O3", "-march=native", "-shared", "-fPIC", "-pthread",
                        f"-DINPUTS={inputs}", "-Wno-aggressive-loop-optimizations", "-o",
                        f"{folder}/fused.so", Path(__file__).with_name("fused.cpp")], check=True)
        return ctypes.CDLL(f"{folder}/fused.so")


def pointers(tensors):
    assert all(x.is_contiguous() and x.dtype == torch.float32 and x.is_cpu for x in tensors)
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def pack(tensors):
    return (ctypes.c_void_p * len(tensors))(*pointers(tensors))


def call(function, sizes, tensors, *more):
    """tensors: those of Fused.forward, phi's from the seventh on; more: further arguments."""
    widths = [16, *(len(x) for x in tensors[6:])]
    function(*sizes, os.cpu_count(), *pointers(tensors[:6]), len(widths) - 1,
             (ctypes.c_int * len(widths))(*widths), pack(tensors[6:]), *more)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, iterations, weight, pose, a, fixed, mu, recurrent, *phi):
        """weight (O, D, I), pose (N, D, I), a (N, I), then the cell's weights and phi's."""
        tensors = [x.contiguous() for x in (weight, pose, a, fixed, mu, recurrent, *phi)]
        (outputs, entries, inputs), fields = weight.shape, len(pose)
        assert entries == 16 and inputs % 8 == 0 and 1 <= iterations <= 3
        assert pose.shape == (fields, entries, inputs) and a.shape == (fields, inputs)
        assert [x.shape for x in (fixed, mu, recurrent)] == [(64, 17), (64, 16), (64, 18)]
        ctx.sizes = outputs, fields, iterations
        results = [weight.new_empty(fields, outputs, 16) for _ in range(2)]  # mu, sum_i c_i s_i
        call(library(inputs).forward, ctx.sizes, tensors, *pointers(results))
        ctx.save_for_backward(*tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx, *gradients):
        tensors = ctx.saved_tensors
        gradients = [x.contiguous() for x in gradients]
        results = [torch.zeros_like(x) for x in tensors]
        call(library(tensors[0].shape[2]).backward, ctx.sizes, tensors,
             *pointers(gradients + results[:6]), pack(results[6:]))
        return None, *results


class FusedCaps(ConvCaps):
    """ConvCaps with ConnectionistRouting; the third result, its compatibilities, is None."""

    def forward(self, pose, logit):
        routing, cell, matrix = self.routing, self.routing.cell, self.weight.shape[2:]
        pose, places = self.receptive_fields(F.normalize(pose, dim=(-2, -1), eps=1e-4))
        a = F.logsigmoid(self.receptive_fields(logit)[0].clamp_min(-1e4)).exp()  # (I, N)
        weight = F.normalize(self.weight, dim=(-2, -1), eps=1e-6)
        entries = matrix.numel()
        w_mu, w_vote, w_a, w_c = cell.weight_ih.split((entries, entries, 1, 1), 1)
        bias = (cell.bias_ih + cell.bias_hh)[:, None]
        phi = [[linear.weight, linear.bias[:, None]] for linear in routing.phi[::2]]
        phi[0].insert(1, torch.zeros_like(phi[0][1]))  # c, in the row between h and the ones
        mu, total = Fused.apply(
            routing.iterations, weight.flatten(2).permute(1, 2, 0),
            pose.flatten(1, 2).permute(2, 1, 0), a.T, torch.cat([w_vote, w_a], 1), w_mu,
            torch.cat([cell.weight_hh, w_c, bias], 1), *(torch.cat(parts, 1) for parts in phi))
        logit = routing.psi(total).squeeze(-1).unflatten(0, places)  # (B, *out, O)
        mu = mu.unflatten(0, places).unflatten(-1, matrix)
        return mu.movedim(-3, 1), logit.movedim(-1, 1), None


def check(net):
    """Each layer's results and gradients, with `net`'s weights, against capsnet.py in float64."""
    generator = torch.Generator().manual_seed(0)
    for layer, side in ((net.caps1, 14), (net.caps2, 6), (net.class_caps, 4)):
        channels = len(layer.weight) // layer.kernel_size[0] ** 2
        pose = torch.randn(4, channels, side, side, 4, 4, generator=generator)
        logit = torch.randn(4, channels, side, side, generator=generator)
        results = []
        for kind, dtype in ((FusedCaps, torch.float32), (ConvCaps, torch.float64)):
            layer.__class__, inputs = kind, [x.to(dtype) for x in (pose, logit)]
            parameters = list(layer.to(dtype).parameters())
            mu, out, _ = layer(*(x.requires_grad_() for x in inputs))
            loss = (mu * mu.detach().roll(1, 0)).sum() + (out * out.detach().roll(1, 0).cos()).sum()
            results.append([mu, out, *torch.autograd.grad(loss, inputs + parameters)])
        layer.float()
        largest = max(exact.norm() for exact in results[1])  # phi's last bias: rounding
        for fused, exact in zip(*results):
            error = (fused - exact).norm()
            assert error < 1e-3 * exact.norm() + 1e-6 * largest, (error, exact.norm(), exact.shape)


def build(*arguments, **options):
    net = CapsNet(*arguments, **options)
    check(net)
    net.class_caps.__class__ = FusedCaps
    return net


if __name__ == "__main__":
    train.OneByOne = FusedCaps  # what train.py makes of the other two layers
    sys.argv.append("--no-compile")
    train.command_line(build)
