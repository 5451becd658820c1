"""The language model: padding changes nothing, the loss counts words, and it learns in a plain loop."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from shoal.jobs import find
from shoal.jobs.language.grammar import PAD, STOP
from shoal.jobs.language.text_transformer import IGNORED, Transformer, padded, word_loss


def test_padded_rows() -> None:
    words, targets = padded(100, seed=5)
    assert words.shape == targets.shape == (100, 31)
    assert torch.equal(words == PAD, targets == IGNORED)
    lengths = (targets != IGNORED).sum(dim=1)
    assert len(set(lengths.tolist())) > 5
    for row, length in enumerate(lengths.tolist()):
        assert targets[row, length - 1] == STOP
        assert torch.equal(targets[row, : length - 1], words[row, 1:length])


def test_loss_is_a_sum_over_words_and_their_number() -> None:
    words, targets = padded(8, seed=5)
    output = torch.randn(*words.shape, 2840)
    total, weight = word_loss(output, targets)
    rows = [
        F.cross_entropy(o[t != IGNORED], t[t != IGNORED], reduction="sum") for o, t in zip(output, targets, strict=True)
    ]
    assert weight.item() == sum(int((t != IGNORED).sum()) for t in targets)
    assert torch.allclose(total, torch.stack(rows).sum())


def test_padding_and_later_words_do_not_change_a_prediction() -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    words = torch.randint(4, 2840, (2, 12))
    changed = words.clone()
    changed[:, 7:] = PAD
    with torch.no_grad():
        assert torch.allclose(model(words)[:, :7], model(changed)[:, :7], atol=1e-5)
        assert not torch.allclose(model(words)[:, 7:], model(changed)[:, 7:], atol=1e-5)


def test_embeddings_are_tied() -> None:
    model = Transformer()
    assert model.head.weight is model.words.weight
    assert "head.weight" in model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 764_416


def test_learns() -> None:
    job = find("text-transformer").job
    torch.manual_seed(0)
    words, targets = padded(160, seed=1)
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    means = []
    for step in range(10):
        rows = slice(16 * step, 16 * (step + 1))
        optimizer.zero_grad()
        total, weight = job.loss(model(words[rows]), targets[rows])
        (total / weight).backward()
        optimizer.step()
        means.append((total / weight).item())
    assert 7.8 < means[0] < 8.2  # ln 2840 = 7.95: it knows nothing yet
    assert means[-1] < 7.0
