"""From padded batches to packed rows: the shift by one, any padding, and a teacher that scores the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sgcd_kernels import linear_divergence, linear_logprob, pack_tokens

V = 60


def batch(sequences: list[list[tuple[list[int], bool]]], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pad sequences of (ids, generated) parts on one side: ids, generated and attention mask, each [B, T]."""
    rows = [[(token, own) for ids, own in parts for token in ids] for parts in sequences]
    width = max(map(len, rows))
    pad = [[(0, False)] * (width - len(row)) for row in rows]
    whole = [p + row if side == "left" else row + p for p, row in zip(pad, rows)]
    real = [[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p) for p, r in zip(pad, rows)]
    return (
        torch.tensor([[token for token, _ in row] for row in whole]),
        torch.tensor([[own for _, own in row] for row in whole]),
        torch.tensor(real),
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    made = LlamaForCausalLM(config).eval()
    made.lm_head.weight.data.mul_(30)
    return made


CHATS = [
    [([5, 6, 7], False), ([11, 12, 2], True), ([20, 21], False), ([13, 2], True)],
    [([5], False), ([14, 2], True)],
    [([5, 6], False), ([15, 16, 17, 2], True), ([22], False)],
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_token_is_scored_with_the_state_that_predicts_it(model: LlamaForCausalLM, side: str) -> None:
    ids, generated, attention = batch(CHATS, side)
    with torch.no_grad():
        hidden = model.model(ids, attention_mask=attention).last_hidden_state
        packed = pack_tokens(hidden, ids, generated)
        logp = linear_logprob(packed.hidden, model.lm_head.weight, packed.targets).logp
        expected = []
        for parts in CHATS:
            flat = torch.tensor([[token for part, _ in parts for token in part]])
            own = torch.tensor([o for part, o in parts for _ in part])
            full = model(flat).logits[0].log_softmax(-1)[:-1].gather(1, flat[0, 1:, None])[:, 0]
            expected.append(full[own[1:]])
    torch.testing.assert_close(logp, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert packed.targets.tolist() == [11, 12, 2, 13, 2, 14, 2, 15, 16, 17, 2]
    assert packed.cu_seqlens.tolist() == [0, 5, 7, 11]
    assert packed.turn_ids.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]


def test_a_teacher_with_another_prompt_scores_the_same_tokens(model: LlamaForCausalLM) -> None:
    ids, generated, attention = batch(CHATS, "left")
    more = [[([30, 31, 32, 33], False), *parts] for parts in CHATS]
    longer, longer_generated, longer_attention = batch(more, "left")
    with torch.no_grad():
        student = pack_tokens(model.model(ids, attention_mask=attention).last_hidden_state, ids, generated)
        states = model.model(longer, attention_mask=longer_attention).last_hidden_state
        teacher = pack_tokens(states, longer, longer_generated, like=student)
        same = pack_tokens(model.model(ids, attention_mask=attention).last_hidden_state, ids, generated, like=student)
    weight = model.lm_head.weight.detach()
    assert (linear_divergence(student.hidden, weight, student.targets, same.hidden).reverse_kl == 0).all()
    assert (linear_divergence(student.hidden, weight, student.targets, teacher.hidden).reverse_kl > 0).all()


def test_gradients_reach_the_predicting_states_alone() -> None:
    ids, generated, _ = batch(CHATS, "right")
    hidden = torch.randn(*ids.shape, 4, requires_grad=True)
    pack_tokens(hidden, ids, generated).hidden.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[:, :-1, 0] == 1, generated[:, 1:])
    assert not hidden.grad[:, -1].any()


def test_masks_of_numbers_and_strided_inputs_and_no_tokens() -> None:
    ids, generated, _ = batch(CHATS, "right")
    hidden = torch.randn(4, ids.shape[1], ids.shape[0]).permute(2, 1, 0)
    expected = pack_tokens(hidden.contiguous(), ids, generated)
    for mask in (generated.int(), generated.float(), generated.t().contiguous().t()):
        for one, other in zip(pack_tokens(hidden, ids.int(), mask, like=expected), expected, strict=True):
            assert torch.equal(one, other)
    none = pack_tokens(hidden, ids, torch.zeros_like(generated))
    assert none.hidden.shape == (0, 4) and none.cu_seqlens.tolist() == [0, 0, 0, 0]
    assert pack_tokens(torch.zeros(0, 0, 4), ids[:0, :0], generated[:0, :0]).cu_seqlens.tolist() == [0]


def test_what_does_not_fit_is_named() -> None:
    ids, generated, _ = batch(CHATS, "right")
    hidden = torch.randn(*ids.shape, 4)
    student = pack_tokens(hidden, ids, generated)
    first, other, fewer, split = generated.clone(), ids.clone(), generated.clone(), generated.clone()
    first[1, 0] = True
    other[0, 4] = 50
    fewer[2, 2] = False
    split[1, 2], split[1, 3] = False, True
    later = ids.clone()
    later[1, 3] = ids[1, 2]
    for arguments, message in (
        ((hidden[0], ids, generated), r"hidden has shape \[10, 4\], needs \[B, T, H\]"),
        ((hidden, ids[:, 1:], generated), "input_ids has shape"),
        ((hidden, ids, generated[:2]), "generated has shape"),
        ((hidden, ids.float(), generated), "input_ids is torch.float32"),
        ((hidden, ids, generated.int() * 2), "generated has values other than 0 and 1"),
        ((hidden, ids, first), "true at the first token of sequence 1"),
        ((hidden, ids.tolist(), generated), "input_ids is .* needs a tensor"),
        ((hidden[:2], ids[:2], generated[:2]), "marks 2 sequences, like has 3"),
        ((hidden, other, generated), "input_ids is 50 at generated token 1 of sequence 0, like has 12"),
        ((hidden, ids, fewer), "marks 3 tokens in sequence 2, like has 4"),
        ((hidden, later, split), "the turn is 1 at generated token 1 of sequence 1, like has 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_tokens(*arguments, like=student)
