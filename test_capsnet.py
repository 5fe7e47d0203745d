"""What must stay true: capsnet.py agrees with loops from the equations; data.py reads, or refuses,
files made here in the official formats, whole or damaged; train.py works as a user runs it.

An oracle takes one image: votes v (L, O, I, D), activations a (L, I), and `fields`, the I input
capsules that each of the L output positions sees. It returns (pose, logit, compatibility) for each
position l and output j. Comparisons are in float64, of values and of all gradients.
"""

import copy
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import train  # before torch, as for a user: it tells threads how to wait

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck

import capsnet as cn
import data
from capsnet import CapsNet, ConvCaps

HERE = Path(cn.__file__).parent
ARGS, _ = train.parse(["--device", "cpu"])  # all defaults
MAKE = {
    "similarity": lambda o: cn.SimilarityRouting(o, num_kernels=2),
    "connectionist": lambda o: cn.ConnectionistRouting(o, pose_size=2, hidden_size=3, phi=(4,),
                                                         psi=(6, 5)),
    "em": cn.EMRouting,
    "dynamic": cn.DynamicRouting,
}
every_routing = pytest.mark.parametrize("name", MAKE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def small_layer(name, kernel=3, stride=1, dims=1):
    """In float64; routing's parameters are random, so that none hides behind its initial value."""
    layer = ConvCaps(2, 2, kernel, MAKE[name](2), stride, 2, dims).double()
    for p in layer.routing.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def tiny_net(name):
    return CapsNet((1, 17, 19), 3, name, channels=(4, 2, 3, 2), pose_size=2).eval()


def gradients(outputs, directions, inputs, keep=True):
    projection = sum((x * d).sum() for x, d in zip(outputs, directions))
    return grad(projection, inputs, retain_graph=keep, allow_unused=True, materialize_grads=True)


def assert_same(actual, expected, inputs):
    """Equal values, and equal gradients of a random projection with respect to every input."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    directions = [torch.randn_like(x) for x in expected]
    slopes = gradients(actual, directions, inputs)
    torch.testing.assert_close(slopes, gradients(expected, directions, inputs),
                               rtol=1e-8, atol=1e-9)
    return slopes


# ------------------------------------------------------------------------------------ oracles


def weighted_sum(weights, vectors):
    return sum(w * v for w, v in zip(weights, vectors))


def oracle_similarity(r, j, v, a):
    """Section 4.1 for output capsule j with votes v (I, D) and activations a (I)."""
    n, (theta1, theta2, theta3) = len(v), r.theta[:, j]
    w = [x.exp() / sum(y.exp() for y in r.kernel_logit) for x in r.kernel_logit]
    gauss = lambda mu, i, s: (-sum((mu - v[i]) ** 2) / (2 * s**2)).exp()
    k = lambda mu, i: sum(w_q * gauss(mu, i, s) for w_q, s in zip(w, r.log_width.exp()))
    c = [v.new_tensor(1 / n)] * n
    mu = weighted_sum(c, v)
    for _ in range(r.iterations):
        lambda1, lambda2 = r.log_lambda[:, j].exp()
        e = [a[i] ** (lambda2 / (lambda1 + lambda2)) * (k(mu, i) / (lambda1 + lambda2)).exp()
             for i in range(n)]
        c = [x / sum(e) for x in e]
        mu = weighted_sum(c, v)
    agreement = weighted_sum(c, [k(mu, i) for i in range(n)])
    logit = theta1 * agreement + theta2 + theta3.abs() * weighted_sum(c, a.log())
    return mu, logit, torch.stack(c)


def oracle_connectionist(r, j, v, a):
    """Algorithm 2: PyTorch's LSTM cell sees the concatenated [mu, v, a, c], vote by vote."""
    n, zero = len(v), v.new_zeros(1, r.cell.hidden_size)
    c, state = [v.new_tensor(1 / n)] * n, [(zero, zero)] * n
    mu = weighted_sum(c, v)
    for _ in range(r.iterations):
        state = [r.cell(torch.cat([mu, v[i], a[i].view(1), c[i].view(1)])[None], state[i])
                 for i in range(n)]
        b = [r.phi(h)[0, 0].exp() for h, s in state]
        c = [x / sum(b) for x in b]
        mu = weighted_sum(c, v)
    return mu, r.psi(weighted_sum(c, [s for h, s in state]))[0, 0], torch.stack(c)


def per_capsule(oracle):
    return lambda r, votes, a, fields: {
        (l, j): oracle(r, j, votes[l, j], a[l]) for l, j in product(*map(range, votes.shape[:2]))}


def parents_of(fields, outputs):
    """child -> every (position, slot of the child there, output channel) that it votes for."""
    parents = {}
    for l, field in enumerate(fields):
        for i, child in enumerate(field):
            parents.setdefault(child, []).extend((l, i, j) for j in range(outputs))
    return parents.values()


def oracle_em(r, votes, a, fields):
    (L, O, I, _), R, density, result = votes.shape, {}, {}, {}
    parents = parents_of(fields, O)
    for t in range(r.iterations):
        for ps in parents:
            for p in ps:
                R[p] = density[p] / sum(density[q] for q in ps) if t else a.new_tensor(1 / len(ps))
        for l, j in product(range(L), range(O)):
            v, weight = votes[l, j], [R[l, i, j] * a[l, i] for i in range(I)]
            mu = weighted_sum(weight, v) / sum(weight)
            variance = weighted_sum(weight, (v - mu) ** 2) / sum(weight) + 1e-5
            cost = sum(r.beta_u[j] + s2.sqrt().log() for s2 in variance) * sum(weight)
            logit = r.inverse_temperature * (1 - 0.95 ** (t + 1)) * (r.beta_a[j] - cost)
            result[l, j] = mu, logit, torch.stack(weight) / sum(weight)
            for i in range(I):
                normal = torch.distributions.Normal(mu, variance.sqrt())
                density[l, i, j] = logit.sigmoid() * normal.log_prob(v[i]).exp().prod()
    return result


def oracle_dynamic(r, votes, a, fields):
    (L, O, I, _), c, result = votes.shape, {}, {}
    parents = parents_of(fields, O)
    b = {p: a.new_tensor(0.0) for ps in parents for p in ps}
    for _ in range(r.iterations):
        for ps in parents:
            c.update({p: b[p].exp() / sum(b[q].exp() for q in ps) for p in ps})
        for l, j in product(range(L), range(O)):
            v = [r.gain * a[l, i] * votes[l, j, i] for i in range(I)]
            s = sum(c[l, i, j] * v[i] for i in range(I))
            n2 = sum(s * s)
            mu = n2 / (1 + n2) * s / n2.sqrt()
            result[l, j] = mu, torch.logit(sum(mu**2).sqrt()), torch.stack(
                [c[l, i, j] for i in range(I)])
            for i in range(I):
                b[l, i, j] = b[l, i, j] + sum(v[i] * mu)
    return result


ORACLES = {"similarity": per_capsule(oracle_similarity), "em": oracle_em, "dynamic": oracle_dynamic,
           "connectionist": per_capsule(oracle_connectionist)}


def oracle_layer(name, layer, pose, logit):
    """ConvCaps on one image (C, *grid, P, P), (C, *grid): vote by vote, position by position."""
    (channels, *grid), frobenius = logit.shape, lambda m: sum(m.flatten() ** 2).sqrt()
    starts = product(*(range(0, n - k + 1, s)
                       for n, k, s in zip(grid, layer.kernel_size, layer.stride)))
    fields = [[(c, *(x + d for x, d in zip(start, offset))) for c in range(channels)
               for offset in product(*map(range, layer.kernel_size))] for start in starts]
    votes = torch.stack([w / frobenius(w) @ (pose[child] / frobenius(pose[child]))
                         for field, j in product(fields, range(layer.weight.shape[1]))
                         for w, child in zip(layer.weight[:, j], field)])
    votes = votes.view(len(fields), -1, len(fields[0]), votes[0].numel())
    a = torch.stack([torch.stack([logit[x].sigmoid() for x in field]) for field in fields])
    return ORACLES[name](layer.routing, votes, a, fields)


# ---------------------------------------------------------------------------------- equations


def test_routing_objective_equals_the_sums_of_equation_2():
    k, z, log_a, lambdas = rand(5, 3), rand(5, 3), rand(5, 3), rand(2)
    c = z.softmax(0)
    expected = sum(c[i] * (-k[i] + lambdas[0] * (c[i] / (1 / 5)).log()
                           + lambdas[1] * (c[i] / log_a[i].exp()).log()) for i in range(5))
    actual = cn.routing_objective(k, c, log_a, *lambdas)
    assert_same([actual], [expected], [k, z, log_a, lambdas])
    one_hot = torch.eye(4).double()[0]  # 0 log 0 = 0
    j = cn.routing_objective(one_hot / 2, one_hot, 0 * one_hot, 3.0, 2.0)
    assert j.item() == pytest.approx(-0.5 + 3 * math.log(4))


@pytest.mark.parametrize("lambdas", [(12.0, 1.0), (0.3, 0.0), (0.0, 0.5), (0.05, 0.2)])
def test_no_point_of_the_simplex_has_a_lower_objective_than_update_compatibility(lambdas):
    k, a = torch.rand(6).double(), torch.rand(6).double()
    c = cn.update_compatibility(k, a.log(), *lambdas)
    z = c.log().requires_grad_()
    slope, = grad(cn.routing_objective(k, z.softmax(0), a.log(), *lambdas), z)
    assert slope.abs().max() < 1e-12  # stationary, and J is convex in c


def test_shares_of_parents_of_apart_fields_and_of_logits_whose_exponentials_overflow():
    logits, apart = rand(4, 3, 2), (torch.arange(8).view(4, 2), 8)
    assert_same([cn.log_softmax_over_parents(logits, None)],
                [cn.log_softmax_over_parents(logits, apart)], [logits])
    logits, fields = rand(4, 3, 3), (torch.tensor([[0, 1, 2, 5], [1, 2, 3, 5], [2, 3, 4, 5]]).T, 6)
    for shift in (-1e4, 1e4):
        torch.testing.assert_close(cn.log_softmax_over_parents(logits + shift, fields),
                                   cn.log_softmax_over_parents(logits, fields))


# ------------------------------------------------------------------ layers against the oracles

CASES = {  # grid, kernel, stride
    "overlap": ((5,), 3, 1),
    "unused_children": ((6,), 1, 2),
    "plane": ((4, 3), (2, 3), (2, 1)),
    "volume": ((4, 3, 2), (2, 3, 1), (2, 1, 1)),
}


@pytest.mark.parametrize("case", CASES)
@every_routing
def test_layer_equals_the_loop_oracle_on_each_of_two_images(name, case):
    grid, kernel, stride = CASES[case]
    layer = small_layer(name, kernel, stride, len(grid))
    layer.routing.iterations = 3
    pose, logit = rand(2, 2, *grid, 2, 2), rand(2, 2, *grid)
    with torch.no_grad():
        pose *= 0.01  # only directions count
        layer.weight *= 0.01
    mu, out, c = layer(pose, logit)
    for b in range(2):
        result = oracle_layer(name, layer, pose[b], logit[b])
        assert len(result) == out[b].numel()
        actual = [mu[b].flatten(1, -3).flatten(-2), out[b].flatten(1), c[b].flatten(1, -2)]
        expected = [torch.stack([result[l, j][x] for j, l in
                                 product(*map(range, actual[1].shape))]).view_as(actual[x])
                    for x in range(3)]  # (O, L, .)
        slopes = assert_same(actual, expected, [pose, logit, *layer.parameters()])
        assert all(g.any() for g in slopes[2:])  # nothing hides behind a zero


@pytest.mark.parametrize("name", ["similarity", "dynamic"])
def test_turning_every_pose_turns_the_outputs_and_leaves_shares_and_activations(name):
    layer, turn = small_layer(name), torch.linalg.qr(rand(2, 2))[0]
    pose, logit = rand(2, 2, 5, 2, 2), rand(2, 2, 5)
    mu, a, c = layer(pose, logit)
    torch.testing.assert_close(layer(pose @ turn, logit), (mu @ turn, a, c))


# ---------------------------------------------------------------------------------- gradients


@every_routing
def test_gradients_of_a_layer_are_exact(name):
    layer = small_layer(name)
    inputs = rand(1, 2, 4, 2, 2), rand(1, 2, 4), *layer.parameters()
    assert gradcheck(lambda pose, logit, *_: layer(pose, logit), inputs)


EXTREMES = {
    "zero_poses": lambda layer, pose, logit: pose.zero_(),
    "zero_weight": lambda layer, pose, logit: layer.weight.zero_(),
    "identical_votes": lambda layer, pose, logit: (pose.fill_(1), layer.weight.fill_(1)),
    "absent": lambda layer, pose, logit: logit.fill_(-math.inf),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("extreme", EXTREMES)
@every_routing
def test_extreme_inputs_give_finite_values_and_gradients(name, extreme, autocast):
    layer = small_layer(name).float()
    pose, logit = torch.randn(2, 2, 5, 2, 2), torch.randn(2, 2, 5)
    with torch.no_grad():
        EXTREMES[extreme](layer, pose, logit)
    inputs = [pose.requires_grad_(), logit.requires_grad_(), *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = layer(pose, logit)
    slopes = gradients(outputs, [torch.randn_like(x) for x in outputs], inputs)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in (*outputs, *slopes))


# -------------------------------------------------------------------------------- the network


def test_parameter_groups_give_lambdas_thetas_and_betas_five_times_the_rate():
    net = CapsNet((1, 17, 17), 2)
    slow, fast = net.parameter_groups(1e-3)
    assert fast["lr"] == 5 * slow["lr"] == 5e-3
    assert {*fast["params"]} == {p for name, p in net.named_parameters()
                                 if name.endswith(("log_lambda", "theta"))}
    assert len(slow["params"]) + len(fast["params"]) == len([*net.parameters()])
    for routing, count in ("em", 3 * 2), ("connectionist", 0):
        assert len(CapsNet((1, 17, 17), 2, routing).parameter_groups(1)[1]["params"]) == count


@torch.no_grad()
def test_initial_values():
    theta1 = CapsNet((1, 17, 17), 2).class_caps.routing.theta[0]
    routing = cn.SimilarityRouting(16, num_kernels=3)
    for parameter, expected in (
            (routing.log_lambda[:, 0].exp(), [0.2, 0.2]), (routing.theta[:, 1], [20.0, 0.0, 1.0]),
            (routing.log_width.exp(), [0.1, 0.1**0.5, 1.0]), (theta1, [60.0, 60.0]),
            (routing.kernel_logit, [0.0] * 3),
            (torch.cat([*cn.EMRouting(2).parameters()]), [0.0] * 4),
            (cn.ConnectionistRouting(1, psi=(3,)).psi[0].bias, [0.0] * 3)):
        torch.testing.assert_close(parameter, torch.tensor(expected))
    assert cn.SimilarityRouting(1, lambda2=0.0).log_lambda[1].isinf()
    assert (ARGS.epochs, ARGS.crops, ARGS.seed) == (2, 1, 0)  # train.py's
    connectionist = cn.ConnectionistRouting(1, psi=(500,))
    mu_and_v, a_and_c = connectionist.cell.weight_ih.split([32, 2], 1)
    assert 0.9 < mu_and_v.abs().max() <= 1 and a_and_c.abs().max() <= 0.25
    assert connectionist.psi[0].weight.std() == pytest.approx((2 / 16) ** 0.5, rel=0.05)
    noise = ConvCaps(8, 16, 3, routing).weight - torch.eye(4)
    assert noise.abs().max() < 0.1001 and noise.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("name, expected", [
    ("similarity", (35.81866, 10.89095, 46.06797, 40.98079, 37.10566)),
    ("mean-vote", (53.59927, 19.02759, 52.23564, 41.97489, 32.18621)),
    ("connectionist", (27.70717, -15.46882, 24.01856, 33.88592, 10.33452)),
    ("em", (15.66585, 2.76890, 29.72249, 22.76079, 25.57180)),
    ("dynamic", (7.53902, 7.70633, 11.94036, 11.18928, 9.08665))])
@torch.no_grad()
def test_the_results_weights_still_mean_what_they_meant(name, expected):
    """All that is in no state_dict, such as iterations, and how the layers are put together."""
    routing, options = ("similarity", {"iterations": 0}) if name == "mean-vote" else (name, {})
    net = CapsNet((1, 32, 32), 5, routing, **options).eval()
    path = HERE / "results" / f"smallnorb-{name}" / "weights.pt"
    args, checkpoint = train.parse(["--eval", str(path)])
    assert (args.lr, args.batch_size) == (train.LR[routing], ARGS.batch_size)
    net.load_state_dict(checkpoint["model"])
    logits = net(torch.linspace(0, 40, 1024).sin().view(1, 1, 32, 32))[1]
    torch.testing.assert_close(logits, torch.tensor([expected]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(2, 40), (1, 17, 18, 17)])
@torch.no_grad()
def test_image_shapes(shape):
    net = CapsNet(shape, 5, channels=(8, 2, 4, 4)).eval()
    poses, logits = net(torch.randn(1, *shape))
    assert poses.shape == (1, 5, 4, 4) and logits.shape == (1, 5)
    assert poses.isfinite().all() and logits.isfinite().all()


@every_routing
def test_batch_of_one_or_none_equals_the_same_images_in_a_batch(name):
    net, images = tiny_net(name).double(), rand(3, 1, 17, 19)
    poses, logits = net(images)
    torch.testing.assert_close(net(images[1:2]), (poses[1:2], logits[1:2]))
    torch.testing.assert_close(net(images[:0]), (poses[:0], logits[:0]))
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(images), (poses, logits))
    assert logits.dtype == torch.float64 and logits.std(0).min() > 1e-6


def call_a_routing_that_loses_an_axis():
    layer = small_layer("similarity")
    layer.routing.activation = lambda mu, *_: mu.sum((0, 1))
    layer(rand(1, 2, 5, 2, 2), rand(1, 2, 5))


@pytest.mark.parametrize("call", [
    lambda: CapsNet((1, 16, 32), 5),  # too small
    lambda: tiny_net("em")(torch.zeros(2, 1, 17, 18)),  # made for another width
    lambda: ConvCaps(8, 16, 3, cn.EMRouting(1)),  # other out_channels
    lambda: small_layer("em")(rand(2, 2, 3, 2, 2), rand(1, 2, 3)),  # other numbers of images
    lambda: small_layer("similarity", 1)(rand(1, 1, 5, 2, 2), rand(1, 1, 5)),  # of channels
    lambda: small_layer("em")(rand(1, 2, 2, 2, 2), rand(1, 2, 2)),  # kernel over grid
    *(lambda make=make: make(2)(rand(2, 2, 4, 3), rand(2, 3)) for make in MAKE.values()),  # log_a
    lambda: data.hold_out(data.Dataset(*torch.zeros(3, 2)), 1),  # no such instance
    call_a_routing_that_loses_an_axis])
def test_what_would_be_wrong_in_silence_is_refused(call):
    with pytest.raises(AssertionError):
        call()


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@every_routing
def test_a_layer_compiled_for_several_threads_as_in_train_equals_the_plain_one(name):
    """Wrong code may also write outside its memory, and abort."""
    plain = CapsNet((1, 32, 32), 5, name).caps2
    fast = copy.deepcopy(plain)
    fast.__class__ = train.OneByOne
    fast.compile(dynamic=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    inputs = [torch.randn(2, 16, 6, 6, 4, 4, requires_grad=True),
              torch.randn(2, 16, 6, 6, requires_grad=True)]
    expected, actual = plain(*inputs), fast(*inputs)
    directions = [torch.randn_like(x) for x in expected]
    slopes, others = (gradients(outputs, directions, [*inputs, *layer.parameters()], keep=False)
                      for layer, outputs in ((plain, expected), (fast, actual)))
    torch.set_num_threads(threads)
    torch.testing.assert_close(actual, list(expected), rtol=1e-3, atol=1e-4)
    largest = max(x.abs().max() for x in slopes)  # the last bias of phi has 0, up to rounding
    for a, b in zip(others, slopes, strict=True):
        assert (a - b).abs().max() < 1e-3 * b.abs().max() + 1e-5 * largest, a.shape


def use_backend(monkeypatch, backend):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile(
        module, backend=backend, **options))


def test_any_number_of_networks_is_compiled_and_keeps_its_weights(monkeypatch):
    graphs, images = [], torch.randn(2, 1, 17, 19)
    use_backend(monkeypatch, lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(3):
        net = tiny_net("dynamic").train()
        fast = train.speed_up(net, images, ARGS)
    assert len(graphs) == 3 * 2 * 2  # two layers, with and without gradients
    weights = zip(net.state_dict().values(), fast.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in weights)
    elsewhere = tiny_net("em").to("meta")  # neither CPU nor CUDA
    assert train.speed_up(elsewhere, images.to("meta"), ARGS) is elsewhere
    assert type(elsewhere.caps1) is ConvCaps  # whole batches
    elsewhere(images.to("meta"))  # no tensor is made on the CPU
    data.augment(torch.zeros(2, 1, 40, 40, device="meta"), data.SPECS["toys"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_routing
def test_compiled_on_a_gpu_a_network_trains_as_the_plain_one(name):
    images, labels = torch.randn(40, 1, 32, 32).cuda(), (torch.arange(40) % 5).cuda()
    net, (args, _) = CapsNet((1, 32, 32), 5, name).cuda(), train.parse(["--device", "cuda"])
    fast = train.speed_up(net, images, args)
    for _ in range(3):
        losses = []
        for x in net, fast:
            x.zero_grad()
            losses.append(F.cross_entropy(x(images)[1], labels))
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)  # TF32 has ten bits
        scale = max(p.grad.abs().max() for p in net.parameters())
        for p, q in zip(net.parameters(), fast.parameters()):
            assert (p.grad - q.grad).abs().max() < 0.05 * scale
        train.evaluate(fast, data.Dataset(images.byte(), labels, None), args)


def test_readme_programs_run_and_all_but_the_first_need_only_capsnet_and_torch(tmp_path):
    shutil.copy(cn.__file__, tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    check = "assert (logits.argmax(1) != labels[test]).float().mean() < 0.1"
    alone = "import sys; sys.modules['numpy'] = None"
    for folder, text, says in (
            (HERE, blocks[0], "[0, 0, 1, 1, 2, 3, 3, 4]) tensor([0, 0, 1, 1, 2, 3, 3, 4])"),
            (tmp_path, "\n".join([alone, blocks[1], check, *blocks[2:]]),
             "0.351 0.316 0.331 0.002\n1.023 0.001\n")):
        run = subprocess.run([sys.executable, "-E", "-c", text], cwd=folder, check=True, text=True,
                             stdout=subprocess.PIPE)
        assert says in run.stdout


def test_speeds_starts(tmp_path):
    subprocess.run([sys.executable, HERE / "results" / "speeds.py", *"--epochs 0 --routing em "
                    "--no-compile --batch-size 2".split()], cwd=tmp_path, check=True)


# --------------------------------------------------------------------------------- data.py


def norb_files(count=30):
    """{name: bytes} of a small smallNORB in the official layout."""
    files, rng = {}, np.random.default_rng(0)
    for stem, instances in ((data._TRAIN, (4, 6, 7, 8, 9)), (data._TEST, (0, 1, 2, 3, 5))):
        index = np.arange(count)
        info = np.stack([np.take(instances, index % 5), index % 9, index % 18 * 2, index % 6], 1)
        files |= {stem + "dat.mat": bytes(24) + rng.bytes(count * 2 * 96 * 96),
                  stem + "cat.mat": bytes(20) + (index // 5 % 5).astype("<i4").tobytes(),
                  stem + "info.mat": bytes(20) + info.astype("<i4").tobytes()}
    return files


def mnist_files(count=24):
    """Each digit one image of noise."""
    order = np.arange(count) % 10
    images = np.random.default_rng(1).integers(256, size=(10, 28, 28), dtype=np.uint8)
    return {f"{stem}-{file}": content for stem, digits in (("train", order), ("t10k", order[::-1]))
            for file, content in (
                ("images-idx3-ubyte", bytes(16) + images[digits].tobytes()),
                ("labels-idx1-ubyte", bytes(8) + digits.astype("u1").tobytes()))}


FILES = {"smallnorb": norb_files(), "mnist": mnist_files()}
PACKED = {name: {file + ".gz": gzip.compress(content, 1) for file, content in files.items()}
          for name, files in FILES.items()}
for name, count in (("smallnorb", 30), ("mnist", 24)):  # let these small ones be the published ones
    data.FILES[name] = tuple(
        (file, header, dtype, (count, *shape[1:]),
         hashlib.sha256(PACKED[name][file + ".gz"]).hexdigest())
        for file, header, dtype, shape, _ in data.FILES[name])


def place(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


def refusal_of(call):
    """The one line that it refuses with."""
    with pytest.raises(data.DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_official_files(tmp_path):
    """Raw, packed, or unpacked by a browser that leaves the name."""
    for name, files in FILES.items():
        for n, (file, content) in enumerate(files.items()):
            place(tmp_path / name, [{file: content}, {file + ".gz": gzip.compress(content)},
                                    {file + ".gz": content}][n % 3])
    toys = ("animal", "human", "airplane", "truck", "car"), 32, 0.2
    assert [*data.SPECS.values()] == [toys, (tuple("0123456789"), 28, 0), toys]
    train, test = data.load("smallnorb", tmp_path, cameras=2)
    pixels = np.frombuffer(FILES["smallnorb"][data._TEST + "dat.mat"], np.uint8, offset=24)
    blocks = pixels.reshape(30, 2, 48, 2, 48, 2).astype(int)
    assert (test.images.numpy() == (blocks.sum((3, 5)) + 2) // 4).all()
    assert test.labels.tolist() == [index // 5 % 5 for index in range(30)]
    assert train.instances[:6].tolist() == [4, 6, 7, 8, 9, 4] and test.instances[4] == 5
    assert torch.equal(data.load("smallnorb", tmp_path)[0].images, train.images[:, :1])

    train, test = data.load("mnist", tmp_path)
    assert train.images.shape == (24, 1, 32, 32) and train.labels.tolist()[9:12] == [9, 0, 1]
    inner = data.crops(test.images, 28)[0]
    assert inner.numpy().tobytes() == FILES["mnist"]["t10k-images-idx3-ubyte"][16:]
    assert test.images.sum() == inner.sum()
    assert train.instances.bincount().tolist() == [2] * 12
    for name, cameras in (("mnist", 2), ("smallnorb", 3)):
        with pytest.raises(AssertionError, match=f"{name}: not {cameras} cameras"):
            data.load(name, tmp_path, cameras)


@pytest.mark.parametrize("part, damage", [
    ("dat.mat", lambda content: content[:-5]),
    ("info.mat", lambda content: content + bytes(4)),
    ("dat.mat.gz", lambda content: content[:-3000]),
    ("dat.mat.gz", lambda content: content[:10] + b"\xff" * 40)])
def test_damaged_files_are_named(tmp_path, part, damage):
    path = tmp_path / "smallnorb" / (data._TEST + part)
    place(path.parent, (PACKED if path.suffix == ".gz" else FILES)["smallnorb"])
    path.write_bytes(damaged := damage(path.read_bytes()))
    assert path.name in refusal_of(lambda: data.load("smallnorb", tmp_path))
    assert path.read_bytes() == damaged  # left as the user put it
    assert not (path.parent / "cache-1.pt").exists()


def test_download_and_a_failed_one_which_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    site = tmp_path / "site"
    place(site, PACKED["mnist"])
    monkeypatch.setitem(data.MIRROR, "mnist", f"file://{site}/")
    place(tmp_path / "placed" / "mnist", FILES["mnist"])
    assert same(data.load("mnist", tmp_path / "got"), data.load("mnist", tmp_path / "placed"))
    assert {*os.listdir(tmp_path / "got" / "mnist")} == {*os.listdir(site), "cache-1.pt"}

    path = site / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    text = refusal_of(lambda: data.load("mnist", tmp_path))
    assert "invalid hash" in text and f"{site}/{path.name}" in text
    assert all(file in text for file in FILES["mnist"])  # what to put there, not one after another
    assert all(left.startswith("train") for left in os.listdir(tmp_path / "mnist"))


def saved(content):
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("content", [b"", saved({"train": []}), saved(Harmful())])
def test_a_bad_cache_is_named_and_runs_nothing_and_a_good_one_serves_alone(
        tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "smallnorb" / "cache-1.pt"
    place(cache.parent, {"cache-1.pt": content})
    assert f"{cache}: not a usable cache" in refusal_of(lambda: data.load("smallnorb", tmp_path))
    assert not Path("harmed").exists()
    cache.unlink()
    place(cache.parent, FILES["smallnorb"])
    splits = data.load("smallnorb", tmp_path)
    for name in FILES["smallnorb"]:
        (cache.parent / name).unlink()
    assert same(data.load("smallnorb", tmp_path), splits)


def test_toys(tmp_path, monkeypatch):
    monkeypatch.setattr(data.render_toys, "__defaults__", (2,))  # views
    train, test = data.load("toys", tmp_path)
    assert train.images.shape == (100, 1, 40, 40)
    assert train.labels.tolist() == [i // 20 for i in range(100)]
    assert [{*split.instances.tolist()} for split in (train, test)] == [
        {*range(10)}, {*range(10, 20)}]
    upper_left = [s.images[:, 0, :20, :20].double().mean().item() for s in (train, test)]
    assert upper_left == pytest.approx([175.91, 174.01], abs=0.1)


def test_standardise():
    images = torch.randint(256, (4, 2, 48, 48), dtype=torch.uint8)
    images[1], images[2], images[3] = 255, 7, 200
    images[3, 0, 0, 0] = 201  # the least variance that an image can have
    out = data.standardise(images)
    assert out.dtype == torch.float32 and (out[1:3] == 0).all()
    for image, x in zip(out[::3], images[::3].float()):  # of both channels together
        torch.testing.assert_close(image, (x - x.mean()) / x.std(unbiased=False), rtol=0, atol=1e-3)


def test_augment():
    image = torch.arange(128.0).view(2, 8, 8)

    def run(jitter, seed=0):
        spec = data.SPECS["mnist"]._replace(crop=6, jitter=jitter)
        torch.manual_seed(seed)
        return data.augment(image.repeat(500, 1, 1, 1), spec)

    plain, out = run(0), run(.5)
    assert not torch.equal(out, run(.5, seed=1))
    corners = [divmod(int(window[0, 0, 0]), 8) for window in plain]
    assert {*corners} == {*product(range(3), repeat=2)}
    for window, (top, left) in zip(plain, corners):
        assert torch.equal(window, image[:, top:top + 6, left:left + 6])
    gain = out.flatten(1).std(1) / plain.flatten(1).std(1)  # contrast, then brightness
    shift = (out - gain.view(-1, 1, 1, 1) * plain).flatten(1)
    assert (shift - shift[:, :1]).abs().max() < 1e-3  # one an image
    for drawn in gain - 1, shift:
        assert -.501 < drawn.min() < -.48 and .48 < drawn.max() < .501
    assert abs(torch.corrcoef(torch.stack([gain, shift[:, 0]]))[0, 1]) < 0.2


def test_crops():
    image = torch.arange(80).view(1, 1, 8, 10)
    assert torch.equal(*data.crops(image, 4), image[:, :, 2:6, 3:7])
    assert [divmod(int(c[0, 0, 0, 0]), 10) for c in data.crops(image, 2, 3)] == [
        (top, left) for top in (1, 3, 5) for left in (1, 4, 6)]


# ------------------------------------------------------------------------------ train.py


@pytest.fixture
def small_mnist(tmp_path):
    place(tmp_path / "data" / "mnist", FILES["mnist"])
    return ["--data-dir", str(tmp_path / "data"), "--device", "cpu", "--no-compile", "--dataset",
            "mnist", "--batch-size", "4", "--iterations", "0"]


def metrics(folder):
    rows = [*csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    assert rows == sorted(rows, key=lambda row: float(row["seconds"]))  # also after a resumption
    return [{**row, "seconds": 0} for row in rows]


def same_runs(one, other):
    a, b = (torch.load(path / "weights.pt", weights_only=True)["model"] for path in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a) and metrics(one) == metrics(other)


@pytest.mark.parametrize("program, net", [
    ("train.py", "CapsNet"), ("results/plain_cnn.py", "PlainCNN")])
def test_stopped_the_command_ends_in_one_line(small_mnist, tmp_path, program, net):
    data.load("mnist", small_mnist[1])  # a child, which has the official sizes, needs the cache
    run = subprocess.Popen([sys.executable, HERE / program, *small_mnist[:-2], "--epochs=99"],
                           cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert next(text for text in run.stdout if " on mnist" in text).startswith(net)
    assert any(text.startswith("epoch 2/99") for text in run.stdout)
    run.terminate()
    error = run.communicate(timeout=60)[1]
    assert error.endswith("\ntrain.py: interrupted\n") and "Traceback" not in error
    assert run.returncode == 1


def test_a_run_learns_and_stopped_resumed_and_prolonged_it_takes_the_same_steps(
        small_mnist, tmp_path, monkeypatch, capsys):
    """And the commands that it prints can be pasted in any folder, whatever the paths."""
    rates, step = [], torch.optim.Adam.step
    build = lambda *args, **options: CapsNet(*args, channels=(16, 4, 8, 8), **options)
    run = lambda *argv: train.main(argv, build)

    def stop_at_10_of_the_second(self, *args):
        slow, fast = self.param_groups
        rates.append(slow["lr"])
        assert fast["lr"] == pytest.approx(5 * slow["lr"])
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        assert sum(g.square().sum() for g in grads) == pytest.approx(1, abs=1e-3)
        if len(rates) == 24 + 10:
            raise KeyboardInterrupt
        return step(self, *args)

    def pasted(text):
        return shlex.split(re.search(f"{text}: (.*)", capsys.readouterr().out)[1])[2:]

    monkeypatch.setattr(torch.optim.Adam, "step", stop_at_10_of_the_second)
    monkeypatch.setattr(train, "SHOW_SECONDS", 0)  # so it saves after every step
    command = ["--data-dir", os.path.relpath(small_mnist[1]), *small_mnist[2:-2], "--epochs=4",
               "--seed=1", "--lr=0.01", "--option", "num_kernels=3", "--option=lambda1=0.3"]
    whole, cut = tmp_path / "whole", tmp_path / "the 'cut' one"
    run(*command, "--out", str(whole))
    assert json.loads((whole / "result.json").read_text())["test_error"] < 50  # guessing: 90
    with pytest.raises(FileExistsError):  # that folder holds a run
        run(*command, "--out", str(whole))
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        run(*command, "--out", os.path.relpath(cut))
    resume = pasted("if it is stopped")
    monkeypatch.chdir(tmp_path)
    run(*resume)
    assert same_runs(whole, cut)
    run(*resume, "--epochs", "5")
    run(*resume)  # which then has no step left, only the test set
    assert [(row["epoch"], row["step"]) for row in metrics(cut)] == [
        ("1", "6"), ("2", "12"), ("3", "18"), ("4", "24"), ("5", "30")]
    for row in metrics(whole)[-1], metrics(cut)[-1]:
        assert float(row["loss"]) < 1.5 < float(row["training_error"]) < 50
    rate = lambda i, steps: min(1, (i + 1) / 10) * 0.01 * (1 - i / steps)
    four = [rate(i, 24) for i in range(24)]
    assert rates == pytest.approx(
        four + four[:10] + four[9:] + [rate(i, 30) for i in range(24, 30)])

    run(*pasted("to score again"))
    scored = json.loads((cut / "result.json").read_text())
    assert f"test error {scored['test_error']:.2f} %" in capsys.readouterr().out
    assert len(torch.load(cut / "weights.pt")["model"]["class_caps.routing.kernel_logit"]) == 3
    for options, words in ("--epochs 4", "already 5 epochs"), ("--validate 1", "cannot change"):
        with pytest.raises(AssertionError, match=f"checkpoint.pt.*{words}"):
            run(*resume, *options.split())
    copied = str(shutil.copy(cut / "checkpoint.pt", cut / "copy.pt"))
    assert "expected checkpoint.pt" in refusal_of(lambda: train.parse(["--resume", copied]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_weights_of_a_run_on_a_gpu_open_without_one(small_mnist, tmp_path):
    train.main([*small_mnist, "--device=cuda", "--epochs=1", "--out", str(tmp_path / "run")])
    weights = torch.load(tmp_path / "run" / "weights.pt")["model"].values()
    assert {x.device.type for x in weights} == {"cpu"}


def test_files_that_are_no_weights_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"dataset": "mnist"}
    whole = saved({"settings": settings, "model": torch.zeros(5000)})
    harmful = saved({"settings": settings, "model": Harmful()})
    for content in harmful, whole[:-3000], b"", saved({"state_dict": {}}), saved([settings]):
        Path("checkpoint.pt").write_bytes(content)  # --resume reads nothing of another name
        for option, file in product(("--eval", "--resume"), ("checkpoint.pt", "absent.pt")):
            assert f"{file}: expected" in refusal_of(lambda: train.parse([option, file]))
    assert not Path("harmed").exists()


def test_numbers_that_are_not_finite_stop_the_run(small_mnist, tmp_path, monkeypatch):
    """At step 8, in the second epoch: the checkpoint of the first stays."""
    losses, plain = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args: losses.append(plain(*args)) or
                        losses[-1] * (math.inf if len(losses) == 8 else 1))
    with pytest.raises(RuntimeError, match="non-finite"):
        train.main([*small_mnist, "--epochs", "3", "--out", str(tmp_path / "run")])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 6
    assert float(metrics(tmp_path / "run")[0]["loss"]) == pytest.approx(sum(losses[:6]).item() / 6)


def test_validation_never_touches_the_test_set(small_mnist, tmp_path, capsys, monkeypatch):
    scored, steps, evaluate = [], [], train.evaluate

    def spy(net, split, args):
        assert net.training and net.caps1.routing.iterations == 0 and args.lr == 0.01
        scored.append(split.labels.tolist())
        steps.append(torch.load(out / "checkpoint.pt")["step"])
        return evaluate(net, split, args)

    monkeypatch.setattr(train, "evaluate", spy)
    monkeypatch.setattr(train, "SHOW_SECONDS", 0)
    out = tmp_path / "run"
    train.main([*small_mnist, "--validate", "0", "--epochs", "2", "--crops", "2",
                "--lr", "0.01", "--out", str(out)])
    train.main(["--eval", str(out / "weights.pt"), *small_mnist[:5], "--crops", "1"])
    assert scored == 4 * [[0, 1]]  # the first two; after each epoch, at the end, and again
    assert steps == [4, 9, 10, 10]  # an epoch not yet scored is not yet saved as ended
    assert "test error" not in capsys.readouterr().out
    result, last = json.loads((out / "result.json").read_text()), metrics(out)[-1]
    assert last["step"] == "10"  # two of the 22 images are left out
    assert last["validation_error"] == str(result["validation_error"])
    assert vars(ARGS).keys() - result["settings"] == {
        "device", "compile", "data_dir", "out", "resume", "eval"}
    assert result["settings"]["crops"] == 2 and sum(map(sum, result["confusion"])) == 2


def test_evaluate_counts_every_image_once_and_averages_probabilities_over_crops():
    """One bright crop of nine is outvoted, though its logit is larger than the others together."""
    labels = torch.arange(300) % 3
    images = torch.zeros(300, 1, 32, 32, dtype=torch.uint8)
    images[labels == 1, 0, 2, 2] = 255  # the corner of the central crop: class 1, the rest class 0
    images[labels == 2, 0, :4, :4] = 255  # of nearly all crops

    class FirstPixel(torch.nn.Module):
        def forward(self, images):
            assert not self.training and abs(images.mean()) > 1e-3  # standardised before the crop
            pixels = images[:, 0, :1, 0]
            return None, F.pad(torch.cat([torch.ones_like(pixels), pixels], 1), (0, 8), value=-99)

    for crops, expected in ("1", [[100, 0], [0, 100], [0, 100]]), (
            "3", [[100, 0], [100, 0], [0, 100]]):
        args, _ = train.parse(["--dataset", "mnist", "--device", "cpu", "--crops", crops])
        error, confusion = train.evaluate(FirstPixel(), data.Dataset(images, labels, None), args)
        assert confusion[:3, :2].tolist() == expected and confusion.sum() == 300
    assert error == pytest.approx(200 / 3)


def test_seeds_differ_in_weights_order_and_augmentation(small_mnist, tmp_path, monkeypatch):
    """And a batch larger than the data is the data."""
    orders, drawn, weights, augment = [], [], [], data.augment

    def spy(images, spec):
        assert abs(images.mean()) < 1e-5  # standardised before they are cropped and varied
        orders.append(tuple(images[:, 0, 9, 9].tolist()))
        drawn.append(torch.rand(1).item())
        return augment(images, spec)

    def build(*args, **options):
        assert args[2:] == ("em",) and options == {"iterations": 1}
        net = CapsNet(*args, **options)
        weights.append(net.conv[0].bias.sum().item())
        return net

    monkeypatch.setattr(data, "augment", spy)
    for seed in "0", "1":
        train.main([*small_mnist, "--batch-size", "99999", "--epochs", "2", "--seed", seed,
                    "--routing", "em", "--iterations", "1", "--out", str(tmp_path / seed)], build)
    assert len({*drawn}) == len({*orders}) == 4 and len({*map(frozenset, orders)}) == 1
    assert len({*weights}) == 2


def test_a_failed_save_leaves_the_file_before_it(tmp_path, monkeypatch):
    data.save(tmp_path / "checkpoint.pt", "whole")
    full_disk = lambda file: os.fstat(file).st_size and os.read(-1, 0)  # if written: an OSError
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        data.save(tmp_path / "checkpoint.pt", "not so")
    assert torch.load(tmp_path / "checkpoint.pt") == "whole"
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_compiled_training_goes_on_as_it_does_where_compiling_fails(
        small_mnist, tmp_path, monkeypatch, capsys):
    def killed(graph, inputs):  # as a C++ compiler without memory: at the first use
        raise RuntimeError("signal 9\nand much more")

    place(tmp_path / "data" / "smallnorb", FILES["smallnorb"])
    for name, backend in ("plain", killed), ("compiled", lambda graph, inputs: graph.forward):
        with monkeypatch.context() as patch:
            use_backend(patch, backend)
            train.main([*small_mnist, "--compile", "--epochs=1", "--out", str(tmp_path / name),
                        "--dataset=smallnorb", "--cameras=2"])
    assert same_runs(tmp_path / "plain", tmp_path / "compiled")
    output = capsys.readouterr().out
    assert len(re.findall("^running uncompiled, which is slower: .+", output, re.M)) == 1
    assert "much more" not in output and "test error" in output
