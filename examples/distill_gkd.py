"""A divergence as the loss: a small student learns a teacher's full distribution on its own samples, without logits.

This is generalized knowledge distillation (GKD, arXiv 2306.13649) in a loop of your own. In TRL's trainer it is
`with linear_distillation(trainer): trainer.train()` (docs/trl.md).

python examples/distill_gkd.py [student [teacher]]     folders or names of causal LMs with the same vocabulary
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sgcd_kernels import check_model, linear_distill_loss, output_head


def tiny(width, layers):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_attention_heads=4, **sizes))
    made.get_output_embeddings().weight.data.mul_(8)  # a random head gives nearly uniform logits
    return made


torch.manual_seed(0)
names = sys.argv[1:]
student = AutoModelForCausalLM.from_pretrained(names[0], dtype=torch.float32) if names else tiny(32, 1)
teacher = AutoModelForCausalLM.from_pretrained(names[-1], dtype=torch.float32) if names else tiny(64, 2)
for model in (student, teacher):
    check_model(model)  # refuses silently wrong heads: quantised, with an adapter, with layers before it
heads = output_head(student), output_head(teacher)
transforms = [(head.scale, head.softcap) for head in heads]
if transforms[0] != transforms[1]:
    sys.exit(f"scale and softcap are {transforms[0]} for the student, {transforms[1]} for the teacher; needs the same")
teacher.requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5 if names else 1e-2)
PAD = 0
prompts = torch.arange(8 * 4).view(8, 4)  # replace by your prompts, padded on the left
prompts[::2, :2] = PAD
start = prompts.shape[1] - 1  # the state before a token predicts it

for step in range(10):
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": True, "pad_token_id": PAD}
    ids = student.generate(prompts, attention_mask=(prompts != PAD).long(), **options)
    seen = torch.cat([prompts != PAD, torch.ones_like(ids[:, start + 1 :], dtype=torch.bool)], dim=1).long()
    inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    states = student.get_decoder()(**inputs).last_hidden_state[:, start:-1]
    with torch.no_grad():
        taught = teacher.get_decoder()(**inputs).last_hidden_state[:, start:-1]
    # [B, T], a divergence per token: mask, clip or weight them as you like before the mean
    divergence = linear_distill_loss(
        states,
        heads[0].weight,
        taught,
        heads[1].weight,
        teacher_bias=heads[1].options()["bias"],
        **heads[0].options(),
        kind="jsd",
        beta=0.5,
        reduction="none",
    )
    loss = divergence.mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  JSD {loss:.4f}  highest per token {divergence.max():.3f}")
