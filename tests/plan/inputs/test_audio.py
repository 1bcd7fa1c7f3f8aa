"""Audio: Whisper's one length, and the frames of waveforms held against the model's own count."""

import pytest
from tiny_configs import model_directory

from floatline.errors import ConfigError, ModelError
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source


def test_whisper_hears_thirty_seconds():
    source = load_source("whisper-tiny", Shape(batch=2))
    batch = source.work.build_batch()
    assert batch["input_features"].shape == (2, 80, 3000) and batch["labels"].shape == (2, 448)
    assert load_source("whisper-large-v3").work.build_batch()["input_features"].shape == (1, 128, 3000)
    assert load_source("whisper-tiny", Shape(seconds=5)).notes == ("samples of 5 s are padded to 30 s",)


def test_whispers_limits():
    with pytest.raises(ConfigError, match="seconds=31 is over the 30 s that whisper-tiny hears at once"):
        load_source("whisper-tiny", Shape(seconds=31))
    with pytest.raises(ConfigError, match="target=449 is over the 448 positions"):
        load_source("whisper-tiny", Shape(target=449))


def test_seq_and_target_both_count_whispers_transcript():
    assert load_source("whisper-tiny", Shape(seq=20)).work.build_batch()["labels"].shape == (1, 20)
    with pytest.raises(ConfigError, match="seq=20 and target=30 both count the transcript"):
        load_source("whisper-tiny", Shape(seq=20, target=30))


@pytest.mark.parametrize("seconds", [0.05, 0.1, 1.0])
def test_frames_are_those_of_the_model(tmp_path, seconds):
    source = load_source(model_directory(tmp_path, "wav2vec2"), Shape(seconds=seconds))
    model, batch = source.work.build_model().eval(), source.work.build_batch()
    assert batch["input_values"].shape == (1, round(16000 * seconds))
    assert model(**batch).logits.shape[1] == source.facts["frames"]


def test_ctc_needs_a_frame_for_each_label():
    with pytest.raises(ConfigError, match="seq=50 labels do not fit the 49 frames of 1 s"):
        load_source("wav2vec2-base", Shape(seconds=1, seq=50))
    with pytest.raises(ConfigError, match="not one frame"):
        load_source("wav2vec2-base", Shape(seconds=0.001))


def test_a_classifier_takes_no_transcript(tmp_path):
    with pytest.raises(ConfigError, match="hubert takes no seq"):
        load_source(model_directory(tmp_path, "hubert"), Shape(seq=4))


def test_other_readers_of_sound_are_refused(tmp_path):
    import json

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "wav2vec2-bert", "architectures": ["Wav2Vec2BertForCTC"]})
    )
    with pytest.raises(ModelError, match="reads audio is not known here") as caught:
        load_source(str(tmp_path / "config.json"))
    assert "module:function" in caught.value.hint
