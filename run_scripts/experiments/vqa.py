"""What the picture, fine-tuning and the question in the Q-Former are each worth for VQA on the embedded world.

    python run_scripts/experiments/vqa.py --seeds 0 1 2

Four arms on the test split: blind (the visual prompt of stage 2 is zero), zero-shot (stage 2 as it is), fine-tuned
without and with the question in the Q-Former. The first two have nothing random and are evaluated once; the others are
trained with every seed, from the same two checkpoints. Needs output/pretrain_stage1 and output/pretrain_stage2. Each
run has a folder of its own below --out and is resumed when the command is given again. `--out` gets vqa.json (all
metrics, the command, the commit and the machine) and vqa.svg.
"""

from __future__ import annotations

from arms import Arm, Experiment

ZERO_SHOT = "projects/blip2/vqa_zeroshot.yaml"
FINE_TUNED = "projects/blip2/vqa_ft.yaml"
BLIND = "run_scripts/experiments/vqa_blind.yaml"
METRICS = {
    "test/accuracy": "all",
    "test/answer_type/yes_no": "yes/no",
    "test/answer_type/number": "number",
    "test/answer_type/other": "other",
}
ARMS = {
    "blind": Arm("blind", BLIND),
    "zero_shot": Arm("zero-shot", ZERO_SHOT),
    "unconditioned": Arm(
        "fine-tuned",
        FINE_TUNED,
        ("model.qformer_text_input=false", "model.qformer_text_from=null"),
        trained=True,
    ),
    "conditioned": Arm("fine-tuned, question in the Q-Former", FINE_TUNED, trained=True),
}

EXPERIMENT = Experiment("vqa", ARMS, METRICS, "accuracy")

if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
