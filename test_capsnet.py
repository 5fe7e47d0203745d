"""What must stay true: capsnet.py against loops from the equations, data.py against files made
here in the official formats, whole and damaged, train.py as a user runs it.

An oracle takes one image: votes v (L, O, I, D), activations a (L, I), and `fields`, the I input
capsules that each of the L output positions sees. It returns (pose, logit, compatibility) for each
position l and output j. Comparisons are in float64, of values and of all gradients.
"""

import csv
import functools
import gzip
import hashlib
import http.server
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import grad, gradcheck

import capsnet as cn
import data
import train
from capsnet import CapsNet, ConvCaps

MAKE = {
    "similarity": lambda o: cn.SimilarityRouting(o, num_kernels=2),
    "mean_shift": lambda o: cn.SimilarityRouting(o, num_kernels=2, mean_shift=True),
    "connectionist": lambda o: cn.ConnectionistRouting(o, 2, hidden_size=3, phi=(4,), psi=(6, 5)),
    "em": cn.EMRouting,
    "dynamic": cn.DynamicRouting,
}
every_routing = pytest.mark.parametrize("name", MAKE)
every_network = pytest.mark.parametrize("name", cn.ROUTINGS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def small_routing(name, outputs=2):
    """In float64, every parameter random, so that none hides behind its initial value."""
    routing = MAKE[name](outputs).double()
    for p in routing.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return routing


def small_layer(name, kernel=3, stride=1, dims=1, channels=2, outputs=2):
    return ConvCaps(channels, outputs, kernel, small_routing(name, outputs), stride, 2, dims).double()


def tiny_net(name):
    return CapsNet((1, 17, 19), 3, name, channels=(4, 2, 3, 2), pose_size=2).eval()


def gradients(outputs, directions, inputs):
    projection = sum((x * d).sum() for x, d in zip(outputs, directions))
    return grad(projection, inputs, allow_unused=True, materialize_grads=True, retain_graph=True)


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
    g = lambda mu, i: sum(w_q * gauss(mu, i, s) / (2 * s**2)
                          for w_q, s in zip(w, r.log_width.exp()))
    c = [v.new_tensor(1 / n)] * n
    mu = weighted_sum(c, v)
    for _ in range(r.iterations):
        lambda1, lambda2 = r.log_lambda[:, j].exp()
        e = [a[i] ** (lambda2 / (lambda1 + lambda2)) * (k(mu, i) / (lambda1 + lambda2)).exp()
             for i in range(n)]
        c = [x / sum(e) for x in e]
        step = [c[i] * g(mu, i) for i in range(n)] if r.mean_shift else c
        mu = weighted_sum(step, v) / sum(step)
    agreement = weighted_sum(c, [k(mu, i) for i in range(n)])
    logit = theta1 * agreement + theta2 + theta3.abs() * weighted_sum(c, a.log())
    return mu, logit, torch.stack(c)


def oracle_connectionist(r, j, v, a):
    """Algorithm 2: the LSTM cell sees the concatenated [mu, v, a, c] of one vote at a time."""
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
            logit = 0.01 * (1 - 0.95 ** (t + 1)) * (r.beta_a[j] - cost)
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
            s = sum(c[l, i, j] * r.gain * votes[l, j, i] for i in range(I))
            n2 = sum(s * s)
            mu = n2 / (1 + n2) * s / n2.sqrt()
            result[l, j] = mu, torch.logit(sum(mu**2).sqrt()), torch.stack(
                [c[l, i, j] for i in range(I)])
            for i in range(I):
                b[l, i, j] = b[l, i, j] + sum(r.gain * votes[l, j, i] * mu)
    return result


ORACLES = {
    "similarity": per_capsule(oracle_similarity), "mean_shift": per_capsule(oracle_similarity),
    "connectionist": per_capsule(oracle_connectionist), "em": oracle_em, "dynamic": oracle_dynamic}


def oracle_layer(name, layer, pose, logit):
    """ConvCaps on one image (C, *grid, P, P), (C, *grid): vote by vote, position by position."""
    (channels, *grid), frobenius = logit.shape, lambda m: sum(m.flatten() ** 2).sqrt()
    starts = product(*(range(0, n - k + 1, s)
                       for n, k, s in zip(grid, layer.kernel_size, layer.stride)))
    fields = [[(c, *(x + d for x, d in zip(start, offset))) for c in range(channels)
               for offset in product(*map(range, layer.kernel_size))] for start in starts]
    votes = []
    for field, j in product(fields, range(layer.weight.shape[1])):
        for w, (channel, *cell) in zip(layer.weight[:, j], field):
            m = pose[channel][tuple(cell)]
            entries = list((m / frobenius(m)).flatten())
            if name == "dynamic":
                entries = [x * logit[channel][tuple(cell)].sigmoid() for x in entries]
            else:
                for axis, (x, n) in enumerate(zip(cell, grid)):
                    entries[axis] = entries[axis] + (x + 0.5) / n
            votes.append(w / frobenius(w) @ torch.stack(entries).view_as(w))
    votes = torch.stack(votes).view(len(fields), -1, len(fields[0]), w.numel())
    a = torch.stack([torch.stack([logit[x].sigmoid() for x in field]) for field in fields])
    return ORACLES[name](layer.routing, votes, a, fields)


# ---------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_votes_equal_a_loop_over_every_entry(lead):
    pose, weight, expected = rand(*lead, 3, 2, 2), rand(3, 2, 2, 2), []
    for m in pose.reshape(-1, 3, 2, 2):
        for j, i, row, column in product(range(2), range(3), range(2), range(2)):
            norm = sum(x**2 for x in weight[i, j].flatten()).sqrt()
            expected.append(sum(weight[i, j, row, q] / norm * m[i, q, column] for q in range(2)))
    expected = torch.stack(expected).view(*lead, 2, 3, 4)
    assert_same([cn.compute_votes(pose, weight)], [expected], [pose, weight])


def test_votes_ignore_the_scale_of_the_weight_and_are_finite_at_zero():
    pose, weight = rand(3, 2, 2), rand(3, 2, 2, 2)
    votes = cn.compute_votes(pose, weight)
    torch.testing.assert_close(cn.compute_votes(pose, 1000 * weight), votes)
    zero = torch.zeros_like(weight, requires_grad=True)
    votes = cn.compute_votes(pose, zero)
    assert votes.eq(0).all() and grad(votes.sum(), zero)[0].isfinite().all()


def objective(k, c, a, lambda1, lambda2):
    """Eq. 2, term by term."""
    n = len(c)
    return (-sum(c[i] * k[i] for i in range(n))
            + lambda1 * sum(c[i] * (c[i] / (1 / n)).log() for i in range(n))
            + lambda2 * sum(c[i] * (c[i] / a[i]).log() for i in range(n)))


def test_routing_objective_equals_the_sums_of_equation_2():
    k, z, log_a, lambdas = rand(3, 5), rand(3, 5), rand(3, 5), rand(2)
    c = z.softmax(-1)
    expected = torch.stack([objective(*x, *lambdas) for x in zip(k, c, log_a.exp())])
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
    slope, = grad(objective(k, z.softmax(-1), a, *lambdas), z)
    assert slope.abs().max() < 1e-12  # stationary, and J is convex in c
    for step in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(30):
            other = (1 - step) * c + step * torch.randn(6).double().mul(3).softmax(-1)
            assert objective(k, other, a, *lambdas) > objective(k, c, a, *lambdas)


def test_compatibilities_sum_to_one_over_the_inputs_and_not_over_the_outputs():
    c = cn.update_compatibility(rand(2, 3, 4), rand(2, 1, 4), 0.5, 0.5)
    torch.testing.assert_close(c.sum(-1), torch.ones_like(c[..., 0]))
    assert (c.sum(-2) - 1).abs().min() > 0.01


def test_compatibility_limits_are_uniform_activation_and_winner_takes_all():
    k, a = torch.rand(5).double(), torch.rand(5).double()
    for lambdas, expected in (((1e9, 1.0), torch.full_like(k, 0.2)), ((1.0, 1e9), a / a.sum()),
                              ((1e-5, 1e-12), torch.eye(5).double()[k.argmax()])):
        c = cn.update_compatibility(k, a.log(), *lambdas)
        torch.testing.assert_close(c, expected, atol=1e-7, rtol=0)


def test_update_pose_is_the_weighted_sum_and_minimises_the_quadratic_objective():
    c, v, log_a = rand(6).softmax(-1), rand(6, 4), rand(6)
    mu = cn.update_pose(c, v)
    expected = [sum(c[i] * v[i, d] for i in range(6)) for d in range(4)]
    assert_same([mu], [torch.stack(expected)], [c, v])
    d2 = [sum((mu[d] - v[i, d]) ** 2 for d in range(4)) for i in range(6)]
    assert_same([cn.squared_distance(mu, v)], [torch.stack(d2)], [c, v])
    j = cn.routing_objective(-cn.squared_distance(mu, v), c, log_a, 1.0, 1.0)
    assert grad(j, mu)[0].abs().max() < 1e-12


def objectives(routing, votes, log_a, steps=8):
    """J after every half-step of the alternation, (2 * steps, ..., O)."""
    mu, js = votes.mean(-2), []
    for _ in range(steps):
        c, _ = routing.compatibility(mu, votes, log_a, None, None)
        for half_step in (mu, routing.pose(mu, votes, c)):
            mu, k = half_step, routing.similarity(half_step, votes)
            js.append(cn.routing_objective(k, c, log_a, *routing.lambdas()))
    return torch.stack(js)


@torch.no_grad()
def test_mean_shift_never_raises_the_objective_even_where_every_gaussian_underflows():
    routing = small_routing("mean_shift", outputs=50)
    routing.log_lambda.uniform_(-5, 2)
    spread = torch.logspace(-2, 3, 40).double().view(-1, 1, 1, 1)
    votes, log_a = spread * rand(40, 50, 7, 3), torch.rand(40, 1, 7).double().log()
    assert (routing.similarity(votes.mean(-2), votes) == 0).all(-1).any()
    js = objectives(routing, votes, log_a)
    assert (js.diff(dim=0) <= 1e-12 * js[1:].abs().clamp_min(1)).all()
    assert (js[-1] < js[0] - 0.1).any()


@torch.no_grad()
def test_alternation_with_the_mean_descends_for_the_quadratic_kernel():
    routing = small_routing("similarity")
    routing.similarity = lambda mu, votes: -cn.squared_distance(mu, votes)
    js = objectives(routing, rand(300, 2, 6, 3), -rand(300, 1, 6).abs())
    assert (js.diff(dim=0) <= 1e-12 * js[1:].abs().clamp_min(1)).all()


@torch.no_grad()
def test_the_papers_mean_can_raise_the_objective_where_mean_shift_lowers_it():
    """Three votes agree; the outlier's activation drags the mean away from all four."""
    votes = torch.tensor([0.0, 0.0, 0.0, 3.0]).double().view(1, 4, 1)
    log_a = torch.tensor([[0.2, 0.2, 0.2, 0.4]]).double().log()
    rise = []
    for mean_shift in (False, True):
        routing = cn.SimilarityRouting(1, num_kernels=1, widths=(1, 1), lambda1=1e-3,
                                       lambda2=100.0, mean_shift=mean_shift).double()
        rise.append(objectives(routing, votes, log_a, 1).diff(dim=0).item())
    assert rise[0] > 0.1 and rise[1] < -0.01


def test_child_is_shared_among_its_parents_at_all_positions():
    children = torch.tensor([[0, 1, 2, 5], [1, 2, 3, 5], [2, 3, 4, 5]])  # 6 is nobody's child
    logits, fields = rand(3, 3, 4), (children, 7)
    share = cn.log_softmax_over_parents(logits, fields).exp()
    expected = {}
    for ps in parents_of(children.tolist(), 3):
        expected |= {(l, j, i): logits[l, j, i].exp() / sum(logits[m, o, n].exp()
                     for m, n, o in ps) for l, i, j in ps}
        assert sum(share[l, j, i] for l, i, j in ps).item() == pytest.approx(1)
    expected = torch.stack([expected[x] for x in product(*map(range, logits.shape))])
    assert_same([share], [expected.view_as(share)], [logits])
    assert (share - logits.softmax(1)).abs().max() > 0.1  # overlap: no softmax per position
    alone = cn.log_softmax_over_parents(logits, None)
    assert_same([alone], [logits.log_softmax(1)], [logits])


# ------------------------------------------------------------------ layers against the oracles

CASES = {  # grid, kernel, stride, iterations
    "overlap": ((5,), 3, 1, 3),
    "one_iteration": ((5,), 3, 1, 1),
    "no_iteration": ((5,), 3, 1, 0),
    "unused_children": ((6,), 1, 2, 3),
    "plane": ((4, 3), (2, 3), (2, 1), 3),
    "volume": ((3, 2, 2), (2, 1, 2), (1, 2, 1), 3),
}


@pytest.mark.parametrize("name, case", [
    (n, c) for n, c in product(MAKE, CASES) if not (n in ("em", "dynamic") and "no_" in c)])
def test_layer_equals_the_loop_oracle(name, case):
    grid, kernel, stride, iterations = CASES[case]
    layer = small_layer(name, kernel, stride, len(grid))
    layer.routing.iterations = iterations
    pose, logit = rand(1, 2, *grid, 2, 2), rand(1, 2, *grid)
    result = oracle_layer(name, layer, pose[0], logit[0])
    mu, out, c = layer(pose, logit)
    actual = [mu[0].flatten(1, -3).flatten(-2), out[0].flatten(1), c[0].flatten(1, -2)]  # (O, L, .)
    expected = [torch.stack([result[l, j][x] for j, l in product(*map(range, actual[1].shape))])
                .view_as(actual[x]) for x in range(3)]
    with torch.autograd.set_detect_anomaly(True):  # no 0/0 that is masked later
        slopes = assert_same(actual, expected, [pose, logit, *layer.parameters()])
    if iterations == 3:  # nothing hides behind a zero
        assert all(g.any() for g in slopes[2:])


@every_routing
def test_no_iterations_leave_the_mean_vote(name):
    routing, votes = small_routing(name, 3), rand(2, 3, 5, 4)
    routing.iterations = 0
    mu, logit, c = routing(votes, -rand(2, 5).abs())
    torch.testing.assert_close(mu, votes.mean(-2))
    assert c.eq(1 / 5).all() and logit.shape == (2, 3)


def test_dynamic_logit_is_the_log_of_the_squared_length():
    mu, logit, _ = cn.DynamicRouting(1, gain=1.0)(torch.tensor([[[3.0, 4.0]]]), torch.zeros(1))
    torch.testing.assert_close(logit, torch.tensor([25.0]).log())
    torch.testing.assert_close(mu.norm(dim=-1), logit.sigmoid())
    layer = small_layer("dynamic")  # and an absent capsule has no vote
    _, logit, _ = layer(rand(1, 2, 5, 2, 2), torch.full((1, 2, 5), -99.0).double())
    assert logit.sigmoid().max() < 1e-6


@every_routing
def test_order_of_the_input_capsules_does_not_matter(name):
    routing, order = small_routing(name), torch.randperm(6)
    pose, weight, log_a = rand(6, 2, 2), rand(6, 2, 2, 2), -rand(6).abs()
    mu, logit, c = routing(cn.compute_votes(pose, weight), log_a)
    permuted = routing(cn.compute_votes(pose[order], weight[order]), log_a[order])
    torch.testing.assert_close(permuted, (mu, logit, c[..., order]))
    assert (c - c[..., order]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------- gradients


def test_gradients_of_the_equations_are_exact():
    fields, x = (torch.tensor([[0, 1, 2], [1, 2, 3]]), 5), (2, 3)
    for function, *shapes in (
            (cn.compute_votes, (2, 3, 2, 2), (3, 2, 2, 2)),
            (lambda k, a, *l: cn.update_compatibility(k, a, *(y.exp() for y in l)),
             x, x, (1,), (1,)),
            (cn.update_pose, x, (2, 3, 4)),
            (lambda k, z, *y: cn.routing_objective(k, z.softmax(-1), *y), x, x, x, (2, 1), (1,)),
            (cn.squared_distance, (2, 4), (2, 3, 4)),
            (lambda z: cn.log_softmax_over_parents(z, fields), (2, 2, 3)),
            (cn.add_coordinates, (1, 2, 3, 2, 2)),
            (lambda z: cn.spread_loss(z, torch.tensor([0, 2]), 0.3), x)):
        assert gradcheck(function, [rand(*shape) for shape in shapes])


@every_routing
def test_gradients_of_a_layer_are_exact(name):
    layer = small_layer(name, channels=1)
    inputs = rand(1, 1, 4, 2, 2), rand(1, 1, 4), *layer.parameters()
    assert gradcheck(lambda pose, logit, *_: layer(pose, logit), inputs)


EXTREMES = {
    "zero_poses": lambda layer, pose, logit: pose.zero_(),
    "zero_weight": lambda layer, pose, logit: layer.weight.zero_(),
    "identical_votes": lambda layer, pose, logit: (pose.fill_(1), layer.weight.fill_(1)),
    "certain": lambda layer, pose, logit: logit.fill_(1e4),
    "absent": lambda layer, pose, logit: logit.fill_(-1e4),
    "mixed": lambda layer, pose, logit: logit.sign_().mul_(1e4),
    "huge_poses": lambda layer, pose, logit: pose.mul_(1e4),
    "single_input": lambda layer, pose, logit: None,
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("extreme", EXTREMES)
@every_routing
def test_extreme_inputs_give_finite_values_and_gradients(name, extreme, autocast):
    channels, kernel = (1, 1) if extreme == "single_input" else (2, 3)
    layer = small_layer(name, kernel, channels=channels).float()
    pose, logit = torch.randn(2, channels, 5, 2, 2), torch.randn(2, channels, 5)
    with torch.no_grad():
        EXTREMES[extreme](layer, pose, logit)
    inputs = [pose.requires_grad_(), logit.requires_grad_(), *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = layer(pose, logit)
    slopes = gradients(outputs, [torch.randn_like(x) for x in outputs], inputs)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in (*outputs, *slopes))


# -------------------------------------------------------------------------------- the network


def mlp_size(*sizes):
    return sum(i * o + o for i, o in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("name, routing", {
    "dynamic": 0, "em": 2 * (16 + 16 + 5), "similarity": 2 * (4 + 4 + 10) + 5 * (16 + 16 + 5),
    "connectionist": 3 * 4 * 16 * (34 + 16 + 2) + 2 * mlp_size(16, 1) + mlp_size(16, 32, 32, 1)
    + 2 * mlp_size(16, 64, 64, 1) + mlp_size(16, 124, 124, 1)}.items())
def test_parameters_number_86408_and_those_of_the_routing(name, routing):
    """Which also holds Q of Eq. 15 and Table 2."""
    assert sum(p.numel() for p in CapsNet((1, 32, 32), 5, name).parameters()) == 86408 + routing


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 48, 48), (2, 40), (1, 17, 19), (1, 17, 18, 17)])
@torch.no_grad()
def test_image_shapes(shape):
    net = CapsNet(shape, 5, channels=(8, 2, 4, 4)).eval()
    poses, logits = net(torch.randn(1, *shape))
    assert poses.shape == (1, 5, 4, 4) and logits.shape == (1, 5)
    assert poses.isfinite().all() and logits.isfinite().all()


@every_network
def test_batch_of_one_equals_the_same_image_in_a_batch(name):
    net, images = tiny_net(name).double(), rand(3, 1, 17, 19)
    poses, logits = net(images)
    torch.testing.assert_close(net(images[1:2]), (poses[1:2], logits[1:2]))
    assert logits.dtype == torch.float64 and logits.std(0).min() > 1e-9
    pose, logit, c = net.caps1(*net.primary(net.conv(images)))
    assert pose.shape == (3, 3, 3, 3, 2, 2) and c.shape == (*logit.shape, 18)
    if name != "dynamic":
        torch.testing.assert_close(c.sum(-1), torch.ones_like(logit))


@every_network
def test_black_images_and_one_class_give_finite_gradients_and_every_parameter_gets_one(name):
    net = tiny_net(name).train()
    poses, logits = net(torch.randn(4, 1, 17, 19))
    (logits.square().sum() + poses.square().sum()).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    net = CapsNet((1, 17, 17), 1, name)
    poses, logits = net(torch.zeros(2, 1, 17, 17))
    slopes = grad(poses.sum() + logits.sum(), list(net.parameters()))
    assert all(x.isfinite().all() for x in (poses, logits, *slopes))


@pytest.mark.parametrize("call, words", [
    (lambda: CapsNet((1, 16, 32), 5), r"\(1, 16, 32\).* of 17 or more"),
    (lambda: CapsNet((1, 32, 32), 5, "magic"), "'magic'.*similarity.*connectionist.*em.*dynamic"),
    (lambda: CapsNet((1, 32, 32), 5, channels=(64, 8, 16, 16, 12)), "too many values"),
    (lambda: tiny_net("em")(torch.zeros(2, 1, 17, 18)), r"\(2, 1, 17, 18\).*\(1, 17, 19\)"),
    (lambda: tiny_net("em")(torch.zeros(1, 17, 19)), r"\(1, 17, 19\).*\(B, .*1, 17, 19"),
    (lambda: small_layer("em")(rand(1, 3, 5, 2, 2), rand(1, 3, 5)), r"\(3, 5\).*expected 2"),
    (lambda: small_layer("em")(rand(1, 2, 2, 2, 2), rand(1, 2, 2)), r"\(2, 2\).*a grid of \(3,\)"),
])
def test_wrong_sizes_and_names_raise_one_informative_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_spread_loss_equals_a_loop_and_is_zero_beyond_the_margin():
    logits, target = rand(4, 3), [0, 2, 1, 2]
    expected = sum((0.6 - (row[t].sigmoid() - row[i].sigmoid())).clamp_min(0) ** 2
                   for row, t in zip(logits, target) for i in range(3) if i != t) / 4
    assert_same([cn.spread_loss(logits, torch.tensor(target), 0.6)], [expected], [logits])
    right = 40 * torch.eye(3).double() - 20
    assert cn.spread_loss(right, torch.arange(3), 0.9).abs() < 1e-12


@pytest.mark.parametrize("name, backend", [(n, "aot_eager") for n in MAKE] + [pytest.param(
    "similarity", "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++"))])
def test_compiled_routing_equals_the_plain_one_in_values_and_all_gradients(name, backend):
    """In C++ (inductor) only the default routing: it takes longer than all other tests here."""
    torch.compiler.reset()
    layer = small_layer(name, outputs=3)
    pose, logit = rand(2, 2, 5, 2, 2), rand(2, 2, 5)
    expected = layer(pose, logit)
    layer.routing.compile(backend=backend, fullgraph=True)
    assert_same(layer(pose, logit), expected, [pose, logit, *layer.parameters()])


def test_capsnet_needs_torch_only(tmp_path):
    """Copied alone into an empty folder, it imports and trains without NumPy or this project."""
    (tmp_path / "capsnet.py").write_text(Path(cn.__file__).read_text())
    program = """
import sys, torch
sys.modules["numpy"] = None
from capsnet import CapsNet
net = CapsNet((1, 17, 17), 2)
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
images, labels = torch.randn(8, 1, 17, 17), torch.arange(8) % 2
losses = []
for _ in range(20):
    loss = torch.nn.functional.cross_entropy(net(images)[1], labels)
    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, env=environment)
