"""What the picture, fine-tuning and the question in the Q-Former are each worth for VQA on the embedded world.

    python run_scripts/experiments/vqa.py --seeds 0 1 2           # the OPT
    python run_scripts/experiments/vqa_t5.py --seeds 0 1 2        # the T5

Four arms on the test split: blind (the visual prompt of stage 2 is zero), zero-shot (stage 2 as it is), fine-tuned
without and with the question in the Q-Former. The first two have nothing random and are evaluated once; the others are
trained with every seed, from the same two checkpoints. Needs output/pretrain_stage1 and output/pretrain_stage2 (or
pretrain_stage2_t5). Each run has a folder of its own below --out and is resumed when the command is given again.
`--out` gets vqa.json (all metrics, the command, the commit and the machine) and vqa.svg. Printed last are the types of
question: the worst seed of each arm beside the majority's answer.
"""

from __future__ import annotations

from arms import Arm, Experiment, Results
from majority import majority

from lavis_lite.datasets.builders import build_dataset_from_preset

DATASET = "shapes_vqa"
METRICS = {
    "test/accuracy": "all",
    "test/answer_type/yes_no": "yes/no",
    "test/answer_type/number": "number",
    "test/answer_type/other": "other",
}
UNCONDITIONED = ("model.qformer_text_input=false", "model.qformer_text_from=null")
TYPE = "test/question_type/"


def experiment(ending: str = "") -> Experiment:
    """The four arms of one language model, whose project files have this ending."""
    zero_shot = f"projects/blip2/vqa_zeroshot{ending}.yaml"
    fine_tuned = f"projects/blip2/vqa_ft{ending}.yaml"
    arms = {
        "blind": Arm("blind", f"run_scripts/experiments/vqa_blind{ending}.yaml"),
        "zero_shot": Arm("zero-shot", zero_shot),
        "unconditioned": Arm("fine-tuned", fine_tuned, UNCONDITIONED, trained=True),
        "conditioned": Arm("fine-tuned, question in the Q-Former", fine_tuned, trained=True),
    }
    return Experiment(f"vqa{ending}", arms, METRICS, "accuracy")


def types_table(results: Results, guessed: dict[str, float]) -> list[str]:
    """The lowest accuracy of each type over an arm's seeds, and that of guessing."""
    kinds = [kind for kind in guessed if kind != "all"]
    lines = ["".join([f"{'lowest seed':<16}", *(f"{name:>15}" for name in results), f"{'majority':>15}"])]
    for kind in kinds:
        lowest = [min(run[TYPE + kind] for run in runs.values()) for runs in results.values()]
        lines.append(f"{kind:<16}" + "".join(f"{value:15.3f}" for value in [*lowest, guessed[kind]]))
    return lines


def main(own: Experiment, description: str | None) -> None:
    """The command, for one language model."""
    results = own.main(description)
    print("\n".join(types_table(results, majority(build_dataset_from_preset(DATASET)))))


if __name__ == "__main__":
    main(experiment(), __doc__)
