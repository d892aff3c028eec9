"""The pretraining loss: what is drawn, what it is equal to, and that padding plays no part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ser_core.models.backbone import build_backbone
from ser_core.models.front_end import run_front_end
from ser_core.models.tapt import (
    TaptDraw,
    WholeBatch,
    code_perplexity,
    code_sums,
    codebook_diversity,
    draw_tapt,
    sample_negatives,
    tapt_loss,
)
from ser_core.settings.backbone import BackboneSettings, Padding
from ser_core.settings.pretraining import NegativeFrames
from tests.ser_core.models import rebuild


def model_of(**changes: Any) -> Any:
    model = build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, **changes}))
    rebuild.fill(dict(model.named_parameters()), seed=1)
    return model


def waves() -> list[Tensor]:
    return [torch.from_numpy(wave) for wave in rebuild.waves()]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), span=st.integers(1, 12), seed=st.integers(0, 99))
def test_negatives(lengths: list[int], span: int, seed: int) -> None:
    """Negatives are frames of the same utterance, never padding, never the frame itself unless it has no other."""
    draw = draws(model_config(span), lengths, 7, seed=seed)
    rows, frames = np.nonzero(draw.mask)
    assert draw.negatives.shape == (len(rows), 7)
    for row, frame, chosen in zip(rows, frames, draw.negatives, strict=True):
        assert (chosen // max(lengths) == row).all()
        assert (chosen % max(lengths) < lengths[row]).all()
        if lengths[row] > 1:
            assert (chosen % max(lengths) != frame).all()


def draws(config: Any, lengths: Any, negatives: int, frames: NegativeFrames = NegativeFrames.valid, seed: int = 0) -> TaptDraw:
    """At least two spans a row, a generator for each row."""
    rngs = [np.random.default_rng((seed, row)) for row in range(len(lengths))]
    return draw_tapt(config, np.array(lengths), minimum=2, negatives=negatives, negative_frames=frames, rngs=rngs)


def model_config(span: int) -> Any:
    from transformers import Wav2Vec2Config

    return Wav2Vec2Config(mask_time_prob=0.3, mask_time_length=span)


@pytest.mark.parametrize("frames", [7, 10])
def test_every_candidate_is_drawn_equally_often(frames: int) -> None:
    """Of a row of 10 frames, padding included or not: each candidate but the frame itself, masked or not."""
    mask = np.zeros((2, 10), dtype=bool)
    mask[:, 2:5] = True
    chosen = sample_negatives(mask, 3000, [np.random.default_rng(0)], np.full(2, frames))
    counts = np.bincount(chosen[4] - 10, minlength=10)  # row 1, frame 3
    assert counts[3] == 0
    assert counts[frames:].sum() == 0
    assert np.delete(counts[:frames], 3).min() > 0.75 * 3000 / (frames - 1)


def test_a_masked_frame_outside_the_candidates_is_an_error() -> None:
    mask = np.ones((1, 4), dtype=bool)
    with pytest.raises(ValueError, match="among the candidates"):
        sample_negatives(mask, 3, [np.random.default_rng(0)], np.array([3]))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_transformers(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With reference padding the contrastive loss and the unused share of the codebook are those of transformers' own forward."""
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", rebuild.fixed_gumbel_softmax)
    model, mask = model_of().train(training), rebuild.time_mask()
    model.set_gumbel_temperature(1)
    every = rebuild.negatives(mask)
    padded = torch.nn.utils.rnn.pad_sequence(waves(), batch_first=True)
    theirs = model(padded, mask_time_indices=torch.from_numpy(mask), sampled_negative_indices=torch.from_numpy(every))
    ours = tapt_loss(model, waves(), TaptDraw(mask, every[mask]), padding=Padding.reference, attention_mask=False)
    torch.testing.assert_close(ours.contrastive, theirs.contrastive_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.diversity * ours.masked, theirs.diversity_loss, rtol=2e-4, atol=1e-5)  # no epsilon there


@pytest.mark.slow
def test_utterances_do_not_depend_on_their_batch() -> None:
    """The contrastive loss of a batch is the sum of its utterances' own; with reference padding it is not."""
    model = model_of().eval()
    sums = {}
    for padding in Padding:
        mask = rebuild.time_mask()
        negatives = sample_negatives(mask, 20, [np.random.default_rng(0)], np.array(rebuild.FRAMES))
        whole = tapt_loss(model, waves(), TaptDraw(mask, negatives), padding=padding)
        rows = np.repeat(np.arange(4), mask.sum(1))
        parts = 0.0
        for row, wave in enumerate(waves()):
            own = mask[row : row + 1, : rebuild.FRAMES[row]]
            shifted = negatives[rows == row] - row * mask.shape[1]
            parts += float(tapt_loss(model, [wave], TaptDraw(own, shifted), padding=padding).contrastive.detach())
        sums[padding] = abs(parts / float(whole.contrastive.detach()) - 1)
    assert sums[Padding.independent] < 1e-5
    assert sums[Padding.reference] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("attention_mask", [True, False])
