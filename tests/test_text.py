"""Text: padding has no part in what the model says, and a dropped text is the same whatever it was."""

import torch
from sharded import SCALES, make

from msc.pretrain.timeline import WholeVideo


def test_padding_and_the_length_of_a_dropped_text_change_nothing():
    model, x, t, _, labels, _ = make(next(iter(SCALES.values())), 4, 1)
    texts = [torch.randn(length, 5).to(x) for length in (2, 6)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    together = model(x, t, padded, labels, WholeVideo())
    for i, text in enumerate(texts):
        alone = model(x[i : i + 1], t[i : i + 1], text[None], labels[i : i + 1], WholeVideo())
        torch.testing.assert_close(together[i : i + 1], alone)
    assert not torch.allclose(together[0], model(x, t, padded.flip(0), labels, WholeVideo())[0])
    assert torch.equal(model(x, t, None, labels), model(x, t, torch.zeros(2, 1, 5).to(x), labels))
    torch.testing.assert_close(model(x, t, None, labels), model(x, t, 0 * padded, labels))


def test_gradients_do_not_pass_through_padding():
    model, x, t, _, labels, _ = make(next(iter(SCALES.values())), 4, 1)
    padded = torch.cat([torch.randn(2, 3, 5), torch.zeros(2, 2, 5)], 1).to(x).requires_grad_()
    model(x, t, padded, labels).square().sum().backward()
    assert padded.grad is not None
    assert padded.grad[:, :3].abs().min() > 0
    assert not padded.grad[:, 3:].any()
