"""SGCD in your own training loop: updates of a Hugging Face model on one group of rollouts, packed, without logits.

python examples/plain_pytorch.py [folder or name of a causal LM]
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sgcd_kernels import CreditConfig, FusedLinearSGCDLoss, check_model, output_head, pack_tokens


def run(prompt, answers, like=None):  # the answers' tokens, packed, each with the state that predicts it
    rows = [torch.tensor(prompt + answer) for answer in answers]
    masks = [torch.tensor([False] * len(prompt) + [True] * len(answer)) for answer in answers]
    ids, generated = pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)  # on the right
    return pack_tokens(model.get_decoder()(input_ids=ids).last_hidden_state, ids, generated, like=like)


torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    model.get_output_embeddings().weight.data.mul_(24)  # a random head gives nearly uniform logits
check_model(model)  # refuses silently wrong heads: quantised, with an adapter, with layers before it
head, optimizer = output_head(model), torch.optim.AdamW(model.parameters(), lr=1e-4)
options = head.options(temperature=1.0)  # bias, softcap and temperature, with the model's own scale in them
bias = options.pop("bias")
config = CreditConfig(gamma=1.0, clip=2.0)
criterion = FusedLinearSGCDLoss(config=config, loss_type="dapo", epsilon_high=0.28, **options)
# From your engine and your verifier: a task's prompt, the siblings' answers, their rewards, and the reference.
prompt, reference = [1, 5, 9, 13], [40, 41, 42, 43]
answers = [[20, 21, 22, 2], [20, 31, 2], [30, 31, 32, 33, 2], [20, 21, 23, 2]]
reward = torch.tensor([1.0, 0.0, 0.0, 1.0])
advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
for step in range(3):
    student = run(prompt, answers)
    with torch.no_grad():
        teacher = run(reference + prompt, answers, like=student)  # the same policy, given the reference
    batch = (student.hidden, head.weight, student.targets, teacher.hidden, advantages, student.cu_seqlens)
    loss, metrics = criterion(*batch, turn_ids=student.turn_ids, bias=bias)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    kl, weight = metrics["credit/mean_divergence"], metrics["credit/mean_weight"]
    print(f"step {step}  loss {loss:.4f}  mean KL {kl:.4g}  mean W {weight:.3f}")