@pytest.mark.parametrize("frames", list(NegativeFrames))
@pytest.mark.parametrize("padding", list(Padding))
def test_parts_add_up_to_the_batch(padding: Padding, frames: NegativeFrames, attention_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a batch in three parts are those of the batch, diversity included; without the whole's sums they are not."""
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", rebuild.likeliest_softmax)
    model = model_of().train()
    draw = draws(model.config, rebuild.FRAMES, 9, frames)
    longest = max(len(wave) for wave in waves())
    cut = padding is Padding.independent and frames is NegativeFrames.valid and attention_mask

    def trained(cuts: list[slice], *, knowing: bool = True) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        draws = [draw.part(rows, max(rebuild.FRAMES[rows]) if cut else draw.mask.shape[1]) for rows in cuts]
        sums = [code_sums(model, waves()[rows], own.mask, padding=padding, samples=longest) for rows, own in zip(cuts, draws, strict=True)]
        whole = WholeBatch(torch.stack(sums).sum(0), int(draw.mask.sum())) if knowing else None
        loss = 0.0
        for rows, own in zip(cuts, draws, strict=True):
            found = tapt_loss(
                model,
                waves()[rows],
                own,
                padding=padding,
                attention_mask=attention_mask,
                diversity_weight=500.0,
                samples=longest,
                whole=whole,
            )
            torch.autograd.backward(found.loss)
            loss += float(found.loss.detach())
        return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, gradients = trained([slice(0, 4)], knowing=False)
    three = [slice(0, 1), slice(1, 3), slice(3, 4)]
    loss, summed = trained(three)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-5)
    assert abs(trained(three, knowing=False)[0] / expected - 1) > 1e-4


@pytest.mark.slow
def test_perplexities_are_those_of_fairseq() -> None:
    """Of the codes of masked frames, in training with noise: the sums over parts give what fairseq's quantizer computes for the whole."""
    from fairseq.modules.gumbel_vector_quantizer import GumbelVectorQuantizer

    model = model_of().train()
    ours, draw = model.quantizer, draws(model.config, rebuild.FRAMES, 9)
    groups, entries = ours.num_groups, ours.num_vars
    theirs = GumbelVectorQuantizer(ours.weight_proj.in_features, entries, (1, 1, 1), groups, False, groups * 4, True)
    theirs.weight_proj.load_state_dict(ours.weight_proj.state_dict())
    features = run_front_end(model, waves(), Padding.independent)
    expected = theirs(features.normalised[torch.from_numpy(draw.mask)][None])
    counts, sums = torch.zeros(groups, entries), torch.zeros(groups, entries)
    for rows in (slice(0, 1), slice(1, 4)):
        found = tapt_loss(model, waves()[rows], draw.part(rows, max(rebuild.FRAMES[rows])), samples=max(map(len, waves())))
        counts, sums = counts + found.code_counts, sums + found.code_sums.detach()
    masked = int(draw.mask.sum())
    assert counts.sum(1).tolist() == [masked] * groups
    assert 1 < float(expected["code_perplexity"]) < groups * entries
    assert code_perplexity(counts, masked).sum() == pytest.approx(float(expected["code_perplexity"]), rel=1e-5)
    assert code_perplexity(sums, masked).sum() == pytest.approx(float(expected["prob_perplexity"].detach()), rel=1e-4)


def test_everything_is_trained() -> None:
    """Every parameter gets a gradient: convolutions, projection, mask embedding, transformer, quantizer, both projections."""
    model = model_of().train()
    draw = draws(model.config, rebuild.FRAMES, 20)
    result = tapt_loss(model, waves(), draw)
    torch.autograd.backward(result.loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []
    assert float(result.per_frame.detach()) == pytest.approx(float(result.loss.detach()) / int(draw.mask.sum()))


def test_identical_codes_are_no_negatives() -> None:
    """With one entry in each codebook all frames share their codes: nothing is left to be told apart, the loss is 0 and not NaN."""
    model = model_of(num_codevectors_per_group=1).eval()
    draw = draws(model.config, rebuild.FRAMES, 9)
    assert float(tapt_loss(model, waves(), draw).contrastive) == 0


def test_short_clips() -> None:
    """Clips shorter than a mask span, and below one frame, have a finite loss and gradient."""
    model = model_of().train()
    clips = [torch.randn(30), torch.randn(500), torch.randn(800)]
    frames = run_front_end(model, clips, Padding.independent).frames.numpy()
    assert frames.max() < model.config.mask_time_length
    draw = draws(model.config, frames, 5)
    result = tapt_loss(model, clips, draw)
    torch.autograd.backward(result.loss)
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters() if parameter.grad is not None)


def test_diversity() -> None:
    """No share of the codebook is unused when all codes are equally likely; all but one of each group when one is certain."""
    assert float(codebook_diversity(torch.full((2, 8), 5.0), 40)) == pytest.approx(0, abs=1e-5)
    certain = torch.zeros(2, 8)
    certain[:, 3] = 40
    assert float(codebook_diversity(certain, 40)) == pytest.approx(1 - 2 / 16)
