"""The head with a projector is that of transformers' classifiers, on the last state and on the weighted sum of layers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from ser_core.models.classifier import ClassifierAdaptors, EmotionClassifier
from ser_core.models.front_end import project_independent
from tests.ser_core.models import rebuild
from tests.ser_core.models.test_backbones import waves


@pytest.mark.parametrize("layer_sum", [False, True])
def test_a_projector_head_is_that_of_transformers(layer_sum: bool) -> None:
    """`Wav2Vec2ForSequenceClassification` of each utterance alone, from our classifier on a ragged batch; what trains is the head."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(**rebuild.BACKBONE, num_labels=4, classifier_proj_size=12, use_weighted_layer_sum=layer_sum)
    theirs = Wav2Vec2ForSequenceClassification(config).eval()
    rebuild.fill(dict(theirs.named_parameters()), seed=1)
    with torch.no_grad():
        expected = torch.cat([theirs(wave[None]).logits for wave in waves()])
    ours = EmotionClassifier(theirs.wav2vec2, 4, adaptors=ClassifierAdaptors(layer_sum=layer_sum), projector=12).eval()
    assert ours.projector is not None
    ours.projector.load_state_dict(theirs.projector.state_dict())
    ours.head.load_state_dict(theirs.classifier.state_dict())
    if ours.layer_sum is not None:
        ours.layer_sum.weights.data.copy_(theirs.layer_weights)
    trained = {name for name, each in ours.named_parameters() if each.requires_grad}
    assert trained == {"head.weight", "head.bias", "projector.weight", "projector.bias", *(("layer_sum.weights",) if layer_sum else ())}
    with torch.no_grad():
        features = project_independent(ours.wav2vec2, waves())
        frames = torch.tensor([len(each) for each in features])
        found = ours(pad_sequence(features, batch_first=True, padding_value=3.0), frames)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
