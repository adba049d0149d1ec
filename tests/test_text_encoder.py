"""Text: padding has no part in what the model says, and a dropped text is the same whatever it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from context_parallel_ranks import SCALES, make

from msc.pretrain.diffusion.text_encoder import open_text_encoder


def test_padding_and_the_length_of_a_dropped_text_change_nothing():
    model, x, t, condition, _ = make(next(iter(SCALES.values())), 4, 1)

    def run(text, rows=slice(None)):
        own = replace(condition.map(lambda value: value[rows]), text=text)
        return model(x[rows], t[rows], own)

    texts = [torch.randn(length, 5).to(x) for length in (2, 6)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    together = run(padded)
    for i, text in enumerate(texts):
        torch.testing.assert_close(together[i : i + 1], run(text[None], slice(i, i + 1)))
    assert not torch.allclose(together[0], run(padded.flip(0))[0])
    assert torch.equal(run(None), run(torch.zeros(2, 1, 5).to(x)))
    torch.testing.assert_close(run(None), run(0 * padded))


def test_gradients_do_not_pass_through_padding():
    model, x, t, condition, _ = make(next(iter(SCALES.values())), 4, 1)
    padded = torch.cat([torch.randn(2, 3, 5), torch.zeros(2, 2, 5)], 1).to(x).requires_grad_()
    model(x, t, replace(condition, text=padded)).square().sum().backward()
    assert padded.grad is not None
    assert padded.grad[:, :3].abs().min() > 0
    assert not padded.grad[:, 3:].any()


def save_encoder(folder: Path, kind: str) -> Path:
    """A tiny random text encoder of the kind, with a tokenizer of seven words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<end>": 1, "a": 2, "disc": 3, "and": 4, "bar": 5, "<unk>": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    end = ("<end>", 1)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A <end>", special_tokens=[end])
    marks = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>", "model_max_length": 6}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=7, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        model = transformers.T5EncoderModel(config)
    else:
        config = transformers.CLIPTextConfig(
            vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=6, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = transformers.CLIPTextModel(config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_captions_go_through_a_text_encoder(tmp_path, kind):
    embed = open_text_encoder(str(save_encoder(tmp_path, kind)), device="cpu")
    found = embed("a disc and a bar")
    assert found.shape == (6, 16)
    assert found.dtype == torch.float16
    assert torch.equal(found, embed("a disc and a bar"))
    assert embed("a disc").shape == (3, 16)
    assert not torch.equal(embed("a disc"), embed("a bar"))
    assert embed("a disc and a bar and a disc").shape == (6, 16)
    assert embed("").shape == (1, 16)


def test_a_folder_without_encoder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        open_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not usable as text encoder|need the package transformers"):
        open_text_encoder(str(tmp_path))
