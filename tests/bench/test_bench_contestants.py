"""Who is compared with whom: parameter shapes, and that every peer computes what we compute."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from benchmarks import peers
from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.bench import optimizers
from imbsam_fast.bench.cases import limit_operations, long_tail_batch
from imbsam_fast.bench.measure import Stopwatch
from imbsam_fast.bench.optimizers import (
    IMBSAM,
    Contender,
    Rules,
    StepData,
    Workspace,
    base_on,
    imbsam,
    ours,
    random_tensors,
    rotated_sets,
    sgd,
)
from imbsam_fast.bench.peers import (
    AuthorsSequence,
    BooleanMasking,
    RowWeights,
    authors_training_step,
    plain_training_step,
)
from imbsam_fast.bench.shapes import (
    describe,
    elements,
    resnet32_shapes,
    resnet50_shapes,
    vit_b16_shapes,
)
from imbsam_fast.ops.dispatch import use_backend

SHAPES = [(5, 3), (7,), (2, 3, 2, 2), (1,)]


# ---------------------------------------------------------------- parameter shapes


def test_resnet50_with_8142_classes_has_161_tensors_of_40_million_elements():
    shapes = resnet50_shapes(8142)
    assert len(shapes) == 161
    assert elements(shapes) == 40_190_990
    assert shapes[0] == (64, 3, 7, 7) and shapes[-2:] == [(8142, 2048), (8142,)]


def test_shapes_have_the_published_number_of_parameters():
    assert elements(resnet50_shapes(1000)) == 25_557_032
    assert elements(resnet32_shapes(10)) == 464_154
    assert elements(vit_b16_shapes()) == 86_567_656
    assert len(vit_b16_shapes()) == 152


def test_shapes_are_described_by_their_number():
    assert describe(resnet50_shapes()) == "161 tensors, 40.2M"
    assert describe([(10, 100)]) == "1 tensor, 1,000 elements"
    assert describe([(1000,)] * 10_000) == "10,000 tensors, 10.0M"


def test_sets_exceed_the_bytes_that_caches_keep():
    assert rotated_sets([(1000, 10)], total_bytes=1_000_000) == 5  # 5 lists of 40 kB each
    assert rotated_sets([(1000, 10)], total_bytes=1_000_001) == 6
    assert rotated_sets([(1,)], total_bytes=1_000_000) == 64
    assert rotated_sets(resnet50_shapes(), total_bytes=1_000_000) == 1


# ---------------------------------------------------------------- steps of peers


def weights_after(contender: Contender, rules: Rules, steps: int = 3) -> list[torch.Tensor]:
    """The weights after steps whose gradients depend on the weights that they are taken at."""
    work = Workspace(*([t.double() for t in random_tensors(SHAPES, x)] for x in (1, 0.1, 0, 0)))
    base = base_on(work, contender)
    params = base.param_groups[0]["params"]
    stepper = contender.make(base, work)
    generator = torch.Generator().manual_seed(1)
    with use_backend(contender.backend or "reference"):
        for _ in range(steps):
            for call in rules.calls:
                for p in params:
                    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.grad = torch.sin(30 * p.detach()) + noise
                getattr(stepper, call)()
                assert all(p.grad is None for p in params)
    return [p.detach() for p in params]


def all_contenders() -> list:
    """(rules, name) of everybody, pytorch_optimizer's SAM where it is installed."""
    return [
        *((IMBSAM, name) for name in peers.imbsam_contenders(len(SHAPES))),
        *((peers.SAM, name) for name in peers.sam_contenders()),
        *((peers.SGD, name) for name in peers.sgd_contenders()),
        *((peers.ADAMW, name) for name in peers.adamw_contenders()),
    ]


def contender(rules: Rules, name: str) -> Contender:
    found = {
        IMBSAM: lambda: peers.imbsam_contenders(len(SHAPES)),
        peers.SAM: peers.sam_contenders,
        peers.SGD: peers.sgd_contenders,
        peers.ADAMW: peers.adamw_contenders,
    }
    return found[rules]()[name]


@pytest.mark.parametrize("rules, name", all_contenders(), ids=lambda x: getattr(x, "name", x))
def test_everybody_ends_at_the_weights_of_the_reference(rules, name):
    adamw = torch.optim.AdamW if rules is peers.ADAMW else None
    expected = weights_after(imbsam("reference")._replace(adamw=adamw), rules)
    # pytorch_optimizer computes the norm in float32.
    rtol = 1e-6 if name == peers.PYTORCH_OPTIMIZER else 1e-12
    for actual, p in zip(weights_after(contender(rules, name), rules), expected):
        torch.testing.assert_close(actual, p, rtol=rtol, atol=rtol)


def test_the_three_kinds_of_step_differ():
    imbsam_, sam, sgd_ = (
        torch.cat([p.reshape(-1) for p in weights_after(imbsam("reference"), rules, steps=1)])
        for rules in (IMBSAM, peers.SAM, peers.SGD)
    )
    assert (imbsam_ - sam).abs().max() > 1e-3 and (sam - sgd_).abs().max() > 1e-3


