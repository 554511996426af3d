"""SGCD in TRL: a reference is written from the siblings' outcomes, and decides which tokens get the advantage.

python examples/trl_sgcd.py [folder or name of a causal LM]
"""

import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sgcd_kernels.integrations.trl import SGCDConfig, SGCDTrainer, Siblings

if len(sys.argv) > 1:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
else:
    words = ["<pad>", "</s>", "<unk>", "#", "Reference", "say", "right:", "wrong:", *(f"w{i}" for i in range(24))]
    spelt = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spelt.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelt, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
    model.get_output_embeddings().weight.data.mul_(8)  # a random head gives nearly uniform logits


def even(completions: list[str], **_: object) -> list[float]:
    """Your verifier: here the first token must be an even number."""
    firsts = [(text.split() or ["w1"])[0] for text in completions]
    return [float(first[1:].isdigit() and int(first[1:]) % 2 == 0) for first in firsts]


def what_separates(group: Siblings) -> str | None:
    """Your reference writer: here a successful and a failed answer of the siblings."""
    right = [text for text, reward in zip(group.completions, group.rewards) if reward == 1]
    wrong = [text for text, reward in zip(group.completions, group.rewards) if reward == 0]
    return f"right: {right[0]} wrong: {wrong[0]}" if right and wrong else None


trainer = SGCDTrainer(
    model,
    even,
    SGCDConfig(
        "runs/trl_sgcd",
        gamma=1.0,
        clip=2.0,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        learning_rate=1e-3,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
    ),
    Dataset.from_list([{"prompt": f"say w{i}"} for i in range(16)]),
    processing_class=tokenizer,
    reference_func=what_separates,
)
trainer.train()
for log in trainer.state.log_history[:-1]:
    print(f"step {log['step']}  reward {log['reward']:.2f}  referenced {log['credit/frac_referenced']:.2f}  "
          f"mean KL {log['credit/mean_divergence']:.2g}  mean W {log['credit/mean_weight']:.3f}")  # fmt: skip
