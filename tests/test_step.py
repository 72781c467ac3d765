"""One step of training: whose gradient goes to which optimiser, and what is done with it."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_tokenizer

import train
from data.records import Sample
from vidreason import Conversation, collate_features, encode_pair, pack

SETTINGS = SimpleNamespace(
    lr=0.01, lora_lr=0.002, muon_lr=0.03, weight_decay=0.1, precision="fp32"
)


def rows(model, videos, names=("good", "wide")):
    """A micro-batch of one pair about each of some videos."""
    pair = encode_pair(tiny_tokenizer(), "why ?", "the red ball hit it .")
    packed = pack([Conversation([pair]) for _ in names], model.config.num_queries)
    return packed, collate_features([model.perceive(videos[name]) for name in names])


def optimizers_of(model, **changed):
    return train.build_optimizers(model, SimpleNamespace(**{**vars(SETTINGS), **changed}))


def test_muon_gets_the_matrices_of_the_core_and_adamw_the_rest(lora_model):
    """Fails if a matrix goes to both or to none, at another's rate, or if norms, biases or queries are decayed."""
    model = lora_model.freeze(2)
    adamw, muon = optimizers_of(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    (matrices,) = muon.param_groups
    assert matrices["peak"] == 0.03 and matrices["lr"] == 0.03 and matrices["weight_decay"] == 0.1
    by_muon = {names[parameter] for parameter in matrices["params"]}
    core = model.fusion.layers.named_parameters(prefix="fusion.layers")
    assert by_muon == {name for name, parameter in core if parameter.ndim == 2}

    by_adamw = {}
    for group in adamw.param_groups:
        assert group["lr"] == group["peak"]
        for parameter in group["params"]:
            by_adamw[names[parameter]] = (group["peak"], group["weight_decay"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert by_adamw.keys() == trained - by_muon
    assert by_adamw["fusion.queries"] == by_adamw["fusion.linear_proj.bias"] == (0.01, 0)
    assert by_adamw["fusion.linear_proj.weight"] == (0.01, 0.1)
    assert {value for name, value in by_adamw.items() if "lora_" in name} == {(0.002, 0.1)}


def test_without_muon_adamw_has_it_all(model):
    """Fails if the core's matrices are forgotten where no muon_lr is given."""
    model.freeze(1)
    (adamw,) = optimizers_of(model, muon_lr=None)
    there = sum(len(group["params"]) for group in adamw.param_groups)
    assert there == len(list(model.fusion.parameters()))


@pytest.mark.parametrize("larger", [1.0, 1000.0])
def test_a_gradient_is_cut_to_norm_one_and_reported_as_it_was(model, videos, larger):
    """Fails if gradients are not clipped, clipped at another norm, or if the norm that is logged is the clipped one."""
    model.freeze(1)
    model.fusion.linear_proj.weight.data *= larger
    optimizers = optimizers_of(model, muon_lr=None)
    _, norm, _ = train.train_step(model, optimizers, [rows(model, videos)], SETTINGS, torch.device("cpu"))
    left = torch.nn.utils.get_total_norm([p.grad for p in model.fusion.parameters() if p.grad is not None])
    assert norm > 1
    assert left.item() == pytest.approx(1, abs=1e-3)


def test_a_step_moves_every_trained_matrix_and_nothing_else(model, videos):
    """Fails if an optimiser is not stepped, or a frozen part is trained."""
    model.freeze(1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train.train_step(model, optimizers_of(model), [rows(model, videos)], SETTINGS, torch.device("cpu"))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    matrices = {name for name, parameter in before.items() if name.startswith("fusion.") and parameter.ndim == 2}
    assert matrices <= moved <= {name for name in before if name.startswith("fusion.")}


def test_of_several_right_answers_the_first_is_trained_and_that_is_said():
    """Fails if the others are left out without a word, or the word comes where there are none."""
    plain = Sample("1", "a.mp4", "why ?", "red")
    assert train.note_on_answers([plain]) == []
    (note,) = train.note_on_answers([plain, Sample("2", "a.mp4", "why ?", "red", also_right=("blue",))])
    assert note.startswith("1 questions have more than one right answer: the first")
