r"""What fine-tuning and generation in fine-tuning (the paper's Table 6), are worth for retrieval on the embedded world.

    python run_scripts/experiments/seeds.py --cfg-path projects/blip2/pretrain_stage1.yaml --seeds 0 1 2 \
        --out output/stage1
    python run_scripts/experiments/retrieval.py --seeds 0 1 2

Three arms on the test split, each by every seed: stage 1 as it is, fine-tuned by ITC, ITM and ITG, and fine-tuned by
ITC and ITM alone. A seed's fine-tuning starts from that seed's stage 1. Each run has a folder of its own below --out
and is resumed when the command is given again. `--out` gets retrieval.json (all metrics, the command, the commit and
the machine) and retrieval.svg.
"""

from __future__ import annotations

from arms import Arm, Experiment

STAGE1 = "model.pretrained=output/stage1/{seed}"
FINE_TUNED = "projects/blip2/retrieval_ft.yaml"
METRICS = {
    "test/itc/tr_r1": "ITC TR@1",
    "test/itc/ir_r1": "ITC IR@1",
    "test/rerank/tr_r1": "ITM TR@1",
    "test/rerank/ir_r1": "ITM IR@1",
}
ARMS = {
    # With the task of the other two, so that all rank the same candidates.
    "stage1": Arm("stage 1", FINE_TUNED, (STAGE1,)),
    "without_itg": Arm("fine-tuned by ITC and ITM", FINE_TUNED, (STAGE1, "model.itg_weight=0"), trained=True),
    "with_itg": Arm("fine-tuned by ITC, ITM and ITG", FINE_TUNED, (STAGE1,), trained=True),
}
EXPERIMENT = Experiment("retrieval", ARMS, METRICS, "recall")

if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
