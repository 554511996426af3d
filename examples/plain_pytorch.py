"""SGCD in a loop of your own: one update of a Hugging Face model on one group of rollouts, packed, no logits.

python examples/plain_pytorch.py [folder or name of a causal LM]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sgcd_kernels import CreditConfig, FusedLinearSGCDLoss


def states(model, prompt, answers):
    """Hidden states [N, H] that predict the answers' tokens, packed; rows do not see each other."""
    found = []
    for answer in answers:
        ids = torch.tensor([prompt + answer])
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        found.append(hidden[len(prompt) - 1 : -1])  # the state before a token predicts it
    return torch.cat(found)


torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
credit = (
    CreditConfig(gamma=1.0, clip=2.0) if len(sys.argv) > 1 else CreditConfig(d_floor=1e-3)
)  # random ones hardly differ
criterion = FusedLinearSGCDLoss(config=credit, loss_type="dapo", epsilon_high=0.28)

# Your engine and your verifier give these: a task's prompt, what siblings answered, who succeeded, what they learned.
prompt, reference = [1, 5, 9, 13], [40, 41, 42, 43]
answers = [[20, 21, 22, 2], [20, 31, 2], [30, 31, 32, 33, 2], [20, 21, 23, 2]]
reward = torch.tensor([1.0, 0.0, 0.0, 1.0])

advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
lengths = torch.tensor([len(answer) for answer in answers])
cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
targets = torch.tensor([token for answer in answers for token in answer])
turn_ids = torch.zeros_like(targets)  # the turn of each token; here every answer is one
for step in range(3):
    with torch.no_grad():
        teacher = states(model, reference + prompt, answers)  # the same policy, shown the reference
    hidden = states(model, prompt, answers)
    weight = model.get_output_embeddings().weight
    loss, metrics = criterion(hidden, weight, targets, teacher, advantages, cu_seqlens, turn_ids=turn_ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss:.4f}  mean KL {metrics['credit/mean_divergence']:.2g}  "
          f"mean W {metrics['credit/mean_weight']:.3f}")  # fmt: skip
