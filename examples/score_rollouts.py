"""A heat map of credit in the terminal: one response, scored under two prompts, with and without a reference.

python examples/score_rollouts.py
python examples/score_rollouts.py --model FOLDER --student PROMPT --teacher PROMPT --response OWN [OBSERVED OWN ...]

Without arguments it uses the tiny policy that ships with the trainer, and a rollout in which it deletes a file without
checking who still needs it. d = KL(student || teacher) and H, the teacher's entropy, are over the full vocabulary, in
nats; W multiplies the token's advantage.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgcd_kernels import CreditConfig, check_model, credit_weights, linear_divergence, output_head

TINY = Path(__file__).resolve().parents[1] / "trainer" / "assets" / "workday-tiny"
REFERENCE = (
    "<ref> steps files_find files_info notes_read answer . check files_info notes_read . "
    "avoid files_delete notes_write todo_find . deviate after files_info . <end> "
)
TASK = "<user> delete the census file <end> <assistant>"
RESPONSE = [
    "<call> files_find topic census <end>",
    "<tool> file f05 <end> <assistant>",
    "well <call> files_delete file f05 <end>",
    "<tool> ok yes <end> <assistant>",
    "so <call> notes_write topic census text deleted <end>",
    "<tool> ok yes <end> <assistant>",
    "done <end>",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TINY, help="folder or name of a Hugging Face causal LM")
    parser.add_argument("--student", default=TASK, help="the prompt that the policy saw")
    parser.add_argument("--teacher", default=REFERENCE + TASK, help="the prompt with the reference")
    parser.add_argument(
        "--response", nargs="+", default=RESPONSE, help="text of the policy, of a tool, of the policy, ..."
    )
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--clip", type=float, default=2.0, help="the largest W")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return parser.parse_args()


@torch.no_grad()
def states(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[R, H], the states that predict the response; the op applies the head."""
    return model.get_decoder()(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]


def shade(text: str, weight: float, clip: float, counts: bool) -> str:
    """White for W = 1, red for W = clip, grey for tokens that the policy did not generate."""
    if not counts:
        return f"\033[90m{text}\033[0m"
    heat = (weight - 1) / max(clip - 1, 1e-9)
    return f"\033[30;48;2;255;{round(255 - 175 * heat)};{round(255 - 200 * heat)}m{text}\033[0m"


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    try:
        check_model(model)
    except ValueError as error:
        sys.exit(str(error))
    student, teacher, *parts = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (args.student, args.teacher, *args.response)
    )
    if not all((student, teacher, *parts)):
        sys.exit("--student, --teacher and every part of --response need at least one token")
    ids = torch.tensor([token for part in parts for token in part])
    part_of = torch.tensor([i for i, part in enumerate(parts) for _ in part])
    own = part_of % 2 == 0  # every other part was observed

    head = output_head(model)
    pair = [states(model, prompt, ids.tolist()) for prompt in (student, teacher)]
    stats = linear_divergence(pair[0], head.weight, ids, pair[1], **head.options())
    config = CreditConfig(gamma=args.gamma, clip=args.clip)
    bounds = torch.tensor([0, len(ids)])
    credit = credit_weights(
        stats.reverse_kl, stats.teacher_entropy, bounds, mask=own, turn_ids=part_of, config=config
    )  # a turn is a part

    words = [tokenizer.decode([token]) for token in ids]
    columns = (stats.reverse_kl, stats.teacher_entropy, credit.weights)
    rows = list(zip(words, *(x.tolist() for x in columns), credit.span_ids.tolist(), own.tolist(), strict=True))
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if color:
        print(" ".join(shade(word.replace("\n", "\\n"), w, args.clip, mine) for word, _, _, w, _, mine in rows) + "\n")
    print(f"{'token':20} {'d':>8} {'H':>8} {'W':>6}  span")
    for word, d, h, w, span, mine in rows:
        mark = "" if span < 0 else f"{span:<3}" + "#" * round(10 * (w - 1) / max(args.clip - 1, 1e-9))
        name = f"{word!r:20}"
        print(shade(name, w, args.clip, mine) if color else name, f"{d:8.4f} {h:8.4f} {w:6.3f}  {mark}".rstrip())
    found = [w for *_, w, _, mine in rows if mine]
    print(f"mean W {sum(found) / len(found):.3f} over {len(found)} tokens of the policy; grey tokens were observed")


if __name__ == "__main__":
    main()
