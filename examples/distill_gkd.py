"""The divergence as a loss: a small student learns a teacher's whole distribution on its own samples, without logits.

This is generalized knowledge distillation (GKD, arXiv 2306.13649) in a loop of your own. In TRL's trainer it is
`with linear_distillation(trainer): trainer.train()` (docs/trl.md).

python examples/distill_gkd.py [student [teacher]]     folders or names of causal LMs with one vocabulary
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sgcd_kernels import linear_distill_loss


def tiny(width, layers):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_attention_heads=4, **sizes))
    made.get_output_embeddings().weight.data.mul_(8)  # random ones hardly prefer a word to another
    return made


torch.manual_seed(0)
names = sys.argv[1:]
student = AutoModelForCausalLM.from_pretrained(names[0], dtype=torch.float32) if names else tiny(32, 1)
teacher = AutoModelForCausalLM.from_pretrained(names[-1], dtype=torch.float32) if names else tiny(64, 2)
teacher.requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5 if names else 1e-2)
prompts = torch.arange(8 * 4).view(8, 4)  # yours, padded on the left
start = prompts.shape[1] - 1  # the state before a token predicts it

for step in range(10):
    ids = student.generate(prompts, max_new_tokens=16, min_new_tokens=16, do_sample=True, pad_token_id=0)
    states = student.get_decoder()(input_ids=ids).last_hidden_state[:, start:-1]
    with torch.no_grad():
        taught = teacher.get_decoder()(input_ids=ids).last_hidden_state[:, start:-1]
    heads = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    # [B, T], one divergence a token: mask, clip or weigh them as you like before the mean
    divergence = linear_distill_loss(states, heads[0], taught, heads[1], kind="jsd", beta=0.5, reduction="none")
    loss = divergence.mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  JSD {loss:.4f}  highest of a token {divergence.max():.3f}")