def test_what_is_not_installed_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert list(peers.sam_contenders()) == [ours(), peers.DAVDA]
    assert "left out: pytorch_optimizer's SAM" in capsys.readouterr().out


def test_many_tensors_are_not_compiled():
    assert peers.COMPILED in peers.imbsam_contenders(161)
    assert peers.COMPILED not in peers.imbsam_contenders(10_000)


def test_every_call_of_a_step_finds_gradients(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, base, rho):
            self.params = base.param_groups[0]["params"]

        def record(self):
            seen.append([p.grad is not None for p in self.params])
            for p in self.params:
                p.grad = None

        first_step = second_step = third_step = record

    monkeypatch.setattr(optimizers, "ImbSAM", Recorder)
    data = StepData([(2, 3), (4,)], sets=2)
    operation = data.step_operation(IMBSAM, {"x": imbsam("reference")})
    watch = Stopwatch()
    operation.contestants["x"](watch)
    assert seen == [[True, True]] * 6 and operation.calls == 2
    assert tuple(watch.laps) == IMBSAM.calls


def test_contestants_share_the_memory_of_all_sets():
    data = StepData(SHAPES, sets=2)
    operation = data.step_operation(IMBSAM, peers.imbsam_contenders(tensors=10_000))
    for contestant in operation.contestants.values():
        before = [[t.clone() for t in (*w.theta, *w.m)] for w in data.work]
        contestant(Stopwatch())
        for work, old in zip(data.work, before):
            changed = [not torch.equal(a, b) for a, b in zip((*work.theta, *work.m), old)]
            assert all(changed)
    n = 4 * elements(SHAPES)
    assert operation.bytes == 11 * n
    assert operation.moved[peers.EAGER] == 17 * n and operation.moved[ours()] == 11 * n


def test_machine_limits_count_what_they_move():
    operations = limit_operations(4000)
    assert [op.size.partition(",")[0] for op in operations] == ["read", "copy", "triad"]
    assert [op.bytes for op in operations] == [4000, 8000, 12000]
    for op in operations:
        for contestant in op.contestants.values():
            watch = Stopwatch()
            contestant(watch)
            assert watch.laps["call"] > 0


# ---------------------------------------------------------------- losses of peers


def test_targets_have_the_share_of_tail_rows_asked_for():
    split, targets = long_tail_batch(200, 31, tail_fraction=0.43)
    assert int(split.tail_mask(targets).sum()) == 86
    assert int(targets.min()) >= 0 and int(targets.max()) < 31


@pytest.mark.parametrize("peer", ["boolean masks", "row weights", "compiled row weights"])
def test_losses_of_peers_equal_ours(peer):
    torch.manual_seed(0)
    split, targets = long_tail_batch(16, 10)
    logits = torch.randn(16, 10, dtype=torch.float64, requires_grad=True)
    criterion = {
        "boolean masks": BooleanMasking,
        "row weights": RowWeights,
        "compiled row weights": lambda split: peers.compiled_row_weights(split, logits, targets),
    }[peer](split)
    ours, theirs = SplitCrossEntropy(split)(logits, targets), criterion(logits, targets)
    for part, expected in zip(ours, theirs):
        torch.testing.assert_close(part, expected)
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (part, expected)]
        torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- training steps of peers


@pytest.mark.parametrize("fused", [None, True])
def test_authors_training_step_gives_our_weights(fused):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    theirs, plain = deepcopy(ours), deepcopy(ours)
    split, targets = long_tail_batch(32, 8)
    batches = [torch.randn(32, 6, dtype=torch.float64) for _ in range(6)]

    base = sgd(list(theirs.parameters()), fused)
    authors = authors_training_step(theirs, BooleanMasking(split), AuthorsSequence(base, rho=0.5))
    optimizer = ImbSAM(sgd(list(ours.parameters())), rho=0.5)
    step = TrainStep(ours, SplitCrossEntropy(split), optimizer, plan="joint")
    sgd_step = plain_training_step(plain, sgd(list(plain.parameters())))
    for inputs in batches:
        step(inputs, targets)
        authors(inputs, targets)
        sgd_step(inputs, targets)
    for p, q, r in zip(ours.parameters(), theirs.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert (p - r).abs().max() > 1e-4  # the perturbation made a difference


def test_plain_training_step_is_ours_without_tail_classes():
    torch.manual_seed(0)
    ours = nn.Linear(6, 8).double()
    plain = deepcopy(ours)
    targets, optimizer = torch.randint(0, 8, (32,)), ImbSAM(sgd([*ours.parameters()]))
    step = TrainStep(ours, SplitCrossEntropy(ClassSplit.none()), optimizer)
    sgd_step = plain_training_step(plain, sgd([*plain.parameters()]))
    for _ in range(3):
        inputs = torch.randn(32, 6, dtype=torch.float64)
        step(inputs, targets)
        sgd_step(inputs, targets)
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-12, atol=1e-14)
