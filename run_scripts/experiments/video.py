"""What the frames of a clip are worth on the embedded world, by type of question.

    python run_scripts/experiments/video.py --seeds 0 1 2

Three arms are trained as projects/blip2/video_ft.yaml says, from the same two checkpoints: four frames joined one after
the other, four frames averaged (which forgets their order), and one frame, the middle one. Printed last are the
accuracies of the training answers' majority for each form of question. Direction, places in time and order can't be
told from the middle frame; the colour of an object, for comparison, can. Needs output/pretrain_stage1 and
output/pretrain_stage2. Each run has a folder of its own below --out and is resumed when the command is given again.
`--out` gets video.json (all metrics, the command, the commit and the machine) and video.svg.
"""

from __future__ import annotations

from arms import Arm, Experiment
from majority import majority

from lavis_lite.datasets.builders import build_dataset_from_preset
from lavis_lite.worlds.shapes.clip_texts import CLIP_TYPES

CONFIG = "projects/blip2/video_ft.yaml"
DATASET = "shapes_video_vqa"
VIS = f"datasets.{DATASET}.vis_processor"
AVERAGED = ("model.video.join=mean", "model.video.frame_embeddings=0")
MIDDLE = (
    "model.video.frame_embeddings=0",
    f"{VIS}.train.num_frames=1",
    f"{VIS}.train.sampling=uniform",
    f"{VIS}.eval.num_frames=1",
)
ARMS = {
    "clip": Arm("four frames", CONFIG, trained=True),
    "mean": Arm("four frames, averaged", CONFIG, AVERAGED, trained=True),
    "frame": Arm("the middle frame", CONFIG, MIDDLE, trained=True),
}
METRICS = {"test/accuracy": "all", **{f"test/question_type/{kind}": kind for kind in CLIP_TYPES}}
EXPERIMENT = Experiment("video", ARMS, METRICS, "accuracy")


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
    guessed = majority(build_dataset_from_preset(DATASET))
    print("the majority's accuracy:", ", ".join(f"{kind} {value:.3f}" for kind, value in guessed.items()))
