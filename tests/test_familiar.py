"""Where "unlike what the model was trained on" begins: what write_familiar keeps, and what infer.py makes of it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from data.features import write_familiar
from infer import unfamiliar
from vidreason import Features

WIDTH, CLIPS = 6, 4


def features(z_global):
    """One object token far away beside the global ones: it must not count."""
    z_vision = torch.cat([z_global, torch.full((1, WIDTH), 1e4)])
    is_object = torch.arange(len(z_vision)) == len(z_global)
    return Features(z_vision, torch.zeros(len(z_vision)), is_object)


class Cache(dict):
    """As much of a FeatureCache as is read."""

    @property
    def videos(self):
        return self


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """-> (folder of familiar.safetensors, what was known of 300 videos)"""
    torch.manual_seed(0)
    spread = torch.tensor([1, 5, 0.7, 1, 3, 1.0])  # unlike in every direction
    videos = [features(7 + spread * torch.randn(CLIPS, WIDTH)) for _ in range(300)]
    folder = tmp_path_factory.mktemp("familiar")
    write_familiar(Cache(enumerate(videos)), folder / "familiar.safetensors")
    return folder, videos


def distance(video, mean, whiten):
    """The mean over clips of the distance from the mean, written out."""
    tokens = video.z_vision[:CLIPS]
    return sum(torch.linalg.norm((token - mean) @ whiten).item() for token in tokens) / CLIPS


def test_the_limit_is_a_tenth_above_nearly_all_that_is_known(known):
    """Fails if the limit moves, or if distances are not measured in standard deviations of each direction."""
    folder, videos = known
    told = load_file(folder / "familiar.safetensors")
    distances = torch.tensor([distance(video, told["mean"], told["whiten"]) for video in videos])
    assert told["limit"].item() == pytest.approx(1.1 * distances.quantile(0.999).item(), rel=1e-4)
    tokens = torch.cat([video.z_vision[:CLIPS] for video in videos])
    covariance = torch.cov(((tokens - told["mean"]) @ told["whiten"]).T)
    assert torch.allclose(covariance, torch.eye(WIDTH), atol=0.05)
    assert torch.allclose(told["mean"], tokens.mean(0), atol=1e-4)


@pytest.mark.parametrize(("share_of_limit", "expected"), [(0.99, False), (1.01, True)])
def test_a_clip_is_announced_from_the_limit_on(known, share_of_limit, expected):
    """Fails if the comparison is turned, or the limit is another than the one that was written."""
    folder, _ = known
    told = SimpleNamespace(**load_file(folder / "familiar.safetensors"))
    direction = torch.linalg.solve(told.whiten.T, torch.nn.functional.one_hot(torch.tensor(2), WIDTH).float())
    clip = features((told.mean + share_of_limit * told.limit * direction).expand(CLIPS, -1))
    assert unfamiliar(clip, folder) is expected


def test_a_model_that_cannot_tell_says_nothing(tmp_path):
    """Fails if a model directory without familiar.safetensors calls clips unfamiliar."""
    assert unfamiliar(features(torch.full((CLIPS, WIDTH), 1e6)), tmp_path) is False
