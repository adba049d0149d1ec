"""Fréchet distances of normal distributions, and feature networks from files."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from scipy import linalg

from msc.pretrain.evaluation.frechet import check_enough, frechet, open_features

CPU = torch.device("cpu")


def sample(mean, covariance, clips, seed=0):
    """Values whose mean and covariance are exactly these."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    x = torch.randn(clips, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.atleast_2d(torch.cov(x.T))), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def test_of_normal_distributions_is_known():
    one = frechet(sample([1.0], [[4.0]], 20), sample([3.5], [[0.25]], 30, 1))
    assert one == pytest.approx(2.5**2 + (2 - 0.5) ** 2)  # (μ1 - μ2)² + (σ1 - σ2)²
    variances = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 16.0])
    a, b = (sample([0.0, 0.0, 0.0], torch.diag(v), 50, i) for i, v in enumerate(variances))
    assert frechet(a, b) == pytest.approx(1 + 1 + 1)
    assert frechet(a, a) == pytest.approx(0, abs=1e-10)


def test_equals_the_formula_with_a_matrix_root():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + i for i in range(2))
    covariances = [torch.cov(x.double().T) for x in (a, b)]
    root = linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = float(shift + sum(c.trace() for c in covariances) - 2 * root.trace())
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    turned = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    assert frechet(a @ turned, b @ turned) == pytest.approx(expected, rel=1e-5)  # a rotation changes nothing


def test_too_few_clips_are_refused():
    check_enough(401, 400)
    with pytest.raises(ValueError, match="needs more than 400 clips.*there are 400"):
        check_enough(400, 400)


class Means(torch.nn.Module):
    def forward(self, video):
        return video.mean((1, 3, 4))


@pytest.fixture
def networks(tmp_path):
    video = torch.zeros(1, 4, 3, 8, 8)
    torch.export.save(torch.export.export(Means(), (video,)), tmp_path / "means.pt2")
    torch.jit.trace(Means(), video).save(tmp_path / "means.pt")
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["means.pt2", "means.pt"])
def test_networks_of_both_kinds_give_features(networks, name):
    features = open_features(networks / name, CPU)
    video = torch.rand(1, 4, 3, 8, 8)
    torch.testing.assert_close(features(video), video.mean((1, 3, 4)).double())
    if name.endswith("2"):  # made for videos of this size alone
        with pytest.raises(ValueError, match=r"means.pt2 does not take video of \[1, 5, 3, 8, 8\]"):
            features(torch.rand(1, 5, 3, 8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_network_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no feature network"):
        open_features(tmp_path / "none.pt", CPU)
    for name, content in (("a.pth", b""), ("a.pt", b""), ("a.pt2", b"PK\3\4 truncated"), ("b.ts", b"x" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no feature network"):
            open_features(tmp_path / name, CPU)
    with zipfile.ZipFile(tmp_path / "c.pt2", "w") as archive:
        archive.writestr("something", "else")
    with pytest.raises(ValueError, match="c.pt2 cannot be opened as a feature network"):
        open_features(tmp_path / "c.pt2", CPU)
    torch.jit.trace(torch.nn.Identity(), torch.zeros(1, 2, 3, 4, 4)).save(tmp_path / "same.pt")
    with pytest.raises(ValueError, match=r"same.pt made a tensor \[1, 2, 3, 4, 4\] of 1 videos; features are \[1, K\]"):
        open_features(tmp_path / "same.pt", CPU)(torch.zeros(1, 2, 3, 4, 4))


class Bomb:
    def __reduce__(self):
        return exec, ("open('exploded', 'w').close()",)


@pytest.mark.parametrize("save", ["pickle", "torch"])
@pytest.mark.parametrize("suffix", ["pt", "pt2"])
def test_a_pickle_by_that_name_is_not_executed(save, suffix, tmp_path):
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    if save == "torch":
        torch.save(Bomb(), path)
    program = f"""
import torch
from pathlib import Path
from msc.pretrain.evaluation.frechet import open_features
try:
    open_features(Path({str(path)!r}), torch.device("cpu"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert re.search("is no feature network|cannot be opened as a feature network", done.stdout), done.stderr
    assert not (tmp_path / "exploded").exists()
