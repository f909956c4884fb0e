"""The optimiser with the authors' options: torch's SGD where none is set."""

import copy
import itertools

import pytest
import torch
from torch import nn

from ss_detectron.solver import SGD

SHAPES = [(4, 3, 3, 3), (4,), (5, 4), ()]


def reference_step(
    p, g, state, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
    batch_manhattan=False, no_sign_change=False, maximize=False,
):  # fmt: skip
    """The definition, for one parameter; returns its new value."""
    g = -g if maximize else g
    g = g.sign() if batch_manhattan else g
    g = g + weight_decay * p
    if momentum:
        first = "v" not in state
        state["v"] = g if first else momentum * state["v"] + (1 - dampening) * g
        g = g + momentum * state["v"] if nesterov else state["v"]
    new = p - lr * g
    if no_sign_change:
        new[(p >= 0) & (new <= 0)] = 1e-10
        new[(p < 0) & (new >= 0)] = -1e-10
    return new


def some_params(dtype=torch.float64, seed=0) -> list[nn.Parameter]:
    """Small values of both signs, many of them exactly zero, one of them -0."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator, dtype=dtype) * 0.1 for shape in SHAPES]
    for p in params[:-1]:
        p[torch.rand(p.shape, generator=generator) < 0.3] = 0.0
    params[0].view(-1)[0] = -0.0
    return [nn.Parameter(p) for p in params]


def set_gradients(params, step) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        if p.dim():
            p.grad[torch.rand(p.shape, generator=generator) < 0.2] = 0.0


def run(optimizer, steps=6, start=0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()


def assert_equal(actual, expected) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=0, equal_nan=True)


def assert_close(actual, expected, dtype=torch.float64) -> None:
    """Within the roundings of some steps."""
    rtol, atol = {torch.float64: (1e-12, 1e-15), torch.float32: (1e-5, 1e-6)}[dtype]
    torch.testing.assert_close(list(actual), list(expected), rtol=rtol, atol=atol)


MOMENTA = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]
# The authors' options, in all combinations.
OPTIONS = [
    {"batch_manhattan": manhattan, "no_sign_change": fixed}
    for manhattan, fixed in itertools.product([False, True], repeat=2)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("others", [{}, {"weight_decay": 0.1, "maximize": True}])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_step_is_the_definition(dtype, momentum, others, options):
    settings = {"lr": 0.07, **momentum, **others, **options}
    params = some_params(dtype)
    expected = [p.detach().double() for p in params]
    states = [{} for _ in params]
    optimizer = SGD(params, **settings)
    for step in range(6):
        set_gradients(params, step)
        if step < 2:
            params[1].grad = None  # it begins to learn later, and its momentum then
        for i, p in enumerate(params):
            if p.grad is not None:
                expected[i] = reference_step(expected[i], p.grad.double(), states[i], **settings)
        gradients = [p.grad.clone() for p in params if p.grad is not None]
        optimizer.step()
        assert_equal([p.grad for p in params if p.grad is not None], gradients)
        assert_close(params, [e.to(dtype) for e in expected], dtype)
    if momentum:
        buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
        assert_close(buffers, [state["v"].to(dtype) for state in states], dtype)
    at_bound = [abs(p) == torch.tensor(1e-10, dtype=dtype) for p in params]
    assert (sum(a.sum() for a in at_bound) > 5) == options["no_sign_change"]
    optimizer.zero_grad()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert_equal(params, before)


@pytest.mark.parametrize("options", [*MOMENTA, {"weight_decay": 0.1, "maximize": True}])
def test_without_the_options_it_is_torchs_own_bit_for_bit(options):
    ours, theirs = some_params(torch.float32), some_params(torch.float32)
    run(SGD(ours, lr=0.07, **options))
    run(torch.optim.SGD(theirs, lr=0.07, fused=True, **options))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_becomes_of_weights_near_zero(dtype):
    bound, tiny = (1e-10, 3e-11) if dtype != torch.float16 else (2.0**-14, 2.0**-20)
    nan, inf = float("nan"), float("inf")
    cases = [  # before, update, after
        *((1, -1, bound), (-1, 1, -bound), (1, -3, bound), (-1, 3, -bound)),
        *((0, -1, bound), (0, 0, bound), (-0.0, 0, bound), (0, 1, 1)),
        # Of its own sign, a weight may be nearer to zero than the bound.
        *((tiny, 0, tiny), (-tiny, 0, -tiny)),
        # What is no number stays so, to be seen.
        *((1, nan, nan), (1, -inf, bound), (-1, inf, -bound), (1, inf, inf)),
    ]
    before, update, after = torch.tensor(cases, dtype=torch.float64).to(dtype).T
    weight = nn.Parameter(before.clone())
    weight.grad = -update
    SGD([weight], lr=1.0, no_sign_change=True).step()
    assert_equal([weight], [after])


def test_what_it_cannot_do_is_refused():
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        SGD(embedding.parameters(), lr=0.1).step()


def test_state_goes_from_torchs_own_and_back():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    params = some_params()
    theirs = torch.optim.SGD(params, fused=True, **options)
    run(theirs, steps=3)
    mine = [nn.Parameter(p.detach().clone()) for p in params]
    ours = SGD(mine, lr=1.0, no_sign_change=True)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    (group,) = ours.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.1)
    # The checkpoint says nothing of the options: they are not switched off.
    assert (group["batch_manhattan"], group["no_sign_change"]) == (False, True)
    group["no_sign_change"] = False
    again = [nn.Parameter(p.detach().clone()) for p in params]
    back = torch.optim.SGD(again, lr=1.0)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in theirs, ours, back:
        run(optimizer, start=3)
    assert_equal(mine, params)
    assert_equal(again, params)


def test_training_goes_on_from_a_saved_optimizer():
    params = some_params()
    optimizer = SGD([params[0]], lr=0.1, momentum=0.9, batch_manhattan=True)
    # A group that is added has the optimiser's settings, where it has none of its own.
    optimizer.add_param_group({"params": params[1:], "no_sign_change": True, "lr": 0.05})
    settings = [(g["batch_manhattan"], g["no_sign_change"]) for g in optimizer.param_groups]
    assert settings == [(True, False), (True, True)]
    run(optimizer, steps=2)
    other = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = SGD([{"params": other[:1]}, {"params": other[1:]}], lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in optimizer, resumed:
        run(o, start=2, steps=2)
    assert_equal(other, params)


def test_closures_and_hooks_are_called_once_a_step():
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    torch.optim.SGD([weight], lr=0.1)  # from now on, torch's own step calls hooks too
    optimizer = SGD([weight], lr=0.5, batch_manhattan=True)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = 100 * weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 200
    assert weight.tolist() == [0.5, -0.5]
    assert calls == ["before", "after"]


def test_gradient_scaling_skips_steps_that_overflow():
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = SGD([weight], lr=0.25, batch_manhattan=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in ((float("inf"), [1.0, -1.0]), (3.0, [0.75, -0.75])):
        optimizer.zero_grad()
        scaler.scale((factor * weight.square()).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == expected
