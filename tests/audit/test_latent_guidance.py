"""The latent classifier and its area under the ROC curve."""

from __future__ import annotations

import pytest
import torch

from erasec.audit.latent_guidance import LatentClassifier, area_under_roc


def test_the_area_is_that_of_pairs() -> None:
    scores, truth = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert area_under_roc(scores, truth) == pytest.approx(3 / 4)
    assert area_under_roc(scores, 1 - truth) == pytest.approx(1 / 4)
    assert area_under_roc(torch.zeros(4), truth) == 0.5
    assert area_under_roc(scores, torch.ones(4)) == 0.5


def test_the_classifier_reads_latents_and_noise_level() -> None:
    torch.manual_seed(0)
    classifier = LatentClassifier((2, 4, 4)).eval()
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    odds = classifier(latents, torch.full((3,), 0.5))
    assert odds.shape == (3,)
    assert not torch.allclose(odds, classifier(latents, torch.full((3,), 0.9)))
    assert not torch.allclose(odds, classifier(2 * latents, torch.full((3,), 0.5)))
